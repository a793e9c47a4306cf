"""All keys of [memory] together, and each in a whole run: training, evaluation, answers, stopping and going on, planning."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from qlite.export import export
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.blocks import decoder_blocks
from qlite.model.lowering import _say_device, lower_memory, modules_on_host
from qlite.offload import is_host, keep_on_host
from qlite.quant.linear import dense_weight
from qlite.recipe.schema import Memory
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper
from tests.model.watch import COPYING, CPU, LAYERS, Watch, adapt, are_equal, distance, gradient, ids, loss_of, lowered
from tests.tiny import CONFIG, one_batch, tiny_llama
from tests.tiny_run import run, tiny_recipe

EACH = {
    "inputs-host": {"saved_inputs": "host"},
    "inputs-8bit": {"saved_inputs": "8bit"},
    "mlp-chunk": {"mlp_chunk": 16},
    "embedding-host": {"embedding": "host"},
    "base-host": {"base": "host"},
    "all": {"saved_inputs": "host", "mlp_chunk": 16, "embedding": "host", "base": "host"},
    "all-8bit": {"saved_inputs": "8bit", "mlp_chunk": 16, "embedding": "host", "base": "host"},
}
SAME_BITS = ("inputs-host", "embedding-host", "base-host")
SHORT = {"steps": 2, "accumulation": 2, "eval_every": 1, "samples": ["abc"]}


def each(*left_out: str) -> pytest.MarkDecorator:
    chosen = {name: keys for name, keys in EACH.items() if name not in left_out}
    return pytest.mark.parametrize("keys", chosen.values(), ids=chosen)


@pytest.mark.parametrize("method", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_all_keys_together_give_the_gradient(storage, method):
    loss, expected = gradient(lowered(storage, **method))
    with Watch() as watch:
        found, gradients = gradient(lowered(storage, Memory(**EACH["all"]), **method))
    assert torch.allclose(found, loss, rtol=1e-5)
    assert distance(gradients, expected) < 1e-6
    assert watch.on_host <= COPYING | {"aten::embedding"}


@pytest.mark.parametrize("method", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_what_lies_on_the_host_before_it_is_adapted_stays_there_uncopied(storage, method):
    memory = Memory(**EACH["all"])
    model = tiny_llama(storage, num_hidden_layers=LAYERS)
    modules = modules_on_host(model, memory)
    for module in modules:
        keep_on_host(module, CPU)
    assert model.model.embed_tokens in modules
    assert model.model.layers[-1].mlp.up_proj in modules
    assert modules.isdisjoint({model.model.norm, model.lm_head, model.model})
    loaded = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    assert loaded
    assert all(is_host(t) for t in loaded)
    adapt(model, memory, **method)
    kept = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert {id(t) for t in loaded} <= kept
    assert are_equal(gradient(model)[1], gradient(lowered(storage, memory, **method))[1])


def test_what_is_left_on_the_device_is_the_head_the_last_norm_and_the_adapter():
    model = lowered("4 bit", Memory(**EACH["all"]))
    everything = [*model.named_parameters(), *model.named_buffers()]
    on_device = {name for name, t in everything if not is_host(t)}
    rotary = {name for name, _ in model.named_buffers() if "rotary" in name}
    assert on_device == {*trainable_tensors(model), "lm_head.weight", "model.norm.weight"} | rotary
    assert len(everything) > len(on_device) > 0


@each()
def test_a_step_can_be_traced_on_fake_tensors(keys):
    batches = [one_batch(), one_batch(seed=1)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).requires_grad_(False)
        method = LoRA(rank=4, dropout=0.1)
        method.attach(model)
        lower_memory(model, Memory(**keys), CPU)
        stepper = Stepper(model, method, 5, CPU)
        loss = stepper.accumulate(batches)
    assert isinstance(loss, FakeTensor)
    assert all(p.grad.shape == p.shape for p in trainable_tensors(model).values())
    wants_host = keys.get("base") == "host"
    assert {is_host(t) for t in decoder_blocks(model)["model.layers.1"].mlp.up_proj.base.parameters()} == {wants_host}


def peak_of_a_pass(memory: Memory, tokens: torch.Tensor) -> int:
    """Return the most bytes on the device in a forward and backward pass, its weights and gradients left out."""
    model = adapt(LlamaForCausalLM(LlamaConfig(**CONFIG, attention_dropout=0.0)).requires_grad_(False), memory)
    for p in trainable_tensors(model).values():
        p.grad = torch.zeros_like(p)
    with Watch() as watch:
        loss_of(model, tokens).backward()
    return watch.peak


def traced_too_much(memory: Memory) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = peak_of_a_pass(memory, ids())
    return traced - peak_of_a_pass(memory, ids())


@pytest.fixture(scope="module")
def traced_too_much_without_keys() -> int:
    """Return what attention's kernel, which shows nothing of its inside, makes a trace tell too much."""
    return traced_too_much(Memory())


