"""Scores of a frozen backbone: k-NN and linear probe on its class token, and the attention of the class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.api import attention_rows
from attnkd.attention.call import class_row
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.capture.models import cls_features
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import patch_grid, token_layout


@torch.no_grad()
def features(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Normalised class tokens [n, D] of a timm model for images [n, C, H, W]; the model is left in evaluation mode."""
    model.eval()
    run = model.forward_features
    return torch.cat([cls_features(model, run(batch)) for batch in images.split(batch_size)])  # type: ignore[operator]


def knn_top1(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in percent of the weighted k-NN classifier used for DINO.

    The k training features nearest in cosine vote for their labels with weight exp(cosine / temperature).

    Args:
        train_features: [n, D]. train_labels: [n]. test_features: [m, D]. test_labels: [m]. Features of any dtype are
            compared in float32.
    """
    test, train = (F.normalize(vectors.float(), dim=1) for vectors in (test_features, train_features))
    similarity = test @ train.T
    nearest, index = similarity.topk(min(k, len(train_features)), dim=1)
    votes = torch.zeros(len(test_features), int(train_labels.max()) + 1, device=test_features.device)
    votes.scatter_add_(1, train_labels[index], (nearest / temperature).exp())
    return 100 * (votes.argmax(1) == test_labels).float().mean().item()


def linear_probe(train_features: Tensor, train_labels: Tensor) -> nn.Linear:
    """A logistic regression on standardised features, fitted in float64, as one float64 layer: [n, D] → [n, classes].

    Args:
        train_features: [n, D]. train_labels: [n], every class of 0 … classes − 1 among them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardised = scaler.fit_transform(train_features.double().cpu().numpy())
    fitted = LogisticRegression(max_iter=2000).fit(standardised, train_labels.cpu().numpy())
    weight = torch.from_numpy(fitted.coef_ / scaler.scale_)
    bias = torch.from_numpy(fitted.intercept_) - weight @ torch.from_numpy(scaler.mean_)
    if len(weight) == 1:  # of two classes scikit-learn scores the second alone
        weight, bias = (torch.cat([torch.zeros_like(values), values]) for values in (weight, bias))
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer.to(train_features.device).requires_grad_(False)


def linear_probe_top1(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Top-1 accuracy in percent of :func:`linear_probe`; arguments as in :func:`knn_top1`."""
    scores = linear_probe(train_features, train_labels)(test_features.double())
    return 100 * (scores.argmax(1) == test_labels).double().mean().item()


@torch.no_grad()
def cls_attention(
    model: nn.Module,
    images: Tensor,
    temperature: float,
    grid: tuple[int, int] | None = None,
    resample_mode: str = "bicubic",
) -> Tensor:
    """The class token's attention in the last block, heads merged by 'logsum'.

    Args:
        model: timm Vision Transformer with a class token; left in evaluation mode.
        images: [n, C, H, W].
        temperature: of the merge.
        grid: resize every head's row to this (height, width) in patches before merging, as AttnDistill does.
        resample_mode: how, see :func:`attnkd.resample_attention`.

    Returns:
        [n, 1 + patches]: entry 0 is the class token itself, the rest the patches in row-major order; sums to 1.
    """
    model.eval()
    prefix = token_layout(model).num_prefix_tokens
    _, (call,) = AttentionTap(model, stop=True)(images)
    own_grid = patch_grid(model, (images.shape[-2], images.shape[-1]), call.key.shape[2] - prefix)
    row = class_row(call, prefix)
    rows = attention_rows(row.query, row.key, scale=row.scale, mask=row.mask)
    rows = resample_attention(rows, own_grid, grid or own_grid, resample_mode)
    return merge_attention(rows, "logsum", temperature)[:, 0, 0]


def attention_divergence_per_image(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention rows [n, keys] → [n], in nats."""
    return F.kl_div(student.log(), teacher, reduction="none").sum(-1)
