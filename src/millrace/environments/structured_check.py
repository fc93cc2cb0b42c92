"""Whether a text validates against a JSON Schema made strict. Runs in a verifier process: a schema's pattern may
backtrack forever, and an answer may be nested or aliased without end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.exceptions import Unresolvable

from millrace.environments.structured_formats import ParseError, parse

LONGEST_REASON = 200
"""Characters of a problem that are told."""

MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "contains", "unevaluatedItems")


def check(schema_str: str, schema_type: str, text: str) -> tuple[str, str] | None:
    """What is wrong with a text, as the kind of problem ("parse" or "schema") and a sentence, or None."""
    schema = json.loads(schema_str)
    try:
        value = parse(text, schema_type, schema)
    except ParseError as error:
        return "parse", f"not {schema_type}: {error}"[:LONGEST_REASON]
    return _schema_problem(value, strictified(schema))


def _schema_problem(value: Any, schema: Any) -> tuple[str, str] | None:
    validator = Draft202012Validator(schema, registry=Registry())  # an empty registry: no reference leaves the schema
    try:
        error = best_match(validator.iter_errors(value))
    except RecursionError:
        return "schema", "$: it is nested too deeply"
    except Unresolvable as unresolvable:
        return "schema", f"the schema's reference {unresolvable.ref!r} leads nowhere"
    return None if error is None else ("schema", f"{error.json_path}: {error.message}"[:LONGEST_REASON])


def strictified(schema: Any) -> Any:
    """The schema in which each object with `properties` needs all of them and allows no other.

    NeMo-Gym leaves the alternatives of `anyOf` and `oneOf` and the places of `prefixItems` as they are; here they are
    made strict too. The parts of `allOf`, `if` and `not` are left, since each describes only a part of an object.
    """
    if not isinstance(schema, Mapping):
        return schema
    strict = dict(schema)
    for key in MAPS_OF_SCHEMAS:
        if isinstance(strict.get(key), Mapping):
            strict[key] = {name: strictified(child) for name, child in strict[key].items()}
    for key in LISTS_OF_SCHEMAS:
        if isinstance(strict.get(key), list):
            strict[key] = [strictified(child) for child in strict[key]]
    for key in SCHEMAS:
        if key in strict:
            strict[key] = strictified(strict[key])
    if "properties" in strict:
        strict |= {"required": list(strict["properties"]), "additionalProperties": False}
    return strict
