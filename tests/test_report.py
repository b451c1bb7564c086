"""The probe's report: brains the right way round, nothing from outside, nobody's name, nothing hidden."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import mni_brain, write_nifti
from matplotlib.image import imread

from extract.embeddings import Embeddings
from extract.montage import evenly_spaced, montage_figure, montage_png, read_brains
from extract.plots import confusion_plot, forest_plot, roc_plot, scatter_plot
from extract.report import verdict, write_report
from extract.results import Interval, OutOfFold, TargetResult
from ingest import ingest
from ingest.errors import StoreError
from ingest.grid import FSL_MNI152_AFFINE
from ingest.planes import planes_of
from ingest.shard import shard_path
from ingest.store import open_store
from loaders.reader import VolumeReader

SHA = "5c106cde386e87d4033832f2996f5493238eda96ccf559d1d62760c4de0613f8"
HOSTILE = "<script>alert(1)</script>"
SETTINGS = {"folds": 5, "repeats": 10, "seed": 7, "phenotypes": Path("/home/jane.doe/table.csv")}

#: Patient left, front, top: mm in MNI space, within the ellipsoid.
MARKERS = {"left": (-45.0, -17.0, 19.0), "front": (0.0, 45.0, 19.0), "top": (0.0, -17.0, 50.0)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Return a store of three brains, each with one marker, in the order of their names."""
    folder = tmp_path_factory.mktemp("jane.doe")
    for name, place in MARKERS.items():
        write_nifti(folder / "src" / f"person-{name}.nii.gz", mni_brain(marker_mm=place), FSL_MNI152_AFFINE, code=4)
    (folder / "src" / "person-broken.nii.gz").write_bytes(b"no image")
    ingest(folder / "src", folder / "study.zarr")
    return folder / "study.zarr"


@pytest.fixture(scope="module")
def embeddings(store) -> Embeddings:
    """Return embeddings of the store, repeated to 60 scans of 57 people; only names and attributes matter here."""
    opened = open_store(store)
    n = 60
    return Embeddings(
        features=np.zeros((n, 8), np.float32),
        scans=pd.DataFrame(
            {"row": np.resize(opened.ok_rows, n), "participant": [f"person-{i % 57:03d}" for i in range(n)]}
        ),
        phenotypes=pd.DataFrame(),
        variables={"income": {"labels": {"1": "less than 18,000", "2": "more & more"}, "units": "GBP a year"}},
        attrs={
            "model": "resnet18",
            "weights": {"name": "imagenet", "sha256": SHA},
            "layer": "avgpool",
            "view": "triplanar",
            "slices": 3,
            "scale": 1.0,
            "pooling": "mean over slices",
            "precision": "float32",
            "input": {"rule": "stored / 255, minus mean, over std", "mean": [0.4], "std": [0.2]},
            "store": {"path": str(store), "id": opened.attrs["store_id"], "grid": opened.attrs["grid"]},
            "simulated": False,
            "created_by": {"numpy": "2.9.9"},
        },
    )


def changed(embeddings: Embeddings, **attrs: object) -> Embeddings:
    """Return embeddings with other attributes."""
    return replace(embeddings, attrs={**embeddings.attrs, **attrs})


