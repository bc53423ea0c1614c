#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under ten minutes: build, tests, sanitizers, benchmarks.
#
#   bash bench/device.sh            every part that has not passed on these sources yet
#   bash bench/device.sh PART...    these parts, see PARTS below
#
# Writes $OUT (default bench/results): device.log, the benchmarks' JSON lines, and device.jsonl with a
# line per part: passed, failed, skipped (it cannot run here) or cut (there was no time for all of it).
# Exit code 1: a part failed; 3: none did, and the same command goes on with what is left.
#
# On a machine that is lent for some minutes a call, gives back what is in $OUT and empties it before
# the next: the same command again and again, the most telling parts come first. After each call what
# came back is appended to bench/results, which travels along and says what has passed:
#
#   FASTPREF_SECONDS=580 FASTPREF_COMMIT=0123456789 bash bench/device.sh            there
#   cd CAME_BACK && for file in *; do cat "$file" >>REPOSITORY/bench/results/"$file"; done    here
#
#   PYTHON            the interpreter that has PyTorch (default python3)
#   FASTPREF_WHEELS   a folder of wheels that this interpreter lacks; nothing is downloaded
#   FASTPREF_COMMIT   what the results are of, where the sources lie without their history
#   FASTPREF_SECONDS  how long the whole call may take (default: as long as the parts do)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PARTS=(build test step_wan pair_loss step_wan_more step_cogvideox_2b step_cogvideox_5b memcheck
  step_wan_half step_small_256 step_small_480 step_small_17 step_toy step_frames_1 step_frames_17
  step_frames_49 step_frames_161 racecheck synccheck step_cogvideox_2b_more step_cogvideox_5b_more
  step_attention ncu overhead)
export OUT=${OUT:-bench/results} PYTHON=${PYTHON:-python3}
SKIPPED=77 CUT=75 # a part's exit codes when it cannot run here, and when there was no time for it
MOST=590          # seconds of a part
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
    part_build || exit 1
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

# What a card holds of a sample's activations: all of them on large cards (a CogVideoX-5B sample's
# are predicted at 80 GB), else what the attention kernels gave.
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
if ((${memory:-0} > 100000)); then kept=none other=attention; else kept=attention other=none; fi

# step ARGUMENTS...: a table in what is left of the part's time, less the start and the end.
step() {
  need_kernels
  local left=$((FASTPREF_PART - SECONDS - 40))
  if ((left < 60)); then
    echo "no time left for a table"
    return $CUT
  fi
  PYTORCH_ALLOC_CONF=expandable_segments:True "$PYTHON" -m bench.step "$@" \
    --minutes "$((left / 60)).$(printf %02d $((left % 60 * 100 / 60)))" --output "$OUT/step.jsonl"
  case $? in
    0) ;;
    3) return $CUT ;; # without a variant
    *) return 1 ;;
  esac
}

# Prepared in this order: the numbers that count are there if time runs out.
headline() {
  step --rounds 3 "$@" \
    --variants B1 "deferred/$kept+compile+cached" "deferred/$kept+compile" B4 B5
}
rung_by_rung() {
  step --rounds 3 "$@" \
    --variants B1 B0 "deferred/$other+compile" deferred/attention deferred/full joint/full
}
part_step_wan() { headline --family wan; }
part_step_wan_more() { rung_by_rung --family wan; }
part_step_cogvideox_2b() { headline --family cogvideox-2b; }
part_step_cogvideox_2b_more() { rung_by_rung --family cogvideox-2b; }
part_step_cogvideox_5b() { headline --family cogvideox-5b; }
part_step_cogvideox_5b_more() { rung_by_rung --family cogvideox-5b; }

# The shared prefix: adapters on the upper half of the blocks in every variant, B1 included.
part_step_wan_half() {
  step --rounds 3 --family wan --adapters half --variants B1 "deferred/$kept+compile" B4 B5
}
part_step_attention() {
  step --rounds 3 --family wan --attention auto \
    --variants B1 "deferred/$kept+compile+cached" "deferred/$kept+compile"
}
part_step_small_256() { step --family wan --shape 1x256x256; } # 256 tokens
part_step_small_480() { step --family wan --shape 1x480x832; }
part_step_small_17() { step --family wan --shape 17x256x256; }
part_step_toy() { step --family toy; }

