"""Weights on their way to a device: the order of events, with a lane that notes them."""

from __future__ import annotations

import threading
from itertools import groupby

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import llama

import fastdean
from fastdean.models.layers import replay, streaming, windows
from fastdean.models.layers.ahead import Ahead
from fastdean.models.loading import stream_model

OPTIONS = {"progress": False, "order": "layers", "keep_top": 0.05, "tokens_per_batch": 12}


class NotedLane:
    """Copies stand for transfers; what was sent is NaN until somebody waits for the event."""

    def __init__(self):
        self.events, self._sent, self._arriving = [], [], {}
        self.threads = set()

    def send(self, tensor):
        self.threads.add(threading.current_thread().name)
        there = torch.full_like(tensor, float("nan"))
        self._sent.append((there, tensor.clone()))
        return there

    def record(self):
        event = len(self._arriving)
        self._arriving[event], self._sent = self._sent, []
        self.events.append(("record", event))
        return event

    def wait(self, event, tensors):
        for (there, values), used in zip(self._arriving[event], tensors, strict=True):
            assert used is there
            there.copy_(values)
        self.events.append(("wait", event))


@pytest.fixture
def lane(monkeypatch):
    """What the windows send weights with, and when layers run."""
    noted, run = NotedLane(), replay.Replay.run

    def noting(self, k, arguments):
        noted.events.append(("run", k))
        return run(self, k, arguments)

    monkeypatch.setattr(replay.Replay, "run", noting)
    for module in (streaming, windows):
        monkeypatch.setattr(module, "lane_to", lambda device: noted)
    return noted


def assert_waited_for(events):
    """Layers ran in their order, each behind the wait for its weights where these were sent."""
    seen = [number if kind == "run" else kind for kind, number in events if kind != "record"]
    order = [each for each, _ in groupby(seen)]
    # The first is in memory from the trial on, or nothing was before it; the last is run forward
    # and then backward.
    assert order == [0, "wait", 1, "wait", 2, "wait", 1, "wait", 0]
    waits = [number for kind, number in events if kind == "wait"]
    assert waits == sorted(set(waits))
    for event in waits:
        assert events.index(("record", event)) < events.index(("wait", event))


def score(model):
    return fastdean.score(model, list(batches(make_examples(), 2)), **OPTIONS)


def three_layers():
    from transformers import LlamaForCausalLM

    config = llama().config
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def assert_same_bits(found, expected):
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)


def test_layers_of_files_are_sent_while_the_one_before_is_in_use(lane, tmp_path):
    three_layers().save_pretrained(tmp_path)
    expected = score(three_layers())
    lane.events.clear()
    stream = stream_model(str(tmp_path))
    assert_same_bits(score(stream), expected)
    assert_waited_for(lane.events)
    assert all(name.startswith("fastdean-weights") for name in lane.threads)
    assert not any(thread.name in lane.threads for thread in threading.enumerate())


def test_layers_that_are_offloaded_are_sent_while_the_one_before_is_in_use(lane):
    from accelerate import cpu_offload

    expected, model = score(three_layers()), three_layers()
    cpu_offload(model, execution_device=torch.device("cpu"))
    lane.events.clear()
    assert_same_bits(score(model), expected)
    assert_waited_for(lane.events)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_lane_that_fails_says_so_when_its_weights_are_wanted():
    def broken():
        raise OSError("the disk is gone")

    ahead = Ahead(NotedLane())
    ahead.begin("a", {"x": broken})
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take("a")
    ahead.close()


def test_where_two_windows_do_not_fit_the_second_is_not_sent():
    class Full(NotedLane):
        def send(self, tensor):
            raise torch.OutOfMemoryError

    ahead = Ahead(Full())
    ahead.begin("a", {"x": lambda: torch.ones(2)})
    assert ahead.take("a") is None


def test_what_nobody_takes_is_let_go():
    lane = NotedLane()
    ahead = Ahead(lane)
    ahead.begin("a", {"x": lambda: torch.ones(2)})
    ahead.begin("b", {"x": lambda: torch.zeros(2)})
    assert ahead.take("a") is None
    assert torch.equal(ahead.take("b")["x"], torch.zeros(2))
    assert ahead.take("b") is None
    ahead.close()


def test_nothing_is_sent_where_weights_are_used_where_they_are():
    ahead = Ahead(None)
    ahead.begin("a", {"x": lambda: torch.ones(2)})
    assert ahead.take("a") is None


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["files", "offloaded"])
def test_on_cuda_layers_that_come_and_go_give_the_scores_of_a_model_that_is_there(where, tmp_path):
    model = three_layers()
    if where == "files":
        model.save_pretrained(tmp_path)
        other = stream_model(str(tmp_path), device="cuda")
    else:
        from accelerate import cpu_offload

        other = three_layers()
        cpu_offload(other, execution_device=torch.device("cuda"))
    expected, found = score(model.cuda()), score(other)
    for name in expected:
        assert torch.equal(found.index(name), expected.index(name))
        torch.testing.assert_close(
            found.entries[name].sums, expected.entries[name].sums, rtol=1e-4, atol=0
        )
