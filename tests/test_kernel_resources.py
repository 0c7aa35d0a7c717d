"""Every CUDA kernel compiles for every target, without spills, and takes no more than it did."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import kernel_resources
import pytest
from kernel_resources import ROOT, TARGETS, UPDATE, Kernel, changed, spilling

needs_nvcc = pytest.mark.skipif(
    kernel_resources.nvcc() is None, reason="no nvcc: the CUDA sources are not compiled here"
)


@pytest.fixture(scope="module")
def found() -> kernel_resources.Resources:
    return kernel_resources.measure(kernel_resources.cuda_sources())


@needs_nvcc
def test_no_kernel_spills(found):
    print(kernel_resources.table(found))
    assert all(found[target] for target in TARGETS)
    assert not spilling(found)


@needs_nvcc
def test_no_kernel_takes_more_than_it_did(found):
    release, baseline = kernel_resources.read_baseline()
    if kernel_resources.release() != release:
        pytest.skip(f"{kernel_resources.BASELINE.name} is of nvcc {release}")
    complaints = changed(found, baseline)
    assert not complaints, "\n".join([*complaints, UPDATE])


@needs_nvcc
def test_blocks_of_row_kernels_fit(found):
    """A block has up to 384 threads, of duals 256, and 65536 registers to share, by eights."""
    for kernels in found.values():
        rows = {name: kernel for name, kernel in kernels.items() if "_row_kernel<" in name}
        assert rows
        for name, kernel in rows.items():
            threads = 256 if "dual" in name else 384
            assert kernel.registers <= 65536 // threads // 8 * 8, name


def disassembler() -> str | None:
    """nvdisasm, the one that Triton brings if there is no other."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else []
    bundled = (Path(folder, "backends/nvidia/bin/nvdisasm") for folder in folders)
    return shutil.which("nvdisasm") or next((str(p) for p in bundled if p.exists()), None)


def opcodes(kernel: str, folder: Path) -> list[str]:
    """The machine instructions of one persistent kernel, for sm_90."""
    source, binary = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(
        '#include "cuda/persistent.cuh"\n'
        f"namespace fused_rnn::cuda {{ template __global__ void {kernel}; }}\n"
    )
    nvcc = [kernel_resources.nvcc(), "-std=c++17", "-O3", "-Icsrc", "-cubin"]
    target = "-gencode=arch=compute_90,code=sm_90"
    subprocess.run([*nvcc, target, str(source), "-o", str(binary)], cwd=ROOT, check=True)
    run = subprocess.run(
        [disassembler(), "-c", str(binary)], capture_output=True, text=True, check=True
    )
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]+)", run.stdout)


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm")
@pytest.mark.parametrize("kernel, in_shared", [
    ("forward_kernel<Lstm, MmaProduct<BFloat16>, ClusterStates>"
     "(RecurrenceForwardParams, Layout, ForwardPlaces, Words4*)", 8),
    ("forward_kernel<Lstm, MmaProduct<BFloat16>, GridStates>"
     "(RecurrenceForwardParams, Layout, ForwardPlaces, Words4*)", 8),
    ("backward_kernel<Lstm, MmaProduct<BFloat16>, ClusterSums, 2>"
     "(RecurrenceBackwardParams, Layout, BackwardPlaces, Words4*)", 8),
    ("backward_kernel<Lstm, MmaProduct<BFloat16>, GridSums, 1>"
     "(RecurrenceBackwardParams, Layout, BackwardPlaces, Words4*)", 4),
])  # fmt: skip
def test_weights_stay_in_registers(kernel, in_shared, tmp_path):
    """A step multiplies 16 pieces, two mma each, and loads a slice of h for every four of them."""
    of_interest = {"HMMA", "LDS", "LDSM", "LDG", "LD", "LDL"}
    names = [code.split(".")[0] for code in opcodes(kernel, tmp_path)]
    names = [name for name in names if name in of_interest]
    places = [i for i, name in enumerate(names) if name == "HMMA"]
    resident = names[places[0] : places[31] + 1]
    assert set(resident) <= {"HMMA", "LDS"}
    assert resident.count("LDS") <= 4
    assert len(places) == 32 + in_shared  # in the loop over pieces from shared memory


@needs_nvcc
def test_the_test_kernels_compile_without_spills():
    source = Path(__file__).parent / "cuda_on_cpu" / "kernels.cu"
    found = kernel_resources.measure([source])
    assert all(found[target] for target in TARGETS)
    assert not spilling(found)


