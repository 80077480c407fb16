"""A reverse proxy that breaks things on purpose, between clients and a real S3 server.

mitmproxy was tried first: it cannot reset a connection, ends what is streamed only with an error of its own, its
current release needs Python 3.12, and its 40 packages would need an environment of their own.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from yarl import URL

from tests.servers import free_ports

_CHUNK = 64 * 2**10
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message><RequestId>0</RequestId></Error>"


class Kind(StrEnum):
    """What goes wrong with a request."""

    UNAVAILABLE = "503 SlowDown"
    FORBIDDEN = "403 AccessDenied"
    RESET = "reset before the answer"
    RESET_IN_BODY = "reset in mid-body"
    LOST_ANSWER = "done, answer lost"
    TRUNCATED = "truncated body"
    FLIPPED = "flipped bit"
    SLOW = "slow first byte"
    DEAD = "no answer"


@dataclass(slots=True)
class Fault:
    """What goes wrong, with which requests.

    Attributes:
        kind: What.
        method: Regular expression that the whole of a method matches.
        path: Regular expression found in a path with its query.
        begin: Regular expression; nothing is hit before a path in which it is found.
        skip: Matching requests that are let through first.
        count: The most requests that are hit; None: no limit.
        seconds: From the first hit on, how long requests are hit; None: no limit.
        delay: Of a slow first byte, seconds.
        hits: Requests that were hit so far.
        first_hit: When the first was, by `time.monotonic`.
        recovered: When a matching request was let through again.
    """

    kind: Kind
    method: str = ".*"
    path: str = ""
    begin: str = ""
    skip: int = 0
    count: int | None = None
    seconds: float | None = None
    delay: float = 0.0
    hits: int = 0
    first_hit: float | None = None
    recovered: float | None = None

    def strikes(self, method: str, path: str) -> bool:
        """Whether it hits this request; counts it."""
        if self.begin and re.search(self.begin, path):
            self.begin = ""
        if self.begin or not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        now = time.monotonic()
        over = self.seconds is not None and self.first_hit is not None and now > self.first_hit + self.seconds
        if over or (self.count is not None and self.hits >= self.count):
            self.recovered = now if self.recovered is None else self.recovered
            return False
        self.first_hit = now if self.first_hit is None else self.first_hit
        self.hits += 1
        return True


@dataclass(slots=True)
class FaultyProxy:
    """The proxy, on a port of its own, in a thread of this process; a context manager.

    Attributes:
        upstream: URL of the server behind it.
        faults: In force; the first that strikes a request is what happens to it. Appended to and cleared at any time.
        requests: How many there were of each method, path without query, and fault ("" for none).
        stored: How often a file of each path was stored, in one piece or in parts.
    """

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    port: int = field(default_factory=lambda: free_ports(1)[0])
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, kind: Kind, **which: object) -> Fault:
        """Put a fault into force."""
        fault = Fault(kind, **which)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults, and the counts begin anew."""
        self.faults.clear()
        self.requests.clear()
        self.stored.clear()

    def count(self, method: str, path: str, kind: str = "") -> int:
        """Requests of a method whose path a regular expression is found in, with that fault."""
        return sum(n for (m, p, k), n in self.requests.items() if m == method and k == kind and re.search(path, p))

    def __enter__(self) -> FaultyProxy:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="faulty-proxy", daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        session, runner = self._loop.run_until_complete(self._start())
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.run_until_complete(session.close())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _start(self) -> tuple[ClientSession, web.AppRunner]:
        session = ClientSession(
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._answer(request, session)

        app = web.Application(client_max_size=2**40)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, auto_decompress=False, shutdown_timeout=0.5, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        return session, runner

    async def _answer(self, request: web.Request, session: ClientSession) -> web.StreamResponse:
        # The path as it was sent and the host that was signed: else the signature would not be the request's.
        path = request.raw_path
        fault = next((one for one in self.faults if one.strikes(request.method, path)), None)
        self.requests[request.method, path.partition("?")[0], fault.kind if fault else ""] += 1
        if fault is not None and (refusal := await _instead(request, fault)) is not None:
            return refusal
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        sent = session.request(
            request.method,
            URL(self.upstream + path, encoded=True),
            headers=headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
        )
        try:
            async with sent as answer:
                file, _, query = path.partition("?")
                ends_upload = request.method == "PUT" and "partNumber" not in query and not file.endswith("/")
                if answer.status < 300 and (ends_upload or (request.method == "POST" and "uploadId" in query)):
                    self.stored[file] += 1
                if fault is not None and fault.kind is Kind.LOST_ANSWER:
                    await answer.read()
                    return _reset(request)
                response = web.StreamResponse(status=answer.status, reason=answer.reason)
                for name, value in answer.headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        response.headers.add(name, value)
                await response.prepare(request)
                if request.method != "HEAD":
                    body = answer.content.iter_chunked(_CHUNK)
                    await _pass_on(body, response, request, fault, int(answer.headers.get("Content-Length", 0)))
                return response
        except ClientError:  # the server itself is away
            return _reset(request)


async def _instead(request: web.Request, fault: Fault) -> web.Response | None:
    """What a client gets in place of the server's answer, if it gets anything else."""
    match fault.kind:
        case Kind.UNAVAILABLE:
            return _refusal(request, 503, "SlowDown", "Please reduce your request rate.")
        case Kind.FORBIDDEN:
            return _refusal(request, 403, "AccessDenied", "Access Denied.")
        case Kind.RESET:
            return _reset(request)
        case Kind.DEAD:
            await asyncio.sleep(3600)
        case Kind.SLOW:
            await asyncio.sleep(fault.delay)
    return None


async def _pass_on(
    body: AsyncIterator[bytes], response: web.StreamResponse, request: web.Request, fault: Fault | None, length: int
) -> None:
    """A body, or what a fault leaves of it: half, or all with one bit of its middle changed."""
    kind, middle, at = fault.kind if fault else None, length // 2, 0
    async for chunk in body:
        piece = bytearray(chunk)
        if kind in (Kind.TRUNCATED, Kind.RESET_IN_BODY) and at + len(piece) > middle:
            await response.write(bytes(piece[: middle - at]))
            await asyncio.sleep(0.05)  # until it has left
            if kind is Kind.TRUNCATED:
                assert request.transport is not None
                request.transport.close()
            else:
                _reset(request)
            return
        if kind is Kind.FLIPPED and at <= middle < at + len(piece):
            piece[middle - at] ^= 1
        at += len(piece)
        await response.write(bytes(piece))


def _refusal(request: web.Request, status: int, code: str, message: str) -> web.Response:
    body = None if request.method == "HEAD" else _ERROR.format(code=code, message=message)
    response = web.Response(status=status, text=body, content_type="application/xml")
    response.force_close()  # what was not read of the request's body is no next request
    return response


def _reset(request: web.Request) -> web.Response:
    """Close the connection as a machine does that has forgotten it: with an RST in place of an end."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()
