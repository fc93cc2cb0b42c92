"""Software engineering by an agent: a shell and an editor in a checkout of the row's repository, until it submits.

Every command is a box of its own. When the agent is done, its patch is taken by a git that it could not reach and is
tested in a second, fresh checkout: reward 1 when every test comes to what the row says, else 0. The tests run the
agent's code in their own process, here as in the field: a patch that forges its tests' report is not told apart.

Masked, because the reward would say nothing of the answer or reward a run that never ended by itself: the episode's
time is up; the tests' is; something ran out of memory; a limit of turns, tokens or context was reached though the patch
resolves the problem; a box failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from millrace.config.schema import SweAgenticConfig
from millrace.environments.base import Cut, Message, Observation, Reward
from millrace.environments.sandbox.boxes import Unavailable
from millrace.environments.sandbox.run import Limits, Run, SandboxFault
from millrace.environments.sandbox.tiers import NoSandboxError
from millrace.environments.sandbox.workspace import WORK, open_workspace, out_of_memory
from millrace.environments.swe.checkout import PatchError, check_out, put_together, take_patch
from millrace.environments.swe.execution import read_outcomes, wrong_tests
from millrace.environments.swe.rows import SweRowError, Task, read_task
from millrace.environments.tool_calls import ToolCall, ToolCallError, parse_tool_calls

T = TypeVar("T")

EDIT = (Path(__file__).parent / "swe" / "editor.py").read_text()
OPENING = """\
A repository is checked out in {folder}. Solve this issue in it:

{problem}

