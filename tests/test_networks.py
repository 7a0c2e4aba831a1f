"""Networks: what is shared, what is overridden, and the distributions that they return."""

import pyro.distributions as dist
import pytest
import torch
from pyro.nn.module import to_pyro_module_
from torch import nn

from vma_pyro import ConvNetworks, Guide, Memory, MLPNetworks, Model, Networks
from vma_pyro.evaluation import kl_report, log_likelihood
from vma_pyro.infer import MultiSampleELBO
from vma_pyro.networks import Features, PyramidNetworks

B, S, Z = 3, 5, 4
NETWORKS = {
    "conv": lambda: ConvNetworks(Z, width=0.1, key_dim=8, hidden_dim=8),
    "conv, refined": lambda: ConvNetworks(Z, width=0.1, key_dim=8, hidden_dim=8, refinement=2),
    "conv, copies": lambda: ConvNetworks(Z, width=0.1, key_dim=8, hidden_dim=8, refinement=2, copies=True),
    "mlp": lambda: MLPNetworks(Z, hidden_dims=(8, 7), key_dim=6),
    "mlp, copies": lambda: MLPNetworks(Z, hidden_dims=(8, 7), key_dim=6, copies=True),
}
every_kind = pytest.mark.parametrize("kind", NETWORKS)


@every_kind
def test_shapes_of_what_is_returned(kind, random_images):
    networks = NETWORKS[kind]()
    assert isinstance(networks, Networks)
    assert (networks.channels, networks.output_shape) == (1, (1, 28, 28))
    features, query = networks.encode(random_images(S)), networks.query(random_images(B))
    m = networks.heads(features)
    assert features.key.shape == (S, networks.key_dim)
    assert query.key.shape == (B, networks.key_dim)
    prior = networks.prior(m)
    assert (prior.batch_shape, prior.event_shape) == ((S,), (Z,))
    posterior = networks.posterior(query, Memory(random_images(S)).encode(networks).read(torch.zeros(2, B).long()))
    assert (posterior.batch_shape, posterior.event_shape) == ((2, B), (Z,))
    assert networks.decode(torch.randn(S, Z), m).shape == (S, 1, 28, 28)


class FullCovariance(MLPNetworks):
    """q(z | x, m) with a covariance: one method."""

    def __init__(self):
        super().__init__(Z, hidden_dims=(8, 7), key_dim=6)
        self.to_tril = nn.Linear(7, Z * Z)

    def posterior(self, query, m):
        hidden = (query.hidden + m.hidden).relu()
        diagonal = super().posterior(query, m).base_dist
        below = self.to_tril(hidden).unflatten(-1, (Z, Z)).tril(-1)
        return dist.MultivariateNormal(diagonal.loc, scale_tril=below + torch.diag_embed(diagonal.scale))


class Flow(MLPNetworks):
    """q(z | x, m) through a learned map: one method."""

    def __init__(self):
        super().__init__(Z, hidden_dims=(8, 7), key_dim=6)
        self.flow = dist.transforms.planar(Z)

    def posterior(self, query, m):
        return dist.TransformedDistribution(super().posterior(query, m), [self.flow])


@pytest.mark.parametrize("kind", [FullCovariance, Flow])
def test_another_family_of_z_is_an_override_of_one_method(kind, random_images):
    networks = kind()
    model, guide = Model(networks), Guide(networks)
    memory, x = Memory(random_images(S)), random_images(B)
    MultiSampleELBO(3)(model, guide)(memory, x).backward()
    own = networks.to_tril if kind is FullCovariance else networks.flow
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters())
    assert log_likelihood(model, guide, memory, x, num_samples=3).isfinite().all()
    report = kl_report(model, guide, memory, x, num_samples=3)
    assert report.kl_z.mean > 0


def test_the_prior_by_hand(random_images):
    networks = NETWORKS["mlp"]()
    m = networks.heads(networks.encode(random_images(S)))
    loc, raw = m.prior.chunk(2, -1)
    expected = dist.Normal(loc, (1 + (raw + 0.5413).exp()).log() + 1e-3).to_event(1)
    z = torch.randn(S, Z)
    torch.testing.assert_close(networks.prior(m).log_prob(z), expected.log_prob(z))


@every_kind
def test_networks_can_be_made_a_pyro_module(kind, random_images):
    """For random weights (Pyro's Bayesian networks)."""
    networks = NETWORKS[kind]()
    to_pyro_module_(networks)
    assert Model(networks)(Memory(random_images(S)), num_images=B).shape == (B, 1, 28, 28)


def test_what_a_subclass_has_to_add():
    networks = PyramidNetworks(
        nn.Identity(), top=3, latent_dim=2, key_dim=2, hidden_dim=2, image_shape=(1, 2, 2), channels=1
    )
    with pytest.raises(NotImplementedError, match="^PyramidNetworks.climb: "):
        networks.encode(torch.zeros(1, 1, 2, 2))
    m = networks.heads(Features(torch.zeros(1, 2), torch.zeros(1, 3)))
    with pytest.raises(NotImplementedError, match="^PyramidNetworks.decode: "):
        networks.decode(torch.zeros(1, 2), m)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("draws", [1, 7])
