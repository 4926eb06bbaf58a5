// Paged attention on CPU: see attention.py for the contract, the layout and the promises.
//
// A query row's result is a left fold over splits (SPLIT keys, at multiples of SPLIT), each split a
// left fold over chunks (CHUNK keys). Which thread computes which split, and which rows share a
// tile, is free: it changes time, never bits.
#pragma once

#include "attention_amx.h"
#include "attention_plan.h"
#include "attention_tiles.h"

namespace slipstream {

constexpr int WRITE_RUN = 32;  // tokens of one head written by a thread at a time

struct Tensors {
  const void *query, *key, *value;
  Unit *key_pages, *value_pages;
  void* output;
  // In elements.
  int64_t query_token, query_head, key_token, key_head, value_token, value_head, output_token;
};

// ---- writing keys and values ----

// Where one token's key or value of one head comes from and goes to.
struct Placement {
  const char *key, *value;
  int64_t page;
  int offset;  // in the page; negative: nowhere
};

template <class T>
static Placement place(const Step& step, const Layer& layer, const Tensors& tensors, int token,
                       int head) {
  const int64_t slot = step.slots[token], size = step.block_size;
  const T* key = static_cast<const T*>(tensors.key) + token * tensors.key_token;
  const T* value = static_cast<const T*>(tensors.value) + token * tensors.value_token;
  return {reinterpret_cast<const char*>(key + head * tensors.key_head),
          reinterpret_cast<const char*>(value + head * tensors.value_head),
          slot / size * layer.kv_heads + head, static_cast<int>(slot < 0 ? -1 : slot % size)};
}

static void write_key(const Placement& token, Unit* pages, int units, int size) {
  Unit* target = pages + token.page * (units * size) + token.offset;
  for (int u = 0; u < units; ++u)
    std::memcpy(target + u * size, token.key + u * sizeof(Unit), sizeof(Unit));
}

// A key goes to as many cache lines as it has units, few of which are in the cache: this fetches them
// while the token's heads are prepared.
static void prefetch_key(const Placement& token, const Unit* pages, int units, int size) {
  if (token.offset < 0) return;
  const Unit* target = pages + token.page * (units * size) + token.offset;
  for (int u = 0; u < units; ++u) __builtin_prefetch(target + u * size, 1, 3);
}

static void write_value(float, const Placement& token, Unit* row, int dim) {
  std::memcpy(row, token.value, dim * sizeof(Unit));
}

// Touches nothing of the pair's other token, which another thread may be writing.
static void write_value(BFloat16, const Placement& token, Unit* row, int dim) {
  for (int i = 0; i < dim; ++i)
    std::memcpy(reinterpret_cast<char*>(row + i) + token.offset % 2 * sizeof(BFloat16),
                token.value + i * sizeof(BFloat16), sizeof(BFloat16));
}

static void write_pair(const Placement& even, const Placement& odd, Unit* row, int dim) {
  const auto* low = reinterpret_cast<const uint16_t*>(even.value);
  const auto* high = reinterpret_cast<const uint16_t*>(odd.value);
  for (int i = 0; i < dim; ++i) row[i] = low[i] | Unit{high[i]} << 16;
}

template <class T>
static void write_run(const Step& step, const Layer& layer, const Tensors& tensors, int run) {
  constexpr int PER = PER_UNIT<T>;
  const int first = run / layer.kv_heads * WRITE_RUN, head = run % layer.kv_heads;
  const int last = std::min(first + WRITE_RUN, step.tokens), size = step.block_size;
  for (int token = first; token < last; ++token) {
    const Placement now = place<T>(step, layer, tensors, token, head);
    if (now.offset < 0) continue;
    write_key(now, tensors.key_pages, layer.head_dim / PER, size);
    Unit* row = tensors.value_pages + (now.page * size + now.offset) / PER * value_columns(layer);
    if (PER == 2 && now.offset % 2 == 0 && token + 1 < last &&
        step.slots[token + 1] == step.slots[token] + 1) {
      const Placement next = place<T>(step, layer, tensors, ++token, head);
      write_key(next, tensors.key_pages, layer.head_dim / PER, size);
      write_pair(now, next, row, layer.head_dim);
    } else {
      write_value(T{}, now, row, layer.head_dim);
    }
  }
}

// ---- attending ----

// One thread's buffers for one tile; grown to the largest tile seen, then kept.
template <class T>
struct Scratch {
  std::vector<Unit> query, packed_keys;
  std::vector<float> scores, split_output, output, shrink;
  std::vector<T> weights;
  std::vector<RowState> split_state, state;
#if SLIPSTREAM_AMX
  AmxScratch amx;
#endif

