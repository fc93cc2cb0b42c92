"""What is raised when a recipe or a checkpoint's config.json cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.errors import MillraceError


class ConfigError(MillraceError):
    """One or several problems, each one sentence that names the file or key and the way out."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
