"""Segment a CT scan with an exported network: onnxruntime, numpy and nibabel are enough.

python docs/onnx_example.py model.onnx scan.nii.gz labels.nii.gz
"""

import json
import sys

import nibabel as nib
import numpy as np
import onnxruntime
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform


def resize(volume: np.ndarray, shape: tuple, average: bool = False) -> np.ndarray:
    """Interpolate (X, Y, Z) linearly, one axis after the other; or `average`, where an axis shrinks by more than 2."""
    for axis, n in enumerate(shape):
        step = volume.shape[axis] / n
        centres = (np.arange(n) + 0.5) * step - 0.5
        distances = np.abs(np.arange(volume.shape[axis]) - centres[:, None])
        weights = (1 - distances / (step if average and step > 2 else 1)).clip(0)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        volume = np.moveaxis(np.tensordot(weights, volume, (1, axis)), 0, axis)
    return volume


if len(sys.argv) != 4:
    sys.exit(__doc__)
model, scan_path, output = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
if facts["crop"] != "none":
    sys.exit(f"{model}: trained with crop: {facts['crop']}; cut the scan to that box first")

scan = nib.load(scan_path)
hu = nib.as_closest_canonical(scan).get_fdata(dtype=np.float32)  # (X, Y, Z) in RAS+ order
if not np.isfinite(hu).all():
    sys.exit(f"{scan_path}: holds NaN or infinite voxels; expected HU")
low, high = facts["window_hu"]
image = resize(((hu - low) / (high - low)).clip(0, 1), facts["size"], average=True)
image = np.rint(image * 255) / np.float32(255)  # the training cases were stored so
(logits,) = session.run(["logits"], {"image": image[None, None]})

labels, best = np.zeros(hu.shape, np.uint8), np.full(hu.shape, -np.inf, np.float32)
for organ, small in enumerate(logits[0]):
    full = resize(small, hu.shape)
    labels[full > best] = organ
    np.maximum(best, full, out=best)
as_stored = ornt_transform(io_orientation(np.eye(4)), io_orientation(scan.affine))
nib.save(nib.Nifti1Image(apply_orientation(labels, as_stored), scan.affine), output)
print(*(f"{organ} {name}: {np.sum(labels == organ)} voxels" for organ, name in enumerate(facts["organs"])), sep="\n")