  void fit(int rows, int units, int columns) {
    const size_t needed = static_cast<size_t>(rows) * columns;
    if (output.size() >= needed && state.size() >= static_cast<size_t>(rows) &&
        packed_keys.size() >= static_cast<size_t>(units) * CHUNK)
      return;
    query.resize(needed);
    packed_keys.resize(static_cast<size_t>(units) * CHUNK);
    scores.resize(static_cast<size_t>(rows) * CHUNK);
    weights.resize(static_cast<size_t>(rows) * CHUNK);
    output.resize(needed);
    split_output.resize(needed);
    shrink.resize(rows);
    split_state.resize(rows);
    state.resize(rows);
  }
};

template <class T>
struct Attend {
  const Step& step;
  const Layer& layer;
  const Tensors& tensors;
  Scratch<T>& scratch;
  const Tile& tile;
  const int group = layer.heads / layer.kv_heads, rows = tile.tokens * group;
  const int dim = layer.head_dim, columns = value_columns(layer), size = step.block_size;
  const int units = dim / PER_UNIT<T>;

  int64_t page(int block) const {
    const int32_t* table = step.block_tables + tile.sequence * step.table_stride;
    return int64_t{table[block]} * layer.kv_heads + tile.kv_head;
  }

  // Key `position`; its units are block_size apart.
  const Unit* key(int position) const {
    return tensors.key_pages + page(position / size) * (units * size) + position % size;
  }

  void load_query() {
    const T* query = static_cast<const T*>(tensors.query);
    T* target = reinterpret_cast<T*>(scratch.query.data());
    for (int r = 0; r < rows; ++r)
      std::memcpy(target + r * dim,
                  query + (tile.token + r / group) * tensors.query_token +
                      (tile.kv_head * group + r % group) * tensors.query_head,
                  dim * sizeof(T));
  }

  // Keys of pages too narrow for a vector are copied side by side.
  void locate_keys(Chunk& chunk) {
    if (size % LANES == 0) {
      chunk.key_stride = size;
      for (int v = chunk.begin / LANES; v * LANES < chunk.end; ++v)
        chunk.keys[v] = key(chunk.first + v * LANES);
      return;
    }
    chunk.key_stride = CHUNK;
    for (int i = chunk.begin; i < chunk.end; ++i) {
      const Unit* source = key(chunk.first + i);
      Unit* target = scratch.packed_keys.data() + i;
      for (int u = 0; u < units; ++u) target[u * CHUNK] = source[u * size];
    }
    for (int v = 0; v < CHUNK / LANES; ++v)
      chunk.keys[v] = scratch.packed_keys.data() + v * LANES;
  }

  void locate_values(Chunk& chunk) {
    constexpr int PER = PER_UNIT<T>;
    for (int i = chunk.begin; i < chunk.end;) {
      const int offset = (chunk.first + i) % size, stop = std::min(chunk.end, i + size - offset);
      const int64_t block = page((chunk.first + i) / size) * size + offset;
      const Unit* row = tensors.value_pages + block / PER * columns;
      for (; i < stop; i += PER, row += columns) chunk.values[i / PER] = row;
    }
  }

  // Folds one chunk into the split's state. Its keys: those from `begin` to `end` (positions).
  void attend_chunk(int begin, int end) {
    Chunk chunk;
    chunk.first = begin / CHUNK * CHUNK;
    chunk.begin = (begin - chunk.first) & ~1;
    chunk.end = end - chunk.first;
    // Tokens that see some key of the chunk: not before it, and not past it by a whole window.
    const int from = std::max(0, begin - tile.position);
    const int to = layer.window > 0
                       ? std::min<int>(tile.tokens, end - 1 + layer.window - tile.position)
                       : tile.tokens;
    const int row = from * group, count = (to - from) * group;
    compute_scores(chunk, row, count);
    const Scoring how(layer.scale, layer.softcap);
    for (int r = 0; r < count; ++r) {
      const int position = tile.position + (row + r) / group;
      const int first = std::max(chunk.begin, first_visible(layer, position) - chunk.first);
      const int last = std::min(chunk.end, position + 1 - chunk.first);
      scratch.shrink[r] =
          update_row<T>(how, scratch.scores.data() + r * CHUNK, first, last, chunk,
                        scratch.split_state[row + r], scratch.weights.data() + r * CHUNK);
    }
    accumulate_values(chunk, row, count);
  }

  void compute_scores(Chunk& chunk, int row, int count) {
    const Unit* query = scratch.query.data() + row * units;
#if SLIPSTREAM_AMX
    if (fits_tiles()) {
      locate_steps(chunk);
      return compute_scores_amx(query, count, units, steps, size, scratch.scores.data());
    }
#endif
    locate_keys(chunk);
    locate_values(chunk);
    slipstream::compute_scores<T>(query, count, units, chunk, scratch.scores.data());
  }

  void accumulate_values(const Chunk& chunk, int row, int count) {
    const T* weights = scratch.weights.data();
    float* output = scratch.split_output.data() + row * columns;
#if SLIPSTREAM_AMX
    if constexpr (PER_UNIT<T> == 2)
      if (fits_tiles())
        return accumulate_values_amx(weights, count, steps, scratch.shrink.data(), columns,
                                     scratch.amx.sums, output);
#endif
    slipstream::accumulate_values<T>(weights, count, chunk, scratch.shrink.data(), columns, output);
  }

#if SLIPSTREAM_AMX
  AmxChunk steps;

  bool fits_tiles() const {
    return PER_UNIT<T> == 2 && dim % STEP == 0 && size % STEP == 0 && tiles_granted();
  }

