"""From a recipe file to the frozen dataclasses of `schema`, and back to YAML.

Strict: an unknown key, a value of the wrong type, a word that is not among the choices and a missing key are errors
that name file, line and key. All of them are reported at once. A domain or judge that is null is taken out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from millrace.config import schema
from millrace.config.cluster import ClusterConfig, cluster_problems
from millrace.config.errors import ConfigError
from millrace.config.fields import (
    STAGE_TYPES,
    field_docs,
    field_types,
    fields_by_key,
    is_optional,
    is_required,
    is_section,
)
from millrace.config.schema import BUILT_IN_TEMPLATES, Recipe
from millrace.config.sources import SHARED, InterpolatedText, KeyPath, Source, apply_overrides, read_source, resolve

_PATHS_OF_THE_RECIPE = (
    ("model", "path"),
    ("model", "lora", "adapter"),
    ("model", "chat_template"),  # unless it names a built-in one
    ("domains", "*", "train"),
    ("domains", "*", "held_out"),
    ("domains", "*", "pass_rates"),
    ("domains", "*", "tables"),
    ("domains", "*", "swe", "repositories"),
    ("judges", "*", "model"),
)
_PATHS_OF_A_STAGE = ("data",)
_TEMPLATE = ("model", "chat_template")

T = TypeVar("T")


class _Absent:
    """Marks a value that was refused, so that what stands beside it is still looked at."""


_ABSENT = _Absent()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with `key=value` overrides. Paths in it become absolute. Raises ConfigError with every problem."""
    source = read_source(Path(path))
    return _convert(Recipe, source, "the recipe", apply_overrides(source, overrides))


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster file, as strictly as a recipe. Raises ConfigError with every problem."""
    source = read_source(Path(path))
    cluster = _convert(ClusterConfig, source, "the cluster file", [])
    problems = cluster_problems(cluster)
    if problems:
        raise ConfigError([f"{source.origin(key)}: {'.'.join(key)} {text}" for key, text in problems])
    return cluster


def _convert(cls: type[T], source: Source, whole: str, problems: list[str]) -> T:
    """The tree of a source as `cls`; `whole` names it in messages, `problems` are those found before."""
    tree, unresolved = resolve(source)
    tree = {key: value for key, value in tree.items() if not key.startswith(SHARED)}
    converter = _Converter(source, whole, silent=bool(unresolved))
    converted = converter.section(cls, tree, _Place((), ""))
    problems = [*problems, *unresolved, *converter.problems]
    if problems or isinstance(converted, _Absent):
        raise ConfigError(problems)
    return typing.cast(T, converted)


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every key written out; `load_recipe` of it gives an equal recipe from any folder."""
    return yaml.safe_dump(_plain(written(recipe)), sort_keys=False, width=120, allow_unicode=True)