# Seconds a pair against frames, one variant at all lengths; 81 frames stand in the tables of wan.
frames() {
  step --rounds 3 --family wan --shape "$1x480x832" --variants B1 deferred/attention+compile
}
part_step_frames_1() { frames 1; }
part_step_frames_17() { frames 17; }
part_step_frames_49() { frames 49; }
part_step_frames_161() { frames 161; }

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
  trap : TERM                 # what it runs is ended too, and has the last word
  "part_$2"
  exit
fi

mkdir -p "$OUT"
say() { echo "$*" | tee -a "$OUT/device.log"; }

if [[ -n ${FASTPREF_WHEELS-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
    "$FASTPREF_WHEELS"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site
fi

# The last commit of something else than results: those are committed between two calls.
sources=(. ':!bench/results')
commit=${FASTPREF_COMMIT-}
if [[ -z $commit ]] && commit=$(git log -1 --format=%h --abbrev=10 -- "${sources[@]}" 2>/dev/null); then
  git diff --quiet HEAD -- "${sources[@]}" || commit+=-dirty
fi
remembered=1 # what has passed
case ${commit:=unknown} in
  unknown)
    say "the commit is unknown (no git history, FASTPREF_COMMIT is not set): every part runs"
    remembered=0
    ;;
  *-dirty)
    say "the sources are not those of a commit ($commit): every part runs"
    remembered=0
    ;;
esac
[[ $commit == unknown ]] || export FASTPREF_COMMIT=$commit # in the benchmarks' rows too
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)

# count_of PART RESULT: how often that came out on these sources and such a device, by the lines of this
# folder and of those that earlier calls left.
count_of() {
  local row="\"part\": \"$1\", \"result\": \"$2\""
  row+=".*\"commit\": \"$commit\", \"device\": \"$device\""
  ((remembered)) || row='no line'
  cat "$OUT/device.jsonl" bench/results/device.jsonl 2>/dev/null | sort -u | grep -c "$row"
}

wanted=("$@")
if ((!${#wanted[@]})); then
  last=()
  for part in "${PARTS[@]}"; do
    # The build lies in the working tree: it is made again where the tree is fresh.
    if [[ $part != build ]] && (($(count_of "$part" passed))); then
      say "$part: passed on $commit before"
    elif (($(count_of "$part" failed) || $(count_of "$part" cut) > 1)); then
      last+=("$part") # after those that were never tried
    else
      wanted+=("$part")
    fi
  done
  wanted+=("${last[@]}")
fi

failed=() skipped=() cut=()
for part in "${wanted[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "bench/device.sh: unknown part $part, expected one of: ${PARTS[*]}" >&2
    exit 2
  fi
  most=$MOST
  if [[ -n ${FASTPREF_SECONDS-} ]]; then
    left=$((FASTPREF_SECONDS - SECONDS))
    if ((left < 60)); then
      cut+=("$part")
      continue
    fi
    ((left - 10 < most)) && most=$((left - 10))
  fi
  say "=== $part"
  start=$SECONDS
  FASTPREF_PART=$most timeout -k 10 "$most" bash bench/device.sh --run "$part" 2>&1 |
    tee -a "$OUT/device.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) result=passed ;;
    "$SKIPPED") result=skipped skipped+=("$part") ;;
    "$CUT") result=cut cut+=("$part") ;;
    124 | 137) # by timeout: a part that has all of its time and needs more is a mistake
      if ((most < MOST)); then result=cut cut+=("$part"); else result=failed failed+=("$part"); fi
      ;;
    *) result=failed failed+=("$part") ;;
  esac
  say "=== $part: $result after $((SECONDS - start)) s (exit code $code)"
  row='{"part": "%s", "result": "%s", "seconds": %d, "commit": "%s", "device": "%s", "time": "%s"}\n'
  printf "$row" "$part" "$result" $((SECONDS - start)) "$commit" "$device" "$(date -u +%FT%T.%3NZ)" \
    >>"$OUT/device.jsonl"
done

((${#skipped[@]})) && say "skipped here: ${skipped[*]}"
if ((${#failed[@]})); then say "FAILED: ${failed[*]}"; else say "no part failed"; fi
if ((${#cut[@]})); then
  next="the same command goes on with them"
  (($# || !remembered)) && next="name them in the next call"
  say "no time for ${cut[*]}: $next"
fi
if ((${#failed[@]})); then exit 1; fi
if ((${#cut[@]})); then exit 3; fi
exit 0
