"""AttentionTap: what it captures is what the model's own attention computes, and it leaves no trace."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from attnkd.attention.call import AttentionCall
from attnkd.capture.tap import AttentionTap

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}

MODELS = {  # timm name: changes to TINY
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_xp_224": {},  # parallel blocks: the attention is the block; qk norm
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch16_dinov3": {},  # EvaAttention, rotary, registers
    "eva02_tiny_patch14_224": {},  # EvaAttention, rotary, separate q, k, v
    "vit_base_patch16_rope_224": {"embed_dim": 96},  # AttentionRope
    "beit_base_patch16_224": {},  # relative position bias
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_base_patch16_rpn_224": {},  # norm after the block
    "naflexvit_base_patch16_gap": {"img_size": None, "class_token": True},
}


def make(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    options = {key: value for key, value in {**TINY, **MODELS.get(name, {}), **changes}.items() if value is not None}
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and constant norms would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def attention_map(call: AttentionCall) -> torch.Tensor:
    logits = call.query.double() @ call.key.double().mT * call.scale
    if call.mask is not None:
        logits = logits + call.mask if call.mask.is_floating_point() else logits.masked_fill(~call.mask, -torch.inf)
    return logits.softmax(-1)


def unfused_map(model: nn.Module, path: str, *args: object) -> torch.Tensor:
    """The map that the same model computes with its fused attention switched off."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    seen = []
    model.get_submodule(path).attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*args)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_captures_the_map_the_model_computes(name: str) -> None:
    model = make(name)
    x = images()
    plain = model(x)
    tap = AttentionTap(model, blocks="all")
    output, calls = tap(x)
    assert torch.equal(output, plain), "tapping changed the model's output"
    assert len(calls) == 3
    for path, call in zip(tap.paths, calls, strict=True):
        expected = unfused_map(tap.model, path, x)
        torch.testing.assert_close(attention_map(call).float(), expected, atol=2e-6, rtol=2e-5)
    for path in tap.paths:
        assert model.get_submodule(path).fused_attn, "the tap must not switch fused attention off"


def test_the_map_test_can_fail() -> None:
    """A rotary embedding or a bias that is missed shows up in the comparison above."""
    model, x = make("vit_small_patch16_dinov3"), images()
    tap = AttentionTap(model)
    _, (call,) = tap(x)
    expected = unfused_map(model, tap.paths[0], x)
    seen = []
    hook = model.blocks[-1].attn.k_norm.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(x)
    hook.remove()
    assert not torch.allclose(attention_map(call._replace(key=seen[0])).float(), expected, atol=1e-4)
    model = make("beit_base_patch16_224")
    tap = AttentionTap(model)
    _, (call,) = tap(x)
    assert call.mask is not None
    expected = unfused_map(model, tap.paths[0], x)
    assert not torch.allclose(attention_map(call._replace(mask=None)).float(), expected, atol=1e-4)


def test_class_attention_of_cait() -> None:
    model = make("cait_xxs24_224", depth=2)
    tap = AttentionTap(model, "blocks_token_only.1.attn")
    x = images()
    output, (call,) = tap(x)
    assert call.query.shape == (2, 3, 1, 16) and call.key.shape == (2, 3, 17, 16)
    expected = unfused_map(model, "blocks_token_only.1.attn", x)
    torch.testing.assert_close(attention_map(call).float(), expected, atol=2e-6, rtol=2e-5)


def test_scale_is_the_calls_own() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], scale=1.0)[:, 0]

    _, (call,) = AttentionTap(nn.Sequential(Attention()), "0")(torch.randn(2, 5, 4))
    assert call.scale == 1.0


