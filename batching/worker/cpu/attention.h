// Paged attention on CPU: see attention.py for the contract, the layout and the promises.
//
// A query row's result is a left fold over splits (SPLIT keys, at multiples of SPLIT), each split a
// left fold over chunks (CHUNK keys). Which thread computes which split, and which rows share a
// tile, is free: it changes time, never bits.
#pragma once

#include "attention_amx.h"
#include "attention_pages.h"
#include "team.h"

namespace slipstream {

// One thread's buffers for one tile; grown to the largest tile seen, then kept.
template <class T>
struct Scratch {
  Aligned<Unit> query, packed_keys;
  Aligned<float> scores, split_output, output, shrink;
  Aligned<T> weights;
  std::vector<RowState> split_state, state;
#if SLIPSTREAM_AMX
  AmxScratch amx;
#endif

  void fit(int rows, int units, int columns) {
    rows += TILE_HEIGHT;  // that tiles may read, and scores be written to, behind the last
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
class Attend {
 public:
  Attend(const Step& step, const Layer& layer, const Tensors& tensors, Scratch<T>& scratch,
         const Plan& plan, const Item& item)
      : step_(step), layer_(layer), tensors_(tensors), scratch_(scratch), plan_(plan), item_(item),
        tile_(plan.tiles[item.tile]) {
    scratch_.fit(rows_, units_, columns_);
  }

  void run(std::atomic<int32_t>& finished, float* partials) {
    load_query();
    const Visit *visit = plan_.visits.data() + item_.first_visit, *end = visit + item_.visits;
    if (item_.part >= 0) {
      attend_split(visit, end);
      if (!keep_part(finished, partials)) return;
    } else if (tile_.splits == 1) {
      attend_split(visit, end);
      std::swap(scratch_.output, scratch_.split_output);
      std::swap(scratch_.state, scratch_.split_state);
    } else {
      reset();
      while (visit < end) {
        visit = attend_split(visit, end);
        merge(scratch_.split_state.data(), scratch_.split_output.data());
      }
    }
    write_output();
  }

 private:
  // Calls use(token of the step, row of the tile) for the first of each token's rows.
  template <class Use>
  void for_each_token(Use&& use) const {
    const Query *query = plan_.queries.data() + tile_.first_query, *end = query + tile_.queries;
    for (int row = 0; query < end; ++query)
      for (int i = 0; i < query->tokens; ++i, row += group_) use(query->token + i, row);
  }

  int64_t page(const Visit& visit, int position) const {
    return int64_t{step_.table(visit.sequence)[position / layout_.size]} * layer_.kv_heads +
           item_.kv_head;
  }

  void load_query() {
    T* target = reinterpret_cast<T*>(scratch_.query.data());
    for_each_token([&](int token, int row) {
      const T* heads = static_cast<const T*>(tensors_.query) + token * tensors_.query_token +
                       item_.kv_head * group_ * tensors_.query_head;
      for (int i = 0; i < group_; ++i)
        std::memcpy(target + (row + i) * dim_, heads + i * tensors_.query_head, dim_ * sizeof(T));
    });
  }

  const Unit* key(const Visit& visit, int position) const {
    return tensors_.key_pages + layout_.key(page(visit, position), position % layout_.size);
  }

  const Unit* value(const Visit& visit, int position) const {
    return tensors_.value_pages + layout_.value(page(visit, position), position % layout_.size);
  }

  // Keys of pages too narrow for a vector are copied side by side.
  void locate_keys(const Visit& visit, Chunk& chunk) {
    if (layout_.whole_vectors()) {
      chunk.key_stride = layout_.key_stride();
      for (int v = chunk.begin / LANES; v * LANES < chunk.end; ++v)
        chunk.keys[v] = key(visit, chunk.first + v * LANES);
      return;
    }
    chunk.key_stride = CHUNK;
    for (int i = chunk.begin; i < chunk.end; ++i) {
      const Unit* source = key(visit, chunk.first + i);
      Unit* target = scratch_.packed_keys.data() + i;
      for (int u = 0; u < units_; ++u) target[u * CHUNK] = source[u * layout_.key_stride()];
    }
    for (int v = 0; v < CHUNK / LANES; ++v)
      chunk.keys[v] = scratch_.packed_keys.data() + v * LANES;
  }

  void locate_values(const Visit& visit, Chunk& chunk) {
    constexpr int PER = PER_UNIT<T>;
    chunk.value_stride = layout_.value_stride();
    for (int i = chunk.begin; i < chunk.end;) {
      const int position = chunk.first + i, size = layout_.size;
      const int stop = std::min(chunk.end, i + size - position % size);
      const Unit* row = value(visit, position);
      for (; i < stop; i += PER, row += LANES) chunk.values[i / PER] = row;
    }
  }

  // Folds one chunk into the split's state.
  void attend_chunk(const Visit& visit) {
    Chunk chunk;
    chunk.first = visit.begin / CHUNK * CHUNK;
    chunk.begin = (visit.begin - chunk.first) & ~1;
    chunk.end = visit.end - chunk.first;
    // Tokens that see some key of the chunk: not before it, and not past it by a whole window.
    const int from = std::max(0, visit.begin - visit.position);
    const int to = layer_.window > 0 ? std::min<int>(visit.tokens, visit.end - 1 + layer_.window -
                                                                       visit.position)
                                     : visit.tokens;
    const int row = (visit.token + from) * group_, count = (to - from) * group_;
    compute_scores(visit, chunk, row, count);
    const Scoring how(layer_.scale, layer_.softcap);
    for (int r = 0; r < count; r += UPDATE_ROWS)
      with_constant<UPDATE_ROWS>(count - r, [&](auto rows) {
        Seen seen[rows];
        for (int i = 0; i < rows; ++i) {
          const int position = visit.position + from + (r + i) / group_;
          seen[i] = {std::max(chunk.begin, first_visible(layer_, position) - chunk.first),
                     std::min(chunk.end, position + 1 - chunk.first)};
        }
        update_rows<T, rows>(how, scratch_.scores.data() + r * CHUNK, seen, chunk,
                             scratch_.split_state.data() + row + r,
                             scratch_.weights.data() + r * CHUNK, scratch_.shrink.data() + r);
      });
    accumulate_values(chunk, row, count);
  }

  void compute_scores(const Visit& visit, Chunk& chunk, int row, int count) {
    const Unit* query = scratch_.query.data() + row * units_;
#if SLIPSTREAM_AMX
    if (fits_tiles()) {
      locate_steps(visit, chunk);
      return compute_scores_amx(query, count, units_, steps_, scratch_.scores.data());
    }
#endif
    locate_keys(visit, chunk);
    locate_values(visit, chunk);
    slipstream::compute_scores<T>(query, count, units_, chunk, scratch_.scores.data());
  }

  void accumulate_values(const Chunk& chunk, int row, int count) {
    const T* weights = scratch_.weights.data();
    float* output = scratch_.split_output.data() + row * columns_;
#if SLIPSTREAM_AMX
    if constexpr (PER_UNIT<T> == 2)
      if (fits_tiles())
        return accumulate_values_amx(weights, count, steps_, scratch_.shrink.data(), columns_,
                                     scratch_.amx.sums, output);
#endif
    slipstream::accumulate_values<T>(weights, count, chunk, scratch_.shrink.data(), columns_,
                                     output);
  }

#if SLIPSTREAM_AMX
  AmxChunk steps_;

  bool fits_tiles() const {
    return PER_UNIT<T> == 2 && dim_ % STEP == 0 && layout_.size % STEP == 0 && tiles_granted();
  }

  void locate_steps(const Visit& visit, const Chunk& chunk) {
    steps_.begin = chunk.begin / STEP * STEP;
    steps_.end = ceil_div(chunk.end, STEP) * STEP;
    steps_.value_stride = layout_.value_stride();
    for (int k = steps_.begin; k < steps_.end; k += STEP) {
      steps_.keys[k / STEP] = key(visit, chunk.first + k);
      steps_.values[k / STEP] = value(visit, chunk.first + k);
    }
    if (chunk.end < steps_.end)
      mask_values(steps_, chunk.end - (steps_.end - STEP), columns_, scratch_.amx.tail);
  }
#endif

  // Leaves the unnormalised output and softmax state of the first visit's split in the scratch, and
  // returns the next split's first visit.
  const Visit* attend_split(const Visit* visit, const Visit* end) {
    std::fill_n(scratch_.split_output.begin(), rows_ * columns_, 0.0f);
    std::fill_n(scratch_.split_state.begin(), rows_, RowState{});
    for (const int split = visit->split(); visit < end && visit->split() == split; ++visit)
      attend_chunk(*visit);
    return visit;
  }

  void reset() {
    std::fill_n(scratch_.output.begin(), rows_ * columns_, 0.0f);
    std::fill_n(scratch_.state.begin(), rows_, RowState{});
  }

  // Folds a split into the tile's result.
  void merge(const RowState* split_state, const float* split_output) {
    for (int r = 0; r < rows_; ++r) {
      const RowState& part = split_state[r];
      RowState& whole = scratch_.state[r];
      if (part.sum == 0) continue;  // this row sees no key of the split
      const float max = std::max(whole.max, part.max);
      const float old = whole.max == NEG_INF ? 0.0f : power_of_two(whole.max - max);
      const float add = power_of_two(part.max - max);
      whole.sum = whole.sum * old + part.sum * add;
      whole.max = max;
      float* out = scratch_.output.data() + r * columns_;
      for (int i = 0; i < columns_; i += LANES)
        store(out + i, multiply_add(load(out + i), splat(old),
                                    load(split_output + r * columns_ + i) * splat(add)));
    }
  }

  // For one split of a tile whose splits run apart. Whoever finishes last folds them, in order: true
  // then.
  bool keep_part(std::atomic<int32_t>& finished, float* partials) {
    const int64_t size = int64_t{rows_} * (columns_ + 2);
    float* all = partials + tile_.partial + item_.kv_head * tile_.splits * size;
    float* mine = all + item_.part * size;
    std::memcpy(mine, scratch_.split_state.data(), rows_ * sizeof(RowState));
    std::copy_n(scratch_.split_output.begin(), rows_ * columns_, mine + rows_ * 2);
    if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < tile_.splits) return false;
    finished.store(0, std::memory_order_relaxed);
    reset();
    for (const float* part = all; part < all + tile_.splits * size; part += size)
      merge(reinterpret_cast<const RowState*>(part), part + rows_ * 2);
    return true;
  }

  void write_output() {
    for_each_token([&](int token, int row) {
      T* target = static_cast<T*>(tensors_.output) + token * tensors_.output_token;
      for (int i = 0; i < group_; ++i) {
        const int head = item_.kv_head * group_ + i;
        write_row(row + i, head, target + head * dim_);
      }
    });
  }

  void write_row(int row, int head, T* target) {
    const RowState& state = scratch_.state[row];
    float shrink = 1.0f, sum = state.sum;
    if (layer_.sinks) {
      const float sink = layer_.sinks[head] * LOG2_E, max = std::max(state.max, sink);
      shrink = power_of_two(state.max - max);
      sum = sum * shrink + power_of_two(sink - max);
    }
    const float* source = scratch_.output.data() + row * columns_;
    const Vec factor = splat(shrink / sum);
    int i = 0;
    for (; i + LANES <= dim_; i += LANES) store_as(target + i, load(source + i) * factor);
    if (i < dim_) {
      T lanes[LANES];
      store_as(lanes, load(source + i) * factor);
      std::copy_n(lanes, dim_ - i, target + i);
    }
  }

  const Step& step_;
  const Layer& layer_;
  const Tensors& tensors_;
  Scratch<T>& scratch_;
  const Plan& plan_;
  const Item& item_;
  const Tile& tile_;
  const int group_ = layer_.heads / layer_.kv_heads, rows_ = tile_.tokens * group_;
  const PageLayout<T> layout_{step_, layer_};
  const int dim_ = layer_.head_dim, columns_ = layout_.columns, units_ = layout_.units;
};

// All of a layer's attention, by all threads of the team; keys and values are written.
template <class T>
void share_attention(Team& team, const Step& step, const Layer& layer, const Tensors& tensors,
                     Plan& plan) {
  static thread_local Scratch<T> scratch;
  team.share(static_cast<int>(plan.items.size()), [&](int i) {
    const Item& item = plan.items[i];
    Attend<T>(step, layer, tensors, scratch, plan, item)
        .run(plan.finished[item.tile * layer.kv_heads + item.kv_head], plan.partials.data());
  });
}

}  // namespace slipstream
