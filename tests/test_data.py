"""Data sets: real preparation code on small files made here, and damaged files refused."""

import errno
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from vma_pyro.data import (
    Characters,
    EpisodeSampler,
    GreyCharacters,
    LabelledImages,
    glyphs,
    load_split,
    mnist,
    omniglot,
)
from vma_pyro.data.prepared import write_npz


def draw_originals(root, half, *, alphabets, characters=2, examples=3, seed=0, ink=0.1):
    """torchvision's folder with random 105x105 drawings, black on white; returns the ink [C, E, 105, 105]."""
    rng = np.random.default_rng(seed)
    inked = rng.random((len(alphabets) * characters, examples, 105, 105)) < ink
    row = 0
    for alphabet in sorted(alphabets):
        for character in range(characters):
            folder = root / "omniglot-py" / f"images_{half}" / alphabet / f"character{character + 1:02d}"
            folder.mkdir(parents=True)
            for example in range(examples):
                Image.fromarray(~inked[row, example]).convert("1").save(
                    folder / f"{row:04d}_{example + 1:02d}.png"
                )
            row += 1
    return inked


def inked(*lead):
    """Images with one inked pixel [*lead, 28, 28]."""
    images = np.zeros((*lead, 28, 28), np.uint8)
    images[..., 14, 14] = 1
    return images


def prepared(root, name="omniglot/background.npz", **changes):
    arrays = {
        "images": inked(2, 3),
        "alphabet": np.array(["Greek", "Latin"]),
        "character": np.array(["character01", "character01"]),
        **changes,
    }
    write_npz(root / name, **{key: value for key, value in arrays.items() if value is not None})
    return root


