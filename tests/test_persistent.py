"""The persistent CUDA engines, their own sources compiled for the CPU, against the reference.

As in test_cuda_on_cpu.py, whose ways these tests share: the runner looks for races, deadlocks and
accesses out of bounds while it computes. The GPU that plans are made for is made up.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import native
import pytest
import test_cuda_on_cpu as on_cpu
import torch
from test_cuda_on_cpu import by_dtype, make_case, results, run_per_step

from fused_rnn import composed
from fused_rnn.cells import CELLS as TRAITS
from fused_rnn.cells import Variation

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [name for name, traits in TRAITS.items() if not traits.late_gate]
ENGINES = ["persistent_cluster", "persistent_grid"]
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
CLUSTERS = [4, 2, 0, 0]  # of 2, 4, 8 and 16 blocks


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ctypes.CDLL]:
    with on_cpu.routed(native.engines_on_cpu()) as found:
        yield found


@pytest.fixture
def chip(library):
    """Sets the chip: multiprocessors, clusters of each size, bytes of shared memory."""

    def choose(multiprocessors: int = 8, clusters: list[int] = CLUSTERS, shared: int = 227) -> None:
        library.cuda_on_cpu_chip(multiprocessors, shared * 1024, (ctypes.c_int * 4)(*clusters))

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
    """Two directions, lengths, resets; a last tile and a last unit block that are not full."""
    assert_as_near_as_the_loop(monkeypatch, dtype, cell, 5, 11, 21, 2, 0, True, True, True)


def compare_with_per_step(monkeypatch: pytest.MonkeyPatch, *configuration: Any) -> None:
    """In float32, exactly multiplied; the two add up in other orders."""
    monkeypatch.setattr(composed, "allows_tf32", lambda: False)
    case = make_case(*configuration, dtype=torch.float32)
    found = results(case, run_per_step)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
    expected = results(case, run_per_step)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        message = f"result {i} of {configuration}: "
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=message.__add__)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("H, clusters", [
    (5, [1, 0, 0, 0]),  # a team of two blocks, one of them without units
    (17, [1, 0, 0, 0]),  # one unit block each
    (40, [1, 0, 0, 0]),  # two each, the last of them empty
    (64, [1, 0, 0, 0]),  # two each, all full
    (64, [0, 1, 0, 0]),  # of four
    (20, [0, 1, 0, 0]),  # of four, two of them without units
])  # fmt: skip
def test_clusters_of_every_size(cell, H, clusters, chip, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_cluster")
    chip(clusters=clusters)
    compare_with_per_step(monkeypatch, cell, 3, 9, H, 1, 0, True, True, True)


@pytest.mark.parametrize("multiprocessors", [2, 4])
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru"])
def test_many_groups_of_tiles(cell, multiprocessors, engine, chip, monkeypatch):
    """Six tiles and two directions, on one team or two: in turns, one group after another."""
    chip(multiprocessors, [multiprocessors // 2, 0, 0, 0])
    for ragged, resets in itertools.product((False, True), repeat=2):
        monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
        compare_with_per_step(monkeypatch, cell, 3, 41, 18, 2, 0, True, ragged, resets)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_more_weights_than_registers(cell, chip, monkeypatch):
    """Those of a block of 32 units, 132 wide in exact float32, go on in shared memory."""
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_cluster")
    chip(clusters=[0, 0, 1, 0])
    compare_with_per_step(monkeypatch, cell, 2, 2, 132, 1, 0, True, False, False)


def test_more_weights_than_registers_in_a_grid(chip, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "persistent_grid")
    chip(multiprocessors=18)
    compare_with_per_step(monkeypatch, "lstm", 2, 1, 275, 1, 0, False, False, False)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_short_and_empty(cell, engine, monkeypatch):
    """One timestep; rows, and a whole tile, without any."""
    compare_with_per_step(monkeypatch, cell, 1, 1, 5, 2, 0, True, False, True)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
    case = make_case(cell, 3, 10, 5, 2, 0, True, True, False, torch.float32)
    case["lengths"][:8] = 0
    case["lengths"][8:] = torch.tensor([3, 1])
    found = results(case, run_per_step)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
    torch.testing.assert_close(found, results(case, run_per_step), rtol=2e-5, atol=2e-5)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
    for T, B in ((0, 3), (4, 0)):
        case = make_case(cell, T, B, 5, 2, 0, True, False, False, torch.float32)
        output, h_n, *_ = run_per_step(**case)
        assert output.shape == (T, B, 2 * 5)
        assert torch.equal(h_n, case["hx"]) or T > 0


@pytest.mark.parametrize("cell", ["lstm_coupled_peephole", "gru"])
def test_same_bits_under_any_schedule(cell, library, engine):
    case = make_case(cell, 3, 9, 20, 2, 0, True, True, True, torch.bfloat16)
    expected = results(case, run_per_step)
    for seed in range(8):
        library.cuda_on_cpu_seed(ctypes.c_uint64(seed))
        found = results(case, run_per_step)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


def test_what_per_step_alone_has_is_its_own(engine, monkeypatch):
    """Late gates, projections and options of the step, whichever engine is asked for."""
    for cell, projection, variation in (
        ("gru_reset_before", 0, None), ("lstm", 2, None), ("gru", 0, Variation(zoneout_h=0.2)),
    ):  # fmt: skip
        case = make_case(cell, 3, 2, 5, 1, projection, True, False, False, torch.float32, variation)
        monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
        found = results(case, run_per_step)
        monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
        assert all(
            torch.equal(a, b) for a, b in zip(found, results(case, run_per_step), strict=True)
        )


def test_what_an_engine_cannot_take_is_said(engine, chip, monkeypatch):
    def run(H: int, dtype: torch.dtype = torch.float32) -> None:
        run_per_step(**make_case("lstm", 2, 1, H, 1, 0, True, False, False, dtype))

    errors = (ValueError, RuntimeError)  # what C++ throws is either, by torch's version
    with pytest.raises(errors, match=f"{engine}, which cannot take this: the dtype is"):
        run(5, torch.float64)
    with pytest.raises(errors, match=r"matrix of 4000 x 1000 does not fit"):
        run(1000)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "fastest")
    with pytest.raises(errors, match=r"persistent_cluster or persistent_grid, got fastest"):
        run(5)


def test_patience_with_a_hand_over(library, monkeypatch):
    """In units of 2^20 cycles of the chip's 1.7 GHz, begun ones included."""
    patience = {"": 16213, "0": 0, "2.5": 4054, "1e-9": 1}
    for given, expected in patience.items():
        monkeypatch.setenv("FUSED_RNN_CUDA_WATCHDOG", given)
        assert library.cuda_on_cpu_patience() == expected, given
    for wrong in ("soon", "2s", "-1", "nan", "1e9"):
        monkeypatch.setenv("FUSED_RNN_CUDA_WATCHDOG", wrong)
        with pytest.raises((ValueError, RuntimeError), match=rf"within 0..86400, got {wrong}"):
            run_per_step(**make_case("lstm", 2, 1, 5, 1, 0, True, False, False, torch.float32))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_where_a_launch_is_refused_per_step_serves(cell, library, engine, chip, monkeypatch):
    """Blocks that have to run at once may find no room: MPS, a partition."""
    chip(clusters=[4, 2, 0, 0])
    case = make_case(cell, 3, 2, 20, 1, 0, True, False, False, torch.float32)
    library.cuda_on_cpu_refuse_to_gather(1)
    try:
        found = results(case, run_per_step)
    finally:
        library.cuda_on_cpu_refuse_to_gather(0)
    differs = results(case, run_per_step)
    monkeypatch.setenv("FUSED_RNN_CUDA_ENGINE", "per_step")
    expected = results(case, run_per_step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(differs, expected, strict=True))


