// The three inner steps of a tile of query rows against a chunk of keys: scores, softmax, values.
//
// Every element of a result is accumulated in an order that depends on neither the number of rows
// in the tile nor on its neighbours; that is what makes a token's bits independent of the batch.
#pragma once

#include "simd.h"

namespace slipstream {

constexpr int CHUNK = 128;  // keys per softmax update; chunks start at multiples of CHUNK
#if defined(__AVX512F__)
constexpr int UPDATE_ROWS = 4;  // whose softmax is updated together
#else
constexpr int UPDATE_ROWS = 2;
#endif

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

// Of a chunk's keys those that a row sees.
struct Seen {
  int first, last;  // one beyond
};

// The softmax update of some rows, each of which sees a key; together, since one alone would mostly wait
// for itself. Turns scores into weights (zero where unseen, over the whole steps of 32 keys that hold
// [begin, end)) and gives the factors by which what was accumulated before must shrink.
template <class T, int ROWS>
void update_rows(const Scoring& how, float* scores, const Seen (&seen)[ROWS], const Chunk& chunk,
                 RowState* states, T* weights, float* shrink) {
  constexpr int STEP = 2 * LANES;
  const int from = chunk.begin / STEP * STEP, to = (chunk.end + STEP - 1) / STEP * STEP;
  Seen some = seen[0], all = seen[0];  // what some row sees, and what all do
  for (const Seen& row : seen) {
    some = {std::min(some.first, row.first), std::max(some.last, row.last)};
    all = {std::max(all.first, row.first), std::min(all.last, row.last)};
  }
  const int lower = some.first / LANES * LANES;
  Vec top[ROWS], total[ROWS] = {};
  float max[ROWS];
  for (Vec& vec : top) vec = splat(NEG_INF);
  for (int i = lower; i < some.last; i += LANES) {
    const bool partly = i < all.first || i + LANES > all.last;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      float* place = scores + r * CHUNK + i;
      Vec x = load(place);
      if (how.inner > 0) x = hyperbolic_tangent(x * how.inner);
      if (partly) {
        const Int lane = lane_index() + i;
        x = select((lane >= seen[r].first) & (lane < seen[r].last), x, splat(NEG_INF));
      }
      if (partly || how.inner > 0) store(place, x);
      top[r] = maximum(top[r], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const float highest = max_lanes(top[r]) * how.scale;
    max[r] = highest > states[r].max ? highest : states[r].max;
  }
  const auto clear = [&](int begin, int end) {
    for (int r = 0; r < ROWS; ++r)
      for (int i = begin; i < end; i += LANES) store_as(weights + r * CHUNK + i, Vec{});
  };
  clear(from, lower);
  int i = lower;
  for (; i < some.last; i += LANES) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = load(scores + r * CHUNK + i);
      const Vec weight = power_of_two(multiply_add(x, splat(how.scale), splat(-max[r])));
      total[r] += weight;
      store_as(weights + r * CHUNK + i, weight);
    }
  }
  clear(i, to);
  Vec change{};
  for (int r = 0; r < ROWS; ++r) set_lane(change, r, states[r].max - max[r]);
  change = power_of_two(change);
  for (int r = 0; r < ROWS; ++r) {
    shrink[r] = states[r].max == NEG_INF ? 0.0f : get_lane(change, r);
    states[r].sum = states[r].sum * shrink[r] + sum_lanes(total[r]);
    states[r].max = max[r];
  }
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
