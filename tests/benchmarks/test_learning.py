"""benchmarks.learning as a user runs it, with its scripts in this process."""

import csv
import json

import pytest
from helpers import TINY

import evaluate
import infer
import train
from benchmarks import learning

SCRIPTS = {"train.py": train, "infer.py": infer, "evaluate.py": evaluate}


@pytest.fixture
def learn(phantom_data, tmp_path, run_main, monkeypatch):
    """Run it on one of five phantoms with tiny networks: exit code, stdout and stderr; the scripts that ran."""
    ran = []

    def run_script(command, log):
        ran.append(command[0])
        code, _, err = run_main(SCRIPTS[command[0]], *command[1:])
        assert code == 0, err

    def learn(*flags):
        monkeypatch.setattr(learning, "run_script", run_script)
        ran.clear()
        common = ["--output", tmp_path / "out" / "a", "--parts", 5, "--folds", 2, "--steps", 4, *TINY]
        return (*run_main(learning, phantom_data, *common, *flags), list(ran))

    return learn


def test_two_networks_are_trained_and_scored_once(learn, tmp_path):
    for name, crop in (("locate", "body"), ("look", "organs")):
        (tmp_path / f"{name}.yaml").write_text(f"crop: {crop}\n")
    recipes = ["--recipe", tmp_path / "locate.yaml", tmp_path / "look.yaml"]
    code, _, _, ran = learn(*recipes)
    assert (code, ran) == (0, ["train.py", "train.py", "infer.py", "evaluate.py"])
    folder = tmp_path / "out" / "a" / "fold2_seed0"
    assert (folder / "train_look" / "val_cases.txt").read_text().split() == ["phantom_0003"]
    with open(folder / "scores" / "metrics.csv", newline="") as file:
        scored = {row["organ"]: float(row["dice"]) for row in csv.DictReader(file) if row["recall"]}
    result = json.loads((tmp_path / "out" / "a" / "learning.json").read_text())["runs"]["fold 2, seed 0"]
    assert result["dice"] == {"phantom_0003": scored}
    assert len(scored) > 8
    # Again: nothing is left to do, and compared with itself it is no better.
    code, out, _, ran = learn(*recipes, "--against", tmp_path / "out" / "a")
    assert (code, ran) == (0, [])
    mean = sum(scored.values()) / len(scored)
    lines = [line for line in out.splitlines() if line.startswith("mean over organs")]
    assert lines[0].split()[3:] == [f"{mean:.4f}"] * 2
    assert lines[-1].split()[3] == "+0.0000"


def test_cases_are_compared_with_themselves(capsys):
    here = {"fold 0, seed 0": {"dice": {"a": {"liver": 0.9, "spleen": 0.5}, "b": {"liver": 0.5, "aorta": 0.5}}}}
    other = {"fold 0, seed 0": {"dice": {"b": {"liver": 0.4}, "a": {"liver": 0.7, "spleen": 0.6}}}}
    learning.print_comparison(here, other)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["liver", "+0.1500"] in lines
    assert ["spleen", "-0.1000"] in lines  # in the order of the files its cases would not meet
    assert ["aorta", "-"] in lines
    other["fold 0, seed 0"]["dice"]["c"] = other["fold 0, seed 0"]["dice"].pop("a")
    with pytest.raises(ValueError, match="its folds hold out other cases than these"):
        learning.print_comparison(here, other)


def test_another_recipes_result_is_not_taken_for_this_ones(learn, tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 1\n")
    (tmp_path / "out" / "a" / "fold2_seed0").mkdir(parents=True)
    (tmp_path / "out" / "a" / "fold2_seed0" / "result.json").write_text('{"made_by": {}}')
    code, _, err, ran = learn("--recipe", tmp_path / "a.yaml")
    assert (code, ran) == (2, [])
    assert "holds the result of another recipe or data set; give another --output" in err


def test_a_fold_beyond_the_parts_is_wrong_usage(learn):
    code, _, err, ran = learn("--recipe", "none.yaml", "--folds", 5)
    assert (code, ran) == (2, [])
    assert "--folds: expected numbers from 0 to 4" in err
