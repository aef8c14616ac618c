"""YAML for settings: 1e-4 is a number, a key given twice is an error, wrong files end in one sentence."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

MAX_SHOWN = 200  # characters of a wrong key or value in an error


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (PyYAML wants 1.0e-4) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping of a node; refuse a key that is given twice."""
        keys = [self.construct_object(key_node, deep=True) for key_node, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                problem = f"the key {shorten(key)} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.value[i][0].start_mark)
        return super().construct_mapping(node, deep=deep)


class Dumper(yaml.SafeDumper):
    """The inverse of Loader: quotes a word that Loader would read as a number, such as a case named 1e-4."""


SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for side in (Loader, Dumper):
    side.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Return the keys and values of a settings file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file does not consist of lines of 'key: value'.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    try:
        settings = yaml.load(path.read_bytes().decode(), Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date like 2024-13-01
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ValueError(f"{path}: got {got}, expected lines of 'key: value'")
    return settings


def parse_value(text: str) -> Any:
    """Return the value that a text has in YAML; the text itself where it is not YAML."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError):
        return text


def dump_yaml(settings: dict[str, Any]) -> str:
    """Return settings as text that `read_yaml` reads."""
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, default_flow_style=None)


def show_value(value: Any) -> str:
    """Return a value as it is written in a file (null, true, [1, 2]), or its type if it cannot be written there."""
    try:
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    except yaml.YAMLError:
        return f"a {type(value).__name__}"
    return shorten(text.removesuffix("...\n").strip())


def shorten(value: Any) -> str:
    """Return the first characters of a value's text, for an error."""
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
