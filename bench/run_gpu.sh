#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, op tests, memory and race checks, goldens, bench.
#
#   bash bench/run_gpu.sh [--dry-run] [--stages a,b,...] FOLDER
#
# For a machine with a GPU, nvcc, and a python3 with torch, pybind11, ninja, numpy and safetensors; no network is
# needed. FOLDER gets log.txt (all stages), summary.json, and the bench's rows.jsonl, bench.{json,md,csv,png}. Each
# stage has a time limit of its own inside a total of SECONDS_TOTAL (default 570); a stage that fails does not keep
# the next ones from running. The exit status is 0 if all stages passed, 1 if one failed, 2 for wrong usage.
# MING_RT_COMMIT names the commit in the report where the folder is no git checkout.
set -uo pipefail

usage() {
  echo "usage: bash bench/run_gpu.sh [--dry-run] [--stages facts,build,...] FOLDER" >&2
  exit 2
}

all=(facts build tests memcheck racecheck goldens bench)
declare -A limit=([facts]=15 [build]=240 [tests]=90 [memcheck]=45 [racecheck]=45 [goldens]=40 [bench]=400)
total=${SECONDS_TOTAL:-570}
bench_least=120 # what the stages before the bench must leave it

dry= stages=("${all[@]}") out=
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --stages)
      (($# > 1)) || usage
      IFS=, read -ra stages <<<"$2"
      shift
      ;;
    -*) usage ;;
    *)
      [ -z "$out" ] || usage
      out=$1
      ;;
  esac
  shift
done
[ -n "$out" ] || usage
for stage in "${stages[@]}"; do
  [[ -v limit[$stage] ]] || { echo "run_gpu.sh: unknown stage '$stage', expected some of ${all[*]}" >&2; exit 2; }
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -z "$dry" ]; then
  mkdir -p "$out" || exit 2
  out=$(cd "$out" && pwd)
  : >"$out/log.txt"
fi
cd "$root" || exit 2
export MING_RT_COMMIT=${MING_RT_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}

# What an installation would look like: the package with the bench inside it.
link_site() {
  mkdir -p "$site/ming_rt" && ln -sfn "$root"/ming_rt/* "$site/ming_rt/" && ln -sfn "$root/bench" "$site/ming_rt/bench"
}

sanitize() {
  local tool=$1
  shift
  # Only our own kernels: torch's are not ours to check, and checking is slow.
  PYTHONPATH=$site compute-sanitizer --tool "$tool" --kernel-regex kns=ming --error-exitcode 9 --print-limit 20 \
    "$@" python3 -m ming_rt.bench.gpu_small cuda
}

run_facts() {
  nvidia-smi
  nvcc --version
  python3 -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.get_device_name(0))'
}
run_build() {
  MING_RT_MODULES=cpu,cuda MAX_JOBS=$(nproc) python3 setup.py build_ext --inplace
}
run_tests() {
  python3 -m pytest python_tests/ops -k cuda --continue-on-collection-errors -p no:cacheprovider
}
run_memcheck() {
  sanitize memcheck
}
run_racecheck() {
  sanitize racecheck --racecheck-report analysis
}
run_goldens() {
  python3 -m pytest python_tests/golden -m golden -k cuda --continue-on-collection-errors -p no:cacheprovider
}
run_bench() {
  # The last minute of its limit is for the report.
  PYTHONPATH=$site python3 -m ming_rt.cli bench --device cuda --budget $(($1 > 90 ? $1 - 60 : 30)) --out "$out"
}

describe() {
  declare -f "run_$1" | sed -e '1,2d' -e '$d' -e 's/^ */    /'
}

began=$SECONDS failed=0 summary=
for stage in "${stages[@]}"; do
  left=$((total - (SECONDS - began)))
  [ "$stage" = bench ] || left=$((left - bench_least))
  allowed=$((limit[$stage] < left ? limit[$stage] : left))
  if [ -n "$dry" ]; then
    echo "$stage: at most ${limit[$stage]} s"
    describe "$stage"
    continue
  fi
  start=$SECONDS status=124 stage_log=$site/$stage.log
  : >"$stage_log"
  echo "== $stage (at most $allowed s)" | tee -a "$out/log.txt"
  if ((allowed > 0)); then
    link_site
    export -f "run_$stage" sanitize
    export root site out
    timeout -k 5 "$allowed" bash -c "set -euo pipefail; run_$stage $allowed" >"$stage_log" 2>&1
    status=$?
  fi
  took=$((SECONDS - start))
  cat "$stage_log" >>"$out/log.txt"
  if ((status)); then
    failed=1
    tail -n 25 "$stage_log"
  fi
  echo "== $stage: exit $status after $took s" | tee -a "$out/log.txt"
  summary+="${summary:+, }\"$stage\": {\"exit\": $status, \"seconds\": $took, \"limit\": $allowed}"
  printf '{"commit": "%s", "stages": {%s}}\n' "$MING_RT_COMMIT" "$summary" >"$out/summary.json"
done
[ -n "$dry" ] && exit 0
if [ -f "$out/bench.md" ]; then head -n 24 "$out/bench.md"; fi
cat "$out/summary.json"
exit $failed
