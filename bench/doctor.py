"""``fused-rnn-bench doctor``: what is installed, what works here and what to do about the rest."""

from __future__ import annotations

import importlib.util
from typing import Any

from . import machine


def run() -> int:
    """Prints the report; plain text, so that it works without rich."""
    found = machine.facts()
    for name, value in _lines(found):
        print(f"{name:<18} {value}")
    advice = machine.advice(found)
    if importlib.util.find_spec("rich") is None:
        advice.append("rich: pip install fused_rnn[bench], for the benchmark's tables.")
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
    lines.append(("engines", ""))
    for name, built in found["engines"].items():
        lines.append((f"  {name}", "built" if built else "not built"))
    return lines
