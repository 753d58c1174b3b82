// Stored elements to fp32, a vector of bytes at a time, in registers.
//
// A 32-bit lane holds E = 4 (FP8) or 8 (FP4) neighbouring elements. Decoding yields E vectors, the j-th with element j
// of every lane. So the columns come out permuted inside a chunk of E * W elements; x is permuted the same way once
// (prepare.h), and a dot product does not mind.
//
// The trick: an element's exponent and mantissa, put where fp32 keeps its own, are the element's value times a power of
// two (2^kUnit undoes it), subnormals included. That needs no table and no conversion, two or three operations a vector.
#pragma once
#include "numbers.h"

namespace BLOCKSCALE_ISA {

// 16-bit lanes: their even bytes, with the sign, shifted left by N. kMultiply: in one operation, whose factor needs a
// register.
template <int N, bool kMultiply>
INLINE I even_bytes(I v) {
#if defined(__AVX512BW__)
  if (kMultiply) return bits<I>(_mm512_maddubs_epi16(_mm512_set1_epi16(1 << N), bits<__m512i>(v)));
#elif defined(__AVX2__)
  if (kMultiply) return bits<I>(_mm256_maddubs_epi16(_mm256_set1_epi16(1 << N), bits<__m256i>(v)));
#endif
  return bits<I>((bits<H>(v) << 8) >> (8 - N));
}

struct E4M3 {
  static constexpr int E = 4, kMantissa = 3, kBias = 7;
  static constexpr int kUnit = 127 - kBias;
  template <bool kMultiply = true>
  INLINE void decode(I v, F (&out)[E]) {
    const I mask = splat((int32_t)0x87F00000);
    I odd = bits<I>(bits<H>(v) >> 4);  // 16-bit lanes: bytes 1 and 3, shifted with their sign
    I even = even_bytes<4, kMultiply>(v);
    out[0] = bits<F>((even << 16) & mask);
    out[1] = bits<F>((odd << 16) & mask);
    out[2] = bits<F>(even & mask);
    out[3] = bits<F>(odd & mask);
  }
  static constexpr int kSpecial = 0x7F;  // the first magnitude that the trick gets wrong: NaN
  INLINE float one(const uint8_t* row, int64_t i) { return from_e4m3(row[i]); }
};

struct E5M2 {
  static constexpr int E = 4, kMantissa = 2, kBias = 15;
  static constexpr int kUnit = 127 - kBias;
  template <bool kMultiply = true>
  INLINE void decode(I v, F (&out)[E]) {
    const I mask = splat((int32_t)0x8FE00000);
    I odd = bits<I>(bits<H>(v) >> 3);
    I even = even_bytes<5, kMultiply>(v);
    out[0] = bits<F>((even << 16) & mask);
    out[1] = bits<F>((odd << 16) & mask);
    out[2] = bits<F>(even & mask);
    out[3] = bits<F>(odd & mask);
  }
  static constexpr int kSpecial = 0x7C;  // infinity; NaNs follow
  INLINE float one(const uint8_t* row, int64_t i) { return from_e5m2(row[i]); }
};

struct E2M1 {  // two to a byte, the even column in the low nibble
  static constexpr int E = 8;
  static constexpr int kUnit = 126;
  template <bool kMultiply = true>
  INLINE void decode(I v, F (&out)[E]) {
    const I mask = splat((int32_t)0x81C00000);
    UNROLL for (int j = 0; j < E; j++) out[j] = bits<F>(((v << (28 - 4 * j)) >> 6) & mask);
  }
  static constexpr int kSpecial = 0;  // every code is a number
  INLINE float one(const uint8_t* row, int64_t i) {
    constexpr float value[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    int code = row[i / 2] >> (i % 2 * 4) & 15;
    return code & 8 ? -value[code & 7] : value[code];
  }
};

// Whether bytes that `D::decode` gets wrong went by: the largest positive and the largest negative byte tell.
template <class D>
struct Watch {
  typedef int8_t Signed __attribute__((vector_size(4 * W)));
  typedef uint8_t Unsigned __attribute__((vector_size(4 * W)));
  Signed positive{};
  Unsigned negative{};
  INLINE_MEMBER void see(I v) {
    if (!D::kSpecial) return;
    const Signed s = bits<Signed>(v);
    const Unsigned u = bits<Unsigned>(v);
    positive = positive > s ? positive : s;
    negative = negative > u ? negative : u;
  }
  bool special() const {
    if (!D::kSpecial) return false;
    return any(bits<I>((positive >= (int8_t)D::kSpecial) | bits<Signed>(negative >= (uint8_t)(0x80 | D::kSpecial))));
  }
};

template <class D>
constexpr int kChunk = D::E * W;  // elements decoded at a time, from 4 * W bytes
template <class D>
INLINE int64_t bytes_of(int64_t elements) { return D::E == 8 ? (elements + 1) / 2 : elements; }

}  // namespace BLOCKSCALE_ISA
