"""JSON documents that say what they are, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from freesolo.data import files
from freesolo.errors import UsageError

# A document that is read whole: a manifest of a million shards has 200 MB. What is larger is no document of ours, and
# must not fill the memory of who looks.
MAX_DOCUMENT_BYTES = 2**30
_MAX_DEPTH = 64  # far below where Python's own recursion ends
_SHOWN = 80

Document = TypeVar("Document")
ListOfParts = TypeVar("ListOfParts", bound="Manifest")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{6,9}$")]  # part of a URL: no other is followed
Count = Annotated[int, Field(ge=0, lt=2**63)]


@runtime_checkable
class Manifest(Protocol):
    """A dataclass, a document's record, that lists the parts of something."""

    def names(self) -> list[str]:
        """Of the parts."""

    def totals(self) -> dict[str, int]:
        """Of the parts together; written beside them, so that a manifest that lost one can be told."""


def document_text(value: object) -> str:
    """A document's file: readable, and the same text for the same value."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def canonical_digest(value: object) -> str:
    """Sha256, in hexadecimal, of a JSON value written in the one canonical way: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(data: bytes | str) -> Any:
    """Read JSON strictly: what is allowed is what its standard allows, and what can be written again.

    Raises:
        ValueError: Not UTF-8 or not JSON, NaN or an infinity, a key that is there twice, half of a surrogate pair, or
            nested more than 64 deep.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    if _deeper_than(value, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return value


def parse_versioned(text: bytes | str, expected_format: str, newest_version: int) -> dict[str, Any]:
    """Read JSON that says what it is: an object with `format` and `format_version`.

    Raises:
        UsageError: Not JSON, something else's, or a newer version's.
    """
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise UsageError(f"not valid JSON ({error}); was it cut short?") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != expected_format:
        raise UsageError(f"this is not a {expected_format} but {short(found or 'some other JSON')}; check the URL")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise UsageError(f"format_version={short(version)} is not a version of {expected_format}; make it again")
    if version > newest_version:
        raise UsageError(f"format version {version} was made by a newer freesolo: upgrade this one ({newest_version})")
    return dict(raw)


def parse_fields(record: type[Document], raw: dict[str, Any]) -> Document:
    """A record from a JSON object, whose fields must be those of the record and of their types.

    Args:
        record: A dataclass; `STRICT` is its `__pydantic_config__`, and its annotations say what is allowed.
        raw: As `parse_json` gives it.

    Raises:
        UsageError: A field is missing, unknown, or not what it must be; names the first few.
    """
    try:
        return TypeAdapter(record).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors()]
        raise UsageError(f"{'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''}") from error


def parse_manifest(
    record: type[ListOfParts], text: bytes | str, expected_format: str, newest_version: int, *, again: str
) -> ListOfParts:
    """A manifest from its file: fields, totals and what it says that it is.

    Args:
        record: As `parse_fields` takes it.
        text: Of the file.
        expected_format: As `parse_versioned`.
        newest_version: As `parse_versioned`.
        again: What to do about a damaged one.

    Raises:
        UsageError: Something else's or a newer version's; or damaged: a field, a name that is there twice, totals.
    """
    raw = parse_versioned(text, expected_format, newest_version)
    totals = raw.pop("totals", None)
    del raw["format"]
    try:
        manifest = parse_fields(record, raw)
        if len(set(names := manifest.names())) != len(names):
            raise UsageError(f"two parts are named {next(name for name in names if names.count(name) > 1)}")
        if totals != manifest.totals():
            raise UsageError(f"its totals are {short(totals)}, its parts' {manifest.totals()}")
    except UsageError as error:
        raise UsageError(f"a damaged manifest: {error}; {again}") from error
    return manifest


def read_document(url: str) -> bytes:
    """The bytes of a document that is read whole, unless it is too large to be one.

    Raises:
        UsageError: Over 1 GiB; or as `freesolo.data.files.read_bytes`.
        JobError: The store cannot be reached.
    """
    size = files.size(url)
    if size is not None and size > MAX_DOCUMENT_BYTES:
        raise UsageError(f"{url}: {size} bytes, more than the {MAX_DOCUMENT_BYTES} of any such file; check the URL")
    return files.read_bytes(url)


def short(value: object) -> str:
    """A value from a file for an error message: one line, printable, not longer than fits."""
    text = value if isinstance(value, str) and value.isprintable() else _repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def differences(there: Any, wanted: Any, key: str = "") -> list[str]:
    """What differs between two JSON values, a line each: `section.field: old, now new`; sorted by name.

    Args:
        there: What was.
        wanted: What is.
        key: Dotted name of both; empty for a whole document.
    """
    if isinstance(there, dict) and isinstance(wanted, dict):
        return [
            difference
            for name in sorted({*there, *wanted})
            for difference in differences(there.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if there == wanted else [f"{key}: {there!r}, now {wanted!r}"]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{short(text)} is too large a number")
    return number


def _deeper_than(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(each, levels - 1) for each in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(each, levels - 1) for each in value)
    return False


def _repr(value: object) -> str:
    try:
        return ascii(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a {type(value).__name__}"
