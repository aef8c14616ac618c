"""A scan and its organs as one web page, to be opened from disk: slices in three planes, surfaces, names, volumes, HU.

    python -m visualization.viewer SCAN LABELS --output viewer.html
    python -m visualization.viewer SCAN PREDICTION --reference LABELS --output viewer.html

The page holds all that it shows and loads nothing from the internet, so it can be mailed and opened years later. To
stay small it holds the scan in-plane at no more than 256x256 voxels and in steps of 4 HU, and says so. With --full it
holds every voxel. Volumes and surfaces are computed from the full label map.
"""

import argparse
import gzip
import io
import json
from collections.abc import Sequence
from string import Template

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from core.scans.resample import resize_image, resize_labels
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.system.files import read_text
from visualization.meshes import Mesh, organ_mesh
from visualization.overlay import draw_overlay
from visualization.page import FOLDER, as_base64, as_json, data_url, escaped, make_page, write_page
from visualization.render import Scene, render, view_at
from visualization.shown import Shown, in_mm, picture_parser, print_written, read_shown
from visualization.slices import choose_slices, count_by_slice
from visualization.style import figure_url, rgb_of

IN_PLANE = 256  # voxels along X and Y that a page holds at most, without --full
HU_STEP = 4  # without --full; finer than the noise of a CT
HU_RANGE = (-1024, 3071)  # of 12 bits, as scanners store them
MESH_STEP_MM = (1.5, 3.0)  # of surfaces in the page, which are turned and not measured
STILL = (800, 600)  # pixels of the surfaces' still picture
GZIP_LEVEL = 9
NIIVUE = FOLDER / "vendor" / "niivue.umd.js"


def make_viewer(shown: Shown, full: bool = False) -> str:
    """Return the page, HTML.

    Args:
        shown: scan and label maps.
        full: True to hold every voxel and every HU, however large the page gets.
    """
    size = shown.voxels.shape if full else (*(min(n, IN_PLANE) for n in shown.voxels.shape[:2]), shown.voxels.shape[2])
    step = np.array(shown.voxels.shape) / size
    affine = shown.geometry.ras_affine @ np.block([[np.diag(step), (step[:, None] - 1) / 2], [np.zeros(3), 1]])
    start = choose_slices(count_by_slice(shown.labels, len(shown.organs)))
    meshes = {
        (source, organ): organ_mesh(labels, organ, shown.geometry.ras_affine, MESH_STEP_MM)
        for source, labels in enumerate(shown.label_maps.values())
        for organ in range(1, len(shown.organs))
    }
    meshes = {which: mesh for which, mesh in meshes.items() if mesh}
    surfaces, packed = pack_surfaces(meshes)
    case = {
        "sources": list(shown.label_maps),
        "organs": describe_organs(shown),
        "start_mm": in_mm(shown.geometry, start),
        "step_mm": [float(mm) for mm in np.array(shown.geometry.spacing_mm) * step],
        "surfaces": surfaces,
    }
    data = {
        "case": as_json(case),
        "scan": as_base64(pack_volume(smaller_scan(shown.voxels, size, full), affine)),
        "surfaces-data": as_base64(gzip.compress(packed, GZIP_LEVEL, mtime=0)),
    }
    for number, labels in enumerate(shown.label_maps.values()):
        data[f"labels-{number}"] = as_base64(pack_volume(resize_labels(labels, size), affine))
    body = Template(read_text(FOLDER / "viewer.html")).substitute(
        title=escaped(shown.title),
        about=escaped(describe_grid(shown.voxels.shape, size, shown.geometry.spacing_mm, full)),
        slices=figure_url(draw_overlay(shown)),
        surfaces=still_of_surfaces({organ: mesh for (source, organ), mesh in meshes.items() if source == 0}),
        niivue=escaped(json.loads(read_text(NIIVUE.parent / "niivue.json"))["version"]),
    )
    scripts = [read_text(path) for path in (NIIVUE, FOLDER / "viewer.js")]
    return make_page(shown.title, body, scripts, [read_text(FOLDER / "viewer.css")], data)


