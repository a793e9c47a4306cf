"""The side-by-side memory tool: what it counts, and what it calls a broken promise."""

import torch
from torch import nn

from tools.peer_memory import CASES, PEER, PLAIN, PROCESS_LIMIT, TENSOR_LIMIT, Followed, broken_promises, table


def result(share_of_tensors: float, share_of_process: float) -> dict:
    return {"over": share_of_tensors, "process": share_of_process, "seconds": 1.0, "total": 0, "host": 0, "process_before": 0}


def test_what_is_frozen_is_not_counted_and_what_is_trained_is():
    model = nn.Sequential(nn.Linear(100, 100, bias=False).requires_grad_(False), nn.Linear(100, 10, bias=False))
    kept_beside = torch.zeros(1000)  # as a library keeps a table that no module names
    followed = Followed(lambda _: None, model)
    with followed:
        model[0].weight.mul_(1.0)  # what is only changed is nothing new
        kept_beside.add_(1.0)
        made = torch.ones(500)
        del made
    found = followed.result(1.0, [])
    assert found["over"] == 4 * (100 * 10 + 500)
    assert found["over_alive"] == 4 * 500
    assert found["frozen"] >= 4 * (100 * 100 + 1000)
    assert found["process"] >= found["process_before"] > found["frozen"]


def test_a_share_above_its_limit_is_a_broken_promise():
    peer = result(1.0, 1.0)
    assert broken_promises({PEER: peer, PLAIN: result(TENSOR_LIMIT, PROCESS_LIMIT)}) == []
    assert len(broken_promises({PEER: peer, PLAIN: result(TENSOR_LIMIT + 0.01, PROCESS_LIMIT)})) == 1
    assert len(broken_promises({PEER: peer, PLAIN: result(TENSOR_LIMIT + 0.01, PROCESS_LIMIT + 0.01)})) == 2


def test_every_case_has_a_line_and_a_file_of_its_own():
    lines = table({case.name: result(1.0, 1.0) for case in CASES})
    assert len(lines) == 2 + len(CASES)
    assert len({case.file for case in CASES}) == len(CASES)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
