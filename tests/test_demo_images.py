"""The live page with images of one's own: other sizes and colours, folders, and files that are dropped."""

import base64
import os
import shutil
from types import SimpleNamespace

import httpx
import live
import numpy as np
import pyro
import pytest
import test_demo_page as browsing
import torch
from drawings import folder_of_shapes
from PIL import Image
from scripts import call

from vma_pyro import (
    CausalBernoulli,
    ContinuousBernoulli,
    ConvNetworks,
    DiscretizedLogistics,
    Guide,
    Memory,
    Model,
    load_pretrained,
    models,
)
from vma_pyro.data import folder
from vma_pyro.demo.app import create_app
from vma_pyro.demo.banks import bank_of, make_banks
from vma_pyro.demo.engine import Engine
from vma_pyro.demo.format import Format, as_bytes, format_of
from vma_pyro.evaluation import address_posterior

SHAPE = (3, 10, 12)


def pair(likelihood, shape=SHAPE):
    torch.manual_seed(0)
    networks = ConvNetworks(3, width=0.1, key_dim=4, hidden_dim=8, image_shape=shape)
    return Model(networks, likelihood=likelihood).eval(), Guide(networks).eval()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield folder_of_shapes(tmp_path_factory.mktemp("own") / "shapes", [3, 2, 4])


@pytest.fixture(scope="module")
def bank(shapes):
    return bank_of("shapes", folder.load(shapes, size=SHAPE[1:], mode="colour"))


@pytest.fixture(scope="module")
def address(bank):
    with pyro.settings.context(module_local_params=True):
        app = create_app(Engine(*pair(DiscretizedLogistics(2))), [bank], about="colours")
        with live.serve(app) as found:
            yield found


def test_a_model_says_which_images_it_takes():
    assert format_of(pair(DiscretizedLogistics(2))[0]) == Format(SHAPE, 8)
    assert format_of(pair(ContinuousBernoulli(), (1, 9, 8))[0]) == Format((1, 9, 8), 8)
    assert format_of(pair(CausalBernoulli(hidden=4), (1, 9, 8))[0]) == Format((1, 9, 8), 1)


@pytest.mark.parametrize("format_", [Format(), Format((1, 3, 4), 8), Format(SHAPE, 8)])
def test_images_come_back_as_they_were_sent(format_):
    images = (torch.rand(3, *format_.shape) * (2**format_.bits - 1)).round() / (2**format_.bits - 1)
    torch.testing.assert_close(format_.read(format_.write(images)), images)


def test_banks_of_a_folder_begin_with_one_of_each_class(bank, shapes):
    assert [tile.label for tile in bank.tiles[:4]] == ["class00", "class01", "class02", "class00"]
    assert len(bank.tiles) == 9
    found = folder.load(shapes, size=SHAPE[1:], mode="colour")
    read = Format(SHAPE, 8).read([tile.image for tile in bank.tiles])
    torch.testing.assert_close(read[1] * 255, torch.from_numpy(found.pixels[3]).float())
    assert [bank.name for bank in make_banks(found)] == ["class00", "class01", "class02"]


