"""Train a V-Net on labelled CT scans.

    python train.py --data-dir data/FLARE22Train --run-dir runs/vnet
    python train.py --resume ...            # go on with the run in --run-dir; start it when there is none
    python train.py --plan --card-gib 6     # what a step needs under each memory plan
    python train.py --help                  # every setting; config.yaml explains them

Writes into the run folder: last.pt and best.pt (by mean validation Dice), log.csv, curves.png, config.yaml, run.json
and val_cases.txt. Exit code 0: done, 1: data refused, 2: settings refused, 3: no memory plan fits,
or the loss was not finite.
"""

import argparse
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from core.checkpoint import build_network, load_checkpoint, load_weights, save_checkpoint
from core.config import DEFAULT_CONFIG, Config, add_config_flags, flags_given, load_config
from core.exits import DONE, REFUSED, STOPPED, USAGE, print_error, refusing, run_command
from core.memory import choose_plan, format_plans, plan_for, predict, step_that_fits, what_would_fit
from core.metrics import confusion_matrix, mean_defined, organ_scores
from core.run_folder import RunFolder
from core.step import (
    DTYPES,
    PLANS,
    Loss,
    NotFiniteError,
    RunningLoss,
    Training,
    choose_device,
    choose_precision,
    compile_network,
    make_optimizer,
    to_channels_last,
    validation_step,
)
from dataset import HU_PERCENTILES, CaseDataset, EpochOrder, augment, find_cases, find_data, reading_of, split_cases


def train_one_epoch(
    training: Training, loader: DataLoader, config: Config, epoch: int, device: torch.device, bar: tqdm
) -> dict[str, float]:
    """One pass over the training cases: the mean loss, and the seconds of waiting for data.

    A loss is read when the next step is on its way, so that a GPU, still busy with a step, finds the next one waiting.
    On a GPU the seconds are an upper bound: it may be at work on a step meanwhile.

    Raises:
        NotFiniteError: naming the step and its cases; that step has changed no weight.
    """
    training.network.train()
    loader.sampler.epoch = epoch
    losses, running, waited, asked = [], None, 0.0, time.perf_counter()
    for number, batch in enumerate(loader):
        waited += time.perf_counter() - asked
        image, labels = to_device(batch, device)
        if config.augment:
            positions = range(number * config.batch_size, number * config.batch_size + len(image))
            image, labels = augment(image, labels, batch["extent_mm"], config, epoch, positions)
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(config, (epoch - 1) * len(loader) + number, config.epochs * len(loader))
        where = f"epoch {epoch}, step {number + 1}, case {', '.join(batch['case'])}"
        before, running = running, RunningLoss(step_that_fits(training, image, labels), where)
        if before is not None:
            losses.append(before.read())
            bar.set_description(f"epoch {epoch}/{config.epochs} loss {np.mean(losses):.4f}")
        bar.update()
        asked = time.perf_counter()
    losses.append(running.read())
    return {"train_loss": float(np.mean(losses)), "data_seconds": waited}


def validate(training: Training, loader: DataLoader, organs: Sequence[str], device: torch.device) -> dict[str, float]:
    """Loss and Dice over the held-out cases, on the network's grid (evaluate.py scores on the scans' own grids)."""
    training.network.eval()
    losses, dice = [], []
    for batch in loader:
        image, labels = to_device(batch, device)
        loss, predicted = validation_step(training, image, labels)
        losses.append(loss)
        matrix = confusion_matrix(labels.cpu().numpy(), predicted.cpu().numpy(), len(organs))
        dice.append(organ_scores(matrix)["dice"][1:])
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


def case_ids(train_set: CaseDataset, val_set: CaseDataset) -> dict[str, list[str]]:
    """Which cases a run trains on and which it holds out."""
    return {"train": [case.id for case in train_set.cases], "val": [case.id for case in val_set.cases]}


def describe_cases(dataset: CaseDataset, workers: int) -> dict:
    """Read every training case once, which fills the cache, and note what infer.py compares new scans with.

    Returns:
        of each axis' extent in mm, and of each HU percentile of the body, the smallest and the largest.
    """
    found = {"extent_mm": [], "hu_percentiles": []}  # of each case three numbers
    for sample in tqdm(DataLoader(dataset, num_workers=workers), desc="preparing cases", disable=None):
        for name, values in found.items():
            values += sample[name].tolist()
    ranges = {
        name: {"min": np.min(values, axis=0).tolist(), "max": np.max(values, axis=0).tolist()}
        for name, values in found.items()
        if values
    }
    return {"percentiles": list(HU_PERCENTILES), **ranges}


def make_loader(dataset: CaseDataset, config: Config, device: torch.device, train: bool) -> DataLoader:
    """Batches in the order that (seed, epoch) gives for training, single cases in their own order for validation."""
    return DataLoader(
        dataset,
        batch_size=config.batch_size if train else 1,
        sampler=EpochOrder(len(dataset), config.seed) if train else None,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
    )


