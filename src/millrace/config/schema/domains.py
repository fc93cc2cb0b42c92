"""Domains: their prompts, and the environments that score the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

JUDGED = ("genrm", "long_context", "swe_agentless")
"""Environments that ask a judge."""


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    tier: Literal["auto", "zygote", "bubblewrap", "landlock", "unsafe"] = "auto"
    """How programs are kept apart: the first that this machine can make of a zygote in namespaces, one bubblewrap for
    each run, and Landlock; or that one. `unsafe` runs them as the user, with a warning at every start."""
    workers: int | None = None
    """Programs that are tested at one time on rank 0's machine. When absent as many as it has processors, but none in a
    job with `placement.verifier_nodes`, whose nodes test them (code)."""
    cpu_s: float = 4.0
    """Processor time of a test; a row's `time_limit_s` goes before."""
    wall_over_cpu: float = 2.5
    """Wall time of a test as a multiple of its processor time, so that a busy machine decides no verdict."""
    memory_mb: int = 1024
    """Address space of a test in MiB; a row's `memory_limit_mb` goes before."""
    output_kb: int = 1024
    """Output of a test in KiB, of each stream; more ends it."""
    languages: tuple[Literal["python", "cpp"], ...] = ("python",)
    """What programs may be written in, by the tag of their block; an untagged block is of the first. C++ is compiled by
    g++ in the sandbox. A row may ask for one of them by `language`; functions that are called are Python."""
    compile_cpu_s: float = 10.0
    """Processor time of a C++ program's compiler; its wall time is `wall_over_cpu` times it."""
    compile_memory_mb: int = 1024
    """Address space of the compiler in MiB."""
    tests_per_process: int = 1
    """Tests that one process goes through, for programs that are trusted not to keep anything from one test to the
    next; what it does not pass is tested again in a process of its own. Python; a C++ program starts for each test."""


@dataclass(frozen=True, kw_only=True)
class TurnsConfig:
    most: int = 100
    """Turns of the policy in an episode."""
    turn_tokens: int | None = None
    """Longest turn in tokens; one that reaches it ends the episode. `sampling.max_response_tokens` bounds all turns
    together."""
    episode_s: float = 3600.0
    """Wall time of an episode, in which it waits for engines too; looked at while an engine answers and after each step
    of the environment. One whose time is up is masked."""
    step_s: float = 1200.0
    """Wall time of one step of the environment. A longer one is the environment's fault, so its episode ends and is
    masked. A tool's own limit, which the policy is told of, must be shorter."""
    open_s: float = 1800.0
    """Wall time until an episode is open, in which it may wait for room; a longer one is masked too."""


@dataclass(frozen=True, kw_only=True)
class PythonToolConfig:
    calls: int = 100
    """Calls of the tool in an episode."""
    call_s: float = 120.0
    """Wall time of a call; after it the interpreter is ended, its state is lost, and the policy is told so."""
    all_calls_s: float = 600.0
    """Wall time of all calls of an episode together; the interpreter's processor time is bounded by the same."""
    output_characters: int = 8000
    """Output that the policy is shown of a call, its beginning and its end."""


@dataclass(frozen=True, kw_only=True)
class SweAgenticConfig:
    container: Literal["apptainer", "bubblewrap"] = "apptainer"
    """What commands and tests run in: an image for each row, or, on a laptop, a box with this machine's own programs
    below /usr."""
    images: str | None = None
    """Path or name of a row's image, with {instance_id} in it; the row's docker_image when absent (apptainer)."""
    repositories: str | None = None
    """Folder with the rows' git repositories, each named as the row's `repo`, / written as __ (bubblewrap)."""
    at_once: int | None = None
    """Episodes that are open at one time; as many as there are processors when absent."""
    command_s: float = 120.0
    """Wall time of a command of the agent."""
    tests_s: float = 900.0
    """Wall time of the tests; `turns.step_s` must be longer."""
    output_characters: int = 16000
    """Output that the policy is shown of a command, its beginning and its end."""
    memory_mb: int = 4096
    """Memory of a command in MiB: of each process, or of the whole container."""
    processes: int = 256
    """Processes and threads of a command."""
    file_mb: int = 1024
    """Largest file of a command in MiB."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    url: str | None = None
    """Where the agent's server is asked, such as http://node7:8001 for a NeMo-Gym agent: each episode is one POST of
    its row to URL/run, whose reply holds the `reward`. It is asked directly: proxies that the environment names are not
    used."""
    listen: str | None = None
    """Address of rank 0 at which the agent finds the policy; where the run's ranks meet when absent: loopback on one
    machine, the address of rank 0's node in a job."""
    port: int = 0
    """Port at that address; a free one of each batch's own when 0. An agent whose own settings name the endpoint, as
    NeMo-Gym's model server does, needs a fixed one."""
    concurrency: int = 256
    """Episodes that the agent's server is given at one time; the others wait, for `turns.open_s` at most."""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    environment: Literal[
        "math",
        "instruction_following",
        "mcqa",
        "structured_outputs",
        "genrm",
        "code",
        "python_tool",
        "workplace_assistant",
        "long_context",
        "swe_agentless",
        "swe_agentic",
        "agent",
    ]
    """Which environment scores the answers."""
    train: str
    """JSONL file of training prompts."""
    held_out: str
    """JSONL file of held-out prompts; measured, never trained on."""
    grading: Literal["binary", "fraction"] = "binary"
    """instruction_following: 1 only when every constraint holds, or the share that holds. code: the same of tests."""
    system_prompt: str | None = None
    """System message put before each prompt."""
    thinking: bool | None = None
    """Prompts in the chat template's thinking form, or in its non-thinking form; as the template does by itself when
    absent. A row's own `thinking` goes before. Held-out prompts are asked in the same form."""
    judge: str | None = None
    """genrm, long_context, swe_agentless: the entry of `judges` that compares answers with one another, with the right
    one, or with the right repair."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """code, python_tool: where programs are run, in which languages (code), and under which limits."""
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    """Limits of an episode (python_tool, workplace_assistant, swe_agentic, agent: environments with turns)."""
    python: PythonToolConfig = field(default_factory=PythonToolConfig)
    """Limits of the Python tool (python_tool)."""
    tables: str | None = None
    """workplace_assistant: folder of CSV tables that rows refer to, with NeMo-Gym's names and columns; when absent the
    office that Millrace generates, for which `millrace data tools` writes rows."""
    mask_unless_above: float | None = None
    """Leave all answers to a training prompt out of the loss unless one of them has a reward above this: among answers
    that are all bad, the least bad is no example. null trains on every prompt."""
    swe: SweAgenticConfig = field(default_factory=SweAgenticConfig)
    """Containers, repositories and limits of the agent (swe_agentic)."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """The server of an agent that drives the episodes, and where it finds the policy (agent)."""
    pass_rates: str | None = None
    """JSONL file of the training prompts' pass rates, as `millrace data passrate` writes it; a stage's `curriculum`
    reads it."""
    verify_timeout_s: float = 10.0
    """Longest time one verification may take (math, python_tool, mcqa, structured_outputs); then its process is killed
    and it scores 0. Not read by instruction_following, which checks each constraint in time linear in the text, in no
    process of its own, nor by code, whose limits are those of `sandbox`."""
