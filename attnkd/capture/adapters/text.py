"""Text encoders of Hugging Face transformers, read off their configuration; nothing of the library is imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, TokenLayout

_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert")
_KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


class TextEncoder(Adapter):
    """An encoder, or one with a head. Every token is compared; those of padding are left out by the attention's own mask."""

    family = f"text encoders of transformers ({', '.join(_TYPES)}; HeadKD and MiniLM)"

    def takes(self, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) not in _TYPES or getattr(config, "is_decoder", False):
            return False
        return any(
            base.__module__.startswith("transformers.models.") and base.__name__.endswith(_KINDS)
            for base in type(model).__mro__
        )

    def refuses(self, model: nn.Module) -> str | None:
        config: Any = getattr(model, "config", None)
        decodes = getattr(config, "model_type", None) in _TYPES and getattr(config, "is_decoder", False)
        return "it is a decoder (is_decoder=True), and causal attention is not compared" if decodes else None

    def vocabulary(self, model: nn.Module) -> int | None:
        return model.config.vocab_size  # type: ignore[union-attr, return-value]

    def no_weight_decay(self, model: nn.Module) -> set[str]:
        """None: position embeddings of text are trained with weight decay, as word embeddings are."""
        return set()

    def layout(self, model: nn.Module) -> TokenLayout:
        return TokenLayout(0, False, model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def window(self, model: nn.Module, path: str) -> str | None:
        reach = getattr(model.get_submodule(path), "sliding_window", None)
        return None if reach is None else f"those within {reach}"

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """What the tokenizer gave, without what this model does not take (``token_type_ids`` of DistilBERT) → scores or tokens."""
        known = inspect.signature(model.forward).parameters
        output = model(**{name: value for name, value in inputs.items() if name in known})
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    def run(self, model: nn.Module, inputs: Any, train_head: bool) -> tuple[Tensor, Tensor | None]:
        """The output alone: no method compares the final tokens."""
        output = self.forward(model, inputs)
        return output, output

    def num_classes(self, model: nn.Module) -> int | None:
        kind = type(model).__name__
        return model.config.num_labels if kind.endswith("Classification") else None if kind.endswith("LM") else 0  # type: ignore[union-attr, return-value]


def is_text(inputs: object) -> bool:
    """Whether inputs are what a tokenizer gives: tensors by name, in place of images."""
    return isinstance(inputs, Mapping)
