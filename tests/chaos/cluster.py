"""Three hosts with Ray, a fourth with the stores: object storage, and MLflow on PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from s3fs import S3FileSystem

from tests.chaos.hosts import Network, network
from tests.servers import RAY, Host, MlflowServer, PostgresServer, RayHead, RayNode, S3Server

ROOT = Path(__file__).parents[2]
NOTICE_SECONDS = 30
WORKER = {"freesolo.dev/pool": "train"}
"""The Ray label of the nodes that may be lost; the head is not one."""


class Worker(RayNode):
    """A node that joins a head."""

    def __init__(self, folder: Path, host: Host, head: RayHead, *, num_cpus: int) -> None:
        super().__init__(folder, host, num_cpus=num_cpus, labels=WORKER, environment=head.settings())
        self._head = head

    @property
    def url(self) -> str:
        return self._head.url

    def notify(self) -> None:
        """Tell Ray that the node will be taken away, as Kubernetes tells a pod: by SIGTERM to its first process."""
        assert self._process is not None
        self._process.terminate()

    def command(self) -> Sequence[str]:
        return self._start(f"--address={self._head.address}")

    def _answers(self) -> bool:
        return "Ray runtime started" in (self.folder / "server.log").read_text(errors="replace")


@dataclass
class Cluster:
    """What runs where, and how a person reaches it."""

    network: Network
    folder: Path
    store: S3Server
    mlflow: MlflowServer
    database: PostgresServer
    head: RayHead
    environment: Mapping[str, str]
    workers: dict[str, Worker] = field(default_factory=dict)
    started: int = 0

    def join(self, name: str, *, num_cpus: int = 2) -> None:
        """A node starts on a host: a new one, or again on one that was lost."""
        if name not in self.network.hosts:
            self.network.add(name)
        self.started += 1
        folder = self.folder / f"w{self.started}"
        folder.mkdir()
        self.workers[name] = Worker(folder, self.network.hosts[name], self.head, num_cpus=num_cpus)
        self.workers[name].start()

    def lose(self, name: str) -> None:
        """The node's host loses power."""
        self.network.kill(name)
        self.workers.pop(name).kill()

    def find(self, pattern: str) -> list[tuple[str, int]]:
        """The hosts and numbers of all processes whose command line matches, workers' first."""
        found = []
        for name in [*self.workers, "head"]:
            for number in self.network.processes(name):
                with suppress(OSError):  # it has just ended
                    line = Path(f"/proc/{number}/cmdline").read_text(errors="replace").replace("\0", " ")
                    if re.search(pattern, line):
                        found.append((name, number))
        return found

    def catch(self, pattern: str) -> tuple[str, int]:
        """As `find`, but wait for one; where and which it is."""
        found: list[tuple[str, int]] = []
        wait_for(lambda: found.extend(self.find(pattern)) or found, what=f"a process {pattern}", pause=0.01)
        return found[0]

    def submit(self, *job: str) -> Submission:
        """`ray job submit`, which follows the job's logs to its end."""
        command = [RAY, "job", "submit", "--address", self.head.url, "--working-dir", ".", "--", sys.executable, *job]
        log = self.folder / f"job-{len(list(self.folder.glob('job-*')))}.log"
        with log.open("w") as stream:
            environment = {**os.environ, **self.environment}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, text=True)
        return Submission(process, log)

    def bucket(self, name: str) -> str:
        """A new bucket's URL."""
        with _set(self.environment):
            S3FileSystem.clear_instance_cache()
            S3FileSystem().mkdir(name)
        return f"s3://{name}"


@dataclass(frozen=True)
class Submission:
    """A submitted job, followed by a process that ends with it."""

    process: subprocess.Popen[str]
    log: Path

    def until(self, happened: Callable[[], object], *, what: str, seconds: float = 300.0) -> None:
        """Wait until something is true, as long as the job has not failed."""
        try:
            wait_for(lambda: happened() or self._failed(), what=what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.log.read_text()[-8000:]}") from None
        assert not self._failed(), f"the job failed before {what}: {self.log.read_text()[-8000:]}"

    def _failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def fails(self, *, seconds: float = 300.0) -> str:
        """Wait for its end, which must be a failure; its logs."""
        assert self.process.wait(seconds) != 0
        return self.log.read_text()

    def finishes(self, *, seconds: float = 900.0) -> dict[str, Any]:
        """Wait for its end; its result, which is the last line of JSON in its logs."""
        code = self.process.wait(seconds)
        logs = self.log.read_text()
        assert code == 0, logs[-8000:]
        result: dict[str, Any] = json.loads([line for line in logs.splitlines() if line.startswith('{"stage"')][-1])
        return result


def steps_done_again(*jobs: Submission) -> int:
    """Steps that were shown as done, and then done again, as the progress in the jobs' logs tells.

    A group of workers that was started again shows first where it begins.
    """
    logs = "\n".join(job.log.read_text() for job in jobs)
    shown = [(name, int(step)) for name, step in re.findall(r"^(\S+): (\d+)/\d+ steps", logs, re.MULTILINE)]
    return sum(max(0, before[1] - after[1]) for before, after in pairwise(shown) if before[0] == after[0])


def wait_for(happened: Callable[[], object], *, seconds: float = 300.0, what: str, pause: float = 0.2) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(pause)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A head and its stores; nodes join by `Cluster.join`. All is killed at the end."""
    with ExitStack() as stack:
        net = stack.enter_context(network())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        store_host, head_host = net.add("store"), net.add("head")
        for name in ("s3", "db", "ml", "h"):  # sockets need short names
            (folder / name).mkdir()
        store = S3Server(folder / "s3", store_host)
        database = PostgresServer(folder / "db", store_host)
        artifacts = "s3://mlflow/artifacts"
        mlflow = MlflowServer(
            folder / "ml", store_host, backend=database.url, artifacts=artifacts, environment=store.environment
        )
        environment = {
            **store.environment,
            "MLFLOW_TRACKING_URI": mlflow.url,
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",  # all hosts are one machine with two cores
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_SECONDS),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-the-tests",
            # A node that is gone is missed after seconds, not half a minute.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        head = RayHead(folder / "h", head_host, num_cpus=1, environment=environment)
        made = Cluster(net, folder, store, mlflow, database, head, head.settings())
        stack.callback(lambda: [node.kill() for node in made.workers.values()])
        for server in (store, database, mlflow, head):
            stack.callback(server.kill)
        for server in (store, database):
            server.start()
        made.bucket("mlflow")
        mlflow.start()
        head.start()
        yield made


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
