// A Llama-shaped decoder: all layers of a step in one parallel region.
#pragma once

#include <cmath>

#include "attention.h"
#include "linear.h"
#include "team.h"

namespace slipstream {

constexpr int MAX_HEAD_DIM = 512;
constexpr int FEW = 32;  // rows that are sooner normed by every thread than shared out

struct DecoderLayer {
  Linear qkv, output, gate_up, down;
  const float *input_norm, *post_norm;  // [hidden]
  const float *query_norm, *key_norm;   // [head_dim], or null
  const Layer* attention;
  Unit *key_pages, *value_pages;
};

struct Decoder {
  const DecoderLayer* layers;
  const void* embedding;    // [vocabulary, hidden] in T, or null: the columns of `tied`
  const Linear* tied;       // the head whose packed columns are the embeddings
  const float* final_norm;  // [hidden]
  const float *cos, *sin;   // [positions, rotary / 2]
  float epsilon;
  int32_t count, hidden, intermediate;
  int32_t rotary;  // leading dimensions of a head that rotate
};

// Rows of activations, `stride` elements apart: whole tiles of them, which products may read.
// Strides are odd multiples of a cache line, so that what lies below each other does not compete for the
// same sets of a cache.
struct Matrix {
  void* data;
  int64_t stride;

  template <class T>
  T* row(int i) const {
    return static_cast<T*>(data) + i * stride;
  }
};

// One step's inputs, and room for its activations. T is the dtype of weights and activations; the
// residual stream is float32. "A block" has ROW_BLOCK rows, or FEW for each thread if that is more. Heads and
// strips are as high as the step, or the block, has rows, however large the room is.
struct Pass {
  const int64_t *tokens, *positions;
  Plan* const* plans;  // of each layer
  float* residual;     // strips [tokens, hidden]
  void* qkv;           // [heads + 2 * kv_heads, tokens, head_dim]
  void* activated;     // strips of a block [rows, intermediate]
  Matrix normed;       // [tokens, hidden], at least a block: the final result
  Matrix attended;     // [tokens, heads * head_dim]
  Matrix bytes;        // a block [rows, widest of the operands], int8 weights only, with
  float* scales;       // [rows]
};

// The height of strips and heads. It is odd, so that a row's pieces do not all lie in the same few sets of a
// cache.
inline int64_t odd_rows(int rows) { return rows | 1; }

// The same for an operand, in whole tiles: were strips a multiple of 4096 bytes high, their tiles would all
// lie in the same sets.
inline int64_t tile_rows(int rows) {
  const int whole = whole_tiles(rows);
  return whole % (4096 / TILE_BYTES) ? whole : whole + TILE_HEIGHT;
}

// x / rms(x) * weight, the mean square summed in a fixed order. source(i) points to sixteen elements of x,
// from i on.
template <class Source, class Out>
void rms_norm(Source&& source, const float* weight, int size, float epsilon, Out* out) {
  Vec total{};
  for (int i = 0; i < size; i += LANES) {
    const Vec v = load_as(source(i));
    total = multiply_add(v, v, total);
  }
  const Vec scale = splat(1.0f / std::sqrt(sum_lanes(total) / size + epsilon));
  for (int i = 0; i < size; i += LANES)
    store_as(out + i, load_as(source(i)) * scale * load(weight + i));
}

SLIPSTREAM_INLINE Vec silu(Vec x) {
  // Bounded, so that the reciprocal's correction never multiplies infinity by zero.
  return x * reciprocal(1.0f + power_of_two(minimum(x * -LOG2_E, splat(126.0f))));
}

template <class T, bool QUANTIZED>
class DecoderPass {
 public:
  DecoderPass(const Decoder& decoder, const Pass& pass, const Step& step, Team& team, int thread)
      : decoder_(decoder), pass_(pass), step_(step), team_(team), thread_(thread) {}

  // Every thread of the team calls this. What needs no other token is done block by block, so that
  // it finds what it reads in the cache.
  void run() {
    team_.share(step_.tokens, [&](int token) { embed(token); });
    for_each_block([&](Block block) { enter(decoder_.layers[0], block); });
    for (int i = 0; i < decoder_.count; ++i) {
      attend(decoder_.layers[i], *pass_.plans[i]);
      for_each_block([&](Block block) {
        const DecoderLayer* next = i + 1 < decoder_.count ? &decoder_.layers[i + 1] : nullptr;
        leave(decoder_.layers[i], block, next ? &next->qkv : nullptr);
        if (next) enter(*next, block);
      });
    }
    team_.share(step_.tokens, [&](int token) {
      norm(token, decoder_.final_norm, normed(token));
    });
  }

