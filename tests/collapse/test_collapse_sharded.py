"""A model whose weights lie on several ranks learns from the term as a whole one in one process.

The processes are started once; each goes through all situations, and the tests read what came out.
"""

from __future__ import annotations

import os
import traceback
from signal import SIGKILL

import forked
import pytest
import torch
from regularized import (
    BATCHES,
    JOINED,
    STRENGTH,
    batches_of,
    require_same_training,
    total_loss,
    trained,
    unlabelled,
    whole,
)
from tiny_classes import rich_batches, some_classes
from tiny_data import make_examples
from tiny_models import VOCAB, bert, llama, qwen2
from tiny_split import by_torch, layers_by_torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from two_ranks import WORLD, join_group, leave_group, run_ranks

from fastdean import CollapseRegularizer
from fastdean.collapse import CollapseClasses, collapse_metrics, nearest_mean_agreement
from fastdean.models.ranks import lost_ranks

CUMULATIVE = {}
WINDOW = {"mode": "window", "decay": 0.5}
LIVE = {"detach_features": False, "statistic": "mean", **WINDOW}
LIVE_BATCH = {"detach_features": False, "mode": "batch"}

# Words of several pieces, some of them shared, in both halves of the vocabulary.
PIECES = ((5,), (9, 60), (60,), (20, 5), (44,), (31,), (80, 81, 82))
OF_PIECES = CollapseClasses(
    pieces=PIECES, words=tuple(map(str, PIECES)), groups=("group",) * len(PIECES)
)


def fully(model, folder=None, **options):
    """As users do it: each layer, then the model."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def in_units(model, folder=None):
    """As accelerate and transformers do it: embedding, norm and head in units of their own."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is head.weight:
        fully_shard([model.model.norm, table, head], reshard_after_forward=False)
    else:
        fully_shard(table)
        fully_shard(head)
    return fully_shard(model)


def by_columns(model, folder=None):
    from torch.distributed.tensor import Shard

    return fully(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)


def loaded(model, folder, **options):
    """As transformers splits it, by its own plan."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**options)
    name = type(model).__name__
    return AutoModelForCausalLM.from_pretrained(
        folder / name, distributed_config=config, dtype=torch.float64
    )


def of_layers(model, folder=None, mesh=None):
    """The layers split by torch; embedding and head are whole on every rank."""
    return layers_by_torch(model, mesh_of(WORLD) if mesh is None else mesh)


def with_head(model, folder=None, mesh=None):
    return by_torch(model, mesh_of(WORLD) if mesh is None else mesh)


def of_sequences(model, folder):
    """A rank has its own part of each sequence between the layers and the head."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        parallelize_module,
    )

    cut = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
    )
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    plan = {"model.norm": cut, "lm_head": head}
    return of_layers(parallelize_module(model, mesh_of(WORLD), plan))


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    names = ("dp", "tp")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def uneven(build=llama):
    """A vocabulary of which the last rank has fewer rows."""
    config = build().config
    config.vocab_size = VOCAB + 5
    torch.manual_seed(0)
    return type(build())(config).eval()


def rows(lengths, seed):
    return [
        {"input_ids": ids, "labels": ids}
        for ids, _ in make_examples(lengths=lengths, seed=seed, vocab=VOCAB)
    ]


TEXT = rows((30, 9, 41, 2, 25, 17, 33), 0)
HELD_OUT = rows((40, 12, 3), 1)
NO_WORDS = [{"input_ids": torch.full((6,), 3), "labels": torch.full((6,), 3)}]


def loaded_fully(model, folder):
    return loaded(model, folder, fsdp_size=WORLD)


def loaded_split(model, folder):
    return loaded(model, folder, tp_size=WORLD)


