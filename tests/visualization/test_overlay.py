"""The organs' colours, the slices picture and the training curves."""

import csv
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from warm import run_script

from core.config import load_organs
from core.scans.geometry import Geometry
from core.scans.organ_colours import ORGAN_COLOURS, colour_of
from visualization import curves, overlay
from visualization.comparison import draw_comparison, errors_of
from visualization.curves import draw_curves
from visualization.overlay import draw_contact_sheet, draw_overlay
from visualization.shown import Shown
from visualization.slices import choose_slices, count_by_slice
from visualization.style import EXTRA, MISSED, MIXED_UP, colour_table, save_figure

ROOT = Path(__file__).parents[2]
ORGANS = load_organs()

# What reaches an eye without one kind of cones, on linear RGB: Machado, Oliveira and Fernandes,
# "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.0.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Smallest CIEDE2000 between two organs, and between an organ and a gray, as the docstring of style.py states them.
SMALLEST = {
    "normal": (20.8, 20.7),
    "protanopia": (11.0, 8.8),
    "deuteranopia": (11.3, 6.0),
    "tritanopia": (11.1, 8.7),
}

# A scan without any symmetry: 24 x 20 x 12 voxels of 4 x 5 x 8 mm. The boxes are in RAS+ order, x from the patient's
# left to the right; liver right, front, top; spleen left, back, bottom.
SHAPE, SPACING_MM = (24, 20, 12), (4.0, 5.0, 8.0)
LIVER, SPLEEN = 1, 3
BOXES = {
    LIVER: (slice(15, 22), slice(11, 17), slice(6, 10)),
    SPLEEN: (slice(3, 7), slice(4, 8), slice(2, 7)),
}


# ---- Colours ---------------------------------------------------------------------------------------------------------


def seen_as_lab(rgb: np.ndarray, vision: str) -> np.ndarray:
    """Return CIELAB (D65), (N, 3), of sRGB colours, (N, 3) from 0 to 1, as an eye with that vision has them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ VISIONS[vision].T, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    relative = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def ciede2000(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the difference of two CIELAB colours.

    Sharma, Wu and Dalal, "The CIEDE2000 Color-Difference Formula" (2005).
    """
    (l1, a1, b1), (l2, a2, b2) = first, second
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    delta_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    cosines = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    t = 1 + sum(weight * np.cos(np.radians(times * hue + shift)) for weight, times, shift in cosines)
    s_l = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    rotation *= np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    dl, dc, dh = (l2 - l1) / s_l, (c2 - c1) / s_c, delta_h / s_h
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


def test_ciede2000_gives_the_published_differences():
    # Pairs 1, 7, 9, 17 and 25 of the paper's table 1.
    for first, second, expected in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ):
        assert ciede2000(np.array(first, float), np.array(second, float)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISIONS)
def test_organs_can_be_told_apart(vision):
    lab = seen_as_lab(np.array([colour_of(organ) for organ in range(1, len(ORGAN_COLOURS) + 1)]), vision)
    distances = {(i + 1, j + 1): ciede2000(lab[i], lab[j]) for i, j in combinations(range(len(lab)), 2)}
    pair = min(distances, key=distances.get)
    assert distances[pair] >= SMALLEST[vision][0], f"{ORGANS[pair[0]]} and {ORGANS[pair[1]]} look alike"
    assert distances[1, 2] > 30, "liver and right kidney touch, and must differ at a glance"


@pytest.mark.parametrize("vision", VISIONS)
def test_no_organ_is_gray(vision):
    lab = seen_as_lab(np.array([colour_of(organ) for organ in range(1, len(ORGAN_COLOURS) + 1)]), vision)
    grays = seen_as_lab(np.linspace(0.1, 0.9, 17)[:, None].repeat(3, axis=1), vision)
    nearest = [min(ciede2000(colour, gray) for gray in grays) for colour in lab]
    assert min(nearest) >= SMALLEST[vision][1], f"{ORGANS[int(np.argmin(nearest)) + 1]} looks gray"


def test_every_organ_of_the_settings_has_its_own_colour():
    assert len(ORGAN_COLOURS) == len(ORGANS) - 1
    assert ORGANS[1:4] == ("liver", "right kidney", "spleen"), "the colours belong to these ids"


