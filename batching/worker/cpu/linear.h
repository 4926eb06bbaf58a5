// Products with packed weights: [rows, in] x [in, columns], rows from one to thousands.
//
// Weights lie in panels of 32 columns, each [in / p / 16][2][16][16][p] with p elements to a 32-bit unit
// (float32 1, bfloat16 2, int8 4), padded to whole tiles: a panel is read front to back once per block of
// rows, which is all that decoding can ask of memory. Every element of a result is accumulated over `in`
// in ascending order, whatever the number of rows, so that a token's bits do not depend on its batch.
#pragma once

#include <optional>
#include <type_traits>

#include "amx.h"
#include "simd.h"
#include "team.h"

namespace slipstream {

constexpr int PANEL = 32, PANEL_VECS = PANEL / LANES;
// Rows x PANEL_VECS accumulators, plus operands, must fit the registers (see TILE_ROWS).
#if defined(__AVX512F__)
constexpr int ROW_TILE = 12;
#else
constexpr int ROW_TILE = 2;
#endif
constexpr int GROUP = 32;       // rows that tiles multiply at a time
constexpr int ROW_BLOCK = 256;  // most rows at a time: they stay in the second-level cache

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
    Int offset;
    std::memcpy(&offset, linear.offsets + column, sizeof offset);
    return __builtin_convertvector(sum - offset, Vec) * (load(linear.scales + column) * scale);
  }
};

// Units of a panel.
template <class T>
int64_t panel_units(const Linear& linear) {
  return int64_t{whole_tiles(linear.in / PER_UNIT<T>)} * PANEL;
}

template <class T>
const Unit* panel_weights(const Linear& linear, int64_t panel) {
  return linear.weights + panel * panel_units<T>(linear);
}

