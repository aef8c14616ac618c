"""The report of a case: its numbers and words against what was put in, and what infer.py --report leaves."""

import dataclasses
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import infer
from core.checkpoint import save_checkpoint
from core.config import load_config, load_organs
from core.network import build_network
from core.scans.anatomy import organs_in, remarks
from core.scans.geometry import Geometry
from core.training.batches import describe_cases
from dataset import CaseDataset, find_cases
from visualization import report, reports
from visualization.shown import Shown

ORGANS = load_organs()
SHAPE = (48, 40, 24)
AFFINE = np.array([[2.0, 0, 0, -48], [0, 2.0, 0, -40], [0, 0, 3.0, 0], [0, 0, 0, 1]])  # RAS+; 0.012 mL a voxel
LIVER, RIGHT_KIDNEY, SPLEEN, LEFT_KIDNEY, BLADDER = 1, 2, 3, 13, 9
BOXES = {
    LIVER: (slice(28, 46), slice(8, 36), slice(10, 24)),  # up to the top of the scan
    SPLEEN: (slice(2, 12), slice(4, 20), slice(12, 22)),
    LEFT_KIDNEY: (slice(8, 18), slice(4, 14), slice(2, 11)),
}


def make_labels(boxes: dict) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for organ, box in boxes.items():
        labels[box] = organ
    return labels


def make_voxels() -> np.ndarray:
    voxels = np.full(SHAPE, -100, np.int16)
    voxels[2:46, 2:38] = 40
    voxels[0] = -1000
    return voxels


def save(volume: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, AFFINE), path)
    return path


class Page(HTMLParser):
    """Tables, list items and addresses of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows, self.items, self.links, self.sources, self.text, self.inside = [], [], [], [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not any(name.startswith("on") for name in attributes)
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.items.append("")
        elif tag == "a":
            self.links.append(attributes["href"])
        elif tag in ("img", "video"):
            self.sources.append(attributes["src"])

    def handle_data(self, data):
        self.text += data
        if self.inside in ("td", "th", "span", "a") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        elif self.inside == "li":
            self.items[-1] += data

    def handle_endtag(self, tag):
        self.inside = "td" if tag in ("span", "a") else None


@pytest.fixture(scope="module", autouse=True)
def short_movies():
    """Make movies short, of 3 frames: what is in them is tested in test_movie.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FRAMES", 3)
        yield


# ---- In words --------------------------------------------------------------------------------------------------------


def said_of(labels: np.ndarray, organs: tuple = ("background", "liver", "spleen", "left kidney")) -> list[str]:
    geometry = Geometry(labels.shape, AFFINE, nib.Nifti1Header())
    return remarks(organs_in(labels, geometry, organs), organs)


def test_what_is_remarked_upon():
    labels = np.zeros(SHAPE, np.uint8)
    labels[28:46, 8:36, 8:22] = 1  # 7056 voxels, 84.7 mL: too little
    labels[2:12, 0:20, 12:24] = 2  # at the back and the top
    assert said_of(labels) == [
        "spleen cut by the back and the top of the scan",
        "left kidney not found",
        "liver of 84.7 mL, expected 400 to 5000 in an adult",
    ]


def test_pieces_that_touch_by_a_corner_hang_together():
    labels = np.zeros(SHAPE, np.uint8)
    labels[20:40, 8:36, 2:22] = 1
    labels[4:14, 4:14, 4:14] = 3
    labels[14:17, 14:17, 14:17] = 3  # by the corner
    labels[2:9, 20:30, 4:14] = 2
    labels[2:9, 32:36, 4:11] = 2  # 196 of 896 voxels
    labels[44, 36, 2] = 1  # a crumb
    said = said_of(labels)
    assert "spleen in 2 pieces, 22% of it apart from the largest" in said
    assert not [remark for remark in said if remark.startswith(("liver in", "left kidney in"))]


def test_swapped_sides_are_said():
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:20, 8:36, 2:22] = 1
    labels[30:40, 4:20, 4:20] = 2
    assert said_of(labels)[0] == "liver lies to the patient's left of the spleen: mirrored, or taken for one another"


# ---- The page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a scan, the reference, and a prediction without spleen and half of the left kidney, with a gallbladder."""
    folder = tmp_path_factory.mktemp("report")
    _, y, z = BOXES[LEFT_KIDNEY]
    half = {LIVER: BOXES[LIVER], LEFT_KIDNEY: (slice(8, 13), y, z), BLADDER: (slice(24, 27), y, z)}
    save(make_voxels(), folder / "scan_0000.nii.gz")
    save(make_labels(BOXES), folder / "truth.nii.gz")
    save(make_labels(half), folder / "prediction.nii.gz")
    return folder


