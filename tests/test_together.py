"""All images of an episode at once: scores against closed forms, assignments against all there are."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel
from vma_pyro.data import Characters, MatchingEpisodes, glyphs
from vma_pyro.evaluation import assign, classify_by_likelihood, entry_log_likelihood, match_scores

D, C, NOISE, SPREAD = 3, 4, 0.5, 1.5
DOUBLE = {"dtype": torch.float64}


def log_x_given(m, x):
    return dist.Normal(m, NOISE).to_event(1).log_prob(x)


def model(memory, x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("address", dist.Categorical(logits=torch.zeros(memory.size, **DOUBLE)))
        pyro.sample("x", dist.Normal(memory.read(a), NOISE).to_event(1), obs=x)


def guide(memory, x):
    with pyro.plate("data", len(x)):
        pyro.sample("address", dist.Categorical(logits=-((memory.entries - x[:, None]) ** 2).sum(-1)))


def memoryless(memory, x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(D, **DOUBLE), SPREAD).to_event(1), obs=x)


def nothing(memory, x):
    with pyro.plate("data", len(x)):
        pass


@pytest.fixture
def episode():
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0, 1, 2, 3, 1, 2, 2])
    memory = Memory(torch.randn(7, D, generator=generator, **DOUBLE), labels, event_dim=1)
    return memory, torch.randn(5, D, generator=generator, **DOUBLE)


def test_scores_are_the_closed_forms(episode):
    memory, x = episode
    found = match_scores(model, guide, memory, x, memoryless=(memoryless, nothing), num_samples=2)
    m, labels = memory.entries, memory.labels
    each = torch.stack([log_x_given(entry, x) for entry in m], 1)  # [B, S], and of either given the other
    alone = dist.Normal(torch.zeros(D, **DOUBLE), SPREAD).to_event(1).log_prob(m)
    for c in range(C):
        of_class = labels == c
        forward = each[:, of_class].logsumexp(1) - math.log(int(of_class.sum()))
        explained = (each - alone)[:, of_class].mean(1)
        torch.testing.assert_close(found.likelihood[:, c], forward)
        torch.testing.assert_close(found.both_ways[:, c], forward + explained)
        q = (-((m - x[:, None]) ** 2).sum(-1)).softmax(1)[:, of_class].sum(1)
        torch.testing.assert_close(found.guide[:, c], q.log())


def test_the_likelihood_of_entries_is_what_classification_sums(episode):
    memory, x = episode
    found = entry_log_likelihood(model, guide, memory, x, num_samples=3)
    expected = torch.stack([log_x_given(entry, x) for entry in memory.entries], 1) - math.log(memory.size)
    torch.testing.assert_close(found, expected)
    probs = classify_by_likelihood(model, guide, memory, x)
    by_hand = torch.stack([found.softmax(1)[:, memory.labels == c].sum(1) for c in range(C)], 1)
    torch.testing.assert_close(probs, by_hand)


@pytest.mark.parametrize(("images", "classes"), [(4, 4), (3, 5), (1, 2)])
def test_the_assignment_has_the_largest_sum_of_all(images, classes):
    for seed in range(20):
        scores = torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))
        found = assign(scores)
        assert found.unique().numel() == images
        total = scores[torch.arange(images), found].sum().item()
        sums = [
            sum(scores[i, c].item() for i, c in enumerate(order))
            for order in itertools.permutations(range(classes), images)
        ]
        assert total == pytest.approx(max(sums), abs=1e-5)


def test_what_cannot_be_assigned_is_refused(episode):
    for scores, message in (
        (torch.zeros(3, 2), "scores: expected at least as many classes as images, 3, got 2"),
        (torch.full((2, 2), math.nan), "scores: expected numbers or minus infinity, got NaN or infinity"),
        (torch.full((2, 2), -math.inf), "scores: expected an assignment of finite scores, found none"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            assign(scores)
    memory, x = episode
    one_each = Memory(memory.entries.expand(5, -1, -1), memory.labels.expand(5, -1), event_dim=1)
    missing = Memory(memory.entries, torch.tensor([0, 0, 2, 2, 2, 3, 3]), event_dim=1)
    for other, message in (
        (one_each, "memory: expected a Memory that all images share, without a mask, got another Memory"),
        (missing, r"memory.labels: expected entries of all classes, got \[2, 0, 3, 2\] of them"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            match_scores(model, guide, other, x, memoryless=(memoryless, nothing))


def test_image_models(random_images):
    networks = ConvNetworks(4, width=0.1, key_dim=4, hidden_dim=8)
    memory, x = Memory(random_images(3), torch.arange(3)), random_images(3)
    found = match_scores(
        Model(networks),
        Guide(networks),
        memory,
        x,
        memoryless=(MemorylessModel(networks), MemorylessGuide(networks)),
    )
    assert all(score.shape == (3, 3) and bool(score.isfinite().all()) for score in found)


@pytest.mark.parametrize("within", [True, False])
def test_every_class_in_memory_has_one_target_which_is_not_there(within):
    characters = glyphs.load(classes=24, examples=5)
    episodes = MatchingEpisodes(characters, number=20, seed=3, within_alphabet=within)
    assert len(episodes) == 20
    alphabet = {image.tobytes(): characters.groups[i // 5] for i, image in enumerate(characters.pixels)}
    kind = {image.tobytes(): i // 5 for i, image in enumerate(characters.pixels)}
    seen = set()
    for e in episodes.episodes(3, 2):
        entries, x = (t.numpy().astype("uint8") for t in (e.memory.entries, e.x))
        assert sorted(e.labels.tolist()) == [0, 1, 2]
        assert e.memory.labels.tolist() == [0, 0, 1, 1, 2, 2]
        for image, label in zip(x, e.labels, strict=True):
            of_class = entries[e.memory.labels == label]
            assert {kind[image.tobytes()]} == {kind[m.tobytes()] for m in of_class}
            assert image.tobytes() not in {m.tobytes() for m in entries}
        groups = {alphabet[m.tobytes()] for m in entries}
        assert not within or len(groups) == 1
        seen |= groups
    assert len(seen) > 1
    again, other = (next(iter(episodes.episodes(3, 2))) for _ in range(2))
    assert torch.equal(again.x, other.x)


def test_too_many_classes_are_refused():
    images = glyphs.load(classes=6, examples=4)
    names = tuple("abcdef")
    characters = Characters(images.images, names, ("A", "A", "A", "B", "B", "B"))
    episodes = MatchingEpisodes(characters, number=1, seed=0, within_alphabet=True)
    with pytest.raises(
        ValueError, match="^classes: expected 1 to 3, the classes to choose from with more than 2 "
    ):
        next(episodes.episodes(4, 2))
    with pytest.raises(ValueError, match="^shots: expected at most 3, as a target is left, got 4$"):
        next(episodes.episodes(1, 4))
    with pytest.raises(ValueError, match="^number: expected at least 1, got 0$"):
        MatchingEpisodes(characters, number=0, seed=0)


def test_an_entry_that_cannot_be_is_no_matter_to_other_classes():
    """Uniform noise around the entry: the other class has no probability, and no NaN comes of it."""

    def boxes(memory, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("address", dist.Categorical(logits=torch.zeros(memory.size)))
            m = memory.read(a)
            pyro.sample("x", dist.Uniform(m - 1, m + 1, validate_args=False).to_event(1), obs=x)

    def any_of_them(memory, x):
        with pyro.plate("data", len(x)):
            pyro.sample("address", dist.Categorical(logits=torch.zeros(memory.size)))

    def wide(memory, x):
        with pyro.plate("data", len(x)):
            low = torch.full((2,), -9.0)
            pyro.sample("x", dist.Uniform(low, -low).to_event(1), obs=x)

    memory = Memory(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.arange(2), event_dim=1)
    with pyro.validation_enabled(False):
        found = match_scores(boxes, any_of_them, memory, memory.entries + 0.1, memoryless=(wide, nothing))
    own = 2 * math.log(1 / 2)
    expected = own + own - 2 * math.log(1 / 18)
    torch.testing.assert_close(found.both_ways.diagonal(), torch.full((2,), expected, **DOUBLE))
    assert bool(found.both_ways[[0, 1], [1, 0]].isneginf().all())
    assert assign(found.both_ways.requires_grad_()).tolist() == [0, 1]
    with pytest.raises(
        ValueError, match="^memory: expected a Memory that all images share, without a mask, got a Ten"
    ):
        match_scores(boxes, any_of_them, memory.entries, memory.entries, memoryless=(wide, nothing))
    with pytest.raises(ValueError, match=r"^scores: expected shape \[images, classes\], got \[3\]$"):
        assign(torch.zeros(3))
