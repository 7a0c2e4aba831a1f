"""Looks at values: what is refused, and what is named in one line because it may be meant."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image

from vma_pyro import BernoulliPixels, Guide, Memory, MLPNetworks, Model
from vma_pyro.comparisons import SoftAttentionModel
from vma_pyro.data import Characters, GreyCharacters, LabelledImages, RecallSampler, glyphs, mnist, omniglot
from vma_pyro.data.prepared import write_npz
from vma_pyro.evaluation import address_posterior, classify
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.memory import SelectedMemory

GLYPHS = glyphs.load(classes=4, examples=5)
NAMES = ("a", "b", "c", "d")


class TestInkOfData:
    @pytest.mark.parametrize("kind", [Characters, GreyCharacters, LabelledImages, RecallSampler])
    def test_inverted(self, kind):
        images = 1 - GLYPHS.images
        share = f"{images.mean():.0%}"
        assert share == "89%"
        message = f"images: expected less ink (1) than paper (0), got {share} ink; give 1 - images if the drawings"
        made = {
            Characters: lambda: Characters(images, NAMES, NAMES),
            GreyCharacters: lambda: GreyCharacters(images.astype(np.float32), NAMES, NAMES),
            LabelledImages: lambda: LabelledImages(images.reshape(-1, 28, 28), np.zeros(20, np.uint8)),
            RecallSampler: lambda: RecallSampler(images.reshape(-1, 28, 28), size=4, queries=2, seed=0),
        }
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}") as told:
            data = made[kind]()
        assert len(told) == 1
        assert "\n" not in str(told[0].message)
        if isinstance(data, Characters):
            data.of_alphabets(["a", "b"])  # told once

    def test_some_inverted(self):
        images = GLYPHS.images.copy()
        images[1, :3] = 1 - images[1, :3]
        with pytest.warns(
            UserWarning, match="^images: expected less ink .*, got more than 60% ink in 3 of 20 images"
        ):
            Characters(images, NAMES, NAMES)

    @pytest.mark.parametrize("kind", [Characters, GreyCharacters])
    def test_empty(self, kind):
        images = GLYPHS.images.astype(np.uint8 if kind is Characters else np.float32)
        images[0, 1] = images[3, 4] = 0
        with pytest.warns(UserWarning, match="^images: expected ink in every image, got 2 of 20 images without; "):
            kind(images, NAMES, NAMES)

    def test_loaded_from_prepared_files(self, tmp_path):
        arrays = {"alphabet": np.array(NAMES), "character": np.array(NAMES)}
        write_npz(tmp_path / "omniglot" / "background.npz", images=1 - GLYPHS.images, **arrays)
        with pytest.warns(UserWarning, match="^images: expected less ink .*, got 89% ink") as told:
            omniglot.load(tmp_path, split="background")
        assert len(told) == 1
        digits = np.zeros((3, 28, 28), np.uint8)
        write_npz(tmp_path / "mnist" / "test.npz", images=digits, labels=np.zeros(3, np.uint8))
        with pytest.warns(UserWarning, match="^images: expected ink in every image, got 3 of 3 images without"):
            mnist.load(tmp_path, split="test")

    def test_hidden_files_of_a_mac(self, tmp_path):
        originals = tmp_path / "omniglot-py" / "images_evaluation"
        ink = np.random.default_rng(0).random((2, 3, 105, 105)) < 0.1
        for row, name in enumerate(("character01", "character02")):
            folder = originals / "Angelic" / name
            folder.mkdir(parents=True)
            for example in range(3):
                Image.fromarray(~ink[row, example]).convert("1").save(folder / f"{example}.png")
                (folder / f"._{example}.png").write_bytes(b"\0\5\26\7")  # of the file system, no image
        (originals / "Angelic" / "._character01").mkdir()
        (originals / ".Trashes" / "character01").mkdir(parents=True)
        (originals / ".DS_Store").write_bytes(b"")
        loaded = omniglot.load(tmp_path, split="evaluation", download=False)
        assert loaded.names == ("character01", "character02")
        assert (loaded.images == omniglot.to_28x28(ink)).all()

    def test_the_shipped_data_is_quiet(self):
        glyphs.load(classes=40, seed=1)  # warnings are errors


@pytest.fixture
def entries():
    return torch.from_numpy(GLYPHS.images[:, :2].reshape(-1, 1, 28, 28)).float()


@pytest.fixture
def x():
    return torch.from_numpy(GLYPHS.images[:3, 4:5]).float()


def programs():
    networks = MLPNetworks(2, hidden_dims=(8, 7), key_dim=5)
    return Model(networks), Guide(networks)


def selected(entries):
    """A memory of its own for each image, of a bank."""
    return SelectedMemory(Memory(entries), torch.randint(len(entries), (3, 5)))


class Grey(Model):
    """A model of shades of grey."""

    def forward(self, memory, x=None, *, num_images=1):
        memory = Memory.of(memory)
        memory.check(x)
        networks, memory = self.networks, memory.encode(self.networks)
        with pyro.plate("data", len(x), dim=-1):
            logits = memory.masked(self.address_prior(memory))
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
            z = pyro.sample("z", networks.prior(m))
            return pyro.sample("x", dist.Normal(networks.decode(z, m), 1.0).to_event(3), obs=x)


class TestEntriesOfABinaryModel:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda e: 255 * e, "got values from 0 to 255"),
            (lambda e: (255 * e).to(torch.uint8), "got values from 0 to 255"),
            (lambda e: 0.8 * e, "got values from 0 to 0.8"),
            (lambda e: 2 * e - 1, "got values from -1 to 1"),
        ],
    )
    @pytest.mark.parametrize("kind", [Model, SoftAttentionModel])
    def test_are_refused_like_x(self, change, message, kind, entries, x):
        model = kind(MLPNetworks(2, hidden_dims=(8, 7), key_dim=5))
        expected = f"^memory.entries: expected binary values 0 and 1, {message}; binarise, "
        with pytest.raises(ValueError, match=expected):
            model(Memory(change(entries)), num_images=2)
        if "255" not in message:  # which are refused for not being like x
            with pytest.raises(ValueError, match=expected):
                model(Memory(change(entries)), x)

    def test_grey_models_and_learned_entries_take_shades(self, entries, x):
        model, guide = programs()
        MultiSampleELBO(2)(Grey(model.networks), guide)(Memory(0.8 * entries), 0.5 * x)
        MultiSampleELBO(2)(model, guide)(Memory((0.8 * entries).requires_grad_()), x)
        MultiSampleELBO(2)(model, guide)(Memory(0.8 * entries, learned=True), x)

    @pytest.mark.parametrize("kind", [lambda e: Memory(e), lambda e: e, lambda e: selected(e)])
    def test_what_is_refused_is_refused_each_time(self, kind, entries, x):
        """Also by the first loss of two programs, which has a look at them before."""
        memory = kind(0.8 * entries)
        loss_fn = MultiSampleELBO(2)(*programs())
        for _ in range(3):
            with pytest.raises(ValueError, match=r"^memory\.entries: expected binary values 0 and 1, got"):
                loss_fn(memory, x)
        model, guide = programs()
        bytes_of = kind(255 * entries)
        for program in (model, guide, model, guide):
            with pytest.raises(ValueError, match=r"^memory\.entries: expected .* got"):
                program(bytes_of, x)

    def test_inverted_ones_are_named(self, entries, x):
        loss = MultiSampleELBO(2)(*programs())
        with pytest.warns(UserWarning, match="expected") as told:
            loss(Memory(1 - entries), x)
        alone = "expected mostly paper (0) as in x, got mostly ink (1); give 1 - entries if ink is 0 there"
        assert {str(t.message) for t in told} == {f"memory.entries: {alone}"}
        with pytest.warns(UserWarning, match="expected") as told:
            loss(Memory(1 - entries), 1 - x)
        both = "expected ink (1) on paper (0), got about 90 % of all pixels 1; give 1 -"
        assert {str(t.message) for t in told} == {
            f"x: {both} x if ink is 0 there",
            f"memory.entries: {both} entries if ink is 0 there",
        }

    def test_are_looked_at_once(self, entries, x, monkeypatch):
        model, guide = programs()
        seen = []
        monkeypatch.setattr(BernoulliPixels, "check", lambda self, name, images: seen.append(name))
        memory = Memory(entries)
        for _ in range(3):
            MultiSampleELBO(2)(model, guide)(memory, x)
            MultiSampleELBO(2)(model, guide)(memory.encode(model.networks), x)
        assert [name for name in seen if name != "x"] == ["memory.entries"]


class TestTheGuideAlone:
    """It does not know the likelihood, but that entries and x are of one kind."""

    @pytest.mark.parametrize("look", [classify, address_posterior])
    def test_bytes_beside_shares_of_ink(self, look, entries, x):
        _, guide = programs()
        labels = torch.zeros(len(entries), dtype=torch.long)
        for memory, target, name, other in (
            (255 * entries, x, "memory.entries", "x"),
            (entries.to(torch.uint8), (200 * x).to(torch.uint8), "x", "memory.entries"),
        ):
            top = int(max(memory.max(), target.max()))
            with pytest.raises(
                ValueError,
                match=f"^{name}: expected values from 0 to 1 as {other} has, got up to {top}; divide by 255$",
            ):
                look(guide, Memory(memory, labels), target)

    def test_inverted(self, entries, x):
        _, guide = programs()
        with pytest.warns(
            UserWarning, match=r"^memory.entries: expected mostly paper \(0\) as in x, got mostly ink"
        ):
            address_posterior(guide, Memory(1 - entries), x)
        with pytest.warns(
            UserWarning, match=r"^x: expected mostly paper \(0\) as in memory.entries, got mostly ink"
        ):
            address_posterior(guide, Memory(entries), 1 - x)

    def test_bytes_on_both_sides_and_signed_values_pass(self, entries, x):
        _, guide = programs()
        address_posterior(guide, Memory(255 * entries), 255 * x)
        address_posterior(guide, Memory(50 * entries - 25), 2 * x - 1)
