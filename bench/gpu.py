"""The sweep: layers and attention over shapes, dtypes and modes on a GPU, against their peers.

Every row is checked, then timed in turns with torch.nn's layer, with CUDA graphs of both, and with
the other libraries that can be imported. Rows are ordered so that any beginning of the list is
spread over everything, and the file holds all rows so far whenever one begins.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_rnn

from . import attention, layers, machine, results, rivals, timing
from .attention import AttentionShape
from .shapes import CELLS, MODES, Shape

# Time is counted per row, set up and check included.
GPU_EFFORT = timing.Effort(budget_s=0.3, slice_s=0.005, min_rounds=3)
DRY_EFFORT = timing.Effort(budget_s=0.0, slice_s=0.0, min_rounds=2, scrub_bytes=1)
GRAPH_BELOW_S = 0.05  # of one call: nothing that takes longer waits for launches
CAPTURE_FAILURES = 3  # then no more is tried: each may leave torch's allocator in disorder
ROW_LIMIT_S = 20.0  # then a row counts as hung, and its process ends
ATTENTION_ROW_LIMIT_S = 60.0  # torch.compile included
COMPILED_ROW_LIMIT_S = 240.0  # where a library runs a compiler for every shape
FAULT = 3  # exit status when the device is lost to the process


class Precision(NamedTuple):
    """A dtype of the sweep: how numbers are stored, and what products may do with them."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def rounding(self) -> float:
        """Of a number on its way into a product: TF32 keeps ten bits after the point."""
        return 2.0**-10 if self.tf32 else torch.finfo(self.dtype).eps


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "tf32": Precision(torch.float32, tf32=True),
    "fp32": Precision(torch.float32),
}


class Case(NamedTuple):
    """What a row measures. An attention's cell is "attention"."""

    cell: str
    mode: str
    dtype: str
    shape: Shape | AttentionShape
    num_layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    library: str = ""  # the one that this row is there for
    engine: str = ""  # the one of ours that is forced; else the plan chooses

    @property
    def key(self) -> str:
        parts = [self.cell, self.mode, self.dtype, str(self.shape)]
        parts += [f"{self.num_layers} layers"] if self.num_layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += ["ragged"] if self.ragged else []
        parts += [self.library] if self.library else []
        parts += [f"on {self.engine}"] if self.engine else []
        return " ".join(parts)

    @property
    def expected_s(self) -> float:
        """How long the row takes on a GPU, a guess; where something compiles, mostly that."""
        if self.library:
            return 150.0
        if isinstance(self.shape, AttentionShape):
            return 15.0
        flops = layers.product_flops(self.cell, self.mode, self.shape, self.num_layers)
        return 0.8 + 30 * flops / PEAK_FLOPS[self.dtype]  # some 15 calls at half the peak

    @property
    def limit_s(self) -> float:
        if self.library:
            return COMPILED_ROW_LIMIT_S
        return ATTENTION_ROW_LIMIT_S if isinstance(self.shape, AttentionShape) else ROW_LIMIT_S

    @property
    def dense(self) -> bool:
        return self.num_layers == 1 and not self.bidirectional and not self.ragged


HIDDEN = (512, 1024, 256, 768, 128, 2048)  # the order in which a subset reaches them
BATCH = (1, 16, 64, 128, 256)
JUDGED = Shape(1024, 16, 768, 768)  # FlashRNN's published shape, LSTM
STACKED = Shape(256, 64, 512, 512)  # two layers, bidirectional
RAGGED = Shape(256, 64, 512, 512)
DEEP = Shape(1024, 16, 512, 512)  # four layers, which have room beside each other


