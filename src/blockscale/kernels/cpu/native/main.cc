// The library's C functions: pick the kernels for this processor, call them, loop over experts.
#include <omp.h>
#include <pthread.h>
#include <string.h>

#include "api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define DECLARE(isa) extern "C" const Kernels blockscale_kernels_##isa;
#if defined(__x86_64__)
DECLARE(sse2)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#elif defined(__aarch64__)
DECLARE(neon)
#else
DECLARE(generic)
#endif

__attribute__((visibility("hidden"))) int blockscale_forked = 0;

static const Kernels* chosen = nullptr;

static bool runs(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512bf16"))
    return runs("avx512") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

static const Kernels* const all[] = {
#if defined(__x86_64__)
    &blockscale_kernels_avx512bf16, &blockscale_kernels_avx512, &blockscale_kernels_avx2, &blockscale_kernels_sse2
#elif defined(__aarch64__)
    &blockscale_kernels_neon
#else
    &blockscale_kernels_generic
#endif
};

static const Kernels* best() {
  for (const Kernels* k : all)
    if (runs(k->isa)) return k;
  return nullptr;  // not reached: the last one runs everywhere
}

__attribute__((constructor)) static void start() {
  pthread_atfork(nullptr, nullptr, [] { blockscale_forked = 1; });
  chosen = best();
}

// Changes whenever api.h does; native.py refuses a library of another version.
EXPORT int blockscale_abi() { return 2; }

EXPORT const char* blockscale_best_isa() { return best()->isa; }

EXPORT const char* blockscale_isa() { return chosen->isa; }

// Use this instruction set's kernels. 0, or -1 when the library has none or the processor lacks it.
EXPORT int blockscale_use(const char* isa) {
  for (const Kernels* k : all)
    if (!strcmp(k->isa, isa) && runs(isa)) {
      chosen = k;
      return 0;
    }
  return -1;
}

EXPORT int blockscale_threads() { return blockscale_forked ? 1 : omp_get_max_threads(); }

EXPORT void blockscale_linear(const LinearSpec* spec, const LinearCall* call) { chosen->linear(spec, call); }

static int64_t size_of(int32_t type) { return type == kFloat32 ? 4 : type == kBFloat16 || type == kFloat16 ? 2 : 1; }

// x [rows, k] sorted by expert, w [experts, n, k]; ends [experts]: where each expert's rows end. Rows past the last
// are zero. per_expert: whether global_scale and x_scale hold one number for each expert (else one for all).
EXPORT void blockscale_grouped_linear(const LinearSpec* spec, int64_t rows, int64_t experts, const int32_t* ends,
                                      const void* x, const uint8_t* w, int64_t w_stride, const void* scale,
                                      int64_t scale_stride, int32_t scale_type, const float* global_scale,
                                      int32_t global_per_expert, const float* x_scale, int32_t x_scale_per_expert,
                                      void* y) {
  const int64_t x_row = spec->k * size_of(spec->x_type), y_row = spec->n * size_of(spec->y_type);
  int64_t start = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t end = ends[e] < rows ? ends[e] : rows;
    if (end <= start) continue;
    const LinearCall call = {end - start, (const char*)x + start * x_row, w + e * w_stride,
                             (const char*)scale + e * scale_stride * size_of(scale_type),
                             global_scale && global_per_expert ? global_scale + e : global_scale, nullptr,
                             x_scale && x_scale_per_expert ? x_scale + e : x_scale, (char*)y + start * y_row,
                             scale_type, kFloat32};
    chosen->linear(spec, &call);
    start = end;
  }
  memset((char*)y + start * y_row, 0, (rows - start) * y_row);
}

EXPORT void blockscale_quantize(const QuantizeRule* rule, int64_t rows, int64_t cols, const void* x, int32_t x_type,
                                const float* given, uint8_t* data, void* scale, int32_t scale_type) {
  const QuantizeCall call = {rows, cols, x, x_type, given, data, scale, scale_type};
  chosen->quantize(rule, &call);
}

EXPORT void blockscale_dense(int64_t m, int64_t n, int64_t k, const void* x, const void* w, const void* bias, void* y,
                             int32_t x_type, int32_t w_type, int32_t bias_type, int32_t y_type) {
  const DenseCall call = {m, n, k, x, w, bias, y, x_type, w_type, bias_type, y_type};
  chosen->dense(&call);
}
