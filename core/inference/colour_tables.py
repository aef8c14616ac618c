"""Organ names and colours beside the label maps, for programs that do not read them from the label maps themselves."""

from collections.abc import Sequence

from core.scans.organ_colours import rgb_of

SLICER, ITK_SNAP = "organs.ctbl", "organs.label"


def colour_tables(organs: Sequence[str]) -> dict[str, str]:
    """Return the text of organs.ctbl for 3D Slicer and organs.label for ITK-SNAP, by file name.

    Args:
        organs: names by id, background first.
    """
    return {SLICER: slicer_table(organs), ITK_SNAP: itk_snap_table(organs)}


def slicer_table(organs: Sequence[str]) -> str:
    """Return a color table of 3D Slicer: id, name without blanks, red, green, blue, opacity."""
    lines = [f"# Color table file {SLICER}\n# {len(organs)} values", "0 background 0 0 0 0"]
    for organ, name in enumerate(organs[1:], start=1):
        lines.append(f"{organ} {'_'.join(name.split())} {' '.join(map(str, rgb_of(organ)))} 255")
    return "\n".join(lines) + "\n"


def itk_snap_table(organs: Sequence[str]) -> str:
    """Return a label description file of ITK-SNAP: id, red, green, blue, opacity, visible, in the mesh, name."""
    lines = ["# ITK-SnAP Label Description File", '0 0 0 0 0 0 0 "Clear Label"']
    for organ, name in enumerate(organs[1:], start=1):
        quoted = " ".join(name.split()).replace('"', "'")
        lines.append(f'{organ} {" ".join(map(str, rgb_of(organ)))} 1 1 1 "{quoted}"')
    return "\n".join(lines) + "\n"
