"""Models of other libraries: captured as they attend, and student or teacher in all four methods."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.call import AttentionCall
from attnkd.capture import adapters
from attnkd.capture.adapters import Adapter, TokenLayout, adapter_for, register_adapter
from attnkd.capture.checkpointing import recompute_blocks
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import mean_token
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.recipes import AttnDistillRecipe
from attnkd.methods.ssta import SSTA
from tests.stirred import stirred

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
HUGGING_FACE: dict[str, tuple[str, str, dict, int, bool]] = {
    # name: class, configuration, its changes, prefix tokens, classifier
    "vit": ("ViTForImageClassification", "ViTConfig", {"intermediate_size": 64}, 1, True),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"intermediate_size": 64}, 2, True),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {}, 1, True),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 3},
        4,
        True,
    ),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {"intermediate_size": 64, "num_register_tokens": 2}, 3, False),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", {"intermediate_size": 64}, 1, False),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", {"intermediate_size": 64}, 0, False),
    "beit": ("BeitForImageClassification", "BeitConfig", {"use_relative_position_bias": True}, 1, True),
    "data2vec-vision": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", {}, 1, True),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", {"intermediate_size": 64}, 1, True),
    "ijepa": ("IJepaModel", "IJepaConfig", {"intermediate_size": 64}, 0, False),
}


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def hugging_face(name: str, attention: str = "sdpa", **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    cls, configuration, changes, _, classifier = HUGGING_FACE[name]
    config = getattr(transformers, configuration)(
        **TINY, **changes, **more, **({"num_labels": 5} if classifier else {})
    )
    torch.manual_seed(0)
    return stirred(getattr(transformers, cls)._from_config(config, attn_implementation=attention))


def timm_vit(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    return stirred(timm.create_model("vit_tiny_patch16_224", **tiny, num_classes=classes))


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    return stirred(models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5))


def open_clip_tower() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return stirred(open_clip.transformer.VisionTransformer(32, 8, 32, 3, 4, 2.0, output_dim=16))


class HubAttention(nn.Module):
    """As in the repositories behind torch.hub: DINOv3's blocks call ``forward_list``, DINOv2's ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward_list(self, xs: list[Tensor]) -> list[Tensor]:
        return [HubAttention.forward(self, x) for x in xs]


class HubBlock(nn.Module):
    def __init__(self, lists: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.lists = nn.LayerNorm(32), HubAttention(), lists

    def forward(self, x: Any) -> Any:
        if self.lists:
            attended = self.attn.forward_list([self.norm(one) for one in x])
            return [one + more for one, more in zip(x, attended, strict=True)]
        return x + self.attn(self.norm(x))


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    """The attributes and outputs of DINOv2's (``registers`` named 'reg') and DINOv3's ('storage') model on torch.hub."""

    def __init__(self, registers: str, chunks: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.num_features, self.registers = 32, 8, 32, registers
        setattr(self, {"reg": "num_register_tokens", "storage": "n_storage_tokens"}[registers], 2)
        self.patch_embed, self.norm, self.head = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32), nn.Identity()
        self.prefix = nn.Parameter(torch.randn(1, 3, 32))
        blocks: list[nn.Module] = [HubBlock(registers == "storage") for _ in range(4)]
        self.chunked_blocks = chunks
        if chunks:
            blocks = [BlockChunk(blocks[:2]), BlockChunk([nn.Identity(), nn.Identity(), *blocks[2:]])]
        self.blocks = nn.ModuleList(blocks)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        tokens: Any = torch.cat([self.prefix.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT], 1)
        tokens = [tokens] if self.registers == "storage" else tokens
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens[0] if self.registers == "storage" else tokens)
        registers = {"reg": "x_norm_regtokens", "storage": "x_storage_tokens"}[self.registers]
        return {"x_norm_clstoken": tokens[:, 0], registers: tokens[:, 1:3], "x_norm_patchtokens": tokens[:, 3:]}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)["x_norm_clstoken"])


def hub(registers: str, chunks: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return stirred(DinoVisionTransformer(registers, chunks))


OTHERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision": (torchvision_vit, 1),
    "open_clip": (open_clip_tower, 1),
    "dinov2 hub": (lambda: hub("reg"), 3),
    "dinov2 hub, chunks": (lambda: hub("reg", chunks=True), 3),
    "dinov3 hub": (lambda: hub("storage"), 3),
}
ALL = [*HUGGING_FACE, *OTHERS]


def build(name: str) -> nn.Module:
    return OTHERS[name][0]() if name in OTHERS else hugging_face(name)


