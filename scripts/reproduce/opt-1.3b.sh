#!/usr/bin/env bash
# The papers' experiments on OPT-1.3B, from nothing to the table; --help says more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

published="OPT-1.3B"
hub_id="facebook/opt-1.3b"
methods="full-finetune,full-finetune-all,gradot,gradot-lambda,gradot+,layer-drop,offsite-tuning"
methods+=",crash,crash-own,scaleot,scaleot-own,empty"
budgets="0.4" # 8 of the 20 blocks between the adapters, as offsite-tuning and CRaSh keep
cost="Weights are held in float32; full-finetune-all trains all of them, with two moments each."

# As offsite-tuning's scripts have it; the rate is chosen by development loss.
question_settings=(--epochs 5 --batch-size 32 --learning-rate 5e-5 --learning-rates 0.4,1)
text_settings=(--epochs 50 --batch-size 64 --learning-rate 1e-4 --learning-rates 0.2,1)

reproduce "$@"
