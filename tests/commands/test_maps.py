"""`attnkd maps`: the numbers behind the figure, and the command on digits, photographs and image files."""

import re

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from attnkd.capture.class_maps import attention_rollout, class_kl, class_maps, upsample
from attnkd.capture.loading import load_saved
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import token_layout
from attnkd.commands import cli, maps
from attnkd.demo.runs import STUDENT, TEACHER, describe, new_classifier
from attnkd.training.run import save_student


def vit(heads, seed=0, patch_size=4, depth=3, **options):
    args = {**STUDENT, "patch_size": patch_size, "num_heads": heads, "depth": depth, "embed_dim": 48, **options}
    model = new_classifier(args, seed).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3)
    return model


def attention(model, images):
    """Every block's attention [B, H, N, N]."""
    _, calls = AttentionTap(model, "all")(images)
    return [(call.query @ call.key.transpose(-2, -1) * call.scale).softmax(-1) for call in calls]


@pytest.fixture
def images():
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_class_maps_are_the_class_tokens_rows(images):
    model = vit(4)
    rows = attention(model, images)[1][:, :, 0]
    shown = class_maps(model, images, block=1)
    torch.testing.assert_close(shown.rows[:, :, 0], rows)
    torch.testing.assert_close(shown.heads_map, rows[..., 1:].unflatten(-1, (4, 4)))
    torch.testing.assert_close(shown.merged_map[:, 0], rows.mean(1)[..., 1:].unflatten(-1, (4, 4)))
    assert not model.training and class_maps(model.train(), images, rollout=False).rollout is None and model.training


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_rollout_is_the_product_of_all_maps(images, registers):
    model = vit(4, reg_tokens=registers)
    product = torch.eye(17 + registers)
    for probs in attention(model, images):
        product = (probs.mean(1) + torch.eye(17 + registers)) / 2 @ product
    expected = product[:, 0, 1 + registers :]
    rollout = class_maps(model, images).rollout
    torch.testing.assert_close(rollout, expected / expected.sum(-1, keepdim=True))
    assert rollout.std() > 1e-3
    _, calls = AttentionTap(model, "all")(images)
    torch.testing.assert_close(attention_rollout(calls[:1], token_layout(model)).sum(-1), torch.ones(2))


@torch.no_grad()
def test_kl_per_head_and_merged(images):
    teacher, student = vit(2, seed=1), vit(2)
    shown = class_maps(teacher, images), class_maps(student, images)
    per_head, merged = class_kl(shown[1], shown[0])
    t, s = (attention(model, images)[-1][:, :, 0] for model in (teacher, student))
    torch.testing.assert_close(per_head, F.kl_div(s.log(), t, reduction="none").sum(-1))
    torch.testing.assert_close(merged, F.kl_div(s.mean(1).log(), t.mean(1), reduction="none").sum(-1)[:, None])
    temperatures = [1.0, 5.0]
    shown = [class_maps(model, images, -1, "logsum", False, temperatures) for model in (teacher, student)]
    t, s = ([(x.log().sum(1) / T).softmax(-1) for T in temperatures] for x in (t, s))
    torch.testing.assert_close(shown[0].merged[:, :, 0], torch.stack(t, 1))
    _, merged = class_kl(shown[1], shown[0], "logsum", temperatures)
    expected = torch.stack([F.kl_div(a.log(), b, reduction="none").sum(-1) for a, b in zip(s, t, strict=True)], 1)
    torch.testing.assert_close(merged, expected)


@torch.no_grad()
def test_kl_with_other_heads_and_another_grid(images):
    teacher, student = vit(4, seed=1, patch_size=2), vit(2)
    shown = class_maps(teacher, images), class_maps(student, images)
    per_head, merged = class_kl(shown[1], shown[0], "logsum")
    assert per_head is None and merged.shape == (2, 1) and (merged > 0).all()
    _, itself = class_kl(shown[1], shown[1], "logsum")
    torch.testing.assert_close(itself, torch.zeros(2, 1), atol=1e-6, rtol=0)


