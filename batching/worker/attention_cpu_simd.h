// Sixteen float32 lanes at a time, on whatever the compiler was told the CPU has.
//
// GCC's vector extensions give one source for AVX-512 (one register), AVX2 (two) and anything else
// (lowered). Only what decides speed or bits is spelled out per instruction set: the fused
// multiply-add and the bfloat16 pair product. The build switches floating-point contraction off,
// so a result never depends on which of two template instances computed it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SLIPSTREAM_INLINE inline __attribute__((always_inline))

namespace slipstream {

constexpr int LANES = 16;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

// 32 bits of a row: one float32, or two neighbouring bfloat16.
typedef uint32_t Unit;

struct BFloat16 {
  uint16_t bits;
};

template <class T>
constexpr int PER_UNIT = sizeof(Unit) / sizeof(T);

// Register tile of the two products, in rows x vectors: accumulators plus one row of operands must
// fit the register file (32 x 64 bytes with AVX-512, 16 x 32 bytes with AVX2).
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECS = 4;
#else
constexpr int TILE_ROWS = 2, TILE_VECS = 2;
#endif

SLIPSTREAM_INLINE Vec load(const float* source) {
  Vec x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

SLIPSTREAM_INLINE Int load_units(const Unit* source) {
  Int x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

SLIPSTREAM_INLINE void store(float* target, Vec x) { std::memcpy(target, &x, sizeof x); }
SLIPSTREAM_INLINE Vec splat(float x) { return Vec{} + x; }
SLIPSTREAM_INLINE Int splat_unit(Unit x) { return Int{} + static_cast<int32_t>(x); }
SLIPSTREAM_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
SLIPSTREAM_INLINE Int lane_index() {
  return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

SLIPSTREAM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union Halves {
    Vec whole;
    __m256 half[2];
  } x{a}, y{b}, z{c};
  z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
  z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// acc + a . b per lane, over the one or two elements each lane's unit holds.
template <class T>
SLIPSTREAM_INLINE Vec dot_add(Int a, Int b, Vec acc);

template <>
SLIPSTREAM_INLINE Vec dot_add<float>(Int a, Int b, Vec acc) {
  return multiply_add((Vec)a, (Vec)b, acc);
}

template <>
SLIPSTREAM_INLINE Vec dot_add<BFloat16>(Int a, Int b, Vec acc) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  constexpr int32_t high = static_cast<int32_t>(0xffff0000u);
  acc = multiply_add((Vec)(a << 16), (Vec)(b << 16), acc);
  return multiply_add((Vec)(a & high), (Vec)(b & high), acc);
#endif
}

// Lane sums and maxima in a fixed order.
SLIPSTREAM_INLINE float sum_lanes(Vec x) {
  float part[LANES];
  store(part, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

SLIPSTREAM_INLINE float max_lanes(Vec x) {
  float part[LANES];
  store(part, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  return part[0];
}

// e^x, relative error below 2e-7; 0 below -87, e^88 above 88. Cody-Waite reduction by ln 2 and the
// degree-5 minimax polynomial of Cephes' expf.
SLIPSTREAM_INLINE Vec exponential(Vec x) {
  const Vec lowest = splat(-87.0f), highest = splat(88.0f), shifter = splat(12582912.0f);
  const Int vanishes = x < lowest;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec n = multiply_add(x, splat(1.44269504088896341f), shifter) - shifter;
  Vec r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + 1.0f);
  const Vec power = (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
  return vanishes ? Vec{} : p * power;
}

SLIPSTREAM_INLINE float exponential(float x) { return exponential(splat(x))[0]; }

// tanh(x) = 1 - 2 / (e^2x + 1): absolute error below 2e-7, which is what a soft cap needs.
SLIPSTREAM_INLINE Vec hyperbolic_tangent(Vec x) {
  return 1.0f - 2.0f / (exponential(x + x) + 1.0f);
}

// Store sixteen values rounded to nearest even.
SLIPSTREAM_INLINE void store_as(float* target, Vec x) { store(target, x); }

SLIPSTREAM_INLINE void store_as(BFloat16* target, Vec x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  typedef uint32_t Bits __attribute__((vector_size(64)));
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0u, Half);
#endif
  std::memcpy(target, &half, sizeof half);
}

}  // namespace slipstream
