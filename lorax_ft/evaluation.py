"""Metrics: pure functions of counts and sums that batches, shards and processes can add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

IGNORED = -100  # a label that is not scored
MODES = ("max", "min")  # whether more or less of a metric is better
LESS_IS_BETTER = ("loss", "perplexity")


def sign_of(metric: str, mode: str | None = None) -> int:
    """1 where more of a metric is better, -1 where less is; by its name where `mode` is None.

    >>> sign_of("accuracy"), sign_of("validation.loss"), sign_of("loss", "max")
    (1, -1, 1)
    """
    if mode is None:
        return -1 if metric.rpartition(".")[2] in LESS_IS_BETTER else 1
    return 1 if mode == "max" else -1


def count_outcomes(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: int, weights: npt.ArrayLike = 1.0
) -> np.ndarray:
    """How much weight of each class was predicted as each class: `counts[label, prediction]`.

    Labels, predictions and weights are of one shape (or broadcast to it); a label of -100 is left
    out. Counts of several batches add up. Raises ValueError for a class that is out of range.

    >>> count_outcomes([0, 1, 1, -100], [0, 1, 0, 1], classes=2).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(
            f"labels {list(labels.shape)} and predictions {list(predictions.shape)} differ in "
            "shape."
        )
    scored = labels != IGNORED
    weights = np.broadcast_to(weights, labels.shape)[scored]
    labels, predictions = labels[scored], predictions[scored]
    for name, values in {"labels": labels, "predictions": predictions}.items():
        if values.size and (values.min() < 0 or values.max() >= classes):
            raise ValueError(
                f"{name} go from {values.min()} to {values.max()}, and there are {classes} classes."
            )
    cells = (labels * classes + predictions).astype(np.int64)
    return np.bincount(cells, weights, classes * classes).reshape(classes, classes)


def accuracy(counts: np.ndarray) -> float:
    """The share of predictions that are right."""
    return _ratio(np.trace(counts), counts.sum())


def f1_per_class(counts: np.ndarray) -> np.ndarray:
    """F1 of each class `[classes]`; NaN for one that is neither a label nor a prediction."""
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return 2 * np.diagonal(counts) / occurrences


def macro_f1(counts: np.ndarray) -> float:
    """The mean F1 of the classes that occur as a label or a prediction."""
    scores = f1_per_class(counts)
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if present.size else math.nan


def binary_f1(counts: np.ndarray, positive: int = 1) -> float:
    """F1 of the class `positive`; 0 where it neither occurs nor is predicted."""
    return float(np.nan_to_num(f1_per_class(counts)[positive]))


def matthews(counts: np.ndarray) -> float:
    """Matthews' correlation of labels and predictions, for any number of classes (Gorodkin 2004).

    0 where all labels or all predictions are of one class.
    """
    labelled, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    covariance = np.trace(counts) * total - labelled @ predicted
    spread = (total**2 - labelled @ labelled) * (total**2 - predicted @ predicted)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def mean_loss(loss_sum: float, weight_sum: float) -> float:
    """The loss of all that was scored; NaN where nothing was."""
    return _ratio(loss_sum, weight_sum)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def collapsed(predictions: npt.ArrayLike, label_names: Sequence[str] = ()) -> str | None:
    """What to tell the user of a classifier that predicts one class only; None for any other.

    >>> print(collapsed([1, 1, 1], label_names=("no", "yes")))
    All 3 predictions are of one class, 'yes': the model has collapsed. Lower the learning rate, \
lengthen the warm-up, or look at how unequal the classes are.
    >>> collapsed([0, 1, 1]) is None
    True
    """
    predictions = np.ravel(np.asarray(predictions))
    classes = np.unique(predictions)
    if len(predictions) < 2 or len(classes) > 1:
        return None
    name = repr(label_names[classes[0]]) if len(label_names) else f"number {classes[0]}"
    return (
        f"All {len(predictions):,} predictions are of one class, {name}: the model has collapsed. "
        "Lower the learning rate, lengthen the warm-up, or look at how unequal the classes are."
    )


def classification_metrics(
    counts: np.ndarray, loss_sum: float, weight_sum: float
) -> dict[str, float]:
    """Accuracy, F1 (macro; of the second class where there are two), Matthews, loss."""
    metrics = {
        "accuracy": accuracy(counts),
        "f1_macro": macro_f1(counts),
        "matthews": matthews(counts),
        "loss": mean_loss(loss_sum, weight_sum),
    }
    return metrics | ({"f1": binary_f1(counts)} if len(counts) == 2 else {})


def language_model_metrics(correct: float, loss_sum: float, weight_sum: float) -> dict[str, float]:
    """Loss a token, perplexity, and the share of tokens that were the likeliest."""
    loss = mean_loss(loss_sum, weight_sum)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": _ratio(correct, weight_sum),
    }


METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "sequence_classification": classification_metrics,
    "token_classification": classification_metrics,
    "masked_lm": language_model_metrics,
    "causal_lm": language_model_metrics,
    "seq2seq_lm": language_model_metrics,
}


def metrics_table(results: dict[str, dict[str, float]]) -> str:
    """Metrics by split (or run) as lines of text, a column for each metric.

    >>> print(metrics_table({"validation": {"accuracy": 0.9}, "test": {"accuracy": 0.875}}))
                accuracy
    validation    0.9000
    test          0.8750
    """
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    first = max(map(len, results), default=0)
    widths = [max(len(name), 8) for name in names]
    lines = ["  ".join([" " * first, *(n.rjust(w) for n, w in zip(names, widths))])]
    for row, metrics in results.items():
        cells = [f"{metrics[n]:.4f}" if n in metrics else "" for n in names]
        lines.append("  ".join([row.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths))]))
    return "\n".join(line.rstrip() for line in lines)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
