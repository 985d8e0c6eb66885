#!/usr/bin/env bash
# Installs what the tests need into a virtual environment ($VENV, default .venv) and runs them.
# Arguments go to pytest: launch/test.sh tests/generators/test_bigr.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "$@"
