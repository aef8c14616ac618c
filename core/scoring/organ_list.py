"""Choose the organ list for label maps: from --config or --checkpoint, else the label maps, else config.yaml."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from core.checkpoint import load_checkpoint
from core.config import Config, load_config, load_organs
from core.scans.files import listed
from core.scans.organ_names import as_list, read_organ_names
from core.scans.organ_words import same_name

DEFAULT_NOTE = "Organ names from config.yaml, since the label maps hold none; --config or --checkpoint gives others."
BORROWED_NOTE = "Organ names come from the {names}; there are none in {others}, whose ids are read by them."


def load_given(config: str | Path | None, checkpoint: str | Path | None) -> Config | None:
    """Return the settings that --config or --checkpoint names; None when neither is given.

    Raises:
        FileNotFoundError, ValueError: when a file is not what it should be, or the two differ in their organs.
    """
    settings = load_config(config) if config else None
    trained = load_checkpoint(checkpoint)["config"] if checkpoint else None
    if settings and trained:
        difference = first_difference(dict(enumerate(settings.organs)), dict(enumerate(trained.organs)))
        if difference:
            raise ValueError(f"--config {config} and --checkpoint {checkpoint} differ: {difference}; give one of them")
    return settings or trained


def choose_organs(given: Config | None, groups: dict[str, Sequence[Path]]) -> tuple[tuple[str, ...], str | None]:
    """Return the organ list that counts, names by id with the background first, and a note when files lack names.

    The list is that of the settings given, else of the first group of label maps that hold names, else of config.yaml.

    Args:
        given: the settings from `load_given`.
        groups: label maps by what they are called, those whose names go first in front: predictions, then references.

    Raises:
        ValueError: when label maps of the group that decides hold different names.
    """
    if given:
        return given.organs, None
    for title, group in groups.items():
        named = {path: names for path in group if (names := names_if_readable(path))}
        if not named:
            continue
        (first, names), *others = named.items()
        for path, other_names in others:
            difference = first_difference(names, other_names)
            if difference:
                raise ValueError(
                    f"{first} and {path} differ in the organ names of their headers: {difference}; "
                    "give the list that counts by --config or --checkpoint"
                )
        nameless = [text for other, paths in groups.items() if (text := without_names(other, paths))]
        note = BORROWED_NOTE.format(names=title, others=" and ".join(nameless)) if nameless else None
        return as_list(names, first), note
    return load_organs(), DEFAULT_NOTE


def without_names(title: str, paths: Sequence[Path]) -> str:
    """Say which label maps of a group hold no organ names; an empty text when all do."""
    nameless = [path.name for path in paths if not names_if_readable(path)]
    if len(nameless) == len(paths):
        return f"the {title}" if paths else ""
    return f"{len(nameless)} of the {len(paths)} {title} ({listed(nameless)})" if nameless else ""


def choose_scored(names: Sequence[str] | None, organs: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of the organs to score, in order: those that --organs names, however spelled; all for None.

    Raises:
        ValueError: when a name is not in the organ list.
    """
    if names is None:
        return tuple(range(1, len(organs)))
    for name in names:
        if not any(same_name(name, organ) for organ in organs[1:]):
            close = difflib.get_close_matches(name, organs[1:], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"--organs: got {name!r}{hint}, expected some of: {', '.join(organs[1:])}")
    return tuple(i for i, organ in enumerate(organs) if i and any(same_name(name, organ) for name in names))


def names_if_readable(path: Path) -> dict[int, str]:
    """Return the names in a label map's file; none when it cannot be read, which is refused when its turn comes."""
    try:
        return read_organ_names(path)
    except (ValueError, OSError):
        return {}


def first_difference(names: dict[int, str], others: dict[int, str]) -> str | None:
    """Return the first id, 1 or more, that two organ lists name differently, in words; None when there is none."""
    for organ in sorted((names.keys() | others.keys()) - {0}):
        name, other = names.get(organ), others.get(organ)
        if name is None or other is None or not same_name(name, other):
            first, second = ("no organ" if each is None else repr(each) for each in (name, other))
            return f"id {organ} is {first} in the first and {second} in the second"
    return None
