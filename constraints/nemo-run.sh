#!/usr/bin/env bash
# Make an environment that launches runs through NeMo-Run: constraints/nemo-run.sh [FOLDER]   (default .venv-nemo-run)
# It holds Millrace without torch, vLLM and Megatron-Core: NeMo-Run asks for versions that vLLM does not bear. Name the
# interpreter that trains as `python` in the cluster file. PYTHON names the interpreter of this one (default python3).
# Done once: a stamp in the folder knows what it was made from.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${1:-.venv-nemo-run}
pins=constraints/nemo-run.txt
made_from=$(cat pyproject.toml "$pins" constraints/nemo-run.sh | sha256sum | cut -d' ' -f1)
stamp=$venv/.millrace-made-from
[ "$(cat "$stamp" 2>/dev/null || true)" = "$made_from" ] && exit 0

printf 'nemo-run: making %s (about two minutes and 220 MB)\n' "$venv" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq --no-deps -r "$pins"
pip install -qq --no-deps -e .
printf '%s\n' "$made_from" >"$stamp"