@pytest.fixture(scope="module")
def compared(folder) -> Path:
    output = folder / "new" / "compared"
    arguments = [folder / "scan_0000.nii.gz", folder / "prediction.nii.gz", "--reference", folder / "truth.nii.gz"]
    assert report.main([*map(str, arguments), "--output", str(output)]) == 0
    return output


def test_a_report_json_of_somebody_else_is_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "make_viewer", lambda shown: "<p>Content-Security-Policy</p>")
    monkeypatch.setattr(report, "make_report", lambda shown, facts: "<p>Content-Security-Policy</p>")
    (tmp_path / "report.json").write_text('{"mine": 1}')
    arguments = [folder / "scan_0000.nii.gz", folder / "prediction.nii.gz", "--output", tmp_path]
    for number in range(2):
        assert report.main([*map(str, arguments)]) == 0
        assert capsys.readouterr().err.count("report.json.old") == (0 if number else 1)
    assert (tmp_path / "report.json.old").read_text() == '{"mine": 1}'


def test_the_report_has_the_numbers_of_the_label_maps(compared):
    assert {path.name for path in compared.iterdir()} == {"index.html", "report.json", "viewer.html"}
    facts = json.loads((compared / "report.json").read_text())
    organs = {row["id"]: row for row in facts["organs"]}
    assert [row["organ"] for row in facts["organs"]] == list(ORGANS[1:])
    liver, spleen, kidney, bladder, aorta = (organs[i] for i in (LIVER, SPLEEN, LEFT_KIDNEY, BLADDER, 5))
    assert liver["ml"] == pytest.approx(18 * 28 * 14 * 0.012)
    assert (liver["pieces"], liver["cut"], liver["dice"], liver["nsd"]) == (1, ["top"], 1, 1)
    assert (spleen["found"], spleen["dice"], spleen["nsd"]) == (False, 0, 0)
    assert spleen["truth_ml"] == pytest.approx(10 * 16 * 10 * 0.012)
    assert kidney["dice"] == pytest.approx(2 * 5 / (5 + 10))
    assert 0 < kidney["nsd"] < 1
    assert (bladder["dice"], bladder["truth_ml"]) == (0, 0)
    assert (aorta["found"], aorta["dice"], aorta["nsd"]) == (False, None, None)
    assert facts["mean_dice"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)


def test_the_page_says_the_same(compared):
    page = Page(compared / "index.html")
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["liver"] == ["84.7", "400 to 5000", "1", "top", "84.7", "1.000", "1.000"]
    assert rows["left kidney"][:2] == ["5.4", "30 to 700"]
    assert rows["left kidney"][5] == "0.667"
    assert rows["spleen"][0] == "not found"
    assert rows["mean over organs"][5] == "0.417"
    assert "spleen not found" in page.items
    assert "liver cut by the top of the scan" in page.items
    assert "left kidney of 5.4 mL, expected 30 to 700 in an adult" in page.items
    assert rows["reference"] == ["truth.nii.gz"]
    assert page.links == ["viewer.html"]
    assert [source.split(";")[0] for source in page.sources] == ["data:image/webp", "data:image/webp", "data:video/mp4"]


def test_a_report_without_truth_has_no_scores(folder, tmp_path):
    empty = save(make_labels({}), tmp_path / "empty.nii.gz")
    arguments = [str(folder / "scan_0000.nii.gz"), str(empty), "--output", str(tmp_path / "out")]
    assert report.main(arguments) == 0
    page = Page(tmp_path / "out" / "index.html")
    assert "No organ to show." in page.text
    assert "Dice" not in page.text
    assert len(page.items) == len(ORGANS) - 1
    assert "mean_dice" not in json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    ("output", "labels", "code", "message"),
    [("taken", "truth.nii.gz", 2, "is a file, expected a folder"), ("out", "missing.nii.gz", 1, "missing.nii.gz")],
)
def test_refusals_are_one_sentence(folder, tmp_path, capsys, output, labels, code, message):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as end:
        report.main([str(folder / "scan_0000.nii.gz"), str(folder / labels), "--output", str(tmp_path / output)])
    assert end.value.code == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- infer.py --report -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    config = dataclasses.replace(
        load_config(), size=(32, 32, 16), channels=2, down_convs=(1, 1), up_convs=(1,), device="cpu", cache_dir=None
    )
    save(make_voxels(), folder / "images" / "a_0000.nii.gz")
    save(make_labels(BOXES), folder / "labels" / "a.nii.gz")
    training_data = describe_cases(CaseDataset(find_cases(folder), config), workers=0).ranges
    torch.manual_seed(0)
    save_checkpoint(folder / "best.pt", build_network(config), config, training_data=training_data, epoch=7)
    return folder / "best.pt"


