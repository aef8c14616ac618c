"""All about one case on one page: movie, slices, table of organs, what to look at, and where it comes from.

    python -m visualization.report SCAN LABELS --output DIR
    python -m visualization.report SCAN PREDICTION --truth LABELS --checkpoint best.pt --output DIR

DIR/index.html holds its pictures and the movie, and leads to DIR/viewer.html beside it; DIR/report.json has the same in
numbers. `infer.py --report` writes one for each case, and a page that lists them.
"""

import argparse
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from core.checkpoint import load_checkpoint
from core.config import DEFAULT_CONFIG, config_to_dict, load_organs
from core.inference.output_folder import REPORT_NUMBERS, REPORT_PAGE, REPORTS, label_map_path
from core.scans.anatomy import PLAUSIBLE_ML, organs_in, remarks
from core.scans.geometry import Geometry
from core.scans.volumes import load_labels
from core.scoring.flare22 import TOLERANCE_MM, TOLERANCES_MM
from core.scoring.overlap import confusion_matrix, mean_defined, organ_scores
from core.scoring.surface import nsd, organ_surfaces
from core.system.exits import DONE, REFUSED, USAGE, print_error, print_warning, refusing, run_command
from core.system.files import whole_file
from core.training.run_folder import git_commit, versions
from visualization.movie import make_movie
from visualization.overlay import draw_comparison, draw_contact_sheet, draw_overlay
from visualization.page import data_url, escaped, make_page, write_page
from visualization.shown import Shown, read_shown, title_of
from visualization.style import organ_rules
from visualization.viewer import make_viewer

FRAMES, SIZE = 96, (960, 540)  # of the movie in a page
SLICES = 20  # axial ones on the sheet
VIEWER = "viewer.html"


def write_report(shown: Shown, folder: Path, provenance: dict[str, str]) -> Path:
    """Write the report of a case.

    Args:
        shown: scan and label maps: one, or `prediction` and `truth` in this order.
        folder: is made when missing.
        provenance: where the label map comes from, by what it is.

    Returns:
        the page.

    Raises:
        OSError: when it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"case": shown.title, "provenance": provenance} | describe(shown)
    write_page(folder / VIEWER, make_viewer(shown))
    write_page(folder / REPORT_PAGE, make_report(shown, facts))
    with whole_file(folder / REPORT_NUMBERS) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder / REPORT_PAGE


def describe(shown: Shown) -> dict:
    """What the page says in numbers and words: `remarks`, `organs` (a dict each), and `mean_dice` beside a truth."""
    labels, *truth = shown.label_maps.values()
    found = organs_in(labels, shown.geometry, shown.organs)
    scores = compare(labels, truth[0], shown) if truth else {}
    rows = []
    for organ, name in enumerate(shown.organs[1:], start=1):
        row = {"id": organ, "organ": name, "found": name in found}
        if name in found:
            of = found[name]
            row |= {"ml": of.ml, "pieces": len(of.pieces_ml), "cut": list(of.cut)}
        rows.append(row | {score: values[organ] for score, values in scores.items()})
    facts = {"remarks": remarks(found, shown.organs), "organs": rows}
    if truth:
        facts["mean_dice"] = defined(mean_defined(row["dice"] for row in rows if row["dice"] is not None)[0])
    return facts


def compare(prediction: np.ndarray, truth: np.ndarray, shown: Shown) -> dict[str, list[float | None]]:
    """Volume in the truth, Dice and NSD by id, background first; None where not defined."""
    matrix = confusion_matrix(truth, prediction, len(shown.organs))
    surfaces = organ_surfaces(truth, prediction, len(shown.organs), shown.geometry.spacing_mm)
    tolerances_mm = [TOLERANCES_MM.get(name, TOLERANCE_MM) for name in shown.organs]
    return {
        "truth_ml": (matrix.sum(axis=1) * shown.geometry.voxel_ml).tolist(),
        "dice": [defined(value) for value in organ_scores(matrix)["dice"]],
        "nsd": [None, *(defined(nsd(both, mm)) for both, mm in zip(surfaces, tolerances_mm[1:], strict=True))],
    }


def defined(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return None if np.isnan(value) else float(value)


# ---- The page --------------------------------------------------------------------------------------------------------


def make_report(shown: Shown, facts: dict) -> str:
    """The page of a case, HTML."""
    body = f"""<header>
