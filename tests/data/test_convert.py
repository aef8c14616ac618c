"""Conversion as users run it: phantoms in each collection's layout come back voxel by voxel under our ids."""

import json
import shutil

import numpy as np
import pytest
from foreign_layouts import (
    AMOS,
    ATLAS,
    BTCV,
    ORGANS,
    TOTAL,
    WORD,
    annotated,
    check_converted,
    renumbered,
    voxels,
    write_labels,
    write_masks,
    write_pairs,
)

from core.config import load_organs


@pytest.mark.parametrize(
    ("images", "maps"), [("img", "label"), (".", "."), ("imagesTr", "labelsTr"), ("Training/img", "Training/label")]
)
def test_btcv(phantoms, run, tmp_path, images, maps):
    source = write_pairs(phantoms, tmp_path / "s", images, maps, "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    write_labels(phantoms[0][1], renumbered(phantoms[0][1], BTCV | {12: 10}), source / maps / "label0001.nii.gz")
    code, out, err, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "img{:04d}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13])
    assert "12  duodenum                not annotated" in out
    assert "becomes background): 10 portal vein and splenic vein" in out
    lost = np.count_nonzero(voxels(phantoms[0][1]) == 12)  # the duodenum, which stands in for the veins here
    assert f"10 portal vein and splenic vein: {lost} voxels in 1 cases became background" in err


def test_amos_with_its_own_dataset_json_and_mr(phantoms, run, tmp_path):
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms[:1], tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    write_pairs(phantoms[1:], tmp_path / "s", "imagesVa", "labelsVa", "amos_0002.nii.gz", "amos_0002.nii.gz", AMOS)
    for part in ("imagesVa", "labelsVa"):
        shutil.copyfile(source / part / "amos_0002.nii.gz", source / part / "amos_0507.nii.gz")
    (source / "imagesTs").mkdir()
    labels = {"0": "background", "1": "spleen", "2": "right kidney", "3": "left kidney", "4": "gall bladder"}
    labels |= {"5": "esophagus", "6": "liver", "7": "stomach", "8": "arota", "9": "postcava", "10": "pancreas"}
    labels |= {"11": "right adrenal gland", "12": "left adrenal gland", "13": "duodenum", "14": "bladder"}
    (source / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": labels}))
    code, out, _, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "amos_{:04d}", list(range(1, 14)))
    assert "organ names from dataset.json" in out
    assert "14 bladder" in out
    assert "1 cases left out, no CT by the numbering of amos: amos_0507" in out
    assert "imagesTs: left out, without label maps" in out


def test_amos_without_dataset_json(phantoms, run, tmp_path):
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    code, out, _, data = run(source)
    assert (code, "the collection amos in" in out) == (0, True)
    check_converted(data, phantoms, "amos_{:04d}", list(range(1, 14)))


def test_word_has_one_id_for_both_adrenal_glands(phantoms, run, tmp_path):
    names = "word_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesVal", "labelsVal", names, names, WORD)
    code, out, err, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "word_{:04d}", [1, 2, 3, 4, 9, 10, 11, 12, 13])
    assert "7  right adrenal gland     not annotated" in out
    assert "12 adrenal: " in err


