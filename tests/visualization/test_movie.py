"""Organ surfaces, their pictures, and the movie, decoded again."""

import signal
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import imageio_ffmpeg
import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from warm import run_script

from core.scans.organ_colours import rgb_of
from core.scans.volumes import load_labels
from visualization import movie
from visualization.meshes import STEP_MM, Mesh, context_meshes, organ_mesh
from visualization.movie import draw_background, draw_frames, draw_mark, main
from visualization.render import Scene, Veil, render, view_at

ROOT = Path(__file__).parents[2]
LABELLED = ROOT / ".." / "shared" / "data" / "labelled"
SIZE = (160, 120)
LIVER, SPLEEN = 1, 3


def ball(shape: tuple[int, int, int], spacing_mm: tuple, centre_mm: tuple, radius_mm: float) -> np.ndarray:
    places = np.stack(np.meshgrid(*[np.arange(n) * mm for n, mm in zip(shape, spacing_mm, strict=True)], indexing="ij"))
    return ((places - np.reshape(centre_mm, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius_mm**2


def is_watertight(mesh: Mesh) -> bool:
    """Return True when each edge belongs to two triangles, which run along it in opposite directions."""
    edges = Counter()
    for a, b, c in mesh.faces.tolist():
        edges.update(((a, b), (b, c), (c, a)))
    return all(count == 1 and edges[end, start] == 1 for (start, end), count in edges.items())


def scene(*balls: tuple[int, tuple[float, float, float], float]) -> Scene:
    """Make balls by organ id, centre and radius in mm, on 2 mm voxels whose first is at 0."""
    labels = np.zeros((60, 60, 60), np.uint8)
    for organ, centre, radius in balls:
        labels[ball(labels.shape, (2, 2, 2), centre, radius)] = organ
    return Scene({organ: organ_mesh(labels, organ, np.diag([2.0, 2, 2, 1])) for organ, _, _ in balls})


@pytest.fixture
def case(tmp_path) -> tuple[Path, Path]:
    """Return a scan and its label map: liver on the patient's right and in front, spleen on the left."""
    labels = np.zeros((40, 30, 20), np.uint8)
    labels[ball(labels.shape, (3, 3, 5), (90, 60, 50), 20)] = LIVER
    labels[ball(labels.shape, (3, 3, 5), (30, 40, 50), 15)] = SPLEEN
    affine = np.array([[3.0, 0, 0, -60], [0, 3, 0, -45], [0, 0, 5, 100], [0, 0, 0, 1]])
    paths = tmp_path / "scan_0000.nii.gz", tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.where(labels > 0, 50, -1000).astype(np.int16), affine), paths[0])
    nib.save(nib.Nifti1Image(labels, affine), paths[1])
    return paths


def decoded(path: Path) -> tuple[dict, list[np.ndarray]]:
    frames = imageio_ffmpeg.read_frames(str(path))
    facts = next(frames)
    width, height = facts["size"]
    return facts, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]


# ---- Meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.8, 0.8, 5), (2, 2, 2), (5, 1, 1)])
def test_a_ball_is_closed_and_has_its_volume_and_place(spacing_mm):
    shape = tuple(int(70 / mm) for mm in spacing_mm)
    mask = ball(shape, spacing_mm, (35, 30, 33), 20).astype(np.uint8)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = 100, -50, 7
    mesh = organ_mesh(mask, 1, affine)
    assert is_watertight(mesh)
    assert mesh.volume_ml == pytest.approx(mask.sum() * np.prod(spacing_mm) / 1000, rel=0.03)
    np.testing.assert_allclose(mesh.vertices.mean(axis=0), [135, -20, 40], atol=0.7)
    radii = np.linalg.norm(mesh.vertices - [135, -20, 40], axis=1)
    assert np.percentile(np.abs(radii - 20), 95) < max(spacing_mm) / 2 + 0.5


@pytest.mark.parametrize("cut", [(slice(0, 1),) * 3, (slice(0, 12), slice(3, 5), slice(2, 3)), (slice(0, 12),) * 3])
def test_small_thin_and_cut_off_organs_are_closed_too(cut):
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[cut] = 4
    mesh = organ_mesh(labels, 4, np.diag([1.5, 1.5, 3, 1]))
    assert is_watertight(mesh)
    assert mesh.volume_ml == pytest.approx((labels > 0).sum() * 6.75 / 1000, rel=0.05)