// Calls use(first, count) for blocks of `rows` of nearly equal height, of whole groups.
template <class Use>
void for_each_block_of_rows(int rows, Use&& use) {
  const int blocks = ceil_div(rows, ROW_BLOCK);
  const int height = blocks ? ceil_div(ceil_div(rows, blocks), GROUP) * GROUP : 0;
  for (int first = 0; first < rows; first += height) use(first, std::min(height, rows - first));
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

// What becomes of sums: of what done(panel) gives, which may be asked several times, one is called as
// write(row, low, high) for each row. Sums of a panel on tiles wait here for the next one, between whose
// steps they are finished, row by row: tiles and vectors are computed at the same time. rest() ends what is
// left.
template <class T, class Done>
class Finishing {
 public:
  typedef typename Accumulate<T>::Sum RowSums[PANEL_VECS];

  Finishing(const Linear& linear, const Rows<T>& input, Done done)
      : linear_(linear), input_(input), done_(done) {}

  // Where the sums of the next panel's rows grow.
  RowSums* growing() { return sums_[growing_]; }

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

  const Done& done() const { return done_; }

 private:
  const Linear& linear_;
  const Rows<T> input_;
  const Done done_;
  std::optional<std::invoke_result_t<Done, int>> write_;
  int panel_ = 0, finished_ = 0, rows_ = 0, growing_ = 0;
  RowSums sums_[2][ROW_BLOCK];
};

// ROWS rows from `row` on times one panel, in vector registers.
template <class T, int ROWS, class Write>
SLIPSTREAM_INLINE void multiply_tile(const Linear& linear, const Rows<T>& input, int row, int panel,
                                     Write&& write) {
  typedef Accumulate<T> A;
  const int units = linear.in / PER_UNIT<T>;
  const Unit* weights = panel_weights<T>(linear, panel);
  typename A::Sum sum[ROWS][PANEL_VECS] = {};
  for (int from = 0; from < units; from += LINE_UNITS, weights += TILE_UNITS) {
    const Unit* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = input.piece(row + r, from);
    const int count = std::min(LINE_UNITS, units - from);
    for (int u = 0; u < count; ++u, weights += LANES) {
      const Int low = load_units(weights), high = load_units(weights + TILE_UNITS);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Int x = splat_unit(rows[r][u]);
        sum[r][0] = A::add(x, low, sum[r][0]);
        sum[r][1] = A::add(x, high, sum[r][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) finish_row(linear, input, row + r, panel, sum[r], write);
}

#if SLIPSTREAM_AMX
// Fetches weights into the second-level cache, AHEAD bytes before they are multiplied, a few lines with
// each step of a product: reading from memory and computing go on at the same time.
class ReadAhead {
 public:
  static constexpr int64_t AHEAD = 16 << 10;
  static constexpr int AGAIN = 8;  // lines that the next step asks for again

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

// Of a panel, parts of so many units stay in the first-level cache while the groups of rows pass by it; or, if
// these are many, all of a panel that is no deeper than WHOLE.
constexpr int DEPTH = 128, WHOLE = 288, MANY_GROUPS = 5;

// All rows times one panel, on tiles. In every product of a type all rows take this way, or none: its
// sums round differently from the vectors'. `then` is the panel that this thread multiplies after it.
template <class T, class Done>
void multiply_amx(const Linear& linear, const Rows<T>& input, int panel, const Unit* then,
                  Finishing<T, Done>& finishing) {
  constexpr int64_t SUMS_ROW = PANEL * sizeof(float);
  constexpr RightStrides right{2 * TILE_UNITS, TILE_UNITS};
  const int count = input.count, groups = ceil_div(count, GROUP);
  const int units = linear.in / PER_UNIT<T>, steps = units / TILE_HEIGHT * groups;
  const LeftStrides left{input.stride * static_cast<int64_t>(sizeof(T)), input.step};
  const Unit* weights = panel_weights<T>(linear, panel);
  ReadAhead ahead(weights, panel_units<T>(linear) * sizeof(Unit), then, steps);
  const bool whole_panel = groups == 1 || (groups >= MANY_GROUPS && units <= WHOLE);
  const int parts = whole_panel ? 1 : ceil_div(units, DEPTH);
  const int depth = ceil_div(units / TILE_HEIGHT, parts) * TILE_HEIGHT;
  const int pace = ceil_div(count, steps);  // rows finished in a step
  auto* sums = finishing.growing();
  for (int begin = 0; begin < units; begin += depth) {
    const int end = std::min(begin + depth, units);
    for (int from = 0; from < count; from += GROUP) {
      const int height = std::min(GROUP, count - from), whole = whole_tiles(height);
      const bool lower = height > TILE_HEIGHT;
      const auto between = [&] {
        ahead();
        finishing.step(pace);
      };
      const Unit *rows = input.piece(from, begin), *columns = weights + begin * PANEL;
      thread_tiles.fit(groups > 1 && from + whole <= input.readable ? whole : height);
      if (begin == 0)
        zero_sums();
      else
        load_sums(sums[from], SUMS_ROW, lower);
      if (groups > 1)
        multiply_units<T, Reuse::LATER>(rows, left, lower, columns, right, end - begin, between);
      else
        multiply_units<T>(rows, left, lower, columns, right, end - begin, between);
      store_sums(sums[from], SUMS_ROW, lower);
    }
  }
  finishing.take(panel);
}

template <class T>
bool fits_tiles(const Linear& linear) {
  return tiles_granted() && PER_UNIT<T> > 1 && linear.in / PER_UNIT<T> % TILE_HEIGHT == 0;
}
#endif

// One panel. `then` is the one that this thread multiplies after it, or null.
template <class T, class Done>
void multiply(const Linear& linear, const Rows<T>& input, int panel, const Unit* then,
              Finishing<T, Done>& finishing) {
#if SLIPSTREAM_AMX
  if (fits_tiles<T>(linear)) return multiply_amx(linear, input, panel, then, finishing);
#endif
  const int count = input.count, tiles = ceil_div(count, ROW_TILE);
  for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int from = count * t / tiles, to = count * (t + 1) / tiles;
    with_constant<ROW_TILE>(to - from, [&](auto tall) {
      multiply_tile<T, tall.value>(linear, input, from, panel, finishing.done()(panel));
    });
  }
}

// The product of at most ROW_BLOCK rows, by all threads of the team, each of which calls prepare() before
// it reads them. `following`, the product that comes then, may be null. For `done` see Finishing.
template <class T, class Prepare, class Done>
void share_product(Team& team, const Linear& linear, const Rows<T>& input, const Linear* following,
                   Prepare&& prepare, Done&& done) {
  Finishing<T, std::decay_t<Done>> finishing(linear, input, done);
  const auto work = [&](int panel, int next) {
    const Unit* then = nullptr;
    if (next >= 0)
      then = panel_weights<T>(linear, next);
    else if (next == Team::END && following)
      then = panel_weights<T>(*following, team.own_run(following->columns / PANEL));
    multiply(linear, input, panel, then, finishing);
  };
  team.share_runs(linear.columns / PANEL, prepare, work, [&] { finishing.rest(); });
}

// One row, whose sixteen elements from i on source(i) points to, as bytes around 128, and its scale: the
// largest magnitude becomes 127.
template <class Source>
float quantize_row(Source&& source, int size, Int8* target) {
  Vec top{};
  for (int i = 0; i < size; i += LANES) {
    const Vec x = load_as(source(i));
    top = maximum(top, maximum(x, -x));
  }
  const float scale = max_lanes(top) / 127.0f;
  const Vec inverse = splat(scale > 0 ? 1.0f / scale : 0.0f), shifter = splat(12582912.0f);
  for (int i = 0; i < size; i += LANES) {
    const Vec rounded = multiply_add(load_as(source(i)), inverse, shifter) - shifter;
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Int) + 128, Bytes);
    std::memcpy(target + i, &bytes, sizeof bytes);
  }
  return scale;
}

}  // namespace slipstream
