"""Which models of the installed timm and transformers can be captured, and whether what is captured is their attention.

Every candidate is built small, with random weights. Its last attention is captured by the tap, and compared with the map of a
copy of the model that computes it in the open: timm's attention with ``fused_attn`` off, Hugging Face's with
``attn_implementation='eager'``, and of an attention that is always fused, its own call with the identity matrix in place of the values.
Then every method takes a step with it (:mod:`attnkd.testing.census_steps`).
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnkd.attention.call import AttentionCall
from attnkd.capture.blocks import attentions_of
from attnkd.capture.tap import AttentionTap
from attnkd.testing.census_steps import Fault, steps

EXACT, BY_PATH, REFUSED, NOT_BUILT, WRONG = "exact", "exact, by path", "refused", "not built", "WRONG"
STATUSES = (EXACT, BY_PATH, REFUSED, NOT_BUILT, WRONG)
SMALL: tuple[dict[str, Any], ...] = (
    {"img_size": 224, "embed_dim": 64, "depth": 3, "num_heads": 4},
    {"embed_dim": 64, "depth": 3, "num_heads": 4},
    {"img_size": 224, "depth": 3},
    {"depth": 3},
    {"depths": (1, 1, 1, 1)},
    {"embed_dim": 24},
    {},
)
"""Arguments that make a timm model small; the first that it takes are used."""
MOST = 120e6
"""Parameters of the largest model that is built."""
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    # model type: model, configuration, its arguments besides TINY or TINY_TEXT
    "vit": ("ViTForImageClassification", "ViTConfig", {"intermediate_size": 64}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {"intermediate_size": 64}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {"intermediate_size": 64}),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", {"intermediate_size": 64}),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {"intermediate_size": 64, "use_relative_position_bias": True},
    ),
    "data2vec-vision": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", {"intermediate_size": 64}),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", {"intermediate_size": 64}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", {"intermediate_size": 64}),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", {"intermediate_size": 64}),
    "bert": ("BertForSequenceClassification", "BertConfig", {"intermediate_size": 64}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {"intermediate_size": 64}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", {"intermediate_size": 64}),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", {"intermediate_size": 64}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {"intermediate_size": 64, "embedding_size": 32}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {"intermediate_size": 64, "pad_token_id": 0},
    ),
}
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
Inputs = Tensor | dict[str, Tensor]


class Found(NamedTuple):
    """What became of one model."""

    library: str
    family: str
    """The module of timm, or 'transformers'."""
    name: str
    status: str
    """One of :data:`STATUSES`."""
    why: str = ""
    methods: dict[str, str] = {}
    """How each method ran: '' in its default form, else the form; or 'refused: ' and why. Of a model that is captured."""


def census(sample: bool = False, contains: str = "", known: Sequence[Found] = ()) -> Iterator[Found]:
    """All candidates, one after the other.

    Args:
        sample: of every family of timm a small model alone.
        contains: only names with this in them.
        known: what was found before; these models are not looked at again.
    """
    seen: dict[str, _Answer] = {}
    before = {(one.library, one.name): one for one in known}
    for family, name in timm_candidates(sample):
        if contains in name:
            yield before.get(("timm", name)) or Found("timm", family, name, *_answer(_timm, name, seen))
    for name in HUGGING_FACE if importlib.util.find_spec("transformers") else ():
        if contains in name:
            found = before.get(("transformers", name))
            yield found or Found("transformers", "transformers", name, *_answer(_hugging_face, name, seen))


def timm_candidates(sample: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name) of every timm model whose file computes an attention."""
    import timm

    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if not names:
            continue
        source = inspect.getsource(inspect.getmodule(timm.model_entrypoint(names[0])))  # type: ignore[arg-type]
        own = "scaled_dot_product_attention" in source or ("attn" in source and "softmax(" in source)
        if own or "vision_transformer import" in source:
            for name in [min(names, key=_size)] if sample else names:
                yield family, name


