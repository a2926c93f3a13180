"""AttnDistill's ablations compute what they say, each something else; its weights and temperature follow schedules."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnkd.methods.alignment import resize_tokens
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.schedule import Schedule
from tests.methods.test_attn_distill import attn_loss, cls_probs, images, kl, make, merged, resized, student, teacher


def normalised(probs: torch.Tensor) -> torch.Tensor:
    return probs / probs.sum(-1, keepdim=True)


def aligned(task: AttnDistill, s: nn.Module, t: nn.Module, x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """mean (g(f_s) − f_t)² over the tokens, from the models' own forward and the task's projector; no other prefix."""
    projected = task.trainable_module.projector(s.forward_features(x)[:, tokens])
    return (projected - t.forward_features(x)[:, tokens].detach()).pow(2).mean()


CLS, PATCHES = slice(0, 1), slice(1, None)
MERGING = {  # of heads' rows [B, H, N]; T = 1 unless log-sum
    "logsum": merged,
    "mean": lambda p: p.mean(1),
    "max": lambda p: normalised(p.amax(1)),
    "min": lambda p: normalised(p.amin(1)),
}


def guided(name: str, block: int = -1):
    return lambda task, s, t, x: kl(MERGING[name](cls_probs(t, x, block)), MERGING[name](cls_probs(s, x, block)))


def every_block(task, s, t, x):
    return sum(guided("logsum", block)(task, s, t, x) for block in range(3)) / 3


ABLATIONS = {
    "class token only": ({"attn_weight": 0}, lambda *a: aligned(*a, CLS)),
    "patch tokens only": ({"pa_weight": 0, "patch_weight": 1.0, "attn_weight": 0}, lambda *a: aligned(*a, PATCHES)),
    "class token and patch tokens": (
        {"patch_weight": 0.5, "attn_weight": 0},
        lambda *a: aligned(*a, CLS) + 0.5 * aligned(*a, PATCHES),
    ),
    "all three": (
        {"patch_weight": 0.5},
        lambda *a: aligned(*a, CLS) + 0.5 * aligned(*a, PATCHES) + 0.1 * guided("logsum")(*a),
    ),
    "class token and attention": ({}, lambda *a: aligned(*a, CLS) + 0.1 * guided("logsum")(*a)),
    "attention, all blocks": ({"pa_weight": 0, "attn_weight": 1.0, "blocks": "all"}, every_block),
    **{
        f"attention, {name}": ({"pa_weight": 0, "attn_weight": 1.0, "merge": name}, guided(name))
        for name in ("logsum", "mean", "max", "min")
    },
}


def ablation(name: str) -> tuple[float, float]:
    """The loss of the task, and of the textbook."""
    options, expected = ABLATIONS[name]
    s, t, x = student(), teacher(embed_dim=96, num_heads=6), images()
    torch.manual_seed(0)
    task = AttnDistill(s, t, **options, verbose=False)
    with torch.no_grad():
        return task(x)["loss"].item(), expected(task, s, t, x).item()


class TestAblations:
    def test_each_is_its_formula_and_another_loss(self) -> None:
        losses = {name: ablation(name) for name in ABLATIONS}
        for name, (loss, want) in losses.items():
            assert loss == pytest.approx(want, rel=2e-5), name
        for (one, (a, _)), (two, (b, _)) in itertools.combinations(losses.items(), 2):
            assert abs(a - b) > 1e-3 * max(a, b), (one, two, a, b)

    def test_max_is_the_softmax_of_the_largest_log_probability(self) -> None:
        s, t, x = student(), teacher(num_heads=6), images()
        one, two = (cls_probs(model, x).log().amax(1).softmax(-1) for model in (t, s))
        got = attn_loss(AttnDistill(s, t, merge="max"), x)
        torch.testing.assert_close(got, kl(one, two), rtol=2e-5, atol=1e-7)

    def test_without_patch_weight_nothing_changes(self) -> None:
        """No patch token is projected, and results have no patch_loss."""
        task, seen = AttnDistill(student(), teacher()), []
        task.trainable_module.projector.register_forward_hook(lambda _, args, out: seen.append(out.shape))
        assert set(task(images())) == {"loss", "pa_loss", "attn_loss", "output", "features"}
        assert seen == [(2, 1, 48)]


class TestPatchTokens:
    @pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area"])
    def test_another_grid_is_resized_as_an_image(self, mode: str) -> None:
        s, t, x = student(), teacher(embed_dim=96, patch_size=4), images()
        task = AttnDistill(s, t, patch_weight=1.0, resample_mode=mode)
        result = task(x)
        with torch.no_grad():
            tokens = t.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
            corners = {} if mode == "area" else {"align_corners": False}
            tokens = F.interpolate(tokens, (4, 4), mode=mode, **corners).flatten(2).transpose(1, 2)
            want = F.mse_loss(task.trainable_module.projector(s.forward_features(x)[:, 1:]), tokens)
        torch.testing.assert_close(result["patch_loss"], want)
        total = result["pa_loss"] + result["patch_loss"] + 0.1 * result["attn_loss"]
        torch.testing.assert_close(result["loss"], total)

    def test_rows_stay_rows(self) -> None:
        """Tokens that say where they are still do after resizing, in oblong grids too."""
        y, x = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
        tokens = torch.stack([y, x], -1).flatten(0, 1)[None]
        got = resize_tokens(tokens, (4, 8), (2, 2), "area")
        assert got.tolist() == [[[0.5, 1.5], [0.5, 5.5], [2.5, 1.5], [2.5, 5.5]]]

    @pytest.mark.parametrize(
        ("name", "prefix"), [("vit_small_patch14_reg4_dinov2", 5), ("deit_tiny_distilled_patch16_224", 2)]
    )
    def test_registers_and_distillation_token_are_left_out(self, name: str, prefix: int) -> None:
        plain, other, x = student(), make(name, seed=2), images()
        for s, t in ((plain, other), (other, plain)):
            task = AttnDistill(copy.deepcopy(s).eval(), copy.deepcopy(t), patch_weight=1.0, attn_weight=0)
            with torch.no_grad():
                tokens, target = (
                    model.eval().forward_features(x)[:, prefix if model is other else 1 :] for model in (s, t)
                )
                want = F.mse_loss(task.trainable_module.projector(tokens), target)
                torch.testing.assert_close(task(x)["patch_loss"], want)

    def test_teacher_that_normalises_after_pooling(self) -> None:
        t, x = teacher(global_pool="avg"), images()
        task = AttnDistill(student(), t, patch_weight=1.0)
        with torch.no_grad():
            target = t.fc_norm(t.forward_features(x)[:, 1:])
            want = F.mse_loss(task.trainable_module.projector(task.student.forward_features(x)[:, 1:]), target)
        torch.testing.assert_close(task(x)["patch_loss"], want)

    def test_gradients(self) -> None:
        s, t, x = student(), teacher(embed_dim=96, patch_size=4), images()
        task = AttnDistill(s, t, pa_weight=0, patch_weight=2.0, attn_weight=0)
        task(x)["loss"].backward()
        other, projector = copy.deepcopy(s), copy.deepcopy(task.trainable_module.projector)
        other.zero_grad()
        projector.zero_grad()
        tokens = t.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        tokens = F.interpolate(tokens, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
        (2.0 * (projector(other.forward_features(x)[:, 1:]) - tokens).pow(2).mean()).backward()
        pairs = itertools.chain(
            zip(s.parameters(), other.parameters(), strict=True),
            zip(task.trainable_module.projector.parameters(), projector.parameters(), strict=True),
        )
        compared = 0
        for one, two in pairs:
            if two.grad is not None and two.grad.any():
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4 * two.grad.abs().max().item())
                compared += 1
        assert compared > 30
        assert all(parameter.grad is None for parameter in t.parameters())

    def test_is_float32_under_autocast(self) -> None:
        task = AttnDistill(student(), teacher(patch_size=4), patch_weight=1.0)
        with torch.no_grad():
            want = task(images())["patch_loss"]
            with torch.autocast("cpu", torch.bfloat16):
                got = task(images())["patch_loss"]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.05, atol=0)

    def test_patch_dropout_is_refused(self) -> None:
        task = AttnDistill(student(patch_drop_rate=0.5), teacher(), patch_weight=1.0, attn_weight=0).train()
        with pytest.raises(ValueError, match="VisionTransformer: expected 4·4 = 16 patch tokens"):
            task(images())


class TestSchedules:
    def test_early_stop_of_guidance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task, x = AttnDistill(student(), teacher(), attn_weight=Schedule(0.4, stop=10, decay=5)), images()
        with pytest.raises(RuntimeError, match=r"attn_weight: changes by epoch, but set_epoch\(\) was never called"):
            task(x)
        for epoch, weight in ((0, 0.4), (7.5, 0.2)):
            task.set_epoch(epoch)
            result = task(x)
            torch.testing.assert_close(result["loss"], result["pa_loss"] + weight * result["attn_loss"])
        monkeypatch.setattr(AttnDistill, "attention_loss", lambda *_: pytest.fail("computed while its weight is 0"))
        task.set_epoch(10)
        result = task(x)
        assert "attn_loss" not in result and torch.equal(result["loss"], result["pa_loss"])

    def test_temperature_and_warm_up_by_step(self) -> None:
        s, t, x = student(), teacher(num_heads=6), images()
        task = AttnDistill(
            copy.deepcopy(s),
            copy.deepcopy(t),
            pa_weight=0,
            attn_weight=Schedule(1.0, warmup=10, unit="step"),
            temperature=Schedule(12.0, start=2.0, warmup=5, unit="step"),
        )
        task.set_step(2)
        want = kl(merged(cls_probs(t, x), 6.0), merged(cls_probs(s, x), 6.0))
        result = task(x)
        torch.testing.assert_close(result["attn_loss"].double(), want, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(result["loss"], 0.2 * result["attn_loss"])

    def test_the_teacher_rests_when_nothing_comes_from_it(self) -> None:
        stop = {f"{name}_weight": Schedule(1.0, stop=1) for name in ("pa", "patch", "attn")}
        s, t, x = student(num_classes=10), teacher(), images()
        task = AttnDistill(s, t, **stop, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.5)
        task.set_epoch(0)
        assert {"pa_loss", "patch_loss", "attn_loss", "task_loss"} <= set(task(x, torch.tensor([1, 7])))
        t.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
        t.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
        task.set_epoch(1)
        result = task(x, torch.tensor([1, 7]))
        assert result.keys() == {"loss", "task_loss", "output", "features"}
        torch.testing.assert_close(result["loss"], 0.5 * result["task_loss"])

    def test_nothing_left_to_train_on_is_an_error(self) -> None:
        task = AttnDistill(student(), teacher(), pa_weight=0, attn_weight=Schedule(1.0, stop=1))
        task.set_epoch(1)
        with pytest.raises(
            RuntimeError, match="nothing to train on: all weights of the teachers are 0 now and criterion is None"
        ):
            task(images())

    def test_time_is_task_state(self) -> None:
        options = {"attn_weight": Schedule(0.4, stop=10, decay=5)}
        task, x = AttnDistill(student(), teacher(), **options), images()
        task.set_epoch(7.5)
        state = task.get_checkpoint_state()
        other = AttnDistill(make(seed=9), teacher(), **options)
        other.load_checkpoint_state(state["state_dict"], state["task_state"])
        assert torch.equal(other(x)["loss"], task(x)["loss"])
        with pytest.raises(RuntimeError, match="no task state 'schedules'"):
            other.load_checkpoint_state(state["state_dict"], {"projector": state["task_state"]["projector"]})

    def test_checkpoints_without_time_load_where_nothing_changes(self) -> None:
        task, x = AttnDistill(student(), teacher()), images()
        state = task.get_checkpoint_state()
        other = AttnDistill(make(seed=9), teacher())
        other.load_checkpoint_state(state["state_dict"], {"projector": state["task_state"]["projector"]})
        assert torch.equal(other(x)["loss"], task(x)["loss"])

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        s, t, x = student(depth=1), teacher(depth=1, patch_size=4), images()
        options = {"patch_weight": Schedule(1.0, stop=1), "attn_weight": 0}
        plain = AttnDistill(copy.deepcopy(s), t, **options)
        task = AttnDistill(s, teacher(depth=1, patch_size=4), **options)
        task.trainable_module.projector.load_state_dict(plain.trainable_module.projector.state_dict())
        task.compile(backend="aot_eager", fullgraph=True)
        for epoch in (0, 1):
            task.set_epoch(epoch)
            plain.set_epoch(epoch)
            torch.testing.assert_close(task(x)["loss"], plain(x)["loss"])

    def test_distributed_while_the_projector_rests(self, tmp_path: object) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            s, targets = student(num_classes=10), torch.tensor([1, 7])
            pa_weight = Schedule(1.0, stop=1)
            task = AttnDistill(s, teacher(), pa_weight=pa_weight, criterion=nn.CrossEntropyLoss())
            task.prepare_distributed()
            for epoch in (0, 1, 2):  # DDP complains about a step's unused parameters at the next
                task.set_epoch(epoch)
                task(images(), targets)["loss"].backward()
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pa_weight": Schedule(1.0, start=-1.0, warmup=2)}, "pa_weight: expected a number >= 0, got Schedule"),
            (
                {"temperature": Schedule(10.0, warmup=5)},
                r"temperature: expected a number > 0, got Schedule\(value=10.0",
            ),
            ({"pa_weight": 0, "attn_weight": Schedule(0.0, stop=3)}, "all are 0, nothing would be distilled"),
        ],
    )
    def test_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AttnDistill(student(), teacher(), **options)


def test_resizing_keeps_probabilities_and_tokens_alike() -> None:
    """Rows and tokens are resized by the same map: a row's patches as one-feature tokens, up to the rows' rescaling."""
    rows = torch.rand(2, 1, 65, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tokens = resize_tokens(rows[..., 1:].transpose(1, 2), (8, 8), (4, 4), "bicubic").transpose(1, 2)
    want = resized(rows, (8, 8), (4, 4))[..., 1:]
    torch.testing.assert_close(normalised(tokens), normalised(want))