def test_mirrored_and_turned_axes_give_outward_faces_in_the_right_place():
    labels = ball((30, 30, 30), (2, 2, 2), (20, 30, 40), 12).astype(np.uint8)
    angle = np.radians(25)
    turned = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag([-2.0, 2, 2])
    mesh = organ_mesh(labels, 1, affine)
    assert mesh.volume_ml == pytest.approx(labels.sum() * 8 / 1000, rel=0.03)  # below 0 if inside out
    np.testing.assert_allclose(mesh.vertices.mean(axis=0), turned @ [-20, 30, 40], atol=0.5)


def test_what_lies_where_is_kept_when_axes_are_mirrored():
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[4:20, 10:14, 10:14] = labels[4:8, 10:26, 10:14] = 1  # an L
    for mirror in (1, -1):
        mesh = organ_mesh(labels, 1, np.diag([2.0 * mirror, 2, 2, 1]))
        x, y = mirror * mesh.vertices[:, 0], mesh.vertices[:, 1]
        assert y[x > 20].max() < 29  # the foot of the L: voxels 10 to 13
        assert y[x < 14].max() == pytest.approx(51, abs=2)


def test_no_organ_and_specks_have_no_mesh():
    assert organ_mesh(np.zeros((4, 4, 4), np.uint8), 1, np.eye(4)) is None
    specks = (np.random.default_rng(0).random((40, 36, 30)) < 0.002).astype(np.uint8)
    assert organ_mesh(specks, 1, np.eye(4), (1.5, 3.0)) is None  # the viewer's steps


@pytest.mark.parametrize("steps", [STEP_MM, (1.5, 3.0)])
@pytest.mark.parametrize("spacing_mm", [(0.5, 0.5, 1), (0.7, 0.7, 5), (0.8, 0.8, 3)])
def test_an_organ_of_few_voxels_does_not_fill_the_movie(spacing_mm, steps):
    # Smoothing closes such surfaces up; scaled to their voxels' volume, they were tens of metres long, or of NaN.
    labels = np.zeros((12, 12, 8), np.uint8)
    labels[6:8, 6, 3] = 1
    labels[2:5, 2:5, 2:5] = 2
    for organ in (1, 2):
        mesh = organ_mesh(labels, organ, np.diag([*spacing_mm, 1.0]), steps)
        assert mesh is None or np.ptp(mesh.vertices, axis=0).max() < 40
    assert mesh.volume_ml == pytest.approx(27 * np.prod(spacing_mm) / 1000, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not LABELLED.is_dir(), reason="the real labelled scans are not at hand")
def test_real_organs_are_closed_and_within_five_per_cent_of_their_voxels():
    labels, geometry = load_labels(LABELLED / "labels" / "ts_example.nii.gz", 14)
    found = np.flatnonzero(np.bincount(labels.ravel(), minlength=14)[1:]) + 1
    assert len(found) >= 10
    for organ in found:
        mesh = organ_mesh(labels, organ, geometry.ras_affine)
        assert is_watertight(mesh), organ
        assert mesh.volume_ml == pytest.approx((labels == organ).sum() * geometry.voxel_ml, rel=0.05), organ


# ---- Pictures: which organ is seen where -----------------------------------------------------------------------------


def test_the_patients_right_is_at_the_pictures_left_and_the_head_at_the_top():
    frame = render(scene((LIVER, (90, 60, 30), 15), (SPLEEN, (30, 60, 90), 15)), view_at(0), SIZE)
    liver_rows, liver_columns = np.nonzero(frame.organ == LIVER)
    spleen_rows, spleen_columns = np.nonzero(frame.organ == SPLEEN)
    assert liver_columns.max() < spleen_columns.min()
    assert spleen_rows.max() < liver_rows.min()
    back = render(scene((LIVER, (90, 60, 30), 15), (SPLEEN, (30, 60, 90), 15)), view_at(180), SIZE)
    assert np.nonzero(back.organ == LIVER)[1].min() > np.nonzero(back.organ == SPLEEN)[1].max()


