"""Attention by segments through torch's fused kernel: when it is taken, and how it is called.

On a CPU plain torch of the same signature takes the kernel's place.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device_waits import device_waits
from tiny_models import HEADS, HIDDEN, INTERMEDIATE, MAX_TOKENS, VOCAB, _build
from torch.nn.attention.varlen import varlen_attn

import fastdean
from fastdean.data.batching import LONGEST_SEGMENT, plan_batches
from fastdean.data.examples import Example
from fastdean.models import probes
from fastdean.models.attention import segment_masks, varlen
from fastdean.models.attention.packed import attention_by_segments, segment_attention
from fastdean.models.attention.segment_products import Segments
from fastdean.models.probes import segments_are_exact

LENGTHS = (7, 11, 3, 9, 1)
CAUSAL = (-1, 0)
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING_AND_FULL = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# All take part: rounding never chooses another.
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# Family -> its configuration, and the windows that the kernel gets, layer by layer.
FAMILIES = {
    "Llama": ({}, [CAUSAL] * 4),
    "Mistral": ({"sliding_window": 4}, [(3, 0)] * 4),
    "Gemma3Text": (_SLIDING_AND_FULL, [(3, 0), CAUSAL] * 2),
    "Gemma2": (_SLIDING_AND_FULL | {"attn_logit_softcapping": 2.0}, []),
    "GptOss": (_SLIDING_AND_FULL | _EXPERTS | _ROPE, []),
    "Llama4Text": (
        {
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "intermediate_size_mlp": 48,
            **_EXPERTS,
        },
        [CAUSAL] * 2,
    ),
}


def family(name: str, dtype=torch.bfloat16):
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SHAPE | FAMILIES[name][0])
    model = _build(transformers.AutoModelForCausalLM.from_config, config, 0).to(dtype)
    # The fast products of experts take no float64.
    model.set_experts_implementation("eager")
    return model


def segments_of(lengths=LENGTHS) -> torch.Tensor:
    ends = torch.tensor(lengths).cumsum(0)
    return torch.stack([ends - torch.tensor(lengths), ends], dim=1)


def packed(lengths=LENGTHS, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return {"input_ids": ids.to(device), "position_ids": positions.to(device)}


def examples(*lengths: int) -> list[Example]:
    texts = [torch.arange(3, 3 + n) for n in lengths]
    return [Example(ids, ids) for ids in texts]


def mask_of(lengths, window=CAUSAL, dtype=torch.bfloat16) -> torch.Tensor:
    longest = max(lengths)
    allowed = torch.ones(longest, longest, dtype=torch.bool).tril()
    if window != CAUSAL:
        allowed = allowed.triu(-window[0])
    mask = torch.zeros(len(lengths), 1, longest, longest, dtype=dtype)
    return mask.masked_fill(~allowed, -torch.inf)


def plain_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """What torch documents of `varlen_attn`, computed in fp32, and what its source requires."""
    for x in (query, key, value):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(2) == 1
        assert x.storage_offset() % 8 == x.stride(0) % 8 == x.stride(1) % 8 == 0
    for ends in (cu_seq_q, cu_seq_k):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == query.device
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == int(cu_seq_q.diff().max())
    assert isinstance(scale, float) and isinstance(window_size, tuple)
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    left, right = (n if n >= 0 else max_q for n in window_size)
    attended = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q[1:].tolist(), strict=False):
        steps = torch.arange(end - start)
        behind = steps[:, None] - steps
        scores = scale * q[:, start:end] @ k[:, start:end].mT
        scores = scores.masked_fill((behind > left) | (behind < -right), -torch.inf)
        attended.append(scores.softmax(-1) @ v[:, start:end])
    return torch.cat(attended, 1).transpose(0, 1).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch) -> SimpleNamespace:
    """The kernel's stand-in on a CPU, with the calls it got and how often masks were read."""
    seen = SimpleNamespace(calls=[], read=0, device=torch.device("cpu"))
    theirs, read = inspect.signature(varlen_attn), segment_masks._window

    def called(*args, **options):
        theirs.bind(*args, **{k: v for k, v in options.items() if k != "enable_gqa"})
        seen.calls.append(options)
        return plain_varlen(*args, **options)

    def window(*args):
        seen.read += 1
        return read(*args)

    monkeypatch.setattr(varlen, "lacking", lambda device: None)
    monkeypatch.setattr(varlen, "_kernel", lambda: called)
    monkeypatch.setattr(
        varlen, "_options", lambda: frozenset(inspect.signature(plain_varlen).parameters)
    )
    monkeypatch.setattr(segment_masks, "_window", window)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["by token", "by head", "sliced"])
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 8), (3, 3, 16)])
@pytest.mark.parametrize("window", [CAUSAL, (3, 0), (0, 0)], ids=str)
def test_the_kernel_is_called_for_what_the_mask_says(
    kernel, window, heads, kv_heads, width, layout, dtype
):
    lengths = (6, 1, 5, 17)
    n = sum(lengths)
    torch.manual_seed(0)

    def leaf(h: int) -> torch.Tensor:
        if layout == "by head":
            return torch.randn(1, h, n, width, dtype=dtype, requires_grad=True)
        wide = torch.randn(1, n, h, width + (layout == "sliced"), dtype=dtype)
        return wide[..., :width].transpose(1, 2).requires_grad_()

    inputs = leaf(heads), leaf(kv_heads), leaf(kv_heads)
    mask = mask_of(lengths, window, dtype)
    with attention_by_segments(torch.nn.Identity(), segments_of(lengths)):
        found, weights = segment_attention(None, *inputs, mask, scaling=0.3)
    assert weights is None and found.shape == (1, n, heads, width) and found.dtype == dtype
    grouped = {"enable_gqa": True} if heads != kv_heads else {}
    assert kernel.calls == [{"scale": 0.3, "window_size": window, **grouped}]

    q, k, v = wide = [t.detach().double().requires_grad_() for t in inputs]
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    alone = []
    for i, (start, end) in enumerate(segments_of(lengths).tolist()):
        scores = 0.3 * q[:, :, start:end] @ k[:, :, start:end].mT
        scores = scores + mask[i, :, : end - start, : end - start].double()
        alone.append(scores.softmax(-1) @ v[:, :, start:end])
    expected = torch.cat(alone, 2).transpose(1, 2)
    upstream = torch.randn(found.shape, dtype=dtype)
    ours = torch.autograd.grad(found, inputs, upstream)
    oracle = torch.autograd.grad(expected, wide, upstream.double())
    limit = 2 * torch.finfo(dtype).eps
    for mine, right in zip((found, *ours), (expected, *oracle), strict=True):
        assert (mine.double() - right).norm() <= limit * right.norm() + limit


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_of_a_model_takes_the_form_that_its_mask_and_scores_allow(kernel, name):
    model, windows = family(name), FAMILIES[name][1]
    inputs, segments = packed(), segments_of()
    with attention_by_segments(model, segments):
        logits = model(**inputs, use_cache=False).logits[0]
    assert [call["window_size"] for call in kernel.calls] == windows
    # Once for each kind of mask, not for each layer, and not where the kernel is out of question.
    kinds = len(set(getattr(model.config, "layer_types", None) or [0]))
    assert kernel.read == (kinds if windows else 0)
    exact = model.double()
    batching = fastdean.score(exact, examples(9, 14), progress=False).manifest["batching"]
    if not batching["by_segments"]:
        # Of a transformers in which chunks begin with the row (5.17), where nothing is packed.
        assert name == "Llama4Text"
        return
    alone = [exact(inputs["input_ids"][:, s:e]).logits[0] for s, e in segments.tolist()]
    expected = torch.cat(alone)
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_scores_through_the_kernel_are_those_of_one_example_at_a_time(kernel):
    model, texts = family("Gemma3Text"), examples(9, 14, 12, 30)
    together = fastdean.score(model, texts, progress=False)
    assert together.manifest["batching"]["by_segments"] and kernel.calls
    alone = fastdean.score(model, texts, tokens_per_batch=1, progress=False)
    exact = fastdean.score(family("Gemma3Text", torch.float32), texts, progress=False)
    for name, entry in exact.entries.items():
        off, off_alone = ((of.entries[name].sums - entry.sums).norm() for of in (together, alone))
        assert off <= 2 * off_alone + 0.01 * entry.sums.norm()


