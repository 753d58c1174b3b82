// How weights meet x in registers: as fp32, as bf16 pairs or as 16-bit integer pairs.
//
// Each arithmetic says what a chunk of weights becomes (`decode` makes kVectors vectors of V from 4 * W bytes), how x is
// laid out to match (`arrange`) and how the two are multiplied and added up (`add`, in a Sum).
//
// Pairs hold two neighbouring 16-bit numbers in a 32-bit lane. They carry no scales: the products of kGroup columns are
// summed, then scaled.
#pragma once
#include "weight.h"

namespace BLOCKSCALE_ISA {

struct Unwatched { static constexpr int kSpecial = 0; };

// fp32 times fp32. The weights come 2^kUnit too small, and x that much too large.
template <class Element, bool kMultiply = true>
struct Single {
  typedef Element D;
  typedef Single<Element, W != 8> Crowded;  // the same with a register less, which AVX2 is short of
  typedef Element Watched;  // whose special codes `decode` gets wrong
  typedef F V;
  typedef F Sum;
  static constexpr int kVectors = D::E;
  static constexpr bool kPairs = false, kIntegers = false;
  INLINE void decode(I v, F (&out)[kVectors]) { D::template decode<kMultiply>(v, out); }
  INLINE F add(F sum, F w, F x) { return sum + w * x; }
  INLINE F value(F sum) { return sum; }
  INLINE void arrange(const float* row, float* to) {
    F v[D::E];
    UNROLL for (int j = 0; j < D::E; j++) v[j] = load<F>(row + j * W);
    deal(v);
    UNROLL for (int j = 0; j < D::E; j++) store(to + j * W, v[j]);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define BLOCKSCALE_BF16 1

// bf16 times bf16, added up in fp32. FP8 numbers are bf16 numbers, so nothing is rounded where x is one too.
template <class Element>
struct Bf16Pairs {
  typedef Element D;
  typedef Bf16Pairs Crowded;
  typedef Unwatched Watched;  // the table below is right for every byte
  typedef I V;
  typedef F Sum;
  static constexpr int kVectors = 2;
  static constexpr bool kPairs = true, kIntegers = false;

  // The upper and lower bytes of every magnitude as bf16, NaN and infinity included. Made by the compiler: what runs when
  // the library is loaded must not need this processor.
  struct Table {
    alignas(64) uint8_t upper[128] = {}, lower[128] = {};
    constexpr Table() {
      for (int code = 0; code < 128; code++) {
        int exponent = code >> D::kMantissa, low = code & ((1 << D::kMantissa) - 1);
        if (!exponent && low)  // a subnormal, which bf16 holds as a normal number
          for (exponent = 1; !(low >> D::kMantissa); low <<= 1) exponent--;
        low &= (1 << D::kMantissa) - 1;
        int number = code ? (exponent - D::kBias + 127) << 7 | low << (7 - D::kMantissa) : 0;
        if (code == D::kSpecial && D::kSpecial == 0x7C) number = 0x7F80;  // E5M2 has an infinity
        else if (code >= D::kSpecial) number = 0x7FC0;
        upper[code] = (uint8_t)(number >> 8), lower[code] = (uint8_t)number;
      }
    }
  };
  static constexpr Table table{};

  INLINE void decode(I v, I (&out)[2]) {
    const __m512i code = bits<__m512i>(v);
    const __m512i* t = (const __m512i*)&table;
    const I upper = bits<I>(_mm512_permutex2var_epi8(t[0], code, t[1])) | (v & (int32_t)0x80808080);
    const I lower = bits<I>(_mm512_permutex2var_epi8(t[2], code, t[3]));
    out[0] = bits<I>(_mm512_unpacklo_epi8(bits<__m512i>(lower), bits<__m512i>(upper)));
    out[1] = bits<I>(_mm512_unpackhi_epi8(bits<__m512i>(lower), bits<__m512i>(upper)));
  }
  INLINE F add(F sum, I w, I x) { return bits<F>(_mm512_dpbf16_ps(bits<__m512>(sum), (__m512bh)w, (__m512bh)x)); }
  INLINE F value(F sum) { return sum; }
  INLINE void arrange(const float* row, float* to) {  // of bf16 numbers
    __m512i half[2];
    for (int i = 0; i < 2; i++) {
      const I a = load<I>(row + 2 * i * W) >> 16, b = load<I>(row + (2 * i + 1) * W) >> 16;
      half[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(bits<__m512i>(a))),
                                   _mm512_cvtepi32_epi16(bits<__m512i>(b)), 1);
    }
    store(to, _mm512_shuffle_i64x2(half[0], half[1], 0x88));  // the unpacking above works on 16 bytes at a time
    store(to + W, _mm512_shuffle_i64x2(half[0], half[1], 0xDD));
  }
};
#endif

#if defined(__AVX2__)
#define BLOCKSCALE_INT16 1

// 16-bit fixed point: weights in steps of 1/32, x in steps of 1/8191 of the largest in its group. No sum of kGroup
// products overflows: a lane adds at most 16 of them, each at most 448 * 32 * 8191.
template <class Element>
struct Int16Pairs {
  typedef Element D;
  typedef Element Watched;
  typedef I V;
  typedef I Sum;
  static constexpr int kVectors = 2;
  static constexpr bool kPairs = true, kIntegers = true;
  static constexpr float kSteps = 32, kMaxX = 8191;
  static constexpr float kMagic = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  INLINE void decode(I v, I (&out)[2]) {
    F b[4];
    D::decode(v, b);
    I n[4];
    UNROLL for (int j = 0; j < 4; j++) n[j] = bits<I>(b[j] * (power_of_two(D::kUnit) * kSteps) + kMagic);
    UNROLL for (int j = 0; j < 2; j++) out[j] = (n[2 * j] & 0xFFFF) | (n[2 * j + 1] << 16);
  }
  INLINE I add(I sum, I w, I x) {
#if defined(__AVX512VNNI__)
    return bits<I>(_mm512_dpwssd_epi32(bits<__m512i>(sum), bits<__m512i>(w), bits<__m512i>(x)));
#elif defined(__AVX512BW__)
    return sum + bits<I>(_mm512_madd_epi16(bits<__m512i>(w), bits<__m512i>(x)));
#else
    return sum + bits<I>(_mm256_madd_epi16(bits<__m256i>(w), bits<__m256i>(x)));
#endif
  }
  INLINE F value(I sum) { return __builtin_convertvector(sum, F); }
  INLINE void arrange(const float* row, float* to) {  // of whole numbers
    F v[4];
    UNROLL for (int j = 0; j < 4; j++) v[j] = load<F>(row + j * W);
    deal(v);
    UNROLL for (int j = 0; j < 2; j++) {
      const I low = __builtin_convertvector(v[2 * j], I), high = __builtin_convertvector(v[2 * j + 1], I);
      store(to + j * W, (low & 0xFFFF) | (high << 16));
    }
  }
};
#endif

}  // namespace BLOCKSCALE_ISA
