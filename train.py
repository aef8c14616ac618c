"""Train a V-Net on labelled CT scans.

    python train.py --data-dir data/FLARE22Train --run-dir runs/vnet
    python train.py --resume ...            # go on with the run in --run-dir; start it when there is none
    python train.py --plan --card-gib 6     # what a step needs under each memory plan
    python train.py --help                  # every setting; config.yaml explains them

Writes into the run folder: last.pt and best.pt (by mean validation Dice), log.csv, curves.png, config.yaml, run.json
and val_cases.txt. Ctrl-C, SIGTERM and SIGUSR1 stop a run after the current step; --resume goes on from there.
Exit code 0: done, 1: data refused, 2: settings refused, 3: no memory plan fits, the loss was not finite, the results
could not be written; 130, 143 or 138: stopped by one of those signals.
"""

import argparse
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.config import Config, add_config_flags, config_from_flags
from core.network import build_network
from core.scoring.overlap import mean_defined, organ_scores
from core.system.exits import REFUSED, USAGE, refusing, run_command
from core.training.augment import augment
from core.training.batches import describe_cases
from core.training.device import training_precision
from core.training.losses import loss_named
from core.training.memory_plans import step_that_fits
from core.training.run import Run
from core.training.setup import Training, check_settings, make_optimizer, move_network, seed_torch
from core.training.splitting import split
from core.training.step import count_pairs, validation_step
from dataset import CaseDataset, find_cases_of_all, find_data, reading_of


def start_training(config: Config, device: torch.device, processes: int = 1) -> Training:
    """Make the network, the loss, the optimizer and the loss scaler of fp16, as the settings say.

    Raises:
        ValueError: when the settings ask for what the device cannot do, or for what does not go together.
    """
    seed_torch(config.seed, config.deterministic)  # the same first weights in every process
    network = build_network(config)
    check_settings(config, network, processes)
    precision = training_precision(config, device)
    move_network(network, config, device)
    return Training(
        network,
        loss=loss_named(config.loss),
        optimizer=make_optimizer(network, config.learning_rate, config.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        precision=precision,
        max_grad_norm=config.max_grad_norm,
        accumulation_steps=config.accumulation_steps,
        patch_size=config.patch_size,
    )


def train(run: Run, train_set: CaseDataset, val_set: CaseDataset) -> None:
    """Train for all epochs that are left; each ends with a row of log.csv, best.pt if it is the best, last.pt if due.

    Raises:
        NotFiniteError, Stopped: as `train_one_epoch`.
    """
    # Before the first epoch, so that a broken file shows now.
    train_facts = describe_cases(train_set, run.workers, run.group, train=True)
    val_facts = describe_cases(val_set, run.workers, run.group)
    run.prepare(train_set, train_facts, val_facts)
    batches, val_batches = run.loader(train_set, train=True), run.loader(val_set, train=False)
    with run.under_way(batches):
        for _ in run.epochs():
            train_one_epoch(run, batches)
            scores = validate(run, val_batches) if run.validation_is_due(val_batches) else {}
            run.finish_epoch(scores)


def train_one_epoch(run: Run, batches: DataLoader) -> None:
    """Run the steps that are left of the epoch.

    Raises:
        NotFiniteError: naming the step and its cases; that step has changed no weight.
        Stopped: when a signal asked for it; last.pt is written.
    """
    training, config = run.training, run.config
    training.network.train()
    for step, batch in run.steps(batches):
        image, labels = to_device(batch, run.device)
        if config.augment or config.patch_size:  # with patch_size, `augment` also draws the patches
            image, labels = augment(image, labels, batch["extent_mm"], config, run.epoch, batch["positions"])
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.epochs * len(batches))
        loss = step_that_fits(training, image, labels, batch["annotated"], batch["weight"])
        run.record_loss(loss, batch)


def validate(run: Run, batches: DataLoader) -> dict[str, float]:
    """Return loss and Dice over the held-out cases, on the network's grid (evaluate.py scores on the scans' own grids).

    Raises:
        Stopped: when a signal asked for it; last.pt is written.
    """
    organs = run.config.organs
    rows = []  # of each case: its place in the list, its loss, and its Dice by organ
    with run.evaluating():
        for place, batch in run.until_stopped(batches):
            image, labels = to_device(batch, run.device)
            loss, predicted = validation_step(run.training, image, labels, batch["annotated"])
            matrix = count_pairs(labels, predicted, len(organs))
            of_case = np.where(batch["annotated"][0], organ_scores(matrix)["dice"], np.nan)
            rows.append((place, loss, of_case[1:]))
        _, losses, dice = zip(*run.gather(rows), strict=True)
    scores = {organ: mean_defined(column)[0] for organ, column in zip(organs[1:], np.transpose(dice), strict=True)}
    columns = {f"dice_{organ.replace(' ', '_')}": score for organ, score in scores.items()}
    return {"val_loss": float(np.mean(losses)), "val_dice": mean_defined(scores.values())[0], **columns}


def to_device(batch: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the image (B, 1, X, Y, Z) as float32 in 0..1 and the labels (B, X, Y, Z) uint8, on the device."""
    image = batch["image"].to(device, non_blocking=True).float() / 255
    return image, batch["labels"].to(device, non_blocking=True)


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Return the rate of step 0, 1, ... of `steps`: constant, or down to 0 by a cosine or a power of 0.9 (poly)."""
    left = 1 - step / steps
    factor = {"constant": 1.0, "cosine": (1 - math.cos(math.pi * left)) / 2, "poly": left**0.9}[config.schedule]
    return config.learning_rate * factor


def draw_curves(*paths_and_organs: object) -> None:
    """Draw curves.png; imported here, because a run goes on without matplotlib."""
    from visualization.curves import draw_curves

    draw_curves(*paths_and_organs)


def main() -> int:
    """Read the settings, find and split the cases, train."""
    arguments = parse_arguments()
    with refusing(USAGE):
        config = config_from_flags(arguments)
        if arguments.plan:
            from core.training.memory_count import show_plans

            return show_plans(config, arguments.card_gib)
        run = Run(config, draw_curves, arguments.resume, arguments.overwrite, arguments.extend)
        run.load(start_training(config, run.device, run.group.size))
        data_dirs = [find_data(folder) for folder in config.data_dir]
    with refusing(REFUSED):
        cases = find_cases_of_all(data_dirs, reading_of(config))
    with refusing(USAGE):
        train_cases, val_cases, how = split(cases, config)
        train_set, val_set = CaseDataset(train_cases, config), CaseDataset(val_cases, config)
        made = [case.id for case in train_cases if case.weight is not None]
        run.start({"train": train_set.ids, "val": val_set.ids, "made": made}, how)
    return run.carry_out(lambda: train(run, train_set, val_set))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train a V-Net on labelled CT scans.",
        epilog="Every setting of config.yaml is a flag; flags override the file.",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir; start it if none")
    parser.add_argument("--extend", action="store_true", help="with --resume: go on for more --epochs than the run had")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run-dir")
    parser.add_argument("--plan", action="store_true", help="print what a step needs under each memory plan, and end")
    parser.add_argument("--card-gib", type=float, metavar="G", help="with --plan: which plan a card of G GiB would get")
    add_config_flags(parser)
    arguments = parser.parse_args()
    if arguments.card_gib is not None and not arguments.plan:
        parser.error("--card-gib: got no --plan, which it belongs to; --memory chooses a run's plan")
    return arguments


if __name__ == "__main__":
    run_command(main)
