"""MiniLM: the relation losses and their gradients against the papers' formulas on the models' own projections."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attnkd import attention_divergence
from attnkd.attention.call import AttentionCall
from attnkd.capture.tap import AttentionTap
from attnkd.methods.minilm import RELATIONS, MiniLM, relation
from tests.methods.test_text_and_windows import images, swin, text, words
from tests.stirred import stirred

PROJECTIONS = {
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
}


def vit(heads: int, width: int, seed: int = 0, patch: int = 8, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": patch, "embed_dim": width, "depth": 2, "num_heads": heads, "num_classes": 3}
    return stirred(timm.create_model("vit_tiny_patch16_224", **{**sizes, **more}))


def projected(model: nn.Module, inputs: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What the last block's projections put out, [B, N, H·D] by 'q', 'k', 'v': hooks on them, and nothing of the tap."""
    paths = [path for path, _ in model.named_modules() if path.endswith(names)][-len(names) :]
    found: dict[str, Tensor] = {}
    handles = []
    for letter, path in zip(("q", "k", "v") if len(names) == 3 else ("qkv",), paths, strict=True):

        def keep(module: nn.Module, args: Any, output: Tensor, letter: str = letter) -> None:
            found[letter] = output

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    known = {key: value for key, value in inputs.items() if key != "token_type_ids"} if isinstance(inputs, dict) else {}
    model(**known) if known else model(inputs)
    for handle in handles:
        handle.remove()
    return found if len(names) == 3 else dict(zip("qkv", found["qkv"].chunk(3, -1), strict=True))


def textbook(student: dict[str, Tensor], teacher: dict[str, Tensor], name: str, heads: int, counts: Tensor) -> Tensor:
    """Mean over the tokens that count and the relation heads of KL(R_t ‖ R_s), R = softmax(A_i A_jᵀ / √d) over those tokens."""
    log_r = []
    for side in (student, teacher):
        a, b = (side[letter].double().unflatten(-1, (heads, -1)).transpose(1, 2) for letter in name)
        logits = a @ b.mT / math.sqrt(a.shape[-1])
        log_r.append(logits.masked_fill(~counts[:, None, None], -math.inf).log_softmax(-1))
    log_s, log_t = log_r[0], log_r[1].detach()
    kl = torch.where(log_t > -math.inf, log_t.exp() * (log_t - log_s), 0.0).sum(-1)
    return kl.transpose(1, 2)[counts].mean()


@pytest.mark.parametrize(("relations", "heads"), [(("qq", "kk", "vv"), 8), (("qk", "vv"), None), (("vq",), 2)])
def test_text_encoders(relations: tuple[str, ...], heads: int | None) -> None:
    """24 channels of 3 heads learn from 32 of 4: relation heads need neither as many heads nor as many channels."""
    student, teacher = text("distilbert", dim=24, n_heads=3).double(), text("bert", seed=1).double()
    task = MiniLM(student, teacher, relations=relations, relation_heads=heads, verbose=False)
    result = task(words())
    result["loss"].backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    ours, theirs = (projected(model, words(), PROJECTIONS[model.config.model_type]) for model in (student, teacher))
    counts = words()["attention_mask"].bool()
    losses = {name: textbook(ours, theirs, name, heads or 4, counts) for name in relations}
    for name, loss in losses.items():
        torch.testing.assert_close(result[f"{name}_loss"], loss)
    total = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(result["loss"], total)
    total.backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert wanted.keys() <= found.keys() and len(wanted) > 5
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-7, atol=1e-12, msg=name)


def test_vision_transformers_with_and_without_registers() -> None:
    student, teacher = vit(3, 24, reg_tokens=2), vit(4, 32, seed=1)
    criterion = nn.CrossEntropyLoss()
    task = MiniLM(student, teacher, criterion=criterion, relation_weight=2.0, task_loss_weight=0.5, verbose=False)
    result = task(images(), torch.tensor([0, 2, 1]))
    result["loss"].backward()
    shared = {
        letter: torch.cat([x[:, :1], x[:, 3:]], 1) for letter, x in projected(student, images(), ("qkv",)).items()
    }
    counts = torch.ones(3, 17, dtype=torch.bool)
    theirs = projected(teacher, images(), ("qkv",))
    expected = torch.stack([textbook(shared, theirs, name, 4, counts) for name in ("qq", "kk", "vv")]).sum()
    torch.testing.assert_close(result["relation_loss"].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["loss"], 2 * result["relation_loss"] + 0.5 * result["task_loss"])
    torch.testing.assert_close(result["output"], student(images()))


def test_other_grids_and_windows() -> None:
    """What whole maps can do, relations can: a teacher's finer grid is resized, windows are compared with the same windows."""
    for student, teacher in ((vit(4, 32), vit(4, 32, seed=1, patch=4)), (swin(), swin(seed=1))):
        result = MiniLM(student, teacher, relation_heads=4, verbose=False)(images())
        result["loss"].backward()
        assert 0 < result["loss"].item() < 100
        with pytest.raises(ValueError, match="patch grid|attend over different tokens"):
            MiniLM(student, vit(4, 32, patch=4), relation_heads=4, resample_mode=None, verbose=False)(images())


