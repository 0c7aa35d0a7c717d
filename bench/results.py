"""The files of a run on a GPU and how they read; ``bench/gpu_check.sh`` calls this as a script.

Standard library only, so that it works where nothing else does:

    results.py facts OUT REPOSITORY              writes machine.json
    results.py stage OUT NAME RC SECONDS [WHY]   adds to stages.json; WHY a stage was not run
    results.py unfinished OUT                    whether a row of sweep.json ended its process
    results.py summary OUT                       writes and prints summary.txt; 1 if a stage failed

A result is written in full beside its file and then put in its place: whoever is stopped in between
leaves the file as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MACHINE, STAGES, SWEEP, SUMMARY = "machine.json", "stages.json", "sweep.json", "summary.txt"

NEEDED = ("build", "import", "tests", "sweep")  # stages without which a run has not passed
LEGEND = (
    "x: torch.nn's time over ours, for attention torch.compile's; above 1 ours is faster.",
    "After graph: both replayed as CUDA graphs. Floors: our time over what arithmetic allows.",
    "Plan: predicted by the cost model, for the recurrence alone; forced: not the plan's choice.",
)
SHOWN = 40  # rows of the sweep that are printed; summary.txt holds all


def write_json(path: Path, document: Any) -> None:
    _replace(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """What the file holds; ``default`` where there is none, or none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(repository: Path) -> dict[str, Any]:
    """What is measured and on what; null for what cannot be found out."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        **_commit(repository),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "nvcc": _last_line("nvcc", "--version"),
        "compute_sanitizer": _last_line("compute-sanitizer", "--version"),
        "gpu": _gpu(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(
                ("CUBLAS_", "CUDA_", "FUSED_RNN_", "NVCC_", "NVIDIA_TF32", "PYTORCH_")
            )
            or name in ("MAX_JOBS", "OMP_NUM_THREADS", "TORCH_CUDA_ARCH_LIST")
        },
    }


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _last_line(*command: str) -> str | None:
    lines = (_output(*command) or "").splitlines()
    return lines[-1] if lines else None


def _commit(repository: Path) -> dict[str, Any]:
    """From git or, in a copy without it, from FUSED_RNN_COMMIT."""
    git = ("git", "-c", "safe.directory=*", "-C", str(repository))
    top = _output(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != repository.resolve():
        return {"commit": os.environ.get("FUSED_RNN_COMMIT", "unknown"), "dirty": None}
    changes = _output(*git, "status", "--porcelain")
    return {
        "commit": _output(*git, "rev-parse", "HEAD") or "unknown",
        "dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, Any]:
    """Of torch, its libraries and triton; to import them may take long."""
    from importlib import metadata

    found: dict[str, Any] = dict.fromkeys(("torch", "torch_cuda", "cudnn", "triton"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    try:
        import torch

        found["torch"] = torch.__version__
        found["torch_cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    except Exception as failure:  # of whatever kind: the rest of the facts are still wanted
        found["torch"] = found["torch"] or f"not imported: {failure}"
    return found


def _gpu() -> dict[str, str] | None:
    fields = (
        "name",
        "driver_version",
        "memory.total",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "clocks.max.mem",
        "power.limit",
        "temperature.gpu",
    )
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    lines = (_output(*command) or "").splitlines()
    if not lines:
        return None
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=False))


def add_stage(out: Path, name: str, rc: int | None, seconds: float, why: str = "") -> None:
    """``rc`` is the exit status, 124 where the time ran out, None where the stage was not run."""
    stages = read_json(out / STAGES, [])
    stages.append({"name": name, "rc": rc, "seconds": seconds, "not_run": why or None})
    write_json(out / STAGES, stages)


def passed(stage: dict[str, Any]) -> bool:
    """A stage that was not run stands in the way of a pass only where it is needed."""
    if stage["rc"] is None:
        return stage["name"] not in NEEDED or stage["not_run"].startswith("dry run")
    return bool(stage["rc"] == 0)


def stage_line(stage: dict[str, Any]) -> str:
    if stage["rc"] is None:
        told = f"not run: {stage['not_run']}"
    else:
        told = {0: "passed", 124: "FAILED: out of time"}.get(stage["rc"], f"FAILED ({stage['rc']})")
    return f"{stage['name']:<17} {stage['seconds']:>5.0f} s  {told}"


def row_line(row: dict[str, Any]) -> str:
    """One row of the sweep in one line: what, ours, the peers, the ratios."""
    sizes = " ".join(
        f"{size}{row[size]}" for size in ("T", "B", "I", "H", "Tq", "Tk", "A") if size in row
    )
    kind = "".join(
        (
            f" {row['layers']}-layer" if row.get("layers", 1) > 1 else "",
            " bidirectional" if row.get("bidirectional") else "",
            " ragged" if row.get("ragged") else "",
            " forced" if row.get("forced") else "",
        )
    )
    what = f"{row['cell']:<9} {row['mode']:<8} {row['dtype']:<4} {sizes}{kind}"
    if row["us"] is None:
        problem = row["problem"] or f"wrong result: {row['check']}"
        return f"{what}  FAILED {problem}"
    line = f"{what}  {row['engine']} {_us(row['us'])} {row['unit']}"
    if row.get("predicted_us") is not None:
        line += f" (plan {_us(row['predicted_us'])})"
    if row.get("parts", 1) > 1:
        line += f" in {row['parts']} parts"
    line += "".join(f", {name} {_us(time)}" for name, time in row["peers"].items())
    if row["graph_us"] is not None:
        line += f", graph {_us(row['graph_us'])}"
    if row["graph_ratio"] is not None:
        line += f" x{row['graph_ratio']:.2f}"
    if row["floor_ratio"] is not None:
        line += f", {row['floor_ratio']:.1f} floors"
    wrong = "" if row["passed"] else "  FAILED, see its notes"
    return f"{line}  x{row['ratio']:.2f}{wrong}"


def _us(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def worst_last(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By falling ratio to the peer; after those the rows that failed."""
    return sorted(rows, key=lambda row: (not row["passed"], -(row["ratio"] or 0.0)))


