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
