"""Cases: found, split, cached, put in order and augmented."""

import errno
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from data_files import SHAPE, SIZE, make_data, same_samples, settings, write_volume
from helpers import TINY

import dataset
import train
from core.config import Config, load_config
from core.scans.anatomy import organs_in
from core.scans.cache import code_checksum
from core.scans.crop import crop_box
from core.scans.files import find_label_maps, find_scans, read_case_ids, select_cases
from core.scans.geometry import check_same_grid
from core.scans.nifti import open_nifti
from core.scans.placement import affine_of
from core.scans.resample import resize_labels
from core.scans.typical import hu_percentiles
from core.scans.volumes import load_labels, load_scan, prepare_image
from core.training.splitting import split_by_fold, split_cases
from dataset import Case, CaseDataset, find_cases, find_data

LABELLED = Path(__file__).parents[1] / ".." / "shared" / "data" / "labelled"


# ---- Finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "scan", "labels"),
    [
        ("", "{}_0000.nii.gz", "{}.nii.gz"),
        ("", "{}_0000.nii", "{}.nii"),
        ("", "{}.nii", "{}.nii.gz"),
        ("", "{}_0000.NII.GZ", "{}.nii.gz"),
        ("", "{}_0000.nii.gz", "{}.nii/{}.nii"),
        ("FLARE22Train", "{}_0000.nii.gz", "{}.nii.gz/{}.nii"),
        ("FLARE22Train/FLARE22Train", "{}_0000.nii.gz", "{}.nii.gz"),
    ],
)
def test_scans_and_label_maps_are_paired_by_id_in_every_layout(tmp_path, below, scan, labels):
    ids = ("FLARE22_Tr_0002", "FLARE22_Tr_0001", "x_0000_y")
    folder = make_data(tmp_path / below, ids, scan, labels)
    assert find_data(tmp_path) == folder
    cases = find_cases(tmp_path)
    assert [case.id for case in cases] == sorted(ids)
    for case in cases:
        assert case.scan == folder / "images" / scan.format(case.id)
        assert case.labels == folder / "labels" / labels.format(case.id, case.id)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    folder = make_data(tmp_path)
    for name in ("images/._a_0000.nii.gz", "images/.77.a.nii.gz", "labels/.DS_Store", "labels/readme.txt"):
        (folder / name).write_text("x")
    (folder / "labels" / "old").mkdir()
    assert [case.id for case in find_cases(folder)] == ["a", "b", "c"]
    assert list(find_label_maps(folder)) == ["a", "b", "c"]


def add_duplicate(folder: Path) -> None:
    """Return a second scan of b."""
    shutil.copy(folder / "images" / "b_0000.nii.gz", folder / "images" / "b.nii.gz")


def shift_labels(folder: Path) -> None:
    """Return the label map of b 12 mm away from its scan."""
    write_volume(folder / "labels" / "b.nii.gz", np.zeros(SHAPE, np.uint8), shift_mm=12)


def cut_labels(folder: Path) -> None:
    """Return the label map of b one slice short."""
    write_volume(folder / "labels" / "b.nii.gz", np.zeros((12, 10, 5), np.uint8))


