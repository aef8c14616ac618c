"""Write a trained network as ONNX, for programs without torch.

    python -m core.export runs/vnet/best.pt model.onnx

The model maps `image`, (1, 1, X, Y, Z) float32 in 0..1 on the network's grid, to `logits`, (1, K, X, Y, Z) float32. Its
metadata say how to make the image of a scan, and what the classes are; docs/onnx_example.py does so without torch.
Exit code 0: done, 2: wrong usage, or a checkpoint that cannot be used.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from core.checkpoint import fingerprint_of, hash_of, load_network
from core.config import Config
from core.system.exits import DONE, USAGE, refusing, run_command
from core.system.files import user_path, whole_file

SUFFIX = ".onnx"


def metadata_of(config: Config, fingerprint: str) -> dict[str, str]:
    """Return what a program must know beside the network, each as JSON; organs by id, background first."""
    facts = {key: getattr(config, key) for key in ("window_hu", "size", "crop", "organs")}
    facts |= {"orientation": "RAS+", "network": fingerprint}
    return {key: json.dumps(value) for key, value in facts.items()}


def export(network: nn.Module, config: Config, path: Path) -> None:
    """Write a network in evaluation mode, with its grid and metadata, as ONNX.

    Raises:
        OSError: when the file cannot be written.
        ValueError: when the packages for ONNX are missing, or the network has an operation that ONNX lacks.
    """
    try:
        import onnx  # noqa: F401 - torch.onnx needs both
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{path}: a package for ONNX is missing ({error}); pip install onnx onnxscript") from error
    example = torch.zeros(1, 1, *config.size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # or it tells of other packages that are not installed
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                network, (example,), dynamo=True, input_names=["image"], output_names=["logits"], verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"{path}: torch cannot write this network as ONNX ({error})") from error
    program.model.metadata_props.update(metadata_of(config, fingerprint_of([hash_of(network)])))
    with whole_file(path) as temporary:
        program.save(temporary, external_data=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=user_path, help="best.pt or last.pt of a run")
    parser.add_argument("output", type=user_path, help=f"the model to write: *{SUFFIX}")
    args = parser.parse_args(arguments)
    with refusing(USAGE):
        if args.output.suffix.lower() != SUFFIX:
            raise ValueError(f"{args.output}: expected a name that ends in {SUFFIX}")
        if args.output.is_dir():
            raise ValueError(f"{args.output}: is a folder, expected a file to write")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        network, content = load_network(args.checkpoint)
        export(network, content["config"], args.output)
    print(f"{args.output} written")
    return DONE


if __name__ == "__main__":
    run_command(main)
