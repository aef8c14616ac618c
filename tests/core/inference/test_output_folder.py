"""The output folder: checked before the work, written whole, shared by processes, earlier results set aside."""

import csv
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import files_in

from core.inference.measures import Measures
from core.inference.output_folder import OutputFolder
from core.inference.stages import Segmentation
from core.inference.volumes_table import write_volumes
from core.scans.crop import whole_box

ORGANS = ("background", "liver", "spleen")
HEADER = "case,id,organ,ml,hu_mean,hu_sd,hu_median,pieces,touches_edge\n"
OLD_HEADER = "case,id,organ,ml\n"


@pytest.fixture
def scans(tmp_path) -> dict[str, Path]:
    """Two files in place of scans, by case: one, two."""
    (tmp_path / "scans").mkdir()
    files = {case: tmp_path / "scans" / f"{case}_0000.nii.gz" for case in ("one", "two")}
    for case, path in files.items():
        path.write_text(case)
    return files


@pytest.fixture
def output(tmp_path) -> OutputFolder:
    (tmp_path / "out").mkdir()
    return OutputFolder(tmp_path / "out")


def rows(output: OutputFolder) -> list[str]:
    return (output.path / "volumes.csv").read_text().splitlines()


# ---- Before the work starts


def test_nothing_is_made_without_cases(tmp_path):
    OutputFolder(tmp_path / "out").prepare({}, [tmp_path / "nowhere"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "what"),
    [("data/images", "the scan"), ("data/labels", "the data's own label maps"), ("link", "the scan")],
)
def test_no_output_into_the_folders_of_the_data(scans, tmp_path, folder, what):
    (tmp_path / "data" / "labels").mkdir(parents=True)
    (tmp_path / "scans").rename(tmp_path / "data" / "images")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "images")
    cases = {case: tmp_path / "data" / "images" / path.name for case, path in scans.items()}
    for found, refused in ((cases, []), ({}, list(cases.values()))):
        with pytest.raises(ValueError, match=f"^--output: {tmp_path / folder} holds {what}.*choose another folder$"):
            OutputFolder(tmp_path / folder).prepare(found, refused)


def test_no_output_over_the_file_that_a_link_leads_to(scans, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one.nii.gz").symlink_to(scans["one"])
    with pytest.raises(ValueError, match="holds the scan"):
        OutputFolder(tmp_path / "scans").prepare({"one": tmp_path / "links" / "one.nii.gz"}, [])


@pytest.mark.parametrize("below", ["", "results"])
def test_no_output_into_a_series_folder(tmp_path, below):
    (tmp_path / "p1").mkdir()
    with pytest.raises(ValueError, match=f"lies in the input folder {tmp_path / 'p1'}; choose another folder"):
        OutputFolder(tmp_path / "p1" / below).prepare({"p1": tmp_path / "p1"}, [])


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("name", ["two.nii.gz", "two_probabilities.nii.gz"])
def test_no_output_over_the_scan_itself_by_whatever_name(output, scans, link, name):
    getattr(output.path / name, link)(scans["two"])
    message = f"^--output: {output.path / name} is the scan {scans['two']} itself"
    with pytest.raises(ValueError, match=message):
        output.prepare(scans, [])
    assert scans["two"].read_text() == "two"


def test_a_scan_whose_link_leads_nowhere_does_not_stop_the_others(output, scans, tmp_path):
    scans["two"].unlink()
    scans["two"].symlink_to(tmp_path / "gone")
    (output.path / "two.nii.gz").write_text("earlier")
    output.prepare(scans, [])


@pytest.mark.parametrize("name", ["two.nii.gz", "two_probabilities.nii.gz", "volumes.csv"])
def test_a_folder_in_a_results_place_is_refused(output, scans, name):
    (output.path / name).mkdir()
    with pytest.raises((ValueError, OSError), match=str(output.path / name)):
        output.prepare(scans, [])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "patient,volume\n1,2\n",
            r"has the columns \['patient', 'volume'\], expected \['case', 'id', 'organ', 'ml', 'hu_mean'",
        ),
        (f"{OLD_HEADER}one,1,liver\n", "has the row one,1,liver,None, expected case,id,organ,ml;"),
        (f"{OLD_HEADER}one,x,liver,3\n", "has the row one,x,liver,3, expected case,id,organ,ml;"),
        (f'{OLD_HEADER}one,1,"liver"s,3\n', "cannot be read as a table"),
        (
            f"{HEADER}one,1,liver,3\n",
            "has the row one,1,liver,3,None,None,None,None,None, expected case,id,organ,ml,hu_",
        ),
    ],
)
def test_a_damaged_or_other_table_is_refused_and_kept(output, scans, content, complaint):
    (output.path / "volumes.csv").write_text(content)
    with pytest.raises(ValueError, match=f"^{output.path / 'volumes.csv'}: {complaint}"):
        output.prepare(scans, [])
    assert files_in(output.path) == {"volumes.csv": content.encode()}


