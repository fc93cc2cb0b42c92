"""Weight sync against a memcpy of the same bytes, in one run: `python -m benchmarks.weight_sync [--transport disk]`.

One vLLM engine with a randomly initialised Qwen3 of about 300 million parameters takes all weights of a policy several
times. Stated are the best sync and the best single-threaded copy of the same tensors into memory that is already
mapped, and the ratio of the two, without and with the verification. The engine's share is more than a copy: vLLM cuts,
fuses and packs each matrix for its kernels.

With `--senders 2` that many processes hold the policy, and syncs in which one of them sends everything take turns with
syncs in which each sends its share.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from millrace.config.schema import FleetConfig
from millrace.ports import free_port
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
    if options.rank:
        _join(options, options.rank)
        _measure(None, _config(options), Path(options.model), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": options.layers}))
        config = _config(options)
        with Fleet(config, str(model), Path(folder)) as fleet:
            options.port = free_port("127.0.0.1")
            others = [_other(options, rank, model) for rank in range(1, options.senders)]
            _join(options, 0)
            _measure(fleet, config, model, options)
            for other in others:
                other.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=["shared_memory", "disk", "gloo"], default="shared_memory")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--senders", type=int, default=1)
    for own in ("--rank", "--port"):  # of the processes that this one starts
        parser.add_argument(own, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(options: argparse.Namespace) -> FleetConfig:
    return FleetConfig(
        transport=options.transport,
        bucket_bytes=options.bucket_mib << 20,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_bytes=256 << 20,
        probe_tolerance=0.1,
        extra_args=("--load-format", "dummy", "--skip-tokenizer-init"),
    )


def _other(options: argparse.Namespace, rank: int, model: Path) -> subprocess.Popen[bytes]:
    given = {**vars(options), "rank": rank, "model": model}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return subprocess.Popen([sys.executable, __file__, *arguments])


def _join(options: argparse.Namespace, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{options.port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=options.senders)


def _measure(fleet: Fleet | None, config: FleetConfig, model: Path, options: argparse.Namespace) -> None:
    from millrace.rollout.weight_sync import SyncReport, WeightSync

    policy = _policy(model, options.rank)
    if fleet:
        fleet.wait_ready()
    sync = WeightSync(policy, fleet, config, SimpleNamespace(rank=options.rank, world=options.senders))
    reports: dict[int, list[SyncReport]] = {}
    for version in range(ROUNDS):
        for senders in sorted({1, options.senders}):
            policy.senders = senders
            sync.forget()
            reports.setdefault(senders, []).append(sync.push(version))
    if not fleet:
        return
    policy.senders = 1
    copy = min(_copy_seconds(policy) for _ in range(ROUNDS))
    first = reports[1][0]
    sys.stdout.write(
        f"{first.bytes / 2**20:.0f} MiB in {first.tensors} tensors, {config.transport}, one engine\n"
        f"memcpy           {copy:8.3f} s  ({first.bytes / copy / 2**30:.1f} GiB/s)\n"
    )
    for senders, measured in reports.items():
        best = min(measured, key=lambda report: report.moved_seconds)
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in best.phases.items())
        sys.stdout.write(
            f"{senders} sender{'s' if senders > 1 else ''}\n"
            f"  sync           {best.moved_seconds:8.3f} s  ratio {best.moved_seconds / copy:.2f}\n"
            f"  with its check {best.seconds:8.3f} s  ratio {best.seconds / copy:.2f}  ({phases})\n"
            f"  {best}\n"
        )


def _policy(model: Path, rank: int):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16).eval()

    class RandomPolicy:
        senders = 1

        def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
            for number, pair in enumerate(network.named_parameters()):  # a tied lm_head comes once
                if number % self.senders == rank:
                    yield pair

        def owned_bytes(self, *, few_owners: bool = False) -> int:
            return max(1, sum(tensor.nbytes for _, tensor in self.hf_tensors()))  # each process meets the engine

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
