"""The server: one page, and four questions that it may ask. It keeps nothing between two requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from vma_pyro.demo.engine import Engine
from vma_pyro.demo.format import Format
from vma_pyro.demo.limits import Busy, Limits, Queue
from vma_pyro.demo.messages import (
    MOST_ENTRIES,
    About,
    Bank,
    Found,
    Generate,
    Images,
    Interpolate,
    Look,
    Problem,
    questions,
)

PAGE = Path(__file__).with_name("page.html")

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "No JSON, no HTTP, or another host"},
    408: {"model": Problem, "description": "The body did not arrive in time"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "A field is not what it should be"},
    429: {"model": Problem, "description": "Too much is waiting; try again in a second"},
    500: {"model": Problem, "description": "It failed, and its log says how"},
}
# The page is HTML, what is said in its place is not.
JSON = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PAGE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": problem["description"], "content": JSON} for status, problem in PROBLEMS.items()
}


def create_app(engine: Engine, banks: Sequence[Bank], *, about: str) -> FastAPI:
    """Make the application.

    Args:
        engine: what does the work.
        banks: images that a visitor may fill the memory with; the first is shown at the start.
        about: the model, in a line.
    """
    app = FastAPI(
        title="Variational Memory Addressing, live", docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for error, answer in ((RequestValidationError, _wrong_field), (HTTPException, _refused), (Busy, _busy)):
        app.add_exception_handler(error, answer)
    app.add_middleware(Limits, most_bytes=most_bytes(engine.format))
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, responses=PAGE_PROBLEMS)
    async def show() -> str:
        """Show the page, in one piece."""
        return page

    app.include_router(_questions(engine, {bank.name: bank for bank in banks}, about))
    return app


def _questions(engine: Engine, banks: dict[str, Bank], about: str) -> APIRouter:
    """Route the page's questions; those to the model wait for each other."""
    api, queue = APIRouter(prefix="/api", responses=PROBLEMS), Queue()
    of_format = questions(engine.format)

    @api.get("/about")
    async def about_model() -> About:
        """Name the model and the banks."""
        return About(model=about, banks=list(banks), shape=engine.format.shape, bits=engine.format.bits)

    @api.get("/banks/{name}", responses={404: {"model": Problem, "description": "No such bank"}})
    async def bank(name: str) -> Bank:
        """Give the images of a bank."""
        if name not in banks:
            raise HTTPException(404, f"name: expected one of {', '.join(banks)}, got {name[:60]!a}")
        return banks[name]

    async def look(request: Look) -> Found:
        """Find where in the memory this drawing is."""
        return await queue.do(engine.look, request)

    async def generate(request: Generate) -> Images:
        """Generate more images like those in the memory."""
        return await queue.do(engine.generate, request)

    async def interpolate(request: Interpolate) -> Images:
        """Show one character on its way from one z to another."""
        return await queue.do(engine.interpolate, request)

    handler: Any
    for handler, message in zip((look, generate, interpolate), of_format, strict=True):
        handler.__annotations__["request"] = message  # whose images are as the model takes them
        api.post(f"/{handler.__name__}")(handler)
    return api


def most_bytes(format_: Format) -> int:
    """Bytes of the largest question: a full memory and a drawing."""
    one = (1 if format_.bits == 1 else 2) * math.prod(format_.shape) + 3
    return max(256 * 1024, (MOST_ENTRIES + 1) * one + 1024)


async def _wrong_field(request: Request, error: Any) -> JSONResponse:
    """Name the first field that is wrong, in one line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return no_json(first["ctx"]["error"])
    where = ".".join(ascii(part)[:40].strip("'") for part in first["loc"] if part != "body") or "body"
    got = ascii(first.get("input"))
    return problem(422, f"{where}: {first['msg']}, got {got if len(got) <= 60 else got[:57] + '...'}")


async def _refused(request: Request, error: Any) -> JSONResponse:
    if error.status_code == 400:  # only a body that cannot be read: nested too deep, or not text
        return no_json("what no reader takes")
    return problem(error.status_code, str(error.detail), headers=error.headers)


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return problem(429, "server: expected fewer requests at a time; try again", headers={"retry-after": "1"})


def no_json(why: str) -> JSONResponse:
    """Refuse a body that is not JSON."""
    return problem(400, f"body: expected JSON, got a body with this error: {why}")


def problem(status: int, error: str, headers: Any = None) -> JSONResponse:
    """Answer in the one shape of errors."""
    return JSONResponse({"error": error}, status, headers)
