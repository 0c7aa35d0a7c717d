"""Threads, processes, autocast, grad modes, long and wide runs: what surrounds a call."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset

import fused_rnn

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
T, B, I, H = 12, 6, 8, 24  # noqa: E741
PATIENCE = 30  # seconds after which a run counts as hung

layers = pytest.mark.parametrize("name", LAYERS)
every = pytest.mark.parametrize("name", LAYERS + CELLS)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


def input_for(name, dtype=torch.float32):
    shape = (32, I) if name in CELLS else (T, B, I)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def work(layer, x):
    """Outputs and the gradients of every parameter and of the input."""
    x = x.detach().requires_grad_()
    outputs = flat(layer(x))
    loss = sum(t.square().sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def rms(difference):
    return difference.double().square().mean().sqrt().item()


# Threads


@every
@pytest.mark.parametrize("threads", [1, 2])
def test_one_module_in_several_threads(name, threads):
    torch.set_num_threads(threads)
    args = (I, H) if name in CELLS else (I, H, 2)
    module = getattr(fused_rnn, name)(*args)
    inputs = [torch.randn_like(input_for(name)) for _ in range(6)]
    expected = [work(module, x) for x in inputs]
    barrier = threading.Barrier(4)

    def run(worker):
        barrier.wait(PATIENCE)
        return [work(module, x) for _ in range(4) for x in inputs[worker:] + inputs[:worker]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4), timeout=PATIENCE))
    for worker, results in enumerate(found):
        wanted = (expected[worker:] + expected[:worker]) * 4
        for result, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(result, want, rtol=0, atol=0)


@layers
def test_thread_count_changes_meanwhile(name):
    layer = getattr(fused_rnn, name)(I, 48, bidirectional=True).double()
    x = torch.randn(20, 1, I, dtype=torch.float64)
    expected = work(layer, x)
    stop = threading.Event()

    def change():
        count = 0
        while not stop.is_set():
            torch.set_num_threads(1 + count % 3)
            count += 1
            time.sleep(0.001)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lambda: [work(layer, x) for _ in range(15)]) for _ in range(2)]
            for run in runs:
                for result in run.result(PATIENCE):
                    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    finally:
        stop.set()
        changer.join(PATIENCE)


@layers
def test_thread_counts_agree(name):
    layer = getattr(fused_rnn, name)(I, 65, 2, bidirectional=True).double()
    for batch in (1, 3, 17):
        x = torch.randn(T, batch, I, dtype=torch.float64)
        torch.set_num_threads(1)
        expected = work(layer, x)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            torch.testing.assert_close(work(layer, x), expected, rtol=0, atol=0)


@layers
def test_scratch_that_is_kept(name):
    """What one call leaves in memory, smaller and larger ones find."""
    assert fused_rnn._C.keep_scratch(64 << 20) == 0  # conftest.py
    sizes = (5, 64, 3, 200, 17)
    runs = [(getattr(fused_rnn, name)(I, size), torch.randn(T, B, I)) for size in sizes]
    kept = [work(layer, x) for layer, x in runs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda run: work(*run), runs * 4, timeout=PATIENCE))
    assert fused_rnn._C.keep_scratch(0) == 64 << 20
    fresh = [work(layer, x) for layer, x in runs]
    torch.testing.assert_close(kept, fresh, rtol=0, atol=0)
    torch.testing.assert_close(together, fresh * 4, rtol=0, atol=0)


@layers
def test_repeats_are_bitwise_equal(name):
    torch.set_num_threads(2)
    layer = getattr(fused_rnn, name)(I, H, 2, dropout=0.3, bidirectional=True)
    for batch in (1, B):
        x = torch.randn(T, batch, I)
        runs = []
        for _ in range(10):
            torch.manual_seed(5)
            runs.append(work(layer, x))
        assert all(same(run, runs[0]) for run in runs)


def test_backward_in_another_thread():
    layer = fused_rnn.LSTM(I, H)
    x = input_for("LSTM")
    expected = work(layer, x)[3:]
    inside = x.clone().requires_grad_()
    loss = sum(t.square().sum() for t in flat(layer(inside)))
    with ThreadPoolExecutor(1) as pool:
        leaves = [inside, *layer.parameters()]
        assert same(pool.submit(torch.autograd.grad, loss, leaves).result(PATIENCE), expected)


def test_grad_mode_belongs_to_the_thread():
    layer = fused_rnn.GRU(I, H)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: layer(input_for("GRU"))[0].requires_grad).result(PATIENCE)
        assert not layer(input_for("GRU"))[0].requires_grad


# Processes


def wait_for(pid):
    """The exit status of a child; a hung one is killed and gives None."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@layers
