// Where pages hold keys and values, and writing them there.
#pragma once

#include "attention_plan.h"

namespace slipstream {

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

constexpr Placement NOWHERE{nullptr, nullptr, 0, -1};

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

// Tokens of a step, and the KV head, that a thread prepares and writes at a time.
struct Stretch {
  int first, last, head;
};

// All of a step's: long ones, so that what is prepared first has arrived from memory when it is written, but
// two for each of so many threads where there are tokens enough.
class Stretches {
 public:
  static constexpr int LONGEST = 32, SHORTEST = 4;

  Stretches(const Step& step, const Layer& layer, int threads)
      : tokens_(step.tokens), heads_(layer.kv_heads) {
    while (threads > 1 && count() < 2 * threads && length_ > SHORTEST) length_ /= 2;
  }

  int count() const { return ceil_div(tokens_, length_) * heads_; }

  Stretch operator[](int i) const {
    const int first = i / heads_ * length_;
    return {first, std::min(first + length_, tokens_), i % heads_};
  }

 private:
  const int tokens_, heads_;
  int length_ = LONGEST;
};

template <class T>
static void write_key(const PageLayout<T>& layout, const Placement& token, Unit* pages) {
  Unit* target = pages + layout.key(token.page, token.offset);
  for (int u = 0; u < layout.units; ++u)
    std::memcpy(target + u * layout.key_stride(), token.key + u * sizeof(Unit), sizeof(Unit));
}

// Sixteen keys, `stride` bytes apart, that fill their vectors.
template <class T>
static void write_keys(const PageLayout<T>& layout, const Placement& first, int64_t stride,
                       Unit* pages) {
  Unit* target = pages + layout.key(first.page, first.offset);
  int u = 0;
#if defined(__AVX512F__)
  for (; u + LANES <= layout.units; u += LANES) {
    Int rows[LANES];
    for (int k = 0; k < LANES; ++k)
      rows[k] = read_lanes<Int>(first.key + k * stride + u * sizeof(Unit));
    transpose(rows);
    for (int k = 0; k < LANES; ++k) write_lanes(target + (u + k) * LANES, rows[k]);
  }
#endif
  for (; u < layout.units; ++u)
    for (int k = 0; k < LANES; ++k)
      std::memcpy(target + u * LANES + k, first.key + k * stride + u * sizeof(Unit), sizeof(Unit));
}

// A token goes to many cache lines, few of which are in the cache: this fetches those that the one before
// it does not go to, while the token's heads are prepared.
template <class T>
static void prefetch_token(const PageLayout<T>& layout, const Tensors& tensors, const Placement& now,
                           const Placement& before) {
  if (now.offset < 0) return;
  const auto fresh = [&](int tokens) {  // of which a line holds something
    return before.offset < 0 || before.page != now.page ||
           before.offset / tokens != now.offset / tokens;
  };
  const Unit* keys = tensors.key_pages + layout.key(now.page, now.offset);
  for (int u = 0; fresh(LANES) && u < layout.units; ++u)
    __builtin_prefetch(keys + u * layout.key_stride(), 1, 3);
  constexpr int PER = PER_UNIT<T>;
  const Unit* values = tensors.value_pages + layout.value(now.page, now.offset / PER * PER);
  for (int i = 0; fresh(PER) && i < layout.columns; i += LANES, values += layout.value_stride())
    __builtin_prefetch(values, 1, 3);
}

// Of a pair of tokens touches only this one: another thread may be writing the other.
template <class T>
static void write_value(const PageLayout<T>& layout, const Placement& token, Unit* row, int dim) {
  const int place = token.offset % PER_UNIT<T>;
  int first = 0;
#if defined(__AVX512BW__)
  for (; PER_UNIT<T> == 2 && first + LANES <= dim; first += LANES, row += layout.value_stride()) {
    const Int units = widen(read_lanes<Half>(token.value + first * sizeof(T))) << 16 * place;
    _mm512_mask_storeu_epi16(row, 0x55555555u << place, (__m512i)units);
  }
#endif
  for (; first < dim; first += LANES, row += layout.value_stride())
    for (int i = first; i < std::min(dim, first + LANES); ++i)
      std::memcpy(reinterpret_cast<char*>(row + i - first) + place * sizeof(T),
                  token.value + i * sizeof(T), sizeof(T));
}

template <class T>
static void write_pair(const PageLayout<T>& layout, const Placement& even, const Placement& odd,
                       Unit* row, int dim) {
  const auto* low = reinterpret_cast<const uint16_t*>(even.value);
  const auto* high = reinterpret_cast<const uint16_t*>(odd.value);
  int first = 0;
  for (; first + LANES <= dim; first += LANES, row += layout.value_stride()) {
    write_lanes(row, widen(read_lanes<Half>(low + first)) | widen(read_lanes<Half>(high + first)) << 16);
  }
  for (int i = first; i < dim; ++i) row[i - first] = low[i] | Unit{high[i]} << 16;
}

template <class T>
static void write_stretch(const Step& step, const Layer& layer, const Tensors& tensors,
                          const Stretch& stretch) {
  const PageLayout<T> layout(step, layer);
  constexpr int PER = PER_UNIT<T>;
  const int64_t key_bytes = tensors.key_token * static_cast<int64_t>(sizeof(T));
  const auto at = [&](int token) { return place<T>(step, layer, tensors, token, stretch.head); };
  // Whether `count` tokens are those of a vector, or a unit: their slots follow each other.
  const auto together = [&](int token, int offset, int count) {
    if (offset % count || token + count > stretch.last) return false;
    for (int i = 1; i < count; ++i)
      if (step.slots[token + i] != step.slots[token] + i) return false;
    return true;
  };
  for (int token = stretch.first, count; token < stretch.last; token += count) {
    const Placement now = at(token);
    count = 1;
    if (now.offset < 0) continue;
    if (layout.whole_vectors() && together(token, now.offset, LANES))
      write_keys(layout, now, key_bytes, tensors.key_pages), count = LANES;
    else
      write_key(layout, now, tensors.key_pages);
  }
  for (int token = stretch.first, count; token < stretch.last; token += count) {
    const Placement now = at(token);
    count = 1;
    if (now.offset < 0) continue;
    Unit* row = tensors.value_pages + layout.value(now.page, now.offset / PER * PER);
    if (PER == 2 && together(token, now.offset, 2))
      write_pair(layout, now, at(token + 1), row, layer.head_dim), count = 2;
    else
      write_value(layout, now, row, layer.head_dim);
  }
}

}  // namespace slipstream
