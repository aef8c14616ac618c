"""Recognise how a collection's files are arranged, and pair its scans with their label maps or masks.

| layout | files |
| --- | --- |
| nnunet | imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json; also the Decathlon, AMOS, WORD |
| btcv | img/img0001.nii.gz, label/label0001.nii.gz, or both in one folder, or in imagesTr and labelsTr |
| masks | CASE/ct.nii.gz, CASE/segmentations/ORGAN.nii.gz; also CASE/combined_labels.nii.gz (AbdomenAtlas) |
| flare22 | images/CASE_0000.nii.gz, labels/CASE.nii.gz |
"""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.scans.annotated import read_annotated
from core.scans.files import case_id, find_files, label_ids, listed
from core.scans.not_found import visible
from core.scans.organ_names import read_organ_names
from core.scans.weights import WEIGHTS, read_weights
from data.label_names import Key, load_collections, read_dataset_json, same_organ
from data.other_formats import IMAGE_SUFFIXES, is_other_format, stem

PAIRS = {
    "nnunet": (
        ("imagesTr", "labelsTr"),
        ("imagesVa", "labelsVa"),
        ("imagesVal", "labelsVal"),
        ("imagesTs", "labelsTs"),
    ),
    "flare22": (("images", "labels"),),
    "btcv": (("img", "label"),),
}
SCAN, MASKS, COMBINED = "ct", "segmentations", "combined_labels"  # of the layout "masks"
DATASET_JSON = "dataset.json"
LEVELS = 2  # folders below SOURCE that are searched
BTCV_LABEL = re.compile(r"label(\d+)$")
LAYOUTS = "imagesTr and labelsTr, images and labels, img and label, img0001 and label0001, CASE/ct.nii.gz with masks"


@dataclass(frozen=True)
class SourceCase:
    """Files of one case.

    Attributes:
        id: name of the case in our layout.
        scan: the CT.
        labels: its label map; None when it has masks.
        masks: file of each organ's mask, by the file's name.
        annotated: the organs that are annotated, by the annotated.csv of a data set in our layout; None: not said.
    """

    id: str
    scan: Path
    labels: Path | None = None
    masks: dict[str, Path] = field(default_factory=dict, hash=False)
    annotated: tuple[str, ...] | None = None

    @property
    def files(self) -> list[Path]:
        """All files of the case."""
        return [self.scan, *([self.labels] if self.labels else []), *self.masks.values()]


@dataclass
class Source:
    """A collection as found on disk.

    Attributes:
        folder: where its layout begins.
        layout: name of the layout.
        cases: its cases with a scan and labels, by id.
        names: organ name by id or mask name; empty when nothing tells.
        named_by: what told, for the user.
        notes: what was left out on purpose.
        failures: cases that cannot be used, with the reason.
    """

    folder: Path
    layout: str
    cases: list[SourceCase] = field(default_factory=list)
    names: dict[Key, str] = field(default_factory=dict)
    named_by: str = ""
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def has_masks(self) -> bool:
        """True when organs come as masks."""
        return any(case.masks for case in self.cases)


# ---- Recognising -----------------------------------------------------------------------------------------------------


