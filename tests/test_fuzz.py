"""Damaged files by the thousand: `read_nifti` and the conversion refuse with a `ScanError`, or say what nibabel says.

The files run in a process of their own, with a limit on its memory and a watchdog that ends it when one file hangs.
The long run, with its figures printed as JSON:  python tests/test_fuzz.py 20000 SEED [FOLDER OF NIFTI FILES]
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_cases import DTYPES, nifti, nifti_pair, pack

from ingest.convert import convert_scan
from ingest.decode import decode_shard
from ingest.errors import ScanError
from ingest.grid import GRIDS, space_of
from ingest.intensity import IntensityRule
from ingest.nifti import MAX_VOXELS, NiftiVolume, read_nifti
from ingest.scan import STATUSES, ScanSource
from ingest.shard import shard_path

SECONDS_PER_FILE = 20  # a read takes 1 ms, the first conversion of each voxel type compiles for seconds
MEMORY = 512 << 20  # above what the process has after its imports and a first conversion
SLAB = 4

_SPECIAL = [0, 1, -1, 2, 3, 7, 127, 348, 352, 540, 544, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**62, -(2**63)]
_SPECIAL_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3e38, -3e38, 1e300, np.nan, np.inf, -np.inf, 352.5]
_NIBABEL_REFUSES = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    IndexError,
    MemoryError,
    zlib.error,
)

Case = tuple[bytes, bytes | None]


def corpus(folder: Path | None = None) -> list[Case]:
    """Return small valid files (content, image of a pair or None), and those of `folder`."""
    rng = np.random.default_rng(0)
    head = np.diag([20.0, 20, 20, 1])
    head[:3, 3] = [-90, -126, -72]
    brain = np.array([[-12.0, 1, 0, 60], [1, 12, 0, -60], [0, 2, 12, -60], [0, 0, 0, 1]])
    cases: list[Case] = []
    for number, dtype in enumerate(DTYPES):
        data = rng.uniform(0, 120, (9, 11, 10)).astype(dtype)
        for order in "<>":
            form = (1, 1) if number % 2 else (0, 1)
            settings = {"order": order, "sform": form[0], "qform": form[1], "affine": brain if number % 3 else head}
            cases.append((nifti(data, kind=nib.Nifti1Image, extension=b"note" * 9, **settings), None))
            cases.append((nifti(data, kind=nib.Nifti2Image, **settings), None))
            cases.append((pack(nifti(data[..., None], **settings), 1 + number % 3), None))
            cases.append(nifti_pair(data, kind=nib.Nifti2Pair if number % 2 else nib.Nifti1Pair, **settings))
    cases.append((nifti(rng.uniform(0, 120, (10, 12, 10)), affine=head, sform=4), None))
    if folder:
        cases += [(path.read_bytes(), None) for path in sorted(folder.iterdir()) if ".nii" in path.name]
    return cases


def mutate(rng: np.random.Generator, cases: list[Case]) -> Case:
    """Return one of the cases with one to three changes, and sometimes a layer of gzip around it."""
    content, image = cases[rng.integers(len(cases))]
    changes = (_flip_bits, _overwrite, _randomise_field, _randomise_field, _truncate, _duplicate, _remove)
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.05:
            other = cases[rng.integers(len(cases))][0]
            content = content[: rng.integers(len(content) + 1)] + other[rng.integers(len(other) + 1) :]
            continue
        change = changes[rng.integers(len(changes))]
        if image is not None and rng.random() < 0.3:
            image = change(rng, image)
        else:
            content = change(rng, content)
    if rng.random() < 0.2:
        content = pack(content, int(rng.integers(1, 4)))
        if rng.random() < 0.3:  # padding, garbage, a bomb of a megabyte
            content += [b"\0" * 100, b"garbage", gzip.compress(b"\0" * (1 << 20))][rng.integers(3)]
        if rng.random() < 0.3:
            content = _flip_bits(rng, content)
    if image is not None and rng.random() < 0.2:
        image = gzip.compress(image)
    return content, image


def _flip_bits(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        if changed:
            changed[int(len(changed) * rng.random() ** 3)] ^= 1 << int(rng.integers(8))  # mostly in the header
    return bytes(changed)


def _overwrite(rng: np.random.Generator, content: bytes) -> bytes:
    at, length = int(len(content) * rng.random() ** 3), int(rng.integers(1, 17))
    return (content[:at] + rng.bytes(length) + content[at + length :])[: len(content)]


def _randomise_field(rng: np.random.Generator, content: bytes) -> bytes:
    """Give a header field a value that is special, or random."""
    sizes = [int.from_bytes(content[:4], order) for order in ("little", "big")]
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    fields = kind.template_dtype.fields
    dtype, offset = fields[list(fields)[rng.integers(len(fields))]][:2]
    if dtype.base.kind not in "iuf" or rng.random() < 0.2:
        value = rng.bytes(dtype.itemsize)
    else:
        single = dtype.base.newbyteorder("<" if sizes[0] in (348, 540) else ">")
        offset += single.itemsize * int(rng.integers(dtype.itemsize // single.itemsize))
        with np.errstate(over="ignore", invalid="ignore"):
            special = np.array([*_SPECIAL_FLOATS, *_SPECIAL] if single.kind == "f" else _SPECIAL)
            value = rng.choice(special).astype(single).tobytes()
    return (content[:offset] + value + content[offset + len(value) :])[: len(content)]


def _truncate(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(len(content) + 1))] if rng.random() < 0.3 else content


def _duplicate(rng: np.random.Generator, content: bytes) -> bytes:
    a, b = sorted(rng.integers(len(content) + 1, size=2))
    return content[:b] + content[a:]


def _remove(rng: np.random.Generator, content: bytes) -> bytes:
    a = int(rng.integers(len(content) + 1))
    return content[:a] + content[a + int(rng.integers(1, 64)) :]


def read_checked(content: bytes, image: bytes | None) -> tuple[str, NiftiVolume | None]:
    """Read one file; return its status and, if accepted, the volume. What is accepted is checked against nibabel."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            volume = read_nifti(content, image)
        except ScanError as error:
            refusal = error
        else:
            refusal = None
    if refusal is not None:
        assert refusal.status in STATUSES
        assert refusal.reason
        return refusal.status, None
    assert 8 <= volume.data.size <= MAX_VOXELS
    assert min(volume.data.shape) >= 2
    assert np.isfinite([*volume.affine.ravel(), volume.slope, volume.inter]).all()
    expected = _nibabel(content, image)
    if expected is None:
        return "ok, refused by nibabel", volume
    values, affine = expected
    with np.errstate(all="ignore"):
        ours = volume.data.transpose(2, 1, 0).astype(np.float64) * volume.slope + volume.inter
    np.testing.assert_array_equal(ours, values.reshape(ours.shape))
    np.testing.assert_array_equal(volume.affine, affine)
    return "ok", volume


