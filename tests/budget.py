"""The error budget of a numerical op: at most twice torch's own error in the same dtype.

|value - oracle| <= 2 |torch_same - oracle| + tolerance(dtype) * |oracle|'s scale, element by
element, and the same for the norms. NaN never passes.
"""

from __future__ import annotations

import torch


def tolerance(dtype):
    """Rounding of a short sum in `dtype`, relative to the largest oracle value."""
    return 4 * torch.finfo(dtype).eps


def assert_within_budget(value, torch_same, oracle, dtype=torch.float32):
    """Fail, with the worst element, unless `value` is as close to `oracle` as torch's own result.

    Args:
        value: what the implementation gave.
        torch_same: the same formula in plain torch at the precision the op promises.
        oracle: float64, the formula at full precision.
        dtype: the precision the op promises for its result.
    """
    value, torch_same, oracle = value.double(), torch_same.double(), oracle.double()
    assert value.shape == oracle.shape == torch_same.shape
    if oracle.numel() == 0:
        return
    floor = tolerance(dtype) * float(oracle.abs().max())
    error, allowed = (value - oracle).abs(), 2 * (torch_same - oracle).abs() + floor
    # Written so that a NaN on either side fails.
    outside = ~(error <= allowed)
    worst = int(torch.where(outside, error.nan_to_num(float("inf")), -1.0).argmax())
    assert not outside.any(), (
        f"{int(outside.sum())} of {oracle.numel()} elements outside the budget; the worst at flat "
        f"index {worst}: got {float(value.flatten()[worst])!r}, torch "
        f"{float(torch_same.flatten()[worst])!r}, oracle {float(oracle.flatten()[worst])!r}, "
        f"allowed error {float(allowed.flatten()[worst]):.3e}"
    )
    own, torchs = float((value - oracle).norm()), float((torch_same - oracle).norm())
    allowed_norm = 2 * torchs + tolerance(dtype) * float(oracle.norm())
    assert own <= allowed_norm, f"error norm {own:.3e}, allowed {allowed_norm:.3e}"
