"""What the page and the server say to each other. Every field is checked, images by the model's format."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from vma_pyro.demo.format import Format

MOST_ENTRIES = 200
MOST_IMAGES = 16


def _number(value: Any) -> Any:
    """Only a number is a number: in JSON neither "1" nor true is one, whatever Python says."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("Input should be a number")
    return value


NUMBER = BeforeValidator(_number)
IN_MEMORY = Field(min_length=1, max_length=MOST_ENTRIES, description="The memory.")
Seed = Annotated[int, Field(ge=0, lt=2**31, description="Of the noise."), NUMBER]
Bytes = Annotated[str, Field(description="Pixels: pairs of hexadecimal digits, colour by colour.")]


class Message(BaseModel):
    """Refuses any field but those named."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Look(Message):
    """Asks where in a memory a drawing is."""

    image: str
    entries: Annotated[list[str], IN_MEMORY]


class Found(Message):
    """Holds the posterior q(a | x, M) over the entries, and what the lookup told."""

    probabilities: list[float]
    kl_nats: float
    kl_bits: float
    most_nats: Annotated[float, Field(description="log |M|, the most that it can be under a uniform p(a | M).")]
    most_bits: float


class Generate(Message):
    """Asks to sample an address, then z and x, and show E[x | z, m_a]."""

    entries: Annotated[list[str], IN_MEMORY]
    seed: Seed = 0
    count: Annotated[int, Field(ge=1, le=MOST_IMAGES), NUMBER] = MOST_IMAGES


class Interpolate(Message):
    """Asks to walk from one z to another under one entry."""

    entry: str
    seed: Seed = 0
    steps: Annotated[int, Field(ge=2, le=MOST_IMAGES), NUMBER] = MOST_IMAGES


class Images(Message):
    """Holds generated images."""

    images: Annotated[
        list[Bytes], Field(description="E[x | z, m_a]; draws of x where the likelihood has no mean.")
    ]
    drawn: Annotated[list[Bytes], Field(description="Draws of x.")]
    addresses: Annotated[list[int], Field(description="The entry that each image varies.")]


class Tile(Message):
    """Holds an image of a bank, and its character."""

    image: str
    label: str


class Bank(Message):
    """Holds images to fill the memory with."""

    name: str
    tiles: list[Tile]


class About(Message):
    """Says what is behind the page."""

    model: str
    banks: list[str]
    shape: Annotated[tuple[int, int, int], Field(description="C, height and width of an image.")]
    bits: Annotated[int, Field(description="1: ink on paper; 8: grey or colour.")]
    most_entries: int = MOST_ENTRIES


class Problem(BaseModel):
    """Says what is wrong, in the one shape of all errors."""

    error: str


class Questions(NamedTuple):
    """The messages that hold images, each as the format says."""

    look: type[Look]
    generate: type[Generate]
    interpolate: type[Interpolate]


def questions(format_: Format) -> Questions:
    """Make the messages that hold images of a format."""
    about: Any = Field(description=format_.description, json_schema_extra={"format": "pixels"})
    image: Any = Annotated[str, *format_.constraints(), about]
    entries: Any = Annotated[list[image], IN_MEMORY]

    def of(base: type[Message], **fields: Any) -> Any:
        required: dict[str, Any] = {name: (kind, ...) for name, kind in fields.items()}
        return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **required)

    return Questions(
        of(Look, image=image, entries=entries), of(Generate, entries=entries), of(Interpolate, entry=image)
    )