def _nibabel(content: bytes, image: bytes | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return nibabel's values and affine, None if it refuses the file."""
    try:
        files = [gzip.decompress(part) if part[:2] == b"\x1f\x8b" else part for part in (content, image or b"")]
        second = 540 in (int.from_bytes(files[0][:4], order) for order in ("little", "big"))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            if image is None:
                loaded = (nib.Nifti2Image if second else nib.Nifti1Image).from_bytes(files[0])
            else:
                kind = nib.Nifti2Pair if second else nib.Nifti1Pair
                streams = dict(zip(("header", "image"), map(io.BytesIO, files), strict=True))
                loaded = kind.from_file_map(kind.make_file_map(streams))
            return loaded.get_fdata(), loaded.affine
    except _NIBABEL_REFUSES:
        return None


def convert_checked(content: bytes, volume: NiftiVolume, folder: Path) -> str:
    """Send an accepted file all the way to its shard; return the status of its row."""
    path = folder / "scan.nii"
    path.write_bytes(content)
    grid = GRIDS[space_of(path.name, volume.affine, volume.data.shape[::-1], volume.form_code)]
    source = ScanSource(str(path), path.name, "9000001", "", "T1w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = convert_scan(source, 0, folder, grid, IntensityRule(), SLAB).row
    assert row.status in STATUSES
    assert not row.error.startswith("unexpected"), row.error
    if row.status == "ok":
        voxels = np.empty(grid.shape_zyx, np.uint8)
        decode_shard(np.frombuffer(shard_path(folder, 0).read_bytes(), np.uint8), SLAB, voxels)
        assert voxels.max() == 255
        assert np.count_nonzero(voxels) == row.brain_voxels > 0
        assert np.isfinite(row.scale)
        assert row.scale > 0
    return row.status


def fuzz(files: int, seed: int, convert_every: int, folder: Path | None) -> dict[str, object]:
    """Run that many damaged files; return counts, the slowest read and the peak of the memory."""
    logging.disable(logging.CRITICAL)  # nibabel reports each header that it mends
    cases = corpus(folder)
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    accepted, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        faulthandler.dump_traceback_later(300, exit=True)
        for content, image in cases[:80:4]:  # compiles
            convert_checked(content, read_nifti(content, image), Path(scratch))
        _limit_memory()
        for number in range(files):
            faulthandler.dump_traceback_later(SECONDS_PER_FILE, exit=True)
            content, image = mutate(rng, cases)
            try:
                started = time.perf_counter()
                status, volume = read_checked(content, image)
                slowest = max(slowest, time.perf_counter() - started)
                outcomes[status] += 1
                if volume is not None and image is None:
                    accepted += 1
                    if accepted % convert_every == 0:
                        converted[convert_checked(content, volume, Path(scratch))] += 1
            except BaseException:
                Path(tempfile.gettempdir(), f"fuzz-{seed}-{number}.nii").write_bytes(content)
                print(f"file {number} of seed {seed}, kept as fuzz-{seed}-{number}.nii", file=sys.stderr)
                raise
        faulthandler.cancel_dump_traceback_later()
    return {
        "files": files,
        "read": dict(outcomes),
        "converted": dict(converted),
        "slowest_read_s": round(slowest, 3),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _limit_memory() -> None:
    """Let the address space grow by no more than `MEMORY`; only Linux says how large it is."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def run_apart(files: int, seed: int, *folder: Path) -> dict[str, dict[str, int]]:
    command = [sys.executable, __file__, str(files), str(seed), *map(str, folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_damaged_files_are_refused_or_read_as_nibabel_does():
    result = run_apart(int(os.environ.get("BRAIN_VOLUMES_FUZZ_FILES", "1000")), 1)
    assert min(result["read"][status] for status in ("ok", "bad_nifti", "bad_image", "unsupported")) > 20
    assert result["converted"]["ok"] > 5


@pytest.mark.real_data
def test_damaged_real_files_are_refused_or_read_as_nibabel_does(real_data):
    result = run_apart(300, 2, real_data / "odd")
    assert min(result["read"][status] for status in ("ok", "bad_nifti", "unsupported")) > 5


if __name__ == "__main__":
    count, chosen = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(fuzz(count, chosen, 20, Path(sys.argv[3]) if sys.argv[3:] else None)))
