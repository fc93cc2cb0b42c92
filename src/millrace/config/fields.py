"""The schema's fields as data: evaluated types, and the documentation strings below them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import types
import typing
from functools import cache
from typing import Any, Union

from millrace.config import schema

STAGE_TYPES: dict[str, type] = {cls.type: cls for cls in typing.get_args(schema.StageConfig)}


def key_of(field_name: str) -> str:
    """The recipe's key of a field: `from_` stands for `from`, which Python keeps for itself."""
    return field_name.rstrip("_")


@cache
def fields_by_key(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a schema class by the keys that recipes write."""
    return {key_of(field.name): field for field in dataclasses.fields(cls)}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The evaluated annotations of a schema class by key, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return {key: hints[field.name] for key, field in fields_by_key(cls).items()}


def is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType) and type(None) in typing.get_args(kind)


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a schema class, its bases included, as one line by key."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = _class_bodies(base.__module__)[base.__name__]
        for statement, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_text(after):
                text = ast.literal_eval(typing.cast(ast.Expr, after).value)
                docs[key_of(statement.target.id)] = " ".join(text.split())
    return docs


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