@pytest.mark.parametrize(
    ("blocks", "paths"),
    [
        (-1, ["blocks.2.attn"]),
        (0, ["blocks.0.attn"]),
        ([-1, 0], ["blocks.0.attn", "blocks.2.attn"]),
        ("all", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
        ("blocks.1.attn", ["blocks.1.attn"]),
        (["blocks.2.attn", "blocks.1.attn"], ["blocks.2.attn", "blocks.1.attn"]),
        ("blocks.1", ["blocks.1"]),
    ],
)
def test_blocks(blocks: object, paths: list[str]) -> None:
    tap = AttentionTap(make(), blocks)
    assert tap.paths == paths
    _, calls = tap(images())
    _, every = AttentionTap(tap.model, "all")(images())
    for path, call in zip(paths, calls, strict=True):
        assert torch.equal(call.query, every[int(path.split(".")[1])].query)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (3, ValueError, r"\[-3, 2\] for 3 blocks, got 3"),
        (-4, ValueError, "got -4"),
        ([], ValueError, "at least one"),
        ([0, -3], ValueError, "once"),
        (["blocks.0.attn", "blocks.0.attn"], ValueError, "once"),
        (["blocks.0.attn", 1], TypeError, "blocks: expected int"),
        (True, TypeError, "blocks: expected int"),
        (1.0, TypeError, "got 1.0"),
        ("blocks.7.attn", ValueError, "no module at path 'blocks.7.attn'"),
    ],
)
def test_wrong_blocks(blocks: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionTap(make(), blocks)


def test_models_without_one_list_of_blocks_need_paths() -> None:
    with pytest.raises(ValueError, match="Sequential: it has none; give module paths"):
        AttentionTap(nn.Sequential(nn.Linear(2, 2)))
    model = make("vit_base_patch16_18x2_224")
    with pytest.raises(ValueError, match=r"blocks.2 has 2 attentions \(blocks.2.attns.0.attn, blocks.2.attns.1.attn\)"):
        AttentionTap(model)
    _, calls = AttentionTap(model, ["blocks.2.attns.0.attn", "blocks.2.attns.1.attn"])(images())
    assert not torch.equal(calls[0].query, calls[1].query)


def test_blocks_of_a_nested_model() -> None:
    nested = nn.Sequential(make())
    assert AttentionTap(nested).paths == ["0.blocks.2.attn"]


class TestStop:
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
    def test_same_bits(self, name: str) -> None:
        model, x = make(name), images()
        _, full = AttentionTap(model, [0, 1])(x)
        output, stopped = AttentionTap(model, [0, 1], stop=True)(x)
        assert output is None
        for one, other in zip(full, stopped, strict=True):
            assert torch.equal(one.query, other.query) and torch.equal(one.key, other.key)

    def test_skips_what_follows(self) -> None:
        model, ran = make(), []
        for index, block in enumerate(model.blocks):
            block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
            block.attn.proj.register_forward_hook(lambda *_, index=index: ran.append(f"proj{index}"))
        AttentionTap(model, 1, stop=True)(images())
        assert ran == ["proj0", 0]

    def test_paths_in_any_order(self) -> None:
        model, x = make(), images()
        _, calls = AttentionTap(model, ["blocks.2.attn", "blocks.0.attn"], stop=True)(x)
        _, full = AttentionTap(model, [0, 2])(x)
        assert torch.equal(calls[0].query, full[1].query) and torch.equal(calls[1].query, full[0].query)


class TestTraining:
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
    def test_gradients_are_those_of_the_unfused_map(self, name: str) -> None:
        model, x = make(name).train(), images()
        other = copy.deepcopy(model)
        tap = AttentionTap(model)
        _, (call,) = tap(x)
        weight = torch.randn(2, 3, call.query.shape[2], call.key.shape[2])
        (attention_map(call) * weight).sum().backward()

        other.blocks[-1].attn.fused_attn = False
        seen = []
        other.blocks[-1].attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        other(x)
        (seen[0] * weight).sum().backward()
        compared = 0
        for (path, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            if two.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, atol=2e-5, rtol=2e-4, msg=lambda m, path=path: path + m)
                compared += int(bool(two.grad.any()))
        assert compared > 20

    @pytest.mark.parametrize("stop", [False, True])
    def test_non_reentrant_checkpointing(self, stop: bool) -> None:
        model, x = make().train(), images()
        grads = []
        for enable in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(enable)
            _, calls = AttentionTap(model, [0, 2], stop=stop)(x)
            sum(call.query.square().sum() + call.key.sum() for call in calls).backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
        for path, grad in grads[0].items():
            assert torch.equal(grad, grads[1][path]), path

    def test_reentrant_checkpointing_is_refused(self) -> None:
        model = make().train()
        model.set_grad_checkpointing(True)
        tap = AttentionTap(model)
        set_reentrant_ckpt(True)
        try:
            with pytest.raises(RuntimeError, match=r"blocks.2.attn \(Attention\): .*Reentrant"):
                tap(images())
            with torch.no_grad():
                tap(images())
        finally:
            set_reentrant_ckpt(False)
        tap(images())

    def test_frozen_first_blocks_under_reentrant_checkpointing(self) -> None:
        """A gradient that would reach earlier blocks only is lost as well."""
        model = make().train()
        model.set_grad_checkpointing(True)
        model.blocks[2].requires_grad_(False)
        set_reentrant_ckpt(True)
        try:
            with pytest.raises(RuntimeError, match="Reentrant"):
                AttentionTap(model)(images())
        finally:
            set_reentrant_ckpt(False)

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
    def test_autocast(self, name: str) -> None:
        """Queries, keys and bias come as SDPA casts them, also from a norm that autocast runs in float32."""

        class Float(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.float()

        model, x = make(name), images()
        if hasattr(model.blocks[-1].attn, "q_norm"):
            model.blocks[-1].attn.q_norm = model.blocks[-1].attn.k_norm = Float()
        tap = AttentionTap(model)
        with torch.autocast("cpu", torch.bfloat16):
            plain = copy.deepcopy(model)(x)
            output, (call,) = tap(x)
        assert torch.equal(output, plain)
        assert call.query.dtype == call.key.dtype == torch.bfloat16
        assert call.mask is None or call.mask.dtype == torch.bfloat16
        sum(t.float().sum() for t in call[:2]).backward()
        assert model.blocks[0].norm1.weight.grad.any()

    def test_attention_dropout_stays_out_of_the_map(self) -> None:
        model, x = make(attn_drop_rate=0.5).train(), images()
        torch.manual_seed(5)
        plain = model(x)
        torch.manual_seed(5)
        output, (call,) = AttentionTap(model)(x)
        assert torch.equal(output, plain), "the model's own dropout stays as it was"
        assert not torch.equal(output, model(x))
        torch.testing.assert_close(attention_map(call).sum(-1), torch.ones(2, 3, 17).double())


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch._dynamo.reset()

    @pytest.mark.parametrize("stop", [False, True])
    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
    def test_fullgraph(self, name: str, stop: bool) -> None:
        model, x = make(name), images()
        tap = AttentionTap(model, [0, -1], stop=stop)
        compiled = torch.compile(tap, fullgraph=True, backend="aot_eager")
        expected, expected_calls = tap(x)
        for _ in range(2):
            output, calls = compiled(x)
            assert (output is None) == stop
            if not stop:
                torch.testing.assert_close(output, expected)
            for call, want in zip(calls, expected_calls, strict=True):
                torch.testing.assert_close(call.query, want.query)
                torch.testing.assert_close(call.key, want.key)
        model.zero_grad()
        calls[-1].query.sum().backward()
        assert model.blocks[0].attn.proj.weight.grad.any()
        assert torch.equal(model(x), copy.deepcopy(model)(x)), "the tap stayed armed after a compiled forward"

    def test_blocks_compiled_on_their_own(self) -> None:
        model, x = make(), images()
        _, (expected,) = AttentionTap(model, stop=True)(x)
        for block in model.blocks:
            block.compile(backend="aot_eager")
        for stop in (False, True):
            _, (call,) = AttentionTap(model, stop=stop)(x)
            torch.testing.assert_close(call.query, expected.query)

    def test_a_compiled_model_is_refused(self) -> None:
        with pytest.raises(TypeError, match="wrap torch.compile around"):
            AttentionTap(torch.compile(make()))
        model = make()
        model.compile()
        with pytest.raises(TypeError, match="wrap torch.compile around"):
            AttentionTap(model)


class TestLeavesNoTrace:
    def test_untap_restores_everything(self) -> None:
        model, x = make(), images()
        before = {path: (type(module), dict(module.__dict__)) for path, module in model.named_modules()}
        keys, output = list(model.state_dict()), model(x)
        tap = AttentionTap(model, "all")
        assert list(model.state_dict()) == keys
        assert [key.removeprefix("model.") for key in tap.state_dict()] == keys
        tap(x)
        assert tap.untap() is model
        after = {path: (type(module), dict(module.__dict__)) for path, module in model.named_modules()}
        assert after == before
        assert torch.equal(model(x), output)
        with pytest.raises(RuntimeError, match="blocks.0.attn: no longer tapped"):
            tap(x)
        AttentionTap(model)(x)

    def test_fused_attention_that_was_off(self) -> None:
        model = make()
        model.blocks[-1].attn.fused_attn = False
        tap = AttentionTap(model)
        tap(images())
        assert model.blocks[-1].attn.fused_attn
        tap.close()
        assert not model.blocks[-1].attn.fused_attn

    def test_copies_of_the_model_are_plain(self) -> None:
        model, x = make(), images()
        tap = AttentionTap(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
            assert type(other.blocks[-1].attn) is timm.layers.Attention
            assert "_armed" not in other.blocks[-1].attn.__dict__
            assert torch.equal(other(x), model(x))
        assert b"attnkd" not in pickle.dumps(model), "a pickled model must load without this package"
        assert torch.equal(tap(x)[0], model(x))

    def test_copies_of_the_tap_work(self) -> None:
        tap, x = AttentionTap(make()), images()
        _, (call,) = tap(x)
        for other in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap)), ModelEmaV3(tap).module):
            _, (again,) = other(x)
            assert torch.equal(again.query, call.query)
            assert other.model is not tap.model

    def test_an_exception_disarms(self) -> None:
        model, x = make(), images()
        tap = AttentionTap(model, [0, 2])
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("from the model")))
        with pytest.raises(KeyError, match="from the model"):
            tap(x)
        hook.remove()
        assert all(model.get_submodule(path)._armed.slot is None for path in tap.paths)
        output, calls = tap(x)
        assert torch.equal(output, model(x)) and len(calls) == 2

    def test_the_model_itself_runs_untapped(self) -> None:
        model = make()
        AttentionTap(model, stop=True)
        assert model(images()).shape == (2, 10), "stop must not end a forward that does not come from the tap"


