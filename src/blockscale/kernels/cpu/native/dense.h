// y = x @ w.T + bias for unquantized weights and at most four rows of x: lm_head and routers while decoding.
//
// 16-bit weights come two to a lane; x is permuted alike, as in decode.h.
#pragma once
#include "quantize.h"

namespace BLOCKSCALE_ISA {

struct DenseFloat {
  typedef float Stored;
  static constexpr int E = 1;
  INLINE void read(const float* p, F (&out)[1]) { out[0] = load<F>(p); }
};
struct DenseBf16 {
  typedef Bf16 Stored;
  static constexpr int E = 2;
  INLINE void read(const Bf16* p, F (&out)[2]) {
    const I v = load<I>(p);
    out[0] = bits<F>(v << 16);
    out[1] = bits<F>(v & (int32_t)0xFFFF0000);
  }
};
struct DenseFp16 {
  typedef Fp16 Stored;
  static constexpr int E = 1;
  INLINE void read(const Fp16* p, F (&out)[1]) {
#if defined(__AVX512F__)
    out[0] = bits<F>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__F16C__)
    out[0] = bits<F>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
    out[0] = widen(p);
#endif
  }
};

template <class T, int M, int R>
static void dense_rows(const typename T::Stored* w, int64_t k, const float* x, int64_t stride, float (&out)[M][R]) {
  constexpr int64_t C = T::E * W;
  F total[M][R];
  UNROLL for (int a = 0; a < M; a++) UNROLL for (int r = 0; r < R; r++) total[a][r] = F{};
  auto step = [&](const typename T::Stored* from, int r, const float* xc) __attribute__((always_inline)) {
    F b[T::E];
    T::read(from, b);
    UNROLL for (int a = 0; a < M; a++)
      UNROLL for (int j = 0; j < T::E; j++) total[a][r] += b[j] * load<F>(xc + a * stride + j * W);
  };
  const int64_t full = k / C * C;
  for (int64_t c = 0; c < full; c += C) {
    const int64_t ahead = c + kPrefetch / (int64_t)sizeof(*w);
    const typename T::Stored* line = w + ahead + (ahead >= k ? (R - 1) * k : 0);
    UNROLL for (int r = 0; r < R; r++) prefetch(line + r * k);
    UNROLL for (int r = 0; r < R; r++) step(w + r * k + c, r, x + c);
  }
  if (full < k)
    for (int r = 0; r < R; r++) {
      typename T::Stored tail[C];
      memset(tail, 0, sizeof tail);
      memcpy(tail, w + r * k + full, (k - full) * sizeof *tail);
      step(tail, r, x + full);
    }
  UNROLL for (int a = 0; a < M; a++) UNROLL for (int r = 0; r < R; r++) out[a][r] = sum(total[a][r]);
}

template <class T, int M>
static void dense_as(const DenseCall& call) {
  static thread_local Scratch memory;
  constexpr int64_t C = T::E * W;
  const int64_t n = call.n, k = call.k, padded = round_up(k, C), stride = padded + 16;
  float* x = memory.get<float>(M * stride + padded);
  {
    DenormalGuard guard;
    float* row = x + M * stride;
    for (int a = 0; a < M; a++) {
      read_floats(call.x, call.x_type, a * k, k, row);
      memset(row + k, 0, (padded - k) * 4);
      for (int64_t c = 0; c < padded; c += C)
        for (int j = 0; j < T::E; j++)
          for (int i = 0; i < W; i++) x[a * stride + c + j * W + i] = row[c + T::E * i + j];
    }
  }
  constexpr int R = M > 2 ? 2 : 4;
  const int64_t group = 64;
  parallel_for((n + group - 1) / group, (double)M * n * k, [&](int64_t task) {
    const typename T::Stored* w = (const typename T::Stored*)call.w;
    float y[M][group];
    const int64_t n0 = task * group, n1 = least(n, n0 + group);
    int64_t i = n0;
    for (; i + R <= n1; i += R) {
      float out[M][R];
      dense_rows<T, M, R>(w + i * k, k, x, stride, out);
      for (int a = 0; a < M; a++) for (int r = 0; r < R; r++) y[a][i - n0 + r] = out[a][r];
    }
    for (; i < n1; i++) {
      float out[M][1];
      dense_rows<T, M, 1>(w + i * k, k, x, stride, out);
      for (int a = 0; a < M; a++) y[a][i - n0] = out[a][0];
    }
    float bias[group];
    if (call.bias) read_floats(call.bias, call.bias_type, n0, n1 - n0, bias);
    for (int a = 0; a < M; a++) {
      if (call.bias) for (int64_t j = 0; j < n1 - n0; j++) y[a][j] += bias[j];
      write_floats(y[a], n1 - n0, call.y, call.y_type, a * n + n0);
    }
  });
}

template <class T>
static void dense_of(const DenseCall& call) {
  switch (call.m) {
    case 1: return dense_as<T, 1>(call);
    case 2: return dense_as<T, 2>(call);
    case 3: return dense_as<T, 3>(call);
    default: return dense_as<T, 4>(call);
  }
}

static void dense(const DenseCall* call) {
  switch (call->w_type) {
    case kFloat32: return dense_of<DenseFloat>(*call);
    case kBFloat16: return dense_of<DenseBf16>(*call);
    default: return dense_of<DenseFp16>(*call);
  }
}

}  // namespace BLOCKSCALE_ISA
