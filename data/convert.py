"""Convert another collection into our layout: scans linked, label ids changed by organ name.

    python -m data.convert SOURCE DATA_DIR [--organs NAME ... | --config FILE] [--layout NAME] [--copy]

Reads the layouts of the Medical Segmentation Decathlon, nnU-Net, BTCV, AMOS, WORD, AbdomenAtlas, TotalSegmentator and
FLARE22 (data/layouts.py). Writes images/CASE_0000.nii.gz, labels/CASE.nii.gz, annotated.csv (the organs that the source
annotates in each case), organs.yaml (the organ list, for --config) and convert.json (what was done), then runs the
doctor. The same command again converts the cases that are missing. Exit codes: 0 done; 1 some case failed, or the
doctor found an error; 2 wrong usage, or a source that is not understood.
"""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from core.config import DEFAULT_CONFIG, check, load_organs
from core.scans.annotated import ANNOTATED
from core.scans.files import listed
from core.system.exits import DONE, REFUSED, USAGE, print_error, print_warning, refusing, run_command
from core.system.files import read_text, user_path
from core.system.parallel import MAX_WORKERS, cores, in_processes
from data import doctor
from data.converted import Converted, DataFolder, convert_case, copy_linked
from data.label_names import BACKGROUND, Key, OrganMap, load_collections, match_organs, parse_source_organs
from data.layouts import Source, read_source, unnamed
from data.other_formats import check_readable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        if args.workers < 1:
            raise ValueError(f"--workers: got {args.workers}, expected 1 or more")
        if args.data_dir.resolve().is_relative_to(args.source.resolve()):
            raise ValueError(f"{args.data_dir}: is in {args.source}; write into a folder outside of it")
        organs = read_organ_list(args.organs, args.config)
        source = read_source(args.source, args.layout)
        given = parse_source_organs(args.source_organs, source.has_masks)
        if not source.names and not given:
            raise unnamed(source)
        check_masks(given, source)
        organ_map = match_organs(source.names, given, organs)
        warn_of_unlisted(source, organ_map)
        check_readable([path for case in source.cases for path in case.files])
        folder = DataFolder(args.data_dir, organs)
        print("\n".join(describe(source, organ_map, organs)), flush=True)
        failures = convert(source, organ_map, folder, args.copy, args.workers)
    for case, reason in sorted(failures.items()):
        print_error(ValueError(f"case {case}: {reason}"))
    if args.no_doctor or not folder.annotated:
        return REFUSED if failures else DONE
    code = doctor.main([str(folder.path), "--config", str(folder.organs_file), "--workers", str(args.workers)])
    return code or (REFUSED if failures else DONE)


def convert(source: Source, organ_map: OrganMap, folder: DataFolder, copy: bool, workers: int) -> dict[str, str]:
    """Convert the cases that are not finished yet, and print what was done.

    Returns:
        the reason of failure by case.
    """
    failures = dict(source.failures)
    todo, finished, taken = folder.plan(source.cases, organ_map)
    failures |= taken
    results: list[Converted] = []
    if todo or finished:
        folder.start(todo)
    for case in finished if copy else ():
        copy_linked(case.scan, folder.path / "images", case.id)
    work = partial(convert_case, organ_map=organ_map, organs=folder.organs, data_dir=folder.path, copy=copy)
    with closing(in_processes(work, todo, max(1, min(workers, len(todo))))) as done:
        for case, result in tqdm(done, total=len(todo), desc="converting", disable=None):
            if result.error:
                failures[case.id] = result.error
            else:
                folder.finish(case, organ_map, result)
                results.append(result)
    for line in [*summarise(results, organ_map), *doubts(folder.never_found(source.cases), source, organ_map, folder)]:
        print_warning(line)
    counts = f"{len(results)} cases converted, {len(finished)} were finished before, {len(failures)} failed"
    print(f"{folder.path}: {counts}", flush=True)
    return failures


def check_masks(given: Mapping[Key, str], source: Source) -> None:
    """Raise a ValueError when --source-organs names a mask that no case has."""
    masks = {mask for case in source.cases for mask in case.masks}
    for name in given if source.has_masks else ():
        if name not in masks:
            close = difflib.get_close_matches(str(name), sorted(masks), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"--source-organs: no case has a mask {name}{hint}; found {listed(sorted(masks))}")


def warn_of_unlisted(source: Source, organ_map: OrganMap) -> None:
    """Warn of organs that the source's annotated.csv lists and that none of its ids or masks has."""
    names = dict.fromkeys(name for case in source.cases for name in case.annotated or ())
    unknown = [name for name in names if not any(organ_map.is_listed(key, [name]) for key in organ_map.names)]
    if unknown:
        print_warning(f"{source.folder / ANNOTATED}: {listed(unknown)} is none of the source's organs")


