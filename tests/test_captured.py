"""Captured updates: bit for bit what the program does, and given up where they cannot be."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from programs import CATEGORICAL
from vma_pyro import BernoulliPixels, ContinuousBernoulli, Guide, InnerProduct, Memory, MLPNetworks, Model
from vma_pyro.data import EpisodeSampler, glyphs
from vma_pyro.infer import MultiSampleELBO, make
from vma_pyro.training import TrainConfig, fit
from vma_pyro.training.captured import Captured
from vma_pyro.training.loss import Loss

B, S, K = 5, 7, 3
NOT_RECORDED = {
    "nvil",
    "measure-valued",
    "measure-valued+common",
    "double-cv",
    "double-cv+common",
    "rodeo",
    "vimco+2z",
    "vimco+chunks",
    "pyro-enum",
}


def build(name="vimco", model=Model):
    torch.manual_seed(0)
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    return make(name, K)(model(networks), Guide(networks))


def trained(loss_fn, data, gradient):
    """Losses and weights after some updates on the same noise."""
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
    torch.manual_seed(1)
    losses = []
    for memory, x in data:
        losses.append(gradient(memory, x))
        optimizer.step()
    return torch.stack(losses), [p.detach().clone() for p in loss_fn.parameters()], torch.get_rng_state()


def plainly(loss_fn, data):
    def gradient(memory, x):
        loss_fn.zero_grad()
        loss = loss_fn(memory, x) / len(x)
        loss.backward()
        return loss.detach()

    return trained(loss_fn, data, gradient)


def assert_same(ours, theirs):
    for a, b in zip([ours[0], *ours[1], ours[2]], [theirs[0], *theirs[1], theirs[2]], strict=True):
        assert (a == b).all()


@pytest.fixture
def data(random_images):
    memories = [Memory(random_images(S)) for _ in range(3)]
    return [(memories[i % 3], random_images(B)) for i in range(5)]


@pytest.fixture
def notes():
    return []


@pytest.fixture(autouse=True)
def parameters_in_modules():
    before = pyro.settings.get("module_local_params")
    pyro.settings.set(module_local_params=True)
    yield
    pyro.settings.set(module_local_params=before)


@pytest.mark.parametrize("name", sorted({*CATEGORICAL} - {"jsa"}))  # which wants the same data in every update
def test_replays_are_the_program_bit_for_bit(name, data, notes):
    loss_fn = build(name)
    captured = Captured(loss_fn, note=notes.append, wait=1)
    ours = trained(loss_fn, data, captured.gradient)
    assert_same(ours, plainly(build(name), data))
    assert captured.possible == (name not in NOT_RECORDED)
    assert len(notes) == (name in NOT_RECORDED)
    assert captured.replays == (4 if captured.possible else captured.replays)
    assert len(captured._graphs) == captured.possible


def test_the_plain_loss_has_the_same_method(data):
    loss_fn = build()
    assert_same(trained(loss_fn, data, Loss(loss_fn).gradient), plainly(build(), data))


def test_shapes_may_change_and_own_memories_are_run_as_usual(random_images, notes):
    sizes = [(S, B), (4, B), (S, 2), (S, B), (4, B)]
    data = [(Memory(random_images(s)), random_images(b)) for s, b in sizes]
    data.insert(2, (Memory(random_images(B, S)), random_images(B)))
    loss_fn = build()
    captured = Captured(loss_fn, note=notes.append, wait=0)
    assert_same(trained(loss_fn, data, captured.gradient), plainly(build(), data))
    assert (captured.replays, notes) == (5, [])


class Tempered(Model):
    """With a temperature among its attributes."""

    temperature = 1.0

    def likelihood(self, logits):
        return super().likelihood(logits / self.temperature)


@pytest.mark.parametrize(("temperatures", "replays"), [([1.0, 1.0, 0.5, 1.0, 0.5], 5), ([1, 2, 3, 4, 5], 3)])
def test_attributes_may_change(temperatures, replays, data, notes, monkeypatch):
    monkeypatch.setattr("vma_pyro.training.captured.MOST", 3)
    found = []
    for capture in (True, False):
        loss_fn = build(model=Tempered)
        captured = Captured(loss_fn, note=notes.append, wait=0 if capture else 99)
        schedule = iter(temperatures)

        def gradient(memory, x, loss_fn=loss_fn, captured=captured, schedule=schedule):
            loss_fn.model.temperature = next(schedule)
            return captured.gradient(memory, x)

        found.append(trained(loss_fn, data, gradient))
        assert captured.replays == (replays if capture else 0)
    assert_same(*found)
    assert len(notes) == (len(set(temperatures)) > 3)


class Optioned(Model):
    """With temperatures in a dictionary and in an object."""

    def __init__(self, networks):
        super().__init__(networks)
        self.options = {"decoder": [1.0], "more": SimpleNamespace(temperature=1.0)}

    def likelihood(self, logits):
        return super().likelihood(logits / self.options["decoder"][0] / self.options["more"].temperature)


def assert_same_while_changing(model, change, values, data, notes):
    """Replays are the program's updates, with a change of the model before each of them."""
    found = []
    for wait in (0, 99):
        loss_fn = build(model=model)
        captured, schedule = Captured(loss_fn, note=notes.append, wait=wait), iter(values)

        def gradient(memory, x, loss_fn=loss_fn, captured=captured, schedule=schedule):
            change(loss_fn.model, next(schedule))
            return captured.gradient(memory, x)

        found.append(trained(loss_fn, data, gradient))
    assert_same(*found)
    assert notes == []


