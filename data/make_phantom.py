"""Write a made-up abdominal CT data set in FLARE22's layout, to try the whole pipeline without real data.

    python -m data.make_phantom DATA_DIR [--cases N] [--shape X Y Z] [--seed S]

gives DATA_DIR/images/phantom_0001_0000.nii.gz (int16 HU), DATA_DIR/labels/phantom_0001.nii.gz (uint8 ids, same grid),
and so on, and DATA_DIR/phantom.json with the settings. The same command gives the same bytes, and a case does not
depend on how many are made. Body size, fat, field of view, contrast phase, axis order and the organs' place, size
and form change from case to case, so that neither HU nor position alone tells an organ. A network that is good
here has shown that the code works, nothing about patients.

Anatomy is described in the atlas: mm in RAS+ (x to the patient's right, y to the front, z to the head), the origin in
the middle of the trunk at the height of the first lumbar vertebra.
"""

import argparse
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from core.scans.organ_names import organ_names_extension
from core.scoring.flare22 import TOLERANCES_MM
from core.system.exits import DONE, USAGE, refusing, run_command
from core.system.files import read_text, user_path, whole_file, write_text

VERSION = 1  # raised when the same settings begin to give other voxels, so that an older set is not reused

ORGANS = ("background", *TOLERANCES_MM)  # FLARE22's 13 in the order of their ids, which are those of the phantoms
DEFAULT_CASES = 20
DEFAULT_SHAPE = (144, 128, 80)
MAX_CASES = 9999  # case names have four digits
MIN_SIDE, MAX_SIDE = 16, 512  # voxels; below, organs vanish; above, no network grid here needs it
MAX_VOXELS = 2**25  # 512 x 512 x 128, about 2 GiB of memory while one case is made

AIR_HU, LUNG_HU, TABLE_HU, FAT_HU, SKIN_HU, MUSCLE_HU = -1000, -820, -350, -100, 10, 55
CARTILAGE_HU, SPONGIOSA_HU, CORTICAL_HU = 85, 170, 420

# Semi-axes (x, y) in mm of the ellipse outside the abdominal muscles, and the thickness of ribs and muscles.
TRUNK_MM, WALL_MM = (142.0, 100.0), 12.0
VERTEBRA_MM, DISC_MM = 34.0, 8.0  # from one disc to the next, and the height of a disc
RIB_MM = 27.0  # from one rib to the next

# Drawn for each case, uniformly between the two.
SIZE, STRETCH = (0.94, 1.06), (0.97, 1.03)  # the body to the atlas, as a whole and along each axis
FAT_MM = (6, 38)  # skin and fat round the trunk
MARGIN_MM = (4, 34)  # air on each side: the body's place in the field of view, so that position tells little
TOP_MM, HEIGHT_MM = (130, 162), (260, 320)  # the scan's upper end, and what it covers from there downwards
ENHANCEMENT = (0.6, 1.2)  # contrast medium relative to the mean portal venous phase, so that HU tell little
LUNG_FLOOR_MM, BREATH_MM = (80, 95), (-10, 8)
NOISE_HU = (14, 22)  # sd over a uniform region

ORGAN_HU_JITTER = 8  # HU, to either side
MEDULLA_MM, MEDULLA_HU = 8, -45  # depth at which a kidney's medulla begins; it takes up less than the cortex
BIAS_HU = 6  # sd of the slow drift over the body
WARP_MM = 4  # sd of the smooth random warp along an axis
MAX_WARP_MM = 12  # where the warp is cut off
BLUR_VOXELS, NOISE_VOXELS = 0.5, 0.6  # sd of the scanner's blur and of the smoothing that gives noise its grain
REACH_MM = 4  # how far outside an organ its distance is computed; no gap of fat is wider
SMALL_BOWEL_LOOPS = 26

