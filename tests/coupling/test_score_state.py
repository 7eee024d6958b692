"""`score` leaves the model as it found it, whatever happens and whatever state that was."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from interrupts import interrupt, moments
from oracle import norm_error
from tiny_data import batches, make_examples
from tiny_models import MODELS, gpt2, llama, qwen2
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook

import fastdean
from fastdean.coupling import scoring
from fastdean.coupling.passes import capture, trial
from fastdean.coupling.sums import accumulators
from fastdean.coupling.targets.finding import find_targets
from fastdean.coupling.workloads import loss_check
from fastdean.coupling.workloads import planning as workloads
from fastdean.models import forward, hooks, model_state


def loader():
    return batches(make_examples(), 4)


def run(model, **options):
    return fastdean.score(model, loader(), progress=False, **options)


def unusual(model):
    """A model in a state that no default would restore: mixed modes, freezes, gradients, cache."""
    model.train()
    layer = model.get_submodule(next(n for n, m in model.named_modules() if n.endswith(".1")))
    layer.eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        if i % 2:
            parameter.grad = torch.full_like(parameter, i / 7)
    model.config.use_cache = True
    return model


def state_of(model):
    """Everything that a user could miss afterwards, with bits where there are numbers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": [id(parameter) for parameter in model.parameters()],
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "config": copy.deepcopy(model.config.to_dict()),
        "hooks": [len(getattr(module, h)) for module in model.modules() for h in hooks],
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "grad enabled": torch.is_grad_enabled(),
        "compiler": torch._dynamo.eval_frame._stance.stance
        if "torch._dynamo" in sys.modules
        else "",
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for key in before.keys() - {"weights", "gradients"}:
        assert before[key] == after[key], key
    for key in ("weights", "gradients"):
        for name, value in before[key].items():
            found = after[key][name]
            assert (value is None) == (found is None), (key, name)
            assert value is None or torch.equal(value, found), (key, name)


def forward_that_raises(model, error, at):
    """Let the model's forward raise in its call number `at`."""
    calls = []
    original = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(*args, **kwargs)

    model.forward = forward


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("name", MODELS)
def test_success_changes_nothing(name, granularity):
    model = unusual(MODELS[name]())
    before = state_of(model)
    run(model, granularity=granularity, deterministic=True)
    assert_same_state(before, state_of(model))


# The first four calls find out whether packing is exact; the others score.
@pytest.mark.parametrize("at", [1, 5, 6])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_an_exception_in_the_model_changes_nothing(error, at):
    model = unusual(llama())
    forward_that_raises(model, error, at)
    before = state_of(model)
    with pytest.raises(type(error)):
        run(model, tokens_per_batch=10, deterministic=True)
    assert_same_state(before, state_of(model))


def test_an_interrupt_in_the_backward_pass_changes_nothing(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(accumulators, "accumulate_importance_", interrupted)
    model = unusual(llama())
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert_same_state(before, state_of(model))


def test_a_loss_that_is_not_finite_changes_nothing():
    model = unusual(llama())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match="loss must be finite, got nan for example [0-5]; check"):
        run(model, deterministic=True)
    after = state_of(model)
    for state in (before, after):
        state["weights"] = {k: v.nan_to_num(12345.0) for k, v in state["weights"].items()}
    assert_same_state(before, after)