def describe(source: Source, organ_map: OrganMap, organs: Sequence[str]) -> list[str]:
    """Return what was recognised and how organs are matched, in lines."""
    lines = [
        f"{source.folder}: {len(source.cases)} cases in the layout {source.layout!r}",
        f"organ names from {source.named_by or '--source-organs'}",
        "",
        f"{'id':>3}  {'organ':<22}  source",
    ]
    for organ, name in enumerate(organs[1:], start=1):
        keys = [key for key, target in organ_map.target.items() if target == organ]
        shown = ", ".join(show_key(key, organ_map, source) for key in keys)
        lines.append(f"{organ:>3}  {name:<22}  {shown or 'not annotated'}")
    dropped = [show_key(key, organ_map, source) for key in organ_map.dropped]
    lines.append(f"dropped, not in the organ list (becomes background): {', '.join(dropped) or 'none'}")
    return [*lines, *source.notes, ""]


def show_key(key: int | str, organ_map: OrganMap, source: Source) -> str:
    """Return a source's organ for a message; for a mask that some cases lack, in how many cases it is."""
    name = organ_map.names[key]
    if not source.has_masks:
        return f"{key} {name}"
    count = sum(key in case.masks for case in source.cases)
    few = f" ({count} of {len(source.cases)} cases)" if count < len(source.cases) else ""
    return (f"{key}={name}" if name != key else name) + few


def summarise(results: Sequence[Converted], organ_map: OrganMap) -> list[str]:
    """Return what was lost in the cases converted now, in sentences: organs that were dropped, masks that overlap."""
    lines = []
    for key in organ_map.dropped:
        found = [result.dropped[key] for result in results if result.dropped.get(key)]
        if found:
            name = organ_map.names[key]
            lines.append(
                f"{key} {name}: {sum(found)} voxels in {len(found)} cases became background; if it is part of an "
                f"organ of the list, --source-organs {key}=ORGAN joins them"
            )
    overlaps = [(result.case, first, second, n) for result in results for (first, second), n in result.overlaps.items()]
    for case, first, second, n in overlaps:
        lines.append(f"case {case}: {n} voxels are both {first} and {second}; they became {second}")
    return lines


def doubts(absent: Sequence[str], source: Source, organ_map: OrganMap, folder: DataFolder) -> list[str]:
    """Return a sentence about organs that the source should annotate but that no case has; none where all occur."""
    keys = [key for key, target in organ_map.target.items() if folder.organs[target] in absent]
    if not keys:
        return []
    flags = " ".join(f"{key}={BACKGROUND}" for key in keys)
    return [
        f"in none of {len(source.cases)} cases: {', '.join(absent)}; annotated.csv says that they are annotated; "
        f"if they are not, --source-organs {flags}"
    ]


def read_organ_list(names: Sequence[str] | None, config: Path) -> tuple[str, ...]:
    """Return the organ list, background first, of --organs (names, or a file with one per line) or of a settings file.

    Raises:
        FileNotFoundError, ValueError: when it is no such list.
    """
    if names is None:
        organs = load_organs(config)
    elif len(names) == 1 and Path(names[0]).suffix in (".yaml", ".yml"):
        organs = load_organs(user_path(names[0]))
    else:
        if len(names) == 1 and names[0] and user_path(names[0]).is_file():
            lines = [re.sub(r"(^|\s)#.*", "", line) for line in read_text(user_path(names[0])).splitlines()]
            names = [line.strip() for line in lines if line.strip()]
        names = list(names)
        organs = check("organs", names if names[:1] == [BACKGROUND] else [BACKGROUND, *names], "--organs")
    with_semicolon = [name for name in organs if ";" in name]
    if with_semicolon:
        raise ValueError(f"--organs: got {with_semicolon[0]!r}, expected names without ';', which separates them")
    return organs


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.convert", description=__doc__.splitlines()[0])
    folder = {"type": user_path}
    parser.add_argument("source", **folder, metavar="SOURCE", help="folder of the collection")
    parser.add_argument("data_dir", **folder, metavar="DATA_DIR", help="folder to write, for train.py --data-dir")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--organs", nargs="+", metavar="NAME|FILE", help="organ list, or a file with one name per line")
    which.add_argument("--config", **folder, default=DEFAULT_CONFIG, metavar="FILE", help="settings with the organs")
    parser.add_argument("--layout", choices=sorted(load_collections()), help="the collection, where it is not clear")
    parser.add_argument(
        "--source-organs", nargs="+", default=[], metavar="ID=NAME", help="names of the source's ids (or of its masks)"
    )
    parser.add_argument("--copy", action="store_true", help="copy scans instead of linking them")
    parser.add_argument("--no-doctor", action="store_true", help="do not check the data afterwards")
    parser.add_argument("--workers", type=int, default=min(cores(), MAX_WORKERS), metavar="N", help="processes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