# FLARE22's scans come mostly in LPS; the rest are there so that code which trusts one order fails.
AXIS_ORDERS = ("LPS", "RAS", "LAS", "LAI", "RPI", "PIL", "ASR", "SRA", "IPL", "LSA")
LPS_SHARE = 0.5
OBLIQUE_SHARE, MAX_TILT_DEGREES = 0.3, 4.0


@dataclass(frozen=True)
class Part:
    """An organ, or an unlabelled neighbour, as a union of tubes that are jittered together.

    Attributes:
        label: FLARE22's id; 0 for what has none.
        hu: HU without contrast medium.
        uptake: HU that contrast medium adds in the mean portal venous phase.
        tubes: each a text "x y z radius; x y z radius; ..." in atlas mm.
        carved: tubes taken away again: hila, fissures.
        squash: thickness along (x, y, z) relative to a round tube.
        gap_mm: fat kept free around it.
        wall_mm: thickness of the wall of a hollow part; 0 when solid.
        shift_mm, growth, turn_degrees: largest jitter of place, of size as a share, and of each angle.
    """

    label: int
    hu: float
    uptake: float
    tubes: tuple[str, ...]
    carved: tuple[str, ...] = ()
    squash: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gap_mm: float = 1.5
    wall_mm: float = 0.0
    shift_mm: float = 6.0
    growth: float = 0.08
    turn_degrees: float = 7.0


