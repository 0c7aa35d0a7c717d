"""``fused-rnn-bench transforms``: which of torch's transforms a layer goes through, and torch.nn's.

Every check raises if a transform fails, falls back to calling one by one, or gives something else
than the layer called plainly. tests/test_transforms.py runs them with lengths and resets as well.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from . import timing

CELLS = ("RNN", "LSTM", "GRU")
T, B, I, H = 5, 3, 3, 4  # noqa: E741


class Case(NamedTuple):
    """A layer to be checked: its class and options, and whether it is called with ragged input."""

    kind: type[nn.Module]
    options: dict[str, Any]
    ragged: bool = False

    def layer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = self.kind(I, H, **self.options)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.4)
        return layer.to(dtype)

    def arguments(self, T: int = T, B: int = B) -> dict[str, Tensor]:
        if not self.ragged:
            return {}
        generator = torch.Generator().manual_seed(T)
        return {
            "lengths": torch.randint(0, T + 1, (B,), generator=generator),
            "resets": torch.rand(T, B, generator=generator) < 0.2,
        }


class Wrapped(nn.Module):
    """The layer inside a larger model, which hands on everything."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> Any:
        ragged = {"lengths": lengths, "resets": resets}
        given = {name: value for name, value in ragged.items() if value is not None}
        return self.layer(input, **given)


class MissingPackageError(Exception):
    """What a check needs is not installed."""


