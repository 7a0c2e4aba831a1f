"""The live page's server: right answers, one shape of errors, and nothing that a visitor breaks or sees."""

import asyncio
import contextlib
import json
import math
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import live
import processes
import pyro
import pytest
import torch
from scripts import call

from vma_pyro import Memory
from vma_pyro.demo.connection import Connection
from vma_pyro.demo.engine import Engine, digits, pixels
from vma_pyro.demo.limits import Busy, Limits, Queue
from vma_pyro.demo.messages import Look
from vma_pyro.evaluation import address_posterior, kl_report
from vma_pyro.evaluation.kl import BoundParts

INK = "01" * 392
BLANK = "0" * 784


@pytest.fixture(scope="module")
def pair():
    with pyro.settings.context(module_local_params=True):
        return live.small_pair()


@pytest.fixture(scope="module")
def server(pair):
    with live.serve(live.application(pair)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture
def entries(random_images):
    return digits(random_images(7).squeeze(1))


def test_digits_are_pixels(random_images):
    images = random_images(3)
    assert torch.equal(pixels(digits(images.squeeze(1))), images)
    assert pixels([INK])[0, 0, 0, :4].tolist() == [0, 1, 0, 1]


def test_a_look_is_the_posterior_and_its_worth(server, pair, entries):
    model, guide = pair
    found = server.post("/api/look", json={"image": INK, "entries": entries}).json()
    memory, x = Memory(pixels(entries)), pixels([INK])
    assert found["probabilities"] == pytest.approx(address_posterior(guide, memory, x)[0].tolist(), abs=1e-6)
    report = kl_report(model, guide, memory, x, num_samples=1)
    assert found["kl_nats"] == pytest.approx(report.kl_address.mean, abs=1e-5)
    assert found["kl_bits"] == pytest.approx(report.kl_address_bits.mean, abs=1e-5)
    assert found["most_nats"] == pytest.approx(report.log_memory)


@pytest.mark.parametrize("size", [2, 3, 5, 20])
def test_a_certain_lookup_tells_no_more_than_there_is(pair, monkeypatch, size):
    from vma_pyro.demo import engine

    # What single precision makes of log |M|.
    certain = BoundParts(
        torch.zeros(1), torch.tensor([1e-7 + math.log(size)]), torch.zeros(1), torch.eye(size)[:1]
    )
    monkeypatch.setattr(engine, "split_bound", lambda *arguments: certain)
    found = engine.Engine(*pair).look(Look(image=INK, entries=[INK] * size))
    assert found.kl_nats == found.most_nats
    assert found.kl_bits == found.most_bits


def test_a_lookup_against_the_odds_tells_more(pair, monkeypatch):
    from vma_pyro.demo import engine

    # Under a p(a | M) of 0.1 for the entry in question: log 10 nats, of "at most" log 2.
    surprising = BoundParts(torch.zeros(1), torch.tensor([math.log(10)]), torch.zeros(1), torch.eye(2)[:1])
    monkeypatch.setattr(engine, "split_bound", lambda *arguments: surprising)
    found = engine.Engine(*pair).look(Look(image=INK, entries=[INK] * 2))
    assert found.kl_nats == pytest.approx(math.log(10))


def test_one_entry_tells_nothing(server):
    found = server.post("/api/look", json={"image": INK, "entries": [BLANK]}).json()
    assert found["probabilities"] == [1.0]
    assert found["kl_nats"] == found["most_bits"] == 0


def test_samples_repeat_with_the_seed_whatever_others_ask(server, entries):
    asked = {"entries": entries, "seed": 3, "count": 5}
    first = server.post("/api/generate", json=asked).json()
    assert len(first["images"]) == 5
    assert all(len(bytes.fromhex(image)) == 784 for image in first["images"])
    assert set(first["addresses"]) <= set(range(7))
    server.post("/api/generate", json={"entries": entries[:2], "seed": 4})
    with ThreadPoolExecutor(8) as threads:
        again = list(threads.map(lambda _: server.post("/api/generate", json=asked).json(), range(8)))
    assert all(answer == first for answer in again)
    assert server.post("/api/generate", json={**asked, "seed": 4}).json() != first


def test_a_walk_moves_by_small_steps_and_ends_elsewhere(server, entries):
    asked = {"entry": entries[0], "seed": 1, "steps": 9}
    found = server.post("/api/interpolate", json=asked).json()
    frames = torch.tensor([list(bytes.fromhex(image)) for image in found["images"]]).double()
    assert frames.shape == (9, 784)
    steps, whole = (frames[1:] - frames[:-1]).norm(dim=1), (frames[-1] - frames[0]).norm()
    assert whole > 0
    assert steps.max() < whole
    assert server.post("/api/interpolate", json=asked).json() == found


def test_banks(server):
    about = server.get("/api/about").json()
    assert about["model"] == "a model"
    for name in about["banks"]:
        tiles = server.get(f"/api/banks/{name}").json()["tiles"]
        assert 0 < len(tiles) <= about["most_entries"]
        assert all(set(tile["image"]) == {"0", "1"} for tile in tiles)


def test_the_page_needs_nothing_else(server):
    answer = server.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text.replace("http://127.0.0.1", "")
    assert 'src="' not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("look", {"entries": [INK]}, "image: Field required, got {'entries': "),
        (
            "look",
            {"image": INK, "entries": []},
            "entries: List should have at least 1 item after validation, not 0",
        ),
        ("look", {"image": INK, "entries": [INK] * 201}, "entries: List should have at most 200 items"),
        (
            "look",
            {"image": INK, "entries": [INK, "01"]},
            "entries.1: String should match pattern '^[01]{784}$', got",
        ),
        ("look", {"image": INK + "\n", "entries": [INK]}, "image: String should match pattern"),
        ("look", {"image": INK, "entries": [INK], "more": 1}, "more: Extra inputs are not permitted, got 1"),
        ("generate", {"entries": [INK], "seed": -1}, "seed: Input should be greater than or equal to 0, got -1"),
        (
            "generate",
            {"entries": [INK], "seed": 2**31},
            "seed: Input should be less than 2147483648, got 2147483648",
        ),
        ("generate", {"entries": [INK], "seed": "1"}, "seed: Value error, Input should be a number, got '1'"),
        ("generate", {"entries": [INK], "count": 17}, "count: Input should be less than or equal to 16, got 17"),
        ("interpolate", {"entry": INK, "steps": 1}, "steps: Input should be greater than or equal to 2, got 1"),
        ("interpolate", [], "body: Input should be a valid dictionary or object to extract fields from, got []"),
    ],
)
def test_wrong_fields_are_named(server, path, body, error):
    answer = server.post(f"/api/{path}", json=body)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith(error)
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/api/look", b"{", 400),
        ("POST", "/api/look", b"\xff\xfe", 400),
        ("POST", "/api/look", b"[" * 100_000, 400),
        ("POST", "/api/look/", b"{}", 404),
        ("POST", "/api/look", b'{"image": "\\ud800", "\\ud800": 1}', 422),
        ("POST", "/api/generate", b'{"entries": [], "seed": 1e999}', 422),
        ("POST", "/api/generate", b'{"entries": [], "seed": NaN}', 422),
        ("POST", "/api/look", b"x" * 300_000, 413),
        ("POST", "/api/look", b"x" * 30_000_000, 413),
        ("GET", "/api/banks/none", b"", 404),
        ("GET", "/api/look", b"", 405),
        ("GET", "/nothing", b"", 404),
        ("GET", "/docs", b"", 404),
    ],
)
def test_malformed_requests_have_the_same_shape_of_errors(server, method, path, content, status):
    answer = server.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert (status == 400) == answer.json()["error"].startswith("body: expected JSON")


