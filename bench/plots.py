"""Plots of records, as matplotlib figures: one line per case, one colour per cell.

Their ink is a colour that ``svg`` turns into the page's own, so that they follow its light or dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .records import Record

INK, GRID = "#010203", "#d1d2d3"  # what stands for the page's own colours
COLOURS = ("#3d8bd4", "#e08214", "#1fa187", "#b874c4", "#c2504a", "#8a8f3c", "#7a6ff0", "#808890")
KNOWN = ("LSTM", "GRU", "RNN")  # cells have the same colour on every page
MARKERS = ("o", "s", "D", "^", "v")  # of peers
WIDTH = 9.0  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}

Draw = Callable[[Axes, float, Record, str, str], None]  # at a height, in a colour, with a marker


def times(records: Sequence[Record]) -> Figure | None:
    """Ours and the peers' times, joined by a line."""
    shown = [record for record in records if record.us and record.peer_us]

    def draw(axes: Axes, y: float, record: Record, colour: str, marker: str) -> None:
        assert record.us is not None and record.peer_us is not None
        axes.plot([record.us, record.peer_us], [y, y], color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(record.peer_us, y, marker, color=colour, markersize=4.5, markerfacecolor="none")
        axes.plot(record.us, y, "o", color=colour, markersize=4.5)

    unit = " and ".join(_in_order(record.unit for record in shown))
    figure = _cases(shown, draw, f"{unit}, less is better", peers_hollow=True)
    return _log(figure)


def rates(records: Sequence[Record], peak_flops: float | None = None) -> Figure | None:
    """Operations a second in matrix products, and what multiply-adds alone reach."""
    shown = [record for record in _once(records) if record.flops_per_s]

    def draw(axes: Axes, y: float, record: Record, colour: str, marker: str) -> None:
        assert record.flops_per_s is not None
        axes.barh(y, record.flops_per_s / 1e9, height=0.7, color=colour)

    figure = _cases(shown, draw, "GFLOP/s of fused_rnn", peers_hollow=None)
    for axes in figure.axes if figure and peak_flops else ():
        axes.axvline((peak_flops or 0) / 1e9, color=INK, linewidth=1.0, linestyle="--")
        axes.annotate(
            "multiply-adds", ((peak_flops or 0) / 1e9, 1.0), (-3, -2), rotation=90, va="top",
            ha="right", fontsize=7.5, color=INK, xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )  # fmt: skip
    return figure


def ratios(records: Sequence[Record], title: str = "") -> Figure | None:
    """The peer's time over ours, with the quartiles over the rounds."""
    shown = [record for record in records if record.ratio]

    def draw(axes: Axes, y: float, record: Record, colour: str, marker: str) -> None:
        assert record.ratio is not None
        if record.quartiles:
            axes.plot(record.quartiles, [y, y], color=colour, linewidth=2.5, alpha=0.45)
        axes.plot(record.ratio, y, marker, color=colour, markersize=4.5)
        number = f"{record.ratio:.2f}" if record.ratio < 10 else f"{record.ratio:.1f}"
        right = max(record.ratio, record.quartiles[1] if record.quartiles else 0.0)
        axes.annotate(
            number, (right, y), (5, 0), textcoords="offset points", va="center", fontsize=7
        )

    peers = " or ".join(_in_order(record.peer for record in shown))
    if len(peers) > 40:
        peers = "peer"
    label = f"time of {peers} / time of fused_rnn"
    figure = _log(_cases(shown, draw, label, peers_hollow=False, title=title))
    for axes in figure.axes if figure else ():
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 1.25) * 1.25)  # the numbers stand beside the points
        axes.axvline(1.0, color=INK, linewidth=1.0)
    return figure


def roofline(
    records: Sequence[Record], peak_flops: float | None, bytes_per_s: float | None
) -> Figure | None:
    """What is reached of the machine's limit, against operations per byte that has to move."""
    shown = [r for r in _once(records) if r.flops_per_s and r.intensity]
    if not shown or peak_flops is None:
        return None
    colours = _colours(records)
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.6)
        modes = _in_order(record.mode for record in shown)
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        points = [record.intensity or 0.0 for record in shown]
        left, right = min(points) / 2, max(points) * 2
        ridge = peak_flops / bytes_per_s if bytes_per_s else left
        left, right = min(left, ridge / 4), max(right, ridge * 4)
        for axes, mode in zip(panels, modes, strict=True):
            axes.set_title(mode, loc="left")
            axes.patch.set_alpha(0.0)
            x = sorted((left, ridge, right))
            roof = [min(peak_flops, at * (bytes_per_s or math.inf)) / 1e9 for at in x]
            axes.plot(x, roof, color=INK, linewidth=1.2)
            axes.annotate(
                f"multiply-adds, {peak_flops / 1e9:.0f} GFLOP/s", (right, peak_flops / 1e9),
                (0, 4), textcoords="offset points", ha="right", fontsize=8,
            )  # fmt: skip
            for record in shown:
                if record.mode == mode:
                    axes.plot(
                        record.intensity, (record.flops_per_s or 0.0) / 1e9, "o",
                        color=colours[record.cell], markersize=5, alpha=0.85,
                    )  # fmt: skip
            axes.set_xlabel("operations per byte that the call has to move")
            axes.grid(True)
            _logarithmic(axes.xaxis, axes.set_xscale)
            _logarithmic(axes.yaxis, axes.set_yscale)
            if bytes_per_s:
                middle = math.sqrt(left * peak_flops / bytes_per_s)
                axes.annotate(
                    f"memory, {bytes_per_s / 1e9:.0f} GB/s", (middle, middle * bytes_per_s / 1e9),
                    (8, -8), textcoords="offset points", fontsize=8,
                )  # fmt: skip
        panels[0].set_ylabel("GFLOP/s of fused_rnn")
        _legend(figure, [_dot(colours[cell], cell) for cell in _in_order(r.cell for r in shown)])
    return figure


