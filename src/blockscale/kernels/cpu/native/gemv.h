// At most kGemvRows rows of x: the weights are decoded in registers and used at once. Memory is the limit, then decoding.
#pragma once
#include "prepare.h"
#include "weight.h"

namespace BLOCKSCALE_ISA {

constexpr int kGemvRows = 4;

// How a weight comes from memory. Processors read ahead best what is a single stream, but then x must
// stay in L1 beside it. Rows side by side share the loads of x, yet are a stream each.
enum Stream {
  kOneRow,   // one row after the other, which the processor reads ahead by itself
  kFewRows,  // short rows side by side; the next ones come into L1 in the order of memory, as one stream
  kFarRows,  // rows side by side, each on its way into L2
};
template <int M, int R>
INLINE Stream stream_of(int64_t row_bytes, int64_t k) {
  constexpr int64_t kL1 = 32 << 10;
  const int64_t x_bytes = 4 * k, two_groups = 2 * R * row_bytes;
  if (x_bytes + two_groups <= kL1 * 5 / 8) return kFewRows;
  return M == 1 && x_bytes <= kL1 / 2 ? kOneRow : kFarRows;
}

// Rows of the weight in flight for M rows of x: more share the loads of x, fewer leave registers for the sums.
template <int M>
constexpr int rows_at_once() { return !kManyRegisters ? 4 : M == 1 ? 8 : M == 2 ? 4 : 2; }

// What the sum over each stretch of kGroup columns must be multiplied by: the weight's scale and, for pairs, that of x.
// A source for ScaleRows: [M, stretches] for each grid row, and the weight's own scales behind them.
template <class A, int M>
struct Multipliers {
  const Weight<typename A::D>& w;
  const Prepared& x;
  const int64_t stretches = (w.k + kGroup - 1) / kGroup;
  int64_t floats() const { return M * stretches + w.floats(); }
  void read_scales(int64_t g, float* to) const {
    float* own = to + M * stretches;
    w.read_scales(g, own);
    const int64_t each = w.block_cols / kGroup;  // stretches that share a scale
    for (int a = 0; a < M; a++, to += stretches)
      for (int64_t s = 0, c = 0; s < stretches; c++)
        for (const int64_t end = least(stretches, s + each); s < end; s++)
          to[s] = A::kPairs ? own[c] * x.scale[a * x.groups + s] : own[c];
  }
};

// What gemv_rows below computes, the slow way: NaN or infinity is among the weights.
template <class A, int M, int R, int S>
NOINLINE static void gemv_special(const Weight<typename A::D>& w, int64_t n, const float* const (&scale)[R],
                                  const Prepared& x, float (&out)[M][R]) {
  static thread_local Scratch memory;
  const int64_t count = w.chunks * kChunk<typename A::D>;
  float* dense = memory.get<float>(count);
  const F down = splat(power_of_two(-A::D::kUnit));
  for (int r = 0; r < R; r++) {
    const float* own = S > 1 ? scale[r] + M * ((w.k + kGroup - 1) / kGroup) : scale[r];  // see Multipliers
    dequantize_row(w, w.row(n + r), own, 0, w.chunks, dense);
    for (int a = 0; a < M; a++) {
      F t = F{};
      for (int64_t i = 0; i < count; i += W) t += load<F>(dense + i) * (load<F>(x.x + a * x.stride + i) * down);
      out[a][r] = sum(t);
    }
  }
}

// Adds to total[a][r], lane by lane, R rows of the weight times M rows of x. S chunks at a time are summed and then
// scaled: by scale[r][a, stretch] of Multipliers or, where blocks are narrower (S is 1), lane by lane.
template <class A, int M, int R, int S, Stream kStream>
INLINE void accumulate(const Weight<typename A::D>& w, const uint8_t* const* row, const float* const* scale,
                       const Prepared& x, F (&total)[M][R], Watch<typename A::Watched>& watch) {
  typedef typename A::V V;
  typedef typename A::Sum Sum;
  constexpr int64_t B = 4 * W, kStretch = S * B;  // bytes of a chunk and of those that are summed
  constexpr bool kHold = kManyRegisters && M * A::kVectors <= 4;  // x in registers, while R rows pass by
  constexpr int kChains = M * R == 1 ? A::kVectors : 1;  // of sums side by side: an addition waits for its chain's last
  const int64_t stretches = (w.chunks + S - 1) / S, full = w.full_chunks / S;
  const float* xc = x.x;
  for (int64_t g = 0; g < stretches; g++) {
    Sum sum[M][R][kChains] = {};
    auto chunk = [&](auto read) __attribute__((always_inline)) {
      V held[M][A::kVectors];
      if (kHold)
        UNROLL for (int a = 0; a < M; a++)
          UNROLL for (int j = 0; j < A::kVectors; j++) {
            held[a][j] = load<V>(xc + a * x.stride + j * W);
            IN_REGISTER(held[a][j]);
          }
      UNROLL for (int r = 0; r < R; r++) {
        const I v = read(r);
        watch.see(v);
        V b[A::kVectors];
        A::decode(v, b);
        const float* xr = xc;
        if (M == 2 && !kManyRegisters) LOAD_AGAIN(xr);  // three rows and more spill anyway
        UNROLL for (int a = 0; a < M; a++)
          UNROLL for (int j = 0; j < A::kVectors; j++) {
            Sum& s = sum[a][r][j % kChains];
            s = A::add(s, b[j], kHold ? held[a][j] : load<V>(xr + a * x.stride + j * W));
          }
      }
      xc += A::kVectors * W;
    };
    const int64_t at = g * kStretch;
    if (g < full) {
      const int64_t ahead = w.ahead(at);
      const uint8_t* next = row[0] + R * (w.row_bytes + at);
      UNROLL for (int c = 0; c < S; c++)
        chunk([&](int r) __attribute__((always_inline)) {
          const bool line = c * B % 64 == 0 && (S > 1 || B >= 64 || g % (64 / B) == 0);
          if (kStream == kFarRows && line) prefetch(row[r] + ahead + c * B);
          if (kStream == kFewRows && line) prefetch_near(next + R * c * B + 64 * r);
          return load<I>(row[r] + at + c * B);
        });
    } else {  // the ragged end of the rows
      for (int64_t c = g * S; c < w.chunks; c++)
        chunk([&](int r) __attribute__((always_inline)) { return load_part(row[r] + c * B, w.row_bytes - c * B); });
    }
    UNROLL for (int r = 0; r < R; r++) {
      const F lanes = S > 1 ? F{} : w.scales(scale[r] + g / w.span * w.step);
      UNROLL for (int a = 0; a < M; a++) {
        Sum all = sum[a][r][0];
        UNROLL for (int i = 1; i < kChains; i++) all += sum[a][r][i];
        total[a][r] += A::value(all) * (S > 1 ? splat(scale[r][a * stretches + g]) : lanes);
      }
    }
  }
}

// R rows of the weight times M rows of x; out[a][r] times the row's factor (prepare.h) is the result.
template <class A, int M, int R, int S>
static void gemv_rows(const Weight<typename A::D>& w, int64_t n, const float* const (&scale)[R], const Prepared& x,
                      float (&out)[M][R]) {
  const uint8_t* row[R];
  UNROLL for (int r = 0; r < R; r++) row[r] = w.row(n + r);
  F total[M][R] = {};
  Watch<typename A::Watched> watch;
  if constexpr (kManyRegisters || R == 1) {
    accumulate<A, M, R, S, R == 1 ? kOneRow : kFarRows>(w, row, scale, x, total, watch);
  } else if (const Stream stream = stream_of<M, R>(w.row_bytes, w.k); M == 1 && stream == kOneRow) {
    for (int r = 0; r < R; r++) {
      F one[M][1] = {};
      accumulate<A, M, 1, S, kOneRow>(w, row + r, scale + r, x, one, watch);
      total[0][r] = one[0][0];
    }
  } else if (stream == kFewRows) {
    accumulate<A, M, R, S, kFewRows>(w, row, scale, x, total, watch);
  } else {
    accumulate<A, M, R, S, kFarRows>(w, row, scale, x, total, watch);
  }
  UNROLL for (int a = 0; a < M; a++)
    UNROLL for (int r = 0; r < R; r += 4) {
      if constexpr (R % 4 == 0) store(out[a] + r, sum4(total[a][r], total[a][r + 1], total[a][r + 2], total[a][r + 3]));
      else UNROLL for (int i = r; i < R; i++) out[a][i] = BLOCKSCALE_ISA::sum(total[a][i]);
    }
  if constexpr (!A::kPairs)
    if (watch.special()) gemv_special<A, M, R, S>(w, n, scale, x, out);
}

template <class A, int M, int S, class Source>
static void gemv(const LinearSpec& spec, const LinearCall& call, const Weight<typename A::D>& w, const Prepared& x,
                 const Source& source) {
  constexpr int R = rows_at_once<M>();
  const int64_t group = 32;
  parallel_for((w.n + group - 1) / group, (double)M * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch memory;
    ScaleRows<Source> scales(source, w.block_rows, memory);
    float y[M][group];
    const int64_t n0 = task * group, n1 = least(w.n, n0 + group);
    auto rows = [&](int64_t n, auto count) {
      constexpr int N = decltype(count)::value;
      const float* scale[N];
      for (int r = 0; r < N; r++) scale[r] = scales.of(n + r);
      float out[M][N];
      gemv_rows<A, M, N, S>(w, n, scale, x, out);
      for (int a = 0; a < M; a++)
        for (int r = 0; r < N; r++) y[a][n - n0 + r] = out[a][r];
    };
    int64_t n = n0;
    for (; n + R <= n1; n += R) rows(n, Count<R>());
    for (; n < n1; n++) rows(n, Count<1>());
    finish(spec, call, x, 0, M, n0, n1 - n0, &y[0][0], group);
  });
}

template <class A, int M>
static void gemv_rows_of_x(const LinearSpec& spec, const LinearCall& call) {
  constexpr int S = kGroup / kChunk<typename A::D>;
  Weight<typename A::D> w(spec, call);
  w.rows_at_once = rows_at_once<M>();
  const Prepared x = prepare<A>(spec, call, A::kPairs ? 0 : A::D::kUnit);
  if constexpr (S > 1)
    if (w.block_cols % kGroup == 0) return gemv<A, M, S>(spec, call, w, x, Multipliers<A, M>{w, x});
  if constexpr (!A::kPairs) gemv<A, M, 1>(spec, call, w, x, w);
}

template <class A>
static void gemv_of(const LinearSpec& spec, const LinearCall& call) {
  switch (call.m) {
    case 1: return gemv_rows_of_x<A, 1>(spec, call);
    case 2: return gemv_rows_of_x<A, 2>(spec, call);
    case 3: return gemv_rows_of_x<typename A::Crowded, 3>(spec, call);
    default: return gemv_rows_of_x<typename A::Crowded, 4>(spec, call);
  }
}

}  // namespace BLOCKSCALE_ISA
