// Sixteen 32-bit lanes at a time, on whatever the compiler was told the CPU has.
//
// With AVX-512 they are one register. GCC keeps a vector that is wider than the CPU's registers in
// memory, so elsewhere sixteen lanes are a pair of halves, down to what fits: two registers with AVX2, four
// on anything else. What is written with operators, and the functions below, is the same for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SLIPSTREAM_ALWAYS __attribute__((always_inline))
#define SLIPSTREAM_INLINE inline SLIPSTREAM_ALWAYS

namespace slipstream {

constexpr int LANES = 16;

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif
constexpr int REGISTER_LANES = REGISTER_BYTES / 4;

typedef float Floats __attribute__((vector_size(REGISTER_BYTES)));
typedef int32_t Ints __attribute__((vector_size(REGISTER_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(REGISTER_BYTES / 2)));
typedef uint8_t Bytes __attribute__((vector_size(REGISTER_BYTES / 4)));

template <class Half>
struct Pair {
  Half low, high;
};

template <class V>
constexpr bool IS_PAIR = false;
template <class Half>
constexpr bool IS_PAIR<Pair<Half>> = true;

// `COUNT` registers.
template <class Register, int COUNT>
struct Several {
  typedef Pair<typename Several<Register, COUNT / 2>::Type> Type;
};
template <class Register>
struct Several<Register, 1> {
  typedef Register Type;
};

typedef Several<Floats, LANES / REGISTER_LANES>::Type Vec;
typedef Several<Ints, LANES / REGISTER_LANES>::Type Int;
typedef Several<Shorts, LANES / REGISTER_LANES>::Type Half;

// f of each register of some vectors, as one vector again.
template <class F, class First, class... Rest>
SLIPSTREAM_INLINE auto each(F f, First first, Rest... rest) {
  if constexpr (IS_PAIR<First>) {
    typedef decltype(each(f, first.low, rest.low...)) Result;
    return Pair<Result>{each(f, first.low, rest.low...), each(f, first.high, rest.high...)};
  } else {
    return f(first, rest...);
  }
}

// Comparisons give lanes of all bits or none.
#define SLIPSTREAM_LANEWISE(op)                                                     \
  template <class T>                                                                \
  SLIPSTREAM_INLINE auto operator op(Pair<T> a, Pair<T> b) {                        \
    return each([](auto x, auto y) SLIPSTREAM_ALWAYS { return x op y; }, a, b);     \
  }                                                                                 \
  template <class T, class Number>                                                  \
    requires std::is_arithmetic_v<Number>                                           \
  SLIPSTREAM_INLINE auto operator op(Pair<T> a, Number b) {                         \
    return each([b](auto x) SLIPSTREAM_ALWAYS { return x op b; }, a);               \
  }                                                                                 \
  template <class T, class Number>                                                  \
    requires std::is_arithmetic_v<Number>                                           \
  SLIPSTREAM_INLINE auto operator op(Number a, Pair<T> b) {                         \
    return each([a](auto x) SLIPSTREAM_ALWAYS { return a op x; }, b);               \
  }
SLIPSTREAM_LANEWISE(+)
SLIPSTREAM_LANEWISE(-)
SLIPSTREAM_LANEWISE(*)
SLIPSTREAM_LANEWISE(/)
SLIPSTREAM_LANEWISE(&)
SLIPSTREAM_LANEWISE(|)
SLIPSTREAM_LANEWISE(<<)
SLIPSTREAM_LANEWISE(>>)
SLIPSTREAM_LANEWISE(<)
SLIPSTREAM_LANEWISE(>)
SLIPSTREAM_LANEWISE(>=)
SLIPSTREAM_LANEWISE(==)
#undef SLIPSTREAM_LANEWISE

template <class T>
SLIPSTREAM_INLINE Pair<T> operator-(Pair<T> x) {
  return {-x.low, -x.high};
}

template <class T>
SLIPSTREAM_INLINE Pair<T>& operator+=(Pair<T>& x, Pair<T> y) {
  return x = x + y;
}

// a where the lane of `which` has all bits, b where none.
template <class V>
SLIPSTREAM_INLINE V select(Int which, V a, V b) {
  return each([](Ints w, auto x, auto y) SLIPSTREAM_ALWAYS { return w ? x : y; }, which, a, b);
}

template <class V>
SLIPSTREAM_INLINE V read_lanes(const void* source) {
  if constexpr (IS_PAIR<V>) {
    typedef decltype(V::low) Part;
    return {read_lanes<Part>(source), read_lanes<Part>(static_cast<const char*>(source) + sizeof(Part))};
  } else {
    V x;
    std::memcpy(&x, source, sizeof x);
    return x;
  }
}

template <class V>
SLIPSTREAM_INLINE void write_lanes(void* target, V x) {
  if constexpr (IS_PAIR<V>) {
    write_lanes(target, x.low), write_lanes(static_cast<char*>(target) + sizeof x.low, x.high);
  } else {
    std::memcpy(target, &x, sizeof x);
  }
}

template <class V>
constexpr int LANES_OF = sizeof(V) / 4;

template <class V>
SLIPSTREAM_INLINE auto get_lane(V x, int i) {
  if constexpr (IS_PAIR<V>)
    return i < LANES_OF<V> / 2 ? get_lane(x.low, i) : get_lane(x.high, i - LANES_OF<V> / 2);
  else
    return x[i];
}

template <class V, class Number>
SLIPSTREAM_INLINE void set_lane(V& x, int i, Number value) {
  if constexpr (!IS_PAIR<V>)
    x[i] = value;
  else if (i < LANES_OF<V> / 2)
    set_lane(x.low, i, value);
  else
    set_lane(x.high, i - LANES_OF<V> / 2, value);
}

SLIPSTREAM_INLINE Vec splat(float x) { return x - Vec{}; }  // minus zero, too
SLIPSTREAM_INLINE Int splat_unit(uint32_t x) { return Int{} + static_cast<int32_t>(x); }

SLIPSTREAM_INLINE Int lane_index() {
#if defined(__AVX512F__)
  return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  static constexpr int32_t INDEX[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read_lanes<Int>(INDEX);
#endif
}

// The same bits, read otherwise.
SLIPSTREAM_INLINE Vec as_floats(Int x) {
  return each([](Ints i) SLIPSTREAM_ALWAYS { return (Floats)i; }, x);
}
SLIPSTREAM_INLINE Int as_ints(Vec x) {
  return each([](Floats f) SLIPSTREAM_ALWAYS { return (Ints)f; }, x);
}

// The same numbers, as far as the other type has them.
SLIPSTREAM_INLINE Vec to_floats(Int x) {
  return each([](Ints i) SLIPSTREAM_ALWAYS { return __builtin_convertvector(i, Floats); }, x);
}
SLIPSTREAM_INLINE Int to_ints(Vec x) {
  return each([](Floats f) SLIPSTREAM_ALWAYS { return __builtin_convertvector(f, Ints); }, x);
}
SLIPSTREAM_INLINE Int widen(Half x) {
  return each([](Shorts s) SLIPSTREAM_ALWAYS { return __builtin_convertvector(s, Ints); }, x);
}
SLIPSTREAM_INLINE Half to_shorts(Int x) {
  return each([](Ints i) SLIPSTREAM_ALWAYS { return __builtin_convertvector(i, Shorts); }, x);
}
SLIPSTREAM_INLINE auto to_bytes(Int x) {
  return each([](Ints i) SLIPSTREAM_ALWAYS { return __builtin_convertvector(i, Bytes); }, x);
}

// The second operand where either is NaN, as the x86 instructions have it.
template <class V>
SLIPSTREAM_INLINE V maximum(V a, V b) {
  return each(
      [](Floats x, Floats y) SLIPSTREAM_ALWAYS {
#if defined(__AVX512F__)
        return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
        return (Floats)_mm256_max_ps((__m256)x, (__m256)y);
#else
        return x > y ? x : y;
#endif
      },
      a, b);
}

SLIPSTREAM_INLINE float maximum(float a, float b) { return a > b ? a : b; }

SLIPSTREAM_INLINE Vec minimum(Vec a, Vec b) {
  return each(
      [](Floats x, Floats y) SLIPSTREAM_ALWAYS {
#if defined(__AVX512F__)
        return (Floats)_mm512_min_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
        return (Floats)_mm256_min_ps((__m256)x, (__m256)y);
#else
        return x < y ? x : y;
#endif
      },
      a, b);
}

// Rounded once where the CPU can.
SLIPSTREAM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return each(
      [](Floats x, Floats y, Floats z) SLIPSTREAM_ALWAYS {
#if defined(__AVX512F__)
        return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
        return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
        return x * y + z;
#endif
      },
      a, b, c);
}

// Lane sums and maxima in a fixed order: halves are put together until one lane is left.
template <class F>
SLIPSTREAM_INLINE float fold_lanes(F f, Floats x) {
  float part[REGISTER_LANES];
  write_lanes(part, x);
  for (int width = REGISTER_LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = f(part[i], part[i + width]);
  return part[0];
}

template <class F, class T>
SLIPSTREAM_INLINE float fold_lanes(F f, Pair<T> x) {
  return fold_lanes(f, f(x.low, x.high));
}

SLIPSTREAM_INLINE float sum_lanes(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return fold_lanes([](auto a, auto b) SLIPSTREAM_ALWAYS { return a + b; }, x);
#endif
}

SLIPSTREAM_INLINE float max_lanes(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return fold_lanes([](auto a, auto b) SLIPSTREAM_ALWAYS { return maximum(a, b); }, x);
#endif
}

}  // namespace slipstream
