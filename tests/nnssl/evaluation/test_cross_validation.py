"""Cross-validation by patients, and the AUC with its bootstrap, compared with loops over pairs."""

import numpy as np
import pytest

from nnssl.evaluation import cross_validation
from nnssl.evaluation.cross_validation import (
    STRENGTHS,
    FoldScores,
    LabelledFeatures,
    bootstrap_auc,
    cross_validate,
    interval,
)

FEW = (1e-4, 1e-2)


@pytest.fixture
def few_fits(monkeypatch):
    monkeypatch.setattr(cross_validation, "REPEATS", 2)
    monkeypatch.setattr(cross_validation, "STRENGTHS", FEW)


def make_cases(patients, cases_each, classes, features, seed=0):
    """Return cases whose features are noise; a patient has one class."""
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.arange(patients) % classes)
    rows = np.repeat(np.arange(patients), cases_each)
    return LabelledFeatures(rng.normal(size=(len(rows), features)).astype(np.float32), own[rows], rows)


def auc_by_loop(folds, classes, each, weights):
    """Return the AUC of a class as the share of pairs, case by case."""
    concordant = pairs = 0.0
    for fold in folds:
        for a, row in enumerate(fold.rows):
            for b, other in enumerate(fold.rows):
                if classes[row] == each and classes[other] != each:
                    weight = weights[row] * weights[other]
                    first, second = fold.scores[a, each], fold.scores[b, each]
                    concordant += weight * (1.0 if first > second else 0.5 if first == second else 0.0)
                    pairs += weight
    return concordant / pairs if pairs else np.nan


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_is_the_share_of_pairs_within_a_fold(classes):
    """Scores have ties, and the bootstrap takes patients with all their cases."""
    data = make_cases(11, 2, classes, 1)
    rng = np.random.default_rng(1)
    order = rng.permutation(22)
    folds = [
        FoldScores(rows, rng.integers(0, 5, (len(rows), classes)) / 5)
        for rows in (order[:9], order[9:], order[5:17], order[:5])
    ]
    (found,) = bootstrap_auc([folds], data, 3, resamples=130)
    scored = range(classes) if classes > 2 else (1,)
    expected = [auc_by_loop(folds, data.classes, each, np.ones(22)) for each in scored]
    np.testing.assert_allclose(found.estimate, expected)
    assert found.samples.shape == (130, len(scored))
    assert np.nanstd(found.samples) > 0.01
    weights = np.repeat(rng.multinomial(11, np.full(11, 1 / 11), size=4), 2, axis=1)
    expected = [[auc_by_loop(folds, data.classes, each, own) for each in scored] for own in weights]
    np.testing.assert_allclose(cross_validation._auc(folds, data, weights.astype(float)), expected)


def test_arms_share_their_bootstrap_samples():
    data = make_cases(12, 1, 2, 1)
    rng = np.random.default_rng(1)
    first, second = ([FoldScores(np.arange(12), rng.random((12, 2)))] for _ in range(2))
    own, other, again = bootstrap_auc([first, second, first], data, 0)
    np.testing.assert_array_equal(own.samples, again.samples)
    assert not np.array_equal(own.samples, other.samples)


def test_bootstrap_draws_patients_with_all_their_cases():
    """Nine equal cases of a patient are no more than one, so the AUC varies three times as much as for independent cases."""
    data = make_cases(20, 9, 2, 1)
    scores = np.repeat(np.random.default_rng(1).random((20, 2)), 9, axis=0)
    folds = [FoldScores(np.arange(180), scores)]
    single = LabelledFeatures(data.values, data.classes, np.arange(180))
    (of_patients,), (of_cases,) = (bootstrap_auc([folds], each, 0) for each in (data, single))
    np.testing.assert_array_equal(of_patients.estimate, of_cases.estimate)
    assert of_patients.samples.std() == pytest.approx(3 * of_cases.samples.std(), rel=0.1)


@pytest.mark.nightly
def test_features_without_information_have_an_auc_of_a_half(few_fits, monkeypatch):
    """The mean over many data sets is unbiased. The interval, which knows nothing of other training parts, is too narrow."""
    monkeypatch.setattr(cross_validation, "REPEATS", 1)
    values, covered = [], []
    for seed in range(200):
        data = make_cases(24, 1, 2, 10, seed)
        (found,) = bootstrap_auc([cross_validate(data, 4, seed)], data, seed, resamples=200)
        low, high = interval(found.samples[:, 0])
        values.append(found.estimate[0])
        covered.append(low <= 0.5 <= high)
    assert abs(np.mean(values) - 0.5) < 3 * np.std(values) / np.sqrt(200)
    assert 0.8 < np.mean(covered) < 0.97


