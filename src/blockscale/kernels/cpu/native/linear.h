// y = x @ dequantized(w).T + bias on the stored bytes.
//
// Up to kGemvRows rows of x: the weights are decoded in registers and used at once (gemv_rows). Above: a few rows of the
// weight become fp32 in the cache (dequantize_row), then a matmul micro-kernel uses them for every row of x (multiply).
#pragma once
#include "prepare.h"

namespace BLOCKSCALE_ISA {

constexpr int kGemvRows = 4;
constexpr int kPrefetch = 1024;  // bytes ahead in a weight row

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 of them, else 16
#else
constexpr bool kManyRegisters = false;
#endif
constexpr int kTileN = 4, kTileM = kManyRegisters ? 6 : 3;  // accumulators of the matmul; the operands need kTileM + 1

#if defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#elif defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#endif
// Keeps a loaded vector in its register: GCC would load it again for every use.

// The weight and its scales.
template <class D>
struct Weight {
  const uint8_t* data;
  int64_t n, k, row_bytes, chunks, full_chunks;
  const void* scale;
  int32_t scale_type;
  float global;
  int64_t block_rows, block_cols, grid_cols;
  int64_t span;       // chunks that share scales
  int64_t step;       // scales that a span holds
  I lane_scale;       // scale of a span's lane