def test_a_model_is_its_own_teacher() -> None:
    result = MiniLM(text("bert"), text("bert"), blocks=[1, 3], relations=RELATIONS, verbose=False)(words())
    assert len(result) == len(RELATIONS) + 2
    torch.testing.assert_close(result["loss"], torch.zeros(()), rtol=0, atol=1e-5)


def test_padding_changes_nothing() -> None:
    losses = []
    for length in (6, 9):
        inputs = {key: value[1:] for key, value in words(length, kept=6).items()}
        if length == 6:
            inputs["input_ids"] = words(9)["input_ids"][1:, :6]
        losses.append(MiniLM(text("distilbert"), text("bert"), verbose=False)(inputs)["loss"])
    torch.testing.assert_close(*losses)


def test_kernels_agree(device: torch.device) -> None:
    found = []
    for impl in ("triton", "reference"):
        student, teacher = vit(2, 16).to(device), vit(2, 32, seed=1).to(device)
        task = MiniLM(student, teacher, relation_heads=4, relations=("vv",), impl=impl, verbose=False)
        loss = task(images()[:1].to(device))["loss"]
        loss.backward()
        found.append((loss, student.get_submodule("blocks.1.attn.qkv").weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    taps = [AttentionTap(model, -1, values=True) for model in (vit(2, 32), vit(4, 32, seed=1))]
    (s,), (t,) = (tap(images())[1] for tap in taps)
    loss = attention_divergence(relation(s, "kk", 8), relation(t, "kk", 8))
    result = MiniLM(vit(2, 32), vit(4, 32, seed=1), relation_heads=8, relations="kk", verbose=False)(images())
    torch.testing.assert_close(loss, result["kk_loss"])
    assert s.value is not None and s.value.shape == (3, 2, 17, 16)
    own = relation(s, "vv")
    assert own.query is s.value and own.key is s.value and own.scale == 0.25
    regrouped = relation(s, "qq", 8).query
    assert regrouped.untyped_storage().data_ptr() == s.query.untyped_storage().data_ptr()  # nothing copied


def test_refusals() -> None:
    _, (call,) = AttentionTap(vit(2, 32), -1)(images())
    with pytest.raises(
        ValueError, match=r"call: has no values; capture it with AttentionTap\(model, blocks, values=True\)"
    ):
        relation(call, "vv")
    with pytest.raises(
        ValueError, match="relation_heads: expected a divisor of 32, .* all heads' query together, got 5"
    ):
        relation(call, "qq", 5)
    with pytest.raises(
        ValueError, match="between the tokens of a self-attention, but this one has 1 rows over 17 keys"
    ):
        relation(call._replace(query=call.query[:, :, :1]), "qq")
    with pytest.raises(
        ValueError, match=r"'qv' relates vectors of one width, got \(3, 2, 17, 16\) and \(3, 2, 17, 8\)"
    ):
        relation(call._replace(value=call.key[..., :8]), "qv")
    with pytest.raises(ValueError, match="name: expected one of 'qq', 'qk'.*got 'xy'"):
        relation(call, "xy")
    with pytest.raises(ValueError, match="student: relation_heads: expected a divisor of 24"):
        MiniLM(vit(3, 24), vit(4, 32), relation_heads=16, verbose=False)(images())
    for wrong in ((), ("qq", "qq")):
        with pytest.raises(ValueError, match="relations: expected one or more, every one once"):
            MiniLM(vit(2, 32), vit(2, 32), relations=wrong, verbose=False)
    with pytest.raises(ValueError, match="relation_heads: expected None or an integer >= 1, got 0"):
        MiniLM(vit(2, 32), vit(2, 32), relation_heads=0, verbose=False)
    with pytest.raises(ValueError, match="relation_weight: all are 0"):
        MiniLM(vit(2, 32), vit(2, 32), relation_weight=0, verbose=False)


def test_values_are_kept_when_asked_for_alone() -> None:
    model = vit(2, 32)
    for stop in (False, True):
        _, (call,) = AttentionTap(model, -1, stop=stop)(images())
        assert isinstance(call, AttentionCall) and call.value is None
        _, (call,) = AttentionTap(model, -1, stop=stop, values=True)(images())
        assert call.value is not None
        torch.testing.assert_close(
            call.value.transpose(1, 2).flatten(2), projected(model, images(), ("qkv",))["v"], rtol=0, atol=0
        )


def test_what_is_not_compared_needs_no_gradient(tmp_path: Path) -> None:
    """DistributedDataParallel waits for every parameter behind an output: of values alone, queries and keys are none."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = text("distilbert")
        task = MiniLM(student, text("bert"), relations="vv", verbose=False).prepare_distributed()
        for _ in range(2):  # it complains at the second step about the first
            task(words())["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    last = "distilbert.transformer.layer.1.attention."
    assert student.get_parameter(f"{last}v_lin.weight").grad is not None
    assert student.get_parameter(f"{last}q_lin.weight").grad is None
