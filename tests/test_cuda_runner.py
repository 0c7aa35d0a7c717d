"""The words of csrc/cuda/device.cuh, and the runner that executes kernels on the CPU.

``tests/cuda_on_cpu/kernels.cu`` uses every word. Here its kernels give the right numbers under
many schedules, and every fault planted in them is found. On a machine with CUDA the same functions,
built by nvcc, must give the same numbers (tests marked ``cuda``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import native
import pytest
import torch
from torch import Tensor

SOURCE = Path(native.ROOT, "tests", "cuda_on_cpu", "kernels.cu")
SEEDS = range(20)


class Buffer(ctypes.Structure):
    """As in tests/cuda_on_cpu/buffer.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("written", ctypes.c_int),
    ]


class Library:
    """The functions of kernels.cu in a shared library, for tensors on one device."""

    def __init__(self, path: Path, device: str):
        self.device = device
        self.functions = ctypes.CDLL(str(path))

    def __call__(self, function: str, inputs: list[Tensor], outputs: list[Tensor], *sizes: int):
        """Runs it and returns the outputs; ``outputs`` say only shape and dtype."""
        given = [t.to(self.device) for t in inputs]
        made = [torch.empty_like(t, device=self.device) for t in outputs]
        buffers = [
            Buffer(t.data_ptr(), t.nbytes, f"buffer {i}".encode(), i < len(given))
            for i, t in enumerate([*given, *made])
        ]
        call = getattr(self.functions, function)
        call.restype = ctypes.c_char_p
        message = call(*buffers, *(ctypes.c_int64(size) for size in sizes))
        if message is not None:
            raise RuntimeError(message.decode())
        return [t.cpu() for t in made]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: sums and products of them are exact in any order."""
    return torch.randint(-4, 5, shape).to(dtype)


def like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def block_sum(run: Library) -> None:
    for rows, n, blocks in ((1, 1, 1), (5, 300, 2), (3, 129, 3)):
        x = numbers(rows, n)
        equal(run("block_sum", [x], [like(rows)], rows, n, blocks)[0], x.sum(1))


def total(run: Library) -> None:
    for n, blocks in ((1, 1), (100, 3), (65, 7)):
        x = numbers(n)
        outputs = [like(blocks), like(1, dtype=torch.int32), like(1)]
        equal(run("total", [x], outputs, n, blocks)[2], x.sum().view(1))


def transpose(run: Library) -> None:
    for dtype, code in ((torch.float64, 1), (torch.bfloat16, 2)):
        for m, n in ((1, 1), (33, 31), (40, 65)):
            x = torch.randn(m, n).to(dtype)
            equal(run("transpose", [x], [like(n, m, dtype=dtype)], m, n, code)[0], x.T)


def hand_over(run: Library) -> None:
    for n, blocks, fenced in ((1, 1, 0), (70, 5, 0), (70, 4, 1)):
        start = numbers(n)
        outputs = [like(blocks, n), like(blocks, dtype=torch.int32)]
        found = run("hand_over", [start], outputs, n, blocks, fenced)[0]
        equal(found, start * 2.0 ** torch.arange(blocks).unsqueeze(1))


def hand_over_tagged(run: Library) -> None:
    for n, blocks in ((1, 1), (50, 4)):
        start, groups = numbers(n), (n + 2) // 3
        v = run("hand_over_tagged", [start], [like(blocks, groups, 4)], n, blocks)[0]
        found = v[:, :, :3].reshape(blocks, -1)[:, :n]
        equal(found, start * 2.0 ** torch.arange(blocks).unsqueeze(1))
        assert (v[:, :, 3].contiguous().view(torch.int32) == 7).all()


@functools.cache
def recurrence(H: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight, initial and result of grid_steps and cluster_steps, the last in float64."""
    generator = torch.Generator().manual_seed(H)
    weight = torch.randn(H, H, generator=generator) / H**0.5
    initial = torch.randn(H, generator=generator)
    y = initial.double()
    for _ in range(T):
        y = weight.double() @ y
        y = y / (1 + y.abs())
    return weight, initial, y


STEPS = [(1, 0, 1), (1, 3, 1), (19, 5, 3), (40, 4, 2)]
CLUSTER_STEPS = [(H, T, max(blocks, 2)) for H, T, blocks in STEPS]


def check_steps(H: int, T: int, found: Tensor) -> None:
    torch.testing.assert_close(found.double(), recurrence(H, T)[2], rtol=1e-5, atol=1e-6)


def grid_steps(run: Library) -> None:
    for H, T, blocks in STEPS:
        outputs = [like(2, H), like(H)]
        found = run("grid_steps", list(recurrence(H, T)[:2]), outputs, H, T, blocks)
        check_steps(H, T, found[1])