  Weight(const LinearSpec& spec, const LinearCall& call) {
    data = call.w, scale = call.scale, scale_type = call.scale_type;
    global = call.global_scale ? *call.global_scale : 1;
    n = spec.n, k = spec.k, row_bytes = bytes_of<D>(k);
    chunks = (k + kChunk<D> - 1) / kChunk<D>, full_chunks = k / kChunk<D>;
    block_rows = spec.block_rows ? spec.block_rows : n;
    grid_cols = spec.block_cols ? (k + spec.block_cols - 1) / spec.block_cols : 1;
    block_cols = grid_cols == 1 ? round_up(k, kChunk<D>) : spec.block_cols;
    span = block_cols > kChunk<D> ? block_cols / kChunk<D> : 1;
    step = block_cols > kChunk<D> ? 1 : kChunk<D> / block_cols;
    for (int i = 0; i < W; i++) lane_scale[i] = step > 1 ? (int32_t)(i * D::E / block_cols) : 0;
  }
  const uint8_t* row(int64_t i) const { return data + i * row_bytes; }
  int64_t padded_scales() const { return grid_cols + W; }
  // The scales of grid row g as fp32, W zeros behind them.
  void read_scales(int64_t g, float* to) const {
    read_floats(scale, scale_type, g * grid_cols, grid_cols, to);
    if (global != 1) for (int64_t i = 0; i < grid_cols; i++) to[i] *= global;
    memset(to + grid_cols, 0, W * 4);
  }
  F scales(const float* at) const { return __builtin_shuffle(load<F>(at), lane_scale); }
};

// Scales of neighbouring rows, read once for each grid row.
template <class D>
struct ScaleRows {
  const Weight<D>& w;
  float* memory;
  int64_t held[kTileN * 2];
  ScaleRows(const Weight<D>& weight, float* scratch) : w(weight), memory(scratch) {
    for (int64_t& g : held) g = -1;
  }
  static int64_t floats(const Weight<D>& w) { return w.padded_scales() * kTileN * 2; }
  const float* of(int64_t row, int slot) {
    const int64_t g = row / w.block_rows;
    if (w.block_rows > 1) slot = (int)(g % 2);
    float* to = memory + slot * w.padded_scales();
    if (held[slot] != g) w.read_scales(g, to), held[slot] = g;
    return to;
  }
};

// Chunks [c0, c1) of a row as fp32 with their scales, permuted; exact, NaN and infinity included.
template <class D>
static void dequantize_row(const Weight<D>& w, const uint8_t* row, const float* scale, int64_t c0, int64_t c1, float* to) {
  constexpr int64_t C = kChunk<D>, B = 4 * W;
  const F unit = splat(D::kUnit);
  I special = I{};
  float* out = to;
  int64_t index = c0 / w.span;
  for (int64_t c = c0; c < c1; index++) {
    const F s = w.scales(scale + index * w.step), both = s * unit;
    const int64_t end = least(c1, (index + 1) * w.span);
    const bool overflows = any((bits<I>(both) & 0x7F800000) == 0x7F800000);  // a scale above 2^7: two steps
    for (; c < end; c++, out += C) {
      const uint8_t* from = row + c * B;
      uint8_t tail[B];
      if (c >= w.full_chunks) {
        memset(tail, 0, B);
        memcpy(tail, from, w.row_bytes - c * B);
        from = tail;
      }
      __builtin_prefetch(row + c * B + kPrefetch);
      const I v = load<I>(from);
      special |= D::special(v);
      F b[D::E];
      D::decode(v, b);
      if (overflows) UNROLL for (int j = 0; j < D::E; j++) store(out + j * W, b[j] * unit * s);
      else UNROLL for (int j = 0; j < D::E; j++) store(out + j * W, b[j] * both);
    }
  }
  if (!D::kSpecial || !any(special & D::kSpecial)) return;
  for (int64_t c = c0; c < c1; c++, to += C) {
    const F s = w.scales(scale + c / w.span * w.step);
    for (int j = 0; j < D::E; j++)
      for (int i = 0; i < W; i++) {
        const int64_t k = c * C + D::E * i + j;
        to[j * W + i] = k < w.k ? D::one(row, k) * s[i] : 0;
      }
  }
}

// R rows of the weight times M rows of x: out[a][r] times the row's factor is the result.
template <class D, int M, int R>
static void gemv_rows(const Weight<D>& w, int64_t n, const float* const (&scale)[R], const Prepared& x, float (&out)[M][R]) {
  constexpr int64_t C = kChunk<D>, B = 4 * W;
  const F unit = splat(D::kUnit * bits<float>((127 - kHeadroom) << 23));
  const uint8_t* row[R];
  uint8_t tail[R][B] = {};
  for (int r = 0; r < R; r++) {
    row[r] = w.row(n + r);
    memcpy(tail[r], row[r] + w.full_chunks * B, w.row_bytes - w.full_chunks * B);
  }
  F total[M][R] = {};
  I special = I{};
  int64_t at = 0;
  for (int64_t c0 = 0; c0 < w.chunks; c0 += w.span, at += w.step) {
    F sum[M][R];
    UNROLL for (int a = 0; a < M; a++) UNROLL for (int r = 0; r < R; r++) sum[a][r] = F{};
    auto step = [&](const uint8_t* const (&from)[R], const float* xc) __attribute__((always_inline)) {
      if (kManyRegisters) {  // all rows decoded first, so that a vector of x is loaded once for all of them
        F b[R][D::E];
        UNROLL for (int r = 0; r < R; r++) {
          const I v = load<I>(from[r]);
          special |= D::special(v);
          D::decode(v, b[r]);
        }
        UNROLL for (int j = 0; j < D::E; j++) UNROLL for (int a = 0; a < M; a++) {
          F xv = load<F>(xc + a * x.stride + j * W);
          IN_REGISTER(xv);
          UNROLL for (int r = 0; r < R; r++) sum[a][r] += b[r][j] * xv;
        }
        return;
      }
      UNROLL for (int r = 0; r < R; r++) {
        const I v = load<I>(from[r]);
        special |= D::special(v);
        F b[D::E];
        D::decode(v, b);
        UNROLL for (int a = 0; a < M; a++)
          UNROLL for (int j = 0; j < D::E; j++) sum[a][r] += b[j] * load<F>(xc + a * x.stride + j * W);
      }
    };
    const int64_t c1 = least(w.full_chunks, c0 + w.span);
#pragma GCC unroll 1
    for (int64_t c = c0; c < c1; c++) {
      if (B >= 64 || c % 2 == 0) {  // a cache line ahead of each row; past the end of a row, into the next group's
        const int64_t ahead = c * B + kPrefetch;
        const uint8_t* line = row[0] + ahead + (ahead >= w.row_bytes ? (R - 1) * w.row_bytes : 0);
        UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(line + r * w.row_bytes);
      }
      const uint8_t* from[R];
      UNROLL for (int r = 0; r < R; r++) from[r] = row[r] + c * B;
      step(from, x.x + c * C);
    }
    if (c0 + w.span > w.full_chunks && w.full_chunks < w.chunks) {
      const uint8_t* from[R];
      for (int r = 0; r < R; r++) from[r] = tail[r];
      step(from, x.x + w.full_chunks * C);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const F s = w.scales(scale[r] + at);
      UNROLL for (int a = 0; a < M; a++) total[a][r] += sum[a][r] * unit * s;
    }
  }
  UNROLL for (int a = 0; a < M; a++) UNROLL for (int r = 0; r < R; r++) out[a][r] = BLOCKSCALE_ISA::sum(total[a][r]);
  if (D::kSpecial && any(special & D::kSpecial)) {  // NaN or infinity among the weights: once more, the slow way
    static thread_local Scratch memory;
    float* dense = memory.get<float>(w.chunks * C);
    for (int r = 0; r < R; r++) {
      dequantize_row(w, row[r], scale[r], 0, w.chunks, dense);
      for (int a = 0; a < M; a++) {
        F t = F{};
        for (int64_t i = 0; i < w.chunks * C; i += W) t += load<F>(dense + i) * load<F>(x.x + a * x.stride + i);
        out[a][r] = BLOCKSCALE_ISA::sum(t) * bits<float>((127 - kHeadroom) << 23);
      }
    }
  }
}

// Adds the bias and writes `rows` x `cols` results to y[m0 ..., n0 ...] in its type.
static void finish(const LinearSpec& spec, const LinearCall& call, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                   float* from, int64_t stride) {
  float bias[64];
  if (call.bias) read_floats(call.bias, call.bias_type, n0, cols, bias);
  for (int64_t a = 0; a < rows; a++, from += stride) {
    if (call.bias) for (int64_t i = 0; i < cols; i++) from[i] += bias[i];
    write_floats(from, cols, call.y, spec.y_type, (m0 + a) * spec.n + n0);
  }
}

template <class D, int M>
static void gemv(const LinearSpec& spec, const LinearCall& call) {
  constexpr int R = M > 2 || D::E == 8 ? 2 : 4;
  const Weight<D> w(spec, call);
  const Prepared x = prepare<D>(spec, call, true);
  const int64_t group = 32;
  parallel_for((w.n + group - 1) / group, (double)M * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch memory;
    ScaleRows<D> scales(w, memory.get<float>(ScaleRows<D>::floats(w)));
    float y[M][64];
    const int64_t n0 = task * group, n1 = least(w.n, n0 + group);
    int64_t n = n0;
    for (; n + R <= n1; n += R) {
      const float* scale[R];
      for (int r = 0; r < R; r++) scale[r] = scales.of(n + r, r);
      float out[M][R];
      gemv_rows<D, M, R>(w, n, scale, x, out);
      for (int a = 0; a < M; a++) for (int r = 0; r < R; r++) y[a][n - n0 + r] = out[a][r] * x.factor[a];
    }
    for (; n < n1; n++) {
      const float* scale[1] = {scales.of(n, 0)};
      float out[M][1];
      gemv_rows<D, M, 1>(w, n, scale, x, out);
      for (int a = 0; a < M; a++) y[a][n - n0] = out[a][0] * x.factor[a];
    }
    finish(spec, call, 0, M, n0, n1 - n0, &y[0][0], 64);
  });
}

