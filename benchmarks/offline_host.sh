#!/usr/bin/env bash
# Run jaxlin on a GPU host that reaches no network and takes its files in pieces of at most 64 MiB.
#
# Here:   benchmarks/offline_host.sh pack [--eval DATA] [FILE...]     writes .carry/1, .carry/2, ... (ignored by git): the
#         Python wheels that such hosts lack, the peers that benchmarks compare with, the demo teacher in two parts; with
#         --eval the packages and the data of eval.py's benchmarks (DATA as in `eval.py --data DATA`, with nltk_data and
#         ruler/haystack.txt); then each FILE (prepared tokens: python -m jaxlin.data).
# There:  source benchmarks/offline_host.sh unpack      after each piece arrived; installs the wheels, joins the parts and
#         unpacks the data (/tmp/carry/data) under /tmp/carry, and sets PYTHONPATH and JAXLIN_DEMO_GGUF. Then any command
#         of this repository (`python3 eval.py --teacher demo --suite all --data /tmp/carry/data`), and
#         kernel_tests [pytest's arguments]              the tests that need a GPU, without the CPU settings of conftest.py,
#         parity_tests [pytest's arguments]              the demo teacher beside transformers on the same GPU,
#         [JOBS=FILE] study CONFIG [flags]               a job a GPU of `python -m jaxlin.study`, or one for each line
#                                                        "GPU [flags]" of FILE (0 --only GROUP), in /tmp/carry; those of a GPU
#                                                        in turn, the next as soon as one has trained and only measures;
#                                                        on the tokens and the data that were carried; results of earlier
#                                                        hosts (collected.tar.gz, packed as a FILE) are not made again. What
#                                                        there is to be brought home lies in /tmp/carry/home, made anew every 20
#                                                        seconds. Longer than a call may last: run it by setsid.
WHEELS="tyro==1.0.17 gguf==0.19.0 grain==0.2.18 array-record cloudpickle docstring-parser typeguard tensorboardX
  importlib_resources etils portpicker flash-linear-attention==0.6.0 fla-core==0.6.0 mlstm_kernels==2.0.6"
EVAL_WHEELS="lm-eval==0.4.13 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash pandas python-dateutil six
  sacrebleu portalocker tabulate colorama lxml jinja2 markupsafe wonderwords==3.0.1 nltk==3.10.4 defusedxml joblib
  immutabledict langdetect==1.0.9"
PLATFORMS="manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64"

download() {  # FOLDER NAME...: wheels for the host's Python; of packages without one, which are pure Python, made here
  folder=$1 && shift
  for name in "$@"; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      $(printf -- '--platform %s ' $PLATFORMS) -d "$folder" "$name" 2> "$folder/error" ||
      python3 -m pip wheel -q --no-deps -w "$folder" "$name" || { cat "$folder/error"; return 1; }
  done
  rm -f "$folder/error"
}

