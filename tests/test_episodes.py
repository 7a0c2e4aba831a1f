"""Episodes: no target in its own memory, exact reproduction, and limits that are named."""

import numpy as np
import pytest
import torch

from vma_pyro.data import Characters, EpisodeSampler
from vma_pyro.data.episodes import augmented

CLASSES, EXAMPLES = 6, 7


@pytest.fixture(scope="module")
def characters():
    """Every image carries its class and example number in its first pixels."""
    images = np.zeros((CLASSES, EXAMPLES, 28, 28), np.uint8)
    images[..., -1, -1] = 1  # no image is empty
    for c in range(CLASSES):
        for e in range(EXAMPLES):
            images[c, e, 0, :3] = [int(b) for b in f"{c:03b}"]
            images[c, e, 1, :3] = [int(b) for b in f"{e:03b}"]
    names = tuple(f"c{c}" for c in range(CLASSES))
    return Characters(images, names, names)


def identify(images):
    """Class and example of images [..., 1, 28, 28], as one number."""
    bits = images[..., 0, :2, :3].flatten(-2).long()
    return (bits * torch.tensor([32, 16, 8, 4, 2, 1])).sum(-1)


def test_shared_memory(characters):
    sampler = EpisodeSampler(characters, classes=3, shots=2, queries=5, seed=0)
    for _, episode in zip(range(200), sampler, strict=False):
        entries, x = identify(episode.memory.entries), identify(episode.x)
        assert episode.memory.entries.shape == (6, 1, 28, 28)
        assert episode.x.shape == (5, 1, 28, 28)
        assert len(set(entries.tolist()) | set(x.tolist())) == 11  # all different: no target in the memory
        assert episode.memory.labels.tolist() == [0, 0, 1, 1, 2, 2]
        classes = entries.reshape(3, 2) // 8
        assert (classes[:, 0] == classes[:, 1]).all()
        assert len(set(classes[:, 0].tolist())) == 3
        assert (x // 8 == classes[episode.labels, 0]).all()


def test_one_memory_per_query(characters):
    sampler = EpisodeSampler(characters, classes=3, shots=6, queries=40, seed=0, shared_memory=False)
    for _ in range(10):
        episode = sampler.sample()
        entries, x = identify(episode.memory.entries), identify(episode.x)
        assert entries.shape == (40, 18)
        assert not (entries == x[:, None]).any()
        assert all(len(set(row)) == 18 for row in entries.tolist())
        own = entries.gather(1, 6 * episode.labels[:, None])[:, 0]
        assert (own // 8 == x // 8).all()
        assert set(episode.labels.tolist()) == {0, 1, 2}


def test_more_shots_extend_the_memory_of_the_same_targets(characters):
    few, many = (
        EpisodeSampler(characters, classes=1, shots=s, queries=30, seed=9, shared_memory=False).sample()
        for s in (2, 5)
    )
    assert (few.x == many.x).all()
    assert (few.memory.entries == many.memory.entries[:, :2]).all()


@pytest.mark.parametrize("shared", [True, False])
def test_all_classes_and_examples_occur_equally(characters, shared):
    sampler = EpisodeSampler(characters, classes=2, shots=1, queries=4, seed=1, shared_memory=shared)
    counts = torch.zeros(64)
    for _ in range(3000):
        counts += torch.bincount(identify(sampler.sample().x), minlength=64)
    seen = counts[counts > 0]
    assert len(seen) == CLASSES * EXAMPLES
    # 12,000 draws over 42 images: 286 each, standard deviation below 24 even for dependent draws.
    assert (seen - 12000 / 42).abs().max() < 5 * 24


@pytest.mark.parametrize("shared", [True, False])
def test_a_share_of_the_memories_is_blank(characters, shared):
    """1,000 episodes, |z| < 5; targets, labels and shapes are those of any episode."""
    shape = {"classes": 2, "shots": 3, "queries": 4, "shared_memory": shared}
    sampler, blank = EpisodeSampler(characters, **shape, seed=1, blank=0.3), 0
    for _ in range(1000):
        episode = sampler.sample()
        without = not episode.memory.entries.any()
        blank += without
        assert episode.memory.entries.shape[-4:] == (6, 1, 28, 28)
        assert without or bool(episode.memory.entries.flatten(-3).any(-1).all())
        assert bool(episode.x.flatten(1).any(1).all())
    assert abs(blank - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("blank", [0.0, 0.5])
@pytest.mark.parametrize("shared", [True, False])
def test_state_is_saved_and_restored(characters, shared, blank):
    def make(seed):
        return EpisodeSampler(
            characters, classes=2, shots=1, queries=4, seed=seed, shared_memory=shared, blank=blank
        )

    sampler = make(0)
    sampler.sample()
    state = sampler.state_dict()
    ahead = [sampler.sample() for _ in range(3)]
    other = make(5)
    other.load_state_dict(state)
    for episode in ahead:
        again = other.sample()
        assert (episode.x == again.x).all()
        assert (episode.memory.entries == again.memory.entries).all()
    assert (make(0).sample().x == make(0).sample().x).all()


def test_augmentation_makes_classes():
    images = np.random.default_rng(0).integers(0, 2, (2, 3, 28, 28)).astype(np.uint8)
    data = Characters(images, ("a", "b"), ("A", "B"))
    flat = images.reshape(6, 1, 28, 28)
    assert (augmented(data, None).numpy() == flat).all()
    turned = augmented(data, "rotations").numpy()
    assert turned.shape == (24, 1, 28, 28)
    assert (turned[6:12] == np.rot90(flat, axes=(2, 3))).all()
    both = augmented(data, "rotations+flips").numpy()
    assert len({image.tobytes() for image in both[::3]}) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 7}, "classes: expected at most 6, the classes of the data set, got 7"),
        ({"classes": 0}, "classes: expected at least 1, got 0"),
        ({"shots": 7}, "shots: expected at most 6, as each class has 7 examples"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        (
            {"classes": 2, "shots": 5, "queries": 5},
            "queries: expected at most 4, the examples that 2 classes leave",
        ),
        ({"blank": 1.0}, "blank: expected a share from 0 to below 1, got 1.0"),
        ({"augment": "mirror"}, "augment: expected None, 'rotations' or 'rotations\\+flips', got 'mirror'"),
    ],
)
def test_limits_are_named(characters, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EpisodeSampler(characters, **{"classes": 2, "shots": 2, "queries": 4, "seed": 0, **arguments})
