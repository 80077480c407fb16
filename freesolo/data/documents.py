"""JSON documents that say what they are, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from freesolo.errors import UsageError


def document_text(value: object) -> str:
    """A document's file: readable, and the same text for the same value."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def canonical_digest(value: object) -> str:
    """Sha256, in hexadecimal, of a JSON value written in the one canonical way: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_versioned(text: str, expected_format: str, newest_version: int) -> dict[str, Any]:
    """Read JSON that says what it is: an object with `format` and `format_version`.

    Raises:
        UsageError: Not JSON, something else's, or a newer version's.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise UsageError(f"not valid JSON ({error}); was it cut short?") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != expected_format:
        raise UsageError(f"this is not a {expected_format} but {found or 'some other JSON'}; check the URL")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > newest_version:
        raise UsageError(f"format version {version} was made by a newer freesolo: upgrade this one ({newest_version})")
    return dict(raw)


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