def test_a_ball_is_as_large_as_its_mm():
    frame = render(scene((LIVER, (60, 60, 60), 30)), view_at(40), SIZE, mm_a_pixel=1.0)
    rows, columns = np.nonzero(frame.organ)
    assert np.ptp(rows) + 1 == pytest.approx(60, abs=2)
    assert np.ptp(columns) + 1 == pytest.approx(60, abs=2)
    assert frame.depth_mm[60, 80] == pytest.approx(frame.depth_mm[np.isfinite(frame.depth_mm)].min(), abs=0.3)


@pytest.mark.parametrize(("degrees", "seen", "hidden"), [(0, SPLEEN, LIVER), (180, LIVER, SPLEEN)])
def test_the_near_organ_hides_the_far_one(degrees, seen, hidden):
    both = scene((LIVER, (60, 20, 60), 12), (SPLEEN, (60, 100, 60), 15 if degrees == 0 else 12))
    middle = render(both, view_at(degrees), SIZE).organ[SIZE[1] // 2, SIZE[0] // 2]
    assert middle == seen != hidden
    assert set(np.unique(render(both, view_at(90), SIZE).organ)) == {0, LIVER, SPLEEN}


def test_leaving_an_organ_out_changes_its_pixels_only():
    near, far = (LIVER, (90, 70, 60), 14), (SPLEEN, (30, 60, 60), 20)
    both, alone = scene(near, far), scene(far)
    alone.centre, alone.half_mm = both.centre, both.half_mm
    with_it, without = (render(one, view_at(0), SIZE, 1.0) for one in (both, alone))
    np.testing.assert_array_equal(without.organ == SPLEEN, with_it.organ == SPLEEN)
    assert not (without.organ == LIVER).any()
    assert (with_it.organ == LIVER).sum() == pytest.approx(np.pi * 14**2, rel=0.05)


def test_pixels_have_their_organs_hue():
    frame = render(scene((6, (60, 60, 60), 20)), view_at(0), SIZE)
    red, green, blue = frame.colour[frame.organ == 6].mean(axis=0)
    assert blue > 1.8 * max(red, green)  # inferior vena cava
    assert np.ptp(frame.colour[0].astype(int), axis=1).max() == 0  # the backdrop is gray


# ---- The command -----------------------------------------------------------------------------------------------------


def test_a_movie_is_decoded_as_it_should_be(case, tmp_path):
    flags = ["--output", str(tmp_path / "o.mp4"), "--frames", "12", "--size", "480", "270"]
    done = run_script("-m", "visualization.movie", *case, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    facts, frames = decoded(tmp_path / "o.mp4")
    assert (facts["codec"], facts["size"], facts["fps"]) == ("h264", (480, 270), 24.0)
    assert facts["pix_fmt"].startswith("yuv420p")
    assert len(frames) == 12
    scenes = [frame[:, :350].astype(int) for frame in frames]
    steps = [np.abs(a - b).mean() for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True)]
    assert min(steps) > 0.5  # it turns in every frame, and from the last to the first as much as elsewhere
    assert steps[-1] < 1.5 * max(steps[:-1])
    half = scenes[0].shape[1] // 2
    redness = [scenes[i][..., 0] - scenes[i][..., 2] > 60 for i in (0, 6)]  # the liver's brown
    assert redness[0][:, :half].sum() > 10 * redness[0][:, half:].sum()
    assert redness[1][:, half:].sum() > 10 * redness[1][:, :half].sum()


def test_a_flipped_affine_flips_the_picture(case, tmp_path):
    flipped = []
    for path in case:
        image = nib.load(path)
        flip = np.diag([-1.0, 1, 1, 1])
        flipped.append(tmp_path / f"flipped_{path.name}")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), flip @ image.affine), flipped[-1])
    sides = []
    for paths in (case, flipped):
        labels, geometry = load_labels(paths[1], 14)
        one = Scene({organ: organ_mesh(labels, organ, geometry.ras_affine) for organ in (LIVER, SPLEEN)})
        organ = render(one, view_at(0), SIZE).organ
        sides.append(np.nonzero(organ == LIVER)[1].mean() < np.nonzero(organ == SPLEEN)[1].mean())
    assert sides == [True, False]


def test_a_gif_beside_the_truth(case, tmp_path):
    output = tmp_path / "new" / "o.gif"
    flags = ["--reference", str(case[1]), "--frames", "3", "--size", "320", "180", "--organs", "liver"]
    assert main([*map(str, case), "--output", str(output), *flags]) == 0
    with Image.open(output) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (320, 180), 0)
        picture = np.asarray(gif.convert("RGB"))[40:150].astype(int)
    brown = picture[..., 0] - picture[..., 2] > 60
    panel = int(320 * 0.73) // 2
    assert brown[:, :panel].sum() > 100
    assert brown[:, panel : 2 * panel].sum() == pytest.approx(brown[:, :panel].sum(), rel=0.1)


