"""The collapse-alignment loss and its gradients in numbers wider than float64, by their formulas.

An oracle in float64 would be the very computation that plain torch does in float64. NumPy's long
double has 64 bits of mantissa on x86 and 113 on Arm under Linux.
"""

from __future__ import annotations

import numpy as np
import torch


def std_step(features, labels, weight, sums, counts, decay):
    """(loss, sums, counts, gradient of weight, of features) of the statistic "std".

    In float64, each rounded once. At least two classes are seen, with cosines that differ.
    """
    x, w, sums, counts = (_wide(each) for each in (features, weight, sums, counts))
    labels, decay = labels.numpy(), np.longdouble(decay)
    labelled = labels >= 0
    sums, counts = decay * sums, decay * counts
    np.add.at(sums, labels[labelled], x[labelled])
    np.add.at(counts, labels[labelled], np.longdouble(1))
    seen = counts > 0
    number, count = np.longdouble(seen.sum()), counts[seen][:, None]
    means = sums[seen] / count
    m, v = means - means.mean(0), w[seen]
    # Columns [classes, 1].
    mm, vv, vm = (np.sum(product, axis=1, keepdims=True) for product in (m * m, v * v, v * m))
    lengths = np.sqrt(vv * mm)
    cosine = vm / lengths
    deviation = cosine - cosine.mean()
    loss = np.sqrt(np.sum(deviation**2) / (number - 1))
    slope = deviation / ((number - 1) * loss)
    grad_weight, of_rows = np.zeros_like(w), np.zeros_like(w)
    grad_weight[seen] = slope * (m / lengths - cosine * v / vv)
    of_centred = slope * (v / lengths - cosine * m / mm)
    of_rows[seen] = (of_centred - of_centred.mean(0)) / count
    grad_features = np.zeros_like(x)
    grad_features[labelled] = of_rows[labels[labelled]]
    results = (np.asarray(loss), sums, counts, grad_weight, grad_features)
    return tuple(torch.from_numpy(each.astype(np.float64)) for each in results)


def _wide(tensor):
    return tensor.double().numpy().astype(np.longdouble)
