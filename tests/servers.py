"""Real servers for tests, on ports of their own: started by whoever needs one, and stopped with it.

They run on this host's loopback, or on one of several hosts (`tests.chaos.hosts`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 120.0
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True, slots=True)
class Host:
    """Where servers run.

    Attributes:
        address: That they listen on.
        enter: What a command is prefixed with to run there.
    """

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()


HERE = Host()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class Server(ABC):
    """A program that answers on a port, can be killed, and started again with the same data."""

    def __init__(self, folder: Path, host: Host = HERE) -> None:
        """Choose its ports; nothing is started yet.

        Args:
            folder: For its data and its log.
            host: Where it will run.
        """
        self.folder = folder
        self.host = host
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it answers."""

    @property
    def health_url(self) -> str:
        """What answers once it is ready."""
        return self.url

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What starts it."""

    def settings(self) -> Mapping[str, str]:
        """Environment variables that it is started with."""
        return {}

    @property
    def running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    @property
    def alive(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert not self.running
        log = self.folder / "server.log"
        with log.open("ab") as stream:
            environment = {**os.environ, **self.settings()}
            self._process = subprocess.Popen(
                [*self.host.enter, *self.command()],
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """Without warning, with the processes that it started in its session."""
        if self._process is not None:
            self.tell(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Hang: connections are taken, nothing is answered."""
        self.tell(signal.SIGSTOP)

    def go_on(self) -> None:
        """After a pause."""
        self.tell(signal.SIGCONT)

    def tell(self, number: signal.Signals) -> None:
        """Signal it and the processes that it started in its session."""
        assert self._process is not None
        os.killpg(self._process.pid, number)  # its own session: nothing else is in the group

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.health_url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500  # S3 answers strangers, if only to refuse them
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