class TestSeveralTaps:
    def test_two_taps_on_one_model(self) -> None:
        model, x = make(), images()
        last, first = AttentionTap(model), AttentionTap(model, [0, -1], stop=True)
        output, (call,) = last(x)
        none, calls = first(x)
        assert none is None and torch.equal(output, model(x))
        assert torch.equal(calls[1].query, call.query)
        first.untap()
        with pytest.raises(RuntimeError, match="blocks.2.attn: no longer tapped"):
            last(x)

    def test_reentry(self) -> None:
        model, x = make(), images()
        tap = AttentionTap(model)
        model.blocks[0].register_forward_hook(lambda *_: tap(x))
        with pytest.raises(RuntimeError, match="blocks.2.attn: its tap was entered again"):
            tap(x)

    def test_gradient_accumulation(self) -> None:
        tap = AttentionTap(make().train())
        (_, (one,)), (_, (two,)) = tap(images()), tap(images() + 1)
        assert not torch.equal(one.query, two.query)
        (one.query.sum() + two.query.sum()).backward()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("xcit_nano_12_p8_224", {"depth": 2}, r"blocks.1.attn \(XCA\): .*channels"),
            ("cait_xxs24_224", {"depth": 2}, r"blocks.1.attn \(TalkingHeadAttn\): .*talking heads"),
            ("vit_dlittle_patch16_reg1_gap_256", {"num_heads": 3}, r"blocks.2.attn \(DiffAttention\): .*two softmaxes"),
            ("vit_dpwee_patch16_reg1_gap_256", {"num_heads": 3}, r"DiffParallelScalingBlock\): .*two softmaxes"),
            ("convit_tiny", {}, r"blocks.2 \(Block\): none of its modules .*has a scaled_dot_product_attention path"),
        ],
    )
    def test_attention_that_q_and_k_do_not_tell(self, name: str, changes: dict, message: str) -> None:
        model = make(name, **changes)
        with pytest.raises(NotImplementedError, match=message):
            AttentionTap(model, 1 if "depth" in changes else -1)  # not the class attention behind those blocks

    def test_a_subclass_of_a_refused_attention(self) -> None:
        class MyXCA(timm.models.xcit.XCA):
            pass

        with pytest.raises(NotImplementedError, match=r"0 \(MyXCA\): .*channels"):
            AttentionTap(nn.Sequential(MyXCA(8)), "0")

    def test_cosine_attention(self) -> None:
        for name, path in [
            ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn"),
            ("swinv2_cr_tiny_224", "stages.0.blocks.0.attn"),
        ]:
            model = timm.create_model(name, embed_dim=24, depths=(1, 1), num_heads=(1, 1), img_size=64, window_size=4)
            with pytest.raises(NotImplementedError, match=f"{path} .*cosine attention"):
                AttentionTap(model, path)

    def test_attention_without_an_sdpa_path(self) -> None:
        model = nn.Sequential(nn.Identity())
        with pytest.raises(RuntimeError, match=r"0 \(Identity\): made no call of F.scaled_dot_product_attention"):
            AttentionTap(model, "0")(images())

    def test_a_block_that_does_not_run(self) -> None:
        model = make()
        tap = AttentionTap(model)
        model.blocks[2].forward = lambda x: x
        with pytest.raises(RuntimeError, match=r"blocks.2.attn \(Attention\): made no call"):
            tap(images())

    @pytest.mark.parametrize(
        ("arguments", "shape", "message"),
        [
            ({"is_causal": True}, (2, 5, 4), "is_causal=True"),
            ({"enable_gqa": True}, (2, 5, 4), "grouped-query attention"),
            ({}, (2, 4), r"expected \[B, H, N, D\] query and key, got \(2, 4\)"),
            ({"twice": True}, (2, 5, 4), "more than once"),
            ({"channels": True}, (2, 5, 4), r"runs over its 5 input tokens"),
        ],
    )
    def test_calls(self, arguments: dict, shape: tuple, message: str) -> None:
        class Attention(nn.Module):
            def forward(self, x: torch.Tensor, twice: bool = False, channels: bool = False, **kw: bool) -> torch.Tensor:
                q = x if x.ndim == 2 else x[:, None]
                q = q.mT if channels else q
                for _ in range(1 + twice):
                    q = F.scaled_dot_product_attention(q, q, q, **kw)
                return q

        tap = AttentionTap(nn.Sequential(Attention()), "0")
        with pytest.raises(NotImplementedError, match=r"0 \(Attention\): .*" + message):
            tap.capture(lambda: tap.model[0](torch.randn(shape), **arguments))

    def test_causal_vit(self) -> None:
        tap = AttentionTap(make())
        with pytest.raises(NotImplementedError, match="blocks.2.attn .*is_causal"):
            tap.capture(tap.model.forward_features, images(), is_causal=True)

    def test_padded_naflex_rows(self) -> None:
        model = make("naflexvit_base_patch16_gap")
        tap = AttentionTap(model)
        y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        batch = {
            "patches": torch.randn(2, 16, 8 * 8 * 3),
            "patch_coord": torch.stack([y, x], -1).view(1, 16, 2).expand(2, -1, -1),
            "patch_valid": torch.ones(2, 16, dtype=torch.bool),
        }
        output, _ = tap(batch)
        assert torch.equal(output, model(batch))
        batch["patch_valid"] = batch["patch_valid"].clone()
        batch["patch_valid"][1, 12:] = False
        for args, kwargs in [((batch,), {}), ((), {"x": batch["patches"], **batch}), (tuple(batch.values()), {})]:
            kwargs.pop("patches", None)
            with pytest.raises(NotImplementedError, match="padded patches"):
                tap(*args, **kwargs)
        with pytest.raises(NotImplementedError, match="padded patches"):
            tap.capture(model.forward_features, *batch.values())

    def test_wrappers(self) -> None:
        with pytest.raises(TypeError, match="wrap DataParallel around the AttentionTap"):
            AttentionTap(nn.DataParallel(make()))
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
            AttentionTap("vit_tiny_patch16_224")

    def test_a_tap_of_a_tap(self) -> None:
        tap = AttentionTap(make(), 0)
        for model in (tap, nn.Sequential(nn.Identity(), tap)):
            with pytest.raises(TypeError, match=r"has an AttentionTap .*; tap its model \(tap.model\)"):
                AttentionTap(model, -1)
        second = AttentionTap(tap.model, -1)  # beside each other they are right
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(tap(images)[1][0].query, AttentionTap(make(), 0)(images)[1][0].query)
        assert torch.equal(second(images)[1][0].query, AttentionTap(make(), -1)(images)[1][0].query)


