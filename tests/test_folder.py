"""Folders of pictures: what is read and how, what is refused, and what is kept."""

import os

import numpy as np
import pytest
from drawings import folder_of_shapes
from PIL import Image

from vma_pyro.data import ImageClasses, divide, folder, load_split
from vma_pyro.data.pictures import fitted


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def grey(value, size=(8, 8)):
    return np.full(size, value, np.uint8)


def test_classes_of_any_number_in_order(tmp_path):
    root = folder_of_shapes(tmp_path / "own", [3, 5, 2])
    (root / "class00" / "notes.txt").write_text("no picture")
    (root / "class00" / "._00.png").write_bytes(b"a Mac's")
    (root / ".hidden").mkdir()
    save(root / ".hidden" / "a.png", grey(0))
    found = folder.load(root, size=(10, 12), mode="colour")
    assert isinstance(found, ImageClasses)
    assert found.pixels.shape == (10, 3, 10, 12)
    assert found.pixels.dtype == np.uint8
    assert found.counts.tolist() == [3, 5, 2]
    assert found.offsets.tolist() == [0, 3, 8]
    assert found.names == found.groups == ("class00", "class01", "class02")
    assert (found.bits, found.examples, found.image_shape) == (8, 5, (3, 10, 12))
    with Image.open(root / "class01" / "04.png") as picture:
        assert (found.pixels[7] == fitted(np.asarray(picture), (10, 12)).transpose(2, 0, 1)).all()


def test_groups(tmp_path):
    for group, name in (("b", "x"), ("a", "x"), ("a", "y")):
        for i in range(2):
            save(tmp_path / "own" / group / name / f"{i}.png", grey(10 * i))
    found = folder.load(tmp_path / "own", mode="grey")
    assert list(zip(found.groups, found.names, strict=True)) == [("a", "x"), ("a", "y"), ("b", "x")]
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 10] * 3


def test_pictures_without_classes_are_one_each(tmp_path):
    for i in range(3):
        save(tmp_path / "own" / f"{i}.png", grey(i))
    with pytest.warns(
        UserWarning, match=r"3 of 3 classes have a single image \(0.png, 1.png, 2.png\): it can be in"
    ):
        found = folder.load(tmp_path / "own", mode="grey")
    assert found.counts.tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*single image")
def test_pictures_are_seen_as_they_are_meant(tmp_path):
    """Turned by exif, transparent on white, 16 bits and palettes as light as they look."""
    half = np.zeros((8, 12, 3), np.uint8)
    half[:, 6:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    own = tmp_path / "own" / "a"
    save(own / "0.png", half, exif=exif)
    found = folder.load(tmp_path / "own", size=8, mode="grey")
    assert found.pixels[0, 0, :4].max() == 0
    assert found.pixels[0, 0, 4:].min() == 255
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    save(own / "0.png", clear)
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(own / "1.png")
    Image.fromarray(grey(77)).convert("P").save(own / "2.png")
    Image.fromarray(np.full((8, 8, 4), 255, np.uint8), "CMYK").save(own / "3.jpg")
    found = folder.load(tmp_path / "own", size=8, mode="grey")
    assert found.pixels[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4
    assert [int(image[0, 0, 0]) for image in found.pixels[1:]] == [100, 77, 0]


def test_a_name_that_is_no_text_can_be_shown(tmp_path):
    folder_of_shapes(tmp_path / "own", [2, 2])
    os.rename(tmp_path / "own" / "class01", os.fsencode(tmp_path / "own") + b"/kl\xe4sse")
    found = folder.load(tmp_path / "own", size=8)
    assert found.names == ("class00", "kl\\xe4sse")
    assert folder.load(tmp_path / "own", size=8).names == found.names  # from the cache


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (np.array([1.0, 2.5]), "fractions"),
        (np.array(["a", ""]), "an empty name"),
        (np.array([1e300, 2.0]), "one too"),
    ],
)
def test_labels_that_name_nothing_are_refused(tmp_path, labels, what):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=f"expected labels that are whole numbers or names, got .*{what}"):
        folder.load(tmp_path / "a.npz", mode="grey")


