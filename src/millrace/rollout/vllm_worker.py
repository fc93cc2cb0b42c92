"""What runs inside vLLM's workers: takes new weights in place. The only file that touches vLLM's internals.

vLLM calls the methods of `WeightReceiver` on every worker through `/collective_rpc`, with strings as arguments:
`millrace_begin`, `millrace_load` for a few buckets at a time, `millrace_finish`; where buckets are broadcast, and other
engines take part than before, `millrace_part` and `millrace_meet` besides. Weights go through vLLM's layer-wise reload,
which repeats what loading does to them (cutting over ranks, fusing, packing for the kernels) and writes the result into
the tensors that the running model holds.

On CPU that reload leaves three things behind, each of them silently (vLLM 0.32):
* a fused mixture of experts skips its packing on an update, as if its kernel kept the weights elsewhere;
* an lm_head tied to the embedding keeps the kernel that was packed from the old embedding;
* a bfloat16 Mamba convolution is packed into new storage while the mixer still reads the old one.
`_before_cpu_reload` and `_after_cpu_reload` put them right.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from millrace.converters.fingerprint import fingerprint
from millrace.rollout.transports.arrival import BucketReader
from millrace.rollout.transports.broadcast import joiner
from millrace.rollout.transports.groups import Meeting, Transfer, within

if current_platform.is_cpu():
    # vLLM imports this module before it builds the model.
    from millrace.rollout import cpu_experts, cpu_fp8

    cpu_experts.install()
    if os.environ.get(cpu_fp8.VARIABLE):
        cpu_fp8.install()

POLL_SECONDS = 0.0002
"""How often a broadcast on its way is asked whether it has arrived."""


@dataclass
class _Receipt:
    """One update under way."""

    expected: set[str]
    """vLLM's names of the model's parameters."""
    loaded: set[str] = field(default_factory=set)
    held: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict)
    """Data type and fingerprint that a parameter must have in the end, if the engine keeps it as it came."""


class WeightReceiver:
    """Mixed into vLLM's worker class (`--worker-extension-cls`)."""

    _millrace_receipt: _Receipt | None = None
    _millrace_reader: BucketReader | None = None

    def millrace_part(self) -> dict[str, Any]:
        """Leave the groups with trainer ranks that were met before."""
        senders = self._millrace_bucket_reader().senders
        while senders:
            senders.popitem()[1].close()
        return {}

    def millrace_meet(self, meeting: str, offset: str, limit: str) -> dict[str, Any]:
        """Join the group of one trainer rank.

        offset: rank of this engine's first worker in it. limit: seconds that this and each broadcast may take.
        """
        where, parallel = Meeting(**json.loads(meeting)), self.vllm_config.parallel_config  # type: ignore[attr-defined]
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        group = joiner(where.kind)(where, int(offset) + own, float(limit))
        self._millrace_bucket_reader().senders[where.rank] = group
        return {}

    @torch.no_grad()
    def millrace_begin(self) -> dict[str, Any]:
        """Get ready to take every weight anew; an update that broke off before is closed first."""
        model = self._millrace_model()
        if self._millrace_receipt is not None:
            self._millrace_finalize(model)
        if self._millrace_on_cpu():
            _before_cpu_reload(model)
        initialize_layerwise_reload(model)
        self._millrace_receipt = _Receipt(expected={name for name, _ in model.named_parameters()})
        return {}

    @torch.no_grad()
    def millrace_load(self, indexes: str, sampled: str) -> dict[str, Any]:
        """Load the buckets that the JSON files `indexes` describe, a JSON list of paths.

        sampled: JSON list of names whose fingerprints are wanted. Returns {"received": {name: fingerprint}}.
        """
        paths, wanted = [Path(index) for index in json.loads(indexes)], set(json.loads(sampled))
        received: dict[str, int] = {}
        for bucket in self._millrace_bucket_reader().read(paths):
            received |= {name: fingerprint(bucket[name]) for name in bucket.keys() & wanted}
            self._millrace_load_bucket(bucket, received)
        if not self._millrace_on_cpu():
            torch.cuda.current_stream().synchronize()  # the sender may overwrite its bucket from now on
        return {"received": received}

    def _millrace_load_bucket(self, bucket: dict[str, Tensor], received: Mapping[str, int]) -> None:
        receipt = self._millrace_open_receipt()
        model = self._millrace_model()
        parameters = dict(model.named_parameters())
        for name in bucket.keys() & received.keys():
            kept_as = _name_in_engine(model, name)
            _note_held(receipt, parameters.get(kept_as), kept_as, bucket[name])
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            receipt.loaded |= model.load_weights(iter(bucket.items()))  # type: ignore[operator]
        _let_go_of(bucket, model, self.device)  # type: ignore[attr-defined]

    @torch.no_grad()
    def millrace_finish(self) -> dict[str, Any]:
        """Close the update.

        Returns {"missing": parameters that got no or not all values, "changed": checked parameters that the engine
        holds with other values than came, "held": how many were checked}.
        """
        receipt = self._millrace_open_receipt()
        model = self._millrace_model()
        missing = sorted((receipt.expected - receipt.loaded - _tied(model)) | _incomplete(model))
        self._millrace_finalize(model)
        held = {name: _values(model, name) for name in receipt.held}
        # A CPU engine packs a matrix for its kernel and drops the parameter's values; one in FP8 quantises it.
        kept = {name: p for name, p in held.items() if p.numel() and p.dtype == receipt.held[name][0]}
        changed = [name for name, parameter in kept.items() if fingerprint(parameter) != receipt.held[name][1]]
        return {"missing": missing, "changed": changed, "held": len(kept)}

    def _millrace_finalize(self, model: nn.Module) -> None:
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            finalize_layerwise_reload(model, self.model_config)  # type: ignore[attr-defined]
            if self._millrace_on_cpu():
                _after_cpu_reload(model)
        self._millrace_receipt = None

    def _millrace_open_receipt(self) -> _Receipt:
        if self._millrace_receipt is None:
            raise RuntimeError("no weight update is under way: millrace_begin comes first")
        return self._millrace_receipt

    def _millrace_bucket_reader(self) -> BucketReader:
        if self._millrace_reader is None:
            self._millrace_reader = BucketReader(self.device)  # type: ignore[attr-defined]
        return self._millrace_reader

    def _millrace_model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]
        return model

    def _millrace_on_cpu(self) -> bool:
        return bool(self.device.type == "cpu")  # type: ignore[attr-defined]


