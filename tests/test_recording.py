"""What is recorded computes what the program does: nothing twice, but all noise, and what is changed in place."""

import pytest
import torch

from vma_pyro.training.recording import reason, record


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op != "placeholder" and node.op != "output"]


def test_the_same_operation_is_made_once():
    def twice(x):
        x.cos()  # of no use
        return x.sin() * 3 + x.sin(), x.sin().sum(0), x.sin().sum(1)

    x = torch.randn(3, 4)
    graph = record(twice, x)
    names = operations(graph)
    assert sum("sin" in name for name in names) == 1
    assert sum("sum" in name for name in names) == 2
    assert not any("cos" in name for name in names)
    other = torch.randn(3, 4)
    for got, expected in zip(graph.forward(other), twice(other), strict=True):
        assert torch.equal(got, expected)


def test_noise_is_drawn_as_often_as_in_the_program():
    def noisy(x):
        torch.rand(5)  # of no use, and drawn all the same
        return torch.bernoulli(x), torch.bernoulli(x), torch.rand_like(x)

    x = torch.full((4, 6), 0.5)
    before = torch.get_rng_state()
    graph = record(noisy, x)
    assert torch.equal(torch.get_rng_state(), before)
    got = graph.forward(x)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    for one, other in zip(got, noisy(x), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), after)


def test_what_is_changed_in_place_is_read_again():
    def remembers(buffer, x):
        first = buffer * 2
        buffer.add_(x)
        return first, buffer * 2

    graph = record(remembers, torch.tensor(1.0), torch.tensor(5.0))
    buffer = torch.tensor(3.0)
    assert [float(value) for value in graph.forward(buffer, torch.tensor(4.0))] == [6.0, 14.0]
    assert float(buffer) == 7.0


def test_a_program_that_looks_at_values_cannot_be_recorded():
    with pytest.raises(RuntimeError) as error:
        record(lambda x: x * 2 if x.sum() > 0 else x, torch.ones(2))
    assert reason(error.value) == "it looks at the values of tensors"
