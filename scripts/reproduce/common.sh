# shellcheck shell=bash
# Sourced by its neighbours, which set `published`, `hub_id`, `methods`, `budgets` and a function
# `recipe TASK` that sets `steps`, `batch`, `rate` and `factors`.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=../setup_venv.sh
source "$root/scripts/setup_venv.sh"

# The middle of WikiText-103: its beginning is WikiText-2, which is one of the tasks.
calibration="Salesforce/wikitext:wikitext-103-raw-v1@train[50%:52%]"
all_tasks="openbookqa,piqa,arc-easy,arc-challenge,hellaswag,sciq,webqs,race,wikitext-2"

usage() {
  cat <<TEXT
usage: bash ${0} [OPTION...]

Measures offsite-tuning on $published: nine tasks, one after the other, then prints what is
published beside what was measured. Every number is from a run; what was not run says so.

Every OPTION goes to \`gradot compare\`, after the settings of this script, so that it replaces
them. A run to see whether everything is in place:

    TASKS=openbookqa,webqs bash ${0} --limit 20 --batch-size 4 --steps 2 --seeds 1

(WikiText-2 has no example to learn in fewer than several hundred lines.)

Environment:
    MODEL          checkpoint folder or hub id   (default: $hub_id)
    DATA           folder with a folder of data for each task, laid out as on the hub, to read
                   nothing from the network      (default: the hub)
    CALIBRATION    the model owner's text        (default: $calibration)
    OUT            folder of the results         (default: $default_out)
    TASKS          some of the tasks, separated by commas
    ACCELERATOR    cpu, cuda or tpu, for what to install; found out by default
    GRADOT_PYTHON  an interpreter that has everything: none is set up, nothing is installed

OUT holds cells/, from which the same command goes on where it was stopped; a folder for each
task with result.json, table.md and plots; and published.md.

Methods: $methods
Budgets: $budgets

Cost: it has not been measured. Per task and method there are three fine-tuning runs and a
further one for each further learning rate to try, of five epochs on the question sets: RACE and
HellaSwag are by far the longest, then PIQA and SciQ. Each run is also evaluated in full.
$cost
Fewer: --seeds 1, --learning-rates 1, --methods gradot,layer-drop, TASKS=arc-easy,arc-challenge.

Not as published: AdamW has b2 0.98 and its rate rises over ten steps, then falls linearly, on
every task; three seeds; distillation and harmonizers train for 300 steps on the calibration
text instead of a shard of the Pile; the budget and text of GradOT's own runs are not known.
TEXT
}

refuse() {
  echo "$*" >&2
  exit 2
}

accelerator() {
  if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    echo cuda
  elif compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

prepare() {
  local kind="${ACCELERATOR:-$(accelerator)}" here="$PWD"
  cd "$root"
  case "$kind" in
    cpu) setup_venv eval ;;
    cuda | tpu) setup_venv "$kind" eval ;;
    *) refuse "ACCELERATOR must be cpu, cuda or tpu, got $kind" ;;
  esac
  cd "$here"
}

# Compressions and zero-shot runs do not depend on the recipe: one folder of cells serves all tasks.
run_task() {
  local task="$1" code=0 file steps batch rate factors
  shift
  recipe "$task"
  rm -f "$out/result.json" "$out/$task/result.json"
  "$GRADOT_PYTHON" -m gradot_jax.cli.main compare --model "${MODEL:-$hub_id}" --tasks "$task" \
    ${DATA:+--data "$DATA"} --preset paper --calibration "${CALIBRATION:-$calibration}" \
    --num-sequences 512 --sequence-length 512 --num-bottom 2 --num-top 2 \
    --methods "$methods" --budgets "$budgets" --dtype bfloat16 --seeds 3 \
    --steps "$steps" --batch-size "$batch" --learning-rate "$rate" --learning-rates "$factors" \
    --out "$out" "$@" || code=$?
  # 3 is input that was refused: the other tasks may still be run, and a result may be there
  # of all methods but one.
  [ "$code" -eq 0 ] || [ "$code" -eq 3 ] || exit "$code"
  failed=$((failed | code))
  [ -f "$out/result.json" ] || return 0
  mkdir -p "$out/$task"
  for file in "$out/result.json" "$out/table.md" "$out"/*.png; do
    [ ! -f "$file" ] || mv "$file" "$out/$task/"
  done
  results+=("$out/$task/result.json")
}

reproduce() {
  local option task tasks out failed=0 results=()
  default_out="reproduce_out/$(basename "$hub_id")"
  for option in "$@"; do
    case "$option" in
      -h | --help) usage && exit ;;
      --tasks* | --out* | --model*) refuse "set TASKS, OUT or MODEL instead of ${option%%=*}" ;;
    esac
  done
  out="${OUT:-$default_out}"
  IFS=, read -ra tasks <<<"${TASKS:-$all_tasks}"
  for task in "${tasks[@]}"; do
    recipe "$task" || refuse "TASKS: unknown task $task, expected some of $all_tasks"
  done
  prepare
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  for task in "${tasks[@]}"; do run_task "$task" "$@"; done
  if [ "${#results[@]}" -gt 0 ]; then
    "$GRADOT_PYTHON" -m benchmarks.published --model "$published" --result "${results[@]}" \
      | tee "$out/published.md"
  fi
  exit "$failed"
}
