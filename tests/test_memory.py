"""Memory: reading, encoding once, and refusing what is no memory."""

import copy
import math
import pickle

import pytest
import torch

from vma_pyro import Guide, Memory, MLPNetworks, Model
from vma_pyro.evaluation import address_posterior, log_likelihood
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.memory import SelectedMemory

B, S = 3, 5


class CountingNetworks(MLPNetworks):
    """Counts the entries that it encodes."""

    def __init__(self):
        super().__init__(4, hidden_dims=(8, 7), key_dim=6)
        self.encoded = self.headed = 0

    def encode(self, entries):
        self.encoded += len(entries)
        return super().encode(entries)

    def heads(self, encoded):
        self.headed += len(encoded.key)
        return super().heads(encoded)


def test_read_shared_and_per_datapoint():
    entries = torch.arange(B * S * 2.0).reshape(B, S, 2)
    own = Memory(entries, event_dim=1)
    shared = Memory(entries[0], event_dim=1)
    address = torch.tensor([[4, 0, 2], [1, 1, 3]])  # [K, B]
    for k in range(2):
        for b in range(B):
            assert (own.read(address)[k, b] == entries[b, address[k, b]]).all()
            assert (shared.read(address)[k, b] == entries[0, address[k, b]]).all()
    enumerated = torch.arange(S).reshape(S, 1, 1)
    assert own.read(enumerated).shape == (S, 1, B, 2)
    assert shared.read(enumerated).shape == (S, 1, 1, 2)
    assert (own.read(enumerated)[:, 0] == entries.transpose(0, 1)).all()


@pytest.mark.parametrize("lead", [(S,), (B, S)])
def test_each_entry_is_encoded_once_per_update(lead, random_images):
    networks = CountingNetworks()
    loss_fn = MultiSampleELBO(4, max_plate_nesting=1)(Model(networks), Guide(networks))
    optimizer = torch.optim.Adam(loss_fn.parameters())
    memory, x = Memory(random_images(*lead)), random_images(B)
    entries = memory.entries.flatten(0, -4).shape[0]
    loss_fn(memory, x)  # the first call has a look at the programs
    networks.encoded = 0
    for update in range(1, 4):
        loss_fn(memory, x).backward()
        optimizer.step()
        assert networks.encoded == update * entries


@pytest.mark.parametrize("lead", [(8,), (B, 8)])
@pytest.mark.parametrize("K", [2, 4, 10])
def test_heads_are_computed_of_reads_or_of_entries_whichever_are_fewer(lead, K, random_images):
    networks = CountingNetworks()
    loss_fn = MultiSampleELBO(K, max_plate_nesting=1)(Model(networks), Guide(networks))
    memory, x = Memory(random_images(*lead)), random_images(B)
    loss_fn(memory, x)  # the first call has a look at the programs
    networks.headed = 0
    for update in range(1, 3):
        loss_fn(memory, x).backward()
        assert networks.headed == update * min(K * B, memory.entries.flatten(0, -4).shape[0])