def memory(records: Sequence[Record]) -> Figure | None:
    """Peak memory of one call, ours and the peer's."""
    shown = [record for record in records if record.peak_bytes and max(record.peak_bytes) > 0]

    def draw(axes: Axes, y: float, record: Record, colour: str, marker: str) -> None:
        assert record.peak_bytes is not None
        # Less than a page cannot be told from nothing.
        ours, peer = (max(each, 4096) / 2**20 for each in record.peak_bytes)
        axes.plot([ours, peer], [y, y], color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(peer, y, marker, color=colour, markersize=4.5, markerfacecolor="none")
        axes.plot(ours, y, "o", color=colour, markersize=4.5)

    return _log(_cases(shown, draw, "peak memory of a call, MB, less is better", peers_hollow=True))


def svg(figure: Figure, name: str, label: str) -> str:
    """An ``<svg>`` element for a page that defines ``--grid``; its ids are those of ``name``."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue().replace(INK, "currentColor").replace(GRID, "var(--grid)")
    text = re.sub(r'<g id="[\w.]+"', "<g", text)  # which nothing refers to, and every plot has
    start = text.index("<svg")
    return f'<svg role="img" aria-label="{escape(label)}"' + text[start + len("<svg") :]


def png(figure: Figure) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure.set_facecolor("white")
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=130, layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def _cases(
    records: Sequence[Record],
    draw: Draw,
    label: str,
    peers_hollow: bool | None,
    title: str = "",
) -> Figure | None:
    """Modes side by side; below one another the cases, and within each its cells and peers.

    ``peers_hollow`` says what the legend has of peers: None for nothing.
    """
    if not records:
        return None
    heights, middles, edges = _heights(records)
    colours, markers = _colours(records), _markers(records)
    modes = _in_order(record.mode for record in records)
    bottom = edges[-1]
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.3 + 0.155 * bottom + (0.3 if title else 0.0))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            axes.set_title(mode, loc="left")
            axes.patch.set_alpha(0.0)
            for record in records:
                if record.mode == mode:
                    y = heights[record.case, record.cell, record.peer]
                    draw(axes, y, record, colours[record.cell], markers[record.peer])
            for edge in edges[:-1]:
                axes.axhline(edge, color=GRID, linewidth=0.5)
            axes.grid(True, axis="x")
            axes.set_xlabel(label)
            axes.set_yticks(list(middles.values()), list(middles))
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(bottom, 0.0)
        sizes = " or ".join(_in_order(record.sizes for record in records if record.sizes))
        panels[0].annotate(
            sizes, (0.0, 1.0), (-5, 7), xycoords="axes fraction", textcoords="offset points",
            ha="right", fontstyle="italic",
        )  # fmt: skip
        legend = [_dot(colours[cell], cell) for cell in _in_order(r.cell for r in records)]
        peers = _in_order(record.peer for record in records)
        if peers_hollow:
            legend.append(_dot(INK, "fused_rnn"))
            legend += [_dot(INK, peer, markers[peer], hollow=True) for peer in peers]
        elif peers_hollow is not None and len(peers) > 1:
            legend += [_dot(INK, f"against {peer}", markers[peer]) for peer in peers]
        _legend(figure, legend, below=bool(title))  # a title has the line above
    return figure


def _heights(
    records: Sequence[Record],
) -> tuple[dict[tuple[str, str, str], float], dict[str, float], list[float]]:
    """Of each (case, cell, peer), of the middle of each case, and of the lines below cases."""
    heights: dict[tuple[str, str, str], float] = {}
    middles: dict[str, float] = {}
    edges: list[float] = []
    y = 0.0
    for case in _in_order(record.case for record in records):
        lines = _in_order((r.cell, r.peer) for r in records if r.case == case)
        y += 0.5
        for i, (cell, peer) in enumerate(lines):
            heights[case, cell, peer] = y + i + 0.5
        middles[case] = y + len(lines) / 2
        y += len(lines) + 0.5
        edges.append(y)
    return heights, middles, edges


def _log(figure: Figure | None) -> Figure | None:
    for axes in figure.axes if figure else ():
        _logarithmic(axes.xaxis, axes.set_xscale)
    return figure


def _logarithmic(axis: Any, set_scale: Callable[[str], None]) -> None:
    set_scale("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs: tuple[float, ...] = (1.0,)
    if decades < 2.2:
        subs = (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, handles: list[Line2D], below: bool = False) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower right" if below else "outside upper right",
        ncols=min(8, len(handles)),
        fontsize=8.5,
    )


def _dot(colour: str, label: str, marker: str = "o", hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    return Line2D(
        [], [], color=colour, marker=marker, linestyle="", label=label, markerfacecolor=face,
        markersize=5,
    )  # fmt: skip


def _colours(records: Iterable[Record]) -> dict[str, str]:
    others = [c for c in _in_order(record.cell for record in records) if c not in KNOWN]
    cells = [*KNOWN, *others]
    return {cell: COLOURS[i % len(COLOURS)] for i, cell in enumerate(cells)}


def _markers(records: Iterable[Record]) -> dict[str, str]:
    peers = _in_order(record.peer for record in records)
    return {peer: MARKERS[i % len(MARKERS)] for i, peer in enumerate(peers)}


def _once(records: Iterable[Record]) -> list[Record]:
    """Ours has one time, against however many peers."""
    return list({(r.cell, r.case, r.mode, r.dtype): r for r in reversed(list(records))}.values())[
        ::-1
    ]


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
