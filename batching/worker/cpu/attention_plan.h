// One step's geometry, one layer's constants, and the division of the work between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_tiles.h"

namespace slipstream {

constexpr int SPLIT = 512;       // keys; a multiple of CHUNK
constexpr int TILE_TARGET = 64;  // query rows of a full tile
constexpr int FEW_QUERY_ROWS = 16;

struct Step {
  const int32_t* query_start;
  const int32_t* context;
  const int32_t* block_tables;
  const int64_t* slots;
  int64_t table_stride;
  int32_t sequences, tokens, block_size, threads;

  const int32_t* table(int sequence) const { return block_tables + sequence * table_stride; }
};

struct Layer {
  const float* sinks;
  float scale, softcap;                       // softcap 0: none
  int32_t heads, kv_heads, head_dim, window;  // window 0: none
};

// Consecutive tokens of one sequence.
struct Query {
  int32_t sequence, token, tokens;
  int32_t position;  // of the first token

  int end() const { return position + tokens; }
};

// Query rows that are computed together: the tokens of some queries, times the heads that share a KV
// head. Several queries have their first `shared` keys in the same blocks, and no window.
struct Tile {
  int32_t first_query, queries, tokens, shared;
  int32_t first_visit = 0, last_visit = 0;
  int32_t splits = 0;    // that hold a visible key
  int64_t partial = -1;  // offset of its partials, or -1: one item computes all splits
};

// A chunk's keys [begin, end), and tokens of a tile that see some of them: from the tile's `token` on,
// the first at `position`. Tokens of several sequences count as if they followed each other.
struct Visit {
  int32_t sequence;  // whose block table leads to the keys
  int32_t token, tokens, position;
  int32_t begin, end;