def describe_grid(shape: Sequence[int], size: Sequence[int], spacing_mm: Sequence[float], full: bool) -> str:
    """Return in a sentence how much of the scan the page holds."""
    numbers = " x ".join(map(str, shape)), " x ".join(f"{mm:.3g}" for mm in spacing_mm)
    scan = f"CT of {numbers[0]} voxels of {numbers[1]} mm"
    if full:
        return f"{scan}, shown in full."
    grid = "" if tuple(size) == tuple(shape) else f"at {size[0]} x {size[1]} in-plane and "
    return f"{scan}, shown {grid}in steps of {HU_STEP} HU. Volumes are those of the whole label map."


def describe_organs(shown: Shown) -> list[dict]:
    """Return id, name and colour of each organ found, and for each label map its mL and a point in it, or None."""
    boxes = [ndimage.find_objects(labels, max_label=len(shown.organs) - 1) for labels in shown.label_maps.values()]
    described = []
    for organ in range(1, len(shown.organs)):
        sources = []
        for labels, found in zip(shown.label_maps.values(), boxes, strict=True):
            box = found[organ - 1]
            if box is None:
                sources.append(None)
                continue
            mask = labels[box] == organ
            place = inside(mask) + [cut.start for cut in box]
            ml = np.count_nonzero(mask) * shown.geometry.voxel_ml
            sources.append({"ml": float(ml), "mm": in_mm(shown.geometry, place)})
        if any(sources):
            described.append({"id": organ, "name": shown.organs[organ], "colour": rgb_of(organ), "sources": sources})
    return described


def inside(mask: np.ndarray) -> np.ndarray:
    """Return a voxel of a mask, (3,): in its largest axial slice, the one nearest to that slice's centre."""
    z = int(np.count_nonzero(mask, axis=(0, 1)).argmax())
    places = np.argwhere(mask[:, :, z])
    nearest = places[((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return np.array([*nearest, z])


def smaller_scan(voxels: np.ndarray, size: Sequence[int], full: bool) -> np.ndarray:
    """Return the scan as the page holds it: int16, at `size` and in steps of HU_STEP, or in full."""
    if full:
        return np.rint(voxels.clip(np.iinfo(np.int16).min, np.iinfo(np.int16).max)).astype(np.int16)
    resized = voxels if tuple(size) == voxels.shape else resize_image(np.ascontiguousarray(voxels), size)
    return (np.rint(resized.clip(*HU_RANGE) / HU_STEP) * HU_STEP).astype(np.int16)


def pack_volume(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """Return a volume in RAS+ order as the bytes of a .nii.gz file."""
    return gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), GZIP_LEVEL, mtime=0)


def pack_surfaces(meshes: dict[tuple[int, int], Mesh]) -> tuple[list[dict], bytes]:
    """Pack surfaces, given by label map and organ: return a list of each one's place in the bytes, and the bytes.

    Vertices are uint16 triples, a step a 65,535th of the organ's box; faces are uint32 triples.
    """
    parts, packed = [], b""
    for (source, organ), mesh in meshes.items():
        low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
        step = (high - low) / np.iinfo(np.uint16).max
        vertices = np.rint((mesh.vertices - low) / step).astype("<u2").tobytes()
        vertices += b"\0" * (-len(vertices) % 4)  # the faces start at a multiple of their size
        parts.append(
            {
                "source": source,
                "organ": organ,
                "vertices": len(mesh.vertices),
                "faces": len(mesh.faces),
                "start": len(packed),
                "faces_start": len(packed) + len(vertices),
                "low": low.tolist(),
                "step": step.tolist(),
            }
        )
        packed += vertices + mesh.faces.astype("<u4").tobytes()
    return parts, packed


def still_of_surfaces(meshes: dict[int, Mesh]) -> str:
    """Return the organs from the front, as a picture's data URL; black without any."""
    colour = render(Scene(meshes), view_at(0), STILL).colour if meshes else np.zeros((*STILL[::-1], 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(colour).save(picture, format="jpeg", quality=88)
    return data_url("image/jpeg", picture.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        if args.output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"{args.output}: a page's name must end with .html")
    shown, note = read_shown(args)
    with refusing(REFUSED):
        write_page(args.output, make_viewer(shown, args.full))
    print_written(args.output, note, f", {args.output.stat().st_size / 1e6:.1f} MB")
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = picture_parser("viewer", __doc__, "page to write: .html", "reference, to switch to")
    parser.add_argument("--full", action="store_true", help="hold every voxel and HU, however large the page gets")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