@pytest.mark.slow
def test_infer_writes_a_report_a_case_and_a_page_for_all(checkpoint, tmp_path, run_main):
    scans, output = tmp_path / "scans", tmp_path / "out"
    save(make_voxels(), scans / "a & b_0000.nii.gz")
    save(make_voxels()[:, :, ::-1].copy(), scans / "c_0000.nii.gz")
    (scans / "broken.nii.gz").write_bytes(b"no scan")
    code, out, err = run_main(infer, scans, "--checkpoint", checkpoint, "--output", output, "--report")
    assert code == 1
    assert "broken" in err
    assert f"reports in {output / 'reports' / 'index.html'}" in out
    page = Page(output / "reports" / "index.html")
    assert page.links == ["a%20%26%20b/index.html", "c/index.html"]
    for case in ("a & b", "c"):
        facts = json.loads((output / "reports" / case / "report.json").read_text())
        labels = np.asarray(nib.load(output / f"{case}.nii.gz").dataobj)
        counts = np.bincount(labels.ravel(), minlength=len(ORGANS))
        assert [row["found"] for row in facts["organs"]] == [bool(count) for count in counts[1:]]
        assert [row.get("ml", 0) for row in facts["organs"]] == pytest.approx(list(counts[1:] * 0.012))
        # The network was taught the organs of the boxes alone: it did not miss the others.
        taught = {row["organ"] for row in facts["organs"] if row["taught"]}
        assert taught == {ORGANS[organ] for organ in np.unique(make_labels(BOXES)) if organ}
        lost = [remark.removesuffix(" not found") for remark in facts["remarks"] if "not found" in remark]
        assert set(lost) == {row["organ"] for row in facts["organs"] if not row["found"]} & taught
        assert facts["provenance"]["checkpoint"] == str(checkpoint)
        assert facts["provenance"]["trained"] == "7 of 50 epochs"
    assert "a & b" in Page(output / "reports" / "a & b" / "index.html").text

    # Segmented anew without a report, or no more to be segmented: the earlier report does not pass for new.
    (scans / "c_0000.nii.gz").write_bytes(b"no scan")
    code, _, err = run_main(infer, scans, "--checkpoint", checkpoint, "--output", output)
    assert code == 1
    for case in ("a & b", "c"):
        names = {path.name for path in (output / "reports" / case).iterdir()}
        assert names == {"index.html.old", "report.json.old", "viewer.html.old"}
    assert "segmented without --report" in err
    # Nor does the list of all reports, which links to them.
    assert {path.name for path in (output / "reports").iterdir() if path.is_file()} == {"index.html.old"}


def test_organs_that_the_segmented_part_cuts_are_named():
    geometry = Geometry(SHAPE, AFFINE, nib.Nifti1Header())
    ends = {ORGANS[LIVER]: ["bottom", "top"], ORGANS[SPLEEN]: ["back"], "aorta": ["bottom", "top"]}
    labels = make_labels(BOXES | {5: (slice(20, 24), slice(2, 6), slice(4, 20))})
    facts = report.describe(Shown("a", make_voxels(), geometry, {"prediction": labels}, ORGANS, box_ends=ends))
    cut = {row["organ"]: (row["cut"], row["cut_by_box"]) for row in facts["organs"] if row["found"]}
    assert cut["liver"] == (["top"], ["bottom"])
    assert cut["spleen"] == ([], ["back"])
    assert cut["aorta"] == ([], [])  # it goes on beyond the abdomen
    assert cut["left kidney"] == ([], [])
    said = "cut by the {} of the part of the scan that was segmented"
    named = [remark for remark in facts["remarks"] if "segmented" in remark]
    assert named == [f"liver {said.format('bottom')}", f"spleen {said.format('back')}"]


def test_a_case_of_specks_gets_a_report_without_a_movie(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr("visualization.movie.organ_mesh", lambda *_: None)
    scan, labels = tmp_path / "a.nii.gz", np.zeros(make_voxels().shape, np.uint8)
    labels[10, 10, 6] = 1
    save(make_voxels(), scan)
    save(labels, tmp_path / "labels.nii.gz")
    code, _, err = run_main(report, scan, tmp_path / "labels.nii.gz", "--output", tmp_path / "out")
    assert code == 0, err
    assert "No organ to show." in Page(tmp_path / "out" / "index.html").text
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["organ"] for row in facts["organs"] if row["found"]] == [ORGANS[1]]


