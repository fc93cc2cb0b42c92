"""Texts of five formats as JSON values, as NeMo-Gym's `structured_outputs` server reads them."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Mapping
from typing import Any
from xml.parsers import expat

import yaml

FORMATS = ("json", "yaml", "xml", "toml", "csv")

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class ParseError(Exception):
    """A text is not of its format."""


def parse(text: str, schema_type: str, schema: Mapping[str, Any]) -> Any:
    """The value that a text holds. XML and CSV know only strings, which are read as the schema's types where possible.

    Raises:
        ParseError: the text is not of the format.
    """
    try:
        match schema_type:
            case "json":
                return json.loads(text)
            case "yaml":
                return _with_string_keys(yaml.safe_load(text))
            case "toml":
                return tomllib.loads(text)
            case "csv":
                return _read_table(text, schema)
            case _:
                return _typed(_parse_xml(text), schema)
    except (ValueError, yaml.YAMLError, csv.Error, expat.ExpatError) as error:
        raise ParseError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error


def _with_string_keys(value: Any) -> Any:
    """YAML's keys may be of any type; those of an object are strings."""
    if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
        raise ParseError("a key is not a string")
    for child in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _with_string_keys(child)
    return value


class _XmlReader:
    """Builds the value of a document: an element is the text in it, or an object of its attributes (`@name`), its
    children and its text (`#text`); children of one name are a list, and an empty element is null."""

    def __init__(self) -> None:
        self.root: dict[str, Any] = {}
        self._open: list[tuple[dict[str, Any], list[str]]] = [(self.root, [])]

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._open.append(({f"@{key}": value for key, value in attributes.items()}, []))

    def text(self, data: str) -> None:
        self._open[-1][1].append(data)

    def end(self, name: str) -> None:
        item, pieces = self._open.pop()
        text = "".join(pieces).strip() or None
        value = {**item, **({"#text": text} if text else {})} if item else text
        parent = self._open[-1][0]
        if name not in parent:
            parent[name] = value
        elif isinstance(parent[name], list):
            parent[name].append(value)
        else:
            parent[name] = [parent[name], value]

    def refuse(self, *_: Any) -> None:
        raise ParseError("it declares an entity")


def _parse_xml(text: str) -> dict[str, Any]:
    reader, parser = _XmlReader(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler, parser.EntityDeclHandler = reader.text, reader.refuse
    parser.Parse(text, True)
    return reader.root


def _typed(value: Any, schema: Any) -> Any:
    """An XML value with its strings read as the schema's types; what cannot be read stays as it is."""
    wanted = _wanted(schema)
    if wanted == "object" and isinstance(value, dict):
        properties = schema.get("properties", {})
        return {key: _typed(child, properties.get(key)) for key, child in value.items()}
    if wanted == "array":
        if isinstance(value, dict) and len(value) == 1:  # <tags><tag>a</tag><tag>b</tag></tags>
            value = next(iter(value.values()))
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [_typed(item, schema.get("items")) for item in items]
    if wanted == "string" and value is None:
        return ""
    return _typed_scalar(value, wanted)


def _read_table(text: str, schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    if any(None in row for row in rows):
        raise ParseError("a row has more fields than the header")
    items = schema.get("items")
    properties = (items if isinstance(items, Mapping) else schema).get("properties", {})
    return [{name: _typed_cell(cell, _wanted(properties.get(name))) for name, cell in row.items()} for row in rows]


def _wanted(schema: Any) -> Any:
    """The type that a schema asks for; one that is true or absent asks for none."""
    return schema.get("type") if isinstance(schema, Mapping) else None


def _typed_cell(cell: Any, wanted: Any) -> Any:
    """A cell as the first of the wanted types that it can be read as; an empty one is null where null is one."""
    kinds = wanted if isinstance(wanted, list) else [wanted]
    if not cell:
        return None if "null" in kinds and isinstance(wanted, list) else cell
    for kind in kinds:
        value = _typed_scalar(cell, kind)
        if not isinstance(value, str) or kind == "string":
            return value
    return cell


def _typed_scalar(value: Any, wanted: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if wanted == "integer":
            return int(value)
        if wanted == "number":
            return float(value)
    except ValueError:
        return value
    return BOOLEANS.get(value.lower(), value) if wanted == "boolean" else value
