"""Reading scans: hostile, damaged and strange files become a reason, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import os
import random
import socket
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingest.archive import MATRIX_MEMBER, MAX_FILE_BYTES, MAX_MEMBER_BYTES, ScanContent, read_scan
from ingest.errors import ScanError
from ingest.scan import STATUSES, ScanSource

MEMBER = "T1/T1_brain_to_MNI.nii.gz"
CONTENT = gzip.compress(random.Random(0).randbytes(5000))
MATRIX = b"0.9 0 0 1  \n0 0.9 0 2  \n0 0 1.0 3  \n0 0 0 1  \n"


def make_zip(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


GOOD = make_zip([(MEMBER, CONTENT), (MATRIX_MEMBER, MATRIX)])


def read(folder: Path, content: bytes, member: str | None = MEMBER) -> ScanContent:
    path = folder / "9000001_20252_2_0.zip"
    path.write_bytes(content)
    return read_scan(ScanSource(str(path), path.name, "9000001", "2", "T1", member))


def refusal(folder: Path, content: bytes, member: str | None = MEMBER) -> tuple[str, str]:
    with pytest.raises(ScanError) as caught:
        read(folder, content, member)
    return caught.value.status, caught.value.reason


def patched(content: bytes, offset: int, value: bytes, signature: bytes = b"PK\x01\x02") -> bytes:
    """Overwrite a field of the first record with a signature."""
    at = content.index(signature) + offset
    return content[:at] + value + content[at + len(value) :]


def test_a_good_archive_is_read(tmp_path):
    content = read(tmp_path, GOOD)
    assert content.nifti == CONTENT
    assert content.head_scale == pytest.approx(0.81)
    assert content.image is None
    stored = make_zip([(MEMBER, CONTENT)], zipfile.ZIP_STORED)
    assert read(tmp_path, stored).nifti == CONTENT
    assert np.isnan(read(tmp_path, stored).head_scale)


@pytest.mark.parametrize("matrix", [b"", b"1 2 3", b"a b c d " * 4, b"nan 0 0 0 " * 4, b"1e999 " * 16, b"1e300 " * 16])
def test_a_bad_matrix_is_unknown_head_size(tmp_path, matrix):
    content = read(tmp_path, make_zip([(MEMBER, CONTENT), (MATRIX_MEMBER, matrix)]))
    assert content.nifti == CONTENT
    assert np.isnan(content.head_scale)


@pytest.mark.parametrize(
    ("members", "status"),
    [
        (["T1/T1.nii.gz"], "missing_member"),
        (["T1/unusable/T1.nii.gz"], "unusable"),
        (["T1/unusable/", "T1/T1.nii.gz"], "missing_member"),
        (["T1/T1.nii.gz", "T1/unusable/T1_brain_to_MNI.nii.gz"], "unusable"),
        ([], "bad_archive"),
        (["T1/"], "bad_archive"),
        ([MEMBER, MEMBER], "bad_archive"),
        (["inner.zip"], "missing_member"),
    ],
)
def test_absences(tmp_path, members, status):
    content = make_zip([(name, GOOD if name == "inner.zip" else b"") for name in members])
    assert refusal(tmp_path, content)[0] == status


def test_unusable_is_found_for_members_in_folders(tmp_path):
    content = make_zip([("T1/unusable/T1.nii.gz", b"")])
    assert refusal(tmp_path, content, "T1/T1_fast/T1_brain_pve_0.nii.gz")[0] == "unusable"


@pytest.mark.parametrize(
    "name",
    [f"/{MEMBER}", f"../{MEMBER}", f"T1/../{MEMBER}", MEMBER.replace("/", "\\"), f"./{MEMBER}", f"C:/{MEMBER}"],
)
def test_hostile_names_match_nothing_and_are_never_written(tmp_path, name):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert refusal(folder, make_zip([(name, CONTENT)]))[0] == "missing_member"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "9000001_20252_2_0.zip"]


def test_a_name_cut_by_nul_is_another_name(tmp_path):
    long = MEMBER + "Xevil"
    content = make_zip([(long, CONTENT)]).replace(long.encode(), MEMBER.encode() + b"\0evil")
    assert refusal(tmp_path, content)[0] == "missing_member"


def test_encrypted_and_unknown_compression(tmp_path):
    # Byte 8 of an entry of the directory holds its flags, byte 10 its method.
    assert refusal(tmp_path, patched(GOOD, 8, b"\x01\x00")) == ("bad_archive", f"{MEMBER} is encrypted")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        status, reason = refusal(tmp_path, make_zip([(MEMBER, CONTENT)], method))
        assert status == "bad_archive"
        assert f"method {method}" in reason
    assert refusal(tmp_path, patched(GOOD, 10, b"\x63\x00"))[0] == "bad_archive"


@pytest.mark.parametrize("claimed", [10, len(CONTENT) - 1, len(CONTENT) + 1, MAX_MEMBER_BYTES + 1, 0xFFFFFFFE])
def test_a_wrong_size_is_noticed(tmp_path, claimed):
    status, reason = refusal(tmp_path, patched(GOOD, 24, struct.pack("<I", claimed)))
    assert status == "bad_archive"
    assert reason


def peak_of_refusal(folder: Path, content: bytes, member: str = MEMBER) -> tuple[str, int]:
    """Return the reason, and the most memory that the refusal took."""
    tracemalloc.start()
    try:
        status, reason = refusal(folder, content, member)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == "bad_archive"
    return reason, peak


def test_zip_bombs_take_little_memory(tmp_path):
    zeros = bytes(200 << 20)
    bomb = make_zip([(MEMBER, zeros)])
    del zeros
    honest, peak = peak_of_refusal(tmp_path, bomb)
    assert "claims to inflate" in honest
    assert peak < 10 << 20
    # A small claim, and data that inflate to 200 MB.
    _, peak = peak_of_refusal(tmp_path, patched(bomb, 24, struct.pack("<I", 1000)))
    assert peak < 10 << 20
    # The member is good, and the matrix is the bomb.
    content = make_zip([(MEMBER, CONTENT), (MATRIX_MEMBER, bytes(20 << 20))])
    _, peak = peak_of_refusal(tmp_path, content)
    assert peak < 10 << 20


def test_a_directory_of_millions_is_not_listed(tmp_path):
    entry = GOOD[GOOD.index(b"PK\x01\x02") : GOOD.index(b"PK\x05\x06")] * 60_000
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 60_000, 60_000, len(entry), 0, 0)
    reason, peak = peak_of_refusal(tmp_path, entry + end)
    assert "list of members" in reason
    assert peak < 3 * len(entry)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 120_000, 120_000, len(entry), 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(entry), 1)
    for size in (0xFFFFFFFF, 100):
        end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, size, 0, 0)
        reason, peak = peak_of_refusal(tmp_path, entry + record + locator + end)
        assert "list of members" in reason
        assert peak < 3 * len(entry)


def test_zip64_and_comments_are_read(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(MEMBER, "w", force_zip64=True) as member:
            member.write(CONTENT)
        archive.comment = b"a comment" * 2000
    assert read(tmp_path, file.getvalue()).nifti == CONTENT
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        for number in range(70_000):  # more than 65,535 need the zip64 end of the directory
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    assert b"PK\x06\x06" in file.getvalue()
    assert read(tmp_path, file.getvalue()).nifti == CONTENT


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100, GOOD[:-1], GOOD[: len(GOOD) // 2], CONTENT])
def test_what_is_no_whole_zip_is_a_bad_archive(tmp_path, content):
    assert refusal(tmp_path, content)[0] == "bad_archive"


def test_flipped_bytes_of_the_member_are_found_by_its_checksum(tmp_path):
    start = GOOD.index(MEMBER.encode()) + len(MEMBER)
    for at in range(start + 10, start + 4000, 397):
        assert refusal(tmp_path, patched(GOOD, at, bytes([GOOD[at] ^ 0x55]), GOOD[:4]))[0] == "bad_archive"


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.integers(0, len(GOOD)),
)
@example(edits=[(len(GOOD) - 1, 1)], end=len(GOOD))
def test_any_damage_is_a_scan_error_or_harmless(tmp_path_factory, edits, end):
    content = bytearray(GOOD)
    for at, value in edits:
        # Most bytes are the member's data; half of the edits go to the records at the end.
        content[at if at % 2 else -1 - at % 300] = value
    folder = tmp_path_factory.getbasetemp()
    outcome = outcome_of(folder, bytes(content[:end] if end % 3 == 0 else content))
    if isinstance(outcome, ScanError):
        assert outcome.status in STATUSES
        assert outcome.reason
    else:
        assert outcome.nifti == CONTENT


def outcome_of(folder: Path, content: bytes) -> ScanContent | ScanError:
    try:
        return read(folder, content)
    except ScanError as error:
        return error


# What is not a regular file


def plain(path: Path, member: str | None = None) -> ScanSource:
    return ScanSource(str(path), path.name, "p", "", "", member)


@pytest.mark.parametrize("member", [None, MEMBER])
def test_only_regular_files_are_opened(tmp_path, member):
    fifo, folder, loop, gone = (tmp_path / name for name in ("fifo.nii", "folder.zip", "loop.nii", "gone.nii"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    gone.symlink_to("nowhere")
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket may have 108 bytes
    try:
        listening.bind("socket.nii")
    finally:
        os.chdir(here)
        listening.close()
    expected = {
        fifo: "pipe", folder: "folder", Path("/dev/zero"): "device", tmp_path / "socket.nii": "socket",
        loop: "symbolic links", gone: "No such file", tmp_path / "a\0b": "null", fifo / "below": "Not a directory",
    }  # fmt: skip
    for path, word in expected.items():
        with pytest.raises(ScanError, match=word) as caught:
            read_scan(plain(path, member))
        assert caught.value.status == "read_error"


def test_files_of_absurd_size_are_not_read(tmp_path):
    path = tmp_path / "huge.zip"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    for member, status in ((MEMBER, "bad_archive"), (None, "unsupported")):
        with pytest.raises(ScanError, match="4294967297 bytes") as caught:
            read_scan(plain(path, member))
        assert caught.value.status == status


# Pairs


@pytest.mark.parametrize(
    ("image", "header"),
    [(".img", ".hdr"), (".img.gz", ".hdr.gz"), (".img.gz", ".hdr"), (".IMG", ".HDR"), (".Img", ".Hdr"),
     (".img", ".HDR.gz"), (".IMG.GZ", ".hdr")],
)  # fmt: skip
def test_pairs_are_read_from_either_half(tmp_path, image, header):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Pair(data, np.eye(4)), tmp_path / "a.b.img")
    for written, suffix in (("a.b.img", image), ("a.b.hdr", header)):
        content = (tmp_path / written).read_bytes()
        (tmp_path / written).unlink()
        (tmp_path / f"a.b{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    halves = [read_scan(plain(tmp_path / f"a.b{suffix}")) for suffix in (image, header)]
    assert halves[0] == ScanContent(halves[0].nifti, pytest.approx(float("nan"), nan_ok=True), halves[0].image)
    for half in halves:
        assert half.nifti == (tmp_path / f"a.b{header}").read_bytes()
        assert half.image == (tmp_path / f"a.b{image}").read_bytes()
    (tmp_path / f"a.b{header}").unlink()
    with pytest.raises(ScanError, match=r"no a\.b\.hdr or a\.b\.hdr\.gz"):
        read_scan(plain(tmp_path / f"a.b{image}"))


def test_a_header_without_its_image(tmp_path):
    (tmp_path / "a.hdr").write_bytes(b"x")
    with pytest.raises(ScanError, match=r"no a\.img or a\.img\.gz") as caught:
        read_scan(plain(tmp_path / "a.hdr"))
    assert caught.value.status == "read_error"
