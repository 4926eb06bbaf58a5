// One step's geometry, one layer's constants, and the division of the work between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "simd.h"

namespace slipstream {

constexpr int SPLIT = 512;       // keys; a multiple of CHUNK
constexpr int TILE_TARGET = 64;  // query rows of a full tile

struct Step {
  const int32_t* query_start;
  const int32_t* context;
  const int32_t* block_tables;
  const int64_t* slots;
  int64_t table_stride;
  int32_t sequences, tokens, block_size, threads;
};

struct Layer {
  const float* sinks;
  float scale, softcap;                       // softcap 0: none
  int32_t heads, kv_heads, head_dim, window;  // window 0: none
};

// Query rows of one KV head: `tokens` tokens from `token` on, times the heads that share it.
struct Tile {
  int32_t sequence, kv_head, token, tokens;
  int32_t position;             // of the first token
  int32_t first_split, splits;  // the splits that hold a visible key
  int64_t partial;              // offset of its partials, or -1: one item computes all splits
};

struct Item {
  int32_t tile, split;  // split -1: the whole tile
  int64_t cost;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;
  std::vector<float> partials;
  std::unique_ptr<std::atomic<int32_t>[]> finished;  // splits done, per tile; ends at 0
  int threads = 1;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Columns of a value row: the head size, up to whole vectors. What lies beyond it is undefined.
inline int value_columns(const Layer& layer) { return ceil_div(layer.head_dim, LANES) * LANES; }

inline int tile_tokens(const Layer& layer) {
  return std::max(1, TILE_TARGET / (layer.heads / layer.kv_heads));
}

inline int first_visible(const Layer& layer, int position) {
  return layer.window > 0 ? std::max(0, position - layer.window + 1) : 0;
}

// Relative cost of rows x keys: reading a key and its value weighs as much as four rows using it.
inline int64_t tile_cost(int rows, int keys) { return int64_t{rows + 4} * keys; }

inline void add_tiles(const Step& step, const Layer& layer, int sequence,
                      std::vector<Tile>& tiles) {
  const int begin = step.query_start[sequence], count = step.query_start[sequence + 1] - begin;
  const int size = tile_tokens(layer);
  for (int done = 0; done < count; done += size) {
    const int tokens = std::min(size, count - done);
    const int position = step.context[sequence] - count + done;
    const int first = first_visible(layer, position) / SPLIT;
    const int splits = ceil_div(position + tokens, SPLIT) - first;
    for (int head = 0; head < layer.kv_heads; ++head)
      tiles.push_back({sequence, head, begin + done, tokens, position, first, splits, -1});
  }
}

inline void add_items(const Layer& layer, int64_t share, Plan& plan) {
  const int group = layer.heads / layer.kv_heads;
  int64_t floats = 0;
  for (size_t t = 0; t < plan.tiles.size(); ++t) {
    Tile& tile = plan.tiles[t];
    const int rows = tile.tokens * group;
    const int keys = tile.position + tile.tokens - first_visible(layer, tile.position);
    const int64_t cost = tile_cost(rows, keys);
    if (tile.splits == 1 || cost <= share) {
      plan.items.push_back({static_cast<int32_t>(t), -1, cost});
      continue;
    }
    tile.partial = floats;
    floats += int64_t{tile.splits} * rows * (value_columns(layer) + 2);
    for (int s = 0; s < tile.splits; ++s)
      plan.items.push_back({static_cast<int32_t>(t), s, cost / tile.splits});
  }
  plan.partials.resize(floats);
}

// Threads: one, or all. A smaller team would make libgomp end the threads it leaves out and start
// them again next time. Entering a parallel region must be small against the work.
inline Plan* make_plan(const Step& step, const Layer& layer) {
  auto plan = std::make_unique<Plan>();
  for (int s = 0; s < step.sequences; ++s) add_tiles(step, layer, s, plan->tiles);
  int64_t total = 0;
  for (const Tile& tile : plan->tiles)
    total += tile_cost(tile.tokens * (layer.heads / layer.kv_heads),
                       tile.position + tile.tokens - first_visible(layer, tile.position));
  constexpr int64_t worth_a_team = 1 << 20;  // about 90 us of one core
  plan->threads = total * layer.head_dim < worth_a_team ? 1 : step.threads;
  const int64_t share = plan->threads == 1 ? total : total / (4 * plan->threads);
  add_items(layer, share, *plan);
  if (plan->threads > 1)  // longest first, so that no thread starts a long item last
    std::stable_sort(plan->items.begin(), plan->items.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
  plan->finished = std::make_unique<std::atomic<int32_t>[]>(plan->tiles.size());
  return plan.release();
}

}  // namespace slipstream
