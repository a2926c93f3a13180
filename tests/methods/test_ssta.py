"""SSTA: textbook restatement of its loss, early stop, head importance against brute force, refusals, and a run on digits."""

import functools
import itertools
import json

import pytest
import timm
import torch
from torch.nn import functional as F

from attnkd.capture.adapters import adapter_for
from attnkd.evaluation.features import class_tokens
from attnkd.methods.head_importance import HeadImportance, head_importance, select_heads
from attnkd.methods.silence import silenced
from attnkd.methods.ssta import SSTA
from tests.digits import fit, load_digits
from tests.stirred import stirred


def vit(heads, depth=3, dim=48, seed=0, classes=10, **options):
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 4, "in_chans": 1, **options},
        num_classes=classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        weight_init="jax",
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # attention that is not uniform
        if classes:
            model.head.weight.normal_(std=0.1)
    return model


def batch(count=5):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def maps(model, images):
    """Every block's attention [B, H, N, N], from the packed projection of timm's Attention."""
    found, heads = [], model.blocks[0].attn.num_heads

    def hook(attention, inputs, output):
        count, tokens, width = output.shape
        query, key, _ = output.view(count, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
        found.append((query @ key.transpose(-2, -1) / (width // 3 // heads) ** 0.5).softmax(-1))

    handles = [block.attn.qkv.register_forward_hook(hook) for block in model.blocks]
    output = model(images)
    for handle in handles:
        handle.remove()
    return found, output


def kl(teacher, student):
    """Mean over images and query rows of KL(teacher ‖ student) of maps [B, N, N]."""
    return F.kl_div(student.log(), teacher, reduction="none").sum(-1).mean()


def test_total_loss_is_the_textbook_loss():
    student, teacher, assistant = vit(2, depth=4), vit(4, depth=4, dim=64, seed=1), vit(3, depth=4, seed=2)
    images, targets = batch()
    task = SSTA(
        student,
        teacher,
        assistant,
        teacher_heads=[0, 3, 1],
        assistant_heads=[2, 0, 2],
        alpha=0.7,
        beta=0.3,
        lam=0.2,
        stop_epoch=None,
        verbose=False,
    )
    result = task(images, targets)
    s, output = maps(student, images)
    t, _ = maps(teacher, images)
    a, _ = maps(assistant, images)
    kl_sl = sum(kl(t[l][:, h], s[l][:, 0]) for l, h in zip((1, 2, 3), (0, 3, 1), strict=True)) / 3
    kl_ssl = sum(kl(a[l][:, h], s[l][:, 1]) for l, h in zip((1, 2, 3), (2, 0, 2), strict=True)) / 3
    expected = 0.7 * F.cross_entropy(output, targets) + 0.3 * kl_sl + 0.2 * kl_ssl
    torch.testing.assert_close(result["teacher_attn_loss"], kl_sl)
    torch.testing.assert_close(result["assistant_attn_loss"], kl_ssl)
    torch.testing.assert_close(result["loss"], expected)
    weights = [block.attn.qkv.weight for block in student.blocks]
    gradients = torch.autograd.grad(result["loss"], weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights), rtol=1e-4, atol=1e-6)


def test_average_compares_with_the_mean_of_all_heads():
    student, teacher, (images, targets) = vit(2), vit(4, dim=64, seed=1), batch()
    task = SSTA(student, teacher, blocks=-1, teacher_heads="average", stop_epoch=None, verbose=False)
    s, _ = maps(student, images)
    t, _ = maps(teacher, images)
    result = task(images, targets)
    torch.testing.assert_close(result["teacher_attn_loss"], kl(t[-1].mean(1), s[-1][:, 0]))
    assert "assistant_attn_loss" not in result


def test_assistant_alone_and_other_student_heads():
    student, assistant, (images, targets) = vit(3), vit(2, seed=1), batch()
    task = SSTA(
        student,
        assistant=assistant,
        blocks=[0],
        assistant_blocks=[2],
        assistant_heads=[1],
        student_heads=(0, 2),
        stop_epoch=None,
        verbose=False,
    )
    s, _ = maps(student, images)
    a, _ = maps(assistant, images)
    torch.testing.assert_close(task(images, targets)["assistant_attn_loss"], kl(a[2][:, 1], s[0][:, 2]))


def test_two_teachers_of_one_kind_may_be_the_same_model():
    student, teacher, (images, targets) = vit(2), vit(4, dim=64, seed=1), batch()
    task = SSTA(
        student, teacher, teacher, blocks=-1, teacher_heads=[0], assistant_heads=[3], stop_epoch=None, verbose=False
    )
    s, _ = maps(student, images)
    t, _ = maps(teacher, images)
    result = task(images, targets)
    torch.testing.assert_close(result["teacher_attn_loss"], kl(t[-1][:, 0], s[-1][:, 0]))
    torch.testing.assert_close(result["assistant_attn_loss"], kl(t[-1][:, 3], s[-1][:, 1]))


def test_early_stop_leaves_the_class_loss_and_rests_the_teachers():
    task = SSTA(
        vit(2), vit(2, seed=1), vit(2, seed=2), teacher_heads="average", assistant_heads=[0, 1, 0], verbose=False
    )
    images, targets = batch()
    with pytest.raises(RuntimeError, match=r"beta: changes by epoch, but set_epoch\(\) was never called"):
        task(images, targets)
    task.set_epoch(99)
    assert {"teacher_attn_loss", "assistant_attn_loss"} <= task(images, targets).keys()
    ran = []
    for name, teacher in task.teachers.items():
        teacher.register_forward_hook(lambda *_, name=name: ran.append(name))
    task(images, targets)
    assert ran == ["teacher", "assistant"]
    task.set_epoch(100)
    result = task(images, targets)
    assert ran == ["teacher", "assistant"] and set(result) == {"loss", "task_loss", "output"}
    assert torch.equal(result["loss"], result["task_loss"])

    resumed = SSTA(vit(2), vit(2, seed=1), teacher_heads="average", verbose=False)
    resumed.load_task_state(task.get_task_state())
    assert set(resumed(images, targets)) == {"loss", "task_loss", "output"}


def test_nothing_left_to_train_on_is_an_error():
    task = SSTA(vit(2), vit(2, seed=1), teacher_heads="average", criterion=None, stop_epoch=1, verbose=False)
    images, _ = batch()
    task.set_epoch(0)
    task(images)["loss"].backward()
    task.set_epoch(1)
    with pytest.raises(RuntimeError, match="nothing to train on"):
        task(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_heads": None}, "teacher_heads: expected 'average' or one head for each of 3 blocks, got None"),
        ({"teacher_heads": "best"}, "teacher_heads: expected 'average' or .*, got 'best'"),
        ({"teacher_heads": [0, 1]}, r"teacher_heads: expected one head for each of 3 blocks, got \[0, 1\]"),
        (
            {"teacher_heads": [0, 1, 2]},
            r"teacher_heads: expected indices from 0 to 1 \(blocks.2.attn has 2 heads\), got 2",
        ),
        ({"student_heads": (2, 1)}, "student_heads: expected indices from 0 to 1"),
        ({"student_heads": (0, 1, 2)}, "student_heads: expected .head for the teacher, head for the assistant."),
        ({"assistant_heads": [0, 0, 0]}, "assistant_heads, assistant_blocks: given, but assistant is None"),
        ({"blocks": [5]}, "blocks: expected"),
        ({"divergence": "kl"}, "divergence: expected one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        SSTA(vit(2), vit(2, seed=1), **{"teacher_heads": [0, 0, 0], "verbose": False, **options})


def test_refusals_about_the_teachers():
    with pytest.raises(ValueError, match="teacher, assistant: expected at least one"):
        SSTA(vit(2), verbose=False)
    with pytest.raises(ValueError, match="student_heads: expected a head of its own for each teacher"):
        SSTA(vit(2), vit(2), vit(2), teacher_heads="average", assistant_heads="average", student_heads=(1, 1))
    other: dict = {"teacher_heads": "average", "stop_epoch": None, "verbose": False}
    task = SSTA(vit(2), vit(2, patch_size=2), resample_mode=None, **other)
    with pytest.raises(ValueError, match="the student's grid is 4x4 .* the teacher's 8x8; whole maps"):
        task(*batch())


# -- head importance --------------------------------------------------------------------------------------------------


def right_without(model, heads, images, targets):
    """How many images are right when heads' outputs are zero where the projection takes them in; heads: {block: head}."""
    handles = []
    for block, head in heads.items():
        attention = model.blocks[block].attn

        def zero(module, inputs, head=head, width=attention.head_dim):
            kept = inputs[0].clone()
            kept[..., head * width : (head + 1) * width] = 0
            return (kept,)

        handles.append(attention.proj.register_forward_pre_hook(zero))
    with torch.no_grad():
        right = int((model.eval()(images).argmax(-1) == targets).sum())
    for handle in handles:
        handle.remove()
    return right


@pytest.fixture(scope="module")
def held_out():
    model = vit(3, depth=4, dim=36).eval()
    images = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        targets = model(images).argmax(-1)
    targets[::5] = (targets[::5] + 1) % 10  # some images the whole model gets wrong
    return model, images, targets, [(images[:25], targets[:25]), (images[25:], targets[25:])]


@pytest.mark.parametrize("max_batch", [9, 100])
def test_importance_of_combinations_is_brute_force(held_out, max_batch):
    model, images, targets, loader = held_out
    found = head_importance(model, loader, max_batch=max_batch, progress=False)
    (importance,) = found.importance()
    full = right_without(model, {}, images, targets)
    assert importance.shape == (3, 3, 3) and found.accuracy == full / 40 and found.images == 40
    expected = torch.empty(3, 3, 3, dtype=torch.float64)
    for heads in itertools.product(range(3), repeat=3):
        expected[heads] = (full - right_without(model, dict(zip((1, 2, 3), heads, strict=True)), images, targets)) / 40
    assert torch.equal(importance, expected) and expected.unique().numel() > 3
    assert importance[tuple(found.best())] == expected.max()


def test_lower_blocks_run_once_for_all_combinations(held_out):
    model, images, targets, _ = held_out
    ran = [0] * 4
    handles = [
        block.register_forward_hook(lambda m, i, out, index=index: ran.__setitem__(index, ran[index] + len(out)))
        for index, block in enumerate(model.blocks)
    ]
    head_importance(model, [(images[:2], targets[:2])], progress=False)
    for handle in handles:
        handle.remove()
    whole_model = 2
    assert ran == [whole_model + 2 * copies for copies in (1, 3, 9, 27)]


def test_importance_of_single_heads(held_out):
    model, images, targets, loader = held_out
    found = head_importance(model, loader, blocks=[0, 3], combinations=False, max_batch=2, progress=False)
    full = right_without(model, {}, images, targets)
    for block, importance in zip((0, 3), found.importance(), strict=True):
        expected = [(full - right_without(model, {block: head}, images, targets)) / 40 for head in range(3)]
        assert importance.tolist() == expected
    assert found.best() == [int(importance.argmax()) for importance in found.importance()]


@pytest.mark.parametrize("kind", ["Swin", "Hiera", "Hugging Face"])
def test_importance_in_models_of_windows_and_of_other_libraries(kind):
    """The windows of an image lie in the batch beside the copies of it."""
    if kind == "Hugging Face":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=5)
        )
    elif kind == "Swin":
        sizes = {"patch_size": 4, "window_size": 8, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, **sizes)
    else:
        sizes = {"embed_dim": 16, "num_heads": 2, "stages": (1, 1, 1, 1)}
        model = timm.create_model("hiera_tiny_224", img_size=64, num_classes=5, **sizes)
    model, images = stirred(model), torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = adapter_for(model).forward
    with torch.no_grad():
        targets = run(model, images).argmax(-1)
    found = head_importance(model, [(images, targets)], blocks=[0, 1], progress=False)
    first, second = found.paths
    for one, two in [(0, 1), (1, 0)]:
        with silenced(model, {first: one, second: two}), torch.no_grad():
            assert found.correct[one][two] == int((run(model, images).argmax(-1) == targets).sum())
    assert len(set(itertools.chain(*found.correct))) > 1


def test_an_interrupted_search_continues(held_out, tmp_path):
    model, _, _, loader = held_out
    path = tmp_path / "importance.json"

    def killed():
        yield loader[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        head_importance(model, killed(), path=path, progress=False)
    assert json.loads(path.read_text())["images"] == 25
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    found = head_importance(model, loader, path=path, progress=False)
    handle.remove()
    assert set(seen) == {15}, "the first batch of 25 must not run again"
    assert found == HeadImportance.load(path) and found.complete
    assert found.correct == head_importance(model, loader, progress=False).correct
    assert head_importance(model, [], path=path, progress=False) == found, "a finished search is not run again"


def test_a_search_is_not_continued_with_other_data_model_or_settings(held_out, tmp_path):
    model, _, _, loader = held_out
    path = tmp_path / "importance.json"
    found = head_importance(model, loader[:1], path=path, progress=False)
    found.complete = False
    found.save(path)
    with pytest.raises(ValueError, match="loader: other targets than in the unfinished search"):
        head_importance(model, loader[::-1], path=path, progress=False)
    with pytest.raises(ValueError, match=r"belongs to another search \(weights_crc"):
        head_importance(vit(3, depth=4, dim=36, seed=9), loader, path=path, progress=False)
    with pytest.raises(ValueError, match=r"belongs to another search \(paths"):
        head_importance(model, loader, blocks=[0], path=path, progress=False)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a saved HeadImportance"):
        head_importance(model, loader, path=path, progress=False)
    with pytest.raises(ValueError, match="loader: expected images, got none"):
        head_importance(model, [], progress=False)


def test_a_model_without_classifier_takes_one(held_out):
    *_, loader = held_out
    model = vit(2, classes=0)
    probe = torch.nn.Linear(48, 10)
    found = head_importance(model, loader, blocks=-1, classifier=probe, progress=False)
    right = sum(int((probe(model(images)).argmax(-1) == targets).sum()) for images, targets in loader)
    assert found.full == right
    with pytest.raises(ValueError, match=r"model: has no classifier .* its 48 features, .* give classifier="):
        head_importance(model, loader, blocks=-1, progress=False)
    few = torch.nn.Linear(48, 3)
    with pytest.raises(ValueError, match="loader: expected class indices from 0 to 2, as many as .*, got 0 to 9"):
        head_importance(model, loader, blocks=-1, classifier=few, progress=False)
    one_hot = [(images, torch.nn.functional.one_hot(targets, 10)) for images, targets in loader]
    with pytest.raises(
        ValueError, match=r"loader: expected class indices \[25\], one for each image, got .* \(25, 10\)"
    ):
        head_importance(model, one_hot, blocks=-1, classifier=probe, progress=False)


def test_a_classifier_that_reads_several_blocks(held_out):
    """As DINO's linear probe does: batches that grow from block to block could not be put together."""
    _, images, targets, loader = held_out

    class FourBlocks(timm.models.VisionTransformer):
        def forward(self, images):
            tokens, found = self._pos_embed(self.patch_embed(images)), []
            for block in self.blocks:
                tokens = block(tokens)
                found.append(self.norm(tokens)[:, 0])
            return self.probe(torch.cat(found, -1))

    torch.manual_seed(0)
    model = FourBlocks(img_size=16, patch_size=4, in_chans=1, embed_dim=36, depth=4, num_heads=3, num_classes=0)
    model.probe = torch.nn.Linear(4 * 36, 10)
    found = head_importance(model, loader, blocks=(-2, -1), max_batch=30, progress=False)
    for first, second in [(0, 2), (1, 1), (2, 0)]:
        assert found.correct[first][second] == right_without(model, {2: first, 3: second}, images, targets)


def test_a_classifier_of_the_class_tokens_of_several_blocks(held_out):
    """Of a plain model, whose own output is another."""
    model, images, targets, loader = held_out
    probe = torch.nn.Linear(3 * 36, 10)
    forward = functools.partial(class_tokens, last_blocks=3)
    found = head_importance(
        model, loader, blocks=(-2, -1), classifier=probe, forward=forward, max_batch=30, progress=False
    )
    assert found.full == int((probe(forward(model, images)).argmax(-1) == targets).sum())
    for first, second in [(0, 2), (2, 1)]:
        with silenced(model, {"blocks.2.attn": first, "blocks.3.attn": second}), torch.no_grad():
            assert found.correct[first][second] == int((probe(forward(model, images)).argmax(-1) == targets).sum())


def test_attentions_out_of_order_are_refused(held_out):
    model, *_, loader = held_out
    with pytest.raises(ValueError, match="blocks: expected at most one attention a block, in running order"):
        head_importance(model, loader, blocks=["blocks.3.attn", "blocks.1.attn"], progress=False)
    parallel = timm.create_model(
        "vit_base_patch16_18x2_224", img_size=32, num_classes=10, depth=2, embed_dim=32, num_heads=2
    )
    with pytest.raises(ValueError, match="blocks: expected at most one attention a block, in running order"):
        head_importance(parallel, loader, blocks=["blocks.0.attns.0.attn", "blocks.0.attns.1.attn"], progress=False)


def test_silenced_leaves_the_model_as_it_was(held_out):
    model, images, *_ = held_out
    before = model(images)
    model.blocks[2].attn.fused_attn = False
    with silenced(model, {"blocks.2.attn": 1}):
        without = model(images)
    assert model.blocks[2].attn.fused_attn is False and not torch.equal(before, without)
    model.blocks[2].attn.fused_attn = True
    assert torch.equal(model(images), before)


def test_selection(held_out):
    model, _, _, loader = held_out
    found = head_importance(model, loader, blocks=[2, 3], progress=False)
    assert select_heads("average", model) == "average"
    assert select_heads("importance", model, [2, 3], importance=found) == found.best()
    drawn = {tuple(select_heads("random", model, seed=seed)) for seed in range(20)}
    assert len(drawn) > 5 and all(0 <= head < 3 for heads in drawn for head in heads)
    assert select_heads("random", model, seed=4) == select_heads("random", model, seed=4)
    with pytest.raises(ValueError, match="importance: expected a search over .*blocks.1.attn"):
        select_heads("importance", model, importance=found)
    with pytest.raises(ValueError, match="importance: 'importance' needs the finished result"):
        select_heads("importance", model)
    with pytest.raises(ValueError, match="selection: expected one of 'importance', 'average', 'random', got 'best'"):
        select_heads("best", model)


def test_digits_end_to_end():
    """Trained teacher → head importance → SSTA with an early stop, on real digits."""
    from timm.task import ClassificationTask

    train, test = load_digits(320, 100)
    teacher, assistant, student = vit(3, seed=1), vit(3, seed=2), vit(2)
    for seed, model in enumerate((teacher, assistant)):
        fit(ClassificationTask(model, verbose=False), *train, seed=seed)
    heads = {
        name: select_heads("importance", model, importance=head_importance(model, [test], progress=False))
        for name, model in (("teacher_heads", teacher), ("assistant_heads", assistant))
    }
    task = SSTA(student, teacher, assistant, stop_epoch=2, verbose=False, **heads)
    losses = fit(task, *train, before_epoch=task.set_epoch)
    for name in ("teacher_attn_loss", "assistant_attn_loss"):
        assert losses[1][name] < losses[0][name] and name not in losses[2]
    assert losses[2]["task_loss"] < losses[0]["task_loss"]
