"""What every test gets: a seed, poisoned memory, and a device to run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from lost_device import (  # noqa: F401  hooks
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_unconfigure,
)

import fused_rnn._C
from fused_rnn import functional

# cuBLAS refuses deterministic mode without it, and reads it when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if fused_rnn._C.build_info()["cuda"] is None:
        return "fused_rnn was built without CUDA"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and (reason := _why_no_cuda()):
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "route" in metafunc.fixturenames:
        routes = [pytest.param("plain", id=pytest.HIDDEN_PARAM), "as_on_cuda"]
        if metafunc.definition.get_closest_marker("one_route"):
            routes = routes[:1]
        metafunc.parametrize("route", routes, indirect=True)


@pytest.fixture
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a call can take, for a file that says ``pytest.mark.usefixtures("route")``.

    A "plain" tensor on the CPU goes to ops that check what they are given, and stays packed. What
    goes "as_on_cuda" is checked in Python, and padded. Tests that are not about calls, or about the
    one way only, are marked ``one_route``.
    """
    if request.param == "as_on_cuda":
        if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
            pytest.skip("on CUDA there is no other way")
        monkeypatch.setattr(functional, "_is_plain_on_cpu", lambda tensor: False)
    way: str = request.param
    return way


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills uninitialised memory with NaN.

    Results and scratch of the compiled ops come from torch's empty too, so that whatever an engine
    reads before it wrote it, or forgets to write, shows. Scratch is fresh for every call.
    """
    kept = fused_rnn._C.keep_scratch(0)
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    fused_rnn._C.keep_scratch(kept)
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_threads: None) -> None:
    """For thousands of tiny calls: on a busy machine threads would only wait for each other."""
    torch.set_num_threads(1)