# Name of a situation: the model, the options, the classes, and how it is sharded; the second kind
# gives all ranks the same batches.
FSDP = {
    "tied": (qwen2, WINDOW, OF_PIECES, in_units),
    "columns": (uneven, LIVE_BATCH, OF_PIECES, by_columns),
}
TP = {
    "loaded": (llama, CUMULATIVE, OF_PIECES, loaded_split),
    "by torch": (uneven, LIVE_BATCH, None, with_head),
}
FURTHER_FSDP = {
    "llama": (llama, CUMULATIVE, None, fully),
    "units": (llama, LIVE, None, in_units),
    "uneven": (uneven, LIVE, None, fully),
    "loaded": (llama, LIVE, None, loaded_fully),
    "loaded, tied": (qwen2, CUMULATIVE, None, loaded_fully),
}
FURTHER_TP = {
    "tied": (qwen2, LIVE, None, loaded_split),
    "layers alone": (llama, WINDOW, None, of_layers),
    "sequences": (llama, LIVE, None, of_sequences),
}


def fsdp(rank, build, options, classes, shard, folder):
    model = shard(build().double(), folder)
    return trained(model, BATCHES[rank], options, scale=WORLD / 50, classes=classes)


def attached_first(rank, folder):
    """The regulariser is there when the model is sharded, as in a Trainer."""
    return trained(llama().double(), BATCHES[rank], LIVE, scale=WORLD / 50, shard=in_units)


def tp(rank, build, options, classes, shard, folder):
    model = shard(build().double(), folder)
    return trained(model, JOINED, options, classes=classes)