def start_training(config: Config, device: torch.device) -> Training:
    """Network, optimiser and the rest as the settings say, before the first step.

    Raises:
        ValueError: when the settings ask for what the device cannot do, or for what does not go together.
    """
    precision = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)
    # Off on purpose: trying cuDNN's algorithms takes gigabytes of workspace and picks other ones in every run.
    torch.backends.cudnn.benchmark = False
    network = build_network(config).to(device)
    if config.channels_last:
        to_channels_last(network)
    if config.compile:
        if config.memory not in ("auto", "off"):
            raise ValueError(f"compile: got true with memory: {config.memory}, expected false, or memory: auto or off")
        compile_network(network, device)
    optimizer = make_optimizer(network, config.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    return Training(network, Loss(config.loss), optimizer, scaler, precision)


def resume_training(training: Training, checkpoint: dict, path: str) -> None:
    """Put network, optimiser and scaler back to where the checkpoint's epoch left them."""
    load_weights(training.network, checkpoint, path)
    for group in checkpoint["optimizer"]["param_groups"]:
        group["fused"] = True  # a checkpoint from a CPU could have it otherwise once
    training.optimizer.load_state_dict(checkpoint["optimizer"])
    training.scaler.load_state_dict(checkpoint["scaler"])


def train(
    training: Training,
    folder: RunFolder,
    train_set: CaseDataset,
    val_set: CaseDataset,
    device: torch.device,
    resumed: dict,
) -> None:
    """All epochs after the resumed one; each leaves a row in log.csv, the curves, last.pt, and best.pt if it is."""
    from visualization.curves import draw_curves

    config, network = folder.config, training.network
    ids, training_data = case_ids(train_set, val_set), describe_cases(train_set, config.workers)
    describe_cases(val_set, config.workers)  # read now, so that a broken file shows before the first epoch
    train_loader, val_loader = (make_loader(part, config, device, part is train_set) for part in (train_set, val_set))
    training.plan = choose_plan(training, config, device)
    if config.compile and training.plan != "off":
        print(f"compile has no effect under the memory plan {training.plan}", flush=True)
    done, best_dice = resumed.get("epoch", 0), resumed.get("best_dice", -1.0)
    bar = tqdm(total=config.epochs * len(train_loader), initial=done * len(train_loader), disable=None, unit="step")
    for epoch in range(done + 1, config.epochs + 1):
        started = time.perf_counter()
        row = dict.fromkeys(folder.log_columns) | {"epoch": epoch}
        row |= train_one_epoch(training, train_loader, config, epoch, device, bar)
        if len(val_set) and (epoch % config.val_interval == 0 or epoch == config.epochs):
            row |= validate(training, val_loader, config.organs, device)
            if not math.isfinite(row["val_loss"]):
                raise NotFiniteError(f"epoch {epoch}: the validation loss is {row['val_loss']}; it was not saved")
        row |= {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(device)}
        folder.append_log(row)
        draw_curves(folder.log, folder.curves, config.organs)

        facts = {"epoch": epoch, "val_dice": row["val_dice"], "training_data": training_data, "cases": ids}
        if row["val_dice"] is not None and row["val_dice"] > best_dice:
            best_dice = row["val_dice"]
            save_checkpoint(folder.best, network, config, **facts)
        state = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
        save_checkpoint(folder.last, network, config, best_dice=best_dice, **facts, **state)
        bar.write(summary_line(row, config.epochs))
        if row["val_dice"] is not None:
            bar.set_postfix(dice=f"{row['val_dice']:.4f}")
    bar.close()


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
            return show_plans(config, arguments.card_gib)
        device = choose_device(config.device)
        folder = RunFolder(config)
        resumed = folder.find_run(arguments.resume, arguments.overwrite)
        training = start_training(config, device)
        if resumed:
            resume_training(training, resumed, folder.last)
        elif config.init_from is not None:
            load_weights(training.network, load_checkpoint(config.init_from, device), config.init_from)
        data_dir = find_data(config.data_dir)
    with refusing(REFUSED):
        cases = find_cases(data_dir, reading_of(config))
    with refusing(USAGE):
        train_cases, val_cases, how = split_cases(cases, config.val_cases, config.val_fraction, config.seed)
        train_set, val_set = CaseDataset(train_cases, config), CaseDataset(val_cases, config)
        ids = case_ids(train_set, val_set)
        if resumed:
            folder.check_same_cases(resumed["cases"], ids)
        else:
            fingerprint = [train_set.key(case) for case in train_cases]
            folder.start(device, ids, fingerprint, arguments.overwrite)
    print(f"{len(train_cases)} cases to train on; {how}; on {device} in {training.precision}", flush=True)
    if resumed and resumed["epoch"] >= config.epochs:
        print(f"{folder.path}: all {config.epochs} epochs are done")
        return DONE
    with refusing(REFUSED):
        try:
            train(training, folder, train_set, val_set, device, resumed or {})
        except NotFiniteError as error:
            print_error(error)
            return STOPPED
    print(f"the run is in {folder.path}: last.pt, {'best.pt, ' * folder.best.is_file()}log.csv, curves.png")
    return DONE


def show_plans(config: Config, card_gib: float | None) -> int:
    """Print what a step needs on a GPU under each memory plan, and which would be chosen for a card of that size."""
    precision = DTYPES["bf16" if config.precision == "auto" else config.precision]
    needs = [predict(config, plan, precision) for plan in PLANS]
    print(format_plans(needs))
    if card_gib is None:
        return DONE
    chosen = plan_for(needs, card_gib)
    if chosen is None:
        print(f"no plan fits a card of {card_gib:g} GiB; {what_would_fit(config, precision, card_gib)}")
        return STOPPED
    print(f"on a card of {card_gib:g} GiB: {chosen.plan}")
    return DONE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a V-Net on labelled CT scans.",
        epilog="Every setting of config.yaml is a flag; what is given here goes before the file.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="settings (default: config.yaml)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir; start it if none")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run-dir")
    parser.add_argument("--plan", action="store_true", help="print what a step needs under each memory plan, and end")
    parser.add_argument("--card-gib", type=float, metavar="G", help="with --plan: which plan a card of G GiB would get")
    add_config_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
