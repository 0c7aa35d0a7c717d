"""DDP, FSDP2 and distributed checkpoints of our layers: two processes on the CPU, over gloo.

What a test expects is what one process computes from the whole batch; each of the two has half of
its rows. Everything is float64 unless it is about another dtype.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    Named,
    as_tuple,
    assert_close_like_torch,
    assert_equal,
    assert_near,
    dyadic,
    largest,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

RANKS = 2
TIMEOUT = 60  # seconds; of one job, its collectives included
T, B, H = 7, 6, 5
INPUT = 3  # features
LENGTHS = (7, 3, 0, 5, 1, 7)

# The layer's class and options. H, 3 * H and the rows of a projection are odd: uneven shards.
TORCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
}
CASES = TORCHS | {
    "lstm_layer_norm": ("LSTM", {"layer_norm": True}),
    "lstm_coupled": ("LSTM", {"coupled": True, "peephole": True}),
    "gru_heads": ("GRU", {"num_heads": 5}),
}

cases = pytest.mark.parametrize("case", CASES)
torchs_cases = pytest.mark.parametrize("case", TORCHS)


# What runs in a process of its own, or in the test's.


class Batch(NamedTuple):
    input: Tensor  # (T, B, INPUT)
    lengths: Tensor  # (B,)
    resets: Tensor  # (T, B)

    def half(self, rank: int) -> Batch:
        rows = slice(rank * B // RANKS, (rank + 1) * B // RANKS)
        return Batch(self.input[:, rows], self.lengths[rows], self.resets[:, rows])


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Batch(
            dyadic(T, B, INPUT, dtype=dtype), torch.tensor(LENGTHS), torch.rand(T, B) < 0.2
        )


class Model(nn.Module):
    """Our layer, or torch.nn's, as one of several; ``unused`` has no part in the result."""

    def __init__(self, case: str, library: Any = fused_rnn) -> None:
        super().__init__()
        name, options = CASES[case]
        self.before = nn.Linear(INPUT, INPUT)
        self.layer = getattr(library, name)(INPUT, H, num_layers=2, bidirectional=True, **options)
        self.after = nn.Linear(2 * (options.get("proj_size") or H), INPUT)
        self.unused: nn.Module | None = None

    def forward(self, batch: Batch, call: str = "ragged") -> tuple[Tensor, ...]:
        """``call``: "dense", "packed", or "ragged" with lengths and resets."""
        input, lengths, resets = batch
        input = self.before(input)
        if call == "packed":
            # A packed row has at least one step.
            input = pack_padded_sequence(input, lengths.clamp(min=1), enforce_sorted=False)
        options = {"lengths": lengths, "resets": resets} if call == "ragged" else {}
        output, final = self.layer(input, **options)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, total_length=T)
        return (self.after(output), *as_tuple(final))


def build(case: str, seed: int = 0, library: Any = fused_rnn) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(case, library).double()


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """A mean over rows, so that of a batch it is the mean of that of its halves."""
    return torch.stack([(output - 0.25).square().mean() for output in outputs]).sum()


def named(model: nn.Module, gradients: bool = False) -> Named:
    """Parameters, or what they have for gradients, whole wherever they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        t = parameter.grad if gradients else parameter.detach()
        t = torch.zeros_like(parameter).detach() if t is None else t
        t = t.full_tensor() if isinstance(t, DTensor) else t
        found[("grad_" if gradients else "") + name.removeprefix("module.")] = t.clone()
    return found


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int | None = None,
    *,
    seeds: tuple[int, ...] = (0, 1),
    call: str = "ragged",
) -> Named:
    """Gradients and parameters of one step per seed, of the whole batch or of a rank's half."""
    found = {}
    for seed in seeds:
        whole = batch(seed)
        optimizer.zero_grad()
        loss_of(model(whole if rank is None else whole.half(rank), call)).backward()
        gradients = named(model, gradients=True)
        optimizer.step()
        for name, t in (gradients | named(model)).items():
            found[f"step {seed}, {name}"] = t
    return found


