"""The recipe as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from millrace.config.schema.domains import JUDGED, DomainConfig
from millrace.config.schema.fleet import FleetConfig, JudgeConfig, PlacementConfig
from millrace.config.schema.model import ModelConfig
from millrace.config.schema.observe import ObserveConfig
from millrace.config.schema.precision import PrecisionConfig
from millrace.config.schema.sampling import EvaluationConfig
from millrace.config.schema.stages import MopdStage, SamplingStage, StageConfig
from millrace.config.schema.trainer import CheckpointConfig, ParallelConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    """Name of the run."""
    run_dir: str
    """Folder of the run: recipe, ledger, checkpoints, metrics, rollouts, export. Against the current folder."""
    seed: int = 1
    """Seed of everything that is drawn at random."""
    model: ModelConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """FP8 in the trainer; without this section everything is computed in `model.dtype`."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which nodes of a cluster do what; on one machine nothing reads it."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """The domains by name."""
    judges: dict[str, JudgeConfig] = field(default_factory=dict)
    """Judges by name; the domains that are judged name theirs."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    stages: tuple[StageConfig, ...]
    """What is done, in order. Each stage starts from the one before it unless its `from` names another."""
    export: bool = True
    """Write the final policy as a Hugging Face checkpoint to RUN_DIR/export."""

    @property
    def samples(self) -> bool:
        """Whether the run draws answers and so needs engines: in an RL stage, or to measure its domains."""
        return bool(self.domains) or any(isinstance(stage, SamplingStage) for stage in self.stages)

    @property
    def runs_code(self) -> bool:
        """Whether a domain has programs that a node which verifies can test."""
        return any(domain.environment == "code" for domain in self.domains.values())

    @property
    def judges_used(self) -> dict[str, JudgeConfig]:
        """The judges that a judged domain names: those that run as long as the run does."""
        named = {domain.judge for domain in self.domains.values() if domain.environment in JUDGED}
        return {name: judge for name, judge in self.judges.items() if name in named}

    @property
    def teacher_engines(self) -> dict[str, FleetConfig]:
        """How the teachers are served, by the key that says so, for each stage that serves them."""
        return {
            f"stages.{stage.name}.teacher_engine": stage.teacher_engine
            for stage in self.stages
            if isinstance(stage, MopdStage) and stage.placement == "served"
        }

    @property
    def engines_started(self) -> dict[str, FleetConfig]:
        """The vLLM servers that the run starts, by the key that says how: of the fleet, of judges and of teachers."""
        started = {"fleet": self.fleet} if self.samples and self.fleet.engines else {}
        started |= {f"judges.{name}.engine": judge.engine for name, judge in self.judges_used.items() if judge.model}
        return started | self.teacher_engines
