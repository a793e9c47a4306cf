"""What only a card can show: the CUDA paths agree with their CPU twins. Run with pytest -n 0 -m gpu."""

import pytest
import torch

from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model import documents
from qlite.model.documents import DOCUMENTS, Documents, documents_attention
from qlite.model.packing import check_packing
from qlite.optim.build import Optimizer
from qlite.training.run_folder import RunFolder
from tests.model.test_packing import Packed, adapted, distance, llama, packed_and_alone
from tests.quant.test_linear import IN, STORAGES, stored
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", STORAGES)
def test_the_product_on_the_card_is_that_of_the_cpu(name, rows):
    layer, _ = stored(STORAGES[name], torch.bfloat16, bias=True)
    x = torch.randn(rows, IN, dtype=torch.bfloat16)
    want = layer(x).float()
    got = layer.to("cuda")(x.cuda()).cpu().float()
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimizers_page_and_step(name):
    param = torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16, device="cuda"))
    notes: list[str] = []
    optimizer = Optimizer(name=name).build([{"params": [param], "lr": 1e-2}], torch.device("cuda"), notes.append)
    param.sum().backward()
    optimizer.step()
    assert notes == []
    assert (param < 1).all()


def test_a_seed_gives_the_adapter_that_it_gives_on_a_cpu():
    def begun(device: str) -> list[torch.Tensor]:
        model = tiny_llama("4 bit").to(device)
        torch.manual_seed(3)
        LoRA(rank=4, alpha=8.0).attach(model)
        return [tensor.cpu() for tensor in trainable_tensors(model).values()]

    assert all(torch.equal(on_card, on_cpu) for on_card, on_cpu in zip(begun("cuda"), begun("cpu"), strict=True))


def test_a_run_on_the_card_learns_and_resumes(tmp_path):
    recipe = tiny_recipe(tmp_path, parallel={"device": "cuda"})
    run(recipe, stop_after=3)
    seen = run(recipe)
    assert seen.steps[-1].loss < seen.steps[0].loss
    assert seen.steps[0].memory.reserved > 0
    assert RunFolder(tmp_path / "run").is_finished


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "checkpoint"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2", DOCUMENTS])
def test_packed_is_alone_on_the_card(attention, checkpointing):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = adapted(llama(attention, dtype=torch.bfloat16).to("cuda"), checkpointing)
    hidden, gradient = packed_and_alone(model, Packed.of([[13, 1, 200, 5], [24, 150], [1, 9]], vocabulary=64))
    assert hidden < 0.02
    assert gradient < 0.02


@pytest.mark.parametrize("bits", ["16 bit", "8 bit", "4 bit"])
def test_the_packing_guard_lets_ours_pass_on_the_card(bits):
    check_packing(llama(DOCUMENTS, bits, torch.bfloat16, num_hidden_layers=8).to("cuda"))


@pytest.mark.parametrize("head_size", [64, 128])
def test_all_documents_go_through_one_kernel_on_the_card(head_size, monkeypatch):
    assert documents._varlen_options() is not None
    calls, kernel = [], documents.varlen_attn
    monkeypatch.setattr(documents, "varlen_attn", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    positions = torch.cat([torch.arange(length) for length in (90, 1, 37, 30, 98)]).view(2, 128)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 128, head_size) for heads in (9, 3, 3)]
    weights = torch.randn(2, 128, 9, head_size)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        out, _ = documents_attention(module, q, k, v, None, Documents.of(positions, q.device))
        return [out, *torch.autograd.grad((out * weights.to(out)).sum(), (q, k, v))]

    expected = run("cpu", torch.float32)
    assert calls == []
    got = run("cuda", torch.bfloat16)
    assert calls == [1]
    assert all(distance(a.cpu(), b) < 0.02 for a, b in zip(got, expected, strict=True))
