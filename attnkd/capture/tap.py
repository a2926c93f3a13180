"""Takes the exact query and key tensors out of a model's attention while its fused attention stays on.

The attention module of a tapped block gets a subclass of its own class, made at run time. While its forward runs under
:meth:`AttentionTap.capture`, a ``TorchFunctionMode`` sees the call of ``F.scaled_dot_product_attention`` and keeps what
enters the softmax: queries and keys after normalisation and rotary embedding, mask (or learned bias) and scale. Hooks
on ``q_norm`` and ``k_norm`` would miss the rotary embedding, hooks on ``qkv`` the norms too. At all other times, and in
all other threads, the module behaves as if it had never been touched; parameters, buffers and state_dict keys do not change.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnkd.attention.api import attention_divergence
from attnkd.attention.call import AttentionCall
from attnkd.attention.one_pass import distilled
from attnkd.capture.blocks import Blocks, attention_paths, attentions_in_words, block_owner, plain_class
from attnkd.capture.checkpointing import saved_tensors_are_hooked
from attnkd.capture.hand_out import hand_out
from attnkd.capture.multihead import multi_head_attention
from attnkd.capture.outputs import NO_DATA_PARALLEL
from attnkd.capture.sdpa import attention_and_lse
from attnkd.capture.tokens import BlockLayout, block_layout, input_images

Wanted = AttentionCall | Tensor | Callable[[AttentionCall], Any] | tuple[AttentionCall | Tensor, Mapping[str, Any]]
"""What a tapped attention is compared with while it runs, see :meth:`AttentionTap.distil`."""
_Compared = tuple[Any, Mapping[str, Any]]


class AttentionTap(nn.Module):
    """Runs a model and returns its output together with the attention calls of some of its blocks.

    Wrap ``torch.compile``, DistributedDataParallel or FSDP around the tap, not inside it: what was captured is part of
    what its forward returns.

    Args:
        model: any module whose tapped attentions call ``F.scaled_dot_product_attention`` once per forward on
            [B, H, N, D] tensors: timm Vision Transformers, Hugging Face models with ``attn_implementation='sdpa'``.
        blocks: which attentions. An index of a block or a sequence of them (negative counts from the end),
            'all', or a module path such as 'layers.11.attention' or a sequence of them, in the order wanted.
        stop: end the model's forward as soon as everything asked for is captured, before that block's softmax; the
            output is then None. The captured tensors are bit-identical to those of a full forward.
        values: keep the values too, for losses on them (:mod:`attnkd.methods.minilm`). Not without such a loss: under
            DistributedDataParallel everything captured must get a gradient.

    Raises:
        TypeError: not a module, or one that cannot be tapped from outside (compiled, data parallel).
        ValueError: blocks out of range, repeated, ambiguous or not found.
        NotImplementedError: a kind of attention that is not a softmax over tokens of query-key products.

    Example::

        tap = AttentionTap(timm.create_model("vit_small_patch16_224"), blocks=-1)
        output, (call,) = tap(images)       # call.query [B, H, N, D], call.key, call.mask, call.scale, call.grid
    """

    def __init__(self, model: nn.Module, blocks: Blocks = -1, stop: bool = False, values: bool = False) -> None:
        super().__init__()
        _check_model(model)
        self.model = model
        self.paths = attention_paths(model, blocks)
        self.owners = {path: block_owner(model, path) for path in self.paths}
        self.stop, self.values = stop, values
        self._switched_on: list[str] = []
        self._tap()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, list[AttentionCall]]:
        """Call the model with these arguments.

        Returns:
            The model's output (None with ``stop``) and one :class:`AttentionCall` per tapped attention, in block order.

        Raises:
            RuntimeError: a tapped attention made no SDPA call, or the gradient of its queries was cut off.
            NotImplementedError: a call whose queries and keys do not tell the attention; see docs/capture.md.
        """
        return self.capture(self.model, *args, **kwargs)

    def capture(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[AttentionCall]]:
        """The same for another entry into the model: ``tap.capture(tap.model.forward_features, images)``."""
        output, calls, _ = self._run(function, args, kwargs, None)
        return output, calls

    def distil(
        self,
        teacher: Sequence[Wanted] | AttentionCall,
        *args: Any,
        function: Callable[..., Any] | None = None,
        **options: Any,
    ) -> tuple[Any, list[AttentionCall], list[Any]]:
        """Call the model; its tapped attentions compute their divergence from the teacher's on the way.

        Each tapped attention calls :func:`attnkd.attention_with_divergence` in place of ``F.scaled_dot_product_attention``: same
        output, and the divergence comes with it. Where saved tensors are hooked (a checkpointed block runs twice, and the second time
        without its teacher) the divergence is computed after the forward instead, to the same numbers.

        Args:
            teacher: what each tapped attention is compared with, in the order of ``paths`` (of one attention also without a list): a
                captured call, or probabilities; or
                (one of them, options for this attention in place of ``options``). Or a function, for what is not one
                divergence of all heads: it is called with the attention's own call and its result is handed on; ``options`` are not its.
            args: what the model is called with.
            function: another entry into the model, such as ``tap.model.forward_features``.
            options: rows, merge, divergence, temperature, row_weight, reduction, impl; see
                :func:`attnkd.attention_with_divergence`.

        Returns:
            What :meth:`forward` returns, and one divergence per tapped attention.

        Raises:
            ValueError: another number of teacher calls than of tapped attentions.
        """
        if isinstance(teacher, AttentionCall):  # a tuple too, whose length says nothing
            teacher = [teacher]
        if not isinstance(teacher, (Sequence, Tensor)):
            raise TypeError(
                f"teacher: expected a sequence, one for each tapped attention, got {type(teacher).__name__}"
            )
        if len(teacher) != len(self.paths):
            raise ValueError(
                f"teacher: expected {len(self.paths)}, one for each tapped attention ({', '.join(self.paths)}), got {len(teacher)}"
            )
        wanted: list[Any] = [entry if type(entry) is tuple else (entry, options) for entry in teacher]
        return self._run(self.model if function is None else function, args, {}, wanted)

    def _run(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], wanted: list[_Compared] | None
    ) -> tuple[Any, list[AttentionCall], list[Any]]:
        attentions: list[Any] = [self.model.get_submodule(path) for path in self.paths]
        for path, attention in zip(self.paths, attentions, strict=True):
            if not isinstance(attention, _Tapped):
                raise RuntimeError(f"{path}: no longer tapped, untap() was called; make a new AttentionTap")
            if attention._armed.slot is not None:
                raise RuntimeError(f"{path}: its tap was entered again while a forward through it is running")
        _refuse_padding(function, args, kwargs)
        calls: list[AttentionCall | None] = [None] * len(attentions)
        losses: list[Any] = [None] * len(attentions)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters())
        images = input_images(args, kwargs)
        output = None
        try:
            for index, (path, attention) in enumerate(zip(self.paths, attentions, strict=True)):
                layout = functools.partial(self._with_layout, path, images=images)
                compared = None if wanted is None else wanted[index]
                attention._armed.slot = _Slot(
                    calls, losses, index, self.stop, self.values, trains, path, layout, compared
                )
            output = function(*args, **kwargs)
        except _Stop:
            pass
        finally:
            for attention in attentions:
                attention._armed.slot = None
        captured = []
        for path, call in zip(self.paths, calls, strict=True):
            if call is None:
                raise RuntimeError(
                    f"{path} ({plain_class(self.model.get_submodule(path)).__name__}): made no call of "
                    "F.scaled_dot_product_attention, so there are no queries and keys to take. Hugging Face models need "
                    "attn_implementation='sdpa'; torch.nn.TransformerEncoderLayer calls none in evaluation without gradients, unless "
                    "torch.backends.mha.set_fastpath_enabled(False); a block that layer drop skipped cannot be tapped. The model's "
                    f"attentions are {attentions_in_words(self.model)}"
                )
            captured.append(call)
        if wanted is None:
            return output, captured, []
        for index, (call, compared) in enumerate(zip(captured, wanted, strict=True)):
            if losses[index] is None:
                losses[index] = _beside(call, *compared)
        return output, captured, losses

    def untap(self) -> nn.Module:
        """Give the attention modules their own classes back and return the model as it was before."""
        for path in self.paths:
            attention: Any = self.model.get_submodule(path)
            if isinstance(attention, _Tapped):
                attention.__class__ = plain_class(attention)
                attention.__dict__.pop("_armed", None)
            if path in self._switched_on:
                attention.fused_attn = False
        self._switched_on = []
        return self.model

    close = untap

    def extra_repr(self) -> str:
        return f"paths={self.paths}, stop={self.stop}"

    def _with_layout(self, path: str, call: AttentionCall, images: Tensor | None) -> AttentionCall:
        """The call, with what its tokens are. A single row over all tokens is the class token's in class attention, else unknown."""
        attention = self.model.get_submodule(path)
        if images is not None and call.query.shape[0] < images.shape[0]:
            raise NotImplementedError(
                f"{path} ({plain_class(attention).__name__}): ran on {call.query.shape[0]} of {images.shape[0]} images, and which "
                "is unknown. Stochastic depth of this kind cannot be tapped: build the model with drop_path_rate=0"
            )
        owner = self.model.get_submodule(self.owners[path])
        layout = block_layout(owner, images, call.key.shape[0], call.key.shape[2])
        own_rows = call.query.shape[2] == call.key.shape[2]
        if not own_rows and plain_class(attention).__name__ != "ClassAttn":
            layout = BlockLayout()
        # Not call._replace: torch.compile of torch 2.11 cannot make the tuple that comes of it.
        return AttentionCall(*call[:4], layout.num_prefix_tokens, layout.has_cls, layout.grid, *call[7:])

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise NotImplementedError(f"AttentionTap: {NO_DATA_PARALLEL}")

    def _tap(self) -> None:
        for path in self.paths:
            attention: Any = self.model.get_submodule(path)
            if getattr(attention, "fused_attn", None) is False:  # it has an SDPA path, switched off
                attention.fused_attn = True
                self._switched_on.append(path)
            if not isinstance(attention, _Tapped):
                attention.__class__ = _tapped_class(attention.__class__)
                attention._armed = _Armed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tap()  # the modules of a copied or unpickled tap have their plain classes, see _Tapped.__reduce_ex__


