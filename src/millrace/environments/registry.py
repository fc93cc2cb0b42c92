"""From a domain of a recipe to its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from millrace.config.errors import ConfigError
from millrace.config.schema import DomainConfig
from millrace.environments.agent import AgentServerEnvironment
from millrace.environments.base import AnyEnvironment
from millrace.environments.code import CodeEnvironment
from millrace.environments.genrm import GenrmEnvironment
from millrace.environments.instruction_following import InstructionFollowingEnvironment
from millrace.environments.judge import Judge
from millrace.environments.long_context import LongContextEnvironment
from millrace.environments.math import MathEnvironment
from millrace.environments.mcqa import McqaEnvironment
from millrace.environments.python_tool import PythonToolEnvironment
from millrace.environments.sandbox.remote import servers_of
from millrace.environments.structured_outputs import StructuredOutputsEnvironment
from millrace.environments.swe_agentic import SweAgenticEnvironment
from millrace.environments.swe_agentless import SweAgentlessEnvironment
from millrace.environments.workplace_assistant import WorkplaceEnvironment
from millrace.rollout.rendezvous import Rendezvous

MOST_WORKERS = 16
"""Verifier processes of one domain; more would only idle, a comparison takes milliseconds."""


def make_environment(config: DomainConfig, judges: Mapping[str, Judge] | None = None) -> AnyEnvironment:
    """The environment that scores a domain. Its processes start with the first answer that needs one. `judges` are
    those of the recipe, by name."""
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
        case "code":
            meeting = Rendezvous.of_environment()
            servers = servers_of(meeting) if meeting else ()
            return CodeEnvironment(config.sandbox, grading=config.grading, servers=servers)
        case "workplace_assistant":
            return WorkplaceEnvironment(None if config.tables is None else Path(config.tables))
        case "python_tool":
            answers = MathEnvironment(verify_timeout_s=config.verify_timeout_s, workers=workers)
            return PythonToolEnvironment(config.python, config.sandbox, answers)
        case "swe_agentic":
            return SweAgenticEnvironment(config.swe)
        case "agent":
            return AgentServerEnvironment(config.agent)
        case "genrm":
            return GenrmEnvironment(_judge(config, judges or {}))
        case "long_context":
            return LongContextEnvironment(_judge(config, judges or {}))
        case "swe_agentless":
            return SweAgentlessEnvironment(_judge(config, judges or {}))


def _judge(config: DomainConfig, judges: Mapping[str, Judge]) -> Judge:
    if config.judge is None or config.judge not in judges:
        raise ConfigError(f"the environment {config.environment} needs the judge {config.judge}, which was not started")
    return judges[config.judge]
