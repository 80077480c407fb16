"""Runs parsers on inputs in a process of their own, whose memory and time are bounded: a crash is seen, not shared.

The process says which input it is at before it begins with it. What kills it, a segmentation fault or a limit, has
a name therefore, and the next process goes on behind it.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2**31  # more than the process has when it has imported everything
_SHOWN_FAILURES = 5


@dataclass
class Tally:
    """What came of a parser's inputs.

    Attributes:
        read: Inputs that gave a value.
        refused: Inputs that gave a documented error.
        seconds: Time they took.
        failures: What else happened, with the input that it happened to; the first few.
    """

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.read + self.refused + len(self.failures)


class Arena:
    """A process that tries parsers, one task after another; another takes its place when it dies."""

    def __init__(self, module: str = "tests.fuzz.parsers", *, cpu_seconds: float = 10.0) -> None:
        """Begin nothing yet.

        Args:
            module: Whose `PARSERS` are meant.
            cpu_seconds: What an input may take.
        """
        self._module = module
        self._cpu_seconds = cpu_seconds
        self._context = multiprocessing.get_context("spawn")
        self._at = self._context.Value("q", 0)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def fuzz(self, name: str, *, seed: int, inputs: int | None = None, seconds: float | None = None) -> Tally:
        """Try a parser on inputs made from a seed: so many, or for so long."""
        return self._run(_Task(self._module, name, self._cpu_seconds, seed, inputs, seconds))

    def replay(self, name: str, contents: Sequence[bytes]) -> Tally:
        """Try a parser on given inputs."""
        return self._run(_Task(self._module, name, self._cpu_seconds, 0, len(contents), None, tuple(contents)))

    def _run(self, task: _Task) -> Tally:
        tally = Tally()
        while not self._attempt(task, tally):
            index = int(self._at.value)
            assert self._process is not None
            tally.failures.append((task.content(index), f"the process died: {_death(self._process.exitcode)}"))
            self._process = None
            if len(tally.failures) >= _SHOWN_FAILURES:
                break
            task = replace(
                task, start=index + 1, seconds=None if task.seconds is None else task.seconds - tally.seconds
            )
        return tally

    def _attempt(self, task: _Task, tally: Tally) -> bool:
        """Whether the process lived to the end of the task."""
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_work, args=(self._module, self._at, theirs), daemon=True)
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        self._at.value = task.start
        try:
            self._pipe.send(task)
            while True:
                kind, value = self._pipe.recv()
                if kind == "failure":
                    tally.failures.append(value)
                else:
                    tally.read, tally.refused = tally.read + value[0], tally.refused + value[1]
                    tally.seconds += value[2]
                if kind == "finished":
                    return True
        except (EOFError, ConnectionError):
            self._process.join()
            return False


@dataclass(frozen=True)
class _Task:
    module: str
    name: str
    cpu_seconds: float
    seed: int
    inputs: int | None
    seconds: float | None
    contents: tuple[bytes, ...] | None = None
    start: int = 0

    def content(self, index: int) -> bytes:
        """The input of a place in the sequence: the same wherever it is made."""
        if self.contents is not None:
            return self.contents[index]
        made: bytes = self.parser.make(random.Random(f"{self.name} {self.seed} {index}"))
        return made

    @property
    def parser(self) -> Any:
        """The parser, in whatever process this is asked."""
        return importlib.import_module(self.module).PARSERS[self.name]


def _death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}, too much CPU time" if name == "SIGPROF" else name


def _work(module: str, at: Synchronized[int], pipe: Connection) -> None:
    importlib.import_module(module)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes of each damaged file
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError):
        while True:
            _try_inputs(pipe.recv(), at, pipe)


def _try_inputs(task: _Task, at: Synchronized[int], pipe: Connection) -> None:
    parser = task.parser
    counts, failed, index = [0, 0], 0, task.start
    with contextlib.suppress(*parser.refusals):  # what the first of a kind imports and makes is not counted
        parser.parse(replace(task, contents=None).content(-1))
    started = told = time.monotonic()
    while (task.inputs is None or index < task.inputs) and (
        task.seconds is None or time.monotonic() - started < task.seconds
    ):
        content = task.content(index)
        at.value = index
        signal.setitimer(signal.ITIMER_PROF, task.cpu_seconds)  # of this process: a busy machine is not a slow parser
        try:
            parser.parse(content)
            counts[0] += 1
        except parser.refusals:
            counts[1] += 1
        except BaseException:  # noqa: BLE001
            pipe.send(("failure", (content, traceback.format_exc())))
            failed += 1
            if failed >= _SHOWN_FAILURES:
                break
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        index += 1
        # Told now and then, so that little is lost of the count if the process dies; of given inputs, nothing is.
        if task.contents is not None or time.monotonic() - told > 0.2:
            pipe.send(("counted", (*counts, time.monotonic() - told)))
            counts, told = [0, 0], time.monotonic()
    pipe.send(("finished", (*counts, time.monotonic() - told)))