class _Stop(Exception):
    """Ends a model's forward once everything is captured; never leaves AttentionTap."""


class _Slot(NamedTuple):
    """What a tapped attention must know during one forward of its tap."""

    calls: list[AttentionCall | None]
    losses: list[Any]
    position: int
    stop: bool
    values: bool
    trains: bool
    path: str
    layout: Callable[[AttentionCall], AttentionCall]
    compared: _Compared | None


class _Armed(threading.local):
    """The slot of a tapped attention in this thread: another thread may run the same model at the same time."""

    def __init__(self) -> None:
        self.slot: _Slot | None = None  # not on the class: torch.compile must find it on the object, in every thread


class _CatchSDPA(TorchFunctionMode):
    def __init__(self, attention: _Tapped, slot: _Slot, num_tokens: int | None) -> None:
        super().__init__()
        self.attention, self.slot, self.num_tokens = attention, slot, num_tokens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention._on_sdpa(self.slot, self.num_tokens, *args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:  # its own SDPA call is out of this mode's sight
            attend = functools.partial(self.attention._on_sdpa, self.slot, None)
            return multi_head_attention(attend, self.slot.path, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Tapped:
    """Mixed into the class of a tapped attention module, see _tapped_class."""

    _plain_class: type[nn.Module]
    _armed: _Armed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not forward: accelerate and others put a forward of their own on the instance, which hides that of a class.
        return self._caught(super().__call__, *args, **kwargs)  # type: ignore[misc]

    def _caught(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        slot = self._armed.slot
        if slot is None:  # evaluation, EMA, the second run of a checkpointed block, another thread: not ours
            return call(*args, **kwargs)
        tokens = args[0] if args else None
        with _CatchSDPA(self, slot, tokens.shape[1] if isinstance(tokens, Tensor) and tokens.ndim == 3 else None):
            return call(*args, **kwargs)

    def _on_sdpa(
        self,
        slot: _Slot,
        num_tokens: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        who, reason = f"{slot.path} ({plain_class(self).__name__})", None
        windows = query.ndim == key.ndim == 5 and attn_mask is None and getattr(self, "use_mask_unit_attn", False)
        if slot.calls[slot.position] is not None:
            reason = (
                "it calls scaled_dot_product_attention more than once in a forward, or the model runs it more than once"
            )
        elif is_causal:
            reason = "is_causal=True is not supported"
        elif (query.ndim != 4 or key.ndim != 4) and not windows:
            reason = f"expected [B, H, N, D] query and key, got {tuple(query.shape)} and {tuple(key.shape)}"
        elif enable_gqa or query.shape[1] != key.shape[1]:
            reason = f"grouped-query attention ({query.shape[1]} query and {key.shape[1]} key heads) is not supported"
        elif num_tokens is not None and num_tokens not in (query.shape[2:-1].numel(), key.shape[2:-1].numel()):
            reason = (
                f"neither query {tuple(query.shape)} nor key {tuple(key.shape)} runs over its {num_tokens} input tokens"
            )
        if reason is not None:
            raise NotImplementedError(f"{who}: {reason}")
        if slot.trains and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{who}: its query has no gradient, because the block runs without gradients inside a forward that has "
                "them. Reentrant activation checkpointing does this: use use_reentrant=False (in timm: "
                "set_reentrant_ckpt(False)). To capture without gradients, call the tap under torch.no_grad()"
            )
        device = query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # SDPA casts below Python: what enters is what it casts to. It leaves float64 as it is.
            dtype = torch.get_autocast_dtype(device)
            query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
            if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float64):
                attn_mask = attn_mask.to(dtype)
        softmax_scale = query.shape[-1] ** -0.5 if scale is None else scale
        teacher, options = (None, {}) if slot.compared is None else slot.compared
        hooked = saved_tensors_are_hooked()
        inside = slot.compared is not None and not callable(teacher) and not hooked and not windows
        captured, first_row = query, None
        if not inside and not windows:
            query, captured, row = hand_out(query)
            first_row = None if row is None else (captured, row)
        tokens: tuple[Any, ...] = (captured, key, value if slot.values else None)
        if windows:  # [B, H, W, N, D] in Hiera: they go into the batch, those of an image one after the other
            tokens = tuple(None if x is None else x.transpose(1, 2).flatten(0, 1) for x in tokens)
        queries, keys, values = tokens
        call = slot.layout(AttentionCall(queries, keys, attn_mask, softmax_scale, first_row=first_row, value=values))
        slot.calls[slot.position] = call
        if slot.stop and all(call is not None for call in slot.calls):
            raise _Stop
        if not inside:
            if windows:
                output, lse = F.scaled_dot_product_attention(query, key, value, None, dropout_p, scale=scale), None
            else:
                output, lse = attention_and_lse(query, key, value, attn_mask, dropout_p, scale)
            slot.calls[slot.position] = call = AttentionCall(*call[:7], lse, *call[8:])
            if callable(teacher) and not hooked:
                slot.losses[slot.position] = teacher(call)
            return output
        output, slot.losses[slot.position] = distilled(
            call, [query, key, value], teacher, dropout_p=dropout_p, pack=True, **options
        )
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles have the plain class: an EMA copy is an ordinary model, a pickle loads without attnkd."""
        reduced: Any = super().__reduce_ex__(1)  # protocol 1 names the class in the first argument of the rebuilder
        rebuild, args, state = reduced
        return rebuild, (plain_class(self), *args[1:]), {k: v for k, v in state.items() if k != "_armed"}


@functools.cache
def _tapped_class(plain: Any) -> type[nn.Module]:
    names: dict[str, Any] = {"_plain_class": plain, "__module__": plain.__module__}
    if hasattr(plain, "forward_list"):  # DINOv3's blocks do not call their attention but this
        names["forward_list"] = lambda self, *args, **kwargs: self._caught(
            functools.partial(plain.forward_list, self), *args, **kwargs
        )
    return type(f"Tapped{plain.__name__}", (_Tapped, plain), names)


def _beside(call: AttentionCall, teacher: Any, options: Mapping[str, Any]) -> Any:
    """What a comparison that did not happen inside the attention would have returned."""
    if callable(teacher):
        return teacher(call)
    if isinstance(teacher, Tensor):
        return attention_divergence(call, teacher_probs=teacher, **options)
    return attention_divergence(call, teacher, **options)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, AttentionTap):
            where = f"at {path!r}" if path else "itself"
            raise TypeError(
                f"model: expected a model, got {type(model).__name__} that has an AttentionTap {where}; tap its model (tap.model), "
                "once for all blocks"
            )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model: wrap {type(model).__name__} around the AttentionTap, not the tap around it")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "model: is compiled; wrap torch.compile around the AttentionTap instead (a training task has task.compile())"
        )


def _refuse_padding(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Padded patches of a NaFlex batch: their rows are no attention, and their columns differ from image to image."""
    valid = kwargs.get("patch_valid")
    if valid is None and args and isinstance(args[0], dict):
        valid = args[0].get("patch_valid")
    if valid is None and len(args) > 1:
        target = function.forward if isinstance(function, nn.Module) else function
        valid = dict(zip(inspect.signature(target).parameters, args, strict=False)).get("patch_valid")
    if valid is not None and not bool(valid.all()):
        raise NotImplementedError(
            "patch_valid: the batch has padded patches, whose rows are not attention; batch images of one patch grid"
        )
