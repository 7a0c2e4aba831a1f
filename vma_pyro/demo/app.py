"""The server: one page, and four questions that it may ask. It keeps nothing between two requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from vma_pyro.demo.engine import Engine
from vma_pyro.demo.limits import Busy, Limits, Queue
from vma_pyro.demo.messages import About, Bank, Found, Generate, Images, Interpolate, Look, Problem

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
    """The application.

    Args:
        engine: what does the work.
        banks: images that a visitor may fill the memory with; the first is shown at the start.
        about: the model, in a line.
    """
    app = FastAPI(
        title="Variational Memory Addressing, live", docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(Limits)
    api = APIRouter(prefix="/api", responses=PROBLEMS)
    queue = Queue()
    by_name = {bank.name: bank for bank in banks}
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, responses=PAGE_PROBLEMS)
    async def show() -> str:
        """The page, in one piece."""
        return page

    @api.get("/about")
    async def about_model() -> About:
        """The model, and the names of the banks."""
        return About(model=about, banks=list(by_name))

    @api.get("/banks/{name}", responses={404: {"model": Problem, "description": "No such bank"}})
    async def bank(name: str) -> Bank:
        """The images of a bank."""
        if name not in by_name:
            raise HTTPException(404, f"name: expected one of {', '.join(by_name)}, got {name[:60]!a}")
        return by_name[name]

    @api.post("/look")
    async def look(request: Look) -> Found:
        """Where in the memory is this drawing?"""
        return await queue.do(engine.look, request)

    @api.post("/generate")
    async def generate(request: Generate) -> Images:
        """More images like those in the memory."""
        return await queue.do(engine.generate, request)

    @api.post("/interpolate")
    async def interpolate(request: Interpolate) -> Images:
        """One character on its way from one z to another."""
        return await queue.do(engine.interpolate, request)

    app.include_router(api)
    app.add_exception_handler(RequestValidationError, _wrong_field)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Busy, _busy)
    return app


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
