"""What is made small: for each target the sum over the scans of a batch whose label is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from finetune.heads import Head


def class_weights(head: Head, labels: np.ndarray, *, balanced: bool) -> np.ndarray:
    """Return the weight of each class, float32 (class,), that of a scan being 1 on average; of values ones (1,).

    Parameters
    ----------
    labels
        float32 (scan,), encoded ones of the scans trained on, NaN where unknown.
    """
    if not head.labels:
        return np.ones(1, np.float32)
    counts = np.bincount(labels[~np.isnan(labels)].astype(np.int64), minlength=len(head.labels))
    if not balanced:
        return np.ones(len(counts), np.float32)
    weights: np.ndarray = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return weights.astype(np.float32)


def scan_weights(head: Head, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return what each scan counts, float32 (scan,): the weight of its class, 0 where its label is unknown."""
    known = ~np.isnan(labels)
    codes = np.where(known, labels, 0).astype(np.int64) if head.labels else np.zeros(len(labels), np.int64)
    return np.where(known, weights[codes], 0).astype(np.float32)


def loss_sums(
    outputs: torch.Tensor, heads: Sequence[Head], columns: Sequence[slice], labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of the losses of each target, float32 (target,).

    Cross-entropy of classes; of an ordinal target the mean over its steps of that of being above; the squared error of
    values, in standard deviations.

    Parameters
    ----------
    outputs
        float32 (scan, output).
    labels
        float32 (scan, target), see `Head.encode`.
    weights
        float32 (scan, target), 0 where a label does not count.
    """
    sums = []
    for number, (head, place) in enumerate(zip(heads, columns, strict=True)):
        counts = weights[:, number]
        label = torch.where(counts > 0, labels[:, number], 0.0)  # NaN times 0 would be NaN
        loss = (scan_losses(outputs[:, place], head, label) * counts).sum()
        sums.append(loss)
    return torch.stack(sums)


def scan_losses(outputs: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each scan, (scan,), of outputs (scan, output) and encoded labels (scan,) without NaN."""
    if head.task == "binary":
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")
    if head.task == "multiclass":
        return functional.cross_entropy(outputs, labels.long(), reduction="none")
    if head.task == "ordinal":
        steps = torch.arange(head.outputs, device=labels.device)
        above = (labels[:, None] > steps).to(outputs.dtype)
        return functional.binary_cross_entropy_with_logits(outputs, above, reduction="none").mean(dim=1)
    return (outputs[:, 0] - labels) ** 2
