"""Settings: the table of them, settings files, flags.

Every setting is one field of Config, with its default, the rule for its values and its help text. config.yaml lists all
of them for users (tests/core/test_config.py keeps it equal to the table). Another settings file may hold only the keys
that differ from the defaults. Every key is also a flag of train.py, with dashes for underscores: `learning_rate: 1e-4`
in a file is `--learning-rate 1e-4` on the command line.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from core.system.files import user_path, write_text
from core.system.yaml_files import dump_yaml, parse_value, read_yaml, shorten, show_value

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "config.yaml"


@dataclass(frozen=True)
class Rule:
    """The values that a setting may take."""

    kind: type  # of the value, or of each item of a list
    words: str  # the allowed values, for errors and --help
    holds: Callable[[Any], bool] = lambda value: True  # condition on the value, or on the tuple of items
    is_list: bool = False
    optional: bool = False  # null is allowed
    is_path: bool = False  # a leading ~ means the home folder


def whole_number(minimum: int) -> Rule:
    return Rule(int, f"a whole number of {minimum} or more", lambda value: value >= minimum)


def number(low: float, high: float) -> Rule:
    return Rule(float, f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    return Rule(str, f"one of {', '.join(choices)}", lambda value: value in choices)


def are_class_names(names: tuple[str, ...]) -> bool:
    """Return True for names that can be told apart, also as columns of log.csv, and whose ids fit into uint8."""
    distinct = {name.replace(" ", "_") for name in names}
    return 2 <= len(names) <= 256 and len(distinct) == len(names) and all(n.strip() and n.isprintable() for n in names)


FOLDER = Rule(str, "a folder", bool, is_path=True)
FOLDERS = Rule(str, "a folder, or several", all, is_list=True, is_path=True)
BOOLEAN = Rule(bool, "true or false")
FRACTION = Rule(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
NOT_NEGATIVE = Rule(float, "a number, 0 or more", lambda value: value >= 0)
VAL_CASES = Rule(
    str, "case ids (in quotes if all digits), a file of them, or null", bool, is_list=True, optional=True, is_path=True
)
SIZE = Rule(int, "three whole numbers", lambda values: len(values) == 3 and min(values) >= 1, is_list=True)
PATCH_SIZE = replace(SIZE, words="three whole numbers, or null", optional=True)
WINDOW = Rule(
    float, "two numbers, the lower first", lambda values: len(values) == 2 and values[0] < values[1], is_list=True
)
ORGANS = Rule(
    str, "2 to 256 names, all different and printable, the first for background", are_class_names, is_list=True
)
COUNTS = Rule(
    int, "whole numbers of 1 or more, one for each stage", lambda values: values and min(values) >= 1, is_list=True
)


def setting(default: Any, rule: Rule, text: str) -> Any:
    """Return a field of Config with its default, its rule and its help text."""
    return field(default=default, metadata={"rule": rule, "help": text})


# fmt: off
@dataclass(frozen=True)
class Config:
    """Every setting of a training run."""

    # Data
    data_dir: tuple[str, ...] = setting(("data/FLARE22Train",), FOLDERS,
        "folder with images/CASE_0000.nii.gz and labels/CASE.nii.gz, or several such folders")
    run_dir: str = setting("runs/vnet", FOLDER, "output folder of the run: checkpoints, log.csv, curves.png, run.json")
    cache_dir: str | None = setting("cache", replace(FOLDER, words="a folder, or null", optional=True),
        "folder for resized cases (16 MiB each at the default size); null: resize them in every epoch")
    val_cases: tuple[str, ...] | None = setting(None, VAL_CASES,
        "ids of the validation cases, or a file with one id per line; null: the cases of data/val_cases.txt, or a "
        "val_fraction of the cases if the data has none of them")
    val_fraction: float = setting(0.2, FRACTION,
        "share of the cases that seed draws for validation where val_cases does not decide; 0: no validation")
    folds: int = setting(0, Rule(int, "0 or a whole number of 2 or more", lambda value: value == 0 or value >= 2),
        "number of parts that seed splits the cases into for cross-validation; 0: no cross-validation")
    fold: int = setting(0, whole_number(0), "part used for validation, from 0 to folds - 1")
    size: tuple[int, int, int] = setting((256, 256, 128), SIZE,
        "voxels X Y Z of the grid that a scan is resized to; multiples of 16 with five stages, or any with patch_size")
    patch_size: tuple[int, int, int] | None = setting(None, PATCH_SIZE,
        "voxels X Y Z that the network sees of the grid at a time, at a random place in training; inference takes the "
        "mean over overlapping patches; multiples of 16 with five stages; null: the whole grid")
    window_hu: tuple[float, float] = setting((-160.0, 240.0), WINDOW,
        "range in HU that is scaled to 0..1; values outside are clipped")
    crop: str = setting("none", one_of("none", "body", "organs"),
        "part of each scan that the grid covers; body: without the air around it; organs: the box of the organs, which "
        "infer.py --locate finds with a second network")
    max_gib: float = setting(8.0, Rule(float, "a number of GiB above 0", lambda value: value > 0),
        "largest scan accepted, in GiB as float32")
    assume_ras: bool = setting(False, BOOLEAN, "read files that state no orientation as RAS+; false: refuse them")
    replace_nonfinite: bool = setting(False, BOOLEAN,
        "replace NaN and infinite voxels of scans by air; false: refuse such scans")
    organs: tuple[str, ...] = setting(
        ("background", "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava",
         "right adrenal gland", "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney"),
        ORGANS, "class names in the order of the ids in the label files; the first is the background")

    # Network (vnet.py)
    channels: int = setting(16, whole_number(1), "channels of the first stage; each stage down doubles them")
    down_convs: tuple[int, ...] = setting((1, 2, 3, 3, 3), COUNTS,
        "number of 5x5x5 convolutions in each stage down; the last is the bottom stage")
    up_convs: tuple[int, ...] = setting((3, 3, 2, 1), COUNTS,
        "number of 5x5x5 convolutions in each stage up, one stage fewer than down; the first is the lowest stage")
    norm: str = setting("instance", one_of("instance", "batch", "group", "none"),
        "normalisation after each convolution; batch needs a batch_size above 1 to work well")

    # Training
    epochs: int = setting(50, whole_number(1), "passes over the training cases")
    batch_size: int = setting(1, whole_number(1), "cases per training step in each process")
    made_per_labelled: float = setting(1.0, NOT_NEGATIVE,
        "cases with labels made by a network (weights.csv) that an epoch draws for each case labelled by people")
    optimizer: str = setting("adam", one_of("adam", "muon"),
        "rule by which the weights change; muon learns in fewer steps (RESULTS.md)")
    learning_rate: float = setting(1e-4, Rule(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
        "learning rate of the optimizer")
    loss: str = setting("cross_entropy", Rule(str, "the name of a loss", bool),
        "name of a loss in core/training/losses.py, such as cross_entropy or dice_cross_entropy (the sum of both)")
    schedule: str = setting("constant", one_of("constant", "cosine", "poly"),
        "learning rate during the run; cosine and poly decrease it almost to 0 at the last step")
    precision: str = setting("auto", one_of("auto", "float32", "bf16", "fp16"),
        "number type of mixed precision; auto: bf16 on a GPU that supports it, fp16 on others, float32 on a CPU")
    memory: str = setting("auto", one_of("auto", "off", "low", "lowest"),
        "plan that saves GPU memory (see train.py --plan); auto: the fastest plan that fits; off on a CPU")
    compile: bool = setting(False, BOOLEAN,
        "compile the network with torch.compile if the memory plan is off; delays the first step by a minute or more; "
        "needs a C++ compiler on a CPU; not measured on a GPU yet")
    channels_last: bool = setting(False, BOOLEAN,
        "store volumes with the channels as the last axis in memory; not measured on a GPU yet")
    val_interval: int = setting(1, whole_number(1),
        "number of epochs from one validation to the next; the last epoch is always validated")
    checkpoint_minutes: float = setting(15.0, replace(NOT_NEGATIVE, words="a number of minutes, 0 or more"),
        "minutes from one last.pt to the next; a run that ends or is stopped writes one, too; 0: after every step")
    max_grad_norm: float = setting(0.0, NOT_NEGATIVE,
        "clip the gradient of all weights together to this norm; 0: no clipping")
    accumulation_steps: int = setting(1, whole_number(1),
        "parts that each batch is split into, computed one after the other; 4 with batch_size 4 needs the memory of "
        "one case and gives the gradient of all four")
    ema_decay: float = setting(0.0, FRACTION,
        "decay of an exponential moving average (EMA) of the weights, which is then validated and becomes best.pt; "
        "0.99 averages over about 100 steps; 0: none")
    init_output_bias: bool = setting(False, BOOLEAN,
        "initialise the output bias so that training starts from each class's share of the training voxels")
    deterministic: bool = setting(False, BOOLEAN,
        "use only operations that give the same weights for the same seed; slower on a GPU and not tested there yet; "
        "a CPU always gives the same weights with the same number of threads")
    tensorboard: bool = setting(False, BOOLEAN,
        "write the numbers of log.csv for TensorBoard too (pip install tensorboard)")
    init_from: str | None = setting(None, Rule(str, "a checkpoint, or null", bool, optional=True, is_path=True),
        "checkpoint of another run whose weights this run starts from, all but the last layer's where the organs "
        "differ; null: random weights")

    # Augmentation
    augment: bool = setting(False, BOOLEAN, "augment the training cases at random")
    augment_rotation_degrees: float = setting(10.0, number(0, 180), "rotation about each axis, in degrees")
    augment_scale: float = setting(0.1, number(0, 0.9), "scaling of the volume; 0.1: by a factor of 0.9 to 1.1")
    augment_shift: float = setting(0.05, number(0, 1), "shift along each axis, as a share of the volume's length")
    augment_elastic: float = setting(0.0, number(0, 0.2),
        "smooth deformation, its standard deviation as a share of the length of the grid, or of a patch; 0: none")
    augment_contrast: float = setting(0.2, number(0, 0.9), "contrast about the mean; 0.2: by a factor of 0.8 to 1.2")
    augment_brightness: float = setting(0.1, number(0, 1),
        "brightness added to all voxels, as a share of the HU window")
    augment_gamma: float = setting(0.2, number(0, 0.9), "exponent of the voxel values; 0.2: 0.8 to 1.2")
    augment_noise: float = setting(0.03, number(0, 1),
        "standard deviation of Gaussian noise, as a share of the HU window")
    augment_flip: bool = setting(False, BOOLEAN,
        "swap left and right with probability 0.5, also the ids of paired organs")

    # Machine
    seed: int = setting(0, Rule(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
        "seed of everything random")
    workers: int = setting(2, whole_number(0),
        "processes that load cases during training; 0: the training process loads them")
    device: str = setting("auto", Rule(str, "auto, cpu, cuda or cuda:N", re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch),
        "device of the training; auto: the first GPU, or the CPU if there is none")
# fmt: on

    def __post_init__(self):
        """Check that a patch lies inside of the grid."""
        if any(n > of for n, of in zip(self.input_size, self.size, strict=True)):
            got, size = (" ".join(map(str, each)) for each in (self.patch_size, self.size))
            raise ValueError(f"patch_size: got {got}, expected no more than the size along any axis, {size}")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Voxels X Y Z of the network's input: of a patch, or of the whole grid."""
        return self.patch_size or self.size


