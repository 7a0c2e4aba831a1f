# %% [markdown]
# # 5. Make it yours
#
# - The model is a few parts: a prior of addresses, networks, a similarity, a likelihood, and the two programs that
#   put them together. Four edits, each a subclass of one part in at most ten lines, make four other models.
# - Training, gradient estimators, reports, files and the live page take the edited models as they are: nothing
#   else is touched.
# - Each edit is compared with what you would expect on paper, which is how you find out whether it does what
#   you meant.
#
# You need: lesson 3, and `vma_pyro/model.py` and `vma_pyro/guide.py` open beside this page.

# %%
import math
import tempfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pictures import keep, rows_of
from torch import nn

from vma_pyro import (
    ContinuousBernoulli,
    ConvNetworks,
    Guide,
    LearnedAddress,
    Likelihood,
    Memory,
    Model,
    models,
)
from vma_pyro.data import Characters, Episode, EpisodeSampler, GreyCharacters, glyphs
from vma_pyro.demo.engine import Engine
from vma_pyro.demo.messages import Generate, Look
from vma_pyro.evaluation import Mean, address_posterior, kl_report
from vma_pyro.infer import make
from vma_pyro.program import Program
from vma_pyro.training import TrainConfig, fit

pyro.settings.set(module_local_params=True)  # parameters live in the modules
UPDATES = 300

# %% [markdown]
# Everything below goes through these three functions, whatever the model. Each takes a function that builds a
# model and its guide.


# %%
def train(build, episodes):
    """Build a model and its guide, and train them."""
    torch.manual_seed(0)
    model, guide = build()
    plain = {"optimizer": "adam", "precision": "32-true"}  # as the paper trains, and the same on all machines
    config = TrainConfig(updates=UPDATES, warmup_updates=50, **plain)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, guide, make("vimco+dreg", 4), episodes, config=config, folder=Path(folder), show_progress=False)
    return model, guide


def report(name, pair, episode):
    """One line: where the nats of the images of an episode go."""
    found = kl_report(*pair, episode.memory, episode.x, num_samples=20)
    print(f"{name:24} NLL {found.nll}   KL(a) {found.kl_address}   KL(z) {found.kl_z}")
    return found


def show_on_page(name, pair, episode, *classes):
    """Save a pair, load it from its file, and ask it what the live page asks: to look up, and to draw.

    A file says which classes its model is made of; those that are not the package's own have to be allowed.
    """
    with tempfile.TemporaryDirectory() as folder:
        models.save(Path(folder) / "edited.pt", pair)
        loaded = models.load(Path(folder) / "edited.pt", classes=classes)
    page = Engine(*loaded)
    # The test images are binary, which a model of grey images takes as well.
    entries, (image,) = (page.format.write(images) for images in (episode.memory.entries, episode.x[:1]))
    found = page.look(Look(image=image, entries=entries))
    print(f"on the page: {name}: KL(a) {found.kl_nats:.2f} nats, of at most {found.most_nats:.2f}")
    drawn = page.generate(Generate(entries=entries, count=6, seed=0)).images
    return torch.tensor([list(bytes.fromhex(grey)) for grey in drawn]).reshape(-1, 1, 28, 28) / 255


seen, unseen = glyphs.load(classes=300), glyphs.load(classes=60, seed=1)
episodes = EpisodeSampler(seen, classes=8, shots=4, queries=16, seed=0)
test = EpisodeSampler(unseen, classes=8, shots=4, queries=120, seed=1).sample()


# %%
def as_it_is():
    """The model as it is."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return Model(networks), Guide(networks)


original = train(as_it_is, episodes)
plain = report("the model as it is", original, test)
drawn = {"as it is": show_on_page("the model as it is", original, test)}

# %% [markdown]
# ## 1. A learned $p(a \mid M)$
#
# Suppose that half of the memory is rubbish. The uniform $p(a \mid M)$ pays for it: naming one of 32 entries
# costs $\log 2$ more than naming one of 16, even though $q$ never looks at the rubbish. Let the prior see the
# entries. For a network that scores each by itself that takes no edit: `Model` has an argument, and
# `LearnedAddress` is such a network. The edit makes one that sees an entry beside the others, as it differs from
# their mean.


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


class AmongOthers(LearnedAddress):
    """p(a | M) by how the key of an entry differs from the mean key."""

    def forward(self, memory):
        key = memory.features.key
        return self.score(key - key.mean(-2, keepdim=True)).squeeze(-1)


def by_itself():
    """The model with a prior that scores each entry by itself."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return Model(networks, address_prior=LearnedAddress(networks)), Guide(networks)


