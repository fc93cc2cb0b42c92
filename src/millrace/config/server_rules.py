"""What the engines, judges and verifiers of a run must fulfil: how they are reached, and what they stay behind."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from millrace.config.schema import Recipe, RlStage

Problems = Iterator[str]

OWN_SERVER_ARGUMENTS = frozenset({"--host", "--port", "--middleware", "--worker-extension-cls", "--model"})
"""Arguments of a vLLM server that must be what Millrace says: they keep it on its interface and behind its token."""


def server_problems(recipe: Recipe) -> Problems:
    yield from _fleet(recipe)
    yield from _servers(recipe)
    yield from verifier_problems(recipe)
    yield from _judges(recipe)


def _fleet(recipe: Recipe) -> Problems:
    fleet = recipe.fleet
    if not recipe.samples:
        return
    if not fleet.engines and not fleet.addresses:
        yield "fleet: the run samples answers, but there are no engines; set fleet.engines or fleet.addresses"
    if fleet.engines and fleet.addresses:
        yield "fleet: engines and addresses are both given; set fleet.engines=0 to use the servers that already run"
    for address in fleet.addresses:
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
            yield f"fleet.addresses: {address!r} is not a URL such as http://node7:8000"
    if fleet.transport in ("nccl", "ipc") and recipe.trainer.device == "cpu":
        yield f"fleet.transport is {fleet.transport}, which needs CUDA; use shared_memory, disk or gloo on CPU"
    if fleet.transport == "gloo" and recipe.trainer.device == "cuda":
        yield "fleet.transport is gloo, which is for trainer and engines on CPU; use nccl on GPUs"
    if fleet.sleep != "never" and fleet.transport != "ipc":
        yield (
            f"fleet.sleep is {fleet.sleep}, but with transport {fleet.transport} engines do not share the "
            "trainer's GPUs; leave it out, or use ipc"
        )
    for stage in recipe.stages if fleet.sleep != "never" else ():
        if isinstance(stage, RlStage) and stage.one_step_off:
            yield (
                f"stages.{stage.name}.one_step_off samples while the trainer trains, but fleet.sleep "
                f"{fleet.sleep} lets the engines sleep then; leave out the one or the other"
            )
    waited = max(fleet.start_timeout_s, fleet.request_timeout_s)
    if recipe.parallel.world_size > 1 and recipe.trainer.collective_timeout_s < waited:
        yield (
            f"trainer.collective_timeout_s is {recipe.trainer.collective_timeout_s:g}, but at a weight sync the ranks "
            f"wait for engines up to {waited:g} s (fleet.start_timeout_s, fleet.request_timeout_s); raise the one or "
            "lower the others"
        )
    remote = [address for address in fleet.addresses if not _is_this_host(address)]
    if fleet.transport in ("shared_memory", "ipc") and remote:
        yield (
            f"fleet.transport is {fleet.transport}, which works on one host only, but {remote[0]} is another; "
            "use nccl or disk"
        )


def verifier_problems(recipe: Recipe) -> Problems:
    """Nodes that verify must find programs there."""
    if recipe.placement.verifier_nodes > 0 and not recipe.runs_code:
        yield (
            f"placement.verifier_nodes is {recipe.placement.verifier_nodes}, but no domain has the environment code, "
            "whose programs they test; leave it out"
        )


def _servers(recipe: Recipe) -> Problems:
    """Every vLLM server that the run starts stays on one interface and behind its token, and keeps to its data type."""
    servers = {"fleet": recipe.fleet} if recipe.samples else {}
    own = {f"judges.{name}.engine": judge.engine for name, judge in recipe.judges.items() if judge.model is not None}
    own |= recipe.teacher_engines
    for key, server in (servers | own).items():
        for taken in sorted(OWN_SERVER_ARGUMENTS & {argument.split("=")[0] for argument in server.extra_args}):
            yield f"{key}.extra_args: {taken} is set by Millrace and guards the engines; leave it out"
        if server.interface in ("0.0.0.0", "::", "", "*"):
            yield (
                f"{key}.interface is {server.interface!r}, which listens on every network of this machine; "
                "name the one interface address that the trainer reaches"
            )
        if server.quantization == "fp8" and server.dtype != "bfloat16":
            yield f"{key}.quantization is fp8, which keeps all else in bfloat16, but {key}.dtype is {server.dtype}"
    for key, server in own.items():
        if server.addresses:
            yield f"{key}.addresses are not used, for this server is started by Millrace; leave them out"


def _is_this_host(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _judges(recipe: Recipe) -> Problems:
    for name, judge in recipe.judges.items():
        if judge.model is not None and not judge.engine.engines:
            yield f"judges.{name}.engine.engines is 0, which starts no judge; set it to 1 or more, or name a url"
