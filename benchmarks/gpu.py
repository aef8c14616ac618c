"""Measure this repository on a GPU by one command: the step under each plan, its memory, variants, inference, training.

    python -m benchmarks.gpu                   # some 20 minutes on a GPU; the table at the end belongs into RESULTS.md
    python -m benchmarks.gpu --minutes 5       # what can be had in that time
    python -m benchmarks.gpu --parts card off  # only these parts

Each part runs in a process of its own, so that one that fails or hangs costs itself alone, and prints one line of JSON.
Sizes are those of config.yaml. MONAI's V-Net is measured where it is installed.
"""

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks.measuring import machine, time_each
from core.config import Config, load_config
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.training import kernels
from core.training.augment import augment
from core.training.device import choose_device
from core.training.memory_count import count_step
from core.training.setup import PLANS
from core.training.step import training_step

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
WARM_UP, TURNS = 3, 10  # steps
MATMUL = 8192  # rows and columns of the matrix product that tells the card's rate
COPY_BYTES = GIB  # that are copied to tell the rate of its memory
CASES, SHAPE = 4, (512, 512, 100)  # of the phantoms that the training part makes
# Settings besides the defaults, each under the plan off.
VARIANTS = {
    "cudnn_benchmark": {},
    "channels_last": {"channels_last": "true"},
    "compile": {"compile": "true"},
    "fp16": {"precision": "fp16"},
    "float32": {"precision": "float32"},
    "batch_2": {"batch_size": "2"},
}
WITHOUT_TRITON = "low_without_triton"  # the plan low without the kernels of core/training/kernels.py
# Other commands of this folder, which print a line of JSON at their end.
PEERS = {"monai": ["benchmarks.train_step", "--repeats", "10"], "inference": ["benchmarks.inference"]}


# ---- Parts -----------------------------------------------------------------------------------------------------------


