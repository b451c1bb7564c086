"""The probe's report: nothing from outside, nobody's name, nothing hidden."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from report_page import Page, svg_text
from reported_probe import HOSTILE, SHA, changed, confounded
from reported_probe import embeddings as embeddings  # a fixture
from reported_probe import results as results  # a fixture
from reported_probe import store as store  # a fixture

from extract.embeddings import Embeddings
from extract.probing.compare import Difference, Probed
from extract.probing.curves import CurvePoint, LearningCurve
from extract.probing.montage import read_brains
from extract.probing.report import write_report
from extract.probing.report_targets import verdict
from extract.probing.results import Interval, TargetResult
from ingest.errors import StoreError
from ingest.shard import shard_path
from ingest.store import open_store

SETTINGS = {"folds": 5, "repeats": 10, "seed": 7, "phenotypes": Path("/home/jane.doe/table.csv")}


def written(tmp_path: Path, embeddings: Embeddings, results: list[TargetResult], **more) -> tuple[str, Page, list[str]]:
    path = tmp_path / "new" / "folder" / "report.html"
    warnings = write_report(path, [Probed("emb", embeddings, results)], settings=SETTINGS, **more)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    return source, Page(source), warnings


def test_page_needs_nothing_from_outside(tmp_path, embeddings, results):
    source, page, warnings = written(tmp_path, embeddings, results)
    assert warnings == []
    assert page.open == []
    assert not re.search(r"https?:|@import|url\(", source)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                assert tag == "img"
                assert value.startswith("data:image/")
    for _, content in page.images:  # pictures are files of their own: they load nothing either
        if not content.startswith(b"\x89PNG"):
            for element in ET.fromstring(content).iter():
                links = [value for name, value in element.attrib.items() if name.endswith("href")]
                assert all(link.startswith(("#", "data:image/png")) for link in links)
    assert len(source) < 3_000_000
    assert page.brains == 3


def test_page_says_what_was_found(tmp_path, embeddings, results):
    source, page, _ = written(tmp_path, embeddings, results)
    rows = re.findall(r"<tbody>(.*?)</tbody>", source, flags=re.S)
    row = {name: Page(next(r for r in rows if f">{name}<" in r)).text for name in ("sex", "age", "income")}
    for words in (
        "binary",
        "60 scans of 57 people",
        "AUC",
        "0.967",
        "0.941 to 0.993",
        "0.500",
        "above chance",
        "0.910 [0.860 to 0.950]",
    ):
        assert words in row["sex"]
    assert "below chance" in row["age"]
    assert "within chance" in row["income"]
    assert "MAE 1.11 categories [1.00 to 1.20], chance 1.12" in row["income"]  # not GBP: these are codes
    assert "1 = less than 18,000; 2 = more & more" in page.text
    assert "skipped: 12 scans, at least 20 needed" in page.text
    assert "4 probed" not in page.text
    assert "5 probed, 1 skipped" in page.text
    assert "Nadeau & Bengio" in page.text
    for words in (
        "First repeat",
        "scores are computed per fold",
        "positive class: male",
        "row 1",  # row 0 is the broken file
        "Scans60",
        "Participants57",
    ):
        assert words in page.text
    plots = {alt: svg_text(content) for alt, content in page.images if not content.startswith(b"\x89PNG")}
    assert "true age (years)" in plots["predicted against true age"]
    assert "identity" in plots["predicted against true age"]
    assert "mean of folds" in plots["ROC curves of sex"]
    assert "current" in plots["confusion matrix of smoking"]
    assert "bins of 10 to 14" in plots["calibration of sex"]
    assert "slope" in plots["calibration of age"]
    assert "previous" in plots["ROC curves of smoking"]
    assert len(plots) == 3 * 2 + 2 * 3 + 2  # three for more than two classes, and one panel for each headline metric


def test_provenance_is_complete_and_names_no_folder(tmp_path, embeddings, results, store):
    source, page, _ = written(tmp_path, embeddings, results)
    for words in (
        SHA,
        "imagenet",
        "avgpool",
        "triplanar",
        "mean over slices",
        "float32",
        "stored / 255",
        "numpy 2.9.9",
    ):
        assert words in page.text
    assert embeddings.attrs["store"]["id"] in page.text
    assert "160 × 192 × 160 voxels (x, y, z) of 1 mm, RAS, MNI152" in page.text
    assert "study.zarr" in page.text
    assert "table.csv" in page.text
    assert "seed7" in page.text
    assert str(store.parent) not in source
    assert "jane.doe" not in source
    assert "not trained" not in page.text
    random = changed(embeddings, weights={"name": "random (seed 0)", "sha256": SHA})
    assert "The network is not trained" in written(tmp_path, random, results)[1].text


def test_names_of_people_are_nowhere(tmp_path, embeddings, results):
    source, page, _ = written(tmp_path, embeddings, results)
    for content in [source.encode(), *(content for _, content in page.images)]:
        assert b"person-" not in content


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_data_are_announced_exactly_when_they_are(tmp_path, embeddings, results, simulated):
    _, page, _ = written(tmp_path, changed(embeddings, simulated=simulated), results)
    assert ("SIMULATED DATA" in page.text) is simulated
    assert ("Not for inference about people" in page.text) is simulated


def test_hostile_names_are_text(tmp_path, embeddings, results):
    source, page, _ = written(tmp_path, changed(embeddings, model=HOSTILE), results)
    assert "<script" not in source.lower()
    assert page.text.count(HOSTILE) >= 4  # table, skipped reason, heading of the plot, model
    hostile = dict(page.images)[f"confusion matrix of {HOSTILE}"]
    assert "script" not in {element.tag.rpartition("}")[2] for element in ET.fromstring(hostile).iter()}
    assert "$x^{$" in svg_text(hostile)
    assert "脳" in svg_text(hostile)


def test_an_absent_store_is_a_warning_not_an_error(tmp_path, embeddings, results, store):
    gone = changed(embeddings, store={**embeddings.attrs["store"], "path": str(tmp_path / "jane.doe" / "gone.zarr")})
    source, page, warnings = written(tmp_path, gone, results)
    assert len(warnings) == 1
    assert "gone.zarr is no longer where it was" in warnings[0]
    assert warnings[0] in page.text
    assert page.brains == 0
    assert "jane.doe" not in source
    _, page, warnings = written(tmp_path, gone, results, store=store)  # told where it is now
    assert warnings == []
    assert page.brains == 3


def test_another_store_is_not_shown(tmp_path, embeddings, results):
    other = changed(embeddings, store={**embeddings.attrs["store"], "id": "0" * 32})
    _, page, warnings = written(tmp_path, other, results)
    assert "not the one that the embeddings were made from" in warnings[0]
    assert warnings[0] in page.text
    assert page.brains == 0


def test_a_damaged_store_is_a_warning(tmp_path, embeddings, results, store):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    row = int(open_store(store).ok_rows[1])
    shard_path(copy, row).write_bytes(b"damaged")
    source, page, warnings = written(tmp_path, embeddings, results, store=copy)
    assert warnings == [f"row {row} of the store copy.zarr is damaged and not shown; see: ingest verify STORE"]
    assert page.brains == 2
    assert "person-" not in source
    (copy / "zarr.json").write_text("{")
    _, page, warnings = written(tmp_path, embeddings, results, store=copy)
    assert "cannot be opened" in warnings[0]
    assert page.brains == 0
    assert read_brains(changed(embeddings, store=None)) == (
        [],
        ["no brains are shown: the embeddings do not say which store they were made from"],
    )


def test_nothing_probed_and_nothing_recorded_is_still_a_page(tmp_path, embeddings):
    _, page, warnings = written(tmp_path, replace(embeddings, attrs={}), [])
    assert "No target was probed" in page.text
    assert "not recorded" in page.text
    assert len(warnings) == 1


def test_a_report_replaces_the_old_one_or_leaves_it(tmp_path, embeddings):
    written(tmp_path, embeddings, [])
    source, _, _ = written(tmp_path, changed(embeddings, simulated=True), [])
    assert "SIMULATED" in source
    for path in (tmp_path / "new", tmp_path / "new" / "folder" / "report.html" / "below.html"):
        with pytest.raises(StoreError, match="choose another name"):
            write_report(path, [Probed("emb", embeddings, [])], settings=SETTINGS)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "new", "report.html"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0871, "0.0871"),
        (0.9, "0.900"),
        (3.614, "3.61"),
        (61.27, "61.3"),
        (12345.6, "12,346"),
        (0.0, "0"),
        (3e-8, "3e-08"),
        (3.2e38, "3.2e+38"),
    ],
)
def test_errors_have_three_figures_in_any_unit(tmp_path, embeddings, value, shown):
    metrics = {"r": Interval(0.1, 0.0, 0.2, 0.0), "mae": Interval(value, value, value, value)}
    result = TargetResult("x", "continuous", "ok", 9, 9, metric="r", metrics=metrics, units="mm")
    gone = changed(embeddings, store=None)
    assert f"MAE {shown} mm [{shown} to {shown}], chance {shown}" in written(tmp_path, gone, [result])[1].text


def test_verdict():
    assert verdict(Interval(0.6, 0.51, 0.7, 0.5)) == "above chance"
    assert verdict(Interval(0.6, 0.5, 0.7, 0.5)) == "within chance"
    assert verdict(Interval(-0.2, -0.3, -0.1, 0.0)) == "below chance"
    nan = float("nan")
    assert verdict(Interval(nan, nan, nan, 0.0)) == "not defined"


# ---- confounds, curves, several embeddings -----------------------------------------------------------------------


def test_confounds_permutations_and_draws_are_beside_the_scores(tmp_path, embeddings, results):
    other = replace(results[1], confounds=["age", "site"])  # a target is no confound of itself, so lists differ
    _, page, _ = written(tmp_path, embeddings, [confounded(results[0]), other, *results[2:]])
    for words in (
        "Confounds (site, head_size, age) were removed",
        "A target is no confound of itself.",
        "0.871",
        "0.810 to 0.930",
        "0.096",
        "-0.010 to 0.200",
        "0.0099",
        "100 permutations",
        "labels exchanged between people",
        "[0.950 to 0.980]",
    ):
        assert words in page.text, words
    (panel,) = [svg_text(content) for alt, content in page.images if alt.startswith("Classification")]
    assert "confounds alone" in panel
    plain = written(tmp_path, embeddings, results)[1].text
    assert "onfounds alone" not in plain
    assert "permutations" not in plain
    assert "bootstrap" not in plain


def test_several_embeddings_are_in_one_table_and_one_chart(tmp_path, embeddings, results):
    other = changed(embeddings, model="r3d_18", weights={"name": "random (seed 1)", "sha256": "f" * 64}, simulated=True)
    weaker = replace(results[0], metrics={"auc": Interval(0.7, 0.6, 0.8, 0.5)})
    curve = LearningCurve("sex", "auc", [CurvePoint(n, results[0].headline) for n in (20, 45)], {900: "45 people <b>"})
    probed = [
        Probed("resnet 2D", embeddings, results[:2], {"sex": curve}),
        Probed(f"r3d {HOSTILE}", other, [weaker, replace(results[5], name="age")], {"sex": curve}),
    ]
    difference = Difference("sex", "auc", probed[1].name, "resnet 2D", Interval(-0.267, -0.35, -0.18, 0.0))
    path = tmp_path / "several.html"
    assert write_report(path, probed, settings=SETTINGS, differences=[difference], warnings=["3 scans left out"]) == [
        "3 scans left out"
    ]
    source = path.read_text()
    page = Page(source)
    assert page.open == []
    sex, age = re.findall(r"<tbody>(.*?)</tbody>", source, flags=re.S)
    words = Page(sex).text
    assert "0.967" in words
    assert "0.700" in words
    assert "-0.267-0.350 to -0.180" in words
    assert "skipped: 12 scans" in Page(age).text
    assert "3 scans left out" in page.text
    assert "SIMULATED DATA" in page.text  # one of them is
    assert f"r3d {HOSTILE}: the network is not trained" in page.text
    assert SHA in page.text
    assert "f" * 64 in page.text
    images = dict(page.images)
    (panel,) = [svg_text(content) for alt, content in images.items() if alt.startswith("Classification")]
    assert "resnet 2D" in panel
    drawn = svg_text(images["learning curve of sex: AUC with 20 to 45 people"])
    assert "people trained on" in drawn
    assert "45" in drawn
    assert "no point at 900 with resnet 2D: 45 people <b>" in page.text
    assert {f"ROC curves of sex with {one.name}" for one in probed} <= set(images)
    assert "<script" not in source.lower()
    assert "jane.doe" not in source
    assert b"person-" not in source.encode()


def test_the_page_is_recognised_as_a_report(tmp_path, embeddings, results):
    source, _, _ = written(tmp_path, embeddings, results[:1])
    assert '<meta name="generator" content="brain-volumes' in source[:512]


def test_in_a_browser_nothing_is_cut_off_or_broken(tmp_path, embeddings, results):
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium here; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    every = [confounded(results[0]), *results[1:]]
    probed = [Probed(name, embeddings, every) for name in ("resnet18-imagenet", "r3d_18-kinetics", "resnet18-random")]
    path = tmp_path / "r.html"
    write_report(path, probed, settings=SETTINGS)
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        for width in (390, 1100):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            wrong: list[str] = []
            tab.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            tab.on(
                "request",
                lambda request, wrong=wrong: (
                    None if re.match("data:|file:", request.url) else wrong.append(request.url)
                ),
            )
            tab.goto(path.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
            assert wrong == []
            hint = tab.evaluate("getComputedStyle(document.querySelector('.scroll'), '::before').content")
            assert ("sideways" in hint) == (width < 600)
        table = "document.querySelector('.scroll')"
        assert tab.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")  # on a desk all columns are seen
        browser.close()