def two_in_a_folder(folder: Path) -> None:
    """Two label maps in the folder b.nii."""
    (folder / "labels" / "b.nii.gz").unlink()
    for name in ("b.nii", "b (1).nii"):
        write_volume(folder / "labels" / "b.nii" / name, np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "labels" / "b.nii.gz").unlink(),
            "no label map for the case b: looked for labels/b.nii.gz$",
        ),
        (
            lambda folder: (folder / "images" / "b_0000.nii.gz").unlink(),
            "no scan for the case b: looked for images/b_0000.nii.gz$",
        ),
        (add_duplicate, "case b: .* both mean it"),
        (shift_labels, "case b: the scan has 12x10x6 .* expected the same voxels"),
        (cut_labels, "case b: the scan has 12x10x6 .* the label map 12x10x5"),
        (two_in_a_folder, "b.nii: is a folder with 2 NIfTI files"),
        (lambda folder: (folder / "labels" / "b.nii.gz").write_bytes(b"x" * 500), "b.nii.gz: is no NIfTI file"),
    ],
)
def test_data_that_do_not_fit_together_are_refused_by_case(tmp_path, spoil, message):
    folder = make_data(tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        find_cases(folder)


def test_folders_without_cases_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is no data set"):
            find_cases(folder)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="no scans in images"):
        find_cases(tmp_path)
    with pytest.raises(FileNotFoundError, match="no label map in this folder"):
        find_label_maps(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_label_maps(tmp_path / "nowhere")


def test_scans_are_found_among_files_and_folders(tmp_path):
    folder = make_data(tmp_path / "data")
    single = tmp_path / "z.nii"
    write_volume(single, np.zeros(SHAPE, np.int16))
    images = folder / "images"
    expected = {case: images / f"{case}_0000.nii.gz" for case in "abc"}
    assert find_scans(folder) == find_scans(images) == expected
    assert list(find_scans(folder)) == ["a", "b", "c"]
    assert find_scans(single) == {"z": single}
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_scans(tmp_path / "nowhere.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no scan in this folder"):
        find_scans(tmp_path / "empty")


def test_label_maps_are_found_without_probabilities(tmp_path):
    for name in ("b.nii.gz", "a.nii", "a_probabilities.nii.gz"):
        write_volume(tmp_path / name, np.zeros((2, 2, 2), np.uint8))
    assert find_label_maps(tmp_path) == {"a": tmp_path / "a.nii", "b": tmp_path / "b.nii.gz"}


def test_cases_are_selected_by_id_or_by_a_file(tmp_path):
    found = {case: Path(case) for case in ("a", "b", "c", "d")}
    assert select_cases(found, None) == found
    assert list(select_cases(found, ["c", "a"])) == ["a", "c"]
    listing = tmp_path / "ids.txt"
    listing.write_text("\ufeff# held out\n c \n\nb # late\n", encoding="utf-8")
    assert list(select_cases(found, [str(listing)])) == ["b", "c"]
    with pytest.raises(ValueError, match=r"x, y not among the 4 cases: a, b, c, \.\.\.$"):
        select_cases(found, ["y", "a", "x"])
    with pytest.raises(ValueError, match=r"x not among the 1 cases: a$"):
        select_cases({"a": Path("a")}, ["x"])
    listing.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"ids\.txt: lists no case"):
        select_cases(found, [str(listing)])


# ---- Splitting -------------------------------------------------------------------------------------------------------


def cases_of(*ids: str) -> list[Case]:
    return [Case(case, Path(case), Path(case)) for case in ids]


def ids_of(cases: list[Case]) -> list[str]:
    return [case.id for case in cases]


FLARE = [f"FLARE22_Tr_{i:04d}" for i in range(1, 51)]


def test_the_data_sets_own_validation_cases_apply_when_all_are_there():
    train, val, how = split_cases(cases_of(*FLARE), None, 0.5, 0)
    assert ids_of(train) == FLARE[:40]
    assert ids_of(val) == FLARE[40:]
    assert how == "10 of 50 held out by data/val_cases.txt"


def test_the_data_sets_own_validation_cases_are_ignored_for_other_data():
    train, val, how = split_cases(cases_of(*"abcdefghij"), None, 0.3, 0)
    assert len(val) == 3
    assert sorted(ids_of(train) + ids_of(val)) == list("abcdefghij")
    assert how.startswith("3 of 10 held out by val_fraction")
    assert "data/val_cases.txt is for other data" in how


def test_some_of_the_data_sets_own_validation_cases_are_an_error():
    with pytest.raises(ValueError, match=r"data/val_cases.txt: FLARE22_Tr_0050 not among the 49 cases"):
        split_cases(cases_of(*FLARE[:-1]), None, 0.2, 0)


