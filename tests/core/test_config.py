"""Settings: what the file and the flags say is what the scripts get, and what cannot be is refused by name."""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.config import (
    DEFAULT_CONFIG,
    RENAMED,
    RULES,
    Config,
    add_config_flags,
    config_from_dict,
    config_to_dict,
    flags_given,
    load_config,
    load_organs,
    save_config,
)
from core.system.exits import print_error

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = DEFAULT_CONFIG.read_text(encoding="utf-8")

# For every key a value other than the default: as typed on the command line, and as the scripts get it.
CHANGES = {
    "data_dir": ("other data", "other data"),
    "run_dir": ("runs/2024-01-01", "runs/2024-01-01"),
    "cache_dir": ("null", None),
    "val_cases": ("0041 0042", ("0041", "0042")),
    "val_fraction": ("0.5", 0.5),
    "folds": ("5", 5),
    "fold": ("3", 3),
    "size": ("64 96 32", (64, 96, 32)),
    "window_hu": ("-1000 1e3", (-1000.0, 1000.0)),
    "organs": ("nothing liver", ("nothing", "liver")),
    "max_gib": ("2.5", 2.5),
    "assume_ras": ("true", True),
    "replace_nonfinite": ("true", True),
    "channels": ("8", 8),
    "down_convs": ("1 2 2", (1, 2, 2)),
    "up_convs": ("2 1", (2, 1)),
    "norm": ("none", "none"),
    "epochs": ("3", 3),
    "batch_size": ("2", 2),
    "learning_rate": ("1e-3", 0.001),
    "loss": ("dice_cross_entropy", "dice_cross_entropy"),
    "schedule": ("cosine", "cosine"),
    "precision": ("float32", "float32"),
    "memory": ("lowest", "lowest"),
    "compile": ("true", True),
    "channels_last": ("true", True),
    "val_interval": ("5", 5),
    "checkpoint_minutes": ("0.5", 0.5),
    "max_grad_norm": ("12", 12.0),
    "accumulation_steps": ("4", 4),
    "ema_decay": ("0.99", 0.99),
    "init_output_bias": ("true", True),
    "deterministic": ("true", True),
    "tensorboard": ("true", True),
    "augment": ("true", True),
    "augment_rotation_degrees": ("15", 15.0),
    "augment_scale": ("0", 0.0),
    "augment_shift": ("0.1", 0.1),
    "augment_contrast": ("0.3", 0.3),
    "augment_brightness": ("0.3", 0.3),
    "augment_gamma": ("0.3", 0.3),
    "augment_noise": ("0.3", 0.3),
    "augment_flip": ("True", True),
    "init_from": ("runs/old/best.pt", "runs/old/best.pt"),
    "seed": ("7", 7),
    "workers": ("0", 0),
    "device": ("cuda:1", "cuda:1"),
}


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def from_command_line(*typed: str, path: Path = DEFAULT_CONFIG) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return load_config(path, flags_given(parser.parse_args(typed)))


def changed(tmp_path: Path, key: str, text: str) -> Path:
    """The default settings with one key's value replaced by other text."""
    lines = DEFAULTS.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
    end = next(i for i in range(start + 1, len(lines) + 1) if i == len(lines) or not lines[i].startswith("  "))
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join([*lines[:start], f"{key}: {text}", *lines[end:]]), encoding="utf-8")
    return path


# ---- What is taken


def test_the_default_run_is_the_one_promised():
    config = load_config()
    assert config.size == (256, 256, 128)
    assert (config.loss, config.learning_rate, config.batch_size, config.epochs) == ("cross_entropy", 1e-4, 1, 50)
    assert (config.precision, config.augment) == ("auto", False)
    assert (config.channels, config.down_convs, config.up_convs) == (16, (1, 2, 3, 3, 3), (3, 3, 2, 1))
    assert load_organs() == config.organs
    numbered = {0: "background", 1: "liver", 2: "right kidney", 9: "gallbladder", 13: "left kidney"}
    assert {i: config.organs[i] for i in numbered} == numbered
    assert len(config.organs) == 14


@pytest.mark.parametrize("key", RULES)
def test_every_key_has_a_flag_that_wins_over_the_file(key):
    typed, expected = CHANGES[key]
    default = getattr(load_config(), key)
    words = typed.split() if RULES[key].row else [typed]
    value = getattr(from_command_line(flag(key), *words), key)
    assert value == expected != default
    assert type(value) is type(expected)


