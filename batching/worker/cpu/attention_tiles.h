// The three inner steps of a tile of query rows against a chunk of keys: scores, softmax, values.
//
// Every element of a result is accumulated in an order that depends on neither the number of rows
// in the tile nor on its neighbours; that is what makes a token's bits independent of the batch.
#pragma once

#include "simd.h"

namespace slipstream {

constexpr int CHUNK = 128;  // keys per softmax update; chunks start at multiples of CHUNK

// Where a chunk's keys and values lie. Entry i of `keys` is vector i of sixteen keys: unit u of
// key k is keys[k / 16][u * key_stride + k % 16]. Entry j of `values` is row j, PER_UNIT consecutive
// tokens interleaved: its dimension i is values[j][i / 16 * value_stride + i % 16].
struct Chunk {
  int first;  // position of its first key
  int begin;  // keys [begin, end) relative to first are visible to some row; begin is even
  int end;
  int64_t key_stride, value_stride;
  const Unit* keys[CHUNK / LANES];
  const Unit* values[CHUNK];
};

// From products to the exponents of two whose softmax it is: x * scale, or with a cap tanh(x * inner) *
// scale. The scale, which is positive, carries log2 e, the inner one twice.
struct Scoring {
  float scale, inner;  // inner 0: no cap

  Scoring(float scale, float softcap)
      : scale(LOG2_E * (softcap > 0 ? softcap : scale)),
        inner(softcap > 0 ? 2 * LOG2_E * scale / softcap : 0.0f) {}
};

// Online softmax (Milakov and Gimelshein 2018) of one query row, in powers of two.
struct RowState {
  float max = NEG_INF;
  float sum = 0;
};

template <class T, int ROWS, int VECS>
void score_block(const Unit* query, int units, const Unit* const* keys, int64_t key_stride,
                 float* scores) {
  Vec acc[ROWS][VECS] = {};
  for (int u = 0; u < units; ++u) {
    Int key[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) key[v] = load_units(keys[v] + u * key_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Int q = splat_unit(query[r * units + u]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) acc[r][v] = dot_add<T>(q, key[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) store(scores + r * CHUNK + v * LANES, acc[r][v]);
}

// Calls f(row, rows, vector, vectors) with the counts as constants, over all register tiles of
// `rows` x `vecs`.
template <class F>
SLIPSTREAM_INLINE void for_each_block(int rows, int vecs, F&& f) {
  const auto walk = [&](auto most_rows, auto most_vecs) __attribute__((always_inline)) {
    for (int v = 0; v < vecs; v += most_vecs)
      with_constant<most_vecs>(vecs - v, [&](auto v_count) __attribute__((always_inline)) {
        for (int r = 0; r < rows; r += most_rows)
          with_constant<most_rows>(rows - r, [&](auto r_count) __attribute__((always_inline)) {
            f(r, r_count, v, v_count);
          });
      });
  };
  if (rows <= FEW_ROWS)
    walk(std::integral_constant<int, FEW_ROWS>{}, std::integral_constant<int, WIDE_VECS>{});
  else
    walk(std::integral_constant<int, TILE_ROWS>{}, std::integral_constant<int, TILE_VECS>{});
}

// scores[rows][CHUNK] = query[rows][units] . keys, for the vectors that hold keys [begin, end).
template <class T>
void compute_scores(const Unit* query, int rows, int units, const Chunk& chunk, float* scores) {
  const int from = chunk.begin / LANES, vecs = (chunk.end + LANES - 1) / LANES - from;
  for_each_block(rows, vecs, [&](int r, auto r_count, int v, auto v_count) {
    score_block<T, r_count.value, v_count.value>(query + r * units, units, chunk.keys + from + v,
                                                 chunk.key_stride,
                                                 scores + r * CHUNK + (from + v) * LANES);
  });
}

// One row's softmax update. Of the chunk's keys this row sees [first, last). Turns its scores into
// weights (zero where unseen, over the whole steps of 32 keys that hold [begin, end)) and returns the
// factor by which what was accumulated before must shrink.
template <class T>
float update_row(const Scoring& how, float* scores, int first, int last, const Chunk& chunk,
                 RowState& state, T* weights) {
  constexpr int STEP = 2 * LANES;
  const int from = chunk.begin / STEP * STEP, lower = first / LANES * LANES;
  const int to = (chunk.end + STEP - 1) / STEP * STEP;
  Vec top = splat(NEG_INF);
  for (int i = lower; i < last; i += LANES) {
    Vec x = load(scores + i);
    const bool partly = i < first || i + LANES > last;
    if (how.inner > 0) x = hyperbolic_tangent(x * how.inner);
    if (partly) {
      const Int lane = lane_index() + i;
      x = (lane >= first) & (lane < last) ? x : splat(NEG_INF);
    }
    if (partly || how.inner > 0) store(scores + i, x);
    top = maximum(top, x);
  }
  const float highest = max_lanes(top) * how.scale;
  const float max = highest > state.max ? highest : state.max;
  Vec total{};
  int i = from;
  for (; i < lower; i += LANES) store_as(weights + i, Vec{});
  for (; i < last; i += LANES) {
    const Vec weight = power_of_two(multiply_add(load(scores + i), splat(how.scale), splat(-max)));
    total += weight;
    store_as(weights + i, weight);
  }
  for (; i < to; i += LANES) store_as(weights + i, Vec{});
  const float shrink = state.max == NEG_INF ? 0.0f : power_of_two(state.max - max);
  state.sum = state.sum * shrink + sum_lanes(total);
  state.max = max;
  return shrink;
}

template <class T, int ROWS, int VECS>
void value_block(const Unit* weights, const Unit* const* values, int64_t first, int64_t stride,
                 int count, bool half_row, const float* shrink, int columns, float* output) {
  constexpr int STRIDE = CHUNK / PER_UNIT<T>;
  Vec acc[ROWS][VECS] = {};
  const auto add_row = [&](int j, Int mask) __attribute__((always_inline)) {
    Int value[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) value[v] = load_units(values[j] + first + v * stride) & mask;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Int w = splat_unit(weights[r * STRIDE + j]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) acc[r][v] = dot_add<T>(w, value[v], acc[r][v]);
    }
  };
  for (int j = 0; j < count; ++j) add_row(j, Int{} - 1);
  // A pair whose second token is not written yet: its weight is zero, its value may be anything.
  if (half_row) add_row(count, Int{} + 0xffff);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) {
      float* out = output + r * columns + v * LANES;
      store(out, multiply_add(load(out), splat(shrink[r]), acc[r][v]));
    }
  }
}

// output[rows][columns] = output * shrink + weights[rows][CHUNK] . values over keys [begin, end).
template <class T>
void accumulate_values(const T* weights, int rows, const Chunk& chunk, const float* shrink,
                       int columns, float* output) {
  constexpr int STRIDE = CHUNK / PER_UNIT<T>;
  const int skip = chunk.begin / PER_UNIT<T>, count = chunk.end / PER_UNIT<T> - skip;
  const bool half_row = chunk.end % PER_UNIT<T> != 0;
  const Unit* packed = reinterpret_cast<const Unit*>(weights) + skip;
  for_each_block(rows, columns / LANES, [&](int r, auto r_count, int v, auto v_count) {
    value_block<T, r_count.value, v_count.value>(packed + r * STRIDE, chunk.values + skip,
                                                 v * chunk.value_stride, chunk.value_stride, count,
                                                 half_row, shrink + r, columns,
                                                 output + r * columns + v * LANES);
  });
}

}  // namespace slipstream
