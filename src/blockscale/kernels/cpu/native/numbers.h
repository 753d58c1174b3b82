// Single numbers and rows of them: bf16, fp16, E8M0, E4M3 and E5M2 to fp32, and back by round-to-nearest-even.
// The loops are plain so that the compiler vectorises them. They need denormals: see DenormalGuard in parallel.h.
#pragma once
#include "api.h"
#include "simd.h"

namespace BLOCKSCALE_ISA {

INLINE uint32_t abs_bits(float x) { return bits<uint32_t>(x) & 0x7FFFFFFF; }

INLINE float from_bf16(uint16_t h) { return bits<float>((uint32_t)h << 16); }

INLINE float from_fp16(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
  uint32_t value = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  value = magnitude >= 31u << 23 ? magnitude | 0x7F800000u : value;  // infinities and NaNs
  return bits<float>(value | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_bf16(float x) {
  uint32_t u = bits<uint32_t>(x);
  uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  return (uint16_t)((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

INLINE uint16_t to_fp16(float x) {
  uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
  uint32_t normal = (a - (112u << 23) + 0xFFF + (a >> 13 & 1)) >> 13;
  uint32_t small = bits<uint32_t>(bits<float>(a) + 0.5f) - bits<uint32_t>(0.5f);  // the addition rounds to 2^-24
  uint32_t h = a < 113u << 23 ? small : normal;
  h = a >= 0x477FF000u ? 0x7C00 : h;  // 65520 and above
  h = a > 0x7F800000u ? 0x7E00 : h;
  return (uint16_t)(h | sign);
}

INLINE float from_e8m0(uint8_t b) {  // OCP MX 1.0: 2^(b - 127), 255 is NaN
  uint32_t u = (uint32_t)b << 23;
  u = b == 0 ? 0x00400000u : u;
  return bits<float>(b == 255 ? 0x7FC00000u : u);
}

INLINE float from_e4m3(uint8_t b) {
  float magnitude = bits<float>((uint32_t)(b & 0x7F) << 20) * 0x1p120f;
  uint32_t u = (b & 0x7F) == 0x7F ? 0x7FC00000u : bits<uint32_t>(magnitude);
  return bits<float>(u | (uint32_t)(b & 0x80) << 24);
}

INLINE float from_e5m2(uint8_t b) { return from_fp16((uint16_t)(b << 8)); }

// Numbers `first ... first + count` of an array of some Type, as fp32.
static void read_floats(const void* from, int32_t type, int64_t first, int64_t count, float* to) {
  switch (type) {
    case kFloat32: memcpy(to, (const float*)from + first, count * 4); break;
    case kBFloat16: for (int64_t i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t*)from)[first + i]); break;
    case kFloat16: for (int64_t i = 0; i < count; i++) to[i] = from_fp16(((const uint16_t*)from)[first + i]); break;
    case kE8M0: for (int64_t i = 0; i < count; i++) to[i] = from_e8m0(((const uint8_t*)from)[first + i]); break;
    default: for (int64_t i = 0; i < count; i++) to[i] = from_e4m3(((const uint8_t*)from)[first + i]); break;
  }
}

static void write_floats(const float* from, int64_t count, void* to, int32_t type, int64_t first) {
  switch (type) {
    case kFloat32: memcpy((float*)to + first, from, count * 4); break;
    case kBFloat16: for (int64_t i = 0; i < count; i++) ((uint16_t*)to)[first + i] = to_bf16(from[i]); break;
    default: for (int64_t i = 0; i < count; i++) ((uint16_t*)to)[first + i] = to_fp16(from[i]); break;
  }
}

}  // namespace BLOCKSCALE_ISA