def grid_steps_tagged(run: Library) -> None:
    for H, T, blocks in STEPS:
        outputs = [like(2, (H + 2) // 3, 4), like(H)]
        found = run("grid_steps_tagged", list(recurrence(H, T)[:2]), outputs, H, T, blocks)
        check_steps(H, T, found[1])


def cluster_steps(run: Library) -> None:
    for exchange in range(3):
        for H, T, blocks in CLUSTER_STEPS:
            inputs = list(recurrence(H, T)[:2])
            found = run("cluster_steps", inputs, [like(H)], H, T, blocks, exchange)
            check_steps(H, T, found[0])


def cluster_words(run: Library) -> None:
    for blocks, cluster in ((2, 2), (6, 3)):
        integers = functools.partial(like, dtype=torch.int32)
        ring, counts = run("cluster_words", [], [integers(blocks, 7), integers(blocks)],
                           blocks, cluster)  # fmt: skip
        left = (torch.arange(blocks) % cluster - 1) % cluster
        equal(ring, (1000 * left.unsqueeze(1) + torch.arange(7)).int())
        equal(counts, torch.full((blocks,), cluster * 2080, dtype=torch.int32))


def cluster_chain(run: Library) -> None:
    for blocks, cluster in ((1, 1), (10, 5)):
        (values,) = run("cluster_chain", [], [like(blocks, dtype=torch.int32)], blocks, cluster)
        equal(values, (1 + torch.arange(blocks) % cluster).int())


MATRIX_TYPES = ((torch.float32, 0), (torch.bfloat16, 2), (torch.float16, 3))


def mma_product(run: Library) -> None:
    for dtype, code in MATRIX_TYPES:
        for m, n, k in ((1, 1, 1), (17, 9, 21), (16, 8, 32)):
            a, b = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype)
            found = run("mma_product", [a, b], [like(m, n)], m, n, k, code)[0]
            equal(found, a.float() @ b.float())


def mma_pipeline(run: Library) -> None:
    for dtype, code in MATRIX_TYPES[1:]:
        for m, n, k in ((1, 8, 8), (33, 24, 40), (32, 16, 64)):
            a, b = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype)
            found = run("mma_pipeline", [a, b], [like(m, n)], m, n, k, code)[0]
            equal(found, a.float() @ b.float())


def bulk_sum(run: Library) -> None:
    for rows, n in ((1, 4), (2, 4 * 1024 + 8)):
        x = numbers(rows, n)
        equal(run("bulk_sum", [x], [like(rows)], rows, n)[0], x.sum(1))


def ping_pong(run: Library) -> None:
    for turns in (0, 1, 8):
        equal(run("ping_pong", [], [like(1, dtype=torch.int64)], turns)[0], torch.tensor([turns]))