@pytest.fixture(scope="module")
def results() -> list[TargetResult]:
    """Return one target of each kind, one with a hostile name, one skipped."""
    n = 60
    rng = np.random.default_rng(0)
    fold = np.arange(n) % 5
    sex = rng.integers(0, 2, n)
    male = np.clip(sex + rng.normal(scale=0.4, size=n), 0, 1)
    binary = {"auc": Interval(0.967, 0.941, 0.993, 0.5), "balanced_accuracy": Interval(0.91, 0.86, 0.95, 0.5)}
    none = {
        "r": Interval(0.04, -0.1, 0.17, 0.0),
        "r2": Interval(-0.01, -0.1, 0.05, 0.0),
        "mae": Interval(1.11, 1.0, 1.2, 1.12),
    }
    age = rng.normal(60, 8, n)
    income = rng.integers(1, 6, n).astype(float)
    smoking = OutOfFold(rng.integers(0, 3, n), rng.dirichlet([6, 4, 2], n), fold)
    labels = ["never", "previous", "current"]
    return [
        TargetResult(
            "sex", "binary", "ok", n, 57, metric="auc", metrics=binary, labels=["female", "male"],
            method="logistic regression", out_of_fold=OutOfFold(sex, np.c_[1 - male, male], fold),
        ),
        TargetResult(
            "age", "continuous", "ok", n, 57, metric="r", metrics={"r": Interval(-0.4, -0.6, -0.2, 0.0)},
            units="years", out_of_fold=OutOfFold(age, age + rng.normal(size=n), fold),
        ),
        TargetResult(
            "income", "ordinal", "ok", n, 57, metric="r", metrics=none, units="GBP a year",
            out_of_fold=OutOfFold(income, np.full(n, 3.0), fold),
        ),
        TargetResult(
            "smoking", "multiclass", "ok", n, 57, metric="auc", metrics={"auc": Interval(0.5, 0.4, 0.6, 0.5)},
            labels=labels, out_of_fold=smoking,
        ),
        TargetResult(
            HOSTILE, "multiclass", "ok", n, 57, metric="auc", metrics={"auc": Interval(0.5, 0.4, 0.6, 0.5)},
            labels=[HOSTILE, "$x^{$", "\x00 脳 "], out_of_fold=smoking, units=HOSTILE,
        ),
        TargetResult("head_size", "continuous", "skipped", 12, 11, reason=f"12 scans, at least 20 needed {HOSTILE}"),
    ]  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and the tags left open."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def images(self) -> list[tuple[str, bytes]]:
        """Alternative text and content of each picture."""
        found = []
        for tag, attrs in self.tags:
            if tag == "img":
                head, _, content = attrs["src"].partition(";base64,")
                assert head in ("data:image/png", "data:image/svg+xml")
                found.append((attrs["alt"], base64.b64decode(content, validate=True)))
        return found

    @property
    def brains(self) -> int:
        """Number of brains shown."""
        return sum(content.startswith(b"\x89PNG") for _, content in self.images)


def written(tmp_path: Path, embeddings: Embeddings, results: list[TargetResult], **more) -> tuple[str, Page, list[str]]:
    path = tmp_path / "new" / "folder" / "report.html"
    warnings = write_report(path, embeddings, results, settings=SETTINGS, **more)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    return source, Page(source), warnings


def svg_text(content: bytes) -> str:
    """Return the words in an SVG file."""
    return " ".join("".join(ET.fromstring(content).itertext()).split())


@pytest.mark.parametrize(
    ("marker", "plane", "side"),
    [
        ("left", "axial", "left"),
        ("left", "coronal", "left"),
        ("front", "axial", "top"),
        ("front", "sagittal", "right"),
        ("top", "coronal", "top"),
        ("top", "sagittal", "top"),
    ],
)
def test_planes_are_upright_and_left_is_left(store, marker, plane, side):
    opened = open_store(store)
    row = [Path(source).stem for source in opened.scans["source"]].index(f"person-{marker}.nii")
    with VolumeReader(opened) as reader:
        found = {p.name: p for p in planes_of(reader.read([row])[0])}[plane]
    height, width = found.pixels.shape
    y, x = (np.median(axis) for axis in np.nonzero(found.pixels == 255))
    middle = {"left": x < 0.35 * width, "right": x > 0.65 * width, "top": y < 0.35 * height}
    assert middle[side], (x, y)
    assert (found.left, found.right) == (("P", "A") if plane == "sagittal" else ("L", "R"))