def test_a_longer_organ_list_goes_on_with_other_colours():
    table = colour_table(120)
    assert table.shape == (120, 4)
    assert table[0].tolist() == [0, 0, 0, 0]
    assert (table[1:, 3] == 1).all()
    assert table.min() >= 0
    assert table.max() <= 1
    assert len(np.unique(table.round(3), axis=0)) == 120
    assert np.array_equal(table, colour_table(120))
    with pytest.raises(ValueError, match="not 0"):
        colour_of(0)


# ---- Slices ----------------------------------------------------------------------------------------------------------


def make_volume() -> tuple[np.ndarray, np.ndarray]:
    """Make HU and ids in RAS+ order: water, with the organs of BOXES."""
    voxels, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
    for organ, box in BOXES.items():
        voxels[box], labels[box] = 60, organ
    voxels[::4, ::4][labels[::4, ::4] == 0] = -120  # some fat, without which it is no CT
    return voxels, labels


def shown(voxels: np.ndarray, *label_maps: np.ndarray, spacing_mm: tuple = SPACING_MM) -> Shown:
    """Return a scan with one label map, or with prediction and reference."""
    geometry = Geometry(voxels.shape, np.diag([*spacing_mm, 1.0]), nib.Nifti1Header())
    return Shown("case", voxels, geometry, dict(enumerate(label_maps)), ORGANS)


def save_nifti(array: np.ndarray, axes: str, path: Path, dtype: type) -> Path:
    """Store a RAS+ array with its axes in another order, such as LPI, the affine saying so."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-40, -200, 600)
    image = nib.Nifti1Image(array.astype(dtype), affine)
    image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))).to_filename(path)
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == axes
    return path


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run `python -m visualization.NAME` on a machine without a screen."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    return run_script("-m", f"visualization.{name}", *arguments, env=environment)


def run_main(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Do the same in this process, which is quicker."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = {"overlay": overlay, "curves": curves}[name].main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def looks_like(pixels: np.ndarray, organ: int) -> np.ndarray:
    """Find where a picture, (rows, columns, 3 or 4) from 0 to 1, has an organ's contour or legend colour."""
    return np.abs(pixels[..., :3] - colour_of(organ)).max(axis=-1) < 0.06


def panel_pixels(figure: Figure) -> dict[str, np.ndarray]:
    """Cut each view's panel out of the drawn figure; keys are the first words of the captions."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()) / 255
    panels = {}
    for axes in figure.axes:
        captions = [text.get_text() for text in axes.texts if "=" in text.get_text()]
        if captions:
            box = axes.get_window_extent()
            left, right, top, bottom = (round(v) for v in (box.x0, box.x1, len(pixels) - box.y1, len(pixels) - box.y0))
            panels[captions[0].split(",")[0]] = pixels[top:bottom, left:right]
    return panels


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Return where the marked pixels lie on average, from 0 (left, top) to 1 (right, bottom)."""
    rows, columns = np.nonzero(mask)
    assert len(rows), "the organ is nowhere in the picture"
    return columns.mean() / mask.shape[1], rows.mean() / mask.shape[0]