def plan(libraries: Sequence[rivals.Library] = ()) -> tuple[list[Case], int]:
    """All rows in order, and how many of them are the subset.

    The subset is JUDGED, also on each of our engines; every cell, dtype and mode at every H, with
    B moving on from one to the next so that all pairs of H and B occur; stacked, ragged and
    attention. Rows for ``libraries`` that compile for minutes come after it, then the rest of the
    grid.
    """
    choices = [
        (cell, mode, dtype) for mode in reversed(MODES) for dtype in PRECISIONS for cell in CELLS
    ]
    judged = [Case("LSTM", mode, dtype, JUDGED) for dtype in PRECISIONS for mode in MODES]
    spread = [
        Case(*choice, Shape(256, BATCH[(h + number) % len(BATCH)], H, H))
        for h, H in enumerate(HIDDEN)
        for number, choice in enumerate(choices)
    ]
    stacked = [Case(*choice, STACKED, 2, True) for choice in choices]
    ragged = [Case(*choice, RAGGED, ragged=True) for choice in choices]
    deep = [Case("LSTM", mode, dtype, DEEP, 4) for dtype in PRECISIONS for mode in MODES]
    attentions = [
        Case("attention", mode, dtype, shape)
        for shape in attention.SHAPES
        for mode, dtype in (
            ("forward", "bf16"), ("training", "fp32"), ("training", "bf16"), ("forward", "fp32"),
        )
    ]  # fmt: skip
    on_each = [case._replace(engine=name) for case in judged for name in machine.CUDA_ENGINES]
    once = len(choices)
    subset = [
        *(case for case in judged if case.dtype in ("bf16", "fp16")),
        *(case for case in on_each if case.dtype == "bf16"),
        *spread[:once],
        *stacked[::5],
        *(case for case in deep if case.dtype == "bf16"),
        *ragged[1::5],
        *attentions[::5],
        *spread[once:],
    ]
    compiled = [
        Case("LSTM", mode, "bf16", JUDGED, library=library.module)
        for library in libraries
        if library.compiles and library.serves("LSTM", "bf16")
        for mode in MODES
    ]
    grid = [Case(*choice, Shape(256, B, H, H)) for H in HIDDEN for B in BATCH for choice in choices]
    every = [*subset, *compiled, *judged, *on_each, *stacked, *deep, *ragged, *grid, *attentions]
    return list(dict.fromkeys(every)), len(subset)


def on_engine(cases: Sequence[Case], engine: str) -> list[Case]:
    """The layers among ``cases``, all on one engine."""
    forced = [case._replace(engine=engine) for case in cases if isinstance(case.shape, Shape)]
    return list(dict.fromkeys(forced))