  int split() const { return begin / SPLIT; }
};

struct Item {
  int32_t tile, kv_head;
  int32_t first_visit, visits;
  int32_t part;  // of the tile's splits, or -1: all of them
  int64_t cost;
};

struct Plan {
  std::vector<Query> queries;
  std::vector<Tile> tiles;
  std::vector<Visit> visits;
  std::vector<Item> items;
  std::vector<float> partials;
  std::unique_ptr<std::atomic<int32_t>[]> finished;  // splits done, per tile and head; ends at 0
  int threads = 1;
};

// Columns of a value row: the head size, up to whole vectors. What lies beyond it is undefined.
inline int value_columns(const Layer& layer) { return ceil_div(layer.head_dim, LANES) * LANES; }

inline int tile_tokens(const Layer& layer) {
  return std::max(1, TILE_TARGET / (layer.heads / layer.kv_heads));
}

inline int first_visible(const Layer& layer, int position) {
  return layer.window > 0 ? std::max(0, position - layer.window + 1) : 0;
}

// ---- tiles ----

// Tokens of one sequence that are alone with it in their tiles.
inline void add_tiles(const Layer& layer, Query query, Plan& plan) {
  const int size = tile_tokens(layer), last = query.token + query.tokens;
  for (; query.token < last; query.token += size, query.position += size) {
    query.tokens = std::min(size, last - query.token);
    plan.tiles.push_back({static_cast<int32_t>(plan.queries.size()), 1, query.tokens, 0});
    plan.queries.push_back(query);
  }
}

// Of the keys before two queries, so many lie in the same blocks, in whole chunks.
inline int shared_keys(const Step& step, const Query& a, const Query& b) {
  const int32_t *left = step.table(a.sequence), *right = step.table(b.sequence);
  const int most = std::min(a.position, b.position);
  int blocks = 0;
  while ((blocks + 1) * step.block_size <= most && left[blocks] == right[blocks]) ++blocks;
  return blocks * step.block_size / CHUNK * CHUNK;
}

// Tiles for queries of a few tokens. What many sequences share, a common beginning of prompts, is then
// read once for all of them (as in Hydragen, Juravsky et al. 2024, and vLLM's cascade attention).
// `most` tokens share a tile.
inline void add_shared_tiles(const Step& step, std::vector<Query>& queries, int most, Plan& plan) {
  const auto blocks = [&](const Query& q) { return q.position / step.block_size; };
  std::sort(queries.begin(), queries.end(), [&](const Query& a, const Query& b) {
    const int32_t *left = step.table(a.sequence), *right = step.table(b.sequence);
    return std::lexicographical_compare(left, left + blocks(a), right, right + blocks(b));
  });
  for (size_t first = 0, last; first < queries.size(); first = last) {
    int shared = 0, tokens = queries[first].tokens;
    for (last = first + 1; last < queries.size(); ++last) {
      const int common = shared_keys(step, queries[last - 1], queries[last]);
      const int then = last == first + 1 ? common : std::min(shared, common);
      const int64_t count = last - first;  // reading `shared` keys is spared for all but one
      if (then == 0 || then * count < shared * (count - 1) || tokens + queries[last].tokens > most)
        break;
      shared = then;
      tokens += queries[last].tokens;
    }
    plan.tiles.push_back({static_cast<int32_t>(plan.queries.size()),
                          static_cast<int32_t>(last - first), tokens, shared});
    plan.queries.insert(plan.queries.end(), queries.begin() + first, queries.begin() + last);
  }
}

// ---- visits and items ----

inline void add_chunks(Visit visit, int begin, int end, Plan& plan) {
  for (; begin < end; begin = visit.end) {
    visit.begin = begin;
    visit.end = std::min((begin / CHUNK + 1) * CHUNK, end);
    plan.visits.push_back(visit);
  }
}

// All visits of a tile, split by split: in each the shared keys come before the queries' own.
inline void add_visits(const Layer& layer, Tile& tile, Plan& plan) {
  const Query *queries = plan.queries.data() + tile.first_query, *end = queries + tile.queries;
  int last = 0;
  tile.first_visit = plan.visits.size();
  for (const Query* q = queries; q < end; ++q) last = std::max(last, q->end());
  for (int from = first_visible(layer, queries->position) / SPLIT * SPLIT; from < last;
       from += SPLIT) {
    add_chunks({queries->sequence, 0, tile.tokens, tile.shared}, from,
               std::min(from + SPLIT, tile.shared), plan);
    int token = 0;
    for (const Query* q = queries; q < end; token += q->tokens, ++q)
      add_chunks({q->sequence, token, q->tokens, q->position},
                 std::max({from, tile.shared, first_visible(layer, q->position)}),
                 std::min(from + SPLIT, q->end()), plan);
  }
  tile.last_visit = plan.visits.size();
}

// Relative cost: reading a key and its value weighs as much as four rows using it.
inline int64_t visit_cost(const Visit& visit, int group) {
  return int64_t{visit.tokens * group + 4} * (visit.end - visit.begin);
}

// The items of a tile: one for each head, or for each head and split if that is more than the `share`
// of a thread.
inline void add_items(const Layer& layer, int tile_index, int64_t share, Plan& plan) {
  Tile& tile = plan.tiles[tile_index];
  const int group = layer.heads / layer.kv_heads;
  Item whole{tile_index, 0, tile.first_visit, tile.last_visit - tile.first_visit, -1, 0};
  std::vector<Item> parts;
  for (int v = tile.first_visit; v < tile.last_visit; ++v) {
    const Visit& visit = plan.visits[v];
    if (parts.empty() || visit.split() != plan.visits[v - 1].split())
      parts.push_back({tile_index, 0, v, 0, tile.splits++, 0});
    ++parts.back().visits;
    parts.back().cost += visit_cost(visit, group);
    whole.cost += visit_cost(visit, group);
  }
  if (tile.splits == 1 || whole.cost <= share) {
    parts.assign(1, whole);
  } else {
    tile.partial = plan.partials.size();
    plan.partials.resize(tile.partial + int64_t{layer.kv_heads} * tile.splits * tile.tokens *
                                            group * (value_columns(layer) + 2));
  }
  for (int head = 0; head < layer.kv_heads; ++head)
    for (Item& item : parts) {
      item.kv_head = head;
      plan.items.push_back(item);
    }
}

// Threads: one, or all. A smaller team would make libgomp end the threads it leaves out and start
// them again next time. Entering a parallel region must be small against the work.
inline Plan* make_plan(const Step& step, const Layer& layer) {
  auto plan = std::make_unique<Plan>();
  const int group = layer.heads / layer.kv_heads;
  std::vector<Query> few;
  for (int s = 0; s < step.sequences; ++s) {
    const int first = step.query_start[s], count = step.query_start[s + 1] - first;
    if (count == 0) continue;
    const Query query{s, first, count, step.context[s] - count};
    if (layer.window == 0 && count * group <= FEW_QUERY_ROWS && query.position >= CHUNK)
      few.push_back(query);
    else
      add_tiles(layer, query, *plan);
  }
  // Every thread shall have some items.
  const int fair = static_cast<int>(few.size()) * layer.kv_heads / (4 * step.threads);
  add_shared_tiles(step, few, std::min(fair, tile_tokens(layer)), *plan);

  int64_t total = 0;
  for (Tile& tile : plan->tiles) add_visits(layer, tile, *plan);
  for (const Visit& visit : plan->visits) total += visit_cost(visit, group) * layer.kv_heads;
  constexpr int64_t worth_a_team = 1 << 20;  // about 90 us of one core
  plan->threads = total * layer.head_dim < worth_a_team ? 1 : step.threads;
  const int64_t share = plan->threads == 1 ? total : total / (4 * plan->threads);
  for (size_t t = 0; t < plan->tiles.size(); ++t) add_items(layer, t, share, *plan);
  if (plan->threads > 1)  // longest first: what is taken last, from the backs of runs, is shorter
    std::stable_sort(plan->items.begin(), plan->items.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
  plan->finished = std::make_unique<std::atomic<int32_t>[]>(plan->tiles.size() * layer.kv_heads);
  return plan.release();
}

}  // namespace slipstream
