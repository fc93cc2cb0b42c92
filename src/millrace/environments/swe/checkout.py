"""Checkouts of a row's repository: what an agent works in, and what its patch is tested in.

A checkout holds the files of one commit and a history of one commit of its own, so that nobody finds the mended files
in it. Git runs on the host only where no agent has been: over the row's repository. Whatever an agent has touched is
read by a git in a box, with a history that it never saw.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from millrace.environments.sandbox.run import Limits, Run, SandboxFault
from millrace.environments.sandbox.workspace import ApptainerWorkspace, Workspace
from millrace.environments.swe.rows import R2E_FOLDER, Task

GIT_LIMIT_S = 600.0
PATCH_LIMITS = Limits(
    wall_s=300.0, cpu_s=300, memory_bytes=4 << 30, processes=64, output_bytes=16 << 20, file_bytes=1 << 30
)
"""Of taking and of applying a patch; a longer one is none."""
IDENTITY = ("-c", "user.name=base", "-c", "user.email=base@localhost", "-c", "commit.gpgsign=false")
ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    **{f"GIT_{who}_DATE": "2000-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}


class PatchError(Exception):
    """Why there is no patch, or why it does not apply; a fault of the policy."""


def check_out(task: Task, source: Path | None, image: str, workspace: Workspace, folder: Path) -> None:
    """Fill a new folder with the repository at the task's commit, and keep its history beside it.

    Raises:
        SandboxFault: the repository or the commit is not there.
    """
    files = folder / "files"
    files.mkdir(parents=True)
    if source is None:
        assert isinstance(workspace, ApptainerWorkspace)
        workspace.unpack(image, files)
        shutil.rmtree(files / ".git", ignore_errors=True)
    else:
        where = _git(["rev-parse", "--absolute-git-dir"], source).strip()
        over = ["--git-dir", where, "--work-tree", str(files)]
        index = {"GIT_INDEX_FILE": str(folder / "index")}
        _git([*over, "read-tree", str(task.commit)], files, index)
        _git([*over, "checkout-index", "--all", "--force"], files, index)
    _git(["init", "--quiet"], files)
    _git(["add", "--all", "--force"], files)
    _git([*IDENTITY, "commit", "--quiet", "--allow-empty", "--message", "base"], files)
    shutil.copytree(files / ".git", folder / "history")
    folder.chmod(0o711)
    workspace.own(files)


def take_patch(task: Task, image: str, workspace: Workspace, folder: Path) -> bytes:
    """What an agent changed, without what it did to hidden tests. The agent's boxes have ended.

    Raises:
        PatchError: the changes are too large, or no git can read them.
        SandboxFault: the box failed.
    """
    files = folder / "files"
    history = files / ".git"
    files.chmod(0o755)  # the agent may have closed it
    if os.path.lexists(history):  # put aside as it is: what a user closed to himself he cannot remove
        if history.is_dir() and not history.is_symlink():
            history.chmod(0o700)
        history.rename(folder / "theirs")
    shutil.copytree(folder / "history", history)
    workspace.own(history)
    added = workspace.run(files, ["git", "add", "--all"], PATCH_LIMITS, image=image)
    hidden = [f":(exclude,top,literal){path}" for path in (*task.hidden, R2E_FOLDER)]
    diff = ["git", "diff", "--cached", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".", *hidden]
    run = workspace.run(files, diff, PATCH_LIMITS, image=image)
    for each in (added, run):
        if not each.clean:
            raise PatchError(f"the changes cannot be read as a patch ({_why(each)})")
    return run.stdout


def put_together(task: Task, patch: bytes, image: str, workspace: Workspace, folder: Path) -> None:
    """Apply the hidden tests and the policy's patch to a fresh checkout; the tests first, so that no patch stands in
    their way.

    Raises:
        PatchError: the patch does not apply.
        SandboxFault: the hidden tests do not, or the box failed.
    """
    files = folder / "files"
    apply = ["git", "apply", "--whitespace=nowarn", "-"]
    steps: list[tuple[Sequence[str], bytes]] = [(apply, task.test_patch.encode())] if task.test_patch else []
    if task.test_files:
        steps.append((["sh", "-c", f"rm -rf {R2E_FOLDER} && mkdir {R2E_FOLDER}"], b""))
        steps += [(["sh", "-c", 'cat > "$0"', path], text.encode()) for path, text in task.test_files.items()]
    for argv, stdin in steps:
        run = workspace.run(files, argv, PATCH_LIMITS, stdin=stdin, image=image)
        if not run.clean:
            raise SandboxFault(f"the hidden tests of {task.instance} cannot be put in place ({_why(run)})")
    run = workspace.run(files, apply, PATCH_LIMITS, stdin=patch, image=image)
    if not run.clean:
        raise PatchError(f"the patch does not apply ({_why(run)})")


def _git(arguments: Sequence[str], folder: Path, extra: dict[str, str] | None = None) -> str:
    """Git on the host."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**ENVIRONMENT, **(extra or {})},
            capture_output=True,
            text=True,
            timeout=GIT_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxFault(f"git in {folder}: {error}") from error
    if done.returncode:
        raise SandboxFault(f"git {arguments[0]} in {folder}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _why(run: Run) -> str:
    lines = run.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"{run.ending} with {run.status}"
