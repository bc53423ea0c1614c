#!/usr/bin/env bash
# Everything that needs a GPU, the most telling first, in one file that a bare machine can run.
#
#   bash bench/device.sh                every part that has not passed on these sources yet
#   bash bench/device.sh PART...        these parts, see TABLE below
#   bash bench/device.sh --plan 80      what would run, in which order, with predicted seconds and
#                                       gigabytes, on a card of 80 GiB; needs no GPU
#   bash bench/device.sh --wheels FILE  which packages a machine lacks that has those of FILE (pip list)
#
# Writes $OUT (default bench/results): device.log, the benchmarks' JSON lines, Inductor's compiled
# code, and device.jsonl with a line per part: passed, failed, skipped (it cannot run here), cut (the
# call ended) or slow (its share of the time was not enough: it comes again after the others, with all
# that is left). Exit code 1: a part failed; 3: none did, and the same command goes on with what is left.
#
# On a machine that is lent for some minutes a call, gives back what is in $OUT and empties it before
# the next: the same command again and again. A part begins where its predicted time is left, so the
# last minutes go to shorter ones. After each call what came back goes to bench/results, which travels
# along, says what has passed and has the compiled code (inductor.zip is not committed: where only what
# is committed travels, name it among what is carried):
#
#   FASTPREF_SECONDS=570 FASTPREF_COMMIT=0123456789 bash bench/device.sh            there
#   cd CAME_BACK && for file in *.log *.jsonl; do cat "$file" >>REPOSITORY/bench/results/"$file"; done
#   cp inductor.zip REPOSITORY/bench/results                                         here
#
# Packages that it lacks go along as wheels (diffusers is enough for the benchmarks and the kernels'
# tests); for Python 3.12 on x86-64:
#
#   bash bench/device.sh --wheels FILE >lacking && pip download --no-deps --only-binary=:all: \
#     --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl -r lacking
#
#   PYTHON            the interpreter that has PyTorch (default python3)
#   FASTPREF_WHEELS   a folder of wheels that this interpreter lacks; nothing is downloaded
#   FASTPREF_COMMIT   what the results are of, where the sources lie without their history
#   FASTPREF_SECONDS  how long the whole call may take (default: as long as the parts do)
#   FASTPREF_REHEARSE 1: no GPU is asked for, benchmarks run on the CPU with tiny shapes; for this script
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

# Part, seconds predicted, the most that it gets beside others. Of tables (-) bench.step predicts. The
# first five are a call of 570 s; their seconds are those of an H100 with 16 cores of a host.
TABLE="
build 25 90
test_cuda 40 120
attention 20 60
step_wan - 395
pair_loss 90 180
step_small_256 - 270
margin_noise 55 150
memcheck 45 120
test_more 60 150
step_cogvideox_2b - 400
step_cogvideox_5b - 500
racecheck 60 180
ncu 30 90
step_frames_1 - 150
step_frames_17 - 150
step_frames_49 - 200
step_frames_161 - 400
step_flash3 - 300
step_wan_more - 500
step_wan_half - 450
step_small_480 - 270
step_small_17 - 270
step_toy - 270
synccheck 60 180
overhead 60 180
spo 60 150
step_attention - 300
step_cogvideox_2b_more - 500
step_cogvideox_5b_more - 500
"
export OUT=${OUT:-bench/results} PYTHON=${PYTHON:-python3}
SKIPPED=77 CUT=75 # a part's exit codes when it cannot run here, and when there was no time for it
MOST=590          # seconds of a part that was named, or tried before
LEAST=120         # seconds in which a table says something
WAN=16,21,60,104
CARRIED=bench/results/inductor.zip
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
REHEARSE=${FASTPREF_REHEARSE-}
quick=() loss=() noise=() table=()
if [[ $REHEARSE ]]; then # everything small; the last of an option counts
  quick=(--device cpu --rounds 2) loss=(--device cpu --rounds 2 --shapes cogvideox)
  noise=(--device cpu --modes deferred) table=(--device cpu --rounds 2 --family tiny --shape 1x64x64)
fi

skip() {
  echo "skipped: $*"
  exit $SKIPPED
}

need() { command -v "$1" >/dev/null || skip "$1 is not installed"; }