def mirrored(part: Part, label: int) -> Part:
    """Return the same part on the patient's other side."""

    def flip(tubes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("; ".join(f"{-x} {y} {z} {radius}" for x, y, z, radius in read_points(tube)) for tube in tubes)

    return replace(part, label=label, tubes=flip(part.tubes), carved=flip(part.carved))


def read_points(tube: str) -> np.ndarray:
    """Return (n, 4) x, y, z and radius in atlas mm of a tube written as in Part."""
    return np.array([point.split() for point in tube.split(";")], float)


# How muscles and vessels move that run along the spine: hardly, and they keep their length.
FIXED = {"shift_mm": 2.0, "growth": 0.0, "turn_degrees": 0.0}

ERECTOR = Part(0, 50, 8, ("30 -78 200 17; 32 -78 0 19; 28 -80 -200 19",), **FIXED)
PSOAS = Part(0, 50, 8, ("24 -44 5 7; 32 -44 -40 14; 44 -38 -110 20; 56 -28 -200 22",), **FIXED)
KIDNEY, KIDNEY_SINUS = "48 -46 32 19; 59 -41 14 24; 62 -38 -12 25; 58 -34 -34 20", "32 -26 -2 10; 46 -34 0 10"
RIGHT_KIDNEY = Part(2, 35, 135, (KIDNEY,), carved=(KIDNEY_SINUS,), shift_mm=7, growth=0.07)
COMMON_ILIAC = Part(0, 42, 105, ("-6 -16 -106 6; 22 -12 -150 6; 44 -4 -200 6",), **FIXED)
ADRENAL = ("29 -22 60 5.4; 29 -34 51 5.2; 30 -44 43 4.6", "29 -22 60 5.4; 34 -29 52 5.2; 41 -37 47 4.6")
RIGHT_ADRENAL = Part(7, 28, 48, ADRENAL, gap_mm=2, shift_mm=3)
COLON = (
    "82 -15 -170 24; 88 -5 -100 24; 84 10 -52 20; 55 55 -48 18; 0 68 -58 17; "
    "-60 58 -30 17; -96 15 5 17; -100 -20 -40 15; -98 -25 -170 14"
)
HEART = "5 20 160 38; -35 38 138 40"
STOMACH = "-58 -12 84 32; -68 12 55 34; -58 36 22 28; -22 46 2 21; 12 42 6 15; 30 34 12 10"
RIGHT_LOBE, LEFT_LOBE = "72 -10 14 52; 70 -2 48 67; 62 8 60 61", "52 34 52 45; 10 50 62 33; -32 50 72 19"
LIVER_FISSURE, RETROPERITONEUM = "28 90 20 4; 26 50 22 5; 24 20 28 6", "32 -34 68 9; 34 -38 46 12; 46 -48 8 17"
SPLEEN, SPLEEN_HILUM = "-84 -52 74 23; -102 -36 52 32; -102 -14 28 23", "-62 -10 70 20; -64 -14 45 22"
DUODENUM = "34 34 10 11; 50 20 4 12; 52 10 -40 12; 32 2 -64 11; -8 4 -62 11; -24 14 -36 10"
PANCREAS = "26 4 -34 11; 30 12 -14 16; 6 20 4 10; -24 14 14 12; -52 -6 26 11.5; -74 -22 34 9"
PORTAL_VEIN = "4 0 -50 5; 5 4 0 6; 24 9 26 6; 46 14 44 6"
AORTA = "-16 -26 220 11; -12 -20 90 11; -6 -16 0 9.5; -6 -16 -105 8.5"
VENA_CAVA = "20 -18 -110 10; 20 -18 0 11; 22 -12 50 12; 16 2 100 12; 14 8 122 11"
GALLBLADDER = "44 36 14 9; 50 46 -6 15; 54 54 -20 16"
ESOPHAGUS = "-4 -12 220 8.5; -8 -6 120 9; -20 -6 96 9; -36 -6 84 9"

MUSCLES = (ERECTOR, mirrored(ERECTOR, 0), PSOAS, mirrored(PSOAS, 0))
# Painted in this order, after muscles and small bowel: what comes later lies over what came before.
PARTS = (
    Part(0, 40, 25, (COLON,), wall_mm=3, shift_mm=12, growth=0.15),
    Part(0, 40, 95, (HEART,), squash=(1, 1, 0.8)),
    Part(11, 40, 32, (STOMACH,), wall_mm=4.5, growth=0.15),
    Part(1, 55, 50, (RIGHT_LOBE, LEFT_LOBE), carved=(LIVER_FISSURE, RETROPERITONEUM), growth=0.06),
    Part(3, 48, 67, (SPLEEN,), carved=(SPLEEN_HILUM,), growth=0.13),
    RIGHT_KIDNEY,
    mirrored(RIGHT_KIDNEY, 13),
    Part(12, 40, 25, (DUODENUM,), wall_mm=3.5, growth=0.1),
    Part(4, 38, 52, (PANCREAS,), gap_mm=1, growth=0.1),
    Part(0, 42, 105, (PORTAL_VEIN,), gap_mm=0.5, shift_mm=4),
    COMMON_ILIAC,
    mirrored(COMMON_ILIAC, 0),
    Part(5, 42, 105, (AORTA,), **FIXED),
    Part(6, 40, 92, (VENA_CAVA,), squash=(1, 0.85, 1), gap_mm=0.5, **FIXED),
    Part(9, 12, 0, (GALLBLADDER,), gap_mm=0.8, growth=0.14),
    Part(10, 38, 12, (ESOPHAGUS,), wall_mm=4.5, **FIXED),
    RIGHT_ADRENAL,
    mirrored(RIGHT_ADRENAL, 8),
)
KIDNEYS = (2, 13)


@dataclass
class Scan:
    """A case while it is painted: where each voxel lies in the atlas, and what is there.

    Attributes:
        atlas_mm: (3, X, Y, Z) float32, the voxel centres in atlas mm.
        start_mm, step_mm: (3,) first voxel and voxel size in atlas mm, before the warp.
        enhancement: how much of the mean phase's contrast medium there is.
        cavity: (X, Y, Z) bool, inside the muscles of the trunk.
        hu: (X, Y, Z) float32.
        labels: (X, Y, Z) uint8.
        texture: (X, Y, Z) float32, a field of fine grain, mean 0, sd 1.
    """

    atlas_mm: np.ndarray
    start_mm: np.ndarray
    step_mm: np.ndarray
    enhancement: float
    texture: np.ndarray
    cavity: np.ndarray = field(init=False)
    hu: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)


