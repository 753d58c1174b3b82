// The C interface between kernels/cpu/native.py and this library. No Python, no torch: pointers, sizes and enums.
// native.py mirrors these structs with ctypes; `blockscale_abi()` must change whenever they do.
#pragma once
#include <stdint.h>

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kE8M0 = 3, kE4M3 = 4 };
enum Element { kElementE4M3 = 0, kElementE5M2 = 1, kElementE2M1 = 2 };
enum Engine { kExact = 0, kInt16 = 1 };  // kInt16: 16-bit fixed point, for E4M3 in blocks of 128 columns, AVX2 and above
enum Rounding { kRoundNone = 0, kRoundPow2Ceil = 1, kRoundPow2Floor = 2 };

// How a block's scale is made. group: columns that share a scale; rows: rows that do; 0 is the whole dimension.
struct QuantizeRule {
  int64_t rows, group;
  int32_t element;    // E4M3 or E5M2
  int32_t rounding;   // Rounding
  float floor;        // lower bound of a block's amax
  int32_t enabled;    // 0: x stays as it is (weight-only)
};

// What a linear computes; fixed for a layer, so the caller builds it once.
struct LinearSpec {
  int64_t n, k;
  int64_t block_rows, block_cols;  // of the weight; 0 is the whole dimension
  int32_t element;                 // Element of the weight
  int32_t x_type, y_type;          // Type
  int32_t engine;                  // Engine
  QuantizeRule activation;
};

// One call. x [m, k] and y [m, n] are contiguous; w and scale lie in layout "row".
struct LinearCall {
  int64_t m;
  const void* x;
  const uint8_t* w;
  const void* scale;
  const float* global_scale;  // NVFP4's second level, or null
  const void* bias;           // [n], or null
  const float* x_scale;       // static activation scale, or null
  void* y;
  int32_t scale_type, bias_type;
};

struct QuantizeCall {
  int64_t rows, cols;
  const void* x;
  int32_t x_type;
  const float* given;  // static scales [grid rows, grid cols], or null
  uint8_t* data;
  void* scale;         // float or E8M0 [grid rows, grid cols]; null when `given`
  int32_t scale_type;
};

struct DenseCall {
  int64_t m, n, k;
  const void* x;
  const void* w;
  const void* bias;  // [n] of x's type, or null
  void* y;
  int32_t x_type, w_type, bias_type, y_type;
};

// One set of kernels, compiled once for each instruction set.
struct Kernels {
  const char* isa;
  void (*linear)(const LinearSpec*, const LinearCall*);
  void (*quantize)(const QuantizeRule*, const QuantizeCall*);
  void (*dense)(const DenseCall*);
};
