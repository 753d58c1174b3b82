// More rows of x: a few rows of the weight are dequantized into the cache, then a matmul micro-kernel uses them for
// every row of x. The columns of K lie along the vectors, so a tile's sums are added up across lanes at its end.
#pragma once
#include "prepare.h"
#include "weight.h"

namespace BLOCKSCALE_ISA {

// Rows of x that the next tile takes of those left: equal shares, since a tile of one row wastes most of its loads.
INLINE int64_t share(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// How a matmul is cut. Small M: kTileN rows of the weight in L1 at a time. Large M: 64 in L2, against blocks of x.
struct Cut {
  int64_t tile_n, tile_m, blocks_m, tiles_n;
  Cut(int64_t m, int64_t n) {
    tile_n = m <= 64 ? kTileN : 64;
    tile_m = m <= 64 ? m : 252;
    blocks_m = (m + tile_m - 1) / tile_m, tiles_n = (n + tile_n - 1) / tile_n;
  }
  int64_t tasks() const { return blocks_m * tiles_n; }
};

// c[MR, 4] += a[MR, k] @ b[4, k].T
template <int MR>
NOINLINE static void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k) {
  F sum[MR][kTileN];
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < kTileN; j++) sum[i][j] = F{};
  for (int64_t p = 0; p < k; p += W) {
    F x[MR];
    UNROLL for (int i = 0; i < MR; i++) {
      x[i] = load<F>(a + i * lda + p);
      IN_REGISTER(x[i]);
    }
    UNROLL for (int j = 0; j < kTileN; j++) {
      F y = load<F>(b + j * ldb + p);
      IN_REGISTER(y);
      UNROLL for (int i = 0; i < MR; i++) sum[i][j] += x[i] * y;
    }
  }
  UNROLL for (int i = 0; i < MR; i++)
    store(c + i * ldc, load<F4>(c + i * ldc) + sum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// All rows of x times `cols` (a multiple of 4) dequantized rows.
static void multiply_panel(const float* x, int64_t ldx, int64_t rows, const float* b, int64_t ldb, int64_t cols,
                           float* c, int64_t ldc, int64_t k) {
  constexpr int kTileM = kManyRegisters ? 6 : 3;  // accumulators; the operands need kTileM + 1 registers more
  for (int64_t m = 0, take; m < rows; m += take) {
    take = share(rows - m, kTileM);
    for (int64_t j = 0; j < cols; j += kTileN) {
      const float *xm = x + m * ldx, *bj = b + j * ldb;
      float* cj = c + m * ldc + j;
      if constexpr (kTileM == 6) {
        if (take == 6) multiply<6>(xm, ldx, bj, ldb, cj, ldc, k);
        else if (take == 5) multiply<5>(xm, ldx, bj, ldb, cj, ldc, k);
        else if (take == 4) multiply<4>(xm, ldx, bj, ldb, cj, ldc, k);
      }
      if (take == 3) multiply<3>(xm, ldx, bj, ldb, cj, ldc, k);
      else if (take == 2) multiply<2>(xm, ldx, bj, ldb, cj, ldc, k);
      else if (take == 1) multiply<1>(xm, ldx, bj, ldb, cj, ldc, k);
    }
  }
}

template <class D>
static void gemm(const LinearSpec& spec, const LinearCall& call) {
  Weight<D> w(spec, call);
  const Prepared x = prepare<Single<D>>(spec, call, 0);
  const Cut cut(call.m, w.n);
  w.rows_at_once = cut.tile_n;
  const int64_t panel = 1024 / kChunk<D>;  // chunks of K at a time
  const int64_t ldb = panel * kChunk<D> + 16;
  parallel_for(cut.tasks(), (double)call.m * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch scale_memory, tile_memory, sum_memory;
    ScaleRows<Weight<D>> scales(w, w.block_rows, scale_memory);
    float* b = tile_memory.get<float>(cut.tile_n * ldb);
    float* c = sum_memory.get<float>(cut.tile_m * cut.tile_n);
    const int64_t n0 = task % cut.tiles_n * cut.tile_n, n1 = least(w.n, n0 + cut.tile_n);
    const int64_t cols = round_up(n1 - n0, kTileN);
    const int64_t m0 = task / cut.tiles_n * cut.tile_m, rows = least(call.m - m0, cut.tile_m);
    memset(c, 0, rows * cut.tile_n * 4);
    memset(b + (n1 - n0) * ldb, 0, (cols - (n1 - n0)) * ldb * 4);
    for (int64_t c0 = 0; c0 < w.chunks; c0 += panel) {
      const int64_t c1 = least(w.chunks, c0 + panel), k = (c1 - c0) * kChunk<D>;
      for (int64_t n = n0; n < n1; n++)
        dequantize_row(w, w.row(n), scales.of(n), c0, c1, b + (n - n0) * ldb);
      multiply_panel(x.x + m0 * x.stride + c0 * kChunk<D>, x.stride, rows, b, ldb, cols, c, cut.tile_n, k);
    }
    finish(spec, call, x, m0, rows, n0, n1 - n0, c, cut.tile_n);
  });
}

}  // namespace BLOCKSCALE_ISA
