# %% [markdown]
# # 5. Make it yours
#
# - The model is two short files of plain Pyro. Four edits of at most ten lines each make four other models of
#   them.
# - Training, gradient estimators and reports work on the edited files as they are: nothing else is touched.
# - Each edit is compared with what you would expect on paper, which is how you find out whether it does what
#   you meant.
#
# You need: lesson 3, and `vma_pyro/model.py` and `vma_pyro/guide.py` open beside this page. In a clone of your
# own you would change the files; here the changed lines are shown as a `diff` and the result is used at once.

# %%
import difflib
import importlib
import inspect
import tempfile
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of
from torch import nn

from vma_pyro import ConvNetworks, Memory
from vma_pyro.data import Characters, Episode, EpisodeSampler, GreyCharacters, glyphs
from vma_pyro.evaluation import address_posterior, kl_report
from vma_pyro.infer import make
from vma_pyro.training import TrainConfig, fit

pyro.settings.set(module_local_params=True)  # parameters live in the modules
UPDATES = 300


def edited(changes):
    """Model and Guide with some lines of their files replaced: {file: [(old, new), ...]}; shows the difference."""
    found, changed = {}, 0
    for file in ("model", "guide"):
        before = after = inspect.getsource(importlib.import_module(f"vma_pyro.{file}"))
        for old, new in changes.get(file, ()):
            assert after.count(old) == 1, old
            after = after.replace(old, new)
        difference = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
        lines = [line for line in difference if not line.startswith(("---", "+++", "@@"))]
        changed += len(lines)
        if lines:
            print(f"{file}.py", *lines, sep="\n")
        exec(compile(after, f"{file}.py", "exec"), found)
    print(f"lines changed: {changed}")
    return found["Model"], found["Guide"]


# %% [markdown]
# Everything below goes through these two functions, whatever the model.


# %%
def train(pair, episodes, networks=None):
    """A trained (model, guide) of an edited pair of classes."""
    torch.manual_seed(0)
    networks = networks or ConvNetworks(latent_dim=16, width=0.25)
    model, guide = (program(networks) for program in pair)
    config = TrainConfig(updates=UPDATES, warmup_updates=50)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, guide, make("vimco+dreg", 4), episodes, config=config, folder=Path(folder), show_progress=False)
    return model, guide


def report(name, pair, episode):
    """One line: where the nats of the images of an episode go."""
    found = kl_report(*pair, episode.memory, episode.x, num_samples=20)
    print(f"{name:24} NLL {found.nll}   KL(a) {found.kl_address}   KL(z) {found.kl_z}")
    return found


seen, unseen = glyphs.load(classes=300), glyphs.load(classes=60, seed=1)
episodes = EpisodeSampler(seen, classes=8, shots=4, queries=16, seed=0)
test = EpisodeSampler(unseen, classes=8, shots=4, queries=120, seed=1).sample()

# %%
original = train(edited({}), episodes)
plain = report("the model as it is", original, test)

# %% [markdown]
# ## 1. A learned $p(a \mid M)$
#
# Suppose that half of the memory is rubbish. The uniform $p(a \mid M)$ pays for it: naming one of 32 entries
# costs $\log 2$ more than naming one of 16, even though $q$ never looks at the rubbish. Let the prior see the
# entries.


# %%
class Messy:
    """Episodes in which every second entry of the memory is noise."""

    def __init__(self, episodes):
        self.episodes = episodes

    def sample(self):
        memory, x, labels = self.episodes.sample()
        entries = memory.entries.clone()
        entries[::2] = (
            entries[::2].flatten(2)[..., torch.randperm(784)].view_as(entries[::2])
        )  # the same ink, shuffled
        return Episode(Memory(entries, memory.labels), x, labels)

    def state_dict(self):
        return self.episodes.state_dict()

    def load_state_dict(self, state):
        self.episodes.load_state_dict(state)


def messy(seed, data, queries):
    """A stream of such episodes."""
    return Messy(EpisodeSampler(data, classes=8, shots=4, queries=queries, seed=seed))


