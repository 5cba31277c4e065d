#!/usr/bin/env bash
# The GPU kernels on a Hopper host that reaches no network: correctness first, smallest kernel first, then timings.
#
# Here:   benchmarks/hopper.sh pack    writes .carry/kernels (ignored by git): the wheels such hosts lack, and the peers.
# There:  benchmarks/hopper.sh run     the ladder, the bench, pytest -m gpu; results in $OUT. Or a part by itself:
#         benchmarks/hopper.sh ladder|bench|tune|tests [arguments of the script behind it]
WHEELS="tyro==1.0.17 docstring-parser typeguard pytest iniconfig pluggy packaging pygments einops
  flash-linear-attention==0.6.0 fla-core==0.6.0 mlstm_kernels==2.0.6"

pack() {
  set -euo pipefail
  mkdir -p .carry/kernels
  grep -qs '^/.carry/' .git/info/exclude || echo /.carry/ >> "$(git rev-parse --git-common-dir)/info/exclude"
  for name in $WHEELS; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d .carry/kernels "$name"
  done
  du -sh .carry/kernels
}

prepare() {
  if [ ! -d /tmp/kernels_site ] && [ -d .carry/kernels ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/kernels_site .carry/kernels/*.whl
  fi
  export PYTHONPATH=$PWD:/tmp/kernels_site PYTHONUNBUFFERED=1 OUT=${OUT:-/tmp} XLA_PYTHON_CLIENT_PREALLOCATE=false
}

tune() { python3 benchmarks/hopper_tune.py "$@" 2>&1 | tee "$OUT/tune.txt"; }

ladder() { python3 benchmarks/hopper_ladder.py "$@"; }

bench() { python3 -m jaxlin.kernels.bench --out "$OUT/bench.json" "$@" 2>&1 | tee "$OUT/bench.txt"; }

tests() {  # without conftest.py and its settings for the CPU
  JAX_PLATFORMS=cuda,cpu python3 -m pytest --noconftest -o addopts= -o filterwarnings=default -q -x -m gpu "$@" \
    tests/test_gated_linear_attention_gpu.py tests/test_gated_delta_rule_gpu.py 2>&1 | tail -30 | tee "$OUT/tests.txt"
}

run() {
  ladder | tee "$OUT/ladder.txt"
  bench --implementations pallas
}

[ "$1" = pack ] || prepare
"$@"
