"""Compare organ names by their words: `kidney_right`, `Right-Kidney` and `kidney (right)` are `right kidney`."""

import re
from collections.abc import Sequence

# FLARE22's organs in the order of their ids 1 to 13, as rules and checks of this repository name them.
STANDARD_NAMES = (
    "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
)  # fmt: skip
OTHER_SIDE = {"right": "left", "left": "right"}


def words_of(name: str) -> list[str]:
    """Return the words of a name, sorted, in lower case; the name itself when it has no letter and no digit."""
    return sorted(re.findall(r"[^\W_]+", name.casefold())) or [name]


def same_name(first: str, second: str) -> bool:
    """Return True when two names have the same words, in any order and case."""
    return words_of(first) == words_of(second)


def standard_name(name: str) -> str:
    """Return the name of STANDARD_NAMES with the same words, or the name itself where there is none."""
    return next((standard for standard in STANDARD_NAMES if same_name(name, standard)), name)


def mirrored_ids(organs: Sequence[str]) -> list[int]:
    """Return for each id that of the organ on the other side, as right kidney for left kidney; itself without a side.

    Raises:
        ValueError: when a name holds a side, but the organ of the other side is not in the list.
    """
    ids = {tuple(words_of(name)): i for i, name in enumerate(organs)}
    mirrored = []
    for i, name in enumerate(organs):
        words = words_of(name)
        other = tuple(sorted(OTHER_SIDE.get(word, word) for word in words))
        if other not in ids and other != tuple(words):
            raise ValueError(
                f"augment_flip: organs holds {name!r} but no {' '.join(other)}, so that a flip has no id for it; "
                "expected both sides, or augment_flip: false"
            )
        mirrored.append(ids.get(other, i))
    return mirrored
