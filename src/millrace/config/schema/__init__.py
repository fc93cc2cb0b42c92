"""What a recipe may say.

Every class is frozen and every field's comment-docstring (the string below it) is its documentation: `millrace check
--explain KEY` and its `--schema` are read from here. Paths are resolved against the folder of the recipe that
wrote them unless they are absolute. A field whose name ends in an underscore is written without it (`from_`: `from`).
Nothing here imports torch.
"""

from millrace.config.schema.domains import (
    JUDGED,
    AgentConfig,
    DomainConfig,
    PythonToolConfig,
    SandboxConfig,
    SweAgenticConfig,
    TurnsConfig,
)
from millrace.config.schema.fleet import FleetConfig, JudgeConfig, PlacementConfig
from millrace.config.schema.losses import AdvantageConfig, KlConfig, MismatchConfig, OffPolicyConfig, PolicyLossConfig
from millrace.config.schema.model import BUILT_IN_TEMPLATES, FAMILY_TEMPLATES, LoraConfig, ModelConfig
from millrace.config.schema.observe import MlflowConfig, ObserveConfig, WandbConfig
from millrace.config.schema.precision import Fp8Format, Fp8Recipe, PrecisionConfig
from millrace.config.schema.recipe import Recipe
from millrace.config.schema.sampling import CurriculumConfig, EvaluationConfig, SamplingConfig
from millrace.config.schema.stages import (
    EvaluateStage,
    GateConfig,
    MopdStage,
    RlhfStage,
    RlStage,
    SamplingStage,
    SftStage,
    Stage,
    StageConfig,
)
from millrace.config.schema.trainer import (
    OUTPUT_DISCARDING,
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputedModule,
    TrainerConfig,
)

__all__ = [
    "BUILT_IN_TEMPLATES",
    "FAMILY_TEMPLATES",
    "JUDGED",
    "OUTPUT_DISCARDING",
    "AdvantageConfig",
    "AgentConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "DomainConfig",
    "EvaluateStage",
    "EvaluationConfig",
    "FleetConfig",
    "Fp8Format",
    "Fp8Recipe",
    "GateConfig",
    "JudgeConfig",
    "KlConfig",
    "LoraConfig",
    "MismatchConfig",
    "MlflowConfig",
    "ModelConfig",
    "MopdStage",
    "ObserveConfig",
    "OffPolicyConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlacementConfig",
    "PolicyLossConfig",
    "PrecisionConfig",
    "PythonToolConfig",
    "Recipe",
    "RecomputedModule",
    "RlStage",
    "RlhfStage",
    "SamplingConfig",
    "SamplingStage",
    "SandboxConfig",
    "SftStage",
    "Stage",
    "StageConfig",
    "SweAgenticConfig",
    "TrainerConfig",
    "TurnsConfig",
    "WandbConfig",
]