def written(section: Any) -> Any:
    """A section of a recipe as plain values under the keys that recipes write."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return {key: written(getattr(section, field.name)) for key, field in fields_by_key(type(section)).items()}
    if isinstance(section, Mapping):
        return {key: written(value) for key, value in section.items()}
    return [written(item) for item in section] if isinstance(section, tuple) else section


@dataclass(frozen=True)
class _Place:
    """Where a value stands: its path in the tree, and its name for people (stages by name)."""

    path: KeyPath
    label: str

    def child(self, key: str, label: str | None = None) -> _Place:
        name = label or key
        return _Place((*self.path, key), f"{self.label}.{name}" if self.label else name)


class _Converter:
    """Gives values their types, collecting every problem on the way."""

    def __init__(self, source: Source, whole: str, silent: bool) -> None:
        self.source = source
        self.whole = whole
        self.silent_about_missing = silent
        self.problems: list[str] = []

    def section(self, cls: type, value: Any, place: _Place) -> Any:
        """A dataclass from a mapping."""
        if not isinstance(value, Mapping):
            return self._refuse(place, f"must be a section with keys, not {_said(value)}")
        hints, fields = field_types(cls), fields_by_key(cls)
        for key in [key for key in value if key not in hints]:
            self._refuse(place.child(key), f"is not a known key; {_nearest(cls, key)}")
        arguments: dict[str, Any] = {}
        for key, kind in hints.items():
            if key in value:
                arguments[fields[key].name] = self.value(kind, value[key], place.child(key))
            elif is_required(fields[key]):
                arguments[fields[key].name] = self._missing(place, key, cls)
        return _ABSENT if _ABSENT in arguments.values() else cls(**arguments)

    def value(self, kind: Any, value: Any, place: _Place) -> Any:
        """A value of the annotated type `kind`."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind == schema.StageConfig:
            return self._stage(value, place)
        if is_optional(kind):
            return None if value is None else self.value(arguments[0], value, place)
        if origin is Literal:
            return self._choice(arguments, value, place)
        if origin is tuple:
            return self._tuple(arguments, value, place)
        if origin is dict:
            return self._dict(arguments[1], value, place)
        if is_section(kind):
            return self.section(kind, value, place)
        return self._scalar(kind, value, place)

    def _stage(self, value: Any, place: _Place) -> Any:
        *first, last = STAGE_TYPES
        kinds = f"{', '.join(first)} or {last}"
        if not isinstance(value, Mapping):
            return self._refuse(place, f"must be a section with `type` ({kinds}), not {_said(value)}")
        if isinstance(value.get("name"), str):
            place = _Place(place.path, f"stages.{value['name']}")
        if "type" not in value:
            return self._refuse(place, f"needs a `type`: {kinds}")
        if not isinstance(value["type"], str) or value["type"] not in STAGE_TYPES:
            return self._refuse(place.child("type"), f"must be {kinds}, not {_said(value['type'])}")
        return self.section(STAGE_TYPES[value["type"]], value, place)

    def _choice(self, choices: tuple[str, ...], value: Any, place: _Place) -> Any:
        if value in choices and isinstance(value, str):
            return str(value)
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return self._refuse(place, f"must be one of {', '.join(choices)}, not {_said(value)}{hint}")

    def _tuple(self, arguments: tuple[Any, ...], value: Any, place: _Place) -> Any:
        if not isinstance(value, list):
            return self._refuse(place, f"must be a list, not {_said(value)}; write [..., ...]")
        open_ended = arguments[-1] is Ellipsis
        if not open_ended and len(value) != len(arguments):
            return self._refuse(place, f"must hold {len(arguments)} values, not {len(value)}")
        kinds = [arguments[0]] * len(value) if open_ended else arguments
        items = [
            self.value(kind, item, place.child(str(index)))
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        ]
        return _ABSENT if _ABSENT in items else tuple(items)

    def _dict(self, kind: Any, value: Any, place: _Place) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(place, f"must be a section with names, not {_said(value)}")
        if is_section(kind):  # null takes an entry out that a base file wrote
            value = {key: item for key, item in value.items() if item is not None}
        entries = {key: self.value(kind, item, place.child(key)) for key, item in value.items()}
        return _ABSENT if _ABSENT in entries.values() else entries

    def _scalar(self, kind: type, value: Any, place: _Place) -> Any:
        converted = _converted(kind, value)
        if isinstance(converted, _Absent):
            hint = "; put it in quotes" if kind is str and value is not None else ""
            return self._refuse(place, f"must be {_NAMES[kind]}, not {_said(value)}{hint}")
        return self._resolved_path(converted, place.path) if kind is str else converted

    def _resolved_path(self, text: str, path: KeyPath) -> str:
        """Data and model paths start at the folder of the file that wrote them, run_dir at the current folder."""
        folder = None
        if path == ("run_dir",):
            folder = Path.cwd()
        elif _is_data_path(path) and not (path == _TEMPLATE and text in BUILT_IN_TEMPLATES):
            folder = self.source.origin(path).folder
        return text if folder is None else str(Path(folder, Path(text).expanduser()).resolve())

    def _missing(self, place: _Place, name: str, cls: type) -> _Absent:
        if not self.silent_about_missing:
            self._refuse(place.child(name), f"is required{_documented(cls, name)}")
        return _ABSENT

    def _refuse(self, place: _Place, text: str) -> _Absent:
        self.problems.append(f"{self.source.origin(place.path)}: {place.label or self.whole} {text}")
        return _ABSENT


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _converted(kind: type, value: Any) -> Any:
    """The value as `kind`, or _ABSENT. Text may stand for a float, interpolated text for any kind."""
    if isinstance(value, InterpolatedText) and kind in (int, bool):
        return _from_interpolation(kind, value)
    if kind is float:
        return _as_float(value)
    if kind is int and isinstance(value, bool):
        return _ABSENT
    if not isinstance(value, kind):
        return _ABSENT
    return str(value) if kind is str else value


def _from_interpolation(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _ABSENT)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else _ABSENT


def _as_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _ABSENT
    try:
        number = float(value)
    except ValueError:
        return _ABSENT
    return number if math.isfinite(number) else _ABSENT


def _is_data_path(path: KeyPath) -> bool:
    if path[:1] == ("stages",):
        return len(path) > 2 and path[2] in _PATHS_OF_A_STAGE
    return any(
        len(pattern) == len(path) and all(part in ("*", key) for part, key in zip(pattern, path, strict=True))
        for pattern in _PATHS_OF_THE_RECIPE
    )


def _nearest(cls: type, key: str) -> str:
    """What may have been meant by an unknown key."""
    hints = field_types(cls)
    near = difflib.get_close_matches(key, hints, n=1)
    if near:
        return f"did you mean {near[0]}?"
    inside = [f"{name}.{key}" for name, kind in hints.items() if is_section(kind) and key in field_types(kind)]
    return f"did you mean {inside[0]}?" if inside else f"there are {', '.join(hints)}"


def _documented(cls: type, name: str) -> str:
    doc = field_docs(cls).get(name, "")
    return f": {doc}" if doc else ""


def _said(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return f"the text {str(value)!r}" if isinstance(value, str) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # A literal ${ must not be read as an interpolation; backslashes before it are halved when it is read.
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
