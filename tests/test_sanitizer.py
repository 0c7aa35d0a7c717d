"""The CPU engine under the address and undefined behaviour sanitizers.

Other tests see a wrong read by what is made of it. Here it is an error in itself, from one piece of
the engine's scratch memory into the next as well.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import native
import pytest

SANITIZED = Path("tests", "sanitized")
# One instruction set, and two storage types, of which one is computed in itself and one in another.
# Not optimised, that takes most of a minute to compile and seconds to run.
FLAGS = [
    "-std=c++17", "-O0", "-g1", "-Wno-psabi", f"-I{SANITIZED}", "-Icsrc",
    "-DFUSED_RNN_USER_CELLS",
    "-DFUSED_RNN_BY_DTYPE(function)={function<float>,nullptr,function<BFloat16>,nullptr}",
]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SOURCES = [str(SANITIZED / "engine.cpp"), "csrc/cpu/engine_portable.cpp", "csrc/cpu/plan.cpp"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trial = tmp_path_factory.mktemp("sanitizer") / "trial"
    trial.with_suffix(".cpp").write_text("int main() {}\n")
    command = [native.cxx(), *SANITIZERS, f"{trial}.cpp", "-o", str(trial)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no address sanitizer runtime")
    commands = [[native.cxx(), *FLAGS, *SANITIZERS, "-c", source] for source in SOURCES]
    return native.program("engine_sanitized", commands, SANITIZERS)


def run(engine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Leaks are looked for by tracing the process, which containers may forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [str(engine), *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def test_engine_stays_within_its_memory(engine: Path) -> None:
    found = run(engine)
    assert found.returncode == 0, found.stdout + found.stderr[-6000:]
    for cell in ("lstm_peephole", "gru", "gru_reset_before"):
        assert f"{cell}, dtype 2, sizes 3, options 4" in found.stderr  # it ran to the end


def test_a_read_beyond_is_noticed(engine: Path) -> None:
    found = run(engine, "short")
    assert found.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in found.stderr