@pytest.mark.parametrize("warn_only", [False, True])
def test_the_callers_deterministic_mode_survives(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        run(llama(), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.mark.parametrize("of_the_caller", [None, ":16:8"])
def test_deterministic_products_on_a_gpu_have_their_workspace(of_the_caller, monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)
    if of_the_caller is not None:
        monkeypatch.setenv(CUBLAS, of_the_caller)
    model, seen = llama(), []
    model.model.register_forward_hook(lambda *args: seen.append(os.environ.get(CUBLAS)))
    run(model, deterministic=True)
    assert set(seen) == {of_the_caller or ":4096:8"}
    assert os.environ.get(CUBLAS) == of_the_caller
    forward_that_raises(model, OSError("disk"), 1)
    with pytest.raises(OSError):
        run(model, deterministic=True)
    assert os.environ.get(CUBLAS) == of_the_caller


def test_nothing_is_set_where_determinism_was_not_asked_for(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)
    model, seen = llama(), []
    model.model.register_forward_hook(lambda *args: seen.append(os.environ.get(CUBLAS)))
    run(model)
    assert set(seen) == {None}


def assert_same_scores(scores, expected):
    assert list(scores) == list(expected)
    for name in expected:
        assert norm_error(scores[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context):
    model, expected = llama(), run(llama())
    with context():
        scores = run(model)
    assert_same_scores(scores, expected)


def test_a_frozen_model_and_one_with_its_input_gradients_on():
    expected = run(llama())
    frozen = llama().requires_grad_(False)
    assert_same_scores(run(frozen), expected)
    frozen.enable_input_require_grads()
    before = state_of(frozen)
    assert_same_scores(run(frozen), expected)
    assert_same_state(before, state_of(frozen))


def test_dropout_is_off_while_scoring():
    expected = run(gpt2())
    model = gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    assert_same_scores(run(model), expected)
    assert all(module.training for module in model.modules())


# The newer name of the method is not in every release of transformers that we support.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_in_training_mode(use_reentrant):
    expected = run(qwen2())
    model = qwen2().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    before = state_of(model)
    assert_same_scores(run(model), expected)
    assert_same_state(before, state_of(model))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _interrupt(module, args):
    raise KeyboardInterrupt


def test_a_model_that_changes_itself_in_short_texts_is_refused_and_stays_as_it_was():
    """BigBird would be scored, and left, with another attention than it was loaded with."""
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128, "block_size": 4}
    sparse = BigBirdForMaskedLM(BigBirdConfig(**sizes, num_random_blocks=1))
    modules = list(sparse.modules())
    with sparse.cls.register_forward_pre_hook(_interrupt), pytest.raises(KeyboardInterrupt):
        run(sparse)
    assert list(sparse.modules()) == modules
    with pytest.raises(ValueError, match="model must keep its modules .* BigBirdAttention that ex"):
        run(sparse)
    assert list(sparse.modules()) == modules
    assert {m.attention_type for m in modules if hasattr(m, "attention_type")} == {"block_sparse"}
    assert list(run(BigBirdForMaskedLM(BigBirdConfig(**sizes, attention_type="original_full"))))


class _Wrapper(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_wrapped_models_are_unwrapped():
    expected = run(llama())
    assert_same_scores(run(_Wrapper(llama())), expected)
    assert_same_scores(run(torch.compile(_Wrapper(llama()), backend="eager")), expected)


def _with_compiled_parts():
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    return model


def _with_checkpointed_layers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = llama()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("build", [_with_compiled_parts, _with_checkpointed_layers])
def test_wrapped_parts_have_the_names_of_the_checkpoint(build, order):
    model, options = build(), {"target_modules": "all,input_layernorm.weight", "order": order}
    found = run(model, **options)
    assert_same_scores(found, run(llama(), **options))
    mask = fastdean.couple(found, found, ratio=0.1)
    for each in (model, llama()):
        with mask.applied(each):
            assert sum(int((p == 0).sum()) for p in each.parameters()) == len(mask)


def compiled(how):
    """A model compiled in one of the ways people use, after a call through the compiled code."""
    model = llama()
    counts = []

    def backend(graph, inputs):
        counts.append(1)
        return graph.forward

    if how == "torch.compile":
        wrapped = torch.compile(model, backend=backend)
    else:
        wrapped, mlp = model, model.model.layers[1].mlp
        if how == "module.compile()":
            mlp.compile(backend=backend)
        else:
            mlp.forward = torch.compile(mlp.forward, backend=backend)
    with torch.no_grad():
        wrapped(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert counts, "nothing was compiled"
    return wrapped, counts


@pytest.mark.parametrize("how", ["torch.compile", "module.compile()", "a compiled forward"])
def test_compiled_models_are_scored_uncompiled(how):
    expected = run(llama())
    model, counts = compiled(how)
    seen = len(counts)
    assert_same_scores(run(model), expected)
    assert len(counts) == seen, "scoring compiled something"


def test_the_users_own_hooks_stay_and_still_run():
    model, calls = llama(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: calls.append(1))
    assert_same_scores(run(model), run(llama()))
    assert calls and len(model.model.layers[0].mlp.up_proj._forward_hooks) == 1


def test_autocast_around_the_call_is_scored_in_the_dtypes_it_computes_in():
    expected = run(llama())
    with torch.autocast("cpu", torch.bfloat16):
        scores = run(llama())
    for name in expected:
        assert scores[name].dtype == torch.float32
        assert norm_error(scores[name], expected[name]) < 0.05


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_offloaded_weights(granularity):
    from accelerate import cpu_offload

    expected = run(llama(), granularity=granularity)
    model = llama()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = run(model, granularity=granularity)
    assert_same_scores(scores, expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_fp32_products(dtype, monkeypatch):
    seen = []

    def recording(acc, x, g, segments, **options):
        assert x.dtype == g.dtype == dtype
        exact = torch.zeros(acc.shape, dtype=torch.float64)
        for start, end in segments.tolist():
            exact += (g[start:end].double().T @ x[start:end].double()).abs()
        seen.append((acc, exact))
        return real(acc, x, g, segments, **options)

    real = accumulators.accumulate_importance_
    monkeypatch.setattr(accumulators, "accumulate_importance_", recording)
    model = llama().to(dtype)
    scores = run(model)
    exact = {}
    for acc, value in seen:
        exact[acc.data_ptr()] = exact.get(acc.data_ptr(), 0) + value
    for name, entry in scores.entries.items():
        assert scores[name].dtype == torch.float32
        # What a loss is multiplied by is taken back from the sums at the end.
        scale = scores.manifest.get("loss_scale", 1.0)
        assert norm_error(entry.sums * scale, exact[entry.sums.data_ptr()]) < 1e-6
        rounded = exact[entry.sums.data_ptr()].to(dtype)
        assert norm_error(rounded, exact[entry.sums.data_ptr()]) > 1e-5
    monkeypatch.undo()
    whole = run(llama())
    assert all(norm_error(scores[name], whole[name]) < 0.1 for name in whole)


# Ctrl-C at every line of what changes a model, and at some of a whole run.

CHANGING = [hooks, capture, model_state, forward]
RUNNING = [*CHANGING, scoring, trial, workloads, accumulators, loss_check]


def files_of(modules):
    return {module.__file__ for module in modules}


def into_every_state(model):
    """In and out of every state that scoring puts a model and torch into."""
    targets = find_targets(model)
    with (
        model_state.strict_determinism(True),
        model_state.eager(),
        model_state.evaluation_state(model),
        model_state.frozen(model),
        model_state.fresh_leaves(model, [targets[0].module.weight]),
        capture.capturing(targets[:2], "weight", lambda *pair: None),
        capture.capturing(targets[-1:], "unit", lambda *pair: None),
        forward.target_logits(model),
    ):
        assert not model.training


def small():
    """A model of few modules, so that few lines run."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=8, n_positions=8, n_embd=4, n_layer=2, n_head=1, bos_token_id=1, eos_token_id=2
    )
    return unusual(GPT2LMHeadModel(config))


@pytest.mark.parametrize("others", [False, True], ids=["", "beside a hook of all modules"])
def test_an_interrupt_at_any_line_leaves_nothing_behind(others):
    model = small()
    other = register_module_forward_hook(lambda *args: None) if others else None
    try:
        before, everywhere = state_of(model), len(torch_module._global_forward_hooks)
        files = files_of(CHANGING)
        found = moments(lambda: into_every_state(model), files)
        assert len(found) > 100
        for moment in found:
            interrupt(lambda: into_every_state(model), files, moment)
            assert_same_state(before, state_of(model))
            assert len(torch_module._global_forward_hooks) == everywhere
            assert torch.backends.mha.get_fastpath_enabled()
    finally:
        if other is not None:
            other.remove()


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_an_interrupt_in_a_run_leaves_nothing_behind(granularity):
    model = small()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids}

    def whole():
        fastdean.score(model, [batch], granularity=granularity, progress=False)

    whole()
    before, files = state_of(model), files_of(RUNNING)
    for moment in moments(whole, files)[::20]:
        interrupt(whole, files, moment)
        assert_same_state(before, state_of(model))


def test_a_model_made_in_inference_mode_is_refused_before_it_runs():
    with torch.inference_mode():
        model = llama()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match="must have parameters that autograd can use, got model.e"):
        run(model)
    assert not calls