class RayNode(Server):
    """`ray start`: a node of a cluster, with all the processes that it starts."""

    def __init__(
        self,
        folder: Path,
        host: Host = HERE,
        *,
        num_cpus: int,
        labels: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Choose its ports.

        Args:
            folder: For its log and sessions.
            host: Where it will run.
            num_cpus: That Ray takes it to have.
            labels: Ray's, of the node.
            environment: Of the node, and so of the workers that it starts.
        """
        super().__init__(folder, host)
        self._num_cpus = num_cpus
        self._labels = labels or {}
        self._environment = environment or {}
        self._agent_port, self._grpc_port = free_ports(2)

    def _start(self, *options: str) -> Sequence[str]:
        command = [RAY, "start", "--block", f"--node-ip-address={self.host.address}", f"--num-cpus={self._num_cpus}"]
        command += [
            f"--dashboard-agent-listen-port={self._agent_port}",
            f"--dashboard-agent-grpc-port={self._grpc_port}",
        ]
        command += [f"--object-store-memory={400 * 2**20}", f"--temp-dir={self.folder}"]
        labels = ",".join(f"{name}={value}" for name, value in self._labels.items())
        return [*command, *([f"--labels={labels}"] if labels else []), *options]

    def settings(self) -> Mapping[str, str]:
        loopback = self.host.address == "127.0.0.1"
        return {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if loopback else "1",
            "RAY_ADDRESS": "",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            **self._environment,
        }

    def kill(self) -> None:
        """With all that it started: its workers are in sessions of their own."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            node = psutil.Process(self._process.pid)
            for member in [*node.children(recursive=True), node]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait(30)
        self._process = None


class RayHead(RayNode):
    """`ray start --head`, with the dashboard that jobs are submitted to."""

    def __init__(
        self,
        folder: Path,
        host: Host = HERE,
        *,
        num_cpus: int,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Choose its ports.

        Args:
            folder: For its log and sessions.
            host: Where it will run.
            num_cpus: That Ray takes it to have.
            environment: Of the node, and so of the workers that it starts.
            options: Of `ray start`, over those that are given it here.
        """
        super().__init__(folder, host, num_cpus=num_cpus, environment=environment)
        self._port, self._dashboard_port, self._client_port = free_ports(3)
        self._options = options

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{self._dashboard_port}"

    @property
    def address(self) -> str:
        """What other nodes join."""
        return f"{self.host.address}:{self._port}"

    @property
    def health_url(self) -> str:
        return f"{self.url}/api/version"

    def command(self) -> Sequence[str]:
        return self._start(
            "--head",
            f"--port={self._port}",
            "--include-dashboard=true",
            f"--dashboard-host={self.host.address}",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={self._client_port}",
            *self._options,
        )


class MlflowServer(Server):
    """`mlflow server`, on SQLite and a folder unless told otherwise."""

    def __init__(
        self,
        folder: Path,
        host: Host = HERE,
        *,
        backend: str | None = None,
        artifacts: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Choose its port.

        Args:
            folder: For its log, and for what is not elsewhere.
            host: Where it will run.
            backend: URI of its database.
            artifacts: URL of its artifacts.
            environment: What its way to those needs.
        """
        super().__init__(folder, host)
        (self._port,) = free_ports(1)
        self._backend = backend or f"sqlite:///{folder}/mlflow.db"
        self._artifacts = artifacts or str(folder / "artifacts")
        self._environment = environment or {}

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{self._port}"

    @property
    def health_url(self) -> str:
        return f"{self.url}/health"

    def command(self) -> Sequence[str]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", self.host.address, "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", self._backend]
        command += ["--allowed-hosts", f"{self.host.address}:*,localhost:*,127.0.0.1:*"]
        return [*command, "--artifacts-destination", self._artifacts]

    def settings(self) -> Mapping[str, str]:
        return {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            **self._environment,
        }


class PostgresServer(Server):
    """PostgreSQL, as Debian installs it; it refuses to run as root, and who has no password."""

    USER, PASSWORD = "mlflow", "mlflow-secret"

    def __init__(self, folder: Path, host: Host = HERE) -> None:
        super().__init__(folder, host)
        (self._port,) = free_ports(1)
        self._programs = max(Path("/usr/lib/postgresql").glob("*/bin"))

    @staticmethod
    def installed() -> bool:
        """Whether it can be started here: it needs Debian's package, and root to become its user."""
        return any(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and os.geteuid() == 0

    @property
    def url(self) -> str:
        return f"postgresql://{self.USER}:{self.PASSWORD}@{self.host.address}:{self._port}/postgres"

    def command(self) -> Sequence[str]:
        data = self.folder / "data"
        if not data.exists():
            self._make(data)
        listening = ["-h", self.host.address, "-p", str(self._port), "-k", str(self.folder)]
        return ["runuser", "-u", "postgres", "--", str(self._programs / "postgres"), "-D", str(data), *listening]

    def _make(self, data: Path) -> None:
        """A new database cluster, whose administrator has the password."""
        shutil.chown(self.folder, "postgres")
        self.folder.chmod(0o755)
        password = self.folder / "password"
        password.write_text(self.PASSWORD)
        password.chmod(0o644)
        command = ["runuser", "-u", "postgres", "--", str(self._programs / "initdb"), "-D", str(data), "-U", self.USER]
        command += ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder)
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {self.host.address}/24 scram-sha-256\n")

    def _answers(self) -> bool:
        ready = [str(self._programs / "pg_isready"), "-h", self.host.address, "-p", str(self._port)]
        return subprocess.run([*self.host.enter, *ready], capture_output=True, check=False).returncode == 0


class S3Server(Server):
    """SeaweedFS, which speaks S3 and refuses who has no key."""

    _PARTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")

    def __init__(self, folder: Path, host: Host = HERE) -> None:
        super().__init__(folder, host)
        self._ports = dict(zip(self._PARTS, free_ports(len(self._PARTS)), strict=True))

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, as AWS's libraries read it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "freesolo",
            "AWS_SECRET_ACCESS_KEY": "freesolo-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def command(self) -> Sequence[str]:
        key = {"accessKey": self.environment["AWS_ACCESS_KEY_ID"]}
        key["secretKey"] = self.environment["AWS_SECRET_ACCESS_KEY"]
        actions = ["Admin", "Read", "List", "Tagging", "Write"]
        identities = [{"name": "freesolo", "credentials": [key], "actions": actions}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "data").mkdir(exist_ok=True)
        weed = str(Path(sys.executable).parent / "weed")
        command = [
            weed,
            "-logtostderr=true",
            "server",
            f"-ip={self.host.address}",
            f"-ip.bind={self.host.address}",
            "-dir=data",
        ]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-master.electionTimeout=2s"]
        command += ["-volume.max=1000", "-volume.preStopSeconds=0", "-filer", "-s3", "-s3.config=s3.json"]
        command += ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for part, port in self._ports.items():
            name, _, kind = part.partition(".")
            command.append(f"-{name}.port{'.' + kind if kind else ''}={port}")
        return command
