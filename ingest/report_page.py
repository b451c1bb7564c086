"""The page of a store: everything that `ingest report` found, as one HTML file that needs nothing beside it.

Names and reasons come from files that anybody may have made. In the page they travel as deflated JSON in base64, which
no HTML parser can mistake for anything else, and its script writes them as text, never as markup. The policy in the
page's head allows that one script, by its hash, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ingest.failures import group_failures
from ingest.histograms import HEIGHT, WIDTH, Histogram, draw_histogram
from ingest.outliers import OUTLIER_SCORE, Cohort
from ingest.pictures import fit_pictures, montage_letters
from ingest.quality import CENTRE, HEAD_VOLUME
from ingest.scan import EXPECTED_ABSENCES, STATUSES
from ingest.store import VolumeStore, package_versions

#: What a page may weigh, of which the pictures get what the rest leaves: with 40,000 scans about 2,500 of them.
PAGE_BYTES = 18_000_000

DAMAGED = "damaged"  # what the page calls an ok row whose shard cannot be read

_FEW_SCANS = 10
_SLACK_BYTES = 2000  # for the numbers that are known only once the pictures are chosen

_MEANINGS = {
    "ok": "stored, and in the gallery",
    DAMAGED: "stored, but the shard cannot be read; ingest verify --repair makes it again",
    "pending": "found, but not read yet; run the same ingest again",
    "unusable": "set aside by UK Biobank's own pipeline; expected",
    "missing_member": "the archive has no such image; expected",
    "bad_archive": "the zip file is damaged",
    "bad_nifti": "the NIfTI file is damaged",
    "bad_image": "the image is empty or constant, or its geometry is impossible",
    "unsupported": "a kind of image that is not stored",
    "wrong_shape": "another space or shape than the store's",
    "read_error": "the file could not be read",
    "duplicate": "a second scan of one participant, session and modality",
    "withdrawn": "removed when the participant withdrew; expected",
}


@dataclass(frozen=True)
class StatusCount:
    """How many scans have a status."""

    status: str
    scans: int
    share: float
    kind: str
    meaning: str


@dataclass(frozen=True)
class Missing:
    """How many of the scans with a volume lack a phenotype."""

    name: str
    scans: int
    share: float


def render_page(
    store: VolumeStore,
    cohort: Cohort,
    damaged: Mapping[int, str],
    pictures: Iterable[tuple[int, bytes]],
    *,
    page_bytes: int = PAGE_BYTES,
) -> tuple[str, int]:
    """Write the page.

    Parameters
    ----------
    store
        Its tables; no file is read.
    cohort
        One row per scan of the store.
    damaged
        Row to reason, of ``ok`` rows whose shard could not be read.
    pictures
        (row, WebP file) in the order in which they are wanted; as many are taken as fit.
    page_bytes
        What the page may have. The tables are not cut: where they alone are larger, there are no pictures.

    Returns
    -------
    page : str
    pictures : int
        How many are in it.
    """
    status = np.where(np.isin(np.arange(len(store.scans)), list(damaged)), DAMAGED, store.scans["status"])
    context = {
        **_facts(store, cohort, status),
        "payload": _deflated(_payload(store, cohort, damaged, status)),
    }
    bare = _render(context, {})
    taken = fit_pictures(pictures, page_bytes - len(bare.encode(errors="replace")) - _SLACK_BYTES)
    return _render(context, taken), len(taken)


def _render(context: Mapping[str, Any], pictures: Mapping[int, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ingest"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (files("ingest") / "templates" / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        **context,
        # base64 and numbers only, so that nothing in it needs escaping
        pictures=Markup(json.dumps(pictures, separators=(",", ":"))),
        picture_count=len(pictures),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _deflated(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: names that are no UTF-8 get through
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def _facts(store: VolumeStore, cohort: Cohort, status: np.ndarray) -> dict[str, Any]:
    """Return what the template writes by itself: what can be read without a script."""
    attrs = store.attrs
    counts = Counter(status.tolist())
    measured = int(np.isfinite(cohort.score).sum())
    people = store.scans.loc[store.scans["participant"] != "", "participant"].nunique()
    depth, height, width = store.grid.shape_zyx
    grid = f"{width} × {height} × {depth} voxels (x, y, z) of {store.grid.voxel_mm:g} mm, RAS, {store.grid.space}"
    return {
        "name": store.path.name,
        "store_id": str(attrs.get("store_id", "")),
        "simulated": bool(attrs.get("simulated")),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "summary": [
            ("Scans", f"{len(status):,}"),
            ("Participants", f"{people:,}"),
            ("With a volume", f"{measured:,}"),
            ("Outliers", f"{len(cohort.outliers):,}"),
            ("Damaged", f"{counts[DAMAGED]:,}"),
            ("Space", store.grid.space),
        ],
        "damaged": counts[DAMAGED],
        "pending": counts["pending"],
        "few": 0 < measured < _FEW_SCANS,
        "measured": measured,
        "whole_heads": HEAD_VOLUME in cohort.measures,
        "template_space": store.grid.space != "native",
        "statuses": _status_counts(counts),
        "histograms": _histograms(store, cohort, status),
        "drawing": (WIDTH, HEIGHT),
        "missing": _missing(store),
        "with_volume": int((store.scans["status"] == "ok").sum()),
        "measures": cohort.measures,
        "outlier_score": OUTLIER_SCORE,
        "provenance": [
            ("store", store.path.name),
            ("store id", str(attrs.get("store_id", ""))),
            ("grid", grid),
            ("slabs", f"{store.slab} planes, LZ4"),
            ("grey levels", _plain(attrs.get("intensity"))),
            ("simulated", "yes" if attrs.get("simulated") else "no"),
            ("store made by", _plain(attrs.get("created_by"))),
            ("report made by", _plain(package_versions("numpy", "numba", "pillow"))),
        ],
        "settings": [(name.replace("_", " "), _plain(value)) for name, value in (attrs.get("settings") or {}).items()],
    }


def _payload(store: VolumeStore, cohort: Cohort, damaged: Mapping[int, str], status: np.ndarray) -> dict[str, Any]:
    """Return the tables of the page, column by column, for its script."""
    scans = store.scans
    reasons = {
        row: (str(status[row]), damaged.get(row, str(scans["error"].iloc[row])))
        for row in np.flatnonzero(status != "ok").tolist()
    }
    groups = group_failures(reasons)
    names = [name for name in (DAMAGED, "ok", *STATUSES[2:], STATUSES[0]) if name in set(status)]
    names += sorted(set(status) - set(names))
    code = {name: number for number, name in enumerate(names)}
    decimals = {measure.name: measure.decimals for measure in cohort.measures} | dict.fromkeys("xyz", 1)
    outliers = cohort.outliers.tolist()
    return {
        "store": store.path.name,
        **{name: scans[name].tolist() for name in ("participant", "session", "modality", "source")},
        "statuses": names,
        "kinds": [_kind(name) for name in names],
        "status": [code[name] for name in status.tolist()],
        "reason": {row: reason for row, (_, reason) in reasons.items()},
        "groups": [{"status": group.status, "pattern": group.pattern} for group in groups],
        "group": {row: number for number, group in enumerate(groups) for row in group.rows},
        "measures": [asdict(measure) for measure in cohort.measures],
        "numbers": {name: _rounded(cohort.numbers[name].to_numpy(), digits) for name, digits in decimals.items()},
        "score": _rounded(cohort.score, 2),
        "why": {row: cohort.explain(row) for row in outliers},
        "flags": {row: [measure.name for measure in cohort.standing_out(row)] for row in outliers},
        "letters": [asdict(letter) for letter in montage_letters(store.grid.shape_zyx)],
    }


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    return [None if value != value else round(value, digits) + 0.0 for value in values.tolist()]  # + 0.0: no minus zero


def _kind(status: str) -> str:
    """Return how a status is shown: good, expected, waiting, or bad."""
    if status == "ok":
        return "good"
    if status == "pending":
        return "waiting"
    return "expected" if status in EXPECTED_ABSENCES else "bad"


def _status_counts(counts: Counter[str]) -> list[StatusCount]:
    total = max(1, counts.total())
    return [
        StatusCount(status, scans, scans / total, _kind(status), _MEANINGS.get(status, "unknown to this version"))
        for status, scans in counts.most_common()
    ]


def _histograms(store: VolumeStore, cohort: Cohort, status: np.ndarray) -> list[Histogram]:
    drawn = []
    deviations = cohort.deviations.abs()
    for measure in cohort.measures:
        values = cohort.numbers[measure.name].to_numpy(np.float64)
        outlying = (deviations[measure.name] > OUTLIER_SCORE).to_numpy()
        median, spread = cohort.median[measure.name], cohort.spread[measure.name]
        sides = (1,) if measure is CENTRE else (-1, 1)
        lines = [(median, "median"), *((median + side * OUTLIER_SCORE * spread, "limit") for side in sides)]
        series = [("usual", values[~outlying]), ("outlying", values[outlying])]
        drawn.append(draw_histogram(measure.title, measure.unit, measure.meaning, series, lines=lines))
    stored = status == "ok"
    head_scale = store.scans["head_scale"].to_numpy(np.float64)
    note = "volume in MNI152 space over the head's own"
    drawn.append(draw_histogram("Head scale", "ratio", note, [("usual", head_scale[stored])]))
    size = store.scans["source_size"].to_numpy(np.float64) / 1e6
    present = size > 0
    series = [("usual", size[present & stored]), ("failed", size[present & ~stored])]
    middle = float(np.median(size[present])) if present.any() else 0.0
    note = "size of the file or archive, with and without a volume"
    drawn.append(draw_histogram("Source file", "MB", note, series, least_reach=middle))  # from 0: failures are small
    return [histogram for histogram in drawn if histogram]


def _missing(store: VolumeStore) -> list[Missing]:
    ok = store.ok_rows
    missing = store.phenotypes.iloc[ok].isna().sum()
    found = [Missing(str(name), int(count), int(count) / max(1, len(ok))) for name, count in missing.items()]
    return sorted(found, key=lambda variable: -variable.scans)


def _plain(value: object) -> str:
    """Write a setting for people."""
    if value is None or value == "":
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    return str(value)