def among_others():
    """The model with the edited prior."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return Model(networks, address_prior=AmongOthers(networks)), Guide(networks)


test_messy = messy(1, unseen, 120).sample()
found = {}
for name, build in {
    "uniform p(a | M)": as_it_is,
    "each by itself": by_itself,
    "among others": among_others,
}.items():
    learned = train(build, messy(0, seen, 16))
    found[name] = report(name, learned, test_messy)
drawn["prior"] = show_on_page("a learned prior", learned, test, AmongOthers)
saved = found["uniform p(a | M)"].nll_of_images - found["among others"].nll_of_images
print(f"NLL, uniform less among others, paired by image: {Mean.of(saved)}   log 2 = {np.log(2):.2f}")

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
print("probability of all noise:", round(prior[::2].sum().item(), 4))
print("of each character:", prior.unflatten(0, (8, 4)).sum(1).numpy().round(3))
assert prior[::2].sum() < 0.1

# %% [markdown]
# The part of the lookup that said "not noise" is now the prior's: KL(a) is lower by about a half, of at most
# $\log 2 \approx 0.69$ nats. On paper the NLL falls by as much. In what is printed it does not yet: the three are
# separate trainings of a few hundred updates, whose decoders differ by more than that, and the prior is uneven
# among the clean entries, where it should not be, as targets are drawn evenly from the characters. This is why
# one compares with the paper: an edit may do what you meant, and the figure you looked at not show it.
#
# ## 2. Another likelihood, for grey images
#
# Pixels between 0 and 1 need a density. Two come to mind: a Gaussian around what the decoder says, and the
# *continuous Bernoulli* (Loaiza-Ganem & Cunningham 2019), the usual cross-entropy with the normaliser that makes a
# density of it. It depends on what the decoder says, so that leaving it out, as is often done, trains something
# else. The second comes with the package; the first is the edit. A likelihood also says which images it can score
# (`check`): the Gaussian, all of them.


# %%
class GaussianPixels(Likelihood):
    """A Gaussian around what the decoder says."""

    def forward(self, decoded):
        return dist.Normal(decoded, 0.3).to_event(3)


def with_gaussian():
    """The model with the edited likelihood."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return Model(networks, likelihood=GaussianPixels()), Guide(networks)


