"""What this machine and this installation are."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn import _C


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
        "engines": engines(),
    }


def engines() -> dict[str, bool]:
    """Every engine of the library and whether this build has it."""
    return {"cpu": True, "per_step": has_cuda_engine()}


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
