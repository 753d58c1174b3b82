// All kernels for one instruction set. The build compiles this file once for each, with its flags and
// -DBLOCKSCALE_ISA=<name>; main.cc picks one at run time.
#include "dense.h"
#include "linear.h"
#include "quantize.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" __attribute__((visibility("hidden"))) const Kernels JOIN(blockscale_kernels_, BLOCKSCALE_ISA) = {
    TEXT(BLOCKSCALE_ISA), BLOCKSCALE_ISA::linear, BLOCKSCALE_ISA::quantize, BLOCKSCALE_ISA::dense};
