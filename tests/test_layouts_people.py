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


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (["0001_T1", "0001_T2", "0001_T1_mask", "0002_T1"], "such as 0001_T1 and 0001_T1_mask; .* --image T1, say in"),
        (["sub01_T1w", "sub01_FLAIR", "sub02_T1w"], "such as sub01_FLAIR and sub01_T1w"),
        (["a b-T1", "a b-T2", "c"], "such as a b-T1 and a b-T2"),
        (["01", "02", "01_label"], "such as 01 and 01_label; say in a manifest"),
        (["a/T1", "b/T1"], "has 2 scans of only 1 names"),
        (["x.brain", "x"], "such as x and x.brain; .* --image brain, "),
        (["mri/mwp1sub-01_T1w", "mri/mwp2sub-01_T1w"], "but 2 others, such as mri/mwp1sub-01_T1w"),
        (
            [f"{who}/{image}" for who in "abc" for image in ("T1", "T2")],
            "has 6 scans of only 2 names, .* in a manifest",
        ),
    ],
)
def test_files_of_one_person_are_not_taken_for_people(tmp_path, tree, words):
    touch(tmp_path, *[f"{name}.nii.gz" for name in tree])
    with pytest.raises(SourceError, match=words):
        find_scans(tmp_path)
    assert len(names(tmp_path, Layout.flat)) == len(tree)


def test_a_flat_folder_has_a_file_of_each_person(tmp_path):
    for tree in (
        ["1_T1", "2_T1", "3_T1_brain"],
        ["T1", "T2"],
        ["a", "x/a", "b"],
        ["brain 1", "brain 2"],
        ["s1", "S1"],
        ["p_1", "p 1"],
        ["PD_1", "CT_1", "1"],
        ["A_sub-1_T1w", "B_sub-1_T1w"],
    ):
        touch(tmp_path / tree[0], *[f"{name}.nii.gz" for name in tree])
        assert len(names(tmp_path / tree[0])) == len(tree)
    tree = ["0001_T1", "0001_T2", "0002_T1", "0002_T2"]
    touch(tmp_path / "one", *[f"{name}.nii.gz" for name in tree])
    assert len(names(tmp_path / "one", image="T1")) == 2
