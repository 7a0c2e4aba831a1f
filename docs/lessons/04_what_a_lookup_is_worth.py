# %% [markdown]
# # 4. What a lookup is worth
#
# - A report splits the cost of an image into the lookup, the variation, and the strokes that are left to say.
# - The memory may be far larger than in training: the cost grows by the price of a name, $\log C$, and no more.
# - More renderings of a character make the next one cheaper: that is learning, without a single update.
#
# You need: lessons 1 and 3. Nothing is trained here: the model comes with the package. It was trained on
# handwritten characters (Omniglot) with 36 entries in memory, and has never seen the ones below.

# %%
import math

import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of

from vma_pyro import LargeMemory, Memory, load_pretrained
from vma_pyro.data import EpisodeSampler, NestedEpisodes, glyphs
from vma_pyro.evaluation import kl_report, log_likelihood

model, guide = load_pretrained("omniglot")
characters = glyphs.load(classes=600)  # 12,000 images of characters made by a program
IMAGES = 60

# %% [markdown]
# ## Reading the report
#
# $$-\text{bound} = \underbrace{\mathrm{KL}(q(a|x)\,\|\,p(a))}_{\text{the lookup}}
#   + \underbrace{\mathbb E\,\mathrm{KL}(q(z|x,m_a)\,\|\,p(z|m_a))}_{\text{the variation}}
#   + \underbrace{\mathbb E[-\log p(x \mid z, m_a)]}_{\text{the rest of the strokes}}$$
#
# All three in nats per image; divide by $\log 2$ for bits.

# %%
episode = EpisodeSampler(characters, classes=8, shots=4, queries=IMAGES, seed=0).sample()
report = kl_report(model, guide, episode.memory, episode.x, labels=episode.labels)
print("the lookup, KL(a)          ", report.kl_address, "of at most", round(report.log_memory, 2))
print("                    in bits", report.kl_address_bits)
print("the variation, KL(z)       ", report.kl_z)
print("the rest                   ", report.reconstruction)
print("entries still in play      ", report.perplexity, "of", episode.memory.size)
print("q(a|x) on the right class  ", report.right_class)

# %% [markdown]
# KL(a) near $\log 8 \approx 2.08$ would mean: it knows the character, and any of its four renderings will do.
# Up to $\log 32 \approx 3.47$: it also finds one rendering more useful than the other three.
#
# ## A larger memory: the line $L_1 + \log C$
#
# Put more characters into the memory, of which one is the target's. If each lookup finds it, the image costs
# $\log C$ more than with that character alone, since it was one of $C$ equally probable ones:
# $L_C \le L_1 + \log C$.

# %%
nested = NestedEpisodes(characters, images=IMAGES, seed=0)


def cost(classes, shots):
    """NLL of the same targets under memories of such a size: (nats, standard error)."""
    bounds = [
        log_likelihood(model, guide, episode.memory, episode.x, num_samples=20)
        for episode in nested.episodes(classes, shots)
    ]
    nll = -torch.cat(bounds)
    return nll.mean().item(), nll.std().item() / len(nll) ** 0.5


sizes = (1, 2, 4, 8, 16, 32, 64, 128)
found = [cost(classes, 4) for classes in sizes]
figure = Figure(figsize=(10, 4), layout="constrained")
by_classes, by_shots = figure.subplots(1, 2)
by_classes.errorbar(sizes, [m for m, _ in found], [e for _, e in found], marker="o", label="measured")
by_classes.plot(
    sizes, [found[0][0] + math.log(c) for c in sizes], color="black", linestyle=":", label="L_1 + log C"
)
by_classes.axvline(36 / 4, color="tab:gray", linewidth=1, label="memory in training: 36 entries")
by_classes.set(xscale="log", xlabel="characters in memory, 4 renderings of each", ylabel="NLL, nats per image")
by_classes.set_xticks(sizes, [str(size) for size in sizes])
by_classes.minorticks_off()
by_classes.legend(fontsize=8)

# %% [markdown]
# ## What more renderings buy
#
# Now the right character alone, with more and more renderings of it. A lookup then finds one that is more like
# the target.

# %%
shots = (1, 2, 4, 8, 19)
found = [cost(1, number) for number in shots]
by_shots.errorbar(shots, [m for m, _ in found], [e for _, e in found], marker="o")
by_shots.set_xticks(shots, [str(number) for number in shots])
by_shots.set(xlabel="renderings of the target's character in memory", ylabel="NLL, nats per image")
keep(figure, "04_sizes")

# %% [markdown]
# (The bars are the standard errors of each mean. The images are the same everywhere, so that differences are
# known much better.) No parameter changes along these curves. What a model usually has to learn by gradients it
# has here as soon as the images lie in its memory.
#
# ## Twelve thousand entries
#
# `LargeMemory` keeps a key for each entry, so that the posterior over all of them is one matrix product. The
# target's own image is left out.

# %%
entries = torch.from_numpy(characters.images).float().unsqueeze(2)  # [600, 20, 1, 28, 28]
chosen = torch.arange(0, len(characters), 100)  # 6 characters
targets, rest = entries[chosen, 0], entries[:, 1:].flatten(0, 1)  # 11,400 entries
large = LargeMemory.encode(model, guide, rest)
top = large.top(model, guide, targets, k=6)
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
# 3. KL(a) falls, as no entry is much better than others. KL(z) and the rest rise: what the entry cannot tell
#    has to be told by $z$, and what $z$ cannot tell costs strokes.
#
# </details>

# %%
by_class = rest.unflatten(0, (len(characters), 19))
right, wrong = by_class[chosen].flatten(0, 1), by_class[1:17].flatten(0, 1)  # 6 characters, 16 others
for name, entries in (("right and wrong", torch.cat([right, wrong[: -len(right)]])), ("wrong alone", wrong)):
    found = kl_report(model, guide, Memory(entries), targets)  # exercise 3; 304 entries both times
    print(f"{name:16} KL(a) {found.kl_address}   KL(z) {found.kl_z}   the rest {found.reconstruction}")