def attention_map(call: AttentionCall) -> Tensor:
    logits = call.query.double() @ call.key.double().mT * call.scale
    if call.mask is not None:
        logits = logits + call.mask if call.mask.is_floating_point() else logits.masked_fill(~call.mask, -torch.inf)
    return logits.softmax(-1).float()


@pytest.mark.parametrize("name", ALL)
def test_integers_capture_and_the_model_stays_what_it_was(name: str) -> None:
    model = build(name)
    adapter = adapter_for(model)
    prefix = OTHERS[name][1] if name in OTHERS else HUGGING_FACE[name][3]
    expected = adapter.forward(model, images())
    tap = AttentionTap(model, blocks="all")
    output, calls = tap.capture(adapter.forward, model, images())
    torch.testing.assert_close(output, expected)
    assert len(calls) == (4 if "hub" in name else 3)
    for call in calls:
        assert (call.num_prefix_tokens, call.has_cls, call.grid) == (prefix, prefix > 0, (4, 4))
        assert call.query.shape == (2, 4, prefix + 16, 8)
    tap.untap()
    tokens, output = adapter.run(model, images(), train_head=True)
    assert adapter.layout(model) == TokenLayout(prefix, prefix > 0, 32) and tokens.shape == (2, prefix + 16, 32)
    if output is not None:
        torch.testing.assert_close(output, expected)
    if name == "dinov2 hub, chunks":
        assert AttentionTap(model, -1).paths == ["blocks.1.3.attn"]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_maps_are_those_of_its_unfused_attention(name: str) -> None:
    model, eager = hugging_face(name), hugging_face(name, "eager")
    eager.load_state_dict(model.state_dict())
    _, calls = AttentionTap(model, "all")(images())
    for call, expected in zip(calls, eager(images(), output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(attention_map(call), expected)
    with pytest.raises((RuntimeError, ValueError), match="attn_implementation='sdpa'"):
        AttentionTap(eager, -1)(images())
    adapter = adapter_for(model)
    if adapter.image_size(model) is None:
        _, (call,) = AttentionTap(model, -1).capture(adapter.forward, model, images(48, 40))
        assert call.grid == (6, 5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masks", [(), ("attn",), ("attn", "key"), ("per head", "key"), ("additive", "key")])
def test_multihead_attention_is_restated(masks: tuple[str, ...], grad: bool) -> None:
    """Its own fused attention, output and gradients, beside the map that it gives with need_weights."""
    torch.manual_seed(0)
    batch_first = "per head" not in masks
    attention = stirred(nn.MultiheadAttention(32, 4, batch_first=batch_first)).train(grad)
    x = torch.randn(2, 6, 32, requires_grad=grad) if batch_first else torch.randn(6, 2, 32, requires_grad=grad)
    given: dict[str, Any] = {}
    if masks:
        hidden = torch.rand(8, 6, 6) < 0.3 if "per head" in masks else torch.rand(6, 6) < 0.3
        hidden[..., 0] = False
        given["attn_mask"] = torch.where(hidden, -1.5, 0.25) if "additive" in masks else hidden
    if "key" in masks:
        given["key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
        if "additive" in masks:  # PyTorch wants one kind
            given["key_padding_mask"] = torch.zeros(2, 6).masked_fill(given["key_padding_mask"], -torch.inf)
    with torch.set_grad_enabled(grad):
        expected, weights = attention(x, x, x, average_attn_weights=False, **given)
        plain = copy.deepcopy(attention)
        tap = AttentionTap(nn.Sequential(attention), "0")
        (output, nothing), (call,) = tap.capture(attention, x, x, x, need_weights=False, **given)
        (_, asked), _ = tap.capture(attention, x, x, x, average_attn_weights=False, **given)
    assert nothing is None
    torch.testing.assert_close(asked, weights)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(attention_map(call), weights)
    if grad:
        output.square().sum().backward()
        plain(x, x, x, need_weights=False, **given)[0].square().sum().backward()
        for ours, theirs in zip(attention.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("options", "call", "named"),
    [
        ({}, {"need_weights": False, "is_causal": True, "attn_mask": torch.zeros(6, 6)}, "is_causal"),
        ({"dropout": 0.5}, {"need_weights": True}, "need_weights=True with dropout"),
        ({"add_bias_kv": True}, {"need_weights": False}, "add_bias_kv"),
        ({"add_zero_attn": True}, {"need_weights": False}, "add_zero_attn"),
    ],
)
def test_multihead_attention_that_is_no_plain_softmax_is_refused(options: dict, call: dict, named: str) -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)
    x = torch.randn(2, 6, 32)
    with pytest.raises(NotImplementedError, match=rf"0 \(MultiheadAttention\): {named}"):
        AttentionTap(nn.Sequential(attention), "0").capture(attention, x, x, x, **call)


def step(task: Any) -> dict[str, Tensor]:
    result = task(images(), torch.tensor([1, 3]))
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.student.parameters())
    return result


@pytest.mark.parametrize("name", ALL)
def test_all_methods_take_it_as_teacher_and_as_student(name: str) -> None:
    model = build(name)
    has_cls, classifier = adapter_for(model).layout(model).has_cls, bool(adapter_for(model).num_classes(model))
    criterion = nn.CrossEntropyLoss() if classifier else None
    label_teacher = build(name) if classifier else None
    step(HeadKD(timm_vit(), build(name), at_weight=0.5, label_teacher=label_teacher, verbose=False))
    options: dict[str, Any] = {"criterion": criterion, "alpha": 0.5 if classifier else 0.0, "verbose": False}
    step(HeadKD(build(name), timm_vit(0), at_weight=0.5, **options))
    if name == "deit":
        with pytest.raises(NotImplementedError, match="student: DeiT.* returns the mean of its two heads"):
            HeadKD(build(name), timm_vit(0), label_teacher=timm_vit(), **options)
    heads = {"teacher_heads": [0, 1, 2], "stop_epoch": None, "verbose": False}
    step(SSTA(timm_vit(), build(name), **heads))
    step(SSTA(build(name), timm_vit(0), **heads, criterion=criterion))
    if not has_cls:
        for pair in ((timm_vit(0), model), (model, timm_vit(0))):
            with pytest.raises(ValueError, match="class tokens are compared.* rows='mean'"):
                AttnDistill(*pair, verbose=False)
        pools = adapter_for(model).pooling(model) is not None
        for rows in ("pool", "mean", "all") if pools else ("mean", "all"):
            step(AttnDistill(timm_vit(0), build(name), rows=rows, patch_weight=1.0, verbose=False))
            step(AttnDistill(build(name), timm_vit(0), rows=rows, verbose=False))
        if not pools:
            with pytest.raises(ValueError, match="teacher: rows='pool', but .* has neither an attention pooling"):
                AttnDistill(timm_vit(0), model, rows="pool", verbose=False)
        return
    step(AttnDistill(timm_vit(0), build(name), patch_weight=1.0, verbose=False))
    result = step(AttnDistill(build(name), timm_vit(0), patch_weight=1.0, criterion=criterion, verbose=False))
    if classifier:
        torch.testing.assert_close(result["output"], adapter_for(model).forward(model, images()))
        step(AttentionProbe(timm_vit(), build(name), teacher_accuracy=0.9, verbose=False))
        step(AttentionProbe(build(name), timm_vit(), teacher_accuracy=0.9, verbose=False))


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["vit", "dinov2", "open_clip"])
def test_activation_checkpointing_changes_no_gradient(name: str, one_pass: bool) -> None:
    gradients = []
    method: Any = AttnDistill if name == "open_clip" else HeadKD
    for checkpointed in (False, True):
        student = build(name).train()
        if checkpointed:
            recompute_blocks(student)
        step(method(student, timm_vit(0), one_pass=one_pass, verbose=False))
        gradients.append({key: parameter.grad for key, parameter in student.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, msg=key)


def test_timm_models_without_class_token() -> None:
    """SigLIP of timm pools with an attention; a model with registers alone averages."""
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
    siglip = stirred(timm.create_model("vit_base_patch16_siglip_224", **tiny))
    registers = stirred(timm.create_model("vit_medium_patch16_reg4_gap_256", **tiny, num_classes=5))
    for rows in ("pool", "mean", "all"):
        step(AttnDistill(timm_vit(0), siglip, rows=rows, verbose=False))
        result = step(AttnDistill(copy.deepcopy(siglip).requires_grad_(), timm_vit(0), rows=rows, verbose=False))
        assert not result["output"].requires_grad  # there is no criterion for it
    for rows in ("mean", "all"):
        step(AttnDistill(copy.deepcopy(registers), siglip, rows=rows, verbose=False))
    step(AttentionProbe(timm_vit(), registers, 0.9, rows="mean", verbose=False))
    same = AttentionProbe(copy.deepcopy(registers).requires_grad_(), registers, 0.9, rows="mean", verbose=False)
    assert same(images())["relation_loss"] < 1e-10


def test_what_pools_is_what_is_compared() -> None:
    """rows='pool' takes the attention that pools. A class token that the head does not use does not."""
    tiny = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "num_classes": 5}
    both = stirred(timm.create_model("vit_tiny_patch16_224", **tiny, global_pool="map", class_token=True))
    step(AttnDistill(timm_vit(0), both, rows="pool", verbose=False))
    unused = stirred(timm.create_model("vit_tiny_patch16_224", **tiny, global_pool="avg", class_token=True))
    models = [unused]
    if importlib.util.find_spec("transformers"):
        models.append(hugging_face("beit", use_mean_pooling=True))
    if importlib.util.find_spec("open_clip"):
        pooled = {"attentional_pool": True, "attn_pooler_heads": 4, "output_dim": 16}
        models.append(
            importlib.import_module("open_clip").transformer.VisionTransformer(32, 8, 32, 3, 4, 2.0, **pooled)
        )
    for model in models:
        with pytest.raises(ValueError, match="an attention pooling of one query nor a class token that pools"):
            AttnDistill(timm_vit(0), model, rows="pool", verbose=False)


def test_padding_is_in_no_mean_token() -> None:
    tokens, padded = torch.randn(2, 4, 32), torch.tensor([[False, False, False, True]])
    other = torch.where(padded[..., None], 9.0, tokens)
    assert torch.equal(mean_token(other, padded), mean_token(tokens, padded))
    torch.testing.assert_close(mean_token(tokens, padded)[:, 0], tokens[:, :3].mean(1))


def test_a_block_that_runs_on_some_of_the_images_is_refused() -> None:
    class Some(HubBlock):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x[:1]), x[1:]])

    model = hub("reg")
    model.blocks[3] = Some(False)
    with pytest.raises(NotImplementedError, match=r"blocks.3.attn .*: ran on 1 of 2 images.*drop_path_rate=0"):
        AttentionTap(model, -1)(images())


