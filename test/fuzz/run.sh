#!/bin/sh
# usage: test/fuzz/run.sh [SECONDS]
# Fuzzes every parser of untrusted bytes, SECONDS in all (default 30), with ASan and UBSan.
# New inputs that reach new code stay in build/fuzz/corpus; an input that fails is left in
# build/fuzz and named at the end.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-30}
: "${CXX:=clang++}"
if ! command -v "$CXX" > /dev/null; then
  echo "test/fuzz/run.sh: $CXX was not found; install clang (Debian: clang) or set CXX" >&2
  exit 1
fi
cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER="$CXX" -DHSDP_CKPT_TORCH=OFF -DHSDP_CKPT_FUZZ=ON
cmake --build build/fuzz -j "${MAX_JOBS:-2}"
set -- test/fuzz/*_fuzz.cpp
each=$((seconds / $#))
for harness; do
  name=$(basename "$harness" _fuzz.cpp)
  mkdir -p "build/fuzz/corpus/$name"
  # Seeds are read from the source tree, finds are written to the first directory.
  "build/fuzz/test/fuzz/${name}_fuzz" -max_total_time="$each" -timeout=10 -rss_limit_mb=1024 \
    -malloc_limit_mb=256 -artifact_prefix="build/fuzz/$name-" -print_final_stats=1 \
    "build/fuzz/corpus/$name" "test/fuzz/corpus/$name"
done
