// At most kGemvRows rows of x: the weights are decoded in registers and used at once. Memory is the limit, then decoding.
#pragma once
#include "prepare.h"
#include "weight.h"

namespace BLOCKSCALE_ISA {

constexpr int kGemvRows = 4;

// R rows of the weight times M rows of x; out[a][r] times the row's factor is the result.
template <class A, int M, int R>
static void gemv_rows(const Weight<typename A::D>& w, int64_t n, const float* const (&scale)[R], const Prepared& x,
                      float (&out)[M][R]) {
  typedef typename A::D D;
  typedef typename A::V V;
  constexpr int64_t B = 4 * W;  // bytes of a chunk
  const F unit = splat(A::kUnit);
  const uint8_t* at[R];
  UNROLL for (int r = 0; r < R; r++) at[r] = w.row(n + r);
  uint8_t tail[R][kGroup];
  F total[M][R] = {};
  Watch<typename A::Watched> watch;
  const float* xc = x.x;
  int64_t index = 0, left = w.span;
  for (int64_t c0 = 0; c0 < w.chunks; c0 += w.stretch) {
    const int64_t count = least(w.stretch, w.chunks - c0);
    if (c0 + count > w.full_chunks)  // the ragged end of the rows, with zeros behind it
      UNROLL for (int r = 0; r < R; r++) {
        memset(tail[r], 0, kGroup);
        memcpy(tail[r], at[r], w.row_bytes - c0 * B);
        at[r] = tail[r];
      }
    const int64_t ahead = w.ahead(c0 * B) - c0 * B;
    typename A::Sum sum[M][R];
    UNROLL for (int a = 0; a < M; a++) UNROLL for (int r = 0; r < R; r++) sum[a][r] = typename A::Sum{};
#pragma GCC unroll 1
    for (int64_t c = 0; c < count; c++, xc += A::kVectors * W) {
      V b[R][A::kVectors];
      UNROLL for (int r = 0; r < R; r++) {
        if (B >= 64 || c % 2 == 0) prefetch(at[r] + ahead);
        const I v = load<I>(at[r]);
        at[r] += B;
        watch.see(v);
        A::decode(v, b[r]);
        if (kManyRegisters) continue;  // else each row's decoded weights are used at once
        UNROLL for (int a = 0; a < M; a++)
          UNROLL for (int j = 0; j < A::kVectors; j++)
            sum[a][r] = A::add(sum[a][r], b[r][j], load<V>(xc + a * x.stride + j * W));
      }
      if (!kManyRegisters) continue;
      UNROLL for (int j = 0; j < A::kVectors; j++)
        UNROLL for (int a = 0; a < M; a++) {  // a vector of x is loaded once for all rows
          V xv = load<V>(xc + a * x.stride + j * W);
          IN_REGISTER(xv);
          UNROLL for (int r = 0; r < R; r++) sum[a][r] = A::add(sum[a][r], b[r][j], xv);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
      const F s = w.scales(scale[r] + index);
      UNROLL for (int a = 0; a < M; a++) {
        const F group = A::kPairs ? splat(x.scale[a * x.groups + c0 * kChunk<D> / kGroup]) : unit;
        total[a][r] += A::value(sum[a][r]) * group * s;
      }
    }
    if ((left -= w.stretch) <= 0) index += w.step, left = w.span;
  }
  UNROLL for (int a = 0; a < M; a++) {
    if constexpr (R == 4) store(out[a], sum4(total[a][0], total[a][1], total[a][2], total[a][3]));
    else UNROLL for (int r = 0; r < R; r++) out[a][r] = BLOCKSCALE_ISA::sum(total[a][r]);
  }
  if constexpr (!A::kPairs) {
    if (!watch.special()) return;
    static thread_local Scratch memory;  // NaN or infinity among the weights: once more, the slow way
    const int64_t count = w.chunks * kChunk<D>;
    float* dense = memory.get<float>(count);
    for (int r = 0; r < R; r++) {
      dequantize_row(w, w.row(n + r), scale[r], 0, w.chunks, dense);
      for (int a = 0; a < M; a++) {
        F t = F{};
        for (int64_t i = 0; i < count; i += W) t += load<F>(dense + i) * load<F>(x.x + a * x.stride + i);
        out[a][r] = BLOCKSCALE_ISA::sum(t) * bits<float>((127 - kHeadroom) << 23);
      }
    }
  }
}

template <class A, int M>
static void gemv(const LinearSpec& spec, const LinearCall& call) {
  typedef typename A::D D;
  constexpr int R = M > 2 || D::E == 8 ? 2 : 4;
  Weight<D> w(spec, call);
  w.rows_at_once = R;
  const Prepared x = prepare<A>(spec, call, kHeadroom);
  const int64_t group = 32;
  parallel_for((w.n + group - 1) / group, (double)M * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch memory;
    ScaleRows<D> scales(w, memory.get<float>(ScaleRows<D>::floats(w)));
    float y[M][64];
    const int64_t n0 = task * group, n1 = least(w.n, n0 + group);
    auto put = [&](int a, int64_t n, float value) { y[a][n - n0] = A::kPairs ? value : value * x.factor[a]; };
    int64_t n = n0;
    for (; n + R <= n1; n += R) {
      const float* scale[R];
      for (int r = 0; r < R; r++) scale[r] = scales.of(n + r);
      float out[M][R];
      gemv_rows<A, M, R>(w, n, scale, x, out);
      for (int a = 0; a < M; a++) for (int r = 0; r < R; r++) put(a, n + r, out[a][r]);
    }
    for (; n < n1; n++) {
      const float* scale[1] = {scales.of(n)};
      float out[M][1];
      gemv_rows<A, M, 1>(w, n, scale, x, out);
      for (int a = 0; a < M; a++) put(a, n, out[a][0]);
    }
    finish(spec, call, 0, M, n0, n1 - n0, &y[0][0], 64);
  });
}

template <class A>
static void gemv_of(const LinearSpec& spec, const LinearCall& call) {
  switch (call.m) {
    case 1: return gemv<A, 1>(spec, call);
    case 2: return gemv<A, 2>(spec, call);
    case 3: return gemv<A, 3>(spec, call);
    default: return gemv<A, 4>(spec, call);
  }
}

}  // namespace BLOCKSCALE_ISA
