// The stored weight: its rows, its scales as fp32, and its rows as fp32.
#pragma once
#include "decode.h"
#include "parallel.h"

namespace BLOCKSCALE_ISA {

constexpr int kTileN = 4;        // weight rows that a matmul tile takes
constexpr int kMostRows = 8;     // weight rows whose scales are in use at a time
constexpr int kGroup = 128;      // columns: x's groups and the weight's blocks are multiples where pairs are used

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
    block_cols = grid_cols == 1 ? round_up(k, kGroup) : spec.block_cols;
    span = block_cols > kChunk<D> ? block_cols / kChunk<D> : 1;
    step = block_cols > kChunk<D> ? 1 : kChunk<D> / block_cols;
    for (int i = 0; i < W; i++) lane_scale[i] = step > 1 ? (int32_t)(i * D::E / block_cols) : 0;
  }
  // What to prefetch at byte `at` of a row: what follows in it, or in the row that is read `rows_at_once` rows later.
  int64_t rows_at_once = 1;
  int64_t ahead(int64_t at) const {
    return at + kPrefetch + (at + kPrefetch >= row_bytes ? (rows_at_once - 1) * row_bytes : 0);
  }
  const uint8_t* row(int64_t i) const { return data + i * row_bytes; }
  int64_t floats() const { return grid_cols + W; }
  // The scales of grid row g as fp32, W zeros behind them.
  void read_scales(int64_t g, float* to) const {
    read_floats(scale, scale_type, g * grid_cols, grid_cols, to);
    if (global != 1) for (int64_t i = 0; i < grid_cols; i++) to[i] *= global;
    memset(to + grid_cols, 0, W * 4);
  }
  F scales(const float* at) const { return __builtin_shuffle(load<F>(at), lane_scale); }
};

// What a Source makes of each grid row of scales (a Weight: the scales as fp32), made once for all the rows that share
// them. What `of` returned stays valid for the next kMostRows - 1 rows.
template <class Source>
struct ScaleRows {
  const Source& source;
  const int64_t block_rows;
  float *memory, *current = nullptr;
  int64_t first = 0, end = 0;  // the rows that `current` serves
  int64_t held[kMostRows];     // grid rows in memory
  ScaleRows(const Source& from, int64_t rows, Scratch& scratch)
      : source(from), block_rows(rows), memory(scratch.get<float>(from.floats() * kMostRows)) {
    for (int64_t& g : held) g = -1;
  }
  const float* of(int64_t row) {
    if (row >= first && row < end) return current;
    const int64_t g = row / block_rows, slot = g % kMostRows;
    first = g * block_rows, end = first + block_rows;
    current = memory + slot * source.floats();
    if (held[slot] != g) source.read_scales(g, current), held[slot] = g;
    return current;
  }
};

// Chunks [c0, c1) of a row as fp32 with their scales, permuted; exact, NaN and infinity included.
template <class D>
static void dequantize_row(const Weight<D>& w, const uint8_t* row, const float* scale, int64_t c0, int64_t c1,
                           float* to) {
  constexpr int64_t C = kChunk<D>, B = 4 * W;
  const F unit = splat(power_of_two(D::kUnit));
  Watch<D> watch;
  float* out = to;
  int64_t index = c0 / w.span;
  for (int64_t c = c0; c < c1; index++) {
    const F s = w.scales(scale + index * w.step), both = s * unit;
    const int64_t end = least(c1, (index + 1) * w.span), full = least(end, w.full_chunks);
    const bool overflows = any((bits<I>(both) & 0x7F800000) == 0x7F800000);  // a scale above 2^7: two steps
    auto chunk = [&](I v) __attribute__((always_inline)) {
      watch.see(v);
      F b[D::E];
      D::decode(v, b);
      if (overflows) UNROLL for (int j = 0; j < D::E; j++) store(out + j * W, b[j] * unit * s);
      else UNROLL for (int j = 0; j < D::E; j++) store(out + j * W, b[j] * both);
      out += C;
    };
    const int64_t ahead = w.ahead(c * B) - c * B;
    for (; c < full; c++) {
      if (B >= 64 || c % (64 / B) == 0) prefetch(row + c * B + ahead);
      chunk(load<I>(row + c * B));
    }
    if (c < end) {  // the ragged end of the row
      chunk(load_part(row + c * B, w.row_bytes - c * B));
      c++;
    }
  }
  if (!watch.special()) return;
  for (int64_t c = c0; c < c1; c++, to += C) {
    const F s = w.scales(scale + c / w.span * w.step);
    for (int j = 0; j < D::E; j++)
      for (int i = 0; i < W; i++) {
        const int64_t k = c * C + D::E * i + j;
        to[j * W + i] = k < w.k ? D::one(row, k) * s[i] : 0;
      }
  }
}

}  // namespace BLOCKSCALE_ISA
