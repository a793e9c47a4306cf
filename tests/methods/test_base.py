"""Adapters can be switched off in place: the model answers as its base does, and afterwards as before, bit for bit."""

import pytest
import torch

from qlite.errors import ModelError
from qlite.methods.base import Beside, adapted_linears, adapters_off
from qlite.model.documents import attend_by_documents
from tests.methods.test_contract import IDS, MOVED_BASE, NO_WAY_BACK, adapted, is_any, storages, variants
from tests.tiny import tiny_llama


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@storages
@variants
def test_inside_it_is_the_base_and_outside_the_adapted_model_bit_for_bit(name, storage):
    model = adapted(name, storage)
    if is_any(name, NO_WAY_BACK):
        before = logits_of(model)
        with pytest.raises(ModelError, match="the base is not in it any more"), adapters_off(model):
            pass
        assert torch.equal(logits_of(model), before)
        return
    own = tiny_llama(storage)
    attend_by_documents(own)
    base = logits_of(own)
    before = logits_of(model)
    assert not torch.equal(before, base)
    with adapters_off(model):
        inside = logits_of(model)
    if name in MOVED_BASE:  # what the factors began with was taken out of the frozen weight, and is put beside it
        assert (inside - base).norm() < 0.2 * (before - base).norm()
    else:
        assert torch.equal(inside, base)
    assert torch.equal(logits_of(model), before)


@variants
def test_the_same_modules_stand_in_the_same_places_afterwards(name):
    if is_any(name, NO_WAY_BACK):
        pytest.skip("puts no module into the model")
    model = adapted(name)
    before = list(model.named_modules())
    beside = [module for module in model.modules() if isinstance(module, Beside)]
    count = len(list(adapted_linears(model)))
    assert count + len(beside) > 0
    with adapters_off(model):
        assert list(adapted_linears(model)) == []
        assert (len(list(model.modules())) < len(before)) == (count > 0)
        assert all(module.is_off for module in beside)
    assert list(model.named_modules()) == before
    assert not any(module.is_off for module in beside)


def test_one_inside_another_switches_back_only_at_the_end_of_the_outer_one():
    base, model = logits_of(tiny_llama()), adapted("lora")
    before = logits_of(model)
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(logits_of(model), base)
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_adapters_are_back(error):
    model = adapted("lora")
    before = logits_of(model)
    with pytest.raises(error), adapters_off(model):
        raise error
    assert torch.equal(logits_of(model), before)


def test_a_model_set_to_eval_inside_is_in_eval_everywhere_afterwards():
    model = adapted("lora").train()
    with adapters_off(model):
        model.eval()
    assert [name for name, module in model.named_modules() if module.training] == []


def test_a_model_without_adapters_is_left_as_it_is():
    model = tiny_llama()
    before = list(model.named_modules())
    with adapters_off(model):
        assert list(model.named_modules()) == before
