"""Metrics: equal to scikit-learn's, additive over batches, plain where a model has collapsed."""

import math

import numpy as np
import pytest
import sklearn.metrics

from lorax_ft import evaluation

# Both sides sum the same few hundred counts in float64.
CLOSE = {"rel": 1e-12, "abs": 1e-12}


def draw(classes, count=200, seed=0, skew=1.0):
    """Labels and predictions that agree more often than chance."""
    random = np.random.default_rng(seed)
    chances = random.dirichlet([skew] * classes)
    labels = random.choice(classes, count, p=chances)
    guesses = random.choice(classes, count, p=chances)
    return labels, np.where(random.random(count) < 0.6, labels, guesses)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_scikit_learn(classes, seed):
    labels, predictions = draw(classes, seed=seed, skew=0.7)

    counts = evaluation.count_outcomes(labels, predictions, classes)

    expected = {
        evaluation.accuracy: sklearn.metrics.accuracy_score(labels, predictions),
        evaluation.macro_f1: sklearn.metrics.f1_score(labels, predictions, average="macro"),
        evaluation.matthews: sklearn.metrics.matthews_corrcoef(labels, predictions),
    }
    for metric, value in expected.items():
        assert metric(counts) == pytest.approx(value, **CLOSE), metric.__name__
    assert np.array_equal(
        counts, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(classes))
    )


@pytest.mark.parametrize("positive", [0, 1])
def test_binary_f1_is_that_of_scikit_learn(positive):
    labels, predictions = draw(2)
    counts = evaluation.count_outcomes(labels, predictions, 2)

    expected = sklearn.metrics.f1_score(labels, predictions, pos_label=positive)

    assert evaluation.binary_f1(counts, positive) == pytest.approx(expected, **CLOSE)


def test_a_weighted_count_is_that_of_scikit_learn():
    labels, predictions = draw(3)
    weights = np.random.default_rng(1).random(len(labels))

    counts = evaluation.count_outcomes(labels, predictions, 3, weights)

    expected = sklearn.metrics.matthews_corrcoef(labels, predictions, sample_weight=weights)
    assert evaluation.matthews(counts) == pytest.approx(expected, **CLOSE)


def test_counts_of_batches_add_up_and_filled_rows_count_nothing():
    labels, predictions = draw(3)
    filled = np.where(np.arange(200) < 150, labels, -100)

    whole = evaluation.count_outcomes(labels[:150], predictions[:150], 3)
    parts = [
        evaluation.count_outcomes(filled[s : s + 50], predictions[s : s + 50], 3)
        for s in range(0, 200, 50)
    ]
    by_weight = evaluation.count_outcomes(labels, predictions, 3, np.arange(200) < 150)

    assert np.array_equal(sum(parts), whole)
    assert np.array_equal(by_weight, whole)


@pytest.mark.parametrize(("labels", "predictions"), [([0, 1], [1, 1]), ([1, 1], [0, 1])])
def test_matthews_is_zero_where_one_side_has_one_class(labels, predictions):
    assert evaluation.matthews(evaluation.count_outcomes(labels, predictions, 2)) == 0


def test_metrics_of_nothing_are_not_a_number():
    counts = evaluation.count_outcomes([], [], 2)

    assert math.isnan(evaluation.accuracy(counts))
    assert math.isnan(evaluation.macro_f1(counts))
    assert math.isnan(evaluation.mean_loss(0.0, 0.0))
    assert evaluation.binary_f1(counts) == 0


def test_perplexity_is_the_exponential_of_the_loss():
    assert evaluation.perplexity(math.log(10)) == pytest.approx(10)
    assert evaluation.perplexity(1e4) == math.inf


def test_loss_is_that_of_scikit_learn():
    labels = np.array([0, 1, 1])
    chances = np.array([[0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])
    losses = -np.log(chances[np.arange(3), labels])

    metrics = evaluation.classification_metrics(
        evaluation.count_outcomes(labels, chances.argmax(axis=1), 2), losses.sum(), 3
    )

    assert metrics["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, chances), **CLOSE)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 2], [0, 1], "labels go from 0 to 2, and there are 2 classes"),
        ([0, 1], [0, -1], "predictions go from -1 to 0"),
        ([0, 1], [0], "differ in shape"),
    ],
)
def test_a_class_out_of_range_is_named(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        evaluation.count_outcomes(labels, predictions, 2)


def test_a_collapsed_classifier_is_told_with_its_class():
    assert "one class, 'b': the model has collapsed" in evaluation.collapsed([1] * 5, ("a", "b"))
    assert "one class, number 1" in evaluation.collapsed([1] * 5)
    assert evaluation.collapsed([0, 1]) is None
    assert evaluation.collapsed([]) is None
    assert evaluation.collapsed([1]) is None  # of one prediction nothing can be said


def test_every_task_has_its_metrics():
    counts = evaluation.count_outcomes([0, 1], [0, 1], 2)

    classified = evaluation.METRICS["sequence_classification"](counts, 1.0, 2.0)
    modelled = evaluation.METRICS["causal_lm"](1.0, 4.0, 2.0)

    assert classified == {"accuracy": 1, "f1_macro": 1, "matthews": 1, "loss": 0.5, "f1": 1}
    assert modelled == {"loss": 2.0, "perplexity": math.exp(2.0), "accuracy": 0.5}


def test_more_than_two_classes_have_no_binary_f1():
    assert "f1" not in evaluation.classification_metrics(np.eye(3), 0.0, 3.0)


def test_a_table_has_a_column_for_each_metric_of_any_row():
    table = evaluation.metrics_table({"a": {"loss": 1.0}, "b": {"accuracy": 0.5, "loss": 2.0}})

    lines = [line.split() for line in table.splitlines()]
    assert lines == [["loss", "accuracy"], ["a", "1.0000"], ["b", "2.0000", "0.5000"]]