def with_continuous_bernoulli():
    """The model with the package's likelihood for grey images."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return Model(networks, likelihood=ContinuousBernoulli()), Guide(networks)


def grey(characters):
    """The same characters, out of focus."""
    images = torch.from_numpy(characters.images).float()
    images = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    return GreyCharacters(images.numpy(), characters.names, characters.alphabets)


soft_focus = EpisodeSampler(grey(seen), classes=8, shots=4, queries=16, seed=0)
test_grey = EpisodeSampler(grey(unseen), classes=8, shots=4, queries=120, seed=1).sample()
gaussian = train(with_gaussian, soft_focus)
continuous = train(with_continuous_bernoulli, soft_focus)
for name, pair in (("Gaussian", gaussian), ("continuous Bernoulli", continuous)):
    report(name, pair, test_grey)
drawn["Gaussian"] = show_on_page("a Gaussian", gaussian, test, GaussianPixels)
drawn["cont. B."] = show_on_page("a continuous Bernoulli", continuous, test)

# %%
columns = [test_grey.memory.entries[::4][:5]]
for model, _ in (gaussian, continuous):
    with torch.no_grad():
        trace = pyro.poutine.trace(model).get_trace(Memory(columns[0].unsqueeze(1)))
    columns.append(trace.nodes["x"]["fn"].base_dist.mean)
keep(rows_of(columns, ["entry", "Gaussian", "cont. B."]), "05_grey")

# %% [markdown]
# Each column shows the mean of a likelihood. (The second one's strokes are coarse. At a logit of $-L$ its density
# of a pixel that is exactly 0 is about $L$, without bound: a few hundred updates of a small model go into the
# white of the paper first.) The NLL of a density may be negative: nats per image still, but against another
# measure. Only densities of the same images compare.
#
# ## 3. A hierarchical address: class, then example
#
# First which character, then which of its renderings: $p(c)\,p(a \mid c)$ in the model,
# $q(c \mid x)\,q(a \mid c, x)$ in the guide. A class gets a site of its own, which you might observe for some
# images (semi-supervised learning) or give a prior.


# %%
def classes(memory):
    """Which entries belong to which class, bool [C, S]; on the page, where nobody says, each to its own."""
    labels = torch.arange(memory.size) if memory.labels is None else memory.labels
    return labels == torch.arange(int(labels.max()) + 1).unsqueeze(-1)


class ModelByClass(Model):
    """p(c) p(a | c, M) in place of p(a | M)."""

    def forward(self, memory, x=None, *, num_images=1):
        memory, x, data = self.opened(memory, x, num_images)
        own = classes(memory)
        with data:
            label = pyro.sample("class", dist.Categorical(logits=torch.zeros(len(own))))  # p(c)
            logits = self.address_prior(memory).masked_fill(~own[label], -math.inf)
            m = memory.read(pyro.sample("address", dist.Categorical(logits=logits)))  # p(a | c, M)
            z = pyro.sample("z", self.networks.prior(m))
            return pyro.sample("x", self.likelihood(self.networks.decode(z, m)), obs=x)


class GuideByClass(Guide):
    """q(c | x, M) q(a | c, x, M) in place of q(a | x, M)."""

    def forward(self, memory, x):
        memory, x, data = self.opened(memory, x)
        own, query = classes(memory), self.networks.query(x)
        with data:
            logits = self.similarity(query.key, memory.features.key)  # [..., B, S]
            of_class = logits.unsqueeze(-2).masked_fill(~own, -math.inf).logsumexp(-1)  # [..., B, C]
            label = pyro.sample("class", dist.Categorical(logits=of_class))  # q(c | x, M)
            address = pyro.sample("address", dist.Categorical(logits=logits.masked_fill(~own[label], -math.inf)))
            pyro.sample("z", self.networks.posterior(query, memory.read(address)))


def by_class():
    """Both edited programs."""
    networks = ConvNetworks(latent_dim=16, width=0.25)
    return ModelByClass(networks), GuideByClass(networks)


hierarchical = train(by_class, episodes)
report("class, then example", hierarchical, test)
report("the model as it is", original, test)
drawn["class"] = show_on_page("class, then example", hierarchical, test, ModelByClass, GuideByClass)
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
# On paper both are the same distribution over addresses, as all characters have as many renderings. With the same
# parameters the reports must agree, and that is easily checked. (The report sums over the class; you did not have
# to tell it. Nor did you have to tell training that the number of classes is a value, with which no update can be
# recorded and replayed: it found out, and said so.)

# %%
networks, similarity = original[0].networks, original[1].similarity
twin = ModelByClass(networks), GuideByClass(networks, similarity=similarity)
twins = [kl_report(*programs, test.memory, test.x, num_samples=20) for programs in (original, twin)]
print("KL(a) of either with the same parameters:", *(found.kl_address for found in twins))
torch.testing.assert_close(*(found.kl_address.mean for found in twins), atol=1e-4, rtol=0)
looks = [address_posterior(programs[1], test.memory, test.x) for programs in (original, twin)]
torch.testing.assert_close(*looks, atol=1e-5, rtol=1e-4)

# %% [markdown]
# ## 4. Learned memory entries
#
# A memory need not consist of data. Make the entries parameters, begin with noise, and they become whatever is
# useful to look up in a small world of sixteen characters.

# %%
LEARNED = 16


class NetworksWithEntries(ConvNetworks):
    """Networks that hold the entries of a memory among their parameters."""

    def __init__(self):
        super().__init__(latent_dim=16, width=0.25)
        self.entries = nn.Parameter(torch.randn(LEARNED, 1, 28, 28))


class OnOwnMemory(Program):
    """A program on the memory that its networks hold, whatever it is given."""

    def opened(self, memory, x=None, num_images=1):
        return super().opened(Memory(self.networks.entries.sigmoid(), learned=True), x, num_images)


class ModelOnOwn(OnOwnMemory, Model):
    """The model on that memory."""


class GuideOnOwn(OnOwnMemory, Guide):
    """The guide on that memory."""


def on_own_memory():
    """Both on their own memory."""
    networks = NetworksWithEntries()
    return ModelOnOwn(networks), GuideOnOwn(networks)


def world(renderings):
    """Sixteen characters, some renderings of each."""
    return Characters(seen.images[:16, renderings], seen.names[:16], seen.alphabets[:16])


small = EpisodeSampler(world(slice(0, 14)), classes=16, shots=1, queries=32, seed=0)
test_small = EpisodeSampler(world(slice(14, 20)), classes=16, shots=1, queries=64, seed=1).sample()
fixed = train(as_it_is, small)
prototypes = train(on_own_memory, small)
for name, pair in (("one example of each", fixed), ("16 learned entries", prototypes)):
    found[name] = report(name, pair, test_small)
own_classes = (NetworksWithEntries, ModelOnOwn, GuideOnOwn)
drawn["entries"] = show_on_page("learned entries", prototypes, test_small, *own_classes)
assert found["16 learned entries"].nll.mean < found["one example of each"].nll.mean + 2

# %%
entries = prototypes[0].networks.entries.detach().sigmoid()
each = pyro.poutine.condition(prototypes[0], data={"address": torch.arange(LEARNED)})  # every entry once
torch.manual_seed(1)
with torch.no_grad():
    trace = pyro.poutine.trace(each).get_trace(Memory(entries), num_images=LEARNED)
made = trace.nodes["x"]["fn"].base_dist.mean
keep(
    rows_of([torch.stack(pair) for pair in zip(entries, made, strict=True)], names=["entry", "E[x]"]), "05_entries"
)

# %% [markdown]
# The entries still look like noise, yet the decoder reads shapes out of them (one draw of $z$ each), and the NLL
# above is not worse than with an example of each character: a name need not look like what it names. (Learned
# from examples as a start, and for longer, they remain pictures: `experiments/mnist_mixture.py`.)
#
# ## All of them on the page
#
# Each of the pairs above has been saved, loaded and asked what the live page asks. This is what they drew there,
# each from the same memory of eight unseen characters (the last from its own):

# %%
keep(rows_of([torch.stack(images) for images in zip(*drawn.values(), strict=True)], names=list(drawn)), "05_page")

# %% [markdown]
# ## Exercises
#
# 1. Give the hierarchical model a learned $p(c)$, one parameter per class. What will it learn from these
#    episodes?
# 2. The Gaussian's standard deviation is fixed at 0.3. Make it a parameter; then let the decoder give one for each
#    pixel. (`Likelihood.channels` says how many numbers per pixel a likelihood wants.)
# 3. Which of the four edits can use a memory of another size at test time than in training?
# 4. Look at what the learned prior gives to each character. Each should get 1/8. What does an image pay whose
#    character gets half of that?
#
# <details><summary>Answers</summary>
#
# 1. Nothing: class 3 is another character in each episode. $p(c)$ stays uniform. That is why edit 1 scores what
#    an entry looks like and not its number.
# 2. `self.log_scale = nn.Parameter(torch.tensor(-1.2))` and `dist.Normal(decoded, self.log_scale.exp())`. The
#    NLL falls: a scale that fits beats any that you guess. For each pixel: `channels = 2` in the class,
#    `ConvNetworks(..., channels=2)`, and `loc, log_scale = decoded.chunk(2, -3)`.
# 3. The first three: `classes` counts the classes of the memory that it is given. The fourth brings its own.
# 4. $\log 2 \approx 0.69$ nats more than it need, as much as the prior can save. More updates even it out.
#
# </details>
