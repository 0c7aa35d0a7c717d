"""The binary: stable ABI only, and what it says of itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import native
import pytest

import fused_rnn
from fused_rnn import _C


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_cpp_symbol_of_torch_is_needed():
    """One binary serves torch 2.10 and everything later, so it may use the C shims only."""
    command = ["nm", "-D", "--undefined-only", "-C", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in listing
    assert not re.findall(r"\b(?:at|c10|torch)::\S*", listing)


def test_build_info_and_instruction_sets():
    assert _C.build_info()["torch_target"] == "2.10"
    sets = _C.instruction_sets()
    assert sets["portable"]
    assert sets[_C.active_instruction_set()]


@pytest.mark.parametrize("wanted", ["avx1024", "portable"])
def test_forcing_an_instruction_set(wanted):
    """FUSED_RNN_CPU_ISA is obeyed, and an unknown name is an error that lists the known ones."""
    script = "import fused_rnn._C as c; print(c.active_instruction_set())"
    environment = {**os.environ, "FUSED_RNN_CPU_ISA": wanted}
    run = subprocess.run(
        [sys.executable, "-c", f"import torch; {script}"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if wanted == "portable":
        assert run.stdout.strip() == "portable", run.stderr
    else:
        assert run.returncode != 0
        assert "avx512, avx2 or portable" in run.stderr


def test_version_is_the_package_version():
    from importlib.metadata import version

    assert version("fused_rnn") == fused_rnn.__version__


def test_multiply_adds_are_counted_as_they_are_done():
    """The benchmark's measure of what the machine can do: no core does 10^12 a second."""
    rounds = 200_000
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = _C.multiply_adds(rounds)
        seconds.append(time.perf_counter() - start)
    assert done == rounds * _C.multiply_adds(1)
    assert 1e8 < done / min(seconds) < 1e12
    assert _C.multiply_adds(0) == 0


def test_sources_outside_the_binding_know_nothing_of_torch():
    for path in native.CSRC.rglob("*"):
        if path.is_file() and path.parent != native.CSRC / "binding":
            assert "#include <torch" not in Path(path).read_text(), path
