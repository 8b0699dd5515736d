from typing import TypedDict

class _Plan(TypedDict):
    path: str
    lanes: int
    row_tile: int
    class_chunk: int
    input_splits: int
    operand_dtype: str
    kept_classes: int
    scratch_bytes: int
    workspace_limit: int
    fits: bool

def version() -> str: ...
def built_for_torch() -> str: ...
def cuda_architectures() -> tuple[str, ...]: ...
def get_workspace_limit(device_type: str) -> int: ...
def set_workspace_limit(device_type: str, bytes: int) -> None: ...
def plan(rows: int, features: int, classes: int, dtype: str, device_type: str, compute_dtype: str) -> _Plan: ...
