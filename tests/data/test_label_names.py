"""Organ names: which mean the same, and what dataset.json and --source-organs may say."""

import pytest

from core.config import load_organs
from data.label_names import load_collections, match_organs, parse_source_organs, read_dataset_json, same_organ

ORGANS = load_organs()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("kidney_right", "right kidney", True),
        ("Kidney (left)", "LEFT-KIDNEY", True),
        ("postcava", "inferior_vena_cava", True),
        ("arota", "Aorta", True),
        ("gall bladder", "gallbladder", True),
        ("oesophagus", "esophagus", True),
        ("adrenal_gland_left", "left adrenal", True),
        ("kidney", "right kidney", False),
        ("adrenal", "right adrenal gland", False),
        ("superior_vena_cava", "inferior vena cava", False),
        ("kidney_cyst_left", "left kidney", False),
        ("bladder", "gallbladder", False),
    ],
)
def test_names(first, second, same):
    assert same_organ(first, second) is same


@pytest.mark.parametrize(
    ("collection", "ids"),
    [
        ("abdomenatlas_1.0", {5: 1, 4: 2, 8: 3, 6: 4, 1: 5, 7: 6, 2: 9, 9: 11, 3: 13}),
        ("abdomenatlas_1.1", {5: 1, 4: 2, 8: 3, 6: 4, 1: 5, 7: 6, 11: 7, 10: 8, 2: 9, 16: 10, 9: 11, 15: 12, 3: 13}),
        ("totalsegmentator_v2", {5: 1, 2: 2, 1: 3, 7: 4, 52: 5, 63: 6, 8: 7, 9: 8, 4: 9, 15: 10, 6: 11, 19: 12, 3: 13}),
        ("decathlon_liver", {1: 1}),
        ("decathlon_pancreas", {1: 4}),
        ("decathlon_spleen", {1: 3}),
        ("flare22", {organ: organ for organ in range(1, 14)}),
    ],
)
def test_known_collections(collection, ids):
    target = match_organs(load_collections()[collection]["ids"], {}, ORGANS).target
    assert {key: organ for key, organ in target.items() if organ} == ids


def test_two_ids_of_one_organ_are_refused_unless_said():
    names = {1: "liver", 2: "Liver", 3: "spleen"}
    with pytest.raises(ValueError, match=r"1 \(liver\) and 2 \(Liver\) both mean 'liver'"):
        match_organs(names, {}, ORGANS)
    assert match_organs(names, {2: "liver"}, ORGANS).target == {1: 1, 2: 1, 3: 3}
    with pytest.raises(ValueError, match="one organ twice, 'postcava' and 'inferior vena cava'"):
        match_organs(names, {}, ("background", "postcava", "inferior vena cava", "liver"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"name": 1}', "cannot be read"),
        ('{"labels": ["liver"]}', "cannot be read"),
        ('{"labels": {"1": "liver"}, "modality": 1}', "cannot be read"),
        ('{"labels": {"0": "liver"}}', "id 0 to an organ"),
        ('{"labels": {"liver": 1, "spleen": 1}}', "twice"),
        ('{"labels": {"liver": 1}, "channel_names": {"0": "CT", "1": "PET"}}', "2 images"),
    ],
)
def test_wrong_dataset_json(tmp_path, content, message):
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_dataset_json(path)


def test_regions_of_nnunet_name_no_id(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"labels": {"background": 0, "whole": [1, 2], "spleen": [3], "liver": "4"}}')
    assert read_dataset_json(path) == {3: "spleen", 4: "liver"}


@pytest.mark.parametrize("given", ["liver", "=liver", "1=", "x=liver", "0=liver", "256=liver"])
def test_wrong_source_organs(given):
    with pytest.raises(ValueError, match="--source-organs: got"):
        parse_source_organs([given], masks=False)
