"""From a network's logits to the label map of the whole scan."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from torch import Tensor

from core.scans.crop import Box, shape_of
from core.scans.resample import logits_to_labels

CONNECTED = ndimage.generate_binary_structure(3, 3)  # voxels that share a face, an edge or a corner are one piece


def restore_labels(logits: Tensor, box: Box, shape: Sequence[int], drop_pieces: float = 0) -> np.ndarray:
    """Return labels of a scan of `shape`, uint8, from logits (K, X, Y, Z) of a box of it; background around the box.

    With `drop_pieces`, small pieces of organs become background, as `drop_small_pieces` says.

    Raises:
        ValueError: when logits are not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("the network's output is not finite, so that no label map can be made of it")
    labels = np.zeros(shape, dtype=np.uint8)
    labels[box] = logits_to_labels(logits, shape_of(box))
    return drop_small_pieces(labels, drop_pieces) if drop_pieces else labels


def drop_small_pieces(labels: np.ndarray, share: float) -> np.ndarray:
    """Make background of pieces of organs in labels, (X, Y, Z) uint8, in place; the largest piece of each organ stays.

    A piece goes when its voxels are at most `share`, 0 to 1, of those of the organ's largest piece; with 1, all others
    go. Of the largest, if several have the same size, the first stays, in the order of X, Y, Z. Each id is on its own:
    right and left kidney keep one piece each.
    """
    for organ, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        part = labels[box]
        pieces, count = ndimage.label(part == organ, CONNECTED)
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0  # what is not the organ
            largest = sizes.argmax()
            small = sizes <= share * sizes[largest]
            small[[0, largest]] = False
            part[small[pieces]] = 0
    return labels
