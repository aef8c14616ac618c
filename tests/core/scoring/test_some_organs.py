"""References that hold some organs only: which organs are scored, and what is said about the others."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import AFFINE

import evaluate
from core.config import load_organs
from core.scans.annotated import write_annotated

ORGANS = load_organs()
LIVER, SPLEEN, IVC, LEFT_KIDNEY = 1, 3, 6, 13


def save(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), AFFINE), path)


def all_organs() -> np.ndarray:
    """Return a label map with a bar of 2 x 4 x 4 voxels of each organ, (28, 6, 6)."""
    labels = np.zeros((28, 6, 6))
    for organ in range(1, 14):
        labels[2 * organ : 2 * organ + 2, 1:5, 1:5] = organ
    return labels


def only(*organs: int) -> np.ndarray:
    return np.where(np.isin(all_organs(), organs), all_organs(), 0)


@pytest.fixture
def score(run_main, tmp_path):
    """Score two cases in one process: their references and predictions, and flags; return (code, out, err)."""

    def score(references, predictions, *flags, **others):
        for name, cases in {"labels": references, "predictions": predictions, **others}.items():
            for case, labels in zip("ab", cases, strict=False):
                save(tmp_path / name / f"{case}.nii.gz", labels)
        names = ["labels", "output", *([] if "--ceiling" in flags else ["predictions"]), *others]
        paths = [f"--{name}={tmp_path / name}" for name in names]
        return run_main(evaluate, "--workers=1", *paths, *flags)

    return score


def read(folder: Path, name: str = "summary.json") -> dict:
    return json.loads((folder / "output" / name).read_text())


def rows(folder: Path, name: str = "metrics.csv") -> dict[tuple[str, int], dict]:
    with open(folder / "output" / name, newline="") as file:
        return {(row["case"], int(row["id"])): row for row in csv.DictReader(file)}


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_organs_that_no_reference_holds_are_named(score, tmp_path):
    code, out, err = score([only(LIVER)] * 2, [all_organs(), only(LIVER, SPLEEN)])
    assert (code, err) == (0, "")
    others = [name for name in ORGANS[1:] if name != "liver"]
    sentence = f"12 of 13 organs are in no reference: {', '.join(others)}; --organs chooses which are scored."
    assert f"{sentence} Predicted all the same, and so counted as Dice 0: all of them." in one_line(out)
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert read(tmp_path)["in_no_reference"] == others
    assert read(tmp_path)["mean"]["dice"] == pytest.approx(1 / 13)
    # What is not predicted either has no score, and counts nowhere.
    _, out, _ = score([only(LIVER)] * 2, [only(LIVER, SPLEEN)] * 2)
    assert "and so counted as Dice 0: spleen." in one_line(out)
    assert read(tmp_path)["mean"]["dice"] == pytest.approx(1 / 2)


def test_nothing_is_said_when_each_organ_is_in_some_reference(score, tmp_path):
    _, out, _ = score([only(*range(1, 7)), only(*range(7, 14))], [all_organs()] * 2)
    assert "no reference" not in out
    assert read(tmp_path)["in_no_reference"] == []


@pytest.mark.parametrize("protocol", ["default", "flare22"])
def test_only_the_chosen_organs_are_scored(score, tmp_path, protocol):
    chosen = ["--organs", "Kidney_LEFT", "liver", "LIVER"]
    against = [np.roll(only(LIVER, LEFT_KIDNEY), 1, axis=1)] * 2
    code, out, err = score(
        [only(LIVER, LEFT_KIDNEY)] * 2, [all_organs()] * 2, *chosen, f"--protocol={protocol}", against=against
    )
    assert (code, err) == (0, "")
    assert "no reference" not in out
    assert "spleen" not in out
    assert list(rows(tmp_path)) == [(case, organ) for case in "ab" for organ in (LIVER, LEFT_KIDNEY)]  # ids are kept
    summary, comparison = read(tmp_path), read(tmp_path, "comparison.json")
    for organs in (summary["organs"], summary["tolerances_mm"], comparison["dice"]["organs"]):
        assert list(organs) == ["liver", "left kidney"]
    assert (summary["mean"]["dice"], summary["mean"]["nsd"]) == (1, 1)
    assert summary["voxel_accuracy"]["mean"] == 1  # other organs count as background
    assert comparison["dice"]["mean"]["mean"] == 1
    assert comparison["dice"]["mean"]["other_mean"] == pytest.approx(0.75)  # one of four layers is moved out
    assert summary["interval_95"]["dice"] == [1, 1]
    assert (tmp_path / "output" / "scores.png").is_file()


def test_the_scores_of_an_organ_do_not_depend_on_the_choice(score, tmp_path):
    noise = np.random.default_rng(0).integers(0, 14, (2, 28, 6, 6))
    found = np.where(np.random.default_rng(1).random(noise.shape) < 0.7, noise, 5)
    for flags, name in (([], "metrics.csv"), (["--ceiling", "--size", "9", "5", "4"], "ceiling.csv")):
        assert score(noise, found, *flags)[0] == 0
        whole = rows(tmp_path, name)
        assert score(noise, found, *flags, "--organs", "spleen", "liver")[0] == 0
        some = rows(tmp_path, name)
        assert [organ for _, organ in some] == [1, 3, 1, 3]
        assert some == {key: whole[key] for key in some}


@pytest.mark.parametrize("name", ["lever", "background", "liver,spleen", ""])
def test_an_unknown_organ_is_refused_with_the_list(score, tmp_path, name):
    code, out, err = score([only(LIVER)], [only(LIVER)], "--organs", "liver", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --organs: got {name!r}")
    assert f"expected some of: {', '.join(ORGANS[1:])}\n" in err
    assert not (tmp_path / "output").exists()


def test_flare22_says_how_it_counts_organs_without_a_reference(score, tmp_path):
    _, out, _ = score([only(LIVER)] * 2, [only(LIVER, SPLEEN)] * 2, "--protocol=flare22")
    assert "flare22 counts them as 1 where they are not predicted either, else as 0." in one_line(out)
    assert read(tmp_path)["mean"]["dice"] == pytest.approx(12 / 13)


def test_the_ceiling_names_them_too(score, tmp_path):
    _, out, _ = score([only(LIVER)] * 2, [], "--ceiling", "--size", "28", "6", "6")
    assert "12 of 13 organs are in no reference: right kidney" in one_line(out)
    assert len(read(tmp_path, "ceiling.json")["in_no_reference"]) == 12


def test_names_that_flare22_does_not_know_are_named_with_those_it_lacks(score, tmp_path):
    names = ["background", *ORGANS[1:]]
    names[IVC], names[LEFT_KIDNEY] = "big vein", "Kidney (left)"  # the second is recognised
    (tmp_path / "config.yaml").write_text(f"organs: {json.dumps(names)}\n")
    flags = [f"--config={tmp_path / 'config.yaml'}", "--protocol=flare22"]
    code, _, err = score([all_organs()], [all_organs()], *flags)
    assert code == 0
    first, second = err.splitlines()
    assert first == (
        "warning: --protocol flare22: no organ of the list is the protocol's 'inferior vena cava'; its rule is not used"
    )
    assert second.startswith("warning: --protocol flare22: the protocol does not know 'big vein' of the list; ")
    assert score([all_organs()], [all_organs()], *flags, "--organs", "liver")[2] == ""
    assert score([all_organs()], [all_organs()], flags[0])[2] == ""  # the default protocol has no such rules


@pytest.mark.parametrize("protocol", ["default", "flare22"])
def test_organs_that_a_case_does_not_annotate_are_not_scored_there(score, run_main, tmp_path, protocol):
    write_annotated(tmp_path, {"a": ["liver", "Kidney_Left"]})  # nothing is said of b: it has all
    code, out, err = score([only(LIVER, LEFT_KIDNEY), all_organs()], [all_organs()] * 2, f"--protocol={protocol}")
    assert (code, err) == (0, "")
    table, summary = rows(tmp_path), read(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "labels")  # it is the labels of the same data set
    flags = [f"--{name}={tmp_path / name}" for name in ("predictions", "output")]
    assert run_main(evaluate, "--workers=1", f"--labels={tmp_path / 'link'}", *flags, f"--protocol={protocol}")[0] == 0
    assert rows(tmp_path) == table
    unscored = [name for name in ORGANS[1:] if name not in ("liver", "left kidney")]
    assert [organ for organ in range(1, 14) if table["a", organ]["dice"]] == [LIVER, LEFT_KIDNEY]
    assert {table["a", SPLEEN][name] for name in ("dice", "nsd", "reference_ml", "predicted_ml")} == {""}
    assert summary["not_annotated"] == {"a": unscored}
    assert (summary["mean"]["dice"], summary["voxel_accuracy"]["mean"]) == (1, 1)
    assert (summary["organs"]["spleen"]["dice"]["n"], summary["organs"]["liver"]["dice"]["n"]) == (1, 2)
    assert "Not annotated by annotated.csv, and so not scored: right kidney (1 of 2 cases), " in one_line(out)


def test_lines_of_annotated_csv_that_do_nothing_are_named_once(score, tmp_path):
    write_annotated(tmp_path, {"a_0000": ["liver"], "b": ["lvier", "spleen"]})
    _, _, err = score([only(LIVER)] * 2, [all_organs()] * 2, f"--against={tmp_path / 'predictions'}")
    assert err.count("lists a_0000, expected ids of the 2 cases") == 1
    assert err.count("annotated.csv: lvier is none of organs; names are separated by ;") == 1


def test_organs_that_no_case_annotates_are_in_no_mean(score, tmp_path):
    write_annotated(tmp_path, {"a": ["liver"], "b": ["liver"]})
    for flags, name in (([], "summary.json"), (["--ceiling", "--size", "28", "6", "6"], "ceiling.json")):
        _, out, _ = score([only(LIVER)] * 2, [all_organs()] * 2, *flags, "--protocol=flare22")
        summary = read(tmp_path, name)
        assert (summary["mean"]["dice"], summary["in_no_reference"]) == (1, [])
        assert summary["organs"]["spleen"]["dice"]["n"] == 0
        assert "spleen (2 of 2 cases)" in one_line(out)


def test_another_folder_beside_annotated_csv_is_taken_as_it_is(score, tmp_path):
    write_annotated(tmp_path, {"a": ["spleen"]})
    (tmp_path / "labels").mkdir()
    save(tmp_path / "others" / "a.nii.gz", only(LIVER))
    code, _, _ = score([], [only(LIVER)], f"--labels={tmp_path / 'others'}")
    assert code == 0
    assert read(tmp_path)["not_annotated"] == {}
