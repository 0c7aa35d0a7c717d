"""``fused-rnn-bench doctor``: what is installed, what works here and what to do about the rest."""

from __future__ import annotations

import importlib.util
from typing import Any

from . import machine

PHASES = ("forward", "backward")


def run() -> int:
    """Prints the report; plain text, so that it works without rich."""
    found = machine.facts()
    for name, value in _lines(found):
        print(f"{name:<18} {value}")
    advice = machine.advice(found)
    if importlib.util.find_spec("rich") is None:
        advice.append("rich: pip install rich, for the benchmark's tables.")
    print("\nto do" if advice else "\nnothing is missing")
    for line in advice:
        print(f"- {line}")
    return 1 if found["active_instruction_set"] is None else 0


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    build = found["build"]
    sets = [
        name + (" (active)" if name == found["active_instruction_set"] else "")
        for name, works in found["instruction_sets"].items()
        if works
    ]
    missing = [name for name, works in found["instruction_sets"].items() if not works]
    lines = [
        ("python", found["python"]),
        ("torch", f"{found['torch']}, CUDA {found['torch_cuda'] or 'none'}"),
        ("fused_rnn", found["fused_rnn"]),
        *((f"  {key.replace('_', ' ')}", str(value or "none")) for key, value in build.items()),
        ("platform", found["platform"]),
        ("processor", found["processor"]),
        ("cores, threads", f"{found['cores']}, {found['threads']}"),
        ("instruction sets", ", ".join(sets)),
    ]
    if missing:
        lines.append(("  not on this CPU", ", ".join(missing)))
    lines.append(("CUDA device", ", ".join(found["cuda_devices"]) or "none"))
    for plan in found["cuda_plans"]:
        lines += plan_lines(plan)
    lines.append(("engines", ""))
    for name, built in found["engines"].items():
        lines.append((f"  {name}", "built" if built else "not built"))
    return lines


def plan_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan of the CUDA engines knows of a GPU; times are predicted."""
    shared = "?" if plan["shared_bytes"] is None else plan["shared_bytes"] // 1024
    major, minor = divmod(plan["capability"], 10)
    sizes = f"compute capability {major}.{minor}, {plan['multiprocessors']} multiprocessors"
    lines = [(f"plan for {plan['name']}", f"{sizes}, {shared} KB of shared memory")]
    fits = {
        name: "/".join(str(plan["largest_hidden"][phase][name] or "none") for phase in PHASES)
        for name in machine.CUDA_ENGINES[1:]
    }
    lines.append(("  largest H", ", ".join(f"{name} {sizes}" for name, sizes in fits.items())))
    lines.append(("", "LSTM, bfloat16, B=16, forward/backward, in steps of 64"))
    probe = machine.PROBE
    of = f"LSTM, bfloat16, B={probe.B}, H={probe.H}, us/step predicted"
    lines.append(("  the plan", f"of {of}; the first engine is taken"))
    for phase in PHASES:
        for name, each in plan["probe"][phase].items():
            time = f"{each['microseconds_per_step']:.2f}: " if each["possible"] else "no: "
            lines.append((f"    {phase}", f"{name} {time}{each['reason']}"))
    return lines
