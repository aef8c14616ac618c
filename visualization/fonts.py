"""Fonts that have the letters of a text: organ and case names come in every script, and no font has all of them."""

import logging
from collections.abc import Iterable, Sequence
from functools import cache

import matplotlib
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font

from core.system.exits import print_warning

# DejaVu comes with matplotlib, so a bare machine draws the same letters.
FONT = "DejaVu Sans"
BOXES = "lastresort"  # in the name of fonts that have a box for every character
UNKNOWN = "?"  # drawn in place of a character that no font has
MAX_NAMED = 20  # characters that a warning names

families = [FONT]  # that pictures are drawn with: a character comes from the first of them that has it
warned: set[str] = set()  # the characters that a warning has named
# It reports how it searches for fonts, which is no news to users.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@cache
def characters_of(family: str) -> frozenset[str]:
    """Return the characters that a family's font has; none for a file that cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(findfont(family)).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def covered() -> set[str]:
    """Return the characters that `families` have."""
    return set().union(*map(characters_of, families))


def missing_in(texts: Iterable[str]) -> set[str]:
    """Return the characters of texts that no installed font has; add the fonts of the others to `families`."""
    missing = set("".join(texts)) - {"\n"}
    missing -= covered()
    # Surrogates are bytes of a file's name that are not UTF-8; fonts have no such characters.
    wanted = {character for character in missing if not is_surrogate(character)} - warned
    if wanted:
        for family in sorted({font.name for font in fontManager.ttflist} - set(families)):
            if BOXES not in family.lower().replace(" ", "") and wanted & characters_of(family):
                families.append(family)
                wanted -= characters_of(family)
    matplotlib.rcParams["font.family"] = families
    return missing - covered()


def is_surrogate(character: str) -> bool:
    """Return True for a character that UTF-8 cannot hold."""
    return "\ud800" <= character <= "\udfff"


def drawable(text: str) -> str:
    """Return a text with UNKNOWN in place of each character that no font has; warn of them."""
    missing = missing_in([text])
    warn_of(missing, f"shown as {UNKNOWN}")
    return "".join(UNKNOWN if character in missing else character for character in text)


def drawable_organs(organs: Sequence[str], ids: Sequence[int] | None = None) -> list[str]:
    """Return the names of organs, "organ 3" in place of each with a character that no font has; warn of them.

    Args:
        organs: names.
        ids: of the organs; None: their places in `organs`.
    """
    missing = missing_in(organs)
    warn_of(missing, "organs are shown by their ids")
    ids = range(len(organs)) if ids is None else ids
    return [f"organ {i}" if missing & set(name) else name for i, name in zip(ids, organs, strict=True)]


def warn_of(missing: set[str], what: str) -> None:
    """Warn of characters that no font has, once in a process."""
    new = {character for character in missing if not is_surrogate(character)} - warned
    if new:
        warned.update(new)
        named = "".join(sorted(new)[:MAX_NAMED]) + "..." * (len(new) > MAX_NAMED)
        print_warning(f"no installed font has the characters {named}: {what} in pictures; install a font with them")


def font_file(text: str) -> str:
    """Return the file of the font that has the most of a text's characters, for drawing without matplotlib."""
    missing_in([text])
    return findfont(max(families, key=lambda family: len(set(text) & characters_of(family))))