def test_a_flag_changes_its_own_key_and_no_other():
    assert from_command_line("--epochs", "3") == dataclasses.replace(load_config(), epochs=3)


def test_a_flag_wins_over_another_file(tmp_path):
    path = changed(tmp_path, "epochs", "7")
    assert from_command_line(path=path).epochs == 7
    assert from_command_line("--epochs", "3", path=path).epochs == 3


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().epochs = 3


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_1e_4_is_a_number_in_the_file_and_as_a_flag(tmp_path, text):
    assert load_config(changed(tmp_path, "learning_rate", text)).learning_rate == 1e-4
    assert from_command_line("--learning-rate", text).learning_rate == 1e-4


def test_a_whole_number_will_do_where_a_number_is_wanted(tmp_path):
    rate = load_config(changed(tmp_path, "learning_rate", "1")).learning_rate
    assert rate == 1
    assert type(rate) is float


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("True", True), ("no", False)])
def test_truth_values(tmp_path, text, expected):
    assert load_config(changed(tmp_path, "augment", text)).augment is expected
    assert from_command_line("--augment", text).augment is expected


def test_a_truth_value_may_stand_alone():
    assert from_command_line("--augment").augment is True
    assert from_command_line("--augment", "--epochs", "3").epochs == 3


@pytest.mark.parametrize("key", ["cache_dir", "val_cases", "init_from"])
def test_null_is_nothing_in_the_file_and_as_a_flag(tmp_path, key):
    assert getattr(load_config(changed(tmp_path, key, "null")), key) is None
    assert getattr(from_command_line(flag(key), "null"), key) is None


def test_one_case_or_a_file_of_cases_needs_no_brackets(tmp_path):
    assert load_config(changed(tmp_path, "val_cases", "runs/vnet/val_cases.txt")).val_cases == (
        "runs/vnet/val_cases.txt",
    )


def test_what_is_saved_is_read_back_the_same(tmp_path):
    for config in (
        load_config(),
        dataclasses.replace(load_config(), **{key: expected for key, (_, expected) in CHANGES.items()}),
        dataclasses.replace(load_config(), organs=("Hintergrund", "Nebenniere ü", "no", "1e-4"), val_cases=("0041",)),
    ):
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


def test_a_checkpoint_gets_plain_values_and_gives_the_settings_back():
    config = from_command_line("--val-cases", "a", "b", "--cache-dir", "null")
    plain = config_to_dict(config)
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]
    assert {type(value) for value in plain.values()} <= {str, int, float, bool, list, type(None)}
    assert config_from_dict(plain, "best.pt") == config
    with pytest.raises(ValueError, match=r"^best\.pt: epochs: got 0, expected a whole number of 1 or more$"):
        config_from_dict(plain | {"epochs": 0}, "best.pt")


# ---- What is refused: one sentence with the key, what came and what is allowed

REFUSED = [
    ("epochs", "0", "got 0, expected a whole number of 1 or more"),
    ("epochs", "2.5", "got 2.5, expected a whole number of 1 or more"),
    ("epochs", "many", "got many, expected a whole number of 1 or more"),
    ("epochs", "true", "got true, expected a whole number of 1 or more"),
    ("epochs", "null", "got null, expected a whole number of 1 or more"),
    ("seed", "-1", "got -1, expected a whole number from 0 to 2^63 - 1"),
    ("learning_rate", "0", "got 0, expected a number above 0 and at most 1"),
    ("learning_rate", "fast", "got fast, expected a number above 0 and at most 1"),
    ("learning_rate", ".nan", "got .nan, expected a number above 0 and at most 1"),
    ("learning_rate", ".inf", "got .inf, expected a number above 0 and at most 1"),
    ("learning_rate", "1" + "0" * 400, "expected a number above 0 and at most 1"),
    ("learning_rate", "true", "got true, expected a number above 0 and at most 1"),
    ("val_fraction", "1", "got 1, expected a number from 0 to below 1"),
    ("augment_scale", "0.95", "got 0.95, expected a number from 0 to 0.9"),
    ("augment", "2", "got 2, expected true or false"),
    ("augment", "maybe", "got maybe, expected true or false"),
    ("loss", "focal", "got focal, expected one of cross_entropy, dice_cross_entropy"),
    ("norm", "null", "got null, expected one of instance, batch, group, none"),
    ("device", "gpu", "got gpu, expected auto, cpu, cuda or cuda:N"),
    ("data_dir", "''", "got '', expected a folder"),
]
REFUSED_ROWS = [
    ("size", ["64", "64"], "got [64, 64], expected three whole numbers"),
    ("size", ["64", "64", "0"], "got [64, 64, 0], expected three whole numbers"),
    ("size", ["64", "64", "1.5"], "got [64, 64, 1.5], expected three whole numbers"),
    ("size", ["64", "64", "deep"], "got [64, 64, deep], expected three whole numbers"),
    ("window_hu", ["240", "-160"], "got [240, -160], expected two numbers, the lower first"),
    ("organs", ["background"], "got [background], expected two names or more"),
    ("organs", ["background", "liver", "liver"], "got [background, liver, liver], expected two names or more, no name"),
    ("down_convs", ["1", "0"], "got [1, 0], expected whole numbers of 1 or more, one for each stage"),
]


def sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("key", "text", "complaint"), REFUSED)
def test_a_value_is_refused_in_the_file(tmp_path, key, text, complaint):
    path = changed(tmp_path, key, text)
    with pytest.raises(ValueError, match=" ") as error:
        load_config(path)
    assert sentence(error).startswith(f"{path}: {key}: ")
    assert sentence(error).endswith(complaint)


@pytest.mark.parametrize(("key", "text", "complaint"), [row for row in REFUSED if row[1] not in ("null", "''")])
def test_a_value_is_refused_as_a_flag(key, text, complaint):
    with pytest.raises(ValueError, match=" ") as error:
        from_command_line(flag(key), text)
    assert sentence(error).startswith(f"{flag(key)}: ")
    assert sentence(error).endswith(complaint)


def test_a_date_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.yaml: cannot be read as YAML \(month must be in 1\.\.12\)"):
        load_config(changed(tmp_path, "run_dir", "2024-13-01"))
    with pytest.raises(ValueError, match="--epochs: got '2024-13-01', expected a whole number"):
        from_command_line("--epochs", "2024-13-01")
    assert from_command_line("--run-dir", "2024-13-01").run_dir == "2024-13-01"


@pytest.mark.parametrize(("key", "texts", "complaint"), REFUSED_ROWS)
def test_a_row_is_refused_in_the_file_and_as_a_flag(tmp_path, key, texts, complaint):
    path = changed(tmp_path, key, f"[{', '.join(texts)}]")
    with pytest.raises(ValueError, match=" ") as error:
        load_config(path)
    assert sentence(error).startswith(f"{path}: {key}: {complaint}")
    with pytest.raises(ValueError, match=" ") as error:
        from_command_line(flag(key), *texts)
    assert sentence(error).startswith(f"{flag(key)}: {complaint}")


