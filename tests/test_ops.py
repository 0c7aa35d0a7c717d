"""The compiled ops themselves: their contract with torch, their checks and their arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import values_by_unit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fused_rnn import _C, ops
from fused_rnn import cells as known

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = list(known.CELLS)
VARIANTS = (
    "plain", "two_lanes", "two_directions", "ragged", "bare", "projected", "packed",
    "packed_projected", "separate", "joint", "drawn", "packed_drawn_projected", "expected",
)  # fmt: skip
# The options of some.
VARIATIONS = {
    "separate": (1, 0.0, 0.0, 0.0, 1e-3),
    "joint": (2, 0.2, 0.0, 0.3, 1e-5),
    "drawn": (0, 0.3, 0.2, 0.4, 1e-5),
    "packed_drawn_projected": (1, 0.3, 0.2, 0.4, 1e-5),
    "expected": (0, 0.3, 0.2, 0.0, 1e-5),
}

Arguments = dict[str, Any]


def forward_arguments(
    cell: str,
    variant: str = "plain",
    *,
    T: int = 4,
    B: int = 3,
    L: int = 1,
    H: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Arguments:
    """Arguments of layer_forward by the names of what they are made of (``op_arguments``)."""
    traits = known.CELLS[cell]
    variation = VARIATIONS.get(variant, known.PLAIN)
    packed, projected = variant.startswith("packed"), variant.endswith("projected")
    if variant in ("two_lanes", "two_directions") or packed or projected:
        L = 2
    I, P = 6, 2 if projected else H  # noqa: E741

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    bare, ragged = variant == "bare", variant in ("ragged", "projected")
    batch_sizes = torch.arange(B, B - T, -1).clamp(min=1) if packed else None
    table = traits.table(not bare, projected, variation[0])
    shapes = [weight.shape({"I": I, "H": H, "P": P}) for weight in table]
    more: Arguments = {}
    if variant in VARIATIONS:
        more = dict(zip(known.Variation._fields, variation, strict=True))
        more["zoneout_c"] *= traits.has_c
        more["seed"] = None if variant == "expected" else torch.tensor(77, device=device)
    states = [(L, B, P), (L, B, H)] if traits.has_c else [(L, B, P)]
    return {
        "input": random(T, B, I) if batch_sizes is None else random(int(batch_sizes.sum()), I),
        "states": [] if bare else [random(*shape) for shape in states],
        "weights": [random(*shape) for shape in shapes * L],
        "has_biases": not bare,
        "projected": projected,
        "lengths": (torch.arange(B, device=device) % (T + 1)) if ragged else None,
        "batch_sizes": batch_sizes,
        "resets": (torch.rand(T, B) < 0.3).to(device) if ragged or packed else None,
        "recurrences": L,
        "directions": 2 if variant == "two_directions" or packed or projected else 1,
        "save": not bare,
        "want_cells": projected,
        **more,
    }


def call_of(cell: str, given: Arguments) -> known.Call:
    variation = None
    if "layer_norm" in given:
        variation = known.Variation(*(given[name] for name in known.Variation._fields))
    return known.Call(
        cell, given["has_biases"], given["projected"], len(given["states"]), given["recurrences"],
        given["directions"], given["want_cells"], variation,
    )  # fmt: skip


def op_arguments(direction: str, cell: str, given: Arguments) -> tuple[Any, ...]:
    """What an op takes."""
    call = call_of(cell, given)
    primals = [given["input"], *given["states"], *given["weights"]]
    rest = [given["lengths"], given["batch_sizes"], given["resets"], given.get("seed")]
    if direction == "forward":
        return (cell, primals, *rest, call.settings(given["save"]), call.variation)
    grads = [given[f"grad_{of}"] for of in ("output", "h_n", "c_n", "cells")]
    needed = [given[f"need_{of}"] for of in ("input", "states", "weights")]
    results = [given["output"], *given["saved"]]
    return (cell, grads, primals, results, rest, call.settings(*needed), call.variation)


OPS = {"forward": ops.layer_forward, "backward": ops.layer_backward}


def forward_op(cell: str) -> Callable[..., list[Tensor]]:
    return lambda **given: ops.layer_forward(*op_arguments("forward", cell, given))


def backward_op(cell: str) -> Callable[..., list[Tensor]]:
    return lambda **given: ops.layer_backward(*op_arguments("backward", cell, given))


def exists(batch_sizes: Tensor) -> Tensor:
    """(T, B) bool: the steps there are, whose order is that of packed rows."""
    return torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)


def lengths_of(given: Arguments) -> Tensor | None:
    return given["lengths"] if given["batch_sizes"] is None else exists(given["batch_sizes"]).sum(0)


def saved_names(cell: str, given: Arguments) -> list[str]:
    call = call_of(cell, given)
    has = {
        "reserve": call.saved_values, "saved_cells": call.traits.has_c,
        "unprojected": call.projected, "statistics": call.layer_norm,
    }  # fmt: skip
    return [name for name, there in has.items() if there]


def forward(cell: str, given: Arguments) -> dict[str, Tensor]:
    """The results of layer_forward by name."""
    names = ["output", "h_n", "c_n"] if known.CELLS[cell].has_c else ["output", "h_n"]
    names += ["cells"] if given["want_cells"] else []
    names += saved_names(cell, given) if given["save"] else []
    return dict(zip(names, forward_op(cell)(**given), strict=True))


def backward_arguments(cell: str, variant: str = "plain", **sizes: Any) -> Arguments:
    """Arguments of layer_backward by name, after a forward that saved its reserve."""
    given = forward_arguments(cell, variant, **sizes) | {"save": True}
    found = forward(cell, given)
    bare = variant == "bare"
    return {
        "grad_output": torch.randn_like(found["output"]),
        "grad_h_n": None if bare else torch.randn_like(found["h_n"]),
        "grad_c_n": None if bare or "c_n" not in found else torch.randn_like(found["c_n"]),
        "grad_cells": torch.randn_like(found["cells"]) if "cells" in found else None,
        **{k: v for k, v in given.items() if k != "save"},
        "output": found["output"],
        "saved": [found[name] for name in saved_names(cell, given)],
        "need_input": True,
        "need_states": bool(given["states"]),
        "need_weights": True,
    }


DIRECTIONS: dict[str, tuple[Callable[[str], Any], Callable[..., Arguments]]] = {
    "forward": (forward_op, forward_arguments),
    "backward": (backward_op, backward_arguments),
}


def cases_of(*variants: str) -> list[tuple[str, str]]:
    """Those that there are of every cell with these variants."""
    return [
        (c, v)
        for c in CELLS
        for v in variants
        if known.CELLS[c].has_c or not v.endswith("projected")
        if not (known.CELLS[c].late_gate and v in VARIATIONS and VARIATIONS[v][0])
    ]


CASES = cases_of(*VARIANTS)


@pytest.fixture(autouse=True)
def _packed_on_cpu(request: pytest.FixtureRequest) -> None:
    given = getattr(request.node, "callspec", None)
    params = {} if given is None else given.params
    if params.get("device") == "cuda" and params.get("variant", "").startswith("packed"):
        pytest.skip("batch_sizes are for the CPU")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell, variant", CASES)
def test_opcheck(cell: str, variant: str, direction: str, device: str) -> None:
    _, arguments = DIRECTIONS[direction]
    # Whole blocks of units, and nothing saved where rows are ragged: the reserve's padding, and its
    # steps that do not exist, are nobody's, and need not repeat.
    given = arguments(cell, variant, H=16, device=device)
    if "save" in given and (given["lengths"] is not None or given["batch_sizes"] is not None):
        given["save"] = False
    torch.library.opcheck(OPS[direction], op_arguments(direction, cell, given))


def assert_same_layout(real: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
    assert len(real) == len(fake)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, list):
        return [map_tensors(function, v) for v in value]
    return function(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "cell, variant, sizes",
    [
        (*case, sizes)
        for case in CASES
        for sizes in ({"T": 0}, {"B": 0}, {"L": 2}, {"T": 0, "B": 0, "L": 2})
        if 0 not in sizes.values() or not case[1].startswith("packed")  # torch does not pack it
    ],
    ids=str,
)
def test_fake_kernels(cell: str, variant: str, direction: str, sizes: dict[str, int]) -> None:
    op, arguments = DIRECTIONS[direction]
    for H, dtype in ((5, torch.float32), (16, torch.bfloat16), (17, torch.float64)):
        given = arguments(cell, variant, H=H, dtype=dtype, **sizes)
        real = op(cell)(**given)
        with FakeTensorMode() as mode:
            fake = op(cell)(**{k: map_tensors(mode.from_tensor, v) for k, v in given.items()})
        assert_same_layout(real, fake)


@pytest.mark.parametrize("wanted", ["input", "states", "weights", "nothing"])
@pytest.mark.parametrize("cell, variant", CASES)
def test_only_what_is_needed(cell: str, variant: str, wanted: str) -> None:
    """The gradients asked for are there, alone, and bitwise the same."""
    given = backward_arguments(cell, variant)
    everything = backward_op(cell)(**given)
    states = len(given["states"])
    parts = {
        "input": everything[:1],
        "states": everything[1 : 1 + states],
        "weights": everything[1 + states :],
        "nothing": [],
    }
    needs = {f"need_{part}": part == wanted for part in ("input", "states", "weights")}
    needs["need_states"] &= states > 0
    found = backward_op(cell)(**(given | needs))
    assert_same_layout(found, parts[wanted])
    for a, b in zip(found, parts[wanted], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    "cell, want_cells",
    [(cell, want) for cell in CELLS for want in {False, bool(known.CELLS[cell].has_c)}],
)
def test_what_is_saved(cell: str, save: bool, want_cells: bool) -> None:
    traits = known.CELLS[cell]
    given = forward_arguments(cell)
    expected = forward(cell, given)
    given |= {"save": save, "want_cells": want_cells}
    found = forward(cell, given)  # whose names are checked against their number
    reserve = found.get("reserve", torch.empty(0))
    assert reserve.numel() == (4 * 3 * 16 * traits.saved if save else 0)
    cells = found.get("cells", torch.empty(0))
    assert cells.numel() == (4 * 3 * 5 if want_cells else 0)
    saved_cells = found.get("saved_cells", torch.empty(0))
    assert saved_cells.numel() == (4 * 3 * 16 if traits.has_c and save else 0)
    if want_cells and save:
        assert torch.equal(values_by_unit(saved_cells, 5).flatten(3), cells)
    for name in ("output", "h_n", "c_n"):
        assert name not in expected or torch.equal(found[name], expected[name])


@pytest.mark.parametrize(
    "cell, variant", cases_of("plain", "two_directions", "ragged", "projected")
)
def test_no_timesteps(cell: str, variant: str, device: str) -> None:
    """The states, and their gradients, pass straight through; the weights get zeros."""
    given = forward_arguments(cell, variant, T=0, device=device)
    found = forward(cell, given)
    assert found["output"].numel() == 0
    for name, state in zip(("h_n", "c_n"), given["states"], strict=False):
        assert torch.equal(found[name], state)
    given = backward_arguments(cell, variant, T=0, device=device)
    _, *grads = backward_op(cell)(**given)
    states, weights = grads[: len(given["states"])], grads[len(given["states"]) :]
    for name, d_state in zip(("grad_h_n", "grad_c_n"), states, strict=False):
        assert torch.equal(d_state, given[name])
    assert all((d_weight == 0).all() for d_weight in weights)


@pytest.mark.parametrize("cell", CELLS)
def test_no_timesteps_from_zeros(cell: str, device: str) -> None:
    found = forward(cell, forward_arguments(cell, "bare", T=0, device=device))
    assert all((t == 0).all() for t in found.values())
    given = backward_arguments(cell, "bare", T=0, device=device)
    assert all((t == 0).all() for t in backward_op(cell)(**given))


@pytest.mark.parametrize("cell, variant", [c for c in CASES if not c[1].startswith("packed")])
def test_no_rows(cell: str, variant: str, device: str) -> None:
    given = backward_arguments(cell, variant, B=0, device=device)
    assert all((t == 0).all() for t in backward_op(cell)(**given))


def elsewhere(value: Tensor) -> Tensor:
    """The same values in other places of memory."""
    return value.movedim(-1, 0).contiguous().movedim(0, -1) if value.dim() >= 2 else value


@pytest.mark.parametrize("cell, variant", CASES)
def test_strided_arguments(cell: str, variant: str, device: str) -> None:
    """Same values, other places in memory: the results are bitwise the same."""
    for op, arguments in DIRECTIONS.values():
        given = arguments(cell, variant, device=device)
        expected = op(cell)(**given)
        found = op(cell)(**{k: map_tensors(elsewhere, v) for k, v in given.items()})
        lengths = lengths_of(given)
        for a, b in zip(found, expected, strict=True):
            # Packed, only what is saved has steps that do not exist: the reserve and statistics.
            has_time = a.dim() == 6 or a.shape[:3] == (4, given["recurrences"], 3)
            where = lengths if given["batch_sizes"] is None or has_time else None
            if a.dim() == 4 and has_time:
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            assert torch.equal(values_by_unit(a, 5, where), values_by_unit(b, 5, where))


def names_in(cell: str, field: str, arguments: Arguments) -> list[str]:
    """The names of the tensors of a list."""
    if field == "states":
        return ["hx", "cx"][: len(arguments[field])]
    if field == "saved":
        return saved_names(cell, arguments)
    table = call_of(cell, arguments).table
    return [weight.name for _ in range(arguments["recurrences"]) for weight in table]


def wrong_tensors(name: str, value: Tensor) -> list[Tensor]:
    if value.numel() == 0:
        return []
    found = [value.unsqueeze(0), torch.zeros_like(value, dtype=torch.int32)]
    found += [value[..., :-1]] if value.dim() else []
    if value.is_floating_point() and name != "input":
        found.append(value.to(torch.float16))
    return found


def wrong_batch_sizes() -> list[Tensor]:
    """In place of [3, 2, 1, 1]; some sums overflow, and the engine writes where they say."""
    values = [
        [3, 1, 2, 1], [3, 2, 2, 0], [3, 2, 3, -1], [3, 2, 1], [3, 2, 2, 1], [7, 0, 0], [0], [-1],
        [2**62] * 4, [2**63 - 1, 2**63 - 1, 9], [10], [-(2**63), 7],
    ]  # fmt: skip
    good = torch.tensor([3, 2, 1, 1])
    others = [good.int(), good.double(), good.view(2, 2), good[:0], good[0], good.to("meta")]
    return [*map(torch.tensor, values), *others]


def wrong_arguments(cell: str, arguments: Arguments) -> list[tuple[str, str, Any]]:
    """For every argument what must not be accepted: its name, or that in a list, and the value."""
    found: list[tuple[str, str, Any]] = []
    for field, value in arguments.items():
        if isinstance(value, Tensor):
            found += [(field, field, wrong) for wrong in wrong_tensors(field, value)]
        if not isinstance(value, list):
            continue
        for i, (name, tensor) in enumerate(
            zip(names_in(cell, field, arguments), value, strict=True)
        ):
            for wrong in wrong_tensors(name, tensor):
                found.append((name, field, [*value[:i], wrong, *value[i + 1 :]]))
        found.append((field, field, [*value, torch.zeros(1)] * 2))
        if value and (field != "states" or len(value) == 2):
            found.append((field, field, value[:-1]))
    if arguments["batch_sizes"] is not None:
        found += [("lengths", "lengths", torch.tensor([4, 2, 1]))]
        found += [("batch_sizes", "batch_sizes", wrong) for wrong in wrong_batch_sizes()]
    T = 4
    found += [("lengths", "lengths", torch.full((3,), T + 1))]
    found += [("lengths", "lengths", torch.tensor([0, -1, 2]))]
    found += [("directions", "directions", 0), ("directions", "directions", 3)]
    found += [("recurrences", "recurrences", 0), ("recurrences", "recurrences", -1)]
    for rate in ("zoneout_h", "zoneout_c", "recurrent_dropout"):
        if rate in arguments:
            found += [(rate, rate, wrong) for wrong in (-0.1, 1.0, math.nan)]
    if "layer_norm" in arguments:
        found += [("layer_norm", "layer_norm", wrong) for wrong in (-1, 3)]
        found += [("layer_norm_eps", "layer_norm_eps", wrong) for wrong in (-1e-5, math.nan)]
        if known.CELLS[cell].late_gate:
            found += [("layer_norm", "layer_norm", 1)]
        if arguments["recurrent_dropout"] > 0:
            found += [("recurrent_dropout", "seed", None)]
        if not known.CELLS[cell].has_c:
            found += [("zoneout_c", "zoneout_c", 0.1)]
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["dense", "packed", "varied"])
@pytest.mark.parametrize("cell", CELLS)
def test_errors_name_the_argument(cell: str, kind: str, direction: str) -> None:
    op, arguments = DIRECTIONS[direction]
    variants = {"dense": "ragged", "packed": "packed", "varied": "joint"}
    if known.CELLS[cell].has_c:
        variants = {
            "dense": "projected", "packed": "packed_projected", "varied": "packed_drawn_projected",
        }  # fmt: skip
    elif known.CELLS[cell].late_gate:
        variants["varied"] = "drawn"
    given = arguments(cell, variants[kind])
    silent = []
    for name, field, wrong in wrong_arguments(cell, given):
        what = f"{name}={getattr(wrong, 'shape', wrong)} {getattr(wrong, 'dtype', '')}"
        try:
            op(cell)(**(given | {field: wrong}))
            silent.append(f"{what}: accepted")
        except RuntimeError as error:
            # Where a size is shared, the other one that does not fit may be named as well as ours.
            named = re.search(rf"{name}(_l0(_reverse)?)? ", str(error))
            if not named and not shares_a_size(name, str(error)):
                silent.append(f"{what}: {str(error).splitlines()[0]}")
    assert not silent, "\n".join(silent)


def shares_a_size(name: str, message: str) -> bool:
    """The sizes are taken from these; the argument found not to fit them is the one named."""
    return name in ("input", "weight_hh") and "Expected " in message and " of shape " in message


@pytest.mark.parametrize("cell", [c for c in CELLS if not known.CELLS[c].has_c])
@pytest.mark.parametrize("name", ["states", "projected", "want_cells"])
def test_arguments_a_cell_does_not_have_are_refused(cell: str, name: str) -> None:
    given = forward_arguments(cell)
    given["states"] += [torch.zeros(1, 3, 5)] if name == "states" else []
    if name == "projected":
        given["weights"].append(torch.zeros(5, 5))
        given["projected"] = True
    given["want_cells"] = name == "want_cells"
    with pytest.raises(RuntimeError, match=name):
        forward_op(cell)(**given)


@pytest.mark.parametrize("cell", [c for c in CELLS if not known.CELLS[c].has_c])
@pytest.mark.parametrize("name", ["grad_c_n", "grad_cells"])
def test_gradients_a_cell_does_not_have_are_refused(cell: str, name: str) -> None:
    given = backward_arguments(cell)
    shape = (1, 3, 5) if name == "grad_c_n" else (4, 3, 1, 5)
    with pytest.raises(RuntimeError, match=name):
        backward_op(cell)(**(given | {name: torch.zeros(shape)}))


@pytest.mark.parametrize("cell", CELLS)
def test_states_that_are_not_there_have_no_gradient(cell: str) -> None:
    given = backward_arguments(cell, "bare") | {"need_states": True}
    with pytest.raises(RuntimeError, match="need_states of 0, since there are no states"):
        backward_op(cell)(**given)


def with_padding(value: Tensor | None, where: Tensor) -> Tensor | None:
    """Packed rows as (T, B, ...), with NaN where there are none."""
    if value is None:
        return None
    padded = value.new_full((*where.shape, *value.shape[1:]), math.nan)
    padded[where] = value
    return padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [{}, {"T": 40, "B": 9, "H": 33}, {"T": 1}, {"B": 1}], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell, variant", cases_of("packed", "packed_projected"))
def test_packed_is_lengths_bitwise(
    cell: str, variant: str, threads: int, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """Results of both ops; what is not there, of input and gradients, is NaN in the padded form."""
    torch.set_num_threads(threads)
    given = backward_arguments(cell, variant, dtype=dtype, **sizes)
    where, lengths = exists(given["batch_sizes"]), lengths_of(given)
    forward_given = {k: given[k] for k in forward_arguments(cell) if k in given}
    forward_given |= {"save": True, "want_cells": variant == "packed_projected"}
    padded: Arguments = {"batch_sizes": None, "lengths": lengths}
    padded["input"] = with_padding(given["input"], where)
    H = sizes.get("H", 5)

    found, expected = forward(cell, forward_given), forward(cell, forward_given | padded)
    for name, t in expected.items():
        if name in ("output", "cells"):
            assert (t[~where] == 0).all()
        if name in ("output", "cells", "unprojected"):
            assert torch.equal(found[name], t[where]), name
        else:
            a, b = (values_by_unit(saved, H, lengths) for saved in (found[name], t))
            assert torch.equal(a, b), name

    padded |= {k: with_padding(given[k], where) for k in ("grad_output", "grad_cells")}
    padded["output"] = expected["output"]
    padded["saved"] = [expected[name] for name in saved_names(cell, given)]
    d_input, *rest = backward_op(cell)(**given)
    d_padded, *expected_rest = backward_op(cell)(**(given | padded))
    assert (d_padded[~where] == 0).all()
    assert torch.equal(d_input, d_padded[where])
    for a, b in zip(rest, expected_rest, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_fake_of_packed_without_states(cell: str, direction: str) -> None:
    """How many rows there are is among the values of batch_sizes, which a fake does not have."""
    op, arguments = DIRECTIONS[direction]
    given = arguments(cell, "packed") | {"states": [], "need_states": False}
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = op(cell)(**{k: map_tensors(mode.from_tensor, v) for k, v in given.items()})
    real = op(cell)(**given)
    rows = len(given["input"])
    for r, f in zip(real, fake, strict=True):
        assert (r.dim(), r.dtype) == (f.dim(), f.dtype)
        for n, m in zip(r.shape, f.shape, strict=True):
            assert not isinstance(m, int) or n == m
    assert fake[0].shape == real[0].shape and fake[0].shape[0] == rows
    assert not isinstance(fake[1].shape[1], int)


@pytest.mark.parametrize("cell", CELLS)
def test_poison_reaches_the_engine(cell: str) -> None:
    """conftest's NaN: results and scratch of an op come from torch's empty, and are filled."""

    def fills() -> int:
        with torch.profiler.profile() as profile:
            forward_op(cell)(**given)
        return [event.name for event in profile.events()].count("aten::fill_")

    given = forward_arguments(cell)
    results = sum(t.numel() > 0 for t in forward_op(cell)(**given))
    assert fills() >= results + 1
    torch.use_deterministic_algorithms(False)
    assert fills() == 0


def results_of(
    call: known.Call, input: Tensor, states: Any, weights: Any, save: bool = False
) -> list[Tensor]:
    primals = [input, *states, *weights]
    return ops.layer_forward(call.cell, primals, *known.Rest(), call.settings(save), call.variation)


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 values of a half type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [1, 64, 37])
def test_half_types_round_to_nearest_even(dtype: torch.dtype, H: int, device: str) -> None:
    """A rectifier of one input for all units: what is stored is the rounded sum or product.

    Rows of one unit, of whole vectors and of a ragged end: each has a store of its own.
    """
    x = every_value(dtype).to(device).view(1, -1, 1)
    rows = x.shape[1]

    def seen(wide: Tensor) -> Tensor:
        """To instructions that multiply pairs of bfloat16, subnormal numbers are zeros."""
        pairs = device == "cpu" and _C.active_instruction_set() == "avx512_bf16"
        if dtype != torch.bfloat16 or not pairs:
            return wide
        return torch.where(wide.abs() < torch.finfo(dtype).tiny, 0.0, wide)

    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def check(found: Sequence[Tensor], wide: Tensor) -> None:
        expected = seen(wide).relu().to(dtype).view(1, rows, 1).expand(1, rows, H)
        for t in found:
            torch.testing.assert_close(t, expected, rtol=0, atol=0, equal_nan=True)

    def relu(
        input: Tensor, states: list[Tensor], weights: list[Tensor], has_biases: bool
    ) -> Sequence[Tensor]:
        call = known.Call("rnn_relu", has_biases, False, len(states), 1, 1)
        return results_of(call, input, states, weights)

    # Sums: the values themselves (0), and ones that need rounding, overflow, or cancel.
    for bias in (0.0, 0.00390625, 1.0, -1.0, 1000.0, torch.finfo(dtype).max, math.inf):
        weights = [full(1, H, 1), full(0, H, H), full(0, H), full(bias, H)]
        check(relu(x, [], weights, True), seen(x.float()) + full(bias, 1).float())
    # Products, which reach between the subnormal numbers.
    for weight in (1.0, 0.7, 1.4e-3, 60.0):
        wide = seen(x.float()) * full(weight, 1).float()
        check(relu(x, [], [full(weight, H, 1), full(0, H, H)], False), wide)
        if H == 1:  # else NaN times the zeros beside the diagonal
            weights = [full(1, 1, 1), full(weight, 1, 1)]
            check(relu(torch.zeros_like(x), [x], weights, False), wide)


def grid(dtype: torch.dtype) -> Tensor:
    """Every magnitude at which exp and tanh change their ways, and all between."""
    special = [0.0, 1e-45, 1e-40, 1e-38, 5e-324, 1e-310, 1e-30, 0.3465, 0.3466, 22.0, 1e4, math.inf]
    special += [87.3, 88.0, 88.72, 88.8, 103.0, 708.0, 709.7, 710.0, 745.0, 746.0, math.nan]
    parts = [
        torch.tensor(special, dtype=torch.float64),
        torch.linspace(0, 1, 20001, dtype=torch.float64),
        torch.linspace(0, 110, 20001, dtype=torch.float64),
        torch.logspace(-44, 4, 20001, dtype=torch.float64),
    ]
    half = torch.cat(parts).to(dtype)
    return torch.cat([half, -half])


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """Error in units of the last place that the exact value has in found's dtype."""
    rounded = exact.to(found.dtype)
    size = rounded.abs()
    unit = torch.nextafter(size, torch.full_like(size, math.inf)) - size
    error = (found.double() - exact).abs() / unit.double()
    same = (found == rounded) | (found.isnan() & rounded.isnan())
    return error.masked_fill(same, 0)  # also infinity, which has no unit