class Sent(TorchDispatchMode):
    """Counts the bytes that collectives are given."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            # What it sends comes here again.
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self.total += sum(leaf.nbytes for leaf in tree_leaves(args[0]) if torch.is_tensor(leaf))
        return func(*args, **(kwargs or {}))


def sent_by(model, batch, regularizer=None):
    with Sent() as sent:
        loss = total_loss(model(**unlabelled(batch)).logits, batch["labels"])
        (loss if regularizer is None else loss + regularizer.term()).backward()
    return sent.total


def sent(rank, folder):
    """By the regulariser alone, for batches of two lengths."""
    models = {
        "fsdp": (fully(llama().double()), CUMULATIVE),
        "fsdp live": (fully(llama().double()), LIVE_BATCH),
        "tp": (with_head(llama().double()), LIVE_BATCH),
    }
    found = {}
    for name, (model, options) in models.items():
        model.train()
        found[name] = []
        for columns in (12, 48):
            batch = next(rich_batches(1, columns=columns, seed=rank if "fsdp" in name else 0))
            sent_by(model, batch)
            plain = sent_by(model, batch)
            with CollapseRegularizer(model, some_classes(), STRENGTH, **options) as regularizer:
                # Once it is found out which ranks train together.
                sent_by(model, batch, regularizer)
                found[name].append(sent_by(model, batch, regularizer) - plain)
    return found


def apart(rank, folder):
    """The term's gradient together with that of the model's loss, before it and behind it, and
    where the gradients of the first batch are reduced with those of the second.
    """
    orders = {}
    for order in ("together", "before", "behind", "deferred"):
        model = in_units(llama().double()).train()
        with CollapseRegularizer(model, some_classes(), STRENGTH, **CUMULATIVE) as regularizer:
            for number, batch in enumerate(BATCHES[rank][:2]):
                model.set_requires_gradient_sync(order != "deferred" or number == 1)
                loss = total_loss(model(**unlabelled(batch)).logits, batch["labels"])
                term = regularizer.term()
                if order in ("together", "deferred"):
                    loss, term = loss + term, None
                for each in (term, loss) if order == "before" else (loss, term):
                    if each is not None:
                        each.backward()
        orders[order] = {name: whole(p.grad) for name, p in model.named_parameters()}
    return orders


def divided_otherwise(rank, folder):
    """As users do it whose loss is divided by the items of all ranks: gradients are summed."""
    model = fully(llama().double())
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    for layer in model.model.layers:
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
    return trained(model, BATCHES[rank], LIVE, scale=1 / 50)


def kept_by_one(rank, folder):
    """A training that goes on with statistics that the first rank saved."""

    def save_and_load(model, regularizer):
        path = folder / "statistics.pt"
        if rank == 0:
            torch.save(regularizer.state_dict(), path)
        torch.distributed.barrier()
        stored = torch.load(path)
        regularizer.state.reset()
        regularizer.load_state_dict(stored)
        torch.distributed.barrier()

    options = {"scale": WORLD / 50, "after": save_and_load}
    return trained(fully(llama().double()), BATCHES[rank], WINDOW, **options)


def measured(model, text, held_out):
    metrics = collapse_metrics(model, text, OF_PIECES).across_ranks()
    nearest = nearest_mean_agreement(model, held_out, OF_PIECES, metrics).across_ranks()
    return metrics.with_nearest(nearest).to_dict()


def llama_in_units():
    return in_units(llama().double())


def bert_in_layers():
    from torch.distributed.fsdp import fully_shard

    model = bert().double()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def llama_split():
    return with_head(llama().double())


def bert_split():
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = bert().double()
    for layer in model.bert.encoder.layer:
        plan = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        parallelize_module(layer, mesh_of(WORLD), plan)
    return model


# How the model is made, of which kind, and whether the ranks have parts of the text.
MEASURED = {"fsdp": (bert_in_layers, bert, True), "tp": (llama_split, llama, False)}
FURTHER_MEASURED = {
    "fsdp llama": (llama_in_units, llama, True),
    "tp bert": (bert_split, bert, False),
}


def in_parts(rank, make, in_parts):
    """With unlike parts of the text, of which one has no listed word; or with the same text."""
    model = make()
    if not in_parts:
        return measured(model, TEXT, HELD_OUT)
    found = measured(model, TEXT[rank::WORLD], NO_WORDS if rank else HELD_OUT)
    # Who makes an optimizer now has the weights that the ranks hold.
    assert {type(weight).__name__ for weight in model.parameters()} == {"DTensor"}
    return found


def refused(rank, folder):
    alone = mesh_of(WORLD, 1)["tp"]
    model = fully(llama(), mesh=alone).train()
    regularizer = CollapseRegularizer(model, some_classes(), STRENGTH)
    split = with_head(llama())
    return {
        "a part": message_of(lambda: model(input_ids=torch.ones(1, 4, dtype=torch.int64))),
        "rows": message_of(lambda: some_classes().rows(split.lm_head.weight)),
        "texts": message_of(
            lambda: collapse_metrics(split, TEXT[rank:], some_classes(), progress=False)
        ),
        "a failure": message_of(
            lambda: collapse_metrics(
                fully(llama()), broken_off(rank), some_classes(), progress=False
            )
        ),
        "steps": regularizer.step,
    }


def broken_off(rank):
    yield from TEXT[:2]
    if rank:
        raise OSError("of a disk")


def message_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def attempt(call, *arguments):
    try:
        return call(*arguments)
    except Exception:
        return traceback.format_exc()


def trained_models(rank, folder, of_fsdp, of_tp):
    return {
        **{("fsdp", name): attempt(fsdp, rank, *how, folder) for name, how in of_fsdp.items()},
        **{("tp", name): attempt(tp, rank, *how, folder) for name, how in of_tp.items()},
    }


def measured_models(rank, models):
    return {
        ("metrics", name): attempt(in_parts, rank, make, parts)
        for name, (make, _, parts) in models.items()
    }


def checked_models(rank, folder, checks):
    return {check.__name__: attempt(check, rank, folder) for check in checks}


def worker(rank, folder):
    join_group(rank, folder)
    found = trained_models(rank, folder, FSDP, TP) | measured_models(rank, MEASURED)
    found |= checked_models(rank, folder, [attached_first, sent, kept_by_one, refused])
    leave_group(rank, folder, found)


def further(rank, folder):
    join_group(rank, folder)
    found = trained_models(rank, folder, FURTHER_FSDP, FURTHER_TP)
    found |= measured_models(rank, FURTHER_MEASURED)
    found |= checked_models(rank, folder, [apart, divided_otherwise])
    leave_group(rank, folder, found)


def save_models(folder):
    for build in (llama, qwen2):
        model = build().double()
        model.save_pretrained(folder / type(model).__name__)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each situation."""
    folder = tmp_path_factory.mktemp("ranks")
    save_models(folder)
    return run_ranks(worker, folder)


def of(result, name):
    assert not isinstance(result[name], str), result[name]
    return result[name]


