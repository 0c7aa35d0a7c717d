"""Checked, interleaved timing of two implementations of the same computation.

First the results of both are compared with the same computation in float64; only a pair that agrees
is timed. Then the two take turns in one process, so that whatever else the machine does falls on
both, and the figure is the median over the rounds of the ratio of their times.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Results = Mapping[str, Tensor]
Run = Callable[[], Results]

SLICE_S = 0.02  # least time of one side in one round
MIN_ROUNDS = 5
MAX_ROUNDS = 25
ONE_QUANTITY = {"h_n": ("h_n", "output")}
SCRUB_BYTES = 64 << 20  # larger than the caches of a core; what lies beyond is shared with others


class Named(Mapping[str, Tensor]):
    """Results that are put beside their names when somebody asks: not while they are timed."""

    __slots__ = ("names", "tensors")

    def __init__(self, names: Sequence[str], *tensors: Sequence[Tensor]) -> None:
        self.names, self.tensors = names, tensors

    def __getitem__(self, name: str) -> Tensor:
        flat = (tensor.detach() for some in self.tensors for tensor in some)
        return dict(zip(self.names, flat, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Effort(NamedTuple):
    """How long a measurement may take and how careful it is."""

    budget_s: float  # for all rounds together, about
    slice_s: float = SLICE_S
    min_rounds: int = MIN_ROUNDS  # whatever the budget; at least 2
    scrub_bytes: int = SCRUB_BYTES


@dataclass(frozen=True)
class Pair:
    """Two implementations of one computation; every result is a named tensor."""

    ours: Run
    peer: Run
    exact: Run  # the peer in float64
    device: torch.device


@dataclass(frozen=True)
class Check:
    """How the results compared; ``worst`` is the result nearest to, or furthest over, its limit."""

    passed: bool
    worst: str
    error: float  # largest difference from float64
    peer_error: float
    limit: float
    message: str = ""

    def __str__(self) -> str:
        if self.message:
            return self.message
        return (
            f"{self.worst}: error {self.error:.2e}, torch.nn's {self.peer_error:.2e}, "
            f"limit {self.limit:.2e}"
        )


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds; ``ratio`` is the peer's time over ours: above 1 ours is faster."""

    ours_s: float
    peer_s: float
    ratio: float
    ratio_low: float  # quartiles of the ratio over the rounds
    ratio_high: float
    rounds: int
    calls: int  # of our side in each round
    ours_quartiles_s: tuple[float, float]
    peer_quartiles_s: tuple[float, float]


def check(pair: Pair, relative: float | None = None) -> Check:
    """``compare`` for a pair."""
    return compare(pair.ours, pair.peer(), pair.exact(), relative)


def compare(
    run: Run,
    peer: Results,
    exact: Results,
    relative: float | None = None,
    rounding: float | None = None,
) -> Check:
    """Holds ours to twice the peer's own error against float64, plus one rounding of the result.

    The error of a result is the largest difference of any element. ``h_n`` is ``output``'s quantity
    at one step, too few elements for a largest error that is not luck: the peer's is that of both.
    One rounding is ``rounding``
    (by default the dtype's epsilon; more where the arithmetic takes in less than the dtype holds)
    times the result's largest value: it keeps a peer that is exact by luck from asking for the
    impossible. Where ``relative`` is given, the limit is that share of the result's largest value
    instead.
    """
    try:
        ours = run()
    except Exception as failure:  # a call that fails is a row of the report, not its end
        return Check(False, "", 0.0, 0.0, 0.0, f"{type(failure).__name__}: {failure}")
    if ours.keys() != exact.keys():
        return Check(False, "", 0.0, 0.0, 0.0, f"results {sorted(ours)}, not {sorted(exact)}")
    worst: tuple[float, Check] | None = None
    for name, truth in exact.items():
        result = ours[name]
        if result.shape != truth.shape or result.dtype != peer[name].dtype:
            message = (
                f"{name}: {tuple(result.shape)} {result.dtype}, "
                f"not {tuple(truth.shape)} {peer[name].dtype}"
            )
            return Check(False, name, 0.0, 0.0, 0.0, message)
        error = _largest(result.double() - truth)
        peer_error = max(
            _largest(peer[other].double() - exact[other])
            for other in ONE_QUANTITY.get(name, (name,))
        )
        scale = _largest(truth)
        one = torch.finfo(result.dtype).eps if rounding is None else rounding
        limit = 2 * peer_error + one * scale
        if relative is not None:
            limit = relative * scale
        passed = error <= limit  # false for NaN
        over = error / limit if limit > 0 else float(error > 0)
        if not passed:
            over = float("inf") if over != over else max(over, 1.0)
        if worst is None or over > worst[0]:
            worst = over, Check(passed, name, error, peer_error, limit)
    assert worst is not None, "a computation without results cannot be checked"
    return worst[1]


