// What products with packed weights work on: the weights, the rows, and what becomes of the sums.
//
// Weights lie in panels of 32 columns, each [in / p / 16][2][16][16][p] with p elements to a 32-bit unit
// (float32 1, bfloat16 2, int8 4), padded to whole tiles.
#pragma once

#include <optional>
#include <type_traits>

#include "amx.h"
#include "simd.h"

namespace slipstream {

constexpr int PANEL = 32, PANEL_VECS = PANEL / LANES;
constexpr int GROUP = 32;       // rows that tiles multiply at a time
constexpr int ROW_BLOCK = 256;  // most rows at a time: they stay in the second-level cache
constexpr int DEPTH = 128;      // units of a panel that stay in the first-level cache while rows pass by

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
  int32_t halved;          // whether float32 weights are kept as the bfloat16 that they equal
};

// Columns that a cache line holds.
template <class T>
constexpr int LINE_COLUMNS = LINE_UNITS * PER_UNIT<T>;

// The left operand: rows, `stride` elements apart, in pieces of a cache line, `step` units apart, and for
// int8 each row's scale. Of `readable` rows, whatever is in the further ones, there may be more than `count`.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, step;
  const float* scales;
  int count, readable;

  // Of a row the piece that begins with this unit.
  const Unit* piece(int row, int unit) const {
    return reinterpret_cast<const Unit*>(data + row * stride) + unit / LINE_UNITS * step;
  }

  const T* at(int row, int column) const {
    return reinterpret_cast<const T*>(piece(row, column / PER_UNIT<T>)) + column % LINE_COLUMNS<T>;
  }

  static Rows plain(const T* data, int64_t stride, const float* scales, int count, int readable) {
    return {data, stride, LINE_UNITS, scales, count, readable};
  }
};

// What products give, in strips as wide as a cache line: what a panel gives for one row after the other lies
// side by side. Row by row, writing results down would cost up to a tenth of a product's time.
template <class T>
struct Strips {
  T* data;
  int64_t height;  // rows from strip to strip

  T* at(int row, int column) const {
    return data + (column / LINE_COLUMNS<T> * height + row) * LINE_COLUMNS<T> + column % LINE_COLUMNS<T>;
  }

  // The first `count` rows.
  Rows<T> rows(const float* scales, int count, int readable) const {
    return {data, LINE_COLUMNS<T>, height * LINE_UNITS, scales, count, readable};
  }
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
    const Int offset = read_lanes<Int>(linear.offsets + column);
    return to_floats(sum - offset) * (load(linear.scales + column) * scale);
  }
};

// Units that a column has.
template <class T>
int column_units(const Linear& linear) {
  return linear.in / (linear.halved ? PER_UNIT<BFloat16> : PER_UNIT<T>);
}

// Units of a panel.
template <class T>
int64_t panel_units(const Linear& linear) {
  return int64_t{whole_tiles(column_units<T>(linear))} * PANEL;
}

template <class T>
const Unit* panel_weights(const Linear& linear, int64_t panel) {
  return linear.weights + panel * panel_units<T>(linear);
}

// From a row's sums to its product; write(row, low, high) gets sixteen columns twice.
template <class T, class Write>
SLIPSTREAM_INLINE void finish_row(const Linear& linear, const Rows<T>& input, int row, int panel,
                                  const typename Accumulate<T>::Sum (&sum)[PANEL_VECS],
                                  Write&& write) {
  typedef Accumulate<T> A;
  const int column = panel * PANEL;
  const float scale = input.scales ? input.scales[row] : 1.0f;
  Vec low = A::finish(sum[0], linear, column, scale);
  Vec high = A::finish(sum[1], linear, column + LANES, scale);
  if (linear.bias) {
    low += load(linear.bias + column);
    high += load(linear.bias + column + LANES);
  }
  write(row, low, high);
}

template <class T>
using RowSums = typename Accumulate<T>::Sum[PANEL_VECS];

// What becomes of sums: what done(panel) gives is called as write(row, low, high) for each row. Sums of a panel on tiles wait here for the next one, between whose
// steps they are finished, row by row: tiles and vectors are computed at the same time. rest() ends what is
// left.
template <class T, class Done>
class Finishing {
 public:
  Finishing(const Linear& linear, const Rows<T>& input, Done done)
      : linear_(linear), input_(input), done_(done) {}

  // Where the sums of the next panel's rows grow.
  RowSums<T>* growing() { return sums_[growing_]; }

  // They are the sums of this panel; what was taken before is finished.
  void take(int panel) {
    rest();
    growing_ = 1 - growing_;
    panel_ = panel, finished_ = 0, rows_ = input_.count;
    write_.emplace(done_(panel));
  }

  SLIPSTREAM_INLINE void step(int rows) {
    for (const int stop = std::min(finished_ + rows, rows_); finished_ < stop; ++finished_)
      finish_row(linear_, input_, finished_, panel_, sums_[1 - growing_][finished_], *write_);
  }

  void rest() { step(rows_); }

 private:
  const Linear& linear_;
  const Rows<T> input_;
  const Done done_;
  std::optional<std::invoke_result_t<Done, int>> write_;
  int panel_ = 0, finished_ = 0, rows_ = 0, growing_ = 0;
  RowSums<T> sums_[2][ROW_BLOCK];
};

#if !SLIPSTREAM_AMX
// Asks for `count` lines of 64 bytes to come into the first-level cache.
SLIPSTREAM_INLINE void fetch_lines(const char* from, int count) {
  for (; count > 0; --count, from += 64) __builtin_prefetch(from);
}
#endif

// Fetches weights into the cache, AHEAD bytes before they are multiplied, a few lines with each step of a
// product: reading from memory and computing go on at the same time.
class ReadAhead {
 public:
  static constexpr int64_t AHEAD = 16 << 10;
  static constexpr int AGAIN = SLIPSTREAM_AMX ? 8 : 0;  // lines that the next step asks for again

  // From a panel of `bytes` on into what is multiplied then (null: nothing), in so many steps.
  ReadAhead(const Unit* panel, int64_t bytes, const Unit* then, int steps)
      : from_(reinterpret_cast<const char*>(panel) + std::min(AHEAD, bytes)),
        end_(reinterpret_cast<const char*>(panel) + bytes),
        then_(reinterpret_cast<const char*>(then)),
        lines_(static_cast<int>((bytes / 64 + steps - 1) / steps)) {}

  SLIPSTREAM_INLINE void operator()() {
    if (from_ >= end_) {
      if (!then_) return;
      from_ = then_, end_ = then_ + AHEAD, then_ = nullptr;
    }
    fetch_lines(from_, lines_ + AGAIN);
    from_ += 64 * lines_;
  }

 private:
  const char *from_, *end_, *then_;
  const int lines_;
};

}  // namespace slipstream
