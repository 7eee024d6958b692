"""The error budget of a numerical op: at most twice torch's own error in the same dtype.

|value - oracle| <= 2 |torch_same - oracle| + tolerance(dtype) * |oracle|'s scale, element by
element, and the same for the norms. NaN never passes.
"""

from __future__ import annotations

import torch


def tolerance(dtype):
    """Rounding of a short sum in `dtype`, relative to the largest oracle value."""
    return 4 * torch.finfo(dtype).eps


# Tokens whose products a matrix unit adds before it cuts the sum to the accumulator's 24 bits.
_STEP = 16


def cut_by_matrix_units(x, g, segments):
    """What the matrix units of a GPU may lose of sum_b |G_b^T X_b|, float64 [R, C].

    They cut the running sum, where plain fp32 arithmetic rounds it: one unit in its last place for
    every step of the longest chain of additions there is.
    """
    lost = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    x, g = x.double(), g.double()
    for start, end in segments.tolist():
        running = torch.zeros_like(lost)
        for first in range(start, end, _STEP):
            last = min(first + _STEP, end)
            running += g[first:last].T @ x[first:last]
            lost += running.abs() * 2.0**-23
    return lost


def lost_on_a_gpu(x, g, segments):
    """What a GPU may lose of sum_b |G_b^T X_b| besides what plain torch does, float64 [R, C]."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return cut_by_matrix_units(x, g, segments)
    return lost_by_rounding(lambda t: g[t, :, None].double() * x[t].double(), segments)


def lost_by_rounding(term, segments):
    """What fp32 may lose of sum_b |sum of the terms of b|, added one after the other; float64.

    A GPU adds in an order of its own, often this one, and torch's result in another order says
    little of it. Each addition rounds by at most half a unit in the running sum's last place; n
    roundings of either sign make a walk, and this is three and a half standard deviations of it.

    Args:
        term: row -> its term, float64.
    """
    lost = 0.0
    for start, end in segments.tolist():
        running = squares = 0.0
        for row in range(start, end):
            running = running + term(row)
            squares = squares + running**2
        lost = lost + 2.0**-23 * squares**0.5
    return lost


def assert_within_budget(value, torch_same, oracle, dtype=torch.float32, lost=0.0):
    """Fail, with the worst element, unless `value` is as close to `oracle` as torch's own result.

    Args:
        value: what the implementation gave.
        torch_same: the same formula in plain torch at the precision the op promises.
        oracle: float64, the formula at full precision.
        dtype: the precision the op promises for its result.
        lost: error allowed on top, a number or float64 of that shape, for a reason that the caller
            works out.
    """
    value, torch_same, oracle = value.double(), torch_same.double(), oracle.double()
    assert value.shape == oracle.shape == torch_same.shape
    if oracle.numel() == 0:
        return
    floor = tolerance(dtype) * float(oracle.abs().max())
    error, allowed = (value - oracle).abs(), 2 * (torch_same - oracle).abs() + floor + lost
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
    lost_norm = float(torch.as_tensor(lost, dtype=torch.float64).expand(oracle.shape).norm())
    allowed_norm = 2 * torchs + tolerance(dtype) * float(oracle.norm()) + lost_norm
    assert own <= allowed_norm, f"error norm {own:.3e}, allowed {allowed_norm:.3e}"
