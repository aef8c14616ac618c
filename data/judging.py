"""Judge a made label map organ by organ: which organs can be taught from, and whether the scan is worth taking."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from core.scans.anatomy import Organ, far_apart, odd_volumes, rounded, swapped_sides

MIN_PIECE = 0.9  # share of an organ in its largest piece
NOT_TAUGHT = "not taught"  # reason of an organ that the networks were not taught


@dataclass(frozen=True)
class Limits:
    """Requirements on a label map.

    Attributes:
        agreement: of an organ, least mean Dice between single predictions and their mean.
        trusted: of a scan, least share of the organs that the networks were taught which can be taught from.
    """

    agreement: float = 0.8
    trusted: float = 0.5


@dataclass(frozen=True)
class OrganJudgement:
    """One organ of a made label map.

    Attributes:
        agreement: Dice between single predictions and their mean, NaN where it is in none.
        ml: its volume, 0 where it was not found.
        largest_piece: share of it in its largest piece, NaN where it was not found.
        cut: the ends of the scan that it touches.
        reason: why it is not taught from; empty: it is.
    """

    agreement: float
    ml: float
    largest_piece: float
    cut: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Judgement:
    """A made label map.

    Attributes:
        organs: by name, without the background.
        reason: why the scan is left out; empty: it is taken.
        weight: mean agreement of the organs that are taught from, 0 to 1; 0 for a scan that is left out.
    """

    organs: Mapping[str, OrganJudgement]
    reason: str
    weight: float

    @property
    def trusted(self) -> list[str]:
        """Return the organs that are taught from."""
        return [name for name, organ in self.organs.items() if not organ.reason]


def judge(
    found: Mapping[str, Organ],
    agreement: Mapping[str, float],
    taught: Collection[str],
    unlike: Sequence[str],
    limits: Limits,
    cut: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Judgement:
    """Judge a label map.

    Args:
        found: its organs, from `organs_in`.
        agreement: of each organ, from `predict_and_compare`.
        taught: the organs that the networks were taught; no other can be trusted, or missed.
        unlike: in words, how the scan differs from the training cases.
        limits: requirements on it.
        cut: the organs that the box of `crop` cuts, with its ends.
    """
    odd = {name: f"{gap:.0f} mm from the {other}" for name, other, gap in far_apart(found)}
    odd |= {name: f"volume of {rounded(ml)} mL" for name, ml in odd_volumes(found)}
    odd |= {name: f"cut by the {' and the '.join(ends)} of the box" for name, ends in cut.items()}
    judged = {}
    for name, agreed in agreement.items():
        organ = found.get(name)
        if organ is None:
            judged[name] = OrganJudgement(agreed, 0.0, math.nan, (), "not found" if name in taught else NOT_TAUGHT)
            continue
        piece = organ.pieces_ml[0] / organ.ml
        reason = reason_of(name, agreed, piece, odd, limits) if name in taught else NOT_TAUGHT
        judged[name] = OrganJudgement(agreed, organ.ml, piece, organ.cut, reason)
    trusted = [organ.agreement for organ in judged.values() if not organ.reason]
    reasons = [f"unlike the training cases: {', '.join(unlike)}"] if unlike else []
    reasons += [f"{right} to the left of {left}" for right, left in swapped_sides(found)]
    if len(trusted) < limits.trusted * len(taught) or not trusted:
        reasons.append(f"{len(trusted)} of {len(taught)} organs can be trusted")
    reason = "; ".join(reasons)
    return Judgement(judged, reason, 0.0 if reason else float(np.mean(trusted)))


def reason_of(name: str, agreement: float, piece: float, odd: Mapping[str, str], limits: Limits) -> str:
    """Return why an organ that was found is not taught from; empty when it is. `odd` gives faults of its anatomy."""
    if not (agreement >= limits.agreement and agreement > 0):  # also without a limit: a weight is above 0
        return f"agreement {agreement:.2f}"
    if name in odd:
        return odd[name]
    return f"{piece:.0%} in its largest piece" if piece < MIN_PIECE else ""
