#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, test, sanitise, measure.
#
#   bench/gpu_check.sh OUTDIR [--dry-run]
#
# Needs torch with CUDA, nvcc and pytest; installs nothing and asks no network. PYTHON names the
# interpreter (python3), FUSED_RNN_COMMIT the commit where there is no git to ask.
#
# Every stage runs even when an earlier one failed, within its own limit and what is left of the
# whole; the sweep takes all that the others left. The exit status says whether all passed. OUTDIR
# holds these files and no others, what there is of them at any time, also after an interrupt:
#
#   machine.json     commit, GPU, driver, clocks, versions    stages.json   what passed, and how long
#   sweep.json       the rows measured, see gpu.py            log.txt       what the stages printed
#   sanitizers.txt   what each tool found, if it was run
#   summary.txt      stages, means, rows with the worst ratios last
#
# --dry-run prints the plan, then runs what needs no GPU: the facts, the tests' collection, and the
# sweep on the CPU with shapes too small to mean anything.
set -uo pipefail

budget=570 # seconds

usage() {
  echo "usage: bench/gpu_check.sh OUTDIR [--dry-run]" >&2
  exit 2
}

out='' dry=no
for argument in "$@"; do
  case $argument in
    --dry-run) dry=yes ;;
    -*) usage ;;
    *)
      [ -z "$out" ] || usage
      out=$argument
      ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + budget))
rm -f "$out"/{machine,stages,sweep}.json "$out"/{summary,log,sanitizers}.txt

if ! work=$(mktemp -d); then
  work=$out/work
  mkdir -p "$work" || exit 2
fi
trap 'rm -rf "$work"' EXIT
[ -w "${HOME:-/nonexistent}" ] || export HOME=$work # for the compilers' caches
export PYTHONUNBUFFERED=1
cd "$work" || exit 2

# Where setup.py will look for nvcc, and where the sanitizer lies beside it.
if [ -z "${CUDA_HOME:-}" ]; then
  for home in "${CUDA_PATH:-}" /usr/local/cuda; do
    if [ -x "$home/bin/nvcc" ]; then
      export CUDA_HOME=$home
      break
    fi
  done
fi
[ -z "${CUDA_HOME:-}" ] || PATH=$PATH:$CUDA_HOME/bin:$CUDA_HOME/compute-sanitizer

# What is built: for the GPU at hand and no other, on all cores, and where nvcc can, one source's kernels
# on several.
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
clusters=yes
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
capability=${capability%%$'\n'*}
if [[ $capability =~ ^[0-9]+\.[0-9]$ ]]; then
  if [ "${capability%.*}" -lt 9 ]; then clusters=no; else capability+=a; fi
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
fi
if [[ $(nvcc --help 2>/dev/null) = *--split-compile* ]]; then
  export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:+$NVCC_APPEND_FLAGS }--split-compile=0"
fi

results() { "$python" "$repo/bench/results.py" "$@"; }

# The package under its three names as an installation has it; the checkout stays as it is.
link_package() {
  local part
  mkdir -p "$work/site/fused_rnn"
  for part in "$repo"/fused_rnn/* "$work"/built/fused_rnn/*.so "$repo/bench" "$repo/kernels"; do
    case ${part##*/} in
      __pycache__ | '*'*) ;;
      *) ln -sfn "$part" "$work/site/fused_rnn/${part##*/}" ;;
    esac
  done
}
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}

# Stages: start begins one, finish waits for all that were begun and records them.
declare -A pids=() begun=() limits=() # by the names of those that run
planning=no

start() { # start NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((deadline - SECONDS)) command
  shift 2
  if [ $planning = yes ]; then
    command="${*//"$repo/"/}"
    printf '%-17s at most %3d s  %s\n' "$name" "$limit" "${command//$'\n'/; }"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -le 0 ]; then
    skip "$name" "no time was left"
    return
  fi
  echo "== $name"
  # timeout leads a process group of its own, and ends all of it.
  timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1 </dev/null &
  pids[$name]=$! begun[$name]=$SECONDS limits[$name]=$limit
}

skip() { # skip NAME WHY
  if [ $planning = yes ]; then
    printf '%-17s not run: %s\n' "$1" "$2"
  else
    echo "== $1: not run, $2"
    results stage "$out" "$1" "" 0 "$2"
  fi
}

on_gpu() { # on_gpu NAME SECONDS COMMAND...: start, but for a dry run
  if [ $dry = yes ] && [ $planning = no ]; then
    skip "$1" "dry run, and it needs a GPU"
  else
    start "$@"
  fi
}

