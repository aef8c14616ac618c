"""Turn scans without labels into a data set to train on: predict, judge each prediction, keep what can be trusted.

    python -m data.pseudo_label UNLABELLED --checkpoint FILE [FILE ...] --output DATA_DIR

UNLABELLED is a NIfTI file, a folder of them, or the folder of a DICOM series. The predictions of several networks, as
of all folds, are averaged and compared; a single network is compared with itself on shifted and scaled views. Writes
images/CASE_0000.nii.gz (links; --copy copies; DICOM becomes NIfTI), labels/CASE.nii.gz, annotated.csv (the organs of
each case that can be trusted; the others are background that says nothing), weights.csv and pseudo_labels.csv (every
criterion of every organ and scan, and why it was left out). `python train.py --data-dir LABELLED DATA_DIR` trains on
both.
The same command again goes on with the scans that are left. `torchrun --nproc-per-node N -m data.pseudo_label ...`
splits them over several GPUs, `--cases` over several jobs.
Exit code 0: done, 1: some scan could not be read (the others are done), 2: wrong usage.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core.checkpoint import load_networks
from core.config import Config, check, check_share
from core.inference.inputs import choose_scans, read_scan
from core.inference.locating import Locator
from core.inference.networks import choose_inference_precision
from core.inference.restoring import restore_labels
from core.inference.stages import Segmentation, run_overlapped
from core.scans.anatomy import cut_by_box, organs_in
from core.scans.nifti import Reading
from core.scans.typical import differences
from core.scans.volumes import prepare_image
from core.system.exits import DONE, REFUSED, USAGE, print_stderr, refusing, run_command
from core.system.files import user_path
from core.system.processes import join_group, leave_group, own_device
from core.training.device import choose_device
from data.agreement import predict_and_compare
from data.judging import Limits, judge
from data.made_labels import MadeLabels


@dataclass
class Prediction(Segmentation):
    """A scan that is being labelled.

    Attributes:
        unlike: in words, how it differs from the training cases.
        agreement: (K,) of its organs, from `predict_and_compare`.
    """

    unlike: Sequence[str] = ()
    agreement: np.ndarray | None = None


@dataclass(frozen=True)
class Labelling:
    """Everything that labelling a scan needs; the first six as in infer.py."""

    networks: Sequence[nn.Module]
    config: Config
    training_data: dict
    device: torch.device
    precision: torch.dtype
    locator: Locator
    limits: Limits
    made: MadeLabels


# ---- One scan: read, predict, judge ----------------------------------------------------------------------------------


def prepare(labelling: Labelling, scan: Prediction) -> None:
    """Read a scan and resample it to the network's grid.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    voxels, scan.geometry = read_scan(scan.file, Reading(warn=scan.warn))
    scan.box = labelling.locator.find_box(voxels, scan.geometry, scan.warn)
    scan.unlike = differences(voxels, scan.geometry, scan.box, labelling.training_data)
    scan.image = prepare_image(voxels[scan.box], labelling.config.size, labelling.config.window_hu)


def predict(labelling: Labelling, scan: Prediction) -> None:
    """Run the networks on a prepared scan, and compare their predictions."""
    image = torch.from_numpy(scan.image).to(labelling.device).float() / 255
    scan.logits, scan.agreement = predict_and_compare(labelling.networks, image[None, None], labelling.precision)
    scan.image = None


def finish(labelling: Labelling, scan: Prediction) -> None:
    """Judge the label map and write what came of it.

    Raises:
        OSError, ValueError: when the network's output is not finite, or a file cannot be written.
    """
    logits, organs = scan.logits, labelling.config.organs
    scan.logits = None
    labels = restore_labels(logits, scan.box, scan.geometry.shape)
    found = organs_in(labels, scan.geometry, organs)
    agreement = dict(zip(organs[1:], scan.agreement[1:].tolist(), strict=True))
    taught = labelling.training_data.get("organs", organs[1:])  # older checkpoints do not say it
    cut = cut_by_box(labels, scan.box, organs)
    judgement = judge(found, agreement, taught, scan.unlike, labelling.limits, cut)
    labelling.made.add(scan.case, scan.file, labels, scan.geometry, judgement)


# ---- All scans -------------------------------------------------------------------------------------------------------


def label(labelling: Labelling, cases: dict[str, Path], show: bool) -> list[str]:
    """Label scans, given with their files, with a progress bar if `show`; return those that could not be read."""
    stages = [partial(stage, labelling) for stage in (prepare, predict, finish)]
    failed = []
    with closing(run_overlapped(stages, cases, labelling.device, Prediction)) as labelled:
        for scan in tqdm(labelled, total=len(cases), desc="scans", disable=None if show else True):
            if scan.failure:
                print_stderr(f"error: {scan.failure}")
                failed.append(scan.case)
    return failed


def main() -> int:
    """Label the scans that the command line names; return the exit code."""
    arguments = parse_arguments()
    with refusing(USAGE):
        limits = Limits(
            check_share(arguments.min_agreement, "--min-agreement"), check_share(arguments.min_organs, "--min-organs")
        )
        device = choose_device(own_device(check("device", arguments.device, "--device")))
        check("precision", arguments.precision, "--precision")
        group = join_group(torch.device("cpu"))  # the processes exchange only names
        cases, refused = choose_scans(arguments.inputs, arguments.cases, None, show=group.first)
        if cases:
            networks, checkpoint = load_networks(arguments.checkpoint, device)
            locator = Locator.load(arguments.locate, checkpoint, device, warn=group.first)
            config, training_data = checkpoint["config"], checkpoint["training_data"]
            precision = choose_inference_precision(arguments.precision, config.precision, device)
            made = MadeLabels(arguments.output, config.organs, checkpoint["fingerprint"], limits, arguments.copy)
            left = made.begin(cases)
    failed = []
    if cases:
        group.wait()  # all processes have listed the same cases before the first one is labelled
        own = dict(list(left.items())[group.rank :: group.size])
        labelling = Labelling(networks, config, training_data, device, precision, locator, limits, made)
        with refusing(REFUSED):
            failed = label(labelling, own, group.first)
            failed = sorted(chain(*group.gather(failed)))
        if group.first:
            print("\n".join(made.summary(cases)))
    leave_group(group)
    names = [*failed, *map(str, refused)]
    if names and group.first:
        print_stderr(f"error: failed: {', '.join(names)}")
    return REFUSED if names else DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Turn scans without labels into a data set to train on.")
    text = partial(parser.add_argument, type=user_path)
    text("inputs", nargs="+", metavar="UNLABELLED", help="a NIfTI file, a folder of them, a series' folder")
    text("--checkpoint", required=True, nargs="+", metavar="FILE", help="best.pt of a run, or of several, as all folds")
    text("--locate", metavar="FILE", help="the network that finds the box for crop: organs")
    text("--output", required=True, metavar="DATA_DIR", help="folder for the data set")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    number = partial(parser.add_argument, type=float, metavar="N")
    number("--min-agreement", default=Limits.agreement, help="least Dice between predictions (default: %(default)s)")
    number("--min-organs", default=Limits.trusted, help="least share of trusted organs (default: %(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy the scans instead of linking them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto, float32, bf16 or fp16, as in infer.py")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
