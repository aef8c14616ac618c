"""The organs of a scan, turning once around the body axis, as a movie.

    python -m visualization.movie SCAN LABELS --output organs.mp4
    python -m visualization.movie SCAN PREDICTION --reference LABELS --output both.mp4
    python -m visualization.movie SCAN LABELS --context --output in_the_body.mp4
    python -m visualization.movie SCAN LABELS --organs "left kidney" "right kidney" --output kidneys.gif

The first frame is seen from the front, so the patient's right is at the picture's left.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.scans.anatomy import volume_text
from core.scoring.organ_list import choose_scored
from core.scoring.tables import shorten
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.system.files import whole_file
from visualization.fonts import drawable, drawable_organs, font_file
from visualization.meshes import context_meshes, organ_mesh
from visualization.render import Scene, Veil, View, backdrop, fitting_scale, render, view_at
from visualization.shown import Shown, picture_parser, print_written, read_shown
from visualization.style import INK, rgb_of

FRAMES, SIZE, FRAMES_A_SECOND = 120, (1280, 720), 24
BONES, SKIN = (0.5, 0.5), (0.04, 0.6)  # opacity of the surroundings: facing the camera, and edge on
CRF = 20  # of H.264: lower is better and larger
LEGEND = 0.27  # share of the width, at the right
MARGIN, LINE, TEXT, HEADING = 0.05, 0.044, 0.024, 0.028  # shares of the height
MARK = 0.055  # radius of the orientation mark, share of the height
MOVIES = (".mp4", ".gif")


@cache
def font(pixels: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return a font that has a text's letters, at a height in pixels."""
    return ImageFont.truetype(font_file(text), pixels)


def make_scene(labels: np.ndarray, chosen: Sequence[int], affine: np.ndarray) -> Scene | None:
    """Return the chosen organs of a label map as surfaces; None when it has none of them."""
    meshes = {organ: organ_mesh(labels, organ, affine) for organ in chosen}
    found = {organ: mesh for organ, mesh in meshes.items() if mesh is not None}
    return Scene(found) if found else None


