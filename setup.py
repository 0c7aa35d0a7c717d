"""Builds fused_rnn._C; everything that is not compiled is declared in pyproject.toml."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from setuptools import setup

os.chdir(Path(__file__).parent)
try:
    import pybind11

    # How csrc is compiled; load_cell compiles it, too.
    recipe = runpy.run_path("fused_rnn/sources.py")
    recipe["expect_torch"]()
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fused_rnn is built against torch 2.10 or later, and with pybind11, setuptools, wheel and "
        f"ninja ({error}). Install those first, then: pip install --no-build-isolation ."
    ) from error


def extension():
    cuda = recipe["with_cuda"]()
    csrc = recipe["csrc"]().relative_to(Path.cwd())
    headers = sorted(str(p) for p in csrc.rglob("*") if p.suffix in (".h", ".cuh"))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return make(
        name="fused_rnn._C",
        sources=[str(csrc / source) for source in recipe["sources"](cuda)],
        extra_compile_args=recipe["flags"](cuda),
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],  # symbols are a tenth of it
        # Before torch's: some torch releases ship a pybind11 that refuses stable-ABI builds.
        include_dirs=[pybind11.get_include()],
        depends=headers,
    )


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    # csrc is no package, but load_cell compiles it where it is installed.
    packages=["fused_rnn", "fused_rnn.kernels", "fused_rnn.bench", "fused_rnn.csrc"],
    package_dir={f"fused_rnn.{name}": name for name in ("kernels", "bench", "csrc")},
    package_data={
        "fused_rnn": ["py.typed", "_C.pyi"],
        "fused_rnn.csrc": ["**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