def test_forked_child(name):
    """As in torch's loader workers the child takes one thread: OpenMP's do not survive a fork."""
    torch.set_num_threads(2)
    layer = getattr(fused_rnn, name)(I, 64, bidirectional=True).double()
    x = torch.randn(T, 1, I, dtype=torch.float64)
    expected = work(layer, x)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            torch.testing.assert_close(work(layer, x), expected, rtol=1e-9, atol=1e-11)
            code = 0
        finally:
            os._exit(code)
    assert wait_for(pid) == 0
    assert same(work(layer, x), expected)


def child(layer, x, queue):
    torch.set_num_threads(1)
    queue.put([t.detach().numpy() for t in work(layer, x)])


def run_child(method, layer, x):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=child, args=(layer, x, queue))
    process.start()
    try:
        results = queue.get(timeout=PATIENCE)
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    return [torch.from_numpy(r) for r in results]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            "fork",
            marks=[
                pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
                pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
            ],
        ),
        "spawn",
    ],
)
def test_child_process(method):
    torch.set_num_threads(2)
    layer = fused_rnn.LSTM(I, H, 2, bidirectional=True).double()
    x = input_for("LSTM", torch.float64)
    expected = work(layer, x)
    results = run_child(method, layer, x)
    torch.testing.assert_close(results, [e.detach() for e in expected], rtol=1e-9, atol=1e-11)


def test_fresh_interpreter(tmp_path):
    """A pickled module brings its package with it: the reader need not import it first."""
    layer, x = fused_rnn.GRU(I, H), input_for("GRU")
    (tmp_path / "layer").write_bytes(pickle.dumps((layer, x)))
    code = (
        "import pickle, sys\n"
        "layer, x = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(type(layer).__module__, layer(x)[0].sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "layer")],
        capture_output=True, text=True, timeout=2 * PATIENCE, check=True,
    )  # fmt: skip
    module, value = done.stdout.split()
    assert module.startswith("fused_rnn")
    assert float(value) == pytest.approx(layer(x)[0].sum().item(), rel=1e-4, abs=1e-4)


class Encoded(Dataset):
    """Runs the layer, and its backward, in the loader's workers."""

    def __init__(self, layer):
        self.layer = layer
        self.x = torch.randn(8, T, 1, I)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        output, *_, last = work(self.layer, self.x[index])
        return output.detach(), last.detach()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@layers
def test_loader_workers(name):
    torch.set_num_threads(2)
    dataset = Encoded(getattr(fused_rnn, name)(I, H))
    expected = [dataset[i] for i in range(8)]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, timeout=PATIENCE)
    for found, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-5)


# Autocast


def modules_under_autocast(name):
    made = []
    for source in (nn, fused_rnn):
        torch.manual_seed(0)
        made.append(getattr(source, name)(I, H))
    return made


@every
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_like_torch(name, with_hx, dtype):
    """Same dtypes; error against float64 at most twice torch.nn's; float32 gradients."""
    theirs, ours = modules_under_autocast(name)
    x = input_for(name, dtype)
    args = (x,)
    if with_hx:
        h = torch.randn((32, H) if name in CELLS else (1, B, H)).to(dtype)
        args = (x, (h, h / 2) if name.startswith("LSTM") else h)
    wide = [tuple(t.double() for t in a) if isinstance(a, tuple) else a.double() for a in args]
    exact = flat(copy.deepcopy(theirs).double()(*wide))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = flat(theirs(*args)), flat(ours(*args))
    for e, t, o in zip(exact, a, b, strict=True):
        assert o.dtype == t.dtype
        assert rms(o - e) <= 2 * rms(t - e)
    grads = []
    for module, outputs in ((theirs, a), (ours, b)):
        module.zero_grad()
        outputs[0].float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
        grads.append([p.grad for p in module.parameters()])
    wide_module = copy.deepcopy(theirs).double()
    wide_module.zero_grad()
    flat(wide_module(*wide))[0].square().sum().backward()
    for p, t, o in zip(wide_module.parameters(), *grads, strict=True):
        assert rms(o - p.grad) <= 2 * rms(t - p.grad)