 private:
  struct Block {
    int first, count;  // tokens
  };

  template <class Use>
  void for_each_block(Use&& use) {
    for_each_block_of_rows(step_.tokens, [&](int first, int count) { use(Block{first, count}); });
  }

  T* attended(int token) const { return pass_.attended.row<T>(token); }
  T* normed(int row) const { return pass_.normed.row<T>(row); }

  // A token's queries, keys or values of one head; keys come behind all queries, then values.
  T* qkv(int head, int token) const {
    return static_cast<T*>(pass_.qkv) + (head * odd_rows(step_.tokens) + token) * head_dim_;
  }

  void norm(int token, const float* weight, T* out) const {
    rms_norm([&](int i) { return residual_.at(token, i); }, weight, decoder_.hidden,
             decoder_.epsilon, out);
  }

  void embed(int token) {
    const int64_t id = pass_.tokens[token];
    if (decoder_.embedding) {
      const T* source = static_cast<const T*>(decoder_.embedding) + id * decoder_.hidden;
      for (int i = 0; i < decoder_.hidden; i += LANES) store(residual_.at(token, i), load_as(source + i));
      return;
    }
    decoder_.tied->halved ? embed_column<BFloat16>(id, token) : embed_column<T>(id, token);
  }

  template <class Weight>
  void embed_column(int64_t id, int token) {
    constexpr int PER = PER_UNIT<Weight>;
    const Unit* source = panel_weights<T>(*decoder_.tied, id / PANEL) +
                         id % PANEL / LANES * TILE_UNITS + id % LANES;
    Weight row[LANES];
    for (int i = 0; i < decoder_.hidden; i += LANES) {
      for (int j = 0; j < LANES; j += PER) {
        const int u = (i + j) / PER, tile = u / TILE_HEIGHT;
        std::memcpy(row + j, source + tile * PANEL_VECS * TILE_UNITS + u % TILE_HEIGHT * LANES,
                    sizeof(Unit));
      }
      store(residual_.at(token, i), load_as(row));
    }
  }

  // Up to queries, keys and values.
  void enter(const DecoderLayer& layer, Block block) {
    const bool last = block.first + block.count == step_.tokens;
    normed_product(layer.input_norm, layer.qkv, last ? &layer.output : nullptr, block,
                   [&](int panel) {
                     T* even = head_part(panel * PANEL, block);
                     T* odd = head_part(panel * PANEL + LANES, block);
                     return [even, odd, dim = head_dim_](int row, Vec low, Vec high) {
                       store_as(even + row * dim, low);
                       store_as(odd + row * dim, high);
                     };
                   });
  }

  // Where a vector of a block's first token's queries, keys and values goes, which begins with this column.
  T* head_part(int column, Block block) const {
    return qkv(column / head_dim_, block.first) + column % head_dim_;
  }

  void attend(const DecoderLayer& layer, Plan& plan) {
    const Layer& how = *layer.attention;
    const int64_t token = head_dim_, head = qkv(1, 0) - qkv(0, 0);
    const Tensors tensors{qkv(0, 0),
                          qkv(how.heads, 0),
                          qkv(how.heads + how.kv_heads, 0),
                          layer.key_pages,
                          layer.value_pages,
                          attended(0),
                          token,
                          head,
                          token,
                          head,
                          token,
                          head,
                          pass_.attended.stride};
    const Stretches stretches(step_, how, step_.threads);
    team_.share(stretches.count(), [&](int i) {
      prepare_heads(layer, tensors, stretches[i]);
      write_stretch<T>(step_, how, tensors, stretches[i]);
    });
    share_attention<T>(team_, step_, how, tensors, plan);
  }

  // From what was attended to the end of the layer.
  void leave(const DecoderLayer& layer, Block block, const Linear* following) {
    const int readable = whole_tiles(block.count);
    add_product(layer.output, &layer.gate_up, block,
                Rows<T>::plain(attended(block.first), pass_.attended.stride, nullptr, block.count,
                               readable));
    // Gate and up columns alternate by vector, so that one panel holds both operands of the product.
    const Strips<T> activated{static_cast<T*>(pass_.activated), tile_rows(block.count)};
    normed_product(layer.post_norm, layer.gate_up, &layer.down, block, [&](int panel) {
      T* column = activated.at(0, panel * LANES);
      return [column](int row, Vec gate, Vec up) {
        store_as(column + row * LINE_COLUMNS<T>, silu(gate) * up);
      };
    });
    add_product(layer.down, following, block, activated.rows(nullptr, block.count, readable));
  }

