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
// residual stream is float32. "A block" has ROW_BLOCK rows, or FEW for each thread if that is more.
struct Pass {
  const int64_t *tokens, *positions;
  Plan* const* plans;  // of each layer
  Matrix residual;     // [tokens, hidden]
  Matrix normed;       // [tokens, hidden], at least a block: the final result
  Matrix qkv;          // [tokens, (heads + 2 * kv_heads) * head_dim]
  Matrix attended;     // [tokens, heads * head_dim]
  Matrix activated;    // a block [rows, intermediate]
  Matrix bytes;        // a block [rows, widest of the above but qkv], int8 weights only, with
  float* scales;       // [rows]
};

// x / rms(x) * weight, the mean square summed in a fixed order.
template <class In, class Out>
void rms_norm(const In* x, const float* weight, int size, float epsilon, Out* out) {
  Vec total{};
  for (int i = 0; i < size; i += LANES) {
    const Vec v = load_as(x + i);
    total = multiply_add(v, v, total);
  }
  const Vec scale = splat(1.0f / std::sqrt(sum_lanes(total) / size + epsilon));
  for (int i = 0; i < size; i += LANES) store_as(out + i, load_as(x + i) * scale * load(weight + i));
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
      rms_norm(residual(token), decoder_.final_norm, decoder_.hidden, decoder_.epsilon,
               normed(token));
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

  float* residual(int token) const { return pass_.residual.row<float>(token); }
  T* qkv(int token) const { return pass_.qkv.row<T>(token); }
  T* attended(int token) const { return pass_.attended.row<T>(token); }
  T* normed(int row) const { return pass_.normed.row<T>(row); }
  T* activated(int row) const { return pass_.activated.row<T>(row); }

  void embed(int token) {
    const int64_t id = pass_.tokens[token];
    const int hidden = decoder_.hidden;
    float* target = residual(token);
    if (decoder_.embedding) {
      const T* source = static_cast<const T*>(decoder_.embedding) + id * hidden;
      for (int i = 0; i < hidden; i += LANES) store(target + i, load_as(source + i));
      return;
    }
    constexpr int PER = PER_UNIT<T>;
    const Unit* source = panel_weights<T>(*decoder_.tied, id / PANEL) +
                         id % PANEL / LANES * TILE_UNITS + id % LANES;
    T row[LANES];
    for (int i = 0; i < hidden; i += LANES) {
      for (int j = 0; j < LANES; j += PER) {
        const int u = (i + j) / PER, tile = u / TILE_HEIGHT;
        std::memcpy(row + j, source + tile * PANEL_VECS * TILE_UNITS + u % TILE_HEIGHT * LANES,
                    sizeof(Unit));
      }
      store(target + i, load_as(row));
    }
  }

  // Up to queries, keys and values.
  void enter(const DecoderLayer& layer, Block block) {
    const bool last = block.first + block.count == step_.tokens;
    normed_product(layer.input_norm, layer.qkv, last ? &layer.output : nullptr, block,
                   Target::of(qkv(block.first), pass_.qkv.stride, PANEL * sizeof(T)),
                   [&](int row, int panel, Vec low, Vec high) {
                     T* target = qkv(block.first + row) + panel * PANEL;
                     store_as(target, low);
                     store_as(target + LANES, high);
                   });
  }

  void attend(const DecoderLayer& layer, Plan& plan) {
    const Layer& how = *layer.attention;
    const int64_t width = pass_.qkv.stride, dim = how.head_dim;
    const T *key = qkv(0) + how.heads * dim, *value = key + how.kv_heads * dim;
    const Tensors tensors{qkv(0), key,   value, layer.key_pages, layer.value_pages, attended(0),
                          width,  dim,   width, dim,             width,             dim,
                          pass_.attended.stride};
    team_.share(ceil_div(step_.tokens, WRITE_RUN) * how.kv_heads, [&](int run) {
      prepare_heads(layer, tensors, run);
      write_run<T>(step_, how, tensors, run);
    });
    share_attention<T>(team_, step_, how, tensors, plan);
  }

  // From what was attended to the end of the layer.
  void leave(const DecoderLayer& layer, Block block, const Linear* following) {
    quantize_rows(pass_.attended, block.first, block.count, layer.output.in);
    add_product(layer.output, &layer.gate_up, pass_.attended, block.first, block);
    // Gate and up columns alternate by vector, so that one panel holds both operands of the product.
    normed_product(layer.post_norm, layer.gate_up, &layer.down, block,
                   Target::of(activated(0), pass_.activated.stride, LANES * sizeof(T)),
                   [&](int row, int panel, Vec gate, Vec up) {
                     store_as(activated(row) + panel * LANES, silu(gate) * up);
                   });
    quantize_rows(pass_.activated, 0, block.count, layer.down.in);
    add_product(layer.down, following, pass_.activated, 0, block);
  }

  // Of a block's norms. A few rows are normed by each thread for itself, so that none waits, or reads what
  // another core has just written.
  template <class Done>
  void normed_product(const float* weight, const Linear& linear, const Linear* following, Block block,
                      const Target& target, Done&& done) {
    const bool few = block.count <= FEW;
    const int begin = few ? thread_ * FEW : 0;  // in the matrices of blocks
    const auto norm_row = [&](int i) {
      T* row = normed(begin + i);
      rms_norm(residual(block.first + i), weight, decoder_.hidden, decoder_.epsilon, row);
      if constexpr (QUANTIZED) quantize(row, decoder_.hidden, begin + i);
    };
    if (!few) team_.share(block.count, norm_row);
    const auto prepare = [&] {
      for (int i = 0; few && i < block.count; ++i) norm_row(i);
    };
    product(linear, following, pass_.normed, begin, begin, block, target, prepare, done);
  }

  // The heads of one run of tokens (as `write_run` counts runs) that share a KV head, and that head.
  void prepare_heads(const DecoderLayer& layer, const Tensors& tensors, int run) {
    const Layer& how = *layer.attention;
    const int first = run / how.kv_heads * WRITE_RUN, kv_head = run % how.kv_heads;
    const int last = std::min(first + WRITE_RUN, step_.tokens), group = how.heads / how.kv_heads;
    const PageLayout<T> layout(step_, how);
    for (int token = first; token < last; ++token) {
      prefetch_key(layout, place<T>(step_, how, tensors, token, kv_head), layer.key_pages);
      T* heads = qkv(token);
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
        prepare_head(heads + head * how.head_dim, how.head_dim, layer.query_norm, token);
      prepare_head(heads + (how.heads + kv_head) * how.head_dim, how.head_dim, layer.key_norm,
                   token);
    }
  }

  // Norm, then rotary embedding (Su et al. 2021; the two halves of a head are paired).
  void prepare_head(T* x, int dim, const float* weight, int token) {
    float row[MAX_HEAD_DIM];
    if (weight) {
      rms_norm(x, weight, dim, decoder_.epsilon, row);
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

  // Adds the product of a block to the residual stream.
  void add_product(const Linear& linear, const Linear* following, const Matrix& input, int first,
                   Block block) {
    product(linear, following, input, first, 0, block,
            Target::of(residual(block.first), pass_.residual.stride, PANEL * sizeof(float)), [] {},
            [&](int row, int panel, Vec low, Vec high) {
              float* target = residual(block.first + row) + panel * PANEL;
              store(target, load(target) + low);
              store(target + LANES, load(target + LANES) + high);
            });
  }

  // Of a block of rows of `input` from `first` on, or of their bytes, which begin at row `quantized`.
  template <class Prepare, class Done>
  void product(const Linear& linear, const Linear* following, const Matrix& input, int first,
               int quantized, Block block, const Target& target, Prepare&& prepare, Done&& done) {
    const int readable = whole_tiles(block.count);
    if constexpr (QUANTIZED) {
      const Rows<Int8> rows{pass_.bytes.row<Int8>(quantized), pass_.bytes.stride,
                            pass_.scales + quantized, block.count, readable};
      share_product(team_, linear, rows, &target, following, prepare, done);
    } else {
      const Rows<T> rows{input.row<T>(first), input.stride, nullptr, block.count, readable};
      share_product(team_, linear, rows, &target, following, prepare, done);
    }
  }

  void quantize_rows(const Matrix& input, int first, int count, int width) {
    if constexpr (QUANTIZED)
      team_.share(count, [&](int row) { quantize(input.row<T>(first + row), width, row); });
  }

  void quantize(const T* values, int width, int row) {
    pass_.scales[row] = quantize_row(values, width, pass_.bytes.row<Int8>(row));
  }

  const Decoder& decoder_;
  const Pass& pass_;
  const Step& step_;
  Team& team_;
  const int thread_;
};

}  // namespace slipstream
