"""Which engine a layer's call takes, and why: ``fused_rnn.explain``.

The layer itself is run on meta tensors, which have shapes but no data, and what its ops are called
with is noted down. So nothing is computed, a wrong argument fails as it would in the call, and how
heads, directions and options become lanes and cells is told by the code that does it.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from . import composed, modules, ops, stack
from .binary import _C
from .cells import Call, Rest, call_of
from .stack import Recurrence

WIDTH = 80  # of the table, in characters


class Candidate(NamedTuple):
    """An engine that was considered."""

    engine: str  # "cpu", "per_step", "persistent_cluster" or "persistent_grid"
    possible: bool
    us_per_step: float | None  # predicted; None where it is impossible or the model has none
    reason: str
    shared_bytes: int = 0  # of each thread block that keeps weights


class Choice(NamedTuple):
    """How a layer of the stack runs its recurrence forward or backward."""

    layer: int
    phase: str  # "forward" or "backward"
    candidates: list[Candidate]  # the one that is taken first

    @property
    def engine(self) -> str:
        return self.candidates[0].engine


class Explanation:
    """What ``explain`` returns; printed, it is a table.

    Attributes:
        device: what the choice was made for.
        recurrences: one for each layer of the stack.
        choices: two for each layer of the stack, forward and backward, in the order of layers.
        tf32: whether float32 products may round to TF32.
        wavefront: how layers over each other run on CUDA in one direction; None elsewhere.
    """

    def __init__(
        self,
        device: str,
        recurrences: list[Recurrence],
        choices: list[Choice],
        tf32: bool,
        wavefront: stack.Plan | None = None,
    ) -> None:
        self.device = device
        self.recurrences = recurrences
        self.choices = choices
        self.tf32 = tf32
        self.wavefront = wavefront

    def __repr__(self) -> str:
        first = self.recurrences[0]
        dtype = first.dtype + " as TF32" * (first.dtype == "float32" and self.tf32)
        sizes = f"T={first.T}, B={first.B}, {_count(first.lanes, 'lane')} of H={first.H}"
        stack = _count(len(self.recurrences), "layer")
        title = f"{first.cell}, {dtype}, {stack}: {sizes}, on {self.device}"
        lines = [*textwrap.wrap(title, WIDTH), *_row("pass", "engine", "us/step", "why")]
        predicted = False
        # What there is to say of one layer holds for the whole stack: only input widths differ.
        for choice in self.choices[:2]:
            for i, each in enumerate(choice.candidates):
                time = "no" if not each.possible else "-"
                if each.us_per_step is not None:
                    time, predicted = f"{each.us_per_step:.2f}", True
                lines += _row("" if i else choice.phase, each.engine, time, each.reason)
        lines += textwrap.wrap(_PREDICTED if predicted else _NOTHING, WIDTH)
        if self.wavefront is not None:
            lines += textwrap.wrap(_over_each_other(self.wavefront), WIDTH)
        return "\n".join(lines)


def _over_each_other(plan: stack.Plan) -> str:
    if not plan.microseconds:
        parts = _count(plan.parts, "part")
        return f"Layers run in {parts} of time, forced by {stack.VARIABLE}." * (plan.parts > 1)
    times = f"{plan.microseconds:.0f} us for the whole stack are predicted"
    if plan.parts == 1:
        return f"Layers run one after the other: {times}, and not much less as a wavefront."
    return (
        f"Layers run as a wavefront in {plan.parts} parts of time: {times}, "
        f"{plan.microseconds_in_one_part:.0f} one after the other."
    )


_PREDICTED = (
    "The first engine is taken. us/step is predicted, not measured, for a timestep of one layer's "
    "recurrence, all rows and lanes."
)
_NOTHING = "The first engine is taken. There is no prediction of us/step."


def explain(
    layer: modules._Layer,
    input: Tensor | PackedSequence | Sequence[int],
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    training: bool | None = None,
    chip: str | None = None,
) -> Explanation:
    """Tells which engine the call ``layer(input, hx, ...)`` takes, and why. Nothing is computed.

    A small cost model with constants per chip chooses among the CUDA engines. Its predictions have
    not been fitted to measurements. ``FUSED_RNN_CUDA_ENGINE`` forces an engine, for tests, and
    ``FUSED_RNN_CUDA_WAVEFRONT`` the number of parts of time that layers over each other run in; on
    the CPU there is one engine, and ``FUSED_RNN_CPU_ISA`` forces its instruction set. Second
    derivatives, which the table leaves out, take ``per_step`` or ``cpu``.

    Args:
        layer: a ``fused_rnn.RNN``, ``LSTM`` or ``GRU``, on any device.
        input: as the layer takes it, on the layer's or the meta device; or just its shape, (T, B,
            I), (B, T, I) with ``batch_first``, or (T, I), and then its dtype is the layer's.
        hx, lengths, resets: as the layer takes them. Their shapes and dtypes are checked; they
            change no choice.
        training: whether the layer is in training mode, where dropouts are drawn; None: as it is.
        chip: None for the device that the layer lives on; or "A100", "H100", "H200" or "B200", for
            which no GPU is needed. Of those, sizes and clocks are from data sheets, and how many
            thread-block clusters fit is assumed.

    Returns:
        What was considered. ``str()`` of it is a table, ``choices`` has for each layer of the stack
        and pass ("forward", "backward") the candidates, the one that is taken first, with their
        predicted microseconds per timestep.

    Raises:
        TypeError: layer or input is something else.
        ValueError: chip is not known; the message names those that are.
        RuntimeError: FUSED_RNN_CUDA_ENGINE or FUSED_RNN_CPU_ISA asks for what cannot be, as in the
            call; or there is no engine for the layer's device.
        ValueError, RuntimeError: as the call raises them for shapes and dtypes that do not fit.
    """
    expect_layer(layer)
    if chip is not None and chip not in _C.cuda_chips():
        known = ", ".join(_C.cuda_chips())
        raise ValueError(f"chip should be None or one of {known}, got {chip!r}")
    with torch.no_grad():
        weights = layer._weights()
    home = weights[0].device
    device = "cuda" if chip is not None else home.type
    recurrences = _recurrences(layer, weights, input, hx, lengths, resets, training, device)
    tf32 = composed.allows_tf32()
    if device == "cpu":
        return Explanation("the CPU", recurrences, _on_cpu(recurrences), tf32)
    if device != "cuda":
        raise RuntimeError(
            f"Expected layer on the CPU or a CUDA device, or the name of a chip, got {home}"
        )
    training = torch.is_grad_enabled() and any(w.requires_grad for w in layer.parameters())

    def on_cuda(name: str) -> Explanation:
        wavefront = None if layer.bidirectional else _wavefront(recurrences, training, chip)
        return Explanation(name, recurrences, _on_cuda(recurrences, tf32, chip), tf32, wavefront)

    if chip is not None:
        return on_cuda(f"{chip} (assumed)")
    if _C.build_info()["cuda"] is None:
        raise RuntimeError(f"Expected layer on the CPU, since this build has no CUDA, got {home}")
    with torch.cuda.device(home):
        return on_cuda(torch.cuda.get_device_name(home))


def expect_layer(layer: Any) -> None:
    if not isinstance(layer, modules._Layer):
        raise TypeError(
            "layer should be a fused_rnn.RNN, LSTM or GRU (fused_rnn.convert makes them of "
            f"torch.nn's), got: {type(layer).__name__}"
        )


class OpCall(NamedTuple):
    """What the op of one layer was called with."""

    call: Call
    primals: Sequence[Tensor]
    rest: Rest


class Recorder(TorchDispatchMode):
    """Notes what the op of layers is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[OpCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is ops.layer_forward:
            cell, primals, *rest, settings, options = args
            call, _ = call_of(cell, settings, options)
            self.seen.append(OpCall(call, primals, Rest(*rest)))
        return func(*args, **(kwargs or {}))


def _recurrence(of: OpCall) -> Recurrence:
    call = of.call
    input, _, weights = call.split(of.primals)
    return Recurrence(
        call.cell, str(input.dtype).removeprefix("torch."), input.shape[0], input.shape[1],
        call.recurrences, weights[1].shape[0] // call.traits.gates, call.projected,
        call.variation is not None,
    )  # fmt: skip


def _recurrences(
    layer: modules._Layer,
    weights: list[Tensor],
    input: Tensor | PackedSequence | Sequence[int],
    hx: Any,
    lengths: Tensor | None,
    resets: Tensor | None,
    training: bool | None,
    device: str,
) -> list[Recurrence]:
    """What the layer's call would hand to its ops on such a device, for each layer of the stack."""

    # Autocast asks for a tensor's device, which meta would hide.
    cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)

    def shadow(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if cast and dtype.is_floating_point and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

    def given(name: str, tensor: Tensor) -> Tensor:
        home = weights[0].device
        if not tensor.is_meta and home.type != "meta" and tensor.device != home:
            raise RuntimeError(
                f"Expected {name} on the layer's device {home} or on meta, got {tensor.device}"
            )
        return shadow(tensor)

    data: Any
    if isinstance(input, PackedSequence):
        data = PackedSequence(given("input", input.data), *input[1:])
    elif isinstance(input, Tensor):
        data = given("input", input)
    else:
        data = shadow(_of_shape(input, weights[0].dtype))
    if isinstance(hx, Tensor):
        hx = given("hx", hx)
    elif isinstance(hx, (tuple, list)):
        hx = tuple(given("hx", state) for state in hx)
    # Not copy.copy, which refuses parametrized layers.
    shadows = [shadow(weight) for weight in weights]
    training = layer.training if training is None else training
    calls = op_calls(layer, (data, hx, lengths, resets), training, _weights=lambda: shadows)
    return [_recurrence(call) for call in calls]


def op_calls(
    layer: modules._Layer, arguments: tuple[Any, ...], training: bool, **others: Any
) -> list[OpCall]:
    """What the layer calls the op of every layer of its stack with; ``others`` are attributes.

    The layer itself, and whoever uses it meanwhile, are left alone.
    """
    twin = object.__new__(type(layer))
    twin.__dict__ |= layer.__dict__ | others | {"training": training}
    before = stack.in_one_part.set(True)
    try:
        with torch.no_grad(), Recorder() as recorder:
            twin._run(*arguments)
    finally:
        stack.in_one_part.reset(before)
    return recorder.seen


def _of_shape(shape: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
        raise TypeError(
            "input should be a tensor, a PackedSequence or the shape of a tensor, got: "
            f"{type(shape).__name__}"
        )
    if any(size < 0 for size in shape):
        raise RuntimeError(f"Expected input of sizes that are not negative, got {tuple(shape)}")
    return torch.empty(shape, dtype=dtype, device="meta")


def _on_cpu(recurrences: list[Recurrence]) -> list[Choice]:
    used = _C.active_instruction_set()
    forced = os.environ.get("FUSED_RNN_CPU_ISA") == used
    by = "forced by FUSED_RNN_CPU_ISA" if forced else "FUSED_RNN_CPU_ISA forces another"
    threads = _count(torch.get_num_threads(), "thread")
    reason = f"the only one on the CPU; instruction set {used} ({by}), up to {threads}"
    candidates = [Candidate("cpu", True, None, reason)]
    return [
        Choice(k, phase, candidates)
        for k in range(len(recurrences))
        for phase in ("forward", "backward")
    ]


def _on_cuda(recurrences: list[Recurrence], tf32: bool, chip: str | None) -> list[Choice]:
    return [
        Choice(k, phase, _plan(each, phase == "backward", tf32, chip))
        for k, each in enumerate(recurrences)
        for phase in ("forward", "backward")
    ]


def _wavefront(
    recurrences: list[Recurrence], training: bool, chip: str | None
) -> stack.Plan | None:
    of = recurrences[0]
    if len(recurrences) == 1 or of.varied:
        return None
    return stack.plan(
        of, layers=len(recurrences), training=training, captured=False, chip=chip
    )  # fmt: skip


def _plan(of: Recurrence, backward: bool, tf32: bool, chip: str | None) -> list[Candidate]:
    try:
        plan = _C.cuda_plan(of, tf32=tf32, backward=backward, chip=chip)
    except ValueError as error:  # an op makes this of what C++ throws
        raise RuntimeError(str(error)) from None
    return [
        Candidate(
            each["engine"], each["possible"], each["microseconds_per_step"], each["reason"],
            each["shared_bytes"],
        )
        for each in plan
    ]  # fmt: skip


def _row(phase: str, engine: str, time: str, reason: str) -> list[str]:
    head = f"{phase:<8}  {engine:<18}  {time:>7}  "
    return textwrap.wrap(reason, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
