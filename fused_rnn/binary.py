"""Loads ``fused_rnn._C``, or tells why it cannot be loaded and what to do."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from . import sources

__all__ = ["_C"]


def _why() -> str | None:
    """Why there is no extension to load; None where there is one."""
    folder = Path(__file__).parent
    wanted = sysconfig.get_config_var("EXT_SUFFIX")
    if (folder / f"_C{wanted}").exists():
        return None
    others = sorted(path.name for path in folder.glob("_C.*.so"))
    build = 'install it with "pip install --no-build-isolation ." in the source tree'
    if others:
        return f"fused_rnn is built for another Python ({', '.join(others)}, not {wanted}): {build}"
    return (
        f"fused_rnn is not built in {folder}: {build} or, where it is installed, start Python in "
        "another folder than the source tree"
    )


sources.expect_torch()
try:
    from . import _C
except ImportError as error:
    if why := _why():
        raise ImportError(why) from error
    raise
