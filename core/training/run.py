"""One training run: `Run` resumes it, saves it, stops it and logs it, in one process or several."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.checkpoint import load_checkpoint, load_optimizer, load_weights, load_weights_for_organs
from core.config import Config
from core.scans.annotated import with_known
from core.system.exits import DONE, REFUSED, STOPPED, Stopped, StopSignals, print_error, print_line, refusing
from core.system.processes import join_group, leave_group, own_device
from core.training.batches import CaseFacts, make_loader, naming_dead_workers, warn_of_held_out, workers_that_fit
from core.training.device import choose_device
from core.training.log_table import summary_line
from core.training.memory_plans import choose_plan, take_peak_gib
from core.training.resuming import check_same_run
from core.training.run_folder import RunFolder, SilentRunFolder
from core.training.setup import EMA, Training, initialise_output_bias
from core.training.step import NotFiniteError, PendingLoss
from core.training.tensorboard import check_tensorboard


class Run:
    """State of one training run; last.pt stores all of it.

    Under torchrun every process has one; only the first writes files and prints.

    Args:
        config: the settings.
        draw_curves: draws curves.png, given the paths of log.csv and of the picture, and the organs.
        resume: go on with the run in the run folder; start it where there is none.
        overwrite: replace the run in the run folder.
        extend: with `resume`, go on for more epochs than the run had.

    Attributes:
        device: that this process computes on.
        group: the processes of the run.
        folder: the run folder.
        training: network, loss, optimizer and the rest, from `load`.
        epoch: the epoch under way, from 1.
        losses: of the steps of this epoch so far.
        best_dice: the highest mean validation Dice so far.

    Raises:
        OSError, ValueError: when the run folder or the device cannot be used as asked for.
    """

    training: Training

    def __init__(
        self, config: Config, draw_curves: Callable, resume: bool = False, overwrite: bool = False, extend: bool = False
    ):
        self.config = config
        if config.tensorboard:
            check_tensorboard(config.run_dir)
        self.device = choose_device(own_device(config.device))
        self.group = join_group(self.device)
        self.folder = RunFolder(config, draw_curves) if self.group.first else SilentRunFolder(config)
        self.folder.lock()
        self.resumed = self.folder.find_run(resume, overwrite, extend)  # the checkpoint to go on from, or None
        self.workers = workers_that_fit(config)  # processes that load cases
        self.facts: dict = {"processes": self.group.size}  # for every checkpoint
        self.epoch, self.losses, self.best_dice = 1, [], -1.0
        self.pending: PendingLoss | None = None
        self.signals, self.saved, self.waited = StopSignals(), time.monotonic(), 0.0

    # ---- Start and resume ----

    def load(self, training: Training) -> None:
        """Take over what is trained, with the state of the checkpoint to go on from or the weights of init_from.

        Raises:
            OSError, ValueError: when the checkpoint cannot be read, or is of another network.
        """
        self.training = training
        training.any_process = self.group.any
        self.keeps_last_layer, checkpoint = self.resumed is not None, self.resumed
        if self.resumed:
            load_weights(training.network, self.resumed, self.folder.last)
            load_optimizer(training.optimizer, self.resumed, self.folder.last, training.scaler)
        elif self.config.init_from is not None:
            checkpoint = load_checkpoint(self.config.init_from)
            left_out = load_weights_for_organs(training.network, self.config, checkpoint, warn=self.group.first)
            self.keeps_last_layer = left_out is None
            if left_out:
                self.say(left_out)
        # The organs that the weights know; data without them must not make the network forget them.
        self.known = checkpoint.get("training_data", {}).get("organs", ()) if self.keeps_last_layer else ()
        if self.config.ema_decay:
            training.ema = EMA(training.network, self.config.ema_decay)
            if self.resumed:
                training.ema.load(self.resumed["ema"], self.folder.last)
        if self.resumed:
            self.epoch, self.losses = self.resumed["epoch"] + 1, list(self.resumed.get("losses", []))
            self.best_dice = self.folder.best_dice = self.resumed.get("best_dice", self.best_dice)

    def start(self, cases: dict[str, list[str]], how: str) -> None:
        """Begin the run folder, or check that a resumed run goes on with the same cases; say what is trained on.

        `cases` are the ids of those to "train" on, held out, "val", and with "made" labels; `how` they were chosen.

        Raises:
            OSError, ValueError: when the folder cannot be written, or the cases are others.
        """
        self.group.wait()  # until all processes have looked at the folder
        self.facts["cases"] = cases
        if self.resumed:
            check_same_run(self.folder.path, self.resumed, cases, self.group.size)
            self.folder.go_on(self.resumed["config"], self.device, cases)
        elif not self.folder.replaces:
            self.folder.start(self.device, cases)
        processes = f" in {self.group.size} processes" if self.group.size > 1 else ""
        where = f"on {self.device} in {self.training.precision}{processes}"
        made = f" ({len(cases['made'])} with labels that a network has made)" if cases["made"] else ""
        self.say(f"{len(cases['train'])} cases to train on{made}; {how}; {where}")

    def prepare(self, train_set: Dataset, to_train: CaseFacts, held_out: CaseFacts) -> None:
        """Finish what the first step needs: the facts of the data, the memory plan, the output bias.

        Args:
            train_set: the training cases.
            to_train: of them; with its ranges infer.py compares new scans.
            held_out: of the others.
        """
        training, config = self.training, self.config
        training.never_annotated = train_set.never_annotated(self.known)
        if self.group.first:
            warn_of_held_out(to_train, held_out)
        fingerprints = to_train.fingerprints | held_out.fingerprints
        taught = with_known(to_train.ranges["organs"], self.known, config.organs)
        training_data = to_train.ranges | {"organs": taught}
        self.facts |= {"training_data": training_data, "fingerprints": fingerprints}
        training.plan = choose_plan(training, config, self.device, self.group, self.folder)
        if self.folder.replaces:  # only now: a run that is refused leaves the earlier one
            self.folder.start(self.device, self.facts["cases"])
        self.folder.compare_data((self.resumed or {}).get("fingerprints"), fingerprints)
        if config.compile and training.plan != "off":
            self.say(f"compile has no effect under the memory plan {training.plan}")
        if config.init_output_bias and not self.keeps_last_layer:
            initialise_output_bias(training.network, len(config.organs), train_set, self.group)
            if training.ema:
                training.ema = EMA(training.network, config.ema_decay)

    def loader(self, dataset: Dataset, train: bool) -> DataLoader:
        """Return the loader of this process's share of the cases."""
        return make_loader(dataset, self.config, self.workers, self.device, self.group, train)

    # ---- Epochs and steps ----

    def carry_out(self, train: Callable[[], None]) -> int:
        """Call `train` and return the exit code: however it ends, what was reached is saved, noted and said."""
        if self.epoch > self.config.epochs:
            self.say(f"{self.folder.path}: all {self.config.epochs} epochs are done")
            leave_group(self.group)
            return DONE
        with refusing(REFUSED), naming_dead_workers():
            try:
                with self.folder.noting_the_end():
                    train()
            except (NotFiniteError, ConnectionError) as error:
                print_error(error)
                return STOPPED
            except Stopped as stopped:
                leave_group(self.group)
                why_not = f"cannot be saved ({self.folder.unwritten})"
                kept = why_not if self.folder.unwritten else "is saved: --resume goes on from here"
                print_line(f"stopped by {stopped}; the run {kept}", sys.stderr)
                return stopped.exit_code
        if self.folder.unwritten:
            print_error(self.folder.unwritten)
            return STOPPED
        leave_group(self.group)
        self.say(f"the run is in {self.folder.path}: {', '.join(self.folder.results())}")
        return DONE

    @contextmanager
    def under_way(self, batches: DataLoader) -> Iterator[None]:
        """Show the progress, and let signals stop the run after a step instead of at once, until the block ends."""
        steps = len(batches)
        done, total = (self.epoch - 1) * steps + len(self.losses), self.config.epochs * steps
        bar = tqdm(total=total, initial=done, disable=None if self.group.first else True, unit="step")
        with self.signals, bar as self.bar:
            yield

    def epochs(self) -> Iterator[int]:
        """Yield the number of each epoch that is left.

        Raises:
            Stopped: when a signal asked for it; last.pt is written.
        """
        while self.epoch <= self.config.epochs:
            if self.group.any(self.signals.received is not None):
                self.checkpoint()
                self.stop_if_asked()
            self.epoch_started, self.waited = time.perf_counter(), 0.0
            yield self.epoch

    def steps(self, batches: DataLoader) -> Iterator[tuple[int, dict]]:
        """Yield the number of each step that is left of this epoch, counted from the run's first, and its batch.

        The batch gets `positions`, its cases' places in the epoch's order. After each step the run is saved if a
        checkpoint is due.

        Raises:
            NotFiniteError: naming the step and its cases; that step has changed no weight.
            Stopped: when a signal asked for it; last.pt is written.
        """
        sampler = batches.batch_sampler
        sampler.epoch, sampler.start = self.epoch, len(self.losses)
        asked = time.perf_counter()
        for number, batch in enumerate(batches, start=sampler.start):
            # On a GPU an upper bound: it may be computing the step before meanwhile.
            self.waited += time.perf_counter() - asked
            batch["positions"] = sampler.positions(number) or range(len(batch["case"]))
            self.training.average_gradients = partial(self.group.average_gradients, weight=sampler.weight(number))
            yield (self.epoch - 1) * len(batches) + number, batch
            if self.checkpoint_is_due():
                self.read_loss()
                self.checkpoint()
                self.stop_if_asked()
            asked = time.perf_counter()
        self.read_loss()

    def record_loss(self, loss: Tensor, batch: dict) -> None:
        """Store a step's loss. It is read after the next step has been launched, so that a GPU never waits for it.

        Raises:
            NotFiniteError: when the loss of the step before is NaN or infinite.
        """
        step = len(self.losses) + (self.pending is not None) + 1
        where = f"epoch {self.epoch}, step {step}, case {', '.join(batch['case'])}"
        pending = PendingLoss(loss, where, batch["annotated"])
        self.read_loss()
        self.pending = pending
        self.bar.update()

    def read_loss(self) -> None:
        """Wait for the loss of the last step, where it has not been read yet."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.losses.append(pending.read())
            self.bar.set_description(f"epoch {self.epoch}/{self.config.epochs} loss {np.mean(self.losses):.4f}")

    # ---- Validation and the end of an epoch ----

    def validation_is_due(self, batches: DataLoader) -> bool:
        """Return True when a validation is due after this epoch and there are cases held out."""
        due = self.epoch % self.config.val_interval == 0 or self.epoch == self.config.epochs
        return due and len(batches.dataset) > 0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network into evaluation mode, with the EMA weights where there are any, until the block ends.

        When a signal stops the block, or memory runs out, the run is saved; --resume repeats the validation.
        """
        try:
            with self.training.ema_weights():
                self.training.network.eval()
                yield
        except (Stopped, MemoryError, RuntimeError, ConnectionError):  # as torch and a lost process say it
            self.checkpoint()
            raise

    def until_stopped(self, batches: DataLoader) -> Iterator[tuple[int, dict]]:
        """Yield the batches of held-out cases with each one's place in the list, until a signal asks to stop."""
        for place, batch in zip(batches.sampler, batches, strict=False):
            if self.signals.received is not None:
                return
            yield place, batch

    def gather(self, rows: list[tuple]) -> list[tuple]:
        """Return the rows of all processes, ordered by their first value.

        Raises:
            Stopped: when a signal asked for it.
        """
        shares = self.group.gather(rows)
        self.stop_if_asked()
        return sorted(chain(*shares), key=lambda row: row[0])

    def finish_epoch(self, scores: dict[str, float]) -> None:
        """Write best.pt if this epoch is the best, its row of log.csv, curves.png, and last.pt if due; begin the next.

        Args:
            scores: of the validation; empty where there was none.

        Raises:
            NotFiniteError: when the validation loss is NaN or infinite; nothing is written then.
        """
        if not np.isfinite(scores.get("val_loss", 0)):
            raise NotFiniteError(f"epoch {self.epoch}: the validation loss is {scores['val_loss']}; it was not saved")
        row = dict.fromkeys(self.folder.log_columns) | {"epoch": self.epoch, "train_loss": float(np.mean(self.losses))}
        row |= scores | {"seconds": time.perf_counter() - self.epoch_started, "data_seconds": self.waited}
        row |= {"peak_gib": take_peak_gib(self.device), "learning_rate": self.training.optimizer.param_groups[0]["lr"]}
        val_dice = row["val_dice"]
        if val_dice is not None:
            self.bar.set_postfix(dice=f"{val_dice:.4f}")
            if val_dice > self.best_dice:
                with self.training.ema_weights():
                    self.folder.keep_best(self.training.network, epoch=self.epoch, val_dice=val_dice, **self.facts)
                self.best_dice = val_dice
        # The log comes first: a row without its checkpoint is written again, a checkpoint without its row is not.
        self.folder.log_epoch(row)
        self.say(summary_line(row, self.config.epochs))
        self.epoch, self.losses = self.epoch + 1, []
        if self.checkpoint_is_due() or self.epoch > self.config.epochs:
            self.checkpoint(val_dice=val_dice)

    # ---- Save and stop ----

    def checkpoint_is_due(self) -> bool:
        """Return True when a checkpoint is due, by time or by a stop signal; all processes agree."""
        minutes = (time.monotonic() - self.saved) / 60
        return self.group.any(minutes >= self.config.checkpoint_minutes or self.signals.received is not None)

    def stop_if_asked(self) -> None:
        """Raise Stopped when any process has received a signal."""
        if self.group.any(self.signals.received is not None):
            raise Stopped(self.signals.received or signal.SIGTERM)

    def checkpoint(self, **facts: object) -> None:
        """Write last.pt, from which --resume goes on as if the run had not stopped.

        Raises:
            NotFiniteError: when a weight is not finite; last.pt is then unchanged.
        """
        training = self.training
        if not all(parameter.isfinite().all() for parameter in training.network.parameters()):
            raise NotFiniteError(f"epoch {self.epoch}, step {len(self.losses)}: weights are not finite; not saved")
        state = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
        progress = {"epoch": self.epoch - 1, "losses": self.losses}
        state |= {"ema": training.ema.weights} if training.ema else {}
        self.folder.save_last(training.network, **self.facts, **facts, **progress, **state)
        self.saved = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, in the first process only."""
        if self.group.first:
            print_line(line, sys.stdout)
