#!/usr/bin/env bash
# The laptop demo: a small base model and its data, a judge, the whole cascade with distillation, and what comes out of it
# checked and asked. Everything it makes lies in demo/ and runs/; a second call resumes what is unfinished.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${VENV:-.venv}/bin

title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

if [ ! -e demo/.made ]; then
  title "A small random Qwen3, its mixture-of-experts sister, data for four domains and for a judge"
  "$bin/python" recipes/laptop/make_data.py --out demo --seed 1 --moe
  touch demo/.made
fi

title "A judge for chat answers"
"$bin/millrace" run recipes/laptop/judge.yaml

title "The cascade: SFT, IF-RL, multi-domain RL, RLHF beside them, and MOPD from their best (tensor parallel over 2 ranks)"
"$bin/millrace" run recipes/laptop/cascade.yaml

title "Does the export load bit for bit, agree with transformers, and with vLLM after a weight swap?"
"$bin/millrace" verify roundtrip --hf runs/laptop-cascade/export --tp 2
"$bin/millrace" verify logits --hf runs/laptop-cascade/export --tp 2
"$bin/millrace" verify sync --hf runs/laptop-cascade/export --tp 2

title "A question from each domain to the exported checkpoint, loaded afresh by transformers"
"$bin/python" recipes/laptop/ask.py runs/laptop-cascade/export demo/{math,instruction_following,mcqa,chat}/held_out.jsonl

printf '\nLook at runs/laptop-cascade/report.html\n'
