"""The YAML side of a recipe: files with `extends`, anchors, overrides and interpolation, with every key's origin.

A recipe is first a plain tree of dicts, lists and scalars beside a table that says which file and line wrote each key,
so that a complaint about any key can point at its line and a relative path starts at the folder of its own file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from millrace.config.errors import ConfigError

KeyPath = tuple[str, ...]

SHARED = "x-"
"""Top-level keys that begin so are no part of the recipe: they hold what `${...}` and YAML anchors share."""

_MERGE = "tag:yaml.org,2002:merge"
_Pair = tuple[yaml.Node, yaml.Node]


class InterpolatedText(str):
    """Text that came out of `${...}`; unlike text written in YAML it may stand for a number or a truth value."""


@dataclass(frozen=True)
class Origin:
    """Who wrote a key."""

    file: Path | None
    """None: the command line."""
    line: int

    def __str__(self) -> str:
        return "command line" if self.file is None else f"{shown(self.file)}:{self.line}"

    @property
    def folder(self) -> Path:
        """Where relative paths written here start."""
        return Path.cwd() if self.file is None else self.file.parent


@dataclass
class Source:
    """A tree of plain values and the origins of its keys; list positions are keys "0", "1", ..."""

    tree: dict[str, Any]
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> Origin:
        """The origin of a key, or of the nearest section around it that was written."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as everyone writes it: 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def shown(path: Path) -> str:
    """A path as people know it: against the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def parse_value(text: str) -> Any:
    """The value of `key=text` on the command line, by YAML's rules. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # _Loader is a SafeLoader


def read_source(path: Path) -> Source:
    """Read a recipe file and what it extends, the nearer file winning. Raises ConfigError."""
    return _read(path.resolve(), Origin(None, 0), ())


def _read(path: Path, wanted_by: Origin, stack: tuple[Path, ...]) -> Source:
    if path in stack:
        chain = " -> ".join(shown(p) for p in (*stack[stack.index(path) :], path))
        raise ConfigError(f"{wanted_by}: extends: the files extend each other in a circle: {chain}")
    source = _parse(path, wanted_by)
    bases = source.tree.pop("extends", [])
    names = [bases] if isinstance(bases, str) else bases
    where = source.origin(("extends",))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: extends must be a path or a list of paths, not {bases!r}")
    merged: Source | None = None
    for index, name in enumerate(names):
        entry = source.origin(("extends", str(index)))
        base = _read((path.parent / name).resolve(), entry, (*stack, path))
        merged = base if merged is None else _merge(merged, base)
    return source if merged is None else _merge(merged, source)


def _parse(path: Path, wanted_by: Origin) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        prefix = "" if wanted_by.file is None else f"{wanted_by}: extends: "
        raise ConfigError(f"{prefix}the recipe {shown(path)} {reason}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{shown(path)}:1: a recipe is a mapping of keys to values, this file holds none")
        reader = _NodeReader(loader, path)
        tree = reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{shown(path)}:{line}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{shown(path)}: not valid YAML: {error.reason} at character {error.position}") from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return Source(tree, reader.origins)


class _NodeReader:
    """Turns YAML nodes into plain values, noting where each key stands."""

    def __init__(self, loader: _Loader, file: Path) -> None:
        self.loader = loader
        self.file = file
        self.origins: dict[KeyPath, Origin] = {}
        self.problems: list[str] = []
        self._around: list[yaml.Node] = []

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.origins.setdefault(path, Origin(self.file, node.start_mark.line + 1))
        if not isinstance(node, yaml.CollectionNode):
            return self.loader.construct_object(node)
        if node in self._around:
            self._refuse(node, f"{'.'.join(path)} is an anchor that holds itself; write it out")
            return None
        self._around.append(node)
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._around.pop()
        return value

    def _sequence(self, node: yaml.CollectionNode, path: KeyPath) -> list[Any]:
        return [self.read(item, (*path, str(index))) for index, item in enumerate(node.value)]

    def _refuse(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{shown(self.file)}:{node.start_mark.line + 1}: {text}")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node):
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in values:
                self._refuse(key_node, f"{'.'.join((*path, key))} is written twice")
            self.origins[(*path, key)] = Origin(self.file, line)
            values[key] = self.read(value_node, (*path, key))
        return values

    def _pairs(self, node: yaml.MappingNode) -> list[_Pair]:
        """The keys a mapping writes, then those that `<<` merges into it and that it does not write itself."""
        pairs = [pair for pair in node.value if pair[0].tag != _MERGE]
        taken = {str(key.value) for key, _ in pairs}
        for base in self._bases(node):
            for key, value in self._pairs(base):
                if str(key.value) not in taken:
                    taken.add(str(key.value))
                    pairs.append((key, value))
        return pairs

    def _bases(self, node: yaml.MappingNode) -> Iterator[yaml.MappingNode]:
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.MappingNode):
                    self._refuse(key, "<< merges sections only; write <<: *anchor")
                elif base in self._around:
                    self._refuse(key, "<< merges a section into itself; leave it out")
                else:
                    yield base


