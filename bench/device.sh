#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under ten minutes: build, tests, sanitizers, benchmarks.
#
#   bash bench/device.sh            every part that has not passed on this commit yet
#   bash bench/device.sh PART...    these parts: build test step_wan pair_loss memcheck racecheck
#                                   synccheck step_wan_more step_small step_small_more
#                                   step_cogvideox_2b step_cogvideox_5b step_attention overhead ncu
#
# Writes $OUT (default bench/results): a log per part, the benchmarks' JSON lines, and device.jsonl
# with a line per part. Ends with 1 if a part failed; a part that cannot run here is said to be skipped.
#
#   PYTHON            the interpreter that has PyTorch (default python3)
#   FASTPREF_WHEELS   a folder of wheels that this interpreter lacks; nothing is downloaded
#   FASTPREF_COMMIT   what the results are of, where the sources lie without their history
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PARTS=(build test step_wan pair_loss memcheck racecheck synccheck step_wan_more step_small
  step_small_more step_cogvideox_2b step_cogvideox_5b step_attention overhead ncu)
export OUT=${OUT:-bench/results} PYTHON=${PYTHON:-python3}
SKIPPED=77 # a part's exit code when it cannot run here
WAN=16,21,60,104
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

skip() {
  echo "skipped: $*"
  exit $SKIPPED
}

need() { command -v "$1" >/dev/null || skip "$1 is not installed"; }

need_gpu() {
  local seen
  seen=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())') || exit 1
  [[ $seen == True ]] || skip "PyTorch sees no GPU"
}

# Without kernels of its own a fresh machine would time the pure PyTorch code.
need_kernels() {
  need_gpu
  "$PYTHON" -W ignore -c 'import sys, fastpref; sys.exit(not fastpref.build_info()["cuda"])' ||
    part_build
}

