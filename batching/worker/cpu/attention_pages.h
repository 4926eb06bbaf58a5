// Where pages hold keys and values, and writing them there.
#pragma once

#include "attention_plan.h"

namespace slipstream {

constexpr int WRITE_RUN = 32;  // tokens of one head written by a thread at a time

struct Tensors {
  const void *query, *key, *value;
  Unit *key_pages, *value_pages;
  void* output;
  // In elements.
  int64_t query_token, query_head, key_token, key_head, value_token, value_head, output_token;
};

// One head's keys and values in a block of `size` tokens: see attention.py. Sixteen keys of whole
// vectors, or sixteen dimensions of the values, lie in one piece.
template <class T>
struct PageLayout {
  const int size, units, columns;  // units of a key; columns of a value row

  PageLayout(const Step& step, const Layer& layer)
      : size(step.block_size), units(layer.head_dim / PER_UNIT<T>), columns(value_columns(layer)) {}

  bool whole_vectors() const { return size % LANES == 0; }

  // Unit u of a key is u * key_stride() from here.
  int64_t key(int64_t page, int offset) const {
    const int64_t start = page * units * size;
    return whole_vectors() ? start + offset / LANES * (units * LANES) + offset % LANES
                           : start + offset;
  }
  int64_t key_stride() const { return whole_vectors() ? LANES : size; }

  // Dimension i of a value is i / 16 * value_stride() + i % 16 from here.
  int64_t value(int64_t page, int offset) const {
    return (page * columns * size + offset * LANES) / PER_UNIT<T>;
  }
  int64_t value_stride() const { return size / PER_UNIT<T> * LANES; }
};

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

template <class T>
static void write_key(const PageLayout<T>& layout, const Placement& token, Unit* pages) {
  Unit* target = pages + layout.key(token.page, token.offset);
  for (int u = 0; u < layout.units; ++u)
    std::memcpy(target + u * layout.key_stride(), token.key + u * sizeof(Unit), sizeof(Unit));
}

// A key goes to as many cache lines as it has units, few of which are in the cache: this fetches them
// while the token's heads are prepared.
template <class T>
static void prefetch_key(const PageLayout<T>& layout, const Placement& token, const Unit* pages) {
  if (token.offset < 0) return;
  const Unit* target = pages + layout.key(token.page, token.offset);
  for (int u = 0; u < layout.units; ++u)
    __builtin_prefetch(target + u * layout.key_stride(), 1, 3);
}

// Of a pair of tokens touches only this one: another thread may be writing the other.
template <class T>
static void write_value(const PageLayout<T>& layout, const Placement& token, Unit* row, int dim) {
  const int half = token.offset % PER_UNIT<T> * sizeof(T);
  for (int first = 0; first < dim; first += LANES, row += layout.value_stride())
    for (int i = first; i < std::min(dim, first + LANES); ++i)
      std::memcpy(reinterpret_cast<char*>(row + i - first) + half, token.value + i * sizeof(T),
                  sizeof(T));
}

template <class T>
static void write_pair(const PageLayout<T>& layout, const Placement& even, const Placement& odd,
                       Unit* row, int dim) {
  const auto* low = reinterpret_cast<const uint16_t*>(even.value);
  const auto* high = reinterpret_cast<const uint16_t*>(odd.value);
  int first = 0;
  for (; first + LANES <= dim; first += LANES, row += layout.value_stride()) {
    Half a, b;
    std::memcpy(&a, low + first, sizeof a);
    std::memcpy(&b, high + first, sizeof b);
    const Int pairs = __builtin_convertvector(a, Int) | __builtin_convertvector(b, Int) << 16;
    std::memcpy(row, &pairs, sizeof pairs);
  }
  for (int i = first; i < dim; ++i) row[i - first] = low[i] | Unit{high[i]} << 16;
}

template <class T>
static void write_run(const Step& step, const Layer& layer, const Tensors& tensors, int run) {
  const PageLayout<T> layout(step, layer);
  const int first = run / layer.kv_heads * WRITE_RUN, head = run % layer.kv_heads;
  const int last = std::min(first + WRITE_RUN, step.tokens);
  for (int token = first; token < last; ++token) {
    const Placement now = place<T>(step, layer, tensors, token, head);
    if (now.offset < 0) continue;
    write_key(layout, now, tensors.key_pages);
    Unit* row = tensors.value_pages + layout.value(now.page, now.offset / PER_UNIT<T> * PER_UNIT<T>);
    if (PER_UNIT<T> == 2 && now.offset % 2 == 0 && token + 1 < last &&
        step.slots[token + 1] == step.slots[token] + 1) {
      const Placement next = place<T>(step, layer, tensors, ++token, head);
      write_key(layout, next, tensors.key_pages);
      write_pair(layout, now, next, row, layer.head_dim);
    } else {
      write_value(layout, now, row, layer.head_dim);
    }
  }
}

}  // namespace slipstream