def draw(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def stacked(results: Sequence[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def total(results: Any) -> Tensor:
    return torch.stack([leaf.square().sum() for leaf in tree_leaves(results)]).sum()


# ---- checks


def compiles(case: Case, backend: str = "inductor") -> None:
    """Values and gradients of one graph, compiled once for every T and B: its size is not T's."""
    layer = case.layer(torch.float32)
    compiled_graphs = []
    inner = torch._dynamo.lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Any:
        compiled_graphs.append(graph)
        return inner(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(Wrapped(layer), fullgraph=True, dynamic=True, backend=counting)
    plain = Wrapped(layer)
    first = 0
    for sizes in ((7, 2), (9, 6), (5, 8), (70, 5)):  # at first none that equals another size
        x = draw(*sizes, I, dtype=torch.float32)
        results = []
        for call in (compiled, plain):
            input = x.clone().requires_grad_()
            output = call(input, **case.arguments(*sizes))
            gradients = torch.autograd.grad(total(output), [input, *layer.parameters()])
            results.append((output, gradients))
        assert_same(results[0], results[1], tolerance=1e-5)
        first = first or len(compiled_graphs)
    if len(compiled_graphs) != first:
        raise AssertionError(f"{len(compiled_graphs)} compilations instead of {first}")


def _exported(case: Case) -> tuple[nn.Module, Any]:
    model = Wrapped(case.layer(torch.float32)).eval()
    sizes = {"T": torch.export.Dim("T", min=2, max=512), "B": torch.export.Dim("B", min=2, max=64)}
    shapes: dict[str, Any] = {"input": {0: sizes["T"], 1: sizes["B"]}}
    if case.ragged:
        shapes |= {"lengths": {0: sizes["B"]}, "resets": {0: sizes["T"], 1: sizes["B"]}}
    with torch.no_grad():
        program = torch.export.export(
            model, (draw(T, B, I, dtype=torch.float32),), case.arguments(), dynamic_shapes=shapes
        )
    return model, program


def _same_at_other_sizes(case: Case, found: Callable[..., Any], expected: nn.Module) -> None:
    for sizes in ((9, 2), (2, 7)):
        x, arguments = draw(*sizes, I, dtype=torch.float32), case.arguments(*sizes)
        with torch.no_grad():
            assert_same(found(x, **arguments), expected(x, **arguments), tolerance=1e-5)


def exports(case: Case) -> None:
    """``torch.export`` with dynamic T and B, run at other sizes."""
    model, program = _exported(case)
    _same_at_other_sizes(case, program.module(), model)


def packages(case: Case) -> None:
    """An AOTInductor package, loaded and run at other sizes."""
    model, program = _exported(case)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "model.pt2")
        )
        _same_at_other_sizes(case, torch._inductor.aoti_load_package(path), model)


def exports_to_onnx(case: Case) -> None:
    """ONNX's own operator, by torch's exporter, run by onnxruntime at other sizes."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(error.name) from error
    import fused_rnn

    model = Wrapped(case.layer(torch.float32)).eval()
    arguments = {name: t for name, t in case.arguments().items() if name != "resets"}
    time, batch = torch.export.Dim("T"), torch.export.Dim("B")
    shapes: dict[str, Any] = {"input": {0: time, 1: batch}}
    if arguments:
        shapes["lengths"] = {0: batch}
    program = torch.onnx.export(
        model, (draw(T, B, I, dtype=torch.float32),), kwargs=arguments, dynamo=True, verbose=False,
        dynamic_shapes=shapes, custom_translation_table=fused_rnn.onnx.translation_table(),
    )  # fmt: skip
    assert program is not None
    kind = type(model.layer).__name__
    operators = [node.op_type for node in program.model.graph]
    if kind not in operators:
        raise AssertionError(f"no {kind} among {sorted(set(operators))}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        program.save(path)
        session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    for sizes in ((9, 2), (2, 7)):
        x = draw(*sizes, I, dtype=torch.float32)
        given = {name: t for name, t in case.arguments(*sizes).items() if name != "resets"}
        values = [x.numpy(), *(t.numpy() for t in given.values())]
        found = session.run(None, dict(zip(names, values, strict=True)))
        with torch.no_grad():
            expected = tree_leaves(model(x, **given))
        assert_same([torch.from_numpy(f) for f in found], expected, tolerance=1e-5)


def _in_both_precisions(compute: Callable[[torch.dtype], Any]) -> None:
    """float32 often takes other code than float64, which finite differences need."""
    assert_same(compute(torch.float32), compute(torch.float64), tolerance=2e-4)


def differentiates_twice(case: Case) -> None:
    """``gradgradcheck``, in training and in eval mode; a gradient penalty in float32."""
    layer, arguments = case.layer(), case.arguments(3, 2)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = draw(3, 2, I).requires_grad_()

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=True))
        return tuple(tree_leaves(functional_call(layer, parameters, (x,), arguments)))

    for training in (True, False):
        layer.train(training)
        gradgradcheck(function, (x, *values), fast_mode=True)

    def penalty(dtype: torch.dtype) -> Any:
        layer, x = case.layer(dtype), draw(T, B, I, dtype=dtype).requires_grad_()
        output = layer(x, **case.arguments())
        (slope,) = torch.autograd.grad(total(output), x, create_graph=True)
        return torch.autograd.grad(total(slope), list(layer.parameters()), allow_unused=True)

    _in_both_precisions(penalty)


def _functional(
    case: Case, dtype: torch.dtype = torch.float64
) -> Callable[[dict[str, Tensor], Tensor], Any]:
    layer, arguments = case.layer(dtype), case.arguments()
    return lambda parameters, x: functional_call(layer, parameters, (x,), arguments)


def _parameters(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in case.layer(dtype, seed).named_parameters()}


def vmaps_inputs(case: Case) -> None:
    """``vmap`` over inputs."""
    call, parameters, xs = _functional(case), _parameters(case), draw(4, T, B, I)
    found = vmap(call, (None, 0))(parameters, xs)
    assert_same(found, stacked([call(parameters, x) for x in xs]))


def vmaps_weights(case: Case) -> None:
    """Ensembles: ``vmap`` over ``stack_module_state``, on one input and each on its own."""
    call, xs = _functional(case), draw(3, T, B, I)
    parameters, _ = stack_module_state([case.layer(seed=n) for n in range(3)])
    members = [_parameters(case, n) for n in range(3)]
    found = vmap(call, (0, None))(parameters, xs[0])
    assert_same(found, stacked([call(member, xs[0]) for member in members]))
    gradients = torch.autograd.grad(
        total(vmap(call, (0, 0))(parameters, xs)), list(parameters.values())
    )
    expected = stacked(
        [grad(lambda p, x: total(call(p, x)))(m, x) for m, x in zip(members, xs, strict=True)]
    )
    assert_same(dict(zip(parameters, gradients, strict=True)), expected)


def gives_gradients_per_sample(case: Case) -> None:
    """``vmap(grad)``: every sample's gradient of every weight, for shared and for own weights."""
    call, xs = _functional(case), draw(3, T, B, I)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return total(call(parameters, x))

    parameters = _parameters(case)
    found = vmap(grad(loss, (0, 1)), (None, 0))(parameters, xs)
    assert_same(found, stacked([grad(loss, (0, 1))(parameters, x) for x in xs]))
    members = [_parameters(case, n) for n in range(3)]
    found = vmap(grad(loss), (0, 0))(stacked(members), xs)
    assert_same(found, stacked([grad(loss)(m, x) for m, x in zip(members, xs, strict=True)]))


def differentiates_forward(case: Case) -> None:
    """``jvp`` against finite differences, and ``jacfwd`` against ``jacrev``."""
    call, parameters, x = _functional(case), _parameters(case), draw(T, B, I)
    along = {name: draw(*t.shape) for name, t in parameters.items()}
    along_x, step = draw(T, B, I).flip(0), 1e-6

    def at(distance: float) -> Any:
        moved = {name: t + distance * along[name] for name, t in parameters.items()}
        return call(moved, x + distance * along_x)

    _, found = jvp(call, (parameters, x), (along, along_x))  # type: ignore[misc]
    slope = tree_map(lambda a, b: (a - b) / (2 * step), at(step), at(-step))
    assert_same(found, slope, tolerance=1e-6)

    def output(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = call(parameters, x)[0]
        return result.sum((1, 2))

    assert_same(jacfwd(output)(parameters), jacrev(output)(parameters))

    def tangent(dtype: torch.dtype) -> Any:
        call, parameters = _functional(case, dtype), _parameters(case, dtype=dtype)
        x = draw(T, B, I, dtype=dtype)
        return jvp(lambda x: call(parameters, x), (x,), (x.flip(0),))[1]  # type: ignore[misc]

    _in_both_precisions(tangent)


def has_a_hessian(case: Case) -> None:
    """``hessian``, forward over reverse, against reverse over reverse and reverse over forward."""
    call, parameters, x = _functional(case), _parameters(case), draw(T, B, I)[:, :1]
    if case.ragged:
        call = _functional(case._replace(ragged=False))

    def loss(x: Tensor) -> Tensor:
        return total(call(parameters, x))

    expected = jacrev(jacrev(loss))(x)
    assert_same(hessian(loss)(x), expected)
    assert_same(jacrev(jacfwd(loss))(x), expected)

    def curvature(dtype: torch.dtype) -> Any:
        call = _functional(case._replace(ragged=False), dtype)
        parameters = _parameters(case, dtype=dtype)
        return hessian(lambda x: total(call(parameters, x)))(draw(3, 1, I, dtype=dtype))

    _in_both_precisions(curvature)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def takes_other_weights(case: Case) -> None:
    """Parametrizations, tied and frozen weights, checkpointing: as computed by hand."""
    x, arguments = draw(T, B, I), case.arguments()
    layer, by_hand = case.layer(), case.layer()
    for name in ("weight_hh_l0", "bias_ih_l0"):
        parametrize.register_parametrization(layer, name, _Doubled())
    with torch.no_grad():
        for name in ("weight_hh_l0", "bias_ih_l0"):
            getattr(by_hand, name).mul_(2)
            # What register_parametrization has kept is what was there.
            layer.parametrizations[name].original.copy_(getattr(by_hand, name) / 2)  # type: ignore[index, union-attr]
    results = []
    for each in (layer, by_hand):
        each.requires_grad_(True)
        each.weight_ih_l0.requires_grad_(False)  # type: ignore[union-attr, operator]
        total(each(x, **arguments)[0]).backward()
        results.append(each(x, **arguments))
    assert_same(*results)
    original = layer.parametrizations["weight_hh_l0"].original  # type: ignore[index, union-attr]
    assert_same(original.grad, 2 * by_hand.weight_hh_l0.grad)  # type: ignore[union-attr, operator]
    if layer.weight_ih_l0.grad is not None:  # type: ignore[union-attr]
        raise AssertionError("a frozen weight has a gradient")
    tied = case.layer()
    tied.weight_hh_l1 = tied.weight_hh_l0
    untied = case.layer()
    with torch.no_grad():
        untied.weight_hh_l1.copy_(untied.weight_hh_l0)  # type: ignore[operator, arg-type]
    for each in (tied, untied):
        output = checkpoint.checkpoint(
            lambda x, e=each: e(x, **arguments)[0], x, use_reentrant=False
        )
        total(output).backward()
    assert_same(
        tied.weight_hh_l0.grad, untied.weight_hh_l0.grad + untied.weight_hh_l1.grad  # type: ignore[union-attr, operator]
    )  # fmt: skip


CHECKS: dict[str, Callable[[Case], None]] = {
    "torch.compile, dynamic T and B": compiles,
    "torch.export, dynamic T and B": exports,
    "AOTInductor package": packages,
    "ONNX, dynamic T and B": exports_to_onnx,
    "double backward": differentiates_twice,
    "vmap over inputs": vmaps_inputs,
    "vmap over weights (ensembles)": vmaps_weights,
    "vmap(grad), per-sample gradients": gives_gradients_per_sample,
    "jvp, jacfwd, jacrev": differentiates_forward,
    "hessian": has_a_hessian,
    "parametrized, tied, frozen weights": takes_other_weights,
}


@contextmanager
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What vmap says where it has no rule and calls one by one.
        warnings.filterwarnings("error", message=".*(performance drop|fallback|batching rule).*")
        yield


def run(name: str, case: Case) -> str | None:
    """What went wrong, or None. Raises MissingPackageError if that cannot be told here."""
    try:
        with _strict():
            CHECKS[name](case)
    except MissingPackageError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}"
    return None


def table(
    libraries: dict[str, Any], announce: Callable[[str], None]
) -> Iterator[tuple[str, str, str, str | None]]:
    """Runs every check on every library's cells: check, library, cell, and what went wrong."""
    for name in CHECKS:
        for library, module in libraries.items():
            for cell in CELLS:
                announce(f"{name}: {library}.{cell}")
                case = Case(getattr(module, cell), {"num_layers": 2, "bidirectional": True})
                try:
                    yield name, library, cell, run(name, case)
                except MissingPackageError as error:
                    yield name, library, cell, f"not installed: {error}"


# ---- what they cost


class Cost(NamedTuple):
    """A time over another's: ``what``, of which library's cell, the ratio and its quartiles."""

    what: str
    library: str
    cell: str
    ratio: float
    low: float
    high: float


PENALTY = "step with gradient penalty / step"
ENSEMBLE = "loop over 16 members / vmap over weights"
PER_SAMPLE = "loop over 16 samples / vmap(grad)"


def costs(
    libraries: dict[str, Any], budget_s: float, announce: Callable[[str], None]
) -> Iterator[Cost]:
    """Times in turns, on results that agree.

    A gradient penalty at T=64, B=16, I=64, H=128: forward, gradient of the input, and the gradient
    of (its norm - 1)^2; over forward and the gradient of everything. vmap, ours alone, at T=100,
    B=4, I=H=64 and T=50, B=1, I=H=64: forward and the gradient of all weights.
    """
    for library, module in libraries.items():
        for cell in CELLS:
            announce(f"{PENALTY}: {library}.{cell}")
            yield _cost(PENALTY, library, cell, _penalty_runs(getattr(module, cell)), budget_s)
    for cell in CELLS:
        kind = getattr(libraries["fused_rnn"], cell)
        for what, runs in ((ENSEMBLE, _ensemble_runs(kind)), (PER_SAMPLE, _sample_runs(kind))):
            announce(f"{what}: {cell}")
            yield _cost(what, "fused_rnn", cell, runs, budget_s)


def _cost(
    what: str, library: str, cell: str, runs: dict[str, Callable[[], Any]], budget_s: float
) -> Cost:
    turns = timing.take_turns(runs, torch.device("cpu"), timing.Effort(budget_s))
    low, middle, high = turns.ratios(*runs)
    return Cost(what, library, cell, middle, low, high)


def _penalty_runs(kind: type[nn.Module]) -> dict[str, Callable[[], Any]]:
    layer = kind(64, 128)
    x = draw(64, 16, 64, dtype=torch.float32).requires_grad_()
    everything = [x, *layer.parameters()]

    def step(layer: nn.Module = layer, x: Tensor = x) -> Any:
        return torch.autograd.grad(layer(x)[0].sum(), everything)

    def penalty(layer: nn.Module = layer, x: Tensor = x) -> Any:
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        loss = (slope.norm(dim=-1) - 1).square().mean()
        return torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)

    exact = copy.deepcopy(layer).double()
    found = [g for g in penalty() if g is not None]
    expected = [g for g in penalty(exact, x.detach().double().requires_grad_()) if g is not None]
    assert_same(found, expected, tolerance=1e-4)
    return {"penalty": penalty, "step": step}


def _ensemble_runs(kind: type[nn.Module]) -> dict[str, Callable[[], Any]]:
    members = [kind(64, 64) for _ in range(16)]
    parameters, _ = stack_module_state(members)
    x = draw(100, 4, 64, dtype=torch.float32)

    def together() -> Any:
        outputs = vmap(lambda p, x: functional_call(members[0], p, (x,))[0], (0, None))(
            parameters, x
        )
        return torch.autograd.grad(outputs.square().sum(), list(parameters.values()))

    def loop() -> Any:
        found = [
            torch.autograd.grad(member(x)[0].square().sum(), list(member.parameters()))
            for member in members
        ]
        return [torch.stack(of_all) for of_all in zip(*found, strict=True)]

    assert_same(together(), loop(), tolerance=1e-4)
    return {"loop": loop, "vmap": together}


def _sample_runs(kind: type[nn.Module]) -> dict[str, Callable[[], Any]]:
    layer = kind(64, 64)
    parameters = {name: t.detach() for name, t in layer.named_parameters()}
    xs = draw(16, 50, 1, 64, dtype=torch.float32)
    slope = grad(lambda p, x: functional_call(layer, p, (x,))[0].square().sum())

    def together() -> Any:
        return list(vmap(slope, (None, 0))(parameters, xs).values())

    def loop() -> Any:
        own = list(layer.parameters())
        found = [torch.autograd.grad(layer(x)[0].square().sum(), own) for x in xs]
        return [torch.stack(of_all) for of_all in zip(*found, strict=True)]

    assert_same(together(), loop(), tolerance=1e-4)
    return {"loop": loop, "vmap": together}
