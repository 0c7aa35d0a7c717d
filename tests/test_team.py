"""The CPU engine's meeting of threads, with and without the thread sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import native
import pytest

SOURCE = Path(__file__).with_name("team_on_host.cpp")


@pytest.mark.parametrize("sanitizer", [None, "thread", "address,undefined"])
def test_any_number_of_threads_makes_progress(sanitizer, tmp_path):
    program = tmp_path / "team"
    command = [native.cxx(), "-std=c++17", "-O1", "-g", "-pthread", f"-I{native.CSRC}", str(SOURCE)]
    if sanitizer:
        command.append(f"-fsanitize={sanitizer}")
    build = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if sanitizer and "cannot find" in build.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer runtime")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
