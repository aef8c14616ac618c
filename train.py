"""Train a V-Net on labelled CT scans.

    python train.py --data-dir data/FLARE22Train --run-dir runs/vnet
    python train.py --resume ...            # go on with the run in --run-dir; start it when there is none
    python train.py --plan --card-gib 6     # what a step needs under each memory plan
    python train.py --help                  # every setting; config.yaml explains them

Writes into the run folder: last.pt and best.pt (by mean validation Dice), log.csv, curves.png, config.yaml, run.json
and val_cases.txt. Ctrl-C, SIGTERM and SIGUSR1 stop a run after the step that it is at, --resume goes on from there.
Exit code 0: done, 1: data refused, 2: settings refused, 3: no memory plan fits, the loss was not finite, the results
could not be written; 130, 143 or 138: stopped by one of those signals.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from core.checkpoint import check_same_shapes, load_checkpoint, load_optimizer, load_weights
from core.config import DEFAULT_CONFIG, Config, add_config_flags, flags_given, load_config
from core.scoring.overlap import confusion_matrix, mean_defined, organ_scores
from core.system.exits import (
    BY_SIGNAL,
    DONE,
    REFUSED,
    STOPPED,
    USAGE,
    Stopped,
    StopSignals,
    print_error,
    refusing,
    run_command,
)
from core.system.processes import Group, join_group, leave_group, own_device
from core.training.augment import augment
from core.training.batches import make_loader, naming_dead_workers
from core.training.memory_plans import choose_plan, step_that_fits
from core.training.run_folder import RunFolder, check_tensorboard
from core.training.setup import (
    Average,
    Training,
    choose_device,
    start_from_shares,
    start_training,
)
from core.training.step import PLANS, NotFiniteError, RunningLoss, training_step, validation_step
from dataset import (
    CaseDataset,
    case_ids,
    describe_cases,
    find_cases,
    find_data,
    reading_of,
    split,
)


@dataclass
class Run:
    """A run on its way. What it has come to is in `training` and in what stands below it here; last.pt holds it all.

    Attributes:
        training: the network and all that trains it.
        folder: where the run leaves its results.
        signals: that ask it to stop.
        group: the processes at work on it.
        facts: of its data, for every checkpoint.
        epoch: the one under way, from 1.
        losses: of the steps of that epoch which are done.
        best_dice: the highest mean validation Dice so far.
        saved: when last.pt was written, by time.monotonic.
    """

    training: Training
    folder: RunFolder
    signals: StopSignals
    group: Group
    facts: dict
    epoch: int = 1
    losses: list[float] = field(default_factory=list)
    best_dice: float = -1.0
    saved: float = field(default_factory=time.monotonic)

    def checkpoint_is_due(self) -> bool:
        """Whether to save in the midst of an epoch, all processes at the same step: as the time is over, or to stop."""
        minutes = (time.monotonic() - self.saved) / 60
        return self.group.any(minutes >= self.folder.config.checkpoint_minutes or self.signals.received is not None)

    def stop_if_asked(self) -> None:
        """Raise Stopped when any process has got a signal."""
        if self.group.any(self.signals.received is not None):
            raise Stopped(self.signals.received or signal.SIGTERM)

    def checkpoint(self, **facts: object) -> None:
        """Write last.pt, from which --resume goes on as if nothing had been.

        Raises:
            NotFiniteError: when a weight is not finite; last.pt is then the one before.
        """
        training = self.training
        if not all(parameter.isfinite().all() for parameter in training.network.parameters()):
            raise NotFiniteError(
                f"epoch {self.epoch}, step {len(self.losses)}: weights are not finite; none were saved"
            )
        state = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
        progress = {"epoch": self.epoch - 1, "losses": self.losses, "best_dice": self.best_dice}
        if training.average:
            state["average"] = training.average.weights
        if self.group.first:
            with self.folder.writing():
                self.folder.save_last(training.network, **self.facts, **facts, **progress, **state)
        self.saved = time.monotonic()


def train_one_epoch(run: Run, loader: DataLoader, device: torch.device, bar: tqdm) -> float:
    """What is left of the epoch's steps, their losses put into the run: the seconds of waiting for data.

    A loss is read when the next step is on its way, so that a GPU, still busy with a step, finds the next one waiting.
    On a GPU the seconds are an upper bound: it may be at work on a step meanwhile.

    Raises:
        NotFiniteError: naming the step and its cases; that step has changed no weight.
        Stopped: when a signal asked for it; last.pt is written.
    """
    training, config, batches = run.training, run.folder.config, loader.batch_sampler
    # With several processes none may begin a step anew alone, as after running out of memory.
    step = step_that_fits if run.group.size == 1 else training_step
    training.network.train()
    batches.epoch, batches.start = run.epoch, len(run.losses)
    running, waited, asked = None, 0.0, time.perf_counter()
    for number, batch in enumerate(loader, start=len(run.losses)):
        waited += time.perf_counter() - asked
        image, labels = to_device(batch, device)
        if config.augment:
            positions = batches.positions(number) or range(len(image))
            image, labels = augment(image, labels, batch["extent_mm"], config, run.epoch, positions)
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(config, (run.epoch - 1) * len(loader) + number, config.epochs * len(loader))
        training.combine = partial(run.group.add_up, weight=batches.weight(number))
        where = f"epoch {run.epoch}, step {number + 1}, case {', '.join(batch['case'])}"
        before, running = running, RunningLoss(step(training, image, labels), where)
        if before is not None:
            run.losses.append(before.read())
            bar.set_description(f"epoch {run.epoch}/{config.epochs} loss {np.mean(run.losses):.4f}")
        bar.update()
        if run.checkpoint_is_due():
            run.losses.append(running.read())
            running = None
            run.checkpoint()
            run.stop_if_asked()
        asked = time.perf_counter()
    if running is not None:
        run.losses.append(running.read())
    return waited


def validate(run: Run, loader: DataLoader, organs: Sequence[str], device: torch.device) -> dict[str, float]:
    """Loss and Dice over the held-out cases, on the network's grid (evaluate.py scores on the scans' own grids).

    Raises:
        NotFiniteError: when the loss is NaN or infinite.
        Stopped: when a signal asked for it.
    """
    run.training.network.eval()
    found = []  # of each case its place in the list, its loss, and its Dice by organ
    for place, batch in zip(loader.sampler, loader, strict=False):
        if run.signals.received is not None:
            break
        image, labels = to_device(batch, device)
        loss, predicted = validation_step(run.training, image, labels)
        matrix = confusion_matrix(labels.cpu().numpy(), predicted.cpu().numpy(), len(organs))
        found.append((place, loss, organ_scores(matrix)["dice"][1:]))
    shares = run.group.gather(found)
    run.stop_if_asked()
    found = sorted(chain(*shares), key=lambda row: row[0])
    _, losses, dice = zip(*found, strict=True)
    if not np.isfinite(losses).all():
        raise NotFiniteError(f"epoch {run.epoch}: the validation loss is {np.mean(losses)}; it was not saved")
    scores = {organ: mean_defined(column)[0] for organ, column in zip(organs[1:], np.transpose(dice), strict=True)}
    columns = {f"dice_{organ.replace(' ', '_')}": score for organ, score in scores.items()}
    return {"val_loss": float(np.mean(losses)), "val_dice": mean_defined(scores.values())[0], **columns}


def to_device(batch: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the network takes: image (B, 1, X, Y, Z) float32 in 0..1 and labels (B, X, Y, Z) uint8."""
    image = batch["image"].to(device, non_blocking=True).float() / 255
    return image, batch["labels"].to(device, non_blocking=True)


