#!/usr/bin/env bash
# Run jaxlin on a GPU host that reaches no network and takes its files in pieces of at most 64 MiB.
#
# Here:   benchmarks/offline_host.sh pack [FILE...]     writes .carry/1, .carry/2, ... (ignored by git): the Python wheels
#         that such hosts lack, the peers that benchmarks compare with, the demo teacher in two parts, then each FILE
#         (prepared tokens: python -m jaxlin.data).
# There:  source benchmarks/offline_host.sh unpack      after each piece arrived; installs the wheels, joins the parts
#         under /tmp/carry, and sets PYTHONPATH and JAXLIN_DEMO_GGUF. Then any command of this repository, and
#         kernel_tests [pytest's arguments]              the tests that need a GPU, without the CPU settings of conftest.py.
WHEELS="tyro==1.0.17 gguf==0.19.0 grain==0.2.18 array-record cloudpickle docstring-parser typeguard tensorboardX
  importlib_resources etils portpicker flash-linear-attention==0.6.0 fla-core==0.6.0 mlstm_kernels==2.0.6"
PLATFORMS="manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64"

pack() {
  set -euo pipefail
  rm -rf .carry && mkdir -p .carry/1 .carry/2
  exclude=$(git rev-parse --git-common-dir)/info/exclude
  mkdir -p "$(dirname "$exclude")"
  grep -qs '^/.carry/' "$exclude" || echo /.carry/ >> "$exclude"
  for name in $WHEELS; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      $(printf -- '--platform %s ' $PLATFORMS) -d .carry/1 "$name"
  done
  gguf=$(python3 -c 'from jaxlin.gguf_teacher import demo_file; print(demo_file())')
  split -b 48m -d -a 1 "$gguf" .carry/demo.gguf.part
  mv .carry/demo.gguf.part0 .carry/1/ && mv .carry/demo.gguf.part1 .carry/2/
  n=3
  for file in "$@"; do
    mkdir .carry/$n && cp "$file" .carry/$n/ && n=$((n + 1))
  done
  du -sh .carry/*
}

unpack() {
  mkdir -p /tmp/carry
  for folder in .carry/*; do cp -r "$folder"/. /tmp/carry/; done
  if [ ! -d /tmp/carry/site ] && ls /tmp/carry/*.whl > /dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/carry/site /tmp/carry/*.whl
  fi
  if [ ! -f /tmp/carry/demo.gguf ] && [ -f /tmp/carry/demo.gguf.part0 ] && [ -f /tmp/carry/demo.gguf.part1 ]; then
    cat /tmp/carry/demo.gguf.part? > /tmp/carry/demo.gguf
  fi
  export PYTHONPATH=/tmp/carry/site:$PWD JAXLIN_DEMO_GGUF=/tmp/carry/demo.gguf PYTHONUNBUFFERED=1
}

kernel_tests() {
  JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python3 -m pytest --noconftest -o addopts= \
    -o filterwarnings=default -p no:cacheprovider -q -m gpu "$@" \
    tests/test_gated_linear_attention_gpu.py tests/test_gated_delta_rule_gpu.py
}

"$@"
