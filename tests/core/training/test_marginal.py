"""Organs that are not annotated: the loss by hand, its gradient under every plan, and a run that says what it does."""

import math

import numpy as np
import pytest
import torch
from helpers import TINY
from torch import nn

import train
from core.checkpoint import load_checkpoint
from core.config import load_config
from core.scans.annotated import write_annotated
from core.scans.volumes import load_labels, save_label_map
from core.training.losses import LOSSES, SlabLoss, marginal, to_background
from core.training.setup import PLANS, Training, make_optimizer
from core.training.step import training_step, validation_step
from data import doctor
from dataset import CaseDataset, find_cases
from vnet import VNet

ALL, TWO_LEFT_OUT = torch.tensor([[True] * 4]), torch.tensor([[True, True, False, False]])


def test_background_stands_for_organs_that_are_not_annotated():
    # One voxel each of p = .1 .2 .3 .4, labelled background and organ 1.
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().reshape(1, 4, 1, 1, 1).expand(1, 4, 2, 1, 1)
    labels = torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    loss = marginal(LOSSES["cross_entropy"], TWO_LEFT_OUT)(logits, labels).item()
    assert loss == pytest.approx((-math.log(0.1 + 0.3 + 0.4) - math.log(0.2)) / 2, rel=1e-6)
    merged = to_background(logits, TWO_LEFT_OUT).softmax(dim=1)
    assert merged[0, :, 0, 0, 0].tolist() == pytest.approx([0.8, 0.2, 0, 0])
    assert isinstance(marginal(LOSSES["dice_cross_entropy"], TWO_LEFT_OUT), SlabLoss)  # still without whole logits


def test_where_all_is_annotated_it_is_the_plain_loss():
    loss = LOSSES["dice_cross_entropy"]
    assert marginal(loss, ALL) is loss
    assert marginal(loss, None) is loss


def test_samples_are_annotated_each_in_its_own_way():
    logits, labels = torch.randn(2, 4, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.long)
    merged = to_background(logits, torch.cat([ALL, TWO_LEFT_OUT]))
    assert torch.allclose(merged[0].softmax(dim=0), logits[0].softmax(dim=0))
    both = marginal(LOSSES["cross_entropy"], torch.cat([ALL, TWO_LEFT_OUT]))(logits, labels).item()
    alone = [
        marginal(LOSSES["cross_entropy"], annotated)(logits[i : i + 1], labels[i : i + 1]).item()
        for i, annotated in enumerate((ALL, TWO_LEFT_OUT))
    ]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-5)


def plain_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy and Dice of each sample's own classes, written out."""
    total = 0
    for scores, ids, classes in zip(logits, labels.long(), (slice(0, 4), slice(0, 2)), strict=True):
        p = scores.softmax(dim=0)
        p = torch.cat([1 - p[1 : classes.stop].sum(dim=0, keepdim=True), p[1 : classes.stop]])
        g = nn.functional.one_hot(ids, len(p)).movedim(-1, 0)
        dice = 2 * (p * g).flatten(1).sum(1) / ((p * p).flatten(1).sum(1) + g.flatten(1).sum(1)).clamp(min=1)
        present = g.flatten(1).sum(1)[1:] > 0
        total = total - (p * g).sum(dim=0).log().mean() + ((1 - dice[1:]) * present).sum() / present.sum()
    return total / 2