def test_the_same_weights_in_timm_and_hugging_face_have_no_divergence() -> None:
    """One model in two libraries: whatever the methods compare must be equal, so nothing is taken from a wrong place."""
    pytest.importorskip("transformers", minversion="5")  # the names below
    ours, theirs = timm_vit(), hugging_face("vit")
    twins: Any = theirs.vit
    pairs = [(ours.norm, twins.layernorm), (ours.head, theirs.classifier)]
    pairs.append((ours.patch_embed.proj, twins.embeddings.patch_embeddings.projection))
    with torch.no_grad():
        ours.cls_token.copy_(twins.embeddings.cls_token)
        ours.pos_embed.copy_(twins.embeddings.position_embeddings)
        for block, layer in zip(ours.blocks, twins.layers, strict=True):
            block.mlp = nn.Sequential(block.mlp.fc1, nn.GELU(), block.mlp.fc2)  # both 64 wide
            block.mlp[0], block.mlp[2] = copy.deepcopy(layer.mlp.fc1), copy.deepcopy(layer.mlp.fc2)
            pairs += [(block.norm1, layer.layernorm_before), (block.norm2, layer.layernorm_after)]
            pairs.append((block.attn.proj, layer.attention.o_proj))
            parts = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
            block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        for mine, twin in pairs:
            mine.load_state_dict(twin.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()).logits, rtol=1e-4, atol=1e-5)
    task = HeadKD(ours, theirs, verbose=False)
    assert task(images(), torch.tensor([1, 3]))["attn_loss"] < 1e-9
    probe = AttentionProbe(ours, theirs, teacher_accuracy=0.9, verbose=False)
    assert probe(images())["relation_loss"] < 1e-6
    attn = AttnDistill(ours, theirs, verbose=False)(images())
    assert attn["attn_loss"] < 1e-6