# Test files that import what is not installed here are named and left out; never test_cuda.py.
part_test() {
  need_kernels
  local ignore=() file log
  log=$("$PYTHON" -m pytest -m cuda --collect-only -q 2>&1)
  while read -r file; do
    echo "left out: $file does not import here"
    ignore+=("--ignore=$file")
  done < <(sed -n 's/^ERROR \(tests[^ ]*\.py\).*/\1/p' <<<"$log" | sort -u)
  ((${#ignore[@]})) && grep -E '^E +[A-Za-z]*Error' <<<"$log" | sort -u
  if [[ " ${ignore[*]-} " == *" --ignore=tests/test_cuda.py "* ]]; then return 1; fi
  "$PYTHON" -m pytest -m cuda -q -rs --durations=10 "${ignore[@]}"
}

part_build() {
  need nvcc
  FASTPREF_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -c 'import fastpref; print(fastpref.build_info())'
}

# Each tensor in an allocation of its own, so that a step outside is seen.
sanitize() {
  need_kernels
  need compute-sanitizer
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k sanitizer
}
part_memcheck() { sanitize memcheck; }
part_racecheck() { sanitize racecheck --kernel-regex kns=fastpref; }
part_synccheck() { sanitize synccheck --kernel-regex kns=fastpref; }

# bench MODULE ARGUMENTS...: its rows go to $OUT.
bench() {
  need_kernels
  "$PYTHON" -m "bench.$1" "${@:2}" --output "$OUT/$1.jsonl"
}
part_pair_loss() { bench pair_loss && bench pair_loss --objective sdpo --pairs 4; }
part_overhead() { bench overhead; }

OURS=(deferred/none+compile deferred/none+compile+cached)
part_step_wan() { bench step --family wan --variants B1 B4 "${OURS[@]}" --rounds 3; }
part_step_wan_more() {
  bench step --family wan --rounds 3 \
    --variants B0 B5 joint/full deferred/full deferred/attention deferred/attention+compile
}
part_step_small() {
  bench step --family wan --shape 1x256x256 --minutes 4 && # 256 tokens
    bench step --family wan --shape 1x480x832 --minutes 4
}
part_step_small_more() {
  bench step --family wan --shape 17x256x256 --minutes 4 && bench step --family toy --minutes 4
}
part_step_attention() {
  bench step --family wan --attention auto --variants "${OURS[@]}" --rounds 3
}
part_step_cogvideox_2b() {
  bench step --family cogvideox-2b --variants B1 B4 "${OURS[@]}" --rounds 3
}
part_step_cogvideox_5b() {
  bench step --family cogvideox-5b --variants B1 B4 "${OURS[@]}" --rounds 3
}

# Hardware counters of each kernel, once, with cold caches: a JSON line per launch.
part_ncu() {
  need_kernels
  need ncu
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --csv --page raw --clock-control none --metrics "$metrics" \
    --kernel-name "regex:(noise|error|grad|epilogue)_kernel" "$PYTHON" - "$WAN" >"$OUT/ncu.csv" <<'PROGRAM' || return 1
import sys

import torch

import fastpref

shape = [int(size) for size in sys.argv[1].split(",")]
gpu, dpo = torch.device("cuda"), fastpref.objective("dpo", beta=500.0)
x0, pred, ref = torch.randn(3, 2, *shape, device=gpu).bfloat16()
one = torch.ones(1, device=gpu)
number = torch.ones(1, dtype=torch.int64, device=gpu)
draws = fastpref.Draws(1, number, number)
target = fastpref.Target(x0, draws, one, -one)
pred.requires_grad_()
fastpref.add_noise(x0, draws, 0.5 * one, 0.5 * one)
for y in (target, x0):
    fastpref.preference_loss(pred, y, ref, dpo).loss.backward()
    fastpref.unit_seed(pred.detach(), y)
torch.cuda.synchronize()
PROGRAM
  "$PYTHON" - "$OUT/ncu.csv" "$OUT/ncu.jsonl" <<'PROGRAM'
import csv
import json
import sys

with open(sys.argv[1]) as file:
    rows = list(csv.DictReader(line for line in file if line.startswith('"')))
units, launches = rows[0], rows[1:]
assert launches, "ncu saw no kernel of ours"
with open(sys.argv[2], "a") as file:
    for row in launches:
        counters = {
            f"{name} {units[name]}".strip(): float(value.replace(",", ""))
            for name, value in row.items()
            if "__" in name and value.replace(",", "").replace(".", "").isdigit()
        }
        file.write(json.dumps({"kernel": row["Kernel Name"], **counters}) + "\n")
        print(row["Kernel Name"][:60], counters)
PROGRAM
}

# ---- running them ----

if [[ ${1-} == --run ]]; then # one part, in a process that timeout can end
  "part_$2"
  exit
fi

mkdir -p "$OUT"
if [[ -n ${FASTPREF_WHEELS-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
    "$FASTPREF_WHEELS"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site
fi

commit=${FASTPREF_COMMIT-}
if [[ -z $commit ]]; then
  commit=$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)
  git diff --quiet HEAD -- . ':!bench/results' 2>/dev/null || commit+=-dirty
fi
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
passed_here() {
  [[ $commit != *-dirty ]] &&
    grep -qs "\"part\": \"$1\", \"result\": \"passed\".*\"commit\": \"$commit\", \"device\": \"$device\"" \
      "$OUT/device.jsonl"
}

wanted=("$@")
if ((!${#wanted[@]})); then
  for part in "${PARTS[@]}"; do
    # The build lies in the working tree: it is made again where the tree is fresh.
    if [[ $part != build ]] && passed_here "$part"; then
      echo "$part: passed on $commit before"
    else
      wanted+=("$part")
    fi
  done
fi

failed=() skipped=()
for part in "${wanted[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "bench/device.sh: unknown part $part, expected one of: ${PARTS[*]}" >&2
    exit 2
  fi
  echo "=== $part"
  start=$SECONDS
  timeout -k 10 590 bash bench/device.sh --run "$part" 2>&1 | tee "$OUT/$part.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) result=passed ;;
    "$SKIPPED") result=skipped skipped+=("$part") ;;
    *) result=failed failed+=("$part") ;;
  esac
  echo "=== $part: $result after $((SECONDS - start)) s (exit code $code)"
  printf '{"part": "%s", "result": "%s", "seconds": %d, "commit": "%s", "device": "%s"}\n' \
    "$part" "$result" $((SECONDS - start)) "$commit" "$device" >>"$OUT/device.jsonl"
done

((${#skipped[@]})) && echo "skipped here: ${skipped[*]}"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "no part failed"
