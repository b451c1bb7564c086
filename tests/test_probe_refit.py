"""Models fitted to everyone: linear in raw features and confounds, saved and read back whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from embedded import make_cohort, make_embeddings
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from extract.probing.confounds import fit_coding, fit_residualiser, read_confounds
from extract.probing.model import ProbeModel, refit, refit_all
from extract.probing.settings import ProbeSettings
from extract.probing.targets import target_names


@pytest.mark.parametrize("confounds", [(), ("age", "site")])
@pytest.mark.parametrize("target", ["gender", "smoking", "something"])
def test_the_model_is_that_of_its_parts(target, confounds):
    cohort = make_cohort()
    model = refit(cohort, target, settings=ProbeSettings(confounds=confounds))
    measured = read_confounds(cohort, confounds)
    used = measured.complete(target)
    features = cohort.features.astype(float)[used]
    if confounds:
        measured = measured.rows(used)
        columns = fit_coding(measured).encode(measured.values)
        features = fit_residualiser(features, columns).apply(features, columns)
    standard = StandardScaler().fit_transform(features)
    y = cohort.phenotypes[target].to_numpy()[used]
    if target == "something":
        expected = Ridge(alpha=model.penalty).fit(standard, y).predict(standard)
    else:
        fitted = LogisticRegression(C=1 / model.penalty, tol=1e-8, max_iter=5000).fit(standard, y)
        expected = fitted.predict_proba(standard)
    np.testing.assert_allclose(model.predict_embeddings(cohort)[used], expected, atol=2e-4)
    assert (model.n, model.participants) == ((110, 100) if confounds else (120, 100))  # ten scans have no age
    assert (model.confounds is None) == (not confounds)


@pytest.mark.parametrize("target", ["age", "gender", "smoking"])
def test_a_model_survives_being_written(target):
    cohort = make_cohort()
    model = refit(cohort, target, settings=ProbeSettings(confounds=("site", "age")))
    again = ProbeModel.from_json(json.loads(json.dumps(model.to_json())))
    np.testing.assert_array_equal(again.predict_embeddings(cohort), model.predict_embeddings(cohort))
    assert again.to_json() == model.to_json()


def test_a_category_that_is_missing_or_unknown_is_the_average_one():
    rng = np.random.default_rng(3)
    site = (np.arange(200) % 20 == 0) * 1.0
    features = rng.normal(size=(200, 5)) + 10 * site[:, None] * (np.arange(5) == 0)
    values = {"site": site, "y": features[:, 0] - 10 * site}
    embeddings = make_embeddings(features, values, variables={"site": {"task": "multiclass"}})
    model = refit(embeddings, "y", settings=ProbeSettings(confounds=("site",)))
    here = features[:1]
    usual, rare, missing, unknown = (model.predict(here, np.array([[code]]))[0] for code in (0.0, 1.0, np.nan, np.inf))
    assert missing == unknown == pytest.approx(0.95 * usual + 0.05 * rare)
    assert abs(rare - usual) > 5


def test_counts_and_classes_of_numbers_come_in_their_own_units():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    counts = np.round(np.exp(1 + 0.5 * features[:, 0]))
    embeddings = make_embeddings(features, {"n": counts}, variables={"n": {"task": "count"}})
    predicted = refit(embeddings, "n").predict_embeddings(embeddings)
    assert predicted.min() >= 0
    assert np.corrcoef(predicted, counts)[0, 1] > 0.9
    binned = refit(embeddings, "n", settings=ProbeSettings(bins={"n": (2, 4)}))
    assert binned.labels == ["<2", "2-4", ">=4"]
    np.testing.assert_allclose(binned.predict_embeddings(embeddings).sum(axis=1), 1)


def test_what_cannot_be_fitted_or_applied_is_refused():
    cohort = make_cohort()
    empty = make_embeddings(cohort.features, {"y": np.full(120, np.nan)})
    with pytest.raises(ValueError, match="'y' cannot be fitted: every value is missing"):
        refit(empty, "y")
    model = refit(cohort, "sex", settings=ProbeSettings(confounds=("age",)))
    with pytest.raises(ValueError, match=r"\(120, 39\).*\(scan, 40\)"):
        model.predict(cohort.features[:, 1:])
    with pytest.raises(ValueError, match="needs the confounds age"):
        model.predict(cohort.features)
    with pytest.raises(ValueError, match="no phenotype 'age'"):
        model.predict_embeddings(empty)
    with pytest.raises(ValueError, match="no saved probe"):
        ProbeModel.from_json({"name": "sex"})


def test_all_at_once_is_each_alone():
    """Regressions of the same scans share a factorisation, classes and others do not."""
    cohort, settings, told = make_cohort(), ProbeSettings(confounds=("site",)), []
    names = ["sex", "age", "something"]
    together = refit_all(cohort, names, settings=settings, on_target=lambda model: told.append(model.name))
    assert [model.name for model in together] == target_names(cohort, names)
    assert sorted(told) == sorted(model.name for model in together)
    for model in together:
        alone = refit(cohort, model.name, settings=settings)
        np.testing.assert_allclose(model.coefficients, alone.coefficients, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.intercept, alone.intercept, rtol=1e-9)
        np.testing.assert_allclose(model.confound_coefficients, alone.confound_coefficients, rtol=1e-9, atol=1e-12)
        assert (model.penalty, model.n, model.task) == (alone.penalty, alone.n, alone.task)