def test_questions_about_colour_are_answered(address, bank):
    model, guide = pair(DiscretizedLogistics(2))
    entries = [tile.image for tile in bank.tiles]
    with httpx.Client(base_url=address) as client:
        about = client.get("/api/about").json()
        assert (about["shape"], about["bits"]) == (list(SHAPE), 8)
        found = client.post("/api/look", json={"image": entries[4], "entries": entries}).json()
        images = Format(SHAPE, 8).read(entries)
        expected = address_posterior(guide, Memory(images), images[4:5])[0]
        assert found["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
        made = client.post("/api/generate", json={"entries": entries, "count": 2}).json()
        for kind in ("images", "drawn"):
            assert [len(bytes.fromhex(image)) for image in made[kind]] == [360, 360]
        walked = client.post("/api/interpolate", json={"entry": entries[0], "steps": 3}).json()
        assert len(walked["images"]) == 3
        for wrong in ("01" * 392, entries[0][:-1] + "G", entries[0].upper() + "0"):
            refused = client.post("/api/look", json={"image": wrong, "entries": entries})
            assert refused.status_code == 422
            assert refused.json()["error"].startswith("image: String should match pattern '^[0-9a-f]{720}$', got")
        schema = client.get("/openapi.json").json()["components"]["schemas"]["Look"]
        assert schema["properties"]["image"]["pattern"] == "^[0-9a-f]{720}$"


def test_a_full_memory_of_large_images_is_not_too_large():
    shape = (3, 64, 64)
    app = create_app(Engine(*pair(DiscretizedLogistics(1), shape)), [], about="large")
    image = as_bytes(torch.zeros(1, *shape))[0]
    with live.serve(app) as address:
        asked = {"image": image, "entries": [image] * 200}
        assert httpx.post(f"{address}/api/look", json=asked, timeout=60).status_code == 200
        asked["entries"] = [image] * 230
        assert httpx.post(f"{address}/api/look", json=asked, timeout=60).status_code == 413


def test_a_folder_fills_the_memory_of_the_page(shapes, tmp_path, monkeypatch):
    from vma_pyro.demo import __main__, connection

    models.save(tmp_path / "model.pt", pair(DiscretizedLogistics(2)), data="folder", training={})
    shown = []
    server = SimpleNamespace(run=lambda sockets: [socket.close() for socket in sockets])
    monkeypatch.setattr(connection, "make_server", lambda app: shown.append(app) or server)
    call(__main__, f"--load={tmp_path / 'model.pt'}", f"--images={shapes}", "--port=0")
    call(__main__, f"--images={shapes}", "--port=0")
    for app, banks, length in zip(shown, (1, 11), (720, 784), strict=True):
        with live.serve(app) as address:
            assert len(httpx.get(f"{address}/api/about").json()["banks"]) == banks
            tiles = httpx.get(f"{address}/api/banks/shapes%20(yours)").json()["tiles"]
            assert {len(tile["image"]) for tile in tiles} == {length}
    with pytest.raises(
        SystemExit, match="^error: --images: expected a folder of images or an npz file, found none"
    ):
        call(__main__, f"--images={tmp_path / 'absent'}", "--port=0")


in_a_browser = [
    pytest.mark.skipif(shutil.which("chromium") is None and not os.environ.get("CI"), reason="no chromium"),
    pytest.mark.filterwarnings("default", "ignore:Session-scoped fixtures"),
]
browser_type_launch_args = browsing.browser_type_launch_args


def with_marks(function):
    for mark in in_a_browser:
        function = mark(function)
    return function


def drop(page, element, *files):
    """Files that are let go over an element; as bytes, by their names."""
    page.evaluate(
        """([id, files]) => {
            const data = new DataTransfer();
            for (const [name, content] of files)
                data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
            $(id).dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        [element, [[name, base64.b64encode(content).decode()] for name, content in files]],
    )


@with_marks
def test_colours_are_drawn_dropped_and_generated(page, address, shapes, tmp_path):
    page.goto(address)
    browsing.until(page, "document.querySelectorAll('.tile').length == 9")
    assert page.evaluate("[$('pad').width, $('pad').height]") == [12, 10]
    page.locator("#colour").fill("#ff0000")
    page.locator("#pad").click()
    browsing.settle(page)
    assert page.evaluate("written(state.ink)").count("ff0000") >= 0
    middle = page.evaluate("[0, 1, 2].map(c => 255 - state.ink[c * 120 + 5 * 12 + 6])")
    assert middle == [255, 0, 0]
    picture = (shapes / "class02" / "00.png").read_bytes()
    drop(page, "frame", ("a.png", picture))
    browsing.until(page, "state.undo.length == 2")
    browsing.settle(page)
    shown = np.array(page.evaluate("Array.from(state.ink)")).reshape(SHAPE)
    expected = 255 - folder.load(shapes, size=SHAPE[1:], mode="colour").pixels[5].astype(int)
    assert np.abs(shown - expected).max() <= 2
    assert page.locator("#top li").count() == 5
    drop(page, "memory", ("b.png", picture), ("c.png", picture))
    browsing.until(page, "document.querySelectorAll('.tile').length == 11")
    assert page.evaluate("state.tiles.at(-1).label") == "c.png"
    drop(page, "frame", ("broken.png", b"no picture"))
    browsing.until(
        page,
        "$('status').textContent.startsWith('image: expected a picture that this browser reads')",
    )
    page.get_by_role("button", name="Generate 16").click()
    browsing.until(page, "document.querySelectorAll('#samples canvas').length == 32")
    path = tmp_path / "d.png"
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(path)
    page.locator("#file").set_input_files(path)
    browsing.until(page, "state.ink.every(value => value == 255)")


@with_marks
def test_ink_is_what_covers_less_of_a_file(page, tmp_path):
    with pyro.settings.context(module_local_params=True):
        app = create_app(Engine(*load_pretrained("omniglot")), [], about="ink")
        with live.serve(app) as address:
            page.goto(address)
            browsing.until(page, "$('about').textContent != ''")
            for paper in (255, 0):
                picture = np.full((56, 56), paper, np.uint8)
                picture[20:36, 20:36] = 255 - paper
                Image.fromarray(picture).save(tmp_path / "a.png")
                drop(page, "frame", ("a.png", (tmp_path / "a.png").read_bytes()))
                browsing.until(page, "state.ink.reduce((a, b) => a + b) == 64")
            page.get_by_role("button", name="Generate 16").click()
            browsing.until(page, "document.querySelectorAll('#samples canvas').length == 32")
            page.get_by_label("draws of x").check()
            assert page.locator("#samples .mean").first.is_hidden()
            assert page.locator("#samples .drawn").first.is_visible()
            page.get_by_role("button", name="Draw row by row").click()
            running = "$('samples').querySelector('.drawn').getAnimations().length"
            assert page.evaluate(running) == 1
            page.emulate_media(reduced_motion="reduce")
            assert page.evaluate(running) == 0


@with_marks
def test_a_file_is_binarised_as_a_folder_is(page, tmp_path):
    """Dim paper, thin strokes, transparency, sizes that are no multiples of 28."""
    rng = np.random.default_rng(0)
    dim = np.full((61, 75), 150, np.uint8)
    dim[20:40, 20:45], dim[24:36, 26:40] = 20, 150
    thin = np.full((200, 170), 255, np.uint8)
    thin[:, 80:83], thin[90:93] = 0, 100
    clear = np.zeros((40, 50, 4), np.uint8)
    clear[10:25, 10:30, 3] = 255
    noise = np.full((90, 90), 230, np.uint8)
    noise[30:60, 30:60] = rng.integers(0, 256, (30, 30))
    pictures = {"dim": dim, "thin": thin, "clear": clear, "noise": noise}
    with pyro.settings.context(module_local_params=True):
        app = create_app(Engine(*load_pretrained("omniglot")), [], about="ink")
        with live.serve(app) as address:
            page.goto(address)
            browsing.until(page, "$('about').textContent != ''")
            for number, (name, values) in enumerate(pictures.items(), start=1):
                path = tmp_path / name / "a.png"
                path.parent.mkdir()
                Image.fromarray(values).save(path)
                drop(page, "frame", ("a.png", path.read_bytes()))
                browsing.until(page, f"state.undo.length == {number}")
                shown = np.array(page.evaluate("Array.from(state.ink)")).reshape(28, 28)
                with pytest.warns(UserWarning, match="single image"):
                    want = folder.load(path.parent, size=28, cache=tmp_path / "cache").pixels[0, 0]
                assert want.any(), name
                assert (shown != want).mean() < 0.005, name  # a pixel at three tenths of ink


@pytest.mark.parametrize(
    ("likelihood", "shape", "message"),
    [
        (DiscretizedLogistics(2, levels=16), (1, 9, 8), "load: expected a likelihood of 256 levels, .*, got 16"),
        (CausalBernoulli(colours=3, hidden=4), (3, 9, 8), "load: expected binary images of one colour, got 3"),
    ],
)
def test_images_that_the_page_cannot_show_are_refused(likelihood, shape, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Engine(*pair(likelihood, shape))


def test_images_of_any_size_have_a_format():
    """No pattern is too long for the validator: from some size on, length and digits are looked at."""
    from pydantic import ValidationError

    from vma_pyro.demo.messages import questions

    look = questions(Format((3, 224, 224), 8)).look
    fine = "0f" * (3 * 224 * 224)
    assert look(image=fine, entries=[fine]).image == fine
    for wrong in (fine[:-1], fine[:-1] + "G"):
        with pytest.raises(ValidationError):
            look(image=wrong, entries=[fine])
