// More rows of x: a few rows of the weight are decoded into the cache, then a matmul micro-kernel uses them for every row
// of x. The columns of K lie along the vectors, so a tile's sums are added up across lanes at its end.
//
// What is decoded, and how it is multiplied, is a Way: Floats (gemm_floats.h) or Pairs (gemm_pairs.h).
#pragma once
#include "prepare.h"
#include "weight.h"

namespace BLOCKSCALE_ISA {

// Rows of x that the next tile takes of those left: equal shares, since a tile of one row wastes most of its loads.
INLINE int64_t share(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// How a matmul is cut. A task makes y[tile_m, tile_n], whose rows are whole cache lines: two threads that write to one
// line wait for each other.
struct Cut {
  int64_t tile_n, tile_m, blocks_m, tiles_n;
  int64_t decoded;  // rows of the weight in the cache at a time: in L1 for small M, else in L2 against blocks of x
  Cut(int64_t m, int64_t n) {
    const bool small = m <= 64;
    tile_m = small ? m : 252;
    blocks_m = (m + tile_m - 1) / tile_m;
    tile_n = small || blocks_m * n < 64 * 16 ? 32 : 64;  // narrow layers too have a share for each thread
    tiles_n = (n + tile_n - 1) / tile_n;
    decoded = small ? kTileN : tile_n;
  }
  int64_t tasks() const { return blocks_m * tiles_n; }
};

constexpr int64_t kPanel = 1024;  // columns of K at a time

// A few rows of a panel, decoded by a Way.
struct Decoded {
  float* b;      // [rows, kStride]
  float* scale;  // [rows, kPanelGroups], for Pairs
};
constexpr int64_t kPanelGroups = kPanel / kGroup;
template <int kColumns>
constexpr int64_t kStride = kPanel / kColumns + 16;  // odd in cache lines, as the stride of x

template <class Way>
static void gemm(const LinearSpec& spec, const LinearCall& call) {
  typedef typename Way::D D;
  constexpr int64_t ldb = kStride<Way::kColumns>;
  Weight<D> w(spec, call);
  const Prepared x = prepare<typename Way::A>(spec, call, 0);
  const Cut cut(call.m, w.n);
  w.rows_at_once = cut.decoded;
  const int64_t panel = kPanel / kChunk<D>;
  parallel_for(cut.tasks(), (double)call.m * w.n * w.k, [&](int64_t task) {
    static thread_local Scratch scale_memory, tile_memory, sum_memory;
    ScaleRows<Weight<D>> scales(w, w.block_rows, scale_memory);
    float* b = tile_memory.get<float>(cut.decoded * (ldb + kPanelGroups));
    const Decoded tile = {b, b + cut.decoded * ldb};
    float* c = sum_memory.get<float>(cut.tile_m * cut.tile_n);
    const int64_t n0 = task % cut.tiles_n * cut.tile_n, n1 = least(w.n, n0 + cut.tile_n);
    const int64_t m0 = task / cut.tiles_n * cut.tile_m, rows = least(call.m - m0, cut.tile_m);
    memset(c, 0, rows * cut.tile_n * 4);
    for (int64_t n = n0; n < n1; n += cut.decoded) {
      const int64_t count = least(n1 - n, cut.decoded), cols = round_up(count, kTileN);
      for (int64_t i = count; i < cols; i++) Way::decode_nothing(tile, i);
      for (int64_t c0 = 0; c0 < w.chunks; c0 += panel) {
        const int64_t c1 = least(w.chunks, c0 + panel);
        for (int64_t i = 0; i < count; i++) Way::decode(w, w.row(n + i), scales.of(n + i), c0, c1, tile, i);
        Way::multiply(x, m0, rows, c0, c1, tile, cols, c + (n - n0), cut.tile_n);
      }
    }
    finish(spec, call, x, m0, rows, n0, n1 - n0, c, cut.tile_n);
  });
}

}  // namespace BLOCKSCALE_ISA
