"""LoRA+, lora's key b_lr_ratio: the same steps as PEFT's optimizer of that name makes."""

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlite.formats.peft import adapter_tensors, write_adapter
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.optim.build import Optimizer
from tests.families import FAMILIES, saved_folder
from tests.formats.test_peft import ours, theirs
from tests.tiny import tiny_llama

LR, RATIO, STEPS = 1e-3, 16.0, 4
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_the_steps_are_those_of_pefts_optimizer(tmp_path):
    base, method = saved_folder(tmp_path, FAMILIES["llama"]), LoRA(rank=4, b_lr_ratio=RATIO)
    model = ours(base)
    method.attach(model)
    write_adapter(tmp_path / "adapter", model, method, str(base))
    other = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter", is_trainable=True)
    own = Optimizer(name="torch_adamw", lr=LR).build(method.param_groups(model, LR), torch.device("cpu"))
    assert sorted(group["lr"] for group in own.inner.param_groups) == [LR, LR * RATIO]
    reference = create_loraplus_optimizer(other, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    for _ in range(STEPS):
        losses = [loss_of(model), loss_of(other)]
        for loss in losses:
            loss.backward()
        assert abs(losses[0].item() - losses[1].item()) < 1e-5
        own.step()
        reference.step()
        reference.zero_grad()
    found = {name.replace(".default", ""): p for name, p in other.named_parameters() if p.requires_grad}
    assert found.keys() == adapter_tensors(model).keys()
    for name, tensor in adapter_tensors(model).items():
        torch.testing.assert_close(tensor, found[name], atol=1e-6, rtol=1e-4)


def test_the_ratio_is_bs_alone_and_1_makes_no_group_of_its_own():
    model = tiny_llama()
    LoRA(rank=2, modules_to_save=("norm",)).attach(model)
    names = {p: name for name, p in trainable_tensors(model).items()}
    fast, slow = sorted(LoRA(rank=2, b_lr_ratio=RATIO).param_groups(model, LR), key=lambda group: -group["lr"])
    assert {names[p].rpartition(".lora_")[2] for p in fast["params"]} == {"B.weight"}
    assert len(fast["params"]) + len(slow["params"]) == len(names)
    assert len(LoRA(rank=2).param_groups(model, LR)) == 1
