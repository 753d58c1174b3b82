// The matmul of gemm.h on 16-bit pairs: half the bytes in the cache and twice the products in an instruction. What lies
// in the cache are codes without scales; the sums over kGroup columns are scaled.
#pragma once
#include "gemm.h"

namespace BLOCKSCALE_ISA {

// c[MR, 4] += sums over groups of a[MR, k] @ b[4, k].T, each times its scales. shared: the rows of b have the same ones.
// half: the second half of the last group is nothing but zeros.
template <class A, int MR>
NOINLINE static void multiply_pairs(const float* a, int64_t lda, const float* a_scale, int64_t lda_scale,
                                    const float* b, const float* b_scale, float* c, int64_t ldc, int64_t groups,
                                    bool shared, bool half) {
  constexpr int64_t ldb = kStride<2>;
  F total[MR][kTileN];
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < kTileN; j++) total[i][j] = F{};
  auto group = [&](int64_t g, auto steps) __attribute__((always_inline)) {
    constexpr int kSteps = decltype(steps)::value;
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
          total[i][j] += A::value(sum[i][j]) * splat(a_scale[i * lda_scale + g] * b_scale[j * kPanelGroups + g]);
    }
    a += kSteps * W, b += kSteps * W;
  };
  constexpr int kSteps = kGroup / (2 * W);
  const int64_t whole = groups - half;
  for (int64_t g = 0; g < whole; g++) group(g, Count<kSteps>());
  if (half) group(whole, Count<kSteps / 2>());
  UNROLL for (int i = 0; i < MR; i++)
    store(c + i * ldc, load<F4>(c + i * ldc) + sum4(total[i][0], total[i][1], total[i][2], total[i][3]));
}

// Whether the scales of kTileN rows are the same.
INLINE bool same_rows(const float* scale, int64_t stride, int64_t count) {
  for (int j = 1; j < kTileN; j++)
    if (memcmp(scale, scale + j * stride, count * 4)) return false;
  return true;
}

template <class Arithmetic>
struct Pairs {
  typedef Arithmetic A;
  typedef typename A::D D;
  static constexpr int kColumns = 2;  // of K in 32 bits

  // Chunks [c0, c1) of a row, and the scale of each group of columns: NaN where the pairs cannot hold a weight.
  static void decode(const Weight<D>& w, const uint8_t* row, const float* scale, int64_t c0, int64_t c1,
                     const Decoded& tile, int64_t i) {
    constexpr int64_t C = kChunk<D>, B = 4 * W, G = kGroup / C;
    float *to = tile.b + i * kStride<2>, *group_scale = tile.scale + i * kPanelGroups;
    const auto chunk = [&](I v) __attribute__((always_inline)) {
      I b[2];
      A::decode(v, b);
      store(to, b[0]), store(to + W, b[1]);
      to += 2 * W;
    };
    for (int64_t c = c0; c < c1; group_scale++) {
      Watch<typename A::Watched> watch;
      *group_scale = scale[c / w.span];
      const int64_t ahead = w.ahead(c * B);
      for (int64_t line = 0; line < G * B; line += 64) prefetch(row + ahead + line);
      for (const int64_t end = least(c1, c + G); c < end; c++) {
        const I v = load_part(row + c * B, w.row_bytes - c * B);
        watch.see(v);
        chunk(v);
      }
      if (watch.special()) *group_scale = bits<float>(0x7FC00000u);
    }
    for (int64_t c = c1; c % G; c++) chunk(I{});  // to a whole group
  }
  static void decode_nothing(const Decoded& tile, int64_t i) {
    memset(tile.b + i * kStride<2>, 0, kStride<2> * 4);
    memset(tile.scale + i * kPanelGroups, 0, kPanelGroups * 4);
  }

  // c[rows, cols] += rows m0 ... of x times `cols` decoded rows, over chunks [c0, c1) of K
  static void multiply(const Prepared& x, int64_t m0, int64_t rows, int64_t c0, int64_t c1, const Decoded& tile,
                       int64_t cols, float* c, int64_t ldc) {
    constexpr int kTileM = kManyRegisters ? 3 : 2;  // sums and totals; operands and products need kTileM + 2 more
    const int64_t k0 = c0 * kChunk<D>, groups = ((c1 - c0) * kChunk<D> + kGroup - 1) / kGroup;
    const bool half = groups * kGroup - (c1 - c0) * kChunk<D> >= kGroup / 2;
    const float *a = x.x + m0 * x.stride + k0 / 2, *a_scale = x.scale + m0 * x.groups + k0 / kGroup;
    // A few rows of x stay in L1 while those of the weight pass by, from L2.
    for (int64_t block = 0, height; block < rows; block += height) {
      height = share(rows - block, 3 * kTileM);
      for (int64_t j = 0; j < cols; j += kTileN) {
        const float *b = tile.b + j * kStride<2>, *b_scale = tile.scale + j * kPanelGroups;
        const bool shared = same_rows(b_scale, kPanelGroups, groups);
        for (int64_t m = block, take; m < block + height; m += take) {
          take = share(block + height - m, kTileM);
          auto rows_of_x = [&](auto multiply) {
            multiply(a + m * x.stride, x.stride, a_scale + m * x.groups, x.groups, b, b_scale,
                     c + m * ldc + j, ldc, groups, shared, half);
          };
          if (take == kTileM) rows_of_x(multiply_pairs<A, kTileM>);
          else if (take == 2) rows_of_x(multiply_pairs<A, 2>);
          else rows_of_x(multiply_pairs<A, 1>);
        }
      }
    }
  }
};

// Whether x and the weight have scales that fit groups of kGroup columns.
INLINE bool in_groups(const LinearSpec& spec) {
  return spec.block_cols % kGroup == 0 && (!spec.activation.enabled || spec.activation.group % kGroup == 0);
}

}  // namespace BLOCKSCALE_ISA
