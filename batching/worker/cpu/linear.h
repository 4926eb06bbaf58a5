// Products with packed weights: [rows, in] x [in, columns], rows from one to thousands.
//
// A panel is read front to back once per block of rows, which is all that decoding can ask of memory. Every
// element of a result is accumulated over `in` in ascending order, whatever the number of rows, so that a token's
// bits do not depend on its batch.
#pragma once

#include "linear_amx.h"
#include "linear_rows.h"
#include "team.h"

namespace slipstream {

// One panel. `then` is the one that this thread multiplies after it, or null. Not inlined, for registers again.
template <class T, class Done>
__attribute__((noinline)) void multiply(const Linear& linear, const Rows<T>& input, int panel,
                                        const Unit* then, Finishing<T, Done>& finishing) {
#if SLIPSTREAM_AMX
  if (fits_tiles<T>(linear)) return multiply_amx(linear, input, panel, then, finishing);
#endif
  if constexpr (std::is_same_v<T, float>)
    if (linear.halved) return multiply_rows<T, true>(linear, input, panel, then, finishing);
  multiply_rows<T, false>(linear, input, panel, then, finishing);
}

// Calls use(first, count) for blocks of `rows` of nearly equal height, of whole groups.
template <class Use>
void for_each_block_of_rows(int rows, Use&& use) {
  const int blocks = ceil_div(rows, ROW_BLOCK);
  const int height = blocks ? ceil_div(ceil_div(rows, blocks), GROUP) * GROUP : 0;
  for (int first = 0; first < rows; first += height) use(first, std::min(height, rows - first));
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
    write_lanes(target + i, to_bytes(to_ints(rounded) + 128));
  }
  return scale;
}

}  // namespace slipstream