def one_process(case: str, call: str = "ragged", library: Any = fused_rnn) -> Named:
    model = build(case, library=library)
    found = train(model, sgd(model), call=call)
    assert all(largest(t) > 0 for t in found.values()), "something does not learn"
    return found


def by_ddp(
    rank: int, case: str, call: str, options: dict[str, bool], synchronized: bool = True
) -> Named:
    model = build(case)
    if options:
        model.unused = nn.Linear(INPUT, INPUT, dtype=torch.float64)
        nn.init.zeros_(model.unused.weight)
        nn.init.zeros_(model.unused.bias)
    parallel = DistributedDataParallel(model, **options)
    with nullcontext() if synchronized else parallel.no_sync():
        found = train(parallel, sgd(parallel), rank, call=call)
    return {name: t for name, t in found.items() if "unused" not in name}


def by_converted_ddp(rank: int, case: str) -> Named:
    model = DistributedDataParallel(build(case, library=nn))
    assert fused_rnn.convert(model) is model
    assert isinstance(model.module.layer, getattr(fused_rnn, CASES[case][0]))
    return train(model, sgd(model), rank)


def shard(model: Model, wrapping: str, **options: Any) -> Model:
    """``wrapping``: each layer a unit of its own, or the whole model one; weights are freed."""
    mesh = init_device_mesh("cpu", (RANKS,))
    if wrapping == "layers":
        for part in (model.before, model.layer, model.after):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, **options)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def local_rows(model: nn.Module) -> list[int]:
    return [len(parameter.to_local()) for parameter in model.parameters()]  # type: ignore[operator]


def by_fsdp(
    rank: int, case: str, call: str, wrapping: str, library: str = "fused_rnn"
) -> tuple[Named, list[int]]:
    model = shard(build(case, library=nn if library == "torch.nn" else fused_rnn), wrapping)
    return train(model, sgd(model), rank, call=call), local_rows(model)


def by_mixed_precision(rank: int, case: str, library: str, seed: int) -> Named:
    """Outputs in bfloat16 and gradients, of float32 weights; outputs of this rank's rows."""
    model = build(case, library=nn if library == "torch.nn" else fused_rnn).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, "layers", mp_policy=policy)
    outputs = model(batch(seed, torch.float32).half(rank), "dense")
    loss_of(tuple(output.float() for output in outputs)).backward()
    return dict(zip("abc", (o.detach() for o in outputs), strict=False)) | named(model, True)


def without_forward_hooks(rank: int, case: str, library: str) -> str:
    """What comes of weights that are still sharded: the exception, by its name and message."""
    model = shard(build(case, library=nn if library == "torch.nn" else fused_rnn), "layers")
    try:
        model.layer.forward(batch(0).half(rank).input)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "computed"


def convert_sharded(rank: int, case: str, wrapping: str) -> tuple[str, bool]:
    """What convert says, and whether the model is as it was and still trains."""
    model = shard(build(case, library=nn), wrapping)
    before = list(model.modules())
    try:
        fused_rnn.convert(model)
        said = "converted"
    except RuntimeError as error:
        said = str(error)
    train(model, sgd(model), rank, call="dense")
    return said, list(model.modules()) == before


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def save(rank: int | None, model: nn.Module, path: str) -> tuple[Named, Named]:
    """Two steps, a checkpoint and one step more; parameters in the checkpoint and what followed."""
    optimizer = adam(model)
    train(model, optimizer, rank)
    kept = named(model)
    dcp.save(checkpoint(model, optimizer), checkpoint_id=path)
    return kept, train(model, optimizer, rank, seeds=(2,))


