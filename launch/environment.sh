# Makes the virtual environment $VENV (default .venv) and installs bitgen into it in place: with the
# extras of the first argument and the requirements of the others. Sourced by the scripts here.
# shellcheck shell=bash
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: bitgen needs Python 3.11 or newer, $PYTHON is $("$PYTHON" --version 2>&1); set PYTHON" >&2
  exit 2
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$1]" "${@:2}"
