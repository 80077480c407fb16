"""Files of tensors: written, and read without running any of what is in them.

Weights, model files and checkpoints come from buckets, registries and the web. The format is a pickle in a zip, either
of which can be made to do what its maker likes: `weights_only` refuses code, and the rest is refused here.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAX_VALUES = 1_000_000  # a ResNet-101's training has 10,000
_LONGEST_NAME = 200


def read_torch_file(path: Path, *, device: torch.device | str = "cpu") -> Any:
    """The tensors and plain values of a file.

    Args:
        path: The file.
        device: Where the tensors go.

    Raises:
        ValueError: It holds anything else, code perhaps, or is damaged; says why in a few words.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of what it then refuses
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        # torch's reader raises whatever its parsing of a damaged file happens to: IndexError, AssertionError, ...
        raise ValueError(_reason(error)) from error
    _check_values(content)
    return content


def write_torch_file(content: Any, path: Path) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: The disk is full, or will not have it.
    """
    with path.open("wb") as file:  # torch would write the name into the file, if it were given one
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, about what became of an archive that could not be written
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _check_archive(path: Path) -> None:
    """A zip's members lie in it as they are: torch never compresses, and a compressed one may be of any size."""
    try:
        if not zipfile.is_zipfile(path):
            return  # torch's format before 1.6, or nothing of torch's
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"a damaged archive ({error})") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("an archive with compressed members, which torch does not write")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("an archive with more in its members than in itself")


def _reason(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+) was not an allowed global|load (\S+) that is not", str(error))
    if refused:
        name = refused[1] or refused[2]
        return f"it holds {name!r:.80}, which is no tensor or plain value: code of whoever made it, which is not run"
    text = str(error).strip().partition("\n")[0]
    if not text or text.startswith("Weights only load failed"):
        return "it is damaged, or holds more than tensors and plain values"
    return text[:200]


def _check_values(content: Any) -> None:
    """Every tensor has all of its numbers, all finite, and containers hold nothing but tensors and plain values."""
    waiting, count = [("", content)], 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if count > _MAX_VALUES:  # a list may be in itself, or twice in each of a chain of lists
            raise ValueError(f"it holds more than {_MAX_VALUES} values")
        if isinstance(value, Tensor):
            _check_tensor(name, value)
        elif isinstance(value, dict):
            waiting += [("", key) for key in value]
            # Cut short: a dictionary may be in itself too.
            waiting += [((f"{name}.{key}" if name else str(key))[:_LONGEST_NAME], each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, each) for each in value]


def _check_tensor(name: str, tensor: Tensor) -> None:
    # A tensor may say that it has a billion numbers, all of them the one that is stored.
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise ValueError("a tensor that is sparse, nested, quantised or without numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} with fewer numbers than that")
    try:
        is_finite = bool(tensor.isfinite().all())
    except NotImplementedError as error:  # of some numbers of 8 bits and fewer
        raise ValueError(f"{name} is of {tensor.dtype}, which is not read; convert it to float32") from error
    if not is_finite:
        raise ValueError(f"{name} has values that are NaN or infinite")