RULES: dict[str, Rule] = {field.name: field.metadata["rule"] for field in fields(Config)}
# Old names of settings, which are refused with the new name.
RENAMED = {
    "average_decay": "ema_decay",
    "accumulate": "accumulation_steps",
    "clip_norm": "max_grad_norm",
    "output_bias": "init_output_bias",
}


def load_config(path: str | Path = DEFAULT_CONFIG, flags: dict[str, Any] | None = None) -> Config:
    """Load the settings of a YAML file; `flags`, the text or texts typed for each key, override the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming the key that is unknown or whose value is not allowed, and what is allowed.
    """
    typed = {key: check(key, parse_flag(key, text), flag_of(key)) for key, text in (flags or {}).items()}
    return config_from_dict(read_yaml(path) | typed, str(path))


def config_from_dict(settings: dict[str, Any], source: str) -> Config:
    """Return checked settings, the inverse of `config_to_dict`; a missing key has its default.

    Raises:
        ValueError: as `load_config`; its sentence begins with `source`.
    """
    for key in settings:
        if key in RENAMED:
            raise ValueError(f"{source}: unknown key {key}; it is {RENAMED[key]} now")
        if key not in RULES:
            close = difflib.get_close_matches(shorten(key), RULES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(RULES)}"
            raise ValueError(f"{source}: unknown key {shorten(key)}; {hint}")
    return Config(**{key: check(key, value, f"{source}: {key}") for key, value in settings.items()})


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as a plain dict of lists and scalars, for YAML, JSON and checkpoints."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def save_config(config: Config, path: str | Path) -> None:
    """Save all settings as YAML for `load_config`."""
    write_text(path, dump_yaml(config_to_dict(config)))


