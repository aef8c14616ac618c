"""Settings: config.yaml, overridden by command-line flags, checked once, frozen.

The defaults live in config.yaml and nowhere else, so every key must be there. Every key is also a flag of train.py,
underscores as dashes: `learning_rate: 1e-4` in the file is `--learning-rate 1e-4` on the command line.
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from core.system.files import whole_file

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "config.yaml"
MOST_BYTES = 256 * 2**10  # of a settings file; a list of 10,000 case ids takes 150 KB
MOST_SHOWN = 200  # characters of a wrong key or value in an error


@dataclass(frozen=True)
class Config:
    """Every setting of a training run; config.yaml says what each is."""

    data_dir: str
    run_dir: str
    cache_dir: str | None
    val_cases: tuple[str, ...] | None
    val_fraction: float
    folds: int
    fold: int
    size: tuple[int, int, int]
    window_hu: tuple[float, float]
    max_gib: float
    assume_ras: bool
    replace_nonfinite: bool
    organs: tuple[str, ...]
    channels: int
    down_convs: tuple[int, ...]
    up_convs: tuple[int, ...]
    norm: str
    epochs: int
    batch_size: int
    learning_rate: float
    loss: str
    schedule: str
    precision: str
    memory: str
    compile: bool
    channels_last: bool
    val_interval: int
    checkpoint_minutes: float
    max_grad_norm: float
    accumulation_steps: int
    ema_decay: float
    init_output_bias: bool
    deterministic: bool
    tensorboard: bool
    augment: bool
    augment_rotation_degrees: float
    augment_scale: float
    augment_shift: float
    augment_contrast: float
    augment_brightness: float
    augment_gamma: float
    augment_noise: float
    augment_flip: bool
    init_from: str | None
    seed: int
    workers: int
    device: str


@dataclass(frozen=True)
class Rule:
    """What a setting may be: a Python type, one value or a row of them, a condition, and both in words."""

    kind: type
    words: str
    holds: Callable[[Any], bool] = lambda value: True
    row: bool = False
    optional: bool = False


def whole_number(minimum: int) -> Rule:
    return Rule(int, f"a whole number of {minimum} or more", lambda value: value >= minimum)


def number(low: float, high: float) -> Rule:
    return Rule(float, f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    return Rule(str, f"one of {', '.join(choices)}", lambda value: value in choices)


def row_of_counts(words: str) -> Rule:
    return Rule(int, words, lambda values: len(values) > 0 and min(values) >= 1, row=True)


RULES = {
    "data_dir": Rule(str, "a folder", bool),
    "run_dir": Rule(str, "a folder", bool),
    "cache_dir": Rule(str, "a folder, or null for no cache", bool, optional=True),
    "val_cases": Rule(
        str, "case ids (in quotes if all digits), a file of them, or null", bool, row=True, optional=True
    ),
    "val_fraction": Rule(float, "a number from 0 to below 1", lambda value: 0 <= value < 1),
    "folds": Rule(int, "0 for none, or a whole number of 2 or more", lambda value: value == 0 or value >= 2),
    "fold": whole_number(0),
    "size": Rule(int, "three whole numbers", lambda values: len(values) == 3 and min(values) >= 1, row=True),
    "window_hu": Rule(
        float, "two numbers, the lower first", lambda values: len(values) == 2 and values[0] < values[1], row=True
    ),
    "max_gib": Rule(float, "a number of GiB above 0", lambda value: value > 0),
    "assume_ras": Rule(bool, "true or false"),
    "replace_nonfinite": Rule(bool, "true or false"),
    "organs": Rule(
        str,
        "two names or more, no name twice, all printable, at most 256, the first for background",
        lambda values: (
            2 <= len(values) <= 256
            and all(v.strip() and v.isprintable() for v in values)
            and len({v.replace(" ", "_") for v in values}) == len(values)
        ),
        row=True,
    ),
    "channels": whole_number(1),
    "down_convs": row_of_counts("whole numbers of 1 or more, one for each stage"),
    "up_convs": row_of_counts("whole numbers of 1 or more, one for each stage, one stage fewer than down_convs"),
    "norm": one_of("instance", "batch", "group", "none"),
    "epochs": whole_number(1),
    "batch_size": whole_number(1),
    "learning_rate": Rule(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "loss": one_of("cross_entropy", "dice_cross_entropy"),
    "schedule": one_of("constant", "cosine", "poly"),
    "precision": one_of("auto", "float32", "bf16", "fp16"),
    "memory": one_of("auto", "off", "low", "lowest"),
    "compile": Rule(bool, "true or false"),
    "channels_last": Rule(bool, "true or false"),
    "val_interval": whole_number(1),
    "checkpoint_minutes": Rule(float, "a number of minutes, 0 or more", lambda value: value >= 0),
    "max_grad_norm": Rule(float, "a number, 0 or more", lambda value: value >= 0),
    "accumulation_steps": whole_number(1),
    "ema_decay": Rule(float, "a number from 0 to below 1", lambda value: 0 <= value < 1),
    "init_output_bias": Rule(bool, "true or false"),
    "deterministic": Rule(bool, "true or false"),
    "tensorboard": Rule(bool, "true or false"),
    "augment": Rule(bool, "true or false"),
    "augment_rotation_degrees": number(0, 180),
    "augment_scale": number(0, 0.9),
    "augment_shift": number(0, 1),
    "augment_contrast": number(0, 0.9),
    "augment_brightness": number(0, 1),
    "augment_gamma": number(0, 0.9),
    "augment_noise": number(0, 1),
    "augment_flip": Rule(bool, "true or false"),
    "init_from": Rule(str, "a checkpoint, or null", bool, optional=True),
    "seed": Rule(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
    "workers": whole_number(0),
    "device": Rule(str, "auto, cpu, cuda or cuda:N", lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)),
}


# Settings by their old names, which are refused with the new one.
RENAMED = {
    "average_decay": "ema_decay",
    "accumulate": "accumulation_steps",
    "clip_norm": "max_grad_norm",
    "output_bias": "init_output_bias",
}


class Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (PyYAML wants 1.0e-4), and a key twice is an error.

    Aliases are refused: no setting needs one, and nested ones stand for billions of values in a few lines.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, refusing an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{shorten(event.anchor)} stands for another value; write the value itself"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node, refusing a key that stands there twice."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key that is a list or a mapping, expected a word"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {shorten(key)} stands there twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """The inverse: puts quotes round a word, such as a case 1e-4, that Loader would take for a number."""


SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for side in (Loader, Dumper):
    side.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))


def load_config(path: str | Path = DEFAULT_CONFIG, flags: dict[str, Any] | None = None) -> Config:
    """Read settings from a YAML file; `flags`, each key with the text or texts typed for it, win over the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the key that is unknown, missing, mistyped or out of range, and what is allowed.
    """
    settings = read_yaml(path)
    check_keys(settings, str(path))
    for key, typed in (flags or {}).items():
        settings[key] = parse_flag(key, typed)
    where = {key: flag_of(key) for key in flags or {}}
    return Config(**{key: check(key, settings[key], where.get(key, f"{path}: {key}")) for key in RULES})


def config_from_dict(settings: dict[str, Any], source: str) -> Config:
    """The inverse of `config_to_dict`, checking everything as for a file; `source` is named in errors."""
    check_keys(settings, source)
    return Config(**{key: check(key, settings[key], f"{source}: {key}") for key in RULES})


def config_to_dict(config: Config) -> dict[str, Any]:
    """Settings as plain dict, lists and scalars, for YAML, JSON and checkpoints."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def save_config(config: Config, path: str | Path) -> None:
    """Write settings as YAML that `load_config` reads."""
    with whole_file(path) as temporary:
        temporary.write_text(yaml.dump(config_to_dict(config), Dumper=Dumper, sort_keys=False, default_flow_style=None))