def _size(name: str) -> int:
    """Of a model, as far as its name tells it: the index of the first of these words that it has."""
    words = ("test", "atto", "pico", "nano", "xx", "tiny", "mini", "xs", "_t", "small", "_s", "b0")
    return next((index for index, word in enumerate(words) if word in name), len(words))


_Answer = tuple[str, str, dict[str, str]]
"""Status, reason, methods."""


def _answer(look: Any, name: str, seen: dict[str, _Answer]) -> _Answer:
    try:
        return look(name, seen)
    except NotImplementedError as error:
        return REFUSED, _reason(error), {}


def _timm(name: str, seen: dict[str, _Answer]) -> _Answer:
    """Of a timm model. It is built without memory first: what has no attention to capture is not built again, and
    what was ``seen``, being the same when small, module by module, is not run again."""
    import timm

    for arguments in SMALL:
        try:
            with torch.device("meta"):
                plan = timm.create_model(name, **arguments)
            count = sum(parameter.numel() for parameter in plan.parameters())
            if count > MOST:
                raise ValueError(f"cannot be built small ({round(count / 1e6)} million parameters)")
            break
        except Exception as error:  # of every kind, by models that need packages, downloads or other arguments
            reason = _reason(error)
    else:
        return NOT_BUILT, reason, {}
    status, path = _last_attention(plan)
    if status == REFUSED:
        return status, path, {}
    cfg: Any = plan.pretrained_cfg
    channels, *size = cfg["input_size"]
    if "img_size" in arguments:
        size = [224, 224]
    elif min(size) > 384 and not hasattr(getattr(plan, "patch_embed", None), "img_size"):
        size = [256, 256]
    key = f"{size} {plan!r} {[_settings(module) for module in plan.modules()]}"
    if key in seen:
        return seen[key]
    torch.manual_seed(0)
    model = _stirred(timm.create_model(name, **arguments))
    in_the_open = copy.deepcopy(model)
    opened: Any
    for opened in in_the_open.modules():
        if hasattr(opened, "fused_attn"):
            opened.fused_attn = False
    seen[key] = _answer(
        lambda *_: _compared(model, in_the_open, status, path, torch.randn(2, channels, *size)), name, seen
    )
    return seen[key]


def _hugging_face(name: str, seen: dict[str, _Answer]) -> _Answer:
    """Of a model type of transformers."""
    import transformers

    cls, configuration, changes = HUGGING_FACE[name]
    text = cls.endswith("SequenceClassification")
    models = []
    for attention in ("sdpa", "eager"):
        config = getattr(transformers, configuration)(**(TINY_TEXT if text else TINY), **changes)
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, cls)._from_config(config, attn_implementation=attention)
        models.append(_stirred(model))
    inputs: Inputs = torch.randn(2, 3, 32, 32)
    if text:
        visible = torch.arange(9) < torch.tensor([[9], [6]])  # the second text has padding
        inputs = {"input_ids": torch.randint(3, 50, (2, 9)) * visible, "attention_mask": visible.long()}
    return _compared(models[0], models[1], *_last_attention(models[0]), inputs)


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module's text does not show: number of heads, scale, kind of rotary embedding."""
    return {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}


@torch.no_grad()
def _stirred(model: nn.Module) -> nn.Module:
    """With weights that make clear maps. New models have nearly uniform ones, and zero biases, which would hide mistakes."""
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim < 2 else 1.5 / max(1, parameter[0].numel()) ** 0.5
        parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def _last_attention(model: nn.Module) -> tuple[str, str]:
    """(how it is chosen, its path), or (refused, why)."""
    try:
        tap = AttentionTap(model, -1)
    except (ValueError, NotImplementedError) as error:  # several lists of blocks, or blocks without one attention each
        paths = attentions_of(model)
        if paths:
            return BY_PATH, paths[-1]
        nothing = "no attention that calls scaled_dot_product_attention"
        return REFUSED, _reason(error) if isinstance(error, NotImplementedError) else nothing
    tap.untap()
    return EXACT, tap.paths[0]


