# %% [markdown]
# # 1. A mixture is a memory
#
# - Choosing a component of a mixture *is* looking something up: the component is the entry, its index the
#   address.
# - Bayes' rule gives the exact posterior over the address; its KL from the prior says in nats what one lookup
#   told.
# - Under a uniform prior that is never more than $\log|M|$. Averaged over images that the model makes itself, it
#   is the mutual information of image and address.
#
# You need: Gaussians, Bayes' rule, and a little Python. Nothing is trained here.

# %%
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pictures import keep
from pyro.infer import TraceEnum_ELBO, config_enumerate

pyro.set_rng_seed(0)

# %% [markdown]
# ## The model
#
# The memory $M$ holds $S$ points of the plane. To make a new point $x$, the model picks an address $a$, reads
# the entry $m_a$, and adds noise:
#
# $$a \sim \mathrm{Uniform}\{1, \dots, S\}, \qquad x \mid a \sim \mathcal N(m_a, \sigma^2 I), \qquad
#   p(x \mid M) = \frac1S \sum_a \mathcal N(x; m_a, \sigma^2 I).$$
#
# A statistician calls this a Gaussian mixture with fixed means. We call the means a memory, since we shall swap
# them for others without changing anything else.

# %%
memory = torch.tensor([[-1.5, 0.5], [-0.5, 1.5], [0.0, -1.0], [0.8, -1.4], [1.6, 0.9]])  # [S, 2]
NOISE = 0.4


def model(memory, x, noise=NOISE):
    """p(a | M) p(x | m_a) for points x [B, 2]."""
    with pyro.plate("data", len(x), dim=-1):
        address = pyro.sample("address", dist.Categorical(logits=torch.zeros(len(memory))))
        pyro.sample("x", dist.Normal(memory[address], noise).to_event(1), obs=x)


# %% [markdown]
# ## The posterior over the address
#
# Given $x$, which entry was it? Bayes' rule answers exactly, as there are only $S$ possibilities:
#
# $$p(a \mid x, M) = \frac{p(a \mid M)\, p(x \mid m_a)}{\sum_{a'} p(a' \mid M)\, p(x \mid m_{a'})}.$$


# %%
def joint(memory, x, noise=NOISE):
    """log p(a, x | M) for every address: [B, S]."""
    likelihood = dist.Normal(memory, noise).to_event(1).log_prob(x.unsqueeze(1))  # [B, S]
    return likelihood - math.log(len(memory))


def posterior(memory, x, noise=NOISE):
    """p(a | x, M), [B, S]."""
    return joint(memory, x, noise).softmax(-1)


x = torch.tensor([[-1.5, 0.5], [-0.9, 1.0], [0.4, -1.2]])  # at an entry, and twice between two
print(posterior(memory, x).numpy().round(3))

# %% [markdown]
# Pyro finds the same by enumeration: it runs the model once with all values of the site side by side. This is
# how the exact gradient of the next lesson comes about.

# %%
nothing = TraceEnum_ELBO(max_plate_nesting=1)
marginals = nothing.compute_marginals(config_enumerate(model), lambda memory, x: None, memory, x)
assert torch.allclose(marginals["address"].probs, posterior(memory, x), atol=1e-6)

# %%
figure = Figure(figsize=(10, 4), layout="constrained")
plane, bars = figure.subplots(1, 2)
side = torch.linspace(-2.8, 2.8, 200)
grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)  # [200, 200, 2]
probs = posterior(memory, grid.flatten(0, 1)).unflatten(0, (200, 200))
colours = torch.tensor(
    [[0.12, 0.47, 0.71], [1, 0.5, 0.05], [0.17, 0.63, 0.17], [0.84, 0.15, 0.16], [0.58, 0.4, 0.74]]
)
plane.imshow((probs @ colours).numpy(), extent=(-2.8, 2.8, -2.8, 2.8), origin="lower", alpha=0.6)
plane.scatter(*memory.T.numpy(), c=colours.numpy(), edgecolors="black", s=70, label="entries m_a")
plane.scatter(*x.T.numpy(), c="black", marker="x", label="x")
for i, point in enumerate(x):
    plane.annotate(f"x{i + 1}", point.numpy() + 0.08)
    bars.bar(
        np.arange(5) + 0.27 * (i - 1),
        posterior(memory, x)[i].numpy(),
        width=0.25,
        color=f"{0.35 * i}",
        label=f"x{i + 1}",
    )
plane.legend(fontsize=8)
plane.set(title="which entry: p(a | x, M) mixes the colours", xlabel="x, first coordinate", ylabel="second")
bars.set(title="p(a | x, M)", xlabel="address a", ylabel="probability")
bars.legend()
keep(figure, "01_posterior")

# %% [markdown]
# ## What a lookup told
#
# Before seeing $x$, each address has probability $1/S$. After it, fewer are in play. The Kullback-Leibler
# divergence says by how much, in nats (divide by $\log 2$ for bits):
#
# $$\mathrm{KL}(a) = \sum_a p(a \mid x, M) \log \frac{p(a \mid x, M)}{p(a \mid M)} \;\le\; \log S .$$
#
# The bound is reached when one entry is certain. And the cost of $x$, $-\log p(x \mid M)$, splits exactly into
# the lookup and the rest:
#
# $$-\log p(x \mid M) = \mathrm{KL}(a) - \mathbb E_{p(a \mid x, M)} \log p(x \mid m_a).$$


# %%
def kl_address(memory, x, noise=NOISE):
    """KL of the posterior over the address from the uniform prior, nats [B]."""
    q = posterior(memory, x, noise)
    return (torch.xlogy(q, q)).sum(-1) + math.log(len(memory))