@pytest.mark.parametrize("lead", [(S,), (B, S)])
@pytest.mark.parametrize("dtype", [torch.long, torch.float])
def test_reads_are_heads_of_the_entries(lead, dtype, random_images):
    """Values and gradients, of few reads and of many, addressed and weighted, after a look without gradients."""
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    entries = random_images(*lead)
    rows = networks.heads(networks.encode(entries.flatten(0, -4))).stem.reshape(*lead, -1).expand(B, S, -1)
    for K in (1, 7):
        weights = torch.rand(K, B, S)
        address = torch.randint(S, (K, B)) if dtype == torch.long else weights
        if dtype == torch.long:
            weights = torch.nn.functional.one_hot(address, S).float()
        expected = torch.einsum("kbs,bsf->kbf", weights, rows)
        memory = Memory(entries).encode(networks)
        with torch.no_grad():
            memory.read(address.clone())
        found = memory.read(address).stem
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad((out**3).sum(), networks.pyramid[1].weight, retain_graph=True)[0]
            for out in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_an_encoding_belongs_to_its_networks(random_images):
    networks, other = CountingNetworks(), CountingNetworks()
    memory, x = Memory(random_images(S), torch.arange(S)), random_images(B)
    encoded = memory.encode(networks)
    assert encoded.encode(networks) is encoded
    assert encoded.encode(other).networks is other
    assert memory.encode(networks) is not encoded  # parameters may have changed
    assert encoded.entries is memory.entries
    assert encoded.labels is memory.labels
    assert (encoded.size, encoded.batch_size, encoded.entry_shape) == (S, None, (1, 28, 28))
    assert vars(memory).keys() == vars(Memory(memory.entries)).keys()  # nothing is left on it
    model, guide = Model(networks), Guide(networks)
    networks.encoded = 0
    for arguments, names in (((encoded, x), {}), ((encoded,), {"x": x}), ((), {"memory": encoded, "x": x})):
        MultiSampleELBO(2)(model, guide)(*arguments, **names)
    assert networks.encoded == 0


@pytest.mark.parametrize("by_name", [False, True])
def test_the_memory_may_go_by_name_and_programs_may_take_more(by_name, random_images):
    """What is prepared keeps the way in which it was given."""

    class Shifted(Model):
        def forward(self, memory, x=None, *, shift=0.0):
            assert shift == 2.0
            return super().forward(memory, x)

    class Shifting(Guide):
        def forward(self, memory, x, *, shift=0.0):
            assert shift == 2.0
            super().forward(memory, x)

    networks = CountingNetworks()
    loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(Shifted(networks), Shifting(networks))
    memory, x = Memory(random_images(S)), random_images(B)
    for _ in range(2):
        networks.encoded = 0
        loss = loss_fn(memory=memory, x=x, shift=2.0) if by_name else loss_fn(memory, x, shift=2.0)
    assert networks.encoded == S
    assert loss.isfinite()