def learning_rate(config: Config, step: int, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`: constant, or down to 0 by a cosine or a power of 0.9 (poly)."""
    left = 1 - step / steps
    factor = {"constant": 1.0, "cosine": (1 - math.cos(math.pi * left)) / 2, "poly": left**0.9}[config.schedule]
    return config.learning_rate * factor


def resume_training(training: Training, checkpoint: dict, path: str) -> None:
    """Load network, optimizer and scaler from a checkpoint.

    Raises:
        ValueError: when it belongs to another network.
    """
    load_weights(training.network, checkpoint, path)
    load_optimizer(training.optimizer, checkpoint, path, training.scaler)
    if "average" in checkpoint:
        parameters = dict(training.network.named_parameters())
        check_same_shapes(checkpoint["average"], parameters, f"{path}: its average is another network's")


def train(
    training: Training,
    folder: RunFolder,
    train_set: CaseDataset,
    val_set: CaseDataset,
    device: torch.device,
    group: Group,
    resumed: dict,
) -> None:
    """All that is left of the epochs; each leaves a row in log.csv, the curves, last.pt, and best.pt if it is.

    Raises:
        NotFiniteError, Stopped: as `train_one_epoch`.
    """
    config = folder.config
    training_data = describe_cases(train_set, config.workers, group)
    describe_cases(val_set, config.workers, group)  # read now, so that a broken file shows before the first epoch
    for part in (train_set, val_set):
        part.warn_no_more()
    facts = {"training_data": training_data, "cases": case_ids(train_set, val_set)}
    train_loader, val_loader = (
        make_loader(part, config, device, group, part is train_set) for part in (train_set, val_set)
    )
    plans = group.gather(choose_plan(training, config, device))
    training.plan = max(plans, key=PLANS.index)  # what fits every card
    if config.compile and training.plan != "off":
        print(f"compile has no effect under the memory plan {training.plan}", flush=True)
    if config.init_output_bias and not resumed and config.init_from is None:
        start_from_shares(training.network, train_set, group)
    if config.ema_decay:
        training.average = Average(training.network, config.ema_decay)
        for name, weight in resumed.get("average", {}).items():
            training.average.weights[name].copy_(weight)
    with StopSignals() as signals:
        run = Run(training, folder, signals, group, facts)
        if resumed:
            run.epoch, run.best_dice = resumed["epoch"] + 1, resumed.get("best_dice", run.best_dice)
            run.losses = list(resumed.get("losses", []))
        steps = (run.epoch - 1) * len(train_loader) + len(run.losses)
        with tqdm(
            total=config.epochs * len(train_loader), initial=steps, disable=None if group.first else True, unit="step"
        ) as bar:
            while run.epoch <= config.epochs:
                run.stop_if_asked()
                row = one_epoch(run, train_loader, val_loader, device, bar)
                if group.first:
                    bar.write(summary_line(row, config.epochs))


def one_epoch(run: Run, train_loader: DataLoader, val_loader: DataLoader, device: torch.device, bar: tqdm) -> dict:
    """Train, validate where it is time to, and leave the results: the epoch's row of log.csv."""
    from visualization.curves import draw_curves

    folder, config = run.folder, run.folder.config
    started = time.perf_counter()
    row = dict.fromkeys(folder.log_columns) | {"epoch": run.epoch}
    row["data_seconds"] = train_one_epoch(run, train_loader, device, bar)
    row["train_loss"] = float(np.mean(run.losses))
    if len(val_loader.dataset) and (run.epoch % config.val_interval == 0 or run.epoch == config.epochs):
        try:
            with run.training.averaged():
                row |= validate(run, val_loader, config.organs, device)
        except Stopped:
            run.checkpoint()  # --resume goes on with the validation
            raise
    row |= {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(device)}
    row["learning_rate"] = run.training.optimizer.param_groups[0]["lr"]  # of the last step
    facts = {"val_dice": row["val_dice"]}
    if row["val_dice"] is not None:
        bar.set_postfix(dice=f"{row['val_dice']:.4f}")
        if row["val_dice"] > run.best_dice and run.group.first:
            with folder.writing(), run.training.averaged():
                folder.save_best(run.training.network, epoch=run.epoch, **facts, **run.facts)
                run.best_dice = row["val_dice"]
    # The log comes first: a row without its checkpoint is written again, a checkpoint without its row is not.
    if run.group.first:
        with folder.writing():
            folder.append_log(row)
            if config.tensorboard:
                folder.write_scalars(row)
            draw_curves(folder.log, folder.curves, config.organs)
    run.epoch, run.losses = run.epoch + 1, []
    run.checkpoint(**facts)
    return row


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory in use since the last call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def summary_line(row: dict, epochs: int) -> str:
    """One epoch in one line."""
    scores = "" if row["val_dice"] is None else f"  validation loss {row['val_loss']:.4f}  Dice {row['val_dice']:.4f}"
    return f"epoch {row['epoch']:>3}/{epochs}  loss {row['train_loss']:.4f}{scores}  {row['seconds']:.1f} s"


def main() -> int:
    """Read the settings, find and split the cases, train."""
    arguments = parse_arguments()
    with refusing(USAGE):
        config = load_config(arguments.config, flags_given(arguments))
        if arguments.plan:
            from core.training.memory_count import show_plans

            return show_plans(config, arguments.card_gib)
        if config.tensorboard:
            check_tensorboard()
        device = choose_device(own_device(config.device))
        group = join_group(device)
        folder = RunFolder(config)
        if group.first:
            folder.lock()
        resumed = folder.find_run(arguments.resume, arguments.overwrite, arguments.extend)
        training = start_training(config, device, group)
        if resumed:
            resume_training(training, resumed, folder.last)
        elif config.init_from is not None:
            load_weights(training.network, load_checkpoint(config.init_from, device), config.init_from)
        data_dir = find_data(config.data_dir)
    with refusing(REFUSED):
        cases = find_cases(data_dir, reading_of(config))
    with refusing(USAGE):
        train_cases, val_cases, how = split(cases, config)
        train_set, val_set = CaseDataset(train_cases, config), CaseDataset(val_cases, config)
        ids = case_ids(train_set, val_set)
        group.wait()  # all have looked at the folder
        if resumed:
            folder.check_same_cases(resumed["cases"], ids)
        elif group.first:
            fingerprint = [train_set.key(case) for case in train_cases]
            folder.start(device, ids, fingerprint, arguments.overwrite)
    if group.first:
        processes = f" in {group.size} processes" if group.size > 1 else ""
        print(
            f"{len(train_cases)} cases to train on; {how}; on {device} in {training.precision}{processes}", flush=True
        )
    if resumed and resumed["epoch"] >= config.epochs:
        if group.first:
            print(f"{folder.path}: all {config.epochs} epochs are done")
        leave_group(group)
        return DONE
    with refusing(REFUSED), naming_dead_workers():
        try:
            with folder.noting_the_end() if group.first else nullcontext():
                train(training, folder, train_set, val_set, device, group, resumed or {})
        except (NotFiniteError, ConnectionError) as error:
            print_error(error)
            return STOPPED
        except Stopped as stopped:
            kept = (
                f"cannot be saved ({folder.unwritten})" if folder.unwritten else "is saved: --resume goes on from here"
            )
            print(f"stopped by {stopped}; the run {kept}", file=sys.stderr)
            return BY_SIGNAL + stopped.number
    if folder.unwritten:
        print_error(folder.unwritten)
        return STOPPED
    leave_group(group)
    if group.first:
        print(f"the run is in {folder.path}: last.pt, {'best.pt, ' * folder.best.is_file()}log.csv, curves.png")
    return DONE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a V-Net on labelled CT scans.",
        epilog="Every setting of config.yaml is a flag; what is given here goes before the file.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="settings (default: config.yaml)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir; start it if none")
    parser.add_argument("--extend", action="store_true", help="with --resume: go on for more --epochs than the run had")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run-dir")
    parser.add_argument("--plan", action="store_true", help="print what a step needs under each memory plan, and end")
    parser.add_argument("--card-gib", type=float, metavar="G", help="with --plan: which plan a card of G GiB would get")
    add_config_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