PRIOR = {
    "model": [
        (
            "UniformAddress() if address_prior is None else address_prior",
            "Worth(networks.key_dim)",
        ),
        (
            "class UniformAddress(",
            """class Worth(nn.Sequential):
    def __init__(self, key_dim):
        super().__init__(nn.Linear(key_dim, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, memory):
        return super().forward(memory.features.key).squeeze(-1)


class UniformAddress(""",
        ),
    ]
}
test_messy = messy(1, unseen, 120).sample()
uniform = train(edited({}), messy(0, seen, 16))
learned = train(edited(PRIOR), messy(0, seen, 16))
for name, pair in (("uniform p(a | M)", uniform), ("learned p(a | M)", learned)):
    report(name, pair, test_messy)

# %%
model = learned[0]
memory = test_messy.memory.encode(model.networks)
with torch.no_grad():
    prior = model.address_prior(memory).softmax(-1)
figure = Figure(figsize=(8, 3), layout="constrained")
axes = figure.subplots()
axes.bar(np.arange(32), prior.numpy(), color=["tab:gray", "tab:blue"] * 16)
axes.axhline(1 / 32, color="black", linestyle=":", label="uniform")
axes.set(xlabel="address a (gray: noise)", ylabel="p(a | M)", title="the prior has learned what is worth a look")
axes.legend()
keep(figure, "05_prior")
print("probability of all noise:", round(prior[::2].sum().item(), 4), " log 2 =", round(np.log(2), 2))

# %% [markdown]
# KL(a) falls by about $\log 2 \approx 0.69$ nats: the part of the lookup that said "not noise" is now the
# prior's.
#
# ## 2. Another likelihood, for grey images
#
# Pixels between 0 and 1 need a density. Two come to mind: a Gaussian around what the decoder says, and the
# *continuous Bernoulli* (Loaiza-Ganem & Cunningham 2019), which is the usual cross-entropy with its missing
# constant.

# %%
LINE = 'return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=observed)  # p(x | z, m_a)'
CHECK = '            check_binary("x", x)\n'


def likelihood(distribution):
    """The edit: another distribution of x, and no more check that it is binary."""
    line = LINE.replace("dist.Bernoulli(logits=logits)", distribution)
    return {"model": [(LINE, line), (CHECK, "")]}


def grey(characters):
    """The same characters, out of focus."""
    images = torch.from_numpy(characters.images).float()
    images = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    return GreyCharacters(images.numpy(), characters.names, characters.alphabets)


soft_focus = EpisodeSampler(grey(seen), classes=8, shots=4, queries=16, seed=0)
test_grey = EpisodeSampler(grey(unseen), classes=8, shots=4, queries=120, seed=1).sample()
gaussian = train(edited(likelihood("dist.Normal(logits, 0.3)")), soft_focus)
continuous = train(edited(likelihood("dist.ContinuousBernoulli(logits=logits)")), soft_focus)
for name, pair in (("Gaussian", gaussian), ("continuous Bernoulli", continuous)):
    report(name, pair, test_grey)

# %%
columns = [test_grey.memory.entries[::4][:5]]
for model, _ in (gaussian, continuous):
    with torch.no_grad():
        trace = pyro.poutine.trace(model).get_trace(Memory(columns[0].unsqueeze(1)))
    columns.append(trace.nodes["x"]["fn"].base_dist.mean)
keep(rows_of(columns, ["entry", "Gaussian", "cont. B."]), "05_grey")

# %% [markdown]
# The NLL of a density may be negative: nats per image still, but against another measure. Only likelihoods of
# the same images compare.
#
# ## 3. A hierarchical address: class, then example
#
# First which character, then which of its renderings: $p(c)\,p(a \mid c)$ in the model,
# $q(c \mid x)\,q(a \mid c, x)$ in the guide. A class gets a site of its own, which you might observe for some
# images (semi-supervised learning) or give a prior.

# %%
ADDRESS = 'address = pyro.sample("address", dist.Categorical(logits=self.address_prior(memory)))  # p(a | M)'
QUERY = 'address = pyro.sample("address", dist.Categorical(logits=logits))  # q(a | x, M)'
HIERARCHY = {
    "model": [
        (
            ADDRESS,
            """label = pyro.sample("class", dist.Categorical(logits=torch.zeros(8)))  # p(c)
            other = memory.labels != label.unsqueeze(-1)  # [..., S]
            logits = self.address_prior(memory).masked_fill(other, float("-inf"))
            address = pyro.sample("address", dist.Categorical(logits=logits))  # p(a | c, M)""",
        )
    ],
    "guide": [
        (
            QUERY,
            """other = memory.labels != torch.arange(8).unsqueeze(-1)  # [8, S]
            of_class = logits.unsqueeze(-2).masked_fill(other, float("-inf")).logsumexp(-1)  # [..., B, 8]
            label = pyro.sample("class", dist.Categorical(logits=of_class))  # q(c | x, M)
            logits = logits.masked_fill(other[label], float("-inf"))
            """
            + QUERY,
        )
    ],
}
hierarchical = train(edited(HIERARCHY), episodes)
deep = report("class, then example", hierarchical, test)
report("the model as it is", original, test)

