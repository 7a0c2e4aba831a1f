"""The live page's server against its own OpenAPI schema: requests that fit it, and requests that do not.

VMA_REQUESTS sets how many; CI makes 5,000.
"""

import os

import live
import pyro
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

REQUESTS = int(os.environ.get("VMA_REQUESTS", "400"))

# A pattern of 784 digits takes Hypothesis a tenth of a second to follow.
bits = st.binary(min_size=98, max_size=98).map(lambda data: "".join(f"{byte:08b}" for byte in data))
schemathesis.openapi.format("pixels", bits)

VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = {"look": "POST", "generate": "POST", "interpolate": "POST", "banks/{name}": "GET"}
# Every name of a bank is a string: none is invalid.
TRIED = [
    (path, mode) for path in OPERATIONS for mode in (VALID, INVALID) if (path, mode) != ("banks/{name}", INVALID)
]


@pytest.fixture(scope="module")
def schema():
    with pyro.settings.context(module_local_params=True):
        app = live.application()
    with live.serve(app) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.filterwarnings("default")  # of the generator's own libraries
@pytest.mark.parametrize(("path", "mode"), TRIED, ids=lambda value: getattr(value, "value", value))
def test_no_request_breaks_it(schema, path, mode):
    operation = schema[f"/api/{path}"][OPERATIONS[path]]
    wanted = -(-REQUESTS // len(TRIED))
    made = 0

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=wanted,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        nonlocal made
        answer = case.call()
        made += 1
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert list(answer.json()) == ["error"]
        case.validate_response(answer)

    check()
    assert made >= wanted


def test_everything_that_is_offered_is_tried(schema):
    offered = {operation.ok().path for operation in schema.get_all_operations()}
    assert offered == {"/", "/api/about", *(f"/api/{path}" for path in OPERATIONS)}
