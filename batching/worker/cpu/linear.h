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
constexpr int ROW_BLOCK = 192;  // rows whose inputs stay in the second-level cache

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
// The same on tiles, for up to 32 rows: two tiles of rows times two of columns. In every product of
// a type all rows take this way, or none: its sums round differently from the vectors'.
template <class T, class Done>
void multiply_amx(const Linear& linear, const Rows<T>& input, int row, int rows, int panel,
                  Done&& done) {
  typedef Accumulate<T> A;
  const int units = linear.in / PER_UNIT<T>, column = panel * PANEL;
  const int upper = std::min(rows, TILE_HEIGHT), lower = rows - upper;
  const int64_t stride = int64_t{units} * sizeof(Unit), panel_stride = PANEL * sizeof(Unit);
  const Unit* high = reinterpret_cast<const Unit*>(input.data) + int64_t{row} * units;
  const Unit* low = high + int64_t{TILE_HEIGHT} * units;
  const Unit* weights = linear.weights + int64_t{column} * units;
  TileShapes shapes;  // 0-3 sums, 4-5 rows, 6-7 weights
  for (int tile = 0; tile < TILES; ++tile) shapes.row_bytes[tile] = TILE_BYTES;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = upper;
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = lower ? lower : 1;
  shapes.rows[6] = shapes.rows[7] = TILE_HEIGHT;
  shape_tiles(shapes);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int u = 0; u < units; u += TILE_HEIGHT) {
    load_tile<6>(weights + u * PANEL, panel_stride);
    load_tile<7>(weights + u * PANEL + LANES, panel_stride);
    load_tile<4>(high + u, stride);
    multiply_tiles<T, 0, 4, 6>();
    multiply_tiles<T, 1, 4, 7>();
    if (!lower) continue;
    load_tile<5>(low + u, stride);
    multiply_tiles<T, 2, 5, 6>();
    multiply_tiles<T, 3, 5, 7>();
  }
  alignas(64) typename A::Sum sums[2 * TILE_HEIGHT][PANEL_VECS];
  store_tile<0>(&sums[0][0], sizeof sums[0]);
  store_tile<1>(&sums[0][1], sizeof sums[0]);
  if (lower) {
    store_tile<2>(&sums[TILE_HEIGHT][0], sizeof sums[0]);
    store_tile<3>(&sums[TILE_HEIGHT][1], sizeof sums[0]);
  }
  release_tiles();
  for (int r = 0; r < rows; ++r) finish_row(linear, input, row + r, panel, sums[r], done);
}

template <class T>
bool fits_tiles(const Linear& linear) {
  static const bool granted = request_tiles();
  return granted && PER_UNIT<T> > 1 && linear.in / PER_UNIT<T> % TILE_HEIGHT == 0;
}
#endif

// One item of a product: a block of rows times a panel. Items count panels within blocks of rows.
template <class T, class Done>
void multiply(const Linear& linear, const Rows<T>& input, int item, Done&& done) {
  const int panel = item % panels(linear), first = item / panels(linear) * ROW_BLOCK;
  const int count = std::min(ROW_BLOCK, input.count - first);
#if SLIPSTREAM_AMX
  if (fits_tiles<T>(linear)) {
    for (int from = 0; from < count; from += 2 * TILE_HEIGHT)
      multiply_amx(linear, input, first + from, std::min(2 * TILE_HEIGHT, count - from), panel,
                   done);
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
