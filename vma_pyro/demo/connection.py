"""The server's side of a connection: few at a time, and a deadline for each request and for each answer."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vma_pyro.demo.limits import HEADERS, refusal


class Connection(H11Protocol):
    """Limits uvicorn's connection, which by itself waits for the end of a request's headers for ever.

    Attributes:
        most: connections at a time.
        headers_within: seconds from the connection, or from the answer before, to the end of the headers.
        answer_within: seconds from there until the client has taken the answer.
    """

    most = 100
    headers_within = 10.0
    answer_within = 60.0

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._watched: Any = None
        if len(self.connections) > self.most:
            self._refuse(503, f"server: expected at most {self.most} connections, got more")
        else:
            self._watch()

    def handle_events(self) -> None:
        """Read on, after more has arrived or an answer is complete."""
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the deadline, as nothing more is expected."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(400, "request: expected HTTP, got something else")

    def _watch(self) -> None:
        """Set a new deadline whenever another request begins or ends."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if (self.cycle, answering) == self._watched:
            return
        self._watched = self.cycle, answering
        if self._deadline is not None:
            self._deadline.cancel()
        if answering:
            self._deadline = self.loop.call_later(self.answer_within, self.transport.abort)
        else:
            error = f"request: expected its headers within {self.headers_within:g} seconds, got a part of them"
            self._deadline = self.loop.call_later(self.headers_within, self._refuse, 408, error)

    def _refuse(self, status: int, error: str) -> None:
        """Say it past the protocol's own state, and hang up."""
        body, headers = refusal(error)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in {**headers, **HEADERS}.items()]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()


def make_server(app: Any, *, log_level: str = "warning") -> uvicorn.Server:
    """Make the server of an application, to be run on a socket of its own."""
    return uvicorn.Server(
        uvicorn.Config(app, http=Connection, ws="none", timeout_keep_alive=5, backlog=50, log_level=log_level)
    )