def exactly(function: Callable[[float], float], x: Tensor) -> Tensor:
    return torch.tensor([function(v) for v in x.double().tolist()], dtype=torch.float64)


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))  # NaN too


@pytest.mark.parametrize("H", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_accurate(dtype: torch.dtype, H: int, device: str) -> None:
    x = grid(dtype)
    weights = [torch.ones(H, 1, dtype=dtype), torch.zeros(H, H, dtype=dtype)]
    found, _ = results_of(
        known.Call("rnn_tanh", False, False, 0, 1, 1), x.to(device).view(1, -1, 1), [],
        [w.to(device) for w in weights],
    )  # fmt: skip
    exact = exactly(math.tanh, x)
    for unit in found.cpu().view(-1, H).unbind(1):
        assert ulps(unit, exact).max() <= 4
        assert (unit.abs() <= 1)[~x.isnan()].all()
        assert (unit.sign() == x.sign())[~x.isnan()].all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"])
def test_zero_stays_positive(cell: str, device: str) -> None:
    """As in torch: nothing in, nothing out, and not minus nothing."""
    given = forward_arguments(cell, "bare", H=17, device=device)
    given["input"].zero_()
    output = forward_op(cell)(**given)[0]
    assert (output == 0).all()
    assert not output.signbit().any()


@pytest.mark.parametrize("gate", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_accurate(dtype: torch.dtype, gate: int, device: str) -> None:
    """Of the gates i, f and o, as the reserve keeps them."""
    x = grid(dtype)
    n = x.numel()
    weight_ih = torch.zeros(4, 1, dtype=dtype, device=device)
    weight_ih[gate] = 1  # infinity and NaN reach the other gates too, which are not looked at
    weights = [weight_ih, torch.zeros(4, 1, dtype=dtype, device=device)]
    call = known.Call("lstm", False, False, 0, 1, 1)
    reserve = results_of(call, x.to(device).view(1, n, 1), [], weights, save=True)[3]
    found = values_by_unit(reserve, 1).reshape(n, 4)[:, gate].cpu()
    exact = exactly(sigmoid, x)
    # 1 + exp(-x) overflows a little before the quotient is gone, here as in torch: what then
    # remains is less than the smallest normal number.
    smallest = torch.finfo(dtype).smallest_normal
    normal = (exact >= smallest) | exact.isnan()
    assert ulps(found, exact)[normal].max() <= 4
    assert (found.double() - exact)[~normal].abs().max() < smallest
    assert ((found >= 0) & (found <= 1))[~x.isnan()].all()
    assert found[x.isnan()].isnan().all()