def test_montage_shows_all_voxels_undistorted_with_letters_on_their_sides():
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 256, (10, 14, 12), dtype=np.uint8)
    figure = montage_figure(volume)
    axes = figure.axes[0]
    picture = np.asarray(axes.images[0].get_array())
    starts = {}
    for plane in planes_of(volume):
        windows = np.lib.stride_tricks.sliding_window_view(picture, plane.pixels.shape)
        places = np.argwhere((windows == plane.pixels).all(axis=(2, 3)))
        assert len(places) == 1  # whole, once
        starts[plane.name] = (places[0][1], plane)
    assert axes.images[0].get_clim() == (0, 255)
    assert axes.get_aspect() == 1.0
    width, height = figure.get_size_inches()
    assert width / height == pytest.approx(picture.shape[1] / picture.shape[0])
    letters = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert [letter for letter, _ in letters] == ["L", "R", "L", "R", "P", "A"]
    for i, (start, plane) in enumerate(starts.values()):
        middle = start + plane.pixels.shape[1] / 2
        assert start <= letters[2 * i][1] < middle < letters[2 * i + 1][1] < start + plane.pixels.shape[1]


def test_letters_are_drawn_on_an_empty_brain():
    pixels = imread(io.BytesIO(montage_png(np.zeros((160, 192, 160), np.uint8))))
    assert pixels.shape[:2] == (2 * 192, 2 * (160 + 160 + 192 + 12))
    assert pixels[..., :3].max() > 0.9
    assert pixels[40:, :, :3].max() == 0  # black below the letters


def test_rows_are_evenly_spaced():
    rows = np.arange(100) * 3
    assert list(evenly_spaced(rows, 4)) == [0, 99, 198, 297]
    assert list(evenly_spaced(rows[:2], 6)) == [0, 3]
    assert list(evenly_spaced(rows[:0], 6)) == []


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
    rows = re.findall(r"<tr>(.*?)</tr>", source, flags=re.S)
    row = {name: Page(next(r for r in rows if f'scope="row">{name}<' in r)).text for name in ("sex", "age", "income")}
    for words in (
        "binary",
        "60(57)",
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
    assert len(plots) == 5 + 2  # and one panel for each headline metric


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
    assert warnings == [f"row {row} of the store copy.zarr is damaged and not shown; ingest it again"]
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
            write_report(path, embeddings, [], settings=SETTINGS)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "new", "report.html"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0871, "0.0871"), (0.9, "0.900"), (3.614, "3.61"), (61.27, "61.3"), (12345.6, "12,346"), (0.0, "0")],
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


def test_confusion_matrix_gives_rare_classes_their_due():
    # Both classes' probabilities follow their frequencies, so the most probable class is 0 throughout.
    truth = np.array([0, 0, 0, 1] * 10)
    informed = np.where(truth == 1, 0.35, 0.15)
    text = svg_text(confusion_plot(OutOfFold(truth, np.c_[1 - informed, informed], np.arange(40) // 8), ["a", "b"]))
    assert re.findall(r"\((\d+)\)", text) == ["30", "0", "0", "10"]


def test_extreme_predictions_are_drawn():
    n = 6000
    rng = np.random.default_rng(0)
    fold = np.arange(n) % 5
    true = rng.integers(40, 80, n).astype(float)
    many = scatter_plot(OutOfFold(true, true + rng.normal(size=n), fold), "age (years)")
    assert "scans" in svg_text(many)
    assert len(many) < 200_000
    constant = scatter_plot(OutOfFold(np.full(9, 2.0), np.full(9, 2.0), fold[:9]), "x" * 300)
    assert "…" in svg_text(constant)
    scatter_plot(OutOfFold(true[:3], np.full(3, np.nan), fold[:3]), "age")
    one_class = OutOfFold(np.zeros(10, int), np.full((10, 2), 0.5), fold[:10])
    assert "mean of folds" not in svg_text(roc_plot(one_class, "male"))
    confusion_plot(OutOfFold(rng.integers(0, 30, 90), rng.dirichlet(np.ones(30), 90), fold[:90]), ["site"] * 30)
    nan = float("nan")
    lost = TargetResult("a" * 99, "binary", "ok", 9, 9, metric="auc", metrics={"auc": Interval(nan, nan, nan, 0.5)})
    assert "not defined" in svg_text(forest_plot([lost], xlabel="AUC", span=(0.4, 1.0)))


def test_equal_results_give_equal_plots(results):
    first, again = (forest_plot(results[:1], xlabel="AUC", span=(0.4, 1.0)) for _ in range(2))
    assert first == again
    assert json.dumps(svg_text(first)).isascii()