def load_organs(path: str | Path = DEFAULT_CONFIG) -> tuple[str, ...]:
    """Load the class names of a settings file; the index of a name is its id. Raises as `load_config`."""
    return load_config(path).organs


def parse_flag(key: str, typed: str | list[str]) -> Any:
    """Return typed text as the value that it would be in a YAML file; a setting of words keeps its text."""
    if isinstance(typed, list):
        return None if typed == ["null"] else [parse_flag(key, text) for text in typed]
    if RULES[key].kind is str:
        return None if typed == "null" and RULES[key].optional else typed
    return parse_value(typed)


def check(key: str, value: Any, where: str) -> Any:
    """Return a value converted to the type of its setting.

    Raises:
        ValueError: if the rule of the setting does not allow the value; the sentence begins with `where`.
    """
    rule = RULES[key]
    if value is None and rule.optional:
        return None
    items = value if rule.is_list and isinstance(value, list | tuple) else [value]
    typed = tuple(rule.kind(item) for item in items if is_a(item, rule.kind))
    if rule.is_path:
        typed = tuple(map(os.path.expanduser, typed))
    if len(typed) != len(items) or not rule.holds(typed if rule.is_list else typed[0]):
        raise ValueError(f"{where}: got {show_value(value)}, expected {rule.words}")
    return typed if rule.is_list else typed[0]