kl = kl_address(memory, x)
rest = -(posterior(memory, x) * (joint(memory, x) + math.log(len(memory)))).sum(-1)
nll = -joint(memory, x).logsumexp(-1)
print("          KL(a)  + rest   = -log p(x | M)   of at most", round(math.log(len(memory)), 3))
for i in range(3):
    print(f"x{i + 1}:     {kl[i]:7.3f} {rest[i]:7.3f} = {nll[i]:7.3f}")
assert torch.allclose(kl + rest, nll, atol=1e-5)

# %% [markdown]
# $x_1$ lies on an entry and tells almost everything ($\log 5 \approx 1.609$); $x_3$ lies exactly halfway
# between two, and a choice of two out of five is worth $\log 5 - \log 2 \approx 0.916$ nats. $x_2$ is somewhat
# nearer to one of two.
#
# ## The average is a mutual information
#
# Over points that the model makes itself, the mean of KL(a) is the mutual information $I(x; a)$: what an image
# tells about its address. With little noise it reaches $\log S$; with much noise all entries look alike, and it
# is zero.


# %%
def mutual_information(memory, noise, samples=4000):
    """Mean of KL(a) over x from the model: (nats, standard error)."""
    address = torch.randint(len(memory), (samples,))
    x = dist.Normal(memory[address], noise).sample()
    found = kl_address(memory, x, noise)
    return found.mean().item(), found.std().item() / math.sqrt(samples)


figure = Figure(figsize=(10, 4), layout="constrained")
by_noise, by_size = figure.subplots(1, 2)
noises = np.geomspace(0.05, 10, 25)
cloud = 2 * torch.randn(512, 2)  # entries of standard deviation 2; a memory of S holds the first S of them
for size in (2, 8, 32):
    found = [mutual_information(cloud[:size], noise) for noise in noises]
    (line,) = by_noise.plot(noises, [mean for mean, _ in found], marker="o", markersize=3, label=f"S = {size}")
    by_noise.axhline(math.log(size), color=line.get_color(), linestyle=":", linewidth=1)
by_noise.set(xscale="log", xlabel="noise", ylabel="I(x; a), nats", title="dotted: log S")
by_noise.legend()
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
for noise in (0.05, 0.2, 0.8):
    found = [mutual_information(cloud[:size], noise)[0] for size in sizes]
    (line,) = by_size.plot(sizes, found, marker="o", markersize=3, label=f"noise {noise}")
    by_size.axhline(math.log1p(2**2 / noise**2), color=line.get_color(), linewidth=0.5)
by_size.plot(sizes, np.log(sizes), color="black", linestyle=":", label="log S")
by_size.set(xscale="log", xlabel="entries S", ylabel="I(x; a), nats", title="thin lines: log(1 + 4 / noise^2)")
by_size.set_ylim(0, 7)
by_size.legend()
keep(figure, "01_information")

# %% [markdown]
# The right picture is worth a second look. Doubling the memory adds $\log 2$ nats as long as entries can be
# told apart. After that the cloud that they come from is full: more entries, no more information. Entries of
# standard deviation 2, so many that they fill it, leave a Gaussian channel with two coordinates, whose capacity
# is $2 \cdot \tfrac12 \log(1 + 2^2/\sigma^2)$: the thin lines. An image of 784 pixels has a great deal more room.
#
# ## What changes in Variational Memory Addressing
#
# | here | there |
# |---|---|
# | points of the plane | images of 28 x 28 pixels |
# | $p(x \mid m_a)$ is a Gaussian around the entry | $\int p(z \mid m_a)\,p(x \mid z, m_a)\,dz$, by networks |
# | the posterior by Bayes' rule | the integral has no closed form: a network $q(a \mid x, M)$ learns to look |
#
# How such a $q$ can be learned, although an address has no derivative, is the next lesson.
#
# ## Exercises
#
# 1. Two entries are the same point. What is the largest KL(a) that an $x$ can have now?
# 2. Give the model the prior $p(a) = (0.96, 0.01, 0.01, 0.01, 0.01)$. Can KL(a) exceed $\log 5$?
# 3. Why is $I(x; a)$ measured with $x$ from the model, and not with points of your own?
#
# <details><summary>Answers</summary>
#
# 1. The posterior of the two is equal for every $x$. An $x$ at another entry still has $\log 5$; one at the
#    doubled point has $\log 5 - \log 2$.
# 2. Yes. KL(a) of a certain address is $-\log p(a)$, which is $\log 100 \approx 4.6$ for a rare one. The bound
#    $\log S$ holds for a uniform prior. The *mean* over the model's own points is still at most the prior's
#    entropy, 0.22 nats.
# 3. $I(x; a)$ is an expectation under the joint distribution $p(a, x)$. With other points the mean of KL(a)
#    splits into $\mathbb E_x\,\mathrm{KL}(p(a|x)\,\|\,\bar p(a)) + \mathrm{KL}(\bar p(a)\,\|\,p(a))$, where
#    $\bar p$ is the mean posterior: it is a mutual information plus how far from uniform the use of the
#    addresses is.
#
# </details>

# %%
rare = torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01])
common, seldom = -rare.log().max().item(), -rare.log().min().item()
print(
    f"exercise 2: KL(a) of a certain address is {common:.3f} nats for the common one, {seldom:.3f} for a rare one,"
)
print(f"and on average over the model's points at most {dist.Categorical(rare).entropy().item():.3f}")
