"""Scores of learning curves: intervals over seeds and test people, what can be told apart, and how it is said."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from finetuning import call_command
from report_page import svg_text
from rich.console import Console
from scipy import stats

from extract.probing.bootstrap import draw_weights, weighted_auc, weighted_pearson
from extract.probing.scores import auc, pearson
from finetune.curves.cells import Cell, CellResult, TargetScores, list_cells
from finetune.curves.charts import curve_png, curve_svg
from finetune.curves.intervals import Scores, estimate, people_needed, read_off
from finetune.curves.planning import Plan
from finetune.curves.power import hanley_mcneil_error, smallest_auc, smallest_correlation, smallest_score
from finetune.curves.printing import cell_lines, print_curve
from finetune.curves.results import CurveResult
from finetune.curves.scores import target_curves
from finetune.curves.words import describe_state, describe_target, ends, signed
from finetune.curves.work import CurveProgress
from finetune.evaluate import score_head
from finetune.heads import Head
from finetune.settings import FinetuneSettings

PEOPLE = 60
SIZES = (25, 50, 100)


def predict(effect: float, shared: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return what a network gives that knows so much, with errors that all networks make and some of its own."""
    return effect * truth + 0.7 * shared + 0.7 * rng.normal(size=len(truth))


def make_cells(
    effects: dict[str, tuple[float, ...]], *, seeds: int = 5, binary: bool = True, spread: float = 0.1
) -> list[CellResult]:
    """Return cells of methods that know so much with 25, 50 and 100 people."""
    rng = np.random.default_rng(1)
    truth = rng.permutation(np.arange(PEOPLE) % 2).astype(float) if binary else rng.normal(62, 8, PEOPLE)
    standard = truth - 0.5 if binary else (truth - 62) / 8
    shared = rng.normal(size=PEOPLE)
    rows = np.arange(PEOPLE)
    cells = []
    for cell in list_cells(tuple(effects), SIZES, range(seeds)):
        effect = effects[cell.method][SIZES.index(cell.size)] * (1 + spread * rng.normal())
        value = predict(effect, shared, standard, rng)
        share = 1 / (1 + np.exp(-value))
        target = TargetScores(
            name="sex" if binary else "age",
            task="binary" if binary else "continuous",
            labels=("female", "male") if binary else (),
            units=None if binary else "years",
            metric="auc" if binary else "r",
            scores={},
            chances={},
            rows=rows,
            people=rows,
            groups=rows,
            participants=rows.astype(str),
            truth=truth,
            predicted=np.stack([1 - share, share], axis=1) if binary else 62 + 8 * value,
        )
        cells.append(CellResult(cell, "ok", "", cell.size, cell.size, 2.0, targets=(target,)))
    return cells


def make_plan(methods: tuple[str, ...], seeds: int = 5) -> Plan:
    store = {"name": "s.zarr", "id": "1", "grid": {"shape_zyx": [16, 20, 16], "voxel_mm": 1.0, "space": "native"}}
    people = {"train": 100, "validation": 20, "test": PEOPLE}
    settings = FinetuneSettings(target=("sex",), weights="/home/somebody/w.pth")
    return Plan(settings, SIZES, methods, tuple(range(seeds)), None, 200, people, store, True)


