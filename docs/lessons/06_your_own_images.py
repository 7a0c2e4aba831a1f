# %% [markdown]
# # 6. Your own images
#
# - A folder of pictures is all it takes: one folder inside it for each class, any number of pictures in each, of
#   any size. Here it is made on the spot, so that the lesson needs nothing of yours.
# - The likelihood has to fit the images. Colour has 256 levels, and a mixture of logistics gives each a
#   probability; the NLL in nats is then also one in bits per dimension, which other papers can be compared with.
# - The report is the one of lesson 4: what the lookup told, in nats, and what was left for z.
#
# You need: lesson 3.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pictures import keep
from PIL import Image, ImageDraw

from vma_pyro import ConvNetworks, DiscretizedLogistics, Guide, Memory, Model
from vma_pyro.data import EpisodeSampler, NestedEpisodes, divide, folder
from vma_pyro.evaluation import kl_report, log_likelihood
from vma_pyro.infer import make
from vma_pyro.likelihoods import bits_per_dim
from vma_pyro.training import TrainConfig, fit

pyro.settings.set(module_local_params=True)  # parameters live in the modules
CLASSES, UPDATES = 60, 700

# %% [markdown]
# ## 1. A folder
#
# Sixty signs: a shape in a colour, on a ground of another colour, 4 to 16 pictures of each, from 30 to 60 pixels
# wide, the shape never in the same place. Yours may be photographs, scans, icons.

# %%
SHAPES = ("ellipse", "rectangle", "triangle", "hexagon")


def draw(path, kind, shape, ground, rng):
    """One picture of a sign as a PNG file, of any size; its colours are a little different each time."""
    size = [int(side) for side in rng.integers(30, 61, 2)]
    pen, paper = (tuple(int(v) for v in np.clip(c + rng.normal(0, 6, 3), 0, 255)) for c in (shape, ground))
    picture = Image.new("RGB", size, paper)
    centre, radius = [side * rng.uniform(0.4, 0.6) for side in size], min(size) * rng.uniform(0.28, 0.38)
    pencil = ImageDraw.Draw(picture)
    if kind == "ellipse":
        pencil.ellipse([c + s * radius for s in (-1, 1) for c in centre], fill=pen)
    else:
        sides = {"triangle": 3, "rectangle": 4, "hexagon": 6}[kind]
        pencil.regular_polygon((*centre, radius), sides, fill=pen)
    picture.save(path)


rng = np.random.default_rng(0)
root = Path(tempfile.mkdtemp()) / "my_images"
for number in range(CLASSES):
    (root / f"sign{number:02d}").mkdir(parents=True)
    shape, ground = rng.integers(0, 256, (2, 3))
    for example in range(rng.integers(4, 17)):
        draw(root / f"sign{number:02d}" / f"{example:02d}.png", SHAPES[number % 4], shape, ground, rng)

# %% [markdown]
# `folder.load` reads it: every picture is turned as its camera says, scaled until it covers the size, and cropped
# in the middle. What has been prepared is kept, and made anew when a file changes. `divide` puts some classes
# aside: a few that choose between models, and some that are looked at once, at the end.

# %%
images = folder.load(root, size=16, mode="colour", cache=root.parent / "cache")
print(
    f"{len(images)} classes, {images.counts.min()} to {images.counts.max()} images each, of {images.image_shape}"
)
data = divide(images)
print("to train on, to validate, to test:", *(len(part) for part in data), "classes")

# %% [markdown]
# ## 2. A model for them
#
# The networks take images of any size from 8 x 8 on, in one colour or three. What the likelihood wants of their
# last layer they find out when the model is made. Each pixel is a mixture of three logistic distributions over the
# levels 0 to 255, with green depending on red, and blue on both:
#
# $$p(x_i \mid z, m) = \sum_k \pi_{ik} \prod_c \Big[\sigma\big(\tfrac{x_{ic} + \delta/2 - \mu_{ikc}}{s_{ikc}}\big)
#   - \sigma\big(\tfrac{x_{ic} - \delta/2 - \mu_{ikc}}{s_{ikc}}\big)\Big]$$