pack() {
  set -euo pipefail
  rm -rf .carry && mkdir -p .carry/1 .carry/2
  exclude=$(git rev-parse --git-common-dir)/info/exclude
  mkdir -p "$(dirname "$exclude")"
  grep -qs '^/.carry/' "$exclude" || echo /.carry/ >> "$exclude"
  download .carry/1 $WHEELS
  gguf=$(python3 -c 'from jaxlin.gguf_teacher import demo_file; print(demo_file())')
  split -b 48m -d -a 1 "$gguf" .carry/demo.gguf.part
  mv .carry/demo.gguf.part0 .carry/1/ && mv .carry/demo.gguf.part1 .carry/2/
  n=3
  if [ "${1:-}" = --eval ]; then
    mkdir .carry/$n && download .carry/$n $EVAL_WHEELS
    tar -chzf .carry/$n/data.tar.gz -C "$2" .
    n=$((n + 1)) && shift 2
  fi
  for file in "$@"; do
    mkdir .carry/$n && cp "$file" .carry/$n/ && n=$((n + 1))
  done
  du -sh .carry/*
}

unpack() {
  mkdir -p /tmp/carry
  for folder in .carry/*; do
    site=/tmp/carry/site-${folder#.carry/}
    if [ ! -d "$site" ] && ls "$folder"/*.whl > /dev/null 2>&1; then
      python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$folder"/*.whl
    fi
    find "$folder" -maxdepth 1 -type f ! -name '*.whl' -exec cp {} /tmp/carry/ \;
  done
  if [ ! -d /tmp/carry/data ] && [ -f /tmp/carry/data.tar.gz ]; then
    mkdir /tmp/carry/data && tar -xzf /tmp/carry/data.tar.gz -C /tmp/carry/data
  fi
  if [ ! -f /tmp/carry/demo.gguf ] && [ -f /tmp/carry/demo.gguf.part0 ] && [ -f /tmp/carry/demo.gguf.part1 ]; then
    cat /tmp/carry/demo.gguf.part? > /tmp/carry/demo.gguf
  fi
  sites=$(printf '%s:' /tmp/carry/site-*)
  export PYTHONPATH=$sites$PWD JAXLIN_DEMO_GGUF=/tmp/carry/demo.gguf PYTHONUNBUFFERED=1
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
}

gpu_tests() {
  JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python3 -m pytest --noconftest -o addopts= \
    -o filterwarnings=default -p no:cacheprovider -q "$@"
}

kernel_tests() {
  gpu_tests -m gpu "$@" tests/test_gated_linear_attention_gpu.py tests/test_gated_delta_rule_gpu.py \
    tests/test_recurrent_step_gpu.py tests/test_attention_gpu.py tests/test_tile_gpu_blocks.py
}

parity_tests() {  # both sides in float32: JAX would take TF32
  JAX_DEFAULT_MATMUL_PRECISION=highest JAXLIN_DATA=/tmp/carry/data gpu_tests -s "$@" tests/test_harness_parity.py tests/test_needle_parity.py
}

study() (  # in /tmp/carry, where nothing is replaced when the next call brings the repository again
  config=$1 && shift
  [ ! -f "$config" ] || config=$(realpath "$config")
  cd /tmp/carry || return 1
  folder=runs/$(basename "$config" .py) && gpus=$(nvidia-smi -L | wc -l) && pids=() && failed=0
  export JAX_COMPILATION_CACHE_DIR=/tmp/carry/cache  # eval.py's suites, and other seeds, are the same programs again
  if [ -f collected.tar.gz ] && [ ! -f "$folder/study.json" ]; then
    mkdir -p "$folder" && tar -xzf collected.tar.gz --strip-components=1 -C "$folder"
  fi
  jobs=${JOBS:-jobs.txt}
  [ -n "${JOBS:-}" ] || for ((gpu = 0; gpu < gpus; gpu++)); do echo "$gpu --shard $gpu/$gpus"; done > "$jobs"
  for gpu in $(cut -d' ' -f1 "$jobs" | sort -u); do
    in_turn "$gpu" "$@" < <(awk -v gpu="$gpu" '$1 == gpu { $1 = NR - 1; print }' "$jobs") &
    pids+=($!)
  done
  while kill -0 "${pids[@]}" 2> /dev/null; do  # what there is, should there be no time for the rest
    sleep 20
    home
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  home
  return $failed
)

in_turn() {  # GPU [flags] < lines "NUMBER [flags]"
  gpu=$1 && shift && started=() && failed=0
  mapfile -t lines
  for line in "${lines[@]}"; do
    read -r number flags <<< "$line"
    CUDA_VISIBLE_DEVICES=$gpu XLA_PYTHON_CLIENT_MEM_FRACTION=0.$((${#lines[@]} > 1 ? 45 : 90)) python3 -m jaxlin.study \
      --config "$config" --data data --heldout heldout.npy --text shard?.npy "$@" $flags > "job$number.log" 2>&1 < /dev/null &
    started+=($!)
    while kill -0 $! 2> /dev/null && ! grep '(log: ' "job$number.log" | grep -qv ': train (log: '; do sleep 1; done
  done
  for pid in "${started[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

home() {  # what is to be brought home of a study: /tmp/carry/home/
  mkdir -p home "$folder"/logs && cp job*.log home/ && tar -czf home/logs.tar.gz "$folder"/logs
  python3 -m jaxlin.study.collect --out "$folder" --to home/collected.tar.gz
}

"$@"
