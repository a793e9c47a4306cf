"""AdaLoRA beside PEFT's over a whole schedule, and what is its own: where it may be used, what it tells, what a stop keeps."""

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from qlite.errors import RecipeError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.peft import write_adapter
from qlite.methods.adalora import AdaLoRA
from qlite.methods.base import trainable_tensors
from qlite.optim.build import Optimizer
from tests.marks import slow
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

STEPS, CPU = 20, torch.device("cpu")
METHOD = AdaLoRA(rank=2, start_rank=4, alpha=8.0, targets=("q_proj", "up_proj"), start_share=0.2, final_share=0.3, interval=2)
THEIRS = AdaLoraConfig(
    target_r=2, init_r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], tinit=4, tfinal=6, deltaT=2, total_step=STEPS,
    task_type="CAUSAL_LM",
)  # fmt: skip
BATCHES = torch.randint(0, 64, (STEPS, 2, 9), generator=torch.Generator().manual_seed(1))


def peft_losses(order: str, start: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of PEFT's AdaLoRA from ``start``, and what it ends with. ``order``: "peft", or "paper".

    "peft": PEFT's own call after the optimizer's step, whose sensitivities are the new weight times the old gradient. "paper": the same
    functions of PEFT's, but the sensitivities before the step, where gradient and weight belong to each other.
    """
    model = get_peft_model(tiny_llama(), THEIRS).train()
    inner, allocator = model.base_model.model, model.base_model.rankallocator
    own = {n.replace(".default", ""): p for n, p in inner.named_parameters() if p.requires_grad}
    assert own.keys() == start.keys()
    for name, p in own.items():
        p.data.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0)
    losses = []
    for step, ids in enumerate(BATCHES, start=1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        last = THEIRS.total_step - THEIRS.tfinal
        if order == "paper" and step < last:
            allocator.update_ipt(inner)
        optimizer.step()
        if order == "peft":
            model.base_model.update_and_allocate(step)
        else:
            budget, is_due = allocator.budget_schedule(step)
            if step <= last and (is_due or step == last):
                THEIRS.rank_pattern = allocator.mask_to_budget(inner, budget)
            elif step > last:
                allocator.mask_using_rank_pattern(inner, THEIRS.rank_pattern)
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in own.items()}


def our_losses(model: nn.Module, method: AdaLoRA = METHOD) -> list[float]:
    optimizer = Optimizer(name="torch_adamw", lr=1e-2).build(method.param_groups(model, 1e-2), CPU)
    losses = []
    for step, ids in enumerate(BATCHES, start=1):
        loss = model(input_ids=ids, labels=ids).loss + method.penalty(model)
        loss.backward()
        losses.append(loss.item())
        method.before_step(model, optimizer, step, STEPS)
        optimizer.step()
        method.after_step(model, optimizer, step, STEPS)
    return losses


def attached(storage: str = "16 bit", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_llama(storage, dtype)
    torch.manual_seed(4)
    METHOD.attach(model)
    return model.train()


def test_losses_and_weights_over_a_whole_schedule_are_pefts():
    model = attached()
    start = {n: p.detach().clone() for n, p in trainable_tensors(model).items()}
    ours = our_losses(model)
    losses, ends = peft_losses("paper", start)
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < 2e-5
    for name, p in trainable_tensors(model).items():
        torch.testing.assert_close(p, ends[name], atol=2e-4, rtol=0)
        if name.endswith("lora_E"):
            assert torch.equal(p == 0, ends[name] == 0)


def test_pefts_own_order_of_step_and_sensitivity_keeps_nearly_the_same_triplets():
    model = attached()
    start = {n: p.detach().clone() for n, p in trainable_tensors(model).items()}
    ours = our_losses(model)
    losses, ends = peft_losses("peft", start)
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < 0.05
    same = [bool(a) == bool(b) for n, p in trainable_tensors(model).items() if n.endswith("E") for a, b in zip(p, ends[n], strict=True)]
    assert sum(same) >= 0.8 * len(same)


def test_the_budget_falls_by_the_cube_to_the_mean_rank_asked_for():
    """arXiv:2303.10512, equation 12, for 4 linears: from 16 triplets to 8 between steps 4 and 14."""
    got = [METHOD.budget(4, step, STEPS) for step in range(1, STEPS + 1)]
    want = [int(8 + 8 * (1 - min(1, max(0, (step - 4) / 10))) ** 3) for step in range(1, STEPS + 1)]
    assert got == want
    assert (got[3], got[8], got[13], got[19]) == (16, 9, 8, 8)


@pytest.mark.parametrize("name", ["adamw8bit", "torch_adamw", "lion8bit"])
def test_a_masked_triplet_is_zero_for_the_optimizer_too(name):
    """A bfloat16 model, whose other weights have masters: what is masked at the end stays exactly 0, step after step."""
    model = attached("4 bit", torch.bfloat16)
    optimizer = Optimizer(name=name, lr=1e-2).build(METHOD.param_groups(model, 1e-2), CPU)
    layers = [module for module in model.modules() if hasattr(module, "kept")]
    for step, ids in enumerate(BATCHES, start=1):
        (model(input_ids=ids, labels=ids).loss + METHOD.penalty(model)).backward()
        METHOD.before_step(model, optimizer, step, STEPS)
        optimizer.step()
        METHOD.after_step(model, optimizer, step, STEPS)
        if step >= 14:
            assert sum(int(layer.kept.sum()) for layer in layers) == 8
            assert all((layer.lora_E[layer.kept == 0] == 0).all() for layer in layers)
            assert all((layer.lora_E.abs() > 0).any() for layer in layers if layer.kept.any())


def test_peft_reads_what_it_has_learned(tmp_path):
    model = attached()
    our_losses(model)
    write_adapter(tmp_path, model, METHOD, "base")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ids = BATCHES[0]
    torch.testing.assert_close(theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].peft_type == "ADALORA"
    again = tiny_llama()
    put_foreign_adapter(read_foreign_adapter(tmp_path), again, tmp_path)
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_penalty_and_its_gradient_are_those_of_autograd():
    model = attached()
    torch.autograd.gradcheck(lambda m: _skew(m), torch.randn(3, 5, dtype=torch.float64, requires_grad=True))
    METHOD.penalty(model).backward()
    got = {n: p.grad.clone() for n, p in trainable_tensors(model).items() if p.grad is not None}
    model.zero_grad()
    factors = {n: p for n, p in trainable_tensors(model).items() if not n.endswith("E")}
    (0.5 * torch.stack([_skew(p if n.endswith("A") else p.T) for n, p in factors.items()]).mean()).backward()
    assert got.keys() == factors.keys()
    for name, p in factors.items():
        torch.testing.assert_close(got[name], p.grad)


def _skew(rows: torch.Tensor) -> torch.Tensor:
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm()


def test_a_run_says_how_many_triplets_each_kind_of_linear_has_kept(tmp_path):
    keys = {"name": "adalora", "rank": 2, "start_rank": 4, "interval": 1, "dropout": 0.1}
    seen = run(tiny_recipe(tmp_path, method=keys, train={"exact_match_rows": 0}))
    (told,) = [note for note in seen.notes if note.startswith("adalora")]
    assert told.startswith("adalora kept 28 of 56 triplets; mean of each kind of linear, and least to most: q_proj ")
    assert all(leaf in told for leaf in ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize(
    "memory",
    [{"base": "host", "embedding": "host", "saved_inputs": "host"}, *map(slow, ({"base": "host"}, {"mlp_chunk": 8}))],
    ids=str,
)
def test_where_the_base_lies_changes_nothing_of_what_is_learned(memory, tmp_path):
    """Averages and masks are written to between steps: copies of them on their way to a device would lose that."""
    keys = {"name": "adalora", "rank": 2, "start_rank": 4, "interval": 1}
    losses = []
    for name, extra in (("plain", {}), ("other", memory)):
        recipe = tiny_recipe(tmp_path, method=keys, memory=extra, train={"exact_match_rows": 0}, output={"dir": str(tmp_path / name)})
        losses.append([step.loss for step in run(recipe).steps])
    assert losses[0] == losses[1] if "mlp_chunk" not in memory else losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rank": 12}, r"method.start_rank = 12: nothing would be dropped; should be more than method.rank = 12"),
        ({"rank": 2, "start_rank": 100}, r"method.start_rank = 100: is more than model.layers.0.self_attn.q_proj can have \(64\)"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(keys, told):
    with pytest.raises(RecipeError, match=told):
        AdaLoRA(**keys).attach(tiny_llama())


def test_a_run_without_a_step_to_drop_triplets_in_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(RecipeError, match=r"method.start_share = 0.5, method.final_share = 0.5: of 6 steps that leaves none"):
        run(tiny_recipe(tmp_path, method={"name": "adalora", "rank": 2, "dropout": 0.0, "start_share": 0.5, "final_share": 0.5}))


@pytest.mark.parametrize(
    ("keys", "steps"),
    [({}, 2), ({"start_share": 0.0, "final_share": 0.9}, 10), ({"start_share": 0.0, "final_share": 0.9, "orthogonality": 0.0}, 20)],
)
def test_where_the_last_triplet_would_be_dropped_before_one_was_listened_to_it_is_refused(keys, steps):
    """A singular value begins at 0, so that in step 1 only the penalty moves A and B: without it nothing is heard before step 2."""
    with pytest.raises(RecipeError, match=rf"of {steps} steps .* after step {round(steps * (1 - keys.get('final_share', 0.3)))}"):
        AdaLoRA(**keys).check(steps)
    AdaLoRA(**keys | {"final_share": 0.8}).check(steps if steps > 2 else 20)
    AdaLoRA().check(3)


def test_triplets_of_equal_importance_are_kept_as_many_as_the_budget_says():
    model = attached()
    for step in (1, 14):
        METHOD.after_step(model, None, step, STEPS)
    layers = [module for module in model.modules() if hasattr(module, "kept")]
    assert sum(int(layer.kept.sum()) for layer in layers) == METHOD.budget(4, 14, STEPS) == 8
