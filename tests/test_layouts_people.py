"""Files whose names tell that several are of one person are never taken for files of a person each."""

from __future__ import annotations

import pytest
from test_layouts import names, touch

from ingest.errors import SourceError
from ingest.layouts import Layout, find_scans


@pytest.mark.parametrize("image", [None, "T1", "T1w.nii.gz"])
def test_a_bids_tree_is_never_taken_for_a_flat_folder(tmp_path, image):
    """Each session would be another person."""
    tree = [f"sub-0{who}/ses-{visit}/anat/sub-0{who}_ses-{visit}_T1w.nii.gz" for who in (1, 2) for visit in (1, 2)]
    if image == "T1w.nii.gz":
        assert names(touch(tmp_path, *tree), image=image) == tree
        return
    touch(tmp_path, *[name.replace("T1w", "T2w") for name in tree] if image is None else tree)
    wanted = image or "T1w"
    with pytest.raises(SourceError, match=rf"has no {wanted} scans by the names of BIDS .*4 others.*--layout flat"):
        find_scans(tmp_path, Layout.auto, image)
    assert len(names(tmp_path, Layout.flat, image)) == 4


def test_a_flat_folder_may_have_names_like_those_of_bids(tmp_path):
    touch(tmp_path, "sub-01_brain.nii.gz", "sub-02_brain.nii.gz", "sub-03.nii.gz")
    assert len(names(tmp_path)) == 3
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(SourceError, match="--layout flat"):
        find_scans(tmp_path)