def tiny(shape: Shape | AttentionShape) -> Shape | AttentionShape:
    """A shape for a dry run on the CPU, in place of one of the plan's."""
    if isinstance(shape, AttentionShape):
        return AttentionShape(2, min(shape.Tq, 3), 5, 8)
    return Shape(3, min(shape.B, 3), max(2, shape.I // 64), max(2, shape.H // 64))


# H100 SXM and H200: dense operations a second (NVIDIA's data sheet), the boost clock, the SMs.
PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "tf32": 495e12, "fp32": 67e12}
CLOCK_HZ, SMS = 1.98e9, 132
L2_HAND_OVER_US = 0.16  # a flag through L2, one way
CLUSTER_HAND_OVER_US = 181 / CLOCK_HZ * 1e6  # the shortest load from another SM of the cluster
CLUSTER_BYTES = 16 * 400 * 1024  # weights that one cluster of 16 SMs can hold


def floor_us(case: Case, shape: Shape, steps: int) -> float:
    """Microseconds a timestep that no H100 or H200 can go below: arithmetic, not measured.

    The larger of two, both with weights resident and nothing else in the way:

    - the chain: the recurrent product of one step, 2 B G H^2 operations for each direction at the
      chip's peak, then one hand-over of h: 181 cycles within a cluster where the recurrent weights
      fit in one, else 0.16 us through L2. Training goes along it twice.
    - all products of the call (three times forward's in training) at the peak, over T.

    ``steps`` are the timesteps of all batch rows together.
    """
    gates, directions = layers.GATES[case.cell], 2 if case.bidirectional else 1
    peak = PEAK_FLOPS[case.dtype]
    weights = gates * shape.H**2
    fits = weights * PRECISIONS[case.dtype].dtype.itemsize <= CLUSTER_BYTES
    hand_over = CLUSTER_HAND_OVER_US if fits else L2_HAND_OVER_US
    chain = 2 * steps / shape.T * weights * directions / peak * 1e6 + hand_over
    flops = layers.product_flops(
        case.cell, case.mode, shape, case.num_layers, case.bidirectional, steps
    )
    return max(chain * (1 if case.mode == "forward" else 2), flops / peak / shape.T * 1e6)


def attention_floor_us(shape: AttentionShape) -> float:
    """Forward with one hardware tanh for each (query, key, channel), 16 a clock and SM."""
    return shape.B * shape.Tq * shape.Tk * shape.A / (16 * SMS * CLOCK_HZ) * 1e6


def engine(layer: Any, input: Tensor, mode: str) -> dict[str, Any]:
    """What ``fused_rnn.explain`` says of a call, as a row has it.

    Predictions are of the recurrence alone; what is measured has the input's product and, in
    training, the weight gradients too.
    """
    phases = PHASES[mode]
    try:
        with torch.set_grad_enabled(mode == "training"):
            explanation = fused_rnn.explain(layer, input)
    except Exception as failure:  # a name in a table is not worth its row
        return {"engine": f"({type(failure).__name__})"}
    taken = [choice for choice in explanation.choices if choice.phase in phases]
    times = [choice.candidates[0].us_per_step for choice in taken]
    known = [time for time in times if time is not None]
    predicted_us = sum(known) if len(known) == len(times) else None
    wavefront, parts = explanation.wavefront, 1
    if wavefront is not None and wavefront.parts > 1:
        predicted_us, parts = wavefront.microseconds / input.shape[0], wavefront.parts
    of_first_layer = {
        choice.phase: {each.engine: each.us_per_step for each in choice.candidates if each.possible}
        for choice in taken
        if choice.layer == 0
    }
    return {
        "engine": "+".join(dict.fromkeys(choice.engine for choice in taken)),
        "predicted_us": predicted_us,
        "predicted": of_first_layer,
        "parts": parts,
    }


PHASES = {"forward": ("forward",), "training": ("forward", "backward")}


class Place(NamedTuple):
    """Where a row runs."""

    engine: str  # of ours that is forced; empty for the plan's choice
    engines: tuple[str, ...]  # that it can lose the device to


def place(case: Case, device: torch.device, avoided: Mapping[str, str]) -> Place | str:
    """Where ``case`` runs, or why it cannot. A dry run asks about an H100.

    Args:
        avoided: engines that have lost a row, and which. A row that forces one of them is left
            out; one for which the plan takes it goes to the best of the others.
    """
    if isinstance(case.shape, AttentionShape):
        return Place("", ())
    passes = _candidates(case, device)
    able = {
        name: sum(found[name].us_per_step or float("inf") for found in passes.values())
        for name in machine.CUDA_ENGINES
        if all(found[name].possible for found in passes.values())
    }
    if case.engine and case.engine not in able:
        for phase, found in passes.items():
            if not found[case.engine].possible:
                return f"{case.engine} cannot take it {phase}: {found[case.engine].reason}"
    forced = case.engine or os.environ.get(machine.VARIABLE, "")
    if forced in avoided:
        return f"{forced} is avoided: {avoided[forced]} was lost"
    taken = (forced,) if forced else tuple(next(iter(found)) for found in passes.values())
    if not any(engine in avoided for engine in taken):
        return Place(case.engine, tuple(dict.fromkeys(taken)))
    best = min((name for name in able if name not in avoided), key=able.__getitem__)
    return Place(best, (best,))


def _candidates(case: Case, device: torch.device) -> dict[str, dict[str, Any]]:
    """By pass, then by engine, the plan's first: what ``fused_rnn.explain`` says of it."""
    assert isinstance(case.shape, Shape)
    on_gpu = device.type == "cuda"
    with products_as(PRECISIONS[case.dtype]), machine.forced(""):
        layer = getattr(fused_rnn, case.cell)(
            case.shape.I, case.shape.H, case.num_layers, bidirectional=case.bidirectional,
            dtype=PRECISIONS[case.dtype].dtype, device=device if on_gpu else "meta",
        )  # fmt: skip
        explanation = fused_rnn.explain(layer, case.shape[:3], chip=None if on_gpu else "H100")
    return {
        choice.phase: {each.engine: each for each in choice.candidates}
        for choice in explanation.choices
        if choice.layer == 0 and choice.phase in PHASES[case.mode]
    }


def blank(case: Case, shape: Shape | AttentionShape) -> dict[str, Any]:
    """A row that holds no figure yet; times are medians in microseconds of one ``unit``."""
    row: dict[str, Any] = {"key": case.key, "cell": case.cell, "mode": case.mode}
    row.update({"dtype": case.dtype, **shape._asdict()})
    if isinstance(shape, Shape):
        row.update(layers=case.num_layers, bidirectional=case.bidirectional, ragged=case.ragged)
    return row | {
        "forced": case.engine or None,
        "engine": None,  # of ours; forward+backward where those differ
        "predicted_us": None,  # by the plan: what it took, all layers and passes, recurrence alone
        "predicted": {},  # pass: engine that can take it: us, of one layer
        "parts": 1,  # of time, in which layers over each other run as a wavefront
        "unit": "us/step" if isinstance(shape, Shape) else "us/call",
        "us": None,
        "graph_us": None,  # our call in a CUDA graph
        "captured": None,  # whether capture in CUDA graphs worked, if it was tried
        "peers": {},  # name: us; "torch.nn graph" is that in a CUDA graph
        "ratio": None,  # torch.nn's time over ours; for attention torch.compile's
        "ratio_quartiles": None,
        "graph_ratio": None,  # the same of both in CUDA graphs
        "gflops": None,  # 10^9 operations a second in our matrix products
        "floor_us": None,  # arithmetic, see floor_us
        "floor_ratio": None,  # our time over that
        "rounds": None,
        "check": None,
        "passed": False,
        "notes": [],
        "problem": None,
        "seconds": None,
    }


def measure(
    case: Case,
    shape: Shape | AttentionShape,
    device: torch.device,
    effort: timing.Effort,
    libraries: Sequence[rivals.Library] = (),
    graphs: bool = False,
) -> dict[str, Any]:
    """One row: checked and, where that passed, timed; with ``graphs`` in CUDA graphs too."""
    with products_as(PRECISIONS[case.dtype]):
        if isinstance(shape, AttentionShape):
            return _attention(case, shape, device, effort)
        if not case.engine:  # the plan's choice, or that of the environment
            return _layer(case, shape, device, effort, libraries, graphs)
        with machine.forced(case.engine):
            return _layer(case, shape, device, effort, libraries, graphs)


@contextmanager
def products_as(precision: Precision) -> Iterator[None]:
    """Allows TF32 or forbids it, for our products and for the peer's."""
    switches: tuple[Any, Any] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision.tf32
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def _layer(
    case: Case,
    shape: Shape,
    device: torch.device,
    effort: timing.Effort,
    libraries: Sequence[rivals.Library],
    graphs: bool,
) -> dict[str, Any]:
    row = blank(case, shape)
    notes: list[str] = row["notes"]
    precision = PRECISIONS[case.dtype]
    variant = layers.Variant(precision.dtype, case.num_layers, case.bidirectional, case.ragged)
    problem = layers.problem(case.cell, shape, device, variant, _copies(shape, precision, device))
    row.update(engine(problem.ours, problem.inputs[0], case.mode))
    pair = problem.checked(case.mode)
    exact, peer = pair.exact(), pair.peer()
    check = timing.compare(pair.ours, peer, exact, rounding=precision.rounding)
    row.update(check=str(check), passed=check.passed)
    if not check.passed:
        return row

    ours_runs, peer_runs = problem.timed(case.mode)
    runs: dict[str, Callable[[], object]] = {"ours": _rotating(ours_runs)}
    runs["torch.nn"] = _rotating(peer_runs)
    if graphs and not case.ragged and timing.call_s(runs["ours"], 1, device) < GRAPH_BELOW_S:
        try:
            replay = timing.captured(ours_runs)
            again = timing.compare(replay, peer, exact, rounding=precision.rounding)
            row.update(captured=True, passed=again.passed)
            if again.passed:
                runs["ours graph"] = replay
            else:
                notes.append(f"our CUDA graph: {again}")
            runs["torch.nn graph"] = timing.captured(peer_runs)
        except RuntimeError as failure:
            row["captured"] = False
            notes.append(f"no CUDA graph: {_first_line(failure)}")
    if case.dense:
        serving = [
            library
            for library in libraries
            if library.serves(case.cell, case.dtype)
            and case.library == (library.module if library.compiles else "")
        ]
        for found in rivals.rivals(serving, case.cell, problem, case.mode, exact):
            if isinstance(found, str):
                notes.append(found)
            else:
                runs[found.name] = found.run
                included = "included" if found.input_product else "NOT included"
                notes.append(f"{found.name}: input product {included}")
    del pair, exact, peer  # the memory of float64

    turns = timing.take_turns(runs, device, effort)
    # A replay runs every input once.
    shares = {name: len(ours_runs) if name.endswith(" graph") else 1 for name in runs}
    us = {name: turns.median(name) / shares[name] / shape.T * 1e6 for name in runs}
    row["us"], row["graph_us"] = us.pop("ours"), us.pop("ours graph", None)
    row["peers"] = us
    _ratios(row, turns, "torch.nn")
    if row["graph_us"] is not None and "torch.nn graph" in us:
        row["graph_ratio"] = turns.ratios("torch.nn graph", "ours graph")[1]
    steps = problem.steps()
    flops = layers.product_flops(
        case.cell, case.mode, shape, case.num_layers, case.bidirectional, steps
    )
    row["gflops"] = flops / turns.median("ours") / 1e9
    _floor(row, floor_us(case, shape, steps), device)
    return row


def _attention(
    case: Case, shape: AttentionShape, device: torch.device, effort: timing.Effort
) -> dict[str, Any]:
    row = blank(case, shape)
    dtype = PRECISIONS[case.dtype].dtype
    on_gpu = device.type == "cuda"
    row["engine"] = "triton" if on_gpu else "cpu"
    torch.compiler.reset()  # or the compiler gives up after so many shapes
    peers = attention.peers("inductor" if on_gpu else "eager")
    pairs = {
        name: attention.pair(peer, case.mode, shape, device, dtype) for name, peer in peers.items()
    }
    relative = attention.RELATIVE_ERROR if dtype == torch.float32 else None
    check = timing.check(pairs["eager"], relative)
    row.update(check=str(check), passed=check.passed)
    if not check.passed:
        return row
    runs = {"ours": pairs["eager"].ours, "eager": pairs["eager"].peer}
    against = "eager"
    try:
        pairs["compiled"].peer()
        runs["compiled"] = pairs["compiled"].peer
        against = "compiled"
    except Exception as failure:  # of a compiler: any kind
        row["notes"].append(f"torch.compile: {_first_line(failure)}")
    turns = timing.take_turns(runs, device, effort)
    row["us"] = turns.median("ours") * 1e6
    row["peers"] = {name: turns.median(name) * 1e6 for name in runs if name != "ours"}
    _ratios(row, turns, against)
    if case.mode == "forward":
        _floor(row, attention_floor_us(shape), device)
    return row


def _ratios(row: dict[str, Any], turns: timing.Turns, peer: str) -> None:
    low, middle, high = turns.ratios(peer, "ours")
    row.update(ratio=middle, ratio_quartiles=[low, high], rounds=len(turns.seconds["ours"]))


def _floor(row: dict[str, Any], floor: float, device: torch.device) -> None:
    """The figures are those of one chip; on another there is no floor to speak of."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        row.update(floor_us=floor, floor_ratio=row["us"] / floor)


def _copies(shape: Shape, precision: Precision, device: torch.device) -> int:
    """Inputs to rotate among, so that a cache does not hold the next: at most 4, on memory."""
    if device.type != "cuda":
        return 2
    size = shape.T * shape.B * shape.I * precision.dtype.itemsize
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(1, min(4, -(-2 * cache // size)))


def _rotating(runs: Sequence[timing.Run]) -> Callable[[], timing.Results]:
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def _first_line(failure: Exception) -> str:
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


class Sweep:
    """The rows measured so far, in a file that is whole at any time."""

    def __init__(self, path: Path | None, device: torch.device, planned: int, resume: bool):
        """With ``resume`` goes on from the file; the row under way when it was left is lost."""
        self.path = path
        self.device = device
        before = results.read_json(path, {}) if path is not None and resume else {}
        self.document: dict[str, Any] = {
            "format": 1,
            "command": "gpu",
            "device": str(device),
            "machine": machine.facts(),
            "planned": planned,
            "running": None,  # the key of the row under way; left behind if the process is killed
            "running_on": [],  # the engines that it can lose the device to
            "fault": None,  # why the process gave up, if it did
            "left_out": [],  # keys of rows that the engine forced on them cannot take, and why
            "avoided": before.get("avoided", {}),  # engines that lost a row, and its key
            "rows": before.get("rows", []),
        }
        self.lost: str | None = before.get("running")
        if self.lost is not None:
            self.avoid(before.get("running_on", []), self.lost)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]  # type: ignore[no-any-return]

    @property
    def avoided(self) -> dict[str, str]:
        return self.document["avoided"]  # type: ignore[no-any-return]

    def avoid(self, engines: Iterable[str], lost: str) -> None:
        """From now on, but for per_step: it waits for nothing, and takes what no other can."""
        for engine in engines:
            if engine != "per_step":
                self.avoided.setdefault(engine, lost)

    def begin(self, case: Case, engines: Sequence[str]) -> None:
        self.document.update(running=case.key, running_on=list(engines))
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(results.row_line(row), *(f"\n    {note}" for note in row["notes"]), flush=True)

    def leave_out(self, case: Case, why: str) -> None:
        self.document["left_out"].append({"key": case.key, "why": why})
        print(f"{case.key}: left out, {why}", flush=True)

    def end(self, fault: str | None = None) -> None:
        self.document.update(running=None, running_on=[], fault=fault)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            results.write_json(self.path, self.document)


def sweep(
    cases: Sequence[Case],
    device: torch.device,
    path: Path | None = None,
    seconds: float | None = None,
    resume: bool = False,
    libraries: Sequence[rivals.Library] = (),
    guard: Callable[[float], None] = lambda limit_s: None,
) -> int:
    """Measures ``cases`` in order while the next one fits in what is left of ``seconds``.

    Args:
        path: the file of the rows; those that it has are not measured again with ``resume``.
        guard: is told before each row how long that may take, and 0 after the last.

    Returns:
        The exit status: 0, 1 if a row failed, FAULT if the device can no longer be used.
    """
    start = time.perf_counter()
    on_gpu = device.type == "cuda"
    file = Sweep(path, device, len(cases), resume)
    done = {row["key"] for row in file.rows}
    took: list[float] = []
    for case in cases:
        shape = case.shape if on_gpu else tiny(case.shape)
        if case.key == file.lost and case.key not in done:
            row = blank(case, shape)
            row["problem"] = "the process ended while this row ran"
            file.add(row)
            done.add(case.key)
        elapsed = time.perf_counter() - start
        usual = 1.5 * statistics.fmean(took) if took else 0.0
        expected = max(usual, case.expected_s) if on_gpu else usual
        if case.key in done or (seconds is not None and elapsed + expected > seconds):
            continue
        guard(case.limit_s)
        began = time.perf_counter()
        placed = Place("", ())
        try:
            found = place(case, device, file.avoided)
            if isinstance(found, str):
                file.leave_out(case, found)
                continue
            placed = found
            file.begin(case, placed.engines)  # a row left out never ran, so it cannot be lost
            effort = GPU_EFFORT if on_gpu else DRY_EFFORT
            uncaptured = sum(row["captured"] is False for row in file.rows)
            graphs = on_gpu and uncaptured < CAPTURE_FAILURES
            on = case._replace(engine=placed.engine)
            row = measure(on, shape, device, effort, libraries, graphs) | {"key": case.key}
            if placed.engine != case.engine:
                row["notes"].append(f"avoided: {', '.join(sorted(file.avoided))}")
        except Exception as failure:  # a row that fails is a row of the report, not its end
            row = blank(case, shape)
            row["problem"] = _first_line(failure)
        fault = _fault(device)
        row["seconds"] = time.perf_counter() - began
        if fault is not None:
            row.update(problem=fault, passed=False)
            file.avoid(placed.engines, case.key)
        file.add(row)
        if not isinstance(case.shape, AttentionShape):
            took.append(row["seconds"])
        if fault is not None:
            file.end(fault)
            return FAULT
    guard(0)
    file.end()
    return 0 if all(row["passed"] for row in file.rows) else 1


def _fault(device: torch.device) -> str | None:
    """The error that the device has left in the process for good, if any."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.ones(1, device=device).item()
    except RuntimeError as failure:
        return _first_line(failure)
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write results, row by row")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no row that takes longer")
    parser.add_argument(
        "--rows", choices=("subset", "all"), default="all", help="all begins with the subset"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--engine", choices=machine.CUDA_ENGINES, help="layers only, all on this one"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the rows of --json")
    parser.add_argument("--plan", action="store_true", help="say how many rows, measure nothing")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """The command; ``device`` is the one that the options name."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # for shapes this small others would only be waited for
    every, count = plan(rivals.LIBRARIES)
    subset = every[:count]
    if options.engine:
        every, subset = on_engine(every, options.engine), on_engine(subset, options.engine)
    if options.plan:
        for name, cases in (("subset", subset), ("all", every)):
            expected = sum(case.expected_s for case in cases)
            print(f"sweep, {name}: {len(cases)} rows, about {expected:.0f} s on a GPU (a guess)")
        return 0
    return sweep(
        subset if options.rows == "subset" else every,
        device,
        options.json,
        options.seconds,
        options.resume,
        rivals.LIBRARIES,
        _watch,
    )


def _watch(limit_s: float) -> None:
    """Ends the process with a traceback when ``limit_s`` seconds are over; 0 calls that off.

    From a thread of its own that needs nothing of the interpreter: a kernel that never ends keeps
    the main thread inside the driver.
    """
    if limit_s:
        faulthandler.dump_traceback_later(limit_s, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()