def load_organs(path: str | Path = DEFAULT_CONFIG) -> tuple[str, ...]:
    """The organ names of a settings file; the index of a name is its id, 0 is the background.

    Raises:
        FileNotFoundError, ValueError: as `load_config`.
    """
    return load_config(path).organs


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchecked; errors as `load_config`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        settings = yaml.load(content.decode(), Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: its values are nested too deeply, expected lines of 'key: value'") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-01
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ValueError(f"{path}: got {got}, expected lines of 'key: value'")
    return settings


def check_keys(settings: dict[str, Any], source: str) -> None:
    """Check that every key is there and none besides; `source` opens the error's sentence."""
    for key in settings:
        if key in RENAMED:
            raise ValueError(f"{source}: unknown key {key}; it is {RENAMED[key]} now")
        if key not in RULES:
            close = difflib.get_close_matches(shorten(key), RULES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(RULES)}"
            raise ValueError(f"{source}: unknown key {shorten(key)}; {hint}")
    missing = [key for key in RULES if key not in settings]
    if missing:
        raise ValueError(f"{source}: missing key {missing[0]}, expected {RULES[missing[0]].words}")


def parse_flag(key: str, typed: str | list[str]) -> Any:
    """Text from the command line as the value that YAML would make of it; words stay words where they are wanted."""
    if isinstance(typed, list):
        return None if typed == ["null"] else [parse_flag(key, text) for text in typed]
    if RULES[key].kind is str:
        return None if typed == "null" and RULES[key].optional else typed
    try:
        return yaml.load(typed, Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return typed


def check(key: str, value: Any, where: str) -> Any:
    """A value as the type that RULES gives its key; `where` opens the error's sentence."""
    rule = RULES[key]
    if value is None and rule.optional:
        return None
    values = value if rule.row and isinstance(value, list | tuple) else [value]
    typed = tuple(rule.kind(item) for item in values if is_a(item, rule.kind))
    fits = len(typed) == len(values) and (rule.row or len(typed) == 1)
    if not fits or not rule.holds(typed if rule.row else typed[0]):
        raise ValueError(f"{where}: got {as_yaml(value)}, expected {rule.words}")
    return typed if rule.row else typed[0]


def is_a(value: Any, kind: type) -> bool:
    """Whether a value can be of that type without loss; a truth value is no number, though Python says so."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # no NaN, nothing infinite
    return isinstance(value, kind)


def as_yaml(value: Any) -> str:
    """A value as it would stand in the file: null, true, [1, 2]; only its type where it is none for a file."""
    try:
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    except (yaml.YAMLError, RecursionError):
        return f"a {type(value).__name__}"
    return shorten(text.removesuffix("...\n").strip())


def shorten(value: Any) -> str:
    """The first characters of a value's text, for an error."""
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` a flag for every key; `flags_given` reads them back."""
    for key, rule in RULES.items():
        # A truth value may also stand alone: --augment is --augment true.
        shape = {"nargs": "+"} if rule.row else {"nargs": "?", "const": "true"} if rule.kind is bool else {}
        parser.add_argument(flag_of(key), help=rule.words, metavar="VALUE", **shape)

    for old, new in RENAMED.items():
        parser.add_argument(flag_of(old), action=RenamedFlag, const=flag_of(new), nargs="*", help=argparse.SUPPRESS)


class RenamedFlag(argparse.Action):
    """A flag by its old name: end with the new one."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """End with exit code 2."""
        parser.error(f"unknown flag {self.option_strings[0]}; it is {self.const} now")


def flag_of(key: str) -> str:
    """The flag of a setting."""
    return f"--{key.replace('_', '-')}"


def flags_given(arguments: argparse.Namespace, keys: Iterable[str] = RULES) -> dict[str, Any]:
    """The settings typed on the command line, as `load_config` takes them."""
    return {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}


assert [field.name for field in fields(Config)] == list(RULES), "every field of Config has its rule, in its order"
