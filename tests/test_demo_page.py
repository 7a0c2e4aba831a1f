"""The live page in a real browser: by mouse, by keyboard, on a phone, and without the network.

Needs Debian's `chromium`. Where it is missing these tests are skipped, in CI they fail.
"""

import os
import shutil

import live
import pyro
import pytest
import torch

from vma_pyro import load_pretrained
from vma_pyro.data import glyphs
from vma_pyro.demo.app import create_app
from vma_pyro.demo.banks import make_banks
from vma_pyro.demo.engine import Engine

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium"),
    pytest.mark.filterwarnings("default", "ignore:Session-scoped fixtures"),  # of the browser's driver and plugin
]
CLASSES = 20
CHARACTERS = glyphs.load(classes=CLASSES, seed=1)


@pytest.fixture(scope="session")
def browser_type_launch_args():
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    return {"executable_path": CHROMIUM or "chromium", "args": ["--no-sandbox", "--disable-gpu", *quiet]}


@pytest.fixture(scope="module")
def address():
    with pyro.settings.context(module_local_params=True):
        app = create_app(Engine(*load_pretrained("omniglot")), make_banks(CHARACTERS), about="a model")
    with live.serve(app) as address:
        yield address


@pytest.fixture
def opened(page, address):
    """The page, which must write nothing to the console and ask nothing of other machines."""
    written, asked = [], []
    page.on("console", lambda message: written.append(message.text))
    page.on("pageerror", lambda error: written.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    until(page, f"document.querySelectorAll('.tile').length == {CLASSES}")
    yield page
    assert written == []
    assert asked
    assert all(url.startswith((f"{address}/", "data:")) for url in asked)


def until(page, condition):
    """Wait for it; the page's own policy forbids the driver's way, which makes code from text."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(condition)


def draw(page, image):
    """Every pixel of ink, by mouse; the nib is a pixel wide."""
    pad = page.locator("#pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    for row, column in torch.from_numpy(image).nonzero().tolist():
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 28, box["y"] + (row + 0.5) * box["height"] / 28)
        page.mouse.down()
        page.mouse.up()
    settle(page)


def settle(page):
    """Until the last question about the drawing is answered."""
    until(page, "!asking && !stale")


def shades(page):
    return page.eval_on_selector_all(".tile", "all => all.map(tile => Number(tile.style.getPropertyValue('--q')))")


def percentages(page):
    return [text.strip() for text in page.locator("#top .number").all_inner_texts()]


@pytest.mark.parametrize("number", [3, 7, 16])
def test_the_right_character_is_on_top(opened, number):
    draw(opened, CHARACTERS.images[number, 3])  # another rendering than the tile's
    found = shades(opened)
    assert max(found) > 0.7
    assert found.index(max(found)) == number
    assert opened.locator("#top li").first.inner_text().startswith(CHARACTERS.names[number])
    assert len(percentages(opened)) == 5
    assert "nats" in opened.locator("#kl").inner_text()
    assert f"{torch.tensor(CLASSES).log():.2f} nats" in opened.locator("#most").inner_text()
    assert (
        float(opened.locator("#meter").get_attribute("value") or opened.locator("#meter").evaluate("m => m.value"))
        > 0.5
    )


def test_a_drawing_is_added_found_and_removed(opened):
    draw(opened, CHARACTERS.images[2, 5])
    opened.get_by_role("button", name="Add to memory").click()
    settle(opened)
    tiles = opened.locator(".tile")
    assert tiles.count() == CLASSES + 1
    found = shades(opened)
    assert found.index(max(found)) in (2, CLASSES)  # the drawing itself, or its character
    assert found[CLASSES] > 0.3
    tiles.nth(CLASSES).click()
    assert tiles.nth(CLASSES).get_attribute("aria-pressed") == "true"
    opened.get_by_role("button", name="Remove tile").click()
    assert tiles.count() == CLASSES
    opened.get_by_role("button", name="Empty").click()
    settle(opened)
    assert tiles.count() == 0
    assert percentages(opened) == []


def samples(page):
    return page.eval_on_selector_all("#samples canvas", "all => all.map(canvas => canvas.toDataURL())")


@pytest.mark.parametrize("source", ["the drawing alone", "the chosen tile", "the whole memory"])
def test_sixteen_samples_that_repeat_with_the_seed(opened, source):
    draw(opened, CHARACTERS.images[4, 1])
    opened.locator(".tile").nth(3).click()
    opened.get_by_label(source).check()
    opened.get_by_label("Seed").fill("5")

    def pressed(name):
        with opened.expect_response("**/api/generate"):
            opened.get_by_role("button", name=name).click()
        until(opened, "document.querySelectorAll('#samples canvas').length == 32")
        opened.wait_for_timeout(50)
        return samples(opened)

    first = pressed("Generate 16")
    assert len(set(first)) > 8
    assert pressed("Generate 16") == first
    other = pressed("Next seed")
    assert other != first
    assert opened.get_by_label("Seed").input_value() == "6"


def test_the_slider_walks_between_two_z(opened):
    draw(opened, CHARACTERS.images[4, 1])
    seen = set()
    for step in (0, 7, 15):
        opened.get_by_label("z", exact=True).fill(str(step))
        opened.wait_for_selector("#walk canvas")
        opened.wait_for_timeout(300)
        seen.add(opened.locator("#walk canvas").evaluate("canvas => canvas.toDataURL()"))
    assert len(seen) == 3


def test_a_fast_slider_asks_once(opened):
    draw(opened, CHARACTERS.images[4, 1])
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.evaluate("for (let i = 0; i < 30; i++) $('slider').dispatchEvent(new Event('input'))")
    opened.wait_for_selector("#walk canvas")
    assert len([url for url in asked if url.endswith("interpolate")]) == 1
    assert opened.locator("#walked").inner_text() == "0 of 15, from the drawing, seed 0"
    with opened.expect_response("**/api/interpolate"):  # another entry, another walk
        opened.locator(".tile").nth(3).click()
    until(opened, "$('walked').textContent == '0 of 15, from the chosen tile, seed 0'")
    with opened.expect_response("**/api/interpolate"):
        opened.get_by_label("Seed").fill("8")
    until(opened, "$('walked').textContent == '0 of 15, from the chosen tile, seed 8'")
    opened.get_by_role("button", name="Empty").click()
    until(opened, "$('walk').children.length == 1 && $('walked').textContent.includes('the drawing')")


def test_a_full_memory_says_so_until_the_next_action(opened):
    for _ in range(200 // CLASSES - 1):
        opened.get_by_role("button", name="Add it").click()
        opened.wait_for_timeout(100)
    assert opened.locator(".tile").count() == 200
    draw(opened, CHARACTERS.images[4, 1])
    opened.get_by_role("button", name="Add to memory").click()
    opened.wait_for_timeout(300)
    settle(opened)  # the look that follows takes nothing back
    assert opened.locator("#status").inner_text() == "memory: expected at most 200 entries, left 1 out"
    assert opened.locator(".tile").count() == 200
    opened.get_by_role("button", name="Generate 16").click()
    opened.wait_for_selector("#samples canvas")
    assert opened.locator("#status").inner_text() == ""


def test_an_empty_page_and_a_wrong_seed_are_explained(opened):
    opened.get_by_role("button", name="Generate 16").click()
    assert opened.locator("#status").inner_text() == "drawing: expected some ink, got an empty page"
    opened.get_by_label("the whole memory").check()
    opened.get_by_label("Seed").fill("-1")
    opened.get_by_role("button", name="Generate 16").click()
    assert opened.locator("#status").inner_text() == "seed: expected 0 to 2147483647, got -1"


def test_by_keyboard_alone(opened):
    keys = opened.keyboard
    for _ in range(10):  # the pad is among the first things that Tab reaches
        keys.press("Tab")
        if opened.evaluate("document.activeElement.id") == "pad":
            break
    assert opened.evaluate("document.activeElement.id") == "pad"
    keys.press("Space")
    for key in ["ArrowDown"] * 6 + ["ArrowRight"] * 6:
        keys.press(key)
    keys.press("Space")
    settle(opened)
    assert opened.evaluate("state.ink.reduce((a, b) => a + b)") >= 12
    assert max(shades(opened)) > 0
    while opened.evaluate("document.activeElement.id") != "add":
        keys.press("Tab")
    keys.press("Enter")
    assert opened.locator(".tile").count() == CLASSES + 1
    while not opened.evaluate("document.activeElement.classList.contains('tile')"):
        keys.press("Tab")
    keys.press("Delete")
    assert opened.locator(".tile").count() == CLASSES
    while opened.evaluate("document.activeElement.id") != "generate":
        keys.press("Tab")
    keys.press("Enter")
    opened.wait_for_selector("#samples canvas")
    opened.evaluate("document.getElementById('pad').focus()")
    keys.press("Backspace")
    assert opened.evaluate("state.ink.some(Boolean)") is False


def pointer(page, kind, number, column, row):
    """An event that a script sends: no device stands behind it, so it cannot be captured."""
    page.evaluate(
        """([kind, pointerId, column, row]) => {
            const box = $("pad").getBoundingClientRect();
            const at = { clientX: box.left + column * box.width / 28, clientY: box.top + row * box.height / 28 };
            $("pad").dispatchEvent(new PointerEvent(kind, { pointerId, ...at, bubbles: true, button: 0 }));
        }""",
        [kind, number, column, row],
    )


def ink(page):
    return page.evaluate("state.ink.reduce((a, b) => a + b)")


def test_a_second_finger_draws_nothing_and_the_first_goes_on(opened):
    pointer(opened, "pointerdown", 1, 5, 5)
    pointer(opened, "pointerdown", 2, 24, 24)
    pointer(opened, "pointermove", 1, 7, 5)
    assert 3 <= ink(opened) <= 9
    pointer(opened, "pointerup", 2, 24, 24)
    before = ink(opened)
    pointer(opened, "pointermove", 1, 12, 5)
    assert ink(opened) > before
    pointer(opened, "pointerup", 1, 12, 5)
    before = ink(opened)
    pointer(opened, "pointermove", 1, 20, 20)
    assert ink(opened) == before
    opened.locator("#pad").click(button="right", position={"x": 200, "y": 200})
    assert ink(opened) == before


def test_held_keys_do_not_repeat_what_they_do(opened):
    opened.locator("#pad").focus()
    for _ in range(4):
        opened.keyboard.down("Space")  # held: the last three are repetitions
    opened.keyboard.up("Space")
    assert opened.evaluate("state.down")
    opened.keyboard.press("ArrowRight")
    for _ in range(60):
        opened.keyboard.down("Backspace")
    opened.keyboard.up("Backspace")
    assert ink(opened) == 0
    opened.get_by_role("button", name="Undo").click()
    assert ink(opened) > 1


def test_tab_passes_the_memory_in_one_step_and_arrows_move_in_it(opened):
    focused = "[...$('tiles').children].indexOf(document.activeElement)"
    opened.get_by_role("button", name="Empty").focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate(focused) == 0
    for key, reached in {
        "ArrowRight": 1,
        "End": CLASSES - 1,
        "ArrowRight ": CLASSES - 1,
        "ArrowLeft": CLASSES - 2,
    }.items():
        opened.keyboard.press(key.strip())
        assert opened.evaluate(focused) == reached
    opened.keyboard.press("Enter")
    assert opened.evaluate("state.chosen") == CLASSES - 2
    opened.keyboard.press("Home")
    opened.keyboard.press("Backspace")
    assert opened.locator(".tile").count() == CLASSES - 1
    assert opened.evaluate("state.chosen") == CLASSES - 3  # the same tile, one place earlier
    assert opened.evaluate(focused) == 0
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.name") == "source"


def test_adding_a_drawing_changes_no_choice(opened):
    opened.locator(".tile").nth(3).click()
    opened.get_by_label("the whole memory").check()
    draw(opened, CHARACTERS.images[4, 1])
    opened.get_by_role("button", name="Add to memory").click()
    assert opened.get_by_label("the whole memory").is_checked()
    assert opened.evaluate("state.chosen") == 3


def test_what_was_asked_last_is_shown(opened):
    draw(opened, CHARACTERS.images[4, 1])
    held = []
    opened.route("**/api/generate", lambda route: held.append(route) if not held else route.continue_())
    opened.get_by_role("button", name="Generate 16").click()
    until(opened, "true")
    opened.get_by_role("button", name="Next seed").click()
    until(opened, "$('made').textContent == '16 from the drawing, seed 1'")
    shown = samples(opened)
    with opened.expect_response("**/api/generate"):
        held[0].continue_()
    opened.wait_for_timeout(100)
    assert samples(opened) == shown
    opened.get_by_label("Seed").fill("")
    opened.get_by_role("button", name="Generate 16").click()
    assert opened.locator("#status").inner_text() == "seed: expected 0 to 2147483647, got no number"
    opened.get_by_label("Seed").fill("2147483647")
    opened.get_by_role("button", name="Next seed").click()
    until(opened, "$('made').textContent == '16 from the drawing, seed 0'")
    assert opened.locator("#status").inner_text() == ""


def test_a_refused_look_is_asked_again(page, address):
    page.goto(address)
    until(page, f"document.querySelectorAll('.tile').length == {CLASSES}")
    refusals = []

    def refuse_once(route):
        if refusals:
            return route.continue_()
        refusals.append(route)
        return route.fulfill(status=429, json={"error": "server: busy"}, headers={"retry-after": "1"})

    page.route("**/api/look", refuse_once)
    page.locator("#pad").click()
    until(page, "$('status').textContent == 'server: busy'")
    assert percentages(page) == []
    until(page, "document.querySelectorAll('#top li').length == 5")
    assert page.locator("#status").inner_text() == ""
    page.route("**/api/look", lambda route: route.abort())
    page.get_by_role("button", name="Load").click()  # the same tiles again, but no answer about them
    until(page, "$('status').textContent == 'server: expected an answer, got none; is it still running?'")
    assert percentages(page) == []


def test_a_drawing_is_kept_when_the_first_bank_comes_late(page, address):
    held = []
    page.route("**/api/banks/*", lambda route: held.append(route))
    page.goto(address)
    page.locator("#pad").click()
    page.get_by_role("button", name="Add to memory").click()
    assert page.locator(".tile").count() == 1
    held[0].continue_()
    until(page, f"document.querySelectorAll('.tile').length == {CLASSES + 1}")
    assert page.evaluate("state.tiles[0].label") == "your drawing"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_shaded_tile_can_be_read(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    for shade in (0, 0.25, 0.5, 0.75, 1):
        text, ground = opened.evaluate(
            """shade => {
                const tile = document.querySelector(".tile");
                const dot = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
                tile.style.setProperty("--q", shade);
                const drawn = colour => {
                    dot.fillStyle = colour;
                    dot.fillRect(0, 0, 1, 1);
                    return [...dot.getImageData(0, 0, 1, 1).data].slice(0, 3);
                };
                return [getComputedStyle(tile.lastChild).color, getComputedStyle(tile).backgroundColor].map(drawn);
            }""",
            shade,
        )
        darker, lighter = sorted(map(luminance, (text, ground)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.2, criterion 1.4.3


def luminance(colour):
    """Relative luminance of an sRGB colour from 0 to 255 (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": 360, "height": 740})
    draw(opened, CHARACTERS.images[0, 2])
    opened.get_by_role("button", name="Generate 16").click()
    opened.wait_for_selector("#samples canvas")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    widths = opened.eval_on_selector_all(
        "button:not(.tile)", "all => all.map(b => b.getBoundingClientRect().height)"
    )
    assert min(widths) >= 36  # a finger's
    colours = opened.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    text, paper = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (text < paper) == (scheme == "light")
    assert abs(text - paper) > 400


def test_touch_draws(browser, address):
    context = browser.new_context(has_touch=True, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".tile")
    page.locator("#pad").tap()
    settle(page)
    assert page.evaluate("state.ink.reduce((a, b) => a + b)") > 0
    context.close()


def test_names_are_shown_as_text(address, opened):
    opened.evaluate("add([{ image: '1'.repeat(784), label: '<img src=x onerror=console.log(1)>' }])")
    opened.locator("#pad").click()
    settle(opened)
    assert opened.locator("#top li").count() == 5
    assert opened.locator("img").count() == 0
