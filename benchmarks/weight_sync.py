"""Weight sync against a memcpy of the same bytes, in one run: `python benchmarks/weight_sync.py [--transport disk]`.

One vLLM engine with a randomly initialised Qwen3 of about 300 million parameters takes all weights of a policy several
times. Stated are the best sync and the best single-threaded copy of the same tensors into memory that is already
mapped, and the ratio of the two, without and with the verification. The engine's share is more than a copy: vLLM cuts,
fuses and packs each matrix for its kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from millrace.config.schema import FleetConfig
from millrace.rollout.fleet import Fleet

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
ROUNDS = 5


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": options.layers}))
        config = FleetConfig(
            transport=options.transport,
            bucket_bytes=options.bucket_mib << 20,
            max_model_len=512,
            max_num_seqs=8,
            kv_cache_bytes=256 << 20,
            probe_tolerance=0.1,
            extra_args=("--load-format", "dummy", "--skip-tokenizer-init"),
        )
        with Fleet(config, str(model), Path(folder)) as fleet:
            _measure(fleet, config, model)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=["shared_memory", "disk"], default="shared_memory")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--bucket-mib", type=int, default=64)
    return parser.parse_args()


def _measure(fleet: Fleet, config: FleetConfig, model: Path) -> None:
    import torch

    from millrace.rollout.weight_sync import WeightSync

    torch.set_num_threads(1)
    policy = _policy(model)
    fleet.wait_ready()
    sync = WeightSync(policy, fleet, config, SimpleNamespace(rank=0, world=1))
    reports = [sync.push(version) for version in range(ROUNDS)]
    best = min(reports, key=lambda report: report.seconds)
    copy = min(_copy_seconds(policy) for _ in range(ROUNDS))
    moved = sum(best.phases[phase] for phase in ("begin", "send", "finish"))
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in best.phases.items())
    sys.stdout.write(
        f"{best.bytes / 2**20:.0f} MiB in {best.tensors} tensors, {config.transport}, one engine\n"
        f"memcpy           {copy:8.3f} s  ({best.bytes / copy / 2**30:.1f} GiB/s)\n"
        f"sync             {moved:8.3f} s  ratio {moved / copy:.2f}\n"
        f"  with its check {best.seconds:8.3f} s  ratio {best.seconds / copy:.2f}  ({phases})\n"
    )


def _policy(model: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16).eval()

    class RandomPolicy:
        def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            return network.named_parameters()  # a tied lm_head comes once

        @torch.no_grad()
        def logprobs(self, batch, *, temperature: float = 1.0):  # type: ignore[no-untyped-def]
            logp = torch.log_softmax(network(batch.tokens[None]).logits[0].float() / temperature, -1)
            scores = logp[:-1].gather(1, batch.tokens[1:, None])[:, 0]
            return torch.cat([torch.zeros(1), scores]), None

    return RandomPolicy()


def _copy_seconds(policy) -> float:  # type: ignore[no-untyped-def]
    """Seconds to copy all tensors into memory that was written to before."""
    import torch

    sources = [tensor.detach() for _, tensor in policy.hf_tensors()]
    targets = [torch.zeros_like(source) for source in sources]
    began = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