  void locate_steps(const Chunk& chunk) {
    steps.begin = chunk.begin / STEP * STEP;
    steps.end = ceil_div(chunk.end, STEP) * STEP;
    for (int k = steps.begin; k < steps.end; k += STEP) {
      const int offset = (chunk.first + k) % size;
      const int64_t block = page((chunk.first + k) / size);
      const Unit* values = tensors.value_pages + (block * size + offset) / 2 * columns;
      steps.keys[k / STEP] = tensors.key_pages + block * (units * size) + offset;
      steps.values[k / STEP] =
          k + STEP <= chunk.end ? values
                                : mask_values(values, chunk.end - k, columns, scratch.amx.tail);
    }
  }
#endif

  // Leaves the split's unnormalised output and softmax state in the scratch.
  void attend_split(int split) {
    std::fill_n(scratch.split_output.begin(), rows * columns, 0.0f);
    std::fill_n(scratch.split_state.begin(), rows, RowState{});
    const int limit = std::min((split + 1) * SPLIT, tile.position + tile.tokens);
    int begin = std::max(split * SPLIT, first_visible(layer, tile.position));
    while (begin < limit) {
      const int end = std::min((begin / CHUNK + 1) * CHUNK, limit);
      attend_chunk(begin, end);
      begin = end;
    }
  }

  void reset() {
    std::fill_n(scratch.output.begin(), rows * columns, 0.0f);
    std::fill_n(scratch.state.begin(), rows, RowState{});
  }

  // Folds a split into the tile's result.
  void merge(const RowState* split_state, const float* split_output) {
    for (int r = 0; r < rows; ++r) {
      const RowState& part = split_state[r];
      RowState& whole = scratch.state[r];
      if (part.sum == 0) continue;  // this row sees no key of the split
      const float max = std::max(whole.max, part.max);
      const float old = whole.max == NEG_INF ? 0.0f : power_of_two(whole.max - max);
      const float add = power_of_two(part.max - max);
      whole.sum = whole.sum * old + part.sum * add;
      whole.max = max;
      float* out = scratch.output.data() + r * columns;
      for (int i = 0; i < columns; i += LANES)
        store(out + i, multiply_add(load(out + i), splat(old),
                                    load(split_output + r * columns + i) * splat(add)));
    }
  }

  void write_output() {
    T* output = static_cast<T*>(tensors.output);
    for (int r = 0; r < rows; ++r) {
      const int head = tile.kv_head * group + r % group;
      const RowState& state = scratch.state[r];
      float shrink = 1.0f, sum = state.sum;
      if (layer.sinks) {
        const float sink = layer.sinks[head] * LOG2_E, max = std::max(state.max, sink);
        shrink = power_of_two(state.max - max);
        sum = sum * shrink + power_of_two(sink - max);
      }
      T* target = output + (tile.token + r / group) * tensors.output_token + head * dim;
      const float* source = scratch.output.data() + r * columns;
      const Vec factor = splat(shrink / sum);
      int i = 0;
      for (; i + LANES <= dim; i += LANES) store_as(target + i, load(source + i) * factor);
      if (i < dim) {
        T lanes[LANES];
        store_as(lanes, load(source + i) * factor);
        std::copy_n(lanes, dim - i, target + i);
      }
    }
  }

  void whole() {
    reset();
    for (int s = 0; s < tile.splits; ++s) {
      attend_split(tile.first_split + s);
      merge(scratch.split_state.data(), scratch.split_output.data());
    }
    write_output();
  }

  // One split of a tile whose splits run apart; whoever finishes last folds them, in order.
  void part(int split, Plan& plan, int index) {
    attend_split(tile.first_split + split);
    const int64_t size = int64_t{rows} * (columns + 2);
    float* mine = plan.partials.data() + tile.partial + split * size;
    std::memcpy(mine, scratch.split_state.data(), rows * sizeof(RowState));
    std::copy_n(scratch.split_output.begin(), rows * columns, mine + rows * 2);
    if (plan.finished[index].fetch_add(1, std::memory_order_acq_rel) + 1 < tile.splits) return;
    plan.finished[index].store(0, std::memory_order_relaxed);
    reset();
    for (int s = 0; s < tile.splits; ++s) {
      const float* theirs = plan.partials.data() + tile.partial + s * size;
      merge(reinterpret_cast<const RowState*>(theirs), theirs + rows * 2);
    }
    write_output();
  }
};

template <class T>
static void run_item(const Step& step, const Layer& layer, const Tensors& tensors, Plan& plan,
                     const Item& item) {
  static thread_local Scratch<T> scratch;
  const Tile& tile = plan.tiles[item.tile];
  scratch.fit(tile.tokens * (layer.heads / layer.kv_heads), layer.head_dim / PER_UNIT<T>,
              value_columns(layer));
  Attend<T> attend{step, layer, tensors, scratch, tile};
  attend.load_query();
  if (item.split < 0)
    attend.whole();
  else
    attend.part(item.split, plan, item.tile);
}

}  // namespace slipstream