@pytest.mark.parametrize("form", ["dense", "unbatched", "packed", "packed with states"])
@pytest.mark.parametrize(("name", "proj_size"), [("RNN", 0), ("GRU", 0), ("LSTM", 0), ("LSTM", 3)])
def test_autocast_dtypes_of_every_form(name, form, proj_size):
    options = {"proj_size": proj_size} if proj_size else {}
    x = torch.randn(T, B, I)
    lengths = torch.arange(B) % T + 1
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    args = {"dense": (x,), "unbatched": (x[:, 0],)}.get(form, (packed,))
    if form == "packed with states":
        h, c = torch.randn(1, B, proj_size or H), torch.randn(1, B, H)
        args = (packed, (h, c) if name == "LSTM" else h)
    found = []
    for source in (nn, fused_rnn):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, states = getattr(source, name)(I, H, **options)(*args)
        found.append([output.data.dtype, *(t.dtype for t in flat(states))])
    assert found[0] == found[1]


@every
def test_autocast_of_float64(name):
    """A float64 layer stays as it is; a float32 one refuses float64 input as torch.nn's does."""
    theirs, ours = (m.double() for m in modules_under_autocast(name))
    x = input_for(name, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = flat(ours(x)), flat(theirs(x))
        for f, w in zip(found, wanted, strict=True):
            assert f.dtype == w.dtype == torch.float64
            torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-11)
        kinds = []
        for module in (theirs.float(), ours.float()):
            with pytest.raises(Exception) as caught:
                module(x)
            kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@every
def test_autocast_disabled_inside(name):
    theirs, ours = modules_under_autocast(name)
    x = input_for(name)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        found, wanted = flat(ours(x)), flat(theirs(x))
    assert all(t.dtype == torch.float32 for t in found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@layers
def test_backward_outside_and_inside_autocast(name):
    _, layer = modules_under_autocast(name)
    grads = []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(input_for(name))[0].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad for p in layer.parameters()])
    assert same(*grads)


@layers
def test_autocast_of_stacked_ragged_runs(name):
    torch.manual_seed(0)
    layer = getattr(fused_rnn, name)(I, H, 3, bidirectional=True)
    theirs = getattr(nn, name)(I, H, 3, bidirectional=True)
    lengths = torch.tensor([12, 0, 3, 5, 1, 12])
    exact = copy.deepcopy(layer).double()(input_for(name, torch.float64), lengths=lengths)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input_for(name), lengths=lengths)[0]
        assert output.dtype == theirs(input_for(name))[0].dtype
    assert rms(output - exact) < 0.05 * rms(exact)
    assert not output[:, 1].any()


# Grad modes


@every
def test_inference_mode(name):
    module = getattr(fused_rnn, name)(I, H)
    x = input_for(name)
    expected = flat(module(x))
    with torch.inference_mode():
        outputs = flat(module(x))
        inside = x * 1
    assert same(outputs, expected)
    assert all(t.is_inference() and not t.requires_grad for t in outputs)
    module.requires_grad_(False)
    assert same(flat(module(inside)), expected)


@every
def test_grad_after_no_grad(name):
    module = getattr(fused_rnn, name)(I, H)
    x = input_for(name)
    expected = work(module, x)
    with torch.no_grad():
        quiet = flat(module(x))
    assert not any(t.requires_grad for t in quiet)
    assert same(quiet, expected[: len(quiet)])
    assert same(work(module, x), expected)


@layers
def test_truncated_backpropagation(name):
    """State carried over segments, detached: the second segment's graph ends at the seam."""
    grads = []
    for source in (nn, fused_rnn):
        torch.manual_seed(0)
        layer = getattr(source, name)(I, H).double()
        hx = None
        for segment in input_for(name, torch.float64).chunk(3):
            output, hx = layer(segment, hx)
            output.square().sum().backward()
            hx = tuple(h.detach() for h in hx) if name == "LSTM" else hx.detach()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@layers