def test_validation_cases_by_id_or_file(tmp_path):
    listing = tmp_path / "val.txt"
    listing.write_text("d\nb\n")
    for given in (["d", "b"], [str(listing)], ["b", "d", "b"]):
        train, val, how = split_cases(cases_of(*"abcd"), given, 0.9, 0)
        assert (ids_of(train), ids_of(val)) == (["a", "c"], ["b", "d"])
        assert how == "2 of 4 held out by val_cases"
    with pytest.raises(ValueError, match="val_cases: e not among the 4 cases"):
        split_cases(cases_of(*"abcd"), ["a", "e"], 0.2, 0)
    with pytest.raises(ValueError, match="val_cases: x not among"):
        split_cases(cases_of(*"abcd"), ["x"], 0.2, 0)
    with pytest.raises(ValueError, match="val_cases: holds out all 2 cases"):
        split_cases(cases_of(*"ab"), ["a", "b"], 0.2, 0)
    made = [replace(case, weight=0.9) for case in cases_of("m")]
    with pytest.raises(ValueError, match="holds out all 2 cases that people have labelled, so that none is left"):
        split_cases([*cases_of(*"ab"), *made], ["a", "b"], 0.2, 0)


@pytest.mark.parametrize(
    ("fraction", "cases", "expected"), [(0, 10, 0), (0.01, 10, 1), (0.25, 8, 2), (0.99, 3, 2), (0.2, 1, 0)]
)
def test_the_fraction_held_out(fraction, cases, expected):
    everything = cases_of(*"abcdefghij"[:cases])
    train, val, _ = split_cases(everything, None, fraction, 0)
    assert len(val) == expected
    assert len(train) == cases - expected


def test_the_fraction_is_drawn_by_the_seed():
    everything = cases_of(*"abcdefghij")
    drawn = [tuple(ids_of(split_cases(everything, None, 0.3, seed)[1])) for seed in range(20)]
    assert drawn == [tuple(ids_of(split_cases(everything, None, 0.3, seed)[1])) for seed in range(20)]
    assert len(set(drawn)) > 10


def test_folds_hold_out_every_case_once():
    everything = cases_of(*"abcdefghijk")
    held_out = []
    for fold in range(4):
        train, val, how = split_by_fold(everything, 4, fold, 7)
        assert len(val) in (2, 3)
        assert sorted(ids_of(train) + ids_of(val)) == list("abcdefghijk")
        assert ids_of(val) == ids_of(split_by_fold(everything[::-1], 4, fold, 7)[1])[::-1]
        assert how == f"{len(val)} of 11 held out as fold {fold} of 4 (0 to 3)"
        held_out += ids_of(val)
    assert sorted(held_out) == list("abcdefghijk")
    firsts = {tuple(ids_of(split_by_fold(everything, 4, 0, seed)[1])) for seed in range(20)}
    assert len(firsts) > 10


def test_cases_with_made_labels_are_in_every_training_and_in_no_fold():
    made = [replace(case, weight=0.9) for case in cases_of(*"mnop")]
    held_out = []
    for fold in range(2):
        train, val, how = split_by_fold([*cases_of(*"abc"), *made], 2, fold, 0)
        assert ids_of(made) == ids_of(case for case in train if case.weight)
        assert how.startswith(f"{len(val)} of 3 held out")
        held_out += ids_of(val)
    assert sorted(held_out) == list("abc")
    with pytest.raises(ValueError, match=r"all 4 cases are in weights\.csv, which lists labels that a network"):
        split_cases(made, None, 0.2, 0)