class TestOmniglot:
    def test_originals_are_sampled_and_kept(self, tmp_path):
        ink = draw_originals(tmp_path, "background", alphabets=["Greek", "Latin"])
        characters = omniglot.load(tmp_path, split="background", download=False)
        rows = [int(3.75 * r) for r in range(28)]
        assert (characters.images == ink[:, :, rows][:, :, :, rows]).all()
        assert characters.images.dtype == np.uint8
        assert characters.alphabets == ("Greek", "Greek", "Latin", "Latin")
        assert characters.names == ("character01", "character02") * 2
        # A second call reads the prepared file.
        (tmp_path / "omniglot-py").rename(tmp_path / "gone")
        again = omniglot.load(tmp_path, split="background", download=False)
        assert (again.images == characters.images).all()
        assert [p.name for p in (tmp_path / "omniglot").iterdir()] == ["background.npz"]

    def test_to_28x28(self):
        images = np.arange(2 * 105 * 105).reshape(2, 105, 105)
        small = omniglot.to_28x28(images)
        assert small.shape == (2, 28, 28)
        assert small[1, 3, 27] == images[1, 11, 101]
        with pytest.raises(ValueError, match=r"^images: expected shape \[..., 105, 105\], got \[28, 28\]$"):
            omniglot.to_28x28(np.zeros((28, 28)))

    def test_to_26x26(self, tmp_path):
        """The ink of a block is that of any of its pixels; by hand, and of drawings in a folder of their own."""
        ink = draw_originals(tmp_path, "background", alphabets=["Greek", "Latin"], ink=0.01)
        small = omniglot.to_26x26(ink)
        assert small.shape == (4, 3, 26, 26)
        for row, column in ((0, 0), (3, 25), (25, 25)):
            block = ink[2, 1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert small[2, 1, row, column] == block.any()
        found = omniglot.load(tmp_path, split="background", side=26, download=False)
        assert (found.images == small).all()
        assert (omniglot.load(tmp_path, split="background", download=False).images.shape)[-1] == 28
        (tmp_path / "omniglot-py").rename(tmp_path / "gone")
        again = omniglot.load(tmp_path, split="background", side=26, download=False)
        assert (again.images == small).all()
        with pytest.raises(ValueError, match=r"^images: expected shape \[..., 105, 105\], got \[104, 104\]$"):
            omniglot.to_26x26(np.zeros((104, 104)))
        with pytest.raises(ValueError, match="^side: expected one of 28, 26, got 27$"):
            omniglot.load(tmp_path, split="background", side=27)

    def test_45_alphabets_at_26x26(self, tmp_path):
        background = [*omniglot.VALIDATION_ALPHABETS, "Latin"]
        draw_originals(tmp_path, "background", alphabets=background, ink=0.01)
        draw_originals(tmp_path, "evaluation", alphabets=[*omniglot.TEST_5, "Angelic"], seed=1, ink=0.01)
        found, other = (load_split(data, tmp_path) for data in ("omniglot-45-26", "omniglot-45"))
        for small, large in zip(found, other, strict=True):
            assert small.full_names == large.full_names
            assert (small.image_shape, large.image_shape) == ((1, 26, 26), (1, 28, 28))

    def test_splits_follow_alphabets(self, tmp_path):
        background = [*omniglot.VALIDATION_ALPHABETS, "Latin", "Sanskrit"]
        evaluation = [*omniglot.TEST_5, "Angelic"]
        draw_originals(tmp_path, "background", alphabets=background)
        draw_originals(tmp_path, "evaluation", alphabets=evaluation, seed=1)
        splits = {s: omniglot.load(tmp_path, split=s, download=False) for s in omniglot.SPLITS}
        assert set(splits["train"].alphabets) == {"Latin", "Sanskrit"}
        assert set(splits["validation"].alphabets) == set(omniglot.VALIDATION_ALPHABETS)
        assert set(splits["5"].alphabets) == set(omniglot.TEST_5)
        assert set(splits["45"].alphabets) == set(background) | {"Angelic"}
        assert len(splits["45"]) + len(splits["5"]) == len(splits["background"]) + len(splits["evaluation"])

    def test_the_root_may_come_from_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("VMA_DATA", str(prepared(tmp_path)))
        assert len(omniglot.load(split="background")) == 2

    def test_unknown_split(self, tmp_path):
        with pytest.raises(ValueError, match="^split: expected one of background, .* got 'test'$"):
            omniglot.load(tmp_path, split="test")

    @pytest.mark.parametrize("exists", [True, False])
    def test_missing_or_empty_folder(self, tmp_path, exists):
        root = tmp_path if exists else tmp_path / "absent"
        with pytest.raises(FileNotFoundError, match="^data_dir: expected .*background.npz or .* found neither$"):
            omniglot.load(root, split="background", download=False)
        assert exists or not root.exists()

    def test_no_network(self, tmp_path, monkeypatch):
        from urllib.error import URLError

        def unreachable(*args, **kwargs):
            raise URLError("no route to host")

        monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", unreachable)
        with pytest.raises(FileNotFoundError, match="found neither, and the download failed .*no route to host"):
            omniglot.load(tmp_path, split="background")

    def test_an_empty_folder_of_originals(self, tmp_path):
        (tmp_path / "omniglot-py" / "images_background").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="found no character$"):
            omniglot.load(tmp_path, split="background", download=False)

    def test_incomplete_originals_leave_no_prepared_file(self, tmp_path):
        draw_originals(tmp_path, "background", alphabets=["Greek"])
        next((tmp_path / "omniglot-py").glob("*/*/character02/*.png")).unlink()
        with pytest.raises(ValueError, match="character02: expected 3 drawings, got 2$"):
            omniglot.load(tmp_path, split="background", download=False)
        assert not (tmp_path / "omniglot").exists()

    def test_a_disk_that_cannot_keep_the_prepared_file(self, tmp_path, monkeypatch):
        draw_originals(tmp_path, "background", alphabets=["Greek"])

        def read_only(path, write):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("vma_pyro.data.prepared.write_atomically", read_only)
        with pytest.warns(UserWarning, match=r"background.npz: prepared data not kept \(Read-only file system\)"):
            characters = omniglot.load(tmp_path, split="background", download=False)
        assert characters.images.any()

    def test_a_broken_drawing_is_named(self, tmp_path):
        draw_originals(tmp_path, "background", alphabets=["Greek"])
        broken = next((tmp_path / "omniglot-py").glob("*/*/character02/*.png"))
        broken.write_bytes(broken.read_bytes()[:40])
        with pytest.raises(ValueError, match="png: expected a 105x105 drawing"):
            omniglot.load(tmp_path, split="background", download=False)


