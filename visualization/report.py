"""A report on one case in one page: movie, slices, table of organs, remarks, and origin of the label map.

    python -m visualization.report SCAN LABELS --output DIR
    python -m visualization.report SCAN PREDICTION --reference LABELS --checkpoint best.pt --output DIR

DIR/index.html holds the pictures and the movie, and links to DIR/viewer.html; DIR/report.json holds the numbers.
`infer.py --report` writes one for each case (visualization/reports.py). --checkpoint names the organs, and the network
in the report.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from core.checkpoint import load_checkpoint
from core.config import config_to_dict
from core.inference.output_files import REPORT_NUMBERS, REPORT_PAGE, REPORT_VIEWER
from core.scans.anatomy import ends_beyond, organs_in, plausible_ml, remarks, rounded, volume_text
from core.scoring.flare22 import TOLERANCE_MM, tolerance_mm
from core.scoring.overlap import confusion_matrix, mean_defined, organ_scores
from core.scoring.surface import nsd, organ_surfaces
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.system.files import read_text
from core.system.provenance import git_commit, versions
from visualization.comparison import draw_comparison
from visualization.movie import make_movie
from visualization.overlay import draw_contact_sheet, draw_overlay
from visualization.page import FOLDER, data_url, escaped, make_page, write_page
from visualization.shown import Shown, picture_parser, print_written, read_shown
from visualization.style import figure_url, organ_rules
from visualization.viewer import make_viewer

FRAMES, SIZE = 96, (960, 540)  # of the movie in a page
SLICES = 20  # axial ones on the sheet


def write_report(shown: Shown, folder: Path, provenance: dict[str, str]) -> Path:
    """Write the report of a case.

    Args:
        shown: scan and label maps: one, or `prediction` and `reference` in this order.
        folder: is made when missing.
        provenance: origin of the label map: values by name.

    Returns:
        the page.

    Raises:
        OSError: when it cannot be written.
    """
    facts = {"case": shown.title, "provenance": provenance} | describe(shown)
    write_page(folder / REPORT_VIEWER, make_viewer(shown))
    write_page(folder / REPORT_PAGE, make_report(shown, facts))
    write_page(folder / REPORT_NUMBERS, json.dumps(facts, indent=2) + "\n", "report")
    return folder / REPORT_PAGE


def describe(shown: Shown) -> dict:
    """Return the content of report.json: `remarks`, `organs` (a dict each), and `mean_dice` with a reference."""
    labels, *reference = shown.label_maps.values()
    found = organs_in(labels, shown.geometry, shown.organs)
    scores = compare(labels, reference[0], shown) if reference else {}
    rows = []
    for organ, name in enumerate(shown.organs[1:], start=1):
        row = {"id": organ, "organ": name, "found": name in found}
        if shown.taught is not None:
            row["taught"] = name in shown.taught
        if name in found:
            of = found[name]
            row |= {"ml": of.ml, "pieces": len(of.pieces_ml), "cut": list(of.cut)}
            known = (*of.cut, *ends_beyond(name))
            row["cut_by_box"] = [end for end in shown.box_ends.get(name, ()) if end not in known]
        rows.append(row | {score: values[organ] for score, values in scores.items()})
    expected = [name for name in shown.organs if shown.taught is None or name in (shown.organs[0], *shown.taught)]
    said = remarks(found, expected)
    said += [
        f"{row['organ']} cut by the {' and the '.join(row['cut_by_box'])} of the part of the scan that was segmented"
        for row in rows
        if row.get("cut_by_box")
    ]
    facts = {"remarks": said, "organs": rows}
    if reference:
        facts["mean_dice"] = defined(mean_defined(row["dice"] for row in rows if row["dice"] is not None)[0])
    return facts


def compare(prediction: np.ndarray, reference: np.ndarray, shown: Shown) -> dict[str, list[float | None]]:
    """Return volume in the reference, Dice and NSD by id, background first; None when not defined."""
    matrix = confusion_matrix(reference, prediction, len(shown.organs))
    surfaces = organ_surfaces(reference, prediction, len(shown.organs), shown.geometry.spacing_mm)
    tolerances_mm = [tolerance_mm(name, TOLERANCE_MM) for name in shown.organs]
    return {
        "truth_ml": (matrix.sum(axis=1) * shown.geometry.voxel_ml).tolist(),
        "dice": [defined(value) for value in organ_scores(matrix)["dice"]],
        "nsd": [None, *(defined(nsd(both, mm)) for both, mm in zip(surfaces, tolerances_mm[1:], strict=True))],
    }


def defined(value: float) -> float | None:
    """Return a number for JSON, which knows no NaN."""
    return None if np.isnan(value) else float(value)


# ---- The page --------------------------------------------------------------------------------------------------------


def make_report(shown: Shown, facts: dict) -> str:
    """Return the page of a case, HTML."""
    rows = [f'<tr><td>{escaped(k)}</td><td class="text">{escaped(v)}</td></tr>' for k, v in facts["provenance"].items()]
    body = Template(read_text(FOLDER / "report.html")).substitute(
        title=escaped(shown.title),
        about=escaped(describe_scan(shown)),
        viewer=REPORT_VIEWER,
        remarks=flags(facts["remarks"]),
        organs=organ_table(facts),
        slices=slices(shown),
        movie=movie(shown),
        provenance="".join(rows),
    )
    return make_page(shown.title, body, styles=[organ_rules(len(shown.organs))])


def describe_scan(shown: Shown) -> str:
    """Return the scan's size, in words."""
    voxels, spacing_mm, extent_mm = (
        " x ".join(map(rounded, numbers))
        for numbers in (shown.voxels.shape, shown.geometry.spacing_mm, shown.geometry.extent_mm)
    )
    return f"CT of {voxels} voxels of {spacing_mm} mm: {extent_mm} mm"


