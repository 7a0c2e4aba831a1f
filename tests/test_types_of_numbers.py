"""Programs in the precision of their parameters: float64 from end to end, half of it, and images of any type."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch

from vma_pyro import AddressIndex, ConvNetworks, Guide, InnerProduct, LearnedAddress, Memory, MLPNetworks, Model
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.evaluation import classify, kl_report, large_log_likelihood, log_likelihood
from vma_pyro.infer import MultiSampleELBO, log_weights, make

NETWORKS = {
    "conv": lambda: ConvNetworks(3, width=0.1),
    "conv, copies": lambda: ConvNetworks(3, width=0.1, copies=True),
    "conv, refined": lambda: ConvNetworks(3, width=0.1, refinement=4),
    "mlp": lambda: MLPNetworks(3, hidden_dims=(9, 8), key_dim=5, copies=True),
}
PROGRAMS = {
    "memory": lambda n: (Model(n), Guide(n)),
    "learned prior": lambda n: (
        Model(n, address_prior=LearnedAddress(n)),
        Guide(n, similarity=InnerProduct()),
    ),
    "soft attention": lambda n: (SoftAttentionModel(n), SoftAttentionGuide(n, target_guided=True)),
    "no memory": lambda n: (MemorylessModel(n), MemorylessGuide(n)),
}


@pytest.fixture
def images():
    return (torch.rand(4, 1, 28, 28) < 0.2).double(), (torch.rand(2, 1, 28, 28) < 0.2).double()


@pytest.mark.parametrize("whole", [".double()", "set_default_dtype"])
@pytest.mark.parametrize(("kind", "program"), [*itertools.product(["mlp"], PROGRAMS), ("conv, refined", "memory")])
def test_float64_from_end_to_end(kind, program, whole, images):
    """Loss, gradients, weights, report: all in float64, with nothing rounded to float32 on the way."""
    entries, x = images
    if whole == "set_default_dtype":
        torch.set_default_dtype(torch.float64)
    try:
        pair = PROGRAMS[program](NETWORKS[kind]())
        model, guide = (part.double() for part in pair) if whole == ".double()" else pair
        for memory, target in ((Memory(entries), x), (Memory(entries.float()), x.to(torch.uint8))):
            loss = MultiSampleELBO(3)(model, guide)(memory, target)
            loss.backward()
            assert loss.dtype == torch.float64
            assert all(p.grad is None or p.grad.dtype == torch.float64 for p in model.parameters())
            trace = pyro.poutine.trace(model).get_trace(memory, target)
            trace.compute_log_prob()
            for site in {"address", "z", "x"} & set(trace.nodes):
                log_prob = trace.nodes[site]["log_prob"]
                assert log_prob.dtype == torch.float64, site
                assert (log_prob.float().double() != log_prob).any() or log_prob.abs().max() == 0, site
        if program == "memory":
            assert kl_report(model, guide, Memory(entries), x, num_samples=2).nll.mean > 0
        assert model(Memory(entries), num_images=2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_value_of_float64_is_right_to_fourteen_digits(images):
    """log p(x, z, a) of MLPNetworks against the same sums in NumPy."""
    entries, x = images
    networks = MLPNetworks(3, hidden_dims=(9, 8), key_dim=5).double()
    z, a = torch.randn(2, 3, dtype=torch.float64), torch.tensor([2, 1])
    model = pyro.poutine.condition(Model(networks), data={"address": a, "z": z})
    trace = pyro.poutine.trace(model).get_trace(Memory(entries), x)
    found = trace.log_prob_sum().item()

    def layer(linear, value):
        bias = 0 if linear.bias is None else linear.bias.detach().numpy()
        return value @ linear.weight.detach().numpy().T + bias

    def relu(value):
        return np.maximum(value, 0)

    _, bottom, _, top, _ = networks.pyramid
    m = relu(layer(top, relu(layer(bottom, entries[a].numpy().reshape(2, -1)))))
    raw = layer(networks.to_prior[2], relu(layer(networks.to_prior[0], m)))
    loc, scale = raw[:, :3], np.log1p(np.exp(raw[:, 3:] + 0.5413)) + 1e-3
    log_z = -0.5 * ((z.numpy() - loc) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)
    h = relu(layer(networks.stem, z.numpy()) + layer(networks.entry_to_stem, m))
    logits = layer(networks.to_logits[2], relu(layer(networks.to_logits[0], h)))
    log_x = np.where(x.numpy().reshape(2, -1) == 1, -np.logaddexp(0, -logits), -np.logaddexp(0, logits))
    assert found == pytest.approx(log_z.sum() + log_x.sum() - 2 * math.log(4), rel=1e-13)


# Those with arithmetic of their own.
ESTIMATORS = ("ovis-mc", "vimco+dreg+resampled", "distinct", "unordered-set", "sum-and-sample", "nvil")
ESTIMATORS += ("wake-wake-defensive", "wake-sleep", "tvo", "gumbel-softmax", "pyro-graph", "pyro-enum")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_in_float64(name, images):
    entries, x = images
    model, guide = (part.double() for part in PROGRAMS["memory"](NETWORKS["mlp"]()))
    elbo = make(name, 3)(model, guide).double()
    loss = elbo(Memory(entries), x)
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in elbo.parameters())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("mlp", dtype) for dtype in (torch.float64, torch.uint8, torch.bool, torch.int64, torch.float16)),
        *(("conv, refined", dtype) for dtype in (torch.float64, torch.bool)),
    ],
)
def test_images_of_any_type(kind, dtype, images):
    """Bit for bit the figures of float32 images."""
    entries, x = images
    model, guide = PROGRAMS["memory"](NETWORKS[kind]())
    figures = []
    for kind_of_number in (torch.float32, dtype):
        memory, target = Memory(entries.to(kind_of_number), torch.arange(4)), x.to(kind_of_number)
        figures.append(
            (log_likelihood(model, guide, memory, target, num_samples=2), classify(guide, memory, target))
        )
    for expected, found in zip(*figures, strict=True):
        assert (expected == found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "program"), [("mlp", "soft attention"), ("conv, refined", "memory"), ("mlp", "learned prior")]
)
def test_parameters_of_half_precision(kind, program, dtype, images):
    """Layers in 16 bits, likelihoods in 32: near the float32 figures of the same rounded parameters."""
    entries, x = images
    model, guide = (part.to(dtype) for part in PROGRAMS[program](NETWORKS[kind]()))
    loss = MultiSampleELBO(2)(model, guide)(Memory(entries), x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.manual_seed(0)
    found = log_weights(model, guide, (Memory(entries), x), num_particles=1)
    torch.manual_seed(0)
    expected = log_weights(model.float(), guide.float(), (Memory(entries), x), num_particles=1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_a_large_memory_keeps_keys_in_32_bits(images):
    entries, x = images
    model, guide = (part.double() for part in PROGRAMS["memory"](NETWORKS["mlp"]()))
    index = AddressIndex.encode(model, guide, entries)
    assert index.kept.keys.dtype == torch.float32
    exact = log_likelihood(model, guide, Memory(entries), x, num_samples=400, address="exact")
    torch.testing.assert_close(large_log_likelihood(index, x, num_samples=400, top=4), exact, rtol=0.01, atol=0)
