"""The output folder of infer.py: label maps, what is written beside each, and tables of all cases.

Every file is replaced whole, and one process at a time changes a table, so several may share a folder. A case's files
are moved to their places together, when all of them are on the disk: the label map, which shows that the case is done,
last. They are renamed when the case fails.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np
from torch import Tensor

from core.inference import output_files
from core.inference.colour_tables import colour_tables
from core.inference.dicom_seg import write_segmentation
from core.inference.dicom_source import read_sources
from core.inference.inputs import named_case
from core.inference.measures import measure_organs
from core.inference.rtstruct import write_structures
from core.inference.stages import Segmentation
from core.inference.volumes_table import VOLUMES_LOCK, read_volumes, write_volumes
from core.scans.dicom_series import read_series_geometry
from core.scans.files import listed
from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import Reading
from core.scans.organ_names import NETWORK, SCAN, read_entries, read_network
from core.scans.volumes import is_as_made, read_geometry, save_label_map, save_probabilities
from core.system.exits import print_error, print_warning
from core.system.files import check_room, locked, read_text, remove_left_over, rename_old, whole_file, write_text

MARK_BYTES = 2**16  # of a scan's file, which tell it from others
PROBABILITY_BYTES = 2  # for each voxel and class, in the temporary file from which they are compressed


@dataclass(frozen=True)
class OutputFolder:
    """The folder that results are written to.

    Attributes:
        path: the folder; `prepare` makes it.
        extras: the flags of what is written beside the label maps, of EXTRAS.
        report: whether the cases get reports, after the label maps.
        series: the DICOM series that is asked for, UID or UID:N; None: the only one.
    """

    path: Path
    extras: Collection[str] = ()
    report: bool = False
    series: str | None = None

    def prepare(self, cases: dict[str, Path], refused: Sequence[Path]) -> None:
        """Make the folder and check it before the work starts; without cases nothing is made.

        Args:
            cases: the scans by case id.
            refused: inputs that could not be read.

        Raises:
            OSError, ValueError: when nothing can be written there, results could replace inputs, or what is asked for
                needs a package that is not installed, or DICOM.
        """
        output_files.check_dicom_extras(self.extras, cases)
        output_files.check_inputs_are_elsewhere(
            self.path, [*cases.values(), *(path for path in refused if not path.is_dir())]
        )
        if cases:
            output_files.make_folder(self.path)
            output_files.check_paths_are_free(self.path, cases)

    def mark_of_options(self, drop_pieces: float) -> str:
        """Return what marks a network's fingerprint with the options that change a label map; "" for none of them."""
        return "+largest-piece" if drop_pieces == 1 else f"+pieces-{drop_pieces:g}" if drop_pieces else ""

    @property
    def reports(self) -> Path:
        """Return the path of the folder of reports."""
        return self.path / output_files.REPORTS

    def label_map(self, case: str) -> Path:
        """Return the path of a case's label map."""
        return output_files.label_map_path(self.path, case)

    def unfinished(self, cases: dict[str, Path], fingerprint: str, warn: bool = True) -> dict[str, Path]:
        """Return the cases without a label map on the scan's grid, or without what is wanted beside it.

        Args:
            cases: the scans by case id.
            fingerprint: of the networks that segment the others.
            warn: whether to name the label maps that are there but on another grid, or not known to be made by these
                networks.
        """
        finished = [case for case, scan in cases.items() if self.is_finished(case, scan, warn)]
        measured = {row["case"] for row in read_volumes(self.path)}
        if warn and not measured.issuperset(finished):
            lacking = listed([case for case in finished if case not in measured])
            print_warning(f"{self.path}: volumes.csv lacks {lacking}, whose label maps --skip-existing keeps")
        for what, others in self.not_made_by(finished, fingerprint).items() if warn else ():
            print_warning(
                f"{self.path}: {len(others)} of {len(finished)} label maps that --skip-existing keeps {what}: "
                f"{listed(others)}; leave it out to segment these again"
            )
        return {case: scan for case, scan in cases.items() if case not in finished}

    def not_made_by(self, finished: Sequence[str], fingerprint: str) -> dict[str, list[str]]:
        """Group cases whose label maps say another fingerprint, or none, by a description of that."""
        found: dict[str, list[str]] = {}
        for case in finished:
            try:
                network = read_network(self.label_map(case))
            except (OSError, ValueError):
                found.setdefault("cannot be read", []).append(case)
                continue
            if network != fingerprint:
                what = "are another network's" if network else "do not say which network made them"
                if network and network.partition("+")[0] == fingerprint.partition("+")[0]:
                    what = "are of other options (--drop-pieces, --locate)"
                found.setdefault(what, []).append(case)
        return found

    def is_finished(self, case: str, scan: Path, warn: bool = False) -> bool:
        """Return True when a case's label map exists, as one of its scan, and all that is wanted beside it."""
        wanted = [self.label_map(case), *(output_files.extra_path(self.path, case, flag) for flag in self.extras)]
        if not all(path.is_file() for path in wanted):
            return False
        difference = difference_from(scan, self.label_map(case), self.series)
        if difference and warn:
            print_warning(f"{difference}; --skip-existing does not keep a label map of another scan")
        return not difference

    def check(self, scan: Segmentation) -> None:
        """Refuse a scan, once it is read, whose results cannot be written as asked for.

        Raises:
            ValueError: when DICOM is wanted of a sheared series, or of one whose slices it cannot refer to.
        """
        wanted = sorted({output_files.SEGMENTATION, output_files.STRUCTURES} & {*self.extras})
        if wanted and scan.geometry.header["qform_code"] == 0:
            raise ValueError(
                "its slices are sheared (tilted gantry), which viewers show wrongly under DICOM segments and contours; "
                f"leave out {' and '.join(wanted)}"
            )
        if wanted:
            read_sources(scan.geometry.slices)

    def write(
        self, scan: Segmentation, logits: Tensor, labels: np.ndarray, organs: Sequence[str], network: str
    ) -> None:
        """Write a case's label map, what is wanted beside it, and the tables.

        Args:
            scan: the case.
            logits: (K, X, Y, Z) of its box.
            labels: (X, Y, Z) ids of the whole scan.
            organs: names by id, background first.
            network: fingerprint of the network and options.

        Raises:
            OSError: when a file cannot be written, or the disk has no room for the probabilities.
            ValueError: when a DICOM series lacks what is copied from it, or a table is another kind of table.
        """
        for path in output_files.case_files(self.path, scan.case):
            remove_left_over(path)
        with whole_file(self.label_map(scan.case)) as label_map, ExitStack() as moves:
            for flag in output_files.EXTRAS:
                path = output_files.extra_path(self.path, scan.case, flag)
                if flag not in self.extras:
                    rename_old(path, f"case {scan.case}: without {flag}")
                    continue
                temporary = moves.enter_context(whole_file(path))
                if flag == output_files.PROBABILITIES:
                    needed = PROBABILITY_BYTES * len(logits) * math.prod(scan.geometry.shape)
                    check_room(self.path, needed, f"the probabilities of {scan.case}")
                    save_probabilities(logits, scan.geometry, scan.box, temporary)
                else:
                    write_dicom = write_segmentation if flag == output_files.SEGMENTATION else write_structures
                    write_dicom(labels, scan.geometry, organs, network, temporary)
            mark = mark_of(scan.file, scan.geometry)
            save_label_map(labels, scan.geometry, label_map, organs, {NETWORK: network, SCAN: mark})
            self.write_tables(scan, labels, organs)  # almost nothing can fail between this and the moves
            self.retire_report(scan.case)
            self.keep_others(scan.case, mark)

    def write_tables(self, scan: Segmentation, labels: np.ndarray, organs: Sequence[str]) -> None:
        """Write organ names and colours, and into volumes.csv what is measured in a scan's labels, (X, Y, Z) ids.

        Tables of other organs' colours are renamed to *.old.

        Raises:
            OSError, ValueError: when a table cannot be read or written, or is another kind of table.
        """
        with locked(self.path / VOLUMES_LOCK):
            for name, text in colour_tables(organs).items():
                path = self.path / name
                if path.is_file() and read_text(path) != text:
                    rename_old(path, "it holds other organs or colours")
                if not path.is_file():
                    write_text(path, text)
        measured = measure_organs(labels, scan.hu, scan.box, scan.geometry, organs)
        scan.hu = None
        write_volumes(self.path, scan.case, measured, organs)

    def set_aside(self, case: str) -> None:
        """Rename earlier outputs of a failed case to *.old, and remove its rows from volumes.csv.

        stderr names what is renamed and what cannot be; an older *.old file is replaced.
        """
        paths = [*output_files.case_files(self.path, case), *self.reported(case)]
        keep_drawn(self.label_map(case))
        for path in paths:
            try:
                rename_old(path, f"case {case}: failed")
            except OSError as error:
                print_error(error)
        try:
            if any(row["case"] == case for row in read_volumes(self.path)):
                write_volumes(self.path, case, (), ())
        except (OSError, ValueError) as error:
            print_error(error)

    def set_aside_refused(self, refused: Sequence[Path], cases: Iterable[str]) -> None:
        """Rename earlier outputs of refused inputs to *.old, unless another input gives the same case."""
        for case in {named_case(path) for path in refused} - set(cases):
            self.set_aside(case)

    def keep_others(self, case: str, mark: str) -> None:
        """Rename a label map in a case's place to *.old, with what is beside it, unless it may be replaced.

        That is one that no network made, as a person may have drawn or edited it; and one of another scan than that of
        `mark`, from `mark_of`. Also what is beside none, in the place of what is written.
        """
        path, why = self.label_map(case), ""
        if not is_as_made(path):
            keep_drawn(path)
            rename_old(path, f"case {case}: the label map there is not as a network of this program made it")
            why = "it is beside no label map that is as this program made it"
        elif read_entries(path).get(SCAN, mark) != mark:
            why = "it is of another scan; another --output keeps both"
            rename_old(path, f"case {case}: {why}")
        for flag in self.extras if why else ():
            rename_old(output_files.extra_path(self.path, case, flag), f"case {case}: {why}")

    def reported(self, case: str) -> tuple[Path, ...]:
        """Return the files of a case's report and the page that lists it; none when the case has no report."""
        files = output_files.report_files(self.path, case)
        return (*files, self.reports / output_files.REPORT_PAGE) if any(path.is_file() for path in files) else ()

    def retire_report(self, case: str) -> None:
        """Rename a case's report of an earlier label map, and the list, to *.old; remove them if written anew later.

        Raises:
            OSError: when that fails.
        """
        for path in self.reported(case):
            if not self.report:
                rename_old(path, f"{case}: segmented without --report")
            elif output_files.is_report_file(path):
                path.unlink(missing_ok=True)
            else:
                rename_old(path, f"{path} is no report of this program")

    def without_report(self, cases: dict[str, Path], fingerprint: str) -> dict[str, Path]:
        """Return the cases that these networks have finished but for the report that is asked for."""
        finished = [case for case, scan in cases.items() if self.report and self.is_finished(case, scan)]
        others = set(chain(*self.not_made_by(finished, fingerprint).values()))
        return {
            case: cases[case]
            for case in finished
            if case not in others and not all(path.is_file() for path in output_files.report_files(self.path, case))
        }


