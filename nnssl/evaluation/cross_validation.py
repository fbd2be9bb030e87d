"""Cross-validated logistic regression of cases, and the area under the ROC curve (AUC) with its interval.

The cases of a patient are always in the same fold. The strength of the regularisation is chosen inside the training part of
every fold, by a cross-validation that keeps patients together as well.

Scores of different folds come from different fits, so only cases of the same fold are compared: the AUC is the share of pairs
of a positive and a negative case of the same fold in which the positive case has the higher score (half for ties), over all
folds of several divisions. If scores were pooled over the folds, features without information would have an AUC below 0.5
(Parker et al., Stratification bias in low signal microarray studies, BMC Bioinformatics 8, 2007), because a class that is
rarer in a test part is more frequent in its training part.

Source: logistic regression and ``StratifiedGroupKFold`` are scikit-learn's; AUC as in Hanley and McNeil, Radiology 143, 1982;
percentile bootstrap over patients (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from nnssl.draws import draw_seed

REPEATS = 5
"""Number of divisions into folds, so that the result depends less on one of them."""
MANY_CASES = 1000
"""Number of cases from which one division is enough; fits would take long otherwise."""
INNER_FOLDS = 4
"""Largest number of folds inside a training part."""
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Values of scikit-learn's ``C`` to choose from, the strongest regularisation first."""
ITERATIONS = 200
"""Largest number of iterations of a fit, which need not converge to the last digit."""
RESAMPLES = 2000
CONFIDENCE = 0.95
BLOCK = 100
"""Number of bootstrap samples that are computed at once."""
CONSTANT = 1e-6
"""Standard deviation below which a feature counts as constant and is ignored."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of cases with their classes and patients.

    Attributes:
        values: Features.
        classes: Class of each case, counted from 0; every class occurs.
        patients: Number of each case's patient.
    """

    values: Float[np.ndarray, "case feature"]
    classes: Int[np.ndarray, " case"]
    patients: Int[np.ndarray, " case"]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.classes.max()) + 1

    def take(self, rows: Int[np.ndarray, " row"]) -> "LabelledFeatures":
        """Return some of the cases; classes keep their numbers, but may be absent."""
        return LabelledFeatures(self.values[rows], self.classes[rows], self.patients[rows])


@dataclass(frozen=True)
class FoldScores:
    """Scores of the test cases of one fold.

    Attributes:
        rows: Indices of the cases.
        scores: Probability of every class.
    """

    rows: Int[np.ndarray, " row"]
    scores: Float[np.ndarray, "row class"]


@dataclass(frozen=True)
class AucSamples:
    """AUC of every class against the rest, for all cases and for bootstrap samples of the patients.

    Attributes:
        estimate: AUC of each class.
        samples: AUC in each bootstrap sample; NaN in samples without a pair to compare.
    """

    estimate: Float[np.ndarray, " class"]
    samples: Float[np.ndarray, "sample class"]


def repeats_of(cases: int) -> int:
    """Return the number of divisions into folds for a number of cases."""
    return REPEATS if cases < MANY_CASES else 1


def cross_validate(data: LabelledFeatures, folds: int, seed: int) -> list[FoldScores]:
    """Return the scores of every case as a test case, in ``repeats_of`` divisions into folds.

    Args:
        data: Features of the cases.
        folds: Number of folds, at most the number of patients of the rarest class.
        seed: Random seed of the divisions; the same seed divides the same cases alike, whatever their features.
    """
    found = []
    for repeat in range(repeats_of(len(data.classes))):
        for train, test in _divide(data, folds, draw_seed(seed, "classify/folds", repeat)):
            known = data.take(train)
            strength = _choose_strength(known, data.num_classes, draw_seed(seed, "classify/inner", repeat))
            (scores,) = _predict(known, data.values[test], [strength], data.num_classes)
            found.append(FoldScores(test, scores))
    return found


