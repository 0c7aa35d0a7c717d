"""A run that loses its device, or hangs, keeps what there is: with stand-ins for CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

CONFTEST = """
import atexit, pytest, torch
import lost_device

lost_device.LIMIT_S = 1
torch.cuda.is_initialized = lambda: True
torch.cuda.lost = False

def synchronize():
    if torch.cuda.lost:
        raise RuntimeError("CUDA error: device-side assert triggered\\nand more")

torch.cuda.synchronize = synchronize
atexit.register(print, "taken down")
"""
TESTS = """
import time, pytest, torch

pytestmark = pytest.mark.cuda

def test_before():
    pass

def test_loses():
    torch.cuda.lost = {loses}

def test_hangs():
    time.sleep({sleeps})

def test_after():
    assert not torch.cuda.lost
"""


def run(folder: Path, *options: str, loses: bool = False, sleeps: float = 0) -> tuple[int, str]:
    """Exit status and output of pytest on the tests above."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS.format(loses=loses, sleeps=sleeps))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = cuda: on a GPU\n")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "lost_device", "-rA", *options, "."],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


def test_nothing_happens_to_a_device_that_works(tmp_path):
    status, output = run(tmp_path)
    assert status == 0, output
    assert "4 passed" in output
    assert "taken down" in output


def test_a_lost_device_ends_the_process_after_its_results(tmp_path):
    status, output = run(tmp_path, "--junit-xml=results.xml", loses=True)
    assert status == 1
    message = "the device is lost to this process after test_it.py::test_loses: CUDA error: device"
    assert message in output
    assert "PASSED test_it.py::test_before" in output
    assert "ERROR test_it.py::test_loses" in output
    assert "test_it.py::test_hangs" not in output
    assert "taken down" not in output
    cases = ElementTree.parse(tmp_path / "results.xml").iter("testcase")
    found = {case.get("name"): [each.get("message") for each in case] for case in cases}
    assert found["test_before"] == []
    assert any(message in (each or "") for each in found["test_loses"])


def test_a_hang_ends_the_process(tmp_path):
    pytest.importorskip("pytest_timeout")
    status, output = run(tmp_path, "-p", "pytest_timeout", "-v", sleeps=30)
    assert status == 1
    assert "test_it.py::test_before PASSED" in output
    assert "Timeout" in output
    assert "in test_hangs" in output
    assert "test_after" not in output


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="no pytest-xdist")
@pytest.mark.parametrize("trouble", [{"loses": True}, {"sleeps": 30}], ids="".join)
def test_another_worker_goes_on(tmp_path, trouble):
    pytest.importorskip("pytest_timeout")
    status, output = run(tmp_path, "-p", "pytest_timeout", "-p", "xdist", "-n1", **trouble)
    name = "loses" if "loses" in trouble else "hangs"
    assert status == 1
    assert f"crashed while running 'test_it.py::test_{name}'" in output
    for each in {"before", "loses", "hangs", "after"} - {name}:
        assert f"PASSED test_it.py::test_{each}" in output
