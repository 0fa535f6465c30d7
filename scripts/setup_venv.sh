# shellcheck shell=bash
# Sourced by its neighbours: `setup_venv EXTRA...` makes .venv in the current folder.
set -euo pipefail

setup_venv() {
  local python="${PYTHON:-python3}" extras
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "gradot_jax needs Python 3.11 or newer; set PYTHON to one" >&2
    return 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  extras=$(IFS=,; echo "$*")
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}"
}
