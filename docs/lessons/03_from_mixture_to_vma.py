# %% [markdown]
# # 3. From mixture to VMA
#
# - With networks for $p(x \mid z, m_a)$ and $q(a \mid x, M)$, the mixture becomes a model that imitates an
#   image it reads.
# - KL(a) rises by itself in training, with no annealing and no schedule, and the image gets cheaper by more than
#   the lookup costs.
# - Soft attention reads a mean of all entries instead of one; here it falls behind where there are more
#   distractors than in training.
#
# You need: lessons 1 and 2. Three small models are trained, half a minute each on two CPU cores.

# %%
import math
import tempfile
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of

from vma_pyro import ConvNetworks, Guide, Memory, Model
from vma_pyro._system.metrics import read_metrics
from vma_pyro.comparisons import MemorylessGuide, MemorylessModel, SoftAttentionGuide, SoftAttentionModel
from vma_pyro.data import EpisodeSampler, NestedEpisodes, glyphs
from vma_pyro.evaluation import address_posterior, classify, encoded, kl_report, log_likelihood
from vma_pyro.guide import CosineSimilarity
from vma_pyro.infer import MultiSampleELBO, vimco
from vma_pyro.training import TrainConfig, fit

pyro.settings.set(module_local_params=True)  # parameters live in the modules
UPDATES, IMAGES = 1000, 160

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
# share their networks. The guide finds an entry by the similarity of its key to that of the image, here a scaled
# cosine as in the paper. (The default subtracts the memory's mean key first. On Omniglot $q(a \mid x, M)$ is flat
# at the start without it, and the decoder learns to do without the memory before the guide learns to look.)
#
# Beside it we train the same networks without a memory, an ordinary variational autoencoder: what a memory is
# worth is what it does better than that one.


# %%
def train(model, guide):
    """The lines of a run's diary, beginning before the first update: bound, KL(a), KL(z)."""
    start = kl_report(model, guide, episode.memory, episode.x, num_samples=10)
    diary = [{"update": 0, "bound": -start.nll.mean, "kl_address": start.kl_address.mean, "kl_z": start.kl_z.mean}]
    torch.manual_seed(0)
    episodes = EpisodeSampler(seen, classes=8, shots=4, queries=16, seed=0)
    plain = {"optimizer": "adam", "precision": "32-true"}  # as the paper trains, and the same on all machines
    config = TrainConfig(updates=UPDATES, log_every=25, warmup_updates=50, **plain)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, guide, MultiSampleELBO(4, baseline=vimco), episodes, config=config, folder=Path(folder))
        return diary + read_metrics(Path(folder) / "metrics.jsonl")


torch.manual_seed(0)
networks = ConvNetworks(latent_dim=16, width=0.25)
model, guide = Model(networks), Guide(networks, similarity=CosineSimilarity(centred=False))
diary = train(model, guide)

# %%
torch.manual_seed(0)
networks = ConvNetworks(latent_dim=16, width=0.25)
vae = MemorylessModel(networks), MemorylessGuide(networks)
vae_diary = train(*vae)

# %%
figure = Figure(figsize=(10, 3.5), layout="constrained")
for axes, key, title in zip(
    figure.subplots(1, 3), ("bound", "kl_address", "kl_z"), ("bound", "KL(a)", "KL(z)"), strict=True
):
    for name, lines in {"memory": diary, "no memory": vae_diary}.items():
        axes.plot([line["update"] for line in lines], [line.get(key, 0.0) for line in lines], label=name)
    axes.set(title=title, xlabel="updates", ylabel="nats per image")
figure.axes[0].set_ylim(-250, -140)  # the first lines lie far below
figure.axes[1].axhline(math.log(32), color="black", linestyle=":", label="log |M|")
figure.axes[1].legend(fontsize=8)
keep(figure, "03_training")

# %%
early = next(line for line in diary if line["update"] >= 0.15 * UPDATES)
print(
    f"KL(a) {diary[0]['kl_address']:.2f} before the first update, {early['kl_address']:.2f} at {early['update']}"
)
assert diary[0]["kl_address"] < 0.5
assert early["kl_address"] > 1.8

# %% [markdown]
# The middle picture is the point of the paper. Nothing tells the model to use its memory, and no temperature is
# lowered: a hundred and fifty updates after the start $q(a \mid x, M)$ pays two nats for each lookup, of at most
# $\log 32 \approx 3.47$. KL(a) is what a lookup *costs*. That it is worth it shows on the left, where the bound
# leaves that of the autoencoder behind, and on the right: what the autoencoder has to say in $z$, the memory
# model has already read. Its own $z$ says about one nat. (Each point of KL(a) and KL(z) is a mean over the
# sixteen images of one episode, with one sample; an estimate of something near zero may fall below it.)
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
without = -log_likelihood(*vae, test.memory, test.x, num_samples=100)  # of the same images
report = kl_report(model, guide, test.memory, test.x, labels=test.labels, memoryless_nll=without)
print("KL(a), the lookup's cost:      ", report.kl_address, "nats of at most", round(report.log_memory, 2))
print("NLL less than without a memory:", report.information_gained, "nats")
print("KL(z):                         ", report.kl_z, "nats")
print("q(a|x) on the right character: ", report.right_class)
right = classify(guide, test.memory, test.x).argmax(1) == test.labels
print("8-way 4-shot classification, never trained for:", right.float().mean().item())
assert report.information_gained.mean > 5