def read_source(folder: Path, collection: str | None) -> Source:
    """Find the cases of a collection, and what its ids mean.

    Args:
        folder: the collection, or a folder up to two levels above it.
        collection: the name of a known one that the user gives; None to recognise it.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when its layout is unknown or not the only one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = list(find_layouts(folder))
    if len(found) != 1:
        here = ", ".join(f"{place} ({layout})" for place, layout in found[:5]) if found else contents(folder)
        what = "several layouts" if found else "no layout that is known"
        advice = "give one of these folders" if len({place for place, _ in found}) > 1 else f"known are: {LAYOUTS}"
        raise ValueError(f"{folder}: {what}, found {here}; {advice}")
    place, layout = found[0]
    source = Source(place, layout)
    if layout == "masks":
        find_masked_cases(source)
    else:
        find_pairs(source)
    if layout == "flare22":
        read_tables(source)
    if not source.cases:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in list(source.failures.items())[:3])
        raise ValueError(f"{place}: no case with a scan and labels{f' ({reasons})' if reasons else ''}")
    name_organs(source, collection)
    return source


def find_layouts(folder: Path, levels: int = LEVELS) -> Iterator[tuple[Path, str]]:
    """Yield the folders that have a layout, with its name; those below such a folder are not searched."""
    here = [layout for layout, pairs in PAIRS.items() if any(is_pair(folder, *pair) for pair in pairs)]
    names = [stem(path) for path in scans_in(folder)]
    if any(re.fullmatch(r"img\d+", name) for name in names) and any(BTCV_LABEL.match(name) for name in names):
        here.append("btcv")
    below = [path for path in visible(folder) if path.is_dir()]
    if any(named(path, SCAN) for path in below):
        here.append("masks")
    for layout in here:
        yield folder, layout
    if not here and levels:
        for path in below:
            yield from find_layouts(path, levels - 1)


def is_pair(folder: Path, images: str, labels: str) -> bool:
    """Return True when a folder holds a folder of scans and one of label maps."""
    return (folder / images).is_dir() and (folder / labels).is_dir()


def named(folder: Path, name: str) -> Path | None:
    """Return the image in a folder that has this name, in any format."""
    return next((path for path in scans_in(folder) if stem(path) == name), None)


def scans_in(folder: Path) -> list[Path]:
    """Return the files of a folder that are named like images, in order; hidden ones are left out."""
    return [path for path in visible(folder) if path.name.lower().endswith(IMAGE_SUFFIXES)]


def contents(folder: Path) -> str:
    """Return what a folder holds, for a message."""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir())]
    return listed(names) if names else "nothing"


# ---- Pairing ---------------------------------------------------------------------------------------------------------


def find_pairs(source: Source) -> None:
    """Pair scans with label maps by case id."""
    pairs = [pair for pair in PAIRS[source.layout] if is_pair(source.folder, *pair)]
    flat = not pairs
    for images, labels in pairs or [(".", ".")]:
        scans = images_by_id(source.folder / images)
        maps = images_by_id(source.folder / labels, scans)
        if flat:
            scans = {case: path for case, path in scans.items() if re.fullmatch(r"img\d+", case)}
            maps = {case: path for case, path in maps.items() if BTCV_LABEL.match(case)}
        maps = {label_case(case, scans): path for case, path in maps.items()}
        for case in sorted(scans.keys() | maps.keys()):
            add_pair(source, case, scans.get(case), maps.get(case))
    for images, labels in PAIRS[source.layout]:
        if (source.folder / images).is_dir() and not (source.folder / labels).is_dir():
            source.notes.append(f"{images}: left out, without label maps ({labels})")


def read_tables(source: Source) -> None:
    """Take over what annotated.csv says of the cases.

    Raises:
        ValueError: when weights.csv says that a network has made labels; they would pass for labels of people.
    """
    if read_weights(source.folder, [case.id for case in source.cases]):
        raise ValueError(
            f"{source.folder}: {WEIGHTS} says that a network has made its labels, which conversion would lose; train "
            "on the folder itself, as one of several of --data-dir"
        )
    annotated = read_annotated(source.folder, [case.id for case in source.cases])
    source.cases = [replace(case, annotated=annotated.get(case.id)) for case in source.cases]


def add_pair(source: Source, case: str, scan: Path | None, labels: Path | None) -> None:
    """Add a case, or the reason why it cannot be used."""
    if scan is None or labels is None:
        source.failures[case] = f"no {'scan' if scan is None else 'label map'} for {scan or labels}"
    elif any(case == other.id for other in source.cases):
        source.failures[case] = f"{scan} is a second case of this name"
    else:
        source.cases.append(SourceCase(case, scan, labels))


def images_by_id(folder: Path, cases: Collection[str] | None = None) -> dict[str, Path]:
    """Return the images of a folder by case id; `cases` is as in `find_files`."""
    found = find_files(folder, cases)
    others = [path for path in scans_in(folder) if is_other_format(path)]
    names = [stem(path) for path in others]
    ids = [case_id(Path(f"{name}.nii")) for name in names] if cases is None else label_ids(names, cases)
    for case, path in zip(ids, others, strict=True):
        if case in found:
            raise ValueError(f"case {case}: {found[case]} and {path} both mean it; remove one")
        found[case] = path
    return found


def label_case(case: str, scans: dict[str, Path]) -> str:
    """Return the id of the scan that a label map belongs to; BTCV's label0001 belongs to img0001."""
    match = BTCV_LABEL.match(case)
    partner = f"img{match[1]}" if match else ""
    return partner if case not in scans and partner in scans else case