def _note_held(receipt: _Receipt, parameter: Tensor | None, name: str, tensor: Tensor) -> None:
    """Remember what a parameter must look like in the end, if the engine keeps it uncut under the same name."""
    if parameter is not None and parameter.shape == tensor.shape and parameter.is_floating_point():
        receipt.held[name] = parameter.dtype, fingerprint(tensor.to(parameter.dtype))


def _name_in_engine(model: nn.Module, name: str) -> str:
    """The parameter that holds the checkpoint's tensor `name` as it came; empty where the engine keeps it otherwise."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.map_name(name) if mapper else name
    # A tensor whose own name changes is another quantity in the engine: Mamba's A_log is kept as A = -exp(A_log).
    return mapped if mapped and mapped.rpartition(".")[2] == name.rpartition(".")[2] else ""


def _values(model: nn.Module, name: str) -> Tensor:
    """What the engine holds as parameter `name`: of a convolution that was packed on CPU, the unpacked copy."""
    parameter = model.get_parameter(name)
    unpacked = getattr(model.get_submodule(name.rpartition(".")[0]), "_cpu_unpacked_conv_weight", None)
    return unpacked.view(parameter.shape) if name.endswith(".weight") and unpacked is not None else parameter


class NcclGroup:
    """vLLM's own communicator, as its weight-transfer plane builds it, on the current device.

    NCCL has no time limit of its own: the meeting and each wait for a broadcast have one here, and `close` ends what
    will not end.
    """

    def __init__(self, meeting: Meeting, rank: int, limit: float) -> None:
        device, self._limit = torch.cuda.current_device(), limit
        # vLLM lets the thread that builds a communicator go on in another CUDA stream, in which a trainer rank could
        # use none of the memory that its allocator keeps for the stream it was in.
        self._communicator = within(
            limit,
            lambda: stateless_init_process_group(meeting.address, meeting.port, rank, meeting.world, device),
        )
        if self._communicator.disabled:  # and its broadcasts would do nothing
            raise RuntimeError("vLLM cannot load NCCL, or VLLM_DISABLE_PYNCCL is set")
        self._stream = torch.cuda.Stream(device)

    def broadcast(self, data: Tensor) -> Transfer:
        self._stream.wait_stream(torch.cuda.current_stream())  # what fills the buffer, or still uses its memory
        data.record_stream(self._stream)
        self._communicator.broadcast(data, src=0, stream=self._stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return _NcclTransfer(event, self._limit)

    def close(self) -> None:
        self._communicator.destroy()


class _NcclTransfer:
    def __init__(self, event: torch.cuda.Event, limit: float) -> None:
        self._event, self._limit = event, limit

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        end = time.monotonic() + self._limit
        while not self.done():  # a stream that waited for a sender which has died could not be ended
            if time.monotonic() > end:
                raise TimeoutError(f"a broadcast did not arrive within {self._limit:g} s")
            time.sleep(POLL_SECONDS)


def _let_go_of(bucket: dict[str, Tensor], model: nn.Module, device: torch.device) -> None:
    """Copy what a layer still waits with, so that the sender may overwrite or remove the bucket.

    The reload keeps the tensors of a layer that is not complete, say one whose experts come from several ranks. From
    another GPU they come to this one, whose stream is waited for before the sender is told.
    """
    shared = {tensor.untyped_storage().data_ptr() for tensor in bucket.values()}
    for module in model.modules():
        for _, call in get_layerwise_info(module).loaded_weights:
            for key, value in call.arguments.items():
                if isinstance(value, Tensor) and not value.is_meta and value.untyped_storage().data_ptr() in shared:
                    call.arguments[key] = value.to(device, copy=True) if value.is_cuda else value.clone()


def _tied(model: nn.Module) -> set[str]:
    """Parameters that share another one's values: the lm_head of a model with tied embeddings."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ParallelLMHead)}


def _incomplete(model: nn.Module) -> set[str]:
    """Layers that got some of their values and not all. A vocabulary is padded, so there the rest is no loss."""
    found = set()
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not info.can_load() or isinstance(module, VocabParallelEmbedding) or is_deferred_attention_layer(module):
            continue
        if 0 < info.load_numel < (info.load_numel_total or 0):
            found.add(f"{name} ({info.load_numel} of {info.load_numel_total} values)")
    return found


def _before_cpu_reload(model: nn.Module) -> None:
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # packs the experts as on the first load


def _after_cpu_reload(model: nn.Module) -> None:
    for head in _tied_heads(model):
        head.quant_method.process_weights_after_loading(head)
    module: Any
    for module in model.modules():
        unpacked = getattr(getattr(module, "conv1d", None), "_cpu_unpacked_conv_weight", None)
        if unpacked is not None and isinstance(getattr(module, "conv_weights", None), Tensor):
            module.conv_weights.copy_(unpacked)


def _tied_heads(model: nn.Module) -> Iterator[ParallelLMHead]:
    if getattr(model.config, "tie_word_embeddings", False):
        yield from (module for module in model.modules() if isinstance(module, ParallelLMHead))
