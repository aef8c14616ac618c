"""Sentences for files that are not found: the name that was looked for, similar names, and files of other formats."""

import difflib
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from core.scans.dicom_header import is_dicom
from core.scans.volumes import NIFTI_SUFFIXES

CONVERTED_SUFFIXES = (".mha", ".mhd", ".nrrd")  # that data.convert reads
CONVERT = "python -m data.convert turns a labelled collection into NIfTI; SimpleITK or 3D Slicer converts single scans"
NO_PLACE = "such files do not say where their voxels lie in the patient; take the scans that they were made from"
# What to do about the files of a folder that is not as expected, by suffix.
ADVICE = {
    **dict.fromkeys(CONVERTED_SUFFIXES, CONVERT),
    **dict.fromkeys((".hdr", ".img"), "write each pair as one .nii.gz file, with nibabel or 3D Slicer"),
    ".nii.gz": "python -m data.convert reads the layouts of other collections",
    **dict.fromkeys(
        (".dcm", ".ima", "DICOM"), "infer.py reads the folder of one DICOM series; dcm2niix makes NIfTI of it"
    ),
    **dict.fromkeys((".npz", ".npy", ".h5", ".mat", ".png", ".jpg", ".tif", ".tiff"), NO_PLACE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"), "unpack them"),
}
MAX_KINDS, MAX_SIMILAR = 3, 2  # that a message names
MIN_ALIKE = 0.6  # of difflib's ratio, its own default for close matches
PREFIX_LETTERS = 3  # that a name must have for another to be similar because it begins with it
SUFFIXES = re.compile(r"(\.(nii|gz|mh[ad]|n?rrd|nhdr|hdr|img|np[yz]|png|jpg|tiff?|dcm|zip|mg[hz]|h5))+$", re.IGNORECASE)


def found_instead(folder: Path) -> str:
    """Return what a folder without NIfTI files holds and what to do about it, to end a sentence; "" when it is empty.

    As in "; holds 3 .mha files: python -m data.convert ...".
    """
    paths = visible(folder)
    counts = Counter("" if path.is_dir() else kind_of(path) for path in paths)
    if not counts:
        return ""
    kinds = [kind for kind, _ in counts.most_common(MAX_KINDS)]
    advice = next((ADVICE[kind] for kind in kinds if kind in ADVICE), None)
    if advice is None and kinds[0] == "":
        advice = "give the folder that holds the files itself"
    more = " and more" if len(counts) > MAX_KINDS else ""
    listed = ", ".join(count_kind(kind, counts[kind]) for kind in kinds)
    return f"; holds {listed}{more}" + (f": {advice}" if advice else "")


def found_below(folder: Path) -> str:
    """Return as `found_instead` what a folder holds, or the first folder in it with files; "" when there is none."""
    for place in (folder, *visible(folder)) if folder.is_dir() else ():
        if place.is_dir() and any(path.is_file() for path in visible(place)):
            return found_instead(place).replace("holds", f"{place.name} holds" if place != folder else "holds", 1)
    return ""


def kind_of(path: Path) -> str:
    """Return a file's suffix in lower case; without one, "DICOM" or "no suffix"."""
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return ".nii.gz"
    return path.suffix.lower() or ("DICOM" if is_dicom(path) else "no suffix")


def count_kind(kind: str, count: int) -> str:
    """Return the number of files or folders of a kind in words; the kind of folders is ""."""
    if not kind:
        return "1 folder" if count == 1 else f"{count} folders"
    files = "1 file" if count == 1 else f"{count} files"
    return f"{files} without a suffix" if kind == "no suffix" else f"{count} {kind} {files.partition(' ')[2]}"


def looked_for(case: str, folder: Path, taken: Collection[Path], ending: str = ".nii.gz") -> str:
    """Return which file of a case was looked for, and which files of the folder have similar names.

    Args:
        case: its id.
        folder: where the file was looked for.
        taken: files that belong to other cases, in the folder or in one folder below it.
        ending: of the name that was looked for.
    """
    others = {path for file in taken for path in (file, file.parent)}
    alike = {path: likeness(case, bare_name(path)) for path in visible(folder) if path not in others}
    best = sorted((path for path in alike if alike[path]), key=lambda path: -alike[path])[:MAX_SIMILAR]
    similar = ", ".join(f"{folder.name}/{path.name}" + "/" * path.is_dir() for path in best)
    return f"looked for {folder.name}/{case}{ending}" + (f"; similar: {similar}" if similar else "")


def likeness(name: str, other: str) -> float:
    """Return how similar two names are, 0 for not at all.

    Names are similar when they differ by case and separators, by further words, by leading zeros, or by a few letters;
    names of different numbers are not, unless one begins with the other.
    """
    words, other_words = (re.findall(r"[^\W_]+", text.casefold()) for text in (name, other))
    plain, other_plain = "".join(words), "".join(other_words)
    ratio = difflib.SequenceMatcher(None, plain, other_plain).ratio()
    shorter, longer = sorted((plain, other_plain), key=len)
    begins = longer.startswith(shorter) and (len(shorter) >= PREFIX_LETTERS)
    contains = bool(words) and bool(other_words) and (set(words) <= set(other_words) or set(other_words) <= set(words))
    numbers, other_numbers = (list(map(int, re.findall(r"[0-9]+", text))) for text in (name, other))
    if begins or contains:
        return 2 + ratio
    if numbers and other_numbers:
        return 1 + ratio if numbers == other_numbers else 0
    return ratio if ratio >= MIN_ALIKE else 0


def bare_name(path: Path) -> str:
    """Return a file's name without the suffixes of images and without the channel number _0000."""
    return re.sub(r"_0000$", "", SUFFIXES.sub("", path.name))


def visible(folder: Path) -> list[Path]:
    """List a folder without hidden files, by name."""
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
