// A thin vector trait over GCC's and Clang's vector extensions: the same source becomes SSE2, AVX2, AVX-512 or NEON.
// The operators + * & << >> work lane by lane on these types, and `a * b + c` contracts to a fused multiply-add where
// the instruction set has one. Only what the operators cannot say is written out below.
//
// Everything sits in a namespace of its own for each instruction set, and nothing comes from the C++ library: the
// linker would otherwise be free to hand the AVX-512 copy of an inline function to the baseline.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // a micro-kernel that is inlined loses its registers to what is around it
#define UNROLL _Pragma("GCC unroll 16")

namespace BLOCKSCALE_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // fp32 lanes of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 of them, else 16
#else
constexpr bool kManyRegisters = false;
#endif

// Keeps a loaded vector in its register: GCC would load it again for every use.
#if defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#elif defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#endif

// Makes the compiler forget what it has loaded from there: loading again is better than running out of registers.
#define LOAD_AGAIN(pointer) __asm__ volatile("" : "+r"(pointer))

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int16_t H __attribute__((vector_size(4 * W)));
typedef uint16_t UH __attribute__((vector_size(4 * W)));
typedef float F4 __attribute__((vector_size(16)));

template <class V, class T>
INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
INLINE I load_part(const uint8_t* p, int64_t count) {  // `count` bytes, fewer than none or more than fit too; then zeros
  if (count >= 4 * W) return load<I>(p);
  if (count <= 0) return I{};
#if defined(__AVX512BW__)
  return bits<I>(_mm512_maskz_loadu_epi8(~0ull >> (64 - count), p));
#else
  uint8_t part[4 * W] = {};
  memcpy(part, p, count);
  return load<I>(part);
#endif
}
template <class V, class T>
INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
INLINE F splat(float x) { return x - F{}; }
INLINE I splat(int32_t x) { return x - I{}; }
INLINE float power_of_two(int exponent) { return bits<float>((exponent + 127) << 23); }  // of a normal number
INLINE F abs(F v) { return bits<F>(bits<I>(v) & 0x7FFFFFFF); }
INLINE F min(F a, F b) { return a < b ? a : b; }
INLINE F max(F a, F b) { return a > b ? a : b; }

INLINE bool any(I v) {  // whether some bit is set
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bits<__m512i>(v), bits<__m512i>(v)) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256(bits<__m256i>(v), bits<__m256i>(v));
#else
  int32_t all = 0;
  for (int i = 0; i < W; i++) all |= v[i];
  return all != 0;
#endif
}

// Every second lane of a and b, from `odd` on.
template <int odd>
INLINE F every_second(F a, F b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, odd, odd + 2, odd + 4, odd + 6, odd + 8, odd + 10, odd + 12, odd + 14, odd + 16,
                                 odd + 18, odd + 20, odd + 22, odd + 24, odd + 26, odd + 28, odd + 30);
#elif defined(__AVX__)
  return __builtin_shufflevector(a, b, odd, odd + 2, odd + 4, odd + 6, odd + 8, odd + 10, odd + 12, odd + 14);
#else
  return __builtin_shufflevector(a, b, odd, odd + 2, odd + 4, odd + 6);
#endif
}
// Deals E * W numbers out to E vectors, one to each by turns.
template <int E>
INLINE void deal(F (&v)[E]) {
  if constexpr (E > 1) {
    F even[E / 2], odd[E / 2];
    UNROLL for (int j = 0; j < E / 2; j++) {
      even[j] = every_second<0>(v[2 * j], v[2 * j + 1]);
      odd[j] = every_second<1>(v[2 * j], v[2 * j + 1]);
    }
    deal(even), deal(odd);
    UNROLL for (int j = 0; j < E / 2; j++) v[2 * j] = even[j], v[2 * j + 1] = odd[j];
  }
}

INLINE F4 fold(F v) {  // W lanes to 4 by adding
#if defined(__AVX512F__)
  typedef float F8 __attribute__((vector_size(32)));
  F8 h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif defined(__AVX__)
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}
INLINE float sum(F v) {
  F4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}
INLINE F4 sum4(F a, F b, F c, F d) {  // the sums of four vectors, side by side
  F4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  F4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  F4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}
INLINE float maximum(F v) {
#if defined(__AVX512F__)
  typedef float F8 __attribute__((vector_size(32)));
  F8 x = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), y = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  F8 h = x > y ? x : y;
  F4 p = __builtin_shufflevector(h, h, 0, 1, 2, 3), q = __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif defined(__AVX__)
  F4 p = __builtin_shufflevector(v, v, 0, 1, 2, 3), q = __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  F4 p = v, q = v;
#endif
  F4 m = p > q ? p : q, n = __builtin_shufflevector(m, m, 2, 3, 0, 1);
  m = m > n ? m : n;
  return m[0] > m[1] ? m[0] : m[1];
}

// Into the second-level cache: the first has too few miss buffers to stream from memory at full speed.
constexpr int kPrefetch = 4096;  // bytes ahead
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // into the first, for what comes very soon

template <int N>
struct Count { static constexpr int value = N; };  // a number that a lambda takes as a constant

INLINE int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace BLOCKSCALE_ISA
