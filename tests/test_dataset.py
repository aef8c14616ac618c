"""Cases: found, split, cached, put in order and augmented."""

import multiprocessing
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader

from core.config import Config, load_config
from core.scans.files import find_label_maps, find_scans, read_case_ids, select_cases
from core.scans.resample import resize_labels
from core.scans.typical import hu_percentiles
from core.scans.volumes import load_labels, load_scan, prepare_image
from core.training.augment import augment, draw_affine, flip_left_right, mirrored_ids, warp
from core.training.batches import EpochBatches
from dataset import Case, CaseDataset, find_cases, find_data, split_by_fold, split_cases

SHAPE, SPACING_MM, SIZE = (12, 10, 6), (2.0, 3.0, 5.0), (8, 8, 8)
LABELLED = Path(__file__).parents[1] / ".." / "shared" / "data" / "labelled"
NO_CHANGE = {
    f"augment_{name}": 0 for name in ("rotation_degrees", "scale", "shift", "contrast", "brightness", "gamma", "noise")
}


def write_volume(path: Path, array: np.ndarray, shift_mm: float = 0) -> None:
    """Write an array as NIfTI, with SPACING_MM and its first voxel at `shift_mm` along X."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING_MM, 1])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(array, affine), path)


def make_data(
    folder: Path, ids: tuple = ("a", "b", "c"), scan: str = "{}_0000.nii.gz", labels: str = "{}.nii.gz"
) -> Path:
    """Return a data set of random scans and label maps, a different one for each id; the folder."""
    for case in ids:
        rng = np.random.default_rng(list(case.encode()))
        write_volume(folder / "images" / scan.format(case), rng.integers(-1000, 1000, SHAPE).astype(np.int16))
        write_volume(folder / "labels" / labels.format(case, case), rng.integers(0, 14, SHAPE).astype(np.uint8))
    return folder


def settings(**changes) -> Config:
    """Return the default settings on a small grid, without a cache."""
    return replace(load_config(), **{"size": SIZE, "cache_dir": None} | changes)


def same_samples(first: dict, second: dict) -> bool:
    """Whether two samples are the same to the bit, types and shapes included."""
    assert first.keys() == second.keys()
    return all(
        value == second[key]
        if isinstance(value, str | list)
        else value.dtype == second[key].dtype and torch.equal(value, second[key].view_as(value))
        for key, value in first.items()
    )


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
        (lambda folder: (folder / "labels" / "b.nii.gz").unlink(), "no label map for the case b$"),
        (lambda folder: (folder / "images" / "b_0000.nii.gz").unlink(), "no scan for the case b$"),
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


def test_a_changed_scan_is_read_anew(tmp_path):
    folder = make_data(tmp_path / "data", ("a",))
    config = settings(cache_dir=str(tmp_path / "cache"))
    before = CaseDataset(find_cases(folder), config)[0]
    write_volume(folder / "images" / "a_0000.nii.gz", np.full(SHAPE, 240, np.int16))
    after = CaseDataset(find_cases(folder), config)[0]
    assert (after["image"] == 255).all()
    assert not (before["image"] == 255).all()


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


# ---- Order -----------------------------------------------------------------------------------------------------------


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        batches = EpochBatches(20, 1, seed)
        batches.epoch = epoch
        return [case for batch in batches for case in batch]

    orders = {tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(row) == list(range(20)) for row in orders)
    np.random.seed(3)  # noqa: NPY002 - the global generator must not matter
    torch.manual_seed(3)
    batches = EpochBatches(20, 3, 2)
    first = list(batches)
    assert [len(batch) for batch in first] == [3] * 6 + [2]
    batches.epoch = 4
    assert list(chain(*batches)) == order(2, 4)
    batches.epoch = 0
    assert list(batches) == first
    assert list(chain(*first)) == order(2, 0)
    batches.start = 5
    assert list(batches) == first[5:]
    assert len(batches) == 7


@pytest.mark.parametrize(("length", "batch_size", "processes"), [(5, 1, 2), (5, 2, 2), (9, 2, 3), (4, 1, 2), (1, 1, 3)])
def test_processes_share_out_the_batches_of_one(length, batch_size, processes):
    whole = list(EpochBatches(length, batch_size * processes, seed=1))
    shares = [EpochBatches(length, batch_size, 1, rank, processes) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(whole)}
    rows = [list(share) for share in shares]
    for step, expected in enumerate(whole):
        weights = [share.weight(step) for share in shares]
        assert sum(weights) == pytest.approx(1)
        # What has weight is the batch of one process, in order; the rest only keeps everybody company.
        assert list(chain(*(row[step] for row, weight in zip(rows, weights, strict=True) if weight))) == expected
        assert all(row[step] for row in rows)
        for row, share, weight in zip(rows, shares, weights, strict=True):
            assert weight == pytest.approx(len(share.positions(step)) / len(expected))
            assert not weight or len(row[step]) == len(share.positions(step))


def test_workers_change_nothing(tmp_path):
    cases = find_cases(make_data(tmp_path / "data", tuple("abcde")))
    config = settings(cache_dir=str(tmp_path / "cache"))

    def epochs(workers: int, batch_size: int = 1) -> list[dict]:
        batches_of = EpochBatches(len(cases), batch_size, seed=1)
        loader = DataLoader(
            CaseDataset(cases, config),
            batch_sampler=batches_of,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        batches = []
        for epoch in (1, 2):
            batches_of.epoch = epoch
            batches += list(loader)
        return batches

    first = epochs(2)  # the workers fill the cache
    for other in (epochs(0), epochs(2)):
        assert len(other) == 10
        assert all(same_samples(a, b) for a, b in zip(first, other, strict=True))
    seen = [batch["case"][0] for batch in first]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list("abcde")
    assert seen[:5] != seen[5:]
    assert [case for batch in epochs(0, batch_size=2) for case in batch["case"]] == seen


# ---- Augmentation ----------------------------------------------------------------------------------------------------


class Fixed:
    """In place of a random generator: every draw gives the numbers of `values`, first to last."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low: float, high: float, size: int | None = None):
        """Return the next value."""
        return self.values.pop(0)