# %%
figure = Figure(figsize=(9, 3), layout="constrained")
for axes, (name, (_, guide)) in zip(
    figure.subplots(1, 2), {"address": original, "class, then address": hierarchical}.items(), strict=True
):
    order = test.labels.argsort()
    axes.imshow(address_posterior(guide, test.memory, test.x)[order].numpy(), aspect="auto", cmap="Greys", vmin=0)
    axes.set(title=f"{name}: q(a | x, M)", xlabel="address, 4 for each character", ylabel="image, by character")
keep(figure, "05_hierarchy")

# %% [markdown]
# On paper both are the same distribution over addresses, as all characters have as many renderings, and the
# reports agree within what two trainings differ by. The report sums over the class; you did not have to tell
# it.
#
# ## 4. Learned memory entries
#
# A memory need not consist of data. Make the entries parameters, begin with noise, and they become whatever is
# useful to look up in a small world of sixteen characters.

# %%
OWN = "Memory(self.networks.entries.sigmoid())"
ENTRIES = {"model": [("Memory.of(memory)\n", f"{OWN}\n")], "guide": [("Memory.of(memory)\n", f"{OWN}\n")]}
LEARNED = 16


def world(renderings):
    """Sixteen characters, some renderings of each."""
    return Characters(seen.images[:16, renderings], seen.names[:16], seen.alphabets[:16])


networks = ConvNetworks(latent_dim=16, width=0.25)
networks.entries = nn.Parameter(torch.randn(LEARNED, 1, 28, 28))
small = EpisodeSampler(world(slice(0, 14)), classes=16, shots=1, queries=32, seed=0)
test_small = EpisodeSampler(world(slice(14, 20)), classes=16, shots=1, queries=64, seed=1).sample()
fixed = train(edited({}), small)
prototypes = train(edited(ENTRIES), small, networks)
for name, pair in (("one example of each", fixed), ("16 learned entries", prototypes)):
    report(name, pair, test_small)

# %%
entries = networks.entries.detach().sigmoid()
each = pyro.poutine.condition(prototypes[0], data={"address": torch.arange(LEARNED)})  # every entry once
torch.manual_seed(1)
with torch.no_grad():
    trace = pyro.poutine.trace(each).get_trace(Memory(entries), num_images=LEARNED)
made = trace.nodes["x"]["fn"].base_dist.mean
keep(
    rows_of([torch.stack(pair) for pair in zip(entries, made, strict=True)], names=["entry", "E[x]"]), "05_entries"
)

# %% [markdown]
# The entries still look like noise, yet each stands for a shape of its own, and the model is no worse with them
# than with examples: a name need not look like what it names. (Learned from examples as a start, and for
# longer, they remain pictures: `experiments/mnist_mixture.py`.)
#
# ## Exercises
#
# 1. Give the hierarchical model a learned $p(c)$, one parameter per class. What will it learn from these
#    episodes?
# 2. The Gaussian's standard deviation is fixed at 0.3. Make it a parameter. (One line in `__init__`, one in
#    `forward`.)
# 3. Which of the four edits can use a memory of another size at test time than in training?
#
# <details><summary>Answers</summary>
#
# 1. Nothing: class 3 is another character in each episode. $p(c)$ stays uniform. That is why edit 1 scores what
#    an entry looks like and not its number.
# 2. `self.log_scale = nn.Parameter(torch.tensor(-1.2))` and `dist.Normal(logits, self.log_scale.exp())`. The
#    NLL falls: a scale that fits beats any that you guess.
# 3. The first two as they are. The third if 8 is replaced by the number of classes (`int(memory.labels.max()) +
#    1`). The fourth brings its own memory.
#
# </details>