@pytest.mark.parametrize("metric", ["auc", "r"])
def test_intervals_hold_the_true_score_and_the_true_difference_about_as_often_as_they_say(metric):
    rng = np.random.default_rng(0)
    spread, effects, tries, draws, seeds = 0.25, (0.8, 0.5), 150, 100, 5

    def expected(effect):  # over people and trainings
        effect = effect + spread * np.random.default_rng(9).normal(size=50_000)
        noise = np.hypot(0.7, 0.7)
        if metric == "r":
            return float(np.mean(effect / np.hypot(effect, noise)))
        return float(np.mean(stats.norm.cdf(effect / np.sqrt(2) / noise)))

    truths = [expected(effect) for effect in effects]
    held = np.zeros(2)
    for number in range(tries):
        weights = draw_weights(PEOPLE, draws, number).astype(np.float32)
        target = rng.normal(size=PEOPLE) if metric == "r" else rng.permutation(np.arange(PEOPLE) % 2) - 0.5
        scores, drawn = np.empty((2, seeds)), np.empty((2, seeds, draws))
        shared = rng.normal(size=PEOPLE)
        for method, effect in enumerate(effects):
            own = np.sqrt(0.5) * (shared + rng.normal(size=PEOPLE))
            for seed in range(seeds):
                value = predict(effect + spread * rng.normal(), own, target, rng)
                if metric == "r":
                    scores[method, seed] = pearson(target, value)
                    drawn[method, seed] = weighted_pearson(target, value, weights)
                else:
                    codes, both = (target > 0).astype(np.int64), np.stack([-value, value], axis=1)
                    scores[method, seed], drawn[method, seed] = auc(codes, both), weighted_auc(codes, both, weights)
        one = estimate(scores[0], drawn[0], PEOPLE)
        gap = estimate(scores[0] - scores[1], drawn[0] - drawn[1], PEOPLE)
        held += (one.holds(truths[0]), gap.holds(truths[0] - truths[1]))
    assert ((held / tries >= 0.9) & (held / tries <= 0.99)).all(), held / tries


def test_an_interval_adds_up_the_variance_of_seeds_and_of_the_people_tested():
    rng = np.random.default_rng(0)
    scores, drawn = rng.normal(0.7, 0.05, 4), rng.normal(0.7, 0.1, (4, 500))
    found = estimate(scores, drawn, 40)
    trained, tested = scores.var(ddof=1) / 4, drawn.mean(axis=0).var(ddof=1)
    freedom = (trained + tested) ** 2 / (trained**2 / 3 + tested**2 / 39)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(trained + tested)
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half))
    assert (found.from_seeds, found.from_people) == pytest.approx((np.sqrt(trained), np.sqrt(tested)))
    assert estimate(scores, drawn, 40, bounds=(0.6, 0.71)).high == pytest.approx(0.71)
    drawn[:, 7] = np.nan  # a draw without a class
    assert estimate(scores, drawn, 40).from_people == pytest.approx(
        np.delete(drawn, 7, axis=1).mean(axis=0).std(ddof=1)
    )


def test_one_seed_tells_of_the_people_tested_alone_and_says_so():
    drawn = np.random.default_rng(0).normal(0.7, 0.1, (1, 500))
    found = estimate(np.array([0.7]), drawn, 40)
    assert found.from_seeds is None
    assert found.high - found.score == pytest.approx(stats.t.ppf(0.975, 39) * drawn.std(ddof=1))
    (curve,) = target_curves(make_cells({"transfer": (1, 2, 3)}, seeds=1), draws=200)
    assert any("one seed" in sentence for sentence in describe_target(curve))


def test_perfect_scores_are_no_certainty():
    ones = np.ones((3, 100))
    found = estimate(np.ones(3), ones, 24, bounds=(0, 1), certain=1.0, margin=12)
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 12)), 1.0)
    (curve,) = target_curves(make_cells({"transfer": (90, 90, 90), "scratch": (90, 90, 90)}), draws=200)
    gap = curve.gap("scratch", 25)
    assert gap.estimate.score == 0
    assert gap.estimate.low < -0.1
    assert gap.verdict == "not told apart"


