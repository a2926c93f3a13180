"""What all four tasks promise: what cannot train or be compared is refused by name, and models come back as they were."""

import copy
import io
import math

import numpy as np
import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from attnkd.attention.call import AttentionCall
from attnkd.capture.tokens import TokenLayout
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.schedule import Schedule
from attnkd.methods.ssta import SSTA
from attnkd.methods.whole_map import compared_maps, whole_map_divergence

X, Y = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4, **options}
    )


TASKS = {
    "AttnDistill": lambda s, t, **o: AttnDistill(s, t, verbose=False, **o),
    "HeadKD": lambda s, t, **o: HeadKD(s, t, verbose=False, **o),
    "SSTA": lambda s, t, **o: SSTA(s, t, **{"teacher_heads": [1, 0, 1], "stop_epoch": None, "verbose": False, **o}),
    "AttentionProbe": lambda s, t, **o: AttentionProbe(s, t, 0.9, verbose=False, **o),
}
WHOLE = ("HeadKD", "SSTA", "AttentionProbe")  # need the same patches

each = pytest.mark.parametrize("name", TASKS)

NUMBERS = [
    ("AttnDistill", {"task_loss_weight": -1.0}, "task_loss_weight: expected a number >= 0, got -1"),
    ("AttnDistill", {"attn_weight": Schedule(1.0, stop=3, end=-0.5)}, "attn_weight: expected a number >= 0"),
    ("AttnDistill", {"temperature": Schedule(1.0, warmup=3)}, "temperature: expected a number > 0"),
    ("HeadKD", {"temperature": 0.0}, "temperature: expected a number > 0, got 0"),
    ("HeadKD", {"alpha": math.nan}, "alpha: expected a finite number"),
    ("HeadKD", {"alpha": Schedule(0.5, stop=3, end=1.5)}, "alpha: expected a number from 0 to 1"),
    ("HeadKD", {"alpha": Schedule(1.0), "criterion": None}, "alpha: 1 leaves the class loss alone"),
    ("HeadKD", {"wrong_student_weight": math.nan}, "wrong_student_weight: expected a finite number"),
    ("SSTA", {"lam": -1.0}, "lam: expected a number >= 0, got -1"),
    ("SSTA", {"lam": math.nan, "stop_epoch": 100}, "lam: expected a finite number"),
    ("SSTA", {"beta": math.inf}, "beta: expected a finite number"),
    ("SSTA", {"temperature": -1.0}, "temperature: expected a number > 0"),
    ("SSTA", {"stop_epoch": math.nan}, "stop_epoch: expected a finite number"),
    ("SSTA", {"alpha": 0, "beta": 0}, "alpha, beta, kd_weight, at_weight: all are 0"),
    ("SSTA", {"beta": 0, "criterion": None}, "beta, kd_weight, at_weight: all are 0"),
    ("AttentionProbe", {"relation_weight": math.nan}, "relation_weight: expected a finite number"),
    ("AttnDistill", {"device": "gpu"}, "device: expected a device PyTorch can use here, .*'cpu', got 'gpu' "),
]


@pytest.mark.parametrize(("name", "options", "message"), NUMBERS)
def test_numbers_are_checked_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        TASKS[name](vit(), vit(1), **options)


