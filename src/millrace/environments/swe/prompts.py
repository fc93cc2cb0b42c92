"""Prompts of the two steps of agentless repair: which files are at fault, and their edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

REPAIR = """\
Below are an issue and the files of the repository that it may be about.

[ISSUE]
{issue}
[END OF ISSUE]

{files}

Find the cause of the issue and fix it. Give every change as a block of this form, below a line with the path of its \
file:

### path/to/file.py
<<<<<<< SEARCH
the lines as they stand in the file, with their indentation, enough of them that they stand there only once
=======
the lines that take their place
>>>>>>> REPLACE

Give as many blocks as it takes, and change nothing that the issue does not ask for."""

LOCALISE = """\
Below are an issue and the paths of files in the repository.

[ISSUE]
{issue}
[END OF ISSUE]

[FILES]
{paths}
[END OF FILES]

Which files have to be changed to fix the issue? End with their paths, one a line, the likeliest first, at most \
{most}, between a line ``` and another one."""


def repair_prompt(issue: str, files: Mapping[str, str]) -> str:
    shown = "\n\n".join(f"### {path}\n```\n{content}\n```" for path, content in files.items())
    return REPAIR.format(issue=issue, files=shown)


def localisation_prompt(issue: str, paths: Iterable[str], most: int) -> str:
    return LOCALISE.format(issue=issue, paths="\n".join(paths), most=most)