def find_masked_cases(source: Source) -> None:
    """Find a case in each folder with ct.nii.gz: masks in segmentations/, otherwise combined_labels.nii.gz."""
    for folder in filter(Path.is_dir, visible(source.folder)):
        scan, combined = named(folder, SCAN), named(folder, COMBINED)
        files = scans_in(folder / MASKS) if (folder / MASKS).is_dir() else []
        masks = {stem(path): path for path in files}
        if len(masks) < len(files):
            source.failures[folder.name] = f"{folder / MASKS}: two files of the same name; remove one"
        elif scan is None:
            if masks or combined:
                source.failures[folder.name] = f"{folder}: no {SCAN}.nii.gz beside its labels"
        elif masks:
            source.cases.append(SourceCase(folder.name, scan, masks=masks))
        elif combined:
            source.cases.append(SourceCase(folder.name, scan, combined))
        else:
            source.failures[folder.name] = f"{folder}: neither masks in {MASKS}/ nor {COMBINED}.nii.gz"
    if len({bool(case.masks) for case in source.cases}) > 1:
        without = [case.id for case in source.cases if not case.masks]
        for case in without:
            source.failures[case] = f"no masks in {MASKS}/, which other cases have"
        source.cases = [case for case in source.cases if case.masks]


# ---- Naming ----------------------------------------------------------------------------------------------------------


def name_organs(source: Source, given: str | None) -> None:
    """Set the organ names of a source.

    They are those of the masks; else of the collection given; else of dataset.json, of the first label map's header, or
    of the collection recognised, whichever comes first.

    Raises:
        ValueError: when dataset.json contradicts the collection that the user gives.
    """
    collections = load_collections()
    recognised = given or recognise(source)
    if recognised:
        leave_out(source, collections[recognised].get("not_ct"), recognised)
    if source.has_masks:
        source.names = {name: name for case in source.cases for name in case.masks}
        source.named_by = "the names of the masks"
        return
    table = source.folder / DATASET_JSON
    names = read_dataset_json(table) if table.is_file() else {}
    if given:
        ids = collections[given]["ids"]
        wrong = [key for key in names.keys() & ids.keys() if not same_organ(names[key], ids[key])]
        if wrong:
            says = f"id {wrong[0]} is {names[wrong[0]]!r}, but {ids[wrong[0]]!r} in {given}"
            raise ValueError(f"{table}: says that {says}; leave --layout out to use {DATASET_JSON}, or move it away")
    if names and not given:
        source.names, source.named_by = names, DATASET_JSON
        return
    in_header, path = ({}, None) if given else names_in_headers(source)
    if in_header:
        source.names, source.named_by = in_header, f"the header of {path}"
    elif recognised:
        source.names = dict(collections[recognised]["ids"])
        source.named_by = f"the collection {recognised} in data/collections.yaml"


def names_in_headers(source: Source) -> tuple[dict[int, str], Path | None]:
    """Return the organ names in the header of the first label map that can be read, and its path."""
    for case in source.cases:
        if not is_other_format(case.labels):
            with suppress(ValueError, OSError):  # a damaged file fails as a case
                return read_organ_names(case.labels), case.labels
    return {}, None


def recognise(source: Source) -> str | None:
    """Return the known collection whose folders and case names these are; None when there is none."""
    for name, about in load_collections().items():
        layouts = ("btcv", "nnunet") if about.get("folders") == "btcv" else (about.get("folders"),)  # of copies, too
        if source.layout in layouts and all(re.fullmatch(about["cases"], case.id) for case in source.cases):
            return name
    return None


def leave_out(source: Source, not_ct: str | None, collection: str) -> None:
    """Take the cases out that are no CT by the collection's numbering."""
    if not not_ct:
        return
    out = [case.id for case in source.cases if re.fullmatch(not_ct, case.id)]
    if out:
        source.cases = [case for case in source.cases if case.id not in out]
        source.notes.append(f"{len(out)} cases left out, no CT by the numbering of {collection}: {listed(out)}")


def unnamed(source: Source) -> ValueError:
    """Return the error for a source whose ids nothing names."""
    return ValueError(
        f"{source.folder}: nothing says which organs the ids are (no {DATASET_JSON}, no known case names, found "
        f"{source.cases[0].id}); name the collection (--layout: {', '.join(load_collections())}) or the ids "
        "(--source-organs 1=liver 2=spleen ...)"
    )