<h1>{escaped(shown.title)}</h1>
<p class="quiet">{escaped(describe_scan(shown))}</p>
<p class="no-print"><a href="{VIEWER}">Open the viewer</a>: slices in three planes and organs that turn.</p>
</header>
<h2>To look at</h2>
{flags(facts["remarks"])}
<h2>Organs</h2>
<div class="scroll">{organ_table(facts)}</div>
<h2>Slices</h2>
{slices(shown)}
<h2>In 3-D</h2>
{movie(shown)}
<h2>Where it comes from</h2>
<table>{
        "".join(
            f'<tr><td>{escaped(name)}</td><td class="text">{escaped(value)}</td></tr>'
            for name, value in facts["provenance"].items()
        )
    }</table>
<p class="quiet">Not a medical device. Plausible volumes are wide ranges of adults: what lies outside is worth a look,
not wrong.</p>"""
    return make_page(shown.title, body, styles=[organ_rules(len(shown.organs))])


def describe_scan(shown: Shown) -> str:
    """The scan's size, in words."""
    voxels, spacing_mm, extent_mm = (
        " x ".join(f"{n:.3g}" for n in numbers)
        for numbers in (shown.voxels.shape, shown.geometry.spacing_mm, shown.geometry.extent_mm)
    )
    return f"CT of {voxels} voxels of {spacing_mm} mm: {extent_mm} mm"


def flags(said: Sequence[str]) -> str:
    """What to look at, as a list."""
    if not said:
        return "<p>Nothing stands out.</p>"
    return f'<ul class="flags">{"".join(f"<li>{escaped(remark)}</li>" for remark in said)}</ul>'


def organ_table(facts: dict) -> str:
    """Organs with volume, plausible range, pieces and ends; with the scores beside a truth."""
    compared = "mean_dice" in facts
    heading = ["organ", "mL", "plausible", "pieces", "cut by the scan's"]
    heading += ["truth mL", "Dice", "NSD"] if compared else []
    lines = []
    for row in facts["organs"]:
        low, high = PLAUSIBLE_ML.get(row["organ"], (None, None))
        cells = [
            number(row.get("ml"), 1) if row["found"] else "not found",
            "" if low is None else f"{low:g} to {high:g}",
            str(row.get("pieces", "")),
            ", ".join(row.get("cut", ())),
        ]
        cells += [number(row["truth_ml"], 1), number(row["dice"], 3), number(row["nsd"], 3)] if compared else []
        name = f'<td><span class="swatch organ-{row["id"]}"></span>{escaped(row["organ"])}</td>'
        lines.append(f"<tr>{name}{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
    if compared:
        mean = ["mean over organs", "", "", "", "", "", number(facts["mean_dice"], 3), ""]
        lines.append(f"<tr>{''.join(f'<th>{cell}</th>' for cell in mean)}</tr>")
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in heading)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def number(value: float | None, places: int) -> str:
    """A number for the table; a dash where it is not defined."""
    return "–" if value is None else f"{value:,.{places}f}"  # noqa: RUF001


def slices(shown: Shown) -> str:
    """The slices as pictures: three planes, beside the truth where there is one, and a sheet of axial ones."""
    labels, *truth = shown.label_maps.values()
    about = (shown.geometry.spacing_mm, shown.organs, shown.title)
    if truth:
        main = draw_comparison(shown.voxels, labels, *truth, *about, shown.geometry.voxel_ml)
        text = "prediction, truth and errors in three planes"
    else:
        main = draw_overlay(shown.voxels, labels, *about, shown.geometry.voxel_ml)
        text = "axial, coronal and sagittal slice with the organs"
    sheet = draw_contact_sheet(shown.voxels, labels, *about, SLICES, shown.geometry.voxel_ml)
    return (
        f'<p><img alt="{text}" src="{picture(main)}"></p>'
        f'<details><summary>Axial slices</summary><img alt="axial slices" src="{picture(sheet)}"></details>'
    )


def picture(figure: Figure) -> str:
    """A figure as an address that holds it."""
    content = io.BytesIO()
    figure.savefig(content, format="webp")
    return data_url("image/webp", content.getvalue())