class TestTokens:
    """What the rows of a call are: decided block by block, from the number of tokens and the images."""

    @pytest.mark.parametrize(
        ("name", "changes", "size", "expected"),
        [
            ("vit_tiny_patch16_224", {}, (32, 32), (1, True, (4, 4))),
            ("vit_tiny_patch16_224", {"patch_size": (4, 16)}, (32, 32), (1, True, (8, 2))),
            ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (16, 41), (1, True, (2, 6))),
            ("deit_tiny_distilled_patch16_224", {}, (32, 32), (2, True, (4, 4))),
            ("vit_medium_patch16_reg4_gap_256", {}, (32, 32), (4, False, (4, 4))),
            ("vit_base_patch16_siglip_gap_224", {}, (32, 32), (0, False, (4, 4))),
            ("naflexvit_base_patch16_gap", {}, (32, 32), (5, True, (4, 4))),
        ],
    )
    def test_layout(self, name: str, changes: dict, size: tuple, expected: tuple) -> None:
        _, (call,) = AttentionTap(make(name, **changes))(torch.randn(2, 3, *size))
        assert call[4:7] == expected
        _, (call,) = AttentionTap(nn.Sequential(make(name, **changes)))(torch.randn(2, 3, *size))
        assert call[4:7] == expected, "a model inside another one"

    def test_class_attention_has_the_class_tokens_row(self) -> None:
        model = make("cait_xxs24_224", depth=2)
        _, (call,) = AttentionTap(model, "blocks_token_only.1.attn")(images())
        if not hasattr(model, "num_prefix_tokens"):
            pytest.skip("this timm's CaiT does not say how many prefix tokens it has")
        assert call[4:7] == (1, True, (4, 4))

    def test_visible_patches_are_no_grid(self) -> None:
        """Also where their number happens to be that of the whole grid, or of a grid without class token."""
        for rate in (0.5, 1 / 16):
            model = make(patch_drop_rate=rate).train()
            tap = AttentionTap(model)
            assert tap(images())[1][0][4:7] == (1, True, None)
            assert tap.eval()(images())[1][0][4:7] == (1, True, (4, 4))

    def test_what_nobody_knows(self) -> None:
        class Windows(nn.Module):  # rows of windows are in the batch
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = x.reshape(4, -1, 4)[:, None]
                return F.scaled_dot_product_attention(x, x, x)

        model = make()
        model.windows = Windows()
        tap = AttentionTap(model, "windows")
        _, (call,) = tap.capture(lambda x: model.windows(x), images()[:, :1, :, :4])
        assert call[4:7] == (None, None, None)
        _, (call,) = AttentionTap(nn.Sequential(Windows()), "0")(torch.randn(4, 5, 4))
        assert call[4:7] == (None, None, None)


