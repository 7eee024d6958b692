"""Commands of a process whose memory is limited (`ulimit -v`): they manage, or say so in a line."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

import forked
import pytest
import torch
from tiny_folders import rows, tokenizer, write_jsonl

import fastdean

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the process's size is read from /proc"
)
MB = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of 75 MB, and the rows to score it on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("limited")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=512,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", rows(6, 0, unsafe=False))
    return folder


def limited(room, *arguments):
    """`fastdean arguments` in a process that may grow by so many bytes of address space."""
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    most = int(size[1]) * 1024 + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    forked.run_command(*arguments)


def score(place, room, *options):
    asked = ["--model", place / "model", "--data", place / "rows.jsonl", "--out", place / "out"]
    # A pool of threads takes address space of its own.
    threads = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = forked.start(limited, room, "score", *map(str, asked), *options, environment=threads)
    return process.finish()


def lines_of(process):
    """What a command said, without the bars and lines that show how far it is."""
    said = [line for line in process.stderr.splitlines() if line.startswith("fastdean: ")]
    progress = re.compile(r"tokens/s|fewer than|: step \d of \d, ")
    return [line for line in said if not progress.search(line)]


def test_auto_goes_layer_by_layer_where_the_sums_do_not_fit(place):
    """Sums of 600 MB, both kinds, are more than the process may grow by."""
    done = score(place, 540 * MB, "--signs")
    assert done.returncode == 0, done.stderr
    order = fastdean.Scores.from_pretrained(place / "out").manifest["order"]
    assert order["by"] == "layers" and "do not fit into" in order["why"]
    assert lines_of(done) == []
    shutil.rmtree(place / "out")


@pytest.mark.parametrize("order", ["auto", "batches"])
def test_what_does_not_fit_at_all_is_said_in_one_line(place, order):
    before = sorted(os.listdir(place))
    done = score(place, 150 * MB, "--order", order)
    assert done.returncode == 2
    (line,) = lines_of(done)
    assert line.startswith("fastdean: memory must hold what the command takes, got an error for ")
    assert line.endswith("`fastdean estimate` says how much a job takes")
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(place)) == before