// c[MR, 4] += a[MR, k] @ b[4, k].T
template <int MR>
static void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k) {
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
static void multiply_panel(const float* x, int64_t ldx, int64_t rows, const float* b, int64_t ldb, int64_t cols, float* c,
                           int64_t ldc, int64_t k) {
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    const int take = left >= kTileM ? kTileM : left >= 3 ? 3 : left >= 2 ? 2 : 1;
    for (int64_t j = 0; j < cols; j += kTileN) {
      const float *xm = x + m * ldx, *bj = b + j * ldb;
      float* cj = c + m * ldc + j;
      if (take == kTileM) multiply<kTileM>(xm, ldx, bj, ldb, cj, ldc, k);
      else if (take == 3) multiply<3>(xm, ldx, bj, ldb, cj, ldc, k);
      else if (take == 2) multiply<2>(xm, ldx, bj, ldb, cj, ldc, k);
      else multiply<1>(xm, ldx, bj, ldb, cj, ldc, k);
    }
    m += take;
  }
}

template <class D>
static void gemm(const LinearSpec& spec, const LinearCall& call) {
  const Weight<D> w(spec, call);
  const Prepared x = prepare<D>(spec, call, false);
  // Small M: four rows of the weight in L1 at a time. Large M: 64 of them in L2, against blocks of x.
  const int64_t tile_n = call.m <= 64 ? kTileN : 64;
  const int64_t tile_m = call.m <= 64 ? call.m : 252;
  const int64_t panel = 1024 / kChunk<D>;  // chunks of K at a time
  const int64_t ldb = panel * kChunk<D> + 16;
  const int64_t blocks_m = (call.m + tile_m - 1) / tile_m, tiles_n = (w.n + tile_n - 1) / tile_n;
  parallel_for(blocks_m * tiles_n, (double)call.m * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch scale_memory, tile_memory, sum_memory;
    ScaleRows<D> scales(w, scale_memory.get<float>(ScaleRows<D>::floats(w)));
    float* b = tile_memory.get<float>(tile_n * ldb);
    float* c = sum_memory.get<float>(tile_m * tile_n);
    const int64_t n0 = task % tiles_n * tile_n, n1 = least(w.n, n0 + tile_n), cols = round_up(n1 - n0, kTileN);
    const int64_t m0 = task / tiles_n * tile_m, rows = least(call.m - m0, tile_m);
    memset(c, 0, rows * tile_n * 4);
    memset(b + (n1 - n0) * ldb, 0, (cols - (n1 - n0)) * ldb * 4);
    for (int64_t c0 = 0; c0 < w.chunks; c0 += panel) {
      const int64_t c1 = least(w.chunks, c0 + panel), k = (c1 - c0) * kChunk<D>;
      for (int64_t n = n0; n < n1; n++)
        dequantize_row(w, w.row(n), scales.of(n, 0), c0, c1, b + (n - n0) * ldb);
      multiply_panel(x.x + m0 * x.stride + c0 * kChunk<D>, x.stride, rows, b, ldb, cols, c, tile_n, k);
    }
    finish(spec, call, m0, rows, n0, n1 - n0, c, tile_n);
  });
}

template <class D>
static void linear_of(const LinearSpec& spec, const LinearCall& call) {
  switch (call.m) {
    case 1: return gemv<D, 1>(spec, call);
    case 2: return gemv<D, 2>(spec, call);
    case 3: return gemv<D, 3>(spec, call);
    case 4: return gemv<D, 4>(spec, call);
    default: return gemm<D>(spec, call);
  }
}

static void linear(const LinearSpec* spec, const LinearCall* call) {
  switch (spec->element) {
    case kElementE4M3: return linear_of<E4M3>(*spec, *call);
    case kElementE5M2: return linear_of<E5M2>(*spec, *call);
    default: return linear_of<E2M1>(*spec, *call);
  }
}

}  // namespace BLOCKSCALE_ISA
