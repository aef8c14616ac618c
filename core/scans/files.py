"""Find scans and label maps on disk by case id."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from core.scans.not_found import found_instead, likeness, looked_for
from core.scans.volumes import NIFTI_SUFFIXES
from core.system.exits import print_warning

CHANNEL = "_0000"  # ends the names of FLARE22's scans; a case id may end so, too


def find_scans(path: str | Path) -> dict[str, Path]:
    """Find the scan at a path, or those in a folder, by case id in order; in a data set, those in its `images`.

    Raises:
        FileNotFoundError: when there is nothing, or no scan in the folder.
        ValueError: when two files mean the same case.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "images" if (path / "images").is_dir() else path
        files = find_files(path, keep_folders=True)
    elif path.exists() or path.is_symlink():  # reading says what is wrong about the link
        files = {case_id(path): path}
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not files:
        raise FileNotFoundError(f"{path}: no scan in this folder (.nii.gz or .nii){found_instead(path)}")
    return dict(sorted(files.items()))


def find_label_maps(folder: str | Path, cases: Collection[str] | None = None) -> dict[str, Path]:
    """Find the label maps of a folder by case id, in order; in a data set, those in its `labels`.

    Args:
        folder: where they are.
        cases: ids that predictions are expected to have; None: those of the scans, in a data set.

    Raises:
        FileNotFoundError: when there is no such folder, or no label map in it.
        ValueError: when two files mean the same case.
    """
    given, folder = Path(folder), label_folder(folder) if cases is None else prediction_folder(folder)
    data_dir = data_set_of(folder)
    if cases is None:
        if folder != given and nifti_in(given) and not (given / "images").is_dir():
            print_warning(f"{given}: label maps are those of {folder}, not the files beside it")
        cases = list_files(data_dir / "images") if data_dir and (data_dir / "images").is_dir() else ()
    files = find_files(folder, cases)
    files = {case: path for case, path in sorted(files.items()) if not case.endswith("_probabilities")}
    if not files:
        raise FileNotFoundError(
            f"{folder}: no label map in this folder (CASE.nii.gz or CASE.nii){found_instead(folder)}"
        )
    return files


def label_folder(folder: str | Path) -> Path:
    """Return the folder of label maps that a path means: that of a data set is its `labels`."""
    folder = Path(folder)
    return folder / "labels" if (folder / "labels").is_dir() else folder


def data_set_of(folder: Path) -> Path | None:
    """Return the data set whose `labels` a folder is, or a link to it; None when it is another folder."""
    path = Path(os.path.abspath(folder))
    path = path if path.name == "labels" else path.resolve()
    return path.parent if path.name == "labels" else None


def prediction_folder(folder: str | Path) -> Path:
    """Return the folder of predictions that a path means: `labels` in it only where it holds no label map itself."""
    folder = Path(folder)
    return folder if folder.is_dir() and nifti_in(folder) else label_folder(folder)


def find_files(folder: str | Path, cases: Collection[str] | None = None, keep_folders: bool = False) -> dict[str, Path]:
    """Find the NIfTI files of a folder by case id; ignore hidden files.

    Args:
        folder: where they are.
        cases: for label maps, the ids that they are expected to have; None: the files are scans.
        keep_folders: True to return a folder with a file's name as that case, which then fails by itself.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when two files mean the same case.
    """
    found = {}
    for case, (path, *others) in list_files(folder, cases).items():
        if path.is_dir() and not keep_folders:
            raise ValueError(f"{path}: is a folder with {len(nifti_in(path))} NIfTI files, expected one")
        if others:
            raise ValueError(f"case {case}: {path} and {others[0]} both mean it; remove one")
        found[case] = path
    return found