def test_edges_are_soft():
    one = scene((LIVER, (60, 60, 60), 30))
    frame = render(one, view_at(0), SIZE, 1.0)
    outside = (frame.organ == 0) & (np.hypot(*(np.indices(SIZE[::-1]) - np.reshape([59.5, 79.5], (2, 1, 1)))) < 31)
    brightest = frame.colour[..., 0][outside]
    assert (brightest > 60).any()  # half covered by the ball
    assert brightest.max() < np.median(frame.colour[..., 0][frame.organ == LIVER])


@pytest.mark.parametrize(
    ("degrees", "left", "right"), [(0, "R", "L"), (90, "A", "P"), (180, "L", "R"), (270, "P", "A")]
)
def test_the_mark_tells_the_sides(degrees, left, right):
    class Recorder:
        def __init__(self):
            self.places = {}

        def line(self, *_: object) -> None:
            pass

        def text(self, place: tuple, letter: str, *_: object) -> None:
            self.places[letter] = place

    recorder = Recorder()
    draw_mark(recorder, view_at(degrees), 720)
    assert set(recorder.places) == {left, right, "S", "I"}
    assert recorder.places[left][0] < recorder.places[right][0]
    assert recorder.places["S"][1] < recorder.places["I"][1]


def test_the_legend_has_the_volumes_of_the_organs_that_are_there(case, tmp_path, monkeypatch):
    listed = []

    def listing(size: tuple[int, int], title: str, rows: list) -> Image.Image:
        listed.append((title, rows))
        return draw_background(size, title, rows)

    monkeypatch.setattr(movie, "draw_background", listing)
    flags = ["--reference", str(case[1]), "--frames", "1", "--size", "320", "180"]
    assert main([*map(str, case), "--output", str(tmp_path / "o.gif"), *flags]) == 0
    labels = np.asarray(nib.load(case[1]).dataobj)
    ml = [(labels == organ).sum() * 3 * 3 * 5 / 1000 for organ in (LIVER, SPLEEN)]
    ((title, rows),) = listed
    assert title == "scan"
    assert [row[:2] for row in rows] == [(LIVER, "liver"), (SPLEEN, "spleen")]
    np.testing.assert_allclose([row[2] for row in rows], [[ml[0]] * 2, [ml[1]] * 2], rtol=1e-5)


