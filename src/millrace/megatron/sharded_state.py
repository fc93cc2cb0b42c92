"""Model and optimizer as tensors that know their place in the whole, and how they reach and leave a folder.

The format is Megatron-Core's `torch_dist`: each rank writes the shards it owns into one file, so that any other layout
can read the pieces it needs. Megatron's own writer starts processes for each save; here the shards are written by the
rank itself with torch.distributed.checkpoint's writer, which costs milliseconds and needs no guarded main module.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.module import MegatronModule
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from millrace.checkpoint_store import CheckpointError
from millrace.converters.errors import ConversionError
from millrace.converters.torch_metadata import read_metadata
from millrace.megatron.master_weights import MasterWeights

SHARDING = {
    # Optimizer state in the shapes of the parameters: readable at any layout, with and without a distributed optimizer.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Dense and expert optimizers name their tensors alike, so that a layout with other groups finds them.
    "chained_optim_avoid_prefix": True,
    # One entry a layer rather than one stacked over layers: layers may differ, and pipeline cuts do not matter.
    "non_homogeneous_layers": True,
}

SHARDED = (ShardedTensor, ShardedTensorFactory)

DISTRIBUTED_MASTER = "optimizer.state.param."
MASTER = "optimizer.state.fp32_param."
"""Names of the float32 master copies: of Megatron's distributed optimizer, and of its other one and of checkpoints."""

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's save strategy, with the writing done in the calling process.

    The file `reserve` is given up when the shards are written: Megatron writes a few small files after them on rank 0
    alone, and a disk that fills up there would leave the other ranks waiting.
    """

    def __init__(self, reserve: Path | None = None) -> None:
        super().__init__("torch_dist", 1)
        self.reserve = reserve

    def writer(self, folder: Path | str) -> FileSystemWriter:
        """What writes this rank's tensors."""
        return FileSystemWriter(folder, thread_count=1, sync_files=True)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Raises torch's CheckpointException on every rank when one cannot write."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=self.writer(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
            ),
        )
        if dist.get_rank() == 0 and self.reserve is not None:
            self.reserve.unlink()


def sharded_state(
    module: MegatronModule,
    optimizer: Any | None,
    *,
    loading_step: int | None = None,
    trained: dict[str, Any] | None = None,
    masters: MasterWeights | None = None,
) -> dict[str, Any]:
    """Model (and optimizer) of this rank as Megatron's sharded state dict.

    To load into it, give the optimizer step that the checkpoint was written at. `trained` stands for the model where
    only part of it is trained: the sharded tensors of that part. In the place of parameters in FP8 it has, on the host,
    what their `masters` hold, or room for it. Collective.
    """
    model = module.sharded_state_dict(metadata=dict(SHARDING)) if trained is None else trained
    state = {"model": _without_empty_objects(model)}
    if optimizer is not None:
        loading = loading_step is not None
        theirs = optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(SHARDING))
        parameters = {_place(item): item.data for item in nested_values(model) if isinstance(item, SHARDED)}
        state["optimizer"] = _portable(
            theirs, parameters, optimizer_step(optimizer) if loading_step is None else loading_step
        )
    if masters is not None:
        _put_masters(state["model"], masters, loading=loading_step is not None)
    return state


def _put_masters(model: dict[str, Any], masters: MasterWeights, *, loading: bool) -> None:
    for item in nested_values(model):
        master = masters.of(item.data) if isinstance(item, SHARDED) else None
        if master is None:
            continue
        whole = None if loading else master.gathered()
        if whole is not None and is_main_replica(item.replica_id):
            item.data = whole.cpu()
        else:
            item.data = torch.empty(item.data.shape, dtype=item.data.dtype)


