"""The live page's server in a thread, on a free port."""

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from vma_pyro import Guide, MLPNetworks, Model
from vma_pyro.data import glyphs
from vma_pyro.demo.app import create_app
from vma_pyro.demo.banks import make_banks
from vma_pyro.demo.connection import make_server
from vma_pyro.demo.engine import Engine


def small_pair():
    """Model and guide that answer in milliseconds."""
    torch.manual_seed(0)
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    return Model(networks), Guide(networks)


def application(pair=None):
    return create_app(
        Engine(*(pair or small_pair())), make_banks(glyphs.load(classes=40, seed=1)), about="a model"
    )


@contextlib.contextmanager
def serve(app):
    """The address of the running server."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, log_level="critical")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def run_alone(coroutine):
    """`asyncio.run` in a thread of its own: the browser's driver leaves its loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
