"""Muon: steps of equal size in every direction of a layer's weights, and Adam for what is no layer's weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardshrink
from torch.optim.adam import adam

from vma_pyro.training.layout import check_parameters, laid_like, lay_state

# A quintic whose iteration takes singular values from (0, 1] to about 1, the small ones as fast as possible.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
NOTHING = 1e-15  # beside a norm of 1; five iterations make at most 485 times as much of it
LIKE_ADAM = 0.2  # root mean square of Adam's steps, in units of the learning rate
ADAMS_RATE = 0.375  # of the learning rate, where Adam moves the matrices: 1.5e-3 of 4e-3


class Muon(torch.optim.Optimizer):
    r"""Momentum whose matrices are orthogonalised, for weights of layers; Adam for all other parameters.

    .. math:: G_t = g_t + \mu M_t, \quad M_t = \mu M_{t-1} + g_t, \qquad
              W_{t+1} = W_t - 0.2 \, \eta \, \sqrt{\max(n, k)} \, U V^\top \text{ where } G_t = U \Sigma V^\top

    Jordan et al. 2024; the factor of Liu et al. 2025 (arXiv 2502.16982, section 2.2), under which a learning rate
    of Adam's serves. A convolution is a matrix of maps out by (maps in times taps), which `torch.optim.Muon` does
    not take.

    With `adam_first`, the first part of a run is Adam's alone. Under steps of equal size the latent that explains
    most learns first: z, and a model whose z explains the image has little to look up. Where Adam begins, the
    address is learned by the time that the matrices move (`experiments/optimizers.py` has the figures).

    Args:
        module: whose weights of linear and convolutional layers are matrices. A learned memory, biases, scales and
            parameters of other layers are Adam's.
        lr: learning rate of both.
        momentum: mu.
        betas, eps: Adam's.
        adam_first: share of the run, in [0, 1), in which all parameters are Adam's, at 0.375 of the rate. How much
            of the run is over is then set as `progress` of every group before each step. A matrix that has been
            Muon's stays so, whatever progress says.
        dtype: in which matrices are multiplied; bfloat16 is enough, where that is faster.

    Raises:
        ValueError: a number outside of its range; a parameter that is complex, or has gaps or repetitions in
            memory.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_first: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shares = {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1], "adam_first": adam_first}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {share}")
        for name, value in (("lr", lr), ("eps", eps)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of 0 or more, got {value}")
        check_parameters(module)
        matrices = {weight: outputs for weight, outputs in _weights(module) if weight.requires_grad}
        others = [p for p in module.parameters() if p.requires_grad and p not in matrices]
        groups: list[dict[str, Any]] = [
            {
                "params": [w for w, dim in matrices.items() if dim == outputs],
                "outputs": outputs,
                "momentum": momentum,
            }
            for outputs in (0, 1)
        ]
        groups.append({"params": others})
        self.dtype, self.adam_first = dtype, adam_first
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters that have a gradient.

        Args:
            closure: computes loss and gradients anew.

        Returns:
            What the closure returns; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adams = self.is_adams()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved and "momentum" in group and not adams:
                self._step_matrices(group, moved)
            elif moved:
                self._step_by_adam(group, moved, rate=(ADAMS_RATE if adams else 1.0) * group["lr"])
        return loss

    def is_adams(self) -> bool:
        """Whether the next step belongs to the part of the run that is Adam's alone."""
        if not self.adam_first or any("momentum" in state for state in self.state.values()):
            return False
        missing = [group for group in self.param_groups if "progress" not in group]
        if missing:
            raise ValueError(f"progress: expected in every group with adam_first={self.adam_first}, found none")
        return all(group["progress"] < self.adam_first for group in self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return super().__getstate__() | {"dtype": self.dtype, "adam_first": self.adam_first}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another one, or of a file."""
        super().__setstate__(state)
        for parameter, own in self.state.items():
            if "step" in own:  # torch leaves it where the file had it; fused Adam wants it beside the parameter
                own["step"] = own["step"].to(parameter.device)
        lay_state(self)

    def _step_matrices(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight] = {"momentum": self._sum_of_gradients(weight, group)}
        gradients = [weight.grad for weight in weights if weight.grad is not None]  # all: they are moved
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        steps = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        for weight, step in zip(weights, steps, strict=True):
            across, matrix = (t.transpose(0, group["outputs"]) for t in (weight, step))
            matrix = matrix.flatten(1)
            size = LIKE_ADAM * math.sqrt(max(matrix.shape)) * group["lr"]
            step = orthogonalised(matrix, self.dtype).to(weight.dtype)
            across.sub_(step.view(across.shape), alpha=size)

    def _sum_of_gradients(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """What Adam's mean of the gradients is a multiple of; zero, where it has not moved the weight."""
        if "exp_avg" in self.state[weight]:
            return self.state[weight]["exp_avg"].div(1 - group["betas"][0])
        return torch.zeros_like(weight)

    def _step_by_adam(self, group: dict[str, Any], parameters: list[Tensor], rate: float) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state = [self.state[p] for p in parameters]
        adam(
            parameters,
            [laid_like(p, p.grad) for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make all singular values of a matrix [n, k] nearly 1 (0.7 to 1.2), by products in a type alone: its own."""
    if not matrix.numel():
        return matrix
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    # Of numbers beyond 1e19 the norm is infinite, and beyond 1e38 they are so themselves in 32 bits.
    x = (x / x.abs().amax().clamp(min=1.0)).to(dtype or x.dtype)
    # What is nothing beside the norm is zero: the momentum of dead units shrinks for ever, and products of numbers
    # below 1e-38 take an Intel processor many times as long as any others.
    x = hardshrink(x / x.norm().clamp(min=1e-7), NOTHING)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _weights(module: nn.Module) -> Iterable[tuple[nn.Parameter, int]]:
    """Give the weights of layers, and which dimension of them counts the outputs."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for layer in module.modules():
        weight = layer._parameters.get("weight")  # none, where it is computed of other parameters
        if weight is not None and isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed)):
            yield weight, int(isinstance(layer, transposed))
