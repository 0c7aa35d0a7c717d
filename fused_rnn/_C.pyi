from typing import Any

reserve_block: int

def cells() -> dict[str, dict[str, Any]]: ...
def add_library(address: int) -> dict[str, dict[str, Any]]: ...
def weight_table(
    cell: str, has_biases: bool, projected: bool, layer_norm: int
) -> list[tuple[str, int, str, str]]: ...
def build_info() -> dict[str, str | None]: ...
def instruction_sets() -> dict[str, bool]: ...
def active_instruction_set() -> str: ...
def multiply_adds(rounds: int) -> float: ...
def keep_scratch(bytes: int) -> int: ...
def saved_values(cell: str, layer_norm: int) -> int: ...
def cuda_chips() -> dict[str, dict[str, Any]]: ...
def cuda_plan(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    L: int,
    H: int,
    *,
    projected: bool,
    varied: bool,
    tf32: bool,
    backward: bool,
    chip: str | None,
) -> list[dict[str, Any]]: ...
def cuda_wavefront(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    L: int,
    H: int,
    *,
    layers: int,
    projected: bool,
    tf32: bool,
    training: bool,
    captured: bool,
    chip: str | None,
) -> dict[str, Any]: ...