@pytest.mark.parametrize("version", [1, 2])
def test_decathlon_and_nnunet_join_tumours_only_when_asked(phantoms, run, tmp_path, version):
    channel = "_0000" if version == 2 else ""
    scans, maps = f"liver_{{}}{channel}.nii.gz", "liver_{}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", scans, maps, {1: 1})
    for number, (_, labels) in enumerate(phantoms, start=1):
        ids = renumbered(labels, {1: 1})
        ids[tuple(np.argwhere(ids == 1)[:5].T)] = 2  # five voxels of tumour in the liver
        write_labels(labels, ids, source / "labelsTr" / maps.format(number), np.float32)
    labels = {"0": "background", "1": "liver", "2": "cancer"} if version == 1 else {"background": 0, "liver": 1}
    labels |= {} if version == 1 else {"cancer": 2}
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    code, _, err, data = run(source)
    assert code == 0
    assert annotated(data) == {"liver_1": ["liver"], "liver_2": ["liver"]}
    liver = np.count_nonzero(voxels(phantoms[0][1]) == 1)
    assert np.count_nonzero(voxels(data / "labels" / "liver_1.nii.gz")) == liver - 5
    assert "2 cancer: 10 voxels in 2 cases became background; if it is part of an organ" in err
    code, _, err, joined = run(source, "--source-organs", "2=liver", to=tmp_path / "joined")
    assert (code, err) == (0, "")
    check_converted(joined, phantoms, "liver_{}", [1])


def test_abdomenatlas_masks_and_nested_folder(phantoms, run, tmp_path):
    write_masks(phantoms, tmp_path / "s" / "inner", ATLAS, "BDMAP_{:08d}")
    code, out, _, data = run(tmp_path / "s")
    assert (code, "'masks'" in out) == (0, True)
    check_converted(data, phantoms, "BDMAP_{:08d}", [1, 2, 3, 4, 5, 6, 9, 11, 13])


def test_totalsegmentator_masks_that_overlap_and_are_missing(phantoms, run, tmp_path):
    source = write_masks(phantoms, tmp_path / "s", TOTAL | {99: "heart"})
    labels = phantoms[0][1]
    grown = voxels(labels)
    taken = np.argwhere(grown == 1)[:7]  # seven voxels of the liver, claimed by the stomach too
    mask = grown == 11
    mask[tuple(taken.T)] = True
    write_labels(labels, mask * 255, source / "s0001" / "segmentations" / "stomach.nii.gz")
    (source / "s0002" / "segmentations" / "pancreas.nii.gz").unlink()
    code, out, err, data = run(source)
    assert code == 0
    grown[tuple(taken.T)] = 11
    np.testing.assert_array_equal(voxels(data / "labels" / "s0001.nii.gz"), grown)
    assert "case s0001: 7 voxels are both liver and stomach; they became stomach" in err
    assert annotated(data)["s0001"] == list(ORGANS[1:])
    assert annotated(data)["s0002"] == [name for name in ORGANS[1:] if name != "pancreas"]
    assert "pancreas (1 of 2 cases)" in out
    assert "heart" in out


def test_combined_labels_need_the_version(phantoms, run, tmp_path):
    ids = {5: 1, 9: 2, 13: 3, 2: 4, 1: 5, 4: 6, 6: 7, 3: 8, 11: 9}
    source = write_pairs(phantoms, tmp_path / "s", ".", ".", "B{}/ct.nii.gz", "B{}/combined_labels.nii.gz", ids)
    code, _, err, _ = run(source)
    assert (code, "--layout: btcv, amos" in err) == (2, True)
    code, _, _, data = run(source, "--layout", "abdomenatlas_1.0")
    assert code == 0
    check_converted(data, phantoms, "B{}", sorted(ids))


def test_flare22_and_names_given_by_the_user(phantoms, run, tmp_path):
    same = {organ: organ for organ in range(1, 14)}
    names = "FLARE22_Tr_{:04d}_0000.nii.gz", "FLARE22_Tr_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "images", "labels", *names, same)
    code, _, _, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "FLARE22_Tr_{:04d}", list(range(1, 14)))
    code, _, _, other = run(source, "--organs", "Kidney (left)", "kidney-right", to=tmp_path / "two")
    assert code == 0
    original = voxels(phantoms[0][1])
    expected = np.where(original == 13, 1, np.where(original == 2, 2, 0))
    np.testing.assert_array_equal(voxels(other / "labels" / "FLARE22_Tr_0001.nii.gz"), expected)
    assert load_organs(other / "organs.yaml") == ("background", "Kidney (left)", "kidney-right")