def test_a_refinement_is_made_once_for_an_image_and_an_entry(random_images, own, draws):
    torch.manual_seed(0)
    networks = NETWORKS["conv, refined"]()
    torch.nn.init.normal_(networks.refinement.to_correction.weight)
    seen = []
    networks.refinement.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    memory = Memory(random_images(B, S) if own else random_images(S))
    x = random_images(B)
    address = torch.randint(2, (draws, B))
    with torch.no_grad():
        constant = memory.encode(networks)
        found = networks.posterior(networks.query(x), constant.read(address)).base_dist
    plain = networks.posterior(networks.query(x), memory.encode(networks).read(address)).base_dist
    pairs = len({(a, b) for row in address.tolist() for b, a in enumerate(row)})
    assert seen == [(pairs, Z) if draws > 1 else (draws, B, Z), (draws, B, Z)]
    assert torch.allclose(found.loc, plain.loc, atol=1e-4)
    assert torch.allclose(found.scale, plain.scale, atol=1e-4)


def test_a_refinement_where_all_addresses_differ_or_broadcast(random_images):
    torch.manual_seed(0)
    networks = NETWORKS["conv, refined"]()
    torch.nn.init.normal_(networks.refinement.to_correction.weight)
    memory, x = Memory(random_images(S)), random_images(B)
    with torch.no_grad():
        constant, query = memory.encode(networks), networks.query(x)
        for address in (torch.arange(S).reshape(S, 1, 1), torch.zeros(4, 1).long(), torch.zeros(2, 3, B).long()):
            found = networks.posterior(query, constant.read(address)).base_dist
            read = constant.read(address)._replace(rows=())
            plain = networks.posterior(query, read).base_dist
            assert found.loc.shape == plain.loc.shape
            assert torch.allclose(found.loc, plain.loc, atol=1e-4)


SHAPES = [(1, 26, 26), (1, 28, 28), (1, 32, 32), (3, 32, 32), (1, 64, 64), (3, 24, 40), (1, 8, 8), (1, 9, 31)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_for_images_of_any_size(shape):
    """Gradients reach every parameter, the top is at most 7 wide, and every pixel of x has a say in its key."""
    torch.manual_seed(0)
    networks = ConvNetworks(3, image_shape=shape, width=0.1, key_dim=4, hidden_dim=8, refinement=2)
    torch.nn.init.normal_(networks.refinement.to_correction.weight)
    assert max(networks.top_shape[1:]) <= 7
    x = torch.rand(2, *shape, requires_grad=True)
    m = networks.heads(networks.encode(torch.rand(2, *shape)))
    query = networks.query(x)
    decoded = networks.decode(networks.posterior(query, m).rsample(), m)
    assert decoded.shape == (2, *shape)
    (slope,) = torch.autograd.grad(query.key.square().sum(), x, retain_graph=True)
    assert bool((slope.abs().sum((0, 1)) > 0).float().mean() > 0.9)
    (
        decoded.square().sum() + query.key.square().sum() + networks.prior(m).log_prob(torch.ones(3)).sum()
    ).backward()
    assert [name for name, p in networks.named_parameters() if p.grad is None] == []


def test_at_28_pixels_it_is_the_network_of_before():
    """By names, shapes and numbers: the published weights fit, and a seed gives the same ones."""
    torch.manual_seed(0)
    networks = ConvNetworks(4, width=0.25)
    shapes = {name: list(p.shape) for name, p in networks.named_parameters()}
    assert list(shapes)[:2] == ["pyramid.0.weight", "pyramid.0.bias"]
    assert shapes["skip4.weight"] == [16, 16, 3, 3]
    assert shapes["skip2.weight"] == [16, 16, 3, 3]
    assert [shapes[f"up{n}.weight"] for n in (7, 14, 28)] == [[16, 16, 3, 3], [16, 16, 4, 4], [16, 16, 4, 4]]
    assert shapes["to_logits.weight"] == [1, 16, 3, 3]
    total = sum(p.abs().sum().item() for p in networks.parameters())
    assert total == pytest.approx(24767.7693, rel=1e-5)  # of the version before other sizes


@pytest.mark.parametrize("shape", [(2, 28, 28), (1, 7, 28), (28, 28), (1, 28)], ids=str)
def test_shapes_that_no_convolutions_take_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"^image_shape: expected \(1 or 3 colours, height, width\) with sides of 8"
    ):
        ConvNetworks(3, image_shape=shape)


@pytest.mark.parametrize("shape", [(1, 8, 128), (1, 8, 112), (1, 16, 256)], ids=str)
def test_ribbons_are_refused(shape):
    with pytest.raises(ValueError, match=r"^image_shape: expected a width of at most 8 times the height, got \["):
        ConvNetworks(3, image_shape=shape)


@pytest.mark.parametrize("shape", [(1, 8, 64), (1, 64, 8), (3, 9, 71), (1, 200, 8)], ids=str)
def test_long_images_are_not(shape):
    networks = ConvNetworks(3, image_shape=list(shape), width=0.1)
    m = networks.heads(networks.encode(torch.zeros(2, *shape)))
    assert networks.decode(torch.zeros(2, 3), m).shape == (2, *shape)
