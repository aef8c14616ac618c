"""Checks of data/make_phantom.py on the files that its command writes."""

import json
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from warm import run_script

ROOT = Path(__file__).resolve().parents[2]
CASES, HELD_OUT = 12, 3
SHAPE = (112, 96, 64)
GRID = (64, 64, 48)

# In adults, mL; the aorta and the vena cava as far as an abdominal scan shows them.
ADULT_ML = {
    1: (900, 2200),
    2: (90, 270),
    3: (80, 450),
    4: (40, 150),
    5: (25, 150),
    6: (20, 150),
    7: (2, 12),
    8: (2, 12),
    9: (10, 80),
    10: (8, 50),
    11: (100, 800),
    12: (30, 160),
    13: (90, 270),
}
LIVER, RIGHT_KIDNEY, SPLEEN, PANCREAS, AORTA, VENA_CAVA, RIGHT_ADRENAL, LEFT_ADRENAL = range(1, 9)
GALLBLADDER, ESOPHAGUS, STOMACH, DUODENUM, LEFT_KIDNEY = range(9, 14)


def run(*arguments: object) -> subprocess.CompletedProcess:
    """Run the real command."""
    return run_script("-m", "data.make_phantom", *arguments)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the phantoms that most tests look at."""
    folder = tmp_path_factory.mktemp("phantom")
    result = run(folder, "--cases", CASES, "--shape", *SHAPE)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pairs(data_dir: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Return the scans and label maps as they are stored."""
    images, labels = (sorted((data_dir / folder).iterdir()) for folder in ("images", "labels"))
    return [(nib.load(image), nib.load(label)) for image, label in zip(images, labels, strict=True)]


@pytest.fixture(scope="module")
def arrays(pairs: list) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return HU and labels, both (X, Y, Z) in RAS+ order."""
    return [tuple(np.asarray(nib.as_closest_canonical(image).dataobj) for image in pair) for pair in pairs]


def to_grid(labels: np.ndarray) -> np.ndarray:
    """Return the label map resized to GRID by the nearest voxel, over its whole volume."""
    nearest = [((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(GRID, labels.shape, strict=True)]
    return labels[np.ix_(*nearest)]


def world_centre(label_image: nib.Nifti1Image, organ: int) -> np.ndarray:
    """Return an organ's centre in world mm, from the stored voxels and the stored affine."""
    voxel = np.argwhere(np.asarray(label_image.dataobj) == organ).mean(axis=0)
    return nib.affines.apply_affine(label_image.affine, voxel)


def test_layout_is_flare22s(data_dir: Path, pairs: list) -> None:
    names = {f"images/phantom_{n:04d}_0000.nii.gz" for n in range(1, CASES + 1)}
    names |= {f"labels/phantom_{n:04d}.nii.gz" for n in range(1, CASES + 1)} | {"phantom.json"}
    assert set(files_in(data_dir)) == names
    for image, labels in pairs:
        assert image.get_data_dtype() == np.int16
        assert labels.get_data_dtype() == np.uint8
        assert image.shape == labels.shape
        assert sorted(image.shape) == sorted(SHAPE)
        assert np.unique(np.asarray(labels.dataobj)).tolist() == list(range(14))


def test_geometry_is_stored_twice_and_alike(pairs: list) -> None:
    for image in (image for pair in pairs for image in pair):
        assert image.header["qform_code"] > 0
        assert image.header["sform_code"] > 0
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
    for image, labels in pairs:
        np.testing.assert_array_equal(image.affine, labels.affine)


def test_storage_differs_from_case_to_case(pairs: list) -> None:
    orders = ["".join(nib.aff2axcodes(image.affine)) for image, _ in pairs]
    assert len(set(orders)) >= 4
    assert max(set(orders), key=orders.count) == "LPS"
    spacings_mm = {tuple(np.round(image.header.get_zooms(), 3)) for image, _ in pairs}
    assert len(spacings_mm) == CASES
    assert all(max(spacing) / min(spacing) > 1.05 for spacing in spacings_mm)
    oblique = [np.abs(nib.affines.obliquity(image.affine)).max() > 1e-3 for image, _ in pairs]
    assert 0 < sum(oblique) < CASES


def test_organs_lie_where_they_lie_in_a_patient(pairs: list) -> None:
    """World x grows to the patient's right, y to the front, z to the head, whatever the storage order."""
    further_right = [
        (LIVER, SPLEEN),
        (LIVER, STOMACH),
        (RIGHT_KIDNEY, LEFT_KIDNEY),
        (RIGHT_ADRENAL, LEFT_ADRENAL),
        (VENA_CAVA, AORTA),
        (GALLBLADDER, PANCREAS),
        (DUODENUM, STOMACH),
    ]
    further_front = [(GALLBLADDER, RIGHT_KIDNEY), (STOMACH, SPLEEN), (PANCREAS, LEFT_KIDNEY), (LIVER, RIGHT_ADRENAL)]
    further_up = [(ESOPHAGUS, DUODENUM), (LIVER, DUODENUM), (SPLEEN, LEFT_KIDNEY), (RIGHT_ADRENAL, RIGHT_KIDNEY)]
    for number, (_, labels) in enumerate(pairs, start=1):
        centres = {organ: world_centre(labels, organ) for organ in ADULT_ML}
        for axis, order in enumerate((further_right, further_front, further_up)):
            for more, less in order:
                assert centres[more][axis] > centres[less][axis], (number, axis, more, less)


def test_volumes_are_adult_and_organs_connected(pairs: list) -> None:
    for number, (_, image) in enumerate(pairs, start=1):
        labels = np.asarray(image.dataobj)
        voxel_ml = np.prod(image.header.get_zooms()) / 1000
        for organ, (low, high) in ADULT_ML.items():
            assert low <= (labels == organ).sum() * voxel_ml <= high, (number, organ)
            assert ndimage.label(labels == organ)[1] == 1, (number, organ)