# ---- Volumes


def write_ml(path: Path, case: str, *volumes_ml: float) -> None:
    write_volumes(path, case, [Measures(ml) for ml in volumes_ml], ORGANS)


def test_volumes_of_a_case_replace_its_earlier_ones_and_leave_the_others(output):
    write_ml(output.path, "two", 1.5, 2)
    write_volumes(output.path, "one", [Measures(0.12345, 55.25, 12.04, 54.5, 2, ("left", "top")), Measures()], ORGANS)
    write_ml(output.path, "two", 7, 0.0004)
    assert rows(output) == [
        HEADER.strip(),
        "one,1,liver,0.123,55.2,12.0,54.5,2,left top",
        "one,2,spleen,0.000,,,,0,",
        "two,1,liver,7.000,,,,0,",
        "two,2,spleen,0.000,,,,0,",
    ]


def test_a_table_from_a_spreadsheet_program_an_earlier_version_and_odd_names_come_through(output):
    table = output.path / "volumes.csv"
    table.write_bytes(b"\xef\xbb\xbfcase,id,organ,ml\r\nzw\xc3\xb6lf,1,liver,3.000\r\n")
    name = os.fsdecode(b"latin \xf6")  # a name that is not UTF-8
    write_ml(output.path, name, 1, 2)
    lines = table.read_bytes().splitlines()
    assert lines[0] == HEADER.strip().encode()
    rest = b",,,,0,"
    assert lines[1:3] == [b"latin \xf6,1,liver,1.000" + rest, b"latin \xf6,2,spleen,2.000" + rest]
    assert lines[3:] == ["zwölf,1,liver,3.000,,,,,".encode()]  # which says nothing of what was not measured


def write_some(path: Path, cases: list[str]) -> None:
    for case in cases:
        write_ml(path, case, 1, 2)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")
def test_no_process_loses_the_rows_of_another(output):
    # Many rows, so that reading and writing the table takes its time, in which others come in between.
    earlier = "".join(f"earlier_{i:05},1,liver,1.000\n" for i in range(10_000))
    (output.path / "volumes.csv").write_text(OLD_HEADER + earlier)
    cases = [f"{i:02}" for i in range(20)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_some, args=(output.path, cases[first::4])) for first in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    with open(output.path / "volumes.csv", newline="") as file:
        found = [(row["case"], row["id"]) for row in csv.DictReader(file)]
    assert len(found) == 10_000 + 20 * 2
    assert found[:40] == [(case, i) for case in cases for i in "12"]
    assert set(files_in(output.path)) == {"volumes.csv"}


# ---- What earlier runs left


def test_a_case_is_finished_when_all_that_is_wanted_is_there(output):
    with_probabilities = OutputFolder(output.path, ["--probabilities"])
    cases = {case: Path(case) for case in ("half", "none", "whole")}
    for name in ("half.nii.gz", "whole.nii.gz", "whole_probabilities.nii.gz", "none_probabilities.nii.gz"):
        (output.path / name).write_text("")
    assert list(output.unfinished(cases, "abc")) == ["none"]
    assert list(with_probabilities.unfinished(cases, "abc")) == ["half", "none"]


