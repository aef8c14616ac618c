"""Another network and another loss, through all scripts: a researcher changes one function and one table entry."""

import csv
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from warm import Script, run_script

from data.make_phantom import write_phantom

ROOT = Path(__file__).resolve().parents[1]
ORGANS = 14
NETWORK = '''
class UNet(nn.Module):
    """A U-Net of one level, in a few lines."""

    def __init__(self, classes):
        super().__init__()
        self.down = nn.Conv3d(1, 8, 2, stride=2)
        self.norm = nn.BatchNorm3d(8)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.last = nn.Conv3d(9, classes, 3, padding=1)

    def forward(self, x):
        return self.last(torch.cat([x, self.up(self.norm(self.down(x)).relu())], dim=1))


def build_network(config):
    return UNet(len(config.organs))
'''
LOSS = '''

def hardest(logits, labels):
    """Cross-entropy of the hardest tenth of the voxels."""
    losses = F.cross_entropy(logits, labels.long(), reduction="none").flatten()
    return losses.topk(losses.numel() // 10).values.mean()


LOSSES["hardest"] = hardest
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Return a copy of the repository, in which a researcher has changed the network and added a loss; and phantoms."""
    house = tmp_path_factory.mktemp("house")
    for name in ("train.py", "infer.py", "evaluate.py", "dataset.py", "vnet.py", "config.yaml"):
        shutil.copy(ROOT / name, house)
    for name in ("core", "data", "visualization"):
        ignored = shutil.ignore_patterns("__pycache__", "FLARE22Train", "vendor")
        shutil.copytree(ROOT / name, house / name, ignore=ignored)
    with open(house / "core" / "network.py", "a") as file:
        file.write("\n\nimport torch\n" + NETWORK)
    with open(house / "core" / "training" / "losses.py", "a") as file:
        file.write(LOSS)
    write_phantom(house / "phantoms", cases=3, shape=(40, 36, 28), seed=0)
    return house


def run(house: Path, *command: object) -> subprocess.CompletedProcess:
    return run_script(*command, cwd=house)


def flags(*more: object) -> list[str]:
    given = ["--data-dir", "phantoms", "--size", 32, 32, 16, "--loss", "hardest", "--learning-rate", 1e-2]
    return [*map(str, given), "--device", "cpu", "--workers", "0", "--checkpoint-minutes", "0", *map(str, more)]


def test_another_network_and_loss_train_resume_infer_and_evaluate(house):
    whole = run(house, "train.py", *flags("--epochs", 6, "--run-dir", "whole", "--augment"))
    assert whole.returncode == 0, whole.stderr
    command = ["train.py", *flags("--epochs", 6, "--run-dir", "cut", "--augment")]
    process = Script(*command, cwd=house)
    end = time.monotonic() + 120
    while not (house / "cut" / "last.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = run(house, *command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, other = (torch.load(house / name / "last.pt", weights_only=True)["network"] for name in ("whole", "cut"))
    assert list(one) == list(other)
    assert "last.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)
    with open(house / "cut" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(row["val_dice"] for row in rows)

    done = run(house, "infer.py", "phantoms", "--checkpoint", "cut/best.pt", "--output", "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    done = run(house, "evaluate.py", "--predictions", "out", "--labels", "phantoms", "--output", "scores")
    assert done.returncode == 0, done.stderr
    with open(house / "scores" / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * (ORGANS - 1)


def test_plans_that_know_v_net_alone_are_refused_and_not_counted(house):
    for plan in ("low", "lowest"):
        done = run(house, "train.py", *flags("--run-dir", "refused", "--memory", plan))
        assert done.returncode == 2
        assert f"memory: got {plan} for a UNet, expected auto or off" in done.stderr
        assert "Traceback" not in done.stderr
    done = run(house, "train.py", *flags("--plan", "--card-gib", 4))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["plan", "off", "Counted"]


def test_what_another_network_cannot_do_is_refused_before_the_cases_are_read(house):
    done = run(house, "train.py", *flags("--run-dir", "refused", "--accumulation-steps", 2, "--batch-size", 2))
    assert done.returncode == 2
    assert "the network (UNet) has batch norm with accumulation_steps" in done.stderr
    with changed(house, "nn.Conv3d(9, classes, 3, padding=1)", "nn.Conv3d(9, classes, 3, padding=1, bias=False)"):
        done = run(house, "train.py", *flags("--run-dir", "refused", "--init-output-bias"))
    assert done.returncode == 2
    assert "init_output_bias: got true for a UNet whose last convolution is not one with a bias" in done.stderr
    assert not (house / "refused").exists()


@pytest.mark.parametrize(
    ("old", "new", "returned"),
    [
        ("nn.Conv3d(9, classes,", "nn.Conv3d(9, classes + 1,", "(1, 15, 32, 32, 16)"),  # no error in any loss
        ("3, padding=1)", "3)", "(1, 14, 30, 30, 14)"),
        ("return self.last(", "return None, self.last(", "tuple"),
    ],
)
def test_logits_of_another_shape_are_refused(house, old, new, returned):
    with changed(house, old, new):
        done = run(house, "train.py", *flags("--run-dir", "refused", "--epochs", 1, "--overwrite"))
    assert done.returncode == 1
    assert f"the network (UNet) returns {returned}, expected (1, 14, 32, 32, 16)" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def changed(house: Path, old: str, new: str) -> Iterator[None]:
    """Change the researcher's network until the block ends."""
    network = house / "core" / "network.py"
    text = network.read_text()
    assert old in text
    network.write_text(text.replace(old, new))
    try:
        yield
    finally:
        network.write_text(text)


def test_a_loss_that_is_in_no_table_is_refused_with_those_that_are(house):
    done = run(house, "train.py", *flags("--run-dir", "refused", "--loss", "easiest"))
    assert done.returncode == 2
    assert "loss: got easiest, expected one of cross_entropy, dice_cross_entropy, hardest" in done.stderr
