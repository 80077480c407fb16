"""Our own model file, `model.pt`: what a stage makes, what the registry keeps, what the next stage reads.

    format_version   1
    kind             "backbone" or "segmenter"
    settings         plain JSON that the network is built from: {"backbone": "resnet50"}, or SoloModelSettings
    state_dict       tensors by name, on the CPU
    lineage          plain JSON: what it was made from

Written by `torch.save`; reading it executes nothing. Readers that know nothing of it find the tensors under
`state_dict`, where published checkpoints have them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from freesolo.errors import UsageError
from freesolo.models.download import sha256_of_file
from freesolo.models.torch_file import read_torch_file, write_torch_file

FORMAT_VERSION = 1
Kind = Literal["backbone", "segmenter"]

_KEYS = ("format_version", "kind", "settings", "state_dict", "lineage")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model as its file has it.

    Attributes:
        kind: What it is.
        settings: What the network is built from.
        state_dict: Tensors by name, on the CPU.
        lineage: What it was made from.
        sha256: Of the file, in hexadecimal.
    """

    kind: Kind
    settings: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    lineage: Mapping[str, Any]
    sha256: str


def save_model(
    path: Path,
    kind: Kind,
    settings: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    lineage: Mapping[str, Any],
) -> str:
    """Write a model file, which appears whole or not at all; equal models make equal files.

    Args:
        path: Its folder must be there. A file that is there is replaced.
        kind: What it is.
        settings: Plain JSON; tuples become lists.
        state_dict: Copied to the CPU; may be empty.
        lineage: Plain JSON.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        TypeError: Settings or lineage are not plain JSON.
        OSError: The disk is full, or will not have it.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "settings": json.loads(json.dumps(dict(settings))),
        # A view would be saved with all of the storage that it looks at.
        "state_dict": {name: value.detach().cpu().clone().contiguous() for name, value in state_dict.items()},
        "lineage": json.loads(json.dumps(dict(lineage))),
    }
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        write_torch_file(content, temporary)
        sha256 = sha256_of_file(temporary)
        temporary.replace(path)
    return sha256


def load_model(path: Path, kind: Kind | None = None, *, backbone: str | None = None) -> ModelFile:
    """Read a model file.

    Args:
        path: The file.
        kind: What it must be; None: anything.
        backbone: The backbone that its network must have; None: any.

    Raises:
        UsageError: There is no such file, it is not one of ours, was written by a newer version, is damaged, or is of
            another kind or architecture than asked for; names both.
    """
    content = _read(path)
    version = content["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise UsageError(
            f"{path}: a model file of format {version!r:.40}, this version of freesolo reads format {FORMAT_VERSION}: "
            "use the version that wrote it, or a newer one"
        )
    _check_fields(path, content)
    if kind is not None and content["kind"] != kind:
        raise UsageError(f"{path}: holds a {content['kind']}, and a {kind} is needed here")
    found = content["settings"].get("backbone")
    if backbone is not None and found != backbone:
        raise UsageError(f"{path}: a {content['kind']} with a {found} backbone, the configuration says {backbone}")
    return ModelFile(
        kind=content["kind"],
        settings=content["settings"],
        state_dict=content["state_dict"],
        lineage=content["lineage"],
        sha256=sha256_of_file(path),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such model file")
    try:
        content = read_torch_file(path)
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read as a model file: {error}") from error
    if not isinstance(content, dict) or not set(_KEYS) <= set(content):
        raise UsageError(
            f"{path}: a checkpoint, but not a model file of freesolo (it lacks kind and settings); published "
            "backbones are read where a configuration asks for weights of a backbone"
        )
    return content


def _check_fields(path: Path, content: Mapping[str, Any]) -> None:
    """What the format's head at the top says of each field, whoever wrote the file."""
    if not isinstance(content["kind"], str) or content["kind"] not in get_args(Kind):
        raise UsageError(f"{path}: holds a {content['kind']!r:.40}, which this version of freesolo does not know")
    for name in ("settings", "lineage"):
        try:
            if not isinstance(content[name], dict):
                raise TypeError(f"it is a {type(content[name]).__name__}")
            json.dumps(content[name], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: a damaged model file: {name} is not plain JSON: {error}") from error
    state = content["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UsageError(f"{path}: a damaged model file: state_dict is not tensors by name")
