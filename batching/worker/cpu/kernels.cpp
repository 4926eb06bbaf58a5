// The C interface: see the Python files of the same names for contracts and layouts.
#include <omp.h>

#include <bit>

#include "decoder.h"
#include "touch.h"

namespace slipstream {

// What a thread does before it leaves a parallel region that multiplied.
static void leave_region() {
#if SLIPSTREAM_AMX
  thread_tiles.release();
#endif
}

// Threads take the next piece of work when they are free: on a shared machine one may be slower.
template <class T>
static void attend(const Step& step, const Layer& layer, const Tensors& tensors, Plan& plan) {
  const AtWork now;
  // A few tokens are sooner written by one thread than shared out.
  const bool alone = plan.threads == 1 || step.tokens <= Stretches::LONGEST;
  const Stretches stretches(step, layer, alone ? 1 : plan.threads);
  const auto write = [&](int i) { write_stretch<T>(step, layer, tensors, stretches[i]); };
  for (int i = 0; alone && i < stretches.count(); ++i) write(i);
  Team team(plan.threads);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    if (!alone) team.share(stretches.count(), write);
    share_attention<T>(team, step, layer, tensors, plan);
    leave_region();
  }
}

template <class T, bool QUANTIZED>
static void decode(const Decoder& decoder, const Pass& pass, const Step& step) {
  const AtWork now;
  Team team(step.threads);
#pragma omp parallel num_threads(step.threads)
  {
    DecoderPass<T, QUANTIZED>(decoder, pass, step, team, omp_get_thread_num()).run();
    leave_region();
  }
}

// done(panel) gives what is called as write(row, low, high) with the columns of input x linear.
template <class T, class Done>
static void project(Team& team, const Linear& linear, const T* input, int rows, Int8* bytes,
                    float* scales, Done&& done) {
  for_each_block_of_rows(rows, [&](int first, int count) {
    const T* block = input + int64_t{first} * linear.in;
    const auto finish = [&](int panel) {
      return [first, write = done(panel)](int row, Vec low, Vec high) { write(first + row, low, high); };
    };
    if (!linear.scales)
      return share_product(team, linear, Rows<T>::plain(block, linear.in, nullptr, count, count),
                           nullptr, [] {}, finish);
    team.share(count, [&](int row) {
      const int64_t offset = int64_t{row} * linear.in;
      scales[row] = quantize_row([&](int i) { return block + offset + i; }, linear.in, bytes + offset);
    });
    share_product(team, linear, Rows<Int8>::plain(bytes, linear.in, scales, count, count), nullptr,
                  [] {}, finish);
  });
}

// Runs use(thread's number, product) on every thread, where product(done) is all of the projection.
template <class T, class Use>
static void project_by_threads(const Linear& linear, const T* input, int rows, int threads,
                               Use&& use) {
  const AtWork now;
  Team team(threads);
  const int most = std::min(rows, ROW_BLOCK);
  std::vector<Int8> bytes(linear.scales ? static_cast<size_t>(most) * linear.in : 0);
  std::vector<float> scales(most);
#pragma omp parallel num_threads(threads)
  {
    use(omp_get_thread_num(), [&](auto&& done) {
      project(team, linear, input, rows, bytes.data(), scales.data(), done);
    });
    leave_region();
  }
}

template <class T>
static void project_all(const Linear& linear, const T* input, int rows, float* output,
                        int threads) {
  project_by_threads(linear, input, rows, threads, [&](int, auto&& product) {
    product([&](int panel) {
      float* column = output + panel * PANEL;
      return [column, stride = int64_t{linear.columns}](int row, Vec low, Vec high) {
        stream(column + row * stride, low);
        stream(column + row * stride + LANES, high);
      };
    });
  });
}

// The largest column so far, in each lane; of equals the first, in whatever order they come.
struct Largest {
  Vec value = splat(NEG_INF);
  Int column{};

  SLIPSTREAM_INLINE void consider(Vec x, int first) {
    const Int here = first + lane_index();
    const Int better = (x > value) | ((x == value) & (here < column));
    value = select(better, x, value);
    column = select(better, here, column);
  }
};

// Without writing the logits down: they are a hundred times as much as what is asked of them.
template <class T>
static void project_largest(const Linear& linear, const T* input, int rows, int columns,
                            int64_t* output, int threads) {
  std::vector<Largest> found(static_cast<size_t>(threads) * rows);
  project_by_threads(linear, input, rows, threads, [&](int thread, auto&& product) {
    Largest* mine = found.data() + static_cast<size_t>(thread) * rows;
    product([=](int panel) {
      return [=, first = panel * PANEL](int row, Vec low, Vec high) {
        if (first + PANEL > columns) {  // padding
          low = select(first + lane_index() < columns, low, splat(NEG_INF));
          high = select(first + LANES + lane_index() < columns, high, splat(NEG_INF));
        }
        mine[row].consider(low, first);
        mine[row].consider(high, first + LANES);
      };
    });
  });
  for (int row = 0; row < rows; ++row) {
    float best = NEG_INF;
    int64_t column = 0;
    for (int t = 0; t < threads; ++t)
      for (int lane = 0; lane < LANES; ++lane) {
        const Largest& one = found[static_cast<size_t>(t) * rows + row];
        const float value = get_lane(one.value, lane);
        const int64_t place = get_lane(one.column, lane);
        if (value > best || (value == best && place < column)) best = value, column = place;
      }
    output[row] = column;
  }
}