def test_whole_labels_of_another_type(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.array([10.0, 9.0, 10.0, 9.0]))
    assert folder.load(tmp_path / "a.npz", mode="grey").names == ("9", "10")


@pytest.mark.parametrize(
    ("path", "got"), [(None, "a path, got NoneType"), ("a.png", "a folder of images or an npz file, got the file")]
)
def test_what_is_no_folder(tmp_path, monkeypatch, path, got):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    with pytest.raises(ValueError, match=f"^data_dir: expected {got}"):
        folder.load(path)


@pytest.mark.parametrize("paper", [255, 0])
def test_binary_pictures_have_ink_on_paper_whichever_is_darker(tmp_path, paper):
    for i in range(2):
        picture = grey(paper, (40, 40))
        picture[:, 20 + i] = 255 - paper  # a thin line, which must stay when the picture shrinks
        save(tmp_path / "own" / "a" / f"{i}.png", picture)
    found = folder.load(tmp_path / "own", size=20)
    assert found.bits == 1
    assert found.pixels.sum((1, 2, 3)).tolist() == [20, 20]
    assert found.pixels[0, 0, :, 10].min() == 1


def test_what_covers_the_size_is_cropped_in_the_middle():
    image = np.arange(12, dtype=np.uint8)[None, :, None] * np.ones((4, 1, 1), np.uint8)
    assert fitted(image, (4, 4))[0, :, 0].tolist() == [4, 5, 6, 7]
    assert fitted(image, (2, 6)).shape == (2, 6, 1)


def arrays(path, **changes):
    rng = np.random.default_rng(0)
    content = {"images": rng.integers(0, 256, (6, 9, 8)).astype(np.uint8), "labels": np.array([1, 0, 1, 0, 1, 2])}
    np.savez(path, **{name: value for name, value in (content | changes).items() if value is not None})
    return path


