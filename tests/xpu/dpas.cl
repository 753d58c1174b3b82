// Intel's matrix instruction (DPAS) in software, for OpenCL devices that lack it: sub-groups of 16, systolic depth 8,
// 8 rows. Lane n holds column n of B and C; lane k holds column k of A, one 16-bit element a row. B packs two
// consecutive K into an int, the even one low. Products and sums are fp32 fused multiply-adds in rising K; the order
// on real hardware is not documented.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_intel_subgroups : enable

float value_f16(int bits) { return (float)as_half((short)bits); }
float value_bf16(int bits) { return as_float(bits << 16); }

#define DPAS(NAME, VALUE)                                                             \
  __attribute__((overloadable)) float8 NAME(short8 a, int8 b, float8 c) {             \
    short rows[8];                                                                    \
    int pairs[8];                                                                     \
    float sums[8];                                                                    \
    vstore8(a, 0, rows);                                                              \
    vstore8(b, 0, pairs);                                                             \
    vstore8(c, 0, sums);                                                              \
    for (int k = 0; k < 16; ++k) {                                                    \
      float right = VALUE((k & 1) ? (pairs[k >> 1] >> 16) & 0xffff : pairs[k >> 1] & 0xffff); \
      for (int r = 0; r < 8; ++r) {                                                   \
        float left = VALUE(intel_sub_group_shuffle((int)rows[r], (uint)k) & 0xffff);  \
        sums[r] = fma(left, right, sums[r]);                                          \
      }                                                                               \
    }                                                                                 \
    return vload8(0, sums);                                                           \
  }

DPAS(intel_sub_group_f16_f16_matrix_mad_k16, value_f16)
DPAS(intel_sub_group_bf16_bf16_matrix_mad_k16, value_bf16)
