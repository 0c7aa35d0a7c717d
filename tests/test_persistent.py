"""The persistent CUDA engines, their own sources compiled for the CPU, against the reference.

As in test_cuda_on_cpu.py, whose ways these tests share: the runner looks for races, deadlocks and
accesses out of bounds while it computes. The GPU that plans are made for is made up.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import helpers
import native
import pytest
import test_cuda_on_cpu as on_cpu
import torch
from test_cuda_on_cpu import by_dtype, make_case, results, run_per_step

from fused_rnn import composed, ops

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [name for name, traits in ops.CELLS.items() if not traits.late_gate]
ENGINES = ["persistent_cluster", "persistent_grid"]
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
CLUSTERS = [8, 4, 2, 0, 0]  # of 1, 2, 4, 8 and 16 blocks


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ctypes.CDLL]:
    patch = pytest.MonkeyPatch()
    yield on_cpu.load(native.engines_on_cpu(), patch)
    patch.undo()


@pytest.fixture
def chip(library):
    """Sets the chip: multiprocessors, clusters of each size, bytes of shared memory."""

    def choose(multiprocessors: int = 8, clusters: list[int] = CLUSTERS, shared: int = 227) -> None:
        library.cuda_on_cpu_chip(multiprocessors, shared * 1024, (ctypes.c_int * 5)(*clusters))

    choose()
    yield choose
    choose()


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch, chip) -> str:
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", request.param)
    return request.param


def assert_as_near_as_the_loop(
    monkeypatch: pytest.MonkeyPatch, dtype: str, *configuration: Any, draws: int = 3
) -> None:
    """Errors against float64, over draws, at most twice those of the plain loop in that dtype.

    TF32 has as many bits of fraction as float16, whose loop is its measure.
    """
    storage, tf32 = DTYPES[dtype]
    monkeypatch.setattr(composed, "allows_tf32", lambda: tf32)
    kinds: tuple[list[helpers.Named], ...] = ([], [], [])
    for _ in range(draws):
        case = make_case(*configuration, dtype=storage)
        ours, plain, exact = by_dtype(case)
        if tf32:
            halves = on_cpu.with_leaves(
                case, [t.detach().half().requires_grad_() for t in on_cpu.leaves(case)]
            )
            plain = results(halves, on_cpu.run_reference)
        plain = [b.to(a.dtype) for a, b in zip(ours, plain, strict=True)]
        for named, found in zip(kinds, (ours, plain, exact), strict=True):
            named.append({f"result {i}": t for i, t in enumerate(found)})
    helpers.assert_close_like_torch(*kinds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_obeys_the_tolerance_rule(cell, dtype, engine, monkeypatch):
    """Two directions, biases, lengths, resets; a last tile and a last unit block that are not full."""
    assert_as_near_as_the_loop(monkeypatch, dtype, cell, 5, 11, 21, 2, 0, True, True, True)