def test_what_fails_unexpectedly_has_the_same_shape(pair, monkeypatch):
    from vma_pyro.demo.engine import Engine

    def fail(self, request):
        raise RuntimeError("secret")

    monkeypatch.setattr(Engine, "look", fail)
    with live.serve(live.application(pair)) as address:
        answer = httpx.post(f"{address}/api/look", json={"image": INK, "entries": [INK]})
    assert answer.status_code == 500
    assert answer.json() == {"error": "server: expected an answer, got a RuntimeError; see its log"}
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_another_host_is_refused(server):
    answer = server.get("/api/about", headers={"host": "example.org"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("host: expected 127.0.0.1 or localhost, got 'example.org'")


def test_bodies_without_a_length_are_bounded(server):
    answer = server.post("/api/look", content=(b"x" * 10_000 for _ in range(100)))
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


def test_a_body_that_is_announced_too_large_is_not_asked_for(server):
    with socket.create_connection(("127.0.0.1", server.base_url.port), timeout=5) as connection:
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
def test_what_is_not_http_has_the_same_shape_of_errors(server, sent):
    with socket.create_connection(("127.0.0.1", server.base_url.port), timeout=5) as connection:
        connection.sendall(sent)
        assert told(connection) == (400, "request: expected HTTP, got something else")


def test_headers_that_do_not_end_are_given_up(pair, monkeypatch):
    monkeypatch.setattr(Connection, "headers_within", 0.2)
    with live.serve(live.application(pair)) as address:
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ")
            error = "request: expected its headers within 0.2 seconds, got a part of them"
            assert told(connection) == (408, error)
        with httpx.Client(base_url=address) as client:  # one connection, longer than that in all
            for _ in range(4):
                assert client.get("/api/about").status_code == 200
                time.sleep(0.1)


def test_an_answer_that_nobody_takes_is_given_up(pair, monkeypatch):
    monkeypatch.setattr(Connection, "answer_within", 0.2)
    with (
        live.serve(live.application(pair)) as address,
        socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=5) as connection,
    ):
        connection.sendall(b"POST /api/look HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_more_connections_than_the_server_takes_leave_it_answering(pair, monkeypatch):
    monkeypatch.setattr(Connection, "most", 20)
    monkeypatch.setattr(Connection, "headers_within", 1.0)
    with live.serve(live.application(pair)) as address:
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


def test_slow_and_broken_connections_leave_it_answering(server):
    port = server.base_url.port
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow[:10]:
        connection.sendall(b"POST /api/look HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    slow[10].sendall(b"\x00\xff garbage \r\n\r\n")
    began = time.monotonic()
    assert server.post("/api/look", json={"image": INK, "entries": [INK, BLANK]}).status_code == 200
    assert time.monotonic() - began < 2
    for connection in slow:
        connection.close()


def test_fifty_at_a_time_are_answered_or_told_to_wait(server, entries):
    asked = {"image": INK, "entries": (entries * 29)[:200]}

    def ask(_):
        began = time.monotonic()
        answer = server.post("/api/look", json=asked)
        return answer.status_code, time.monotonic() - began

    with ThreadPoolExecutor(50) as threads:
        found = list(threads.map(ask, range(150)))
    assert {status for status, _ in found} <= {200, 429}
    assert any(status == 200 for status, _ in found)
    assert max(seconds for _, seconds in found) < 2
    assert server.post("/api/look", json=asked).status_code == 200


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


def test_a_stroke_over_200_entries_encodes_each_of_them_once(pair, monkeypatch, random_images):
    """Which is nearly all of its time, about 0.1 s with the published model."""
    model, guide = pair
    encode, seen = type(guide.networks).encode, []
    monkeypatch.setattr(
        type(guide.networks), "encode", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    Engine(model, guide).look(Look(image=INK, entries=digits(random_images(200).squeeze(1))))
    assert seen == [200]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--load", "nowhere.pt"], "nowhere.pt"),
        (["--port", "70000"], "port: expected 0 to 65535, got 70000"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, error, tmp_path):
    script = Path(__file__).parents[1] / "vma_pyro" / "demo" / "__main__.py"
    done = processes.run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert error in done.stderr.splitlines()[-1]


def test_a_model_of_ones_own_classes_is_shown(own_model, monkeypatch):
    from vma_pyro.demo import __main__, connection

    shown = []
    server = SimpleNamespace(run=lambda sockets: [socket.close() for socket in sockets])
    monkeypatch.setattr(connection, "make_server", lambda app: shown.append(app) or server)
    code = str(own_model.with_name("own_model.py"))
    call(__main__, f"--load={own_model}", f"--code={code}", "--port=0")
    asked = {"image": INK, "entries": [INK, INK]}
    with live.serve(shown[0]) as address, httpx.Client(base_url=address) as client:
        assert client.post("/api/look", json=asked).json()["probabilities"] == pytest.approx([0.5, 0.5])
    with pytest.raises(
        SystemExit, match="^error: checkpoint .*: expected classes of vma_pyro, got 'own_model:Soft'"
    ):
        call(__main__, f"--load={own_model}", "--port=0")


def test_a_port_in_use_is_named(server, tmp_path):
    script = Path(__file__).parents[1] / "vma_pyro" / "demo" / "__main__.py"
    done = processes.run(script, "--port", server.base_url.port, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        f"error: --port: expected a free one, got {server.base_url.port}"
    )


def test_alphabets_of_the_data_come_before_the_made_ones(data_folder):
    from vma_pyro.demo.__main__ import DemoConfig, banks

    made = [bank.name for bank in banks(DemoConfig())]
    assert made[0] == "glyphs-1-000"
    assert len(made) == 10
    found = banks(DemoConfig(data="omniglot", data_dir=data_folder))
    assert [bank.name for bank in found][-10:] == made
    assert len(found) > 10
    assert all(1 <= len(bank.tiles) <= 200 for bank in found)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from vma_pyro.demo import __main__

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "vma_pyro.demo.connection", raising=False)
    with pytest.raises(SystemExit, match="^error: uvicorn: not installed; run `uv run --extra demo"):
        call(__main__)
