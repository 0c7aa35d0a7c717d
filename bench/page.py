"""One self-contained HTML page of result files: failures first, plots, all figures, the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from . import plots
from .records import File, Record

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #fff; --grid: #d5dae0; --soft: #5b6875;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --paper: #14191f; --grid: #353e48; --soft: #98a4b0; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.2rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 1rem 0 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0; padding-top: 1rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.8rem 0 0; }
p, figcaption { max-width: 46rem; }
p.soft, figcaption { color: var(--soft); margin: 0.2rem 0 0.6rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { overflow-x: auto; padding: 0.6rem 0.8rem; border: 1px solid var(--grid); border-radius: 4px; }
.failures { border-left: 4px solid var(--bad); padding-left: 0.9rem; }
.failures h2 { border: 0; margin: 1.2rem 0 0; padding: 0; color: var(--bad); }
summary { cursor: pointer; margin: 1rem 0; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")

METHOD = (
    "Times are medians over rounds in which both sides took turns in one process; a ratio is the "
    "median over the rounds of the peer's time over ours, so above 1 fused_rnn is faster. Every "
    "result was held against the same computation in float64 before it was timed."
)
ROOFLINE = (
    "The limit is what multiply-adds alone reach on this machine and, where it was measured, the "
    "bandwidth of a copy larger than any cache. A call has to move each tensor that it is given or "
    "returns once; what runs again and again from a cache may lie above the slope."
)

# Of the machine's facts, what the page shows; the rest is in the JSON.
FACTS = (
    "processor", "platform", "cores", "threads", "active_instruction_set", "cuda_devices", "python",
    "torch", "torch_cuda", "fused_rnn",
)  # fmt: skip


def page(files: Sequence[File]) -> str:
    """HTML that loads nothing and runs nothing; ``plots`` are SVG in it."""
    failed = [(file, record) for file in files for record in file.records if record.failure]
    body = [_failures(failed)] if failed else []
    body += [_section(file, f"{i}") for i, file in enumerate(files)]
    versions = _in_order(str(file.machine.get("fused_rnn", "")) for file in files)
    title = f"fused_rnn {', '.join(versions)}: benchmark"
    return PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(body))


def write(path: Path, files: Sequence[File]) -> None:
    path.write_text(page(files), encoding="utf-8")


def write_png(path: Path, file: File) -> None:
    """The ratios to the peers, with what they were measured on."""
    machine = file.machine
    title = f"fused_rnn {machine.get('fused_rnn')}, torch {machine.get('torch')}, {_place(file)}"
    path.write_bytes(plots.png(plots.ratios(file.records, title) or Figure()))


def _place(file: File) -> str:
    on_gpu = any(record.device.startswith("cuda") for record in file.records)
    devices = file.machine.get("cuda_devices") or []
    if on_gpu and devices:
        return str(devices[0])
    return f"{file.machine.get('processor')}, {file.machine.get('threads')} threads"


def _failures(failed: Iterable[tuple[File, Record]]) -> str:
    lines = "".join(
        f"<li>{escape(' '.join((r.cell, r.case, r.mode, r.dtype)))}: {escape(r.failure or '')} "
        f"({escape(file.name)})</li>"
        for file, r in failed
    )
    return f'<div class="failures"><h2>Failed</h2><ul>{lines}</ul></div>'


def _section(file: File, prefix: str) -> str:
    parts = [
        f"<h2>fused-rnn-bench {escape(file.command)}</h2>",
        f'<p class="soft">{escape(", ".join(filter(None, (_place(file), file.time))))}</p>',
    ]
    if file.unfinished:
        parts.append(f"<p>The run was stopped at: {escape(file.unfinished)}</p>")
    if file.notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in file.notes)
        parts.append(f"<ul>{lines}</ul>")
    parts += [_means(file.records), f'<p class="soft">{METHOD}</p>']
    facets = _facets(file)
    for name, records in facets.items():
        parts += _plots(file, records, f"{prefix} {name}", f", {name}" if len(facets) > 1 else "")
    parts += [
        f"<details><summary>All figures, {len(file.records)} rows</summary>",
        f'<div class="wide">{_figures(file.records)}</div></details>',
        "<h3>Machine</h3>",
        _machine(file.machine),
        "<h3>To do it again</h3>",
        f"<pre>{escape(file.invocation)}</pre>",
    ]
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    known = [name for name in FACTS if name in machine]
    return _table(("", ""), [(name.replace("_", " "), _shown(machine[name])) for name in known])


def _facets(file: File) -> dict[str, list[Record]]:
    """What shares plots: in a sweep on a GPU each dtype and unit has its own."""
    found: dict[str, list[Record]] = {}
    for record in file.records:
        name = f"{record.dtype}, {record.unit}" if file.command == "gpu" else ""
        found.setdefault(name, []).append(record)
    return found


def _plots(file: File, records: list[Record], name: str, suffix: str) -> list[str]:
    peak = file.machine.get("multiply_add_flops")
    copied = file.machine.get("copy_bytes_per_s")
    drawn: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("Ratio to the peer", "Dots are medians, bars the quartiles over the rounds.",
         lambda: plots.ratios(records)),
        ("Time", "", lambda: plots.times(records)),
        ("Operations a second", "Those of matrix products, by our time for the whole call.",
         lambda: plots.rates(records, peak)),
        ("Share of the machine's limit", ROOFLINE, lambda: plots.roofline(records, peak, copied)),
        ("Peak memory of one call", "Beyond what is held before the call.",
         lambda: plots.memory(records)),
    ]  # fmt: skip
    parts = []
    for title, caption, draw in drawn:
        figure = draw()
        if figure is not None:
            svg = plots.svg(figure, f"{name} {title}", f"{title}{suffix}")
            parts.append(
                f"<h3>{escape(title + suffix)}</h3>\n<figure><figcaption>{escape(caption)}"
                f"</figcaption>{svg}</figure>"
            )
    return parts


def _means(records: Sequence[Record]) -> str:
    """Geometric means of the ratios, a line for each cell and peer."""
    modes = _in_order(record.mode for record in records)
    ratios: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for record in records:
        if record.ratio and not record.failure:
            line = ratios.setdefault((record.cell, record.dtype, record.peer), {})
            line.setdefault(record.mode, []).append(record.ratio)
    rows = [
        (*key, *(f"{statistics.geometric_mean(of[m]):.2f}" if m in of else "" for m in modes))
        for key, of in ratios.items()
    ]
    heads = ("cell", "dtype", "against", *(f"{mode}, mean ratio" for mode in modes))
    return f'<div class="wide">{_table(heads, rows, numbers=3)}</div>'


def _figures(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        us, peer_us, ratio = _number(r.us), _number(r.peer_us), _number(r.ratio)
        quartiles = f"{r.quartiles[0]:.2f} to {r.quartiles[1]:.2f}" if r.quartiles else ""
        rate = _number(r.flops_per_s and r.flops_per_s / 1e9)
        peaks = " / ".join(f"{each / 2**20:.1f}" for each in r.peak_bytes or ())
        rows.append(
            (r.cell, r.case, r.mode, r.dtype, r.peer, r.unit, us, peer_us, ratio, quartiles, rate,
             peaks, "failed" if r.failure else "passed")
        )  # fmt: skip
    case = " or ".join(_in_order(r.sizes for r in records if r.sizes)) or "case"
    heads = (
        "cell", case, "mode", "dtype", "against", "unit", "ours", "peer", "ratio", "quartiles",
        "GFLOP/s", "MB ours / peer", "check",
    )  # fmt: skip
    filled = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return _table(
        [heads[i] for i in filled],
        [[row[i] for i in filled] for row in rows],
        numbers=6,
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 99) -> str:
    """Columns from ``numbers`` on are aligned to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i >= numbers else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    head = f"<tr>{line('th', heads)}</tr>" if any(heads) else ""
    lines = [f"<tr>{line('td', row)}</tr>" for row in rows]
    return f"<table>{head}{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
