"""The main job on images of one's own: trained, resumed, loaded and drawn, in colour and in grey."""

import json

import numpy as np
import pytest
import torch
from drawings import folder_of_shapes
from scripts import refusal, run

from vma_pyro import models
from vma_pyro.data import load_split, split_of

SMALL = [
    "--width=0.1",
    "--latent-dim=4",
    "--particles=2",
    "--queries=6",
    "--eval-images=5",
    "--eval-samples=2",
    "--eval-queries=6",
    "--log-every=1",
    "--validation-samples=1",
    "--no-memoryless",
    "--accelerator=cpu",
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Twelve classes of 3 to 9 pictures, each of another size."""
    counts = [3, 9, 4, 5, 3, 6, 3, 7, 3, 4, 5, 3]
    return folder_of_shapes(tmp_path_factory.mktemp("own") / "shapes", counts)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


def job(*arguments, cwd):
    done = run("few_shot", *SMALL, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_in_colour(shapes, tmp_path):
    given = ["--data=folder", f"--data-dir={shapes}", "--mode=colour", "--size=16", "--out=runs/own"]
    job(*given, "--updates=2", cwd=tmp_path)
    report = (tmp_path / "runs" / "own" / "report.md").read_text()
    assert "Likelihood: logistics." in report
    assert "bits per dimension" in report
    found = json.loads((tmp_path / "runs" / "own" / "results.json").read_text())
    assert found["bits_per_dim"]["1"]["mean"] == pytest.approx(found["nll"]["1"]["mean"] / 768 / np.log(2))
    for name in ("samples.png", "posterior.png", "training.png"):
        assert (tmp_path / "runs" / "own" / name).read_bytes().startswith(b"\x89PNG")
    facts = models.facts_of(tmp_path / "runs" / "own" / "model.pt")
    assert (facts["data"], facts["mode"], facts["size"], facts["likelihood"]) == (
        "folder",
        "colour",
        16,
        "logistics",
    )
    # How pictures are prepared is known from the file.
    job(f"--load={tmp_path / 'runs/own/model.pt'}", f"--data-dir={shapes}", "--out=again", cwd=tmp_path)
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["nll"] == found["nll"]
    job(*given, "--updates=4", "--resume", "--new-budget", cwd=tmp_path)
    assert models.facts_of(tmp_path / "runs" / "own" / "model.pt")["updates"] == 4


@pytest.mark.parametrize("likelihood", [None, "causal-logistics"])
def test_arrays_in_grey(tmp_path, likelihood):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), [4, 5, 3, 4, 6, 3, 4, 5])
    images = (rng.random((8, 12, 10))[labels] * 200 + rng.random((len(labels), 12, 10)) * 50).astype(np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    chosen = [] if likelihood is None else [f"--likelihood={likelihood}", "--context-radius=1"]
    job("--data=folder", "--data-dir=own.npz", "--mode=grey", "--updates=2", *chosen, cwd=tmp_path)
    pair = models.load(tmp_path / "runs" / "few_shot" / "model.pt")
    assert pair[0].networks.image_shape == (1, 12, 10)
    assert models.likelihood_of(pair[0]) == (likelihood or "logistics")


def test_binary_pictures_are_causal_by_default(shapes, tmp_path):
    job("--data=folder", f"--data-dir={shapes}", "--size=12", "--updates=1", cwd=tmp_path)
    model, _ = models.load(tmp_path / "runs" / "few_shot" / "model.pt")
    assert models.likelihood_of(model) == "causal"
    made = model(torch.zeros(1, 1, 12, 12), num_images=2)
    assert set(made.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: --data-dir: expected the folder of your images with data=folder, got none"),
        (
            ["--data-dir=absent"],
            "error: --data-dir: expected a folder of images or an npz file, found none at absent",
        ),
        (
            ["--data-dir={shapes}"],
            "error: --size: expected one to bring all images to, as they differ, got none; ",
        ),
        (["--data-dir={shapes}", "--size=4"], "error: --size: expected at least 8, got 4"),
        (
            ["--data-dir={shapes}", "--size=12", "--classes=30"],
            "error: --classes: expected at most 7, the classes of",
        ),
        (
            ["--data-dir={shapes}", "--size=12", "--mode=colour", "--likelihood=causal"],
            "error: --likelihood: expected one for images of 3 colours and 8 bits, logistics or causal-logis",
        ),
        (["--data-dir={shapes}", "--size=12", "--likelihood=logistics"], "error: --likelihood: expected one for "),
    ],
)
def test_one_line_errors(shapes, tmp_path, options, message):
    filled = [option.format(shapes=shapes) for option in options]
    assert refusal("few_shot", "--data=folder", *filled, cwd=tmp_path).startswith(message)
    assert not (tmp_path / "runs").exists()


def test_modes_are_of_ones_own_images(tmp_path):
    line = refusal("few_shot", "--data=glyphs", "--mode=grey", cwd=tmp_path)
    assert line == "error: --mode: expected it with images of your own, got it with data=glyphs"


def test_a_folder_that_has_changed_is_not_tested_on_what_was_trained_on(shapes, tmp_path):
    """With a class more the folder is divided in another way."""
    import shutil

    root = tmp_path / "own"
    shutil.copytree(shapes, root)
    job("--data=folder", f"--data-dir={root}", "--size=12", "--updates=1", cwd=tmp_path)
    trained = models.facts_of(tmp_path / "runs" / "few_shot" / "model.pt")["trained_on"]
    for number in range(12, 30):
        shutil.copytree(root / "class00", root / f"class{number}")
        if set(load_split("folder", root, size=12).test.full_names) & set(trained):
            break
    given = ["--load=runs/few_shot/model.pt", f"--data-dir={root}", "--out=b"]
    line = refusal("few_shot", *SMALL, *given, cwd=tmp_path)
    assert line.startswith("error: --data-dir: expected test classes that the model was not trained on, got class")
    assert not (tmp_path / "b").exists()


def test_options_that_the_file_decides_are_refused_beside_it(shapes, tmp_path):
    job("--data=folder", f"--data-dir={shapes}", "--size=12", "--updates=1", cwd=tmp_path)
    given = ["--load=runs/few_shot/model.pt", f"--data-dir={shapes}", "--out=b"]
    for option, value in {"likelihood": "bernoulli", "context-radius": 7, "refinement": 5}.items():
        line = refusal("few_shot", *SMALL, *given, f"--{option}={value}", cwd=tmp_path)
        assert line.startswith(f"error: --{option}: expected that of the file beside load, ")


def test_other_experiments_prepare_the_images_of_a_model_as_its_training_did(shapes, tmp_path):
    """Without the mode a grey model would be tested on ink, which has two of its 256 levels: in silence."""
    architecture = {
        "networks": "conv",
        "width": 0.1,
        "latent_dim": 4,
        "program": "memory",
        "likelihood": "logistics",
    }
    facts = {"mode": "grey", "size": 12}
    built = models.build(architecture | {"image_shape": (1, 12, 12)})
    models.save(tmp_path / "model.pt", built, data="folder", training=facts)
    test = split_of(models.facts_of(tmp_path / "model.pt"), shapes).test
    assert (test.bits, test.image_shape) == (8, (1, 12, 12))
    done = run(
        "likelihoods",
        f"--load={tmp_path / 'model.pt'}",
        f"--judge={tmp_path / 'model.pt'}",
        f"--data-dir={shapes}",
        "--tiny",
        "--out=a",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| logistics |" in (tmp_path / "a" / "report.md").read_text()
