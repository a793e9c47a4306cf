"""Several adapters over one base, computed in one pass, are what each is alone: outputs and gradients."""

import pytest
import torch

from qlite.errors import RecipeError
from qlite.methods import METHODS
from qlite.methods.base import adapted_linears, trainable_tensors
from qlite.methods.together import join
from qlite.methods.views import view_of
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import attend_by_documents
from qlite.model.fusing import fuse
from tests.tiny import tiny_llama

LORA = METHODS["lora"]
KINDS = {
    "r4": LORA(rank=4),
    "r2, hot": LORA(rank=2, alpha=64.0),
    "few": LORA(rank=8, targets=("q_proj", "*.1.mlp.*")),
    "rs": LORA(rank=3, rslora=True),
}
IDS = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(1))
ROWS = (2, 1, 1, 1)


def moved(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in trainable_tensors(model).values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def joined(storage: str, methods=KINDS, fused: bool = True):
    model = tiny_llama(storage)
    attend_by_documents(model)
    if fused:
        fuse(model)
    views = []
    for seed, method in enumerate(methods.values()):
        views.append(view_of(model))
        torch.manual_seed(seed)
        method.attach(views[-1])
        moved(views[-1], seed)
    return model, views, join(model, views)


def alone(storage: str, seed: int, method) -> torch.nn.Module:
    model = tiny_llama(storage)
    attend_by_documents(model)
    torch.manual_seed(seed)
    method.attach(model)
    return moved(model, seed).train()


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kept", ["everything", "inputs", "attention"])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_a_group_answers_and_learns_as_its_adapter_alone_does(storage, kept):
    model, views, groups = joined(storage)
    model.train()
    if kept != "everything":
        checkpoint_blocks(model, keep_attention=kept == "attention")
    groups.rows, groups.members = ROWS, tuple(range(4))
    logits = model(input_ids=IDS).logits.split(ROWS)
    sum(loss_of(own, ids) for own, ids in zip(logits, IDS.split(ROWS), strict=True)).backward()
    for seed, (method, view, ids) in enumerate(zip(KINDS.values(), views, IDS.split(ROWS), strict=True)):
        single = alone(storage, seed, method)
        want = single(input_ids=ids).logits
        loss_of(want, ids).backward()
        torch.testing.assert_close(logits[seed], want, atol=1e-5, rtol=1e-4)
        expected = {name: p.grad for name, p in trainable_tensors(single).items()}
        found = {name: p.grad for name, p in trainable_tensors(view).items()}
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name  # float32; measured 2.2e-5


def test_models_that_are_not_asked_for_get_no_gradient():
    model, views, groups = joined("4 bit")
    groups.rows, groups.members = (3, 2), (2, 0)
    logits = model.train()(input_ids=IDS).logits
    loss_of(logits, IDS).backward()
    has_grad = [any(p.grad is not None for p in trainable_tensors(view).values()) for view in views]
    assert has_grad == [True, False, True, False]


def test_dora_computes_on_its_own_rows():
    methods = {"dora": LORA(rank=2, dora=True), "plain": LORA(rank=2)}
    model, _, groups = joined("4 bit", methods)
    groups.rows, groups.members = (3, 2), (0, 1)
    found = model.eval()(input_ids=IDS).logits.split((3, 2))
    for seed, (method, ids) in enumerate(zip(methods.values(), IDS.split((3, 2)), strict=True)):
        torch.testing.assert_close(found[seed], alone("4 bit", seed, method).eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_with_dropout_every_group_drops_its_own_share_and_a_second_pass_the_same():
    methods = {"half": LORA(rank=4, dropout=0.5), "none": LORA(rank=4)}
    grads = []
    for checkpointed in (False, True):
        model, views, groups = joined("4 bit", methods)
        if checkpointed:
            checkpoint_blocks(model)
        groups.rows, groups.members = (3, 2), (0, 1)
        torch.manual_seed(7)
        loss_of(model.train()(input_ids=IDS).logits, IDS).backward()
        grads.append([{name: p.grad for name, p in trainable_tensors(view).items()} for view in views])
    for one, other in zip(*grads, strict=True):
        assert all(torch.equal(grad, other[name]) for name, grad in one.items())
    single = alone("4 bit", 1, methods["none"])
    torch.testing.assert_close(model.train()(input_ids=IDS).logits[3:], single(input_ids=IDS[3:]).logits, atol=1e-5, rtol=1e-4)


def test_views_share_every_weight_and_nothing_that_is_put_into_one_is_in_another():
    model = tiny_llama("4 bit")
    fuse(model)
    one, other = view_of(model), view_of(model)
    KINDS["r4"].attach(one)
    one.train()
    other.eval()
    assert list(adapted_linears(other)) == list(adapted_linears(model)) == []
    assert len(list(adapted_linears(one))) == 14
    assert one.training
    assert not other.model.layers[0].self_attn.training
    own = {id(t) for t in trainable_tensors(one).values()}
    assert {id(t) for t in one.parameters()} - own == {id(t) for t in model.parameters()}
    assert {id(t) for t in one.buffers()} == {id(t) for t in model.buffers()}
    assert one.get_output_embeddings() is model.get_output_embeddings()
    base = model(input_ids=IDS).logits
    moved(one, 0)
    assert torch.equal(other(input_ids=IDS).logits, base)
    assert not torch.equal(one.eval()(input_ids=IDS).logits, base)


def test_what_is_trained_otherwise_than_by_lora_is_refused():
    model = tiny_llama()
    view = view_of(model)
    LORA(rank=2, modules_to_save=("lm_head",)).attach(view)
    with pytest.raises(RecipeError, match="lm_head is trained otherwise than by LoRA"):
        join(model, [view])
