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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Results = Mapping[str, Tensor]
Run = Callable[[], Results]

SLICE_S = 0.02  # least time of one side in one round
MIN_ROUNDS = 5
MAX_ROUNDS = 25
SCRUB_BYTES = 64 << 20  # larger than the caches of a core; what lies beyond is shared with others


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


def check(pair: Pair, relative: float | None = None) -> Check:
    """Holds ours to twice the peer's own error against float64, plus one rounding of the result.

    The error of a result is the largest difference of any element. One rounding is the dtype's
    epsilon times the result's largest value: it keeps a peer that is exact by luck from asking for
    the impossible. Where ``relative`` is given, the limit is that share of the result's largest
    value instead.
    """
    exact = pair.exact()
    peer = pair.peer()
    try:
        ours = pair.ours()
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
        peer_error = _largest(peer[name].double() - truth)
        scale = _largest(truth)
        limit = 2 * peer_error + torch.finfo(result.dtype).eps * scale
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
    ours_calls = _calls_per_slice(pair.ours, pair.device)
    peer_calls = _calls_per_slice(pair.peer, pair.device)
    ours: list[float] = []
    peer: list[float] = []
    end = time.perf_counter() + budget_s
    while len(ours) < MIN_ROUNDS or (time.perf_counter() < end and len(ours) < MAX_ROUNDS):
        if len(ours) % 2:
            ours.append(_slice(pair.ours, ours_calls, pair.device))
            peer.append(_slice(pair.peer, peer_calls, pair.device))
        else:
            peer.append(_slice(pair.peer, peer_calls, pair.device))
            ours.append(_slice(pair.ours, ours_calls, pair.device))
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(
        statistics.median(ours), statistics.median(peer), middle, low, high, len(ours), ours_calls
    )


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory that one call holds beyond what is held before; None where nothing tells."""
    run()
    if device.type == "cuda":
        _synchronize(device)
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls_per_slice(run: Run, device: torch.device) -> int:
    """How many calls take SLICE_S; their first ones warm up."""
    run()
    calls = 1
    while True:
        seconds = _time(run, calls, device)
        if seconds * calls >= SLICE_S / 2:
            return max(1, round(SLICE_S / seconds))
        calls *= 4


def _slice(run: Run, calls: int, device: torch.device) -> float:
    """Seconds per call, from caches that hold nothing of the other side."""
    torch.empty(SCRUB_BYTES, dtype=torch.uint8, device=device).zero_()
    return _time(run, calls, device)


def _time(run: Run, calls: int, device: torch.device) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()
