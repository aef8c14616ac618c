"""Make one phantom: paint the parts of the atlas into an abdomen that differs from case to case."""

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from data.phantom_atlas import KIDNEYS, MUSCLES, PARTS, Part, read_points

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


def make_case(seed: int, number: int, shape: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
