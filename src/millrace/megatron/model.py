"""A Megatron-Core GPT from the facts of a Hugging Face config.json.

Legend: T tokens of a packed micro-batch that this rank computes (a multiple of TP), H hidden size.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.rules import layout_problems
from millrace.config.schema import OUTPUT_DISCARDING, ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.megatron import user_buffers
from millrace.megatron.expert_groups import choose_groups_by_their_best_two
from millrace.megatron.kernels import transformer_engine_is_there
from millrace.megatron.local_layers import make_local, needs_local_layers
from millrace.megatron.model_config import rope_inverse_frequencies, transformer_config
from millrace.megatron.precision import PLAIN, engine_recipe
from millrace.megatron.specs import block_spec
from millrace.megatron.topology import LayoutError

log = logging.getLogger(__name__)


class HiddenStateModel(GPTModel):
    """A GPT whose last pipeline stage ends after the final norm.

    forward returns hidden states [T, 1, H] (with sequence parallelism this rank's [T / TP, 1, H]); the log-prob head
    takes them from there, so that the logits of a whole micro-batch never exist at one time.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """Vocabulary rows of this tensor-parallel rank [V / TP, H]; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    grouped_experts: bool = True,
    fused_gradients: bool = False,
    precision: PrecisionConfig = PLAIN,
) -> HiddenStateModel:
    """This rank's pipeline stage, on `device`, with random weights; what else is given is as for `transformer_config`.
    Raises LayoutError for a layout that cannot hold it."""
    check_layout(shape, parallel)
    check_context_parallelism(shape, parallel, device)
    check_dispatcher(trainer)
    check_recomputation(trainer, device)
    user_buffers.prepare(shape, parallel, trainer, dtype, device)
    config = transformer_config(
        shape,
        parallel,
        trainer,
        dtype,
        device,
        grouped_experts=grouped_experts,
        fused_gradients=fused_gradients,
        precision=precision,
    )
    if (recipe := engine_recipe(precision)) is not None:
        log.info("linear layers are computed in FP8, by Transformer Engine's %s", recipe)
    if shape.expert_groups > 1:
        choose_groups_by_their_best_two()
    stage = shape.stage_layers(parallel.pp, parallel_state.get_pipeline_model_parallel_rank())
    layers = shape.layers[stage.start : stage.stop]
    spec = block_spec(config, layers, shape.mamba)
    if needs_local_layers(shape):
        make_local(spec, shape, layers)
    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size(parallel.tp),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type=shape.position,
        rotary_base=shape.rope_theta,
    )
    if shape.position == "rope" and shape.latent_attention is None:  # whose layers have a RoPE of their own
        model.rotary_pos_emb.inv_freq = rope_inverse_frequencies(shape).to(device)
    if shape.embedding_scale != 1.0 and model.pre_process:
        scale_embeddings(model.embedding, shape.embedding_scale)
    reduce_expert_gradients_over_expert_ranks(model, parallel)
    return model.to(device)


def scale_embeddings(embedding: torch.nn.Module, scale: float) -> None:
    """Multiply what the module gives by `scale`, rounded to its data type as transformers does."""

    def scaled(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(scale, dtype=output.dtype, device=output.device)

    embedding.register_forward_hook(scaled)


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raises LayoutError, with one sentence for each problem, when the layout cannot hold the model."""
    problems = list(layout_problems(parallel, shape))
    if problems:
        raise LayoutError("; ".join(problems))


def check_context_parallelism(shape: ModelShape, parallel: ParallelConfig, device: torch.device) -> None:
    """Raises LayoutError where the model's layers cannot share a sequence on this device."""
    if parallel.cp > 1 and shape.mamba is not None and not (device.type == "cuda" and transformer_engine_is_there()):
        raise LayoutError(
            f"parallel.cp is {parallel.cp}, but Megatron-Core shares the sequences of Mamba layers through Transformer "
            "Engine only, which is not there; use parallel.cp=1"
        )


def check_dispatcher(trainer: TrainerConfig) -> None:
    """Raises LayoutError where the kernels of the token dispatcher are not installed."""
    if trainer.token_dispatcher == "deepep" and find_spec("deep_ep") is None:
        raise LayoutError(
            "trainer.token_dispatcher is deepep, but the package deep_ep is not installed; build it from "
            "github.com/deepseek-ai/DeepEP, or set trainer.token_dispatcher=alltoall"
        )


def check_recomputation(trainer: TrainerConfig, device: torch.device) -> None:
    """Raises LayoutError where what is to be computed again needs Transformer Engine, which is not there."""
    asked = [m for m in trainer.recompute_modules if m in OUTPUT_DISCARDING and trainer.recompute == "selective"]
    if asked and not (device.type == "cuda" and transformer_engine_is_there()):
        raise LayoutError(
            f"trainer.recompute_modules names {', '.join(asked)}, which Megatron-Core computes again on CUDA, through "
            "Transformer Engine, only; leave it out"
        )


def reduce_expert_gradients_over_expert_ranks(model: torch.nn.Module, parallel: ParallelConfig) -> None:
    """Send the gradients of experts to the expert-data-parallel group whenever it is not the data-parallel group.

    Megatron-Core does that for EP > 1 only. With TP > 1, ETP < TP and EP = 1 the tensor-parallel ranks hold the same
    experts but send them different tokens; without this each would keep the gradient of its own tokens, silently wrong.
    """
    if parallel.ep == 1 and parallel.etp == parallel.tp:
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            setattr(parameter, "allreduce", False)  # noqa: B010