def test_backward_twice(name):
    layer = getattr(fused_rnn, name)(I, H)
    output, _ = layer(input_for(name))
    loss = output.square().sum()
    parameters = list(layer.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert same(first, torch.autograd.grad(loss, parameters))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@layers
def test_weight_changed_before_backward(name):
    """Never a wrong gradient in silence."""
    layer = getattr(fused_rnn, name)(I, H)
    output, _ = layer(input_for(name))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Sizes


@layers
@pytest.mark.parametrize("threads", [1, 2])
def test_long_and_thin(name, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    theirs = getattr(nn, name)(1, 1).double()
    ours = getattr(fused_rnn, name)(1, 1).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(20000, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(work(ours, x), work(theirs, x), rtol=1e-7, atol=1e-9)


@layers
def test_wide(name):
    torch.set_num_threads(2)
    theirs = getattr(nn, name)(2, 3).double()
    ours = getattr(fused_rnn, name)(2, 3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20011, 2, dtype=torch.float64)
    torch.testing.assert_close(work(ours, x), work(theirs, x), rtol=1e-7, atol=1e-9)


LEAK = """
import resource, sys, torch, fused_rnn
torch.set_num_threads(1)
layer = fused_rnn.LSTM(32, 64, bidirectional=True)
x = torch.randn(30, 8, 32)
def step():
    output, _ = layer(x, lengths=torch.full((8,), 30))
    output.sum().backward()
    try:
        layer(x, lengths=torch.full((8,), 31))
    except RuntimeError:
        pass
def peak():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
for _ in range(20):
    step()
before = peak()
for i in range(200):
    torch.set_num_threads(2 if i % 20 == 0 else 1)
    step()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow():
    """A step saves half a megabyte for its backward: 200 lost ones would show."""
    done = subprocess.run(
        [sys.executable, "-c", LEAK], capture_output=True, text=True, timeout=90, check=True
    )
    assert int(done.stdout) < 32 * 2**20


# Surroundings


@every
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype(name, default):
    module = getattr(fused_rnn, name)(I, H)
    x = input_for(name)
    expected = work(module, x)
    torch.set_default_dtype(default)
    try:
        assert same(work(module, x), expected)
        made = getattr(fused_rnn, name)(I, H)
        assert {p.dtype for p in made.parameters()} == {default}
        assert flat(made(torch.randn(x.shape)))[0].dtype == default
    finally:
        torch.set_default_dtype(torch.float32)


@layers
def test_errors_do_not_poison_later_calls(name):
    torch.set_num_threads(2)
    layer = getattr(fused_rnn, name)(I, H)
    x = input_for(name)
    expected = work(layer, x)
    bad = [
        lambda: layer(torch.randn(T, B, I + 1)),
        lambda: layer(x.double()),
        lambda: layer(x, lengths=torch.full((B,), T + 1)),
        lambda: layer(x, lengths=torch.full((B,), -1)),
        lambda: layer(x, resets=torch.zeros(1, 1, dtype=torch.bool)),
        lambda: layer(x, torch.zeros(7)),
        lambda: layer(x)[0].backward(torch.ones(1)),
    ]
    for call in bad:
        with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
            call()
        assert same(work(layer, x), expected)


def test_error_inside_a_backward_hook():
    layer = fused_rnn.LSTM(I, H)
    x = input_for("LSTM")
    expected = work(layer, x)

    def refuse(grad):
        raise KeyError("hook")

    y = x.clone().requires_grad_()
    handle = layer.weight_hh_l0.register_hook(refuse)
    with pytest.raises(KeyError, match="hook"):
        layer(y)[0].sum().backward()
    handle.remove()
    layer.zero_grad()
    assert same(work(layer, x), expected)


def test_many_layers_alive_at_once():
    x = torch.randn(3, 2, I)
    made = [fused_rnn.GRU(I, H) for _ in range(50)]
    outputs = [layer(x)[0] for layer in made]
    sum(o.sum() for o in outputs).backward()
    for layer, output in zip(made, outputs, strict=True):
        assert torch.equal(layer(x)[0], output)
        assert layer.weight_hh_l0.grad.abs().max() > 0