Use the tools to read the code, to change it and to run it. Change no test: others, which you do not see, decide. Call \
submit when the issue is solved."""


def _tool(name: str, description: str, required: Sequence[str], **parameters: tuple[str, str]) -> Mapping[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS: Sequence[Mapping[str, Any]] = (
    _tool(
        "shell",
        f"Run a command with bash in {WORK}. Each starts afresh there; what it changes there stays. No network.",
        ["command"],
        command=("string", "The command."),
    ),
    _tool(
        "edit",
        "View or change a file.",
        ["action", "path"],
        action=(
            "string",
            "view (a file or a folder), create (a file with text), replace (old by text), insert (text).",
        ),
        path=("string", f"The file, from {WORK} on."),
        old=("string", "replace: what is replaced; it must stand in the file exactly once."),
        text=("string", "create, replace, insert: the new text."),
        line=("integer", "insert: the line behind which the text comes, 0 for the top. view: the first line shown."),
    ),
    _tool("submit", "Say that the issue is solved. The episode ends.", []),
)


class SweAgenticEnvironment:
    """Raises NoSandboxError when there are no boxes for it on this machine."""

    required_fields: Sequence[str] = ("problem_statement",)

    def __init__(self, config: SweAgenticConfig) -> None:
        self.config = config
        try:
            self.workspace = open_workspace(config.container)
        except Unavailable as error:
            raise NoSandboxError(
                f"swe_agentic cannot run with swe.container {config.container} on this machine: {error}; take the "
                "other one of apptainer (images) and bubblewrap (a laptop)"
            ) from error
        self._room = asyncio.Semaphore(config.at_once or os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(config.at_once or os.cpu_count() or 1, thread_name_prefix="swe")
        self.episodes = self.resolved = self.masked = 0

    def validate(self, row: Mapping[str, Any]) -> str | None:
        try:
            task = read_task(row)
        except SweRowError as error:
            return f"the row has {error}"
        if self.config.container == "apptainer":
            return None if self._image(task) else "the row has no docker_image, and swe.images is not set"
        source = self._source(task)
        if source is None:
            return "the row's repository lies in an image, which swe.container bubblewrap has not; take apptainer"
        return None if source.exists() else f"the row's repository {source} is not there; see swe.repositories"

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        text = OPENING.format(folder=WORK, problem=read_task(row).problem.strip())
        return [{"role": "user", "content": text}]

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return TOOLS

    async def open(self, row: Mapping[str, Any]) -> SweSession:
        """Waits for room, which the episode holds until it is closed."""
        task = read_task(row)
        await self._room.acquire()
        session = SweSession(self, task, self._image(task), self._source(task))
        try:
            await session.start()
        except BaseException:
            await session.close()
            raise
        return session

    def summary(self) -> str:
        """What was done so far, in a sentence for the log."""
        done = f"{self.episodes} patches tested, {self.resolved} resolved"
        return f"boxes of {self.workspace.name}: {done}; {self.masked} episodes masked"

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def leave(self) -> None:
        self._room.release()

    async def run(self, action: Callable[[], T]) -> T:
        """Run something that waits, in a thread. It goes on when its caller is cancelled; limits end it."""
        return await asyncio.wrap_future(self._threads.submit(action))

    def _image(self, task: Task) -> str:
        if self.config.container != "apptainer":
            return ""
        if self.config.images is not None:
            return self.config.images.format(instance_id=task.instance)
        return f"docker://{task.image}" if task.image else ""

    def _source(self, task: Task) -> Path | None:
        if self.config.container == "apptainer" or task.repository is None or self.config.repositories is None:
            return None
        return Path(self.config.repositories) / task.repository.replace("/", "__")


class SweSession:
    def __init__(self, environment: SweAgenticEnvironment, task: Task, image: str, source: Path | None) -> None:
        self._environment, self._config = environment, environment.config
        self._workspace, self._task, self._image, self._source = environment.workspace, task, image, source
        self._holder: tempfile.TemporaryDirectory[str] | None = None
        self._at_work = threading.Lock()
        """Held by what goes on in the folder, also when nobody waits for it any more: it is removed behind that."""
        self._calls = self._failed = 0
        self._out_of_memory = False
        self._limits = Limits(
            wall_s=self._config.command_s,
            cpu_s=round(self._config.command_s + 0.5),
            memory_bytes=self._config.memory_mb << 20,
            processes=self._config.processes,
            open_files=1024,
            output_bytes=16 << 20,
            file_bytes=self._config.file_mb << 20,
        )

    async def start(self) -> None:
        await self._run(self._make)

    async def step(self, answer: str) -> Observation | Reward:
        try:
            calls = parse_tool_calls(answer, TOOLS)
        except ToolCallError as error:
            self._failed += 1
            return _observation([f"Error: {error}"])
        try:
            shown = []
            for call in calls:
                if call.name == "submit":
                    return await self._judge()
                shown.append(await self._call(call))
                if self._out_of_memory:
                    return self._masked("a command ran out of memory")
            return _observation(shown) if calls else await self._judge()
        except SandboxFault as fault:
            return self._masked(f"no verdict: {fault}")

    async def cut(self, by: Cut) -> Reward:
        if by == "time":
            return self._masked("the agent's time is up")
        try:
            reward = await self._judge()
        except SandboxFault as fault:
            return self._masked(f"no verdict: {fault}")
        if reward.value == 1.0:
            return self._masked(f"resolved, but the agent reached its limit of {by}")
        return Reward(reward.value, f"limit of {by}; {reward.reason}", reward.details, reward.masked)

    async def close(self) -> None:
        self._environment.leave()
        with contextlib.suppress(RuntimeError):  # the environment is closed already; the interpreter's end removes it
            await self._run(self._remove)

    def _make(self) -> None:
        self._holder = tempfile.TemporaryDirectory(prefix="millrace-swe-", ignore_cleanup_errors=True)
        self._root = Path(self._holder.name)
        self._root.chmod(0o711)
        self._check_out("agent")

    def _remove(self) -> None:
        if self._holder is not None:
            self._holder.cleanup()

    async def _run(self, action: Callable[[], T]) -> T:
        def alone() -> T:
            with self._at_work:
                return action()

        return await self._environment.run(alone)

    async def _call(self, call: ToolCall) -> str:
        """What the policy is shown of a call."""
        self._calls += 1
        match call.name:
            case "shell" if isinstance(call.arguments.get("command"), str):
                run = await self._command(["bash", "-c", call.arguments["command"]])
                return self._shown(run)
            case "shell":
                text = "Error: shell needs the parameter command, a string"
            case "edit":
                run = await self._command(["python3", "-c", EDIT], json.dumps(call.arguments).encode())
                self._failed += not run.clean
                return self._cut_short(run.stdout.decode(errors="replace") or _ending(run, self._config.command_s))
            case name:
                text = f"Error: there is no tool {name}; there are shell, edit and submit"
        self._failed += 1
        return text

    async def _command(self, argv: Sequence[str], stdin: bytes = b"") -> Run:
        def run() -> Run:
            return self._workspace.run(self._files("agent"), argv, self._limits, stdin=stdin, image=self._image)

        done = await self._run(run)
        self._out_of_memory = self._workspace.ends_for_memory and out_of_memory(done)
        return done

    async def _judge(self) -> Reward:
        try:
            outcome = await self._run(self._test)
        except PatchError as error:
            return self._scored(0.0, str(error), {})
        run, outcomes, details = outcome
        if run is None:
            return self._scored(0.0, "nothing was changed", details)
        if run.ending == "wall":
            return self._masked("the tests' time is up")
        if out_of_memory(run):
            return self._masked("the tests ran out of memory")
        wrong = wrong_tests(outcomes, self._task.expected, self._task.test_format)
        details = {**details, "tests": float(len(self._task.expected)), "tests_wrong": float(len(wrong))}
        if wrong:
            return self._scored(0.0, f"{len(wrong)} of {len(self._task.expected)} tests wrong, {wrong[0]}", details)
        return self._scored(1.0, "resolved", details)

    def _test(self) -> tuple[Run | None, dict[str, str], dict[str, float]]:
        """Take the patch, put it into a fresh checkout, run the tests there."""
        patch = take_patch(self._task, self._image, self._workspace, self._root / "agent")
        details = {"patch_bytes": float(len(patch))}
        if not patch:
            return None, {}, details
        self._check_out("tests")
        put_together(self._task, patch, self._image, self._workspace, self._root / "tests")
        limits = self._limits._replace(wall_s=self._config.tests_s, cpu_s=round(self._config.tests_s + 0.5))
        argv = ["bash", "-c", self._task.test_command]
        run = self._workspace.run(self._files("tests"), argv, limits, image=self._image)
        report = (run.stdout + b"\n" + run.stderr).decode(errors="replace")
        return run, read_outcomes(report, self._task.test_format), details

    def _check_out(self, name: str) -> None:
        check_out(self._task, self._source, self._image, self._workspace, self._root / name)

    def _files(self, name: str) -> Path:
        return self._root / name / "files"

    def _shown(self, run: Run) -> str:
        text = (run.stdout + run.stderr).decode(errors="replace").rstrip("\n")
        notes = [] if run.clean else [_ending(run, self._config.command_s)]
        self._failed += not run.clean
        return "\n".join(part for part in (self._cut_short(text), *notes) if part) or "[no output]"

    def _cut_short(self, text: str) -> str:
        most = self._config.output_characters
        if len(text) <= most:
            return text
        left_out = len(text) - most
        return f"{text[: most - most // 2]}\n[... {left_out} characters left out ...]\n{text[len(text) - most // 2 :]}"

    def _scored(self, value: float, reason: str, details: Mapping[str, float]) -> Reward:
        self._environment.episodes += 1
        self._environment.resolved += value == 1.0
        return Reward(value, reason, {**details, **self._details()})

    def _masked(self, reason: str) -> Reward:
        self._environment.masked += 1
        return Reward(0.0, reason, self._details(), masked=True)

    def _details(self) -> dict[str, float]:
        return {
            "calls": float(self._calls),
            "failed_calls": float(self._failed),
            f"sandbox_{self._workspace.name}": 1.0,
        }


def _observation(texts: Sequence[str]) -> Observation:
    return Observation([{"role": "tool", "content": text} for text in texts])


def _ending(run: Run, limit_s: float) -> str:
    match run.ending:
        case "wall":
            return f"[the command was ended after {limit_s:g} s]"
        case "output":
            return "[the command was ended, for it printed too much]"
        case "killed" | "cpu":
            return f"[the command was killed by signal {run.status}]"
    return f"[exit status {run.status}]"