def bootstrap_auc(
    arms: Sequence[Sequence[FoldScores]], data: LabelledFeatures, seed: int, resamples: int = RESAMPLES
) -> list[AucSamples]:
    """Return the AUC of several arms, with the same bootstrap samples of the patients for all of them.

    Args:
        arms: Result of ``cross_validate`` for each arm.
        data: The cases; their features are not used.
        seed: Random seed of the resampling.
        resamples: Number of bootstrap samples.

    Returns:
        AUC of each class against the rest, for each arm. With two classes, only that of the second one, because the other is
        equal.
    """
    _, patients = np.unique(data.patients, return_inverse=True)
    number = int(patients.max()) + 1
    rng = np.random.default_rng(draw_seed(seed, "classify/bootstrap"))
    blocks: list[list[np.ndarray]] = [[_auc(arm, data, np.ones((1, len(patients))))] for arm in arms]
    for first in range(0, resamples, BLOCK):
        draws = min(BLOCK, resamples - first)
        counts = rng.multinomial(number, np.full(number, 1 / number), size=draws)
        weights = counts[:, patients].astype(np.float64)
        for own, arm in zip(blocks, arms, strict=True):
            own.append(_auc(arm, data, weights))
    return [AucSamples(own[0][0], np.concatenate(own[1:])) for own in blocks]


def interval(samples: Float[np.ndarray, " sample"]) -> tuple[float, float]:
    """Return the percentile interval of bootstrap samples; samples that are NaN do not count."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return float("nan"), float("nan")
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, (tail, 100 - tail))
    return float(low), float(high)


def _auc(
    folds: Sequence[FoldScores], data: LabelledFeatures, weights: Float[np.ndarray, "draw case"]
) -> Float[np.ndarray, "draw class"]:
    """Return the AUC of the classes with cases weighted; NaN without a pair to compare."""
    scored = range(data.num_classes) if data.num_classes > 2 else (1,)
    concordant = np.zeros((len(weights), len(scored)))
    pairs = np.zeros_like(concordant)
    for fold in folds:
        own = weights[:, fold.rows]
        for place, each in enumerate(scored):
            more, total = _count_pairs(fold.scores[:, each], data.classes[fold.rows] == each, own)
            concordant[:, place] += more
            pairs[:, place] += total
    return np.divide(concordant, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)


def _count_pairs(
    scores: Float[np.ndarray, " row"], positive: Bool[np.ndarray, " row"], weights: Float[np.ndarray, "draw row"]
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """Return the weight of the pairs in which the positive case has the higher score, and of all pairs."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # the first of each group of equal scores
    positives = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    negatives = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return (positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1)


def _divide(data: LabelledFeatures, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of the training and of the test part of every fold."""
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer cases than inner folds is intended
        divided = list(splitter.split(data.values, data.classes, data.patients))
    yield from ((train, test) for train, test in divided if len(train) and len(test))


def _choose_strength(data: LabelledFeatures, num_classes: int, seed: int) -> float:
    """Return the strength of the regularisation with the least log loss in a cross-validation of a training part."""
    present = np.unique(data.classes)
    fewest = min(len(np.unique(data.patients[data.classes == each])) for each in present)
    losses = np.zeros(len(STRENGTHS))
    for train, test in _divide(data, min(INNER_FOLDS, fewest), seed) if fewest > 1 else ():
        found = _predict(data.take(train), data.values[test], STRENGTHS, num_classes)
        for place, scores in enumerate(found):
            true = scores[np.arange(len(test)), data.classes[test]]
            losses[place] -= np.log(np.clip(true, 1e-12, None)).sum()
    return STRENGTHS[int(np.argmin(losses))]


def _predict(
    train: LabelledFeatures, test: Float[np.ndarray, "row feature"], strengths: Sequence[float], num_classes: int
) -> list[Float[np.ndarray, "row class"]]:
    """Return the probabilities of the classes for test cases, with each strength of the regularisation."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    mean, std = train.values.mean(axis=0, dtype=np.float64), train.values.std(axis=0, dtype=np.float64)
    std[std < CONSTANT] = np.inf
    known, asked = (train.values - mean) / std, (test - mean) / std
    if known.shape[1] > len(known):
        # Coordinates along the training cases: the regularised weights lie in their span, so the fit is the same but faster.
        axes = np.linalg.svd(known, full_matrices=False)[2]
        known, asked = known @ axes.T, asked @ axes.T
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    found = []
    for strength in strengths:
        scores = np.zeros((len(test), num_classes))
        present = np.unique(train.classes)
        if len(present) == 1:
            scores[:, present[0]] = 1.0
        else:
            with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
                warnings.simplefilter("ignore")  # that a fit has not converged
                model.set_params(C=strength).fit(known, train.classes)
                scores[:, model.classes_] = model.predict_proba(asked)
        found.append(scores)
    return found