def test_interval_leaves_out_samples_without_pairs():
    samples = np.append(np.arange(101) / 100, [np.nan] * 7)
    assert interval(samples) == pytest.approx((0.025, 0.975))


def test_patients_are_kept_together_in_every_division():
    data = make_cases(14, 3, 2, 2)
    for train, test in cross_validation._divide(data, 4, 0):
        assert not set(data.patients[train]) & set(data.patients[test])
        assert sorted([*train, *test]) == list(range(42))
        assert set(data.classes[test]) == {0, 1}


def test_features_that_identify_a_patient_say_nothing_about_others(few_fits):
    """The features are a patient's own, and the labels random: only a patient on both sides of a division would help."""
    data = make_cases(20, 3, 2, 1)
    noise = np.random.default_rng(1).normal(size=(20, 40))
    own = LabelledFeatures(noise[data.patients], data.classes, data.patients)
    leaking = LabelledFeatures(own.values, own.classes, np.arange(60))
    (kept,) = bootstrap_auc([cross_validate(own, 4, 0)], own, 0)
    (leaked,) = bootstrap_auc([cross_validate(leaking, 4, 0)], leaking, 0)
    low, high = interval(kept.samples[:, 0])
    assert low < 0.5 < high
    assert leaked.estimate[0] > 0.95


def test_strength_is_chosen_within_training_parts_by_divisions_of_patients(monkeypatch, few_fits):
    data = make_cases(12, 2, 2, 3)
    seen = []
    divide = cross_validation._divide

    def spy(given, folds, seed):
        divisions = list(divide(given, folds, seed))
        seen.append((given, divisions))
        return iter(divisions)

    monkeypatch.setattr(cross_validation, "_divide", spy)
    cross_validate(data, 3, 0)
    inner = [(given, divisions) for given, divisions in seen if len(given.classes) < 24]
    assert len(inner) == 2 * 3
    for given, divisions in inner:
        assert len(divisions) == 4
        assert all(not set(given.patients[a]) & set(given.patients[b]) for a, b in divisions)


def test_noise_is_regularised_and_a_clear_difference_is_not():
    noise = make_cases(60, 1, 2, 200)
    assert cross_validation._choose_strength(noise, 2, 0) <= 1e-4
    clear = make_cases(60, 1, 2, 2)
    clear.values[:, 0] += 9 * clear.classes
    assert cross_validation._choose_strength(clear, 2, 0) == STRENGTHS[-1]


def test_more_features_than_cases_give_the_same_fit_as_without_rotation():
    """Compared with scikit-learn on all features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data, test = make_cases(15, 2, 3, 70), make_cases(5, 1, 3, 70, seed=9)
    data.values[:, 4] = 7.0  # constant features are ignored
    found = cross_validation._predict(data, test.values, [1e-3, 1e-1], 3)
    for scores, strength in zip(found, (1e-3, 1e-1), strict=True):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-8))
        model.fit(np.delete(data.values, 4, axis=1), data.classes)
        expected = model.predict_proba(np.delete(test.values, 4, axis=1))
        np.testing.assert_allclose(scores, expected, atol=2e-3)


def test_a_class_that_a_training_part_lacks_has_no_probability():
    data = make_cases(8, 1, 2, 3)
    assert (cross_validation._predict(data, data.values, [1.0], 3)[0][:, 2] == 0).all()
    alone = data.take(np.flatnonzero(data.classes == 1))
    np.testing.assert_array_equal(cross_validation._predict(alone, data.values, [1.0], 2)[0], [[0, 1]] * 8)


def test_many_cases_are_divided_once():
    assert (cross_validation.repeats_of(999), cross_validation.repeats_of(1000)) == (5, 1)


def test_the_same_seed_gives_the_same_scores_and_another_one_others(few_fits):
    data = make_cases(12, 2, 2, 3)
    first, again, other = (cross_validate(data, 3, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.scores, b.scores) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.rows, b.rows) for a, b in zip(first, other, strict=True))
