"""What the page and the server say to each other. Every field is checked; an image is 784 digits 0 and 1."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MOST_ENTRIES = 200
MOST_IMAGES = 16


def _number(value: Any) -> Any:
    """Only a number is a number: in JSON neither "1" nor true is one, whatever Python says."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("Input should be a number")
    return value


NUMBER = BeforeValidator(_number)
Image = Annotated[
    str,
    StringConstraints(pattern=r"^[01]{784}$"),
    Field(description="28 x 28 pixels, row by row: 1 is ink, 0 is paper.", json_schema_extra={"format": "pixels"}),
]
Entries = Annotated[list[Image], Field(min_length=1, max_length=MOST_ENTRIES, description="The memory.")]
Seed = Annotated[int, Field(ge=0, lt=2**31, description="Of the noise."), NUMBER]
GreyImage = Annotated[
    str, Field(description="Expected pixels: 784 pairs of hexadecimal digits, from 00 (paper) to ff (ink).")
]


class Message(BaseModel):
    """Refuses any field but those named."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Look(Message):
    """Asks where in a memory a drawing is."""

    image: Image
    entries: Entries


class Found(Message):
    """Holds the posterior q(a | x, M) over the entries, and what the lookup told."""

    probabilities: list[float]
    kl_nats: float
    kl_bits: float
    most_nats: Annotated[float, Field(description="log |M|, the most that it can be under a uniform p(a | M).")]
    most_bits: float


class Generate(Message):
    """Asks to sample an address, then z, and show E[x | z, m_a]."""

    entries: Entries
    seed: Seed = 0
    count: Annotated[int, Field(ge=1, le=MOST_IMAGES), NUMBER] = MOST_IMAGES


class Interpolate(Message):
    """Asks to walk from one z to another under one entry."""

    entry: Image
    seed: Seed = 0
    steps: Annotated[int, Field(ge=2, le=MOST_IMAGES), NUMBER] = MOST_IMAGES


class Images(Message):
    """Holds generated images."""

    images: list[GreyImage]
    addresses: Annotated[list[int], Field(description="The entry that each image varies.")]


class Tile(Message):
    """Holds an image of a bank, and its character."""

    image: Image
    label: str


class Bank(Message):
    """Holds images to fill the memory with."""

    name: str
    tiles: list[Tile]


class About(Message):
    """Says what is behind the page."""

    model: str
    banks: list[str]
    most_entries: int = MOST_ENTRIES


class Problem(BaseModel):
    """Says what is wrong, in the one shape of all errors."""

    error: str
