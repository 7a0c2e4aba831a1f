# %% [markdown]
# # 2. Learning to look
#
# - A network $q(a \mid x, M)$ can learn to find the entry, though an address has no derivative: the score
#   function.
# - Its gradient is noisy. Good baselines (VIMCO, leave-one-out) cut the noise; enumeration is the judge of them
#   all.
# - A trap: Pyro's own multi-sample bound, `RenyiELBO(alpha=0)`, gives a discrete guide no gradient at all, and
#   says nothing.
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

from vma_pyro.infer import MultiSampleELBO, compare, fit_slope, loo, make, reinforce, score_baseline, vimco

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
# for any baseline $c$ that does not depend on $a$, where $f$ itself is free of $\phi$. The bound of $K$ particles,
# $L = \log \frac1K \sum_k w_k$ with $w_k = p(x, a_k, z_k) / q(a_k, z_k \mid x)$, is a function of $K$ addresses,
# and $q$ stands in its weights as well:
#
# $$\nabla_\phi\, \mathbb E[L] = \mathbb E\Big[\sum_k (L - c_k)\, \nabla_\phi \log q_\phi(a_k)
#   + \sum_k v_k \nabla_\phi \log w_k\Big], \qquad v_k = \frac{w_k}{\sum_l w_l}.$$
#
# Each particle has a baseline of its own, made of the others. The second sum is the ordinary derivative, which
# trains the model and $q(z \mid x, a)$; it contains $-v_k \nabla \log q(a_k)$, whose mean vanishes for $K = 1$ but
# not for more. So what multiplies $\nabla \log q(a_k)$ in all is $L - c_k - v_k$:
#
# - **VIMCO** takes for $c_k$ the bound of the others, $\log \frac{1}{K-1} \sum_{l \ne k} w_l$;
# - **leave-one-out** (`loo`) strikes particle $k$ from the sum and leaves the rest as it is,
#   $\log \frac1K \sum_{l \ne k} w_l$. What is left is $-\log(1 - v_k) - v_k$: nothing for a particle that
#   weighs nothing. VIMCO's is less by $\log \frac{K}{K-1}$ for every particle. This constant changes no mean,
#   and we shall see what it does to the noise.
#
# ## The judge: enumeration
#
# There are five addresses, so four particles can hold $5^4 = 625$ combinations of them, and the expectation over
# addresses is a sum (that over $z$ a mean of many draws). `compare` draws each estimator's gradient many times and
# holds it against that. Common noise is another objective; its judge sums as well, with the noise shared.

# %%
guide = Guide()
x = draw(16)
names = ("reinforce", "vimco", "loo", "vimco+common")
table = compare(
    model, guide, (x,), estimators={name: make(name, 4) for name in names}, draws=300, show_progress=False
)
print(f"{'estimator':12} {'bias, z':>8} {'variance/G^2':>13} {'SNR':>6}    reference")
for name in names:
    row = table.of(name, "discrete guide")
    print(f"{name:12} {row.bias_z:8.1f} {row.relative_variance:13.2f} {row.snr:6.2f}    {row.reference}")
    assert row.bias_z < 4

# %% [markdown]
# The first three are unbiased, to all that these draws can tell (the difference is less than four of its
# standard errors), and their noise differs by a lot. The last one draws a single $\varepsilon$ per image and
# gives it to all particles, *common noise*: then their weights differ because of the address alone, and it shows
# more clearly which address was the better one. The bound becomes another one by that: the row has a
# $G$ of its own, of which it is an unbiased estimate as well. On Omniglot it trained worse than
# VIMCO (`experiments/results/estimators.md`).
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
    "rloo: four separate bounds": make("rloo", 4),
    "enumeration, of one bound": make("pyro-enum", 1),
}
final = {}
figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
for name, elbo in objectives.items():
    distances = train(elbo)
    axes.plot(range(0, 10 * len(distances), 10), distances, label=name)
    final[name] = distances[-1]
    print(f"{name:26} {distances[0]:.2f} to {distances[-1]:.3f} nats from the exact posterior")
