"""Draw docs/page.png, the live page as one sees it: `uv run docs/page_picture.py`, with Debian's chromium."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pyro
import torch
from playwright.sync_api import sync_playwright

from vma_pyro import load_pretrained
from vma_pyro.data import glyphs
from vma_pyro.demo.app import create_app
from vma_pyro.demo.banks import make_banks
from vma_pyro.demo.connection import make_server
from vma_pyro.demo.engine import Engine

NUMBER = 13  # the character that is drawn, in another rendering than its tile's

pyro.settings.set(module_local_params=True)
characters = glyphs.load(classes=60, seed=1)
app = create_app(
    Engine(*load_pretrained("omniglot-causal")), make_banks(characters), about="pretrained on Omniglot"
)
listening = socket.create_server(("127.0.0.1", 0))
server = make_server(app, log_level="error")
threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
while not server.started:
    time.sleep(0.05)

with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 700})
    page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
    page.locator(".tile").nth(19).wait_for()
    page.get_by_label("Images of").select_option(index=1)
    page.get_by_role("button", name="Add it").click()
    page.locator(".tile").nth(39).wait_for()
    box = page.locator("#pad").bounding_box()
    for row, column in torch.from_numpy(characters.images[NUMBER, 3]).nonzero().tolist():
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 28, box["y"] + (row + 0.5) * box["height"] / 28)
        page.mouse.down()
        page.mouse.up()
    page.get_by_role("button", name="Generate 16").click()
    page.locator("#samples canvas").nth(15).wait_for()
    page.get_by_label("z", exact=True).fill("7")
    page.locator("#walk canvas").wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    path = Path(__file__).with_name("page.png")
    page.screenshot(path=path, full_page=True)
    browser.close()
print(path.name)
