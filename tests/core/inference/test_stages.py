"""Three stages overlap, each with one scan at a time; what happens to one scan stops no other."""

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import wait_for

from core.inference.stages import Segmentation, run_overlapped

STAGES = ("prepare", "predict", "finish")
SCANS = {str(i): Path(f"scans/{i}.nii.gz") for i in range(6)}


class Stages:
    """Three stages that note what they do in `events`: (stage, case, "begins" or "ends")."""

    def __init__(self, **work):
        self.work, self.events, self.tries = work, [], Counter()

    def run(self) -> list[Segmentation]:
        """Take SCANS through the stages."""
        return list(run_overlapped(map(self.stage, STAGES), SCANS, torch.device("cpu")))

    def stage(self, name: str):
        def stage(scan: Segmentation) -> None:
            self.events.append((name, scan.case, "begins"))
            self.tries[name, scan.case] += 1
            if name in self.work:
                self.work[name](scan)
            self.events.append((name, scan.case, "ends"))

        return stage


def test_the_network_works_while_the_next_scan_is_read_and_the_one_before_is_written():
    prepared, predicting, finishing = set(), set(), set()

    def predict_late(scan):
        case = int(scan.case)
        predicting.add(case)
        assert case == 5 or wait_for(lambda: case + 1 in prepared)
        assert case == 0 or wait_for(lambda: case - 1 in finishing)

    def finish_late(scan):
        case = int(scan.case)
        finishing.add(case)
        assert case == 5 or wait_for(lambda: case + 1 in predicting)

    stages = Stages(prepare=lambda scan: prepared.add(int(scan.case)), predict=predict_late, finish=finish_late)
    done = stages.run()
    assert [(scan.case, scan.file, scan.failure) for scan in done] == [(case, SCANS[case], None) for case in "012345"]


@pytest.mark.parametrize("slow", ["predict", "finish"])
def test_no_more_than_one_scan_waits_for_a_stage(slow):
    stages = Stages(**{slow: lambda _: time.sleep(0.02)})  # in which the stages before could run far ahead
    stages.run()
    happened = Counter()
    for name, _, what in stages.events:
        happened[name, what] += 1
        # One that the next stage is at, and one more.
        assert happened["prepare", "begins"] <= happened["predict", "ends"] + 2
        assert happened["predict", "begins"] <= happened["finish", "ends"] + 2
    assert happened["finish", "ends"] == 6


def test_the_network_keeps_the_cores_and_no_thread_stays():
    seen = {}
    work = {name: lambda _, name=name: seen.update({name: torch.get_num_threads()}) for name in STAGES}
    threads, cores = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Stages(**work).run()
        assert seen == {"prepare": 1, "predict": 2, "finish": 1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(cores)
    assert threading.active_count() == threads


# What Python, numpy, torch and the libraries under it raise when memory runs out.
OUT_OF_MEMORY = [
    MemoryError("Unable to allocate 9 GiB"),
    RuntimeError("CUDA out of memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_a_scan_that_had_too_little_memory_is_done_alone_at_the_end(name, error):
    def crowded(scan):
        if scan.case == "1" and stages.tries[name, "1"] == 1:
            raise error

    stages = Stages(**{name: crowded})
    assert [(scan.case, scan.failure) for scan in stages.run()] == [(case, None) for case in "023451"]
    assert {case: stages.tries[name, case] for case in SCANS} == {case: 1 + (case == "1") for case in SCANS}
    # By then nothing else is under way.
    assert stages.events[-6:] == [(name, "1", what) for name in STAGES for what in ("begins", "ends")]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_a_scan_that_always_has_too_little_memory_fails_alone(name, error):
    def too_large(scan):
        if scan.case == "1":
            raise error

    stages = Stages(**{name: too_large})
    *others, last = stages.run()
    assert [(scan.case, scan.failure) for scan in others] == [(case, None) for case in "02345"]
    assert last.case == "1"
    assert last.failure.startswith("case 1: ")
    assert str(error) in last.failure
    assert stages.tries[name, "1"] == 2


def test_a_failed_scan_keeps_no_volume_and_goes_no_further():
    def fill(scan):
        scan.image = scan.logits = torch.ones(2)
        if scan.case == "2":
            raise ValueError(f"{scan.file}: is no NIfTI file")

    stages = Stages(prepare=fill)
    failed = {scan.case: scan for scan in stages.run() if scan.failure}
    assert failed.keys() == {"2"}
    assert failed["2"].failure == f"{SCANS['2']}: is no NIfTI file"
    assert failed["2"].image is failed["2"].logits is None
    assert [name for name, case, _ in stages.events if case == "2"] == ["prepare"]


@pytest.mark.parametrize("name", STAGES)
def test_a_mistake_of_ours_is_no_failure_of_a_scan(name):
    def mistake(scan):
        raise RuntimeError("the shapes do not match")

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="the shapes do not match"):
        Stages(**{name: mistake}).run()
    assert threading.active_count() == threads


def test_a_warning_names_its_scan_once(capsys):
    scan = Segmentation("1", SCANS["1"])
    scan.warn("it is large")
    scan.warn(f"{SCANS['1']}: it is small")
    assert capsys.readouterr().err == f"warning: case 1: it is large\nwarning: {SCANS['1']}: it is small\n"