  // Of a block's norms. A few rows are normed by each thread for itself, so that none waits, or reads what
  // another core has just written.
  template <class Done>
  void normed_product(const float* weight, const Linear& linear, const Linear* following, Block block,
                      Done&& done) {
    const bool few = block.count <= FEW;
    const int begin = few ? thread_ * FEW : 0;  // in the matrices of blocks
    const auto norm_row = [&](int i) {
      T* row = normed(begin + i);
      norm(block.first + i, weight, row);
      if constexpr (QUANTIZED)
        quantize([row](int k) { return row + k; }, decoder_.hidden, begin + i);
    };
    if (!few) team_.share(block.count, norm_row);
    const auto prepare = [&] {
      for (int i = 0; few && i < block.count; ++i) norm_row(i);
    };
    if constexpr (QUANTIZED) {
      share_product(team_, linear, bytes(begin, block.count), following, prepare, done);
    } else {
      const auto rows = Rows<T>::plain(normed(begin), pass_.normed.stride, nullptr, block.count,
                                       whole_tiles(block.count));
      share_product(team_, linear, rows, following, prepare, done);
    }
  }

  // The queries and keys of a stretch.
  void prepare_heads(const DecoderLayer& layer, const Tensors& tensors,
                     const Stretch& stretch) {
    const Layer& how = *layer.attention;
    const int group = how.heads / how.kv_heads;
    const PageLayout<T> layout(step_, how);
    Placement before = NOWHERE;
    for (int token = stretch.first; token < stretch.last; ++token) {
      const Placement now = place<T>(step_, how, tensors, token, stretch.head);
      prefetch_token(layout, tensors, now, before);
      before = now;
      for (int head = stretch.head * group; head < (stretch.head + 1) * group; ++head)
        prepare_head(qkv(head, token), layer.query_norm, token);
      prepare_head(qkv(how.heads + stretch.head, token), layer.key_norm, token);
    }
  }

  // Norm, then rotary embedding (Su et al. 2021; the two halves of a head are paired).
  void prepare_head(T* x, const float* weight, int token) {
    float row[MAX_HEAD_DIM];
    const int dim = head_dim_;
    if (weight) {
      rms_norm([x](int i) { return x + i; }, weight, dim, decoder_.epsilon, row);
    } else {
      for (int i = 0; i < dim; i += LANES) store(row + i, load_as(x + i));
    }
    const int half = decoder_.rotary / 2;
    const float* cos = decoder_.cos + pass_.positions[token] * half;
    const float* sin = decoder_.sin + pass_.positions[token] * half;
    for (int i = 0; i < half; i += LANES) {
      const Vec a = load(row + i), b = load(row + half + i);
      store_as(x + i, a * load(cos + i) - b * load(sin + i));
      store_as(x + half + i, b * load(cos + i) + a * load(sin + i));
    }
    for (int i = 2 * half; i < dim; i += LANES) store_as(x + i, load(row + i));
  }

  // Adds the product of a block's `rows` to the residual stream.
  void add_product(const Linear& linear, const Linear* following, Block block, const Rows<T>& rows) {
    const auto done = [&](int panel) {
      float* even = residual_.at(block.first, panel * PANEL);
      float* odd = residual_.at(block.first, panel * PANEL + LANES);
      return [even, odd](int row, Vec low, Vec high) {
        const int at = row * LINE_COLUMNS<float>;
        store(even + at, load(even + at) + low);
        store(odd + at, load(odd + at) + high);
      };
    };
    if constexpr (QUANTIZED) {
      team_.share(rows.count, [&](int row) {
        quantize([&](int i) { return rows.at(row, i); }, linear.in, row);
      });
      share_product(team_, linear, bytes(0, rows.count), following, [] {}, done);
    } else {
      share_product(team_, linear, rows, following, [] {}, done);
    }
  }

  template <class Source>
  void quantize(Source&& source, int width, int row) {
    pass_.scales[row] = quantize_row(source, width, pass_.bytes.row<Int8>(row));
  }

  Rows<Int8> bytes(int first, int count) const {
    return Rows<Int8>::plain(pass_.bytes.row<Int8>(first), pass_.bytes.stride,
                             pass_.scales + first, count, whole_tiles(count));
  }

  const Decoder& decoder_;
  const Pass& pass_;
  const Step& step_;
  Team& team_;
  const int thread_;
  const int head_dim_ = decoder_.layers->attention->head_dim;
  const Strips<float> residual_{pass_.residual, odd_rows(step_.tokens)};
};

}  // namespace slipstream