@pytest.mark.slow
def test_reports_are_made_up_for_and_none_is_older_than_its_label_map(checkpoint, tmp_path, run_main, monkeypatch):
    flags = [save(make_voxels(), tmp_path / "c_0000.nii.gz"), "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    page = tmp_path / "out" / "reports" / "c" / "index.html"
    assert run_main(infer, *flags)[0] == 0
    code, out, _ = run_main(infer, *flags, "--skip-existing", "--report")
    assert (code, "0 of 0 scans segmented" in out, page.is_file()) == (0, True, True)
    page.unlink()
    content = torch.load(checkpoint, weights_only=True)
    content["network"] = {name: weight + 1 for name, weight in content["network"].items()}
    torch.save(content, tmp_path / "other.pt")
    others = [*flags[:2], tmp_path / "other.pt", *flags[3:]]
    code, _, err = run_main(infer, *others, "--skip-existing", "--report")
    assert (code, "are another network's" in err, page.is_file()) == (0, True, False)  # its report would say this one
    assert run_main(infer, *flags, "--skip-existing", "--report")[0] == 0
    # Stopped before the reports: the earlier one is of an earlier label map.
    monkeypatch.setattr(infer, "write_reports", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_main(infer, *flags, "--report")
    assert not page.exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_report_of_infer_reads_the_boxs_ends_in_volumes_csv(checkpoint, tmp_path, run_main):
    flags = [save(make_voxels(), tmp_path / "c_0000.nii.gz"), "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    assert run_main(infer, *flags)[0] == 0
    table = tmp_path / "out" / "volumes.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{line.rpartition(',')[0]},somewhere" for line in lines[1:])]) + "\n")
    assert run_main(infer, *flags, "--skip-existing", "--report", "--drop-pieces", "0.1")[0] == 0
    assert not (tmp_path / "out" / "reports" / "c").exists()  # its label map is of other options
    assert run_main(infer, *flags, "--skip-existing", "--report")[0] == 0
    facts = json.loads((tmp_path / "out" / "reports" / "c" / "report.json").read_text())
    assert "pieces dropped" not in facts["provenance"]
    found = [row for row in facts["organs"] if row["found"]]
    assert len(found) > 1
    assert all(row["cut_by_box"] == ["somewhere"] for row in found)
    assert run_main(infer, *flags, "--report", "--drop-pieces", "0.1")[0] == 0
    facts = json.loads((tmp_path / "out" / "reports" / "c" / "report.json").read_text())
    assert facts["provenance"]["pieces dropped"] == "0.1"


@pytest.mark.slow
def test_a_scan_without_a_place_is_shown_when_it_is_assumed(checkpoint, tmp_path, run_main):
    nowhere = nib.Nifti1Image(make_voxels().astype(np.int16), None)
    nowhere.header.set_xyzt_units("mm")
    nib.save(nowhere, tmp_path / "c.nii.gz")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--assume-ras", "--report"]
    code, _, err = run_main(infer, tmp_path / "c.nii.gz", *flags)
    assert code == 0, err
    shown = [tmp_path / "c.nii.gz", tmp_path / "out" / "c.nii.gz", "--output", tmp_path / "page"]
    assert run_main(report, *shown)[0] == 1
    assert run_main(report, *shown, "--assume-ras")[0] == 0


def test_a_report_that_cannot_be_written_is_named_and_the_label_map_stays(checkpoint, tmp_path, run_main):
    scan = save(make_voxels(), tmp_path / "c_0000.nii.gz")
    (tmp_path / "out" / "reports").mkdir(parents=True)
    (tmp_path / "out" / "reports" / "c").write_text("in the way")
    code, out, err = run_main(infer, scan, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--report")
    assert code == 1
    assert "case c: no report: " in err
    assert "1 of 1 scans segmented" in out
    assert "error: failed: c (its report)" in err
    assert (tmp_path / "out" / "c.nii.gz").is_file()


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"organs": 3}'])
def test_a_report_that_is_none_is_left_out_of_the_list(compared, tmp_path, capsys, content):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "report.json").write_bytes((compared / "report.json").read_bytes())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text(content)
    (tmp_path / "index.html").write_text("<p>somebody's page</p>")
    page = Page(reports.write_index(tmp_path))
    what = f"{tmp_path / 'index.html'} is no page of this program, so the earlier index.html is now"
    assert f"warning: {what} {tmp_path / 'index.html.old'}\n" in capsys.readouterr().err
    assert (tmp_path / "index.html.old").read_text() == "<p>somebody's page</p>"
    page = Page(reports.write_index(tmp_path))  # its own page is replaced
    assert page.links == ["good/index.html"]
    assert page.rows[1][1:3] == ["3 of 13", "0.417"]
    err = capsys.readouterr().err
    assert f"warning: {tmp_path / 'bad' / 'report.json'}: is no report" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_name_that_is_no_text_gets_a_report(checkpoint, tmp_path, run_main):
    name = os.fsdecode(b"sc\xe4n")
    scan = save(make_voxels(), tmp_path / f"{name}.nii.gz")
    code, _, err = run_main(infer, scan, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--report")
    assert (code, err.count("error")) == (0, 0)
    assert Page(tmp_path / "out" / "reports" / "index.html").links == ["sc%E4n/index.html"]
