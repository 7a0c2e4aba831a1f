# %% [markdown]
# # 3. From mixture to VMA
#
# - With networks for $p(x \mid z, m_a)$ and $q(a \mid x, M)$, the mixture becomes a model that imitates an
#   image it reads.
# - KL(a) rises by itself in training: no annealing, no schedule. The model finds that looking things up pays.
# - Soft attention reads a mean of all entries instead of one; with many distractors it loses track.
#
# You need: lessons 1 and 2. Two small models are trained, a minute each on two CPU cores.

# %%
import math
import tempfile
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of

from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro.baselines import SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import EpisodeSampler, NestedEpisodes, glyphs
from vma_pyro.evaluation import address_posterior, classify, kl_report, log_likelihood
from vma_pyro.infer import MultiSampleELBO, vimco
from vma_pyro.record import read_metrics
from vma_pyro.training import TrainConfig, fit

pyro.settings.set(module_local_params=True)  # parameters live in the modules
UPDATES, IMAGES = 1000, 80

# %% [markdown]
# ## Characters nobody has seen
#
# The data are made on the spot: characters of a few strokes, in alphabets, twenty shaky renderings of each.
# Some characters are for training; others, from other alphabets, stay unseen until the end.

# %%
seen, unseen = glyphs.load(classes=300), glyphs.load(classes=60, seed=1)
images = torch.from_numpy(seen.images[:8, :8]).float()
keep(rows_of([images[:, n : n + 1] for n in range(8)]), "03_glyphs")

# %% [markdown]
# ## One episode
#
# Training proceeds in episodes. Each draws 8 characters, puts 4 renderings of each into the memory
# ($|M| = 32$), and asks for other renderings of the same characters. A target is never in its own memory:
# copying cannot help, varying does.

# %%
episodes = EpisodeSampler(seen, classes=8, shots=4, queries=32, seed=0)
episode = episodes.sample()
print("memory", tuple(episode.memory.entries.shape), " targets", tuple(episode.x.shape))

# %% [markdown]
# ## The model
#
# $$p(x \mid M) = \sum_a p(a \mid M) \int p(z \mid m_a)\, p(x \mid z, m_a)\, dz$$
#
# `vma_pyro/model.py` and `guide.py` say this in Pyro; read them now, they take two minutes. Model and guide
# share their networks. The guide finds an entry by the similarity of its key to that of the image.


# %%
def train(model, guide):
    """The lines of a run's diary: bound, KL(a), KL(z) along the way."""
    torch.manual_seed(0)
    episodes = EpisodeSampler(seen, classes=8, shots=4, queries=16, seed=0)
    config = TrainConfig(updates=UPDATES, log_every=25, warmup_updates=50)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, guide, MultiSampleELBO(4, baseline=vimco), episodes, config=config, folder=Path(folder))
        return read_metrics(Path(folder) / "metrics.jsonl")


torch.manual_seed(0)
networks = ConvNetworks(latent_dim=16, width=0.25)
model, guide = Model(networks), Guide(networks)
diary = train(model, guide)

# %%
figure = Figure(figsize=(10, 3.5), layout="constrained")
for axes, key, title in zip(
    figure.subplots(1, 3), ("bound", "kl_address", "kl_z"), ("bound", "KL(a)", "KL(z)"), strict=True
):
    axes.plot([line["update"] for line in diary], [line[key] for line in diary])
    axes.set(title=title, xlabel="updates", ylabel="nats per image")
figure.axes[1].axhline(math.log(32), color="black", linestyle=":", label="log |M|")
figure.axes[1].legend()
keep(figure, "03_training")

# %% [markdown]
# The middle curve is the point of the paper. Nothing tells the model to use its memory, and no temperature is
# lowered: within a hundred updates a lookup is worth two nats and more, of at most $\log 32 \approx 3.47$.
# KL(z) comes later, when the decoder has learned what of an entry may vary.
#
# ## Where does it look?

# %%
torch.manual_seed(1)
test = EpisodeSampler(unseen, classes=8, shots=4, queries=64, seed=0).sample()
probs = address_posterior(guide, test.memory, test.x)  # [64, 32]
best = probs.topk(5)
columns = [test.x[:6]] + [test.memory.entries[best.indices[:6, place]] for place in range(5)]
keep(rows_of(columns, ["x", "first", "second", "third", "fourth", "fifth"]), "03_lookups")

