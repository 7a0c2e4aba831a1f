# %% [markdown]
# # 4. What a lookup is worth
#
# - A report splits the cost of an image into the lookup, the variation, and the strokes that are left to say.
# - The memory may be far larger than in training: the cost of an image grows by the price of a name, $\log C$, at
#   most.
# - More renderings of a character make the next one cheaper: that is learning, without a single update.
#
# You need: lessons 1 and 3. Nothing is trained here: the model comes with the package. It was trained on
# handwritten characters (Omniglot) with 36 entries in memory. The ones below are made by a program and unlike
# them, so that nats here do not compare with those of the README.

# %%
import math

import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of

from vma_pyro import AddressIndex, Memory, load_pretrained
from vma_pyro.data import EpisodeSampler, NestedEpisodes, glyphs
from vma_pyro.evaluation import kl_report, log_likelihood

model, guide = load_pretrained("omniglot")
characters = glyphs.load(classes=600)  # 12,000 images of characters made by a program
IMAGES, SAMPLES = 60, 100

# %% [markdown]
# ## Reading the report
#
# $$-\text{bound} = \underbrace{\mathrm{KL}(q(a|x)\,\|\,p(a))}_{\text{the lookup}}
#   + \underbrace{\mathbb E\,\mathrm{KL}(q(z|x,m_a)\,\|\,p(z|m_a))}_{\text{the variation}}
#   + \underbrace{\mathbb E[-\log p(x \mid z, m_a)]}_{\text{the rest of the strokes}}$$
#
# All three in nats per image; divide by $\log 2$ for bits. The bound is that of one sample of the guide. The NLL
# of tables and plots is a tighter one, minus $\log \frac1K \sum_k w_k$ of many samples.

# %%
episode = EpisodeSampler(characters, classes=8, shots=4, queries=IMAGES, seed=0).sample()
report = kl_report(model, guide, episode.memory, episode.x, labels=episode.labels)
print("the lookup, KL(a)          ", report.kl_address, "of at most", round(report.log_memory, 2))
print("                    in bits", report.kl_address_bits)
print("the variation, KL(z)       ", report.kl_z)
print("the rest                   ", report.reconstruction)
parts = (report.kl_address, report.kl_z, report.reconstruction)
print("all three                  ", round(sum(part.mean for part in parts), 2))
print(f"NLL, {report.samples} samples           ", report.nll)
print("entries still in play      ", report.perplexity, "of", episode.memory.size)
print("q(a|x) on the right class  ", report.right_class)

# %% [markdown]
# KL(a) near $\log 8 \approx 2.08$ would mean: it knows the character, and any of its four renderings will do.
# Up to $\log 32 \approx 3.47$: it also finds one rendering more useful than the other three.
#
# KL(a) is what the lookup costs, not yet what it is worth: that takes a model without a memory to compare with,
# and is `information_gained` in the report (lesson 3).
#
# ## A larger memory: the line $L_1 + \log C$
#
# Let $L_1$ be the cost of an image with $M_1$ in memory, some renderings of its own character, and add characters
# until there are $C$, each with as many renderings. Each address is now $C$ times less probable, so that
#
# $$p(x \mid M) \ge \frac1C\, p(x \mid M_1), \qquad\text{that is}\qquad L_C \le L_1 + \log C,$$
#
# whatever the model. What we measure is a bound: it keeps to the line only as long as the guide finds the entries
# that explain the image.

# %%
nested = NestedEpisodes(characters, images=IMAGES, seed=0)  # the same targets under memories of any size


def cost(classes, shots):
    """NLL of each target [IMAGES], nats."""
    bounds = [
        log_likelihood(model, guide, episode.memory, episode.x, num_samples=SAMPLES)
        for episode in nested.episodes(classes, shots)
    ]
    return -torch.cat(bounds)


def change(nlls):
    """How much more than the first, paired by image: means and standard errors."""
    differences = torch.stack(nlls) - nlls[0]
    return differences.mean(1), differences.std(1) / IMAGES**0.5