def smooth_field(rng: np.random.Generator, shape: tuple, nodes: int) -> np.ndarray:
    """Return (X, Y, Z) float32 of mean 0 and sd about 1, splined from `nodes` random values along each axis."""
    values = rng.standard_normal((nodes, nodes, nodes), np.float32)
    for size in shape:
        weights = CubicSpline(np.arange(nodes), np.eye(nodes))(np.linspace(0, nodes - 1, size))
        # The first axis goes to the end, so that three rounds bring the axes back in order. Not tensordot: its sums
        # depend on the number of threads, and the files must not.
        values = np.einsum("ijk,ni->jkn", values, weights.astype(np.float32))
    return values / values.std()


def place_scan(rng: np.random.Generator, shape: tuple) -> tuple[Scan, np.ndarray, float]:
    """Draw a body and a field of view around it.

    Returns:
        The scan with only its coordinates filled, the voxel size in mm (3,), and the thickness of the fat in atlas mm.
    """
    size = rng.uniform(*SIZE) * rng.uniform(*STRETCH, 3)
    fat_mm = rng.uniform(*FAT_MM)
    margins_mm = rng.uniform(*MARGIN_MM, (2, 2))
    half_mm = (np.array(TRUNK_MM) + fat_mm) * size[:2]
    top_mm, height_mm = rng.uniform(*TOP_MM), rng.uniform(*HEIGHT_MM)
    start_mm = np.append(-half_mm - margins_mm[:, 0], top_mm - height_mm)
    extent_mm = np.append(2 * half_mm + margins_mm.sum(axis=1), height_mm)
    spacing_mm = extent_mm / np.array(shape)
    start_mm, step_mm = (start_mm + spacing_mm / 2) / size, spacing_mm / size
    axes = np.ix_(*(start_mm[axis] + step_mm[axis] * np.arange(shape[axis]) for axis in range(3)))
    atlas_mm = np.empty((3, *shape), np.float32)
    for axis in range(3):
        atlas_mm[axis] = axes[axis] + np.clip(WARP_MM * smooth_field(rng, shape, 5), -MAX_WARP_MM, MAX_WARP_MM)
    scan = Scan(atlas_mm, start_mm, step_mm, rng.uniform(*ENHANCEMENT), smooth_field(rng, shape, 24))
    return scan, spacing_mm, fat_mm


def beyond_ellipse(x: np.ndarray, y: np.ndarray, semi_axes: tuple[float, float]) -> np.ndarray:
    """Return how many mm a point lies outside an ellipse round the origin, seen along its ray; negative inside."""
    stretch = np.sqrt((x / semi_axes[0]) ** 2 + (y / semi_axes[1]) ** 2) + 1e-6
    return np.hypot(x, y) * (1 - 1 / stretch)


def paint_trunk(scan: Scan, fat_mm: float, rng: np.random.Generator) -> None:
    """Paint air, skin, fat, the muscular wall with ribs, the lungs and the fat between them."""
    x, y, z = scan.atlas_mm
    beyond_mm = beyond_ellipse(x, y, TRUNK_MM)
    scan.hu = np.full(x.shape, AIR_HU, np.float32)
    scan.labels = np.zeros(x.shape, np.uint8)
    scan.hu[np.abs(y + TRUNK_MM[1] + fat_mm + 12) < 2.5] = TABLE_HU
    scan.hu[beyond_mm < fat_mm] = SKIN_HU
    scan.hu[beyond_mm < fat_mm - 2.5] = FAT_HU
    wall = (beyond_mm < 0) & (beyond_mm > -WALL_MM)
    scan.hu[wall] = MUSCLE_HU
    # Ribs fall from the spine to the front and end at the costal arch, which rises towards the breastbone.
    height_mm = z + 0.45 * y
    ribs = wall & (beyond_mm < -2) & (beyond_mm > -9) & (height_mm % RIB_MM < 11) & (z > -25 + 0.6 * (y + 60))
    scan.hu[ribs] = np.where(np.abs(beyond_mm[ribs] + 5.5) < 1.8, SPONGIOSA_HU, CORTICAL_HU)
    scan.cavity = beyond_mm < -WALL_MM
    scan.hu[scan.cavity] = FAT_HU
    mediastinum = beyond_ellipse(x + 4, y + 18, (32, 40)) < 0
    floor_mm = rng.uniform(*LUNG_FLOOR_MM) + 0.55 * y
    scan.hu[scan.cavity & (z > floor_mm) & ~mediastinum] = LUNG_HU