def written(rows: list, monkeypatch) -> list[tuple[str, tuple]]:
    """Return the texts of a legend with their boxes in pixels."""
    texts, write = [], ImageDraw.ImageDraw.text

    def writing(self, place, text, fill, font, anchor) -> None:
        texts.append((text, self.textbbox(place, text, font, anchor)))
        write(self, place, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", writing)
    draw_background((1280, 720), "case_" * 10 + "7", rows)
    return texts


def test_the_legend_of_forty_organs_with_long_names_stays_in_the_picture_and_apart(monkeypatch):
    rows = [(organ, f"{'vein_' * organ}left", [1234.0, 1234.0]) for organ in range(1, 41)]
    texts = written(rows, monkeypatch)
    assert len(texts) == 2 + 2 * len(rows)
    assert texts[0][0].endswith("_7")
    assert all(name.endswith("left") for name, _ in texts if name.startswith("vein"))
    for (_, (x0, y0, x1, y1)), (_, other) in combinations(texts, 2):
        assert 0 < x0 < x1 < 1280
        assert 0 < y0 < y1 < 720
        assert x1 <= other[0] or other[2] <= x0 or y1 <= other[1] or other[3] <= y0


def test_a_gif_keeps_the_colours_of_small_organs(tmp_path):
    picture = draw_background((640, 360), "case", [(organ, "organ", [1.0]) for organ in range(1, 14)])
    shades = np.broadcast_to(np.linspace(0, 255, 300, dtype=np.uint8)[:, None], (300, 140))
    for channel in range(3):  # what organs' surfaces show, from dark to bright
        bands = [Image.fromarray(shades * (band == channel)) for band in range(3)]
        picture.paste(Image.merge("RGB", bands), (150 * channel, 0))
    movie.write_movie(tmp_path / "o.gif", iter([np.asarray(picture)] * 2), picture.size)
    legend = np.asarray(picture).astype(int)[:, 460:]
    with Image.open(tmp_path / "o.gif") as gif:
        off = np.abs(np.asarray(gif.convert("RGB"))[:, 460:] - legend).max(axis=2)
    marks = [(legend == rgb_of(organ)).all(axis=2) for organ in range(1, 14)]
    assert all(mark.any() for mark in marks)
    assert max(off[mark].max() for mark in marks) < 16


def test_a_movie_is_written_to_a_relative_path_with_a_colon(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, case), "--frames", "1", "--size", "320", "180", "--output", "scan:1 #%d/o.mp4"]) == 0
    assert len(decoded(tmp_path / "scan:1 #%d" / "o.mp4")[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_movie_that_does_not_fit_on_the_disk_leaves_the_old_one(case, tmp_path, suffix):
    resource = pytest.importorskip("resource")

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails then, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    output = tmp_path / f"o.{suffix}"
    output.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-m", "visualization.movie", *map(str, case), "--frames", "4", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert str(output) in done.stderr
    assert done.stderr.count("\n") == 1
    assert output.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {output.name, *(path.name for path in case)}


def test_a_movie_that_lacks_frames_is_not_kept(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(movie.imageio_ffmpeg, "count_frames_and_secs", lambda path: (2, 0.1))
    with pytest.raises(SystemExit) as end:
        main([*map(str, case), "--frames", "3", "--size", "320", "180", "--output", str(tmp_path / "o.mp4")])
    assert end.value.code == 1
    assert f"{tmp_path / 'o.mp4'}: ffmpeg could not write it whole" in capsys.readouterr().err
    assert not (tmp_path / "o.mp4").exists()


def test_prediction_and_truth_stand_at_the_same_place():
    whole, half = scene((LIVER, (60, 60, 60), 30)), scene((LIVER, (60, 60, 80), 10))
    background = draw_background((400, 200), "case", [(LIVER, "liver", [1.0, 2.0])])
    picture = next(draw_frames({"prediction": half, "truth": whole}, background, 1)).astype(int)
    brown = picture[..., 0] - picture[..., 2] > 60
    tops = [np.flatnonzero(panel.any(axis=1))[0] for panel in (brown[:, :146], brown[:, 146:292])]
    assert tops[0] == pytest.approx(tops[1], abs=2)  # both reach up to 90 mm


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--output", "o.avi"], 2, "must end with one of .mp4, .gif"),
        (["--output", "o.mp4", "--frames", "0"], 2, "--frames: got 0, expected 1 or more"),
        (["--output", "o.mp4", "--size", "101", "100"], 2, "--size: got 101 100, expected two even numbers"),
        (
            ["--output", "o.mp4", "--organs", "heart"],
            2,
            "--organs: got 'heart' (did you mean 'aorta'?), expected",
        ),
        (["--output", "o.mp4", "--organs", "aorta"], 1, "has none of the organs to show"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(case, tmp_path, monkeypatch, capsys, flags, code, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*map(str, case), *flags])
    assert end.value.code == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / flags[1]).exists()


def test_a_label_map_of_another_grid_is_refused(case, tmp_path, capsys):
    image = nib.load(case[1])
    moved = image.affine.copy()
    moved[2, 3] += 12
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), case[1])
    with pytest.raises(SystemExit) as end:
        main([*map(str, case), "--output", str(tmp_path / "o.mp4")])
    assert end.value.code == 1
    assert "expected the same voxels" in capsys.readouterr().err


# ---- Skin and bones around the organs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient() -> tuple[np.ndarray, np.ndarray]:
    """Return HU and ids, 64 x 56 x 40 voxels of 3 mm: a cylinder with lung, bone, a bright organ; and a table."""
    x, y, _ = np.mgrid[:64, :56, :40]
    voxels = np.full((64, 56, 40), -1000.0, np.float32)
    voxels[((x - 32) / 24) ** 2 + ((y - 30) / 18) ** 2 <= 1] = 40
    voxels[20:28, 28:36, 5:35] = -800  # lung
    voxels[30:36, 16:22] = 600  # spine
    voxels[4:60, 4:6] = 300  # table
    voxels[38:48, 26:36, 10:30] = 350
    labels = np.zeros(voxels.shape, np.uint8)
    labels[38:48, 26:36, 10:30] = 2
    return voxels, labels