@pytest.mark.parametrize("where", ["in a list", "in an object"])
def test_numbers_in_containers_may_change(where, data, notes):
    def change(model, value):
        if where == "in a list":
            model.options["decoder"][0] = value
        else:
            model.options["more"].temperature = value

    assert_same_while_changing(Optioned, change, (1.0, 1.0, 1.0, 0.5, 1.0), data, notes)


class Limited(Model):
    """With limits of which one is None."""

    def __init__(self, networks):
        super().__init__(networks)
        self.low, self.high = None, 2.0

    def likelihood(self, logits):
        return super().likelihood(logits.clamp(self.low, self.high))


def test_nothing_is_a_value_too(data, notes):
    def change(model, limits):
        model.low, model.high = limits

    low, high = (0.1, None), (None, 0.1)
    assert_same_while_changing(Limited, change, (high, high, low, high, low), data, notes)


class Keeping(Model):
    """Counts in a dictionary."""

    def __init__(self, networks):
        super().__init__(networks)
        self.stats = {"calls": 0}

    def likelihood(self, logits):
        self.stats["calls"] += 1
        return super().likelihood(logits)


def test_one_line_says_when_there_are_too_many_recordings(data, notes, monkeypatch):
    monkeypatch.setattr("vma_pyro.training.captured.MOST", 2)
    loss_fn = build(model=Keeping)
    captured = Captured(loss_fn, note=notes.append, wait=0)
    assert_same(trained(loss_fn, data, captured.gradient), plainly(build(model=Keeping), data))
    assert captured.replays == 2
    (note,) = notes
    assert note.startswith("capture: 2 recordings are made, and no more, although")


def test_weights_that_are_frozen_on_the_way_stay(data, notes):
    found = []
    for wait in (0, 99):
        loss_fn = build()
        captured, frozen = Captured(loss_fn, note=notes.append, wait=wait), iter((True, True, False, False, True))
        weight = next(iter(loss_fn.parameters()))

        def gradient(memory, x, captured=captured, frozen=frozen, weight=weight):
            weight.requires_grad_(next(frozen))
            loss = captured.gradient(memory, x)
            assert (weight.grad is not None) == weight.requires_grad
            return loss

        found.append(trained(loss_fn, data, gradient))
    assert_same(*found)
    assert notes == []


