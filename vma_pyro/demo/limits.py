"""What one visitor may ask for: bodies of a bounded size within a bounded time, and a bounded queue of work."""

from __future__ import annotations

import asyncio
import json
import logging
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
LOG = logging.getLogger("uvicorn.error")


class Refused(Exception):
    """Ends a request that is not answered: its arguments are a status and an error in one line."""


class Limits:
    """ASGI middleware: refuses what is too large, too slow or meant for another host, before anything reads it.

    A page elsewhere that has its own name point here (DNS rebinding) is refused by the name. A client that leaves
    gives back its place in the queue. What fails unexpectedly is logged, and answered in the shape of all errors.

    Args:
        app: what is protected.
        most_bytes: of a body.
        seconds: for a body to arrive.
    """

    def __init__(self, app: Any, *, most_bytes: int = 256 * 1024, seconds: float = 10.0) -> None:
        self.app, self.most_bytes, self.seconds = app, most_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(headers)
            body = await self._body(headers, receive)
            if body is not None:
                await self._run(scope, body, receive, answer)
        except Refused as refused:
            await refuse(answer, *refused.args)
        except Exception as error:
            if begun:
                raise
            LOG.exception("unexpected")
            await refuse(answer, 500, f"server: expected an answer, got a {type(error).__name__}; see its log")

    def _check(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if host.lower() not in HOSTS:
            raise Refused(400, f"host: expected {' or '.join(HOSTS)}, got {host[:60]!a}")
        if b"expect" in headers and int(headers.get(b"content-length", b"0")) > self.most_bytes:
            raise self._too_large()  # it asks before it sends

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """Read all of it, or None if the client has left; what is too much is dropped, so that it hears."""
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.most_bytes:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            if size <= self.most_bytes:
                error = f"body: expected within {self.seconds:g} seconds, got a part of it"
                raise Refused(408, error) from None
        if size > self.most_bytes:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused(413, f"body: expected at most {self.most_bytes} bytes, got more")

    async def _run(self, scope: Any, body: bytes, receive: Any, answer: Any) -> None:
        """Run the application, as long as somebody waits for its answer."""
        whole = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.ensure_future(_gone(receive))

        async def replay() -> Any:
            return whole.pop() if whole else await asyncio.shield(gone)

        work = asyncio.ensure_future(self.app(scope, replay, answer))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Any) -> Any:
    """Wait until the client has left, or has its answer."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def refusal(error: str) -> tuple[bytes, dict[bytes, bytes]]:
    """Make body and headers of an error; the connection ends, as some of the request may be unread."""
    body = json.dumps({"error": error}).encode()
    length = str(len(body)).encode()
    return body, {b"content-type": b"application/json", b"content-length": length, b"connection": b"close"}


async def refuse(send: Any, status: int, error: str) -> None:
    """Answer an ASGI request with an error."""
    body, headers = refusal(error)
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})


class Busy(Exception):
    """Says that more work is waiting than can be done soon."""


class Queue:
    """Has work done in threads, one piece at a time, while a few wait.

    Args:
        waiting: pieces at most, the one that is being done included.
    """

    def __init__(self, waiting: int = 10) -> None:
        self.waiting, self.present = waiting, 0
        self._turn = asyncio.Lock()

    async def do(self, work: Callable[[Any], Result], request: Any) -> Result:
        """Wait for a turn, do the work and return its result.

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