def call_of(heads=4, kv_heads=2, width=8, value_width=None, dtype=torch.bfloat16, **others):
    q, k, v = (
        torch.ones(1, h, 5, d, dtype=dtype)
        for h, d in ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    )
    return (q, k, v), {"softcap": None, "sinks": None} | others


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"width": 256}, None),
        ({"width": 264}, "256"),
        ({"width": 12}, "multiple of 8"),
        ({"value_width": 16}, "one width"),
        ({"dtype": torch.float32}, "bf16"),
        ({"dtype": torch.float64}, "bf16"),
        ({"softcap": 30.0}, "soft-caps"),
        ({"sinks": torch.zeros(4)}, "sinks"),
    ],
)
def test_what_the_kernel_does_not_do_is_declined(kernel, asked, reason):
    tensors, others = call_of(**asked)
    found = varlen.declined(*tensors, **others)
    assert (found is None) if reason is None else reason in found


def test_a_torch_whose_kernel_does_not_name_shared_keys_is_not_asked_for_them(kernel, monkeypatch):
    monkeypatch.setattr(varlen, "_options", lambda: frozenset({"scale", "window_size"}))
    tensors, others = call_of()
    assert "share keys" in varlen.declined(*tensors, **others)
    tensors, others = call_of(kv_heads=4)
    assert varlen.declined(*tensors, **others) is None