def random_batch(samples: int = 3, size: tuple = (12, 10, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels in blobs, and extents in mm."""
    rng = np.random.default_rng(0)
    zoom = (1, size[0] / 3, size[1] / 3, size[2] / 2)
    labels = ndimage.zoom(rng.integers(0, 14, (samples, 3, 3, 2)), zoom, order=0)
    image = torch.from_numpy(rng.random((samples, 1, *size), dtype=np.float32))
    return image, torch.from_numpy(labels.astype(np.uint8)), torch.tensor([[350.0, 250.0, 200.0]] * samples)


def centroid_mm(labels: Tensor, organ: int, spacing_mm: tuple) -> np.ndarray:
    """Return the centroid of an organ in mm from the volume's centre."""
    places = (labels == organ).nonzero().double().mean(dim=0).numpy()
    return (places + 0.5 - np.array(labels.shape) / 2) * spacing_mm


def test_no_strength_is_no_change():
    image, labels, extent_mm = random_batch()
    changed, moved = augment(image, labels, extent_mm, settings(**NO_CHANGE, augment_flip=False), 3, range(3))
    torch.testing.assert_close(changed, image, atol=1e-4, rtol=0)
    assert torch.equal(moved, labels)
    assert (changed.dtype, moved.dtype) == (image.dtype, labels.dtype)


def test_a_change_depends_on_seed_epoch_and_position_alone():
    image, labels, extent_mm = random_batch(4)
    config = settings(augment_flip=True)

    def one_by_one(seed: int, epoch: int, positions: list[int]) -> tuple[Tensor, Tensor]:
        rows = [
            augment(image[i : i + 1], labels[i : i + 1], extent_mm[:1], replace(config, seed=seed), epoch, [position])
            for i, position in enumerate(positions)
        ]
        return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])

    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(0)
    together = augment(image, labels, extent_mm, config, 5, range(8, 12))
    torch.rand(7)
    alone = one_by_one(0, 5, [8, 9, 10, 11])
    torch.testing.assert_close(together[0], alone[0], atol=1e-6, rtol=0)
    assert torch.equal(together[1], alone[1])
    for other in (one_by_one(1, 5, [8, 9, 10, 11]), one_by_one(0, 6, [8, 9, 10, 11]), one_by_one(0, 5, [9, 8, 11, 10])):
        assert all((a - b).abs().max() > 0.05 for a, b in zip(alone[0], other[0], strict=True))
    assert together[0].dtype == torch.float32
    assert together[1].dtype == torch.uint8