@pytest.mark.parametrize("binary", [True, False])
def test_curves_are_those_of_drawing_people_one_by_one(binary):
    cells = make_cells({"transfer": (1, 2, 3), "probe": (1, 1.5, 2)}, seeds=2, binary=binary)
    (curve,) = target_curves(cells, draws=100)
    by_cell = {cell.cell: cell.targets[0] for cell in cells}
    drawn = draw_weights(PEOPLE, 100, 0)

    def score(target, chosen):
        truth, predicted = target.truth[chosen], target.predicted[chosen]
        return auc(truth.astype(int), predicted) if binary else pearson(truth, predicted)

    def mean(method, chosen):
        return np.mean([score(by_cell[Cell(method, 50, seed)], chosen) for seed in range(2)])

    everyone, taken = np.arange(PEOPLE), [np.repeat(np.arange(PEOPLE), times) for times in drawn]
    for method in ("transfer", "probe"):
        point = curve.point(method, 50)
        assert point.estimate.score == pytest.approx(mean(method, everyone))
        assert point.estimate.from_people == pytest.approx(np.std([mean(method, rows) for rows in taken], ddof=1), 1e-4)
    gap = curve.gap("probe", 50).estimate
    differences = [mean("transfer", rows) - mean("probe", rows) for rows in taken]
    assert gap.from_people == pytest.approx(np.std(differences, ddof=1), rel=1e-4)
    assert gap.from_seeds == pytest.approx(
        abs(np.diff(np.subtract(curve.point("transfer", 50).scores, curve.point("probe", 50).scores))[0]) / 2
    )


def test_cells_are_compared_on_the_scans_that_all_of_them_have_whatever_their_order():
    cells = make_cells({"transfer": (1, 2, 3), "scratch": (0.5, 1, 2)}, seeds=2)
    (whole,) = target_curves(cells, draws=100)

    def reorder(cell, rows):
        fields = ("rows", "people", "groups", "truth", "predicted")
        target = cell.targets[0]
        return replace(cell, targets=(replace(target, **{name: getattr(target, name)[rows] for name in fields}),))

    backwards = [reorder(cell, np.arange(PEOPLE)[::-1]) for cell in cells[:3]] + cells[3:]
    assert target_curves(backwards, draws=100)[0].to_json() == whole.to_json()
    without = [reorder(cells[0], np.arange(3, PEOPLE)), *cells[1:]]
    (fewer,) = target_curves(without, draws=100)
    assert (fewer.people, fewer.dropped) == (PEOPLE - 3, 3)
    (expected,) = target_curves([reorder(cell, np.arange(3, PEOPLE)) for cell in cells], draws=100)
    assert replace(fewer, dropped=0).to_json() == expected.to_json()


