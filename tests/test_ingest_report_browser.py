"""The report of a store in a browser: search, filters, keyboard, hostile names, narrow screens, 40,000 scans."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from reported_store import EXPECTED, HOSTILE, numbers, tables_in
from reported_store import source as source  # a fixture
from reported_store import store as store  # a fixture

from ingest.grid import MNI152_GRID
from ingest.outliers import compare_scans
from ingest.pictures import picture_order
from ingest.quality import measures_of
from ingest.report import write_report
from ingest.report_page import PAGE_BYTES, render_page
from ingest.store import VolumeStore


def synthetic(n: int, **columns: Any) -> tuple[VolumeStore, pd.DataFrame]:
    """Return a store that lies nowhere, and quality numbers of its scans; one in 32 failed."""
    rng = np.random.default_rng(0)
    ids = (9_000_000 + 17 * np.arange(n)).astype(str)
    ok = np.arange(n) % 32 != 5
    scans = pd.DataFrame(
        {
            "participant": ids,
            "session": np.where(np.arange(n) % 20 == 0, "3", "2"),
            "modality": "T1",
            "source": [f"Bulk/Brain MRI/T1/{i[:2]}/{i}_20252_2_0.zip/T1/T1_brain_to_MNI.nii.gz" for i in ids],
            "source_size": rng.integers(2 * 10**7, 4 * 10**7, n),
            "status": np.where(ok, "ok", rng.choice(["unusable", "bad_nifti", "missing_member"], n)),
            "error": [
                "" if fine else f"truncated: the gzip data end after {nbytes} bytes"
                for fine, nbytes in zip(ok, rng.integers(0, 10**7, n), strict=True)
            ],
            "head_scale": rng.normal(1.3, 0.1, n),
            **columns,
        }
    )
    measured = numbers(n)
    measured["noise"] = 5 + rng.standard_t(5, n)
    measured[scans["status"] != "ok"] = np.nan
    phenotypes = pd.DataFrame({"age": np.where(rng.random(n) < 0.1, np.nan, 60.0)})
    attrs = {"store_id": "0" * 32, "simulated": False}
    return VolumeStore(Path("big.zarr"), attrs, MNI152_GRID, 4, scans, phenotypes, {}), measured


def a_picture(nbytes: int = 5200) -> bytes:
    """Return a WebP file of about the size of a brain's."""
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(520) % 256, (192, 1)).astype(np.uint8)).save(buffer, "WEBP", quality=50)
    assert buffer.tell() < nbytes
    return buffer.getvalue().ljust(nbytes, b"\0")


@pytest.fixture(scope="module")
def large_page(tmp_path_factory) -> Path:
    """Return the page of 40,000 scans."""
    store, measured = synthetic(40_000)
    cohort = compare_scans(measured, measures_of(whole_heads=False))
    order = picture_order(store.ok_rows, cohort.outliers)
    content = a_picture()
    page, count = render_page(store, cohort, {}, ((row, content) for row in order))
    assert 1500 < count < 5000
    path = tmp_path_factory.mktemp("large") / "large.html"
    path.write_text(page, encoding="utf-8")
    return path


