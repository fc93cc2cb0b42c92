"""The log-prob mismatch of FP8 rollouts beside that of bfloat16: `python -m benchmarks.fp8_rollouts --model FOLDER`.

One engine after the other serves the checkpoint and answers the same prompts, random tokens; transformers recomputes
each answer's log-probs in the model's own data type, as a trainer would. Stated are mean, 99th percentile and largest
|log p - log p_rollout| of a token, the share of tokens that IcePop's gate [0.5, 2] would leave out, and sampled tokens
a second. Without --model a randomly initialised Qwen3 of 8 layers serves, whose logits are flatter than a trained
model's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.weight_sync import SHAPE
from millrace.config.schema import FleetConfig
from millrace.rollout.fleet import Fleet
from millrace.rollout.types import Request, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from millrace.rollout.types import Rollout

PROMPT_TOKENS = 32
GATE = math.log(2)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model or _random_model(Path(folder)))
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        answers = {kind: _answers(kind, model, vocabulary, options, Path(folder)) for kind in ("none", "fp8")}
        network = _network(model)
        for kind, (rollouts, seconds) in answers.items():
            tokens = sum(len(rollout.answer) for rollout in rollouts)
            print_line("bfloat16" if kind == "none" else kind, _distances(network, rollouts), tokens / seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Hugging Face checkpoint; a random one when absent")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=128)
    return parser.parse_args()


def _random_model(folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": 8, "initializer_range": 0.05}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16).save_pretrained(path)
    return path


def _answers(
    quantization: Literal["none", "fp8"], model: Path, vocabulary: int, options: argparse.Namespace, folder: Path
) -> tuple[list[Rollout], float]:
    """The answers of an engine, and the seconds it took for them."""
    config = FleetConfig(
        quantization=quantization,
        max_model_len=PROMPT_TOKENS + options.answer_tokens,
        max_num_seqs=options.prompts,
        extra_args=("--skip-tokenizer-init",),
    )
    sampling = SamplingParams(max_tokens=options.answer_tokens, stop_token_ids=(vocabulary - 1,), seed=1)
    prompts = [tuple((31 * n + 17 * i * i) % vocabulary for i in range(PROMPT_TOKENS)) for n in range(options.prompts)]
    requests = [Request(str(n), prompt, sampling) for n, prompt in enumerate(prompts)]
    with Fleet(config, str(model), folder / quantization) as fleet:
        fleet.wait_ready()
        fleet.serve_checkpoint()
        fleet.generate(requests[:1])
        began = time.perf_counter()
        answers = [rollouts[0] for rollouts in fleet.generate(requests)]
        return answers, time.perf_counter() - began


def _network(model: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(device)


def _distances(network, rollouts: list[Rollout]) -> Tensor:  # type: ignore[no-untyped-def]
    """log p - log p_rollout of every sampled token."""
    import torch

    found = []
    for rollout in rollouts:
        tokens = torch.tensor([*rollout.prompt, *rollout.answer], device=network.device)
        with torch.no_grad():
            logp = network(tokens[None]).logits[0, len(rollout.prompt) - 1 : -1].float().log_softmax(-1)
        own = logp.gather(1, tokens[len(rollout.prompt) :, None])[:, 0].cpu()
        found.append(own - torch.tensor(rollout.rollout_logp))
    return torch.cat(found)


def print_line(name: str, distances: Tensor, rate: float) -> None:
    size = distances.abs()
    sys.stdout.write(
        f"{name:9} mismatch mean {size.mean():.4f}  p99 {size.quantile(0.99):.4f}  max {size.max():.3f}  outside the "
        f"gate {(size > GATE).float().mean():.2%}  {rate:.0f} tokens/s\n"
    )


if __name__ == "__main__":
    main()