@pytest.mark.filterwarnings("ignore:.*single image")
class TestArrays:
    def test_bytes_truth_values_and_shares(self, tmp_path):
        path = arrays(tmp_path / "own.npz")
        found = folder.load(path, mode="grey")
        assert found.counts.tolist() == [2, 3, 1]
        assert found.names == ("0", "1", "2")
        images = np.load(path)["images"]
        assert (found.pixels[:, 0] == images[[1, 3, 0, 2, 4, 5]]).all()
        shares = folder.load(arrays(path, images=images / 255.0), mode="grey")
        assert (shares.pixels == found.pixels).all()
        ink = images < 60
        binary = folder.load(arrays(path, images=ink))
        assert (binary.pixels[:, 0] == ink[[1, 3, 0, 2, 4, 5]]).all()
        assert (folder.load(arrays(path, images=ink.astype(np.uint8))).pixels == binary.pixels).all()

    def test_colours_first_or_last_names_and_groups(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (4, 9, 8, 3)).astype(np.uint8)
        names, groups = np.array(["a", "a", "b", "b"]), np.array(["y", "y", "x", "x"])
        last = folder.load(arrays(tmp_path / "a.npz", images=images, labels=names, groups=groups), mode="colour")
        assert (last.names, last.groups) == (("b", "a"), ("x", "y"))
        assert (last.pixels == images[[2, 3, 0, 1]].transpose(0, 3, 1, 2)).all()
        first = arrays(tmp_path / "b.npz", images=images.transpose(0, 3, 1, 2), labels=names, groups=groups)
        assert (folder.load(first, mode="colour").pixels == last.pixels).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": np.zeros(5)}, r"expected images \[N, height, width\], .* got \[6, 9, 8\] and \[5\]"),
            ({"images": np.zeros((6, 9, 8, 2))}, r"expected images of 1 or 3 colours, got shape \[6, 9, 8, 2\]"),
            ({"images": np.full((6, 9, 8), 2.0)}, "real numbers from 0 to 1, got float64 from 2 to 2"),
            ({"images": np.full((6, 9, 8), np.nan)}, "real numbers from 0 to 1, got float64 from nan to nan"),
            ({"images": np.zeros((6, 9, 8), np.int32)}, "expected images of type uint8 or bool, or .*, got int32"),
            ({"labels": None}, r"expected arrays \['images', 'labels'\], got"),
            ({"labels": np.array([1.0, np.nan] * 3)}, "expected labels that are .*, got NaN, infinity or"),
            ({"labels": np.ones(6, complex)}, "expected labels that are whole numbers or names, got complex128"),
            ({"groups": np.zeros(3)}, r"expected groups \[6\], one per image, got \[3\]"),
            (
                {"images": np.array([None] * 6, object)},
                "expected a prepared npz file, got one that cannot be read",
            ),
        ],
    )
    def test_others_are_refused(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            folder.load(arrays(tmp_path / "own.npz", **changes))
        assert "\n" not in str(caught.value)


class TestRefusals:
    def test_a_file_that_cannot_be_read(self, tmp_path):
        root = folder_of_shapes(tmp_path / "own", [3, 3])
        whole = (root / "class00" / "01.png").read_bytes()
        (root / "class00" / "01.png").write_bytes(whole[: len(whole) // 2])
        message = r"class00/01.png: expected a picture, got a file that cannot be read \(.*\); --skip-unreadable"
        with pytest.raises(ValueError, match=message):
            folder.load(root, size=8)
        with pytest.warns(UserWarning, match=r"class00/01.png: left out, as not to be read"):
            found = folder.load(root, size=8, skip_unreadable=True)
        assert found.counts.tolist() == [2, 3]
        (root / "class00" / "01.png").write_bytes(whole)  # what was left out is not what is kept
        assert folder.load(root, size=8).counts.tolist() == [3, 3]

    def test_no_picture_can_be_read(self, tmp_path):
        (tmp_path / "own" / "a").mkdir(parents=True)
        (tmp_path / "own" / "a" / "0.png").write_bytes(b"text")
        with pytest.raises(ValueError, match="^data_dir: expected pictures that can be read in .*, got 1 others$"):
            folder.load(tmp_path / "own", skip_unreadable=True)

    def test_different_sizes(self, tmp_path):
        save(tmp_path / "own" / "a" / "0.png", grey(0))
        save(tmp_path / "own" / "b" / "0.png", grey(0, (9, 8)))
        with pytest.raises(
            ValueError, match=r"^size: expected one to bring all images to, .* 8 high and 8 wide, .* 9 and 8$"
        ):
            folder.load(tmp_path / "own")

    @pytest.mark.parametrize(
        ("places", "message"),
        [
            (["a/0.png", "1.png"], "expected all pictures at the same depth, got .*1.png and .*0.png"),
            (["a/b/c/0.png"], "expected .*own/class/picture or .*own/group/class/picture, got .*a/b/c/0.png"),
        ],
    )
    def test_other_arrangements(self, tmp_path, places, message):
        for place in places:
            save(tmp_path / "own" / place, grey(0))
        with pytest.raises(ValueError, match=f"^data_dir: {message}$"):
            folder.load(tmp_path / "own")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match="^data_dir: expected a folder of images or an npz file, found none"
        ):
            folder.load(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            FileNotFoundError, match=r"^data_dir: expected pictures \(png, jpg, .*\) in folders of .*"
        ):
            folder.load(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "rgb"}, "mode: expected one of binary, grey, colour, got 'rgb'"),
            ({"size": 0}, "size: expected a number of pixels, or height and width, got 0"),
            ({"size": (8, 8, 3)}, r"size: expected a number of pixels, .*, got \(8, 8, 3\)"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            folder.load(folder_of_shapes(tmp_path / "own", [2]), **options)


def test_pictures_of_other_kinds_are_named(tmp_path):
    """A class of which all pictures are of another kind would be missing, and one with some would be smaller."""
    root = folder_of_shapes(tmp_path / "own", [2, 2])
    (root / "notes.txt").write_text("no picture")
    (root / "class00" / "notes.txt").write_text("no picture")
    folder.load(root, size=8)
    (root / "class01" / "IMG_1.HEIC").write_bytes(b"photo")
    (root / "drawings").mkdir()
    (root / "drawings" / "a.svg").write_text("<svg/>")
    for _ in range(2):  # also where it is prepared already
        with pytest.warns(
            UserWarning, match=r"IMG_1.HEIC and 1 more: passed over, as not of a kind that is read$"
        ):
            assert folder.load(root, size=8).names == ("class00", "class01")
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.avif").write_bytes(b"photo")
    with pytest.raises(FileNotFoundError, match=r"^data_dir: expected pictures \(png, .*found .*1.avif$"):
        folder.load(tmp_path / "photos", size=8)


def test_what_cannot_be_read_on_the_way(tmp_path, monkeypatch):
    root = folder_of_shapes(tmp_path / "own", [2, 2])
    (root / "class00" / "z.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="z.png: expected a picture, got a file that cannot be read"):
        folder.load(root, size=8)
    with pytest.warns(UserWarning, match="z.png: left out"):
        assert folder.load(root, size=8, skip_unreadable=True).counts.tolist() == [2, 2]

    def walk(path, *, onerror, **options):
        onerror(PermissionError(13, "Permission denied", str(root / "class01")))
        return iter(())

    monkeypatch.setattr(folder.os, "walk", walk)
    with pytest.raises(
        PermissionError, match=r"^data_dir: expected folders that can be read, got .*class01 \(Perm"
    ):
        folder.load(root, size=8)


def test_numbers_of_32_bits_have_no_known_white(tmp_path):
    (tmp_path / "own" / "a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "own" / "a" / "0.tif")
    with pytest.raises(ValueError, match="0.tif: expected 8 or 16 bits, got 32, whose white is not known; --skip"):
        folder.load(tmp_path / "own", mode="grey")


class TestCache:
    def test_is_read_as_long_as_nothing_has_changed(self, tmp_path, monkeypatch):
        root = folder_of_shapes(tmp_path / "own", [3, 2])
        first = folder.load(root, size=8, mode="grey")
        (kept,) = (tmp_path / "home" / ".cache" / "vma_pyro" / "folders").iterdir()

        def unread(*args):
            raise AssertionError

        with monkeypatch.context() as patched:
            patched.setattr(folder, "read_picture", unread)
            again = folder.load(root, size=8, mode="grey")
            assert (again.pixels == first.pixels).all()
            assert again.names == first.names
            with pytest.raises(AssertionError):
                folder.load(root, size=9, mode="grey")
            save(root / "class01" / "00.png", grey(255))
            with pytest.raises(AssertionError):
                folder.load(root, size=8, mode="grey")
        assert (folder.load(root, size=8, mode="grey").pixels[3] == 255).all()
        kept.write_bytes(b"damaged")
        assert (folder.load(root, size=8, mode="grey").pixels[3] == 255).all()

    def test_files_that_change_places_are_read_again(self, tmp_path):
        """Of the same size and of the same time."""
        root = tmp_path / "own"
        for name, value in (("a", 10), ("b", 200)):
            save(root / name / "0.bmp", grey(value))
            save(root / name / "1.bmp", grey(value + 1))
        for path in root.glob("*/*"):
            os.utime(path, (1e9, 1e9))
        before = folder.load(root, mode="grey").pixels[:, 0, 0, 0]
        (root / "a" / "0.bmp").rename(tmp_path / "aside")
        (root / "b" / "0.bmp").rename(root / "a" / "0.bmp")
        (tmp_path / "aside").rename(root / "b" / "0.bmp")
        assert before.tolist() == [10, 11, 200, 201]
        assert folder.load(root, mode="grey").pixels[:, 0, 0, 0].tolist() == [200, 11, 10, 201]

    def test_a_time_is_enough_of_a_change(self, tmp_path):
        root = folder_of_shapes(tmp_path / "own", [2])
        folder.load(root, size=8, cache=tmp_path / "cache")
        (kept,) = (tmp_path / "cache").iterdir()
        before = kept.stat().st_mtime_ns
        os.utime(root / "class00" / "00.png", ns=(1, 1))
        folder.load(root, size=8, cache=tmp_path / "cache")
        assert kept.stat().st_mtime_ns > before

    def test_where_it_cannot_be_kept(self, tmp_path):
        (tmp_path / "file").write_text("no folder")
        with pytest.warns(UserWarning, match="prepared data not kept"):
            folder.load(folder_of_shapes(tmp_path / "own", [2]), size=8, cache=tmp_path / "file")


def classes(counts, groups=None):
    names = tuple(f"c{i}" for i in range(len(counts)))
    pixels = np.random.default_rng(0).integers(0, 2, (sum(counts), 1, 4, 4)).astype(np.uint8)
    return ImageClasses(pixels, np.array(counts), names, names if groups is None else groups)


class TestDivide:
    def test_parts_are_disjoint_whole_and_the_same_for_a_seed(self):
        data = classes([3, 4, 5, 2, 6, 1, 1, 7], tuple("aabbccdd"))
        parts = divide(data, seed=3)
        found = [name for part in parts for name in part.names]
        assert sorted(found) == sorted(data.names)
        assert not set(parts.train.groups) & set(parts.test.groups)
        assert not set(parts.train.groups) & set(parts.validation.groups)
        assert all(part.examples > 1 for part in parts)
        assert divide(data, seed=3).test.names == parts.test.names
        assert len({divide(data, seed=seed).test.names for seed in range(9)}) > 1
        row = data.names.index(parts.test.names[0])
        assert (parts.test.pixels[0] == data.pixels[data.offsets[row]]).all()

    def test_by_name_and_by_class(self):
        data = classes([3] * 6, tuple("aabbcc"))
        parts = divide(data, test=["b"], validation=["c"])
        assert parts.test.names == ("c2", "c3")
        assert parts.train.groups == ("a", "a")
        assert divide(data, by="class", test=["c1"], validation=["c0", "c5"]).train.names == ("c2", "c3", "c4")

    def test_names_are_whole_and_classes_of_one_name_are_not_one(self):
        data = ImageClasses(
            np.zeros((12, 1, 4, 4), np.uint8), np.full(6, 2), ("a", "b") * 3, ("x", "x", "y", "y", "xy", "xy")
        )
        assert set(divide(data, test="xy", validation=["y"]).test.groups) == {"xy"}
        assert data.of_groups("xy").groups == ("xy", "xy")
        parts = divide(data, by="class", test=["x/b"], validation=["y/a"])
        assert (parts.test.groups, parts.test.names) == (("x",), ("b",))
        assert len(parts.train) == 4

    def test_named_validation_is_never_drawn_for_the_test(self):
        for seed in range(8):
            assert divide(classes([3] * 6), validation=["c0"], seed=seed).validation.names == ("c0",)

    def test_too_few_are_left(self):
        data = classes([3, 3, 3, 1, 1])
        with pytest.raises(
            ValueError, match=r"^validation: expected 2 or more with a class of 2 images to choose from, got 0$"
        ):
            divide(data, test=["c0", "c1", "c2"])

    @pytest.mark.parametrize("counts", [[2, 1, 1, 1, 3, 1, 1, 1, 1, 2], [1, 2, 2, 2, 1], [5, 5, 5]])
    def test_every_part_has_a_query(self, counts):
        for seed in range(20):
            for part in divide(classes(counts), seed=seed):
                assert part.examples > 1

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            (
                classes([3, 3, 1]),
                {},
                "data: expected 3 groups \\(.*\\) or more with a class of 2 images or more, .*, got 2",
            ),
            (classes([3] * 4), {"test": 1.0}, "test: expected a share between 0 and 1, or names, got 1.0"),
            (classes([3] * 4), {"test": ["z"]}, "test: expected some of c., c., c., c., got .'z'."),
            (
                classes([3] * 4),
                {"test": ["c0"], "validation": ["c0"]},
                "validation: expected other names than of the test, got c0 in both",
            ),
            (classes([3] * 4), {"by": "name"}, "by: expected 'group' or 'class', got 'name'"),
            (classes([3] * 4), {"seed": -1}, "seed: expected .*"),
            (
                classes([3, 3, 3, 1]),
                {"test": ["c3"]},
                "test: expected a group with a class of 2 images or more, got 1 without",
            ),
        ],
    )
    def test_refusals(self, data, options, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            divide(data, **options)


def test_load_split(tmp_path):
    root = folder_of_shapes(tmp_path / "own", [3] * 5)
    parts = load_split("folder", root, size=8, mode="grey")
    assert sum(len(part) for part in parts) == 5
    with pytest.raises(
        ValueError, match="^data_dir: expected the folder of your images with data=folder, got none$"
    ):
        load_split("folder")
    with pytest.raises(ValueError, match="^size: expected it with images of your own, got it with data=glyphs$"):
        load_split("glyphs", size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixels": np.zeros((4, 2, 4, 4), np.uint8)},
            "pixels: expected at least one image, .*, got .4, 2, 4, 4.",
        ),
        (
            {"pixels": np.full((4, 1, 4, 4), 2, np.uint8)},
            "pixels: expected binary values .* up to 2; say bits=8 .*",
        ),
        ({"pixels": np.zeros((4, 1, 4, 4))}, "pixels: expected dtype uint8 or float32, got float64"),
        (
            {"pixels": np.zeros((4, 1, 4, 4), np.float32), "bits": 8},
            "pixels: expected dtype uint8 with bits=8, got f.*",
        ),
        ({"bits": 4}, "bits: expected 1 or 8, got 4"),
        ({"counts": np.array([3, 0])}, "counts: expected 1 or more images for each class, 4 in all, got .3, 0."),
        ({"counts": np.array([3, 2])}, "counts: expected 1 or more images for each class, 4 in all, got .3, 2."),
        ({"names": ("a",)}, "names: expected 2, one per class, got 1"),
    ],
)
def test_records_that_do_not_fit_are_refused(change, message):
    fine = {"pixels": np.zeros((4, 1, 4, 4), np.uint8), "counts": np.array([3, 1]), "names": ("a", "b")}
    with pytest.raises(ValueError, match=f"^{message}$"):
        ImageClasses(**(fine | {"groups": ("a", "b")} | change))


def test_digits_of_real_people(tmp_path):
    """1,797 digits in 17 shades from scikit-learn: other numbers of each, sharper than chance in 60 updates."""
    import torch
    from sklearn.datasets import load_digits

    from vma_pyro import ConvNetworks, DiscretizedLogistics, Guide, Model
    from vma_pyro.data import EpisodeSampler
    from vma_pyro.infer import make

    digits = load_digits()
    np.savez(tmp_path / "digits.npz", images=digits.images / 16, labels=digits.target)
    data = folder.load(tmp_path / "digits.npz", mode="grey")
    assert data.counts.tolist() == np.bincount(digits.target).tolist()
    assert data.image_shape == (1, 8, 8)
    torch.manual_seed(0)
    networks = ConvNetworks(4, width=0.2, image_shape=data.image_shape, key_dim=8, hidden_dim=16)
    model, guide = Model(networks, likelihood=DiscretizedLogistics(2)), Guide(networks)
    loss_fn = make("vimco", 3)(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=3e-3)
    losses = []
    for _, e in zip(range(60), EpisodeSampler(data, classes=5, shots=2, queries=16, seed=0), strict=False):
        optimizer.zero_grad()
        loss = loss_fn(e.memory, e.x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / 16)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 30
