#!/usr/bin/env bash
# Measures on one NVIDIA GPU what docs/performance.md has targets for. See --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
usage: benchmarks/gpu.sh [--dry-run] CLONE [REFERENCE_PYTHON]

Measures training steps of stage1:l32, stage1:b64, stage2:l32 and generator:l32, and encoding, decoding and sampling with
TiTok-L-32, in bfloat16 on an H100 or H200: the published code, this code, and the published code under torch.compile. Each
runs alone on the GPU, in a process of its own; the first two take turns. The table has medians, the largest memory, and in
its last column the targets and whether they are met.

It stops within 9 minutes. What is done is kept after every turn: the same command goes on. The first two sides take two or
three starts. torch.compile comes after them, one case at a time; what does not end in 8 minutes counts as failed. The status
is 0 when all is done, and 1 when there is more to do.

  CLONE             a clone of https://github.com/bytedance/1d-tokenizer
  REFERENCE_PYTHON  an interpreter with its requirements (default: that of this code)
  --dry-run         print the command and do nothing

environment:
  PYTHON   the interpreter of this code, with JAX for the GPU (default: .venv/bin/python if there is one, else python3)
  RESULTS  the file that keeps the figures (default: runs/gpu.json); remove it to begin anew
EOF
}

dry_run=
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    *) echo "error: unknown option $1; --help says what there is" >&2; exit 2 ;;
  esac
  shift
done
if (($# < 1 || $# > 2)); then
  echo "error: expected CLONE and perhaps REFERENCE_PYTHON, got $# arguments; --help says what they are" >&2
  exit 2
fi

default=$ROOT/.venv/bin/python
[[ -x $default ]] || default=python3
PYTHON=${PYTHON:-$default}
RESULTS=${RESULTS:-$ROOT/runs/gpu.json}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}  # so that no start compiles again
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

command=("$PYTHON" "$ROOT/benchmarks/speed.py" --reference "$1" --reference-python "${2:-$PYTHON}" --torch-compile
  --dtype bfloat16 --minutes 8.7 --compile-minutes 8 --json "$RESULTS"
  --only "train stage1:l32" "train stage1:b64" "train stage2:l32" "train generator:l32" titok_l32)
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
if ! "$PYTHON" -c 'import sys, jax; sys.exit(jax.default_backend() != "gpu")'; then
  echo "error: JAX in $PYTHON finds no GPU here; README.md says what to install for one" >&2
  exit 2
fi
mkdir -p "$(dirname "$RESULTS")"
exec "${command[@]}"
