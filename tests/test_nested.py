"""Nested episodes: fixed targets under memories that grow; never the target itself; pooled sets as in GMN."""

import numpy as np
import pytest
import torch

from vma_pyro import Guide, MLPNetworks
from vma_pyro.data import Characters, NestedEpisodes
from vma_pyro.evaluation import classify, encoded, encoded_bank


@pytest.fixture(scope="module")
def characters():
    """18 classes of three alphabets, 6 examples each; every image is its own number in binary."""
    number = np.arange(18 * 6).reshape(18, 6)
    images = np.zeros((18, 6, 28, 28), np.uint8)
    images[..., -1, -1] = 1  # no image is empty
    images[..., 0, :7] = number[..., None] >> np.arange(7) & 1
    alphabets = tuple("abc"[min(2, n // 8)] for n in range(18))  # 8, 8 and 2 classes
    return Characters(images, tuple(map(str, range(18))), alphabets)


def numbers(images):
    """The number of each image."""
    return (images[..., 0, 0, :7].long() * 2 ** torch.arange(7)).sum(-1)


def gather(episodes):
    episodes = list(episodes)
    labels = None if episodes[0].memory.labels is None else torch.cat([e.memory.labels for e in episodes])
    return (
        torch.cat([numbers(e.x) for e in episodes]),
        torch.cat([numbers(e.memory.entries) for e in episodes]),
        labels,
        torch.cat([e.labels for e in episodes]),
    )


def test_targets_are_the_same_and_memories_contain_each_other(characters):
    nested = NestedEpisodes(characters, images=40, seed=3)
    x, small, _, _ = gather(nested.episodes(3, 2))
    assert len(x.unique()) == len(nested) == 40
    for classes, shots in ((3, 4), (7, 2), (18, 5)):
        again, entries, names, labels = gather(nested.episodes(classes, shots))
        assert torch.equal(again, x)
        assert entries.shape == (40, classes * shots)
        for i in range(40):
            assert set(small[i].tolist()) <= set(entries[i].tolist())
            assert len(entries[i].unique()) == classes * shots
            assert int(x[i]) not in entries[i].tolist()
            own = entries[i] // 6 == x[i] // 6
            assert own.sum() == shots
            assert (names[i][own] == labels[i]).all()
            assert (names[i][~own] != labels[i]).all()
            for label in range(classes):  # one class under each label
                assert len((entries[i] // 6)[names[i] == label].unique()) == 1


def test_all_images_and_the_first_of_them(characters):
    nested = NestedEpisodes(characters, images=None, seed=0)
    x, entries, _, labels = gather(nested.episodes(4, 1))
    assert len(NestedEpisodes(characters, images=109, seed=0)) == 108
    assert sorted(x.tolist()) == list(range(108))
    assert x.tolist() != sorted(x.tolist())
    assert len(labels.unique()) == 4  # its own class stands anywhere
    for first, memories in ((gather(nested.episodes(4, 1, first=5)), entries),):
        assert torch.equal(first[0], x[:5])
        assert torch.equal(first[1], memories[:5])
    other = gather(NestedEpisodes(characters, images=None, seed=1).episodes(4, 1))
    assert not torch.equal(other[0], x)


def test_large_memories_come_in_parts(characters, monkeypatch):
    nested = NestedEpisodes(characters, images=30, seed=0)
    whole = gather(nested.episodes(18, 5))
    monkeypatch.setattr(NestedEpisodes, "_parts", lambda self, first, size: iter([range(7), range(7, 30)]))
    for one, other in zip(whole, gather(nested.episodes(18, 5)), strict=True):
        assert torch.equal(one, other)


def test_within_an_alphabet(characters):
    nested = NestedEpisodes(characters, images=60, seed=0, within_alphabet=True, smallest_alphabet=5)
    x, entries, _, _ = gather(nested.episodes(5, 2))
    assert (x // 6 < 16).all()  # the third alphabet has two classes
    assert ((entries // 6) // 8 == (x // 6 // 8)[:, None]).all()
    with pytest.raises(ValueError, match=r"^classes: expected 1 to 8, those to choose from, got 9$"):
        next(nested.episodes(9, 1))


def test_pooled(characters):
    nested = NestedEpisodes(characters, images=50, seed=0)
    targets = gather(nested.episodes(2, 1))[0]
    x, few, _, _ = gather(nested.pooled(2, 3))
    assert torch.equal(x, targets)
    again, all_but_target, _, _ = gather(nested.pooled(2, 11))
    assert torch.equal(again, x)
    absent = 0
    for i in range(50):
        assert set(few[i].tolist()) <= set(all_but_target[i].tolist())
        assert len(all_but_target[i].unique()) == 11
        assert int(x[i]) not in all_but_target[i].tolist()
        assert len((all_but_target[i] // 6).unique()) == 2
        absent += not (few[i] // 6 == x[i] // 6).any()
    assert 0 < absent < 25  # P = C(6,3) / C(11,3) = 0.12
    # With replacement the target is in its own memory of n entries of its class with 1 - (5/6)^n.
    _, own, _, _ = gather(NestedEpisodes(characters, images=None, seed=0).pooled(1, 4, replacement=True))
    x = gather(NestedEpisodes(characters, images=None, seed=0).episodes(1, 1))[0]
    share = (own == x[:, None]).any(1).double().mean().item()
    expected = 1 - (5 / 6) ** 4
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 108) ** 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: next(n.episodes(2, 6)), "shots: expected 1 to 5, got 6"),
        (lambda n: next(n.episodes(19, 1)), "classes: expected 1 to 18, those to choose from, got 19"),
        (lambda n: next(n.pooled(2, 12)), "entries: expected 1 to 11, the images of 2 classes, got 12"),
        (lambda n: NestedEpisodes(n.of, images=0, seed=0), "images: expected at least 1, got 0"),
        (
            lambda n: NestedEpisodes(n.of, images=3, seed=0, within_alphabet=True, smallest_alphabet=9),
            "smallest_alphabet: expected at most 8, the largest there is, got 9",
        ),
        (
            lambda n: NestedEpisodes(n.of.of_classes([0]), images=3, seed=0, within_alphabet=True),
            r"within_alphabet: expected groups \(alphabets\) of 2 classes or more, got groups of one each",
        ),
    ],
)
def test_one_line_errors(characters, call, message):
    nested = NestedEpisodes(characters, images=5, seed=0)
    nested.of = characters
    with pytest.raises(ValueError, match=f"^{message}"):
        call(nested)


def test_a_bank_is_encoded_once_for_memories_of_all_sizes(characters):
    torch.manual_seed(0)
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    guide = Guide(networks)
    nested = NestedEpisodes(characters, images=7, seed=1)
    tasks = ((3, 1), (5, 2), (18, 5))
    plain = [classify(guide, e.memory, e.x) for task in tasks for e in nested.episodes(*task)]
    seen = []
    encode = networks.encode
    networks.encode = lambda entries: seen.append(len(entries)) or encode(entries)
    guide.train()
    once = encoded_bank(guide, nested)
    assert guide.training
    found = [classify(guide, e.memory, e.x) for task in tasks for e in encoded(guide, once.episodes(*task))]
    found += [classify(guide, e.memory, e.x) for e in once.episodes(4, 3)]
    plain += [classify(guide, e.memory, e.x) for e in nested.selecting_from(nested.bank()).episodes(4, 3)]
    assert (seen[0], len(seen)) == (18 * 6, 2)  # the second of another bank
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