# %%
torch.manual_seed(0)
networks = ConvNetworks(latent_dim=16, image_shape=images.image_shape, width=0.25)
model, guide = Model(networks, likelihood=DiscretizedLogistics(mixtures=3)), Guide(networks)
episodes = EpisodeSampler(data.train, classes=8, shots=3, queries=16, seed=0)
held_out = EpisodeSampler(data.validation, classes=len(data.validation), shots=2, queries=8, seed=1).sample()
plain = {"optimizer": "adam", "precision": "32-true"}  # the same on all machines
lengths = {"updates": UPDATES, "warmup_updates": min(50, UPDATES // 2), "validate_every": max(1, UPDATES // 3)}
config = TrainConfig(**lengths, learning_rate=3e-3, **plain)
with tempfile.TemporaryDirectory() as run:
    fit(
        model,
        guide,
        make("vimco+dreg", 4),
        episodes,
        config=config,
        folder=run,
        validation=[held_out],
        show_progress=False,
    )

# %% [markdown]
# ## 3. What it learned
#
# Signs that it has never seen, each from one example. The address of every image below is a choice
# among the same entries; how much the choice told stands in the report.

# %%
targets = NestedEpisodes(data.test, images=60, seed=0)
(few,) = targets.episodes(len(data.test), 1)
report = kl_report(model, guide, few.memory, few.x, labels=few.labels, num_samples=10)
for name, value in {
    "NLL": report.nll,
    "what the lookup told, KL(a)": report.kl_address,
    "left for z, KL(z)": report.kl_z,
    "share of q(a | x) on the right class": report.right_class,
}.items():
    print(f"{name:38} {value}")
print(f"of at most log |M| = {report.log_memory:.2f} nats")
bound = log_likelihood(model, guide, few.memory, few.x, num_samples=50)
print(f"NLL in bits per dimension: {bits_per_dim(-bound.mean().item(), images.image_shape):.2f}")
assert report.kl_address.mean > 0.5 * report.log_memory
assert report.right_class.mean > 0.6
assert bits_per_dim(-bound.mean().item(), images.image_shape) < 8

# %%
entries = next(iter(targets.episodes(1, 1, first=8))).memory.entries
torch.manual_seed(1)
with torch.no_grad():
    trace = pyro.poutine.trace(model).get_trace(Memory(entries))
drawn, mean = trace.nodes["x"]["value"], trace.nodes["x"]["fn"].mean
figure = Figure(figsize=(6, 2.4), layout="constrained")
for axes, column in zip(figure.subplots(3, 8).T, zip(entries[:, 0], drawn, mean, strict=True), strict=False):
    for place, image in zip(axes, column, strict=True):
        place.imshow(image.permute(1, 2, 0).numpy())
        place.set_axis_off()
keep(figure, "06_samples")

# %% [markdown]
# Each column: the entry, a draw of $x$ from $p(x \mid z, m)$, and $E[x \mid z, m]$ of the same $z$. After so short
# a training colours and places are there, edges are not, and the logistics are still wide: the draw is speckled,
# as each pixel is drawn for itself. (A uniform choice among 256 levels would cost 8 bits.) An hour of the command
# below goes much further. A likelihood whose pixels see their neighbours above and to the left draws smoother:
# `--likelihood causal-logistics`, or `causal` for ink on paper.
#
# ## 4. Which entry explains which image

# %%
shown = few.x[:4]
with torch.no_grad():
    looked = pyro.poutine.trace(guide).get_trace(few.memory.datapoints(slice(4)), shown)
probs = looked.nodes["address"]["fn"].probs
figure = Figure(figsize=(7, 3), layout="constrained")
for row, (axes, image, own) in enumerate(zip(figure.subplots(4, 6), shown, probs, strict=True)):
    best = own.argsort(descending=True)[:5]
    memory = few.memory.datapoints(slice(row, row + 1)).entries[0]
    for place, picture, text in zip(
        axes, [image, *memory[best]], ["x", *(f"{value:.2f}" for value in own[best])], strict=False
    ):
        place.imshow(picture.permute(1, 2, 0).numpy())
        place.set_title(text, fontsize=8)
        place.set_axis_off()
keep(figure, "06_posterior")

# %% [markdown]
# ## The same by commands
#
# ```sh
# uv run experiments/few_shot.py --data folder --data-dir my_images --mode colour --size 32 --out runs/mine
# uv run experiments/few_shot.py --load runs/mine/model.pt --data-dir my_images       # report and pictures again
# uv run --extra demo python -m vma_pyro.demo --load runs/mine/model.pt --images my_images   # the page
# ```
#
# ## Exercises
#
# 1. Load the same folder with `mode="binary"`, and train with `CausalBernoulli()`. How large is KL(z) now, and
#    what do the samples look like? (`experiments/results/likelihoods.md` measures what this question is about.)
# 2. Put the signs into folders of folders, one for each shape, and look at what `divide` does then.
# 3. Which images does the model put on the wrong class? Are they of signs alike in shape, or in colour?
#
# <details><summary>Answers</summary>
#
# 1. It is small: the neighbours say how a stroke goes on, and from scratch the model lets them say everything.
#    Strokes are sharp then, and of no class. Train with `CausalBernoulli(alone=0.5)`, or go on from a trained
#    model without neighbours (`--init FILE --likelihood causal`), which knows what z and m are for.
# 2. Groups are never cut through: a shape is in one of the three parts with all of its colours.
# 3. Look at `classify(guide, few.memory, few.x)`, and at both pictures. Colours fill most pixels, so that most of
#    the nats are theirs: alike in colour.
#
# </details>
