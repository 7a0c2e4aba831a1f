"""What one visitor may ask for: bodies of a bounded size within a bounded time, and a bounded queue of work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread

Result = TypeVar("Result")

HEADERS = {
    # Nothing but what the page itself brings, and no other page around it.
    b"content-security-policy": b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    b"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
HOSTS = ("127.0.0.1", "localhost")


class Limits:
    """ASGI middleware: refuses what is too large, too slow or meant for another host, before anything reads it.

    A page elsewhere that has its own name point here (DNS rebinding) is refused by the name.

    Args:
        app: what is protected.
        most_bytes: of a body.
        seconds: for a body to arrive.
    """

    def __init__(self, app: Any, *, most_bytes: int = 256 * 1024, seconds: float = 10.0) -> None:
        self.app, self.most_bytes, self.seconds = app, most_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host not in HOSTS:
            await refuse(answer, 400, f"host: expected {' or '.join(HOSTS)}, got {host[:60]!a}")
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._body(receive)
        except TimeoutError:
            await refuse(answer, 408, f"body: expected within {self.seconds:g} seconds, got a part of it")
            return
        if body is None:
            await refuse(answer, 413, f"body: expected at most {self.most_bytes} bytes, got more")
            return
        read = False

        async def replay() -> Any:
            nonlocal read
            if read:
                return await receive()  # the client going away
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, answer)

    async def _body(self, receive: Any) -> bytes | None:
        """All of it, or None if it is too large; a little too much is read, so that the client hears why."""
        parts, size, more = [], 0, True
        while more and size <= 16 * self.most_bytes:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size <= self.most_bytes:
                parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts) if size <= self.most_bytes else None


async def refuse(send: Any, status: int, error: str) -> None:
    """Answer in the one shape of errors."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Busy(Exception):
    """More work is waiting than can be done soon."""


class Queue:
    """Work in threads, one piece at a time, a few waiting.

    Args:
        waiting: pieces at most, the one that is being done included.
    """

    def __init__(self, waiting: int = 10) -> None:
        self.waiting, self.present = waiting, 0
        self._turn = asyncio.Lock()

    async def do(self, work: Callable[[Any], Result], request: Any) -> Result:
        """The result of the work.

        Raises:
            Busy: too many are waiting.
        """
        if self.present >= self.waiting:
            raise Busy
        self.present += 1
        try:
            async with self._turn:
                return await anyio.to_thread.run_sync(work, request)
        finally:
            self.present -= 1
