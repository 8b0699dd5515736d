"""State that moves with training, where a forward is computed again inside a backward pass.

torch.utils.checkpoint runs a forward a second time. The state has moved on by then, perhaps by several other
forwards, so each training forward writes down the state that it used, and under what: a few sums of its batch.
The second run finds its state by them (the op `_recall_state` knows whether it runs inside a backward pass).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["empty_log", "key_of", "log_shape"]

_LENGTH = 64  # forwards that may wait for their backward pass
_KEY = 4


def log_shape(states: int) -> tuple[int, int]:
    return _LENGTH, _KEY + 1 + states


def empty_log(states: int, device: torch.device) -> Tensor:
    """A row a forward, newest first: key, in which backward pass it was recalled last, and its `states` numbers."""
    return torch.full(log_shape(states), torch.inf, dtype=torch.float64, device=device)


def key_of(embeddings: Tensor, labels: Tensor) -> Tensor:
    """What tells a batch from another, [4] float64. The second run of a batch may round its embeddings otherwise."""
    rows = torch.nan_to_num(embeddings.detach(), 0.0, 0.0, 0.0)
    place = torch.arange(1, labels.shape[0] + 1, dtype=torch.float64, device=labels.device) / labels.shape[0]
    sums = (
        (rows.sum(1, dtype=torch.float64) * place).sum(),
        rows.abs().sum(dtype=torch.float64),
        (labels * place).sum(),
        torch.ones_like(place).sum(),
    )
    return torch.stack(sums)
