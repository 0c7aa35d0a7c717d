"""How results are shown in a terminal: the progress bar, tables in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import compare, transforms
from .layers import Row, geometric_means
from .model import WHOLE, share
from .shapes import MODES

LEGEND = (
    "Milliseconds per call, float32. x: the peer's time over ours, median over rounds\n"
    "in turns; above 1 ours is faster. Mean: geometric. Results were checked first."
)

MODEL_LEGEND = (
    "Milliseconds for a call of the model, before and after fused_rnn.convert; x:\n"
    "before over after, median over rounds in turns. Layers are timed alone, on the\n"
    "inputs that the model gives them. Results were checked first."
)
COMPARED_LEGEND = (
    "x: the peer's time over ours. Its change decides, since both sides took turns in\n"
    "one process; noise: changes up to that are none. time: change of our time alone."
)


def peak_legend(peak_flops: float) -> str:
    return (
        "GF/s: our matrix products, in 10^9 operations a second; %: of what multiply-adds\n"
        f"alone reach here, {peak_flops / 1e9:.0f}."
    )


def console() -> Console:
    return Console(highlight=False)


def progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def headline(machine: dict[str, Any], device: str) -> str:
    return (
        f"fused_rnn {machine['fused_rnn']}, torch {machine['torch']}, {device}, "
        f"{machine['threads']} threads, {machine['active_instruction_set']}\n{machine['processor']}"
    )


def table(rows: Sequence[Row], what: str, peer: str, peak_flops: float | None = None) -> Table:
    """One line per cell and shape, forward and training side by side, a mean under each cell.

    All rows are against one peer. ``what`` heads the first column, ``peer`` the peer's times. With
    ``peak_flops`` the peer's times make room for our operations a second and their share of that.
    """
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column(what)
    result.add_column(",".join(rows[0].shape._fields))
    for mode in MODES:
        result.add_column(mode, justify="right")
        if peak_flops is None:
            result.add_column(peer, justify="right")
        result.add_column("x", justify="right")
        if peak_flops is not None:
            result.add_column("GF/s", justify="right")
            result.add_column("%", justify="right")
    means = geometric_means(rows)
    for cell in _in_order(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        for shape in _in_order(row.shape for row in mine):
            line: list[str | Text] = [cell, str(shape)]
            for mode in MODES:
                row = next((r for r in mine if (r.shape, r.mode) == (shape, mode)), None)
                nothing = [""] * (3 if peak_flops is None else 4)
                line += nothing if row is None else _cells(row, peak_flops)
            result.add_row(*line)
        line = [Text(cell, "bold"), Text("mean", "bold")]
        for mode in MODES:
            mean = means.get((cell, mode, mine[0].peer))
            bold = Text("-" if mean is None else f"{mean:.2f}", "bold")
            line += ["", "", bold] if peak_flops is None else ["", bold, "", ""]
        result.add_row(*line, end_section=True)
    return result


def memory_table(rows: Sequence[Row]) -> Table | None:
    """Peak memory of one call, ours and the peer's; None if it was not measured."""
    measured = [row for row in rows if None not in row.peak_bytes]
    if not measured:
        return None
    result = Table(box=box.SIMPLE_HEAD, title="peak memory of one call, MB", title_justify="left")
    for name in ("peer", ",".join(rows[0].shape._fields), "mode"):
        result.add_column(name)
    for name in ("ours", "peer"):
        result.add_column(name, justify="right")
    for row in measured:
        megabytes = [f"{(peak or 0) / 2**20:.1f}" for peak in row.peak_bytes]
        result.add_row(row.cell, str(row.shape), row.mode, *megabytes)
    return result


def failures(rows: Iterable[Row]) -> list[str]:
    return [
        f"FAILED {row.cell} {row.mode} {row.shape}: {row.check}"
        for row in rows
        if not row.check.passed
    ]