def _compared(model: nn.Module, in_the_open: nn.Module, status: str, path: str, inputs: Inputs) -> _Answer:
    """Once both have run; and the methods, where the capture is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, why = _captured(model, in_the_open, status, path, inputs)
        if status not in (EXACT, BY_PATH):
            return status, why, {}
        try:
            found = steps(model.float(), _stirred(copy.deepcopy(model)), path, inputs)
        except Fault as fault:
            return WRONG, _reason(fault), {}
    short = {
        method: f"refused: {_reason(how[9:])}" if how.startswith("refused: ") else how for method, how in found.items()
    }
    return status, why, short


@torch.no_grad()
def _captured(model: nn.Module, in_the_open: nn.Module, status: str, path: str, inputs: Inputs) -> tuple[str, str]:
    try:
        expected = _maps(in_the_open, path, inputs)
    except Exception as error:  # of the model itself: its sizes do not fit together
        return NOT_BUILT, f"does not run small: {_reason(error)}"
    tap = AttentionTap(model, path)
    try:
        _, (call,) = _run(tap, inputs)
    except (RuntimeError, NotImplementedError) as error:
        return REFUSED, _reason(error)
    except Exception as error:
        return WRONG, f"{type(error).__name__}: {_reason(error)}"
    finally:
        tap.untap()
    if len(expected) != 1:
        return WRONG, f"captured one attention, the model computes {len(expected)}"
    found = attention_map(call)
    if expected[0].ndim == 3 and found.shape[1] == 1:  # one head, without a dimension for it
        expected[0] = expected[0][:, None]
    if found.shape != expected[0].shape:
        return WRONG, f"captured {tuple(found.shape)}, the model computes {tuple(expected[0].shape)}"
    wanted = expected[0].double()
    if not bool(wanted.isfinite().all()):
        return NOT_BUILT, "its map is not finite with random weights, so that nothing could be compared"
    if wanted.std() * wanted.shape[-1] < 0.05:
        return NOT_BUILT, "its map is uniform, so that nothing could be compared"
    if torch.allclose(found, wanted, rtol=1e-2, atol=1e-6):
        return status, ""
    if wanted.dtype != expected[0].dtype and isinstance(
        inputs, Tensor
    ):  # scores so large that float32 rounds them to other maps?
        return _captured(model.double(), in_the_open.double(), status, path, inputs.double())
    return WRONG, f"largest difference of a probability {(found - wanted).abs().max().item():.1e}"


def _run(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def attention_map(call: AttentionCall) -> Tensor:
    """[B, H, M, N]: softmax(scale · q·kᵀ + mask), in float64."""
    logits = call.query.double() @ call.key.double().mT * call.scale
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else logits + call.mask
    return logits.softmax(-1)


def _maps(model: nn.Module, path: str, inputs: Inputs) -> list[Tensor]:
    """The attention maps that the module at ``path`` computes in one forward, [B, H, M, N] each."""
    module, mode = model.get_submodule(path), _Maps()
    run = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    module.forward = watched
    try:
        _run(model, inputs)
    finally:
        del module.forward
    return mode.maps


class _Maps(TorchFunctionMode):
    """Keeps every softmax, and makes a map of every fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in (torch.softmax, Tensor.softmax, F.softmax):
            self.maps.append(output)
        elif func is F.scaled_dot_product_attention:
            query, key, _, *rest = args + tuple(kwargs[name] for name in ("query", "key", "value") if name in kwargs)
            named = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value")}
            identity = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], key.shape[-2])
            self.maps.append(func(query, key, identity, *rest, **named))
        elif func is F.multi_head_attention_forward:
            weights: Any = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]
            self.maps.append(weights)
        return output


def _reason(error: Exception | str) -> str:
    """The first sentence, without the path of this one model's module."""
    text = " ".join(str(error).split()) or type(error).__name__
    named = re.match(r"[\w.]* ?\((\w+)\): (.*)", text)
    text = f"{named[1]}: {named[2]}" if named else text
    return text.partition(". ")[0].rstrip(".")[:220]