def mark_of(scan: Path, geometry: Geometry) -> str:
    """Return what tells a scan from others of its name: a checksum from the middle of its file, or its middle slice's.

    It does not depend on where the file lies. Acquisitions in one DICOM file are told by the number of the frame.
    """
    middle = geometry.slices[len(geometry.slices) // 2] if geometry.slices else None
    path, frame = (middle.path, middle.frame) if middle else (scan, 0)
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size // 2)
        return f"{crc32(file.read(MARK_BYTES), size + frame):08x}"


def keep_drawn(path: Path) -> None:
    """Rename PATH.old to PATH.old.old, and so on, before `path` takes its place, when a person may have drawn it."""
    old = path.with_name(f"{path.name}.old")
    with suppress(OSError, ValueError):  # no such file, or no label map
        if path.is_file() and not (read_network(old) and is_as_made(old)):
            keep_drawn(old)
            rename_old(old, "it is not as a network of this program made it")


def difference_from(scan: Path, label_map: Path, series_uid: str | None = None) -> str | None:
    """Tell whether a label map is of another scan, by its mark and by the grids in the headers.

    None where it is not, or where a header cannot be read or does not tell.
    """
    reading = Reading(math.inf, assume_ras=True)
    try:
        of_scan = read_series_geometry(scan, series_uid) if scan.is_dir() else read_geometry(scan, reading)
        of_labels = read_geometry(label_map, reading)
        mark = read_entries(label_map).get(SCAN)
        if of_scan and mark and mark != mark_of(scan, of_scan):
            return f"{label_map}: is of another scan than {scan}"
    except (OSError, ValueError):
        return None
    try:
        check_same_grid(of_scan or of_labels, of_labels, str(label_map))
    except ValueError as error:
        return str(error)
    return None
