"""Compare organ names by their words: `kidney_right`, `Right-Kidney` and `kidney (right)` are `right kidney`."""

import re
from collections.abc import Sequence

# FLARE22's organs in the order of their ids 1 to 13, as rules and checks of this repository name them.
STANDARD_NAMES = (
    "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
)  # fmt: skip
OTHER_NAMES = {
    "aorta": ("arota",),  # as AMOS's dataset.json spells it
    "inferior vena cava": ("postcava", "IVC"),
    "right adrenal gland": ("right adrenal", "right suprarenal gland"),
    "left adrenal gland": ("left adrenal", "left suprarenal gland"),
    "gallbladder": ("gall bladder",),
    "esophagus": ("oesophagus",),
}
OTHER_SIDE = {"right": "left", "left": "right"}
SHORT_SIDES = {"r", "l", "rt", "lt"}  # not guessed: a flip is refused


def words_of(name: str) -> list[str]:
    """Return the words of a name, sorted, in lower case; the name itself when it has no letter and no digit.

    A capital letter after a small one begins a word, and so does a number: `kidneyRight2` is `2 kidney right`.
    """
    return sorted(re.findall(r"[^\W\d_]+|\d+", split_capitals(name))) or [name]


def split_capitals(name: str) -> str:
    """Return a name in lower case, with a blank where a capital letter follows a small one."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()


def letters_of(name: str) -> str:
    """Return the letters and digits of a name in their order, in lower case."""
    return "".join(re.findall(r"[^\W_]+", name.casefold()))


def same_name(first: str, second: str) -> bool:
    """Return True when two names have the same words, in any order and case, or the same letters in the same order."""
    return words_of(first) == words_of(second) or (letters_of(first) == letters_of(second) != "")


def standard_name(name: str) -> str:
    """Return the name of STANDARD_NAMES that a name, or another of OTHER_NAMES, means; other names as they are."""
    for standard in STANDARD_NAMES:
        if any(same_name(name, other) for other in (standard, *OTHER_NAMES.get(standard, ()))):
            return standard
    return name


def mirrored_ids(organs: Sequence[str]) -> list[int]:
    """Return for each id that of the organ on the other side, as right kidney for left kidney; itself without a side.

    Raises:
        ValueError: when a name holds a side, but the organ of the other side is not in the list, or when it may hold a
            side that cannot be told.
    """
    ids = {tuple(words_of(standard_name(name))): i for i, name in enumerate(organs)}
    mirrored = []
    for i, name in enumerate(organs):
        words = words_of(standard_name(name))
        glued = any(word.startswith(side) or word.endswith(side) for word in words for side in OTHER_SIDE)  # rightlung
        # kidney_l, kidneyL and LK, but not the vertebra L1
        short = SHORT_SIDES & set(re.findall(r"[^\W_]+", split_capitals(name))) or re.fullmatch("[RL][A-Z]", name)
        if not set(words) & set(OTHER_SIDE) and (glued or short):
            raise ValueError(
                f"augment_flip: {name!r} of organs may hold a side; expected right or left as a word of its own, as in "
                "right kidney, or augment_flip: false"
            )
        other = tuple(sorted(OTHER_SIDE.get(word, word) for word in words))
        if other not in ids and other != tuple(words):
            raise ValueError(
                f"augment_flip: organs holds {name!r} but no {' '.join(other)}, so that a flip has no id for it; "
                "expected both sides, or augment_flip: false"
            )
        mirrored.append(ids.get(other, i))
    return mirrored
