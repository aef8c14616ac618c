"""Find several acquisitions under one SeriesInstanceUID: contrast phases, reconstruction kernels, cardiac phases.

Blocks of slices that follow one another, such as two breath-holds, are one volume. Acquisitions are apart when each of
them is even by itself and they share a part of the patient.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from core.scans.dicom_geometry import SAME_POSITION_MM, WHOLE_GAP, positions_mm
from core.scans.dicom_header import MARKS, TIMES, printable
from core.scans.dicom_slice import Slice

MAX_ACQUISITIONS = 20  # cardiac series have 10 to 20 phases
FEWEST, MIN_IN_TIME = 2, 3  # slices of an acquisition, and where only times tell it, which may agree by chance
NAMED = 3  # attributes in a name
# What may alternate within one acquisition: dose is modulated, and files are written by several threads.
MINOR_MARKS = ("SliceThickness", "XRayTubeCurrent", "Exposure", "InstanceCreationTime")
Parts = list[list[int]]  # of each acquisition, the numbers of its slices in the order of their places


@dataclass
class Acquisition:
    """Some of a series' slices.

    Attributes:
        name: what tells it from the others, and its number of slices.
        slices: in the order of their places.
    """

    name: str
    slices: list[Slice]


def acquisitions_of(slices: Sequence[Slice], alternating: bool = False) -> list[Acquisition]:
    """Return the acquisitions of sorted slices, as their headers tell; empty when they are one volume or do not tell.

    Instance numbers are looked at only where the slices are no even volume, MINOR_MARKS only there or when the image is
    `alternating` along the slices.
    """
    places = positions_mm(slices)
    even = is_even(places)
    passed = MINOR_MARKS if even and not alternating else ()
    marks = [mark for mark in MARKS[:-1] if mark not in passed]
    varying = [mark for mark in marks if len({one.marks.get(mark, "") for one in slices}) > 1]
    for keywords in (*combinations(varying, 1), *combinations(varying, 2)):
        parts = parts_by_mark(slices, keywords)
        fewest = MIN_IN_TIME if set(keywords) & set(TIMES) else FEWEST
        if are_apart(parts, places, fewest):
            return named(slices, sorted(parts, key=lambda part: sort_key(slices[part[0]], keywords)), keywords)
    for keyword in [mark for mark in (*TIMES, *(() if even else ("InstanceNumber",))) if mark not in passed]:
        for parts in (parts_by_pause(slices, keyword), *parts_by_sweep(slices, places, keyword)):
            if are_apart(parts, places, MIN_IN_TIME):
                return named(slices, parts, (keyword,))
    return []


def acquisitions_in_turn(slices: Sequence[Slice], period: int) -> list[Acquisition]:
    """Return the acquisitions of sorted slices that take turns along them, whatever their headers say."""
    ordinal = {2: "2nd", 3: "3rd"}[period]  # PERIODS of core/scans/alternating.py
    parts = [list(slices[start::period]) for start in range(period)]
    return [
        Acquisition(f"every {ordinal} slice from number {number}, {len(part)} slices", part)
        for number, part in enumerate(parts, start=1)
    ]


def is_even(places: np.ndarray) -> bool:
    """Return True when sorted places have about the same distance, and none is double."""
    gaps = np.diff(places)
    return bool(gaps.min() >= SAME_POSITION_MM and np.abs(gaps / np.median(gaps) - 1).max() <= WHOLE_GAP)


def are_apart(parts: Parts, places: np.ndarray, fewest: int) -> bool:
    """Return True when parts of a series are acquisitions of their own: two of them share a part of the patient.

    In an even volume they must take turns. Where places are double, none may have a double place; slices may be missing
    too. Elsewhere each part must be even.
    """
    if not 2 <= len(parts) <= MAX_ACQUISITIONS or min(map(len, parts)) < fewest:
        return False
    if is_even(places):
        return all((np.diff(part) == len(parts)).all() for part in parts)
    ends = sorted((places[part].min(), places[part].max()) for part in parts)
    if not any(after[0] < before[1] + SAME_POSITION_MM for before, after in pairwise(ends)):
        return False
    if np.diff(places).min() < SAME_POSITION_MM:
        return all(np.diff(places[part]).min() >= SAME_POSITION_MM for part in parts)
    return all(is_even(places[part]) for part in parts)


def parts_by_mark(slices: Sequence[Slice], keywords: Sequence[str]) -> Parts:
    """Divide slices by their values of some attributes."""
    parts = defaultdict(list)
    for k, one in enumerate(slices):
        parts[tuple(one.marks.get(keyword, "") for keyword in keywords)].append(k)
    return list(parts.values())


def parts_by_pause(slices: Sequence[Slice], keyword: str) -> Parts:
    """Divide slices at the pauses of a time: gaps that are longer than half of the longest one."""
    values = [number_in(one.marks.get(keyword, "")) for one in slices]
    if None in values:
        return []
    order = sorted(range(len(slices)), key=lambda k: values[k])
    gaps = np.diff([values[k] for k in order])
    parts = np.split(order, np.flatnonzero(gaps > gaps.max() / 2) + 1)
    return [sorted(part.tolist()) for part in parts]


def parts_by_sweep(slices: Sequence[Slice], places: np.ndarray, keyword: str) -> Iterator[Parts]:
    """Divide slices, in the order of an attribute, wherever they do not go on by the same step.

    Slices of the same value are ordered by place, upwards and then downwards, as either may be the scan's way.
    """
    values = [number_in(one.marks.get(keyword, "")) for one in slices]
    if None in values or len(set(values)) < 2:
        return
    for way in (1, -1):
        order = sorted(range(len(slices)), key=lambda k: (values[k], way * places[k]))
        parts: Parts = [[order[0]]]
        for k in order[1:]:
            part = parts[-1]
            step, first = places[k] - places[part[-1]], places[part[1]] - places[part[0]] if len(part) > 1 else 0
            if abs(step) < SAME_POSITION_MM or (first and abs(step / first - 1) > WHOLE_GAP):
                parts.append([k])
            else:
                part.append(k)
        yield [sorted(part) for part in parts]


def number_in(value: str) -> float | None:
    """Return the number that orders slices: a time as HHMMSS.FFF (without date and zone), or a plain number."""
    value = time_in(value)
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def time_in(value: str) -> str:
    """Return a time without its date, zone and colons; other values as they are."""
    value = value.replace(":", "")
    whole = value.split(".")[0].split("+")[0]
    return value[8:].split("+")[0].split("-")[0] if len(whole) == 14 else value


def sort_key(one: Slice, keywords: Sequence[str]) -> list[tuple[bool, float, str]]:
    """Return the key that orders acquisitions: by numbers where values are numbers, otherwise by text."""
    return [value_key(one.marks.get(keyword, "")) for keyword in keywords]


def value_key(value: str) -> tuple[bool, float, str]:
    """Return the key that orders values of an attribute: numbers first, by size, then text."""
    number = number_in(value)
    return number is None, number or 0.0, value


def named(slices: Sequence[Slice], parts: Parts, keywords: Sequence[str]) -> list[Acquisition]:
    """Make acquisitions, named by the attributes that divided them and by others with no value in common."""
    telling = list(keywords)
    for keyword in MARKS[:-1]:
        values = [{slices[k].marks.get(keyword, "") for k in part} for part in parts]
        if keyword not in telling and not any(one & other for one, other in combinations(values, 2)):
            telling.append(keyword)
    return [
        Acquisition(
            ", ".join(f"{keyword} {range_of(slices, part, keyword)}" for keyword in telling[:NAMED])
            + f", {len(part)} slices",
            [slices[k] for k in part],
        )
        for part in parts
    ]


def range_of(slices: Sequence[Slice], part: list[int], keyword: str) -> str:
    """Return the value of an attribute in an acquisition, or its first and last one; a time without its date."""
    values = {slices[k].marks.get(keyword, "") for k in part}
    if keyword in TIMES:
        values = {time_in(value) for value in values}
    ordered = sorted(values, key=value_key)
    # A damaged value may run on into other attributes.
    shown = [(printable(value) if value.isprintable() else "damaged") or "empty" for value in ordered]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