# How reports are read and compared

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for 'sm_80'
ptxas info    : Function properties for {kernel}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 3072 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 10.238 ms
ptxas info    : Compiling entry function '{kernel}' for 'sm_90'
ptxas info    : Function properties for {kernel}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for other
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 384 bytes cmem[0]
"""
SYMBOL = (
    "_ZN9fused_rnn4cuda44_GLOBAL__N__ba48c1a8_11_per_step_cu_c054f8d013finish_kernelI"
    "NS_3RnnINS_14TanhActivationEEENS_4HalfEEEvNS_24RecurrenceBackwardParamsE"
    "NS1_13BackwardStateIT0_EE"
)
NAME = "file/finish_kernel<rnn_tanh, fp16>"
KERNELS = {target: {"file/a": Kernel(40, 1024), "file/b": Kernel(32)} for target in TARGETS}


def with_kernel(target: str, name: str, **changes: int) -> kernel_resources.Resources:
    kernel = dataclasses.replace(KERNELS[target].get(name, Kernel(1)), **changes)
    return {**KERNELS, target: {**KERNELS[target], name: kernel}}


def without_kernel(target: str, name: str) -> kernel_resources.Resources:
    return {**KERNELS, target: {k: v for k, v in KERNELS[target].items() if k != name}}


def test_a_report_is_read():
    assert kernel_resources.parse(REPORT.format(kernel=SYMBOL), "file") == {
        "sm_80": {NAME: Kernel(40, 3072)},
        "sm_90": {NAME: Kernel(255, 0, 48, 12)},
        "sm_100": {},
    }


@pytest.mark.parametrize(
    "symbol, name",
    [
        ("_ZN9fused_rnn4cuda14project_kernelIfEEvT_", "project_kernel<fp32>"),
        ("_ZN9fused_rnn4cuda12total_kernelEPKfPf", "total_kernel"),
        (
            "_ZN9fused_rnn4cuda13finish_kernelINS_6VariedINS_8LstmCellILb0ELb1EEEEEdEEvT0_",
            "finish_kernel<lstm_p+, fp64>",
        ),
        (
            "_ZN9fused_rnn4cuda13finish_kernelINS_6VariedINS_3GruEEENS_4DualIdEEEEvT0_",
            "finish_kernel<gru+, dual64>",
        ),
        (
            "_ZN9fused_rnn4cuda12_GLOBAL__N_112steps_kernelILNS1_8ExchangeE2ENS_9NewCell_tEEEvPKf",
            "steps_kernel<Exchange 2, NewCell_t>",
        ),
    ],
)
def test_names_are_readable(symbol, name):
    assert kernel_resources.readable(symbol) == name


def test_no_change_and_less_are_accepted():
    assert changed(KERNELS, KERNELS) == []
    assert changed(with_kernel("sm_80", "file/a", registers=39, shared=0), KERNELS) == []
    assert spilling(KERNELS) == []


@pytest.mark.parametrize(
    "found, complaint",
    [
        (with_kernel("sm_80", "file/a", registers=41), "sm_80 file/a: registers 40 -> 41"),
        (with_kernel("sm_90", "file/b", shared=16), "sm_90 file/b: shared 0 -> 16"),
        (with_kernel("sm_100", "file/c"), "sm_100 file/c: new"),
        (without_kernel("sm_80", "file/b"), "sm_80 file/b: gone"),
    ],
)
def test_more_or_other_kernels_are_not(found, complaint):
    assert changed(found, KERNELS) == [complaint]


def test_a_target_that_is_new_or_gone_is_not():
    fewer = {target: KERNELS[target] for target in list(TARGETS)[1:]}
    assert changed(fewer, KERNELS) == ["sm_80 file/a: gone", "sm_80 file/b: gone"]
    assert changed(KERNELS, fewer) == ["sm_80 file/a: new", "sm_80 file/b: new"]


@pytest.mark.parametrize("changes", [{"spilled": 4}, {"stack": 16}])
def test_spills_and_stack_are_not(changes):
    (complaint,) = spilling(with_kernel("sm_90", "file/a", **changes))
    assert complaint.startswith("sm_90 file/a: ")


def test_the_baseline_is_read_as_written(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_resources, "BASELINE", tmp_path / "baseline.json")
    kernel_resources.BASELINE.write_text(kernel_resources.baseline_text("13.0", KERNELS))
    assert kernel_resources.read_baseline() == ("13.0", KERNELS)
    stored = json.loads(kernel_resources.BASELINE.read_text())
    assert stored["kernels"]["sm_80"]["file/a"] == [40, 1024]


def test_the_table_is_80_columns_wide():
    _, baseline = kernel_resources.read_baseline()
    lines = kernel_resources.table(baseline).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) > len(baseline["sm_80"])
