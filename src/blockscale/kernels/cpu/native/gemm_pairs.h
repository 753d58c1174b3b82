// The matmul of gemm.h on 16-bit pairs: half the bytes in the cache and twice the products in an instruction. What lies
// in the cache are codes without scales; the sums over kGroup columns are scaled.
#pragma once
#include "gemm.h"

namespace BLOCKSCALE_ISA {

// Chunks [c0, c1) of a row as pairs, and the scale of each group of columns: NaN where the pairs cannot hold a weight.
template <class A>
static void decode_row(const Weight<typename A::D>& w, const uint8_t* row, const float* scale, int64_t c0, int64_t c1,
                       float* to, float* group_scale) {
  constexpr int64_t C = kChunk<typename A::D>, B = 4 * W, G = kGroup / C;
  for (int64_t c = c0; c < c1; group_scale++) {
    Watch<typename A::Watched> watch;
    *group_scale = scale[c / w.span];
    for (const int64_t end = least(c1, c + G); c < end; c++, to += 2 * W) {
      prefetch(row + w.ahead(c * B));
      const I v = load_part(row + c * B, w.row_bytes - c * B);
      watch.see(v);
      I b[2];
      A::decode(v, b);
      store(to, b[0]), store(to + W, b[1]);
    }
    if (watch.special()) *group_scale = bits<float>(0x7FC00000u);
  }
  for (int64_t c = c1; c % G; c++, to += 2 * W) store(to, F{}), store(to + W, F{});  // to a whole group
}

// c[MR, 4] += sums over groups of a[MR, k] @ b[4, k].T, each times its scales. shared: the rows of b have the same ones.
template <class A, int MR>
NOINLINE static void multiply_pairs(const float* a, int64_t lda, const float* a_scale, int64_t lda_scale, const float* b,
                           int64_t ldb, const float* b_scale, int64_t ldb_scale, float* c, int64_t ldc, int64_t groups,
                           bool shared) {
  constexpr int kSteps = kGroup / (2 * W);
  F total[MR][kTileN];
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < kTileN; j++) total[i][j] = F{};
  for (int64_t g = 0; g < groups; g++, a += kSteps * W, b += kSteps * W) {
    typename A::Sum sum[MR][kTileN];
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < kTileN; j++) sum[i][j] = typename A::Sum{};
    UNROLL for (int p = 0; p < kSteps; p++) {
      I x[MR];
      UNROLL for (int i = 0; i < MR; i++) {
        x[i] = load<I>(a + i * lda + p * W);
        IN_REGISTER(x[i]);
      }
      UNROLL for (int j = 0; j < kTileN; j++) {
        I y = load<I>(b + j * ldb + p * W);
        IN_REGISTER(y);
        UNROLL for (int i = 0; i < MR; i++) {
          sum[i][j] = A::add(sum[i][j], y, x[i]);
          IN_REGISTER(sum[i][j]);  // GCC would collect integer products first and run out of registers
        }
      }
    }
    if (shared) {
      const F s = splat(b_scale[g]);
      UNROLL for (int i = 0; i < MR; i++) {
        const F both = s * splat(a_scale[i * lda_scale + g]);
        UNROLL for (int j = 0; j < kTileN; j++) total[i][j] += A::value(sum[i][j]) * both;
      }
    } else {
      UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int j = 0; j < kTileN; j++)
          total[i][j] += A::value(sum[i][j]) * splat(a_scale[i * lda_scale + g] * b_scale[j * ldb_scale + g]);
    }
  }
  UNROLL for (int i = 0; i < MR; i++)
    store(c + i * ldc, load<F4>(c + i * ldc) + sum4(total[i][0], total[i][1], total[i][2], total[i][3]));
}

// Whether the scales of kTileN rows are the same.
INLINE bool same_rows(const float* scale, int64_t stride, int64_t count) {
  for (int j = 1; j < kTileN; j++)
    if (memcmp(scale, scale + j * stride, count * 4)) return false;
  return true;
}

template <class A>
static void gemm_pairs(const LinearSpec& spec, const LinearCall& call) {
  typedef typename A::D D;
  constexpr int kTileM = kManyRegisters ? 3 : 2;  // sums and totals; operands and products need kTileM + 2 more
  Weight<D> w(spec, call);
  const Prepared x = prepare<A>(spec, call, 0);
  const Cut cut(call.m, w.n);
  w.rows_at_once = cut.tile_n;
  const int64_t panel = 1024 / kChunk<D>, panel_groups = 1024 / kGroup;  // chunks and groups of K at a time
  const int64_t ldb = 1024 / 2 + 16;
  parallel_for(cut.tasks(), (double)call.m * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch scale_memory, tile_memory, sum_memory;
    ScaleRows<Weight<D>> scales(w, w.block_rows, scale_memory);
    float* b = tile_memory.get<float>(cut.tile_n * (ldb + panel_groups));
    float* b_scale = b + cut.tile_n * ldb;
    float* c = sum_memory.get<float>(cut.tile_m * cut.tile_n);
    const int64_t n0 = task % cut.tiles_n * cut.tile_n, n1 = least(w.n, n0 + cut.tile_n);
    const int64_t cols = round_up(n1 - n0, kTileN);
    const int64_t m0 = task / cut.tiles_n * cut.tile_m, rows = least(call.m - m0, cut.tile_m);
    memset(c, 0, rows * cut.tile_n * 4);
    memset(b + (n1 - n0) * ldb, 0, (cols - (n1 - n0)) * ldb * 4);
    memset(b_scale + (n1 - n0) * panel_groups, 0, (cols - (n1 - n0)) * panel_groups * 4);
    for (int64_t c0 = 0; c0 < w.chunks; c0 += panel) {
      const int64_t c1 = least(w.chunks, c0 + panel), g0 = c0 * kChunk<D> / kGroup;
      const int64_t groups = ((c1 - c0) * kChunk<D> + kGroup - 1) / kGroup;
      for (int64_t n = n0; n < n1; n++)
        decode_row<A>(w, w.row(n), scales.of(n), c0, c1, b + (n - n0) * ldb, b_scale + (n - n0) * panel_groups);
      const float *xp = x.x + m0 * x.stride + c0 * kChunk<D> / 2, *xs = x.scale + m0 * x.groups + g0;
      // A few rows of x stay in L1 while those of the weight pass by, from L2.
      for (int64_t block = 0, height; block < rows; block += height) {
        height = share(rows - block, 3 * kTileM);
        for (int64_t j = 0; j < cols; j += kTileN) {
          const float *bj = b + j * ldb, *bs = b_scale + j * panel_groups;
          const bool shared = same_rows(bs, panel_groups, groups);
          for (int64_t m = block, take; m < block + height; m += take) {
            take = share(block + height - m, kTileM);
            auto tile = [&](auto multiply) {
              multiply(xp + m * x.stride, x.stride, xs + m * x.groups, x.groups, bj, ldb, bs, panel_groups,
                       c + m * cut.tile_n + j, cut.tile_n, groups, shared);
            };
            if (take == kTileM) tile(multiply_pairs<A, kTileM>);
            else if (take == 2) tile(multiply_pairs<A, 2>);
            else tile(multiply_pairs<A, 1>);
          }
        }
      }
    }
    finish(spec, call, x, m0, rows, n0, n1 - n0, c, cut.tile_n);
  });
}

// Whether x and the weight have scales that fit groups of kGroup columns.
INLINE bool in_groups(const LinearSpec& spec) {
  return spec.block_cols % kGroup == 0 && (!spec.activation.enabled || spec.activation.group % kGroup == 0);
}

}  // namespace BLOCKSCALE_ISA
