#!/usr/bin/env bash
# Build without a network, check, measure, write one JSON file: `benchmarks/gpu_run.sh [--quick] [--blocks check,speed]`.
# Needs a CUDA device and a Python with torch, triton and pytest; nvcc and cmake for the native kernel. Settings of the
# card are only read.
#   PY=python3.12     the interpreter
#   BUDGET_S=540      seconds for everything, the build included
#   OUT=folder        receives a copy of the results file, the build's log and the output
# Other arguments go to `python -m benchmarks.gpu_run` (--help lists them); --dry rehearses on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."

PY=${PY:-python3}
BUDGET_S=${BUDGET_S:-540}
BUILD_S=${BUILD_S:-120}
OUT=${OUT:-}
started=$(date +%s)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUDA_MODULE_LOADING=LAZY

build() {
  # editable and without dependencies: nothing is fetched; what is missing shows when it is imported
  timeout "$BUILD_S" "$PY" -m pip install -q --no-build-isolation --no-deps --no-index -e .
  case $? in
    0) echo "pip" > "$log.how" && return ;;
    # a second attempt would cost the measurements their time
    124) echo "source tree alone: pip took more than $BUILD_S s" > "$log.how" && return ;;
  esac
  echo "--- pip could not; cmake alone"
  timeout "$BUILD_S" cmake -S . -B build/gpu -DPython_EXECUTABLE="$(command -v "$PY")" \
    && timeout "$BUILD_S" cmake --build build/gpu --parallel "$(nproc)" \
    && cmake --install build/gpu --prefix . && echo "cmake" > "$log.how" && return
  echo "source tree alone, without native modules" > "$log.how"
}

how="none, a dry run"
case " $* " in
  *" --dry "*) ;;
  *)
    build > "$log" 2>&1
    how=$(cat "$log.how")
    rm -f "$log.how"
    echo "build: $how, $(($(date +%s) - started)) s"
    "$PY" -c 'import importlib.util as u; print("native modules:", [n for n in ("_cpu", "_cuda") if u.find_spec("orthofast." + n)])'
    ;;
esac

copies=()
if [[ -n "$OUT" ]]; then
  mkdir -p "$OUT"
  cp "$log" "$OUT/build.log"
  copies=(--copy "$OUT/gpu.json")
fi
"$PY" -m benchmarks.gpu_run --budget-s "$BUDGET_S" --spent-s "$(($(date +%s) - started))" --build "$how" \
  ${copies[@]+"${copies[@]}"} "$@" 2>&1 | tee ${OUT:+"$OUT/gpu_run.log"}
exit "${PIPESTATUS[0]}"
