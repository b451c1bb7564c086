"""Writing a simulated cohort, laid out as UK Biobank bulk files or as BIDS, with the truth beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path

import deflate
import nibabel as nib
import numpy as np
import pandas as pd

from ingest.brains import Anatomy, Effects, flirt_matrix, mni_volume, native_volume
from ingest.cohort import anatomy_of, bids_table, draw_people, ukb_table, visits_of
from ingest.convert import SIMULATED_PREFIX
from ingest.dictionary import BY_NAME
from ingest.errors import StoreError
from ingest.grid import FSL_MNI152_AFFINE
from ingest.store import package_versions
from ingest.template import load_template

MOST_PARTICIPANTS = 900_000  # of whom each has a number of seven digits

_README = """A SIMULATED cohort: deformed copies of the MNI152 template, no people.

Age widens the lateral ventricles and lowers the contrast of grey and white matter. Sex changes the local shape of the
brain and the size of the head. Fluid intelligence changes the shape a little. Household size, income and smoking have
no effect at all. truth.csv says what was drawn for every scan, simulation.json how large the effects are.
"""


class SimulatedLayout(StrEnum):
    """How the files of a cohort are laid out."""

    ukb = "ukb"
    bids = "bids"


def simulate_cohort(
    directory: Path,
    participants: int,
    *,
    layout: str = "ukb",
    seed: int = 0,
    effects: Effects | None = None,
    threads: int | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_scan: Callable[[], None] | None = None,
) -> int:
    """Write a cohort with known effects.

    Parameters
    ----------
    directory
        A folder that does not exist or is empty. UK Biobank's layout puts archives into
        ``Bulk/Brain MRI/T1/<2 digits>`` and a ``phenotypes.csv`` at the top; BIDS has ``sub-*/ses-*/anat`` and
        ``participants.tsv``. Both have ``truth.csv`` (one row per scan) and ``simulation.json``.
    participants
        People with a scan; about one in twenty has two.
    layout
        ``ukb`` or ``bids``. About 3 % of the archives of a ``ukb`` cohort hold no usable volume, as in real ones.
    seed
        Same seed, same bytes.
    effects
        How large the effects are.
    threads
        By default one per core.
    on_plan, on_scan
        Called with the number of scans, and after each of them.

    Returns
    -------
    int
        Scans written.

    Raises
    ------
    ValueError
        For an unknown layout or no participants.
    FileExistsError
        If the folder holds anything, or is a file.
    StoreError
        If it cannot be written.
    """
    if layout not in list(SimulatedLayout):
        raise ValueError(f"layout {layout!r} is unknown, expected ukb or bids")
    if not 1 <= participants <= MOST_PARTICIPANTS:
        raise ValueError(f"participants is {participants}, expected 1 to {MOST_PARTICIPANTS}")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    people = draw_people(participants, seed)
    visits = visits_of(people)
    effects = effects or Effects()
    record = {
        "simulated": True,
        "layout": layout,
        "participants": participants,
        "scans": len(visits),
        "seed": seed,
        "effects": asdict(effects),
        "without_effect": ["household_size", "income", "smoking", "site"],
        "template": "ICBM 2009a nonlinear symmetric, as shipped by nilearn",
        "created_by": package_versions("nilearn", "numpy", "scipy", "nibabel", "deflate"),
    }
    load_template()  # once, before the threads

    def write(visit: tuple[int, str]) -> dict[str, object]:
        person, session = people.iloc[visit[0]], visit[1]
        anatomy = anatomy_of(person, session, seed)
        rng = np.random.default_rng([seed, 2, int(person["eid"]), int(session)])
        write_scan = _write_ukb_scan if layout == "ukb" else _write_bids_scan
        file = write_scan(directory, person, session, anatomy, effects, rng)
        if on_scan:
            on_scan()
        return {
            "participant": person["eid"],
            "session": session,
            "file": file.relative_to(directory),
            "fault": person["fault"] if layout == "ukb" and session == "2" else "",
            "sex": "male" if anatomy.male else "female",
            "age": anatomy.age,
            "intelligence": round(anatomy.intelligence, 4),
            "head_scale": round(anatomy.head_scale, 5),
        }

    with _clear_write_errors(directory):
        _make_empty(directory)
        if on_plan:
            on_plan(len(visits))
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as executor:
            truth = list(executor.map(write, visits))
        pd.DataFrame(truth).to_csv(directory / "truth.csv", index=False)
        if layout == "ukb":
            ukb_table(people).to_csv(directory / "phenotypes.csv", index=False)
        else:
            _write_bids_tables(directory, people)
        (directory / "README").write_text(_README)
        (directory / "simulation.json").write_text(json.dumps(record, indent=2) + "\n")
    return len(visits)


@contextlib.contextmanager
def _clear_write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:  # says itself what it is about
        raise
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be written: {error.strerror or error}; choose a folder where there is leave and room "
            "to write, and remove what was begun here"
        ) from error


def _make_empty(directory: Path) -> None:
    """Make a folder; FileExistsError if it is there and has something in it, or is none."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, expected a new or empty folder; choose another name")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; choose a new folder, or empty it")
    directory.mkdir(parents=True, exist_ok=True)