def _cells(row: Row, peak_flops: float | None) -> list[str | Text]:
    if row.time is None:
        failed = Text("FAILED", "bold red")
        return ["", "", failed] if peak_flops is None else ["", failed, "", ""]
    ratio = Text(f"{row.time.ratio:.2f}", "green" if row.time.ratio >= 1 else "yellow")
    ours = _milliseconds(row.time.ours_s)
    if peak_flops is None:
        return [ours, _milliseconds(row.time.peer_s), ratio]
    flops = row.flops_per_s or 0.0
    return [ours, ratio, f"{flops / 1e9:.0f}", f"{100 * flops / peak_flops:.0f}"]


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def transforms_table(rows: Sequence[tuple[str, str, str, str | None]]) -> Table:
    """One line per check; yes or no for every library and cell."""
    columns = _in_order(f"{library} {cell}" for _, library, cell, _ in rows)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("transform")
    for column in columns:
        result.add_column(column.replace(" ", "\n"), justify="right")
    for check in _in_order(check for check, *_ in rows):
        found = {f"{library} {cell}": error for name, library, cell, error in rows if name == check}
        result.add_row(
            check,
            *(Text("yes") if found[c] is None else Text("no", style="red") for c in columns),
        )
    return result


def costs_table(costs: Sequence[transforms.Cost]) -> Table:
    """Ratios of times, one line for each and library."""
    cells = _in_order(cost.cell for cost in costs)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("time / time")
    result.add_column("of")
    for cell in cells:
        result.add_column(cell, justify="right")
    for what, library in dict.fromkeys((cost.what, cost.library) for cost in costs):
        found = {c.cell: c.ratio for c in costs if (c.what, c.library) == (what, library)}
        result.add_row(what, library, *(f"{found[cell]:.2f}" for cell in cells))
    return result


def model_table(rows: Sequence[Row]) -> Table:
    """The whole model, then each layer alone: milliseconds before and after, and the ratio."""
    modes = _in_order(row.mode for row in rows)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("layer", overflow="fold")
    result.add_column("T,B,I,H")
    for mode in modes:
        for head in (f"{mode}\nbefore", "\nafter", "\nx"):
            result.add_column(head, justify="right", no_wrap=True)
    for name in _in_order(row.cell for row in rows):
        found = {row.mode: row for row in rows if row.cell == name}
        line: list[str | Text] = [name, str(next(iter(found.values())).shape)]
        for mode in modes:
            ours, peer, ratio = _cells(found[mode], None) if mode in found else ("", "", "")
            line += [peer, ours, ratio]
        result.add_row(*line, end_section=name == WHOLE)
    return result


def model_shares(rows: Sequence[Row]) -> list[str]:
    """How much of the model's time is RNN."""
    lines = []
    for mode in _in_order(row.mode for row in rows):
        found = share(rows, mode)
        if found is not None:
            lines.append(
                f"{mode}: recurrent layers take {found[0]:.0%} of the model's time before, "
                f"{found[1]:.0%} after"
            )
    return lines


def compared_table(found: Sequence[compare.Compared]) -> Table:
    """One line per row: the ratio to the peer in both files, its change, and the verdict."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("row", overflow="fold")
    result.add_column("mode")
    for head in ("x in A", "x in B", "change", "noise", "time"):
        result.add_column(head, justify="right", no_wrap=True)
    result.add_column("verdict", no_wrap=True)
    dtypes = _in_order(each.record.dtype for each in found)
    colours = {compare.FASTER: "green", compare.SAME: "", compare.REPAIRED: "green"}
    for each in found:
        record = each.record
        name = f"{record.cell} {record.case}{f' {record.dtype}' if len(dtypes) > 1 else ''}"
        if record.peer != "torch.nn":
            name += f", against {record.peer}"
        bad = "bold red" if each.verdict in compare.REGRESSIONS else "yellow"
        result.add_row(
            name,
            record.mode,
            *("" if r is None or r.ratio is None else f"{r.ratio:.2f}" for r in each[:2]),
            _percent(each.change),
            "" if each.noise is None else f"{each.noise - 1:.0%}",
            _percent(each.time_change),
            Text(each.verdict, colours.get(each.verdict, bad)),
        )
    return result


def _percent(factor: float | None) -> str:
    return "" if factor is None else f"{round(100 * (factor - 1)):+d}%"