@pytest.mark.parametrize(
    "device, changed, reason",
    [
        ("cuda", {}, None),
        ("cpu", {}, "CUDA only"),
        ("mps", {}, "CUDA only"),
        ("cuda", {"version": None}, "CUDA only"),
        ("cuda", {"options": {"is_causal", "scale"}}, "window"),
        ("cuda", {"built": False}, "built without"),
        ("cuda", {"capability": (7, 5)}, "8.0"),
        ("cuda", {"capability": (12, 0)}, None),
    ],
)
def test_where_the_kernel_runs(monkeypatch, device, changed, reason):
    machine = {
        "version": "13.0",
        "options": {"scale", "window_size"},
        "built": True,
        "capability": (9, 0),
    } | changed
    monkeypatch.setattr(torch.version, "cuda", machine["version"])
    monkeypatch.setattr(varlen, "_options", lambda: frozenset(machine["options"]))
    flash = torch.backends.cuda
    monkeypatch.setattr(flash, "is_flash_attention_available", lambda: machine["built"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine["capability"])
    found = varlen.lacking(torch.device(device))
    assert (found is None) if reason is None else reason in found


@pytest.mark.parametrize("mode, taken", [("default", True), ("warn", False), ("error", True)])
def test_the_kernel_is_not_taken_where_its_backward_pass_would_not_repeat(kernel, mode, taken):
    lengths, before = (4, 6), torch.get_deterministic_debug_mode()
    (q, _, _), _ = call_of()
    q = q.new_ones(1, 2, 10, 8)
    try:
        torch.set_deterministic_debug_mode(mode)
        with attention_by_segments(torch.nn.Identity(), segments_of(lengths)):
            segment_attention(None, q, q, q, mask_of(lengths))
    finally:
        torch.set_deterministic_debug_mode(before)
    assert bool(kernel.calls) == taken


def reached(values: torch.Tensor, lengths=(3, 5)) -> tuple[int, int] | None:
    return Segments.cut(segments_of(lengths)).mask(values).window()


def test_a_window_is_found_only_where_every_row_says_it():
    lengths = (3, 5)
    causal = mask_of(lengths)
    assert reached(causal) == CAUSAL
    assert reached(mask_of(lengths, (4, 0))) == CAUSAL
    assert reached(mask_of(lengths, (3, 0))) == (3, 0)
    # Behind the end of an example anything may stand.
    ragged = causal.clone()
    ragged[0, :, 3:, :] = 0.5
    assert reached(ragged) == CAUSAL
    full = torch.zeros_like(causal)
    chunks = causal.clone()
    chunks[1, 0, 2:, :2] = -torch.inf
    biased = causal.clone()
    biased[1, 0, 4, 2] = -0.25
    nowhere = torch.full_like(causal, -torch.inf)
    unknown = causal.clone()
    unknown[0, 0, 2, 1] = torch.nan
    huge = causal.clone().clamp_min(torch.finfo(causal.dtype).min)
    for other in (full, chunks, biased, nowhere, unknown, huge):
        assert reached(other) is None


def test_a_mask_that_was_changed_is_read_again_and_one_for_each_layer_is_not_read_each_time(kernel):
    lengths = (4, 6)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = mask_of(lengths)
    with attention_by_segments(torch.nn.Identity(), segments_of(lengths)):
        causal, _ = segment_attention(None, q, k, v, mask)
        again, _ = segment_attention(None, q, k, v, mask)
        assert kernel.read == 1 and torch.equal(again, causal)
        mask.copy_(mask_of(lengths, (1, 0)))
        sliding, _ = segment_attention(None, q, k, v, mask)
        assert kernel.read == 2 and kernel.calls[-1]["window_size"] == (1, 0)
        for _ in range(10):
            fresh, _ = segment_attention(None, q, k, v, mask.clone())
            assert (fresh - sliding).norm() < 0.01 * sliding.norm()
        assert kernel.read == 4
    assert not torch.equal(causal, sliding)


def test_a_mask_made_in_inference_mode_is_taken(kernel):
    model = family("Llama")
    with torch.inference_mode(), attention_by_segments(model, segments_of()):
        model(**packed(), use_cache=False)
    assert len(kernel.calls) == 4 and kernel.read == 1


def test_products_keep_their_part_of_a_mask_for_all_layers(monkeypatch):
    model, made = family("Gemma2"), []
    real = torch.Tensor.index_select

    def selecting(tensor, dim, index):
        if tensor.dim() == 4:
            made.append(index)
        return real(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", selecting)
    segments = segments_of()
    with attention_by_segments(model, segments):
        loss = model(**packed(), use_cache=False).logits.float().square().sum()
        torch.autograd.grad(loss, model.get_input_embeddings().weight)
    assert len(made) == 2 * len(Segments.cut(segments).groups)


def on_cuda(monkeypatch):
    """`probes` believes that models are on CUDA, and runs them here."""
    real, real_device = probes._logits, probes.input_device

    def logits(model, inputs):
        with monkeypatch.context() as patched:
            patched.setattr(probes, "input_device", real_device)
            return real(model, inputs)

    monkeypatch.setattr(probes, "_logits", logits)
    monkeypatch.setattr(probes, "input_device", lambda model: torch.device("cuda"))


def test_on_cuda_the_form_that_runs_there_is_measured(kernel, monkeypatch):
    on_cuda(monkeypatch)
    texts = examples(20, 25)
    assert segments_are_exact(family("Mistral"), texts) and kernel.calls
    taken = len(kernel.calls)
    assert segments_are_exact(family("Mistral", torch.float32), texts)
    assert segments_are_exact(family("Gemma2"), texts) and len(kernel.calls) == taken

    def leaking(q, k, v, *ends, **options):
        return plain_varlen(q, k, v, *ends, **options) + 0.1 * v.mean()

    def failing(*args, **options):
        raise RuntimeError("no kernel image is available")

    for broken in (leaking, failing):
        monkeypatch.setattr(varlen, "_kernel", lambda broken=broken: broken)
        assert not segments_are_exact(family("Mistral"), texts)
    monkeypatch.setattr(probes, "input_device", lambda model: torch.device("mps"))
    assert not segments_are_exact(family("Mistral"), texts)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_a_model_loaded_with_flash_attention_keeps_its_own(kernel, name, monkeypatch):
    model = family("Llama")
    model.config._attn_implementation_internal = name
    monkeypatch.setattr(probes, "_keeps_apart", None)  # it is not even measured
    assert not segments_are_exact(model, examples(9, 12))


def test_the_products_of_a_batch_take_memory_by_its_tokens_alone():
    """At most as many scores per head as a third more tokens in examples of the longest length."""
    generator = torch.Generator().manual_seed(0)
    for longest in (5, 80, LONGEST_SEGMENT):
        lengths = torch.randint(1, longest + 1, (400,), generator=generator).tolist()
        texts = [Example(ids, ids) for ids in map(torch.arange, (n + 1 for n in lengths))]
        for batch in plan_batches(
            texts, shift=1, tokens_per_batch=2048, packed=True, by_segments=True
        ):
            if batch.by_segments:
                cut = Segments.cut(batch.segments)
                scores = [len(group) * cut.longest(group) ** 2 for group in cut.groups]
                assert max(scores) <= 2048 / 0.75 * LONGEST_SEGMENT


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["kernel", "products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu_both_forms_compute_what_each_example_computes_alone(
    name, dtype, form, monkeypatch
):
    lengths = (70, 33, 64, 1, 130, 20)
    shape = _SHAPE | FAMILIES[name][0] | {"max_position_embeddings": 256}
    monkeypatch.setattr(f"{__name__}._SHAPE", shape)
    model, exact = family(name, dtype).cuda(), family(name, dtype).double().cuda()
    exact.set_attn_implementation("eager")
    inputs, segments = packed(lengths, "cuda"), segments_of(lengths)
    taken, attend = [], varlen.attend

    def noted(*args):
        taken.append(args)
        return attend(*args)

    monkeypatch.setattr(varlen, "attend", noted)
    if form == "products":
        monkeypatch.setattr(varlen, "lacking", lambda device: "left out")

    def gradient(of, logits: torch.Tensor) -> torch.Tensor:
        upstream = torch.linspace(-1, 1, VOCAB, device="cuda")
        embedding = of.get_input_embeddings().weight
        return torch.autograd.grad((logits.double() * upstream).sum(), embedding)[0]

    def alone(of) -> torch.Tensor:
        ids = inputs["input_ids"]
        return torch.cat([of(ids[:, s:e], use_cache=False).logits[0] for s, e in segments.tolist()])

    with attention_by_segments(model, segments):
        logits = model(**inputs, use_cache=False).logits[0]
    kernel_wanted = form == "kernel" and dtype != torch.float32
    assert len(taken) == (len(FAMILIES[name][1]) if kernel_wanted else 0)
    found = logits, gradient(model, logits)
    model.set_attn_implementation("eager")
    own, oracle = ((x := alone(of), gradient(of, x)) for of in (model, exact))
    for mine, theirs, right in zip(found, own, oracle, strict=True):
        off, off_alone = ((x.double() - right).norm() for x in (mine, theirs))
        assert off <= 2 * off_alone + 4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.gpu
def test_on_a_gpu_a_strict_run_repeats_its_bits_and_a_batch_is_waited_for_once(monkeypatch):
    model, texts = family("Gemma3Text").cuda(), examples(*range(10, 80))
    assert segments_are_exact(model, texts)
    first, again = (
        fastdean.score(model, texts, deterministic=True, progress=False) for _ in range(2)
    )
    assert first.manifest["batching"]["by_segments"]
    for name, entry in first.entries.items():
        assert torch.equal(again.entries[name].sums, entry.sums)
    segments, inputs = segments_of(), packed(device="cuda")
    with device_waits() as waits, attention_by_segments(model, segments):
        model(**inputs, use_cache=False).logits.sum().backward()
    package = Path(fastdean.__file__).parent
    ours = [wait for wait in waits if Path(wait.filename).is_relative_to(package)]
    assert len(ours) == 2  # one for each kind of mask