def test_hooks_on_gradients_are_called(data, notes):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    found = []
    for wait in (0, 99):
        loss_fn = build()
        for parameter in loss_fn.parameters():
            parameter.register_post_accumulate_grad_hook(halve)
        found.append(trained(loss_fn, data, Captured(loss_fn, note=notes.append, wait=wait).gradient))
    assert_same(found[0], found[1])
    with pytest.raises(AssertionError):
        assert_same(found[0], plainly(build(), data))  # Adam's epsilon sees it


def test_images_may_lie_otherwise_in_memory(data, notes):
    turned = [
        (Memory(memory.entries.transpose(-1, -2)), x.flip(-1)) if number % 2 else (memory, x.transpose(-1, -2))
        for number, (memory, x) in enumerate(data)
    ]
    captured = Captured(build(), note=notes.append, wait=0)
    assert_same(
        trained(captured.loss_fn, data[:1] + turned, captured.gradient), plainly(build(), data[:1] + turned)
    )
    assert notes == []


class Secretive(Model):
    """Changes where nobody looks."""

    def __init__(self, networks):
        super().__init__(networks)
        runs = itertools.count(1)
        self.runs = lambda: next(runs)

    def likelihood(self, logits):
        return super().likelihood(logits / self.runs())


class Curious(Model):
    """Looks at the values of x."""

    def forward(self, memory, x=None):
        assert x.sum() >= 0
        return super().forward(memory, x)


class Counting(Model):
    """Has a buffer."""

    def __init__(self, networks):
        super().__init__(networks)
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Secretive, "replay 1 differs from the program"),
        (Curious, "the program cannot be recorded: it looks at the values of tensors"),
        (Counting, "the program cannot be recorded: it has buffers, which it may change"),
    ],
)
def test_programs_that_cannot_be_replayed_are_run(model, reason, data, notes):
    loss_fn = build(model=model)
    captured = Captured(loss_fn, note=notes.append, wait=2)
    ours = trained(loss_fn, data, captured.gradient)
    assert notes == [f"capture: {reason}; updates are made without it"]
    assert not captured.possible
    if model is not Secretive:  # recording and comparing were runs, too
        assert_same(ours, plainly(build(model=model), data))


def test_bad_images_are_refused_by_replays_too(data):
    captured = Captured(build(), wait=0)
    memory, x = data[0]
    captured.gradient(memory, x)
    for bad, message in (
        (x * 0.5, r"^x: expected binary values 0 and 1"),
        (x * float("nan"), r"^x: expected finite values"),
        (x[:, :, 1:], r"^x: expected shape \[B, 1, 28, 28\]"),
    ):
        with pytest.raises(ValueError, match=message):
            captured.gradient(memory, bad)


class Grey(Model):
    """A likelihood for grey images, which asks for no binary ones."""

    def forward(self, memory, x=None):
        memory = Memory.of(memory).encode(self.networks)
        with pyro.plate("data", len(x), dim=-1):
            m = memory.read(pyro.sample("address", dist.Categorical(logits=self.address_prior(memory))))
            z = pyro.sample("z", self.networks.prior(m))
            pyro.sample("x", dist.ContinuousBernoulli(logits=self.networks.decode(z, m)).to_event(3), obs=x)


def test_grey_images_are_replayed_where_the_program_takes_them(data, notes):
    grey = [(Memory(0.9 * memory.entries), 0.3 + 0.4 * x) for memory, x in data]
    captured = Captured(build(model=Grey), note=notes.append, wait=0)
    assert_same(trained(captured.loss_fn, grey, captured.gradient), plainly(build(model=Grey), grey))
    assert captured.replays == len(grey)
    assert notes == []


