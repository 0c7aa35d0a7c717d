"""``fused-rnn-bench``: measures this machine against torch.nn.

Exit status: 0; 1 if a result failed its check or, of compare, a row is slower by more than noise; 2
if it cannot be done: arguments, files or a model that are no use.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from . import doctor, gpu, machine
from .machine import UnusableError

MEASURING = {
    "quick": "the smaller shapes, about a minute on two cores (the default)",
    "cpu": "all eight shapes, several minutes",
    "options": "lengths, resets, bfloat16, threads and variants against the dense call",
    "attention": "additive attention against eager PyTorch and torch.compile of it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UnusableError as error:
        print(f"fused-rnn-bench {options.command}: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "doctor":
        return doctor.run()
    if options.command != "gpu" and importlib.util.find_spec("rich") is None:
        raise UnusableError("the tables need rich: pip install rich")
    if options.command == "gpu":
        _check_folder(options.json)
        return gpu.run(options, machine.device("cpu" if options.plan else options.device))
    from . import commands

    return {
        "model": commands.measure_model,
        "compare": commands.compare_files,
        "report": commands.report,
        "transforms": commands.transforms,
    }.get(options.command, commands.measure)(options)


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise UnusableError(f"--json {path}: no such folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fused-rnn-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, text in MEASURING.items():
        command = commands.add_parser(name, help=text, description=text)
        _measuring_options(command, of_layers=name in ("quick", "cpu"))
    text = "the sweep on a GPU: layers and attention over shapes, dtypes and modes"
    gpu.add_arguments(commands.add_parser("gpu", help=text, description=text))
    _model_options(commands)
    _compare_options(commands)
    _report_options(commands)
    text = "which of torch's transforms work: compile, export, vmap, higher derivatives and others"
    commands.add_parser("transforms", help=text, description=text)
    commands.add_parser("doctor", help="what is installed, what works here, what to do about it")
    _measuring_options(parser, of_layers=True)
    parser.set_defaults(command="quick")
    return parser


def _measuring_options(parser: argparse.ArgumentParser, of_layers: bool) -> None:
    # Suppressed defaults: a subparser's own would overwrite what stood before the command.
    unset = argparse.SUPPRESS
    _output_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=unset, help="default: cpu")
    if of_layers:
        parser.add_argument(
            "--peers", metavar="NAMES", default=unset,
            help="beside torch.nn, separated by commas: torch.compile (of the plain loop; takes "
            "minutes), torchrl, haste; or all that are installed",
        )  # fmt: skip


def _output_options(parser: argparse.ArgumentParser) -> None:
    unset = argparse.SUPPRESS
    parser.add_argument("--json", type=Path, metavar="PATH", default=unset, help="write results")
    parser.add_argument("--html", type=Path, metavar="PATH", default=unset, help="write a page")
    parser.add_argument("--png", type=Path, metavar="PATH", default=unset, help="write the plot")
    _threads_option(parser)


def _threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_count, metavar="N", default=argparse.SUPPRESS, help="CPU threads"
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return count


def _model_options(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "your own model before and after fused_rnn.convert, layer by layer"
    parser = commands.add_parser("model", help=text, description=text)
    parser.add_argument(
        "target", metavar="PATH:FACTORY",
        help="a .py file or a module's dotted name, and in it a function without arguments that "
        "returns (model, inputs): a tuple of arguments, a dictionary of keyword arguments or one "
        "tensor",
    )  # fmt: skip
    _output_options(parser)


def _compare_options(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "which rows of B are slower or faster than in A by more than noise"
    parser = commands.add_parser("compare", help=text, description=text)
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--all", action="store_true", help="show the rows that are the same, too")
    parser.add_argument(
        "--least", type=float, default=5.0, metavar="PERCENT",
        help="changes of the ratio up to this are noise (default: 5)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the verdicts")


def _report_options(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "one self-contained HTML page of result files, with plots; without files, of a quick run"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("files", type=Path, nargs="*", metavar="RESULT.json")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="PATH",
        help="default: report.html",
    )  # fmt: skip
    parser.add_argument("--png", type=Path, metavar="PATH", help="write the first file's plot, too")
    _threads_option(parser)


if __name__ == "__main__":
    raise SystemExit(main())
