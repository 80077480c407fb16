"""Several hosts on one machine: network namespaces on a switch of their own, each with its address.

Needs root and iproute2. This machine gets one interface into their network, by which the tests reach them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.servers import Host

_NETWORK = "10.177.83"
_GATEWAY = 254


def can_make_hosts() -> bool:
    """Whether this machine and user can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    trial = f"fs{os.getpid()}-trial"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, check=False).returncode == 0
    if made:
        _ip("netns", "del", trial)
    return made


@dataclass
class Network:
    """Hosts on one switch."""

    prefix: str
    hosts: dict[str, Host] = field(default_factory=dict)

    def add(self, name: str) -> Host:
        """A new host."""
        number = len(self.hosts) + 1
        space, link = self._space(name), self._link(name)
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("link", "add", link, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "set", link, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        self.hosts[name] = Host(f"{_NETWORK}.{number}", ("ip", "netns", "exec", space))
        return self.hosts[name]

    def cut(self, name: str) -> None:
        """Nothing reaches the host any more, and it reaches nothing."""
        _ip("-n", self._switch, "link", "set", self._link(name), "down")

    def heal(self, name: str) -> None:
        """After a cut."""
        _ip("-n", self._switch, "link", "set", self._link(name), "up")

    def processes(self, name: str) -> list[int]:
        """All that run on the host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=True
        ).stdout
        return [int(number) for number in listed.split()]

    def kill(self, name: str) -> None:
        """The host loses power."""
        while processes := self.processes(name):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    @property
    def _switch(self) -> str:
        return f"{self.prefix}-switch"

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _link(self, name: str) -> str:
        return f"to-{name}"

    def _connect(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        _ip("link", "add", self.prefix, "type", "veth", "peer", "name", "to-tests", "netns", self._switch)
        _ip("-n", self._switch, "link", "set", "to-tests", "master", "bridge", "up")
        _ip("addr", "add", f"{_NETWORK}.{_GATEWAY}/24", "dev", self.prefix)
        _ip("link", "set", self.prefix, "up")

    def _remove(self) -> None:
        for name in self.hosts:
            self.kill(name)
        for space in [*(self._space(name) for name in self.hosts), self._switch]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.prefix], capture_output=True, check=False)


@contextmanager
def network() -> Iterator[Network]:
    """A network without hosts yet; what runs on them is killed at the end."""
    made = Network(f"fs{os.getpid()}")
    try:
        made._connect()
        yield made
    finally:
        made._remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