def paint_spine(scan: Scan, rng: np.random.Generator) -> None:
    """Paint vertebrae with a cortical shell, discs, the spinal canal and the processes."""
    x, y, z = scan.atlas_mm
    phase = (z + rng.uniform(0, VERTEBRA_MM)) % VERTEBRA_MM
    disc = phase < DISC_MM
    body_mm = beyond_ellipse(x, y + 50, (22, 17))
    canal_mm = beyond_ellipse(x, y + 76, (10, 8))
    shell = (body_mm > -3) | (phase < DISC_MM + 3) | (phase > VERTEBRA_MM - 3)
    arch = (phase > 0.35 * VERTEBRA_MM) & (canal_mm < 6)
    arch |= (phase > 0.5 * VERTEBRA_MM) & (phase < 0.8 * VERTEBRA_MM) & (np.abs(y + 70) < 5) & (np.abs(x) < 36)
    arch |= (phase > 0.3 * VERTEBRA_MM) & (phase < 0.9 * VERTEBRA_MM) & (np.abs(x) < 4) & (y > -104) & (y < -78)
    scan.hu[arch] = 0.5 * (SPONGIOSA_HU + CORTICAL_HU)
    # No organ is painted over bone.
    scan.cavity &= ~arch & (body_mm >= 0) & (canal_mm >= 0)
    scan.hu[body_mm < 0] = np.where(disc, CARTILAGE_HU, np.where(shell, CORTICAL_HU, SPONGIOSA_HU))[body_mm < 0]
    scan.hu[canal_mm < 0] = MUSCLE_HU - 20