def optimizer_step(optimizer: Any) -> int:
    """Updates made so far; the optimizers in use keep them in their parameter groups."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


Place = tuple[str, tuple[int, ...]]
"""Name of a tensor and where a shard begins in it: the experts of a layer are shards of one tensor."""


def _place(item: ShardedTensor | ShardedTensorFactory) -> Place:
    first = item if isinstance(item, ShardedTensor) else next(iter(nested_values(item.build())))
    return item.key.removeprefix(DISTRIBUTED_MASTER), tuple(first.global_offset)


def _portable(node: Any, parameters: dict[Place, torch.Tensor], step: int) -> Any:
    """An optimizer's sharded state with nothing in it that depends on the layout or on the kind of optimizer.

    Only tensors go to the checkpoint. Groups, their options and the order of the parameters are the running
    optimizer's own, with the step set. A float32 master copy is written under one name; where the parameter itself is
    float32 it would be the same tensor twice, and is taken from the model.
    """
    if isinstance(node, dict):
        return {
            key: _groups_at(value, step) if key == "param_groups" else _portable(value, parameters, step)
            for key, value in node.items()
        }
    if isinstance(node, list) and node:  # an empty one is of a rank on which nothing is trained
        return [_portable(value, parameters, step) for value in node]
    if isinstance(node, SHARDED):
        return _master_copy(node, parameters) if node.key.startswith(DISTRIBUTED_MASTER) else node
    return node if isinstance(node, LocalNonpersistentObject) else LocalNonpersistentObject(node)


def _groups_at(groups: list[dict[str, Any]], step: int) -> LocalNonpersistentObject:
    own = []
    for group in groups:
        options = {k: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v for k, v in group.items()}
        own.append({**options, "step": step})
    return LocalNonpersistentObject(own)


def _master_copy(item: ShardedTensor | ShardedTensorFactory, parameters: dict[Place, torch.Tensor]) -> Any:
    name, begin = _place(item)
    parameter = parameters[name, begin]
    if parameter.dtype == torch.float32:
        return LocalNonpersistentObject(parameter)
    item.key = MASTER + name
    return item


def owned_bytes(state: dict[str, Any]) -> int:
    """Bytes this rank will write: the shards of which it holds the main replica."""
    total = 0
    for item in nested_values(state):
        if isinstance(item, SHARDED) and is_main_replica(item.replica_id):
            total += item.data.numel() * item.data.element_size()
    return total


def write_sharded(state: dict[str, Any], folder: Path, *, reserve: Path) -> None:
    """Write all ranks' shards. Collective. Raises CheckpointError on every rank."""
    try:
        dist_checkpointing.save(state, str(folder), InProcessSave(reserve))
    except CheckpointException as failure:
        raise CheckpointError(_first_failure(failure, folder)) from failure
    except CheckpointingException as failure:
        raise CheckpointError(f"the checkpoint cannot be written to {folder}: {failure}") from failure


def check_metadata(folder: Path) -> None:
    """Raises CheckpointError when the folder's pickled metadata holds more than a checkpoint's tables."""
    try:
        read_metadata(folder)
    except ConversionError as problem:
        raise CheckpointError(str(problem)) from None


def read_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a state built with `loading_step` from a folder written at any layout. Collective.

    Raises CheckpointError when a tensor is missing or has another shape.
    """
    state = without_absent_extra_states(state, folder)
    try:
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointException, CheckpointingException, KeyError) as failure:
        raise CheckpointError(f"{folder} does not fit this model or optimizer: {failure}") from failure


def without_absent_extra_states(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Transformer Engine's modules have extra states, which hold scales of FP8 alone; a checkpoint that was converted,
    or saved by other modules, has none, and the modules then start with their own."""
    wanted = {key for key, item in state["model"].items() if isinstance(item, ShardedObject)}
    if not wanted:
        return state
    present = read_metadata(folder).state_dict_metadata
    absent = {key for key in wanted if is_extra_state(key) and state["model"][key].unique_key not in present}
    return {**state, "model": {key: item for key, item in state["model"].items() if key not in absent}}


def is_extra_state(key: str) -> bool:
    """Whether a module's key is its extra state; grouped experts have one each: `_extra_state`, `_extra_state1`, ..."""
    return key.rpartition(".")[2].startswith("_extra_state")


def load_module(module: MegatronModule, values: dict[str, Any], *, part: bool = False) -> None:
    """Put loaded tensors into the module. Raises CheckpointError when a parameter or buffer got none; `part`: when the
    module has no such parameter."""
    missing, unexpected = module.load_state_dict(values, strict=False)
    wrong = [key for key in ([] if part else missing) + unexpected if not is_extra_state(key)]
    if wrong:
        raise CheckpointError(f"the checkpoint does not fit this model: {wrong[0]} is only in one of them")


def _without_empty_objects(model: dict[str, Any]) -> dict[str, Any]:
    """Drop modules' extra states that hold nothing (all but Transformer Engine's)."""
    return {key: item for key, item in model.items() if not (isinstance(item, ShardedObject) and item.data is None)}


def _first_failure(failure: CheckpointException, folder: Path) -> str:
    rank, (error, _) = sorted(failure.failures.items())[0]
    return f"rank {rank} cannot write the checkpoint to {folder}: {write_problem(error)}"


def write_problem(error: BaseException) -> str:
    """What a failed write says to the user."""
    if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
        return f"no space left on the disk ({error.strerror})"
    return f"{type(error).__name__}: {error}"