def test_folds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="fold: got 4 of 4 folds, expected 0 to 3"):
        split_by_fold(cases_of(*"abcde"), 4, 4, 0)
    with pytest.raises(ValueError, match="folds: got 6 for 5 cases"):
        split_by_fold(cases_of(*"abcde"), 6, 0, 0)


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_scan_on_the_networks_grid(tmp_path):
    cases = find_cases(make_data(tmp_path))
    sample = CaseDataset(cases, settings())[1]
    assert sample["case"] == "b"
    voxels, labels = load_scan(cases[1].scan)[0], load_labels(cases[1].labels)[0]
    assert sample["image"].shape == (1, *SIZE)
    assert sample["image"].dtype == sample["labels"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["image"][0], prepare_image(voxels, SIZE, (-160, 240)))
    np.testing.assert_array_equal(sample["labels"], resize_labels(labels, SIZE))
    assert sample["extent_mm"].tolist() == [12 * 2, 10 * 3, 6 * 5]
    assert sample["hu_percentiles"].tolist() == np.float32(hu_percentiles(voxels)).tolist()


def test_the_percentiles_are_of_the_body():
    voxels = np.full((40, 40, 40), -1024, np.float32)
    voxels[:20] = np.arange(40)  # along Z; every fourth: 0, 4, ..., 36, each a tenth of the body
    np.testing.assert_allclose(hu_percentiles(voxels), [0, 18, 36])
    np.testing.assert_allclose(hu_percentiles(np.full((8, 8, 8), -1024, np.float32)), -1024)


def test_a_sample_is_the_same_with_and_without_the_cache(tmp_path, monkeypatch):
    cases = find_cases(make_data(tmp_path / "data"))
    plain = CaseDataset(cases, settings())
    expected = [plain[i] for i in range(3)]
    cached = settings(cache_dir=str(tmp_path / "cache"))
    filling = CaseDataset(cases, cached)
    assert all(same_samples(filling[i], expected[i]) for i in range(3))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    forbid_preparing(monkeypatch)
    for reader in (filling, CaseDataset(cases, cached)):
        assert all(same_samples(reader[i], expected[i]) for i in range(3))
    # Writing into a sample changes neither the file nor the next sample.
    filling[0]["image"].fill_(7)
    filling[0]["labels"].fill_(7)
    assert same_samples(filling[0], expected[0])
    assert same_samples(CaseDataset(cases, cached)[0], expected[0])


def test_a_data_set_keeps_nothing_of_its_samples(tmp_path):
    cases = find_cases(make_data(tmp_path / "data"))
    samples = CaseDataset(cases, settings(cache_dir=str(tmp_path / "cache")))
    before = pickle.dumps(vars(samples))
    for _ in range(2):  # the second time from the cache
        for i in range(len(samples)):
            samples[i]
    assert pickle.dumps(vars(samples)) == before