def require_same_trainings(ranks, kind, situations):
    for name, (build, options, classes, _) in situations.items():
        expected = trained(build().double(), JOINED, options, classes=classes)
        for found in ranks:
            require_same_training(of(found, (kind, name)), expected)
        for steps in zip(*(of(found, (kind, name))[0] for found in ranks), strict=True):
            # To the bit.
            assert torch.equal(steps[0]["sums"], steps[1]["sums"])


@pytest.mark.parametrize("kind, situations", [("fsdp", FSDP), ("tp", TP)])
def test_a_sharded_model_is_trained_as_a_whole_one(found, kind, situations):
    require_same_trainings(found, kind, situations)


def test_a_model_may_be_sharded_when_the_regulariser_is_attached(found):
    expected = trained(llama().double(), JOINED, LIVE)
    for result in found:
        require_same_training(of(result, "attached_first"), expected)


def test_statistics_that_one_rank_saved_are_every_ranks(found):
    expected = trained(llama().double(), JOINED, WINDOW)
    for result in found:
        require_same_training(of(result, "kept_by_one"), expected)


def test_rows_and_statistics_alone_are_sent_whatever_the_number_of_tokens(found):
    classes, width, double = len(some_classes()), 32, 8
    rows = statistics = classes * width * double
    counts = classes * double
    for result in found:
        # Rows there and their gradient back; sums and counts; of live features those of a batch
        # and the gradient of the sums.
        assert of(result, "sent") == {
            "fsdp": [2 * rows + statistics + counts] * 2,
            "fsdp live": [2 * rows + 2 * (statistics + counts)] * 2,
            "tp": [rows] * 2,
        }


def require_same_metrics(ranks, models):
    for name, (_, build, _) in models.items():
        expected = measured(build().double(), TEXT, HELD_OUT)
        for found in ranks:
            result = of(found, ("metrics", name))
            assert result["counts"] == expected["counts"]
            assert result["nearest"] == expected["nearest"]
            for value, exact in expected["values"].items():
                assert result["values"][value]["value"] == pytest.approx(exact["value"], rel=1e-7)


def test_metrics_of_a_sharded_model_are_those_of_a_whole_one(found):
    require_same_metrics(found, MEASURED)