def test_names_come_from_the_header_and_must_agree(phantoms, run, tmp_path):
    """A converted data set names its ids itself, and can be converted again into another list."""
    same = {organ: organ for organ in range(1, 14)}
    source = write_pairs(
        phantoms, tmp_path / "s", "images", "labels", "FLARE22_Tr_{:04d}.nii.gz", "FLARE22_Tr_{:04d}.nii.gz", same
    )
    run(source)
    code, out, _, again = run(tmp_path / "data", "--organs", "spleen", "liver", to=tmp_path / "again")
    assert (code, "organ names from the header of" in out) == (0, True)
    original = voxels(phantoms[1][1])
    expected = np.where(original == 3, 1, np.where(original == 1, 2, 0))
    np.testing.assert_array_equal(voxels(again / "labels" / "FLARE22_Tr_0002.nii.gz"), expected)
    code, _, err, _ = run(tmp_path / "data", "--layout", "amos", to=tmp_path / "wrong")
    assert code == 1
    assert "its header says that id 1 is 'liver', but it is read as 'spleen'" in err
    assert not list((tmp_path / "wrong" / "images").iterdir())


def test_the_sources_annotated_csv_is_checked(phantoms, run, tmp_path):
    names = "FLARE22_Tr_{:04d}_0000.nii.gz", "FLARE22_Tr_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "images", "labels", *names, {organ: organ for organ in range(1, 14)})
    (source / "annotated.csv").write_text("case,organs\nFLARE22_Tr_0001,liver;spleeen\nflare22_tr_0002,liver\n")
    code, _, err, data = run(source, "--no-doctor")
    assert code == 0
    assert "annotated.csv: lists flare22_tr_0002, expected ids of the 2 cases; such lines do nothing" in err
    assert "annotated.csv: spleeen is none of the source's organs" in err
    assert annotated(data)["FLARE22_Tr_0001"] == ["liver"]


def test_an_organ_list_may_have_comments(phantoms, run, tmp_path):
    names = "FLARE22_Tr_{:04d}_0000.nii.gz", "FLARE22_Tr_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "images", "labels", *names, {organ: organ for organ in range(1, 14)})
    (tmp_path / "organs.txt").write_text("# mine\nliver # the largest\n\nspleen\n")
    code, *_, data = run(source, "--no-doctor", "--organs", tmp_path / "organs.txt")
    assert code == 0
    assert load_organs(data / "organs.yaml") == ("background", "liver", "spleen")


def test_names_of_masks_and_ids_are_checked(phantoms, run, tmp_path):
    masks = write_masks(phantoms, tmp_path / "masks", TOTAL)
    code, _, err, _ = run(masks, "--source-organs", "splen=spleen")
    assert (code, err.count("\n")) == (2, 1)
    assert "error: --source-organs: no case has a mask splen (did you mean spleen?); found " in err
    code, _, err, _ = run(masks, "--source-organs", "liver=liver", "liver=spleen", to=tmp_path / "two")
    assert (code, err) == (2, "error: --source-organs: names liver twice, liver and spleen; expected it once\n")


@pytest.mark.parametrize(
    ("kind", "warned"), [("MRI", True), ("T1w", True), ("CT", False), ("computed tomography", False)]
)
def test_a_source_that_is_no_ct_is_warned_of(phantoms, run, tmp_path, kind, warned):
    names = "case_{:04d}_0000.nii.gz", "case_{:04d}.nii.gz"
    source = write_pairs(phantoms[:1], tmp_path / "s", "imagesTr", "labelsTr", *names, {1: 1})
    table = {"channel_names": {"0": kind}, "labels": {"background": 0, "liver": 1}}
    (source / "dataset.json").write_text(json.dumps(table))
    code, _, err, _ = run(source, "--no-doctor")
    assert code == 0
    assert (f"dataset.json: says that the images are {kind}, expected CT" in err) == warned
