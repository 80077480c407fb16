"""Settings from YAML and to it, and the only place that reads any.

A file states what differs from the defaults; the command line overrides it with `section.field=value`. What is wrong is
refused, and the error names the key and the fix.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from freesolo.errors import UsageError
from freesolo.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)

_MAX_DEPTH = 32
_SHOWN = 200  # characters of a wrong value


def load_config(kind: type[AnySettings], path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> AnySettings:
    """Read settings from YAML and apply `section.field=value` overrides.

    Args:
        kind: Of settings; a job's.
        path: A YAML file.
        overrides: Each `dotted.key=value`, the value in YAML.

    Raises:
        UsageError: The file is missing or not a mapping, an override is malformed, a key is unknown or a value wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        raw = _parse_yaml(file.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise UsageError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"--config {path}: must be a mapping of settings, is a {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(kind, raw, source=str(path))


def parse_config(kind: type[AnySettings], raw: dict[str, Any], *, source: str) -> AnySettings:
    """Check a mapping of settings against their kind.

    Strict JSON mode takes lists for tuples and refuses the rest: unknown keys, wrong types, YAML's `1e-4` (a string).

    Raises:
        UsageError: Names each key that is wrong, its value and the fix.
    """
    text = json.dumps(_over_defaults(kind, raw), default=str)  # a date is a text that looks like one
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(kind, detail) for detail in error.errors()]
        raise UsageError(f"{source}: " + "; ".join(lines)) from error


def dump_config(settings: Settings) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML: nothing that multiplies (aliases), nests without end, or is said twice."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a value.

        Raises:
            yaml.YAMLError: An alias, or a value nested too deep.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read in a configuration: write the value out")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping.

        Raises:
            yaml.YAMLError: A key is there twice, or is no text.
        """
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"a setting is there twice, among {', '.join(map(str, mapping))}")
        if not all(isinstance(key, str) for key in mapping):
            raise yaml.YAMLError("the names of settings are words: put one that YAML reads otherwise in quotes")
        return mapping


def _parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: It is not YAML, or not plain.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error


def _over_defaults(model: type[Settings], raw: dict[str, Any]) -> dict[str, Any]:
    """The settings given, completed section by section with the section's default in this very place.

    Else a section of which one setting is given would take the rest from its class, not from where it is used.
    """
    completed = dict(raw)
    for name, field in model.model_fields.items():
        kind, section = field.annotation, raw.get(name)
        if isinstance(section, dict) and isinstance(kind, type) and issubclass(kind, Settings):
            default = field.default.model_dump(mode="json") if isinstance(field.default, Settings) else {}
            completed[name] = _over_defaults(kind, _merged(default, section))
    return completed


def _merged(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return default | {
        key: _merged(default[key], value) if isinstance(value, dict) and isinstance(default.get(key), dict) else value
        for key, value in given.items()
    }


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"override {override!r}: write section.field=value")
    *parents, leaf = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UsageError(f"override {override!r}: {parent} is a value, not a section")
    try:
        section[leaf] = _parse_yaml(text) if text else None
    except ValueError as error:
        raise UsageError(f"override {override[:_SHOWN]!r}: the value is not valid YAML; put it in quotes") from error


def _explain(kind: type[Settings], detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(detail["loc"][-1]), _fields_beside(kind, detail["loc"]), n=1)
        return f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if detail["type"] == "missing":
        return f"{key}: missing; give it in the YAML or as {key}=VALUE"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    value = detail.get("input")
    hint = ""
    if isinstance(value, str) and detail["type"].startswith(("float", "int")):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)"
    shown = repr(value) if len(repr(value)) <= _SHOWN else f"{repr(value)[:_SHOWN]}..."
    return f"{key}={shown}: {detail['msg'].lower()}{hint}"


def _fields_beside(kind: type[Settings], location: tuple[Any, ...]) -> list[str]:
    model: Any = kind
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))