class TwoLines(nn.Module):
    """A model that no library has."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.stages = nn.Conv2d(3, 32, 8, 8), nn.ModuleList([HubBlock(False), HubBlock(False)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for stage in self.stages:
            x = stage(x)
        return x.mean(1)


class TwoLinesAdapter(Adapter):
    def takes(self, model: nn.Module) -> bool:
        return isinstance(model, TwoLines)

    def layout(self, model: nn.Module) -> TokenLayout:
        return TokenLayout(0, False, 32)

    def grid(self, model: nn.Module, size: Any) -> tuple[int, int]:
        return size[0] // 8, size[1] // 8

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        x = model.patches(images).flatten(2).mT
        for stage in model.stages:
            x = stage(x)
        return x

    def head(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


@pytest.mark.parametrize("name", [*HUGGING_FACE, "torchvision", "open_clip"])
@pytest.mark.parametrize("alone", [False, True])
def test_positions_and_tokens_have_no_weight_decay(name: str, alone: bool) -> None:
    """In a task, and as a model alone: what has weight decay are the weights of layers."""
    student = build(name)
    layers = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    weights = {
        id(p) for m in student.modules() if isinstance(m, layers) for p in m.parameters(recurse=False) if p.ndim > 1
    }
    queries = {"open_clip": ["proj"], "siglip_vision_model": ["head.probe"]}.get(
        name, []
    )  # a matrix, a pooling's own query
    weights |= {id(student.get_parameter(path)) for path in queries}
    recipe = AttnDistillRecipe(50, 256)
    trained = student if alone else HeadKD(student, timm_vit(), criterion=None, alpha=0.0, verbose=False)
    groups = recipe.optimizer(trained).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {id(p): path for path, p in student.named_parameters()}
    assert sorted(names[i] for i in decayed) == sorted(names[i] for i in weights)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_an_adapter_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    assert AttentionTap(TwoLines(), -1).paths == ["stages.1.attn"]  # integers need none
    with pytest.raises(TypeError, match=r"student: .*got TwoLines.*register_adapter"):
        HeadKD(TwoLines(), timm_vit(0), criterion=None, alpha=0.0, verbose=False)
    with pytest.raises(TypeError, match="adapter: expected"):
        register_adapter(TwoLinesAdapter)  # type: ignore[arg-type]
    register_adapter(TwoLinesAdapter())
    step(HeadKD(TwoLines(), timm_vit(0), criterion=None, alpha=0.0, verbose=False))
    with pytest.raises(
        ValueError, match="got num_classes None and 5; None: neither an attribute .* nor a method of its adapter"
    ):
        AttentionProbe(TwoLines(), timm_vit(), 0.9, rows="mean", verbose=False)
    _, (call,) = AttentionTap(TwoLines(), -1)(images(48, 40))
    assert (call.num_prefix_tokens, call.has_cls, call.grid) == (0, False, (6, 5))


def test_what_shuffles_its_patches_is_unknown() -> None:
    """ViT-MAE's encoder drops and shuffles patches; YOLOS appends tokens. Nothing is guessed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(**TINY, use_mean_pooling=True)
    with pytest.raises(ValueError, match="teacher: the features of BeitModel are not normalised"):
        AttnDistill(timm_vit(0), transformers.BeitModel(config, add_pooling_layer=False), verbose=False)
    masked = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**TINY, intermediate_size=64))
    with pytest.raises(
        TypeError, match="teacher: .*got ViTForMaskedImageModeling; its part 'vit' is of a known family"
    ):
        HeadKD(timm_vit(), masked, verbose=False)
    mae = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, intermediate_size=64))
    _, (call,) = AttentionTap(mae, -1)(images())
    assert (call.num_prefix_tokens, call.has_cls, call.grid) == (None, None, None)
    with pytest.raises(TypeError, match="teacher: .*got ViTMAEModel; it drops and shuffles its patches"):
        HeadKD(timm_vit(), mae, verbose=False)
    with pytest.raises(
        TypeError, match="teacher: .*got DataParallel; its part 'module' is of a known family: give that"
    ):
        HeadKD(timm_vit(), nn.DataParallel(timm_vit()), verbose=False)


