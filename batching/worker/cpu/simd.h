// What the kernels compute with sixteen lanes: dot products of every format, powers of two, rounding.
//
// Only what decides speed or bits is spelled out per instruction set. The build switches floating-point
// contraction off, so a result never depends on which of two template instances computed it.
#pragma once

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "vectors.h"

namespace slipstream {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

// 32 bits of a row: one float32, two neighbouring bfloat16 or four bytes.
typedef uint32_t Unit;

struct BFloat16 {
  uint16_t bits;
};

// Memory whose vectors do not lie across two cache lines.
template <class T>
struct LineAllocator {
  typedef T value_type;
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, LINE); }
  bool operator==(const LineAllocator&) const { return true; }

 private:
  static constexpr std::align_val_t LINE{64};
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

template <class T>
constexpr int PER_UNIT = sizeof(Unit) / sizeof(T);

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Register tiles of the two products, in rows x vectors: accumulators plus one row of operands must
// fit the register file (32 x 64 bytes with AVX-512, 16 x 32 bytes with AVX2). Few rows take the
// wider tile: they wait for memory, which likes whole rows read at once.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECS = 4, FEW_ROWS = 3, WIDE_VECS = 8;
#else
constexpr int TILE_ROWS = 6, TILE_VECS = 1, FEW_ROWS = 2, WIDE_VECS = 2;
#endif

SLIPSTREAM_INLINE Vec load(const float* source) { return read_lanes<Vec>(source); }
SLIPSTREAM_INLINE Int load_units(const Unit* source) { return read_lanes<Int>(source); }
SLIPSTREAM_INLINE void store(float* target, Vec x) { write_lanes(target, x); }

// Past the caches: for what is not read again soon. `target` is aligned to 64 bytes.
SLIPSTREAM_INLINE void stream(float* target, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(target, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(target, (__m256)x.low), _mm256_stream_ps(target + REGISTER_LANES, (__m256)x.high);
#else
  store(target, x);
#endif
}

// 1 / x for normal x, to about the last bit: an estimate and one Newton step, where a division would
// occupy its unit for as long as ten other operations.
SLIPSTREAM_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return multiply_add(guess, multiply_add(-x, guess, splat(1.0f)), guess);
#else
  return 1.0f / x;
#endif
}

// acc + a . b per lane, over the one or two elements each lane's unit holds.
template <class T>
SLIPSTREAM_INLINE Vec dot_add(Int a, Int b, Vec acc);

template <>
SLIPSTREAM_INLINE Vec dot_add<float>(Int a, Int b, Vec acc) {
  return multiply_add(as_floats(a), as_floats(b), acc);
}

// Of units of two bfloat16 the first or second ones, as float32 have them.
SLIPSTREAM_INLINE Int half_as_float(Int units, int part) {
  return part == 0 ? units << 16 : units & static_cast<int32_t>(0xffff0000u);
}

template <>
SLIPSTREAM_INLINE Vec dot_add<BFloat16>(Int a, Int b, Vec acc) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = multiply_add(as_floats(half_as_float(a, 0)), as_floats(half_as_float(b, 0)), acc);
  return multiply_add(as_floats(half_as_float(a, 1)), as_floats(half_as_float(b, 1)), acc);
#endif
}

// The sums of two products of neighbouring 16-bit integers, per lane.
SLIPSTREAM_INLINE Ints multiply_pairs(Ints a, Ints b) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// acc + the four products of unsigned bytes of a and signed bytes of b, per lane.
SLIPSTREAM_INLINE Int dot_add_bytes(Int a, Int b, Int acc) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
  return each(
      [](Ints x, Ints y, Ints sum) SLIPSTREAM_ALWAYS {
        typedef int16_t Signed __attribute__((vector_size(REGISTER_BYTES)));
        typedef uint16_t Unsigned __attribute__((vector_size(REGISTER_BYTES)));
#if defined(__x86_64__)
        asm("" : "+x"(x));  // or GCC masks a number before it is spread, by way of a slow register
#endif
        const Ints even = multiply_pairs(x & 0xff00ff, (Ints)((Signed)y << 8 >> 8));
        const Ints odd = multiply_pairs((Ints)((Unsigned)x >> 8), (Ints)((Signed)y >> 8));
        return sum + even + odd;
      },
      a, b, acc);
#endif
}

// 2^r on [-1/2, 1/2], relative error below 2.2e-7 in float32: the coefficients of a Remez exchange
// on the relative error, with the first one set to 1 so that 2^0 is exact.
constexpr float POWER_SERIES[6] = {1.0f,              6.9314696706e-01f, 2.4022119724e-01f,
                                   5.5507132735e-02f, 9.6755413345e-03f, 1.3276471993e-03f};

// 2^x; exactly 0 where that is below the normal range of float32, for minus infinity too: processors take
// many times as long for results that are denormal.
SLIPSTREAM_INLINE Vec power_of_two(Vec x) {
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x + shifter) - shifter, r = x - n;
  Vec p = splat(POWER_SERIES[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) p = multiply_add(p, r, splat(POWER_SERIES[i]));
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Vec bounded = minimum(splat(127.0f), maximum(splat(-127.0f), n));
  const Vec result = p * as_floats((to_ints(bounded) + 127) << 23);
  return select(x < -126.0f, Vec{}, result);
#endif
}

SLIPSTREAM_INLINE float power_of_two(float x) { return get_lane(power_of_two(splat(x)), 0); }

// tanh(x / (2 log2 e)) = 1 - 2 / (2^x + 1): absolute error below 2e-7, which a soft cap can afford.
SLIPSTREAM_INLINE Vec hyperbolic_tangent(Vec x) { return 1.0f - 2.0f / (power_of_two(x) + 1.0f); }

SLIPSTREAM_INLINE Vec load_as(const float* source) { return load(source); }
SLIPSTREAM_INLINE Vec load_as(const BFloat16* source) {
  return as_floats(widen(read_lanes<Half>(source)) << 16);
}

// Store sixteen values rounded to nearest even.
SLIPSTREAM_INLINE void store_as(float* target, Vec x) { store(target, x); }

SLIPSTREAM_INLINE void store_as(BFloat16* target, Vec x) {
#if defined(__AVX512BF16__)
  write_lanes(target, _mm512_cvtneps_pbh((__m512)x));
#else
  const Int bits = as_ints(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  write_lanes(target, to_shorts(select(x == x, rounded, Int{} + 0x7fc0)));
#endif
}

#if defined(__AVX512F__)
// Lane j of row i changes places with lane i of row j.
SLIPSTREAM_INLINE void transpose(Int (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int width = 1; width < LANES; width *= 2) {  // squares of twice that width
    const Int lane = lane_index(), low = (lane & width) ? LANES + lane - width : lane;
    const Int high = (lane & width) ? LANES + lane : lane + width;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & width) continue;
      const Int a = rows[i], b = rows[i + width];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + width] = __builtin_shuffle(a, b, high);
    }
  }
}
#endif

// Calls f with std::integral_constant n, 1 <= n <= N: a run-time count as a template argument.
template <int N, class F>
SLIPSTREAM_INLINE void with_constant(int n, F&& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(std::integral_constant<int, N>{});
}

}  // namespace slipstream
