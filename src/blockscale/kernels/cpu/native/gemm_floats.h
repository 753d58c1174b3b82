// The matmul of gemm.h in fp32: the weight's rows are dequantized, so that nothing is left to scale.
#pragma once
#include "arithmetic.h"
#include "gemm.h"

namespace BLOCKSCALE_ISA {

// c[MR, 4] += a[MR, k] @ b[4, k].T
template <int MR>
NOINLINE static void multiply(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t k) {
  constexpr int64_t ldb = kStride<1>;
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

template <class Element>
struct Floats {
  typedef Element D;
  typedef Single<D> A;
  static constexpr int kColumns = 1;  // of K in 32 bits

  static void decode(const Weight<D>& w, const uint8_t* row, const float* scale, int64_t c0, int64_t c1,
                     const Decoded& tile, int64_t i) {
    dequantize_row(w, row, scale, c0, c1, tile.b + i * kStride<1>);
  }
  static void decode_nothing(const Decoded& tile, int64_t i) {
    memset(tile.b + i * kStride<1>, 0, kStride<1> * 4);
  }

  // c[rows, cols] += rows m0 ... of x times `cols` decoded rows, over chunks [c0, c1) of K
  static void multiply(const Prepared& x, int64_t m0, int64_t rows, int64_t c0, int64_t c1, const Decoded& tile,
                       int64_t cols, float* c, int64_t ldc) {
    constexpr int kTileM = kManyRegisters ? 6 : 3;  // accumulators; the operands need kTileM + 1 registers more
    const int64_t k = (c1 - c0) * kChunk<D>;
    const float* a = x.x + m0 * x.stride + c0 * kChunk<D>;
    for (int64_t m = 0, take; m < rows; m += take) {
      take = share(rows - m, kTileM);
      for (int64_t j = 0; j < cols; j += kTileN) {
        auto rows_of_x = [&](auto multiply) {
          multiply(a + m * x.stride, x.stride, tile.b + j * kStride<1>, c + m * ldc + j, ldc, k);
        };
        if constexpr (kTileM == 6) {
          if (take == 6) rows_of_x(BLOCKSCALE_ISA::multiply<6>);
          else if (take == 5) rows_of_x(BLOCKSCALE_ISA::multiply<5>);
          else if (take == 4) rows_of_x(BLOCKSCALE_ISA::multiply<4>);
        }
        if (take == 3) rows_of_x(BLOCKSCALE_ISA::multiply<3>);
        else if (take == 2) rows_of_x(BLOCKSCALE_ISA::multiply<2>);
        else if (take == 1) rows_of_x(BLOCKSCALE_ISA::multiply<1>);
      }
    }
  }
};

}  // namespace BLOCKSCALE_ISA