@pytest.mark.parametrize(("axes", "run"), [("LAI", run_module), ("RAS", run_main), ("PSR", run_main)])
def test_command_puts_the_patients_right_at_the_left(tmp_path, axes, run):
    voxels, labels = make_volume()
    scan = save_nifti(voxels, axes, tmp_path / "case_0000.nii.gz", np.int16)
    label_map = save_nifti(labels, axes, tmp_path / "case.nii.gz", np.uint8)
    result = run("overlay", scan, label_map, "--output", tmp_path / "new" / "slices.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["slices.png"]
    pixels = imread(tmp_path / "new" / "slices.png")
    # The legend is at the right of the axial panel; the left half of the picture holds the axial and coronal panels.
    half = pixels[:, : pixels.shape[1] // 2]
    liver, spleen = (centre(looks_like(half, organ)) for organ in (LIVER, SPLEEN))
    assert liver[0] < spleen[0] - 0.2


def test_panels_follow_the_radiological_convention():
    voxels, labels = make_volume()
    panels = panel_pixels(draw_overlay(shown(voxels, labels)))
    right_left, front_back, top_bottom = ([0.25, 0.8], [0.3, 0.7], [0.333, 0.625])
    expected = {  # the boxes' centres as shares of the panel, from the patient's right, front and top
        "axial": (right_left, front_back),
        "coronal": (right_left, top_bottom),
        "sagittal": (front_back, top_bottom),
    }
    seen = 0
    for view, (across, down) in expected.items():
        for organ, x, y in zip((LIVER, SPLEEN), across, down, strict=True):
            if looks_like(panels[view], organ).any():
                assert centre(looks_like(panels[view], organ)) == pytest.approx((x, y), abs=0.05), (view, organ)
                seen += 1
    assert seen >= 4


def test_letters_stand_on_their_sides():
    figure = draw_overlay(shown(*make_volume()))
    FigureCanvasAgg(figure).draw()
    letters = {}
    for axes in figure.axes:
        box = axes.get_window_extent()
        for text in axes.texts:
            if text.get_text() in tuple("RLAPSI"):
                x, y = text.get_window_extent().get_points().mean(axis=0)
                x, y = (x - box.x0) / box.width - 0.5, (y - box.y0) / box.height - 0.5
                side = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("below" if y < 0 else "above")
                letters.setdefault(side, []).append(text.get_text())
    assert {side: "".join(sorted(found)) for side, found in letters.items()} == {
        "left": "ARR", "right": "LLP", "above": "ASS", "below": "IIP"
    }  # fmt: skip


def test_all_panels_have_one_scale_in_mm():
    figure = draw_overlay(shown(*make_volume(), spacing_mm=(0.7, 0.9, 5.0)))
    inches = {}
    for axes in figure.axes:
        captions = [text.get_text() for text in axes.texts if "=" in text.get_text()]
        if captions:
            inches[captions[0].split(",")[0]] = axes.get_position().size * figure.get_size_inches()
            (width, height), drawn = inches[captions[0].split(",")[0]], axes.get_xlim()[1] / axes.get_ylim()[0]
            assert width / height == pytest.approx(drawn)
    x, y, z = 24 * 0.7, 20 * 0.9, 12 * 5.0
    scale = inches["axial"][0] / x
    for view, size_mm in {"axial": (x, y), "coronal": (x, z), "sagittal": (y, z)}.items():
        assert inches[view] == pytest.approx(np.multiply(size_mm, scale))


def test_slices_show_every_organ_that_three_slices_can():
    labels = np.zeros((30, 30, 30), np.uint8)
    # Ids 1 to 4 share axial and coronal slices; id 5 lies alone, and only a sagittal slice without the others adds it.
    for organ in range(1, 5):
        labels[5 * organ : 5 * organ + 2, 8:10, 19:22] = organ
    labels[26:29, 15:28, 2:12] = 5
    counts = count_by_slice(labels, 6)
    x, y, z = choose_slices(counts)
    assert 19 <= z <= 21
    shown = set(np.unique(labels[x])) | set(np.unique(labels[:, y])) | set(np.unique(labels[:, :, z]))
    assert shown == {0, 1, 2, 3, 4, 5}


def test_legend_gives_each_organs_volume_and_whether_it_is_seen():
    voxels, labels = make_volume()
    # Four organs of one voxel each, no two in any slice: three slices cannot show them all.
    for organ, voxel in {10: (0, 0, 0), 11: (1, 1, 1), 12: (22, 18, 10), 13: (23, 19, 11)}.items():
        labels[voxel] = organ
    figure = draw_overlay(shown(voxels, labels))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    # 7 * 6 * 4 and 4 * 4 * 5 voxels of 0.16 mL, and one.
    for name, ml in {"liver": "26.9", "spleen": "12.8", "left kidney": "0.2"}.items():
        assert texts[texts.index(name) + 1] == ml
    assert "pancreas" not in texts
    assert "hollow: in none of these slices" in texts


def test_no_text_overlaps_another_or_leaves_the_picture():
    labels = np.zeros((40, 30, 11), np.uint8)
    for organ in range(1, len(ORGANS)):
        labels[2 * organ, 3:25, organ % 11] = organ
    figure = draw_overlay(shown(np.zeros(labels.shape, np.float32), labels, spacing_mm=(9.0, 9.0, 5.0)))
    check_texts(figure)


def check_texts(figure: Figure) -> None:
    """Check that no text lies on another, and none goes over the edge."""
    FigureCanvasAgg(figure).draw()
    texts = [t for t in (*figure.texts, *(t for axes in figure.axes for t in axes.texts)) if t.get_text()]
    boxes = {text.get_text() + f" {i}": text.get_window_extent() for i, text in enumerate(texts)}
    assert len(boxes) > 2 * 13
    for name, box in boxes.items():
        assert figure.bbox.contains(box.x0, box.y0), name
        assert figure.bbox.contains(box.x1, box.y1), name
    for (name, box), (other_name, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), f"{name} lies on {other_name}"


def drawn(figure: Figure) -> np.ndarray:
    """Return the figure's pixels, (rows, columns, 3) from 0 to 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def test_errors_are_told_apart():
    truth, prediction = np.array([[0, 1, 2, 2, 0]]), np.array([[0, 0, 2, 1, 1]])
    assert errors_of(prediction, truth).tolist() == [[0, 1, 0, 3, 2]]


def test_comparison_shows_prediction_truth_and_errors():
    voxels, truth = make_volume()
    prediction = truth.copy()
    prediction[BOXES[SPLEEN]] = 0  # missed
    prediction[19:22, 11:17, 6:10] = 2  # a part of the liver taken for the right kidney
    prediction[10:15, 11:17, 6:10] = LIVER  # too much
    figure = draw_comparison(shown(voxels, prediction, truth))
    pixels = drawn(figure)
    legend = int(len(pixels[0]) * figure.axes[-1].get_position().x0)
    left, middle, _ = np.array_split(pixels[:, : legend - 40], 3, axis=1)
    assert not looks_like(left, SPLEEN).any()
    assert looks_like(middle, SPLEEN).any()
    assert looks_like(left, 2).any()
    assert not looks_like(middle, 2).any()
    panel = panel_of(figure, pixels, 2)  # errors, axial
    places = {}
    for name, colour in {"missed": MISSED, "extra": EXTRA, "mixed": MIXED_UP}.items():
        rgb = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
        places[name] = centre(np.abs(panel - rgb).max(axis=-1) < 0.16)[0]
    # From the patient's right: the liver's part x 19 to 21, then what is too much, x 10 to 14, and the spleen, 3 to 6.
    expected = {"mixed": 1 - 20.5 / 24, "extra": 1 - 12.5 / 24, "missed": 1 - 5 / 24}
    assert places == pytest.approx(expected, abs=0.03)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    liver, spleen, kidney = (texts.index(name) for name in ("liver", "spleen", "right kidney"))
    # Liver: 7 x 6 x 4 voxels in truth; 3 x 6 x 4 are missing and 5 x 6 x 4 too many: 2 * 4 / (7 + 9).
    assert texts[liver + 1 : liver + 4] == ["34.6", "26.9", "0.500"]
    assert texts[spleen + 1 : spleen + 4] == ["0.0", "12.8", "0.000"]
    assert texts[kidney + 1 : kidney + 4] == ["11.5", "0.0", "0.000"]


def panel_of(figure: Figure, pixels: np.ndarray, number: int) -> np.ndarray:
    """Cut one of a figure's axes out of its pixels."""
    box = figure.axes[number].get_window_extent()
    left, right, top, bottom = (round(v) for v in (box.x0, box.x1, len(pixels) - box.y1, len(pixels) - box.y0))
    return pixels[top:bottom, left:right]


def test_contact_sheet_goes_evenly_from_the_highest_slice_to_the_lowest():
    voxels, labels = make_volume()
    figure = draw_contact_sheet(shown(voxels, labels), 4)
    captions = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text().startswith("z = ")]
    assert captions == ["z = 9", "z = 7", "z = 4", "z = 2"]  # the organs lie in slices 2 to 9
    pixels = drawn(figure)
    for number, organs in enumerate(({LIVER}, {LIVER}, {SPLEEN}, {SPLEEN})):
        panel = panel_of(figure, pixels, number)
        assert {organ for organ in (LIVER, SPLEEN) if looks_like(panel, organ).any()} == organs
    assert (
        centre(looks_like(panel_of(figure, pixels, 0), LIVER))[0]
        < 0.5
        < centre(looks_like(panel_of(figure, pixels, 3), SPLEEN))[0]
    )
    sizes = {tuple(np.round(axes.get_position().size * figure.get_size_inches(), 6)) for axes in figure.axes[:4]}
    assert len(sizes) == 1
    ((width, height),) = sizes
    assert width / height == pytest.approx(24 * 4 / (20 * 5))  # mm-true
    more = draw_contact_sheet(shown(voxels, labels), 100)
    assert len(more.axes) == 8 + 1  # no slice twice


@pytest.mark.parametrize("draw", ["comparison", "sheet"])
def test_other_pictures_too_keep_their_texts_apart(draw):
    labels = np.zeros((40, 30, 33), np.uint8)
    for organ in range(1, len(ORGANS)):
        labels[2 * organ, 3:25, 2 * organ] = organ
    voxels, spacing_mm = np.zeros(labels.shape, np.float32), (9.0, 9.0, 5.0)
    if draw == "comparison":
        figure = draw_comparison(shown(voxels, labels, labels[::-1], spacing_mm=spacing_mm))
    else:
        figure = draw_contact_sheet(shown(voxels, labels, spacing_mm=spacing_mm), 12)
    check_texts(figure)


@pytest.mark.parametrize("shape", [(24, 20, 1), (1, 1, 1)])
def test_other_pictures_of_thin_and_empty_scans(shape):
    for labels in (np.zeros(shape, np.uint8), np.ones(shape, np.uint8)):
        voxels = np.zeros(shape, np.float32)
        for figure in (draw_comparison(shown(voxels, labels, labels)), draw_contact_sheet(shown(voxels, labels), 9)):
            assert drawn(figure).any()


def test_the_command_draws_comparison_and_sheet(tmp_path):
    voxels, labels = make_volume()
    scan = save_nifti(voxels, "LAI", tmp_path / "case_0000.nii.gz", np.int16)
    label_map = save_nifti(labels, "LAI", tmp_path / "case.nii.gz", np.uint8)
    for flags in (("--reference", label_map), ("--contact", 6)):
        result = run_main("overlay", scan, label_map, *flags, "--output", tmp_path / "picture.png")
        assert (result.returncode, result.stderr) == (0, "")
        assert imread(tmp_path / "picture.png").shape[0] > 300
        (tmp_path / "picture.png").unlink()
    for flags, message in (
        (("--reference", label_map, "--contact", 6), "one of the two"),
        (("--contact", 0), "got 0, expected 1 or more"),
    ):
        result = run_main("overlay", scan, label_map, *flags, "--output", tmp_path / "picture.png")
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("shape", [(24, 20, 1), (1, 1, 1)])
def test_thin_and_empty_scans_are_drawn(shape, tmp_path):
    for labels in (np.zeros(shape, np.uint8), np.ones(shape, np.uint8)):
        figure = draw_overlay(shown(np.zeros(shape, np.float32), labels))
        save_figure(figure, tmp_path / "slices.png")
        empty = "no organ in the label map" in [text.get_text() for axes in figure.axes for text in axes.texts]
        assert empty is not labels.any()


def test_overlay_refuses_in_one_sentence(tmp_path):
    voxels, labels = make_volume()
    scan = save_nifti(voxels, "RAS", tmp_path / "case_0000.nii.gz", np.int16)
    smaller = save_nifti(labels[:-1], "RAS", tmp_path / "smaller.nii.gz", np.uint8)
    unknown = save_nifti(labels + 90, "RAS", tmp_path / "unknown.nii.gz", np.uint8)
    folder, slices = tmp_path / "taken.png", tmp_path / "slices.png"
    folder.mkdir()
    good = save_nifti(labels, "RAS", tmp_path / "case.nii.gz", np.uint8)
    for run, label_map, output, code, named in (
        (run_module, tmp_path / "none.nii.gz", slices, 1, "none.nii.gz"),
        (run_main, smaller, slices, 1, "smaller.nii.gz"),
        (run_main, unknown, slices, 1, "unknown.nii.gz"),
        (run_main, good, folder, 1, "taken.png"),
        (run_main, good, tmp_path / "slices.doc", 2, "slices.doc"),
    ):
        result = run("overlay", scan, label_map, "--output", output)
        assert result.returncode == code, result.stderr
        assert result.stderr.startswith("error: ")
        assert named in result.stderr
        assert result.stderr.count("\n") == 1
    assert not slices.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "slices.png"
    path.write_bytes(b"old")

    class HalfFigure(Figure):
        """Its disk is full."""

        def savefig(self, path: Path) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_figure(HalfFigure(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- Curves ----------------------------------------------------------------------------------------------------------


def write_log(path: Path, rows: list[dict]) -> Path:
    """Write a log as train.py does; what a row does not name stays empty."""
    dice = [f"dice_{organ.replace(' ', '_')}" for organ in ORGANS[1:]]
    columns = ["epoch", "train_loss", "val_loss", "val_dice", *dice, "seconds", "data_seconds", "peak_gib"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


LOG = [
    {"epoch": 1, "train_loss": 2.5, "val_loss": 2.2, "val_dice": 0.2, "dice_liver": 0.4, "dice_left_kidney": 0.1},
    {"epoch": 2, "train_loss": 0.9},
    {"epoch": 3, "train_loss": 0.1, "val_loss": 0.3, "val_dice": 0.8, "dice_liver": 0.9, "dice_left_kidney": 0.7},
]


def drawn_curves(rows: list[dict], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Draw a log and keep the figure."""
    kept = []

    def save_and_keep(figure: Figure, path: Path) -> None:
        kept.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr("visualization.curves.save_figure", save_and_keep)
    draw_curves(write_log(folder / "log.csv", rows), folder / "curves.png", ORGANS)
    assert imread(folder / "curves.png").std() > 0.01
    return kept[0]


def test_curves_join_the_values_across_empty_cells(tmp_path, monkeypatch):
    loss, dice = drawn_curves(LOG, tmp_path, monkeypatch).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[1, 2.5], [2, 0.9], [3, 0.1]],
        [[1, 2.2], [3, 0.3]],
    ]
    lines = {line.get_color(): line.get_xydata().tolist() for line in dice.lines}
    assert lines[colour_of(1)] == [[1, 0.4], [3, 0.9]]
    assert lines[colour_of(13)] == [[1, 0.1], [3, 0.7]]
    assert len(lines) == 3, "the mean and the two organs with values"
    texts = [text.get_text() for text in dice.texts]
    names = [text for text in texts if text in ORGANS or text == "mean"]
    assert names[:3] == ["liver", "mean", "left kidney"], "the names stand in the order of the last values"
    assert sorted(names) == sorted(["mean", *ORGANS[1:]])
    assert texts[texts.index("spleen") - 1] == "-"


@pytest.mark.parametrize("rows", [LOG[:1], LOG[1:2], [{**LOG[0], "train_loss": "nan", "val_loss": "inf"}]])
def test_one_epoch_is_drawn(rows, tmp_path, monkeypatch):
    loss, dice = drawn_curves(rows, tmp_path, monkeypatch).axes
    assert all(line.get_marker() == "o" for line in (*loss.lines, *dice.lines))
    ticks = dice.get_xticks()
    assert np.array_equal(ticks, ticks.round())


def test_names_beside_the_curves_do_not_touch(tmp_path, monkeypatch):
    dice = {f"dice_{organ.replace(' ', '_')}": 0.9 for organ in ORGANS[1:]}
    figure = drawn_curves([{**row, **dice} for row in LOG], tmp_path, monkeypatch)
    texts = [text for text in figure.axes[1].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 3 * 14
    assert all(figure.bbox.contains(box.x1, box.y1) and figure.bbox.contains(box.x0, box.y0) for box in boxes)
    for (text, box), (other, other_box) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(other_box), f"{text.get_text()} lies on {other.get_text()}"


def test_a_long_name_beside_the_curves_is_cut_in_its_middle(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ORGANS", ["background", "common_carotid_artery_right"])
    row = {key: LOG[0][key] for key in ("epoch", "train_loss", "val_loss", "val_dice")}
    figure = drawn_curves([{**row, "dice_common_carotid_artery_right": 0.5}], tmp_path, monkeypatch)
    (name,) = (text for text in figure.axes[1].texts if text.get_text().startswith("common"))
    assert name.get_text().endswith("right")
    assert name.get_window_extent().x1 < figure.bbox.x1


def test_curves_command(tmp_path):
    (tmp_path / "config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    result = run_main("curves", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: ")
    assert "log.csv" in result.stderr
    write_log(tmp_path / "log.csv", LOG)
    result = run_module("curves", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert imread(tmp_path / "curves.png").shape[2] == 4


def test_logs_that_cannot_be_drawn_are_refused(tmp_path):
    log, picture = tmp_path / "log.csv", tmp_path / "curves.png"
    write_log(log, [{**LOG[0], "dice_liver": "much"}])
    with pytest.raises(ValueError, match=r"log\.csv: row 2, column dice_liver: 'much'"):
        draw_curves(log, picture, ORGANS)
    write_log(log, [*LOG, {"train_loss": 0.1}])
    with pytest.raises(ValueError, match="a row without its epoch"):
        draw_curves(log, picture, ORGANS)
    write_log(log, [])
    with pytest.raises(ValueError, match="has no row"):
        draw_curves(log, picture, ORGANS)
    write_log(log, LOG)
    with pytest.raises(ValueError, match="lacks the columns dice_tail"):
        draw_curves(log, picture, (*ORGANS, "tail"))
    log.write_bytes(b"\xff\xfe\x00epoch")
    with pytest.raises(ValueError, match=r"log\.csv: lacks the columns"):
        draw_curves(log, picture, ORGANS)
    assert not picture.exists()