sizes = (1, 2, 4, 8, 16, 32, 64, 128)
means, errors = change([cost(classes, 4) for classes in sizes])
figure = Figure(figsize=(10, 4), layout="constrained")
by_classes, by_shots = figure.subplots(1, 2)
by_classes.errorbar(sizes, means, errors, marker="o", capsize=3, label="measured")
by_classes.plot(sizes, [math.log(c) for c in sizes], color="black", linestyle=":", label="log C")
by_classes.axvline(36 / 4, color="tab:gray", linewidth=1, label="memory in training: 36 entries")
by_classes.set(xscale="log", xlabel="characters C in memory, 4 renderings of each", ylabel="L_C - L_1, nats")
by_classes.set_xticks(sizes, [str(size) for size in sizes])
by_classes.minorticks_off()
by_classes.legend(fontsize=8)
for classes, mean, error in zip(sizes, means, errors, strict=True):
    print(f"{classes:3} characters: {mean:5.2f} ± {error:.2f} nats more than one, log C = {math.log(classes):.2f}")
    assert mean <= math.log(classes) + 2 * error

# %% [markdown]
# ## What more renderings buy
#
# Now the right character alone, with more and more renderings of it. A lookup then finds one that is more like
# the target.

# %%
shots = (1, 2, 4, 8, 19)
means, errors = change([cost(1, number) for number in shots])
by_shots.errorbar(shots, means, errors, marker="o", capsize=3)
by_shots.set_xticks(shots, [str(number) for number in shots])
by_shots.set(xlabel="renderings of the target's character in memory", ylabel="nats more than with one rendering")
assert means[-1] < -5
keep(figure, "04_sizes")

# %% [markdown]
# The images are the same everywhere, so that these differences are known much better than the costs themselves. No
# parameter changes along the curves. What a model usually has to learn by gradients it has here as soon as the
# images lie in its memory.
#
# ## Twelve thousand entries
#
# `AddressIndex` keeps a key for each entry, so that the posterior over all of them is one matrix product. The
# target's own image is left out.

# %%
entries = torch.from_numpy(characters.images).float().unsqueeze(2)  # [600, 20, 1, 28, 28]
chosen = torch.arange(0, len(characters), 100)  # 6 characters
targets, rest = entries[chosen, 0], entries[:, 1:].flatten(0, 1)  # 11,400 entries
index = AddressIndex.encode(model, guide, rest)
top = index.top(targets, k=6)
same = top.address // 19 == chosen.unsqueeze(1)
print("entries of the target's own character among the first six:", same.sum(1).tolist())
print("probability of the first:", top.log_prob[:, 0].exp().numpy().round(3))
columns = [targets, *(rest[top.address[:, place]] for place in range(6))]
keep(rows_of(columns, ["x", "first", "second", "third", "fourth", "fifth", "sixth"]), "04_among_thousands")

# %% [markdown]
# ## Exercises
#
# 1. KL(a) is 2.5 nats at $|M| = 32$. How many equally good entries is that?
# 2. Could $L_C$ lie *above* $L_1 + \log C$? What would that say?
# 3. Remove the right character from the memory (`Memory(rest)` without its 19 entries). What do you expect of
#    KL(a), KL(z) and the rest? Try it with `kl_report`.
#
# <details><summary>Answers</summary>
#
# 1. $32 / e^{2.5} \approx 2.6$.
# 2. Yes, if the guide fails to find the right entry: $q(a|x)$ then spreads over wrong ones, and the bound pays.
#    The *exact* $-\log p(x \mid M)$ cannot: $p(x \mid M) \ge \frac1C p(x \mid M_1)$.
# 3. KL(z) and the rest rise: what the entry cannot tell has to be told by $z$, and what $z$ cannot tell costs
#    strokes. KL(a) falls by little: some wrong character is the most similar one, and the guide looks there. It
#    says how decided a lookup was, and not that it was right; for that the report takes labels (`right_class`).
#
# </details>

# %%
by_class = rest.unflatten(0, (len(characters), 19))
right, wrong = by_class[chosen].flatten(0, 1), by_class[1:17].flatten(0, 1)  # 6 characters, 16 others
for name, entries in (("right and wrong", torch.cat([right, wrong[: -len(right)]])), ("wrong alone", wrong)):
    found = kl_report(model, guide, Memory(entries), targets)  # exercise 3; 304 entries both times
    print(f"{name:16} KL(a) {found.kl_address}   KL(z) {found.kl_z}   the rest {found.reconstruction}")
