"""Organ names of label ids: known collections, synonyms, and the way from a source's ids to an organ list.

    match_organs(names, organs) -> OrganMap         (by name: 9 "postcava" becomes the id of "inferior vena cava")

Facts about collections are in data/collections.yaml.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from core.scans.organ_words import OTHER_NAMES, words_of
from core.system.exits import print_warning
from core.system.files import read_text
from core.system.yaml_files import read_yaml

COLLECTIONS = Path(__file__).with_name("collections.yaml")
BACKGROUND = "background"
IGNORE = "ignore"  # nnU-Net's name for voxels that nobody annotated
IDS = range(1, 256)  # of organs in a label map
OTHER_KINDS = r"\b(mri?|t[12]w?|pet|flair|ultrasound)\b"  # of images that are no CT, as dataset.json names them
Key = int | str  # what a source tells organs by: the id in a label map, or the name of a mask's file


@dataclass(frozen=True)
class OrganMap:
    """Map the ids of a source to the ids of an organ list.

    Attributes:
        names: organ name by key, as the source has it or the user gives it; without the background.
        target: id in the organ list by key; 0 for keys that `dropped` lists.
        dropped: keys of organs that the list does not have.
        ignored: keys of voxels that are not annotated.
        given: keys that the user has named.
        own: organ name by key, as the source has it.
    """

    names: dict[Key, str]
    target: dict[Key, int]
    dropped: tuple[Key, ...]
    ignored: tuple[Key, ...]
    given: frozenset[Key]
    own: Mapping[Key, str]

    def is_listed(self, key: Key, organs: Sequence[str]) -> bool:
        """Return True when `organs` list a key, by the source's own name or the one given."""
        known = (self.names[key], self.own.get(key, self.names[key]))
        return any(same_organ(name, organ) for name in known for organ in organs)

    def annotated(self, keys: Sequence[Key]) -> tuple[int, ...]:
        """Return the ids of the organ list that `keys` stand for, in order."""
        return tuple(sorted({self.target[key] for key in keys} - {0}))


@cache
def load_collections() -> dict[str, dict]:
    """Return the known collections by name, as data/collections.yaml has them."""
    return read_yaml(COLLECTIONS)["collections"]


@cache
def synonyms() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the words of an organ's usual name by the words of its other names."""
    table = read_yaml(COLLECTIONS)["synonyms"] | OTHER_NAMES
    return {tuple(words_of(other)): tuple(words_of(name)) for name, others in table.items() for other in others}


def words_for(name: str) -> tuple[str, ...]:
    """Return the words that a name is compared by: sorted, in lower case, synonyms replaced by the usual name."""
    words = tuple(words_of(name))
    return synonyms().get(words, words)


def same_organ(first: str, second: str) -> bool:
    """Return True when two names mean the same organ."""
    return words_for(first) == words_for(second)


def match_organs(names: Mapping[Key, str], given: Mapping[Key, str], organs: Sequence[str]) -> OrganMap:
    """Match a source's organs with an organ list by name.

    Args:
        names: organ name by key, as the source has it.
        given: names that the user gives, which go before; only these may join several keys in one organ.
        organs: the organ list, background first.

    Raises:
        ValueError: when two keys mean the same organ without the user saying so, or no organ of the list is there.
    """
    wanted: dict[tuple[str, ...], int] = {}
    for organ, name in enumerate(organs):
        other = wanted.setdefault(words_for(name), organ)
        if other != organ:
            raise ValueError(f"the organ list has one organ twice, {organs[other]!r} and {name!r}; leave one out")
    wanted[words_for(BACKGROUND)] = 0
    merged = {**names, **given}
    target = {key: wanted.get(words_for(name), 0) for key, name in merged.items()}
    for organ in sorted(set(target.values()) - {0}):
        keys = [key for key in names if key not in given and target[key] == organ]
        if len(keys) > 1:
            which = " and ".join(f"{key} ({merged[key]})" for key in keys)
            raise ValueError(f"{which} both mean {organs[organ]!r}; --source-organs KEY=NAME says what each is")
    ignored = tuple(key for key, name in merged.items() if same_organ(name, IGNORE))
    dropped = tuple(
        key
        for key, name in merged.items()
        if not target[key] and key not in ignored and not same_organ(name, BACKGROUND)
    )
    if not any(target.values()):
        listed = ", ".join(str(name) for name in merged.values())
        raise ValueError(
            f"none of the source's organs ({listed}) is in the organ list ({', '.join(organs[1:])}); "
            "give another list (--organs, --config), or other names (--source-organs)"
        )
    return OrganMap(merged, target, dropped, ignored, frozenset(given), names)


def read_dataset_json(path: Path) -> dict[int, str]:
    """Return the organ name by id that a dataset.json of the Decathlon or nnU-Net gives.

    `labels` may be {"1": "liver"} (Decathlon, nnU-Net v1) or {"liver": 1} (nnU-Net v2). A region of several ids names
    none of them.

    Raises:
        ValueError: when it cannot be read, has no `labels`, or is about several images per case.
    """
    try:
        content = json.loads(read_text(path))
        labels = content["labels"]
        pairs = [(k, v) for k, v in labels.items() if not isinstance(v, list) or len(v) == 1]
        pairs = [(k, v[0] if isinstance(v, list) else v) for k, v in pairs]
        images = content.get("channel_names", content.get("modality", {}))
        channels = 1 if isinstance(images, str) else len(images)
        names = {int(k): str(v) for k, v in pairs} if by_id(labels) else {int(v): str(k) for k, v in pairs}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        expected = '"labels": {"1": "liver", ...} or {"liver": 1, ...}'
        raise ValueError(f"{path}: cannot be read ({reason}), expected {expected}") from error
    if channels > 1:
        raise ValueError(f"{path}: says that a case has {channels} images, expected one CT scan")
    kind = " ".join(map(str, images.values())) if isinstance(images, dict) else str(images)
    if re.search(OTHER_KINDS, kind, re.IGNORECASE):
        print_warning(f"{path}: says that the images are {kind}, expected CT")
    if len(set(names.values())) < len(names) or (by_id(labels) is False and len(names) < len(pairs)):
        raise ValueError(f"{path}: its labels name an id or an organ twice")
    if not same_organ(names.pop(0, BACKGROUND), BACKGROUND):
        raise ValueError(f"{path}: its labels give id 0 to an organ, expected the background")
    return names


def by_id(labels: Mapping) -> bool:
    """Return True when the keys of `labels` are ids, False when they are names."""
    return all(str(key).strip().lstrip("-").isdigit() for key in labels)


def parse_source_organs(given: Sequence[str], masks: bool) -> dict[Key, str]:
    """Return organ names by key from the flag's KEY=NAME.

    Raises:
        ValueError: when it is no such list.
    """
    names: dict[Key, str] = {}
    for text in given:
        key, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not name or not key or (not masks and not key.isdigit()):
            what = "MASK=NAME, such as liver_lesion=liver" if masks else "ID=NAME, such as 6=liver"
            raise ValueError(f"--source-organs: got {text!r}, expected {what}")
        if not masks and int(key) not in IDS:
            raise ValueError(f"--source-organs: got {text!r}, expected an id from {IDS[0]} to {IDS[-1]}")
        mask_or_id = key if masks else int(key)
        if mask_or_id in names:
            raise ValueError(f"--source-organs: names {key} twice, {names[mask_or_id]} and {name}; expected it once")
        names[mask_or_id] = name
    return names
