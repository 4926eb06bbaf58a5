// The C interface: see the Python files of the same names for contracts and layouts.
#include "decoder.h"

namespace slipstream {

// Threads take the next piece of work when they are free: on a shared machine one may be slower.
template <class T>
static void attend(const Step& step, const Layer& layer, const Tensors& tensors, Plan& plan) {
  const int runs = ceil_div(step.tokens, WRITE_RUN) * layer.kv_heads;
  const auto write = [&](int i) { write_run<T>(step, layer, tensors, i); };
  // A few tokens are sooner written by one thread than all threads have met at a barrier.
  const bool alone = plan.threads == 1 || step.tokens <= WRITE_RUN;
  for (int i = 0; alone && i < runs; ++i) write(i);
  Team team(plan.threads);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    if (!alone) team.share(runs, write);
    team.share(static_cast<int>(plan.items.size()),
               [&](int i) { run_item<T>(step, layer, tensors, plan, plan.items[i]); });
  }
}

template <class T, bool QUANTIZED>
static void decode(const Decoder& decoder, const Pass& pass, const Step& step) {
  Team team(step.threads);
#pragma omp parallel num_threads(step.threads)
  DecoderPass<T, QUANTIZED>(decoder, pass, step, team).run();
}

template <class T>
static void project(const Linear& linear, const T* input, int rows, float* output, int threads) {
  Team team(threads);
  std::vector<Int8> bytes(linear.scales ? static_cast<size_t>(rows) * linear.in : 0);
  std::vector<float> scales(rows);
  const auto store_columns = [&](int row, int panel, Vec low, Vec high) {
    float* target = output + int64_t{row} * linear.columns + panel * PANEL;
    store(target, low);
    store(target + LANES, high);
  };
#pragma omp parallel num_threads(threads)
  {
    if (linear.scales)
      team.share(rows, [&](int row) {
        const int64_t offset = int64_t{row} * linear.in;
        scales[row] = quantize_row(input + offset, linear.in, bytes.data() + offset);
      });
    team.share(row_blocks(rows) * panels(linear), [&](int item) {
      if (linear.scales)
        multiply(linear, Rows<Int8>{bytes.data(), scales.data(), rows}, item, store_columns);
      else
        multiply(linear, Rows<T>{input, nullptr, rows}, item, store_columns);
    });
  }
}

}  // namespace slipstream

using namespace slipstream;

extern "C" {

void* slipstream_plan(const Step* step, const Layer* layer) { return make_plan(*step, *layer); }

void slipstream_free(void* plan) { delete static_cast<Plan*>(plan); }

// Strides in elements; the last dimension is contiguous.
void slipstream_attend(const Step* step, const Layer* layer, void* plan, const void* query,
                       const void* key, const void* value, Unit* key_pages, Unit* value_pages,
                       void* output, int64_t query_token, int64_t query_head, int64_t key_token,
                       int64_t key_head, int64_t value_token, int64_t value_head,
                       int32_t bfloat16) {
  const Tensors tensors{query,       key,        value,     key_pages, value_pages, output,
                        query_token, query_head, key_token, key_head,  value_token, value_head};
  Plan& work = *static_cast<Plan*>(plan);
  if (bfloat16)
    attend<BFloat16>(*step, *layer, tensors, work);
  else
    attend<float>(*step, *layer, tensors, work);
}

// A whole forward pass; the result is in pass->normed.
void slipstream_decode(const Decoder* decoder, const Pass* pass, const Step* step,
                       int32_t bfloat16) {
  if (decoder->layers->qkv.scales)
    bfloat16 ? decode<BFloat16, true>(*decoder, *pass, *step)
             : decode<float, true>(*decoder, *pass, *step);
  else
    bfloat16 ? decode<BFloat16, false>(*decoder, *pass, *step)
             : decode<float, false>(*decoder, *pass, *step);
}

// output float32 [rows, linear->columns] = input [rows, linear->in] x linear.
void slipstream_project(const Linear* linear, const void* input, int32_t rows, float* output,
                        int32_t threads, int32_t bfloat16) {
  if (bfloat16)
    project(*linear, static_cast<const BFloat16*>(input), rows, output, threads);
  else
    project(*linear, static_cast<const float*>(input), rows, output, threads);
}
}
