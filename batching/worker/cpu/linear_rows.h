// Products of packed weights in vector registers.
#pragma once

#include "product.h"

namespace slipstream {

// Rows that are multiplied at a time, and up to how many of them by all vectors of a panel rather than by one:
// their sums and operands must fit the registers (see TILE_ROWS), of which bytes need more where they are
// multiplied in two halves.
#if defined(__AVX512F__)
template <class T>
constexpr int ROW_TILE = 12;
constexpr int WHOLE_PANEL_ROWS = 12;
#else
template <class T>
constexpr int ROW_TILE = PER_UNIT<T> == 4 ? 4 : 6;
constexpr int WHOLE_PANEL_ROWS = 2;
#endif

// ROWS rows from `row` on times VECS vectors of a panel, from `first` on, in registers: their units from
// `begin` to `end`, added to `sums` unless they are the first. HALVED weights become float32 as they are read, so
// that sums have the bits that they have with whole ones. Inlined, it would not have all registers.
template <class T, bool HALVED, int ROWS, int VECS>
__attribute__((noinline)) void multiply_tile(const Rows<T>& input, int row, const Unit* weights, int first,
                                             int begin, int end, ReadAhead& ahead, RowSums<T>* sums) {
  typedef Accumulate<T> A;
  constexpr int PARTS = HALVED ? 2 : 1, LINE = LINE_UNITS / PARTS;
  typename A::Sum sum[ROWS][VECS] = {};
#pragma GCC unroll 16
  for (int r = 0; r < ROWS && begin > 0; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sum[r][v] = sums[r][first + v];
  for (int from = begin; from < end; from += LINE) {
    ahead();
    const Unit* tile = weights + (from / LINE_UNITS * PANEL_VECS + first) * TILE_UNITS +
                       from % LINE_UNITS * LANES;
    const Unit* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = input.piece(row + r, from * PARTS);
    const int count = std::min(LINE, end - from);
    for (int u = 0; u < count; ++u, tile += LANES) {
#pragma GCC unroll 2
      for (int part = 0; part < PARTS; ++part) {
        Int column[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) {
          column[v] = load_units(tile + v * TILE_UNITS);
          if (HALVED) column[v] = half_as_float(column[v], part);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
          const Int x = splat_unit(rows[r][u * PARTS + part]);
#pragma GCC unroll 2
          for (int v = 0; v < VECS; ++v) sum[r][v] = A::add(x, column[v], sum[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sums[r][first + v] = sum[r][v];
}

// All rows times one panel, in vector registers. `then` is the panel that this thread multiplies after it.
template <class T, bool HALVED, class Done>
void multiply_rows(const Linear& linear, const Rows<T>& input, int panel, const Unit* then,
                   Finishing<T, Done>& finishing) {
  constexpr int LINE = HALVED ? LINE_UNITS / 2 : LINE_UNITS;
  const Unit* weights = panel_weights<T>(linear, panel);
  const int count = input.count, tiles = ceil_div(count, ROW_TILE<T>), units = column_units<T>(linear);
  const int passes = count <= tiles * WHOLE_PANEL_ROWS ? tiles : tiles * PANEL_VECS;
  const int depth = passes > 1 ? DEPTH : units;
  ReadAhead ahead(weights, panel_units<T>(linear) * sizeof(Unit), then, passes * ceil_div(units, LINE));
  RowSums<T>* sums = finishing.growing();
  for (int begin = 0; begin < units; begin += depth) {
    const int end = std::min(begin + depth, units);
    for (int t = 0; t < tiles; ++t) {  // of nearly equal height
      const int from = count * t / tiles, to = count * (t + 1) / tiles;
      with_constant<ROW_TILE<T>>(to - from, [&](auto rows) {
        constexpr int VECS = rows <= WHOLE_PANEL_ROWS ? PANEL_VECS : 1;
        for (int v = 0; v < PANEL_VECS; v += VECS)
          multiply_tile<T, HALVED, rows, VECS>(input, from, weights, v, begin, end, ahead, sums + from);
      });
    }
  }
  finishing.take(panel);
  finishing.rest();
}

}  // namespace slipstream
