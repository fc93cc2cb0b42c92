"""The stages of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from millrace.config.schema.fleet import FleetConfig
from millrace.config.schema.losses import AdvantageConfig, KlConfig, MismatchConfig, OffPolicyConfig, PolicyLossConfig
from millrace.config.schema.sampling import CurriculumConfig, SamplingConfig
from millrace.config.schema.trainer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    min_gain: float | None = None
    """Least gain on the stage's own domains, in points of the held-out pass rate (percent)."""
    max_drop: float | None = None
    """Largest drop on every other domain, in points."""
    own: tuple[str, ...] | None = None
    """Domains that min_gain speaks about; those of the stage when absent."""
    others: tuple[str, ...] | None = None
    """Domains that max_drop speaks about; all but `own` when absent."""
    against: Literal["parent", "best"] = "parent"
    """What the stage is compared with: the checkpoint it started from, or the best one so far on each domain."""
    certain: bool = False
    """Fail only when the whole 95% interval of the change lies beyond the limit; else its estimate decides."""
    on_failure: Literal["stop", "warn", "back"] = "stop"
    """Stop the run, go on with a warning, or go back: later stages start from the best checkpoint instead."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has."""

    name: str
    """Name of the stage, unique in the recipe."""
    from_: str | None = None
    """The earlier stage whose result it starts from; the previous one when absent, `start` for the model itself."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What its held-out pass rates must fulfil."""


@dataclass(frozen=True, kw_only=True)
class SftStage(Stage):
    type: Literal["sft"] = "sft"
    data: tuple[str, ...]
    """JSONL files of conversations: {"messages": [{"role", "content"}, ...]}, and perhaps `tools` and `thinking`. The
    assistant's messages are trained on, but for those with `"train": false`."""
    steps: int | None = None
    """Optimizer steps; `epochs` when absent."""
    epochs: float | None = None
    """Passes over the data; exactly one of steps and epochs is given."""
    thinking: bool | None = None
    """false: leave all reasoning out and train the chat template's non-thinking form; true: the thinking form for every
    turn; when absent the form of each turn is told by whether it has reasoning. A row's own `thinking` goes before."""
    global_batch: int = 64
    """Training sequences a step. A conversation is one, unless the chat template rewrites earlier turns (drops their
    reasoning): then each turn is trained on in a sequence that begins as its prompt would."""
    max_length: int = 4096
    """Longest training sequence in tokens; longer ones are an error, or are dropped with `drop_overlong`."""
    drop_overlong: bool = False
    """Leave training sequences longer than max_length out (their number is logged)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class SamplingStage(Stage):
    """What every stage has that trains on the policy's own answers."""

    steps: int
    """Batches of rollouts; each is one policy update, or `updates_per_batch` in an RL stage."""
    prompts_per_step: int = 128
    """Groups a step."""
    samples_per_prompt: int = 16
    """Answers a group."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample others until the batch is full."""
    dynamic_sampling_max_rounds: int = 10
    """Rounds of refilling before the stage goes on with a smaller batch."""
    overlong: Literal["keep", "filter", "zero_reward"] = "keep"
    """Answers that reach the length limit: scored as they are, left out of the loss, or given reward 0."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class RlStage(SamplingStage):
    type: Literal["rl"] = "rl"
    domains: tuple[str, ...]
    """Domains whose training prompts are mixed evenly by size."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    updates_per_batch: int = 1
    """Optimizer steps on one batch of rollouts; 1 is strictly on-policy."""
    one_step_off: bool = False
    """Sample the next step's answers while this one is trained, so that neither fleet nor trainer waits for the other.
    They come from the weights before the last step, which off_policy corrects; `mismatch` then holds that step too."""


@dataclass(frozen=True, kw_only=True)
class RlhfStage(RlStage):
    type: Literal["rlhf"] = "rlhf"  # type: ignore[assignment]
    kl: KlConfig = field(default_factory=lambda: KlConfig(coefficient=0.03))
    pairing: Literal["all_pairs", "circular"] = "all_pairs"
    """Which answers of a group are compared: each with every other, or each with the next one around a circle."""
    both_orders: bool = True
    """Judge each pair in both orders, so that a judge that likes the first answer better favours none."""
    think_length_weight: float = 0.5
    """Weight of the length-controlled reward of the reasoning: the shortest of the group gains most; 0 switches off."""
    answer_length_weight: float = 0.5
    """The same for the answer behind the reasoning."""
    think_bonus: float = 0.5
    """Bonus of the answer with the shortest reasoning, if its quality is among the best `bonus_share` of the group."""
    answer_bonus: float = 0.5
    """Bonus of the shortest answer, under the same condition."""
    bonus_share: float = 0.2
    """The best so-large share of a group, by reward of the comparisons alone, may get a bonus."""


@dataclass(frozen=True, kw_only=True)
class MopdStage(SamplingStage):
    type: Literal["mopd"] = "mopd"
    teachers: dict[str, str]
    """The teacher of each domain: `best(DOMAIN)`, the checkpoint so far with the highest held-out pass rate there, or
    `stage(NAME)`, the result of that stage (`stage(start)`: the model itself)."""
    rewarded: tuple[str, ...] = ()
    """Further domains, which are trained by their rewards in the same batch, as in an RL stage."""
    samples_per_prompt: int = 4
    """Answers a prompt."""
    placement: Literal["time_shared", "resident", "served"] = "time_shared"
    """Where teachers live: swapped into the trainer's ranks from host memory, as models of their own beside the policy,
    or as vLLM servers."""
    signal: Literal["sampled", "top_k", "full"] = "sampled"
    """What a teacher says of each token: its log-prob alone (the paper), or the reverse KL over the `top_k` likeliest
    tokens, or over the whole vocabulary."""
    top_k: int = 64
    """Tokens of the top_k signal."""
    support: Literal["student", "teacher"] = "student"
    """Whose likeliest tokens the top_k signal compares."""
    ratio_low: float = 0.5
    """Tokens whose train/rollout probability ratio is below this get weight 0 (still counted in the denominator)."""
    ratio_high: float = 2.0
    """The same for ratios above this."""
    advantage_clip: float | None = None
    """Bound of |log pi_teacher - log pi_train|; none when absent, as in the paper."""
    aggregation: Literal["token", "sequence"] = "sequence"
    """Mean over sequences of their token means, as the paper's equation 4, or mean over all tokens of the batch."""
    teacher_engine: FleetConfig = field(default_factory=FleetConfig)
    """How the vLLM servers of `placement: served` are started, one for each distinct teacher."""

    @property
    def domains(self) -> tuple[str, ...]:
        return (*self.teachers, *self.rewarded)


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(Stage):
    type: Literal["evaluate"] = "evaluate"


StageConfig = SftStage | RlStage | RlhfStage | MopdStage | EvaluateStage