def test_40000_scans_weigh_less_than_20_mb(large_page):
    assert 0.9 * PAGE_BYTES < large_page.stat().st_size <= PAGE_BYTES < 20_000_000
    page = large_page.read_text(encoding="utf-8")
    assert len(tables_in(page)["participant"]) == 40_000
    assert re.search(r"Only the first [\d,]+ pictures are embedded", page)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium with a user of its own."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium here; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=executable,
            headless=True,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)],
            viewport={"width": 1100, "height": 900},
        )
        yield context
        context.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page and waits until it is filled; at the end nothing may have gone wrong."""
    tab = browser.new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: None if re.match("data:|file:", request.url) else wrong.append(request.url))

    def open_page(path: Path):
        tab.goto(path.as_uri())
        tab.wait_for_selector("#state:not(:empty)")
        return tab

    yield open_page
    tab.close()
    assert wrong == []


@pytest.fixture(scope="module")
def study_page(store, tmp_path_factory) -> Path:
    """Return the report of the store."""
    page = tmp_path_factory.mktemp("page") / "study.html"
    write_report(store, page)
    return page


def cards(tab) -> list[str]:
    return tab.locator("#gallery .card h3").all_text_contents()


def search(tab, words: str) -> None:
    """Type into the search box and wait for its answer."""
    tab.evaluate("document.getElementById('state').textContent = ''")
    tab.fill("#search", words)
    tab.wait_for_selector("#state:not(:empty)")


def test_browser_outliers_come_first_and_search_narrows(opened, study_page):
    tab = opened(study_page)
    assert set(cards(tab)[:4]) == set(EXPECTED)
    first = tab.locator(".card").first
    assert "robust SDs" in first.locator(".why").inner_text()
    assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 520)")
    search(tab, "9900002")
    assert cards(tab) == ["9900002"]
    assert tab.inner_text("#failure-state") == "0 scans of 3 without a volume"
    search(tab, "BAD_nifti truncated")  # status and reason, in any case
    assert cards(tab) == ["9920000"]
    assert tab.locator("#failure-rows tr").count() == 1
    assert "truncated" in tab.inner_text("#failure-rows")
    search(tab, "9000274.nii.gz")
    assert cards(tab) == ["9000274"]
    search(tab, "no such scan")
    assert cards(tab) == []
    assert "nothing matches" in tab.inner_text("#state")
    tab.click("#clear")
    assert len(cards(tab)) == 22


def test_browser_filters_sorts_and_groups(opened, study_page):
    tab = opened(study_page)
    tab.select_option("#status", "bad_nifti")
    assert sorted(cards(tab)) == ["9910000", "9910001", "9920000"]
    assert "No volume" in tab.locator(".card").first.inner_text()
    tab.click("#groups button >> nth=0")
    assert sorted(cards(tab)) == ["9910000", "9910001"]
    assert tab.get_attribute("#groups button >> nth=0", "aria-pressed") == "true"
    tab.click("#groups button >> nth=0")
    assert len(cards(tab)) == 3
    tab.click("#clear")
    assert tab.input_value("#status") == ""
    tab.click("#outliers")
    assert set(cards(tab)) == set(EXPECTED)
    tab.click("#outliers")
    tab.select_option("#sort", "participant")
    names = cards(tab)
    assert [name for name in names if name.isdigit()] == sorted(name for name in names if name.isdigit())
    tab.click("#direction")
    assert cards(tab) == names[::-1]
    for measure, participant in (("volume", "9900003"), ("intensity", "9900004")):
        tab.select_option("#sort", measure)
        tab.click("#direction")  # the lowest first
        assert cards(tab)[0] == participant
        assert set(cards(tab)[-3:]) == {"9910000", "9910001", "9920000"}  # without numbers: last either way
    tab.select_option("#sort", "noise")
    assert cards(tab)[0] == "9900001"


def test_browser_pages_by_keyboard_and_searches_40000_scans(opened, large_page):
    tab = opened(large_page)
    assert tab.locator(".card").count() == 24  # only what is shown exists
    first = cards(tab)
    tab.focus("#pager button[aria-label^=Next]")
    tab.keyboard.press("Enter")
    second = cards(tab)
    assert not set(first) & set(second)
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Next page of scans"
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.type("1")
    tab.keyboard.press("Enter")
    assert cards(tab) == first
    tab.fill("#pager input", "99999")
    tab.keyboard.press("Enter")
    assert tab.input_value("#pager input") == tab.get_attribute("#pager input", "max") == "1667"
    assert tab.is_disabled("#pager button[aria-label^=Next]")
    assert len(cards(tab)) == 16
    search(tab, "9170000")
    assert cards(tab) == ["9170000 · session 3"]
    search(tab, "truncated unusable")
    found = int(tab.inner_text("#state").split()[0].replace(",", ""))
    assert 300 < found < 600
    assert tab.inner_text("#failure-state").startswith(f"{found} scans of 1,250 ")
    assert tab.locator("#failure-rows tr").count() == 50
    tab.click("#failure-pager button[aria-label^=Next]")
    assert tab.input_value("#failure-pager input") == "2"
    tab.click("#clear")
    tab.select_option("#sort", "row")
    tab.fill("#pager input", "3")
    tab.keyboard.press("Enter")
    rows = tab.locator("#gallery .card").evaluate_all("(all) => all.map((card) => Number(card.dataset.row))")
    assert rows == list(range(48, 72))
    assert "Picture not embedded" in tab.inner_text("#gallery")
    assert "--rows 48" in tab.inner_text("#gallery")


def test_browser_shows_hostile_names_as_they_are(opened, tmp_path):
    names = [HOSTILE, "a\0b", "\u202egnp", "</textarea><svg onload=alert(1)>", "{{ 7 * 7 }}", "${alert(1)}", "脳 é"]
    columns = {
        name: [f"{text}-{name}" for text in names] for name in ("participant", "session", "modality", "source", "error")
    }
    store, measured = synthetic(len(names), **columns, status=["ok", "bad_nifti", *["ok"] * 5])
    store.attrs["settings"] = {HOSTILE: HOSTILE}
    cohort = compare_scans(measured, measures_of(whole_heads=False))
    page, _ = render_page(store, cohort, {2: HOSTILE}, [])
    assert "alert(1)" not in page.replace(HOSTILE, "").replace("&lt;script&gt;alert(1)", "")
    path = tmp_path / "hostile.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    tab = opened(path)
    for row, text in enumerate(names):
        card = tab.locator(f".card[data-row='{row}']")
        expected = f"{text}-participant · session {text}-session"
        assert card.locator("h3").text_content() == expected
        source = f"row {row} · {text}-modality · {text}-source"
        assert card.locator(".source").text_content() == source
    assert tab.locator("#failure-rows tr[data-row='2'] td").last.text_content() == HOSTILE
    search(tab, "<script>alert(1)</script>'\"&amp;")
    assert len(cards(tab)) == 2  # by name, and by reason
    assert tab.locator("svg[onload], img[onerror]").count() == 0


def test_browser_shows_a_hostile_file_of_a_real_store(opened, study_page):
    tab = opened(study_page)
    search(tab, "onerror")
    assert cards(tab) == ["<img src=x onerror=alert(1)> '\"&amp;"]


def test_browser_runs_no_other_script(browser, study_page):
    tab = browser.new_page()
    tab.goto(study_page.as_uri())
    tab.evaluate(
        "() => { const added = document.createElement('script'); added.textContent = 'window.ran = true';"
        "document.body.append(added); const box = document.createElement('div');"
        "box.innerHTML = '<img src=x onerror=\"window.ran = true\">'; document.body.append(box); }"
    )
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.ran") is None
    tab.close()


@pytest.mark.parametrize("width", [1100, 420])
def test_browser_fits_the_screen(opened, study_page, large_page, tmp_path, width):
    for path in (study_page, large_page):
        tab = opened(path)
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        picture = tmp_path / f"{path.stem}-{width}.png"
        tab.screenshot(path=picture)
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.shape == (900, width)
        assert pixels.min() < 60 < 200 < pixels.max()
        overflowing = "(all) => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
        assert tab.locator(".card .body").evaluate_all(overflowing) == []
