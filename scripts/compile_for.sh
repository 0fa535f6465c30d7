#!/usr/bin/env bash
# Compiles the pipeline's programs for TPUs and GPUs that need not be here, at small shapes, and
# checks what their compilers make of them: nine minutes were measured on one core, after the
# downloads (1.3 GB, which lie in .venv-compile). Arguments go to pytest.
export GRADOT_VENV=.venv-compile
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source scripts/setup_venv.sh
setup_venv test tpu compile-gpu
exec "$GRADOT_PYTHON" -m pytest tests/benchmarks/test_compile_for.py "$@"