# What stands in the sources, what stands there when {planted}, and what is then said.
FAULTS = {
    "persistent_cluster": [
        (
            "sync_threads();  // all sums of the step are there",
            "if (!{planted}) sync_threads();",
            r"race on|which nothing has written",
        ),
        (
            "sync_threads();  // own d_gates are there",
            "if (!{planted}) sync_threads();",
            r"race on|which nothing has written",
        ),
        (
            "sync_threads();  // the initial state is there",
            "if (!{planted}) sync_threads();",
            r"race on",
        ),
        (
            "sync_threads();  // spans are there\n\n    for (int step = 0;",
            "if (!{planted}) sync_threads();\n\n    for (int step = 0;",
            r"race on|which nothing has written",
        ),
        (
            "if (step > span.begin) states.await(tile, turn - 1, first, count);",
            "if (!{planted} && step > span.begin) states.await(tile, turn - 1, first, count);",
            r"race on|deadlock|which nothing has written|phase",
        ),
        (
            "    barrier_wait(of(tile, turn), turn / 2 % 2, patience_, turn);\n",
            "    if (!{planted}) barrier_wait(of(tile, turn), turn / 2 % 2, patience_, turn);\n",
            r"more arrivals than the 1",
        ),
        (
            "barrier_expect(of(tile, turn), bytes_);",
            "barrier_expect(of(tile, turn), bytes_ - ({planted} ? 16 : 0));",
            r"race on|whose block has exited",
        ),
        (
            "for (unsigned rank = warp_lane() % lanes; rank < team_; rank += lanes)",
            "for (unsigned rank = warp_lane() % lanes + {planted}; rank < team_; rank += lanes)",
            r"deadlock",
        ),
        (
            "cluster ? static_cast<unsigned>(layout.team) : 1,",
            "cluster && !{planted} ? static_cast<unsigned>(layout.team) : 1,",
            r"store_async at \S+ in a cluster of one block: expected %cluster_nctarank > 1",
        ),
    ],
    "persistent_grid": [
        (
            "words[j].w[3] != tag;",
            "!{planted} && words[j].w[3] != tag;",
            r"not close",
        ),
        (
            "sync_warp();  // all of it is there",
            "if (!{planted}) sync_warp();",
            r"race on",
        ),
        (
            "sync_threads();  // all parts are there",
            "if (!{planted}) sync_threads();",
            r"race on|which nothing has written",
        ),
        (
            "d_h_of[at] += product;  // a reverse",
            "d_h_of[at] += {planted} ? 0 : product;  // a reverse",
            r"not close",
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", FAULTS)
def test_planted_faults_are_found(engine):
    """In a process of its own: the ops of a changed engine bear the same names."""
    folder = native.CSRC / "cuda"
    source = (folder / f"{engine}.cu").read_text()
    for header in ("persistent.cuh", "exchange.cuh"):
        text = (folder / header).read_text().replace("#pragma once\n", "")
        source = source.replace(f'#include "{header}"\n', text)
    for number, (old, new, _) in enumerate(FAULTS[engine], 1):
        assert source.count(old) == 1, old
        source = source.replace(old, new.replace("{planted}", f"(planted == {number})"))
    own = f"csrc/cuda/{engine}.cu"
    kernels = [
        native.planted(folder / f"{engine}.cu", source) if kernel == own else kernel
        for kernel in native.ENGINES
    ]
    library = native.engines_on_cpu(kernels, f"planted_{engine}_on_cpu")
    script = f"import test_persistent as t; t.print_faults({str(library)!r}, {engine!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    *messages, none = json.loads(run.stdout)
    assert none is None, none
    for (_, new, expected), message in zip(FAULTS[engine], messages, strict=True):
        assert message is not None, f"not found: {new}"
        assert re.search(expected, message), message


def print_faults(library: str, engine: str) -> None:
    """What each fault does to a ragged bidirectional lstm, and what happens without any."""
    messages = []
    with pytest.MonkeyPatch.context() as patch, on_cpu.routed(Path(library)) as engines:
        engines.cuda_on_cpu_chip(4, 227 * 1024, (ctypes.c_int * 4)(2, 0, 0, 0))
        for number in (*range(1, len(FAULTS[engine]) + 1), 0):
            engines.plant(number)
            patch.setenv("FUSED_RNN_CUDA_ENGINE", engine)
            try:
                compare_with_per_step(patch, "lstm", 4, 9, 20, 2, 0, True, True, True)
                messages.append(None)
            except (RuntimeError, AssertionError) as error:
                messages.append(str(error))
    print(json.dumps(messages))
