"""The reports of all cases that infer.py has segmented, and the page that lists them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from core.inference.output_files import REPORT_NUMBERS, REPORT_PAGE, REPORTS, label_map_path
from core.inference.volumes_table import read_volumes
from core.scans.geometry import Geometry
from core.scans.nifti import Reading
from core.scans.volumes import DEFAULT_READING
from core.system.exits import CtrlC, print_error, print_warning
from core.system.files import read_text
from visualization.page import escaped, make_page, write_page
from visualization.report import number, write_report
from visualization.shown import Shown, read_label_maps, title_of


def write_reports(
    output: Path,
    cases: dict[str, Path],
    read: Callable[[Path], tuple[np.ndarray, Geometry]],
    organs: Sequence[str],
    provenance: dict[str, str],
    reading: Reading = DEFAULT_READING,
    taught: Sequence[str] | None = None,
) -> list[str]:
    """Write the reports of predictions, for `write_index` to list.

    Args:
        output: the folder with the label maps; the reports go into its folder REPORTS.
        cases: the scans by case.
        read: reads a scan.
        organs: names by id, background first.
        provenance: origin of the label maps, common to all cases.
        reading: options for reading the label maps.
        taught: the organs that the network was taught; None: not known.

    Returns:
        the cases without a report; each is named on stderr with the reason.
    """
    failed, volumes = [], read_volumes(output)
    for case, file in tqdm(cases.items(), desc="reports", disable=None):
        CtrlC.check()
        try:
            voxels, geometry = read(file)
            label_maps = read_label_maps({"prediction": label_map_path(output, case)}, geometry, organs, reading)
            ends = {row["organ"]: row.get("touches_edge", "").split() for row in volumes if row["case"] == case}
            shown = Shown(title_of(case), voxels, geometry, label_maps, organs, taught, ends)
            write_report(shown, output / REPORTS / case, {"scan": file.name} | provenance)
        except (ValueError, OSError, MemoryError) as error:
            print_error(ValueError(f"case {case}: no report: {error or type(error).__name__}"))
            failed.append(case)
    return failed


def write_index(folder: Path) -> Path:
    """Write the page that lists the reports in a folder, from their report.json.

    Returns:
        the page.

    Raises:
        OSError: when a report cannot be read, or the page not be written.
    """
    lines = []
    for path in sorted(folder.glob(f"*/{REPORT_NUMBERS}")):
        try:
            lines.append(index_row(path.parent.name, json.loads(read_text(path))))
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
    """Return the row of the list for a report, from the name of its folder and its report.json."""
    found = sum(row["found"] for row in facts["organs"])
    return (
        f'<tr><td><a href="{quote(os.fsencode(folder))}/{REPORT_PAGE}">{escaped(facts["case"])}</a></td>'
        f"<td>{found} of {len(facts['organs'])}</td>"
        f"<td>{number(facts['mean_dice'], 3) if 'mean_dice' in facts else ''}</td>"
        f'<td class="text">{"<br>".join(escaped(remark) for remark in facts["remarks"])}</td></tr>'
    )