def measure_card(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the machine, and the rates of the card: a large matrix product in bf16, and a copy in its memory."""
    rows, size = (MATMUL, COPY_BYTES) if device.type == "cuda" else (MATMUL // 32, COPY_BYTES // 32)
    left, right = (torch.randn(rows, rows, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    jobs = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    seconds = {name: each["median"] for name, each in time_each(jobs, TURNS, device, WARM_UP).items()}
    return machine() | {
        "triton": kernels.TRITON_VERSION,
        "matmul_tflops": 2 * rows**3 / seconds["product"] / 1e12,
        "copy_gb_per_s": 2 * size / seconds["copy"] / 1e9,
    }


def measure_step(config: Config, device: torch.device, plan: str = "off", benchmark: bool = False) -> dict[str, Any]:
    """Return the seconds of training steps as train.py does them, and the memory: measured, and counted beforehand."""
    if plan == WITHOUT_TRITON:
        kernels.triton, plan = None, "low"
    training = train.start_training(config, device)
    torch.backends.cudnn.benchmark = benchmark
    training.plan = plan
    torch.manual_seed(0)
    image = torch.rand(config.batch_size, 1, *config.input_size, device=device)
    labels = torch.randint(len(config.organs), image[:, 0].shape, dtype=torch.uint8, device=device)
    found = time_each({"step": lambda: training_step(training, image, labels)}, TURNS, device, WARM_UP)["step"]
    need = count_step(config, plan, training.precision)
    found |= {"counted_gib": need.peak_gib, "tflop": need.flops / 1e12}
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def measure_augment(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the seconds of augmenting one case."""
    image = torch.rand(1, 1, *config.size, device=device)
    labels = torch.zeros(1, *config.size, dtype=torch.uint8, device=device)
    extent_mm = torch.tensor([[400.0, 400.0, 300.0]])
    jobs = {"augment": lambda: augment(image, labels, extent_mm, config, 1, [0])}
    return time_each(jobs, TURNS, device, WARM_UP)["augment"]


def measure_training(config: Config, device: torch.device) -> dict[str, Any]:
    """Return an epoch's seconds of train.py on phantoms, and those that it waited for data; from the second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        shape = map(str, SHAPE if device.type == "cuda" else (40, 36, 28))
        run_python("-m", "data.make_phantom", f"{folder}/data", "--cases", str(CASES), "--shape", *shape)
        where = [f"--data-dir={folder}/data", f"--run-dir={folder}/run", f"--cache-dir={folder}/cache"]
        settings = [f"--device={device}", "--size", *map(str, config.size), f"--channels={config.channels}"]
        run_python("train.py", *where, *settings, "--augment", "--epochs=3", "--val-fraction=0.25")
        with open(f"{folder}/run/log.csv", newline="") as file:
            rows = list(csv.DictReader(file))[1:]
    return {
        "epoch_s": statistics.median(float(row["seconds"]) for row in rows),
        "data_wait_s": statistics.median(float(row["data_seconds"]) for row in rows),
        "steps": CASES - 1,
    }


def run_python(*arguments: str) -> str:
    """Run a command of this repository; return what it printed.

    Raises:
        ValueError: when it fails; the last line of its errors.
    """
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def measure(part: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Measure one part in this process."""
    if part in PEERS:
        if "channels" in flags:
            raise ValueError(f"--channels: {part} is measured with config.yaml's network alone; leave it out")
        module, *more = PEERS[part]
        grid = ["--size", *flags["size"]] if "size" in flags else ["--size", *map(str, load_config().size)]
        return json.loads(
            run_python("-m", module, *more, *grid, "--device", flags["device"], "--json").splitlines()[-1]
        )
    config = load_config(flags=flags | VARIANTS.get(part, {}))
    device = choose_device(config.device)
    if part in (*PLANS, WITHOUT_TRITON):
        return measure_step(config, device, part)
    if part in VARIANTS:
        return measure_step(config, device, benchmark=part == "cudnn_benchmark")
    return {"card": measure_card, "augment": measure_augment, "training": measure_training}[part](config, device)


PARTS = ("card", *PLANS, WITHOUT_TRITON, *VARIANTS, "augment", "training", *PEERS)


# ---- All parts -------------------------------------------------------------------------------------------------------


def run_part(part: str, flags: list[str], limit_s: float) -> dict[str, Any]:
    """Measure a part in a process of its own; return its result, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            return {"part": part, "failed": f"not done within {limit_s:.0f} s"}
    if process.returncode:
        return {"part": part, "failed": (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return {"part": part, "result": json.loads(out.splitlines()[-1])}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the Markdown tables."""
    found = {each["part"]: each.get("result") for each in results}
    card = found.get("card") or {}
    lines = [", ".join(f"{name} {value}" for name, value in card.items() if value is not None), ""]
    rate = card.get("matmul_tflops")
    lines += ["| step | median s | min | max | of the matmul rate | allocated GiB | reserved | counted |"]
    lines += ["| --- " * 8 + "|"]
    for part in (*PLANS, WITHOUT_TRITON, *VARIANTS):
        row = found.get(part)
        if row:
            share = row["tflop"] / row["median"] / rate if rate else None
            numbers = [row["median"], row["min"], row["max"], share]
            numbers += [row.get(key) for key in ("allocated_gib", "reserved_gib", "counted_gib")]
            lines.append(f"| {part} | " + " | ".join("-" if n is None else f"{n:.3f}" for n in numbers) + " |")
    lines += ["", "| other | result |", "| --- | --- |"]
    for part in ("augment", "training", *PEERS):
        if found.get(part):
            lines.append(f"| {part} | {json.dumps(found[part])} |")
    lines += [f"| {each['part']} | failed: {each['failed']} |" for each in results if "failed" in each]
    return lines


def main() -> int:
    """Measure all parts, or one in this process; return the exit code: 0 done, 1 some part failed, 2 wrong usage."""
    arguments = parse_arguments()
    flags = {"device": arguments.device}
    if arguments.size:
        flags["size"] = list(map(str, arguments.size))
    if arguments.channels:
        flags["channels"] = str(arguments.channels)
    with refusing(USAGE):
        device = choose_device(arguments.device)
        if device.type == "cpu" and arguments.device != "cpu":
            raise ValueError("device: torch sees no GPU here; --device cpu tries the command, with a small --size")
        if arguments.part:
            print(json.dumps(measure(arguments.part, flags), allow_nan=False))
            return DONE
    own = [f"--device={arguments.device}", *(["--size", *flags["size"]] if "size" in flags else [])]
    own += [f"--channels={flags['channels']}"] if "channels" in flags else []
    ends, results = time.monotonic() + 60 * arguments.minutes, []
    for part in arguments.parts or PARTS:
        left = ends - time.monotonic()
        result = run_part(part, own, left) if left > 0 else {"part": part, "failed": "no time was left"}
        results.append(result)
        print(json.dumps(result), flush=True)
    print("\n" + "\n".join(table(results)))
    return REFUSED if any("failed" in each for each in results) else DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure this repository on a GPU.")
    parser.add_argument("--minutes", type=float, default=20, metavar="M", help="for all parts together (default: 20)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--part", choices=PARTS, metavar="PART", help="measure this in this process; print its JSON")
    parser.add_argument("--device", default="auto", help="auto, cuda:N, or cpu to try the command (default: auto)")
    parser.add_argument("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="voxels (default: config.yaml's)")
    parser.add_argument("--channels", type=int, metavar="C", help="of the first stage (default: config.yaml's)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
