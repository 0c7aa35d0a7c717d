"""What the benchmark's commands measure is right, and its checks can fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("rich")

from fused_rnn.bench import layers, options, tables, timing
from fused_rnn.bench.shapes import CELLS, MODES, Shape

SHAPE = Shape(6, 3, 5, 20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("option", options.OPTIONS)
def test_every_option_is_checked(option: str, cell: str, mode: str) -> None:
    checked, timed = options._pairs(option, cell, mode, SHAPE)
    check = timing.check(checked)
    assert check.passed, str(check)
    for run in (timed.ours, timed.peer):
        assert all(torch.isfinite(result).all() for result in run().values())

    def wrong() -> timing.Results:
        return {name: result * 1.1 for name, result in checked.ours().items()}

    assert not timing.check(dataclasses.replace(checked, ours=wrong)).passed


def test_one_rounding_may_be_that_of_the_products() -> None:
    """A peer exact by luck, ours within a rounding of TF32: float32 alone would not allow it."""
    exact = {"output": torch.ones(3, dtype=torch.float64)}
    peer = {"output": torch.ones(3)}

    def ours() -> timing.Results:
        return {"output": torch.ones(3) * (1 + 2**-11)}

    assert not timing.compare(ours, peer, exact).passed
    assert timing.compare(ours, peer, exact, rounding=2**-10).passed


@pytest.mark.parametrize("wrong, passed", [(3e-7, True), (6e-7, False), (float("nan"), False)])
def test_h_of_the_last_step_has_the_limit_of_all_steps(wrong: float, passed: bool) -> None:
    """The peer's h_n is exact by luck, its output is not; that lifts no limit but h_n's."""
    exact = {name: torch.ones(3, dtype=torch.float64) for name in ("output", "h_n", "c_n")}
    peer = {name: torch.ones(3) for name in exact}
    peer["output"] = peer["output"] * (1 + 2**-23)

    def ours(name: str) -> timing.Results:
        return {other: torch.ones(3) + wrong * (other == name) for other in exact}

    assert timing.compare(lambda: ours("h_n"), peer, exact).passed == passed
    assert not timing.compare(lambda: ours("c_n"), peer, exact).passed


def test_everyone_has_a_turn_in_every_round() -> None:
    ran: list[str] = []
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    effort = timing.Effort(0.0, slice_s=0.0, min_rounds=4, scrub_bytes=1)
    turns = timing.take_turns(runs, torch.device("cpu"), effort)
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == dict(a=4, b=4, c=4)
    assert "".join(ran[-12:]) == "bca" + "cab" + "abc" + "bca"
    assert turns.ratios("a", "a") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("cell", CELLS)
def test_operations_are_counted(cell: str) -> None:
    """Against the sizes of the weights themselves."""
    layer = getattr(torch.nn, cell)(SHAPE.I, SHAPE.H, bias=False)
    weights = sum(p.numel() for p in layer.parameters())
    forward = 2 * SHAPE.T * SHAPE.B * weights
    assert layers.product_flops(cell, "forward", SHAPE) == forward
    assert layers.product_flops(cell, "training", SHAPE) == 3 * forward


def test_table_shows_operations_and_their_share() -> None:
    check = timing.Check(True, "output", 0.0, 0.0, 1.0)
    time = timing.Timing(0.5, 1.0, 2.0, 2.0, 2.0, 5, 1, (0.5, 0.5), (1.0, 1.0))
    rows = [
        layers.Row("LSTM", mode, SHAPE, "cpu", "float32", check, time, flops=int(3e9))
        for mode in MODES
    ]
    console = tables.console()
    console.width = 100
    with console.capture() as capture:
        console.print(tables.table(rows, "cell", "torch.nn", 12e9))
    line = next(text for text in capture.get().splitlines() if "6,3,5,20" in text)
    assert line.split() == ["LSTM", "6,3,5,20", *(["500.0", "2.00", "6", "50"] * 2)]