def movie(shown: Shown) -> str:
    """The organs turning, or a word that there are none."""
    if not any(labels.any() for labels in shown.label_maps.values()):
        return "<p>No organ to show.</p>"
    label_maps = shown.label_maps if len(shown.label_maps) > 1 else {"": next(iter(shown.label_maps.values()))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "organs.mp4"
        chosen = range(1, len(shown.organs))
        make_movie(shown.title, shown.geometry, label_maps, path, shown.organs, chosen, FRAMES, SIZE)
        content = path.read_bytes()
    return (
        f'<video controls loop muted autoplay playsinline width="{SIZE[0]}" height="{SIZE[1]}" '
        f'src="{data_url("video/mp4", content)}"></video>'
    )


# ---- All cases -------------------------------------------------------------------------------------------------------


def write_reports(
    output: Path,
    cases: dict[str, Path],
    read: Callable[[Path], tuple[np.ndarray, Geometry]],
    organs: Sequence[str],
    provenance: dict[str, str],
) -> list[str]:
    """Write the reports of predictions, for `write_index` to list.

    Args:
        output: the folder with the label maps; the reports go into its folder REPORTS.
        cases: the scans by case.
        read: reads a scan.
        organs: names by id, background first.
        provenance: what the cases have in common.

    Returns:
        the cases without a report, each of which stderr names with the reason.
    """
    failed = []
    for case, file in tqdm(cases.items(), desc="reports", disable=None):
        try:
            voxels, geometry = read(file)
            labels, _ = load_labels(label_map_path(output, case), len(organs))
            shown = Shown(title_of(case), voxels, geometry, {"prediction": labels}, organs)
            write_report(shown, output / REPORTS / case, {"scan": file.name} | provenance)
        except (ValueError, OSError, MemoryError) as error:
            print_error(ValueError(f"case {case}: no report: {error or type(error).__name__}"))
            failed.append(case)
    return failed


def write_index(folder: Path) -> Path:
    """Write the page that lists the reports in a folder, by what their report.json says.

    Returns:
        the page.

    Raises:
        OSError: when a report cannot be read, or the page not be written.
    """
    lines = []
    for path in sorted(folder.glob(f"*/{REPORT_NUMBERS}")):
        try:
            lines.append(index_row(path.parent.name, json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            print_warning(f"{path}: is no report of this program ({type(error).__name__}); left out of the list")
    head = "<tr><th>case</th><th>organs</th><th>mean Dice</th><th class='text'>to look at</th></tr>"
    body = (
        f"<h1>{len(lines)} {'case' if len(lines) == 1 else 'cases'}</h1>"
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
    write_page(folder / REPORT_PAGE, make_page("Reports", body))
    return folder / REPORT_PAGE


def index_row(folder: str, facts: dict) -> str:
    """The list's row for a report, by the name of its folder and what its report.json says."""
    found = sum(row["found"] for row in facts["organs"])
    return (
        f'<tr><td><a href="{quote(os.fsencode(folder))}/{REPORT_PAGE}">{escaped(facts["case"])}</a></td>'
        f"<td>{found} of {len(facts['organs'])}</td>"
        f"<td>{number(facts['mean_dice'], 3) if 'mean_dice' in facts else ''}</td>"
        f'<td class="text">{"<br>".join(escaped(remark) for remark in facts["remarks"])}</td></tr>'
    )


def provenance_of(checkpoints: Sequence[str | Path], content: dict) -> dict[str, str]:
    """Where a prediction comes from: checkpoints, the training of the first, whose `content` is given, and versions."""
    config = config_to_dict(content["config"])
    epochs = content.get("epoch", "an unknown number")
    settings = ", ".join(
        f"{key} {config[key]}" for key in ("size", "window_hu", "channels", "norm", "loss", "learning_rate")
    )
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
        organs = load_organs(args.config)
        provenance = {"scan": args.scan.name, "label map": args.labels.name}
        if args.truth:
            provenance["truth"] = args.truth.name
        if args.checkpoint:
            provenance |= provenance_of([args.checkpoint], load_checkpoint(args.checkpoint))
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"{args.output}: is a file, expected a folder to write the report into")
    with refusing(REFUSED):
        label_maps = {"labels": args.labels} if args.truth is None else {"prediction": args.labels, "truth": args.truth}
        page = write_report(read_shown(args.scan, label_maps, organs), args.output, provenance)
    print(f"wrote {page}")
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m visualization.report", description=__doc__.splitlines()[0])
    parser.add_argument("scan", type=Path, help="CT scan, NIfTI")
    parser.add_argument("labels", type=Path, help="its label map, NIfTI")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the report into")
    parser.add_argument("--truth", type=Path, metavar="LABELS", help="compare with this label map")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="that made the label map, to be named")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings that name the organs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