def _merge(base: Source, over: Source) -> Source:
    merged = Source(dict(base.tree), dict(base.origins))
    _merge_mapping(merged, merged.tree, over.tree, over, ())
    merged.origins[()] = over.origins[()]
    return merged


def _merge_mapping(merged: Source, into: dict[str, Any], tree: dict[str, Any], over: Source, path: KeyPath) -> None:
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            into[key] = dict(into[key])
            merged.origins[here] = over.origins[here]
            _merge_mapping(merged, into[key], value, over, here)
        else:
            into[key] = value
            _replace_origins(merged.origins, here, {p: o for p, o in over.origins.items() if p[: len(here)] == here})


def _replace_origins(origins: dict[KeyPath, Origin], path: KeyPath, new: dict[KeyPath, Origin]) -> None:
    for old in [p for p in origins if p[: len(path)] == path]:
        del origins[old]
    origins.update(new)


def apply_overrides(source: Source, overrides: Sequence[str]) -> list[str]:
    """Set `dotted.key=value` one after another; returns what is wrong with them."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"command line: {override!r} is not of the form key=value")
            continue
        try:
            value = parse_value(text)
            _set(source, key.split("."), value)
        except yaml.YAMLError as error:
            problems.append(f"command line: the value of {override!r} is not valid YAML: {error}".splitlines()[0])
        except ConfigError as error:
            problems.extend(error.problems)
    return problems


def _set(source: Source, keys: list[str], value: Any) -> None:
    node: Any = source.tree
    path: KeyPath = ()
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            key = str(_list_position(node, key, ".".join(keys[:position])))
            path, index = (*path, key), int(key)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            path = (*path, key)
            if last:
                node[key] = value
            else:
                # A section that is absent or null is begun here; a misspelt one is found when it is given its types.
                if node.get(key) is None:
                    node[key] = {}
                    source.origins[path] = Origin(None, 0)
                node = node[key]
        else:
            raise ConfigError(f"command line: {'.'.join(keys)}: {'.'.join(keys[:position])} holds a value, not keys")
    _replace_origins(source.origins, path, {path: Origin(None, 0)})


def _list_position(items: list[Any], key: str, where: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = ", ".join(str(name) for name in names if name is not None) or f"0 to {len(items) - 1}"
    raise ConfigError(f"command line: {where} has no entry {key!r}; there are {known}")


def resolve(source: Source) -> tuple[dict[str, Any], list[str]]:
    """The tree with every `${...}` filled in, and what could not be."""
    problems: list[str] = []
    try:
        config = OmegaConf.create(source.tree)
    except OmegaConfBaseException as error:
        return {}, [f"{source.origin(())}: {_first_line(error)}"]
    return _resolved(config, (), source, problems), problems


def _resolved(node: DictConfig | ListConfig, path: KeyPath, source: Source, problems: list[str]) -> Any:
    mapping = isinstance(node, DictConfig)
    values: dict[str, Any] = {}
    for key in list(node.keys()) if mapping else range(len(node)):
        here = (*path, str(key))
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{source.origin(here)}: {'.'.join(here)}: {_first_line(error)}")
            continue
        if isinstance(value, DictConfig | ListConfig):
            value = _resolved(value, here, source, problems)
        elif isinstance(value, str) and OmegaConf.is_interpolation(node, key):
            value = InterpolatedText(value)
        values[str(key)] = value
    return values if mapping else list(values.values())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
