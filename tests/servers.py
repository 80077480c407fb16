"""Real servers for tests, on ports of their own on loopback: started by whoever needs one, and stopped with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

START_SECONDS = 120.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class Server(ABC):
    """A program that answers on a port, can be killed, and started again with the same data."""

    def __init__(self, folder: Path) -> None:
        """Choose its ports; nothing is started yet.

        Args:
            folder: For its data and its log.
        """
        self.folder = folder
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

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert not self.running
        log = self.folder / "server.log"
        with log.open("ab") as stream:
            environment = {**os.environ, **self.settings()}
            self._process = subprocess.Popen(
                self.command(), env=environment, stdout=stream, stderr=stream, start_new_session=True, cwd=self.folder
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


class RayHead(Server):
    """`ray start --head`, with the dashboard that jobs are submitted to."""

    def __init__(self, folder: Path, *, num_cpus: int) -> None:
        super().__init__(folder)
        self._num_cpus = num_cpus
        self._port, self._dashboard_port, self._client_port, self._agent_port = free_ports(4)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def health_url(self) -> str:
        return f"{self.url}/api/version"

    def command(self) -> Sequence[str]:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={self._port}"]
        command += ["--node-ip-address=127.0.0.1", f"--num-cpus={self._num_cpus}", f"--temp-dir={self.folder}"]
        command += ["--include-dashboard=true", f"--dashboard-port={self._dashboard_port}"]
        return [
            *command,
            f"--ray-client-server-port={self._client_port}",
            f"--dashboard-agent-listen-port={self._agent_port}",
        ]

    def settings(self) -> Mapping[str, str]:
        return {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ADDRESS": "",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
        }

    def kill(self) -> None:
        """With all that it started: its workers are in sessions of their own."""
        if self._process is None:
            return
        head = psutil.Process(self._process.pid)
        for member in [*head.children(recursive=True), head]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait(30)
        self._process = None


class MlflowServer(Server):
    """`mlflow server` on SQLite."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def health_url(self) -> str:
        return f"{self.url}/health"

    def command(self) -> Sequence[str]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        return [*command, "--artifacts-destination", str(self.folder / "artifacts")]

    def settings(self) -> Mapping[str, str]:
        return {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }


class S3Server(Server):
    """SeaweedFS, which speaks S3 and refuses who has no key."""

    _PARTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ports = dict(zip(self._PARTS, free_ports(len(self._PARTS)), strict=True))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

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
        command = [weed, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-dir=data"]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-master.electionTimeout=2s"]
        command += ["-volume.max=1000", "-volume.preStopSeconds=0", "-filer", "-s3", "-s3.config=s3.json"]
        command += ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for part, port in self._ports.items():
            name, _, kind = part.partition(".")
            command.append(f"-{name}.port{'.' + kind if kind else ''}={port}")
        return command
