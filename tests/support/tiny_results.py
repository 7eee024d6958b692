"""Results of a run and of a debiasing as the report takes them."""

from __future__ import annotations

import math
import random

MODULES = {"mlp.gate_proj": 1536 * 576, "mlp.up_proj": 1536 * 576, "mlp.down_proj": 576 * 1536}


def make_results(layers: int = 30, coupled: bool = True, seed: int = 0) -> dict:
    """Results as a run hands them over, with values that vary from matrix to matrix."""
    draw = random.Random(seed)
    rows = []
    for layer in range(layers):
        for module, numel in MODULES.items():
            k = int(1e-5 * numel)
            both = draw.randint(0, k) if coupled else 0
            removed = draw.randint(0, both)
            rows.append(
                {
                    "name": f"model.layers.{layer}.{module}",
                    "layer": layer,
                    "module": module,
                    "numel": numel,
                    "k": k,
                    "first": k,
                    "second": k,
                    "coupled": both,
                    "removed": removed,
                    "kept": both - removed,
                }
            )
    sums = ("numel", "k", "first", "second", "coupled", "removed", "kept")
    total = {key: sum(row[key] for row in rows) for key in sums}
    return {
        "title": "Coupled weights of Small-135M-Instruct",
        "created": "2025-11-21T19:38:00+00:00",
        "command": "fastdean run --model small-135m --ratio 1e-5 --out run/",
        "versions": {"fastdean": "0.1.0", "torch": "2.13.0"},
        "findings": [
            f"{total['kept']} of {total['numel']:,} scored weights are coupled and were zeroed.",
            "Zeroing them raised the privacy margin and left the fairness margin within noise.",
            "Perplexity on general text rose by 0.2 %, within its interval.",
        ],
        "model": {"name": "Small-135M-Instruct", "parameters": 134_515_008, "dtype": "float32"},
        "data": {
            name: {
                "source": f"embedded:{name}",
                "examples": 128,
                "tokens": 9_728 + extra,
                "target_tokens": 6_040 + extra,
                "sha256": f"{draw.getrandbits(256):064x}",
            }
            for extra, name in enumerate(("fairness", "privacy", "general"))
        },
        "options": {"ratio": 1e-5, "rule": "paper", "target_modules": "mlp", "seed": 0},
        "coverage": {
            "scored_parameters": total["numel"],
            "model_parameters": total["numel"] + 54_888_768,
            "share": total["numel"] / (total["numel"] + 54_888_768),
            "targets": len(rows),
            "groups": {
                "mlp": {"modules": 90, "parameters": 79_626_240, "scored": 90, "unscorable": 0},
                "self_attn": {"modules": 120, "parameters": 9, "scored": 0, "unscorable": 0},
                "router": {"modules": 0, "parameters": 0, "scored": 0, "unscorable": 8},
            },
        },
        "coupling": {"rows": rows, "total": total},
        "overlap": [
            {
                "ratio": ratio,
                "k": int(ratio * 79_626_240),
                "coupled": int(ratio * 79_626_240 * share),
                "expected_by_chance": ratio * ratio * 79_626_240,
                "removed": int(ratio * 79_626_240 * share * 0.8),
                "kept": int(ratio * 79_626_240 * share * 0.2),
            }
            for ratio, share in (
                (2e-6, 0.71),
                (5e-6, 0.69),
                (1e-5, 0.675),
                (1e-4, 0.58),
                (1e-3, 0.49),
            )
        ],
        "hsic": {
            "estimator": "normalized",
            "kernel": "gaussian",
            "bandwidth": "median",
            "n": 128,
            "pairing": "by index, arbitrary",
            "layers": [
                {
                    "layer": layer,
                    "before": 2.1 + 0.9 * math.sin(layer / 6),
                    "after": 2.1 + 0.9 * math.sin(layer / 6) - draw.uniform(-0.02, 0.08),
                    "null_low": 1.7 + 0.1 * math.sin(layer / 4),
                    "null_high": 2.2 + 0.1 * math.sin(layer / 4),
                }
                for layer in range(layers)
            ],
        },
        "margins": {
            "fairness": {
                "pairs": 256,
                "unit": "nats per token",
                "confidence": 0.95,
                "origin": {"mean": 0.1432, "low": 0.1121, "high": 0.1744},
                "masks": {
                    "paper": mask(0.0041, -0.0019, 0.0103, 101),
                    "random": mask(0.0001, -0.0004, 0.0005, 101),
                    "released": mask(0.0213, 0.0081, 0.0352, 163),
                },
            },
            "privacy": {
                "pairs": 256,
                "unit": "nats per token",
                "confidence": 0.95,
                "origin": {"mean": 0.2011, "low": 0.1688, "high": 0.2320},
                "masks": {
                    "paper": mask(0.0090, 0.0012, 0.0171, 101),
                    "random": mask(-0.0002, -0.0007, 0.0003, 101),
                    "released": mask(-0.0153, -0.0291, -0.0022, 163),
                },
            },
        },
        "perplexity": {
            "text": "embedded general text",
            "tokens": 40_960,
            "origin": 18.412,
            "masks": {
                "paper": {
                    "value": 18.449,
                    "ratio": 1.00201,
                    "low": 0.9991,
                    "high": 1.0049,
                    "verdict": "no effect",
                },
                "random": {
                    "value": 18.413,
                    "ratio": 1.00005,
                    "low": 0.9998,
                    "high": 1.0003,
                    "verdict": "no effect",
                },
                "released": {
                    "value": 18.803,
                    "ratio": 1.02124,
                    "low": 1.0138,
                    "high": 1.0287,
                    "verdict": "higher",
                },
            },
        },
        "cost": [
            {
                "step": "score fairness",
                "seconds": 41.2,
                "tokens": 9_728,
                "peak_bytes": 1_912_602_624,
            },
            {
                "step": "score privacy",
                "seconds": 44.9,
                "tokens": 9_729,
                "peak_bytes": 1_912_602_624,
            },
            {"step": "couple", "seconds": 2.3, "tokens": None, "peak_bytes": None},
        ],
        "files": {"mask": "mask/", "scores": "scores/fairness scores.safetensors"},
        "manifest": {"model": {"name": "Small-135M-Instruct"}, "seed": 0},
        "warnings": ["5e-7 selects nothing from matrices below 2,000,000 entries."],
    }