@each("all-8bit")
def test_a_trace_allocates_what_the_real_pass_does(keys, traced_too_much_without_keys):
    assert traced_too_much(Memory(**keys)) == traced_too_much_without_keys


# Whole runs


def losses(watcher) -> list[float]:
    return [report.loss for report in watcher.steps]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of a run with no key set, and what was seen of it."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(tiny_recipe(folder, method={"dropout": 0.0}, train=SHORT, memory={"plan": "off"}))


@each()
def test_a_run_trains_evaluates_and_answers_as_without_the_key(plain, tmp_path, keys, request):
    folder, expected = plain
    output = {"dir": str(tmp_path / "run")}
    seen = run(tiny_recipe(folder, method={"dropout": 0.0}, train=SHORT, memory={"plan": "off"} | keys, output=output))
    if request.node.callspec.id in SAME_BITS:
        assert losses(seen) == losses(expected)
        assert [e.loss for e in seen.evaluations] == [e.loss for e in expected.evaluations]
        assert seen.samples == expected.samples
        assert seen.answers == expected.answers
    else:
        assert losses(seen)[0] == pytest.approx(losses(expected)[0], rel=1e-5)
        assert losses(seen)[-1] == pytest.approx(losses(expected)[-1], rel=0.02)
        assert len(seen.samples) == len(expected.samples) > 0


@each("inputs-host", "inputs-8bit", "mlp-chunk", "embedding-host", "base-host")
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, keys):
    def recipe(name: str):
        return tiny_recipe(tmp_path, memory={"plan": "off"} | keys, train={"exact_match_rows": 0}, output={"dir": str(tmp_path / name)})

    whole = run(recipe("whole"))
    first = run(recipe("parts"), stop_after=3)
    second = run(recipe("parts"))
    assert losses(first)[:2] + losses(second) == losses(whole)
    adapters = [(RunFolder(tmp_path / name).adapter / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_a_run_with_all_keys_can_be_planned_and_merged(tmp_path):
    run(tiny_recipe(tmp_path, train=SHORT, memory=EACH["all"]))
    export(tmp_path / "run", merge="fp32", out=tmp_path / "merged", device="cpu", quiet=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_model_says_the_device_it_computes_on_and_stays_of_its_family():
    plain, model = lowered(), lowered(memory=replace(Memory(), base="host", embedding="host"))
    assert model.device == CPU
    other = lowered()
    _say_device(other, torch.device("meta"))  # stands for a card: no weight lies there
    assert other.device == torch.device("meta")
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, LlamaForCausalLM)
    assert are_equal(gradient(model)[1], gradient(plain)[1])


def test_a_lowered_model_still_gives_its_dense_weights():
    plain, model = lowered(), lowered(memory=Memory(**EACH["all"]))
    loss_of(model, ids()).backward()
    for one, other in zip(plain.model.layers, model.model.layers, strict=True):
        assert torch.equal(dense_weight(one.mlp.down_proj.base), dense_weight(other.mlp.down_proj.base))