finish() {
  local name
  while [ ${#pids[@]} -gt 0 ]; do
    for name in "${!pids[@]}"; do
      kill -0 "${pids[$name]}" 2>/dev/null || record "$name"
    done
    sleep 0.1
  done
}

record() { # record NAME: of a stage that has ended
  local name=$1 pid=${pids[$1]} log=$work/$1.log rc why=()
  local seconds=$((SECONDS - begun[$name]))
  unset "pids[$name]"
  wait "$pid"
  rc=$?
  [ $rc -eq 137 ] && [ $seconds -ge "${limits[$name]}" ] && rc=124
  if [[ $name = *check* ]]; then
    {
      echo "== $name"
      grep '^=========' "$log"
    } >>"$out/sanitizers.txt"
  fi
  if [[ $name = *check* ]] && grep -q "Device not supported" "$log"; then
    rc='' why=("compute-sanitizer does not support this device")
  fi
  # To pytest it is a success when every test was skipped.
  if [ $dry = no ] && [ "$rc" = 0 ] && grep -q "test session starts" "$log"; then
    grep -Eq "[0-9] passed" "$log" || rc=5
  fi
  {
    echo "== $name: exit status ${rc:-none}, $seconds s"
    cat "$log"
  } >>"$out/log.txt"
  [ ${#pids[@]} -eq 0 ] || echo "-- $name"
  tail -n 3 "$log"
  rm -f "$log"
  results stage "$out" "$name" "$rc" "$seconds" "${why[@]}"
}

interrupted() {
  local pid
  trap '' INT TERM HUP
  echo "interrupted"
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null; done
  finish
  results summary "$out"
  exit 130
}
trap interrupted INT TERM HUP

have() { "$python" -c "import $1" 2>/dev/null; }

# Plugins are not loaded by themselves: none is needed, and nobody knows which are installed.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=("$python" -m pytest -c "$repo/pyproject.toml" -o "addopts=-ra --strict-markers"
  -o faulthandler_timeout=60 -p no:cacheprovider --continue-on-collection-errors --tb=short)
# A test that hangs ends its process (tests/lost_device.py), and xdist starts another.
! have pytest_timeout || pytest+=(-p pytest_timeout)
workers=()
if have xdist; then
  cores=$(nproc)
  workers=(-p xdist -n "$((cores < 8 ? cores : 8))")
fi

stage_build() {
  local where=(--inplace)
  [ -w "$repo/fused_rnn" ] || where=(--build-lib "$work/built" --build-temp "$work/temporary")
  link_package
  if [ $dry = yes ] && [ $planning = no ] && have fused_rnn._C; then
    skip build "dry run, and the extension is there"
  else
    start build 210 "$python" "$repo/setup.py" build_ext --force "${where[@]}"
    finish
    link_package
  fi
  on_gpu import 20 "$python" -c "
import fused_rnn._C as extension, torch
print(extension.build_info(), torch.cuda.get_device_name())
assert extension.build_info()['cuda'], 'built without CUDA: every test would be skipped'"
  finish
}

stage_tests() {
  local test_cuda=$repo/tests/test_cuda.py tool engine sanitizer
  local tools=(memcheck racecheck synccheck)
  if ! have pytest; then
    for tool in tests "${tools[@]/%/-cluster}" "${tools[@]/%/-grid}" "${tools[@]}" initcheck \
      determinism graphs; do
      skip $tool "pytest is not installed"
    done
    return
  fi
  if [ $dry = yes ] && [ $planning = no ]; then
    start tests 80 "${pytest[@]}" -q --collect-only -m cuda "$repo/tests"
  else
    start tests 80 "${pytest[@]}" -v --durations=10 "${workers[@]}" -m cuda \
      -k "not (test_cuda and (deterministic or graph))" "$repo/tests"
  fi
  finish
  # One start of Python each is most of what these take: together. Each persistent engine on its own,
  # so that one that hangs, or that a tool does not understand, says nothing of the other.
  for engine in cluster grid; do
    for tool in "${tools[@]}"; do
      if [ "$engine$clusters" = clusterno ]; then
        skip "$tool-$engine" "this GPU has no clusters"
        continue
      fi
      sanitize "$tool" "$tool-$engine" "small and persistent_$engine"
    done
  done
  for tool in "${tools[@]}" initcheck; do
    sanitize "$tool" "$tool" "small and not persistent" FUSED_RNN_CUDA_ENGINE=per_step
  done
  finish
  on_gpu determinism 40 "${pytest[@]}" -v -k deterministic "$test_cuda"
  on_gpu graphs 40 "${pytest[@]}" -v -k graph "$test_cuda"
  finish
}

sanitize() { # sanitize TOOL NAME TESTS [VARIABLE=VALUE]
  local tool=$1 name=$2 which=$3 sanitizer
  shift 3
  # Kernels of the libraries that are called trip all but memcheck.
  sanitizer=(compute-sanitizer --tool "$tool" --error-exitcode 86 --print-limit 50)
  if [ "$tool" = memcheck ]; then
    sanitizer+=(--report-api-errors no)
  else
    sanitizer+=(--kernel-name kns=fused_rnn)
  fi
  if command -v compute-sanitizer >/dev/null || [ $planning = yes ]; then
    on_gpu "$name" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 "$@" \
      "${sanitizer[@]}" "${pytest[@]}" -v -k "$which" "$repo/tests/test_cuda.py"
  else
    skip "$name" "compute-sanitizer is not installed"
  fi
}

stage_sweep() {
  local sweep=("$python" -m fused_rnn.bench gpu --json "$out/sweep.json") left
  if [ $planning = yes ]; then
    start sweep 120 "${sweep[@]}" --seconds "(all that is left)"
    "${sweep[@]}" --plan
    return
  elif [ $dry = yes ]; then
    start sweep 120 "${sweep[@]}" --device cpu --rows subset --seconds 100
    finish
    return
  fi
  left=$((deadline - SECONDS))
  start sweep $left "${sweep[@]}" --seconds $((left - 20))
  finish
  # A row that took the process with it is left out, and the rest goes on.
  for again in 1 2 3; do
    left=$((deadline - SECONDS))
    if [ $left -gt 40 ] && results unfinished "$out"; then
      start "sweep-$again" $left "${sweep[@]}" --resume --seconds $((left - 20))
      finish
    fi
  done
}

stages() {
  start facts 30 "$python" "$repo/bench/results.py" facts "$out" "$repo"
  finish
  stage_build
  stage_tests
  stage_sweep
}

if [ $dry = yes ]; then
  link_package
  planning=yes
  stages
  planning=no
  echo
fi
stages
results summary "$out"
status=$?
echo "in $out, after $((SECONDS - deadline + budget)) s"
exit $status
