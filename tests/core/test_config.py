"""Settings: what the file and the flags say is what the scripts get, and what cannot be is refused by name."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from warm import run_script

from core.config import (
    DEFAULT_CONFIG,
    RULES,
    Config,
    add_config_flags,
    config_from_dict,
    config_from_flags,
    config_to_dict,
    load_config,
    load_organs,
    save_config,
)
from core.system.exits import print_error
from core.system.yaml_files import read_yaml
from vnet import check_size

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = DEFAULT_CONFIG.read_text(encoding="utf-8")

# For every key a value other than its default: as typed on the command line, and as the scripts get it.
CHANGES = {
    "data_dir": ("other data", ("other", "data")),
    "run_dir": ("runs/2024-01-01", "runs/2024-01-01"),
    "cache_dir": ("null", None),
    "val_cases": ("0041 0042", ("0041", "0042")),
    "val_fraction": ("0.5", 0.5),
    "folds": ("5", 5),
    "fold": ("3", 3),
    "size": ("64 96 32", (64, 96, 32)),
    "patch_size": ("32 48 16", (32, 48, 16)),
    "crop": ("body", "body"),
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
    "made_per_labelled": ("2.5", 2.5),
    "optimizer": ("muon", "muon"),
    "learning_rate": ("1e-3", 0.001),
    "loss": ("focal", "focal"),  # the rule takes any name: core/training/losses.py has the losses
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
    "augment_elastic": ("0.02", 0.02),
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
    return config_from_flags(parser.parse_args(["--config", str(path), *typed]))


def settings_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
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


def comment_of(key: str) -> str:
    """Return the comment of a key in config.yaml, which may go on over lines that hold nothing else."""
    first, more = re.search(rf"^{key}:[^#\n]*# (.*)\n((?: +# .*\n)*)", DEFAULTS, re.MULTILINE).groups()
    return " ".join([first, *(line.strip(" #") for line in more.splitlines())])


def test_config_yaml_states_every_default():
    assert list(read_yaml(DEFAULT_CONFIG)) == [field.name for field in dataclasses.fields(Config)]
    assert load_config() == Config()


def test_config_yaml_and_help_explain_every_setting_in_the_same_words():
    parser = argparse.ArgumentParser(prog="train.py")
    add_config_flags(parser)
    printed = "".join(parser.format_help().split())
    for field in dataclasses.fields(Config):
        text, words = field.metadata["help"], RULES[field.name].words
        assert comment_of(field.name) in (text, f"{words}; {text}")
        assert "".join(f"{text} ({words}; default: ".split()) in printed
        assert flag(field.name) in printed


def test_what_a_settings_file_leaves_out_has_its_default(tmp_path):
    path = settings_file(tmp_path, "epochs: 7\nschedule: poly\n")
    assert load_config(path) == dataclasses.replace(load_config(), epochs=7, schedule="poly")
    assert from_command_line("--epochs", "3", path=path).epochs == 3
    assert config_from_dict({}, "last.pt") == load_config()


@pytest.mark.parametrize("key", ["data_dir", "run_dir", "cache_dir", "init_from", "val_cases"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = str(tmp_path / "x")
    expected = (path,) if key in ("val_cases", "data_dir") else path
    assert getattr(load_config(settings_file(tmp_path, f"{key}: ~/x\n")), key) == expected
    assert getattr(from_command_line(flag(key), "~/x"), key) == expected


@pytest.mark.parametrize("key", RULES)
def test_every_key_has_a_flag_that_wins_over_the_file(key):
    typed, expected = CHANGES[key]
    default = getattr(load_config(), key)
    words = typed.split() if RULES[key].is_list else [typed]
    value = getattr(from_command_line(flag(key), *words), key)
    assert value == expected != default
    assert type(value) is type(expected)


def test_a_flag_mends_a_file_that_is_wrong_without_it(tmp_path):
    (file := tmp_path / "mine.yaml").write_text("patch_size: [512, 512, 128]")
    with pytest.raises(ValueError, match="patch_size: got 512 512 128, expected no more than the size"):
        load_config(file)
    assert load_config(file, {"size": ["512", "512", "256"]}).patch_size == (512, 512, 128)


def test_a_flag_changes_its_own_key_and_no_other():
    assert from_command_line("--epochs", "3") == dataclasses.replace(load_config(), epochs=3)


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().epochs = 3


@pytest.mark.parametrize(
    ("key", "texts", "expected"),
    [
        ("learning_rate", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"], 1e-4),
        ("learning_rate", ["1"], 1.0),
        ("augment", ["true", "True", "yes"], True),
        ("augment", ["false", "no"], False),
        ("cache_dir", ["null"], None),
        ("val_cases", ["null"], None),
        ("init_from", ["null"], None),
        ("val_cases", ["runs/vnet/val_cases.txt"], ("runs/vnet/val_cases.txt",)),
    ],
)
def test_a_text_means_the_same_in_the_file_and_as_a_flag(tmp_path, key, texts, expected):
    for text in texts:
        in_file = getattr(load_config(settings_file(tmp_path, f"{key}: {text}")), key)
        as_flag = getattr(from_command_line(flag(key), text), key)
        assert in_file == as_flag == expected
        assert type(in_file) is type(as_flag) is type(expected)


def test_a_bool_flag_needs_no_value():
    assert from_command_line("--augment").augment is True
    assert from_command_line("--augment", "--epochs", "3").epochs == 3


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

CLASS_NAMES = "expected 2 to 256 names, all different and printable, the first for background"
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
    ("schedule", "linear", "got linear, expected one of constant, cosine, poly"),
    ("folds", "1", "got 1, expected 0 or a whole number of 2 or more"),
    ("norm", "null", "got null, expected one of instance, batch, group, none"),
    ("device", "gpu", "got gpu, expected auto, cpu, cuda or cuda:N"),
    ("data_dir", "''", "got '', expected a folder, or several"),
    ("size", "[64, 64]", "got [64, 64], expected three whole numbers"),
    ("size", "[64, 64, 0]", "got [64, 64, 0], expected three whole numbers"),
    ("size", "[64, 64, 1.5]", "got [64, 64, 1.5], expected three whole numbers"),
    ("size", "[64, 64, deep]", "got [64, 64, deep], expected three whole numbers"),
    ("window_hu", "[240, -160]", "got [240, -160], expected two numbers, the lower first"),
    ("organs", "[background]", f"got [background], {CLASS_NAMES}"),
    ("organs", "[background, liver, liver]", f"got [background, liver, liver], {CLASS_NAMES}"),
    ("down_convs", "[1, 0]", "got [1, 0], expected whole numbers of 1 or more, one for each stage"),
]


def sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("key", "text", "complaint"), REFUSED)
def test_a_value_is_refused_in_the_file_and_as_a_flag(tmp_path, key, text, complaint):
    path = settings_file(tmp_path, f"{key}: {text}")
    with pytest.raises(ValueError, match=" ") as error:
        load_config(path)
    assert sentence(error).startswith(f"{path}: {key}: ")
    assert sentence(error).endswith(complaint)
    if text not in ("null", "''"):  # which are words on the command line
        with pytest.raises(ValueError, match=" ") as error:
            from_command_line(flag(key), *text.strip("[]").split(", "))
        assert sentence(error).startswith(f"{flag(key)}: ")
        assert sentence(error).endswith(complaint)


def test_a_date_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.yaml: cannot be read as YAML \(month must be in 1\.\.12\)"):
        load_config(settings_file(tmp_path, "run_dir: 2024-13-01"))
    with pytest.raises(ValueError, match="--epochs: got '2024-13-01', expected a whole number"):
        from_command_line("--epochs", "2024-13-01")
    assert from_command_line("--run-dir", "2024-13-01").run_dir == "2024-13-01"


def test_256_classes_fit_into_a_byte_and_257_do_not(tmp_path):
    names = [f"organ {i}" for i in range(257)]
    assert len(from_command_line("--organs", *names[:256]).organs) == 256
    with pytest.raises(ValueError, match="expected 2 to 256 names"):
        from_command_line("--organs", *names)


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.yaml: unknown key learning_rat; did you mean learning_rate\?$"):
        load_config(settings_file(tmp_path, "epochs: 1\nlearning_rat: 1\n"))
    with pytest.raises(ValueError, match=r"unknown key xyz; the keys are data_dir, run_dir, .*device$"):
        load_config(settings_file(tmp_path, "xyz: 1\n"))


NEW_NAMES = {
    "average_decay": "ema_decay",
    "accumulate": "accumulation_steps",
    "clip_norm": "max_grad_norm",
    "output_bias": "init_output_bias",
}


@pytest.mark.parametrize(("old", "new"), NEW_NAMES.items())
def test_an_old_name_is_refused_with_the_new_one(tmp_path, capsys, old, new):
    with pytest.raises(ValueError, match=rf"settings\.yaml: unknown key {old}; it is {new} now$"):
        load_config(settings_file(tmp_path, f"epochs: 1\n{old}: 1\n"))
    with pytest.raises(ValueError, match=rf"^last\.pt: unknown key {old}; it is {new} now$"):
        config_from_dict(config_to_dict(load_config()) | {old: 1}, "last.pt")
    for value in ([], ["1"]):
        with pytest.raises(SystemExit) as end:
            from_command_line(flag(old), *value)
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: unknown flag {flag(old)}; it is {flag(new)} now\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"epochs: 1\nseed: 2\nepochs: 3\n", "line 3: the key epochs is given twice"),
        (b"1: 2\n0x1: 3\n", "line 2: the key 1 is given twice"),
        (b"? [1, 2]\n: 3\n", "line 1: found unhashable key"),
        (b"epochs: " + b"[" * 20000, "cannot be read as YAML (maximum recursion depth"),
        (b"x" * 1000 + b": 1\n", "unknown key " + "x" * 200 + "...; the keys are"),
        (b"epochs: " + b"x" * 1000, "epochs: got " + "x" * 200 + "..., exp"),
        (b'organs: [background, "liver\\e[2J"]', "all different and printable"),
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


def test_a_missing_file_and_a_folder_are_no_settings(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such settings file$"):
            load_config(path)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--learning-rate", "fast"], "error: --learning-rate: got fast, expected a number above 0 and at most 1\n"),
        (["--clip-norm", "1"], "train.py: error: unknown flag --clip-norm; it is --max-grad-norm now\n"),
        (
            ["--card-gib", "6"],
            "error: --card-gib: got no --plan, which it belongs to; --memory chooses a run's plan\n",
        ),
        (["--loss", "mine"], "error: loss: got mine, expected one of cross_entropy, dice_cross_entropy\n"),
    ],
)
def test_the_script_ends_with_2_and_a_sentence(tmp_path, flags, complaint):
    result = run_script("train.py", "--run-dir", tmp_path / "run", *flags)
    assert result.returncode == 2
    assert result.stderr.endswith(complaint)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_run_whose_folder_was_moved_name_it(tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "run.json").write_text("{}")
    save_config(Config(run_dir=str(tmp_path / "before")), tmp_path / "moved" / "config.yaml")
    result = run_script("train.py", "--resume", "--config", tmp_path / "moved" / "config.yaml")
    assert result.returncode == 2
    assert f"config.yaml: says run_dir: {tmp_path / 'before'}, but lies in the folder of another run" in result.stderr
    assert f"give --run-dir {tmp_path / 'moved'} to go on" in result.stderr
    assert not (tmp_path / "before").exists()
    result = run_script("train.py", "--config", tmp_path / "moved" / "config.yaml", "--run-dir", tmp_path / "moved")
    assert "says run_dir" not in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_a_settings_file_for_a_network(path):
    config = load_config(path)
    check_size(config.input_size, len(config.up_convs))
    assert config != load_config()
