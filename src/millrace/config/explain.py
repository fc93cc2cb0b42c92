"""The documentation of a recipe's keys, read from the strings below the fields of `schema`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union

from millrace.config import schema
from millrace.config.errors import ConfigError
from millrace.config.fields import STAGE_TYPES, field_docs, field_types, fields_by_key, is_optional, is_section


@dataclass(frozen=True)
class KeyDoc:
    key: str
    """Dotted key; `<name>` stands for a name of the recipe's choice, `stages.<sft>` for a stage of that type."""
    type: str
    default: str
    """As YAML writes it; "required" where there is none; empty for a section."""
    doc: str


@cache
def schema_listing() -> tuple[KeyDoc, ...]:
    """Every key a recipe may have, in the order of the schema."""
    return tuple(_keys(schema.Recipe, ""))


def listing_text() -> str:
    """Every key with type, default and documentation."""
    return "\n".join(line for doc in schema_listing() for line in _paragraph(doc))


def explain(key: str) -> str:
    """Type, default and documentation of a key such as `trainer.recompute` or `stages.rl.kl`; sections list theirs.

    Raises ConfigError with the nearest key.
    """
    listing = schema_listing()
    found = [doc for doc in listing if _matches(doc.key, key)]
    if found:
        return "\n".join(line for doc in found for line in _paragraph(doc))
    near = difflib.get_close_matches(key, [doc.key.replace("<", "").replace(">", "") for doc in listing], n=1)
    raise ConfigError(
        f"there is no key {key}; {f'the nearest is {near[0]}' if near else 'see millrace check --schema'}"
    )


def _paragraph(doc: KeyDoc) -> list[str]:
    default = f", default {doc.default}" if doc.default not in ("", "required") else ""
    required = ", required" if doc.default == "required" else ""
    return [f"{doc.key}  ({doc.type}{default}{required})", *([f"    {doc.doc}"] if doc.doc else [])]


def _matches(pattern: str, key: str) -> bool:
    """Whether `key` names the pattern's key or a section around it; placeholders match any name, lists drop out."""
    wanted, parts = key.split("."), pattern.split(".")
    if len(wanted) > len(parts):
        return False
    if wanted[:1] == ["stages"] and len(wanted) > 1 and wanted[1] in STAGE_TYPES and parts[1:2] != [f"<{wanted[1]}>"]:
        return False
    return all(part == want or part.startswith("<") for part, want in zip(parts, wanted, strict=False))


def _keys(cls: type, prefix: str) -> list[KeyDoc]:
    docs: list[KeyDoc] = []
    for name, field in fields_by_key(cls).items():
        kind, key = field_types(cls)[name], f"{prefix}{name}"
        doc = field_docs(cls).get(name, "")
        if is_section(kind):
            docs += [KeyDoc(key, "section", "", doc), *_keys(kind, f"{key}.")]
            continue
        docs.append(KeyDoc(key, type_name(kind), _default(field), doc))
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is dict and is_section(inner[1]):
            docs += _keys(inner[1], f"{key}.<name>.")
        elif is_optional(kind) and is_section(inner[0]):
            docs += _keys(inner[0], f"{key}.")
        elif name == "stages":
            for type_, stage in STAGE_TYPES.items():
                docs += _keys(stage, f"{key}.<{type_}>.")
    return docs


def type_name(kind: Any) -> str:
    """A type as a reader of YAML understands it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if kind == schema.StageConfig:
        return "stage"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} numbers"
    if origin is dict:
        return "sections by name" if is_section(arguments[1]) else f"{type_name(arguments[1])} by name"
    if is_section(kind):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "{}"
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