@pytest.mark.parametrize("own", [False, True])
def test_an_encoding_without_gradients_is_made_again_where_they_are_wanted(own, random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    loss_fn = MultiSampleELBO(3, max_plate_nesting=1)(Model(networks), Guide(networks))
    bank, x = Memory(random_images(S)), random_images(B)
    rows = torch.randint(S, (B, 4))

    def gradients(bank):
        loss_fn.zero_grad()
        torch.manual_seed(0)
        loss_fn(SelectedMemory(bank, rows) if own else bank, x).backward()
        return [parameter.grad.clone() for parameter in loss_fn.parameters()]

    gradients(bank)  # after the first look at the programs
    expected = gradients(bank)
    with torch.no_grad():
        encoded = bank.encode(networks)
    for ours, theirs in zip(gradients(encoded), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_memory_of_ones_own_masks_as_it_says(random_images):
    class WithoutFirst(Memory):
        def masked(self, logits):
            return logits.masked_fill(torch.arange(self.size) == 0, -math.inf)

    class Twice(Memory):
        def read(self, address):
            return 2 * super().read(address)

    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    guide, x = Guide(networks), random_images(B)
    assert (address_posterior(guide, WithoutFirst(random_images(S)), x)[:, 0] == 0).all()
    with pytest.raises(TypeError, match="^memory: expected the method `read` of Memory, got that of Twice"):
        Twice(random_images(S)).encode(networks)


def test_in_inference_mode(random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    with torch.inference_mode():
        images = Model(networks)(random_images(S), num_images=2)
        Guide(networks)(Memory(random_images(S)), random_images(B))
    assert images.shape == (2, 1, 28, 28)


def test_two_losses_of_one_memory_have_graphs_of_their_own(random_images):
    networks = CountingNetworks()
    loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(Model(networks), Guide(networks))
    memory, x = Memory(random_images(S)), random_images(B)
    first, second = loss_fn(memory, x), loss_fn(memory, x)
    first.backward()
    second.backward()


@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_never_sees_old_weights(fused, random_images):
    """Fused optimizers do not raise the version counters of the parameters."""
    networks = CountingNetworks()
    model, guide = Model(networks), Guide(networks)
    loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.1, fused=fused)
    memory, x = Memory(random_images(S)), random_images(B)
    for _ in range(3):
        loss_fn(memory, x).backward()
        optimizer.step()
        bound = log_likelihood(model, guide, memory, x, num_samples=5)
        assert (bound == log_likelihood(model, guide, Memory(memory.entries), x, num_samples=5)).all()


def test_evaluation_encodes_once(random_images, monkeypatch):
    monkeypatch.setattr("vma_pyro.evaluation.chunks.READS_PER_CHUNK", 2 * B)
    networks = CountingNetworks()
    log_likelihood(Model(networks), Guide(networks), Memory(random_images(S)), random_images(B), num_samples=20)
    assert networks.encoded == S
    log_likelihood(Model(networks), Guide(networks), Memory(random_images(B, S)), random_images(B), num_samples=20)
    assert networks.encoded == S + B * S


def test_two_backward_passes_without_an_update(random_images):
    networks = CountingNetworks()
    loss_fn = MultiSampleELBO(2, max_plate_nesting=1)(Model(networks), Guide(networks))
    memory, x = Memory(random_images(S)), random_images(B)
    gradients = []
    for _ in range(2):
        loss_fn.zero_grad()
        torch.manual_seed(0)
        loss_fn(memory, x).backward()
        gradients.append([p.grad.clone() for p in loss_fn.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert (first == second).all()


def test_copies_and_slices(random_images):
    networks = CountingNetworks()
    memory = Memory(random_images(B, S), torch.arange(S).expand(B, -1))
    encoded = memory.encode(networks)
    for twin in (
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
        memory.to("cpu"),
        encoded.to("cpu"),
        copy.copy(encoded),
        copy.deepcopy(encoded),
        pickle.loads(pickle.dumps(encoded)),
    ):
        assert (twin.entries == memory.entries).all()
        assert (twin.labels == memory.labels).all()
    part = memory.datapoints(slice(1, 3))
    assert part.batch_size == 2
    assert (part.entries == memory.entries[1:3]).all()
    shared = Memory(random_images(S))
    assert shared.datapoints(slice(1, 3)) is shared
    assert (shared.size, shared.batch_size, shared.entry_shape) == (S, None, (1, 28, 28))


class TestErrors:
    def test_no_entries(self):
        with pytest.raises(
            ValueError, match=r"^memory.entries: expected at least one entry, got shape \[0, 1, 28"
        ):
            Memory(torch.zeros(0, 1, 28, 28))
        with pytest.raises(ValueError, match=r"^memory.entries: expected at least one entry"):
            Memory(torch.zeros(2, 0, 1, 28, 28))

    def test_dimensions(self):
        with pytest.raises(ValueError, match=r"^memory.entries: expected 4 dimensions \[S, \*E\] or 5"):
            Memory(torch.zeros(28, 28))

    def test_nan(self):
        with pytest.raises(
            ValueError, match=r"^memory.entries: expected finite values, got 784 NaN or infinite of 1568$"
        ):
            Memory(torch.stack([torch.zeros(1, 28, 28), torch.full((1, 28, 28), float("nan"))]))

    def test_labels(self):
        with pytest.raises(
            ValueError, match=r"^memory.labels: expected shape \[5\], one label per entry, got \[4\]"
        ):
            Memory(torch.zeros(5, 1, 28, 28), torch.zeros(4))

    def test_address_of_another_batch(self):
        with pytest.raises(ValueError, match=r"^address: expected shape \[..., 2\], got \[3\]$"):
            Memory(torch.zeros(2, 5, 1, 28, 28)).read(torch.zeros(3, dtype=torch.long))