# Without kernels of its own a fresh machine would time the pure PyTorch code. Looked at once a call.
need_kernels() {
  [[ -e ${SCRATCH-}/ready ]] && return
  local seen gpu built
  seen=$("$PYTHON" -W ignore -c 'import sys, torch, fastpref
print(torch.cuda.is_available(), bool(fastpref.build_info()[sys.argv[1]]))' \
    "$([[ $REHEARSE ]] && echo cpu || echo cuda)") || exit 1
  read -r gpu built <<<"$seen"
  [[ $gpu == True || $REHEARSE ]] || skip "PyTorch sees no GPU"
  [[ $built == True ]] || part_build || exit 1
  [[ -z ${SCRATCH-} ]] || touch "$SCRATCH/ready"
}

part_build() {
  local cuda=${FASTPREF_CUDA:-1}
  [[ $cuda == 0 ]] || need nvcc
  FASTPREF_CUDA=$cuda "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -c 'import fastpref; print(fastpref.build_info())'
}

part_test_cuda() {
  need_kernels
  "$PYTHON" -m pytest -q -rs --durations=5 tests/loss/test_cuda.py
}

# Test files that import what is not installed here are named and left out.
part_test_more() {
  need_kernels
  local ignore=(--ignore=tests/loss/test_cuda.py) file log
  log=$("$PYTHON" -m pytest -m cuda --collect-only -q "${ignore[@]}" 2>&1)
  while read -r file; do
    echo "left out: $file does not import here"
    ignore+=("--ignore=$file")
  done < <(sed -n 's/^ERROR \(tests[^ ]*\.py\).*/\1/p' <<<"$log" | sort -u)
  ((${#ignore[@]} > 1)) && grep -E '^E +[A-Za-z]*Error' <<<"$log" | sort -u
  "$PYTHON" -m pytest -m cuda -q -rs --durations=10 "${ignore[@]}"
}

# Tools that count or watch on the card: nothing to rehearse.
need_tool() {
  [[ -z $REHEARSE ]] || skip "$1 watches a GPU"
  need_kernels
  need "$1"
}

# Each tensor in an allocation of its own, so that a step outside is seen.
sanitize() {
  need_tool compute-sanitizer
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/loss/test_cuda.py -k sanitizer
}
part_memcheck() { sanitize memcheck; }
part_racecheck() { sanitize racecheck --kernel-regex kns=fastpref; }
part_synccheck() { sanitize synccheck --kernel-regex kns=fastpref; }

# bench MODULE ARGUMENTS...: its rows go to $OUT, which holds eight files at most.
bench() {
  need_kernels
  "$PYTHON" -m "bench.$1" "${@:2}" --output "$OUT/${rows:-$1}.jsonl"
}
part_attention() { rows=kernels bench attention "${quick[@]}"; }
part_pair_loss() {
  bench pair_loss "${loss[@]}" && bench pair_loss --objective sdpo --pairs 4 "${loss[@]}"
}
part_margin_noise() { bench margin_noise --family wan "${noise[@]}"; }
part_overhead() { bench overhead "${quick[@]}"; }
part_spo() { rows=overhead bench spo --family wan --shape 9x480x832 --rounds 3 "${table[@]}"; }

# step ARGUMENTS...: a table in what is left of the part's time, less the start and the end. Variants
# that are predicted not to fit the card are named there and not compiled.
step() {
  if [[ -n ${FASTPREF_PLAN-} ]]; then
    "$PYTHON" -m bench.step "$@" --plan "$FASTPREF_PLAN"
    return
  fi
  need_kernels
  local left=$((FASTPREF_PART - SECONDS - 30))
  if ((left < 60)); then
    echo "no time left for a table"
    return $CUT
  fi
  PYTORCH_ALLOC_CONF=expandable_segments:True "$PYTHON" -m bench.step "$@" "${table[@]}" \
    --minutes "$((left / 60)).$(printf %02d $((left % 60 * 100 / 60)))" \
    --inductor $CARRIED --output "$OUT/step.jsonl"
  case $? in
    0) ;;
    3) return $CUT ;; # without a variant
    *) return 1 ;;
  esac
}

# Prepared in this order: the numbers that count are there if time runs out.
headline() { step --rounds 3 --variants B1 "$@"; }
rungs() {
  headline B0 deferred/attention+compile+cached deferred/attention deferred/full joint/full "$@"
}
LOOSE=(deferred/none+compile deferred/none+compile+loose) # what rounding as eager does costs
NONE=(deferred/none+compile+cached deferred/none+compile)
ATTENTION=(deferred/attention+compile+cached deferred/attention+compile)
one_sample_fits() { headline "${NONE[@]}" B4 deferred/attention+compile B5 --family "$1"; }
part_step_wan() { one_sample_fits wan; }
part_step_cogvideox_2b() { one_sample_fits cogvideox-2b; }
part_step_cogvideox_5b() { headline "${NONE[@]}" "${ATTENTION[@]}" B4 B5 --family cogvideox-5b; }
part_step_wan_more() { rungs "${LOOSE[@]}" --family wan; }
part_step_cogvideox_2b_more() { rungs --family cogvideox-2b; }
part_step_cogvideox_5b_more() { rungs --family cogvideox-5b; }

# The shared prefix: adapters on the upper half of the blocks in every variant, B1 included.
part_step_wan_half() {
  headline deferred/none+compile B4 deferred/attention+compile B5 --family wan --adapters half
}
part_step_attention() { headline "${NONE[@]}" --family wan --attention auto; }
part_step_flash3() {
  if [[ -z ${FASTPREF_PLAN-} ]]; then
    "$PYTHON" -c 'import flash_attn_interface' 2>/dev/null || skip "flash-attn-3 is not installed"
  fi
  headline "${NONE[@]}" --family wan --attention flash3
}
part_step_small_256() { step --family wan --shape 1x256x256; } # 256 tokens
part_step_small_480() { step --family wan --shape 1x480x832; }
part_step_small_17() { step --family wan --shape 17x256x256; }
part_step_toy() { step --family toy; }

# Seconds a pair against frames, one variant at all lengths; 81 frames stand in the tables of wan.
frames() { headline deferred/attention+compile --family wan --shape "$1x480x832"; }
part_step_frames_1() { frames 1; }
part_step_frames_17() { frames 17; }
part_step_frames_49() { frames 49; }
part_step_frames_161() { frames 161; }

# Hardware counters of each kernel, once, with cold caches: a JSON line per launch.
part_ncu() {
  need_tool ncu
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --csv --page raw --clock-control none --metrics "$metrics" \
    --kernel-name "regex:(noise|error|grad|epilogue)_kernel" "$PYTHON" - "$WAN" >"$SCRATCH/ncu.csv" <<'PROGRAM' || return 1
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
  "$PYTHON" - "$SCRATCH/ncu.csv" "$OUT/kernels.jsonl" "$metrics" <<'PROGRAM'
import csv
import json
import sys

import torch

from bench import timing

with open(sys.argv[1]) as file:
    rows = list(csv.DictReader(line for line in file if line.startswith('"')))
units, launches = rows[0], rows[1:]
assert launches, "ncu saw no kernel of ours"
facts, metrics = timing.environment(torch.device("cuda", 0)), sys.argv[3].split(",")
with open(sys.argv[2], "a") as file:
    for row in launches:
        counters = {f"{m} {units[m]}".strip(): float(row[m].replace(",", "")) for m in metrics}
        own = {"bench": "ncu", "kernel": row["Kernel Name"], **counters}
        file.write(json.dumps(own | facts) + "\n")
        print(row["Kernel Name"][:60], counters)
PROGRAM
}

# ---- running them ----

# of_part PART: "SECONDS MOST" of the table.
of_part() { sed -n "s/^$1 //p" <<<"$TABLE"; }

# What would run, in calls of FASTPREF_SECONDS: each takes the parts in order that have their predicted
# time left (below a table begins with less), and builds first.
plan() {
  local budget=${FASTPREF_SECONDS:-570} call=0 left part takes most begin next=() open=()
  local -A seconds share lines
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  sed -n 's/ - .*//p' <<<"$TABLE" | # all tables' predictions, as many at once as there are cores
    FASTPREF_PLAN=$1 xargs -P "$(nproc)" -I{} \
      bash -c 'bash bench/device.sh --run {} >"$0/{}" 2>"$0/{}.err"' "$SCRATCH"
  while read -r part takes most; do
    open+=("$part") share[$part]=$most
    if [[ $takes == - ]]; then
      lines[$part]=$(<"$SCRATCH/$part")
      takes=$(sed -n '$s/^predicted \([0-9]*\).* s$/\1/p' <<<"${lines[$part]}")
      if [[ -z $takes ]]; then
        echo "bench/device.sh: no prediction of $part:" >&2
        cat "$SCRATCH/$part"{.err,} >&2
        return 1
      fi
    fi
    seconds[$part]=$takes
  done < <(sed '/^$/d' <<<"$TABLE")
  while ((${#open[@]})); do
    echo "--- call $((++call)), $budget s on a card of $1 GiB"
    left=$((budget - 10)) next=()
    ((call == 1)) || ((left -= seconds[build]))
    begin=1 # a call's first part begins whatever it takes
    for part in "${open[@]}"; do
      takes=$((seconds[$part] < share[$part] ? seconds[$part] : share[$part]))
      if ((takes > left && !begin)); then
        next+=("$part")
        continue
      fi
      begin=0
      ((left -= takes))
      printf '%-24s %4d s, at most %d s\n' "$part" "${seconds[$part]}" "${share[$part]}"
      [[ -z ${lines[$part]-} ]] || sed '$d; s/^/    /' <<<"${lines[$part]}"
    done
    open=("${next[@]}")
  done
}

case ${1-} in
  --run)        # one part, in a process that timeout can end
    trap : TERM # what it runs is ended too, and has the last word
    "part_$2"
    exit
    ;;
  --plan)
    plan "${2:?--plan: of how many GiB is the card?}"
    exit
    ;;
  --wheels)
    "$PYTHON" -m bench.wheels "${@:2}"
    exit
    ;;
esac

mkdir -p "$OUT"
say() { echo "$*" | tee -a "$OUT/device.log"; }
SCRATCH=$(mktemp -d) # of this call
export SCRATCH
trap 'rm -rf "$SCRATCH"' EXIT

if [[ -n ${FASTPREF_WHEELS-} ]]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SCRATCH/site" \
    "$FASTPREF_WHEELS"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$SCRATCH/site
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

mapfile -t parts < <(sed -n 's/^\([a-z_0-9]*\) .*/\1/p' <<<"$TABLE")
wanted=("$@") all_of_it=" $* " # parts that are not held to their share of the time
if ((!${#wanted[@]})); then
  last=()
  for part in "${parts[@]}"; do
    # The build lies in the working tree: it is made again where the tree is fresh.
    if [[ $part != build ]] && (($(count_of "$part" passed))); then
      say "$part: passed on $commit before"
    elif (($(count_of "$part" '\(failed\|slow\)') || $(count_of "$part" cut) > 1)); then
      last+=("$part") # after those that were never tried
    else
      wanted+=("$part")
    fi
  done
  wanted+=("${last[@]}") all_of_it=" ${last[*]-} "
fi

failed=() skipped=() cut=()
for part in "${wanted[@]}"; do
  read -r seconds most <<<"$(of_part "$part")"
  if [[ -z $most ]]; then
    echo "bench/device.sh: unknown part $part, expected one of: ${parts[*]}" >&2
    exit 2
  fi
  [[ $all_of_it != *" $part "* ]] || most=$MOST
  share=$most
  if [[ -n ${FASTPREF_SECONDS-} ]]; then
    left=$((FASTPREF_SECONDS - SECONDS - 10))
    [[ $seconds != - ]] || seconds=$LEAST
    if ((left < seconds)); then
      cut+=("$part")
      continue
    fi
    ((left < most)) && most=$left
  fi
  say "=== $part"
  start=$SECONDS
  FASTPREF_PART=$most timeout -k 10 "$most" bash bench/device.sh --run "$part" 2>&1 |
    tee -a "$OUT/device.log"
  code=${PIPESTATUS[0]}
  # 137 is also what the machine ends that is out of memory: no matter of time
  ((code != 137 || SECONDS - start >= most)) || code=1
  case $code in
    0) result=passed ;;
    "$SKIPPED") result=skipped skipped+=("$part") ;;
    "$CUT" | 124 | 137) # the last two by timeout
      if ((most < share)); then
        result=cut cut+=("$part")
      elif ((code == CUT || share < MOST)); then
        result=slow cut+=("$part")
      else # it has all of the time and needs more: a mistake
        result=failed failed+=("$part")
      fi
      ;;
    *) result=failed failed+=("$part") ;;
  esac
  say "=== $part: $result after $((SECONDS - start)) s (exit code $code)"
  row='{"part": "%s", "result": "%s", "seconds": %d, "commit": "%s", "device": "%s", "time": "%s"}\n'
  printf "$row" "$part" "$result" $((SECONDS - start)) "$commit" "$device" "$(date -u +%FT%T.%3NZ)" \
    >>"$OUT/device.jsonl"
  [[ $CARRIED -nt $OUT/inductor.zip ]] && cp -p "$CARRIED" "$OUT/inductor.zip"
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
