// Products with packed weights: [rows, in] x [in, columns], rows from one to thousands.
//
// Weights lie in panels of 32 columns, each [in / p][32][p] with p elements to a 32-bit unit (float32
// 1, bfloat16 2, int8 4): a panel is read front to back once per block of rows, which is all that
// decoding can ask of memory. Every element of a result is accumulated over `in` in ascending order,
// whatever the number of rows, so that a token's bits do not depend on its batch.
#pragma once

#include "amx.h"
#include "simd.h"

namespace slipstream {

constexpr int PANEL = 32, PANEL_VECS = PANEL / LANES;
// Rows x PANEL_VECS accumulators, plus operands, must fit the registers (see TILE_ROWS).
#if defined(__AVX512F__)
constexpr int ROW_TILE = 12;
#else
constexpr int ROW_TILE = 2;
#endif
constexpr int ROW_BLOCK = 256;  // most rows at a time: their inputs stay in the second-level cache

// int8 weights times activations quantized row by row, as unsigned bytes around 128 (that is how the
// instruction wants them).
struct Int8 {
  uint8_t bits;
};

struct Linear {
  const Unit* weights;
  const float* bias;       // [columns], or null
  const float* scales;     // [columns], int8 only: weight = scale * integer
  const int32_t* offsets;  // [columns], int8 only: 128 * sum of the column's integers
  int32_t in, columns;     // columns are padded to a multiple of PANEL
};

// The left operand: `data` [rows, in], and for int8 each row's scale.
template <class T>
struct Rows {
  const T* data;
  const float* scales;
  int count;
};

// What the accumulators of one element type are, and how they become the product.
template <class T>
struct Accumulate {
  typedef Vec Sum;
  static SLIPSTREAM_INLINE Sum add(Int a, Int b, Sum sum) { return dot_add<T>(a, b, sum); }
  static SLIPSTREAM_INLINE Vec finish(Sum sum, const Linear&, int, float) { return sum; }
};

template <>
struct Accumulate<Int8> {
  typedef Int Sum;
  static SLIPSTREAM_INLINE Sum add(Int a, Int b, Sum sum) { return dot_add_bytes(a, b, sum); }
  static SLIPSTREAM_INLINE Vec finish(Sum sum, const Linear& linear, int column, float scale) {
    Int offset;
    std::memcpy(&offset, linear.offsets + column, sizeof offset);
    return __builtin_convertvector(sum - offset, Vec) * (load(linear.scales + column) * scale);
  }
};

inline int panels(const Linear& linear) { return linear.columns / PANEL; }
inline int row_blocks(int rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

// Blocks of nearly equal height, of whole tiles.
inline int block_height(int rows) {
  const int blocks = row_blocks(rows);
  return ((rows + blocks - 1) / blocks + 31) / 32 * 32;
}

// From a row's sums to its product; done(row, panel, low, high) gets sixteen columns twice.
template <class T, class Done>
SLIPSTREAM_INLINE void finish_row(const Linear& linear, const Rows<T>& input, int row, int panel,
                                  const typename Accumulate<T>::Sum (&sum)[PANEL_VECS],
                                  Done&& done) {
  typedef Accumulate<T> A;
  const int column = panel * PANEL;
  const float scale = input.scales ? input.scales[row] : 1.0f;
  Vec low = A::finish(sum[0], linear, column, scale);
  Vec high = A::finish(sum[1], linear, column + LANES, scale);
  if (linear.bias) {
    low += load(linear.bias + column);
    high += load(linear.bias + column + LANES);
  }
  done(row, panel, low, high);
}

// ROWS rows from `row` on times one panel, in vector registers.
template <class T, int ROWS, class Done>
SLIPSTREAM_INLINE void multiply_tile(const Linear& linear, const Rows<T>& input, int row, int panel,
                                     Done&& done) {
  typedef Accumulate<T> A;
  const int units = linear.in / PER_UNIT<T>, column = panel * PANEL;
  const Unit* rows = reinterpret_cast<const Unit*>(input.data) + int64_t{row} * units;
  const Unit* weights = linear.weights + int64_t{column} * units;
  typename A::Sum sum[ROWS][PANEL_VECS] = {};
  for (int u = 0; u < units; ++u) {
    const Int low = load_units(weights + u * PANEL), high = load_units(weights + u * PANEL + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Int x = splat_unit(rows[int64_t{r} * units + u]);
      sum[r][0] = A::add(x, low, sum[r][0]);
      sum[r][1] = A::add(x, high, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) finish_row(linear, input, row + r, panel, sum[r], done);
}

#if SLIPSTREAM_AMX
// Sums of a block of rows on their way through the blocks of `in`; a vector of columns each.
template <class T>
inline thread_local typename Accumulate<T>::Sum tile_sums[ROW_BLOCK][PANEL_VECS];

// With many rows, the units of `in` after which the next rows take their turn: 16 KiB of a panel stay
// in the first-level cache for all of them.
constexpr int UNIT_BLOCK = 128, MANY_ROWS = 128;

// Reads ahead into the second-level cache, a little with each step of a product.
struct ReadAhead {
  const char* from;
  int lines;  // per step

  SLIPSTREAM_INLINE void operator()() {
    for (int i = 0; i < lines; ++i, from += 64) __builtin_prefetch(from, 0, 2);
  }
};

// `count` rows from `first` on times one panel, on tiles. In every product of a type all rows take
// this way, or none: its sums round differently from the vectors'.
template <class T, class Done>
void multiply_amx(const Linear& linear, const Rows<T>& input, int first, int count, int panel,
                  const Unit* next, Done&& done) {
  constexpr int HEIGHT = 2 * TILE_HEIGHT, SUM_BYTES = PANEL * sizeof(float);
  constexpr int STEP_LINES = TILE_HEIGHT * PANEL * sizeof(Unit) / 64;
  const int units = linear.in / PER_UNIT<T>, block = count < MANY_ROWS ? units : UNIT_BLOCK;
  const int64_t row_bytes = int64_t{units} * sizeof(Unit);
  const Unit* rows = reinterpret_cast<const Unit*>(input.data) + int64_t{first} * units;
  const Unit* weights = linear.weights + int64_t{panel} * PANEL * units;
  const int heights = (count + HEIGHT - 1) / HEIGHT;
  // The hardware reads ahead well enough while every step reads weights.
  const bool help = next && heights > 1;
  ReadAhead ahead{reinterpret_cast<const char*>(next), help ? (STEP_LINES + heights - 1) / heights : 0};
  auto& sums = tile_sums<T>;
  for (int u = 0; u < units; u += block) {
    const int length = std::min(block, units - u);
    for (int from = 0; from < count; from += HEIGHT) {
      const int height = std::min(HEIGHT, count - from);
      const bool lower = height > TILE_HEIGHT;
      thread_tiles.fit(height);
      if (u == 0)
        zero_sums();
      else
        load_sums(sums[from], SUM_BYTES, lower);
      multiply_units<T>(rows + int64_t{from} * units + u, row_bytes, lower, weights + u * PANEL,
                        PANEL, length, ahead);
      store_sums(sums[from], SUM_BYTES, lower);
      if (u + length < units) continue;
      for (int r = from; r < from + height; ++r)
        finish_row(linear, input, first + r, panel, sums[r], done);
    }
  }
}

template <class T>
bool fits_tiles(const Linear& linear) {
  return tiles_granted() && PER_UNIT<T> > 1 && linear.in / PER_UNIT<T> % TILE_HEIGHT == 0;
}
#endif

// One item of a product: a block of rows times a panel. Items count panels within blocks of rows.
// `next` is the item that this thread will do then, if there is one.
template <class T, class Done>
void multiply(const Linear& linear, const Rows<T>& input, int item, int next, Done&& done) {
  const int panel = item % panels(linear), block = item / panels(linear);
  const int height = block_height(input.count), first = block * height;
  const int count = std::min(height, input.count - first);
#if SLIPSTREAM_AMX
  if (fits_tiles<T>(linear)) {
    const bool more = next < panels(linear) * row_blocks(input.count);
    const int64_t ahead = int64_t{next % panels(linear)} * PANEL * (linear.in / PER_UNIT<T>);
    multiply_amx(linear, input, first, count, panel, more ? linear.weights + ahead : nullptr, done);
    return;
  }
#endif
  const int tiles = (count + ROW_TILE - 1) / ROW_TILE;
  for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int from = count * t / tiles, to = count * (t + 1) / tiles;
    with_constant<ROW_TILE>(to - from, [&](auto height) {
      multiply_tile<T, height.value>(linear, input, first + from, panel, done);
    });
  }
}

// One row as bytes around 128, and its scale: the largest magnitude becomes 127.
template <class T>
float quantize_row(const T* source, int size, Int8* target) {
  Vec top{};
  for (int i = 0; i < size; i += LANES) {
    const Vec x = load_as(source + i);
    top = maximum(top, maximum(x, -x));
  }
  const float scale = max_lanes(top) / 127.0f;
  const Vec inverse = splat(scale > 0 ? 1.0f / scale : 0.0f), shifter = splat(12582912.0f);
  for (int i = 0; i < size; i += LANES) {
    const Vec rounded = multiply_add(load_as(source + i), inverse, shifter) - shifter;
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Int) + 128, Bytes);
    std::memcpy(target + i, &bytes, sizeof bytes);
  }
  return scale;
}

}  // namespace slipstream
