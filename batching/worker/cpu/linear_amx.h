// Products of packed weights on AMX tiles.
#pragma once

#include "product.h"

#if SLIPSTREAM_AMX

namespace slipstream {

// Parts of a panel, DEPTH units each, pass by the groups of rows one after the other; or, if groups are many, all
// of a panel that is no deeper than WHOLE.
constexpr int WHOLE = 288, MANY_GROUPS = 5;

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

}  // namespace slipstream

#endif
