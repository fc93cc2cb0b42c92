"""Ask a Hugging Face checkpoint the first questions of data sets, with transformers alone.

python recipes/laptop/ask.py runs/laptop-cascade/export demo/math/held_out.jsonl demo/chat/held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path, nargs="+", help="JSONL files with a `prompt` in each row")
    parser.add_argument("--questions", type=int, default=1, help="questions from each file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    console = Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    lines = (path.read_text(encoding="utf-8").splitlines()[: arguments.questions] for path in arguments.prompts)
    for line in chain.from_iterable(lines):
        question = json.loads(line)["prompt"]
        console.print(f"[bold]{question}[/bold]")
        console.print(answer(model, tokenizer, question), markup=False)
        console.print()


def answer(model, tokenizer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    output = model.generate(prompt, max_new_tokens=64, do_sample=True, eos_token_id=stop, pad_token_id=stop)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