def test_a_cached_sample_is_mapped_and_not_read_into_memory(tmp_path):
    cases = find_cases(make_data(tmp_path / "data", ("a",)))
    config = settings(cache_dir=str(tmp_path / "cache"), size=(64, 64, 64))
    samples = CaseDataset(cases, config)
    samples[0]
    tracemalloc.start()
    sample = samples[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample["image"].numel() == 64**3
    assert peak < 64**3 / 4


def forbid_preparing(monkeypatch) -> None:
    """From here on every sample has to come from the cache."""

    def prepare(self: CaseDataset, case: Case) -> None:
        raise AssertionError(f"{case.id} was not taken from the cache")

    monkeypatch.setattr(CaseDataset, "prepare", prepare)


def flip_byte(place: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return spoil


def cut_to(length: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:length])


FACTS = 2 * 8 * 8 * 8  # where the facts follow the volumes in a cache file


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        flip_byte(0),
        flip_byte(FACTS - 1),
        flip_byte(FACTS + 2),
        flip_byte(FACTS + 16),  # the first digit of the extent, which stays a number
        flip_byte(-1),
        cut_to(0),
        cut_to(3),
        cut_to(FACTS // 2),
        cut_to(FACTS),
        cut_to(-1),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_cache_entry_is_made_anew(tmp_path, spoil, same_process):
    cases = find_cases(make_data(tmp_path / "data", ("a",)))
    config = settings(cache_dir=str(tmp_path / "cache"))
    first = CaseDataset(cases, config)
    expected = CaseDataset(cases, settings())[0]
    assert same_samples(first[0], expected)
    assert same_samples(first[0], expected)
    (path,) = (tmp_path / "cache").iterdir()
    good = path.read_bytes()
    assert good[FACTS : FACTS + 16] == b'{"extent_mm": [2'[:16]
    spoil(path)
    if path.exists():
        os.utime(path, ns=(1, 1))  # whatever the clock's steps are, the change shall show
    again = first if same_process else CaseDataset(cases, config)
    assert same_samples(again[0], expected)
    assert path.read_bytes() == good
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_a_cache_entry_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cases = find_cases(make_data(tmp_path / "data", ("a",)))
    samples = CaseDataset(cases, settings(cache_dir=str(tmp_path / "cache")))
    write_bytes = Path.write_bytes

    def write_half(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="disk full"):
            samples[0]
    assert list((tmp_path / "cache").iterdir()) == []
    assert same_samples(samples[0], CaseDataset(cases, settings())[0])


def test_the_cache_key_covers_size_window_classes_and_files(tmp_path):
    cases = find_cases(make_data(tmp_path / "data", ("a", "b")))
    organs = load_config().organs

    def key(case: Case = cases[0], **changes) -> str:
        return CaseDataset(cases, settings(cache_dir="x", **changes)).key(case)

    keys = {
        key(),
        key(cases[1]),
        key(size=(8, 8, 16)),
        key(window_hu=(-160, 241)),
        key(organs=organs[:-1]),
    }
    assert len(keys) == 5
    assert key() == key(seed=5, epochs=7, augment=True)  # what does not matter does not make a new entry
    for path in (cases[0].scan, cases[0].labels):
        before = key()
        os.utime(path, ns=(1, 1))
        assert key() != before
        before, content = key(), path.read_bytes()
        path.write_bytes(content + b"\0")
        os.utime(path, ns=(1, 1))
        assert key() != before


def test_the_cache_key_covers_the_code_that_prepares_a_case(tmp_path, monkeypatch):
    used = (CaseDataset, load_scan, prepare_image, resize_labels, crop_box, organs_in, hu_percentiles)
    used += (open_nifti, affine_of, check_same_grid)
    assert {function.__module__ for function in used} <= set(dataset.PREPARED_BY)
    module = ModuleType("edited")
    module.__file__ = str(tmp_path / "edited.py")
    Path(module.__file__).write_text("a = 1")
    monkeypatch.setitem(sys.modules, "edited", module)
    monkeypatch.setattr(dataset, "PREPARED_BY", ("edited",))
    cases = find_cases(make_data(tmp_path / "data", ("a",)))
    before = CaseDataset(cases, settings(cache_dir="x")).key(cases[0])
    Path(module.__file__).write_text("a = 2")
    code_checksum.cache_clear()
    assert CaseDataset(cases, settings(cache_dir="x")).key(cases[0]) != before


def test_a_changed_scan_is_read_anew(tmp_path):
    folder = make_data(tmp_path / "data", ("a",))
    config = settings(cache_dir=str(tmp_path / "cache"))
    before = CaseDataset(find_cases(folder), config)[0]
    write_volume(folder / "images" / "a_0000.nii.gz", np.full(SHAPE, 240, np.int16))
    after = CaseDataset(find_cases(folder), config)[0]
    assert (after["image"] == 255).all()
    assert not (before["image"] == 255).all()


def test_a_changed_scan_is_read_anew_though_size_and_time_are_kept(tmp_path):
    folder = make_data(tmp_path / "data", ("a",))
    config = settings(cache_dir=str(tmp_path / "cache"))
    labels = folder / "labels" / "a.nii"
    write_volume(labels, np.zeros(SHAPE, np.uint8))
    (folder / "labels" / "a.nii.gz").unlink()
    assert not CaseDataset(find_cases(folder), config)[0]["labels"].any()
    before = labels.stat()
    write_volume(labels, np.ones(SHAPE, np.uint8))
    os.utime(labels, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (labels.stat().st_size, labels.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (CaseDataset(find_cases(folder), config)[0]["labels"] == 1).all()


def read_first(cases: list[Case], config: Config, go: object, answers: object) -> None:
    """In a process of its own: wait for the others, then read the first case."""
    torch.set_num_threads(1)
    go.wait()
    sample = CaseDataset(cases, config)[0]
    answers.put((sample["image"].numpy().tobytes(), sample["labels"].numpy().tobytes(), sample["extent_mm"].tolist()))


def test_several_processes_may_make_the_same_entry(tmp_path):
    cases = find_cases(make_data(tmp_path / "data", ("a",)))
    config = settings(cache_dir=str(tmp_path / "cache"), size=(48, 48, 48))
    fork = multiprocessing.get_context("fork")
    go, answers = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=read_first, args=(cases, config, go, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    expected = CaseDataset(cases, replace(config, cache_dir=None))[0]
    for image, labels, extent_mm in got:
        assert image == expected["image"].numpy().tobytes()
        assert labels == expected["labels"].numpy().tobytes()
        assert extent_mm == expected["extent_mm"].tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("spoil", "message"), [(shift_labels, "case b: the scan has"), (cut_labels, "case b: the scan")]
)
def test_a_sample_that_does_not_fit_together_is_refused(tmp_path, spoil, message):
    cases = find_cases(make_data(tmp_path))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        CaseDataset(cases, settings())[1]
    write_volume(tmp_path / "labels" / "b.nii.gz", np.full(SHAPE, 14, np.uint8))
    with pytest.raises(ValueError, match=r"b.nii.gz: ids outside the organ list: 14 \(720 voxels\)"):
        CaseDataset(cases, settings())[1]


# ---- Real scans ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LABELLED.is_dir(), reason="the real scans in ../shared/data/labelled are missing")
def test_real_cases(tmp_path):
    cases = find_cases(LABELLED)
    assert ids_of(cases) == ["amos_0001", "amos_0013", "ts_example"]
    samples = CaseDataset(cases[2:], settings(size=(64, 64, 64), cache_dir=str(tmp_path)))
    assert same_samples(samples[0], samples[0])
    np.testing.assert_allclose(samples[0]["extent_mm"], [122 * 3, 101 * 3, 112 * 3], rtol=1e-5)
    assert set(samples[0]["labels"].unique().tolist()) == set(range(14)) - {10}
    # The patient's liver is on the right, the spleen on the left; X grows to the right.
    labels = samples[0]["labels"]
    assert (labels == 1).nonzero()[:, 0].float().mean() > (labels == 3).nonzero()[:, 0].float().mean() + 10


def test_list_of_cases_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "cases.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cases\.txt: is no text"):
        read_case_ids([str(tmp_path / "cases.txt")])


def train_with_cache(run_main, data: Path, folder: Path, workers: int, reason: str) -> None:
    """Train where no cache file can be written, and check the sentence that ends it."""
    flags = [*TINY, "--workers", workers, f"--run-dir={folder / 'run'}", f"--cache-dir={folder / 'cache'}"]
    code, _, err = run_main(train, f"--data-dir={data}", *flags)
    assert code in (1, 2, 3)
    sentence = rf"error: {folder}/cache/phantom_\d+-\w+.cache: the cache cannot be written \({reason}\); make room, "
    assert re.fullmatch(sentence + r"give another --cache-dir, or train without a cache by --cache-dir null\n", err)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_cache_disk_names_the_way_without(tmp_path, monkeypatch, run_main, phantom_data, number):
    def fail(path: Path, content: bytes) -> None:
        if path.name.endswith(".cache"):
            raise OSError(number, os.strerror(number), str(path))
        write(path, content)

    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", fail)
    train_with_cache(run_main, phantom_data, tmp_path, 0, os.strerror(number))
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_system_that_takes_no_cache_file_is_named_from_a_worker_too(tmp_path, run_main, phantom_data):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # a cache file has 2 x 32 x 32 x 16 bytes and more
    try:
        train_with_cache(run_main, phantom_data, tmp_path, 1, os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
