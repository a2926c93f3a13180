"""Two models side by side: shares of their predictions, and CKA against a restatement in NumPy."""

import json

import numpy as np
import pytest
import timm
import torch

from attnkd.commands import cli
from attnkd.evaluation.agreement import Seen, alignment, cka, look, overlap
from attnkd.training import run

MODEL = {"img_size": 16, "in_chans": 1, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def restated(a, b):
    """The HSIC of linear kernels, image by image: H centres the kernel matrices."""
    k, l, n = a @ a.T, b @ b.T, len(a)
    h = np.eye(n) - 1 / n
    return np.trace(k @ h @ l @ h) / np.sqrt(np.trace(k @ h @ k @ h) * np.trace(l @ h @ l @ h))


def test_cka_is_the_restated_one_and_sees_no_rotation_and_scale():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)) + 3, rng.normal(size=(40, 8)) - 1
    b[:, :5] += a
    ours = cka(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    assert ours == pytest.approx(restated(a, b), abs=1e-6) and 0.2 < ours < 0.9
    turned = a @ np.linalg.qr(rng.normal(size=(5, 5)))[0] * 7 + 2
    assert cka(torch.from_numpy(a), torch.from_numpy(turned)) == pytest.approx(1)
    with pytest.raises(ValueError, match="the same for all images"):
        cka(torch.ones(4, 2), torch.randn(4, 2))


def test_shares_of_predictions():
    labels = torch.tensor([0, 1, 2, 3, 4])
    first = Seen([], torch.tensor([0, 1, 0, 9, 4]), labels)
    second = Seen([], torch.tensor([0, 2, 2, 9, 3]), labels)
    assert overlap(first, second) == pytest.approx((20, 40, 20, 20, 40))
    with pytest.raises(ValueError, match="two classifiers"):
        overlap(first, second._replace(classes=None))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_features_are_the_means_of_every_blocks_tokens(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **MODEL).train()
    images, labels, found = torch.randn(5, 1, 16, 16), torch.arange(5), []
    hooks = [block.register_forward_hook(lambda m, i, out: found.append(out.mean(1))) for block in model.blocks]
    seen = look(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], torch.device("cpu"))
    assert model.training and seen.labels.tolist() == [0, 1, 2, 3, 4]
    for hook in hooks:
        hook.remove()
    for index, block in enumerate(seen.blocks):
        torch.testing.assert_close(block, torch.cat(found[index::2]).detach())
    torch.testing.assert_close(seen.classes, model.eval()(images).argmax(1))
    assert torch.allclose(alignment(seen, seen).diagonal(), torch.ones(2))


def test_the_command_compares_two_saved_models(tmp_path, capsys):
    pytest.importorskip("sklearn")
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        described = {"model_name": "vit_tiny_patch16_224", **MODEL, "depth": 2 + seed}
        run.save_student(folder, timm.create_model(**described), described)
        paths.append(str(folder / "model.safetensors"))
    options = ["--data", "digits", "--workers", "0", "--device", "cpu", "--mean", "0.3", "--std", "0.4"]
    assert cli.main(["eval", "agree", *paths, *options, "--json", str(tmp_path / "x.json")]) == 0
    found, said = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    assert np.shape(found["cka"]) == (2, 3) and f"same {found['overlap']['same']:.2f} %" in said
    assert sum(share for name, share in found["overlap"].items() if name != "same") == pytest.approx(100)
    assert cli.main(["eval", "agree", paths[0], *options]) == 2
    assert capsys.readouterr().err.startswith("attnkd eval: --model: agree takes two, got 1")
