"""What this machine and this installation are."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn import _C
from fused_rnn.stack import Recurrence

from .shapes import Shape

CUDA_ENGINES = ("per_step", "persistent_cluster", "persistent_grid")
VARIABLE = "FUSED_RNN_CUDA_ENGINE"


class UnusableError(Exception):
    """What was asked for cannot be done, and the user can be told why in a few lines."""


def device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UnusableError("--device cuda: torch sees no CUDA device; see fused-rnn-bench doctor")
    if name == "cuda" and not has_cuda_engine():
        raise UnusableError("--device cuda: built without CUDA; see fused-rnn-bench doctor")
    return torch.device(name)


def facts() -> dict[str, Any]:
    """Versions, instruction sets, devices and engines, as they go into the JSON files."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "fused_rnn": fused_rnn.__version__,
        "build": dict(_C.build_info()),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": dict(_C.instruction_sets()),
        "active_instruction_set": _active_instruction_set(),
        "cuda_devices": _cuda_devices(),
        "cuda_plans": cuda_plans(),
        "engines": engines(),
    }


def engines() -> dict[str, bool]:
    """Every engine of the library and whether this build has it."""
    return {"cpu": True} | dict.fromkeys(CUDA_ENGINES, has_cuda_engine())


# An LSTM in bfloat16 with rows for several teams, which tells how many of them there are.
PROBE = Shape(256, 256, 512, 512)
LARGEST = 4096  # hidden units that are tried


def cuda_plans(chips: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What the plan of the engines knows of each GPU: its sizes, and what follows from them.

    ``chips`` names those that it knows without having them, in place of the GPUs at hand.
    """
    if chips is not None:
        known = _C.cuda_chips()
        return [{"name": name, **known[name], **_planned(name)} for name in chips]
    if not has_cuda_engine():
        return []
    found = []
    for i, name in enumerate(_cuda_devices()):
        properties = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            found.append(
                {
                    "name": name,
                    "capability": properties.major * 10 + properties.minor,
                    "multiprocessors": properties.multi_processor_count,
                    "shared_bytes": getattr(properties, "shared_memory_per_block_optin", None),
                    **_planned(None),
                }
            )
    return found


def _planned(chip: str | None) -> dict[str, Any]:
    """Which engine PROBE takes, and up to which H an LSTM with 16 rows fits each of them."""

    def candidates(backward: bool, B: int, H: int) -> dict[str, dict[str, Any]]:
        of = Recurrence("lstm", "bfloat16", PROBE.T, B, 1, H)
        plan = _C.cuda_plan(of, tf32=False, backward=backward, chip=chip)
        return {each["engine"]: each for each in plan}

    probe, largest = {}, {}
    with forced(""):
        for phase, backward in (("forward", False), ("backward", True)):
            probe[phase] = {
                name: {key: each[key] for key in ("possible", "microseconds_per_step", "reason")}
                for name, each in candidates(backward, PROBE.B, PROBE.H).items()
            }
            able = dict.fromkeys(CUDA_ENGINES[1:], 0)
            for H in range(64, LARGEST + 1, 64):
                plan = candidates(backward, 16, H)
                able |= {name: H for name in able if plan[name]["possible"]}
            largest[phase] = able
    return {"probe": probe, "largest_hidden": largest}


@contextmanager
def forced(engine: str) -> Iterator[None]:
    """Within, CUDA calls take that engine; for an empty name, the one that the plan chooses."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = engine
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def multiply_add_flops() -> float:
    """Floating-point operations a second, float32, of as many threads as torch uses: no product can
    do more on this machine. The best of several runs."""
    threads = torch.get_num_threads()
    rounds = 2_000_000  # some 20 ms
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(20):
            start = time.perf_counter()
            done = sum(pool.map(_C.multiply_adds, [rounds] * threads))
            best = max(best, done / (time.perf_counter() - start))
    return best


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a copy that no cache holds. The best of several."""
    source = torch.ones(64 << 20)  # 256 MB
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):  # the first one has to be given the memory
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def has_cuda_engine() -> bool:
    return _C.build_info()["cuda"] is not None


def advice(found: dict[str, Any]) -> list[str]:
    """For everything that ``facts`` shows to be missing, one line of what to do."""
    lines = []
    forced = os.environ.get("FUSED_RNN_CPU_ISA")
    if found["active_instruction_set"] is None:
        names = ", ".join(name for name, works in found["instruction_sets"].items() if works)
        lines.append(f"FUSED_RNN_CPU_ISA={forced} cannot be used here: unset it, or take {names}.")
    elif forced:
        lines.append(f"FUSED_RNN_CPU_ISA={forced} is set: unset it for the best instruction set.")
    if not found["engines"]["per_step"]:
        if found["torch_cuda"] is None:
            lines.append(
                "per_step (CUDA): this torch has no CUDA. With an NVIDIA GPU, install a CUDA "
                "build of torch, then fused_rnn again."
            )
        else:
            lines.append(
                f"per_step (CUDA): built without nvcc. Install the CUDA {found['torch_cuda']} "
                "toolkit, set CUDA_HOME, then install fused_rnn again."
            )
    elif not found["cuda_devices"]:
        lines.append(
            "CUDA device: torch sees none. Look at nvidia-smi and at CUDA_VISIBLE_DEVICES."
        )
    if engine := os.environ.get(VARIABLE):
        lines.append(f"{VARIABLE}={engine} is set: unset it for the plan's choice.")
    return lines


def _active_instruction_set() -> str | None:
    try:
        return str(_C.active_instruction_set())
    except RuntimeError:  # FUSED_RNN_CPU_ISA names one that is not there
        return None


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