def test_families_are_drawn_as_a_whole():
    cells = make_cells({"transfer": (1, 2, 3)}, seeds=2)
    pairs = [replace(cell, targets=(replace(cell.targets[0], groups=cell.targets[0].groups // 2),)) for cell in cells]
    (curve,) = target_curves(pairs, draws=100)
    weights = draw_weights(PEOPLE // 2, 100, 0)[:, np.arange(PEOPLE) // 2].astype(np.float32)
    of_seeds = [
        weighted_auc(cell.targets[0].truth.astype(int), cell.targets[0].predicted, weights)
        for cell in cells
        if cell.cell.size == 25
    ]
    found = curve.point("transfer", 25).estimate
    assert found.from_people == pytest.approx(np.mean(of_seeds, axis=0).std(ddof=1))


def test_people_needed_are_read_off_over_the_logarithm_of_people():
    sizes = np.array([10, 40, 160])
    assert read_off(0.7, sizes, np.array([0.6, 0.8, 0.9])) == pytest.approx(20)
    assert read_off(0.85, sizes, np.array([0.6, 0.8, 0.9])) == pytest.approx(80)
    assert read_off(0.6, sizes, np.array([0.6, 0.8, 0.9])) == 0
    assert read_off(0.91, sizes, np.array([0.6, 0.8, 0.9])) == np.inf
    assert read_off(0.65, sizes, np.array([0.6, 0.7, 0.5])) == pytest.approx(20)  # the first time
    both = read_off(np.array([0.7, 0.95]), sizes, np.array([[0.6, 0.6], [0.8, 0.8], [0.9, 0.9]]))
    assert both == pytest.approx([20, np.inf])


def test_people_needed_have_an_interval_over_seeds_and_people():
    rng = np.random.default_rng(0)
    seeds, draws = np.arange(4), 400

    def scores(size, mean, only=slice(None)):
        of_seed = mean + rng.normal(0, 0.01, 4)
        return Scores(size, seeds[only], of_seed[only], (of_seed[:, None] + rng.normal(0, 0.005, draws))[only])

    others = [scores(10, 0.6), scores(40, 0.8), scores(160, 0.9)]
    found = people_needed(scores(10, 0.7), others)
    assert found.within
    assert found.low < found.people < found.high
    assert 15 < found.low < 20 < found.high < 27
    assert found.ratio == pytest.approx(found.people / 10)
    one_less = people_needed(scores(10, 0.7), [others[0], scores(40, 0.8, slice(0, 3)), others[2]])
    assert 15 < one_less.low < 20 < one_less.high < 27
    beyond = people_needed(scores(10, 0.95), others)
    assert (beyond.people, beyond.high, beyond.within) == (np.inf, np.inf, False)
    assert beyond.to_json() | {"score": None} == {
        "size": 10, "score": None, "people": None, "low": None, "high": None, "ratio": None, "within": False,
    }  # fmt: skip


def test_the_smallest_score_is_told_apart_from_chance_in_80_percent():
    rng = np.random.default_rng(0)
    positives, negatives = 15, 35
    needed = smallest_auc(positives, negatives)
    apart = np.sqrt(2) * stats.norm.ppf(needed)
    found = [
        stats.mannwhitneyu(
            rng.normal(apart, 1, positives), rng.normal(0, 1, negatives), method="asymptotic", use_continuity=False
        ).pvalue
        < 0.05
        for _ in range(500)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)
    r = smallest_correlation(50)
    target = rng.normal(size=(1000, 50))
    value = r * target + np.sqrt(1 - r**2) * rng.normal(size=target.shape)
    assert np.mean([stats.pearsonr(*pair).pvalue < 0.05 for pair in zip(target, value, strict=True)]) == pytest.approx(
        0.8, abs=0.04
    )
    assert hanley_mcneil_error(0.5, 20, 30) == pytest.approx(np.sqrt(51 / (12 * 600)), rel=0.03)
    assert smallest_score(("a", "b", "c"), (20, 20, 20), 60) == pytest.approx(smallest_auc(20, 40))
    assert np.isnan(smallest_auc(2, 2))
    assert np.isnan(smallest_correlation(3))


def test_words_say_where_transfer_is_better_and_how_many_people_that_is_worth():
    cells = make_cells({"transfer": (2.2, 3.4, 3.5), "scratch": (0.1, 0.8, 3.4), "probe": (2.2, 3.2, 3.3)})
    (curve,) = target_curves(cells, draws=200)
    text = " ".join(describe_target(curve))
    assert "Tested on 60 people (30 female, 30 male) throughout; chance is AUC 0.5." in text
    gap = curve.gap("scratch", 25).estimate
    assert f"Transfer is better than scratch (AUC, 95 % interval): with 25 people by {gap.score:.3f} (" in text
    assert "Transfer and scratch cannot be told apart with 100 people (" in text
    assert "Transfer and the frozen probe cannot be told apart with 25 people" in text
    (needed, *_) = curve.needed["scratch"]
    assert f"Scratch needs {needed.people / 25:.1f} times the people for the AUC that transfer has with 25" in text
    assert 50 < needed.people < 100
    assert "Scratch cannot be told apart from chance (AUC) with 25" in text
    assert "not within the sizes tested" in text


def test_words_count_what_is_not_done_and_what_failed():
    cells = make_cells({"transfer": (1, 2, 3)})
    cells[0] = CellResult(cells[0].cell, "failed", "step 3: the loss of sex is nan")
    cells[1] = CellResult(cells[1].cell, "unfinished")
    result = CurveResult(None, make_plan(("transfer",)), target_curves(cells, draws=100), tuple(cells), 1)
    assert not result.ok
    assert not result.complete
    found = describe_state(result)
    assert found[0].startswith("Incomplete: 1 of 15 cells not done, 1 of them under way in other processes")
    assert found[1:3] == [
        "Failed: transfer, 25 people, seed 0: step 3: the loss of sex is nan.",
        "What failed stays so; --retry-failed begins it anew.",
    ]
    assert found[3].startswith("With 100 of the 100 people to train on, the seeds share most of their people")
    assert result.targets[0].point("transfer", 25).seeds == (1, 2, 3, 4)


def test_a_command_whose_cells_are_at_others_has_not_failed(monkeypatch, capsys, tmp_path):
    cells = make_cells({"transfer": (1, 2, 3)})
    curves = target_curves(cells, draws=100)
    waiting = replace(cells[0], status="unfinished", targets=())
    failed = replace(cells[1], status="failed", targets=())
    for changed, elsewhere, code in (([waiting], 1, 0), ([waiting], 0, 1), ([waiting, failed], 1, 1)):
        found = CurveResult(
            tmp_path, make_plan(("transfer",)), curves, (*changed, *cells[len(changed) :]), elsewhere
        )  # fmt: skip
        monkeypatch.setattr("finetune.curves.running.run_curve", lambda *_, found=found, **__: found)
        assert call_command(monkeypatch, "curve", "s.zarr", tmp_path, "--target", "sex") == code
        assert "1 of 15 cells not done" in capsys.readouterr().out


def test_a_line_tells_of_each_cell_where_no_bar_can_be_shown():
    cells = make_cells({"transfer": (1, 2, 3)})
    failed = CellResult(cells[1].cell, "failed", "step 3: the loss of sex is nan")
    told = io.StringIO()
    tell = cell_lines(Console(file=told, width=20))
    done = replace(cells[0], targets=(replace(cells[0].targets[0], name="sex", metric="auc", scores={"auc": 0.81}),))
    tell(CurveProgress(0, 2, done.cell))
    tell(CurveProgress(1, 2, done.cell, done))
    tell(CurveProgress(2, 2, failed.cell, failed))
    first, last = told.getvalue().splitlines()
    assert first == "1/2 transfer, 25 people, seed 0: sex 0.810, 0:00:00 left"
    assert last == "2/2 transfer, 50 people, seed 0: failed: step 3: the loss of sex is nan"


def test_counts_are_compared_as_they_are_learnt():
    cells = make_cells({"transfer": (1, 2, 3)}, seeds=2, binary=False)
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.exp(rng.normal(1, 1, PEOPLE))).astype(float)
    guesses = counts * np.exp(rng.normal(0, 1, PEOPLE))
    cells = [
        replace(cell, targets=(replace(cell.targets[0], task="count", truth=counts, predicted=guesses),))
        for cell in cells
    ]
    (curve,) = target_curves(cells, draws=100)
    found = score_head(Head("age", "count"), counts, guesses, np.arange(PEOPLE), bootstrap=0).headline.score
    assert found != pytest.approx(pearson(counts, guesses), abs=0.01)
    assert curve.point("transfer", 25).scores == pytest.approx((found, found))


def test_chart_and_tables_show_every_number(tmp_path):
    methods = ("transfer", "scratch", "probe")
    cells = make_cells({"transfer": (2, 3, 3.5), "scratch": (0.1, 1, 3), "probe": (2, 2.5, 2.6)})
    curves = target_curves(cells, draws=100)
    words = svg_text(curve_svg(curves[0]))
    for expected in ("people trained on", "AUC, 60 people tested", "transfer (fine-tuned)", "minus scratch", "100"):
        assert expected in words
    assert curve_svg(curves[0]) == curve_svg(curves[0])
    assert curve_png(curves, "SIMULATED DATA").startswith(b"\x89PNG")
    shown = io.StringIO()
    result = CurveResult(tmp_path, make_plan(methods), curves, tuple(cells))
    print_curve(result, Console(file=shown, width=100))
    text = shown.getvalue()
    for point in curves[0].points:
        assert f"{point.estimate.score:.3f} ({point.estimate.low:.3f} to {point.estimate.high:.3f})" in text
    for gap in curves[0].gaps:
        assert f"{signed(gap.estimate.score)} ({ends(gap.estimate)})" in text
    assert "simulated data" in text
    assert max(map(len, text.splitlines()[4:9])) < 100
