"""Training on with wider and deeper networks: they give what the narrow ones gave, and every new weight learns."""

import pytest
import torch

from vma_pyro import models
from vma_pyro.evaluation import log_likelihood
from vma_pyro.infer import make
from vma_pyro.models.growth import grown
from vma_pyro.training.start import start_from

CAUSAL = {"likelihood": "causal", "context_hidden": 5}
NARROW = {"networks": "conv", "width": 0.17, "latent_dim": 4, "program": "memory", "hidden_dim": 8, "key_dim": 6}
WIDER = {
    "maps": {"width": 0.4},
    "maps, but not at the top": {"width": 0.4, "top_maps": 8},
    "layers of z": {"hidden_dim": 13},
    "second look": {"refinement": 6},
    "blocks": {"blocks": 2},
    "keys": {"key_maps": 4},
    "looks": {"looks": 3},
    "all": {"width": 0.34, "hidden_dim": 13, "refinement": 6, "blocks": 1},
}


def images(number, side=28):
    return (torch.rand(number, 1, side, side) > 0.7).float()


def stirred(pair):
    with torch.no_grad():
        for parameter in models.as_one(pair).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pair


@pytest.fixture(scope="module", params=["bernoulli", "causal"])
def narrow(request, tmp_path_factory):
    torch.manual_seed(0)
    architecture = NARROW | {"refinement": 3} | (CAUSAL if request.param == "causal" else {})
    path = tmp_path_factory.mktemp("narrow") / "model.pt"
    models.save(path, stirred(models.build(architecture)), data="glyphs")
    return architecture, path


@pytest.mark.parametrize("how", WIDER)
def test_wider_networks_give_what_narrow_ones_gave_and_all_of_them_learns(narrow, how):
    architecture, path = narrow
    more = {"context_hidden": 9, "context_steps": (1, 2)} if "likelihood" in architecture and how == "all" else {}
    torch.manual_seed(1)
    wide = models.build(architecture | WIDER[how] | more)
    start_from(path, wide)
    memory, x = images(3), images(4)
    bounds = [log_likelihood(*programs, memory, x, num_samples=5) for programs in (models.load(path), wide)]
    torch.testing.assert_close(*bounds, rtol=1e-4, atol=1e-3)
    learns = [p.detach().clone() for p in models.as_one(wide).parameters()]
    loss_fn = make("vimco", 3)(*wide)
    steps = torch.optim.Adam(loss_fn.parameters(), 1e-3)
    for _ in range(3):  # those behind a layer that starts at zero have no gradient at first
        steps.zero_grad()
        loss_fn(images(3), images(6)).backward()
        steps.step()
    moved = [not torch.equal(old, new) for old, new in zip(learns, models.as_one(wide).parameters(), strict=True)]
    still = [name for (name, _), m in zip(models.as_one(wide).named_parameters(), moved, strict=True) if not m]
    assert not still


@pytest.mark.parametrize(
    "other",
    [{"latent_dim": 5}, {"top_maps": 6}, {"hidden_dim": 4}, {"key_dim": 7}, {"image_shape": (1, 32, 32)}],
)
def test_what_cannot_be_the_same_function_is_refused(narrow, other):
    """More latents, more numbers in a key, fewer units, other images: one line, and the weights stay."""
    architecture, path = narrow
    wide = models.build(architecture | other)
    before = {name: value.clone() for name, value in models.as_one(wide).state_dict().items()}
    with pytest.raises(
        ValueError, match="^checkpoint: expected the architecture of model and guide for "
    ) as caught:
        start_from(path, wide)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in models.as_one(wide).state_dict().items())


def test_a_layer_by_hand():
    """Two of three outputs and one of two inputs are old: the old output has no weight for the new input."""
    layer = torch.nn.Linear(2, 3)
    holder = torch.nn.Sequential(layer)
    found = grown(holder, {"0.weight": torch.ones(2, 1), "0.bias": torch.ones(2)})
    expected = layer.weight.detach().clone()
    expected[:2] = torch.tensor([1.0, 0.0])
    assert torch.equal(found["0.weight"], expected)
    assert torch.equal(found["0.bias"], torch.cat([torch.ones(2), layer.bias.detach()[2:]]))
    transposed = torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 3, 1))
    found = grown(transposed, {"0.weight": torch.ones(1, 2, 1, 1)})["0.weight"]
    assert torch.equal(found[:, :2, 0, 0], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(found[:, 2], transposed[0].weight[:, 2])


def test_what_is_missing_within_a_part_is_no_part_that_starts_without_effect(tmp_path):
    """A further layer of single pixels, in programs that no example can be made for."""
    import pyro
    from torch import nn

    from vma_pyro.likelihoods import CausalBernoulli

    class Own(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.likelihood = CausalBernoulli(hidden=4, layers=layers)

        def forward(self, memory, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", self.likelihood(torch.zeros(len(x), 5, 4, 4)), obs=x)

    models.save(tmp_path / "own.pt", (Own(1), nn.Identity()))
    before = Own(2)
    weights = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(ValueError, match="^checkpoint: expected the architecture of model and guide for "):
        start_from(tmp_path / "own.pt", (before, nn.Identity()))
    assert all(torch.equal(value, weights[name]) for name, value in before.state_dict().items())


def test_a_refusal_by_what_the_programs_give_leaves_the_weights_as_they_were(tmp_path):
    """Other steps have the same shapes, and another function."""
    architecture = NARROW | CAUSAL
    models.save(tmp_path / "one.pt", stirred(models.build(architecture | {"context_steps": (1,)})), data="glyphs")
    other = models.build(architecture | {"context_steps": (2,)})
    before = {name: value.clone() for name, value in models.as_one(other).state_dict().items()}
    with pytest.raises(ValueError, match="expected the model that it was trained with, whose site 'x'"):
        start_from(tmp_path / "one.pt", other)
    assert all(torch.equal(value, before[name]) for name, value in models.as_one(other).state_dict().items())
