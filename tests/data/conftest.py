"""Phantoms for the tests of data.convert, and the command itself."""

from pathlib import Path

import pytest
from foreign_layouts import CASES, voxels, write_labels

from data import convert
from data.make_phantom import write_phantom
from dataset import find_cases


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> list[tuple[Path, Path]]:
    """Return the scan and the label map of each case; the label maps hold no names in their headers."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(folder, cases=CASES, shape=(48, 40, 32), seed=0)
    cases = [(case.scan, case.labels) for case in find_cases(folder)]
    for _, labels in cases:
        write_labels(labels, voxels(labels), labels)
    return cases


@pytest.fixture
def run(run_main, tmp_path):
    """Run the conversion into tmp_path/data without the doctor: exit code, stdout, stderr, and the folder."""

    def run(source: Path, *flags: object, to: Path = tmp_path / "data"):
        return *run_main(convert, source, to, "--no-doctor", "--workers", "1", *flags), to

    return run