def load(rank: int | None, model: nn.Module, path: str) -> tuple[Named, Named]:
    """Parameters after loading, and the step that follows."""
    optimizer = adam(model)
    state = checkpoint(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return named(model), train(model, optimizer, rank, seeds=(2,))


def save_sharded(rank: int, case: str, wrapping: str, path: str) -> tuple[Named, Named]:
    return save(rank, shard(build(case), wrapping), path)


def load_sharded(rank: int, case: str, wrapping: str, path: str) -> tuple[Named, Named]:
    return load(rank, shard(build(case, seed=9), wrapping), path)


def fail_on_rank_1(rank: int, how: str) -> None:
    if rank == 0 or how == "hang":
        # Nobody else comes.
        time.sleep(TIMEOUT)
    assert how != "raise", "planted"


# The two processes.


def serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    # As conftest does for the tests' own process: memory that nobody has written is NaN.
    torch.use_deterministic_algorithms(True)
    fused_rnn._C.keep_scratch(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    while (job := pickle.loads(connection.recv_bytes())) is not None:
        function, arguments = job
        try:
            answer = (function(rank, *arguments), None)
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    # What DDP still holds of the group keeps gloo's threads, and one of them aborts the process if
    # it lets go of a finished collective while Python shuts down.
    gc.collect()
    dist.destroy_process_group()


class Processes:
    """Two processes that run one job after another; new ones after a failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = itertools.count()
        self._running: list[tuple[Any, Connection]] = []

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT
    ) -> list[Any]:
        """``function(rank, *arguments)`` of every rank; fails as soon as one does, or at a hang."""
        if not self._running:
            self._start()
        connections = [connection for _, connection in self._running]
        try:
            for connection in connections:
                connection.send_bytes(pickle.dumps((function, arguments)))
            answers: dict[int, Any] = {}
            deadline = time.monotonic() + timeout
            while len(answers) < RANKS:
                waiting = [c for rank, c in enumerate(connections) if rank not in answers]
                ready = wait(waiting, max(0.0, deadline - time.monotonic()))
                assert ready, f"no answer after {timeout} s from {len(waiting)} of {RANKS} ranks"
                for connection in ready:
                    rank = connections.index(connection)
                    answers[rank], error = pickle.loads(connection.recv_bytes())
                    assert error is None, f"rank {rank}:\n{error}"
        except BaseException:
            self.stop(kill=True)
            raise
        return [answers[rank] for rank in range(RANKS)]

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        store = str(self._folder / f"store{next(self._started)}")
        for rank in range(RANKS):
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(rank, store, there), daemon=True)
            process.start()
            there.close()  # else the end of the process would not end the pipe
            self._running.append((process, here))

    def stop(self, kill: bool = False) -> None:
        for process, connection in self._running:
            if kill:
                process.kill()
            else:
                connection.send_bytes(pickle.dumps(None))
        running, self._running = self._running, []
        for process, connection in running:
            process.join(TIMEOUT)
            connection.close()
        codes = [process.exitcode for process, _ in running]
        assert kill or not any(codes), f"exit codes {codes}"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("distributed"))
    yield made
    made.stop()


pytestmark = pytest.mark.usefixtures("one_thread")


# DDP.


@pytest.mark.parametrize("option", [None, "find_unused_parameters", "static_graph"])
@cases
def test_ddp_is_one_process(processes: Processes, case: str, option: str | None) -> None:
    expected = one_process(case)
    for found in processes(by_ddp, case, "ragged", {option: True} if option else {}):
        assert_near(found, expected)


def test_comparison_can_fail(processes: Processes) -> None:
    """Gradients of each rank's own half, not averaged, are seen to differ."""
    expected = one_process("lstm")
    for found in processes(by_ddp, "lstm", "ragged", {}, False):
        for name in expected:
            with pytest.raises(AssertionError, match=r"allowed"):
                assert_near({name: found[name]}, {name: expected[name]})


@torchs_cases
def test_ddp_of_packed_sequences_is_torchs_one_process(processes: Processes, case: str) -> None:
    expected = one_process(case, "packed", nn)
    for found in processes(by_ddp, case, "packed", {}):
        assert_near(found, expected)


def test_convert_of_a_ddp_model(processes: Processes) -> None:
    """The parameters, and with them DDP's hooks, stay the same."""
    for found in processes(by_converted_ddp, "lstm_projected"):
        assert_near(found, one_process("lstm_projected"))


# FSDP2.

wrappings = pytest.mark.parametrize("wrapping", ["layers", "model"])


@wrappings
@cases
def test_fsdp_is_one_process(processes: Processes, case: str, wrapping: str) -> None:
    expected = one_process(case)
    (first, rows), (second, other_rows) = processes(by_fsdp, case, "ragged", wrapping)
    assert_near(first, expected)
    assert_equal(first, second)
    assert rows != other_rows, "no shard is uneven"


@pytest.mark.parametrize("call", ["dense", "packed"])
@torchs_cases
def test_fsdp_is_torchs_fsdp(processes: Processes, case: str, call: str) -> None:
    theirs = processes(by_fsdp, case, call, "layers", "torch.nn")
    ours = processes(by_fsdp, case, call, "layers")
    for (found, rows), (expected, their_rows) in zip(ours, theirs, strict=True):
        assert_near(found, expected)
        assert rows == their_rows


@torchs_cases
def test_fsdp_mixed_precision(processes: Processes, case: str) -> None:
    """Weights gathered in bfloat16, gradients reduced in float32: the tolerance rule."""
    ours, theirs, exact = [], [], []
    for seed in range(4):
        model = build(case).float().double()
        outputs = model(batch(seed), "dense")
        loss_of(outputs).backward()
        gradients = named(model, gradients=True)
        for own, peer, rank in zip(
            processes(by_mixed_precision, case, "fused_rnn", seed),
            processes(by_mixed_precision, case, "torch.nn", seed),
            range(RANKS),
            strict=True,
        ):
            assert own["a"].dtype == torch.bfloat16
            assert own["grad_layer.weight_hh_l1"].dtype == torch.float32
            ours.append(own)
            theirs.append(peer)
            rows = [o.detach().chunk(RANKS, 1)[rank] for o in outputs]
            exact.append(dict(zip("abc", rows, strict=False)) | gradients)
    assert_close_like_torch(ours, theirs, exact)


@torchs_cases
def test_sharded_weights_are_refused(processes: Processes, case: str) -> None:
    """A call that goes around the hooks would compute with a part of the weights."""
    for library in ("fused_rnn", "torch.nn"):
        for said in processes(without_forward_hooks, case, library):
            assert said != "computed" and "rror: " in said


@wrappings
def test_convert_refuses_sharded_layers(processes: Processes, wrapping: str) -> None:
    for said, unchanged in processes(convert_sharded, "lstm", wrapping):
        assert said.startswith("fused_rnn.convert: layer is sharded already"), said
        assert unchanged


# Checkpoints.


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@wrappings
@cases
def test_sharded_checkpoint(processes: Processes, case: str, wrapping: str, tmp_path: Path) -> None:
    """Sharded to sharded, to one process, and back."""
    first, second = str(tmp_path / "sharded"), str(tmp_path / "whole")
    (kept, followed), other = processes(save_sharded, case, wrapping, first)
    assert_equal(kept, other[0])
    for loaded, next_step in processes(load_sharded, case, wrapping, first):
        assert_equal(loaded, kept)
        assert_equal(next_step, followed)

    loaded, next_step = load(None, build(case, seed=9), first)
    assert_equal(loaded, kept)
    assert_near(next_step, followed)

    kept, followed = save(None, build(case, seed=3), second)
    for loaded, next_step in processes(load_sharded, case, wrapping, second):
        assert_equal(loaded, kept)
        assert_near(next_step, followed)


# The processes themselves.


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "rank 1:(.|\n)*planted"), ("hang", "no answer after 3 s")]
)
def test_failures_and_hangs_are_seen(processes: Processes, how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        processes(fail_on_rank_1, how, timeout=20 if how == "raise" else 3)
