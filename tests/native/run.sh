#!/usr/bin/env bash
# The native CPU kernels without Python: under ASan and UBSan here, and as NEON under qemu-user.
#
#   tests/native/run.sh [sanitize] [neon]      both by default
#
# Installs g++-aarch64-linux-gnu and qemu-user with apt where they are missing and root may.
set -euo pipefail
cd "$(dirname "$0")/../.."
native=src/blockscale/kernels/cpu/native
out=build/native-tests
mkdir -p "$out"
flags=(-std=c++17 -O1 -g -fopenmp -fno-exceptions -fno-rtti -fno-math-errno -Wno-psabi -Wno-unknown-pragmas -w "-I$native")

build() {  # build <compiler> <name> <extra flags> -- <isa=flags> ...
  local compiler=$1 name=$2 extra=$3 objects=()
  shift 3
  for pair in "$@"; do
    local isa=${pair%%:*} march=${pair#*:}
    local object="$out/$name-$isa.o"
    objects+=("$object")
    if [ -e "$object" ] && [ -z "$(find "$native" -newer "$object" -type f)" ]; then continue; fi
    # shellcheck disable=SC2086
    $compiler "${flags[@]}" $extra $march "-DBLOCKSCALE_ISA=$isa" -c "$native/kernels.cc" -o "$object"
  done
  # shellcheck disable=SC2086
  $compiler "${flags[@]}" $extra "$native/main.cc" tests/native/check.cc "${objects[@]}" -o "$out/$name" -lpthread
}

sanitize() {
  build g++ sanitized "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr" \
    sse2:-march=x86-64 avx2:-march=haswell "avx512:-march=skylake-avx512 -mprefer-vector-width=512" \
    "avx512bf16:-march=skylake-avx512 -mprefer-vector-width=512 -mavx512bf16 -mavx512vnni -mavx512vbmi"
  OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 "$out/sanitized"
}

neon() {
  if ! command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null; then
    apt-get install -y -qq g++-aarch64-linux-gnu qemu-user >/dev/null
  fi
  build aarch64-linux-gnu-g++ neon "-static -O2" neon:-march=armv8-a
  OMP_NUM_THREADS=2 qemu-aarch64 "$out/neon"
}

for part in "${@:-sanitize neon}"; do for step in $part; do echo "== $step"; "$step"; done; done
