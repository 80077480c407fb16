"""What a sweep or an ablation varies: which values of which settings, known and checked before anything is started.

A sweep's draws are a function of its space and a seed, so submitted again it is made of the same trials.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from freesolo.settings import RangeSettings, Settings

Values = dict[str, Any]
"""A value for each of some dotted settings."""


def draw_trials(space: Mapping[str, RangeSettings], *, draws: int, seed: int) -> tuple[Values, ...]:
    """The trials of a sweep, which do not depend on the order of the settings in its space.

    Args:
        space: What to draw from, by dotted setting.
        draws: How many; each is combined with every point of the grids.
        seed: Of the draws.

    Returns:
        `draws` times the product of the grids' lengths; of grids the values of the last name in the alphabet change
        fastest.
    """
    generator = random.Random(seed)
    by_name = dict(sorted(space.items()))
    grids = {name: values.grid for name, values in by_name.items() if values.grid is not None}
    trials = []
    for _ in range(draws):
        drawn = {name: _draw(values, generator) for name, values in by_name.items() if values.grid is None}
        for point in itertools.product(*grids.values()):
            values = drawn | dict(zip(grids, point, strict=True))
            trials.append({name: values[name] for name in space})
    return tuple(trials)


def _draw(values: RangeSettings, generator: random.Random) -> Any:
    if values.choice is not None:
        return generator.choice(values.choice)
    if values.uniform is not None:
        return generator.uniform(*values.uniform)
    assert values.loguniform is not None
    low, high = values.loguniform
    return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)


def with_values(settings: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A copy of a mapping of settings with others at some dotted names, whose sections must be there."""
    changed = dict(settings)
    for name, value in values.items():
        first, _, rest = name.partition(".")
        changed[first] = with_values(changed[first], {rest: value}) if rest else value
    return changed


def check_values(
    where: str, model: type[Settings], sections: tuple[str, ...], values: Mapping[str, Sequence[Any]]
) -> None:
    """See that there are such settings, and that they may be what is tried.

    What settings must be together is not looked at here, each stands alone; nor is a whole section.

    Args:
        where: The values are given, for errors.
        model: Whose settings they are.
        sections: Those of its fields that may be varied.
        values: What will be tried, by dotted setting.

    Raises:
        ValueError: A setting does not exist, names those beside it; or a value is none for it.
    """
    for name, tried in values.items():
        field = _field(where, model, sections, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            continue  # a section's defaults depend on where it is: it is looked at when it is drawn
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        adapter = TypeAdapter[Any](kind, config=ConfigDict(strict=True, allow_inf_nan=False))
        for value in tried:
            try:
                adapter.validate_json(json.dumps(value))
            except ValidationError as error:
                (detail, *_) = error.errors()
                raise ValueError(f"{where}: {name}={value!r}: {detail['msg'].lower()}") from None
    for name, other in itertools.permutations(values, 2):
        if other.startswith(f"{name}."):
            raise ValueError(f"{where}: {other} is part of {name}: give one of them")


def _field(where: str, model: type[Settings], sections: tuple[str, ...], name: str) -> FieldInfo:
    """The field that a dotted setting is."""
    at: Any = model
    fields = list(sections)
    *parents, leaf = name.split(".")
    inside = ""
    for part in (*parents, leaf):
        if part not in fields:
            near = difflib.get_close_matches(part, fields, n=1)
            suggestion = f"did you mean {inside}{near[0]}? " if near else ""
            raise ValueError(
                f"{where}: {name}: no such setting; {suggestion}there are "
                + (", ".join(f"{inside}{field}" for field in fields) or f"none inside of {inside[:-1]}")
            )
        field: FieldInfo = at.model_fields[part]
        at = field.annotation
        inside += f"{part}."
        fields = list(getattr(at, "model_fields", {}))
    return field