@pytest.mark.parametrize(
    "how, text",
    [
        ("a part", "ValueError: model must be sharded by fully_shard over all 2 ranks that have"),
        ("rows", "ValueError: embedding must be a plain tensor where its rows need a gradient"),
        ("texts", "ValueError: loader must have the same text on all ranks over which tensor"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(found, how, text):
    for result in found:
        assert text in of(result, "refused")[how]
        assert of(result, "refused")["steps"] == 0


def test_a_rank_whose_text_breaks_off_ends_the_measurement_on_all(found):
    first, second = (of(result, "refused")["a failure"] for result in found)
    assert "StateError: every rank must finish its part of the work, got 1 of 2 that fail" in first
    assert second == "OSError: of a disk"


@pytest.mark.slow
def test_other_models_and_ways_to_shard_them(tmp_path):
    save_models(tmp_path)
    ranks = run_ranks(further, tmp_path)
    require_same_trainings(ranks, "fsdp", FURTHER_FSDP)
    require_same_trainings(ranks, "tp", FURTHER_TP)
    require_same_metrics(ranks, FURTHER_MEASURED)
    # Whose gradients are summed counts the term of every rank.
    expected = trained(llama().double(), JOINED, LIVE, strength=WORLD * STRENGTH)
    for result in ranks:
        together, *others = of(result, "apart").values()
        for other in others:
            torch.testing.assert_close(other, together, rtol=1e-12, atol=1e-14)
        require_same_training(of(result, "divided_otherwise"), expected)


def replicated(model, folder):
    """HSDP: sharded over two ranks, twice."""
    return fully(model, mesh=mesh_of(2, 2))


def in_both_ways(model, folder):
    """Split over two ranks by tensor parallel, and each part sharded over two by FSDP2."""
    mesh = mesh_of(2, 2)
    return fully(with_head(model, mesh=mesh["tp"]), mesh=mesh["dp"])


def layers_in_both_ways(model, folder):
    mesh = mesh_of(2, 2)
    return fully(of_layers(model, mesh=mesh["tp"]), mesh=mesh["dp"])


def loaded_in_both_ways(model, folder):
    return loaded(model, folder, tp_size=2, fsdp_size=2)


def in_teams(model, folder):
    """Split over two ranks by tensor parallel, twice."""
    return with_head(model, mesh=mesh_of(2, 2)["tp"])


def averaged_by_hand(model):
    """Of the ranks that hold the same blocks: 0 and 2, and 1 and 3."""
    groups = [torch.distributed.new_group(ranks) for ranks in ((0, 2), (1, 3))]
    group = groups[torch.distributed.get_rank() % 2]
    for parameter in model.parameters():
        grad = getattr(parameter.grad, "_local_tensor", parameter.grad)
        torch.distributed.all_reduce(grad, group=group)
        grad /= 2


OF_FOUR, JOINED_OF_FOUR = batches_of(4)
# How it is sharded, the batches of each rank, and who averages the gradients.
FOURS = {
    "replicated": (replicated, [0, 1, 2, 3], None),
    "both": (in_both_ways, [0, 0, 1, 1], None),
    "layers in both": (layers_in_both_ways, [0, 0, 1, 1], None),
    "loaded in both": (loaded_in_both_ways, [0, 0, 1, 1], None),
    "teams": (in_teams, [0, 0, 1, 1], averaged_by_hand),
}
OPTIONS = {"detached": WINDOW, "live": LIVE}


def of_four(rank, folder, how, options):
    shard, turns, averaged = FOURS[how]
    model = shard(llama().double(), folder)
    scale = len(set(turns)) / 50
    return trained(model, OF_FOUR[turns[rank]], options, scale=scale, averaged=averaged)


def four_ranks(rank, folder):
    join_group(rank, folder, world=4)
    found = {
        (how, name): attempt(of_four, rank, folder, how, options)
        for how in FOURS
        for name, options in OPTIONS.items()
    }
    share = [0, 0, 1, 1][rank]
    models = {
        "teams": (in_teams(llama().double(), folder), TEXT[share::2]),
        "both": (in_both_ways(llama().double(), folder), TEXT[share::2]),
        "replicated": (replicated(llama().double(), folder), TEXT[rank::4]),
    }
    for name, (model, text) in models.items():
        found["metrics", name] = attempt(measured, model, text, text)
    leave_group(rank, folder, found)


@pytest.mark.slow
def test_four_ranks_in_two_dimensions_train_as_one_does(tmp_path):
    save_models(tmp_path)
    ranks = run_ranks(four_ranks, tmp_path, world=4)
    for how, (_, turns, _) in FOURS.items():
        batches = JOINED_OF_FOUR if len(set(turns)) == 4 else JOINED
        for name, options in OPTIONS.items():
            expected = trained(llama().double(), batches, options)
            for found in ranks:
                require_same_training(of(found, (how, name)), expected)
    expected = measured(llama().double(), TEXT, TEXT)
    for name in ("teams", "both", "replicated"):
        for rank in range(4):
            result = of(ranks[rank], ("metrics", name))
            assert result["counts"] == expected["counts"]
            assert result["nearest"] == expected["nearest"]


def dies_while_it_is_measured(rank, folder):
    """One rank is killed in the first forward pass, in which FSDP gathers weights."""
    join_group(rank, folder)
    lost_ranks._SOON, lost_ranks._LOOK = 1.0, 0.1
    model = llama()
    if rank == 1:
        model.model.layers[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), SIGKILL))
    fully(model)
    with pytest.raises(RuntimeError) as error:
        collapse_metrics(model, TEXT, some_classes(), progress=False)
    torch.save(f"{type(error.value).__name__}: {error.value}", folder / f"rank{rank}.pt")
    os._exit(0)  # torch waits for what FSDP has begun


def test_a_rank_that_is_lost_while_the_model_is_measured_is_named(tmp_path):
    """What the other hears says nothing of the model, such as that it is no language model."""
    started = [forked.start(dies_while_it_is_measured, rank, tmp_path) for rank in range(WORLD)]
    codes = [process.finish() for process in started]
    assert codes[0].returncode == 0, codes[0].stderr
    heard = torch.load(tmp_path / "rank0.pt")
    assert heard.startswith("StateError: every rank must stay to the end of the job, got no answer")
    assert "from rank 1 of 2" in heard