def test_earlier_results_of_a_failed_case_are_renamed_and_its_rows_removed(output, capsys):
    out = output.path
    (out / "reports" / "two").mkdir(parents=True)
    names = ["two.nii.gz", "two_probabilities.nii.gz", "reports/two/index.html", "reports/two/report.json"]
    for name in (*names, "one.nii.gz"):
        (out / name).write_text(name)
    (out / "two.nii.gz.old").write_text("older still")
    for case in ("one", "two"):
        write_ml(out, case, 1, 2)
    output.set_aside("two")
    assert {name: text.decode() for name, text in files_in(out).items() if name != "volumes.csv"} == {
        "one.nii.gz": "one.nii.gz", **{f"{name}.old": name for name in names},
    }  # fmt: skip
    assert rows(output) == [HEADER.strip(), "one,1,liver,1.000,,,,0,", "one,2,spleen,2.000,,,,0,"]
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == (f"warning: case two: failed, so the earlier two.nii.gz is now {out / 'two.nii.gz'}.old")
    assert len(warnings) == 4
    before = files_in(out)
    output.set_aside("two")
    assert files_in(out) == before
    assert capsys.readouterr().err == ""


def test_refused_inputs_count_as_failed_unless_another_input_is_the_case(output):
    for case in ("one", "two"):
        (output.path / f"{case}.nii.gz").write_text("")
    output.set_aside_refused([Path("gone/one_0000.nii.gz"), Path("gone/two.nii")], ["two", "three"])
    assert set(files_in(output.path)) == {"one.nii.gz.old", "two.nii.gz"}


def test_what_cannot_be_set_aside_is_named(output, capsys):
    (output.path / "two.nii.gz").write_text("")
    (output.path / "two.nii.gz.old" / "full").mkdir(parents=True)
    (output.path / "volumes.csv").write_text("another,table\n")
    output.set_aside("two")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "two.nii.gz" in first
    assert second.startswith(f"error: {output.path / 'volumes.csv'}: has the columns")


def test_probabilities_need_room(output, monkeypatch):
    class Grid:
        shape = (200, 200, 60)

    scan = Segmentation("one", Path("one.nii.gz"), Grid(), whole_box(Grid.shape))
    monkeypatch.setattr("core.system.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    # 200 * 200 * 60 voxels of 4 classes, 2 bytes each: 0.018 GiB.
    with pytest.raises(OSError, match=r"out: has 0.00 GiB free, but the probabilities of one needs 0.02 GiB"):
        OutputFolder(output.path, ["--probabilities"]).write(
            scan, np.zeros((4, 1, 1, 1)), np.zeros(1, np.uint8), ORGANS, ""
        )
    assert files_in(output.path) == {}


@pytest.mark.parametrize("name", ["organs.ctbl", "organs.label"])
def test_a_folder_in_the_place_of_a_table_is_refused_before_the_work(output, scans, name):
    (output.path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: is a folder where a table is to be written; move it away"):
        output.prepare(scans, ())


def test_tables_of_other_organs_are_kept_and_equal_ones_not_written_again(output, capsys):
    class Grid:
        voxel_ml = 1.0

    def write_tables(*organs: str) -> dict[str, bytes]:
        scan = Segmentation("one", Path("one.nii.gz"), Grid(), whole_box((2, 2, 2)))
        scan.keep_hu(np.zeros((2, 2, 2)))
        output.write_tables(scan, np.zeros((2, 2, 2), np.uint8), organs)
        return files_in(output.path)

    earlier = write_tables("background", "liver")
    written = (output.path / "organs.ctbl").stat().st_mtime_ns
    write_tables("background", "liver")
    assert (output.path / "organs.ctbl").stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    later, warned = write_tables("background", "aorta"), capsys.readouterr().err
    for name in ("organs.ctbl", "organs.label"):
        assert b"aorta" in later[name]
        assert later[f"{name}.old"] == earlier[name]
        assert f"the earlier {name} is now" in warned


def test_files_of_somebody_else_in_the_place_of_a_report_are_kept(output, capsys):
    reports = output.path / "reports"
    (reports / "two").mkdir(parents=True)
    foreign = {"two/report.json": '{"mine": 1}', "index.html": "my own"}
    for name, text in (foreign | {"two/index.html": "<p>Content-Security-Policy</p>"}).items():
        (reports / name).write_text(text)
    replace(output, report=True).retire_report("two")
    assert files_in(reports) == {f"{name}.old": text.encode() for name, text in foreign.items()}
    assert capsys.readouterr().err.count("is no report of this program, so the earlier") == 2
