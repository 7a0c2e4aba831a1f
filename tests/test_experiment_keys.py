"""Keys trained with labels, with tiny arguments: they alone change, and every task is scored with both."""

import torch
from scripts import is_estimate, module, refusal, results

from vma_pyro import models


def test_only_the_keys_change(data_folder, untrained, tmp_path):
    arguments = ["--tiny", f"--load={untrained / 'memory.pt'}", f"--data-dir={data_folder}"]
    content = results("keys", *arguments, cwd=tmp_path, out="a")
    tasks = [(r["keys"], r["split"], r["among"], r["ways"], r["shots"]) for r in content["rows"]]
    assert len(tasks) == len(set(tasks)) >= 2 * 2 * 2
    assert all(is_estimate(r["accuracy"], n=4, high=1) for r in content["rows"])
    before, after = (
        models.as_one(models.load(path)).state_dict()
        for path in (untrained / "memory.pt", tmp_path / "a/model.pt")
    )
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert changed
    assert all(".keys." in name or "similarity" in name for name in changed)
    again = results("keys", *arguments, "--resume", cwd=tmp_path, out="a")
    assert again["keys"] == content["keys"]
    line = refusal("keys", f"--load={tmp_path / 'a/model.pt'}", f"--data-dir={data_folder}", cwd=tmp_path)
    assert line.startswith("error: --load: expected ConvNetworks without a key network, got ")


def test_bent_drawings_are_binary_and_near_what_they_were():
    keys = module("keys")
    images = torch.zeros(50, 1, 28, 28)
    images[:, :, 8:20, 12:16] = 1.0
    found = keys.bent(images, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    ink = found.flatten(1).sum(1) / images.flatten(1).sum(1)
    assert 0.6 < ink.min() < ink.max() < 1.6
    assert (found != images).flatten(1).any(1).float().mean() > 0.9


def test_training_learns_to_tell_classes_apart():
    """Glyphs, a minute at most: far better than chance on glyphs of other alphabets."""
    keys = module("keys")
    from vma_pyro.data import Split, glyphs

    train, held_out = glyphs.load(classes=60, seed=0), glyphs.load(classes=20, seed=1)
    pair = models.build({"networks": "conv", "width": 0.1, "latent_dim": 4, "key_maps": 8, "program": "memory"})
    config = keys.KeysConfig(classes=20, minutes=0.15, validate_every=50, validation_images=100, key_maps=8)
    split = Split(train, held_out, held_out)
    before = keys.accuracy(pair, held_out, (20, 1), config, torch.device("cpu")).mean
    facts = keys.train(pair, split, config, torch.device("cpu"))
    after = keys.accuracy(pair, held_out, (20, 1), config, torch.device("cpu")).mean
    assert after == facts["validation_accuracy"]
    assert after > before