# %%
report = kl_report(model, guide, test.memory, test.x, labels=test.labels)
print("KL(a):", report.kl_address, "nats of at most", round(report.log_memory, 2))
print("KL(z):", report.kl_z, "nats; share of q(a|x) on the right character:", report.right_class)
right = classify(guide, test.memory, test.x).argmax(1) == test.labels
print("8-way 4-shot classification, never trained for:", right.float().mean().item())

# %% [markdown]
# ## One-shot generation
#
# Give it a memory of one entry, a character that it has never seen, and sample. The address has no choice; what
# varies is $z$. (Each pixel is drawn by itself, so strokes fray. The model of lesson 4 was trained two hundred
# times as long.)

# %%
entries = torch.from_numpy(unseen.images[::8, 0]).float().unsqueeze(1)  # [8, 1, 28, 28]
torch.manual_seed(2)
with torch.no_grad():
    samples = [model(Memory(entries.unsqueeze(1))) for _ in range(9)]  # one memory of one entry for each image
keep(rows_of([entries, *samples], ["entry"]), "03_one_shot")

# %% [markdown]
# ## Soft attention, the usual way
#
# Most neural memories do not choose. They read the mean of all entries, weighted by a softmax, which has a
# derivative, so that nothing of lesson 2 is needed. Here is one on the same networks, with $z$ deciding where
# to look:
#
# $$p(x \mid M) = \int p(z)\, p(x \mid z, \bar m(z))\, dz, \qquad \bar m(z) = \sum_a \pi_a(z)\, m_a.$$

# %%
torch.manual_seed(0)
networks = ConvNetworks(latent_dim=16, width=0.25)
soft_model, soft_guide = SoftAttentionModel(networks), SoftAttentionGuide(networks)
train(soft_model, soft_guide)

# %%
sizes = (1, 2, 4, 8, 16, 32)
pairs = {"one entry is read": (model, guide), "soft attention": (soft_model, soft_guide)}
curves = {name: [] for name in pairs}
nested = NestedEpisodes(unseen, images=IMAGES, seed=0)  # the same targets, under larger and larger memories
for classes in sizes:
    for name, pair in pairs.items():
        bounds = [log_likelihood(*pair, e.memory, e.x, num_samples=20) for e in nested.episodes(classes, 4)]
        curves[name].append(-torch.cat(bounds).mean().item())
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for name, nlls in curves.items():
    axes.plot(sizes, nlls, marker="o", label=name)
axes.plot(
    sizes,
    [curves["one entry is read"][0] + math.log(c) for c in sizes],
    linestyle=":",
    color="black",
    label="the price of naming the class: + log C",
)
axes.set(xscale="log", xlabel="characters in memory, 4 renderings of each", ylabel="NLL, nats per image")
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.minorticks_off()
axes.legend(fontsize=8)
keep(figure, "03_distractors")

# %% [markdown]
# Both pay for more distractors. A lookup pays at most $\log C$, the price of naming one character of $C$
# (dotted); the mean of many entries also becomes a mush.
#
# ## Exercises
#
# 1. The loss is $-\log p(x \mid M)$ per image. Why can it not be lower with 32 characters in memory than with
#    one, which is the right one?
# 2. Set `UPDATES = 300`. Is KL(a) or the bound first to become good? Why?
# 3. Why does `EpisodeSampler` keep the target out of the memory? What would the model learn otherwise?
#
# <details><summary>Answers</summary>
#
# 1. It can, a little: entries of other characters may happen to explain the target better. But each address has
#    the prior probability $1/|M|$, so that the right ones weigh $1/32$ of what they weighed alone: 3.5 nats.
# 2. KL(a). Any similarity between image and entry is enough to choose better than by chance, and each better
#    choice helps the decoder, which helps the choice. Fine strokes come later.
# 3. To copy: then $p(x \mid M) \ge 1/|M|$ for a perfect copy and the loss goes to $\log |M|$, whatever the
#    image. That is recall, figure 2A of the paper (`experiments/mnist_recall.py`), and a model of nothing.
#
# </details>
