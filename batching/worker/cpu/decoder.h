// A Llama-shaped decoder: all layers of a step in one parallel region.
#pragma once

#include <cmath>

#include "attention.h"
#include "linear.h"
#include "team.h"

namespace slipstream {

constexpr int MAX_HEAD_DIM = 512;

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

// One step's inputs, and room for its activations. T is the dtype of weights and activations; the
// residual stream is float32.
struct Pass {
  const int64_t *tokens, *positions;
  Plan* const* plans;  // of each layer
  float* residual;     // [tokens, hidden]
  void* normed;        // [tokens, hidden]; the final result too
  void* qkv;           // [tokens, (heads + 2 * kv_heads) * head_dim]
  void* attended;      // [tokens, heads * head_dim]
  void* activated;     // [tokens, intermediate]
  Int8* bytes;         // [tokens, widest of the above but qkv], int8 weights only, with
  float* scales;       // [tokens]
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
  DecoderPass(const Decoder& decoder, const Pass& pass, const Step& step, Team& team)
      : decoder_(decoder), pass_(pass), step_(step), team_(team) {}

  // Every thread of the team calls this.
  void run() {
    team_.share(step_.tokens, [&](int token) { embed(token); });
    for (int i = 0; i < decoder_.count; ++i) {
      const DecoderLayer& layer = decoder_.layers[i];
      norm(layer.input_norm);
      attention(layer, *pass_.plans[i]);
      norm(layer.post_norm);
      feed_forward(layer);
    }
    norm(decoder_.final_norm);
  }

 private:
  float* residual(int token) const { return pass_.residual + int64_t{token} * decoder_.hidden; }
  T* normed() const { return static_cast<T*>(pass_.normed); }
  T* qkv() const { return static_cast<T*>(pass_.qkv); }
  T* attended() const { return static_cast<T*>(pass_.attended); }
  T* activated() const { return static_cast<T*>(pass_.activated); }

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
    const Unit* source = decoder_.tied->weights + id / PANEL * PANEL * (hidden / PER) + id % PANEL;
    T row[LANES];
    for (int i = 0; i < hidden; i += LANES) {
      for (int j = 0; j < LANES; j += PER)
        std::memcpy(row + j, source + int64_t{(i + j) / PER} * PANEL, sizeof(Unit));
      store(target + i, load_as(row));
    }
  }

  void norm(const float* weight) {
    team_.share(step_.tokens, [&](int token) {
      T* row = normed() + int64_t{token} * decoder_.hidden;
      rms_norm(residual(token), weight, decoder_.hidden, decoder_.epsilon, row);
      if constexpr (QUANTIZED) quantize(row, decoder_.hidden, token);
    });
  }

  void attention(const DecoderLayer& layer, Plan& plan) {
    const Layer& how = *layer.attention;
    const int width = layer.qkv.columns, dim = how.head_dim;
    product(layer.qkv, normed(), [&](int token, int panel, Vec low, Vec high) {
      T* target = qkv() + int64_t{token} * width + panel * PANEL;
      store_as(target, low);
      store_as(target + LANES, high);
    });
    T *key = qkv() + how.heads * dim, *value = key + how.kv_heads * dim;
    const Tensors tensors{qkv(), key, value, layer.key_pages, layer.value_pages, attended(),
                          width, dim, width, dim,             width,             dim};
    team_.share(ceil_div(step_.tokens, WRITE_RUN) * how.kv_heads, [&](int run) {
      prepare_heads(layer, tensors, run);
      write_run<T>(step_, how, tensors, run);
    });
    team_.share(static_cast<int>(plan.items.size()),
                [&](int i) { run_item<T>(step_, how, tensors, plan, plan.items[i]); });
    quantize_all(attended(), layer.output.in);
    add_product(layer.output, attended());
  }

  // The heads of one run of tokens (as `write_run` counts runs) that share a KV head, and that head.
  void prepare_heads(const DecoderLayer& layer, const Tensors& tensors, int run) {
    const Layer& how = *layer.attention;
    const int first = run / how.kv_heads * WRITE_RUN, kv_head = run % how.kv_heads;
    const int last = std::min(first + WRITE_RUN, step_.tokens), group = how.heads / how.kv_heads;
    for (int token = first; token < last; ++token) {
      prefetch_key(place<T>(step_, how, tensors, token, kv_head), layer.key_pages,
                   how.head_dim / PER_UNIT<T>, step_.block_size);
      T* heads = qkv() + int64_t{token} * layer.qkv.columns;
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

  // Gate and up columns alternate by vector, so that one panel holds both operands of the product.
  void feed_forward(const DecoderLayer& layer) {
    product(layer.gate_up, normed(), [&](int token, int panel, Vec gate, Vec up) {
      store_as(activated() + int64_t{token} * decoder_.intermediate + panel * LANES,
               silu(gate) * up);
    });
    quantize_all(activated(), decoder_.intermediate);
    add_product(layer.down, activated());
  }

  void add_product(const Linear& linear, const T* input) {
    product(linear, input, [&](int token, int panel, Vec low, Vec high) {
      float* target = residual(token) + panel * PANEL;
      store(target, load(target) + low);
      store(target + LANES, load(target + LANES) + high);
    });
  }

  template <class Done>
  void product(const Linear& linear, const T* input, Done&& done) {
    if constexpr (QUANTIZED)
      share_product(team_, linear, Rows<Int8>{pass_.bytes, pass_.scales, step_.tokens}, done);
    else
      share_product(team_, linear, Rows<T>{input, nullptr, step_.tokens}, done);
  }

  void quantize_all(const T* input, int width) {
    if constexpr (QUANTIZED)
      team_.share(step_.tokens,
                  [&](int token) { quantize(input + int64_t{token} * width, width, token); });
  }

  void quantize(const T* row, int width, int token) {
    pass_.scales[token] = quantize_row(row, width, pass_.bytes + int64_t{token} * width);
  }

  const Decoder& decoder_;
  const Pass& pass_;
  const Step& step_;
  Team& team_;
};

}  // namespace slipstream
