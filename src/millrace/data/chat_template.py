"""Which chat template a checkpoint is used with: its own, one that Millrace ships, or a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from millrace.config.checkpoint_files import TEMPLATE_FILE
from millrace.config.schema import BUILT_IN_TEMPLATES, FAMILY_TEMPLATES
from millrace.data.errors import DataError


def chosen_template(own: str | None, config: Mapping[str, Any], named: str | None, path: Path) -> str:
    """The Jinja text of the chat template of the checkpoint in `path`.

    Args:
        own: the tokenizer's own template.
        config: the checkpoint's config.json.
        named: `model.chat_template` of a recipe, a built-in template's name or a file; None takes the tokenizer's own,
            or where it has none that of its family.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    if named is not None:
        return _built_in(named) if named in BUILT_IN_TEMPLATES else _read(Path(named))
    if own:
        return own
    family = FAMILY_TEMPLATES.get(str(config.get("model_type")))
    if family is None:
        raise DataError(
            f"{path}: the tokenizer has no chat template: add {TEMPLATE_FILE} or a chat_template in "
            f"tokenizer_config.json, or name one with model.chat_template ({', '.join(BUILT_IN_TEMPLATES)}, or a file)"
        )
    return _built_in(family)


def _built_in(name: str) -> str:
    return (resources.files("millrace.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {path} cannot be read: {error}") from error
