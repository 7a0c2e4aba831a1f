"""Inverted lists: the support that they find, exact probabilities within it, bounds that remain bounds, files."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vma_pyro import AddressIndex, Guide, InnerProduct, InvertedLists, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro._system import checkpoint
from vma_pyro.evaluation import large_log_likelihood, sample_images
from vma_pyro.infer import log_weights_given
from vma_pyro.memory.keys import Keys

B, S, E = 3, 300, 6
EVERYWHERE = InvertedLists(nlist=7, nprobe=7, support=S)
FEW = InvertedLists(nlist=7, nprobe=2, support=13)
CODES = InvertedLists(nlist=5, nprobe=2, code_size=3, support=11)


def build(similarity=None, learned=False):
    networks = MLPNetworks(4, hidden_dims=(8, 7), key_dim=E)
    model = Model(networks, address_prior=LearnedAddress(networks) if learned else None)
    return model, Guide(networks, similarity=similarity)


def indices(random_images, search, *, similarity=None, key_dtype=torch.float32):
    """An exact one, one with lists, and queries."""
    programs, entries = build(similarity, learned=True), random_images(S)
    exact = AddressIndex.encode(*programs, entries)
    lists = AddressIndex.encode(*programs, entries, torch.arange(S), search=search, key_dtype=key_dtype)
    return exact, lists, random_images(B)


@pytest.mark.parametrize("similarity", [None, InnerProduct(scale=1.0)], ids=["cosine", "inner"])
def test_with_all_lists_and_all_entries_it_is_the_exact_index(similarity, random_images):
    exact, lists, x = indices(random_images, EVERYWHERE, similarity=similarity)
    expected, found = exact.top(x, 20), lists.top(x, 20)
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    torch.testing.assert_close(exact.posterior(x).gather(1, found.address), expected.log_prob)
    torch.testing.assert_close(lists.log_prior(found.address), exact.log_prior(found.address))


@pytest.mark.parametrize("search", [FEW, CODES], ids=["half", "codes"])
def test_probabilities_within_the_support_are_exact(search, random_images):
    exact, lists, x = indices(random_images, search)
    found = lists.top(x, search.support)
    assert all(len(set(row)) == search.support for row in found.address.tolist())
    logits = exact.posterior(x).gather(1, found.address)
    torch.testing.assert_close(found.log_prob, logits.log_softmax(1))
    assert (found.log_prob.diff(dim=1) <= 0).all()
    torch.testing.assert_close(lists.top(x, 4).address, found.address[:, :4])
    drawn = lists.sample(x, 500)
    for address, log_prob, row, expected in zip(*drawn, *found, strict=True):
        at = (address[:, None] == row).long()
        assert bool((at.sum(1) == 1).all())
        torch.testing.assert_close(log_prob, expected[at.argmax(1)])
        frequencies = at.float().mean(0)
        assert (frequencies - expected.exp()).abs().max() < 4 * 0.5 / 500**0.5


@pytest.mark.parametrize(("search", "atol"), [(FEW, 0.02), (CODES, 3.0)], ids=["half", "codes"])
def test_without_the_keys_probabilities_are_those_of_the_keys_in_the_lists(search, atol, random_images):
    exact, lists, x = indices(random_images, search, key_dtype=None)
    assert lists.kept.keys is None
    found = lists.top(x, search.support)
    torch.testing.assert_close(found.log_prob.exp().sum(1), torch.ones(B))
    logits = exact.posterior(x).gather(1, found.address).log_softmax(1)
    torch.testing.assert_close(found.log_prob, logits, atol=atol, rtol=0)
    # As the lists decode them, to the last digit but one.
    lists.kept.lists.found.make_direct_map()
    decoded = torch.from_numpy(lists.kept.lists.found.reconstruct_batch(found.address.flatten().numpy()))
    query, scale = lists._query(x)
    logits = scale * torch.einsum("be,bpe->bp", query, decoded.reshape(B, -1, E))
    torch.testing.assert_close(found.log_prob, logits.log_softmax(1), atol=1e-4, rtol=0)


def test_lists_with_too_few_entries_are_joined_by_more(random_images):
    """The support is as large as promised for every query: no entry twice, none that is not there."""
    for number in (1, 40, S):
        search = InvertedLists(nlist=30, nprobe=1, support=number)
        _, lists, x = indices(random_images, search)
        assert [len(set(row)) for row in lists.top(x, number).address.tolist()] == [number] * B
    _, lists, x = indices(random_images, InvertedLists())  # by size, and a support of more than |M|
    assert lists.kept.lists.found.nlist == 16
    assert lists.top(x, S).address.sort(1).values.tolist() == [list(range(S))] * B


@pytest.mark.parametrize("search", [FEW, CODES, EVERYWHERE], ids=["half", "codes", "all"])
@pytest.mark.parametrize("key_dtype", [torch.float32, None])
def test_less_support_still_gives_a_lower_bound(search, key_dtype, random_images):
    """By enumeration: the ELBO of q, the sum over its support, and log p(x | M)."""
    programs, entries, x = build(learned=True), random_images(S), random_images(B)
    networks = programs[0].networks
    with torch.no_grad():  # q(z | x, m) = p(z | m) and a decoder that does not look at z: the integral is exact
        for p in (*networks.to_prior[-1].parameters(), *networks.hidden_to_posterior.parameters()):
            p.zero_()
        networks.stem.weight.zero_()
    index = AddressIndex.encode(*programs, entries, search=search, key_dtype=key_dtype)
    every = {"address": torch.arange(S)}
    joint = log_weights_given(every, *programs, (Memory(entries), x), num_particles=1)
    joint = joint.squeeze(1).T.double()  # [B, S]
    twice = log_weights_given(every, *programs, (Memory(entries), x), num_particles=1).squeeze(1).T.double()
    torch.testing.assert_close(joint, twice, atol=1e-3, rtol=0)
    exact = joint.logsumexp(1)
    address, log_q = index.top(x, min(S, search.support))
    within = joint.gather(1, address)
    elbo = (log_q.double().exp() * (within - log_q.double())).sum(1)
    assert (elbo <= within.logsumexp(1) + 1e-4).all()
    assert (within.logsumexp(1) <= exact + 1e-9).all()
    found = large_log_likelihood(index, x, num_samples=2, top=min(S, search.support))
    torch.testing.assert_close(found, within.logsumexp(1), atol=2e-3, rtol=0)
    if search is not EVERYWHERE:
        assert (found < exact - 0.1).all()
    sampled = large_log_likelihood(index, x, num_samples=3000)
    assert (sampled <= exact + 0.5).all()


def test_a_file_holds_the_lists(tmp_path, random_images):
    for search, key_dtype in ((FEW, torch.bfloat16), (CODES, None), (FEW, None)):
        _, index, x = indices(random_images, search, key_dtype=key_dtype)
        index.save(tmp_path / "lists.pt")
        again = AddressIndex.load(tmp_path / "lists.pt", index.model, index.guide)
        for one, other in zip(index.top(x, 9), again.top(x, 9), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(again.part(again.top(x, 2).address).labels, index.top(x, 2).address)
        assert again.kept.lists.nbytes == S * (8 + (search.code_size or 2 * E))
        images, read = sample_images(again, 5)
        assert images.shape == (5, 1, 28, 28)


def test_nothing_imports_faiss_that_does_not_ask_for_it():
    code = "import sys, vma_pyro, vma_pyro.evaluation; assert 'faiss' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestRefusals:
    """One line each, that names the argument."""

    def test_without_the_extra(self, tmp_path, random_images, monkeypatch):
        exact, index, x = indices(random_images, FEW)
        index.save(tmp_path / "lists.pt")
        monkeypatch.setitem(sys.modules, "faiss", None)
        advice = r"expected faiss installed for inverted lists, found none; pip install 'vma-pyro\[index\]'$"
        with pytest.raises(ValueError, match=rf"^search: {advice}"):
            AddressIndex.encode(*build(), random_images(S), search=FEW)
        with pytest.raises(ValueError, match=rf"^path: {advice}"):
            AddressIndex.load(tmp_path / "lists.pt", index.model, index.guide)
        exact.top(x, 2)

    def test_the_posterior_of_every_entry(self, random_images):
        _, index, x = indices(random_images, FEW)
        with pytest.raises(
            ValueError, match=r"^search: expected None, .* for the posterior of every entry, got Inv"
        ):
            index.posterior(x)

    def test_more_than_the_support(self, random_images):
        _, index, x = indices(random_images, FEW)
        for ask in (lambda: index.top(x, 14), lambda: large_log_likelihood(index, x, num_samples=1, top=14)):
            with pytest.raises(ValueError, match=r"^k: expected 1 to 13, the support of the search, got 14$"):
                ask()
        with pytest.raises(ValueError, match=r"^num_samples: expected at least 1, got 0$"):
            index.sample(x, 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"nlist": 0}, r"^nlist: expected at least 1, got 0$"),
            ({"nlist": 2.5}, r"^nlist: expected an int, got 2.5$"),
            ({"support": float("nan")}, r"^support: expected an int, got nan$"),
            ({"support": -1}, r"^support: expected at least 1, got -1$"),
            ({"nlist": 4, "nprobe": 5}, r"^nprobe: expected at most 4, the number of lists, got 5$"),
            ({"nlist": S + 1}, r"^nlist: expected at most 300, the entries of the memory, got 301$"),
            ({"nprobe": 17}, r"^nprobe: expected at most 16, the number of lists, got 17$"),
            ({"code_size": 4}, r"^code_size: expected a divisor of E = 6, got 4$"),
        ],
    )
    def test_numbers_that_do_not_fit(self, options, message, random_images):
        with pytest.raises(ValueError, match=message):
            AddressIndex.encode(*build(), random_images(S), search=InvertedLists(**options))

    @pytest.mark.parametrize("nprobe", [0, -1])
    def test_no_list_to_look_into(self, nprobe, random_images):
        _, index, x = indices(random_images, FEW)
        index.kept.lists.nprobe = nprobe
        with pytest.raises(ValueError, match=f"^nprobe: expected at least 1, got {nprobe}$"):
            index.top(x, 2)

    def test_too_few_for_codes(self, random_images):
        with pytest.raises(
            ValueError, match=r"^code_size: expected at least 256 entries to learn codes from, got 255$"
        ):
            AddressIndex.encode(*build(), random_images(255), search=CODES)

    def test_keys_kept_nowhere(self, random_images):
        with pytest.raises(ValueError, match=r"^key_dtype: expected torch\.float32 or torch\.bfloat16, got None$"):
            AddressIndex.encode(*build(), random_images(S), key_dtype=None)
        _, index, _ = indices(random_images, FEW, key_dtype=None)
        with pytest.raises(ValueError, match=r"^kept: expected keys or lists of them, got neither$"):
            AddressIndex(index.model, index.guide, replace(index.kept, lists=None))

    def test_keys_beyond_half_precision(self, random_images):
        model, guide = build(InnerProduct())
        with torch.no_grad():
            guide.networks.to_key.bias.fill_(7e4)
        with pytest.raises(ValueError, match=r"^entries: expected keys up to 65504, as half precision holds, got"):
            AddressIndex.encode(model, guide, random_images(S), search=FEW)

    def test_images_that_are_none(self, random_images):
        _, index, x = indices(random_images, FEW)
        x[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"^x: expected finite values, got 1 NaN or infinite of 2352$"):
            index.top(x, 1)

    def test_other_parameters(self, random_images):
        _, index, x = indices(random_images, FEW)
        with torch.no_grad():
            index.guide.similarity.log_scale.add_(1)
        for ask in (lambda: index.top(x, 1), lambda: index.sample(x, 1), lambda: sample_images(index, 1)):
            with pytest.raises(
                ValueError, match=r"^guide: expected the parameters that made the keys, got others"
            ):
                ask()

    def test_a_file_whose_parts_do_not_fit(self, tmp_path, random_images):
        _, index, _ = indices(random_images, FEW)
        index.save(tmp_path / "lists.pt")
        whole = checkpoint.load(tmp_path / "lists.pt")["large_memory"]
        for name, value in (
            ("rows", torch.zeros(S, dtype=torch.long)),
            ("sizes", torch.ones(7, dtype=torch.long)),
        ):
            changed = whole | {"lists": whole["lists"] | {name: value}}
            checkpoint.save(tmp_path / "changed.pt", {"large_memory": changed})
            with pytest.raises(
                ValueError, match=r"expected inverted lists whose parts fit each other, got others$"
            ):
                Keys.load(tmp_path / "changed.pt")
        damaged = (tmp_path / "lists.pt").read_bytes()
        (tmp_path / "lists.pt").write_bytes(damaged[:-900] + b"?" + damaged[-899:])
        with pytest.raises(ValueError, match=r"expected a whole checkpoint, got a damaged file$"):
            Keys.load(tmp_path / "lists.pt")

    def test_lists_of_another_number_of_keys(self, random_images):
        _, index, _ = indices(random_images, FEW)
        kept = index.kept
        others = replace(kept, entries=kept.entries[1:], keys=kept.keys[1:], prior=kept.prior[1:])
        with pytest.raises(ValueError, match=r"^kept: expected lists of its 299 entries, got 300$"):
            AddressIndex(index.model, index.guide, others)