class TestThreads:
    def test_other_threads_run_the_same_model(self) -> None:
        """They are not stopped, and what they run is not captured here; two taps at once capture each their own."""
        model = make()
        stopping, whole = AttentionTap(model, stop=True), AttentionTap(model, "all")
        batches = [images(2).roll(shift, -1) for shift in range(3)]
        with torch.no_grad():
            plain = [model(x) for x in batches]
            expected = [stopping(x)[1][0].query for x in batches]
        wrong: list[str] = []

        def run(kind: int) -> None:
            with torch.no_grad():
                for turn in range(25):
                    index = (turn + kind) % 3
                    try:
                        if kind == 0:
                            right = torch.equal(model(batches[index]), plain[index])
                        elif kind == 1:
                            right = torch.equal(stopping(batches[index])[1][0].query, expected[index])
                        else:
                            output, calls = whole(batches[index])
                            right = torch.equal(output, plain[index]) and torch.equal(calls[-1].query, expected[index])
                    except BaseException as error:
                        right = False
                        wrong.append(repr(error))
                    if not right:
                        wrong.append(f"{kind}: another result")

        threads = [threading.Thread(target=run, args=(kind,)) for kind in (0, 1, 2, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong


class TestModelsPeopleBring:
    def test_a_forward_on_the_instance(self) -> None:
        """Accelerate's hooks and others put one there; it hides the forward of any class."""
        model, x = make(), images()
        _, (expected,) = AttentionTap(copy.deepcopy(model))(x)
        for before in (True, False):
            attention = model.blocks[-1].attn
            tap = AttentionTap(model) if not before else None
            plain = type(attention).forward
            attention.forward = functools.partial(plain, attention)
            tap = tap or AttentionTap(model)
            assert torch.equal(tap(x)[1][0].query, expected.query)
            tap.untap()
            del attention.forward

    def test_an_index_finds_attention_without_a_flag(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Linear(12, 36)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.attn = nn.LayerNorm(12), Attention()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.attn(self.norm(x))

        model = nn.Module()
        model.blocks = nn.Sequential(Block(), Block())
        tap = AttentionTap(model, "all")
        assert tap.paths == ["blocks.0.attn", "blocks.1.attn"]
        _, calls = tap.capture(model.blocks, torch.randn(2, 5, 12))
        assert [call.query.shape for call in calls] == [(2, 2, 5, 6)] * 2
        assert AttentionTap(model, -1).paths == ["blocks.1.attn"], "while it is tapped"

    def test_weight_shared_blocks(self) -> None:
        for share in (lambda m: m.blocks, lambda m: m.blocks[2]._modules):
            model = make()
            key = 2 if share(model) is model.blocks else "attn"
            share(model)[key] = model.blocks[0] if key == 2 else model.blocks[0].attn
            for block in (0, -1, "all"):
                with pytest.raises(ValueError, match="weight-shared: blocks 0, 2 use one module"):
                    AttentionTap(model, block)
            assert AttentionTap(model, 1).paths == ["blocks.1.attn"]
            with pytest.raises(NotImplementedError, match="the model runs it more than once"):
                AttentionTap(model, "blocks.0.attn")(images())

    def test_data_parallel_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match="nn.DataParallel .* use DistributedDataParallel"):
            AttentionTap(make())._replicate_for_data_parallel()  # what nn.DataParallel calls first


class TestDistributed:
    """A loss on the captured tensors alone trains under DDP, because they are returned from the wrapped forward.

    FSDP gathers a block's parameters again when the backward reaches the block's output, so there the output must take
    part in the loss, or the tap must stop (then the tapped block is never sharded again).
    """

    @pytest.fixture(autouse=True)
    def process_group(self, tmp_path: object) -> Iterator[None]:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("stop", [False, True])
    @pytest.mark.parametrize("kind", ["ddp", "fsdp"])
    def test_wrapped_around_the_tap(self, kind: str, stop: bool) -> None:
        def loss(output: torch.Tensor | None, call: AttentionCall) -> torch.Tensor:
            alone = call.query.square().sum()
            return alone if output is None or kind == "ddp" else alone + output.sum()

        model, x = make().train(), images()
        wrapped = tap = AttentionTap(model, stop=stop)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(tap, find_unused_parameters=True)
        else:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(tap)
        for _ in range(2):  # DDP complains about the first step's unused parameters at the second
            model.zero_grad()
            output, (call,) = wrapped(x)
            assert isinstance(call, AttentionCall)
            loss(output, call).backward()
        other = make().train()
        output, (call,) = AttentionTap(other, stop=stop)(x)
        loss(output, call).backward()
        grads = dict(model.named_parameters())
        for name, parameter in other.named_parameters():
            if parameter.grad is not None:
                grad = grads[name].grad
                torch.testing.assert_close(grad.full_tensor() if kind == "fsdp" else grad, parameter.grad, msg=name)
