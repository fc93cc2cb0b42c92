"""From a domain of a recipe to its environment."""

from __future__ import annotations

import os

from millrace.config.errors import ConfigError
from millrace.config.schema import DomainConfig
from millrace.environments.base import Environment
from millrace.environments.instruction_following import InstructionFollowingEnvironment
from millrace.environments.math import MathEnvironment
from millrace.environments.mcqa import McqaEnvironment
from millrace.environments.structured_outputs import StructuredOutputsEnvironment

MOST_WORKERS = 16
"""Verifier processes of one domain; more would only idle, a comparison takes milliseconds."""


def make_environment(config: DomainConfig) -> Environment:
    """The environment that scores a domain. Its processes start with the first answer that needs one."""
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    match config.environment:
        case "math":
            return MathEnvironment(verify_timeout_s=config.verify_timeout_s, workers=workers)
        case "mcqa":
            return McqaEnvironment(verify_timeout_s=config.verify_timeout_s, workers=workers)
        case "structured_outputs":
            return StructuredOutputsEnvironment(verify_timeout_s=config.verify_timeout_s, workers=workers)
        case "instruction_following":
            return InstructionFollowingEnvironment(grading=config.grading)
    raise ConfigError(f"the environment {config.environment} is not built yet; `millrace check` names what is")
