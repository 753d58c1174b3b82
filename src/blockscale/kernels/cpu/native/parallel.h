// Threads, scratch memory and the floating-point mode.
//
// Threads are torch's own: this library links to the soname libgomp.so.1, which torch has loaded already, so
// omp_get_max_threads() is torch.get_num_threads() and there is one pool. Work is handed out in dynamic pieces, since
// a static share stalls everyone when one core is busy with something else. A forked child stays on one thread: the
// parent's pool is gone there, and libgomp can wait for it forever.
#pragma once
#include <omp.h>
#include <stdlib.h>

#include "simd.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

extern int blockscale_forked;  // set in a child process by main.cc

namespace BLOCKSCALE_ISA {

// fp32 as IEEE says while it lives: torch.set_flush_denormal(True) would zero the FP8 subnormals that decode.h makes.
struct DenormalGuard {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  DenormalGuard() { _mm_setcsr(0x1F80); }  // round to nearest, no exceptions, denormals kept
  ~DenormalGuard() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  DenormalGuard() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)0));
  }
  ~DenormalGuard() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

// A buffer that grows and stays with its thread.
struct Scratch {
  char* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  template <class T>
  T* get(int64_t count) {
    size_t need = (size_t)round_up((count ? count : 1) * sizeof(T), 4096);
    if (need > size) {
      free(memory);
      memory = (char*)aligned_alloc(4096, need);
      if (!memory) abort();
      size = need;
    }
    return (T*)memory;
  }
};

// body(i) for i in 0 ... tasks. work: operations in all, so that small jobs do not wake the pool.
template <class Body>
static void parallel_for(int64_t tasks, double work, const Body& body) {
  int threads = blockscale_forked || omp_in_parallel() || work < 4e5 ? 1 : omp_get_max_threads();
  if (threads > tasks) threads = (int)tasks;
  if (threads <= 1) {
    DenormalGuard guard;
    for (int64_t i = 0; i < tasks; i++) body(i);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    DenormalGuard guard;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < tasks; i++) body(i);
  }
}

}  // namespace BLOCKSCALE_ISA
