"""From a network's logits to the label map of the whole scan."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from torch import Tensor

from core.scans.crop import Box, shape_of
from core.scans.resample import logits_to_labels

CONNECTED = ndimage.generate_binary_structure(3, 3)  # voxels that share a face, an edge or a corner are one piece


def restore_labels(logits: Tensor, box: Box, shape: Sequence[int], largest_piece: bool = False) -> np.ndarray:
    """Return labels of a scan of `shape`, uint8, from logits (K, X, Y, Z) of a box of it; background around the box.

    With `largest_piece`, only the largest connected piece of each organ is kept.
    """
    labels = np.zeros(shape, dtype=np.uint8)
    labels[box] = logits_to_labels(logits, shape_of(box))
    return keep_largest_pieces(labels) if largest_piece else labels


def keep_largest_pieces(labels: np.ndarray) -> np.ndarray:
    """Make background of all but the largest connected piece of each organ in labels, (X, Y, Z) uint8, in place.

    Of pieces of the same size the first is kept, in the order of X, Y, Z. Each id is on its own: right and left kidney
    keep one piece each.
    """
    for organ, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        part = labels[box]
        pieces, count = ndimage.label(part == organ, CONNECTED)
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            part[(pieces > 0) & (pieces != sizes.argmax())] = 0
    return labels
