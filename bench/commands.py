"""What the commands do that show tables: measure, write files, compare and report."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_rnn

from . import (
    against,
    attention,
    compare,
    loading,
    machine,
    model,
    records,
    results,
    rivals,
    shapes,
    tables,
)
from . import options as own_options
from .layers import Row
from .records import UnusableError

# What quick and cpu run: their shapes, and the seconds of timing spent on each row.
LAYERS = {
    "quick": (shapes.QUICK, 0.8),
    "cpu": (shapes.CPU, 3.0),
}
ATTENTION_S = 2.0
OPTION_S = 0.8
TRANSFORM_S = 2.0
MODEL_S = 2.0

ALL = "all"  # of the peers that are installed


def check_files(options: argparse.Namespace) -> None:
    """Before anything is measured: that what is asked for can be written."""
    for name in ("json", "html", "png", "output"):
        path: Path | None = getattr(options, name, None)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UnusableError(f"--{name} {path}: no such folder")
        if name != "json" and importlib.util.find_spec("matplotlib") is None:
            raise UnusableError(f"--{name} needs matplotlib: pip install matplotlib")


def invocation(options: argparse.Namespace) -> str:
    """The command that does the same measurement again."""
    words = ["fused-rnn-bench", options.command]
    words += [options.target] if options.command == "model" else []
    for name in ("threads", "device", "peers"):
        value = getattr(options, name, None)
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def peers(names: str, place: torch.device) -> list[rivals.Library]:
    """Libraries by name, separated by commas; "all" are those that are installed."""
    found = []
    wanted = [name for name in names.split(",") if name != "torch.nn"]
    for name in rivals.PEERS if wanted == [ALL] else wanted:
        if name not in rivals.PEERS:
            known = ", ".join((ALL, "torch.nn", *rivals.PEERS))
            raise UnusableError(f"--peers {name}: expected some of {known}")
        library = rivals.PEERS[name]
        usable = place.type in library.devices and rivals.installed(library.module)
        if not usable and wanted != [ALL]:
            why = "is not installed" if place.type in library.devices else "needs CUDA"
            raise UnusableError(f"--peers {name}: {library.module} {why}")
        found += [library] if usable else []
    return found


def measure(options: argparse.Namespace) -> int:
    """quick, cpu, options and attention."""
    check_files(options)
    _, status = _measured(options, tables.console())
    return status


def _measured(options: argparse.Namespace, console: Console) -> tuple[records.File, int]:
    notes: list[str] = []
    with_threads(options)
    place = machine.device(getattr(options, "device", "cpu"))
    facts = machine.facts()
    console.print(tables.headline(facts, str(place)))
    with tables.progress(console) as progress:
        task = progress.add_task("", total=None)
        rows: list[Row] = []

        def announce(what: str) -> None:
            progress.update(task, description=what)

        total, measured = _plan(options, place, announce, notes.append)
        progress.update(task, total=total)
        for some in measured:
            rows += some
            progress.advance(task)
    of_layers = options.command in LAYERS
    if of_layers and place.type == "cpu":
        # Products run at the arithmetic's speed on the CPU; nobody counted what the GPU's could do.
        facts["multiply_add_flops"] = machine.multiply_add_flops()
        facts["copy_bytes_per_s"] = machine.copy_bytes_per_s()
    peak = facts.get("multiply_add_flops")
    if of_layers:
        for peer in dict.fromkeys(row.peer for row in rows):
            its = [row for row in rows if row.peer == peer]
            # The peer's times have a place in the tables of the others, without the share.
            its_peak = peak if peer == "torch.nn" else None
            console.print(tables.table(its, "cell", peer, its_peak))
    else:
        what, peer = {"attention": ("against", "peer"), "options": ("option", "dense")}[
            options.command
        ]
        console.print(tables.table(rows, what, peer))
    memory = tables.memory_table(rows)
    if memory is not None:
        console.print(memory)
    console.print(tables.LEGEND)
    if peak is not None:
        console.print(tables.peak_legend(peak))
    for line in notes:
        console.print(line, style="yellow", soft_wrap=True)
    written = records.document(options.command, invocation(options), facts, rows, notes)
    return written_file(options, console, written), failures(console, rows)


def _plan(
    options: argparse.Namespace,
    place: torch.device,
    announce: Callable[[str], None],
    note: Callable[[str], None],
) -> tuple[int, Iterator[list[Row]]]:
    """How many steps a command has, and the rows of each."""
    pairs = len(shapes.MODES) * len(shapes.CELLS)
    if options.command == "attention":
        found = attention.measure(attention.SHAPES, place, ATTENTION_S, announce)
        total = len(attention.SHAPES) * len(shapes.MODES) * len(attention.peers())
        return total, ([row] for row in found)
    if options.command == "options":
        found = own_options.measure(shapes.CELLS, OPTION_S, announce)
        total = len(own_options.OPTIONS) * len(own_options.SHAPES) * pairs
        total += 2 * len(shapes.MODES) * sum(len(c) for _, c in own_options.VARIANTS.values())
        return total, ([row] for row in found)
    selected, budget_s = LAYERS[options.command]
    others = peers(getattr(options, "peers", None) or "torch.nn", place)
    return len(selected) * pairs, against.measure(
        shapes.CELLS, selected, place, budget_s, announce, others, note
    )


def with_threads(options: argparse.Namespace) -> None:
    threads = getattr(options, "threads", None)
    if threads is not None:
        torch.set_num_threads(threads)


def failures(console: Console, rows: Sequence[Row]) -> int:
    lines = tables.failures(rows)
    for line in lines:
        console.print(line, style="red", soft_wrap=True)
    return 1 if lines else 0


def written_file(
    options: argparse.Namespace, console: Console, written: dict[str, Any]
) -> records.File:
    """Writes the files that are asked for."""
    file = records.parse(written, "this run")
    for name in ("json", "html", "png"):
        path: Path | None = getattr(options, name, None)
        if path is None:
            continue
        if name == "json":
            results.write_json(path, written)
        else:
            from . import page  # which needs matplotlib

            if name == "html":
                page.write(path, [file])
            else:
                page.write_png(path, file)
        console.print(f"written: {path}", soft_wrap=True)
    return file


def measure_model(options: argparse.Namespace) -> int:
    check_files(options)
    with_threads(options)
    console = tables.console()
    its_model, call = loading.load(options.target)
    facts = machine.facts()
    console.print(tables.headline(facts, options.target), soft_wrap=True)
    rows: list[Row] = []
    notes: list[str] = []
    with tables.progress(console) as progress:
        task = progress.add_task("", total=None)

        def announce(what: str) -> None:
            progress.update(task, description=what)

        for row in model.measure(its_model, call, MODEL_S, announce, notes.append):
            rows.append(row)
            progress.advance(task)
    console.print(tables.model_table(rows))
    console.print(tables.MODEL_LEGEND)
    shares = tables.model_shares(rows)
    for line in shares:
        console.print(line)
    for line in notes:
        console.print(line, style="yellow", soft_wrap=True)
    written = records.document(
        "model", invocation(options), facts, rows, [*shares, *notes]
    )  # fmt: skip
    written_file(options, console, written)
    return failures(console, rows)


def compare_files(options: argparse.Namespace) -> int:
    check_files(options)
    before, after = (records.read(path) for path in (options.a, options.b))
    console = tables.console()
    found = compare.compare(before, after, options.least / 100)
    for line in compare.differences(before, after):
        console.print(line, style="yellow", soft_wrap=True)
    shown = found if options.all else [each for each in found if each.verdict != compare.SAME]
    if shown:
        console.print(tables.compared_table(shown))
        console.print(tables.COMPARED_LEGEND)
    counts = {each.verdict: 0 for each in found}
    for each in found:
        counts[each.verdict] += 1
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if options.json is not None:
        rows = [
            {
                **dict(zip(records.KEY, each.record.key, strict=True)),
                "ratio": [r and r.ratio for r in (each.before, each.after)],
                "change": each.change,
                "noise": each.noise,
                "time_change": each.time_change,
                "verdict": each.verdict,
            }
            for each in found
        ]
        differences = compare.differences(before, after)
        results.write_json(options.json, {"differences": differences, "compared": rows})
        console.print(f"written: {options.json}", soft_wrap=True)
    return 1 if compare.failed(found) else 0


def report(options: argparse.Namespace) -> int:
    """Returns 1 if the files, or what was measured without any, hold a failure."""
    check_files(options)
    from . import page

    console = tables.console()
    if options.files:
        files = [records.read(path) for path in options.files]
    else:
        options.command = "quick"
        files = [_measured(options, console)[0]]
    page.write(options.output, files)
    console.print(f"written: {options.output}", soft_wrap=True)
    if options.files and options.png is not None:
        page.write_png(options.png, files[0])
        console.print(f"written: {options.png}", soft_wrap=True)
    return 1 if any(record.failure for file in files for record in file.records) else 0


def transforms(options: argparse.Namespace) -> int:
    from . import transforms as checks

    console = tables.console()
    libraries = {"torch.nn": torch.nn, "fused_rnn": fused_rnn}
    rows = []
    with tables.progress(console) as progress:
        total = len(checks.CHECKS) * len(checks.CELLS) * len(libraries)
        task = progress.add_task("", total=total)
        for row in checks.table(libraries, lambda s: progress.update(task, description=s)):
            rows.append(row)
            progress.advance(task)
    console.print(tables.transforms_table(rows))
    with tables.progress(console) as progress:
        task = progress.add_task("", total=4 * len(checks.CELLS))
        costs = []
        for cost in checks.costs(
            libraries, TRANSFORM_S, lambda s: progress.update(task, description=s)
        ):
            costs.append(cost)
            progress.advance(task)
    console.print(tables.costs_table(costs))
    failed = [row for row in rows if row[1] == "fused_rnn" and row[3] is not None]
    for check, _, cell, error in failed:
        console.print(f"FAILED {cell}, {check}: {error}", style="red", soft_wrap=True)
    return 1 if failed else 0