def _write_ukb_scan(
    directory: Path, person: pd.Series, session: str, anatomy: Anatomy, effects: Effects, rng: np.random.Generator
) -> Path:
    eid = str(person["eid"])
    path = directory / "Bulk" / "Brain MRI" / "T1" / eid[:2] / f"{eid}_20252_{session}_0.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    fault = person["fault"] if session == "2" else ""
    matrix = "\n".join("  ".join(f"{value:.10f}" for value in row) for row in flirt_matrix(anatomy, rng)) + "\n"
    if fault:  # such archives still hold the scan in the scanner's own space
        volume, affine = native_volume(anatomy, effects, rng)
        folder = "T1/unusable" if fault == "unusable" else "T1"
        members = {f"{folder}/T1_brain.nii.gz": _nifti_gz(volume.astype(np.int16), affine, code=1)}
    else:
        members = {"T1/T1_brain_to_MNI.nii.gz": _nifti_gz(mni_volume(anatomy, effects, rng), FSL_MNI152_AFFINE, code=4)}
    if fault != "unusable":
        members["T1/transforms/T1_to_MNI_linear.mat"] = matrix.encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with a fixed date: the same seed gives the same bytes
    return path


def _write_bids_scan(
    directory: Path, person: pd.Series, session: str, anatomy: Anatomy, effects: Effects, rng: np.random.Generator
) -> Path:
    visit = int(session) - 1
    path = directory / f"sub-{person['eid']}" / f"ses-{visit}" / "anat" / f"sub-{person['eid']}_ses-{visit}_T1w.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    volume, affine = native_volume(anatomy, effects, rng)
    path.write_bytes(_nifti_gz(volume.astype(np.int16), affine, code=1))
    return path


def _write_bids_tables(directory: Path, people: pd.DataFrame) -> None:
    description = {
        "Name": "Simulated brains with known effects",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "CC0",
        "GeneratedBy": [{"Name": name, "Version": version} for name, version in package_versions().items()],
    }
    income = {str(code): label for code, label in BY_NAME["income"].labels.items()}
    columns = {
        "sex": {"Levels": {"female": "female", "male": "male"}},
        "age": {"Description": "at the first visit", "Units": "years"},
        "household_size": {"Description": "people in the household; no effect on the brain"},
        "income": {"Levels": income, "Description": "of the household; no effect on the brain"},
        "fluid_intelligence": {"Description": "right answers; a weak effect on the brain"},
        "smoking": {"Levels": {"0": "never", "1": "previous", "2": "current"}, "Description": "no effect on the brain"},
    }
    (directory / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    (directory / "participants.json").write_text(json.dumps(columns, indent=2) + "\n")
    bids_table(people).to_csv(directory / "participants.tsv", sep="\t", index=False, na_rep="n/a")


def _nifti_gz(volume: np.ndarray, affine: np.ndarray, *, code: int) -> bytes:
    """Return the bytes of a .nii.gz file from voxels (z, y, x) and voxel (x, y, z) -> mm."""
    image = nib.Nifti1Image(volume.T, affine)
    image.header["descrip"] = f"{SIMULATED_PREFIX}, not a person"
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    buffer = io.BytesIO()
    image.to_file_map({"header": nib.FileHolder(fileobj=buffer), "image": nib.FileHolder(fileobj=buffer)})
    return bytes(deflate.gzip_compress(buffer.getvalue(), 1))
