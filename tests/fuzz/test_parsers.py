"""No input makes a parser crash, hang, take memory without end or raise what its docstring does not say.

The ordinary run tries a few hundred inputs of each parser, the same each time, and everything that was ever found
(`corpus/`, a folder a parser). `make fuzz` goes on for minutes, from a seed of one's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.arena import Arena, Tally
from tests.fuzz.parsers import PARSERS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 150


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena() as arena:
        yield arena


def shown(tally: Tally) -> str:
    return "\n".join(f"{content[:200]!r}: {reason}" for content, reason in tally.failures)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_stands_any_input(arena: Arena, name: str) -> None:
    tally = arena.fuzz(name, seed=0, inputs=INPUTS)
    assert not tally.failures, shown(tally)
    assert tally.inputs == INPUTS
    # Else the inputs are all alike to the parser, and show nothing.
    assert tally.refused
    assert tally.read


@pytest.mark.parametrize("name", sorted(folder.name for folder in CORPUS.iterdir()))
def test_what_was_found_once_is_not_found_again(arena: Arena, name: str) -> None:
    (parser,) = [each for each in PARSERS if each.replace(" ", "-").replace("'", "") == name]
    contents = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    tally = arena.replay(parser, contents)
    assert not tally.failures, shown(tally)
    assert tally.inputs == len(contents) > 0


def test_the_arena_sees_every_kind_of_failure() -> None:
    with Arena("tests.fuzz.broken", cpu_seconds=1.0) as arena:
        tally = arena.replay("broken", [b"fine", b"crash", b"fine", b"swell", b"refuse", b"raise", b"spin", b"fine"])
    assert (tally.read, tally.refused) == (3, 1)
    assert {content: reason.strip().splitlines()[-1] for content, reason in tally.failures} == {
        b"crash": "the process died: SIGSEGV",
        b"swell": "MemoryError",
        b"raise": "ZeroDivisionError: on purpose",
        b"spin": "the process died: SIGPROF, too much CPU time",
    }
