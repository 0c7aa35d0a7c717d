"""What the CUDA kernels take of a GPU, as ptxas reports it for every target.

python tests/kernel_resources.py            compile csrc/cuda and print a table
python tests/kernel_resources.py --update   and write kernel_resources.json, which
                                            tests/test_kernel_resources.py compares with
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = Path(__file__).with_suffix(".json")
TARGETS = {"sm_80": "compute_80", "sm_90": "compute_90", "sm_100": "compute_100"}
UPDATE = "If this is deliberate: python tests/kernel_resources.py --update"

# What types are called in kernel names; c is for coupled, p for peephole, rb for reset before, and
# + for Varied.
TYPES = {
    "MmaProduct<float>": "tf32",
    "MmaProduct<BFloat16>": "bf16",
    "MmaProduct<Half>": "fp16",
    "ExactProduct": "fp32",
    "ClusterStates": "cluster",
    "ClusterSums": "cluster",
    "GridStates": "grid",
    "GridSums": "grid",
    "double": "fp64",
    "float": "fp32",
    "BFloat16": "bf16",
    "Half": "fp16",
    "Dual<float>": "dual32",
    "Dual<double>": "dual64",
    "Rnn<TanhActivation>": "rnn_tanh",
    "Rnn<ReluActivation>": "rnn_relu",
    "LstmCell<false, false>": "lstm",
    "LstmCell<false, true>": "lstm_p",
    "LstmCell<true, false>": "lstm_c",
    "LstmCell<true, true>": "lstm_cp",
    "Gru": "gru",
    "GruResetBefore": "gru_rb",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    registers: int  # per thread
    shared: int = 0  # bytes per block, dynamic shared memory not included
    stack: int = 0  # bytes per thread
    spilled: int = 0  # bytes stored and loaded


# By target, then by "source file/name<template arguments>".
Resources = dict[str, dict[str, Kernel]]


def nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def release() -> str:
    listing = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\d+\.\d+)", listing.stdout)[1]


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def measure(sources: Iterable[Path]) -> Resources:
    """Compiles each for all targets."""
    found: Resources = {target: {} for target in TARGETS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kernels_by_target in pool.map(measure_one, sources):
            for target, kernels in kernels_by_target.items():
                found[target].update(kernels)
    return found


def measure_one(source: Path) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc(), "-std=c++17", "-O3", "-Icsrc", "-c", str(source),
            "-o", str(Path(folder, "kernels.o")), "-Xptxas", "-v",
            *(f"-gencode=arch={arch},code={target}" for target, arch in TARGETS.items()),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return parse(run.stderr, source.stem)


def parse(report: str, source: str) -> Resources:
    """What ``ptxas -v`` said of one source file."""
    found: Resources = {target: {} for target in TARGETS}
    head = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
    pieces = head.split(report)[1:]
    for symbol, target, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        # A function that is not inlined reports of its own, under the kernel that calls it.
        sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        frames = [tuple(map(int, sizes)) for sizes in re.findall(sizes, text)]
        shared = re.search(r"(\d+) bytes smem", text)
        found[target][f"{source}/{readable(symbol)}"] = Kernel(
            int(re.search(r"Used (\d+) registers", text)[1]),
            int(shared[1]) if shared else 0,
            sum(stack for stack, _, _ in frames),
            sum(stores + loads for _, stores, loads in frames),
        )
    return found


@functools.cache
def readable(symbol: str) -> str:
    """A kernel's mangled name as ``forward_kernel<lstm, bf16>``."""
    run = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", run.stdout.strip())
    name = name.replace(" >", ">")
    while name.endswith(")"):  # the parameters
        depth = 0
        for i in reversed(range(len(name))):
            depth += (name[i] == ")") - (name[i] == "(")
            if depth == 0:
                name = name[:i]
                break
    types = "|".join(map(re.escape, TYPES))
    name = re.sub(rf"(?<!\w)(?:{types})(?!\w)", lambda match: TYPES[match[0]], name)
    name = re.sub(r"Varied<(\w+)>", r"\1+", name)
    return re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name)  # enumerators


def spilling(found: Resources) -> list[str]:
    """Complaints about kernels that keep in memory what should be in registers."""
    return [
        f"{target} {name}: {kernel.spilled} bytes spilled, {kernel.stack} bytes of stack"
        for target, kernels in found.items()
        for name, kernel in kernels.items()
        if kernel.spilled or kernel.stack
    ]


def changed(found: Resources, baseline: Resources) -> list[str]:
    """Complaints about kernels that take more than they did, are new or gone."""
    complaints = []
    for target in {**baseline, **found}:
        before, after = baseline.get(target, {}), found.get(target, {})
        for name in sorted({**before, **after}):
            if name not in before:
                complaints.append(f"{target} {name}: new")
            elif name not in after:
                complaints.append(f"{target} {name}: gone")
            else:
                for what in ("registers", "shared"):
                    old, new = getattr(before[name], what), getattr(after[name], what)
                    if new > old:
                        complaints.append(f"{target} {name}: {what} {old} -> {new}")
    return complaints


def read_baseline() -> tuple[str, Resources]:
    """The release of nvcc that it is of, and what it says."""
    stored = json.loads(BASELINE.read_text())
    kernels = {
        target: {name: Kernel(*numbers) for name, numbers in kernels.items()}
        for target, kernels in stored["kernels"].items()
    }
    return stored["nvcc"], kernels


def baseline_text(release: str, found: Resources) -> str:
    """A line per kernel, so that changes read well."""
    targets = []
    for target, kernels in found.items():
        lines = [
            f"   {json.dumps(name)}: [{kernel.registers}, {kernel.shared}]"
            for name, kernel in sorted(kernels.items())
        ]
        targets.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
    kernels = ",\n".join(targets)
    return f'{{\n "nvcc": {json.dumps(release)},\n "kernels": {{\n{kernels}\n }}\n}}\n'


def table(found: Resources) -> str:
    """80 columns: registers per thread, and static shared memory where there is some."""

    def cell(kernel: Kernel | None) -> str:
        if kernel is None:
            return "-"
        shared = f" +{kernel.shared}" if kernel.shared else ""
        return f"{kernel.registers}{shared}{' !' if kernel.spilled or kernel.stack else ''}"

    lines = ["registers +bytes of static shared memory; ! spills or has a stack"]
    source = None
    for key in sorted({name for kernels in found.values() for name in kernels}):
        if source != (source := key.split("/")[0]):
            lines.append(f"{source:46}" + "".join(f"{target:>11}" for target in found))
        name = key.split("/")[1]
        cells = (cell(kernels.get(key)) for kernels in found.values())
        lines.append(f"  {name:44}" + "".join(f"{text:>11}" for text in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {BASELINE.name}")
    update = parser.parse_args().update
    if nvcc() is None:
        parser.error("there is no nvcc; set NVCC")
    found = measure(cuda_sources())
    print(table(found))
    if update:
        BASELINE.write_text(baseline_text(release(), found))
    complaints = spilling(found)
    if complaints:
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    main()
