// Scores and values of a chunk on AMX tiles, for bfloat16.
//
// Pages of keys and values (attention_pages.h) are right operands as they lie, each tile in one piece. In
// every case that fits the tiles all rows take this way, a single decoding row too: its sums round
// differently from the vectors'.
#pragma once

#include "amx.h"
#include "attention_tiles.h"

#if SLIPSTREAM_AMX
namespace slipstream {

constexpr int STEP = 2 * TILE_HEIGHT;  // keys or dimensions that one operand tile spans
constexpr int WIDE = 4 * LANES;        // dimensions of the values of few rows

// Room for the sums of one pass over a chunk's values, and for a masked copy of its last step.
struct AmxScratch {
  alignas(64) float sums[STEP * WIDE];
  Aligned<Unit> tail;
};

// Where the steps of a chunk lie: sixteen keys, with the other sixteen behind all their units; and the
// first sixteen dimensions of the values, with the next `value_stride` units on.
struct AmxChunk {
  int begin, end;  // in keys, multiples of STEP
  int64_t value_stride;
  const Unit* keys[CHUNK / STEP];
  const Unit* values[CHUNK / STEP];
};

// Calls f(first, height) for groups of up to two tiles of rows. More rows than a tile has fill the last one
// with whatever lies behind them.
template <class F>
SLIPSTREAM_INLINE void for_each_group(int rows, F&& f) {
  for (int first = 0; first < rows; first += STEP) {
    const int count = std::min(STEP, rows - first);
    thread_tiles.fit(rows > TILE_HEIGHT ? whole_tiles(count) : count);
    f(first, count);
  }
}

// scores[rows][CHUNK] = query[rows][units] . keys
inline void compute_scores_amx(const Unit* query, int rows, int units, const AmxChunk& chunk,
                               float* scores) {
  const LeftStrides left{units * static_cast<int64_t>(sizeof(Unit)), LINE_UNITS};
  for_each_group(rows, [&](int first, int count) {
    for (int key = chunk.begin; key < chunk.end; key += STEP) {
      zero_sums();
      const bool lower = count > TILE_HEIGHT;
      const Unit* keys = chunk.keys[key / STEP];
      multiply_units<BFloat16>(query + first * units, left, lower, keys,
                               {TILE_UNITS, units * LANES}, units);
      store_sums(scores + first * CHUNK + key, CHUNK * sizeof(float), lower);
    }
  });
}

// Puts a copy in the place of the last step's values, of which only `keys` are written: the rest counts
// as zero, whatever the page holds.
inline void mask_values(AmxChunk& chunk, int keys, int columns, Aligned<Unit>& tail) {
  const Unit*& values = chunk.values[chunk.end / STEP - 1];
  tail.resize(columns / LANES * chunk.value_stride);
  for (int tile = 0; tile < columns / LANES; ++tile) {
    const Unit* from = values + tile * chunk.value_stride;
    Unit* to = tail.data() + tile * chunk.value_stride;
    std::copy_n(from, keys / 2 * LANES, to);
    std::fill(to + keys / 2 * LANES, to + TILE_UNITS, 0);
    if (keys % 2)
      for (int i = keys / 2 * LANES; i < (keys / 2 + 1) * LANES; ++i) to[i] = from[i] & 0xffff;
  }
  values = tail.data();
}

// Four tiles of dimensions for one tile of rows.
inline void multiply_wide(const BFloat16* weights, const AmxChunk& chunk, int column,
                          float* sums) {
  zero_sums();
  for (int key = chunk.begin; key < chunk.end; key += STEP) {
    const int64_t stride = chunk.value_stride;
    const Unit* values = chunk.values[key / STEP] + column / LANES * stride;
    load_tile<4>(weights + key, CHUNK * sizeof(BFloat16));
    load_tile<6>(values, TILE_BYTES);
    multiply_tiles<BFloat16, 0, 4, 6>();
    load_tile<7>(values + stride, TILE_BYTES);
    multiply_tiles<BFloat16, 1, 4, 7>();
    load_tile<6>(values + 2 * stride, TILE_BYTES);
    multiply_tiles<BFloat16, 2, 4, 6>();
    load_tile<7>(values + 3 * stride, TILE_BYTES);
    multiply_tiles<BFloat16, 3, 4, 7>();
  }
  constexpr int64_t ROW = WIDE * sizeof(float);
  store_tile<0>(sums, ROW), store_tile<1>(sums + LANES, ROW);
  store_tile<2>(sums + 2 * LANES, ROW), store_tile<3>(sums + 3 * LANES, ROW);
}

// Two tiles of dimensions for up to two tiles of rows.
inline void multiply_narrow(const BFloat16* weights, bool lower, const AmxChunk& chunk, int column,
                            float* sums) {
  constexpr LeftStrides left{CHUNK * sizeof(BFloat16), LINE_UNITS};
  zero_sums();
  for (int key = chunk.begin; key < chunk.end; key += STEP)
    multiply_units<BFloat16>(reinterpret_cast<const Unit*>(weights + key), left, lower,
                             chunk.values[key / STEP] + column / LANES * chunk.value_stride,
                             {0, chunk.value_stride}, TILE_HEIGHT);
  store_sums(sums, WIDE * sizeof(float), lower);
}

// output[rows][columns] = output * shrink + weights[rows][CHUNK] . values
inline void accumulate_values_amx(const BFloat16* weights, int rows, const AmxChunk& chunk,
                                  const float* shrink, int columns, float* sums, float* output) {
  for_each_group(rows, [&](int first, int count) {
    // Tiles 2 and 3 hold the lower rows' sums; with few rows, further dimensions'.
    const bool few = rows <= TILE_HEIGHT;
    for (int column = 0, width; column < columns; column += width) {
      const BFloat16* left = weights + first * CHUNK;
      width = few && columns - column >= WIDE ? WIDE : STEP;
      if (width == WIDE)
        multiply_wide(left, chunk, column, sums);
      else
        multiply_narrow(left, count > TILE_HEIGHT, chunk, column, sums);
      for (int r = 0; r < count; ++r)
        for (int i = 0; i < width; i += LANES) {
          float* out = output + (first + r) * columns + column + i;
          store(out, multiply_add(load(out), splat(shrink[first + r]), load(sums + r * WIDE + i)));
        }
    }
  });
}

}  // namespace slipstream
#endif
