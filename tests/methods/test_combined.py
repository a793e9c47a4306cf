"""Methods at once: each does what it does alone, hooks reach all of them, and messages name the table in which a key stands."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from qlite.errors import NotMergeable, RecipeError
from qlite.formats.merged import merged_tensors
from qlite.methods import Combined
from qlite.methods.base import AdaptedLinear, Method, adapted_linears, trainable_tensors
from qlite.methods.bottleneck import Bottleneck, BottleneckLinear
from qlite.methods.ia3 import IA3, ScaledLinear
from qlite.methods.llama_adapter_v2 import LlamaAdapterV2
from qlite.methods.lora import LoRA, LoRALinear
from qlite.methods.lora_linear import SIBLINGS
from qlite.methods.relora import ReLoRA
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import attend_by_documents
from qlite.model.load import Base
from qlite.model.originals import Originals
from qlite.optim.build import Optimizer
from qlite.quant.linear import dense_weight
from qlite.serving.survival import survival
from tests.families import FAMILIES, saved_folder
from tests.formats.test_peft import logits_of, ours, theirs
from tests.methods.test_contract import IDS
from tests.tiny import tiny_llama


def test_what_needs_a_linears_own_weight_stands_nearest_to_it_whatever_the_order():
    model = tiny_llama()
    Combined(parts=(IA3(), Bottleneck(width=8), LoRA(rank=4))).attach(model)
    stands = {name: [type(layer) for layer in chain(module)] for name, module in adapted_linears(model)}
    assert stands["model.layers.0.mlp.down_proj"] == [BottleneckLinear, ScaledLinear, LoRALinear]
    assert stands["model.layers.1.self_attn.k_proj"] == [ScaledLinear, LoRALinear]
    assert stands["model.layers.1.self_attn.q_proj"] == [LoRALinear]
    assert len(stands) == 14


def chain(module: nn.Module) -> list[AdaptedLinear]:
    """Return the adapted linears that stand on each other, the outer one first."""
    return [module, *chain(module.base)] if isinstance(module, AdaptedLinear) else []


@pytest.mark.parametrize("parts", [(LoRA(rank=4), IA3()), (LoRA(rank=4, dora=True), Bottleneck(width=8))])
def test_where_one_has_learned_nothing_the_model_is_that_of_the_other_alone(parts):
    for kept in parts:
        together, alone = tiny_llama(), tiny_llama()
        Combined(parts=parts).attach(together)
        kept.attach(alone)
        tensors, generator = trainable_tensors(together), torch.Generator().manual_seed(1)
        for name, own in trainable_tensors(alone).items():
            own.data += 0.1 * torch.randn(own.shape, generator=generator)
            (found,) = [tensor for other, tensor in tensors.items() if other.replace(".base.", ".") == name]
            found.data.copy_(own.data)
        torch.testing.assert_close(together(input_ids=IDS).logits, alone(input_ids=IDS).logits, atol=1e-6, rtol=1e-5)


def test_factors_of_a_linear_with_lora_rescale_both_and_are_merged_so():
    """y = l (W + sBA) x, written out for one linear, and the whole model with biases through the exporter's own merge."""
    model = tiny_llama()
    Combined(parts=(LoRA(rank=4, alpha=8.0), IA3())).attach(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in trainable_tensors(model).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    layer = model.model.layers[0].self_attn.v_proj
    lora, x = layer.base, torch.randn(3, 64, generator=generator)
    weight = dense_weight(layer.frozen) + 2.0 * lora.lora_B.weight @ lora.lora_A.weight
    torch.testing.assert_close(layer(x), layer.ia3_l.flatten() * (x @ weight.T), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.merged(dense_weight(layer.frozen)), layer.ia3_l * weight, atol=1e-6, rtol=1e-5)


def test_merged_over_a_family_with_biases_lora_and_ia3_are_the_adapted_model(tmp_path):
    base = saved_folder(tmp_path, FAMILIES["qwen2"])
    model, plain = ours(base), theirs(base)
    Combined(parts=(IA3(targets=("q_proj", "v_proj"), feedforward=("q_proj",)), LoRA(rank=4))).attach(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in trainable_tensors(model).values():
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    plain.load_state_dict({tensor.name: tensor.whole() for tensor in merged_tensors(model)}, strict=False)
    torch.testing.assert_close(logits_of(plain), logits_of(model), atol=1e-5, rtol=1e-4)


def test_what_was_trained_whole_has_no_other_original_under_another_methods_factors(tmp_path):
    """Merged over the base's own files the model is that of the run: over a base of 16 bits these are the weights that it has."""
    base = Base(model=str(saved_folder(tmp_path, FAMILIES["qwen2"])), bits=16, dtype="float32", fused=False)
    loaded = base.load(torch.device("cpu"), nothing)
    model = loaded.model
    originals = Originals(model, loaded.checkpoint, {tensor.name for tensor in merged_tensors(model)})
    Combined(parts=(LoRA(rank=4, targets=("q_proj",), modules_to_save=("k_proj",)), IA3(targets=("k_proj",), feedforward=()))).attach(model)
    generator = torch.Generator().manual_seed(1)
    for tensor in trainable_tensors(model).values():
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    own, over = ({tensor.name: tensor.whole() for tensor in merged_tensors(model, each)} for each in (None, originals))
    assert own.keys() == over.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(over[name], tensor, atol=1e-6, rtol=1e-5, check_dtype=False)
    for layer, found in survival(model, originals, lambda dense: dense.parts(), nothing).items():
        k = dict(adapted_linears(model))[layer]
        change = k.merged(dense_weight(k.frozen)) - k.untrained(dense_weight(k.frozen))
        assert found.change == pytest.approx(float(change.square().sum()), rel=1e-4)


def nothing(*_: object) -> None: ...


def test_one_that_cannot_be_merged_keeps_all_from_it_wherever_it_stands():
    for parts in ((Bottleneck(width=8), IA3()), (IA3(), Bottleneck(width=8))):
        model = tiny_llama()
        Combined(parts=parts).attach(model)
        with pytest.raises(NotMergeable):
            next(iter(merged_tensors(model)))


def test_each_parts_own_dropout_counts_in_linears_that_share_an_input():
    for targets in (("q_proj",), ("k_proj", "v_proj")):
        rest = tuple(name for name in SIBLINGS[0] if name not in targets)
        model = tiny_llama()
        Combined(parts=(LoRA(rank=4, targets=targets, dropout=0.9), ReLoRA(rank=4, targets=rest))).attach(model)
        attention, heard = model.model.layers[0].self_attn, {name: [] for name in SIBLINGS[0]}
        for name, found in heard.items():
            nn.init.normal_(getattr(attention, name).lora_B.weight)
            getattr(attention, name).register_forward_hook(lambda _, __, y, found=found: found.append(y))
        for _ in range(2):
            model.train()(input_ids=IDS)
        assert {name for name, (first, second) in heard.items() if not torch.equal(first, second)} == set(targets)


@pytest.mark.parametrize("inner", [("k_proj", "gate_proj"), ("up_proj",)])
def test_beside_lora_factors_on_an_input_that_linears_share_are_trained_under_checkpointing(inner):
    found = []
    for is_checkpointed in (False, True):
        model = tiny_llama().train()
        Combined(parts=(LoRA(rank=4), IA3(targets=("k_proj", "v_proj", *inner), feedforward=inner))).attach(model)
        if is_checkpointed:
            checkpoint_blocks(model)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
        attention = model.model.layers[0].self_attn
        assert (attention.q_proj.siblings is None) == ("k_proj" in inner)
        found.append({name: p.grad for name, p in trainable_tensors(model).items()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_linears_whose_inputs_differ_whatever_their_names_are_trained_under_checkpointing_and_part_where_no_gradient_is_due():
    model = tiny_llama().train()
    LoRA(rank=4).attach(model)
    checkpoint_blocks(model)
    attentions = [block.self_attn for block in model.model.layers]
    for attention in attentions:
        attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(attention.k_proj.siblings is not None for attention in attentions)
    with torch.no_grad():
        model(input_ids=IDS)
    assert all(attention.k_proj.siblings is None for attention in attentions)


def test_norms_that_lora_trains_whole_are_not_trained_a_second_time():
    model = tiny_llama()
    attend_by_documents(model)
    Combined(parts=(LoRA(rank=4, targets=("q_proj",), modules_to_save=("norm",)), LlamaAdapterV2(first_block=1))).attach(model)
    norms = [name for name in trainable_tensors(model) if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert "model.norm.weight" in norms
    assert type(model.model.norm.base) is type(tiny_llama().model.norm)


def test_messages_name_the_table_in_which_the_key_stands():
    with pytest.raises(RecipeError) as caught:
        Combined(parts=(LoRA(rank=4), IA3(targets=("k_prj",)))).attach(tiny_llama())
    assert str(caught.value) == 'method.ia3.targets: no linear layer is called "k_prj"; did you mean "k_proj"?'
    with pytest.raises(RecipeError) as caught:
        Combined(parts=(IA3(), LoRA(rank=99))).attach(tiny_llama())
    assert str(caught.value).startswith("method.lora.rank = 99: is more than")
    assert "in method.lora.rank_per_target" in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Heard(Method):
    """Notes each call of a hook."""

    name: ClassVar[str] = "heard"
    log: list
    ratio: float = 1.0

    def start(self, *_: object) -> None:
        self.log.append("start")

    def settle(self, *_: object) -> None:
        self.log.append("settle")

    def before_step(self, *_: object) -> None:
        self.log.append("before")

    def after_step(self, *_: object) -> None:
        self.log.append("after")

    def lr_factor(self, step: int, steps: int) -> float:
        return self.ratio * step

    def penalty(self, model: nn.Module) -> Tensor | None:
        return torch.tensor(self.ratio) if self.ratio > 1 else None


def test_every_hook_reaches_every_part_and_what_they_say_is_put_together():
    first, second = Heard(log=[], ratio=2.0), Heard(log=[], ratio=3.0)
    both = Combined(parts=(first, second, LoRA(b_lr_ratio=16)))
    both.start(nn.Module(), None)
    both.settle(nn.Module(), None)
    both.before_step(None, None, 1, 2)
    both.after_step(None, None, 1, 2)
    assert first.log == second.log == ["start", "settle", "before", "after"]
    assert both.lr_factor(2, 4) == 1.0
    assert Combined(parts=(first, LoRA())).part_factors(2, 4) == {"heard": 2.0 * 2}
    assert float(both.penalty(None)) == 5.0
    assert Combined(parts=(LoRA(), IA3())).penalty(None) is None
    assert both.words == "heard + heard + lora"


def test_a_parts_options_and_its_learning_rate_are_its_own_tensors_alone():
    """LoRA's B at 16 times the rate, ReLoRA's restart at step 6 of 12 with a warm-up: each touches none of the other's."""
    model = tiny_llama()
    relora = ReLoRA(rank=4, targets=("o_proj",), resets=1, warmup=4)
    both = Combined(parts=(LoRA(rank=4, targets=("q_proj",), b_lr_ratio=16), relora))
    both.attach(model)
    groups = both.param_groups(model, 0.5)
    optimizer = Optimizer(name="torch_adamw").build(groups, torch.device("cpu"))
    optimizer.set_lr_factor(0.5 * both.lr_factor(7, 12), both.part_factors(7, 12))
    now = [group["lr"] for group in optimizer.inner.param_groups]
    names = {tensor: name for name, tensor in trainable_tensors(model).items()}
    rates = {names[p]: (group["lr"], lr) for group, lr in zip(groups, now, strict=True) for p in group["params"]}
    assert len(rates) == 8
    for name, found in rates.items():
        highest = 8.0 if "q_proj.lora_B" in name else 0.5
        assert found == (highest, highest * 0.5 * (0.25 if "o_proj" in name else 1.0)), name


def test_keys_of_a_part_are_read_and_changed_by_its_name():
    both = Combined(parts=(LoRA(rank=4), IA3()))
    assert both.get("lora.rank") == 4
    changed = both.having("lora.rank", 2)
    assert next(part for part in changed.parts if isinstance(part, LoRA)).rank == 2
    assert changed.parts[1] == both.parts[1]


@pytest.mark.parametrize("key", ["ia4.rank", "rank", "lora.rnk", "lora", "ia3.rank"])
def test_a_key_that_no_part_has_is_refused(key):
    both = Combined(parts=(LoRA(rank=4), IA3()))
    for asked in (lambda: both.having(key, 2), lambda: both.get(key)):
        with pytest.raises(RecipeError, match=rf"method\.{key}: no such key; .* tables of their own: method.lora, method.ia3"):
            asked()


def test_what_is_checked_before_and_in_training_is_told_with_the_table():
    with pytest.raises(RecipeError, match=r"method\.relora\.resets"):
        Combined(parts=(ReLoRA(resets=50), IA3())).check(20)

    class Refusing(LoRA):
        def before_step(self, model: nn.Module, optimizer: object, step: int, steps: int) -> None:
            raise RecipeError("method.rank = 16: too much")

    with pytest.raises(RecipeError, match=r"^method\.lora\.rank = 16"):
        Combined(parts=(Refusing(), IA3())).before_step(None, None, 1, 2)
