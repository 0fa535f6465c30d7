#!/usr/bin/env bash
# Sets up .venv and runs the whole method on the bundled model; arguments go to `gradot demo`.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source scripts/setup_venv.sh
setup_venv
exec "$GRADOT_PYTHON" -m gradot_jax.cli.main demo --overwrite "$@"
