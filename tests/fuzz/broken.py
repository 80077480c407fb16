"""A parser that fails in each way that there is, so that the arena can be seen to see it."""

from __future__ import annotations

import os
import signal

from tests.fuzz.parsers import Parser


def _parse(data: bytes) -> object:
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"spin":
        while True:
            pass
    if data == b"swell":
        return bytearray(2**33)
    if data == b"refuse":
        raise ValueError("as documented")
    if data == b"raise":
        raise ZeroDivisionError("on purpose")
    return None


PARSERS = {"broken": Parser(lambda source: b"", _parse, (ValueError,))}
