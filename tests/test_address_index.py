"""Large memories: chunked addressing equals the plain one, bounds are bounds, files come back whole."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import vma_pyro.memory.exact
from vma_pyro import (
    AddressIndex,
    ContinuousBernoulli,
    CosineSimilarity,
    Guide,
    InnerProduct,
    LearnedAddress,
    Memory,
    MLPNetworks,
    Model,
)
from vma_pyro._system import checkpoint
from vma_pyro.evaluation import address_posterior, large_log_likelihood, log_likelihood, sample_images
from vma_pyro.memory import KeyedBank

B, S = 3, 11


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(vma_pyro.memory.exact, "CHUNK", 4)  # three chunks, the last one shorter


def build(similarity=None, learned=False):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model = Model(networks, address_prior=LearnedAddress(networks) if learned else None)
    return model, Guide(networks, similarity=similarity)


similarities = pytest.mark.parametrize(
    "similarity",
    [CosineSimilarity(), CosineSimilarity(centred=False), InnerProduct(scale=1.0)],
    ids=["cosine", "uncentred", "inner"],
)


@similarities
def test_the_posterior_is_that_of_the_plain_memory(similarity, random_images):
    model, guide = build(similarity)
    entries, x = random_images(S), random_images(B)
    index = AddressIndex.encode(model, guide, entries, chunk_size=5)
    expected = address_posterior(guide, Memory(entries), x).log()
    torch.testing.assert_close(index.posterior(x), expected)
    top = index.top(x, 6)
    values, addresses = expected.topk(6, dim=1)
    torch.testing.assert_close(top.log_prob, values)
    assert torch.equal(top.address, addresses)
    drawn = index.sample(x, 5)
    torch.testing.assert_close(drawn.log_prob, expected.gather(1, drawn.address))


def test_samples_have_the_frequencies_of_the_posterior(random_images):
    model, guide = build(learned=True)
    index = AddressIndex.encode(model, guide, random_images(S))
    x, n = random_images(B), 20000
    frequencies = nn.functional.one_hot(index.sample(x, n).address, S).float().mean(1)
    assert (frequencies - index.posterior(x).exp()).abs().max() < 4 * 0.5 / math.sqrt(n)
    prior = nn.functional.one_hot(index.sample_prior(n), S).float().mean(0)
    expected = index.log_prior(torch.arange(S)[None]).exp().squeeze(0)
    assert (prior - expected).abs().max() < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("learned", [False, True])
def test_the_prior_is_the_models(learned, random_images):
    model, guide = build(learned=learned)
    entries = random_images(S)
    index = AddressIndex.encode(model, guide, entries, chunk_size=4)
    logits = model.address_prior(Memory(entries).encode(model.networks)).detach()
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(index.log_prior(torch.arange(S)[None]).squeeze(0), expected)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("k", [1, 4, S])
def test_the_exact_part_gives_its_share_of_the_exact_bound(k, learned, random_images):
    model, guide = build(learned=learned)
    entries, x = random_images(S), random_images(B)
    index = AddressIndex.encode(model, guide, entries)
    ours = large_log_likelihood(index, x, num_samples=7, top=k)
    address = index.top(x, k).address
    part = Memory(entries[address])
    of_part = log_likelihood(model, guide, part, x, num_samples=7, address="exact")
    logits = model.address_prior(Memory(entries).encode(model.networks)).detach()
    share = logits[address].logsumexp(1) - logits.logsumexp(0)
    torch.testing.assert_close(ours, of_part + share.double(), rtol=0, atol=1e-3)
    assert bool((share.abs() > 0.1).all()) == (k < S)


@pytest.mark.parametrize("learned", [False, True])
def test_the_sampled_bound_agrees_with_the_plain_one(learned, random_images):
    # Small weights make p(x | z, m) depend little on z and m, a small scale q(a | x) on x: few samples suffice.
    model, guide = build(CosineSimilarity(scale=0.5), learned=learned)
    with torch.no_grad():
        for p in model.networks.parameters():
            p.mul_(0.1)
    entries, x = random_images(S), random_images(B)
    index = AddressIndex.encode(model, guide, entries)
    n = 2000
    ours = large_log_likelihood(index, x, num_samples=n)
    plain = log_likelihood(model, guide, Memory(entries), x, num_samples=n, seed=1)
    torch.testing.assert_close(ours, plain, atol=0.05, rtol=0)


def test_generates_from_entries_of_the_prior(random_images):
    model, guide = build()
    index = AddressIndex.encode(model, guide, random_images(S), torch.arange(S))
    images, read = sample_images(index, 7)
    assert images.shape == (7, 1, 28, 28)
    assert read.entries.shape == (7, 1, 1, 28, 28)
    assert torch.equal(index.entries[read.labels[:, 0]].float(), read.entries[:, 0])
    again, _ = sample_images(index, 7)
    assert torch.equal(images, again)


def test_half_precision_keys_cost_three_digits(random_images):
    model, guide = build()
    entries, x = random_images(S), random_images(B)
    exact = AddressIndex.encode(model, guide, entries).posterior(x)
    half = AddressIndex.encode(model, guide, entries, key_dtype=torch.bfloat16)
    assert half.kept.keys.dtype == torch.bfloat16
    torch.testing.assert_close(half.posterior(x), exact, atol=0.2, rtol=0)


def test_the_file_of_a_slice_holds_the_slice(tmp_path, random_images):
    model, guide = build()
    many = random_images(400).to(torch.uint8)
    AddressIndex.encode(model, guide, many[:S]).save(tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < many.nbytes / 4


def test_a_file_holds_entries_and_keys(tmp_path, random_images):
    model, guide = build()
    entries, x = random_images(S), random_images(B)
    index = AddressIndex.encode(model, guide, entries, torch.arange(S))
    index.save(tmp_path / "memory.pt")
    again = AddressIndex.load(tmp_path / "memory.pt", model, guide)
    assert torch.equal(again.posterior(x), index.posterior(x))
    assert torch.equal(again.labels, index.labels)
    assert again.entries.dtype == torch.uint8


def test_untied_networks_have_the_models_own_prior(random_images):
    torch.manual_seed(1)
    model, _ = build(learned=True)
    _, guide = build()
    entries, x = random_images(S), random_images(B)
    index = AddressIndex.encode(model, guide, entries)
    expected = model.address_prior(Memory(entries).encode(model.networks)).detach().log_softmax(-1)
    torch.testing.assert_close(index.log_prior(torch.arange(S)[None]).squeeze(0), expected)
    index.top(x, 1)
    with torch.no_grad():
        next(model.networks.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys"):
        index.top(x, 1)


class Wide(Model):
    """With a likelihood of its own, by a method."""

    def likelihood(self, decoded):
        return dist.Normal(decoded, 10.0).to_event(3)

    def check_values(self, memory, x):
        pass


@pytest.mark.parametrize("kind", [lambda n: Model(n, likelihood=ContinuousBernoulli()), Wide])
def test_grey_entries_stay_grey(kind, tmp_path, random_images):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=6)
    model, guide = kind(networks), Guide(networks)
    entries, x = 0.7 * random_images(S) + 0.1, 0.5 * random_images(B)
    AddressIndex.encode(model, guide, entries).save(tmp_path / "grey.pt")
    index = AddressIndex.load(tmp_path / "grey.pt", model, guide)
    torch.testing.assert_close(index.posterior(x), address_posterior(guide, Memory(entries), x).log())
    assert torch.equal(index.part(torch.tensor([[2, 0]])).entries, entries[None, [2, 0]])
    found = large_log_likelihood(index, x, num_samples=400, top=S)
    exact = log_likelihood(model, guide, Memory(entries), x, num_samples=400, address="exact")
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0.5)


@pytest.mark.parametrize("learned", [True, False])
def test_another_default_type_changes_nothing(learned, random_images):
    model, guide = build(learned=learned)
    entries, x = random_images(S), random_images(B)
    found = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            index = AddressIndex.encode(model, guide, entries, chunk_size=5)
            torch.manual_seed(0)
            values = [index.posterior(x), *index.top(x, 6), *index.sample(x, 5)]
            values += [index.log_prior(torch.arange(S)[None]), large_log_likelihood(index, x, num_samples=3)]
            found.append([value.double() for value in values])
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class TestRefusals:
    """One line each, that names the argument."""

    @pytest.mark.parametrize(
        ("address", "said"),
        [
            ([[0, S]], f"address: expected 0 to {S - 1}, those of the memory, got 0 to {S}"),
            ([[-1, 2]], f"address: expected 0 to {S - 1}, those of the memory, got -1 to 2"),
            ([[0.0, 1.0]], "address: expected int64, got torch.float32"),
            ([[True, False]], "address: expected int64, got torch.bool"),
        ],
    )
    def test_addresses_of_no_entry(self, address, said, random_images):
        index = AddressIndex.encode(*build(), random_images(S))
        for ask in (index.part, index.log_prior):
            with pytest.raises(ValueError, match=f"^{said}$"):
                ask(torch.tensor(address))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda x: 255 * x,
                r"x: expected values from 0 to 1 as memory.entries has, got up to 255; divide by 255",
            ),
            (lambda x: x / 0, r"x: expected finite values, got \d+ NaN or infinite of \d+"),
            (lambda x: x[:, :, 1:], r"x: expected shape \[B, 1, 28, 28\] like the memory's entries, got .*"),
            (lambda x: x[:0], r"x: expected at least one datapoint, got shape \[0, 1, 28, 28\]"),
        ],
    )
    def test_images_unlike_the_entries(self, change, said, random_images):
        index, x = AddressIndex.encode(*build(), random_images(S)), random_images(B)
        index.top(x, 2)  # what is right at first is looked at again
        for ask in (index.posterior, lambda x: index.top(x, 2), lambda x: index.sample(x, 2)):
            with pytest.raises(ValueError, match=f"^{said}$"):
                ask(change(x))

    @pytest.mark.parametrize("number", [0, -3, 2.5])
    def test_chunks_of_no_size(self, number, random_images):
        with pytest.raises(ValueError, match=f"^chunk_size: expected (at least 1|an int), got {number}$"):
            AddressIndex.encode(*build(), random_images(S), chunk_size=number)

    def test_other_parameters(self, random_images):
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        index.top(random_images(B), 1)
        with torch.no_grad():
            guide.similarity.log_scale.add_(1)
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys, got others"):
            index.top(random_images(B), 1)

    def test_a_fused_step(self, random_images):
        # It changes parameters without raising their version counter.
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        x = random_images(B)
        index.top(x, 1)
        optimizer = torch.optim.Adam(guide.parameters(), fused=True)
        guide.networks.query(x).key.sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys"):
            index.top(x, 1)

    @pytest.mark.parametrize("other", [CosineSimilarity(centred=False), InnerProduct(scale=10.0)])
    def test_another_similarity_with_the_same_numbers(self, other, random_images):
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        guide.similarity = other
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys"):
            index.top(random_images(B), 1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"entries": torch.zeros(S, 28, 28)},
                r"^entries: expected shape \[S, 1, 28, 28\] with S >= 1, got \[11,",
            ),
            ({"entries": torch.zeros(0, 1, 28, 28)}, r"^entries: expected shape .* got \[0, 1, 28, 28\]$"),
            (
                {"entries": torch.full((S, 1, 28, 28), 0.5)},
                r"^memory\.entries: expected binary values 0 and 1, got .* 0\.5 to",
            ),
            ({"labels": torch.zeros(4)}, r"^labels: expected shape \[11\], one label per entry, got \[4\]$"),
            ({"key_dtype": torch.float16}, r"^key_dtype: expected torch\.float32 or torch\.bfloat16, got"),
        ],
    )
    def test_bad_entries(self, change, message, random_images):
        model, guide = build()
        arguments = {"entries": random_images(S)} | change
        with pytest.raises(ValueError, match=message):
            AddressIndex.encode(model, guide, **arguments)

    def test_a_similarity_without_embedding(self, random_images):
        model, guide = build(nn.Bilinear(2, 2, 1))
        with pytest.raises(
            ValueError, match=r"^guide\.similarity: expected `embed` and .* got Bilinear without `embed`$"
        ):
            AddressIndex.encode(model, guide, random_images(S))

    @pytest.mark.parametrize("k", [0, S + 1])
    def test_too_many_of_the_best(self, k, random_images):
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        with pytest.raises(ValueError, match=rf"^k: expected 1 to 11, the entries of the memory, got {k}$"):
            index.top(random_images(B), k)

    def test_no_samples(self, random_images):
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        with pytest.raises(ValueError, match=r"^num_samples: expected at least 1, got 0$"):
            large_log_likelihood(index, random_images(B), num_samples=0)
        with pytest.raises(ValueError, match=r"^num_samples: expected at least 1, got 0$"):
            index.sample(random_images(B), 0)
        with pytest.raises(ValueError, match=r"^num_samples: expected at least 1, got 0$"):
            sample_images(index, 0)

    def test_programs_with_another_address(self, random_images):
        """What an index computes by keys would not be theirs."""

        class Sharper(Guide):
            def forward(self, memory, x):
                memory = memory.encode(self.networks)
                query = self.networks.query(x)
                with pyro.plate("data", len(x)):
                    logits = 2 * self.similarity(query.key, memory.features.key)
                    m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))
                    pyro.sample("z", self.networks.posterior(query, m))

        class Asymmetric(CosineSimilarity):
            def forward(self, query, keys):
                return super().forward(query, keys) + keys[..., 0]

        class Last(nn.Module):
            def forward(self, memory):
                return torch.arange(memory.size) / 3

        class Normalised(LearnedAddress):
            def forward(self, memory):
                return super().forward(memory).softmax(-1)

        model, guide = build()
        networks = model.networks
        for other in (Sharper(networks), Guide(networks, similarity=Asymmetric())):
            with pytest.raises(
                ValueError, match=r"^guide: expected a site 'address' with its similarity's logits,"
            ):
                AddressIndex.encode(model, other, random_images(S))
        for prior in (Last(), Normalised(networks)):
            with pytest.raises(
                ValueError, match=r"^model\.address_prior: expected .* a score of each entry by itself"
            ):
                AddressIndex.encode(Model(networks, address_prior=prior), guide, random_images(S))

    @pytest.mark.parametrize(
        "change",
        [
            lambda model, guide: guide.networks.to_key.weight.copy_(guide.networks.to_key.weight.flip(0)),
            lambda model, guide: setattr(guide, "temperature", 5.0),
            lambda model, guide: setattr(guide.similarity, "weights", torch.tensor([1.0, 2.0])),
            lambda model, guide: setattr(guide.networks.pyramid[1], "power", (1, 2)),
            lambda model, guide: setattr(model, "address_prior", LearnedAddress(model.networks)),
        ],
    )
    def test_whatever_may_decide_on_the_address_is_not_to_change(self, change, random_images):
        model, guide = build()
        index = AddressIndex.encode(model, guide, random_images(S))
        x = random_images(B)
        index.posterior(x)
        with torch.no_grad():
            change(model, guide)
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys, got others"):
            index.posterior(x)
        with pytest.raises(ValueError, match=r"^guide: expected the parameters that made the keys, got others"):
            index.log_prior(torch.zeros(1, 1, dtype=torch.long))

    def test_noise_of_a_training_mode_is_not_in_the_keys(self, random_images):
        class Noisy(MLPNetworks):
            def query(self, x):
                found = super().query(x)
                return found._replace(key=nn.functional.dropout(found.key, 0.5, self.training))

        networks = Noisy(4, hidden_dims=(8, 7), key_dim=6)
        model, guide = Model(networks), Guide(networks)
        entries, x = random_images(S), random_images(B)
        index = AddressIndex.encode(model, guide, entries)
        guide.train()
        torch.testing.assert_close(index.posterior(x), address_posterior(guide, Memory(entries), x).log())
        assert guide.training

    def test_a_file_of_other_parameters(self, tmp_path, random_images):
        model, guide = build()
        AddressIndex.encode(model, guide, random_images(S)).save(tmp_path / "memory.pt")
        AddressIndex.load(tmp_path / "memory.pt", model, guide)
        for other in (build(), (model, Guide(guide.networks, similarity=InnerProduct()))):
            with pytest.raises(
                ValueError, match=r"^guide: expected the parameters that made the keys, got others"
            ):
                AddressIndex.load(tmp_path / "memory.pt", *other)

    def test_damaged_and_other_files(self, tmp_path, random_images):
        model, guide = build()
        AddressIndex.encode(model, guide, random_images(S)).save(tmp_path / "memory.pt")
        whole = (tmp_path / "memory.pt").read_bytes()
        (tmp_path / "memory.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"expected a whole checkpoint, got a damaged file$"):
            AddressIndex.load(tmp_path / "memory.pt", model, guide)
        checkpoint.save(tmp_path / "other.pt", {"weights": {}})
        with pytest.raises(ValueError, match=r"expected an address index, got another kind of checkpoint$"):
            AddressIndex.load(tmp_path / "other.pt", model, guide)


@pytest.mark.parametrize("number", [2.5, "2", True])
def test_numbers_that_are_not_whole_are_refused(number, random_images):
    index = AddressIndex.encode(*build(), random_images(S))
    for ask in (index.top, index.sample):
        with pytest.raises(ValueError, match=r"^(k|num_samples): expected an int, got "):
            ask(random_images(B), number)
    with pytest.raises(ValueError, match=r"^num_samples: expected an int, got "):
        index.sample_prior(number)


def test_entries_that_are_no_tensor_are_refused(random_images):
    with pytest.raises(ValueError, match="^entries: expected a tensor of images .* got KeyedBank$"):
        AddressIndex.encode(*build(), KeyedBank(random_images(S)))