def test_what_cannot_be_found_lists_the_attentions() -> None:
    two = nn.ModuleDict({"a": hub("reg"), "b": hub("reg")})
    with pytest.raises(
        ValueError, match=r"lists of blocks are a\.blocks, b\.blocks; give module paths.*a\.blocks\.0\.attn"
    ):
        AttentionTap(two, -1)
    with pytest.raises(ValueError, match="none that calls scaled_dot_product_attention"):
        AttentionTap(nn.Sequential(nn.Linear(2, 2)), -1)
    with pytest.raises(ValueError, match=r"no module at path 'blocks.9'; its attentions are blocks\.0\.attn, "):
        AttentionTap(timm_vit(), "blocks.9")
    with pytest.raises(
        RuntimeError, match=r"blocks.0.mlp .* made no call .* The model's attentions are blocks\.0\.attn"
    ):
        AttentionTap(timm_vit(), "blocks.0.mlp")(images())
    with pytest.raises(ValueError, match="blocks.1.attn is an attention; give its block 'blocks.1'"):
        AttentionProbe(timm_vit(), timm_vit(), 0.9, blocks="blocks.1.attn", teacher_blocks=1, verbose=False)
    with pytest.raises(TypeError, match="student: ResNet does not say .* Its attentions are none that calls"):
        HeadKD(timm.create_model("test_resnet"), timm_vit(), verbose=False)
    assert AttentionTap(nn.Sequential(HubBlock(False), HubBlock(False)), -1).paths == ["1.attn"]
    wrapped = nn.ModuleDict({"backbone": hub("reg")})
    assert AttentionTap(wrapped, -1).paths == ["backbone.blocks.3.attn"]