def jitter(part: Part, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shift, turn, grow and bend a part.

    Returns:
        The spheres (n, 4) that make up its tubes and those of its carved tubes: x, y, z, radius in atlas mm.
    """
    tubes, carved = ([read_points(tube) for tube in texts] for texts in (part.tubes, part.carved))
    centre = np.concatenate(tubes)[:, :3].mean(axis=0)
    turn = Rotation.from_euler("xyz", rng.uniform(-part.turn_degrees, part.turn_degrees, 3), degrees=True)
    shift_mm = rng.uniform(-part.shift_mm, part.shift_mm, 3)
    growth = 1 + rng.uniform(-part.growth, part.growth)
    for points in tubes + carved:
        points[:, :3] = turn.apply(points[:, :3] - centre) * growth + centre + shift_mm
        points[:, :3] += rng.uniform(-1.5, 1.5, (len(points), 3))
        points[:, 3] *= growth * rng.uniform(0.94, 1.06, len(points))
    return tuple(np.concatenate([np.empty((0, 4)), *map(beads, group)]) for group in (tubes, carved))


def beads(tube: np.ndarray) -> np.ndarray:
    """Return (n, 4) spheres (x, y, z, radius) along a smooth curve through a tube's points, a third radius apart."""
    along = np.append(0, np.cumsum(np.linalg.norm(np.diff(tube[:, :3], axis=0), axis=1)))
    count = max(2, round(along[-1] / (tube[:, 3].mean() / 3)))
    return CubicSpline(along, tube)(np.linspace(0, along[-1], count))


def box_around(scan: Scan, spheres: np.ndarray) -> tuple[slice, slice, slice]:
    """Return the voxels that can lie within REACH_MM of the spheres (n, 4), whatever the warp."""
    reach_mm = spheres[:, 3:] + REACH_MM + MAX_WARP_MM
    low = ((spheres[:, :3] - reach_mm).min(axis=0) - scan.start_mm) / scan.step_mm
    high = ((spheres[:, :3] + reach_mm).max(axis=0) - scan.start_mm) / scan.step_mm
    shape = scan.labels.shape
    low, high = (np.clip(np.ceil(ends), 0, shape).astype(int) for ends in (low, high))
    return tuple(map(slice, low, high))


def distance_to(scan: Scan, spheres: np.ndarray, squash: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Return (X, Y, Z) how many mm each voxel lies outside the spheres' union: negative inside, else up to REACH_MM."""
    distance_mm = np.full(scan.labels.shape, REACH_MM, np.float32)
    for sphere in spheres.astype(np.float32):
        box = box_around(scan, sphere[None])
        offsets_mm = ((scan.atlas_mm[axis][box] - sphere[axis]) / np.float32(squash[axis]) for axis in range(3))
        distance_mm[box] = np.minimum(distance_mm[box], np.sqrt(sum(mm**2 for mm in offsets_mm)) - sphere[3])
    return distance_mm


def paint_part(scan: Scan, part: Part, shift_mm: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one part, with its gap of fat, its wall and what it holds, over what is there."""
    spheres, holes = jitter(part, rng)
    spheres[:, :3] += shift_mm
    holes[:, :3] += shift_mm
    box = box_around(scan, spheres)
    distance_mm = distance_to(scan, spheres, part.squash)[box]
    if len(holes):
        distance_mm = np.maximum(distance_mm, -distance_to(scan, holes)[box])
    hu, labels, texture = scan.hu[box], scan.labels[box], scan.texture[box]
    inside = scan.cavity[box] & (distance_mm < 0)
    gap = scan.cavity[box] & (distance_mm >= 0) & (distance_mm < part.gap_mm)
    # Where an organ meets the lung, the diaphragm lies between them.
    hu[gap] = np.where(hu[gap] == LUNG_HU, MUSCLE_HU, FAT_HU)
    labels[gap] = 0
    labels[inside] = part.label
    hu[inside] = part.hu + part.uptake * scan.enhancement + rng.uniform(-ORGAN_HU_JITTER, ORGAN_HU_JITTER)
    if part.label in KIDNEYS:
        hu[inside & (distance_mm < -MEDULLA_MM + texture)] += MEDULLA_HU * scan.enhancement
    if part.wall_mm:
        fill_hollow(hu, inside & (distance_mm < -part.wall_mm), scan.atlas_mm[1][box], texture, rng)


def fill_hollow(
    hu: np.ndarray, lumen: np.ndarray, y: np.ndarray, texture: np.ndarray, rng: np.random.Generator
) -> None:
    """Fill a lumen with chyme and, in front, as the patient lies on the back, with gas."""
    content_hu, grain_hu, gas_share = rng.uniform(0, 55), rng.uniform(3, 18), rng.uniform(-0.3, 0.5)
    if not lumen.any():
        return
    hu[lumen] = content_hu + grain_hu * texture[lumen]
    back_mm, front_mm = np.quantile(y[lumen], (0.02, 0.98))
    hu[lumen & (y > front_mm - gas_share * (front_mm - back_mm))] = AIR_HU + 30


def small_bowel(rng: np.random.Generator) -> list[Part]:
    """Return loops of small bowel between stomach and pelvis: unlabelled, yet like stomach and duodenum inside."""
    parts = []
    for _ in range(SMALL_BOWEL_LOOPS):
        points = rng.uniform((-80, 0, -175), (72, 66, -38)) + np.cumsum(rng.uniform(-26, 26, (5, 3)), axis=0)
        points[:, 2] = np.minimum(points[:, 2], -38)
        tube = "; ".join(f"{x} {y} {z} {rng.uniform(9, 13)}" for x, y, z in points)
        parts.append(Part(0, 40, 28, (tube,), wall_mm=3.0, shift_mm=0.0, growth=0.0))
    return parts


def drop_fragments(scan: Scan) -> None:
    """Turn into fat what other organs have cut off from an organ, so that each is one connected piece."""
    for label, box in enumerate(ndimage.find_objects(scan.labels), start=1):
        if box is None:
            continue
        mask = scan.labels[box] == label
        pieces, count = ndimage.label(mask)
        if count > 1:
            lost = mask & (pieces != np.bincount(pieces[mask]).argmax())
            scan.labels[box][lost] = 0
            scan.hu[box][lost] = FAT_HU


def make_case(seed: int, number: int, shape: tuple = DEFAULT_SHAPE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one case; it depends on its arguments only.

    Returns:
        HU (X, Y, Z) int16 and label map (X, Y, Z) uint8, both in RAS+ order, and the voxel size in mm (3,).
    """
    rng = np.random.default_rng((seed, number))
    scan, spacing_mm, fat_mm = place_scan(rng, shape)
    paint_trunk(scan, fat_mm, rng)
    paint_spine(scan, rng)
    # All organs hang on the diaphragm and move with the breath; the wall and the spine do not.
    breath_mm = np.array([0, 0, rng.uniform(*BREATH_MM)])
    for part in (*MUSCLES, *small_bowel(rng), *PARTS):
        paint_part(scan, part, breath_mm, rng)
    drop_fragments(scan)
    voxels = ndimage.gaussian_filter(scan.hu, BLUR_VOXELS)
    voxels += np.where(voxels > 3 * FAT_HU, BIAS_HU * smooth_field(rng, shape, 4), 0)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), NOISE_VOXELS)
    voxels += noise * (rng.uniform(*NOISE_HU) / noise.std())
    return np.clip(np.rint(voxels), -1024, 3071).astype(np.int16), scan.labels, spacing_mm


def scan_affine(rng: np.random.Generator, shape: tuple, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the affine (4, 4) of a case in RAS+ order, in mm; in some cases the patient lies a little turned."""
    tilt = rng.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES, 3) * (rng.random() < OBLIQUE_SHARE)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = rng.uniform(-60, 60, 3) - affine[:3, :3] @ (np.array(shape) / 2)
    return affine


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray, axis_order: str, organs: Sequence[str] = ()) -> bytes:
    """Return a gzipped NIfTI file of voxels given in RAS+ order and stored in another, with no date in it.

    Its header holds the names of `organs`, by id with the background first, when they are given.
    """
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axis_order)
    )
    image = nib.Nifti1Image(voxels, affine).as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    if organs:
        image.header.extensions.append(organ_names_extension(organs))
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def write_case(data_dir: Path, seed: int, number: int, shape: tuple) -> None:
    """Make one case and write its two files; labels first, so that a scan is never without them."""
    voxels, labels, spacing_mm = make_case(seed, number, shape)
    # A stream of its own, so that the way of storing does not depend on what was drawn for the anatomy.
    rng = np.random.default_rng((seed, number, 1))
    affine = scan_affine(rng, shape, spacing_mm)
    axis_order = "LPS" if rng.random() < LPS_SHARE else str(rng.choice(AXIS_ORDERS))
    image_path, labels_path = case_paths(data_dir, number)
    for path, array, organs in ((labels_path, labels, ORGANS), (image_path, voxels, ())):
        with whole_file(path) as temporary:
            temporary.write_bytes(nifti_bytes(array, affine, axis_order, organs))


def case_paths(data_dir: Path, number: int) -> tuple[Path, Path]:
    """Return where a case's image and its label map lie."""
    name = f"phantom_{number:04d}"
    return data_dir / "images" / f"{name}_0000.nii.gz", data_dir / "labels" / f"{name}.nii.gz"


def first_foreign_file(data_dir: Path) -> Path | None:
    """Return some path in data_dir that this script does not write, or None."""
    ours = re.compile(r"images|labels|(images/|labels/)?(\.\d+\.)?phantom(_\d{4}(_0000)?\.nii\.gz|\.json)")
    found = (path.relative_to(data_dir) for path in data_dir.rglob("*"))
    return next((path for path in found if not ours.fullmatch(path.as_posix())), None)


def read_record(data_dir: Path) -> dict:
    """Return what phantom.json says; empty when it is not there or not ours."""
    try:
        record = json.loads(read_text(data_dir / "phantom.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(data_dir: Path, record: dict) -> None:
    """Write phantom.json, whole."""
    write_text(data_dir / "phantom.json", json.dumps(record, indent=2) + "\n")


def write_phantom(data_dir: Path, cases: int, shape: tuple[int, int, int], seed: int) -> bool:
    """Write the data set unless the same one is there already.

    phantom.json says from the start what is being made, and at the end that all of it is there; so the same command
    begins an interrupted run again.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: data_dir is a file, or holds something else or phantoms of other settings; nothing is written then.
    """
    settings = {"version": VERSION, "cases": cases, "shape": list(shape), "seed": seed}
    paths = [path for number in range(1, cases + 1) for path in case_paths(data_dir, number)]
    if data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"{data_dir} is a file; give a new or empty folder")
    record = read_record(data_dir)
    if record == {"finished": True, "settings": settings} and all(path.is_file() for path in paths):
        return False
    if foreign := first_foreign_file(data_dir):
        raise ValueError(f"{data_dir} holds {foreign}, which is no phantom; give a new or empty folder")
    if any(data_dir.glob("*/*")) and record.get("settings") != settings:
        found = record.get("settings", "unknown settings")
        raise ValueError(f"{data_dir} holds phantoms made with {found}, not with {settings}; give another folder")
    for folder in ("images", "labels"):
        (data_dir / folder).mkdir(parents=True, exist_ok=True)
    for half_written in data_dir.glob("**/.*.phantom*"):  # by a run that was killed
        half_written.unlink()
    write_record(data_dir, {"finished": False, "settings": settings})
    for number in tqdm(range(1, cases + 1), desc="phantoms", unit="case", disable=None):
        write_case(data_dir, seed, number, shape)
    write_record(data_dir, {"finished": True, "settings": settings})
    return True


def main() -> int:
    """Write the data set that the command line asks for; return the exit code."""
    args = parse_arguments()
    with refusing(USAGE):
        written = write_phantom(args.data_dir, args.cases, tuple(args.shape), args.seed)
    print(f"{args.data_dir}: {args.cases} phantoms " + ("written" if written else "there already, reused"))
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m data.make_phantom", description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=user_path, metavar="DATA_DIR", help="a new or empty folder")
    parser.add_argument("--cases", type=int, default=DEFAULT_CASES, help="how many (default: %(default)s)")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=DEFAULT_SHAPE,
        metavar=("X", "Y", "Z"),
        help="voxels to the right, front and head; the field of view stays some 370 x 280 x 290 mm, and below about "
        "32 32 24 small organs may vanish (default: 144 128 80)",
    )
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.cases <= MAX_CASES:
        parser.error(f"--cases must be from 1 to {MAX_CASES}, not {args.cases}")
    if min(args.shape) < MIN_SIDE or max(args.shape) > MAX_SIDE or np.prod(args.shape) > MAX_VOXELS:
        parser.error(
            f"--shape needs {MIN_SIDE} to {MAX_SIDE} voxels along each axis and at most {MAX_VOXELS} in all, "
            f"not {' '.join(map(str, args.shape))}"
        )
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    return args


if __name__ == "__main__":
    run_command(main)