def test_a_right_angle_in_mm_by_hand():
    # 80 x 40 x 40 mm on a grid of 40 x 40 x 20: voxels of 2 x 1 x 2 mm. A box of 16 x 32 mm turned by 90 degrees about
    # Z is one of 32 x 16 mm: 16 x 16 voxels. Turned in voxels instead, its 8 x 32 would become 32 x 8.
    labels = torch.zeros(1, 40, 40, 20, dtype=torch.uint8)
    labels[0, 16:24, 4:36, 5:15] = 1
    matrix = draw_affine(
        Fixed(np.array([0, 0, 1]), 0, np.zeros(3)), (80, 40, 40), settings(augment_rotation_degrees=90)
    )
    image, turned = warp((labels == 1).float()[:, None], labels, matrix[None])
    expected = torch.zeros_like(labels)
    expected[0, 12:28, 12:28, 5:15] = 1
    assert torch.equal(turned, expected)
    inside = ndimage.binary_erosion(expected[0].numpy(), iterations=1)
    np.testing.assert_allclose(image[0, 0].numpy()[inside], 1, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotations_shifts_and_scales_in_mm(axis):
    # Two balls 30 mm from the centre along the turned axes; where 20 degrees take them is worked out in mm.
    spacing_mm, size = (2.0, 1.0, 4.0), (60, 130, 30)
    extent_mm = np.multiply(spacing_mm, size)
    mm = np.stack(np.meshgrid(*[(np.arange(n) + 0.5 - n / 2) * s for n, s in zip(size, spacing_mm, strict=True)],
                              indexing="ij"), axis=-1)  # fmt: skip
    first, second = np.eye(3)[(axis + 1) % 3] * 30, np.eye(3)[(axis + 2) % 3] * 30
    labels = torch.zeros(1, *size, dtype=torch.uint8)
    for organ, place in ((1, first), (2, second)):
        labels[0][torch.from_numpy(np.linalg.norm(mm - place, axis=-1) < 12)] = organ
    image = (labels > 0).float()[:, None]

    def changed(angle: float, scale: float, shift: tuple) -> Tensor:
        config = settings(augment_rotation_degrees=20, augment_scale=0.2, augment_shift=0.1)
        draws = Fixed(np.eye(3)[axis] * angle, scale, np.array(shift))
        image_moved, labels_moved = warp(image, labels, draw_affine(draws, extent_mm, config)[None])
        # The two move together: where the image is bright there is an organ.
        assert ((image_moved[0, 0] > 0.5) == (labels_moved[0] > 0)).float().mean() > 0.995
        return labels_moved[0]

    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    turned = changed(1, 0, (0, 0, 0))
    # The new volume looks up its values at places turned by +20 degrees, so that what it shows is turned by -20.
    np.testing.assert_allclose(centroid_mm(turned, 1, spacing_mm), cos * first - sin * second, atol=0.6)
    np.testing.assert_allclose(centroid_mm(turned, 2, spacing_mm), cos * second + sin * first, atol=0.6)
    larger = changed(0, 1, (0, 0, 0))
    np.testing.assert_allclose(centroid_mm(larger, 1, spacing_mm), 1.2 * first, atol=0.6)
    assert (larger == 1).sum() / (labels == 1).sum() == pytest.approx(1.2**3, rel=0.1)
    shifted = changed(0, 0, np.eye(3)[axis])
    np.testing.assert_allclose(centroid_mm(shifted, 1, spacing_mm), first - 0.1 * extent_mm * np.eye(3)[axis], atol=0.6)


def test_strengths_are_the_largest_change():
    config = settings(augment_rotation_degrees=10, augment_scale=0.1, augment_shift=0.05)
    extent_mm = np.array([350.0, 250.0, 200.0])
    angles, scales, shifts = [], [], []
    for seed in range(300):
        matrix = draw_affine(np.random.default_rng(seed), extent_mm, config).double().numpy()
        in_mm = np.diag(extent_mm) @ matrix[:, :3] @ np.diag(1 / extent_mm)
        scale = np.cbrt(np.linalg.det(in_mm))
        np.testing.assert_allclose(in_mm.T @ in_mm, np.eye(3) * scale**2, atol=1e-5)  # right angles, one scale
        angles.append(np.degrees(np.arcsin(in_mm[2, 1] / scale)))
        scales.append(1 / scale)
        shifts.append(matrix[:, 3] / 2)  # of the length, which runs from -1 to 1
    assert 9 < np.max(np.abs(angles)) < 10.5
    assert (np.min(scales), np.max(scales)) == (pytest.approx(0.9, abs=0.01), pytest.approx(1.1, abs=0.01))
    assert 0.048 < np.abs(shifts).max() <= 0.05 + 1e-6


def test_values_stay_from_0_to_1_and_outside_is_0():
    image, labels, extent_mm = random_batch()
    config = settings(
        augment_contrast=0.9, augment_brightness=1, augment_gamma=0.9, augment_noise=1, augment_shift=0.4,
        augment_flip=True,
    )  # fmt: skip
    for epoch in range(8):
        changed, moved = augment(image, labels, extent_mm, config, epoch, range(3))
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert changed.isfinite().all()
        assert set(moved.unique().tolist()) <= set(labels.unique().tolist()) | {0, 2, 7, 8, 13}
    # Moved by half its length, half of the volume is outside: 0 in both.
    half = torch.eye(3, 4)
    half[0, 3] = 1
    ones = torch.ones(1, 1, 8, 8, 8)
    image, moved = warp(ones, ones[:, 0].to(torch.uint8), half[None])
    for volume in (image[0, 0], moved[0]):
        assert (volume[:4] == 1).all()
        assert (volume[4:] == 0).all()


def test_a_flip_mirrors_along_x_and_swaps_right_and_left():
    organs = load_config().organs
    assert mirrored_ids(organs) == [0, 1, 13, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 2]
    assert mirrored_ids(("background", "left lung", "upright part", "upleft part")) == [0, 1, 2, 3]
    labels = torch.zeros(2, 6, 1, 1, dtype=torch.uint8)
    labels[:, :, 0, 0] = torch.tensor([0, 1, 2, 13, 7, 8])
    image = torch.arange(12.0).reshape(2, 1, 6, 1, 1) / 12
    flipped, swapped = flip_left_right(image, labels, [True, False], organs)
    assert swapped[0, :, 0, 0].tolist() == [7, 8, 2, 13, 1, 0]
    assert torch.equal(swapped[1], labels[1])
    assert torch.equal(flipped[0, 0, :, 0, 0], torch.tensor([5.0, 4, 3, 2, 1, 0]) / 12)
    assert torch.equal(flipped[1], image[1])
    assert (flipped.dtype, swapped.dtype) == (image.dtype, labels.dtype)
    again = flip_left_right(flipped, swapped, [True, False], organs)
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], labels)


def test_every_second_case_is_flipped_and_only_when_asked():
    image, labels, extent_mm = random_batch(1)
    for asked, expected in ((True, 100), (False, 0)):
        config = settings(**NO_CHANGE, augment_flip=asked)
        flipped = sum(
            not torch.equal(augment(image, labels, extent_mm, config, 1, [position])[1], labels)
            for position in range(200)
        )
        assert abs(flipped - expected) <= (25 if asked else 0)


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
