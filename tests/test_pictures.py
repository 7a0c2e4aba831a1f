"""Single picture files, read as they are meant to be seen: turned, of more bits, transparent, damaged in a tag."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vma_pyro.data.pictures import ORIENTATION, read_picture

UPRIGHT = {  # by the orientation of exif, what is seen of an array of pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*itertools.product(("L", "RGB", "RGBA"), ("tif", "png", "webp")), ("I;16", "tif"), ("I;16", "png")],
)
def test_every_orientation_of_every_kind(tmp_path, orientation, suffix, kind):
    """Uncompressed TIFF among them, which Pillow maps into memory when it opens a file by name."""
    values = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    picture = Image.fromarray(values).convert(kind) if kind != "I;16" else Image.fromarray(values * np.uint16(257))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    picture.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert (read_picture(path, "grey")[..., 0] == UPRIGHT[orientation](values)).all()


def test_a_tag_of_exif_that_is_damaged_does_not_hide_a_picture(tmp_path):
    """The resolution's unit as a text, which cannot be written again."""
    tiff = b"II*\0" + struct.pack("<IH", 8, 2)
    tiff += (
        struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHI", 0x128, 2, 2) + b"2\0\0\0" + bytes(4)
    )
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tiff)
    assert read_picture(tmp_path / "a.jpg", "grey").shape == (8, 4, 1)


def write_tiff(path, values, *, bits, photometric):
    """Grey values, uncompressed, as bytes of a TIFF."""
    height, width = values.shape
    data = values.astype("<u2").tobytes() if bits == 16 else packed_12(values)
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 200,
        277: 1,
        278: height,
        279: len(data),
    }
    body = b"II*\0" + struct.pack("<IH", 8, len(tags))
    body += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4)
    path.write_bytes(body.ljust(200, b"\0") + data)


def packed_12(values):
    """Rows of 12-bit numbers, two in three bytes, high bits first."""
    pairs = values.reshape(len(values), -1, 2).astype(np.uint32)
    joined = (pairs[..., 0] << 12) | pairs[..., 1]
    return np.stack([joined >> 16, joined >> 8 & 255, joined & 255], -1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_grey_of_more_bits_is_as_light_as_it_looks(tmp_path, bits, photometric):
    """From black to white, whichever of the two is zero in a TIFF."""
    values = np.random.default_rng(1).integers(0, 2**bits, (4, 6))
    write_tiff(tmp_path / "a.tif", values, bits=bits, photometric=photometric)
    light = values / (2**bits - 1)
    want = (255 * (light if photometric else 1 - light)).round()
    assert np.abs(read_picture(tmp_path / "a.tif", "grey")[..., 0] - want).max() <= 1


def test_a_transparent_colour_of_16_bits(tmp_path):
    """On white in grey; of three colours, of which 8 bits are kept, it cannot be told, and is refused."""
    values = np.full((2, 3), 30000, np.uint16)
    values[0] = 1000
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    assert read_picture(tmp_path / "a.png", "grey")[..., 0].tolist() == [[255] * 3, [117] * 3]
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">HHH", 1, 2, 3))]
    chunks += [(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 1, 2, 3))), (b"IEND", b"")]
    written = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    with pytest.raises(
        ValueError, match="b.png: expected 8 bits per colour where one colour is transparent, got 16"
    ):
        read_picture(tmp_path / "b.png", "colour")