def make_veils(voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> list[Veil]:
    """Return bones and skin of a scan, to be drawn faintly."""
    meshes = zip(context_meshes(voxels, labels, affine), (BONES, SKIN), strict=True)
    return [Veil(Scene({1: mesh}), *opacity) for mesh, opacity in meshes if mesh is not None]


def draw_frames(
    panels: dict[str, Scene | None], background: Image.Image, frames: int, veils: Sequence[Veil] = ()
) -> Iterator[np.ndarray]:
    """Draw one turn: (H, W, 3) uint8 pictures, the first from the front.

    Args:
        panels: by title, drawn side by side at one scale left of the legend; None is an empty panel.
        background: backdrop and legend, the same in every frame.
        frames: number of frames.
        veils: surfaces that the organs are seen through.
    """
    width, height = background.size
    size = int(width * (1 - LEGEND)) // len(panels), height
    scenes = [*(veil.scene for veil in veils), *(scene for scene in panels.values() if scene)]
    for scene in scenes:  # the same place of the patient in the middle of every panel
        scene.centre_on(scenes[-1].centre)
    scale = max(fitting_scale(scene, size) for scene in scenes)
    for number in range(frames):
        view, picture = view_at(360 * number / frames), background.copy()
        for place, (title, scene) in enumerate(panels.items()):
            left = place * size[0]
            if scene:
                picture.paste(Image.fromarray(render(scene, view, size, scale, veils).colour), (left, 0))
            draw = ImageDraw.Draw(picture)
            draw.text((left + MARGIN * height, MARGIN * height), title, INK, font(round(HEADING * height)), "lm")
        draw_mark(ImageDraw.Draw(picture), view, height)
        yield np.asarray(picture)


def draw_mark(draw: ImageDraw.ImageDraw, view: View, height: int) -> None:
    """Draw the patient's axes at the lower left: right, left, front (A), back (P), head (S), feet (I)."""
    radius, letters = MARK * height, font(round(TEXT * height))
    x, y = MARGIN * height + radius, height * (1 - MARGIN) - radius
    ends = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    for letter, axis in sorted(ends.items(), key=lambda end: np.dot(end[1], view.back)):
        near = np.dot(axis, view.back)
        if not -0.3 < near < 0.8:  # it would hide the centre, or be hidden by the letter of another axis
            continue
        tip = x + radius * np.dot(axis, view.right), y - radius * np.dot(axis, view.up)
        gray = round(165 + 80 * near)
        draw.line([(x, y), (x + (tip[0] - x) * 0.7, y + (tip[1] - y) * 0.7)], (gray,) * 3, max(1, height // 360))
        draw.text(tip, letter, (gray,) * 3, letters, "mm")


def draw_background(size: tuple[int, int], title: str, rows: Sequence[tuple[int, str, list[float]]]) -> Image.Image:
    """Backdrop and legend: colour, name and volumes in mL of the organs.

    Args:
        size: width and height in pixels.
        title: above the legend.
        rows: id, name and the volume in each label map, of every organ to list.
    """
    width, height = size
    picture = Image.fromarray(np.round(255 * backdrop(size)).astype(np.uint8))
    draw, title = ImageDraw.Draw(picture), drawable(title)
    left, right, y = width * (1 - LEGEND), width - MARGIN * height, MARGIN * height
    heading = font(round(HEADING * height), title)
    draw.text((left, y), fitted(title, heading, right - left), INK, heading, "lm")
    y += 1.5 * LINE * height
    line = min(LINE * height, (height - MARGIN * height - y) / len(rows))  # lower where organs are many
    pixels = max(1, round(TEXT / LINE * line))
    letters = font(pixels)
    draw.text((right, y), "mL" if len(rows[0][2]) == 1 else "mL / reference", INK, letters, "rm")
    for organ, name, volumes_ml in rows:
        y += line
        colour, half = rgb_of(organ), 0.3 * line
        draw.rounded_rectangle((left, y - half, left + 2 * half, y + half), half / 2, colour)
        volumes = " / ".join(f"{ml:,.0f}" if ml >= 10 else volume_text(ml) for ml in volumes_ml)
        draw.text((right, y), volumes, INK, letters, "rm")
        room, of_name = right - left - 1.5 * line - letters.getlength(volumes), font(pixels, name)
        draw.text((left + line, y), fitted(name, of_name, room), INK, of_name, "lm")
    return picture


def fitted(text: str, letters: ImageFont.FreeTypeFont, width: float) -> str:
    """Return a text that is cut in its middle where it is wider than so many pixels."""
    cuts = (shorten(text, count) for count in range(len(text), 2, -1))
    return next((cut for cut in cuts if letters.getlength(cut) <= width), text[:1])


def write_movie(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int]) -> None:
    """Write frames as H.264 in .mp4, or as an endless .gif; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".gif":
            # The default palette of 256 colours goes by area, and leaves out the colours of small organs.
            first, *rest = (Image.fromarray(frame).quantize(method=Image.Quantize.MAXCOVERAGE) for frame in frames)
            first.save(temporary, append_images=rest, duration=round(1000 / FRAMES_A_SECOND), loop=0)
            return
        try:  # ffmpeg takes a relative path with a colon for an address
            write_h264(temporary.absolute(), frames, size)
        except (OSError, RuntimeError) as error:  # both carry pages of ffmpeg's output
            raise OSError(f"{path}: ffmpeg could not write it whole; is the disk full?") from error


def write_h264(path: Path, frames: Iterator[np.ndarray], size: tuple[int, int]) -> None:
    """Write frames by ffmpeg and count them again, since it ends without an error when the disk is full.

    Raises:
        OSError, RuntimeError: when some are missing.
    """
    writer = imageio_ffmpeg.write_frames(
        str(path),
        size,
        fps=FRAMES_A_SECOND,
        codec="libx264",
        quality=None,
        macro_block_size=2,
        ffmpeg_log_level="quiet",
        output_params=["-crf", str(CRF), "-movflags", "+faststart"],
    )
    sent = 0
    with closing(writer):
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
            sent += 1
    written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    if written != sent:
        raise OSError(f"{written} of {sent} frames are there")


def make_movie(
    shown: Shown,
    output: Path,
    chosen: Sequence[int],
    frames: int = FRAMES,
    size: tuple[int, int] = SIZE,
    context: bool = False,
) -> None:
    """Make the movie of a case.

    Args:
        shown: scan and label maps, one, or prediction and reference side by side.
        output: .mp4 or .gif.
        chosen: ids of the organs to show.
        frames: of one turn.
        size: width and height in pixels.
        context: True to show the scan's skin and bones faintly.

    Raises:
        OSError, ValueError: when it cannot be written, or no label map has an organ to show.
    """
    label_maps, geometry, affine = shown.label_maps, shown.geometry, shown.geometry.ras_affine
    titles = label_maps if len(label_maps) > 1 else [""]
    panels = {
        name: make_scene(labels, chosen, affine) for name, labels in zip(titles, label_maps.values(), strict=True)
    }
    if not any(panels.values()):
        raise ValueError(f"{shown.title}: has none of the organs to show, expected one at least")
    counts = [np.bincount(labels.ravel(), minlength=len(shown.organs)) for labels in label_maps.values()]
    names = drawable_organs(shown.organs)
    rows = [(organ, names[organ], [count[organ] * geometry.voxel_ml for count in counts]) for organ in chosen]
    rows = [row for row in rows if any(row[2])]
    labels = np.maximum.reduce(list(label_maps.values()))  # the union of the organs
    veils = make_veils(shown.voxels, labels, affine) if context else []
    write_movie(output, draw_frames(panels, draw_background(size, shown.title, rows), frames, veils), size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        if args.output.suffix.lower() not in MOVIES:
            raise ValueError(f"{args.output}: a movie's name must end with one of {', '.join(MOVIES)}")
        if args.frames < 1:
            raise ValueError(f"--frames: got {args.frames}, expected 1 or more")
        if min(args.size) < 64 or any(pixels % 2 for pixels in args.size):
            raise ValueError(f"--size: got {args.size[0]} {args.size[1]}, expected two even numbers of 64 or more")
    shown, note = read_shown(args)
    with refusing(USAGE):
        chosen = choose_scored(args.organs, shown.organs)
    with refusing(REFUSED):
        make_movie(shown, args.output, chosen, args.frames, tuple(args.size), args.context)
    print_written(args.output, note)
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = picture_parser("movie", __doc__, "movie to write: .mp4 or .gif", "reference, drawn beside the label map")
    parser.add_argument("--context", action="store_true", help="show skin and bones faintly around the organs")
    parser.add_argument("--organs", nargs="+", metavar="NAME", help="the organs to show (default: all)")
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=f"of one turn (default: {FRAMES})")
    parser.add_argument(
        "--size", type=int, nargs=2, default=SIZE, metavar=("W", "H"), help="pixels (default: 1280 720)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
