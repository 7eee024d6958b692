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


def rounded_one_after_another(x, g, segments):
    """What plain fp32 additions, one token after the other, may lose of sum_b |G_b^T X_b|.

    Each addition rounds the running sum to half a unit in its last place, up or down as it comes:
    five standard deviations of that walk, float64 [R, C]. Torch's own product may take the tokens
    in blocks and lose far less, so that twice its error is no measure for long examples.
    """
    squared = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)
    x, g = x.double(), g.double()
    for start, end in segments.tolist():
        running = (g[start:end].unsqueeze(2) * x[start:end].unsqueeze(1)).cumsum(0)
        squared += (running * 2.0**-24).square().sum(0) / 3
    return 5 * squared.sqrt()


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