@pytest.mark.parametrize("slabs", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_has_the_gradient_written_out(plan, slabs):
    torch.manual_seed(0)
    network = VNet(4, 2, (1, 1), (1,)).double()
    image = torch.rand(2, 1, 8, 8, 4).double()
    labels = torch.stack([torch.randint(4, (8, 8, 4)), torch.randint(2, (8, 8, 4))])
    loss = LOSSES["dice_cross_entropy"]
    loss = loss if slabs else SlabLoss.__call__.__get__(loss)
    annotated = torch.cat([ALL, TWO_LEFT_OUT])
    training = Training(network, loss, make_optimizer(network, 1e-9), torch.amp.GradScaler("cpu", enabled=False),
        torch.float64, plan=plan, accumulation_steps=2)  # fmt: skip
    expected = plain_gradient(network(image), labels)
    gradients = torch.autograd.grad(expected, list(network.parameters()))
    found = training_step(training, image, labels, annotated=annotated)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-8 * gradient.norm() + 1e-12
    assert validation_step(training, image, labels, annotated)[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_an_organ_that_no_case_annotates_is_learned_as_absent(plan):
    # Otherwise nothing tells it from the background: it was found in 170 to 3,350 of the 3,880 background voxels.
    torch.manual_seed(0)
    network = VNet(4, 4, (1, 1), (1,))
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    labels[:, 4:10, 4:10, 4:10] = 1
    image = labels[:, None] * 0.5 + 0.2
    training = Training(network, LOSSES["dice_cross_entropy"], make_optimizer(network, 1e-2),
        torch.amp.GradScaler("cpu", enabled=False), torch.float32, plan=plan)  # fmt: skip
    training.never_annotated = ~TWO_LEFT_OUT[0]
    for _ in range(20):
        training_step(training, image, labels, annotated=TWO_LEFT_OUT)
    loss, predicted = validation_step(training, image, labels, TWO_LEFT_OUT)
    assert set(predicted.unique().tolist()) == {0, 1}
    assert loss == pytest.approx(LOSSES["dice_cross_entropy"](network(image), labels).item(), rel=1e-4)


def test_a_run_says_which_organs_are_taught_and_leaves_the_others_out(phantom_data, tmp_path, run_main):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels"):
        (data / name).symlink_to(phantom_data / name)
    kept = ["liver", "spleen", "right kidney", "left kidney"]
    write_annotated(
        data, {f"phantom_000{number}": kept for number in (1, 2, 3, 4)} | {"phantom_0005": [*kept, "aorta"]}
    )
    flags = ["--data-dir", data, "--run-dir", tmp_path / "run", "--cache-dir", "null", *TINY, "--epochs", 1]
    code, out, err = run_main(train, *flags, "--val-cases", "phantom_0001")
    assert code == 0, err
    assert "of 4 cases to train on, so many annotate liver 4, right kidney 4, spleen 4, pancreas 0, aorta 1" in out
    assert "in none of" not in err
    # The label maps hold the pancreas, too, but nothing teaches it.
    taught = load_checkpoint(tmp_path / "run" / "last.pt")["training_data"]["organs"]
    assert taught == ["liver", "right kidney", "spleen", "aorta", "left kidney"]
    header, row = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    dice = dict(zip(header, row, strict=True))
    assert [dice[f"dice_{organ}"] != "" for organ in ("liver", "left_kidney", "pancreas", "aorta")] == [1, 1, 0, 0]


def test_a_run_asks_whether_absent_organs_are_annotated(phantom_data, tmp_path, run_main):
    organs = [*load_config().organs, "bladder"]
    flags = ["--data-dir", phantom_data, "--run-dir", tmp_path / "run", "--cache-dir", "null", *TINY, "--epochs", 1]
    code, _, err = run_main(train, *flags, "--organs", *organs, "--val-cases", "phantom_0001")
    assert code == 0
    assert "in none of the 4 cases to train on: bladder; if one is there but not annotated, say so in" in err


def test_label_maps_that_name_other_organs_are_refused_by_training_and_the_doctor(phantom_data, tmp_path, run_main):
    organs = list(load_config().organs)
    organs[2:4] = organs[3:1:-1]
    (tmp_path / "other.yaml").write_text(f"organs: {organs}\n")
    given = ["--config", tmp_path / "other.yaml"]
    flags = ["--data-dir", phantom_data, "--run-dir", tmp_path / "run", "--cache-dir", "null", *TINY, "--epochs", 1]
    code, _, err = run_main(train, *given, *flags)
    told = (
        "its header says that id 2 is 'right kidney', but the organ list says 'spleen'; give the list of this label map"
    )
    assert (code, err.count(told), err.count("Traceback")) == (1, 1, 0)
    code, out, _ = run_main(doctor, phantom_data, *given, "--workers", 1, "--output", tmp_path / "doctor")
    assert (code, told in out) == (1, True)


def test_a_small_box_of_few_annotated_organs_is_warned_of(phantom_data, tmp_path, run_main):
    data = tmp_path / "data"
    (data / "labels").mkdir(parents=True)
    (data / "images").symlink_to(phantom_data / "images")
    for path in sorted((phantom_data / "labels").iterdir()):
        labels, geometry = load_labels(path)
        organs = [0, 3] if path.name.startswith("phantom_0002") else range(14)  # the spleen alone
        save_label_map(np.where(np.isin(labels, organs), labels, 0), geometry, data / "labels" / path.name)
    write_annotated(data, {"phantom_0002": ["spleen"], "phantom_0003": load_config().organs[1:12]})
    flags = ["--data-dir", data, "--run-dir", tmp_path / "run", "--cache-dir", "null", *TINY, "--epochs", 1]
    code, _, err = run_main(train, *flags, "--crop", "organs", "--val-cases", "phantom_0001")
    assert code == 0
    assert "crop: organs: phantom_0002: the box of the organs that are annotated is less than 50% as long" in err


def test_a_flip_needs_both_sides_annotated(phantom_data, tmp_path, run_main):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels"):
        (data / name).symlink_to(phantom_data / name)
    write_annotated(data, {"phantom_0002": ["liver", "right kidney"]})
    flags = ["--data-dir", data, "--run-dir", tmp_path / "run", "--cache-dir", "null", *TINY, "--epochs", 1]
    code, _, err = run_main(train, *flags, "--augment", "--augment-flip", "--val-cases", "phantom_0001")
    assert code == 2
    assert "annotated.csv lists only one of right kidney and left kidney for case phantom_0002" in err


def test_fine_tuning_on_fewer_organs_does_not_unlearn_the_others(phantom_data, tmp_path, run_main):
    flags = ["--cache-dir", "null", *TINY, "--epochs", 1, "--val-cases", "phantom_0001"]
    assert run_main(train, "--data-dir", phantom_data, "--run-dir", tmp_path / "first", *flags)[0] == 0
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels"):
        (data / name).symlink_to(phantom_data / name)
    write_annotated(data, {f"phantom_000{number}": ["liver", "spleen"] for number in range(1, 6)})
    init = ["--init-from", tmp_path / "first" / "last.pt"]
    for folder, more, known in (("tuned", init, load_config().organs[1:]), ("new", [], ["liver", "spleen"])):
        code, _, err = run_main(train, "--data-dir", data, "--run-dir", tmp_path / folder, *flags, *more)
        assert code == 0, err
        assert load_checkpoint(tmp_path / folder / "last.pt")["training_data"]["organs"] == [*known]
    cases = CaseDataset(find_cases(data), load_config())
    assert cases.never_annotated().sum() == 11
    assert cases.never_annotated(["kidney_left", "aorta"]).nonzero().ravel().tolist() == [2, 4, 6, 7, 8, 9, 10, 11, 12]
