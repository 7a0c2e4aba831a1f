"""The live page's server under visitors who send too much, too slowly, or at once: nothing breaks it."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import live
import pytest

from vma_pyro.demo.connection import Connection
from vma_pyro.demo.limits import Busy, Limits, Queue

INK = "01" * 392
BLANK = "0" * 784


def test_another_host_is_refused(live_server):
    answer = live_server.get("/api/about", headers={"host": "example.org"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("host: expected 127.0.0.1 or localhost, got 'example.org'")


def test_bodies_without_a_length_are_bounded(live_server):
    answer = live_server.post("/api/look", content=(b"x" * 10_000 for _ in range(100)))
    assert answer.status_code == 413


def test_a_slow_body_is_given_up():
    async def receive():
        await asyncio.sleep(10)

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", b"localhost:1"), (b"content-length", b"5")]}
    live.run_alone(Limits(None, seconds=0.05)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert sent[1]["body"] == b'{"error": "body: expected within 0.05 seconds, got a part of it"}'


def test_a_body_that_is_announced_too_large_is_not_asked_for(live_server):
    with socket.create_connection(("127.0.0.1", live_server.base_url.port), timeout=5) as connection:
        lines = [
            b"POST /api/look HTTP/1.1",
            b"host: LOCALHOST",
            b"content-length: 10000000000",
            b"expect: 100-continue",
        ]
        connection.sendall(b"\r\n".join([*lines, b"", b""]))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def told(connection):
    """Status and error of what arrives until the server hangs up."""
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    head, body = b"".join(parts).split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff garbage \r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/look HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_has_the_same_shape_of_errors(live_server, sent):
    with socket.create_connection(("127.0.0.1", live_server.base_url.port), timeout=5) as connection:
        connection.sendall(sent)
        assert told(connection) == (400, "request: expected HTTP, got something else")


def test_headers_that_do_not_end_are_given_up(live_pair, monkeypatch):
    monkeypatch.setattr(Connection, "headers_within", 0.2)
    with live.serve(live.application(live_pair)) as address:
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ")
            error = "request: expected its headers within 0.2 seconds, got a part of them"
            assert told(connection) == (408, error)
        with httpx.Client(base_url=address) as client:  # one connection, longer than that in all
            for _ in range(4):
                assert client.get("/api/about").status_code == 200
                time.sleep(0.1)


def test_an_answer_that_nobody_takes_is_given_up(live_pair, monkeypatch):
    monkeypatch.setattr(Connection, "answer_within", 0.2)
    with (
        live.serve(live.application(live_pair)) as address,
        socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=5) as connection,
    ):
        connection.sendall(b"POST /api/look HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_more_connections_than_the_server_takes_leave_it_answering(live_pair, monkeypatch):
    monkeypatch.setattr(Connection, "most", 20)
    monkeypatch.setattr(Connection, "headers_within", 1.0)
    with live.serve(live.application(live_pair)) as address:
        port = int(address.rsplit(":", 1)[1])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(20)]
        for connection in idle:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx-a: ")
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            assert told(connection) == (503, "server: expected at most 20 connections, got more")
        assert {told(connection)[0] for connection in idle} == {408}
        assert httpx.get(f"{address}/api/about").status_code == 200
        for connection in idle:
            connection.close()


def test_a_client_that_leaves_gives_back_its_place():
    places = []

    async def application(scope, receive, send):
        places.append("taken")
        try:
            await asyncio.sleep(10)
        finally:
            places.append("given back")

    async def one():
        messages = iter([{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}])

        async def receive():
            await asyncio.sleep(0.05)
            return next(messages)

        scope = {"type": "http", "headers": [(b"host", b"localhost")]}
        await asyncio.wait_for(Limits(application)(scope, receive, None), 2)

    live.run_alone(one())
    assert places == ["taken", "given back"]


def test_half_a_body_is_not_taken_for_the_whole():
    async def receive():
        return messages.pop(0)

    messages = [{"type": "http.request", "body": b"{}", "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "headers": [(b"host", b"localhost")]}
    live.run_alone(Limits(None)(scope, receive, None))  # neither runs the application nor answers
    assert messages == []


def test_slow_and_broken_connections_leave_it_answering(live_server):
    port = live_server.base_url.port
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow[:10]:
        connection.sendall(b"POST /api/look HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    slow[10].sendall(b"\x00\xff garbage \r\n\r\n")
    # The client gives up after five seconds.
    assert live_server.post("/api/look", json={"image": INK, "entries": [INK, BLANK]}).status_code == 200
    for connection in slow:
        connection.close()


def test_fifty_at_a_time_are_answered_or_told_to_wait(live_server, live_entries):
    asked = {"image": INK, "entries": (live_entries * 29)[:200]}

    def ask(_):
        return live_server.post("/api/look", json=asked).status_code  # within five seconds, or the client raises

    with ThreadPoolExecutor(50) as threads:
        found = list(threads.map(ask, range(150)))
    assert {*found} <= {200, 429}
    assert 200 in found
    assert live_server.post("/api/look", json=asked).status_code == 200


def test_the_queue_is_bounded():
    async def crowd():
        queue, gate = Queue(waiting=3), threading.Event()
        tasks = [asyncio.create_task(queue.do(lambda _: gate.wait(5), None)) for _ in range(5)]
        await asyncio.sleep(0.05)
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(f, Busy) for f in found] == [False] * 3 + [True] * 2
        assert await queue.do(lambda x: x + 1, 1) == 2

    live.run_alone(crowd())
