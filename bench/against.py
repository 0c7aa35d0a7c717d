"""Layers against torch.nn's and those of other libraries: the rows of ``quick`` and ``cpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from . import layers, rivals, timing
from .layers import Row
from .shapes import MODES, Shape


def measure(
    cells: Sequence[str],
    shapes: Sequence[Shape],
    device: torch.device,
    budget_s: float,
    announce: Callable[[str], None],
    libraries: Sequence[rivals.Library] = (),
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """Checks and times every cell, shape and mode, in float32.

    Everybody takes turns in the same rounds, ``budget_s`` seconds for each peer. A library that
    cannot take a row, or computes something else, has no row of its own; ``note`` is told why.

    Yields:
        The rows of one cell, shape and mode: against torch.nn, then against each library.
    """
    for cell in cells:
        for shape in shapes:
            for mode in MODES:
                announce(f"{cell} {mode} {shape}")
                problem = layers.problem(cell, shape, device)
                pair = problem.checked(mode)
                exact = pair.exact()
                check = timing.compare(pair.ours, pair.peer(), exact)
                peers = {"torch.nn": pair.peer}
                serving = [each for each in libraries if each.serves(cell, "fp32")]
                for found in rivals.rivals(serving, cell, problem, mode, exact):
                    if isinstance(found, str):
                        note(f"{cell} {mode} {shape}: no row for {found}")
                    else:
                        peers[found.name] = found.run
                turns = None
                if check.passed:
                    effort = timing.Effort(budget_s * len(peers))
                    turns = timing.take_turns({"ours": pair.ours, **peers}, device, effort)
                flops = layers.product_flops(cell, mode, shape)
                yield [
                    Row(
                        cell, mode, shape, str(device), "float32", check,
                        turns.against(name) if turns else None, flops=flops, peer=name,
                    )
                    for name in peers
                ]  # fmt: skip