assert final["RenyiELBO: the trap"] > 2 * final["reinforce"] > 2 * final["vimco"]
axes.set(xlabel="updates", ylabel="KL(q(a|x) || p(a|x)), nats", yscale="log", title="learning where to look")
axes.legend(fontsize=8)
keep(figure, "02_training")

# %% [markdown]
# Three things are to be seen. The trap learns nothing about where to look. A baseline makes up for a good part
# of the noise. And the two lowest curves have another *objective*: enumeration and `rloo` (four addresses, each
# with a bound of its own, and the others' mean as its baseline) follow the single-sample bound, whose distance
# from $\log p(x)$ contains the KL that is plotted. The bound of four particles is content with a guide that has
# one good particle among four. It is the better objective for the *model*, which is fixed here.
#
# ## More particles
#
# For the model, more particles mean a tighter bound and a better gradient. For a guide trained with plain
# reparameterisation they are a mixed blessing: for large $K$ the signal-to-noise ratio of its gradient *falls* as
# $1/\sqrt K$, since the tight bound leaves the guide little to gain (Rainforth et al. 2018). Doubly
# reparameterised gradients (`dreg`, Tucker et al. 2019) turn that round. We look at a guide that has learned for a
# while.

# %%
torch.manual_seed(2)
trained = Guide()
optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
for _ in range(70):
    optimizer.zero_grad()
    MultiSampleELBO(4, max_plate_nesting=1).loss_and_grads(model, trained, draw(16))
    optimizer.step()

PARTICLES, DRAWS = (2, 4, 8, 16, 32), 400
groups = {
    "discrete guide": ("reinforce", "vimco", "loo", "vimco+common"),
    "continuous guide": ("vimco", "vimco+dreg"),
}
slopes = {}
figure = Figure(figsize=(10, 4), layout="constrained")
for axes, (group, names) in zip(figure.subplots(1, 2, sharey=True), groups.items(), strict=True):
    for name in names:
        snr = {}
        for k in PARTICLES:
            found = compare(
                model,
                trained,
                (x,),
                estimators={name: make(name, k)},
                draws=DRAWS,
                reference_draws=2,
                show_progress=False,
            )
            snr[k] = found.of(name, group).snr
        seen = {k: value for k, value in snr.items() if value > DRAWS**-0.5}  # the rest is not told from noise
        axes.plot(list(seen), list(seen.values()), marker="o", label=name)
        slopes[group, name] = fit_slope(list(seen), list(seen.values())) if len(seen) > 1 else float("-inf")
        print(f"{group:16} {name:12} SNR grows with K to the power of {slopes[group, name]:+.2f}")
    for power, label in ((0.5, "powers of 1/2 and -1/2"), (-0.5, None)):
        axes.plot(PARTICLES, [0.5 * (k / 8) ** power for k in PARTICLES], ":", color="tab:gray", label=label)
    axes.set(title=group, xlabel="particles K", ylabel="signal-to-noise ratio", xscale="log", yscale="log")
    axes.set_xticks(PARTICLES, [str(k) for k in PARTICLES])
    axes.minorticks_off()
    axes.legend(fontsize=8)
keep(figure, "02_particles")
assert slopes["discrete guide", "loo"] > 0.5 > 0 > slopes["discrete guide", "vimco"]
assert slopes["continuous guide", "vimco+dreg"] > 0 > slopes["continuous guide", "vimco"]

# %% [markdown]
# Right, what was promised: more particles bury the guide's plain gradient in noise, and `dreg` lifts it out. (The
# powers of one half are for many particles; with as few as here the slopes may be steeper.) Left, the same for the
# address, and that constant: with VIMCO the signal sinks after the first particles, with `loo` it grows (Lievin et
# al. 2020 prove $\sqrt K$). REINFORCE is lost in the noise of so many draws, where its curve ends. All that holds
# for this small program with a guide that is on its way. On Omniglot `loo` and VIMCO do not differ up to 64
# particles, and the signal grows with both. Which is best for *your* model is a matter of measuring it:
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