def list_files(folder: str | Path, cases: Collection[str] | None = None) -> dict[str, list[Path]]:
    """Return all NIfTI files of a folder by case id, also several of one case; `cases` is as in `find_files`.

    Hidden files are skipped. A folder with a file's name is replaced by the one file in it (labels/X.nii/X.nii). With
    more files in it, the folder itself is returned.

    Raises:
        FileNotFoundError: when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = []
    for path in nifti_in(folder):
        inside = nifti_in(path) if path.is_dir() else []
        paths.append(inside[0] if len(inside) == 1 else path)
    ids = map(case_id, paths) if cases is None else label_ids([bare_stem(path) for path in paths], cases)
    found: dict[str, list[Path]] = {}
    for case, path in zip(ids, paths, strict=True):
        found.setdefault(case, []).append(path)
    return found


def check_partners(folder: Path, scans: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """Check that each case of a data set has a scan and a label map.

    Args:
        folder: the data set's.
        scans: files of its `images` by case id.
        labels: files of its `labels` by case id.

    Raises:
        ValueError: naming the cases without one of them, and similar names.
    """
    for have, lack, name, what, ending in (
        (scans, labels, "labels", "label map", ".nii.gz"),
        (labels, scans, "images", "scan", "_0000.nii.gz"),
    ):
        orphans = [case for case in have if case not in lack]
        if orphans:
            taken = [path for case, path in lack.items() if case in have]
            hint = looked_for(orphans[0], folder / name, taken, ending) + ("" if lack else found_instead(folder / name))
            raise ValueError(f"{folder}: no {what} for the case {listed(orphans)}: {hint}")


def nifti_in(folder: Path) -> list[Path]:
    """List the paths in a folder that are named like a NIfTI file, in order, without hidden files."""
    return [p for p in sorted(folder.iterdir()) if p.name.lower().endswith(NIFTI_SUFFIXES) and p.name[0] != "."]


def bare_stem(path: Path) -> str:
    """Return a file's name without .nii or .nii.gz."""
    return re.sub(r"(\.nii|\.nii\.gz)$", "", path.name, flags=re.IGNORECASE)


def case_id(path: Path) -> str:
    """Return the name of a scan's file without its suffix and without the channel number _0000; of a folder, its name.

    Label maps have no channel number: `label_ids` gives theirs.
    """
    stem = bare_stem(path)
    return stem.removesuffix(CHANNEL) if stem != path.name else stem


def label_ids(names: Sequence[str], cases: Collection[str]) -> list[str]:
    """Return the case id of each label map of a folder, by its name without suffix.

    It is the one among `cases` with the same name, else with the name without or with _0000: a case may be called
    phantom_0000. For other names, _0000 is left out where all label maps have it, as they do when named like scans.

    Args:
        names: of all label maps of a folder.
        cases: ids that are known, such as those of the scans.
    """
    like_scans = all(name.endswith((CHANNEL, "_probabilities")) for name in names)
    ids = []
    for name in names:
        plain, longer = name.removesuffix(CHANNEL), name + CHANNEL
        known = [case for case in (name, plain, longer) if case in cases and (case != longer or longer not in names)]
        ids.append(known[0] if known else plain if like_scans else name)
    return ids


def listed(cases: Sequence[str], most: int = 5) -> str:
    """Join case ids for a message, at most `most` of them."""
    return ", ".join([*cases[:most], *["..."] * (len(cases) > most)])


def read_case_ids(given: Sequence[str]) -> list[str]:
    """Return case ids as given, or the ids listed in a file when the only item is the path of a file.

    The file has one id a line, as `format_case_ids` writes it. A `#` at the start of a line, or after a blank, begins a
    comment.

    Raises:
        ValueError: when the file is no text, or lists no case.
    """
    file = Path(os.path.expanduser(given[0])) if len(given) == 1 else None
    if file is None or not file.is_file():
        return list(given)
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{given[0]}: is no text, expected one case id a line")
    ids = []
    for line in content.decode("utf-8-sig", "surrogateescape").split("\n"):
        if line.startswith('"'):
            try:
                ids.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{given[0]}: {line} is no id in quotes; expected one case id a line") from error
        else:
            ids.append(re.sub(r"(^|\s)#.*", "", line).strip())
    if not any(ids):
        raise ValueError(f"{given[0]}: lists no case, expected one id a line")
    return [case for case in ids if case]


def format_case_ids(ids: Sequence[str]) -> bytes:
    """Return the content of a file from which `read_case_ids` reads the same ids, for every id a file system allows."""
    plain = re.compile(r"(?![\s\"#])(?!.*\s#).*\S")
    lines = [case if plain.fullmatch(case) else json.dumps(case) for case in ids]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def select_cases(found: dict[str, Path], given: Sequence[str] | None) -> dict[str, Path]:
    """Return the files of the cases in `given` (ids or a file of ids), in the order of `found`; all for None.

    Raises:
        ValueError: naming the ids that are not among the cases.
    """
    if given is None:
        return found
    wanted = read_case_ids(given)
    missing = sorted(set(wanted) - set(found))
    if missing:
        closest = max(found, key=lambda case: likeness(missing[0], case), default="")
        hint = f"; did you mean {closest}?" if likeness(missing[0], closest) else ""
        raise ValueError(f"--cases: {listed(missing)} not among the {len(found)} cases: {listed(list(found), 3)}{hint}")
    return {case: path for case, path in found.items() if case in wanted}
