"""What a pytest run does about a GPU that hangs or fails: it loses a test, and not the rest.

Kernels of ours that wait for too long end by themselves (FUSED_RNN_CUDA_WATCHDOG). Whatever else
hangs, pytest-timeout ends the process. And a process whose device has failed leaves: every later
call in it would report the same failure, and some would wait for ever. Under pytest-xdist another
worker goes on with the other tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest
import torch

LIMIT_S = 60  # of a test, with what a compiler may take for it; more than the watchdog's 10

lost = pytest.StashKey[str]()
status = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any(map(config.pluginmanager.hasplugin, ("timeout", "pytest_timeout"))):
        return
    for item in items:
        if item.get_closest_marker("cuda") and not item.get_closest_marker("timeout"):
            # The other method is a signal, which waits for the driver to return.
            item.add_marker(pytest.mark.timeout(LIMIT_S, method="thread"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and item.get_closest_marker("cuda") and (fault := device_fault()):
        message = f"the device is lost to this process after {item.nodeid}: {fault}"
        report.outcome, report.longrepr = "failed", message
        item.config.stash[lost] = message
        item.session.shouldfail = message
    return report


def device_fault() -> str | None:
    """The error that the device has left in this process for good, if any."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


class Worker:
    """The hooks of a process that pytest-xdist began."""

    def __init__(self, config: pytest.Config):
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """The reports have been sent. To xdist the worker has crashed, and it starts another."""
        if self.config.stash.get(lost, None):
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(config))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[status] = exitstatus


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """All results have been written. What Python would now take down may wait for the device."""
    if config.stash.get(lost, None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(config.stash.get(status, 1)))
