// y = x @ dequantized(w).T + bias on the stored bytes: which of the ways below serves a call.
//
//   gemv.h         at most kGemvRows rows of x
//   gemm_floats.h  more, in fp32
//   gemm_pairs.h   more, in bf16 where that rounds nothing, or in 16-bit integers where the caller asks for them
#pragma once
#include "gemm_floats.h"
#include "gemm_pairs.h"
#include "gemv.h"

namespace BLOCKSCALE_ISA {

template <class D>
static void linear_fp8(const LinearSpec& spec, const LinearCall& call) {
#if defined(BLOCKSCALE_BF16)
  if ((spec.activation.enabled || spec.x_type == kBFloat16) && in_groups(spec))  // FP8 codes, or x itself, are bf16
    return call.m > kGemvRows ? gemm<Pairs<Bf16Pairs<D>>>(spec, call) : gemv_of<Bf16Pairs<D>>(spec, call);
#endif
  call.m > kGemvRows ? gemm<Floats<D>>(spec, call) : gemv_of<Single<D>>(spec, call);
}

static void linear(const LinearSpec* spec, const LinearCall* call) {
#if defined(BLOCKSCALE_INT16)
  if (spec->engine == kInt16) return gemm<Pairs<Int16Pairs<E4M3>>>(*spec, *call);
#endif
  switch (spec->element) {
    case kElementE4M3: return linear_fp8<E4M3>(*spec, *call);
    case kElementE5M2: return linear_fp8<E5M2>(*spec, *call);
    default: return call->m > kGemvRows ? gemm<Floats<E2M1>>(*spec, *call) : gemv_of<Single<E2M1>>(*spec, *call);
  }
}

}  // namespace BLOCKSCALE_ISA