def mask(mean: float, low: float, high: float, weights: int) -> dict:
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no effect beyond noise"
    return {"mean": mean, "low": low, "high": high, "verdict": verdict, "weights": weights}


DEBIASED = {
    "collapse": {
        "classes": {"kept": 61, "left_out": 3, "groups": {"female": 30, "male": 31}},
        "settings": {"shift": "next"},
        "metrics": {
            "NC3": {"definition": "mean cosine", "values": {"before": 0.125, "after": 0.25}},
            "NC1": {
                "definition": "CDNV, exponent 2",
                "values": {"before": "inf", "after": None},
                "notes": {"before": "2 classes have one mean"},
            },
        },
    },
    "bias": {
        "CrowS-Pairs": {
            "unit": "percentage points",
            "neutral": 50.0,
            "definition": "share of pairs",
            "before": {"value": 61.0, "low": 55.0, "high": 67.0, "n": 262},
            "after": {"value": 60.0, "low": 54.0, "high": 66.0, "n": 262},
            "change": {"value": -1.0, "low": -4.0, "high": 2.0},
        },
        "SEAT <6>": {"before": {"value": 0.4, "low": None, "high": None, "n": 8}},
    },
    "training": {
        "method": "causal",
        "history": [
            {"step": i, "loss": 2.0 / i, "base": 1.0 / i, "collapse": None} for i in (1, 2)
        ],
        "evaluations": [{"step": 0, "(U)NC3": 0.2}, {"step": 2, "(U)NC3": 0.1}],
    },
}
