#!/usr/bin/env bash
# The laptop demo: a small base model and its data, SFT, RL in two domains on two ranks, once more with experts, and what
# comes out of it checked and asked. Everything it makes lies in demo/ and runs/; a second call resumes what is unfinished.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${VENV:-.venv}/bin

title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

if [ ! -e demo/.made ]; then
  title "A small random Qwen3, its mixture-of-experts sister and data for two domains"
  "$bin/python" recipes/laptop/make_data.py --out demo --seed 1 --moe
  touch demo/.made
fi

title "Dense model: SFT, RL on math, RL on instruction following (tensor parallel over 2 ranks)"
"$bin/millrace" run recipes/laptop/dense.yaml

title "Mixture of experts: SFT and RL (expert parallel over 2 ranks)"
"$bin/millrace" run recipes/laptop/moe.yaml

title "Does what was exported load bit for bit, agree with transformers, and with vLLM after a weight swap?"
"$bin/millrace" verify roundtrip --hf runs/laptop-dense/export --tp 2
"$bin/millrace" verify logits --hf runs/laptop-dense/export --tp 2
"$bin/millrace" verify sync --hf runs/laptop-moe/export --ep 2

title "A question to the exported checkpoint, loaded afresh by transformers"
"$bin/python" recipes/laptop/ask.py runs/laptop-dense/export demo/math/held_out.jsonl

printf '\nLook at runs/laptop-dense/report.html and runs/laptop-moe/report.html\n'
