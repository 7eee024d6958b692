"""How ragged examples are cut into the blocks of tokens that the kernels walk through."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdean.kernels import token_blocks as module
from fastdean.kernels.token_blocks import placed_token_blocks, token_blocks


def by_hand(segments, owners, num_owners, block_tokens):
    """owner -> [(first row, rows left in the example)], one example after the other."""
    lists = [[] for _ in range(num_owners)]
    for (start, end), owner in zip(segments, owners, strict=True):
        for row in range(start, end, block_tokens):
            lists[owner].append([row, end - row])
    return lists


def read(blocks, first):
    return [blocks[lo:hi].tolist() for lo, hi in zip(first[:-1], first[1:], strict=True)]


cases = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 3)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200, database=None)
@given(cases, st.sampled_from([1, 16, 32, 64]))
def test_blocks_are_those_of_a_plain_loop(case, block_tokens):
    owners = sorted(owner for _, owner in case)
    ends = torch.tensor([length for length, _ in case]).cumsum(0)
    segments = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], dim=1)
    blocks, first = token_blocks(
        segments,
        num_rows=int(ends[-1]),
        block_tokens=block_tokens,
        owners=torch.tensor(owners),
        num_owners=4,
    )
    assert read(blocks, first) == by_hand(segments.tolist(), owners, 4, block_tokens)
    # One entry more than blocks: kernels load one ahead.
    assert len(blocks) == int(first[-1]) + 1


def test_segments_in_any_order_with_gaps_and_overlaps():
    segments = torch.tensor([[40, 45], [2, 37], [30, 33], [7, 7]])
    blocks, first = token_blocks(segments, num_rows=50, block_tokens=16)
    assert read(blocks, first) == by_hand(segments.tolist(), [0] * 4, 1, 16)


def test_segments_of_a_device_give_the_same_blocks_without_being_read():
    # The meta device holds no data: what can be made on it needs no value of its input.
    segments, owners = torch.tensor([[0, 40], [40, 41], [41, 90]]), torch.tensor([0, 2, 2])
    sizes = {"num_rows": 90, "block_tokens": 16, "num_owners": 3}
    blocks, first = token_blocks(segments, owners=owners, **sizes)
    made = token_blocks(segments.to("meta"), owners=owners.to("meta"), **sizes)
    assert len(made[0]) >= len(blocks) and made[1].shape == first.shape


def test_rows_beyond_the_inputs_are_left_out():
    blocks, first = token_blocks(torch.tensor([[-3, 2], [4, 99]]), num_rows=6, block_tokens=16)
    assert read(blocks, first) == [[[0, 2], [4, 2]]]


def test_a_batch_is_cut_once_for_all_its_layers():
    segments = torch.tensor([[0, 3], [3, 9]])
    place = {"num_rows": 9, "block_tokens": 16, "device": torch.device("cpu")}
    first = placed_token_blocks(segments, **place)
    assert placed_token_blocks(segments, **place) is first
    assert placed_token_blocks(segments.clone(), **place) is not first
    segments[1, 1] = 8
    assert placed_token_blocks(segments, **place)[0].tolist()[1] == [3, 5]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is none: `gpu.capturing` says whether its stream is captured into a graph.

    Copies to it stay on the CPU. Those that are captured arrive when `gpu.replay` is called.
    """
    state = SimpleNamespace(device=torch.device("cuda", 0), capturing=False, captured=[])

    def to(tensor, device, non_blocking):
        assert device == state.device and non_blocking
        arrived = torch.full_like(tensor, -1)
        state.captured.append((arrived, tensor))
        if not state.capturing:
            state.replay()
        return arrived

    def replay():
        for arrived, source in state.captured:
            arrived.copy_(source)
        state.captured.clear()

    state.replay = replay
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(module, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(module, "_COPIED_BY_GRAPHS", [])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "to", to)
    return state


def test_what_is_placed_while_a_graph_is_captured_is_for_the_graph_alone(gpu):
    segments = torch.tensor([[0, 3], [3, 9]])
    place = {"num_rows": 9, "block_tokens": 16, "device": gpu.device}
    gpu.capturing = True
    of_graph = placed_token_blocks(segments, **place)
    gpu.capturing = False
    # The graph has not run: its blocks hold nothing yet.
    outside = placed_token_blocks(segments, **place)
    assert read(*outside) == [[[0, 3], [3, 6]]]
    assert placed_token_blocks(segments, **place) is outside
    gpu.replay()
    assert read(*of_graph) == [[[0, 3], [3, 6]]]
    # What the graph copies from is there for every replay.
    assert len(module._COPIED_BY_GRAPHS) == 2


def test_a_graph_may_use_what_was_placed_before(gpu):
    segments = torch.tensor([[0, 3], [3, 9]])
    place = {"num_rows": 9, "block_tokens": 16, "device": gpu.device}
    before = placed_token_blocks(segments, **place)
    gpu.capturing = True
    assert placed_token_blocks(segments, **place) is before
    assert gpu.captured == [] and module._COPIED_BY_GRAPHS == []
