"""``fused-rnn-bench``: measures this machine against torch.nn."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from . import attention, doctor, gpu, layers, machine, shapes
from . import options as own_options

# What each measuring command runs: its shapes, and the seconds of timing spent on each row.
COMMANDS = {
    "quick": (shapes.QUICK, 0.8),
    "cpu": (shapes.CPU, 3.0),
}


ATTENTION_S = 2.0  # of timing on each row of the attention command
OPTION_S = 0.8
TRANSFORM_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 1 if a result failed its check."""
    options = _parser().parse_args(arguments)
    if options.command == "doctor":
        return doctor.run()
    if options.command == "gpu":
        _check_json(options.json)
        return gpu.run(options, torch.device("cpu") if options.plan else _device(options.device))
    if importlib.util.find_spec("rich") is None:
        raise SystemExit("The benchmark needs rich: pip install fused_rnn[bench]")
    if options.command == "transforms":
        return _transforms()
    return _measure(options)


def _transforms() -> int:
    import fused_rnn

    from . import report, transforms

    console = report.console()
    libraries = {"torch.nn": torch.nn, "fused_rnn": fused_rnn}
    rows = []
    with report.progress(console) as progress:
        total = len(transforms.CHECKS) * len(transforms.CELLS) * len(libraries)
        task = progress.add_task("", total=total)
        for row in transforms.table(libraries, lambda s: progress.update(task, description=s)):
            rows.append(row)
            progress.advance(task)
    console.print(report.transforms_table(rows))
    with report.progress(console) as progress:
        task = progress.add_task("", total=4 * len(transforms.CELLS))
        costs = []
        for cost in transforms.costs(
            libraries, TRANSFORM_S, lambda s: progress.update(task, description=s)
        ):
            costs.append(cost)
            progress.advance(task)
    console.print(report.costs_table(costs))
    failed = [row for row in rows if row[1] == "fused_rnn" and row[3] is not None]
    for check, _, cell, error in failed:
        console.print(f"FAILED {cell}, {check}: {error}", style="red", soft_wrap=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fused-rnn-bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, text in (
        ("quick", "the smaller shapes, about a minute on two cores (the default)"),
        ("cpu", "all eight shapes, several minutes"),
        ("options", "lengths, resets, packed input, bfloat16 and threads against the dense call"),
        ("attention", "additive attention against eager PyTorch and torch.compile of it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _measuring_options(command)
    text = "the sweep on a GPU: layers and attention over shapes, dtypes and modes"
    gpu.add_arguments(commands.add_parser("gpu", help=text, description=text))
    text = "which of torch's transforms work: compile, export, vmap, higher derivatives and others"
    commands.add_parser("transforms", help=text, description=text)
    commands.add_parser("doctor", help="what is installed, what works here, what to do about it")
    _measuring_options(parser)
    parser.set_defaults(command="quick")
    return parser


def _measuring_options(parser: argparse.ArgumentParser) -> None:
    # Suppressed defaults: a subparser's own would overwrite what stood before the command.
    unset = argparse.SUPPRESS
    parser.add_argument("--json", type=Path, metavar="PATH", default=unset, help="write results")
    parser.add_argument("--threads", type=int, metavar="N", default=unset, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=unset, help="default: cpu")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device; see fused-rnn-bench doctor")
    if name == "cuda" and not machine.has_cuda_engine():
        raise SystemExit("--device cuda: built without CUDA; see fused-rnn-bench doctor")
    return torch.device(name)


def _check_json(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise SystemExit(f"--json {path}: no such folder")


def _measure(options: argparse.Namespace) -> int:
    from . import report

    json_path: Path | None = getattr(options, "json", None)
    _check_json(json_path)
    device = _device(getattr(options, "device", "cpu"))
    if hasattr(options, "threads"):
        if options.threads < 1:
            raise SystemExit(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    facts = machine.facts()

    console = report.console()
    console.print(report.headline(facts, str(device)))
    rows: list[layers.Row] = []
    with report.progress(console) as progress:
        task = progress.add_task("", total=None)

        def announce(what: str) -> None:
            progress.update(task, description=what)

        if options.command == "attention":
            what, peer = "against", "peer"
            measured = attention.measure(attention.SHAPES, device, ATTENTION_S, announce)
            total = len(attention.SHAPES) * len(shapes.MODES) * len(attention.peers())
        elif options.command == "options":
            what, peer = "option", "dense"
            measured = own_options.measure(shapes.CELLS, OPTION_S, announce)
            total = len(own_options.OPTIONS) * len(own_options.SHAPES)
            total *= len(shapes.MODES) * len(shapes.CELLS)
        else:
            what, peer = "cell", "torch.nn"
            selected, budget_s = COMMANDS[options.command]
            measured = layers.measure(shapes.CELLS, selected, device, budget_s, announce)
            total = len(selected) * len(shapes.MODES) * len(shapes.CELLS)
        progress.update(task, total=total)
        for row in measured:
            rows.append(row)
            progress.advance(task)
    # Products run at the arithmetic's speed on the CPU; nobody counted what the GPU's could do.
    peak = machine.multiply_add_flops() if what == "cell" and device.type == "cpu" else None
    console.print(report.table(rows, what, peer, peak))
    memory = report.memory_table(rows)
    if memory is not None:
        console.print(memory)
    console.print(report.LEGEND)
    if peak is not None:
        facts["multiply_add_flops"] = peak
        console.print(report.peak_legend(peak))
    failures = report.failures(rows)
    for line in failures:
        console.print(line, style="red", soft_wrap=True)
    if json_path is not None:
        report.write_json(json_path, options.command, facts, rows)
        console.print(f"written: {json_path}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