# %% [markdown]
# ## One-shot generation
#
# Give it a memory of one entry, a character that it has never seen, and sample. The address has no choice; what
# varies is $z$, and then each pixel by itself, so that strokes fray. Left of the samples is what three draws of
# $z$ have the decoder expect: they differ little after so short a training. (The model of lesson 4 has seen sixty
# times as many updates.)

# %%
entries = torch.from_numpy(unseen.images[::8, 0]).float().unsqueeze(1)  # [8, 1, 28, 28]
alone = Memory(entries.unsqueeze(1))  # one memory of one entry for each image
torch.manual_seed(2)
with torch.no_grad():
    traces = [pyro.poutine.trace(model).get_trace(alone) for _ in range(9)]
means = [trace.nodes["x"]["fn"].base_dist.mean for trace in traces[:3]]
samples = [trace.nodes["x"]["value"] for trace in traces[3:]]
keep(rows_of([entries, *means, *samples], ["entry", *3 * ["E[x]"], *6 * ["x"]]), "03_one_shot")

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
found = {name: [] for name in pairs}
nested = NestedEpisodes(unseen, images=IMAGES, seed=0)  # the same targets, under larger and larger memories
for classes in sizes:
    for name, pair in pairs.items():
        targets = encoded(
            pair[1], nested.episodes(classes, 4)
        )  # their memories share entries: each is encoded once
        bounds = [log_likelihood(*pair, e.memory, e.x, num_samples=20) for e in targets]
        found[name].append(-torch.cat(bounds))
hard, soft = (torch.stack(nlls) for nlls in found.values())  # [sizes, IMAGES]


def paired(difference):
    """Mean and standard error of differences [sizes, IMAGES]."""
    return difference.mean(1).numpy(), (difference.std(1) / difference.shape[1] ** 0.5).numpy()


figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for name, nlls in {"one entry is read": hard, "soft attention": soft}.items():
    axes.errorbar(sizes, *paired(nlls - hard[0]), marker="o", capsize=3, label=name)
axes.plot(sizes, [math.log(c) for c in sizes], ":", color="black", label="the price of naming the class: log C")
axes.axvline(8, color="tab:gray", linewidth=1, label="characters in training")
axes.set(
    xscale="log",
    xlabel="characters C in memory, 4 renderings of each",
    ylabel="nats more than one entry read, C = 1",
)
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.minorticks_off()
axes.legend(fontsize=8)
keep(figure, "03_distractors")

# %%
gap, error = paired(soft - hard)
for classes, mean, se in zip(sizes, gap, error, strict=True):
    print(f"{classes:2} characters: soft attention {mean:+.1f} ± {se:.1f} nats from one entry")
assert gap[-1] - gap[3] > 2 * (error[-1] + error[3])

# %% [markdown]
# A lookup pays at most $\log C$ for distractors, the price of naming one character of $C$ (dotted). The mean of
# many entries becomes a mush once there are more of them than it was trained with. That is one small run with
# one seed, and four renderings of each character. On Omniglot, after eight times as many updates, this kind of
# soft attention is worse throughout with four examples of each character, but not more so with more characters,
# and with one example of each it is the better one from 8 characters on; what falls off there is how often it
# looks at the right one: `experiments/results/soft_attention.md`.
#
# ## Exercises
#
# 1. By how much at most can $-\log p(x \mid M)$ rise when 31 other characters join the right one in memory? Can
#    it fall?
# 2. At which update has the bound made nine tenths of its way, and KL(a)? Why this order?
# 3. Why does `EpisodeSampler` keep the target out of the memory? What would the model learn otherwise?
# 4. Put one rendering of each character into the memory instead of four. Which is better now, the model with a
#    memory or the one without?
#
# <details><summary>Answers</summary>
#
# 1. By $\log 32 \approx 3.5$ nats: each address has the prior probability $1/|M|$, so that the right ones weigh
#    $1/32$ of what they weighed alone. It can fall: an entry of another character may explain the target better.
# 2. The bound (the cell below computes it): most of its way is to learn that paper is white, which takes no
#    memory. The last nats are those of the memory, and come with KL(a).
# 3. To copy: then $p(x \mid M) \ge 1/|M|$ for a perfect copy and the loss goes to $\log |M|$, whatever the
#    image. That is recall, figure 2A of the paper (`experiments/mnist_recall.py`), and a model of nothing.
# 4. The one without. Our model learned to find the most similar of four renderings and to vary it little; one
#    rendering is too far from the target for that. Trained with one of each, it would learn to use $z$ more
#    (`experiments/kl_split.py`).
#
# </details>


# %%
def nine_tenths(key):
    """The first update at which a figure has made nine tenths of its way from the first line to the last four."""
    start, end = diary[0][key], sum(line[key] for line in diary[-4:]) / 4
    return next((line["update"] for line in diary if (line[key] - start) / (end - start) >= 0.9), "none")


print("exercise 2: bound at update", nine_tenths("bound"), " KL(a) at update", nine_tenths("kl_address"))
lone = EpisodeSampler(unseen, classes=8, shots=1, queries=64, seed=0).sample()
for name, pair in {"memory": (model, guide), "no memory": vae}.items():
    nll = -log_likelihood(*pair, lone.memory, lone.x, num_samples=100)
    print(f"exercise 4: {name:9} NLL {nll.mean():.1f} nats")
