#!/usr/bin/env sh
# Everything a fresh machine needs, inside .venv: packages from the lock, this project, the Delta jars, a Java if there is none.
set -eu
cd "$(dirname "$0")/.."

python=""
for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$name
        break
    fi
done
if [ -z "$python" ]; then
    echo "set-up: no Python 3.11 or newer on PATH; expected one. Install python3 (>= 3.11) and run make again." >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "set-up: $("$python" --version) has no venv module; expected it. Install it (Debian, Ubuntu: python3-venv) and run make again." >&2
    exit 1
fi

[ -x .venv/bin/python ] || { echo "set-up: virtual environment"; "$python" -m venv .venv; }
[ -x .venv/bin/uv ] || { echo "set-up: uv"; .venv/bin/python -m pip install -q uv; }
echo "set-up: packages (0.5 GB of downloads and more with CUDA the first time; UV_TORCH_BACKEND=cpu takes the small torch)"
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install -q -r requirements.lock
VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install -q --no-deps -e .
echo "set-up: Delta jars"
.venv/bin/python -m jobs.spark.engine >.venv/jars.log 2>&1 || { cat .venv/jars.log >&2; exit 1; }
touch .venv/ready
