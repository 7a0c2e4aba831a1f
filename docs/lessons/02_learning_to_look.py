# %% [markdown]
# # 2. Learning to look
#
# - A network $q(a \mid x, M)$ can learn to find the entry, though an address has no derivative: the score
#   function.
# - Its gradient is noisy. Good baselines (VIMCO, leave-one-out) cut the noise; enumeration is the judge of them
#   all.
# - A trap: Pyro's own multi-sample objective gives a discrete guide no gradient at all, and says nothing.
#
# You need: lesson 1, and what an ELBO is.

# %%
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pictures import keep
from pyro.infer import RenyiELBO
from pyro.nn import PyroModule
from torch import nn

from vma_pyro.infer import MultiSampleELBO, compare, loo, make, reinforce, score_baseline, vimco

pyro.settings.set(module_local_params=True)  # parameters live in the modules

# %% [markdown]
# ## A small VMA
#
# Points of the plane again, but now a point may slide along a line away from its entry: a latent $z$ says how
# far. This is already the shape of Variational Memory Addressing, an address and a variation of what was read:
#
# $$a \sim \mathrm{Uniform}, \quad z \sim \mathcal N(0, 1), \quad
#   x \mid a, z \sim \mathcal N(m_a + z\,d, \sigma^2 I).$$

# %%
memory = torch.tensor([[-1.5, 0.5], [-0.5, 1.5], [0.0, -1.0], [0.8, -1.4], [1.6, 0.9]])  # [S, 2]
DIRECTION, NOISE = torch.tensor([0.5, 0.3]), 0.3


def model(x):
    """p(a) p(z) p(x | a, z) for points x [B, 2]."""
    with pyro.plate("data", len(x), dim=-1):
        address = pyro.sample("address", dist.Categorical(logits=torch.zeros(len(memory))))
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        mean = memory[address] + z.unsqueeze(-1) * DIRECTION
        pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)


class Guide(PyroModule):
    """q(a | x) q(z | x, a): one small network, and one line of coefficients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, len(memory)))
        self.slide = nn.Linear(2, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        """The arguments are the model's."""
        with pyro.plate("data", len(x), dim=-1):
            address = pyro.sample("address", dist.Categorical(logits=self.look(x)))
            z = self.slide(x - memory[address]).squeeze(-1)
            pyro.sample("z", dist.Normal(z, self.log_scale.exp()))


def draw(number):
    """Points from the model [B, 2]."""
    address = torch.randint(len(memory), (number,))
    return memory[address] + torch.randn(number, 1) * DIRECTION + NOISE * torch.randn(number, 2)


# %% [markdown]
# ## Why it needs a trick
#
# The bound that we maximise is an expectation under $q$, and the parameters that we train sit inside $q$. For
# $z$ that is no problem: $z = \mu + \sigma \varepsilon$ is a differentiable function of noise. For $a$ there is
# no such function. The score-function identity helps,
#
# $$\nabla_\phi\, \mathbb E_{q_\phi(a)}[f(a)] = \mathbb E_{q_\phi(a)}[(f(a) - c)\, \nabla_\phi \log q_\phi(a)],$$
#
# for any baseline $c$ that does not depend on $a$. The multi-sample bound $L = \log \frac1K \sum_k w_k$ has the
# same with a $c_k$ for each particle $k$, made of the others. **VIMCO** takes the bound of the others,
# $\log \frac{1}{K-1} \sum_{l \ne k} w_l$; **leave-one-out** (`loo`) strikes particle $k$ from the sum and
# leaves the rest as it is, $\log \frac1K \sum_{l \ne k} w_l$. A constant lies between the two, and we shall see
# what it does.
#
# ## The judge: enumeration
#
# With five addresses the expectation over $a$ is a sum of five terms, so the exact gradient is at hand.
# `compare` draws each estimator's gradient many times and holds it against that.