def flags(said: Sequence[str]) -> str:
    """Return the remarks, as an HTML list."""
    if not said:
        return "<p>Nothing stands out.</p>"
    return f'<ul class="flags">{"".join(f"<li>{escaped(remark)}</li>" for remark in said)}</ul>'


def organ_table(facts: dict) -> str:
    """Return the table of organs: volume, plausible range, pieces and ends; with the scores when compared."""
    compared = "mean_dice" in facts
    heading = ["organ", "mL", "plausible", "pieces", "cut by the scan's"]
    heading += ["reference mL", "Dice", "NSD"] if compared else []
    lines = []
    for row in facts["organs"]:
        low, high = plausible_ml(row["organ"]) or (None, None)
        cells = [
            volume_text(row["ml"]) if row["found"] else "not found" if row.get("taught", True) else "not taught",
            "" if low is None else f"{low:g} to {high:g}",
            str(row.get("pieces", "")),
            ", ".join(row.get("cut", ())),
        ]
        cells += [volume_text(row["truth_ml"]), number(row["dice"], 3), number(row["nsd"], 3)] if compared else []
        name = f'<td><span class="swatch organ-{row["id"]}"></span>{escaped(row["organ"])}</td>'
        lines.append(f"<tr>{name}{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
    if compared:
        mean = ["mean over organs", "", "", "", "", "", number(facts["mean_dice"], 3), ""]
        lines.append(f"<tr>{''.join(f'<th>{cell}</th>' for cell in mean)}</tr>")
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in heading)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def number(value: float | None, places: int) -> str:
    """Return a number for the table; a dash when it is not defined."""
    return "–" if value is None else f"{value:,.{places}f}"  # noqa: RUF001


def slices(shown: Shown) -> str:
    """Return the slices as pictures: three planes, compared when there is a reference, and a sheet of axial slices."""
    if len(shown.label_maps) > 1:
        main, text = draw_comparison(shown), "prediction, reference and errors in three planes"
    else:
        main, text = draw_overlay(shown), "axial, coronal and sagittal slice with the organs"
    sheet = draw_contact_sheet(shown, SLICES)
    return (
        f'<p><img alt="{text}" src="{figure_url(main)}"></p>'
        f'<details><summary>Axial slices</summary><img alt="axial slices" src="{figure_url(sheet)}"></details>'
    )


def movie(shown: Shown) -> str:
    """Return the movie of the organs, or a sentence that there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "organs.mp4"
        try:
            make_movie(shown, path, range(1, len(shown.organs)), FRAMES, SIZE)
        except ValueError:  # no organ, or only specks without a surface
            return "<p>No organ to show.</p>"
        content = path.read_bytes()
    return (
        f'<video controls loop muted autoplay playsinline width="{SIZE[0]}" height="{SIZE[1]}" '
        f'src="{data_url("video/mp4", content)}"></video>'
    )


def provenance_of(checkpoints: Sequence[str | Path], content: dict) -> dict[str, str]:
    """Return a prediction's origin: checkpoints, the first one's training (its `content` is given), and versions."""
    config = config_to_dict(content["config"])
    epochs = content.get("epoch", "an unknown number")
    shown = ("size", "patch_size", "window_hu", "channels", "norm", "loss", "learning_rate")
    settings = ", ".join(f"{key} {config[key]}" for key in shown if config[key] is not None)
    return {
        "checkpoint": ", ".join(str(path) for path in checkpoints),
        "trained": f"{epochs} of {config['epochs']} epochs",
        "settings": settings,
        "commit": git_commit() or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        provenance = {"scan": args.scan.name, "label map": args.labels.name}
        if args.reference:
            provenance["reference"] = args.reference.name
        if args.checkpoint:
            provenance |= provenance_of([args.checkpoint], load_checkpoint(args.checkpoint))
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"{args.output}: is a file, expected a folder to write the report into")
    shown, note = read_shown(args)
    with refusing(REFUSED):
        page = write_report(shown, args.output, provenance)
    print_written(page, note)
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = picture_parser("report", __doc__, "folder to write the report into", "compare with this reference")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