def test_256_classes_fit_into_a_byte_and_257_do_not(tmp_path):
    names = [f"organ {i}" for i in range(257)]
    assert len(from_command_line("--organs", *names[:256]).organs) == 256
    with pytest.raises(ValueError, match="at most 256"):
        from_command_line("--organs", *names)


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(DEFAULTS + "\nlearning_rat: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key learning_rat; did you mean learning_rate\?$"):
        load_config(path)
    path.write_text(DEFAULTS + "\nxyz: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key xyz; the keys are data_dir, run_dir, .*device$"):
        load_config(path)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(tmp_path, capsys, old):
    new = {"clip_norm": "max_grad_norm", "accumulate": "accumulation_steps", "average_decay": "ema_decay",
           "output_bias": "init_output_bias"}[old]  # fmt: skip
    path = tmp_path / "settings.yaml"
    path.write_text(f"{DEFAULTS}\n{old}: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"settings\.yaml: unknown key {old}; it is {new} now$"):
        load_config(path)
    with pytest.raises(ValueError, match=rf"^last\.pt: unknown key {old}; it is {new} now$"):
        config_from_dict(config_to_dict(load_config()) | {old: 1}, "last.pt")
    for value in ([], ["1"]):
        with pytest.raises(SystemExit) as end:
            from_command_line(flag(old), *value)
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: unknown flag {flag(old)}; it is {flag(new)} now\n")


@pytest.mark.parametrize("key", RULES)
def test_a_missing_key_is_named_with_what_it_may_be(tmp_path, key):
    settings = yaml.safe_load(DEFAULTS)
    del settings[key]
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=" ") as error:
        load_config(path)
    assert sentence(error) == f"{path}: missing key {key}, expected {RULES[key].words}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"epochs: 1\nseed: 2\nepochs: 3\n", "line 3: the key epochs stands there twice"),
        (b"1: 2\n0x1: 3\n", "line 2: the key 1 stands there twice"),
        (b"a: &a [1, 2]\nb: *a\n", "line 2: the alias *a stands for another value; write the value itself"),
        (b"a: &a {k: 1}\nb: {<<: [*a, *a]}\n", "line 2: the alias *a stands for another value"),
        (b"epochs: &e [*e]\n", "line 1: the alias *e stands for another value"),
        (b"? [1, 2]\n: 3\n", "line 1: a key that is a list or a mapping, expected a word"),
        (b"epochs: " + b"[" * 20000, "its values are nested too deeply"),
        (b"epochs: " + b"{a: " * 20000, "its values are nested too deeply"),
        (b"seed: 1\n" + b"#" * 2**18, "it has more than 262144 bytes"),
        (b"x" * 1000 + b": 1\n", "unknown key " + "x" * 200 + "...; the keys are"),
        (DEFAULTS.replace("epochs: 50", "epochs: " + "9" * 5000).encode(), "cannot be read as YAML (Exceeds the limit"),
        (DEFAULTS.replace("epochs: 50", "epochs: " + "x" * 10**5).encode(), "epochs: got " + "x" * 200 + "..., exp"),
        (DEFAULTS.replace("- liver", '- "liver\\e[2J"').encode(), "all printable"),
        (b"epochs: [1, 2\n", "line 2: expected ',' or ']'"),
        (b"", "got nothing, expected lines of 'key: value'"),
        (b"# only a remark\n", "got nothing, expected lines of 'key: value'"),
        (b"- epochs\n- 1\n", "got a list, expected lines of 'key: value'"),
        (b"epochs\n", "got a str, expected lines of 'key: value'"),
        (b"data_dir: K\xf6ln\n", "cannot be read as YAML ('utf-8' codec can't decode byte 0xf6"),
        (b"data_dir: \x00\n", "cannot be read as YAML (unacceptable character"),
        (b"data_dir: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, capsys, content, complaint):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=" ") as error:
        load_config(path)
    print_error(error.value)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {path}: ")
    assert complaint in printed
    assert printed.count("\n") == 1


def test_aliases_that_stand_for_billions_of_values_take_no_time(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    (tmp_path / "settings.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"settings\.yaml: line 2: the alias \*a0 stands for another value"):
        load_config(tmp_path / "settings.yaml")


def test_a_flag_that_is_nested_too_deeply_is_refused():
    with pytest.raises(ValueError, match=r"^--seed: got '\[\[") as error:
        load_config(flags={"seed": "[" * 20000})
    assert len(str(error.value)) < 400


def test_a_missing_file_and_a_folder_are_no_settings(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such settings file$"):
            load_config(path)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--learning-rate", "fast"], "error: --learning-rate: got fast, expected a number above 0 and at most 1\n"),
        (["--config", "nowhere.yaml"], "error: nowhere.yaml: no such settings file\n"),
        (["--learning-rat3", "1"], "unrecognized arguments: --learning-rat3 1\n"),
    ],
)
def test_the_script_ends_with_2_and_a_sentence(tmp_path, flags, complaint):
    command = [sys.executable, ROOT / "train.py", "--run-dir", tmp_path / "run", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.endswith(complaint)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


# ---- How an error is printed


def test_the_last_line_of_a_message_does_not_stand_for_all_of_it(capsys):
    print_error(ValueError("scan.nii: cannot be read\n - could the file be damaged?"))
    assert capsys.readouterr().err == "error: scan.nii: cannot be read - could the file be damaged?\n"


def test_an_error_without_a_message_is_named(capsys):
    print_error(EOFError())
    assert capsys.readouterr().err == "error: EOFError\n"


def test_a_loading_process_error_is_printed_without_its_traceback(capsys):
    message = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "dataset.py", line 1, in load\nValueError: inner\n\nThe above exception was the direct cause:\n\n'
        'Traceback (most recent call last):\n  File "dataset.py", line 2, in load\n'
        "ValueError: case 0001: cannot be read (ValueError: inner)\n"
    )
    print_error(ValueError(message))
    assert capsys.readouterr().err == "error: case 0001: cannot be read (ValueError: inner)\n"