def test_hu_are_those_of_ct(arrays: list) -> None:
    for hu, labels in arrays:
        medians = {organ: np.median(hu[labels == organ]) for organ in ADULT_ML}
        assert -15 < medians[GALLBLADDER] < 40
        assert all(50 < medians[organ] < 220 for organ in (LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, PANCREAS, AORTA))
        assert medians[AORTA] > medians[LIVER]
        # Air around the patient, and fat, bowel, muscle and bone inside, so that background is no single value.
        outside = hu[labels == 0]
        assert 0.15 < (outside < -900).mean() < 0.7
        assert all(
            ((outside > low) & (outside < high)).mean() > 0.01 for low, high in ((-130, -70), (20, 90), (150, 600))
        )


def test_small_organs_survive_on_the_networks_grid(arrays: list) -> None:
    counts = np.array([np.bincount(to_grid(labels).ravel(), minlength=14) for _, labels in arrays])
    assert counts.min() > 0
    assert counts.mean(axis=0)[[RIGHT_ADRENAL, LEFT_ADRENAL]].min() >= 20


def test_hu_alone_do_not_give_the_organs_away(arrays: list) -> None:
    """Not even the best set of 5-HU bins for each organ, chosen on the held-out cases themselves, scores 0.3."""
    counts = np.zeros((14, 1000))
    for hu, labels in arrays[-HELD_OUT:]:
        bins = (hu.astype(int) + 1024) // 5
        np.add.at(counts, (labels, bins), 1)
    dice = []
    for organ in ADULT_ML:
        likeliest_first = np.argsort(-counts[organ] / np.maximum(counts.sum(axis=0), 1))
        hits = counts[organ][likeliest_first].cumsum()
        chosen = counts.sum(axis=0)[likeliest_first].cumsum()
        dice.append((2 * hits / (chosen + counts[organ].sum())).max())
    assert np.mean(dice) < 0.25


def test_position_alone_does_not_give_the_organs_away(arrays: list) -> None:
    """The majority vote of the training label maps scores below 0.5; yet above 0.15, or nothing could be learnt."""
    grids = [to_grid(labels) for _, labels in arrays]
    votes = np.stack([np.sum([grid == organ for grid in grids[:-HELD_OUT]], axis=0) for organ in range(14)])
    vote = votes.argmax(axis=0)
    dice = [
        2 * ((vote == organ) & (grid == organ)).sum() / ((vote == organ).sum() + (grid == organ).sum())
        for grid in grids[-HELD_OUT:]
        for organ in ADULT_ML
    ]
    assert 0.15 < np.mean(dice) < 0.5


def test_same_command_gives_the_same_bytes(data_dir: Path, tmp_path: Path) -> None:
    """Also when fewer cases are asked for; another seed gives other ones."""
    assert run(tmp_path / "fewer", "--cases", 2, "--shape", *SHAPE).returncode == 0
    many, fewer = files_in(data_dir), files_in(tmp_path / "fewer")
    del fewer["phantom.json"]
    assert len(fewer) == 4
    assert all(content == many[name] for name, content in fewer.items())
    assert run(tmp_path / "other", "--cases", 2, "--shape", *SHAPE, "--seed", 1).returncode == 0
    other = files_in(tmp_path / "other")
    assert all(content != other[name] for name, content in fewer.items())


def test_same_data_set_is_reused_and_a_broken_one_completed(tmp_path: Path) -> None:
    command = (tmp_path, "--cases", 2, "--shape", 32, 32, 24)
    first = run(*command)
    assert first.returncode == 0
    assert "written" in first.stdout
    before = files_in(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run(*command)
    assert again.returncode == 0
    assert "reused" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    # As a run leaves it that was ended while it wrote the second case's image.
    image = tmp_path / "images" / "phantom_0002_0000.nii.gz"
    image.rename(image.with_name(f".123.{image.name}"))
    record = json.loads((tmp_path / "phantom.json").read_text())
    (tmp_path / "phantom.json").write_text(json.dumps(record | {"finished": False}))
    completed = run(*command)
    assert completed.returncode == 0
    assert "written" in completed.stdout
    assert files_in(tmp_path) == before


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Check for exit code 2 and one sentence that names what was wrong."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr.splitlines()[-1] for word in words), result.stderr


@pytest.mark.parametrize("name", ["notes.txt", "images/FLARE22_Tr_0001_0000.nii.gz", "labels/FLARE22_Tr_0001.nii.gz"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"precious")
    assert_refused(run(tmp_path, "--cases", 1, "--shape", 16, 16, 16), name)
    assert files_in(tmp_path) == {name: b"precious"}


def test_phantoms_of_other_settings_are_refused(tmp_path: Path) -> None:
    assert run(tmp_path, "--cases", 1, "--shape", 16, 16, 16).returncode == 0
    before = files_in(tmp_path)
    assert_refused(run(tmp_path, "--cases", 1, "--shape", 16, 16, 16, "--seed", 1), "'seed': 0", "'seed': 1")
    assert_refused(run(tmp_path / "phantom.json", "--cases", 1), "is a file")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--cases", "0"), "--cases"),
        (("--cases", "10000"), "--cases"),
        (("--shape", "64", "15", "64"), "--shape"),
        (("--shape", "64", "64", "513"), "--shape"),
        (("--shape", "512", "512", "512"), "--shape"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, flags: tuple[str, ...], word: str) -> None:
    assert_refused(run(tmp_path / "new", *flags), word)
    assert not (tmp_path / "new").exists()
