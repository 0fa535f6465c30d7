# shellcheck shell=bash
# Sourced by its neighbours: `setup_venv EXTRA...` makes .venv in the current folder, or the folder
# that GRADOT_VENV names, and sets GRADOT_PYTHON to its interpreter. A GRADOT_PYTHON from outside is
# used as it is, nothing is installed.
set -euo pipefail

setup_venv() {
  [ -z "${GRADOT_PYTHON:-}" ] || return 0
  local python="${PYTHON:-python3}" venv="${GRADOT_VENV:-.venv}" extras
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "gradot_jax needs Python 3.11 or newer; set PYTHON to one" >&2
    return 2
  }
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  extras=$(IFS=,; echo "$*")
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}"
  GRADOT_PYTHON="$PWD/$venv/bin/python"
}
