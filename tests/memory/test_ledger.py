"""The ledger counts what is alive, once, under one term, and remembers the most of it."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qlite import offload
from qlite.memory import terms
from qlite.memory.ledger import Ledger
from qlite.model.blocks import decoder_blocks
from tests.tiny import tiny_llama

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_a_tensor_counts_from_its_making_to_its_end_and_its_views_not_at_all():
    ledger = Ledger()
    with ledger:
        a = kib(3)
        view = a.view(3, KIB)[1:].t()
        assert ledger.bytes == 3 * KIB
        del a
        assert ledger.bytes == 3 * KIB
        del view
    assert ledger.bytes == 0


def test_what_ends_outside_is_seen_to_end_and_what_is_made_outside_is_not_seen():
    ledger = Ledger()
    with ledger:
        a = kib(1)
    b = kib(5)
    assert ledger.bytes == KIB
    del a
    assert ledger.bytes == 0
    ledger.adopt([b], terms.ADAPTER)
    assert ledger.now == {terms.WORKSPACE: 0, terms.ADAPTER: 5 * KIB}


def test_each_phase_keeps_its_own_peak_by_term():
    ledger = Ledger()
    with ledger:
        base = kib(10)
        ledger.adopt([base], terms.BASE)
        with ledger.phase("one"):
            kib(4)
            kib(2)
        with ledger.phase("two", terms.OPTIMIZER):
            kept = [kib(1), kib(1)]
    assert ledger.moments["one", ""].terms == {terms.BASE: 10 * KIB, terms.WORKSPACE: 4 * KIB}
    assert ledger.moments["two", ""].terms == {terms.BASE: 10 * KIB, terms.OPTIMIZER: 2 * KIB}
    assert len(kept) == 2


def test_adopting_moves_a_tensor_and_counts_it_once():
    ledger = Ledger()
    with ledger:
        a = kib(2)
        for term in (terms.ADAPTER, terms.GRADIENTS, terms.GRADIENTS):
            ledger.adopt([a, a], term)
    assert {term: size for term, size in ledger.now.items() if size} == {terms.GRADIENTS: 2 * KIB}


def test_a_window_on_a_file_is_not_counted_and_what_is_made_of_it_is():
    ledger = Ledger()
    with ledger:
        window = offload.window(lambda: kib(8))
        copy = window.clone()
    assert ledger.bytes == copy.nbytes == 8 * KIB


def test_what_a_checkpoint_reads_is_not_counted_however_it_is_looked_at(tmp_path):
    save_file({"weight": torch.ones(2 * KIB)}, tmp_path / "file.safetensors")
    ledger = Ledger()
    with ledger, safe_open(tmp_path / "file.safetensors", "pt") as file:
        window = offload.window(lambda: file.get_tensor("weight"))
        copy = window[:KIB].clone()
    assert ledger.bytes == copy.nbytes


def test_host_memory_is_counted_apart():
    ledger = Ledger()
    with ledger:
        a = kib(2)
        copy = offload.host_copy(a, torch.device("cpu"))
        assert (ledger.bytes, ledger.host_bytes) == (2 * KIB, 2 * KIB)
        del copy
    assert ledger.host_bytes == 0
    assert ledger.moments["", ""].host == 2 * KIB


def test_terms_name_every_tensor_of_a_model_and_a_tied_one_once():
    model = tiny_llama("4 bit", tie_word_embeddings=True)
    ledger = Ledger()
    ledger.adopt_model(model)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    assert ledger.bytes == sum(storages.values())
    assert ledger.now[terms.VOCABULARY] == model.get_input_embeddings().weight.nbytes
    assert ledger.now[terms.BASE] == sum(module.weight.nbytes for name, module in model.named_modules() if name.endswith("proj"))


def test_places_in_the_model_say_what_is_kept_and_what_comes_and_goes():
    model = tiny_llama(num_hidden_layers=4)
    blocks = list(decoder_blocks(model).values())
    scale = nn.Parameter(torch.ones(()))
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, rows: rows * scale)
    ledger = Ledger()
    ids = torch.arange(12).view(2, 6)
    ledger.adopt_model(model)
    with ledger.following(model, blocks), ledger, ledger.phase("step"):
        states = model.base_model(ids, use_cache=False).last_hidden_state
        loss = states.square().mean()
        del states
        loss.backward()
    places = {where for _, where in ledger.moments}
    blocks_named = {f"{way}, {which}" for way in ("forward", "backward") for which in ("first block", "a middle block", "last block")}
    assert blocks_named | {"embedding", "head and loss"} <= places
    kept = [
        ledger.moments["step", f"forward, {which}"].terms.get(terms.SAVED, 0) for which in ("first block", "a middle block", "last block")
    ]
    assert kept[0] < kept[1] < kept[2]
    assert ledger.moments["step", "head and loss"].terms[terms.LOSS] > 0
    assert ledger.moments["step", "backward, first block"].terms[terms.SAVED] < kept[2]


def test_dense_weights_made_from_packed_ones_have_a_term_of_their_own():
    for storage, seen in (("4 bit", True), ("8 bit", True), ("16 bit", False)):
        model = tiny_llama(storage)
        ledger = Ledger()
        with ledger:
            linear = model.base_model.layers[0].mlp.up_proj
            linear(torch.ones(1, 64))
        assert any(terms.DEQUANTISED in peak.terms for peak in ledger.moments.values()) == seen
