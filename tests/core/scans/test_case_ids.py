"""Lists of case ids: whatever is written is read back as it was."""

from pathlib import Path

import numpy as np
import pytest
from data_files import make_data, write_volume

from core.scans.files import find_label_maps, find_scans, format_case_ids, label_ids, read_case_ids
from core.scoring.cases import pair_up
from data.doctor import pair_files
from dataset import find_cases

ODD = [
    "case",
    "scan #2",
    "#3",
    " padded ",
    "a#b",
    '"quoted"',
    "M\udcfcller",
    "two\nlines",
    "tab\tin",
    "Ärzte 王",
    "x\r",
]


def test_every_id_comes_back_as_it_was(tmp_path):
    file = tmp_path / "val_cases.txt"
    file.write_bytes(format_case_ids(ODD))
    assert read_case_ids([str(file)]) == ODD
    assert format_case_ids(["case_1", "a#b"]) == b"case_1\na#b\n"  # the usual ids stay plain


def test_comments_and_blank_lines_are_no_ids(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("# held out\nfirst  # a comment\n\n  second\r\n")
    assert read_case_ids([str(file)]) == ["first", "second"]


def test_an_id_with_a_broken_quote_is_refused(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text('"half\n')
    with pytest.raises(ValueError, match=r'cases\.txt: "half is no id in quotes'):
        read_case_ids([str(file)])


@pytest.mark.parametrize(
    ("names", "cases", "expected"),
    [
        (["p_0000", "p_0001"], ["p_0000", "p_0001"], ["p_0000", "p_0001"]),
        (["p_0000", "p_0001"], ["p", "p_0001"], ["p", "p_0001"]),  # scans without a channel number
        (["p", "p_0001"], ["p_0000", "p_0001"], ["p_0000", "p_0001"]),  # and their predictions
        (["p", "p_0000"], ["p_0000"], ["p", "p_0000"]),
        (["p_0000", "p_0001"], [], ["p_0000", "p_0001"]),
        (["a_0000", "b_0000", "b_0000_probabilities"], [], ["a", "b", "b_0000_probabilities"]),
        (["a_0000", "b"], [], ["a_0000", "b"]),
    ],
)
def test_label_maps_have_the_ids_of_the_scans(names, cases, expected):
    assert label_ids(names, cases) == expected


def test_a_case_may_end_like_a_channel_number(tmp_path):
    ids = ["phantom_0000", "phantom_0001"]
    data = make_data(tmp_path / "data", ids)
    labels = data / "labels"
    assert [case.id for case in find_cases(data)] == list(find_scans(data)) == ids
    pairs, findings = pair_files(data)
    assert [(case, labels.name) for case, _, labels in pairs] == [(case, f"{case}.nii.gz") for case in ids]
    assert not findings
    first = labels / "phantom_0000.nii.gz"
    write_volume(tmp_path / "predictions" / "phantom_0000.nii.gz", np.zeros((2, 2, 2), np.uint8))
    references = find_label_maps(labels)
    assert list(references) == ids
    tasks, extra = pair_up(tmp_path / "predictions", references, {"phantom_0000": first})
    assert tasks[0].prediction == tmp_path / "predictions" / "phantom_0000.nii.gz"
    assert not extra
    (labels / "phantom_0001.nii.gz").unlink()
    assert find_label_maps(data) == {"phantom_0000": first}  # by the scans beside it
    assert find_label_maps(labels.rename(tmp_path / "references")) == {
        "phantom": Path(tmp_path, "references", first.name)
    }