def test_training_is_the_same_with_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr("vma_pyro.training.captured.WAIT", 2)
    characters = glyphs.load(classes=20)

    def weights(folder, capture):
        torch.manual_seed(0)
        networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
        model, guide = Model(networks), Guide(networks)
        config = TrainConfig(updates=12, warmup_updates=2, log_every=3, accelerator="cpu", capture=capture)
        episodes = EpisodeSampler(characters, classes=3, shots=2, queries=5, seed=0)
        fit(
            model,
            guide,
            MultiSampleELBO(K),
            episodes,
            config=config,
            folder=folder,
            show_progress=False,
        )
        return [p.detach().clone() for p in guide.parameters()]

    for a, b in zip(weights(tmp_path / "a", True), weights(tmp_path / "b", False), strict=True):
        assert (a == b).all()


def test_masks_of_padding_are_data(data, notes):
    """Each call has its own, and the replay is the program's bit for bit."""
    masked = []
    for number, (memory, x) in enumerate(data):
        mask = torch.rand(S) < 0.5
        mask[number] = True
        masked.append((Memory(memory.entries, mask=mask), x))
    captured = Captured(build(), note=notes.append, wait=0)
    assert_same(trained(captured.loss_fn, masked, captured.gradient), plainly(build(), masked))
    assert captured.replays == len(masked)
    assert notes == []


def test_entries_are_looked_at_in_a_replay(data):
    captured = Captured(build(), wait=0)
    (memory, x), *_ = data
    captured.gradient(memory, x)
    with pytest.raises(
        ValueError, match="^memory.entries: expected binary values 0 and 1, got values from 0 to 0.5"
    ):
        captured.gradient(Memory(0.5 * memory.entries), x)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside):
        self.inside = inside


HELD = {
    "a tensor": (torch.tensor, lambda held: held),
    "an array": (np.array, float),
    "a number of numpy": (np.float64, float),
    "an object with slots": (Slotted, lambda held: held.inside),
    "a partial function": (lambda t: functools.partial(float, t), lambda held: held()),
    "a large tensor": (lambda t: torch.full((1000,), t), lambda held: held.mean()),
}


class Warm(BernoulliPixels):
    """Has a temperature that may be held by anything."""

    def __init__(self, make, read):
        super().__init__()
        self.make, self.read = make, read
        self.set(1.0)

    def set(self, temperature):
        self.held = self.make(temperature)

    def forward(self, decoded):
        return dist.Bernoulli(logits=decoded * self.read(self.held)).to_event(3)


@pytest.mark.parametrize("held", HELD)
def test_whatever_holds_a_temperature_may_change(held, data):
    """Right at once, and not at the next comparison with the program."""
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    likelihood = Warm(*HELD[held])
    loss_fn = make("vimco", K)(Model(networks, likelihood=likelihood), Guide(networks))
    captured, plain = Captured(loss_fn, wait=0, note=pytest.fail), Loss(loss_fn)
    memory, x = data[0]
    for temperature in (1.0, 1.0, 1.0, 0.5, 2.0, 0.5):
        likelihood.set(temperature)
        losses = []
        for loss in (captured, plain):
            torch.manual_seed(3)
            losses.append(loss.gradient(memory, x).item())
        assert losses[0] == losses[1]
    assert captured.replays == 6


@pytest.mark.parametrize(
    "exchange",
    [
        lambda model, guide: setattr(model, "likelihood", ContinuousBernoulli()),
        lambda model, guide: setattr(guide, "similarity", InnerProduct()),
    ],
)
def test_modules_may_be_exchanged(exchange, data):
    networks = MLPNetworks(4, hidden_dims=(9, 8), key_dim=6)
    model, guide = Model(networks), Guide(networks)
    loss_fn = make("vimco", K)(model, guide)
    captured, plain = Captured(loss_fn, wait=0), Loss(loss_fn)
    memory, x = data[0]
    for update in range(8):
        if update == 5:
            exchange(model, guide)
        found = []
        for loss in (captured, plain):
            torch.manual_seed(3)
            value = loss.gradient(memory, x)
            found.append([value, *(p.grad.clone() for p in guide.similarity.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert captured.possible
