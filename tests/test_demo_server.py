"""The live page's server: right answers, one shape of errors, and banks of images."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import live
import processes
import pyro.distributions as dist
import pytest
import torch
from scripts import call
from torch.distributions import transforms

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.demo.engine import Engine, walk
from vma_pyro.demo.format import Format
from vma_pyro.demo.messages import Interpolate, Look
from vma_pyro.evaluation import address_posterior, kl_report
from vma_pyro.evaluation.kl import BoundParts

pixels, digits = Format().read, Format().write
INK = "01" * 392
BLANK = "0" * 784


def test_digits_are_pixels(random_images):
    images = random_images(3)
    assert torch.equal(pixels(digits(images)), images)
    assert pixels([INK])[0, 0, 0, :4].tolist() == [0, 1, 0, 1]


def test_a_look_is_the_posterior_and_its_worth(live_server, live_pair, live_entries):
    model, guide = live_pair
    found = live_server.post("/api/look", json={"image": INK, "entries": live_entries}).json()
    memory, x = Memory(pixels(live_entries)), pixels([INK])
    assert found["probabilities"] == pytest.approx(address_posterior(guide, memory, x)[0].tolist(), abs=1e-6)
    report = kl_report(model, guide, memory, x, num_samples=1)
    assert found["kl_nats"] == pytest.approx(report.kl_address.mean, abs=1e-5)
    assert found["kl_bits"] == pytest.approx(report.kl_address_bits.mean, abs=1e-5)
    assert found["most_nats"] == pytest.approx(report.log_memory)


@pytest.mark.parametrize("size", [2, 3, 5, 20])
def test_a_certain_lookup_tells_no_more_than_there_is(live_pair, monkeypatch, size):
    from vma_pyro.demo import engine

    # What single precision makes of log |M|.
    certain = BoundParts(
        torch.zeros(1), torch.tensor([1e-7 + math.log(size)]), torch.zeros(1), torch.eye(size)[:1]
    )
    monkeypatch.setattr(engine, "split_bound", lambda *arguments: certain)
    found = engine.Engine(*live_pair).look(Look(image=INK, entries=[INK] * size))
    assert found.kl_nats == found.most_nats
    assert found.kl_bits == found.most_bits


def test_a_lookup_against_the_odds_tells_more(live_pair, monkeypatch):
    from vma_pyro.demo import engine

    # Under a p(a | M) of 0.1 for the entry in question: log 10 nats, of "at most" log 2.
    surprising = BoundParts(torch.zeros(1), torch.tensor([math.log(10)]), torch.zeros(1), torch.eye(2)[:1])
    monkeypatch.setattr(engine, "split_bound", lambda *arguments: surprising)
    found = engine.Engine(*live_pair).look(Look(image=INK, entries=[INK] * 2))
    assert found.kl_nats == pytest.approx(math.log(10))


def test_one_entry_tells_nothing(live_server):
    found = live_server.post("/api/look", json={"image": INK, "entries": [BLANK]}).json()
    assert found["probabilities"] == [1.0]
    assert found["kl_nats"] == found["most_bits"] == 0


def test_samples_repeat_with_the_seed_whatever_others_ask(live_server, live_entries):
    asked = {"entries": live_entries, "seed": 3, "count": 5}
    first = live_server.post("/api/generate", json=asked).json()
    assert len(first["images"]) == 5
    assert all(len(bytes.fromhex(image)) == 784 for image in first["images"])
    assert set(first["addresses"]) <= set(range(7))
    live_server.post("/api/generate", json={"entries": live_entries[:2], "seed": 4})
    with ThreadPoolExecutor(8) as threads:
        again = list(threads.map(lambda _: live_server.post("/api/generate", json=asked).json(), range(8)))
    assert all(answer == first for answer in again)
    assert live_server.post("/api/generate", json={**asked, "seed": 4}).json() != first


def test_a_walk_moves_by_small_steps_and_ends_elsewhere(live_server, live_entries):
    asked = {"entry": live_entries[0], "seed": 1, "steps": 9}
    found = live_server.post("/api/interpolate", json=asked).json()
    frames = torch.tensor([list(bytes.fromhex(image)) for image in found["images"]]).double()
    assert frames.shape == (9, 784)
    steps, whole = (frames[1:] - frames[:-1]).norm(dim=1), (frames[-1] - frames[0]).norm()
    assert whole > 0
    assert steps.max() < whole
    assert live_server.post("/api/interpolate", json=asked).json() == found


def test_banks(live_server):
    about = live_server.get("/api/about").json()
    assert about["model"] == "a model"
    for name in about["banks"]:
        tiles = live_server.get(f"/api/banks/{name}").json()["tiles"]
        assert 0 < len(tiles) <= about["most_entries"]
        assert all(set(tile["image"]) == {"0", "1"} for tile in tiles)


def test_the_page_needs_nothing_else(live_server):
    answer = live_server.get("/")
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
def test_wrong_fields_are_named(live_server, path, body, error):
    answer = live_server.post(f"/api/{path}", json=body)
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
def test_malformed_requests_have_the_same_shape_of_errors(live_server, method, path, content, status):
    answer = live_server.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert (status == 400) == answer.json()["error"].startswith("body: expected JSON")


def test_what_fails_unexpectedly_has_the_same_shape(live_pair, monkeypatch):
    from vma_pyro.demo.engine import Engine

    def fail(self, request):
        raise RuntimeError("secret")

    monkeypatch.setattr(Engine, "look", fail)
    with live.serve(live.application(live_pair)) as address:
        answer = httpx.post(f"{address}/api/look", json={"image": INK, "entries": [INK]})
    assert answer.status_code == 500
    assert answer.json() == {"error": "server: expected an answer, got a RuntimeError; see its log"}
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_stroke_over_200_entries_encodes_each_of_them_once(live_pair, monkeypatch, random_images):
    """Which is nearly all of its time, about 0.1 s with the published model."""
    model, guide = live_pair
    encode, seen = type(guide.networks).encode, []
    monkeypatch.setattr(
        type(guide.networks), "encode", lambda self, images: seen.append(len(images)) or encode(self, images)
    )
    Engine(model, guide).look(Look(image=INK, entries=digits(random_images(200))))
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


def test_a_port_in_use_is_named(live_server, tmp_path):
    script = Path(__file__).parents[1] / "vma_pyro" / "demo" / "__main__.py"
    done = processes.run(script, "--port", live_server.base_url.port, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        f"error: --port: expected a free one, got {live_server.base_url.port}"
    )


def test_alphabets_of_the_data_come_before_the_made_ones(data_folder):
    from vma_pyro.demo.__main__ import DemoConfig, banks

    made = [bank.name for bank in banks(DemoConfig(), Format())]
    assert made[0] == "glyphs-1-000"
    assert len(made) == 10
    found = banks(DemoConfig(data="omniglot", data_dir=data_folder), Format())
    assert [bank.name for bank in found][-10:] == made
    assert len(found) > 10
    assert all(1 <= len(bank.tiles) <= 200 for bank in found)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from vma_pyro.demo import __main__

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "vma_pyro.demo.connection", raising=False)
    with pytest.raises(SystemExit, match="^error: uvicorn: not installed; run `uv run --extra demo"):
        call(__main__)


class FlowNetworks(MLPNetworks):
    """Networks whose p(z | m) is no Gaussian, and has no mean."""

    def prior(self, m):
        return dist.TransformedDistribution(super().prior(m), [transforms.SigmoidTransform()])


class CorrelatedNetworks(MLPNetworks):
    """Networks whose p(z | m) has a covariance."""

    def prior(self, m):
        base = super().prior(m).base_dist
        factor = torch.diag_embed(base.scale) + 0.3 * torch.ones(4, 4).tril(-1)
        return dist.MultivariateNormal(base.loc, scale_tril=factor)


@pytest.mark.parametrize("kind", [FlowNetworks, CorrelatedNetworks, MLPNetworks])
def test_any_prior_of_z_is_walked_from_draw_to_draw(kind):
    networks = kind(4, hidden_dims=(8, 7), key_dim=5)
    found = Engine(Model(networks), Guide(networks)).interpolate(Interpolate(entry=INK, steps=3, seed=0))
    assert len(set(found.images)) == 3
    memory = Memory(pixels([INK])).encode(networks)
    prior = networks.prior(memory.read(torch.zeros(1, dtype=torch.long)))
    torch.manual_seed(1)
    ends = walk(prior, 5)[[0, -1]]
    torch.manual_seed(1)
    torch.testing.assert_close(ends, prior.sample((2,))[:, 0])