#if SLIPSTREAM_AMX
static float small_integer(int i) { return static_cast<float>(i * 7 % 15 - 7); }
static void assign(BFloat16& target, float x) { target.bits = std::bit_cast<uint32_t>(x) >> 16; }
static void assign(Int8& target, float x) { target.bits = static_cast<int>(x) & 127; }

// Whether tiles and vectors agree on small integers, whose sums are exact in any order. What is behind the
// rows changes nothing.
template <class T>
static bool tiles_agree() {
  constexpr int ROWS = 2 * GROUP - TILE_HEIGHT + 1, READABLE = 2 * GROUP;
  constexpr int IN = 2 * DEPTH * PER_UNIT<T>;
  std::vector<T> input(READABLE * IN), weights(PANEL * IN);
  std::memset(input.data(), 0xff, input.size() * sizeof(T));  // not numbers
  const Strips<T> strips{input.data(), READABLE};
  for (int row = 0; row < ROWS; ++row)
    for (int i = 0; i < IN; ++i) assign(*strips.at(row, i), small_integer((row + i) % 11));
  for (size_t i = 0; i < weights.size(); ++i) assign(weights[i], small_integer(i % 13));
  const std::vector<float> scales(ROWS + PANEL, 1.0f);
  const std::vector<int32_t> offsets(PANEL, 0);
  const Linear linear{reinterpret_cast<Unit*>(weights.data()), nullptr, scales.data(),
                      offsets.data(), IN, PANEL};
  const Rows<T> rows = strips.rows(scales.data(), ROWS, READABLE);
  std::vector<float> sums(2 * ROWS * PANEL);
  const auto keep = [&](float* target) {
    return [=](int) {
      return [=](int row, Vec low, Vec high) {
        store(target + row * PANEL, low);
        store(target + row * PANEL + LANES, high);
      };
    };
  };
  Finishing finishing(linear, rows, keep(sums.data()));
  multiply_amx(linear, rows, 0, linear.weights, finishing);
  finishing.rest();
  thread_tiles.release();
  Finishing plain(linear, rows, keep(sums.data() + ROWS * PANEL));
  multiply_rows<T, false>(linear, rows, 0, linear.weights, plain);
  return std::equal(sums.begin(), sums.begin() + ROWS * PANEL, sums.begin() + ROWS * PANEL);
}
#endif

}  // namespace slipstream

using namespace slipstream;

extern "C" {

// 0: the library computes what it should here. Run by the build, in a process that may crash.
int slipstream_self_check() {
#if SLIPSTREAM_AMX
  return request_tiles() && tiles_agree<BFloat16>() && tiles_agree<Int8>() ? 0 : 1;
#else
  return 0;
#endif
}

void* slipstream_plan(const Step* step, const Layer* layer) { return make_plan(*step, *layer); }

void slipstream_free(void* plan) { delete static_cast<Plan*>(plan); }

// Strides in elements; the last dimension is contiguous.
void slipstream_attend(const Step* step, const Layer* layer, void* plan, const void* query,
                       const void* key, const void* value, Unit* key_pages, Unit* value_pages,
                       void* output, int64_t query_token, int64_t query_head, int64_t key_token,
                       int64_t key_head, int64_t value_token, int64_t value_head,
                       int32_t bfloat16) {
  const Tensors tensors{query,       key,        value,     key_pages, value_pages, output,
                        query_token, query_head, key_token, key_head,  value_token, value_head,
                        layer->heads * layer->head_dim};
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
    project_all(*linear, static_cast<const BFloat16*>(input), rows, output, threads);
  else
    project_all(*linear, static_cast<const float*>(input), rows, output, threads);
}

// output [rows]: which of the first `columns` columns of the same is largest, of equals the first.
void slipstream_project_largest(const Linear* linear, const void* input, int32_t rows,
                                int32_t columns, int64_t* output, int32_t threads,
                                int32_t bfloat16) {
  if (bfloat16)
    project_largest(*linear, static_cast<const BFloat16*>(input), rows, columns, output, threads);
  else
    project_largest(*linear, static_cast<const float*>(input), rows, columns, output, threads);
}

// Ends with slipstream_stop_touching, before which the spans must stay.
void* slipstream_touch(const Span* spans, int32_t count) {
  return new Toucher(std::vector<Span>(spans, spans + count));
}

void slipstream_stop_touching(void* toucher) { delete static_cast<Toucher*>(toucher); }
}