def test_upsampling_keeps_constants_and_order():
    torch.testing.assert_close(upsample(torch.full((2, 3, 4, 4), 0.25), (9, 7)), torch.full((2, 3, 9, 7), 0.25))
    large = upsample(torch.tensor([[0.0, 1.0]]), (1, 8))
    assert (large.diff() >= 0).all() and large[0, 0] == 0 and large[0, -1] == 1


def command(*words):
    return cli.main(["maps", *map(str, words)])


def picture_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size, len(image.convert("RGB").resize((64, 64)).getcolors(64 * 64))


@pytest.fixture
def results(tmp_path):
    """A demo's results: models beside their arguments, and pictures to look at."""
    for name, args in (
        ("teacher-old", STUDENT),
        ("teacher-new", TEACHER),
        ("student-pa_ag-1", STUDENT),
    ):
        (tmp_path / name).mkdir()
        save_student(tmp_path / name, new_classifier(args, 0), describe(args))
    (tmp_path / "images").mkdir()
    for name in ("digit 0", "digit 1"):
        Image.radial_gradient("L").resize((16, 16)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def test_newest_demo_on_its_pictures(results, capsys):
    output = results / "figures" / "maps.png"
    assert command("--run", results, "--output", output, "--merge", "logsum") == 0
    printed = capsys.readouterr().out
    assert (
        "digit 0:  logsum of heads " in printed
        and "digit 1:" in printed
        and "teacher and student have 4 and 2" in printed
    )
    size, colours = picture_of(output)
    assert size[0] > 600 and size[1] > 500 and colours > 100


def test_temperatures_and_labels(results, capsys):
    output, digits = results / "maps.png", sorted((results / "images").glob("*.png"))
    assert command("--run", results, "--output", output, *digits) == 0
    plain = picture_of(output)
    words = ["--run", results, "--output", output, "--merge", "logsum", "--temperature", 1, 10, "--labels", "--"]
    assert command(*words, *digits) == 0
    assert len(re.findall(r"logsum of heads \d\.\d{3} \d\.\d{3}$", capsys.readouterr().out, re.M)) == 2
    assert picture_of(output)[0][0] > plain[0][0], "a column more"
    model = load_saved(results / "teacher-new" / "model.safetensors")
    _, _, (images, _) = maps.load_pictures(digits, model, model)
    probability, index = model(images).softmax(-1).max(-1)
    expected = [f"{i} ({p:.2f})" for i, p in zip(index.tolist(), probability.tolist(), strict=True)]
    assert maps.predicted(model, images) == expected
    assert command("--run", results, "--output", output, "--temperature", 0) == 2
    assert "--temperature: expected a finite number above 0" in capsys.readouterr().err


def test_the_teacher_is_that_of_the_student(tmp_path):
    for seed, name in enumerate(("teacher-seed1-a", "teacher-seed2-a", "student-pa_ag-seed1-b")):
        (tmp_path / name).mkdir()
        save_student(tmp_path / name, new_classifier(STUDENT, seed), describe(STUDENT))
    found = maps.find_model("teacher", None, None, {}, tmp_path)
    first = load_saved(tmp_path / "teacher-seed1-a" / "model.safetensors")
    assert torch.equal(found.pos_embed, first.pos_embed)


def test_grey_images_are_normalised_as_the_saved_model_says(results):
    model = load_saved(results / "teacher-new" / "model.safetensors")
    _, pictures, (teacher, student) = maps.load_pictures([results / "images" / "digit 0.png"], model, model)
    assert pictures.shape == (1, 1, 16, 16) and 0 <= pictures.min() < pictures.max() <= 1
    torch.testing.assert_close(teacher, (pictures - 0.31) / 0.348)
    assert torch.equal(teacher, student)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(folder / f"{seed}.pth")
        model = timm.create_model("test_vit", num_classes=1000 if seed == 0 else 0)  # AttnDistill's students have none
        torch.save(model.state_dict(), files[-1])
    options = ["--teacher", "test_vit", "--teacher-checkpoint", files[0], "--student", "test_vit"]
    return [*options, "--student-checkpoint", files[1]]


def test_photographs_by_default_and_own_files(checkpoints, tmp_path, capsys):
    output = tmp_path / "maps.png"
    assert command(*checkpoints, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "china.jpg:" in printed and "flower.jpg:" in printed and "heads 0." in printed
    file = tmp_path / "mine.png"
    Image.linear_gradient("L").save(file)
    before = picture_of(output)
    assert command(file, *checkpoints, "--output", output, "--no-rollout") == 0
    assert "mine.png:" in capsys.readouterr().out and picture_of(output)[0] != before[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nowhere"], "--teacher: no teacher in nowhere; run `attnkd demo` first, or name a timm model"),
        (["--teacher", "vit_of_mine"], "--teacher: 'vit_of_mine' is neither a timm model nor a model.safetensors"),
        (["--teacher-checkpoint", "x.pth"], "--teacher-checkpoint: needs the model it belongs to"),
        (["--output", "nowhere.txt"], "--output: expected a suffix among"),
        (["--device", "abacus"], "--device: expected a device PyTorch can use here"),
    ],
)
def test_refusals(words, message, capsys, tmp_path):
    assert command("--output", tmp_path / "maps.png", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "maps.png").exists()


def test_refusals_with_models(checkpoints, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    assert command(tmp_path / "text.png", *checkpoints) == 2
    assert "text.png: cannot be read as an image" in capsys.readouterr().err
    assert command(tmp_path / "none.png", *checkpoints) == 2
    assert "none.png: cannot be read as an image (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert command(*checkpoints, "--output", tmp_path / "folder.png") == 2
    assert "--output: cannot write" in capsys.readouterr().err
    for words, said in (
        (
            ["--temperature", 1, 10, "image.png"],
            "--temperature: expected numbers, got 'image.png'; what is not of this option",
        ),
        (
            ["--student-kwargs", "a=1", "image.png"],
            "--student-kwargs: expected NAME=VALUE, got 'image.png'; what is not of",
        ),
    ):
        with pytest.raises(SystemExit):
            command(*words)
        assert said in capsys.readouterr().err
    broken = torch.load(checkpoints[3])
    broken["blocks.0.attn.qkv.weight"].fill_(3e38)  # finite, but products with it are not
    torch.save(broken, tmp_path / "broken.pth")
    assert command(*checkpoints, "--teacher-checkpoint", tmp_path / "broken.pth", "--output", tmp_path / "x.png") == 2
    assert "--teacher: its attention is not finite; check its weights" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert command(*checkpoints, "--block", 99) == 2
    assert "blocks: expected" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no class token whose attention could be shown"):
        class_maps(vit(2, class_token=False, global_pool="avg"), torch.randn(1, 1, 16, 16))


def test_models_without_a_rollout_show_a_block_alone():
    small = {"img_size": 32, "patch_size": 8, "num_classes": 3}
    pit = timm.create_model("pit_ti_224", base_dims=(8, 8, 8), heads=(2, 2, 2), depth=(1, 1, 1), stride=4, **small)
    cait = timm.create_model("cait_xxs24_224", embed_dim=32, depth=1, num_heads=4, **small)
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="rollout: .* the grid of PoolingVisionTransformer shrinks .*--no-rollout"):
        class_maps(pit, images)
    with pytest.raises(NotImplementedError, match=r"rollout: .* blocks.0.attn .TalkingHeadAttn.: .*--no-rollout"):
        class_maps(cait, images)
    for model in (pit, cait):
        shown = class_maps(model, images, rollout=False)
        torch.testing.assert_close(shown.rows.sum(-1), torch.ones_like(shown.rows[..., 0]))
