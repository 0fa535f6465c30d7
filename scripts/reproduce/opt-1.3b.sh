#!/usr/bin/env bash
# The papers' experiments on OPT-1.3B, from nothing to the table; --help says more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

published="OPT-1.3B"
hub_id="facebook/opt-1.3b"
methods="full-finetune,full-finetune-all,gradot,layer-drop,offsite-tuning,crash,scaleot,empty"
budgets="0.4" # 8 of the 20 blocks between the adapters, as offsite-tuning and CRaSh keep
cost="Weights are held in float32; full-finetune-all trains all of them, with two moments each."

# Five epochs in batches of 32 at 5e-5 or 2e-5, as offsite-tuning's scripts have it, the rate
# chosen by development loss; WikiText-2 50 epochs in batches of 64 at 1e-4 or 2e-5.
recipe() {
  batch=32 rate=5e-5 factors=0.4,1
  case "$1" in
    openbookqa) steps=775 ;;
    piqa) steps=2520 ;;
    arc-easy) steps=355 ;;
    arc-challenge) steps=175 ;;
    hellaswag) steps=6240 ;;
    sciq) steps=1825 ;;
    webqs) steps=565 ;;
    race) steps=9760 ;;
    wikitext-2) steps=3700 batch=64 rate=1e-4 factors=0.2,1 ;;
    *) return 1 ;;
  esac
}

reproduce "$@"
