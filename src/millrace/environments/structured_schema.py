"""What is wrong with a JSON Schema, found in a fraction of a millisecond.

jsonschema's own check against the metaschema takes tens of milliseconds, so minutes for a data set. This one looks at
the form of each keyword, at its patterns, and at its references, none of which may lead out of the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TYPES = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})

DEEPEST = 200
"""Levels of a schema; one of a real document has a dozen."""

SCHEMA_KEYS = frozenset(
    {"items", "contains", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"}
    | {"not", "if", "then", "else"}
)
MAP_KEYS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LIST_KEYS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})


def _is_type(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else _is_list(value) and all(map(_is_one_type, value))


def _is_one_type(value: Any) -> bool:
    return isinstance(value, str) and value in TYPES


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and float(value).is_integer()


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


FORMS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (f"one of {', '.join(sorted(TYPES))} or a list of them", _is_type),
    "required": ("a list of names", _is_names),
    "$schema": ("a string", _is_text),
    "enum": ("a list", lambda value: isinstance(value, list)),
    "pattern": ("a string", _is_text),
    "$ref": ("a string", _is_text),
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "dependentRequired": (
        "an object of lists of names",
        lambda v: isinstance(v, dict) and all(map(_is_names, v.values())),
    ),
    "uniqueItems": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(MAP_KEYS, ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(LIST_KEYS, ("a non-empty list", _is_list)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), ("a number", _is_number)),
    **dict.fromkeys(
        (
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
            "minProperties",
            "maxProperties",
            "minContains",
            "maxContains",
        ),
        ("a whole number of at least 0", _is_count),
    ),
}


def schema_problem(schema_str: Any) -> str | None:
    """Why this is not the text of a schema that can be checked, in a clause that follows its name, or None."""
    if not isinstance(schema_str, str):
        return f"must be the text of a JSON Schema, not a {type(schema_str).__name__}"
    try:
        schema = json.loads(schema_str)
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}"
    if not isinstance(schema, dict):
        return f"must be a JSON object, not {schema_str[:80]}"
    return next(_problems(schema, schema, "#", 0), None)


def _problems(schema: Any, root: Mapping[str, Any], where: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        yield f"is nested more than {DEEPEST} levels deep"
    elif not isinstance(schema, bool | dict):
        yield f"has {schema!r} at {where} where a schema must be"
    elif isinstance(schema, dict):
        yield from _form_problems(schema, where)
        yield from _content_problems(schema, root, where)
        for name, child in _children(schema, where):
            yield from _problems(child, root, name, depth + 1)


def _form_problems(schema: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, (form, is_form) in FORMS.items():
        if key in schema and not is_form(schema[key]):
            yield f"has {key} {schema[key]!r} at {where}, which must be {form}"


def _content_problems(schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> Iterator[str]:
    for pattern in (*_given(schema, "pattern"), *schema.get("patternProperties", ())):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"has at {where} the pattern {pattern[:80]!r}, which is not a regular expression: {error}"
    for reference in _given(schema, "$ref"):
        if not reference.startswith("#"):
            yield f"refers at {where} to {reference!r}, outside of itself; write it into $defs"
        elif not _leads_somewhere(reference, root):
            yield f"refers at {where} to {reference!r}, which is not in it"


def _given(schema: Mapping[str, Any], key: str) -> list[str]:
    return [schema[key]] if key in schema else []


def _leads_somewhere(reference: str, root: Any) -> bool:
    """Whether a JSON Pointer finds something. Anchors are not followed: no released schema has one."""
    place = root
    for step in reference.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and key in place:
            place = place[key]
        elif isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            place = place[int(key)]
        else:
            return False
    return reference == "#" or reference.startswith("#/")


def _children(schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """What stands where schemas must be within a schema of the right form, each with its place."""
    for key, value in schema.items():
        place = f"{where}/{key}"
        if key in SCHEMA_KEYS:
            yield place, value
        elif key in MAP_KEYS:
            yield from ((f"{place}/{name}", child) for name, child in value.items())
        elif key in LIST_KEYS:
            yield from ((f"{place}/{number}", child) for number, child in enumerate(value))