@each
def test_a_student_that_cannot_train_is_refused(name):
    with pytest.raises(ValueError, match="student: no parameter of VisionTransformer requires grad"):
        TASKS[name](vit().requires_grad_(False), vit(1))
    if name != "AttentionProbe":
        with pytest.raises(ValueError, match=r"student: VisionTransformer has no classifier \(num_classes = 0\)"):
            TASKS[name](vit(num_classes=0), vit(1), criterion=nn.CrossEntropyLoss())
    if name in ("HeadKD", "SSTA"):  # only the last norm and the classifier train, and maps do not reach them
        student = vit().requires_grad_(False)
        student.head.requires_grad_(True)
        with pytest.raises(RuntimeError, match="nothing would train: the loss depends on no parameter of the student"):
            TASKS[name](student, vit(1), criterion=None)(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each
def test_teacher_and_student_of_other_dtypes(name, dtype):
    """Images are given to each in its own dtype; the loss is that of float32 up to the rounding of the models."""
    options = {"impl": "chunked"}
    if name == "AttnDistill":
        options["patch_weight"] = 1.0
    torch.manual_seed(0)
    plain = TASKS[name](vit(), vit(1), **options)
    want = plain(X, Y)["loss"]
    for student, teacher in ((torch.float32, dtype), (dtype, torch.float32)):
        task = TASKS[name](vit().to(student), vit(1).to(teacher), **options)
        if name == "AttnDistill":
            task.trainable_module.projector.load_state_dict(plain.trainable_module.projector.state_dict())
        loss = task(X, Y)["loss"]
        loss.backward()
        torch.testing.assert_close(loss.float(), want, rtol=0.05, atol=2e-3)
        assert all(p.grad.isfinite().all() for p in task.student.parameters() if p.grad is not None)


@each
def test_untap_gives_models_back_as_they_were(name):
    student, teacher = vit(), vit(1)
    teacher.blocks[0].requires_grad_(False)
    teacher.blocks[1].eval()
    teacher.blocks[2].attn.fused_attn = False
    before = [(type(m), m.training, getattr(m, "fused_attn", None), len(m._forward_hooks)) for m in teacher.modules()]
    trains = [p.requires_grad for p in teacher.parameters()]
    task = TASKS[name](student, teacher).eval().train()
    task(X, Y)["loss"].backward()
    assert not any(p.requires_grad for p in teacher.parameters()) and not any(m.training for m in teacher.modules())
    one, other = task.untap()
    assert one is student and other is teacher
    after = [(type(m), m.training, getattr(m, "fused_attn", None), len(m._forward_hooks)) for m in teacher.modules()]
    assert after == before and [p.requires_grad for p in teacher.parameters()] == trains


def test_one_model_as_teacher_and_assistant_comes_back_as_it_was():
    teacher = vit(1).train()
    heads = {"teacher_heads": "average", "assistant_heads": [0] * 3}
    task = SSTA(vit(), teacher, teacher, **heads, label_teacher=teacher, at_weight=1.0, verbose=False)
    task.untap()
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", WHOLE)
def test_equal_numbers_of_patches_are_not_the_same_patches(name):
    options = {} if name == "AttentionProbe" else {"resample_mode": None}
    with pytest.raises(ValueError, match=r"the student's grid is 4x4 \(height x width\), the teacher's 8x2"):
        TASKS[name](vit(), vit(1, patch_size=(4, 16)), **options)(X, Y)
    dropped = TASKS[name](vit(patch_drop_rate=0.75).train(), vit(1, patch_size=16))
    with pytest.raises(ValueError, match="student: its patches do not form the grid .*patch_drop_rate=0"):
        dropped(X, Y)
    with pytest.raises(ValueError, match="the student's grid is 4x4"):
        TASKS[name](dropped.untap()[0].eval(), vit(1, patch_size=16), **options)(X, Y)


@pytest.mark.parametrize("name", ["HeadKD", "SSTA"])
def test_a_map_over_another_grid_is_resized(name):
    """4x4 patches of the student; the teacher's 8x2 and 2x2."""
    for patch in ((4, 16), 16):
        task = TASKS[name](vit(), vit(1, patch_size=patch))
        loss = task(X, Y)
        loss["loss"].backward()
        assert loss["loss"].isfinite() and task.student.blocks[-1].attn.qkv.weight.grad.any()
        halves = [
            TASKS[name](vit(), vit(1, patch_size=patch), impl=impl)(X, Y)["loss"] for impl in ("reference", "chunked")
        ]
        torch.testing.assert_close(halves[0], halves[1])


def test_attn_distill_refuses_patch_dropout_whatever_number_is_left():
    for rate, patch in ((0.75, 16), (1 / 16, 8)):
        task = AttnDistill(vit(patch_drop_rate=rate), vit(1, patch_size=patch), verbose=False).train()
        with pytest.raises(ValueError, match="patch_drop_rate"):
            task(X)


@pytest.mark.parametrize("model", ["cait_xxs24_224", "xcit_nano_12_p16_224", "convit_tiny"])
def test_blocks_without_their_class_token_are_refused(model):
    small = {"embed_dim": 96, "depth": 3, "num_heads": 3} if model.startswith("cait") else {}
    build = lambda: timm.create_model(model, img_size=32, patch_size=8, num_classes=4, **small)  # noqa: E731
    with pytest.raises(ValueError, match="student: a compared block has no class token yet"):
        AttentionProbe(build(), build(), 0.9, verbose=False)(X)
    if model == "convit_tiny":  # it has one in the last two
        AttentionProbe(build(), build(), 0.9, blocks=[10, 11], verbose=False)(X)["loss"].backward()


@each
def test_weight_shared_blocks_are_refused(name):
    for role in (0, 1):
        models = [vit(), vit(1)]
        models[role].blocks[2] = models[role].blocks[0]
        with pytest.raises(ValueError, match=("teacher_" if role else "") + r"blocks: blocks.\d.* is weight-shared"):
            TASKS[name](*models)


@each
def test_targets_and_integer_images_are_refused_by_name(name):
    criterion = {} if name == "AttentionProbe" else {"criterion": nn.CrossEntropyLoss()}
    task = TASKS[name](vit(), vit(1), **criterion)
    with pytest.raises(
        ValueError, match="images: expected floating point numbers, normalised for student, got torch.uint8"
    ):
        task((X * 50).clamp(0, 255).to(torch.uint8), Y)
    if not criterion:
        return
    both = r"targets: expected \[2\] class indices, torch.int64, or \[2, 4\] probabilities of floating point, got "
    for targets, message in (
        (Y[:1], both + r"torch.int64 \(1,\)"),
        (Y[:, None], both + r"torch.int64 \(2, 1\)"),
        (Y.int(), both + r"torch.int32 \(2,\)"),
        (Y.double(), both + r"torch.float64 \(2,\)"),
        (F.one_hot(Y, 5).float(), both + r"torch.float32 \(2, 5\)"),
        ([0, 3], both + "list"),
        (Y + 1, "targets: expected class indices from 0 to 3, the student has 4 classes, got 1 to 4"),
        (Y - 1, "targets: expected class indices from 0 to 3, .* got -1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            task(X, targets)
    for targets in (F.one_hot(Y, 4).float(), torch.tensor([0, -100])):  # -100: cross-entropy leaves the image out
        assert task(X, targets)["loss"].isfinite()

    class OfADictionary(nn.CrossEntropyLoss):
        """What a loss of one's own takes is its own affair."""

        def forward(self, output, targets):
            return super().forward(output, targets["label"].long())

    own = TASKS[name](vit(), vit(1), criterion=OfADictionary())
    assert own(X, {"label": Y.int()})["loss"].isfinite()


@each
def test_a_message_names_the_model_it_belongs_to(name):
    with pytest.raises(ValueError, match="student takes 3 channels and teacher 1"):
        TASKS[name](vit(), vit(1, in_chans=1))
    task = TASKS[name](vit(dynamic_img_size=True), vit(1))
    with pytest.raises(ValueError, match=r"images: student \(VisionTransformer\) takes 3 channels, got 1"):
        task(X[:, :1], Y)
    with pytest.raises(ValueError, match=r"images: teacher \(VisionTransformer\) takes 32x32 pixels, got 48x32"):
        task(torch.randn(2, 3, 48, 32), Y)
    with pytest.raises(
        TypeError, match="teacher: expected a Vision Transformer .* AttentionTap and attention_divergence"
    ):
        TASKS[name](vit(), nn.Linear(2, 2))


def test_the_trainer_of_transformers_asks_the_task_for_checkpointing():
    task, asked = TASKS["HeadKD"](vit(), vit(1)), {"activation_checkpointing_kwargs": None, "every_n_layers": 1}
    task.activation_checkpointing_enable(**asked, offload=False)
    assert task.student.grad_checkpointing
    with pytest.raises(
        ValueError, match="student: VisionTransformer recomputes .* without options, got {'offload': True}"
    ):
        task.activation_checkpointing_enable(**asked, offload=True)


def test_a_model_without_final_norm_compares_attention_alone():
    teacher = vit(1, final_norm=False)  # as RADIO and InternViT
    with pytest.raises(ValueError, match="teacher: .* neither norm nor fc_norm.*pa_weight=0 and patch_weight=0"):
        AttnDistill(vit(), teacher, verbose=False)
    assert all(p.requires_grad for p in teacher.parameters()), "a refused teacher is not frozen"
    AttnDistill(vit(), teacher, pa_weight=0, verbose=False)(X)["loss"].backward()


def test_check_finite_does_not_break_a_compiled_task():
    torch._dynamo.reset()
    task = AttnDistill(vit(depth=1), vit(1, depth=1), verbose=False)
    want = task(X)["loss"]
    torch.testing.assert_close(torch.compile(task, backend="aot_eager", fullgraph=True)(X)["loss"], want)


@each
def test_data_parallel_is_refused(name):
    task = TASKS[name](vit(), vit(1))
    with pytest.raises(NotImplementedError, match="nn.DataParallel .*DistributedDataParallel.*prepare_distributed"):
        task._replicate_for_data_parallel()  # what nn.DataParallel calls first


def test_ddp_around_the_task_names_prepare_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        task = HeadKD(vit(), vit(1), criterion=None, verbose=False)
        with pytest.raises(RuntimeError, match="DistributedDataParallel around the task .*task.prepare_distributed()"):
            nn.parallel.DistributedDataParallel(task)(X)
        told = nn.parallel.DistributedDataParallel(task, find_unused_parameters=True)
        for _ in range(2):
            told(X)["loss"].backward()
        with_labels = HeadKD(vit(), vit(1), verbose=False)
        nn.parallel.DistributedDataParallel(with_labels)(X, Y)["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_padding_leave_the_mean(kind, weighted):
    """A batch of 6 and 4 tokens in one tensor is the mean over 10 rows of each head, whatever the padding holds."""
    generator = torch.Generator().manual_seed(1)
    q, k, tq, tk = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(4))
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    mask = valid[:, None, None] & torch.ones(6, 1, dtype=torch.bool)
    if kind == "additive":
        mask = torch.zeros(2, 1, 6, 6).masked_fill(~mask, -torch.inf)
    sample = torch.tensor([0.5, 2.0]) if weighted else None
    layouts, heads = (TokenLayout(1, True, 12),) * 2, (0, 1, 2)

    def loss(padding):
        fill = lambda x: torch.where(valid[:, None, :, None], x, padding)  # noqa: E731
        calls = [AttentionCall(fill(a), fill(b), mask, 0.5) for a, b in ((q, k), (tq, tk))]
        return whole_map_divergence(*compared_maps(*calls, layouts, heads, heads), sample_weight=sample)

    expected = []
    for image, count in enumerate((6, 4)):
        s, t = ((0.5 * a[image, :, :count] @ b[image, :, :count].mT).log_softmax(-1) for a, b in ((q, k), (tq, tk)))
        rows = (t.exp() * (t - s)).sum(-1)
        expected.append(rows.sum() * (1 if sample is None else sample[image]))
    torch.testing.assert_close(loss(0.0), sum(expected) / 30)
    torch.testing.assert_close(loss(7.0), sum(expected) / 30)


class Padding(VisionTransformer):
    """Patches of zeros are padding: no token looks at them."""

    def forward_features(self, x, **_):
        valid = F.max_pool2d(x.abs().amax(1, keepdim=True), 4).flatten(1) > 0
        return super().forward_features(x, attn_mask=F.pad(valid, (1, 0), value=True)[:, None, None])


@pytest.mark.parametrize("method", ["HeadKD", "SSTA", "AttentionProbe", "per channel", "AttnDistill"])
def test_padded_patches_count_in_no_method(method):
    """An image of 2x4 patches that is padded to 4x4 has the losses that it has without padding."""

    def model(seed, height):
        torch.manual_seed(seed)
        padded = Padding(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=5)
        if height == 16:
            return padded
        plain = VisionTransformer(img_size=(8, 16), patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=5)
        state = padded.state_dict()
        plain.load_state_dict(state | {"pos_embed": state["pos_embed"][:, :9]})
        return plain

    def losses(height, images):
        student, teacher = model(1, height), model(2, height)
        torch.manual_seed(3)  # of the projector
        if method == "HeadKD":
            task = HeadKD(student, teacher, wrong_teacher_weight=0.5, verbose=False)
        elif method == "SSTA":
            heads = {"teacher_heads": [1, 0], "assistant_heads": "average", "stop_epoch": None}
            task = SSTA(student, teacher, model(4, height), blocks=[0, 1], verbose=False, **heads)
        elif method == "AttnDistill":
            task = AttnDistill(student, teacher, patch_weight=1.0, verbose=False)
        else:
            dim = -2 if method == "per channel" else -1
            task = AttentionProbe(student, teacher, 0.9, blocks=[0, 1], normalize_dim=dim, verbose=False)
        result = task(images, torch.tensor([1, 2]))
        return {name: value for name, value in result.items() if name.endswith("loss")}

    images = torch.randn(2, 3, 16, 16)
    images[:, :, 8:] = 0.0
    torch.testing.assert_close(losses(16, images), losses(8, images[:, :, :8]))


def test_numbers_of_numpy_are_numbers():
    """As they come out of arrays: block, head, weight, accuracy, epoch."""
    one, half = np.int64(1), np.float32(0.5)
    made = []
    for index, alpha in ((1, 0.5), (one, half)):
        kd = HeadKD(
            vit(),
            vit(1),
            mode="head_to_head",
            blocks=[index],
            heads=index,
            teacher_heads=[index],
            alpha=alpha,
            verbose=False,
        )
        kd.set_epoch(index)
        made.append((kd.student_tap.paths, kd.heads, kd(X, Y)["loss"].item(), kd.schedules.state_dict()))
    assert made[0] == made[1]
    file = io.BytesIO()
    torch.save(kd.schedules.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["epoch"] == 1
    assert SSTA(vit(), vit(1), blocks=one, teacher_heads=[one], alpha=half, verbose=False).links["teacher"][0][2] == (
        1,
    )
    assert AttentionProbe(vit(), vit(1), half, blocks=one, verbose=False)(X)["loss"].isfinite()
    with pytest.raises(TypeError, match=r"teacher_heads: expected head indices \(int\), got .*1.0"):
        SSTA(vit(), vit(1), blocks=-1, teacher_heads=[np.float64(1.0)], verbose=False)


@each
def test_an_empty_batch_is_named(name):
    task = TASKS[name](vit(), vit(1))
    with pytest.raises(ValueError, match="images: expected at least one, got shape"):
        task(X[:0], Y[:0])


def test_a_failed_construction_leaves_the_models_alone():
    student, teacher = vit(), vit(1)
    kinds = copy.deepcopy([type(m) for m in (*student.modules(), *teacher.modules())])
    with pytest.raises(ValueError, match="teacher_heads"):
        HeadKD(student, teacher, teacher_heads=[5, 6], verbose=False)
    with pytest.raises(ValueError, match="teacher_heads"):
        SSTA(student, teacher, teacher_heads=[5, 6, 7], verbose=False)
    for make in TASKS.values():
        with pytest.raises(
            ValueError, match="impl: expected one of 'auto', 'triton', 'chunked', 'reference', got 'cuda'"
        ):
            make(student, teacher, impl="cuda")
    assert [type(m) for m in (*student.modules(), *teacher.modules())] == kinds
    assert all(p.requires_grad for p in teacher.parameters()) and teacher.training