# %%
guide = Guide()
x = draw(16)
names = ("reinforce", "vimco", "loo", "vimco+common")
table = compare(
    model, guide, (x,), estimators={name: make(name, 4) for name in names}, draws=300, show_progress=False
)
print(f"{'estimator':12} {'bias, z':>8} {'variance/G^2':>13} {'SNR':>6}    reference: {table.rows[0].reference}")
for name in names:
    row = table.of(name, "discrete guide")
    print(f"{name:12} {row.bias_z:8.1f} {row.relative_variance:13.2f} {row.snr:6.2f}")

# %% [markdown]
# All are unbiased (the bias is less than four of its standard errors), and their noise differs by a lot. The
# last one draws a single $\varepsilon$ per image and gives it to all particles, *common noise*: then their
# weights differ because of the address alone, and it shows more clearly which address was the better one. Here
# that helps a little; on Omniglot it trained worse than VIMCO itself (`experiments/results/estimators.md`).
#
# ## The trap
#
# Pyro has a multi-sample bound too, `RenyiELBO(alpha=0)`. Look at the gradient that it gives $q(a \mid x)$:


# %%
def gradient(elbo):
    """Lengths of one gradient of the part that looks, and of the part that slides."""
    guide.zero_grad()
    elbo.loss_and_grads(model, guide, x)
    parts = (guide.look.parameters(), guide.slide.parameters())
    return [round(sum(p.grad.square().sum().item() for p in part) ** 0.5, 3) for part in parts]


trap = RenyiELBO(alpha=0, num_particles=4, max_plate_nesting=1, vectorize_particles=True)
ours = MultiSampleELBO(4, baseline=vimco, max_plate_nesting=1)
print("lengths of the gradients of q(a|x) and q(z|x,a):")
print("RenyiELBO      ", gradient(trap))
print("MultiSampleELBO", gradient(ours))

# %% [markdown]
# Zero: it differentiates through $z$ and lets $a$ go by. Training goes on, the loss falls as $q(z \mid x, a)$
# learns, and the guide looks wherever it happened to look at the start. No error, no warning.
#
# ## Training
#
# The exact posterior over the address is known here ($z$ can be integrated out: $x \mid a$ is a Gaussian with
# covariance $\sigma^2 I + d\,d^\top$), so we can watch how far each guide is from it.

# %%
covariance = NOISE**2 * torch.eye(2) + torch.outer(DIRECTION, DIRECTION)
held_out = draw(500)
exact = dist.MultivariateNormal(memory, covariance).log_prob(held_out.unsqueeze(1)).log_softmax(-1)  # [500, S]


def distance(guide):
    """Mean KL of q(a | x) from the exact posterior, nats."""
    with torch.no_grad():
        q = guide.look(held_out).log_softmax(-1)
    return (q.exp() * (q - exact)).sum(-1).mean().item()


def train(elbo, updates=400):
    """The distance after every tenth update of a fresh guide."""
    torch.manual_seed(1)
    guide, distances = Guide(), []
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    for update in range(updates):
        if update % 10 == 0:
            distances.append(distance(guide))
        optimizer.zero_grad()
        elbo.loss_and_grads(model, guide, draw(16))
        optimizer.step()
    return distances


objectives = {
    "RenyiELBO: the trap": trap,
    "reinforce": MultiSampleELBO(4, baseline=reinforce, max_plate_nesting=1),
    "vimco": MultiSampleELBO(4, baseline=vimco, max_plate_nesting=1),
    "loo": MultiSampleELBO(4, baseline=loo, max_plate_nesting=1),
    "enumeration": make("pyro-enum", 1),
}
figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
for name, elbo in objectives.items():
    distances = train(elbo)
    axes.plot(range(0, 10 * len(distances), 10), distances, label=name)
    print(f"{name:22} {distances[0]:.2f} to {distances[-1]:.3f} nats from the exact posterior")
axes.set(xlabel="updates", ylabel="KL(q(a|x) || p(a|x)), nats", yscale="log", title="learning where to look")
axes.legend(fontsize=8)
keep(figure, "02_training")