def interleave(pair: Pair, budget_s: float) -> Timing:
    """Times both sides in turns for about ``budget_s`` seconds. Check the pair first."""
    runs = {"ours": pair.ours, "peer": pair.peer}
    return take_turns(runs, pair.device, Effort(budget_s)).against("peer")


@dataclass(frozen=True)
class Turns:
    """What several contestants took in the same rounds."""

    seconds: dict[str, list[float]]  # of one call, a figure for each round
    calls: dict[str, int]  # in a round

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, over: str) -> tuple[float, float, float]:
        """Quartiles over the rounds of one contestant's time over another's."""
        rounds = zip(self.seconds[name], self.seconds[over], strict=True)
        return _quartiles(a / b for a, b in rounds)

    def against(self, peer: str) -> Timing:
        """Of the contestant "ours" and another one."""
        ours_low, ours, ours_high = _quartiles(self.seconds["ours"])
        peer_low, theirs, peer_high = _quartiles(self.seconds[peer])
        low, middle, high = self.ratios(peer, "ours")
        return Timing(
            ours_s=ours,
            peer_s=theirs,
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            rounds=len(self.seconds["ours"]),
            calls=self.calls["ours"],
            ours_quartiles_s=(ours_low, ours_high),
            peer_quartiles_s=(peer_low, peer_high),
        )


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def take_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, effort: Effort
) -> Turns:
    """Times all ``runs`` in turns, each round another one first.

    Each takes at least ``slice_s`` seconds a round; calls before the first round warm up.
    """
    names = list(runs)
    calls = {name: _calls_per_slice(runs[name], device, effort.slice_s) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + effort.budget_s
    for done in range(MAX_ROUNDS):
        if done >= effort.min_rounds and time.perf_counter() >= end:
            break
        first = (done + 1) % len(names)
        for name in names[first:] + names[:first]:
            # From caches that hold nothing of the others.
            torch.empty(effort.scrub_bytes, dtype=torch.uint8, device=device).zero_()
            seconds[name].append(call_s(runs[name], calls[name], device))
    return Turns(seconds, calls)


def captured(runs: Sequence[Run]) -> Callable[[], Results]:
    """All of ``runs`` one after another as one CUDA graph: a call replays it.

    Each call returns the results of the first run, in the graph's own memory: the next call
    overwrites them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer stream comes back as the current one even where the end of a capture fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        first = runs[0]()
        for run in runs[1:]:
            run()

    def replay() -> Results:
        graph.replay()
        return first

    return replay


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory that one call holds beyond what is held before; None where nothing tells."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would be used again without showing
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from now
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if any element is."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _calls_per_slice(run: Callable[[], object], device: torch.device, slice_s: float) -> int:
    """How many calls take ``slice_s``; their first ones warm up."""
    run()
    calls = 1
    while True:
        seconds = call_s(run, calls, device)
        if seconds * calls >= slice_s / 2:
            return max(1, round(slice_s / seconds))
        calls *= 4


def call_s(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call, of ``calls`` in a row; on CUDA as its events see them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / calls
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()
