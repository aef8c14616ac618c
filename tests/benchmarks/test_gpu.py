"""benchmarks.gpu, tried on a CPU: its parts, their lines of JSON, and the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--size", "32", "32", "16", "--channels", "2"]


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_parts_are_measured_one_by_one_and_a_failed_one_costs_itself_alone():
    done = run(*SMALL, "--parts", "fp16", "low", "low_without_triton")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    results = {each["part"]: each for each in map(json.loads, lines[:3])}
    assert "precision: got fp16 on a CPU" in results["fp16"]["failed"]
    low = results["low"]["result"]
    assert low["n"] == 10
    assert 0 < low["min"] <= low["median"] <= low["max"]
    # Of the 5x5x5 convolutions alone, forward and backward, at 2 channels.
    fives = [(1, 2, 0)] + [(4, 4, 1)] * 2 + [(8, 8, 2)] * 3 + [(16, 16, 3)] * 3 + [(32, 32, 4)] * 3
    fives += [(32, 32, 3)] * 3 + [(16, 16, 2)] * 3 + [(8, 8, 1)] * 2 + [(4, 4, 0)]
    forward = sum(2 * 125 * c_in * c_out * 32 * 32 * 16 / 8**level for c_in, c_out, level in fives)
    assert low["tflop"] == pytest.approx(3 * forward / 1e12, rel=0.05)
    assert any(line.startswith(f"| low | {low['median']:.3f} | ") for line in lines)
    assert results["low_without_triton"]["result"]["tflop"] == low["tflop"]
    assert any(line.startswith("| low_without_triton | ") for line in lines)
    assert any(line.startswith("| fp16 | failed: ") for line in lines)


def test_the_share_is_of_the_cards_rate_for_a_matrix_product():
    step = {
        "median": 0.5,
        "min": 0.4,
        "max": 0.6,
        "n": 10,
        "counted_gib": 7.7,
        "tflop": 24.0,
        "allocated_gib": 8.0,
    }
    results = [{"part": "card", "result": {"gpu": "Card", "matmul_tflops": 480.0}}, {"part": "off", "result": step}]
    lines = gpu.table(results)
    assert lines[0] == "gpu Card, matmul_tflops 480.0"
    assert "| off | 0.500 | 0.400 | 0.600 | 0.100 | 8.000 | - | 7.700 |" in lines


@pytest.mark.long
def test_an_epoch_of_train_py_is_measured():
    done = run(*SMALL, "--parts", "training")
    assert done.returncode == 0, done.stdout
    training = json.loads(done.stdout.splitlines()[0])["result"]
    assert training["steps"] == 3
    assert 0 <= training["data_wait_s"] <= training["epoch_s"]


def test_the_peers_have_no_channels(run_main):
    code, _, err = run_main(gpu, *SMALL, "--part", "monai")
    assert (code, err) == (2, "error: --channels: monai is measured with config.yaml's network alone; leave it out\n")


def test_a_part_without_time_is_said(run_main):
    code, out, _ = run_main(gpu, *SMALL, "--parts", "augment", "--minutes", "0")
    assert (code, "| augment | failed: no time was left |" in out) == (1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu_the_command_says_so(run_main):
    code, _, err = run_main(gpu)
    assert (code, err.count("\n")) == (2, 1)
    assert "error: device: torch sees no GPU here; --device cpu tries the command" in err