# %% [markdown]
# ## More particles
#
# For the model, more particles mean a tighter bound and a better gradient. For a guide trained with plain
# reparameterisation they are a mixed blessing: the signal-to-noise ratio of its gradient *falls* as
# $1/\sqrt K$, since the tight bound leaves the guide little to gain (Rainforth et al. 2018). Doubly
# reparameterised gradients (`dreg`) turn that round. We look at a guide that has learned for a while.

# %%
torch.manual_seed(2)
trained = Guide()
optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
for _ in range(70):
    optimizer.zero_grad()
    MultiSampleELBO(4, max_plate_nesting=1).loss_and_grads(model, trained, draw(16))
    optimizer.step()

PARTICLES = (2, 4, 8, 16, 32)
groups = {
    "discrete guide": ("reinforce", "vimco", "loo", "vimco+common"),
    "continuous guide": ("vimco", "vimco+dreg"),
}
figure = Figure(figsize=(10, 4), layout="constrained")
for axes, (group, names) in zip(figure.subplots(1, 2), groups.items(), strict=True):
    for name in names:
        snr = []
        for k in PARTICLES:
            estimator = {name: make(name, k)}
            found = compare(
                model, trained, (x,), estimators=estimator, draws=150, reference_draws=2, show_progress=False
            )
            snr.append(found.of(name, group).snr or float("nan"))  # 0: not to be told from noise
        axes.plot(PARTICLES, snr, marker="o", label=name)
    axes.set(title=group, xlabel="particles K", ylabel="signal-to-noise ratio", xscale="log", yscale="log")
    axes.set_xticks(PARTICLES, [str(k) for k in PARTICLES])
    axes.minorticks_off()
    axes.legend(fontsize=8)
keep(figure, "02_particles")

# %% [markdown]
# Right, what was promised: more particles bury the guide's plain gradient in noise, and `dreg` lifts it out.
# Left, the same for the address, and that constant: with VIMCO the signal sinks as well, with `loo` it grows
# like $\sqrt K$ (Lievin et al. 2020). Far from the posterior, at the start of training, VIMCO is no worse than
# `loo`, as the curves above show. Which is best for *your* model is a matter of measuring it:
# `experiments/estimators_on_your_model.py`.
#
# ## Exercises
#
# 1. Give `RenyiELBO` one particle, `num_particles=1`. Is the gradient of the part that looks still zero? Try
#    it.
# 2. Why may $c_k$ not depend on particle $k$? Find the term in the identity that would no longer vanish.
# 3. Enumeration is exact and fast here. What does it cost with 32 images in memory, a deep decoder, and 64
#    targets?
# 4. Write a baseline of your own, the mean of the *logarithms* of the other weights, and measure it with
#    `compare`.
#
# <details><summary>Answers</summary>
#
# 1. Yes. The score term is missing whatever the number. With one particle `pyro.infer.Trace_ELBO` is right, and
#    so is `MultiSampleELBO(1, baseline=reinforce)`.
# 2. $\mathbb E[c\, \nabla \log q(a)] = c\, \nabla \sum_a q(a) = c\, \nabla 1 = 0$ needs $c$ outside of the sum
#    over $a$.
# 3. 32 times the decoder evaluations of one particle, 8 times those of four. In return the gradient has no
#    noise from the address. For thousands of entries it is out of reach.
# 4. See the last cell. A mean of logarithms lies far below the logarithm of a mean where weights differ by
#    much, so it is the worse guess.
#
# </details>


# %%
@score_baseline(min_particles=2)
def mean_of_logs(log_weights):
    """The mean of the others' log weights, for log weights [K, B]."""
    return (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)


ours = {"mean_of_logs": MultiSampleELBO(4, baseline=mean_of_logs, max_plate_nesting=1), "vimco": make("vimco", 4)}
table = compare(model, guide, (x,), estimators=ours, draws=300, show_progress=False)
for name in ours:
    row = table.of(name, "discrete guide")
    print(f"{name:12} bias {row.bias_z:.1f} of its standard errors, SNR {row.snr:.2f}")
one = RenyiELBO(alpha=0, num_particles=1, max_plate_nesting=1, vectorize_particles=True)
print("exercise 1:", gradient(one))
