"""How far a prediction can be trusted, organ by organ: networks, or views of a scan by one network, compared."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from core.inference.networks import mean_logits, predict_logits
from core.scans.resample import largest_class
from core.scoring.overlap import confusion_matrix, organ_scores
from core.training.augment import warp

# Views of a scan, for a single network: scaled about the centre, and shifted along all axes, as shares of the volume.
SCALES, SHIFTS = (0.95, 1.05), (-0.03, 0.03)


@torch.inference_mode()
def predict_and_compare(
    networks: Sequence[nn.Module], image: Tensor, precision: torch.dtype
) -> tuple[Tensor, np.ndarray]:
    """Return the networks' mean logits, (K, X, Y, Z) float32, and how well single predictions agree with them.

    Several networks are compared with their mean; a single one on shifted and scaled views with itself.

    Args:
        networks: each maps (1, 1, X, Y, Z) to logits (1, K, X, Y, Z).
        image: (1, 1, X, Y, Z) float32 in 0..1.
        precision: the type that convolutions are computed in.

    Returns:
        the logits, and (K,) the mean Dice by organ, on the network's grid: 1 for full agreement, NaN for an organ in
        none of them.
    """
    if len(networks) == 1:
        logits = predict_logits(networks[0], image, precision)[0]
        others = (labels_of_view(networks[0], image, precision, matrix) for matrix in views())
    else:
        others = []

        def logits_of_each() -> Iterator[Tensor]:
            for network in networks:
                logits = predict_logits(network, image, precision)[0]
                others.append(largest_class(logits))
                yield logits

        logits = mean_logits(logits_of_each(), len(networks))
    agreed = largest_class(logits)
    dice = [organ_scores(confusion_matrix(agreed, labels, len(logits)))["dice"] for labels in others]
    counted = np.isfinite(dice).sum(axis=0)
    return logits, np.where(counted > 0, np.nansum(dice, axis=0) / np.maximum(counted, 1), np.nan)


def views() -> list[Tensor]:
    """Return the views of a scan, (3, 4) each: from places in the view to places in the scan, which spans -1 to 1."""
    scaled = [torch.eye(3, 4) * scale for scale in SCALES]
    shifted = [torch.cat([torch.eye(3), torch.full((3, 1), 2 * shift)], dim=1) for shift in SHIFTS]
    return scaled + shifted


def labels_of_view(network: nn.Module, image: Tensor, precision: torch.dtype, matrix: Tensor) -> np.ndarray:
    """Return the labels, (X, Y, Z) uint8, of a view of an image, moved back to where the scan has them."""
    no_labels = torch.zeros(image[:, 0].shape, dtype=torch.uint8, device=image.device)
    view, _ = warp(image, no_labels, matrix[None].to(image.device))
    labels = torch.from_numpy(largest_class(predict_logits(network, view, precision)[0])).to(image.device)
    _, back = warp(image, labels[None], inverse(matrix)[None].to(image.device))
    return back[0].cpu().numpy()


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of (3, 4), a linear map and a shift."""
    linear = torch.linalg.inv(matrix[:, :3])
    return torch.cat([linear, -linear @ matrix[:, 3:]], dim=1)
