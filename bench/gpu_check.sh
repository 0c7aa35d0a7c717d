#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, test, sanitise, measure.
#
#   bench/gpu_check.sh OUTDIR
#
# Needs torch with CUDA, nvcc, and the test and bench extras of pyproject.toml; installs nothing.
# Every stage runs even when an earlier one failed, and the exit status says whether all passed.
# OUTDIR receives machine.txt, build.log, tests.log, sanitizer.log, layers.json.
set -uo pipefail

out=${1:?usage: bench/gpu_check.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
failed=()

stage() { # stage NAME SECONDS COMMAND...: runs with a limit, keeps the output in NAME.log
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 5 "$out/$name.log"
}

{
  git rev-parse HEAD
  nvidia-smi
  nvcc --version
  python3 -c "import torch; print(torch.__version__, torch.version.cuda)"
} >"$out/machine.txt" 2>&1

export PYTHONUNBUFFERED=1
# A package for this call only: the build in place, importable from here under its three names.
stage build 240 python3 setup.py build_ext --inplace
PYTHONPATH=$(pwd):${PYTHONPATH:-}
export PYTHONPATH
[ -e fused_rnn/bench ] || ln -s ../bench fused_rnn/bench
[ -e fused_rnn/kernels ] || ln -s ../kernels fused_rnn/kernels
trap 'rm -f fused_rnn/bench fused_rnn/kernels' EXIT

stage tests 240 python3 -m pytest -q -m cuda tests
if command -v compute-sanitizer >/dev/null; then
  stage memcheck 120 compute-sanitizer --error-exitcode 1 python3 -m pytest -q tests/test_cuda.py -k small
  stage initcheck 120 compute-sanitizer --tool initcheck --error-exitcode 1 \
    python3 -m pytest -q tests/test_cuda.py -k small
else
  echo "compute-sanitizer is not installed: not run"
fi
stage layers 240 python3 -m fused_rnn.bench cpu --device cuda --json "$out/layers.json"

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all passed"