def test_skin_and_bones_are_what_they_are(patient):
    bones, skin = context_meshes(*patient, np.diag([3.0, 3, 3, 1]))
    x, y, _ = np.mgrid[:64, :56, :40]
    body_ml = np.count_nonzero(((x - 32) / 24) ** 2 + ((y - 30) / 18) ** 2 <= 1) * 0.027
    assert skin.volume_ml == pytest.approx(body_ml, rel=0.05)  # with the lung, without the table
    assert skin.vertices[:, 1].min() > 3 * 10
    assert bones.volume_ml == pytest.approx(6 * 6 * 40 * 0.027, rel=0.1)  # without the organ and the table
    assert bones.vertices[:, 0].max() < 3 * 37
    assert bones.vertices[:, 1].min() > 3 * 14


def test_thick_slices_keep_their_ends(patient):
    voxels, labels = (volume[:, :, ::4] for volume in patient)
    _, skin = context_meshes(voxels, labels, np.diag([3.0, 3, 12, 1]))
    assert skin.vertices[:, 2].min() == pytest.approx(-6, abs=4)
    assert skin.vertices[:, 2].max() == pytest.approx(9 * 12 + 6, abs=4)


def test_air_has_neither_skin_nor_bones():
    air = np.full((16, 16, 16), -1000.0, np.float32)
    assert context_meshes(air, np.zeros(air.shape, np.uint8), np.eye(4)) == (None, None)


def test_a_veil_lies_over_what_is_behind_it_alone(patient):
    voxels, labels = patient
    affine = np.diag([3.0, 3, 3, 1])
    scene = Scene({2: organ_mesh(labels, 2, affine)})
    _, skin = context_meshes(voxels, labels, affine)
    veil, view, size = Veil(Scene({1: skin}), 0.1, 0.8), view_at(0), (260, 160)
    veil.scene.centre_on(scene.centre)
    plain = render(scene, view, size, 1.0)
    veiled = render(scene, view, size, 1.0, [veil])
    assert np.array_equal(plain.organ, veiled.organ)
    assert np.array_equal(plain.depth_mm, veiled.depth_mm)
    change = np.abs(veiled.colour.astype(int) - plain.colour).sum(axis=2)
    assert (change[plain.organ == 2] > 0).mean() > 0.9  # the skin is in front of the organ
    # Edge on it is brighter than in the middle of the body, where it faces the camera and no organ is.
    row = veiled.colour[80].astype(int).sum(axis=1)
    body = np.flatnonzero(change[80])
    middle = body[len(body) // 2]
    assert not plain.organ[80, middle]
    assert row[body[-5] : body[-1]].max() > 1.5 * row[middle]
    # What is behind the organ from the front is over it from the back.
    behind = Veil(Scene({1: organ_mesh(np.roll(labels, (0, -14, 0), axis=(0, 1, 2)), 2, affine)}), 0.5, 0.5)
    front, back = (render(scene, view_at(angle), size, 1.0, [behind]) for angle in (0, 180))
    assert np.array_equal(front.colour[80, 130], render(scene, view_at(0), size, 1.0).colour[80, 130])
    assert not np.array_equal(back.colour[80, 130], render(scene, view_at(180), size, 1.0).colour[80, 130])


def test_the_command_shows_the_context(patient, tmp_path):
    voxels, labels = patient
    affine = np.diag([3.0, 3, 3, 1])
    for name, volume in (("scan", voxels.astype(np.int16)), ("labels", labels)):
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{name}.nii.gz")
    frames = {}
    for flags in ([], ["--context"]):
        path = tmp_path / f"movie{len(flags)}.mp4"
        paths = [str(tmp_path / "scan.nii.gz"), str(tmp_path / "labels.nii.gz"), "--output", str(path)]
        assert movie.main([*paths, "--frames", "2", "--size", "320", "180", *flags]) == 0
        frames[len(flags)] = decoded(path)[1][0].astype(int)
    gray = [np.count_nonzero((np.ptp(f, axis=2) < 12) & (f.mean(axis=2) > 60)) for f in (frames[0], frames[1])]
    assert gray[1] > gray[0] + 200
