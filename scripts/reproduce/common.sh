# shellcheck shell=bash
# Sourced by its neighbours, which set `published`, `hub_id`, `methods`, `budgets`, `cost`, and the
# settings of fine-tuning, `question_settings` and `text_settings`.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=../setup_venv.sh
source "$root/scripts/setup_venv.sh"

# The middle of WikiText-103, which shares its beginning with WikiText-2, one of the tasks.
calibration="Salesforce/wikitext:wikitext-103-raw-v1@train[50%:52%]"
all_questions="openbookqa,piqa,arc-easy,arc-challenge,hellaswag,sciq,webqs,race"

usage() {
  cat <<TEXT
usage: bash ${0} [OPTION...]

Measures offsite-tuning on $published: eight question sets, then WikiText-2, and prints what is
published beside what was measured. Every number is from a run; what was not run says so.

Every OPTION goes to \`gradot compare\`, after the settings of this script, so that it replaces
them. A run to see whether everything is in place:

    QUESTIONS=openbookqa,webqs bash ${0} --limit 20 --batch-size 4 --steps 2 \\
        --emulator-steps 2 --seeds 1 --learning-rates 1

(WikiText-2 has no block to learn in fewer than several hundred lines, and says so.)

Environment:
    MODEL          checkpoint folder or hub id   (default: $hub_id)
    DATA           folder with a folder of data for each task, laid out as on the hub, to read
                   nothing from the network      (default: the hub)
    CALIBRATION    the model owner's text        (default: $calibration)
    OUT            folder of the results         (default: $default_out)
    QUESTIONS      some of the question sets, separated by commas
    ACCELERATOR    cpu, cuda or tpu, for what to install; found out by default
    GRADOT_PYTHON  an interpreter that has everything: none is set up, nothing is installed

OUT/questions and OUT/wikitext-2 hold result.json, table.md and plots, and cells/, from which the
same command goes on where it was stopped; OUT/published.md is the table that is printed. A cell is a
small JSON file, known by all that it depends on: those of several people may be put in one folder.

Methods: $methods
Budgets: $budgets

Cost: it has not been measured. Per task and method there are three fine-tuning runs and two or more
to have the best learning rate between two others, of five epochs on the question sets: RACE and
HellaSwag are by far the longest. Each run is also evaluated in full. $cost
Fewer: --seeds 1, --learning-rates 1, --methods gradot,layer-drop, QUESTIONS=arc-easy.

Not as published: three seeds; distillation and harmonizers train for 300 steps on the calibration
text instead of a shard of the Pile; the budget and text of GradOT's own runs are not known; CRaSh
is tuned as all others are, where its paper has a recipe of its own. Fine-tuning has no dropout
(published 0.1), takes the weights of the least development loss of eleven, and cuts a prompt that
is too long, never its answer. All blocks of the full model are tuned for as many epochs, at the
same rates, as the adapters (published: 3 epochs at 2e-5; WikiText-2 for 1 epoch in batches of 8
with weight decay 0.1).
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

# Exit code 3 is input that was refused: the other part may still be run, and a result may be
# there of all methods but one.
compare() {
  local code=0
  "$GRADOT_PYTHON" -m gradot_jax.cli.main compare --model "${MODEL:-$hub_id}" \
    ${DATA:+--data "$DATA"} --preset paper --calibration "${CALIBRATION:-$calibration}" \
    --num-sequences 512 --sequence-length 512 --num-bottom 2 --num-top 2 --seeds 3 \
    --methods "$methods" --budgets "$budgets" --dtype bfloat16 "$@" || code=$?
  [ "$code" -eq 0 ] || [ "$code" -eq 3 ] || exit "$code"
  failed=$((failed | code))
}

reproduce() {
  local option out failed=0 results=()
  default_out="reproduce_out/$(basename "$hub_id")"
  for option in "$@"; do
    case "$option" in
      -h | --help) usage && exit ;;
      --tasks* | --out* | --model*) refuse "set QUESTIONS, OUT or MODEL, not ${option%%=*}" ;;
    esac
  done
  out="${OUT:-$default_out}"
  prepare
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  compare --tasks "${QUESTIONS:-$all_questions}" --out "$out/questions" \
    "${question_settings[@]}" "$@"
  compare --tasks wikitext-2 --out "$out/wikitext-2" "${text_settings[@]}" "$@"
  for part in questions wikitext-2; do
    [ ! -f "$out/$part/result.json" ] || results+=("$out/$part/result.json")
  done
  if [ "${#results[@]}" -gt 0 ]; then
    "$GRADOT_PYTHON" -m gradot_jax.comparison.published --model "$published" --result "${results[@]}" \
      | tee "$out/published.md"
  fi
  exit "$failed"
}
