"""The policy: a model on many ranks that gives log-probs of tokens and learns from them.

It knows no algorithm. A stage hands it a batch (the same on every rank) and a loss over the batch's log-probs; the
policy cuts the batch over data-parallel ranks and micro-batches, packs it, runs Megatron-Core's pipeline schedule and
updates.

Legend: N tokens of the global batch, T tokens of a micro-batch, B sequences, S their length, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from millrace.algorithms.losses import LossFn
from millrace.config.model_shape import ModelShape
from millrace.config.schema import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
)
from millrace.data.batch import TokenBatch
from millrace.errors import MillraceError
from millrace.megatron import lora, weights
from millrace.megatron.context import ContextShare
from millrace.megatron.data_parallel import with_gradient_buffers
from millrace.megatron.divergence import Divergence, TeacherStates
from millrace.megatron.fp8_emulation import Fp8Emulation
from millrace.megatron.head import PolicyHead
from millrace.megatron.kernels import kernels_in_use
from millrace.megatron.master_weights import MasterWeights
from millrace.megatron.microbatch import MicroBatch, cut_batch
from millrace.megatron.model import build_model
from millrace.megatron.offload import HostState
from millrace.megatron.optimizer import build_optimizer, learning_rate, set_hyper_parameters
from millrace.megatron.parameter_gather import ParameterGather
from millrace.megatron.precision import PLAIN, token_multiple
from millrace.megatron.schedule import OnLastStage, from_last_stage, run_micro_batches, sum_metrics
from millrace.megatron.topology import Topology

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BeforeUpdate = Callable[[dict[str, float]], None]


class TrainingDiverged(MillraceError):
    """Loss or gradient is not a finite number; no update was made."""


class Policy:
    """One model over all ranks of the trainer; every rank calls every method, in the same order.

    `optimizer` None builds it forward only, without gradient buffers: a reference or a teacher. It has no master
    weights, and so keeps its weights in the model's type with `precision.parameters` too.
    """

    def __init__(
        self,
        model: ModelConfig,
        shape: ModelShape,
        parallel: ParallelConfig,
        trainer: TrainerConfig,
        topology: Topology,
        *,
        optimizer: OptimizerConfig | None,
        seed: int,
        precision: PrecisionConfig = PLAIN,
    ) -> None:
        self.config = model
        self.shape = shape
        self.parallel = parallel
        self.trainer = trainer
        self.topology = topology
        self.seed = seed
        self.precision = precision = precision if optimizer is not None else replace(precision, parameters=False)
        self.step = 0
        """Updates made since the policy was built; checkpoints carry it on."""
        self.dtype = DTYPES[model.dtype]
        whole = optimizer is not None and model.lora is None
        self.module = build_model(
            shape,
            parallel,
            trainer,
            self.dtype,
            topology.device,
            grouped_experts=not lora.adapts_experts(shape, model.lora),
            fused_gradients=whole,
            precision=precision,
        )
        if optimizer is not None:
            for sentence in kernels_in_use(shape, topology.device, self.dtype, fused_gradients=whole):
                log.info(sentence)
        self.emulation: Fp8Emulation | None = None
        """Of FP8, with `precision.emulate`."""
        if precision.fp8 != "none" and precision.emulate:
            self.emulation = Fp8Emulation(self.module, precision, shape, topology)
        self.adapters = [] if model.lora is None else lora.attach(self.module, shape, model.lora, topology)
        """Of this rank's linears, with `model.lora`; then they alone are trained."""
        self._base: str | None = None
        """What the frozen weights below the adapters were read from."""
        self.optimizer: MegatronOptimizer | None = None
        self.masters: MasterWeights | None = None
        """Of parameters that exist in FP8 alone, with `precision.parameters`; to be used in `weights_present`."""
        self._host_state: HostState | None = None
        """Where the optimizer's state waits between updates, with `trainer.offload_optimizer`."""
        self._trained: DistributedDataParallel | None = None
        self._gather: ParameterGather | None = None
        """Of what an update leaves in parts, with `trainer.overlap_parameter_gather`."""
        if optimizer is None:
            self.module.requires_grad_(False)
        else:
            self._trained = with_gradient_buffers(self.module, trainer, precision)
            if trainer.overlap_parameter_gather:
                self._gather = ParameterGather(self._trained)
            self.reset_optimizer(optimizer, total_steps=0)
        self._head = PolicyHead(self.module, shape, topology, chunk=trainer.logprob_chunk_tokens, gather=self._gather)
        """To be used on the last pipeline stage."""

    def frozen_twin(self) -> Policy:
        """A forward-only policy of the same model and layout, with random weights."""
        return Policy(
            self.config,
            self.shape,
            self.parallel,
            self.trainer,
            self.topology,
            optimizer=None,
            seed=self.seed,
            precision=self.precision,
        )

    def load_hf(self, path: str, *, master_weights: bool = True) -> None:
        """Take the weights of a Hugging Face checkpoint; each rank reads its own parts. Raises ConversionError.

        Adapters start afresh, or from `model.lora.adapter`. `master_weights`: whether the optimizer's copies follow, as
        they must where training goes on from here; those of parameters in FP8 always do, for they are the weights.
        """
        self.gather_parameters()
        with self.weights_present():
            self._load_base(path)
            if self.masters is not None:
                self.masters.follow()
                self.masters.write()
        if self.config.lora is not None:
            self._start_adapters(self.config.lora)
        if self.optimizer is not None and self.masters is None and master_weights:
            with self.optimizer_present():
                self.optimizer.reload_model_params()

    def require_base(self) -> None:
        """Have the frozen weights that adapters stand on, which checkpoints do not hold. Raises ConversionError."""
        if self.config.lora is not None and self._base != self.config.path:
            self._load_base(self.config.path)

    def _load_base(self, path: str) -> None:
        if self.config.lora is not None and self._base == path:
            return  # frozen, so they are what was read
        weights.load_hf(self._bound(), self.shape, path)
        self._base = path

    def _start_adapters(self, config: LoraConfig) -> None:
        if config.adapter is None:
            lora.reset(self.adapters, self.seed)
        else:
            lora.load(self.adapters, config, self.shape, self.topology, config.adapter)

    def gather_parameters(self) -> None:
        """Have all parameters whole on every rank: for whoever reads or writes those of `module` or `adapters`, rather
        than ask this policy for what they give. Collective; `trainer.overlap_parameter_gather` leaves them in parts."""
        if self._gather is not None:
            self._gather.finish()

    def sharded_adapters(self) -> dict[str, Any] | None:
        """The adapters as Megatron-Core's checkpoints take them; None for a policy whose every weight is trained."""
        return None if self.config.lora is None else lora.sharded(self.module, self.topology)

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters' factors that this rank owns, by PEFT's names. Collective: iterate to the end."""
        self.gather_parameters()
        return weights.hf_tensors(lora.bind(self.adapters, self.topology))

    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors this rank owns, adapters merged; see `weights.hf_tensors`. Collective: iterate to
        the end."""
        self.gather_parameters()
        with self.weights_present():
            yield from weights.hf_tensors(self._bound(), few_owners=few_owners)

    def owned_bytes(self, *, few_owners: bool = False) -> int:
        """Bytes of the tensors that `hf_tensors` yields on this rank."""
        return weights.owned_bytes(self._bound(), few_owners=few_owners)

    def _bound(self) -> list[weights.BoundParameter]:
        return weights.bind(self.module, self.shape, self.topology, masters=self.masters)

    def reset_optimizer(self, config: OptimizerConfig, total_steps: int) -> None:
        """Start a stage of `total_steps` updates: fresh moments, and its schedule from the beginning. Where FP8 is
        emulated the history of delayed scales begins afresh too; Transformer Engine goes on with its own."""
        assert self._trained is not None, "a forward-only policy has no optimizer"
        if self.emulation is not None:
            self.emulation.reset()
        if self.masters is not None:
            with self.optimizer_present():
                self.masters.hand_on()
        self.optimizer = self.masters = self._host_state = None  # free the old state first
        self.optimizer = build_optimizer(config, self.trainer, self.dtype, self._trained, self.precision)
        if self.precision.parameters:
            self.masters = MasterWeights(self._trained, self.optimizer)
        if self.trainer.offload_optimizer:
            self._host_state = HostState(self.optimizer, self.module.parameters())
            self._host_state.take_out()
        self.set_schedule(config, total_steps)

    def optimizer_present(self) -> AbstractContextManager[None]:
        """For whoever reads or writes the optimizer's state: with `trainer.offload_optimizer` it is on the device only
        inside. Not to be nested."""
        return nullcontext() if self._host_state is None else self._host_state.present()

    def weights_present(self) -> AbstractContextManager[None]:
        """For whoever reads or writes `masters` outside `optimizer_present`; does nothing where there are none."""
        return nullcontext() if self.masters is None else self.optimizer_present()

    @property
    def offloaded_bytes(self) -> int:
        """Of the optimizer's state that waits in host memory."""
        return 0 if self._host_state is None else self._host_state.waiting_bytes

    def set_schedule(self, config: OptimizerConfig, total_steps: int, done: int = 0) -> None:
        """Follow `config` with `done` of its `total_steps` updates made, moments untouched: what a resumed stage
        needs."""
        self._optimizer_config, self._total_steps = config, total_steps
        self._schedule_start = self.step - done

    def logprobs(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob of every token given those before it, float32 [N] on the CPU of every rank, without gradient.

        With `entropy` also that of the distribution each token was drawn from. Both are 0 at the first token of a
        sequence. Raises DataError for a sequence longer than trainer.max_tokens_per_micro_batch.
        """
        micro_batches = self.cut(batch)

        def on_last_stage(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Any]:
            rows = micro_batch.predicting_rows
            logp, entropies = self._head.logprobs(micro_batch, hidden, rows, temperature=temperature, entropy=entropy)
            stacked = logp[None] if entropies is None else torch.stack([logp, entropies])
            return logp.new_zeros(()), (micro_batch, stacked)

        collected = self._run(micro_batches, on_last_stage, training=False)
        values = torch.zeros(1 + entropy, batch.tokens.numel(), device=self.topology.device)
        for micro_batch, stacked in collected:
            values[:, micro_batch.positions.to(values.device)] = stacked[:, : micro_batch.real].float()
        values = from_last_stage(values, self.topology, sum_over_dp=True).cpu()
        return values[0], (values[1] if entropy else None)

    def train_step(
        self,
        batch: TokenBatch,
        loss_fn: LossFn,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        divergence: Divergence | None = None,
        before_update: BeforeUpdate | None = None,
    ) -> dict[str, float]:
        """One update from the whole batch; the loss is the sum of `loss_fn` over it, however it is cut.

        Logits are taken only where the batch's stream `weight` is not 0; elsewhere `loss_fn` sees a log-prob of 0. With
        `divergence` it sees one more stream of that name, the reverse KL to the teacher at the tokens whose stream
        `taught` names one; it has a gradient there, and `logp` has none.

        Returns on every rank the loss and `loss_fn`'s metrics, summed over the batch, with `grad_norm`, `lr`, `tokens`
        and `micro_batches` (of one data-parallel rank), and with `entropy` the batch's weighted mean of it.
        `before_update` sees all of them after the backward pass; what it raises leaves the weights as they are. Raises
        TrainingDiverged when loss or gradient is not finite.
        """
        assert self._trained is not None and self.optimizer is not None, "a forward-only policy does not train"
        lr = learning_rate(self.step - self._schedule_start, self._optimizer_config, self._total_steps)
        set_hyper_parameters(self.optimizer, self._optimizer_config, lr)
        micro_batches = self.cut(batch)
        metrics = self.backward(micro_batches, loss_fn, temperature=temperature, entropy=entropy, divergence=divergence)
        self.optimizer.prepare_grads()
        metrics |= {
            "grad_norm": float(self.optimizer.get_grad_norm()),
            "lr": lr,
            "tokens": float(batch.tokens.numel()),
            "micro_batches": float(len(micro_batches)),
        }
        self._require_finite(metrics)
        if before_update is not None:
            before_update(metrics)
        with self.optimizer_present():
            self.optimizer.step()
        self.step += 1
        if self.emulation is not None:
            self.emulation.advance()
        return metrics

    def backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_fn: LossFn,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        divergence: Divergence | None = None,
    ) -> dict[str, float]:
        """Leave the gradient of the summed loss, reduced over all ranks, in the parameters' `main_grad`."""
        assert self._trained is not None and self.optimizer is not None, "a forward-only policy does not train"
        self._trained.zero_grad_buffer()
        self.optimizer.zero_grad()
        wanted: dict[str, Any] = {"temperature": temperature, "entropy": entropy}

        def on_last_stage(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Any]:
            streams = dict(micro_batch.streams)
            if divergence is None:
                logp, entropies = self._head.logprobs(micro_batch, hidden, micro_batch.trained_rows, **wanted)
            else:
                logp, entropies, streams["divergence"] = self._head.taught(micro_batch, hidden, divergence, **wanted)
            loss, metrics = loss_fn(logp, streams, micro_batch.segment_ids)
            if entropies is not None:
                metrics["entropy"] = (streams["weight"] * entropies).sum()
            return loss, {"loss": loss.detach(), **metrics}

        return sum_metrics(self._run(micro_batches, on_last_stage, training=True), self.topology)

    def teacher_states(self, batch: TokenBatch, teacher: int) -> TeacherStates:
        """What these weights know, as the `teacher`-th teacher, of the tokens whose stream `taught` is `teacher`.

        Called on the policy that holds the teacher's weights: a frozen twin of the student, or the student itself while
        it has them. Only the sequences that it teaches run; `batch` is the whole one, whose cut the states follow. The
        states of a twin share its head, so they hold as long as it keeps its weights; of the student it is copied.
        """
        speaks = (batch.streams["taught"] == teacher) & (batch.streams["weight"] != 0)
        keep = torch.zeros(len(batch), dtype=torch.bool).index_fill(0, batch.segment_ids[speaks], True)

        def on_last_stage(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Any]:
            _, places = micro_batch.computed_here(micro_batch.taught_rows(teacher))
            return hidden.new_zeros(()), self._head.whole(hidden).index_select(0, places)

        states = self._run(self.cut(batch, keep), on_last_stage, training=False)
        if not self.topology.last_stage:
            return TeacherStates(states, None)
        head_weight = self._head.weight.detach()
        return TeacherStates(states, head_weight if self._trained is None else head_weight.clone())

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Full-vocabulary logits [B, S, V] in float32 on the CPU of every rank, for small inputs [B, S]."""
        rows, length = tokens.shape
        batch = TokenBatch(tokens.reshape(-1).cpu(), torch.full((rows,), length))
        micro_batches = cut_batch(
            batch,
            dp=1,
            dp_rank=0,
            capacity=length,
            multiple=self._multiple,
            device=self.topology.device,
            context=self._context,
        )

        def on_last_stage(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Any]:
            return hidden.new_zeros(()), self._head.logits(micro_batch, hidden)

        values = torch.zeros(rows * length, self.shape.vocab_size, device=self.topology.device)
        for positions, part in self._run(micro_batches, on_last_stage, training=False):
            values[positions] = part
        if self.topology.cp > 1 and self.topology.last_stage:
            dist.all_reduce(values, group=self.topology.cp_group)
        return from_last_stage(values, self.topology, sum_over_dp=False).cpu().reshape(rows, length, -1)

    @property
    def _multiple(self) -> int:
        if self.trainer.overlap_tensor_parallel:  # every micro-batch fills the buffers of `user_buffers`
            return self.trainer.max_tokens_per_micro_batch
        ranks = self.topology.tp if self.module.config.sequence_parallel else 1
        return token_multiple(self.precision, self.parallel) * ranks

    @property
    def _context(self) -> ContextShare:
        return ContextShare(self.topology.cp, self.topology.cp_rank)

    def cut(self, batch: TokenBatch, keep: Tensor | None = None) -> list[MicroBatch]:
        """The packed micro-batches of this rank; every rank gets the same number. `keep` as for `cut_batch`."""
        return cut_batch(
            batch,
            dp=self.topology.dp,
            dp_rank=self.topology.dp_rank,
            capacity=self.trainer.max_tokens_per_micro_batch,
            multiple=self._multiple,
            device=self.topology.device,
            context=self._context,
            keep=keep,
        )

    def _run(self, micro_batches: Sequence[MicroBatch], on_last_stage: OnLastStage, *, training: bool) -> list[Any]:
        """What the last stage collects of each micro-batch; elsewhere nothing."""
        longest = max(m.input_ids.numel() for m in micro_batches)
        assert not self.trainer.overlap_tensor_parallel or longest == self._multiple, (
            "kernels would pass their buffers' end"
        )
        self.module.train(training)
        model = self._trained if training else self.module
        assert model is not None, "a forward-only policy does not train"
        return run_micro_batches(model, micro_batches, on_last_stage, training=training)

    def _require_finite(self, metrics: Mapping[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise TrainingDiverged(
                    f"{name} is {metrics[name]} at update {self.step}; no update was made. Lower optimizer.lr, or look "
                    "for broken samples in this batch"
                )
