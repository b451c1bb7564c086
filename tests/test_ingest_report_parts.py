"""Parts of the report of a store: reasons in groups, pictures that fit, histograms."""

from __future__ import annotations

import numpy as np

from ingest.failures import group_failures, reason_pattern
from ingest.histograms import draw_histogram
from ingest.pictures import fit_pictures, picture_order


def test_reasons_are_grouped_without_what_is_of_one_scan():
    same = [
        ("truncated: the gzip data end after 13,527,288 bytes", "truncated: the gzip data end after 12 bytes"),
        ("not a NIfTI file: it starts with 6e6f2069", "not a NIfTI file: it starts with 00000000"),
        ("same scan as 90/9000001_20252_2_0.zip/T1/T1.nii.gz", "same scan as a b/9000002.nii.gz".replace("a b", "ab")),
        ("no member 'T1.nii'", "no member 'x y (3).nii'"),
    ]
    for first, second in same:
        assert reason_pattern(first) == reason_pattern(second)
    assert reason_pattern("the scan's type float32 isn't known") == "the scan's type float32 isn't known"
    groups = group_failures({4: ("bad", "a 1"), 2: ("bad", "a 2"), 3: ("worse", "a 3"), 9: ("withdrawn", "")})
    assert [(g.status, g.pattern, g.rows) for g in groups] == [
        ("bad", "a #", [2, 4]), ("worse", "a #", [3]), ("withdrawn", "", [9]),
    ]  # fmt: skip


def test_no_more_pictures_are_drawn_than_fit():
    drawn = []

    def draw():
        for row in range(1000):
            drawn.append(row)
            yield row, b"x" * 300

    taken = fit_pictures(draw(), 4200)
    assert list(taken) == list(range(10))
    assert len(drawn) == 11


def test_pictures_are_spread_however_many_fit():
    present = np.arange(10, 3010)
    order = picture_order(present, np.array([500, 20]), first=[77, 500])
    assert order[:3] == [77, 500, 20]
    assert sorted(order) == present.tolist()
    for count in (30, 100, 700):
        gaps = np.diff(np.sort(order[3 : 3 + count]))
        assert gaps.max() <= 3 * 3000 / count
    assert picture_order(present[:0], present[:0]) == []


def test_histograms_count_every_scan():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(5, 1, 5000), [5000.0, -300.0, np.nan]])
    outlying = np.abs(values - 5) > 3
    series = [("usual", values[~outlying]), ("outlying", values[outlying])]
    drawn = draw_histogram("Noise", "grey levels", "", series, lines=[(5.0, "median"), (900.0, "limit")])
    assert drawn is not None
    counted = sum(int(bar.label.split(": ")[1].split()[0].replace(",", "")) for bar in drawn.bars)
    assert counted == 5000
    assert drawn.beyond == "1 below the axis, 1 above the axis"
    assert [kind for _, kind in drawn.lines] == ["median"]
    assert {text for _, text in drawn.ticks} >= {"0", "5", "10"}
    assert all(bar.height > 0 and bar.y >= 10 for bar in drawn.bars)
    same = draw_histogram("Size", "MB", "", [("usual", np.full(4, 7.0))])
    assert same is not None
    assert same.tallest == 4
    assert draw_histogram("Size", "MB", "", [("usual", np.full(4, np.nan))]) is None
