"""Result files of every command: written here, and read back as records of one kind."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import options
from .layers import GATES, Row, geometric_means, least_bytes
from .machine import UnusableError
from .shapes import Shape

SIZES = ("T", "B", "I", "H", "Tq", "Tk", "A")  # of the sweep's rows, which hold them one by one
KEY = ("cell", "case", "mode", "dtype", "device", "peer")
FORMAT = 1  # counts up when a key changes its meaning


@dataclass(frozen=True)
class Record:
    """One measurement against one peer; None for what the file does not tell."""

    cell: str  # "LSTM", "attention", the name of a model's layer
    case: str  # the shape, after what else there is to tell
    sizes: str  # what the numbers of the shape are: "T,B,I,H"
    mode: str
    dtype: str
    device: str
    peer: str
    unit: str  # of both times: "us/step" or "us/call"
    us: float | None  # ours, the median over the rounds
    peer_us: float | None
    quartiles_us: tuple[float, float] | None  # of ours
    ratio: float | None  # the peer's time over ours
    quartiles: tuple[float, float] | None  # of the ratio over the rounds
    rounds: int | None
    flops_per_s: float | None  # ours, in matrix products
    intensity: float | None  # operations for each byte that the call has to move
    peak_bytes: tuple[float, float] | None  # ours and the peer's
    failure: str | None

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same measurement in another file."""
        return tuple(getattr(self, name) for name in KEY)


@dataclass(frozen=True)
class File:
    """What one run of a command has left."""

    name: str
    command: str
    invocation: str  # how to do it again
    time: str | None
    machine: dict[str, Any]
    records: list[Record]
    notes: list[str]
    unfinished: str | None  # a sweep that was stopped: where


def document(
    command: str,
    invocation: str,
    machine: dict[str, Any],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that was measured, as it goes into a file."""
    return {
        "format": FORMAT,
        "command": command,
        "invocation": invocation,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine,
        "rows": [{**dataclasses.asdict(row), "shape": dict(row.shape._asdict())} for row in rows],
        "geometric_means": [
            {"cell": cell, "mode": mode, "peer": peer, "ratio": ratio}
            for (cell, mode, peer), ratio in geometric_means(rows).items()
        ],
        "notes": list(notes),
    }


def read(path: Path) -> File:
    """Raises UnusableError for what is no result file of this version or an older one."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UnusableError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UnusableError(f"{path}: no JSON: {error}") from error
    return parse(found, str(path))


def parse(found: Any, name: str) -> File:
    """As ``read``, of a document at hand; ``name`` is what messages call it."""
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise UnusableError(f"{name}: no result of fused-rnn-bench: it has no rows")
    if found.get("format") != FORMAT:
        raise UnusableError(
            f"{name}: format {found.get('format')}, expected {FORMAT}: written by another version"
        )
    try:
        command, notes = found["command"], list(map(str, found.get("notes", [])))
        if command == "gpu":
            if found["device"] == "cpu":
                notes.append("a dry run on the CPU: tiny shapes stand in for those that are named")
            records = [r for row in found["rows"] for r in _of_sweep(row, found["device"])]
        else:
            records = [_of_row(row, command) for row in found["rows"]]
        return File(
            name,
            command,
            found.get("invocation", f"fused-rnn-bench {command}"),
            found.get("time"),
            found["machine"],
            records,
            notes,
            found.get("running") or found.get("fault"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnusableError(
            f"{name}: no result of fused-rnn-bench: {type(error).__name__}: {error}"
        ) from error


def _of_row(row: dict[str, Any], command: str) -> Record:
    cell, case, peer = row["cell"], ",".join(map(str, row["shape"].values())), row.get("peer")
    if command == "attention":
        cell, peer = "attention", peer or cell
    elif command == "options":
        cell, option = cell.split(" ", 1)
        peer = peer or (options.LOOP if option.endswith(f", {options.LOOP}") else options.DENSE)
        case = f"{option.removesuffix(f', {options.LOOP}')} {case}"
    time, T = row["time"] or {}, row["shape"].get("T")
    if command == "model":
        cell, case, T = ("model", cell, None) if not case else ("layer", f"{cell} {case}", None)
    scale = 1e6 / (T or 1)
    flops, intensity = row.get("flops"), None
    if flops and cell in GATES:
        intensity = flops / least_bytes(cell, row["mode"], Shape(**row["shape"]))
    check = row["check"]
    return Record(
        cell=cell,
        case=case,
        sizes=",".join(row["shape"]),
        mode=row["mode"],
        dtype=row["dtype"],
        device=row["device"],
        peer=peer or "torch.nn",
        unit="us/step" if T else "us/call",
        us=time["ours_s"] * scale if time else None,
        peer_us=time["peer_s"] * scale if time else None,
        quartiles_us=_pair(time.get("ours_quartiles_s"), scale),
        ratio=time.get("ratio"),
        quartiles=_pair((time.get("ratio_low"), time.get("ratio_high"))),
        rounds=time.get("rounds"),
        flops_per_s=flops / time["ours_s"] if flops and time else None,
        intensity=intensity,
        peak_bytes=_pair(row.get("peak_bytes")),
        failure=None if check["passed"] else _failure(check),
    )


def _failure(check: dict[str, Any]) -> str:
    if check.get("message"):
        return str(check["message"])
    return f"{check['worst']}: error {check['error']}, limit {check['limit']}"


def _of_sweep(row: dict[str, Any], device: str) -> Iterable[Record]:
    """A row of the GPU's sweep: against its peer, in CUDA graphs, and against other libraries."""
    peers = row["peers"]
    main = "torch.nn"
    if row["cell"] == "attention":
        main = "compiled" if "compiled" in peers else "eager"
    failure = None if row["passed"] else row["problem"] or row["check"] or "; ".join(row["notes"])
    record = Record(
        cell=row["cell"],
        case=row["key"].removeprefix(f"{row['cell']} {row['mode']} {row['dtype']} "),
        sizes=",".join(size for size in SIZES if size in row),
        mode=row["mode"],
        dtype=row["dtype"],
        device=device,
        peer=main,
        unit=row["unit"],
        us=row["us"],
        peer_us=peers.get(main),
        quartiles_us=None,
        ratio=row["ratio"],
        quartiles=_pair(row["ratio_quartiles"]),
        rounds=row["rounds"],
        flops_per_s=None if row["gflops"] is None else row["gflops"] * 1e9,
        intensity=None,
        peak_bytes=None,
        failure=failure,
    )
    yield record
    graph = f"{main} graph"
    for name, us in peers.items():
        if name == main:
            continue
        ours, ratio = row["us"], us and row["us"] and us / row["us"]
        if name == graph:
            ours, ratio = row["graph_us"], row["graph_ratio"]
        if ours is not None:
            yield dataclasses.replace(
                record, peer=name, us=ours, peer_us=us, ratio=ratio, quartiles=None,
                flops_per_s=None, failure=None,
            )  # fmt: skip


def _pair(values: Sequence[float | None] | None, scale: float = 1.0) -> tuple[float, float] | None:
    if values is None or values[0] is None or values[1] is None:
        return None
    return values[0] * scale, values[1] * scale
