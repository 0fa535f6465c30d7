#!/usr/bin/env bash
# Sets up .venv and runs the test suite; arguments go to pytest.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source scripts/setup_venv.sh
setup_venv test eval
exec "$GRADOT_PYTHON" -m pytest --numprocesses 2 "$@"