class TestPreparedFiles:
    def load(self, root):
        return omniglot.load(root, split="background", download=False)

    def test_truncated(self, tmp_path):
        path = prepared(tmp_path) / "omniglot" / "background.npz"
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 5):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"background.npz: expected a prepared npz file") as caught:
                self.load(tmp_path)
            assert "\n" not in str(caught.value)

    def test_a_changed_byte(self, tmp_path):
        images = np.random.default_rng(0).integers(0, 2, (2, 3, 28, 28)).astype(np.uint8)
        path = prepared(tmp_path, images=images) / "omniglot" / "background.npz"
        whole = path.read_bytes()
        for place in range(100, 500, 40):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"background.npz: expected a prepared npz file"):
                self.load(tmp_path)

    def test_a_single_array(self, tmp_path):
        path = prepared(tmp_path) / "omniglot" / "background.npz"
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(ValueError, match=r"background.npz: expected a prepared npz file"):
            self.load(tmp_path)

    def test_missing_array(self, tmp_path):
        with pytest.raises(ValueError, match=r"background.npz: expected arrays .* got \['images', 'character'\]$"):
            self.load(prepared(tmp_path, alphabet=None))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (
                np.zeros((2, 3, 26, 26), np.uint8),
                r"expected shape \[..., 28, 28\], got \[2, 3, 26, 26\]",
            ),
            (np.zeros((2, 28, 28), np.uint8), r"expected shape \[classes, examples, height, width\]"),
            (np.zeros((0, 3, 28, 28), np.uint8), "expected at least one image"),
            (np.zeros((2, 3, 28, 28), np.float32), "expected dtype uint8, got float32"),
            (np.full((2, 3, 28, 28), 255, np.uint8), "expected binary values 0 and 1, got values up to 255"),
        ],
    )
    def test_wrong_images(self, tmp_path, images, message):
        with pytest.raises(ValueError, match=f"background.npz: images: {message}"):
            self.load(prepared(tmp_path, images=images))

    def test_wrong_number_of_names(self, tmp_path):
        with pytest.raises(ValueError, match="background.npz: alphabets: expected 2, one per class, got 1"):
            self.load(prepared(tmp_path, alphabet=np.array(["Greek"])))

    def test_objects_are_not_loaded(self, tmp_path):
        prepared(tmp_path)
        np.savez(
            tmp_path / "omniglot" / "background.npz",
            images=np.array([{}], dtype=object),
            alphabet=[],
            character=[],
        )
        with pytest.raises(ValueError, match="expected a prepared npz file, got one that cannot be read"):
            self.load(tmp_path)


GREY = np.random.default_rng(0).integers(0, 256, (4, 28, 28)).astype(np.uint8)


