"""The GPU kernels compute what plain torch does: interpreted by Triton on a CPU, and compiled to a GPU's code.

tests/test_cuda.py runs them on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.training import kernels

CPU = torch.device("cpu")
with_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed; it exists for Linux alone")


@with_triton
def test_interpreted_kernels_compute_what_plain_torch_does():
    file = Path(__file__).with_name("interpreted_kernels.py")
    # Triton looks at the variable where it is imported: this takes a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "12 passed" in done.stdout


# Volumes that a kernel must read and write: then each value is read once and written once.
@with_triton
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(
    ("kernel", "flags", "read", "written"),
    [
        ("moments_kernel", {}, 1, 0),
        ("write_activated_kernel", {"RESIDUAL": False}, 1, 1),
        ("write_activated_kernel", {"RESIDUAL": True}, 2, 1),
        ("sums_backward_kernel", {"RESIDUAL": False}, 2, 0),
        ("sums_backward_kernel", {"RESIDUAL": True}, 3, 1),
        ("input_backward_kernel", {"GIVEN": False}, 2, 1),
        ("input_backward_kernel", {"GIVEN": True}, 2, 1),
    ],
)
def test_compiled_kernels_read_and_write_each_value_once(
    kernel, flags, read, written, capability, monkeypatch, tmp_path
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels, kernel)
    flags = flags | {"TILE": kernels.TILE, "WIDE": triton.language.float32}
    numbers = ("stats", "slope", "along", "offset", "sums")
    types = {name: "*fp32" if name in numbers else "i32" for name in function.arg_names}
    types |= {name: "*bf16" for name in ("x", "residual", "gradient", "into") if name in types}
    types |= dict.fromkeys(flags, "constexpr")
    # As torch's memory and the sizes of volumes are: multiples of 16.
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name not in (*flags, "channels")}
    constants = {(i,): flags[name] for i, name in enumerate(types) if name in flags}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=even)
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": kernels.WARPS}
    code = triton.compile(source, target=target, options=options).asm["ptx"]
    # Accesses of 16 bytes that a thread needs for its part of a tile in bf16.
    wide = 2 * kernels.TILE // (32 * kernels.WARPS) // 16
    assert code.count("ld.global.v4.b32") == wide * read
    assert code.count("st.global.v4.b32") == wide * written


# ---- Where kernels do not work


@pytest.fixture(autouse=True)
def forget_what_works():
    kernels.works.cache_clear()
    kernels.warn_once.cache_clear()
    yield
    kernels.works.cache_clear()
    kernels.warn_once.cache_clear()


def test_without_triton_plain_torch_computes_and_a_warning_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setattr(kernels, "MISSING", "No module named 'triton'")
    monkeypatch.setattr(kernels, "PLAIN", {})
    compute = kernels.or_plain(lambda x: "kernel", lambda x: "plain")
    types = (torch.float32, torch.bfloat16, torch.float32)
    assert [compute(torch.zeros(1, 2, 4, 4, 4, dtype=dtype)) for dtype in types] == ["plain"] * 3
    warning = "warning: norm and PReLU are computed without Triton, which takes more time (No module named 'triton')\n"
    assert capsys.readouterr().err == warning  # once


def test_the_warning_comes_from_the_first_process_alone(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setenv("RANK", "1")
    assert not kernels.works(CPU, torch.float32)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no C compiler"),
        OSError("no ptxas"),
        AssertionError("libcuda.so cannot found!"),
        ImportError("failed to map segment from shared object"),
        kernels.TritonError("too much"),
    ],
)
def test_kernels_that_fail_are_left_out(monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "is_right", fails)
    assert not kernels.works(CPU, torch.float32)
    assert f"more time ({error})" in capsys.readouterr().err


def test_out_of_memory_is_no_reason_to_leave_them_out(monkeypatch):
    outcomes = [torch.OutOfMemoryError("CUDA out of memory"), True]

    def is_right(*_):
        outcome = outcomes.pop(0)
        if outcome is not True:
            raise outcome
        return outcome

    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "is_right", is_right)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.works(CPU, torch.float32)
    assert kernels.works(CPU, torch.float32)


def test_kernels_compute_where_channels_come_first(monkeypatch):
    monkeypatch.setattr(kernels, "works", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "PLAIN", {})
    compute = kernels.or_plain(lambda *_: "kernel", lambda *_: "plain")
    x = torch.zeros(2, 8, 4, 6, 4)
    assert compute(x, torch.zeros(4, 2, 8), None) == "kernel"
    assert compute(x[:, :3], x[:, :1].expand(2, 3, 4, 6, 4)) == "kernel"
    assert compute(x, x.to(memory_format=torch.channels_last_3d)) == "plain"