def check_share(value: float, flag: str) -> float:
    """Return a share of 0 to 1; raise a ValueError for another number, which begins with `flag`."""
    if not 0 <= value <= 1:
        raise ValueError(f"{flag}: got {value:g}, expected a number from 0 to 1")
    return value


def is_a(value: Any, kind: type) -> bool:
    """Return True if a value converts to a type without loss; a bool is not a number here."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite
    return isinstance(value, kind)


def flag_of(key: str) -> str:
    return f"--{key.replace('_', '-')}"


class RenamedFlag(argparse.Action):
    """The old name of a flag, which ends the command with exit code 2 and the new name."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"unknown flag {self.option_strings[0]}; it is {self.const} now")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add --config and a flag for every setting; `config_from_flags` reads them back."""
    parser.add_argument(
        "--config", type=user_path, default=DEFAULT_CONFIG, metavar="FILE", help="settings (default: config.yaml)"
    )
    group = parser.add_argument_group("settings")
    for item in fields(Config):
        rule, default = RULES[item.name], show_value(config_to_dict(Config())[item.name])
        # A bool needs no value: --augment is --augment true.
        shape = {"nargs": "+"} if rule.is_list else {"nargs": "?", "const": "true"} if rule.kind is bool else {}
        text = f"{item.metadata['help']} ({rule.words}; default: {default})"
        group.add_argument(flag_of(item.name), help=text, metavar="VALUE", **shape)
    for old, new in RENAMED.items():
        parser.add_argument(flag_of(old), action=RenamedFlag, const=flag_of(new), nargs="*", help=argparse.SUPPRESS)


def config_from_flags(arguments: argparse.Namespace) -> Config:
    """Load the settings file of --config and override it by the flags typed; errors as `load_config`.

    Raises:
        ValueError: also when it is of a run whose folder has been moved or copied, and no --run-dir is typed.
    """
    typed = {key: getattr(arguments, key) for key in RULES if getattr(arguments, key) is not None}
    config, folder = load_config(arguments.config, typed), Path(arguments.config).parent
    moved = folder.resolve() != Path(config.run_dir).resolve()
    if "run_dir" not in typed and moved and (folder / "run.json").is_file():
        raise ValueError(
            f"{arguments.config}: says run_dir: {config.run_dir}, but lies in the folder of another run, moved or "
            f"copied; give --run-dir {folder} to go on with that one, or the folder of a new one"
        )
    return config