def write_originals(root):
    """Four digits in MNIST's own format."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = lambda magic, *shape: b"".join(n.to_bytes(4, "big") for n in (magic, *shape))  # noqa: E731
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header(0x803, 4, 28, 28) + GREY.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header(0x801, 4) + bytes([7, 1, 2, 3]))
    return raw


class TestMNIST:
    def test_prepared_file(self, tmp_path):
        write_npz(tmp_path / "mnist" / "test.npz", images=inked(5), labels=np.arange(5, dtype=np.uint8))
        digits = mnist.load(tmp_path, split="test")
        assert len(digits) == 5
        assert digits.labels.tolist() == [0, 1, 2, 3, 4]

    def test_shuffled_images_keep_their_labels(self):
        labels = np.repeat(np.arange(5, dtype=np.uint8), 20)
        images = np.zeros((100, 28, 28), np.uint8)
        images[np.arange(100), 0, labels] = 1
        digits = LabelledImages(images, labels).shuffled(seed=3)
        assert (digits.images[:, 0].argmax(1) == digits.labels).all()
        assert sorted(digits.labels) == labels.tolist()
        assert set(digits.labels[:20]) == set(range(5))
        assert (LabelledImages(images, labels).shuffled(seed=3).labels == digits.labels).all()

    def test_originals_are_binarised_once(self, tmp_path):
        from torchvision.datasets.mnist import MNIST

        write_originals(tmp_path)
        assert MNIST(str(tmp_path), train=True).data.shape == (4, 28, 28)
        digits = mnist.load(tmp_path, split="train", download=False)
        assert digits.labels.tolist() == [7, 1, 2, 3]
        assert (digits.images == mnist.binarise(GREY, seed=0)).all()
        assert digits.images[GREY == 0].max() == 0
        assert digits.images[GREY == 255].min() == 1
        assert digits.images.mean() == pytest.approx(GREY.mean() / 255, abs=0.05)
        assert (mnist.load(tmp_path, split="train").images == digits.images).all()

    @pytest.mark.parametrize(
        ("damaged", "length"),
        [("images-idx3", 0), ("images-idx3", 3), ("images-idx3", 100), ("labels-idx1", 0), ("labels-idx1", 9)],
    )
    def test_damaged_originals(self, tmp_path, damaged, length):
        raw = write_originals(tmp_path)
        path = raw / f"train-{damaged}-ubyte"
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(
            ValueError, match="raw: expected MNIST's files, got some that cannot be read"
        ) as caught:
            mnist.load(tmp_path, split="train", download=False)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "mnist").exists()

    def test_without_a_network(self, tmp_path, monkeypatch):
        def unreachable(*args, **options):
            raise URLError("no route to host")

        monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
        with pytest.raises(FileNotFoundError, match="^data_dir: expected .*train.npz or .*raw, found neither"):
            mnist.load(tmp_path, split="train")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="^data_dir: expected .*train.npz or .*raw, found neither"):
            mnist.load(tmp_path, split="train", download=False)
        with pytest.raises(ValueError, match="^split: expected one of train, test, got 'valid'$"):
            mnist.load(tmp_path, split="valid")

    def test_labels_of_the_wrong_length(self, tmp_path):
        write_npz(
            tmp_path / "mnist" / "test.npz",
            images=np.zeros((5, 28, 28), np.uint8),
            labels=np.zeros(4, np.uint8),
        )
        with pytest.raises(ValueError, match=r"test.npz: labels: expected shape \[5\], got \[4\]$"):
            mnist.load(tmp_path, split="test")


class TestGlyphs:
    def test_deterministic_and_a_prefix(self):
        a, b = glyphs.load(classes=25, examples=3, seed=4), glyphs.load(classes=45, examples=3, seed=4)
        assert a.images.shape == (25, 3, 28, 28)
        assert (a.images[:20] == b.images[:20]).all()
        assert (a.images == glyphs.load(classes=25, examples=3, seed=4).images).all()
        assert (a.images[:20] != glyphs.load(classes=20, examples=3, seed=5).images).any()
        assert len(set(a.alphabets)) == 2
        assert len(set(b.alphabets)) == 3

    def test_looks_like_ink(self):
        images = glyphs.load(classes=60, examples=5).images
        assert 0.06 < images.mean() < 0.16  # Omniglot has 0.08
        assert images.sum((2, 3)).min() > 10

    def test_examples_of_a_class_resemble_each_other(self):
        images = glyphs.load(classes=40, examples=6).images.reshape(40, 6, -1).astype(float)
        means = images[:, 1:].mean(1)
        nearest = ((images[:, 0, None] - means) ** 2).sum(-1).argmin(1)
        share = (nearest == np.arange(40)).mean()
        assert 0.3 < share < 1.0  # neither noise nor copies

    def test_errors(self):
        with pytest.raises(ValueError, match="^classes: expected at least 1, got 0$"):
            glyphs.load(classes=0)
        with pytest.raises(ValueError, match="^seed: expected at least 0, got -1$"):
            glyphs.load(seed=-1)


def test_records_refuse_what_does_not_fit():
    images = inked(2, 3)
    characters = Characters(images, ("a", "b"), ("A", "B"))
    assert characters.of_alphabets(["B"]).names == ("b",)
    assert characters.without_alphabets(["B"]).names == ("a",)
    with pytest.raises(ValueError, match=r"^alphabets: expected some of \['A', 'B'\], got \['C'\]$"):
        characters.of_alphabets(["C"])
    with pytest.raises(ValueError, match="^names: expected 2, one per class, got 1$"):
        Characters(images, ("a",), ("A", "B"))
    with pytest.raises(ValueError, match=r"^labels: expected shape \[3\], got \[2\]$"):
        LabelledImages(images[0], np.zeros(2))


class TestGreyCharacters:
    def of(self, images):
        return GreyCharacters(images, names=("a", "b"), alphabets=("A", "B"))

    def test_episodes_are_grey(self):
        images = np.random.default_rng(0).random((2, 4, 28, 28), np.float32)
        data = self.of(images).of_alphabets(["B"])
        assert isinstance(data, GreyCharacters)
        episode = EpisodeSampler(data, classes=1, shots=2, queries=2, seed=0).sample()
        everything = torch.cat([episode.memory.entries, episode.x]).flatten()
        assert everything.sort().values.tolist() == np.sort(images[1].flatten()).tolist()

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 3, 28, 28), np.uint8), "images: expected dtype float32, got uint8"),
            (np.full((2, 3, 28, 28), 255, np.float32), "images: expected values from 0 to 1, got 255 to 255"),
            (np.full((2, 3, 28, 28), np.nan, np.float32), "images: expected values from 0 to 1, got nan to nan"),
            (np.zeros((2, 28, 28), np.float32), r"images: expected shape \[classes, examples, height, .*"),
        ],
    )
    def test_others_are_refused(self, images, message):
        with pytest.raises(ValueError, match=f"^{message}$"):
            self.of(images)