def words(run: Library) -> None:
    n = 128
    x = torch.randn(n).add(0.01)
    x[32:64] = x[32:64].abs() + 0.1  # a warp that votes as one
    integers = functools.partial(like, dtype=torch.int32)
    outputs = [like(11, n), integers(3, n), like(n, dtype=torch.float64),
               like(1, dtype=torch.int64), integers(1)]  # fmt: skip
    floats, counts, wide, total, sign = run("words", [x], outputs, n, 77)
    exact = x.double()
    functions = (exact.exp(), exact.exp2(), exact.tanh(), 1 / exact)
    for found, expected in zip(floats[:4], functions, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)
    assert ((floats[4] >= 0) & (floats[4] < 1)).all() and len(floats[4].unique()) > n - 2
    i = torch.arange(n)
    equal(floats[5], x[i // 32 * 32 + 31 - i % 32])
    equal(floats[6], x[i ^ 5])
    equal(floats[7], torch.where(i % 32 < 29, x[(i + 3) % n], x))
    equal(floats[8], x[i ^ 1])
    equal(floats[9], x.flip(0))
    equal(floats[10], x.view(2, -1).flip(1).flatten())
    votes = (x > 0).view(-1, 32)
    ballots = (votes.long() << torch.arange(32)).sum(1).repeat_interleave(32)
    equal(counts[0].long() & 0xFFFFFFFF, ballots)
    equal(counts[1].long(), (votes.any(1) + 2 * votes.all(1).long()).repeat_interleave(32))
    equal(counts[2].sort().values.long(), i)
    equal(wide, 1.0 / 3 + torch.where(i % 32 < 16, x[(i + 16) % n], x).double())
    equal(total, torch.tensor([n * 2**32 + n * (n - 1) // 2]))
    equal(sign.long(), torch.where(x < 0, -1, 1).sum().view(1))


KERNELS: dict[str, Callable[[Library], None]] = {
    case.__name__: case
    for case in (
        block_sum, total, transpose, hand_over, hand_over_tagged, grid_steps, grid_steps_tagged,
        cluster_steps, cluster_words, cluster_chain, mma_product, mma_pipeline, bulk_sum,
        ping_pong, words,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def cpu() -> Library:
    return Library(native.kernels_on_cpu(), "cpu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_under_many_schedules(cpu, kernel):
    for seed in SEEDS:
        cpu.functions.cuda_on_cpu_seed(ctypes.c_uint64(seed))
        KERNELS[kernel](cpu)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_on_a_gpu(kernel):
    """The host twins mean what the words mean."""
    needs_clusters = kernel.startswith(("cluster", "bulk"))
    if needs_clusters and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters and transaction barriers exist from sm_90 on")
    KERNELS[kernel](Library(native.kernels_on_gpu(), "cuda"))


@pytest.mark.parametrize(
    ("exchange", "word"), [(0, "store_async"), (1, ""), (2, "remote_shared")], ids=str
)
def test_a_cluster_of_one_is_refused(cpu, exchange, word):
    """What PTX leaves undefined there; without it, a block on its own is a cluster like others."""
    H, T = 19, 5
    call = functools.partial(
        cpu, "cluster_steps", list(recurrence(H, T)[:2]), [like(H)], H, T, 1, exchange
    )
    if not word:
        check_steps(H, T, call()[0])
        return
    where = rf"{word} at \S*kernels.cu:\d+ in a cluster of one block"
    with pytest.raises(RuntimeError, match=rf"{where}: expected %cluster_nctarank > 1"):
        call()


def hang(run: Library, at_barrier: int) -> None:
    run("hang", [], [like(4, dtype=torch.int32)], 2, at_barrier)


@pytest.mark.parametrize("at_barrier", [0, 1])
def test_a_hang_is_an_error(cpu, at_barrier):
    with pytest.raises(RuntimeError, match="deadlock"):
        hang(cpu, at_barrier)


@pytest.mark.cuda
@pytest.mark.parametrize("at_barrier", [0, 1])
def test_a_hang_is_an_error_on_a_gpu(at_barrier):
    """In a process of its own, for which the device is lost."""
    if at_barrier and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("transaction barriers exist from sm_90 on")
    script = (
        "import native, test_cuda_runner as t\n"
        f"t.hang(t.Library(native.kernels_on_gpu(), 'cuda'), {at_barrier})"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert "device-side assert triggered" in run.stderr
    assert "hand-over:7: Watchdog: block: [0,0,0]" in run.stdout + run.stderr


def test_all_recurrences_agree_bitwise(cpu):
    H, T, blocks = 40, 4, 2
    inputs = list(recurrence(H, T)[:2])
    expected = cpu("grid_steps", inputs, [like(2, H), like(H)], H, T, blocks)[1]
    tagged = [like(2, (H + 2) // 3, 4), like(H)]
    equal(cpu("grid_steps_tagged", inputs, tagged, H, T, blocks)[1], expected)
    for exchange in range(3):
        equal(cpu("cluster_steps", inputs, [like(H)], H, T, blocks, exchange)[0], expected)


def test_a_seed_is_a_schedule(cpu):
    """The same seed runs threads in the same order, another one in another."""

    def schedule(seed: int) -> int:
        cpu.functions.cuda_on_cpu_seed(ctypes.c_uint64(seed))
        torch.manual_seed(0)
        hand_over(cpu)
        cpu.functions.cuda_on_cpu_schedule.restype = ctypes.c_uint64
        return cpu.functions.cuda_on_cpu_schedule()

    digests = [schedule(seed) for seed in SEEDS]
    assert digests == [schedule(seed) for seed in SEEDS]
    assert len(set(digests)) == len(SEEDS)


# Faults. All are planted in one copy of kernels.cu, each behind a number that a test sets: deleted
# lines behind the line's number, changed ones behind numbers from 10000.

DELETED = re.compile(
    r"((?:sync_|cluster_sync|cluster_wait|grid_sync|fence|barrier_|wait_until|store_release"
    r"|copy_async_wait).*;) *// (.*)"
)
# What the message must be, by the comment of the deleted line. Of the others any will do that
# names a line of the kernel.
EXPECTED = {
    "the tile is whole": r"(race on|read of) 'tile of block .*\n  (read )?by thread",
    "y_{t+1} is whole": r"(race on|read of) 'buffer 2' byte \d+",
    "after v[i] and": r"deadlock: no thread can run\n +\d+ wait for a flag at \S+:\d+, 'buffer 2'",
    "the value of an even block": r"race on 'value of block .*\n  read by thread 0",
    "the slice is written": r"race on 'dynamic shared.*\n  read by an asynchronous copy",
    "copies know the barriers": r"race on 'filled of block",
    "the phase ends when": r"deadlock: no thread can run\n +\d+ wait for a barrier at",
    "the others' copies have read": r"whose block has exited",
}
# What stands there, what stands there when {planted}, what the message must be.
CHANGED = [
    (
        "sync_threads();  // the tile is whole",
        "if (!{planted} || thread_index() < 40) sync_threads();  // the tile is whole",
        r"divergent barrier: thread \d+ of block \(0, 0, 0\) has returned and others wait for it",
    ),
    (
        "row < m && column < n)  // inside x",
        "row < m + {planted} && column < n)  // inside x",
        r"out of bounds: read of \d bytes, \d+ past 'buffer 0' byte",
    ),
    (
        "row < n && column < m)  // inside y",
        "row < n && column < m + {planted})  // inside y",
        r"which nothing has written|race on 'buffer 1'|out of bounds: write",
    ),
    (
        "if (i == 0) counter[0] = 0;",
        "if (i == 0 && !{planted}) counter[0] = 0;",
        r"read of 'counter of block \(0, 0, 0\)' byte 0, which nothing has written",
    ),
    (
        "element(a, row + i % 2 * 8, at + i / 2 * 4, m, k)",
        "({planted} ? element(a, row + i / 2 * 8, at + i % 2 * 4, m, k)"
        " : element(a, row + i % 2 * 8, at + i / 2 * 4, m, k))",
        r"Tensor-likes are not equal",
    ),
    (
        "two(element(b, at + i * 8, column, k, n),",
        "{planted} ? two(element(b, column, at + i * 8, k, n), S{0})"
        " : two(element(b, at + i * 8, column, k, n),",
        r"Tensor-likes are not equal",
    ),
]


@dataclasses.dataclass(frozen=True)
class Fault:
    number: int
    kernel: str
    lines: range  # of the kernel
    comment: str
    expected: str

    def __str__(self) -> str:
        return f"{self.kernel}:{self.comment.replace(' ', '_')}"


def plant() -> tuple[list[Fault], str]:
    """The faults, and the source that holds them all."""
    text = SOURCE.read_text().splitlines()
    begins = {n: m[1] for n, line in enumerate(text, 1)
              if (m := re.match(r"KERNEL void (\w+)_kernel\(", line))}  # fmt: skip
    ends = [*list(begins)[1:], len(text) + 1]
    kernels = {range(b, e): begins[b] for b, e in zip(begins, ends, strict=True)}
    faults, planted = [], []
    changed = set()
    for number, line in enumerate(text, 1):
        lines, kernel = next(((r, k) for r, k in kernels.items() if number in r), (range(0), ""))
        for i, (old, new, expected) in enumerate(CHANGED):
            if old in line:
                faults.append(Fault(10000 + i, kernel, lines, f"change {i}", expected))
                line = line.replace(old, new.replace("{planted}", f"(planted == {10000 + i})"))
                changed.add(i)
        if deleted := DELETED.fullmatch(text[number - 1].strip()):
            comment = deleted[2]
            expected = [e for start, e in EXPECTED.items() if comment.startswith(start)]
            faults.append(Fault(number, kernel, lines, comment, (expected or [""])[0]))
            line = f"if (planted != {number}) {{ {line.split('  // ')[0]} }}"
        planted.append(line)
    assert changed == set(range(len(CHANGED))), "a line that CHANGED quotes is not there"
    return faults, "\n".join(planted) + "\n"


FAULTS, FAULTY_SOURCE = plant()


@pytest.fixture(scope="module")
def faulty() -> Library:
    return Library(native.kernels_on_cpu(native.planted(SOURCE, FAULTY_SOURCE)), "cpu")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault_is_found(faulty, fault):
    """Under one of the seeds, with a message that leads to the kernel's lines."""
    faulty.functions.plant(fault.number)
    for seed in SEEDS:
        faulty.functions.cuda_on_cpu_seed(ctypes.c_uint64(seed))
        try:
            KERNELS[fault.kernel](faulty)
        except (RuntimeError, AssertionError) as error:
            message = str(error)
            break
    else:
        pytest.fail(f"not found under {len(SEEDS)} seeds")
    print(message)
    assert re.search(fault.expected, message)
    if "not equal" not in message and "not close" not in message:
        named = re.findall(r"kernels\.cu:(\d+)", message)
        assert any(int(line) in fault.lines for line in named)


def test_without_a_fault_the_copy_is_right(faulty):
    faulty.functions.plant(0)
    for kernel in KERNELS.values():
        kernel(faulty)


def test_every_expected_message_has_its_fault():
    comments = [fault.comment for fault in FAULTS]
    assert all(any(c.startswith(start) for c in comments) for start in EXPECTED)
