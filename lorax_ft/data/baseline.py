"""The baseline a fine-tuned text classifier has to beat: TF-IDF with logistic regression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Labelled = tuple[Sequence[str], Sequence[str]]  # texts, and the label of each


def tfidf_baseline(train: Labelled, test: Labelled) -> float:
    """Accuracy on `test` of a logistic regression on words and word pairs, trained on `train`.

    Meant to be strong: sublinear counts, one- and two-word terms, one classifier a class, and the
    regularisation chosen by cross-validation on the training rows. Takes seconds for thousands of
    sentences. Raises ValueError where texts and labels are not of one length.

    >>> weather = (["rain and wind", "a cold wind", "rain again"] * 3, ["weather"] * 9)
    >>> food = (["bread and cheese", "a warm soup", "cheese again"] * 3, ["food"] * 9)
    >>> both = (weather[0] + food[0], weather[1] + food[1])
    >>> tfidf_baseline(both, (["wind and rain", "soup and bread"], ["weather", "food"]))
    1.0
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import Pipeline

    for name, (texts, labels) in {"train": train, "test": test}.items():
        if len(texts) != len(labels):
            raise ValueError(f"{name} has {len(texts)} texts and {len(labels)} labels.")
    terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    classes = OneVsRestClassifier(LogisticRegression(solver="liblinear", dual=True, random_state=0))
    search = GridSearchCV(
        Pipeline([("terms", terms), ("classes", classes)]),
        {"classes__estimator__C": [1.0, 3.0, 10.0, 30.0, 100.0]},
        cv=KFold(3, shuffle=True, random_state=0),
    )
    predictions = search.fit(list(train[0]), list(train[1])).predict(list(test[0]))
    return float(np.mean(predictions == np.array(test[1])))
