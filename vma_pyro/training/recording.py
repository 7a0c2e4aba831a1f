"""The tensor operations of a function, written down once to be run without its Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

# Recorded operations, and the same ones by a shorter way through torch's Python.
aten = torch.ops.aten
METHODS = {
    aten.view.default: "view",
    aten.t.default: "t",
    aten.expand.default: "expand",
    aten.permute.default: "permute",
    aten.unsqueeze.default: "unsqueeze",
}
FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.mm.default: torch.mm,
    aten.relu_.default: torch.relu_,
}


def record(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Record the tensor operations of one call, without Pyro's checks; leaves the noise as it was.

    Args:
        function: of tensors, or containers of these, alone; it must not look at their values.
        inputs: for which it is recorded; those that it changes in place are changed.

    Returns:
        A module whose `forward` takes other inputs of the same shapes.

    Raises:
        RuntimeError: it looks at the values of tensors; and whatever it raises itself.
    """
    noise, quick = torch.random.fork_rng(devices=[]), _described_together()
    with noise, quick, pyro.validation_enabled(False):
        return _shortened(make_fx(function)(*inputs))


def reason(error: Exception) -> str:
    """Say in one line why a function could not be recorded."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return "it looks at the values of tensors" if "value out of a tracing tensor" in line else line


def _is_pure(node: Node) -> bool:
    """Tell whether an operation has no effect but its result, the same for the same inputs."""
    operation = node.target
    if not isinstance(operation, torch._ops.OpOverload) or operation._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in operation.tags


def _merge_repeated(graph: Graph) -> None:
    """Compute once what is computed several times, where nothing changes a tensor in between."""
    called = [node for node in graph.nodes if node.op == "call_function"]
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in called):
        return
    known: dict[str, Node] = {}
    for node in called:
        if _is_pure(node):
            first = known.setdefault(repr((node.target, node.args, sorted(node.kwargs.items()))), node)
            if first is not node:
                node.replace_all_uses_with(first)


def _erase_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and _is_pure(node):
            graph.erase_node(node)


def _described_together() -> AbstractContextManager[Any]:
    """One mode to describe all tensors of a recording in; torch would make one for each, which takes long."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:  # of torch's own, which may move
        return nullcontext()
    return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))


def _shortened(graph: GraphModule) -> GraphModule:
    """Leave the same results with fewer operations, and less Python around them."""
    _merge_repeated(graph.graph)
    _erase_unused(graph.graph)
    for node in list(graph.graph.nodes):
        if node.target is aten.alias.default:  # what `detach` leaves; the same tensor
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in METHODS and not node.kwargs:
            node.op, node.target = "call_method", METHODS[node.target]
        elif node.target in FUNCTIONS and not node.kwargs:
            node.target = FUNCTIONS[node.target]
    graph.recompile()
    return graph