def means(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The geometric mean of the ratios of each cell, mode and dtype, and the least of them.

    Rows on an engine that was forced count for themselves.
    """
    ratios: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        if row["ratio"]:
            key = (row["cell"], row["mode"], row["dtype"], row.get("forced") or "")
            ratios.setdefault(key, []).append(row["ratio"])
    return [
        f"{' '.join(key).rstrip():<23} mean x{_geometric_mean(each):.2f}, "
        f"least x{min(each):.2f}, {len(each)} rows"
        for key, each in sorted(ratios.items())
    ]


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(out: Path, shown: int | None = None) -> list[str]:
    """Stages, means, and the ``shown`` worst rows of the sweep (all by default), worst last."""
    machine = read_json(out / MACHINE, {})
    stages = read_json(out / STAGES, [])
    sweep = read_json(out / SWEEP, {})
    rows = worst_last(sweep.get("rows", []))
    gpu = (machine.get("gpu") or {}).get("name", "no GPU")
    changed = ", with changes" if machine.get("dirty") else ""
    lines = [
        f"commit {machine.get('commit', 'unknown')}{changed}",
        f"{gpu}, torch {machine.get('torch')}, CUDA {machine.get('torch_cuda')}",
        "",
        *map(stage_line, stages),
    ]
    if sweep:
        left_out = len(sweep.get("left_out", []))
        why = "cannot take them, or is avoided"
        beside = f", {left_out} left out: their engine {why}" if left_out else ""
        avoided = sweep.get("avoided", {})
        lines += ["", f"sweep: {len(rows)} of {sweep['planned']} rows{beside}"]
        if sweep["running"] is not None:
            lines.append(f"stopped at: {sweep['running']}")
        lines += [f"{engine} avoided after it lost {key}" for engine, key in avoided.items()]
        lines += ["", *means(rows)]
    if rows:
        lines += ["", *LEGEND]
        lines += map(row_line, rows if shown is None else rows[-shown:])
    failed = [stage["name"] for stage in stages if not passed(stage)]
    missing = [name for name in NEEDED if name not in {stage["name"] for stage in stages}]
    verdict = "all passed"
    if failed or missing:
        verdict = "; ".join(
            f"{what}: {', '.join(names)}"
            for what, names in (("FAILED", failed), ("never reached", missing))
            if names
        )
    return [*lines, "", verdict]


def main(arguments: Sequence[str]) -> int:
    command, out, *rest = arguments[0], Path(arguments[1]), *arguments[2:]
    if command == "facts":
        known = facts(Path(rest[0]))
        write_json(out / MACHINE, known)
        write_json(out / MACHINE, known | versions())
    elif command == "stage":
        name, rc, seconds, *why = rest
        add_stage(out, name, int(rc) if rc else None, float(seconds), *why)
    elif command == "unfinished":
        sweep = read_json(out / SWEEP, {})
        return 0 if sweep.get("running") or sweep.get("fault") else 1
    elif command == "summary":
        _replace(out / SUMMARY, "\n".join(summary(out)) + "\n")
        lines = summary(out, SHOWN)
        print("\n".join(lines))
        return 0 if lines[-1] == "all passed" else 1
    else:
        raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: nothing that torch imports is meant to be found here
    raise SystemExit(main(sys.argv[1:]))
