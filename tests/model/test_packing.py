"""Documents packed into one line: none sees another, on every attention path and in every family, or the run is refused."""

import inspect
import shutil
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.masking_utils import sdpa_mask

from qlite.errors import ModelError
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model import documents as module
from qlite.model.attention import meta_model
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import DOCUMENTS, DeferredMask, Documents, attend_by_documents, documents_attention, documents_mask
from qlite.model.head import hidden_states, logits_head
from qlite.model.load import Base
from qlite.model.packing import check_packing
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from tests.conftest import SMOLLM2, SMOLLM2_SHA256
from tests.families import FAMILIES, Family, new_model, saved_folder
from tests.marks import slow
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

CPU = torch.device("cpu")
METHOD = LoRA(rank=4, alpha=8.0)
# Linear attention and a convolution run along the whole line; Falcon gives its mask no positions to find documents by.
REFUSED = {"qwen3_5", "falcon"}
# The attention that "auto" gives: ours, where the family's layers leave it to transformers' interface.
NOT_OURS = {"gemma2": "eager", "gptj": "eager", "stablelm": "sdpa", "qwen3_5": "sdpa", "falcon": "sdpa"}
LINES = [[13, 1, 20, 5], [24, 15], [1, 9]]


@pytest.fixture(autouse=True)
def one_thread():
    """What these models compute is too little to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Packed:
    """Random documents in lines: ``input_ids``, ``position_ids`` [B, T] and the ``weights`` [B, T, V] of a loss over the logits."""

    lines: list[list[int]]
    input_ids: Tensor
    position_ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, lines: list[list[int]], vocabulary: int, seed: int = 0) -> "Packed":
        generator = torch.Generator().manual_seed(seed)
        width = max(map(sum, lines))
        ids = torch.randint(vocabulary, (len(lines), width), generator=generator)
        weights = torch.randn(len(lines), width, vocabulary, generator=generator)
        positions = torch.zeros(len(lines), width, dtype=torch.long)
        for index, lengths in enumerate(lines):
            filled = sum(lengths)
            counted = [torch.arange(length) for length in (*lengths, width - filled)]
            positions[index] = torch.cat(counted)
            weights[index, filled:] = 0
        return cls(lines, ids, positions, weights)

    def documents(self) -> list[tuple[int, slice]]:
        """Return where each document lies: its line, and the stretch in it."""
        places = []
        for index, lengths in enumerate(self.lines):
            bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
            places += [(index, slice(*stretch)) for stretch in pairwise(bounds)]
        return places

    def hidden(self, model: PreTrainedModel) -> Tensor:
        return hidden_states(model, self.input_ids.to(model.device), self.position_ids)

    def hidden_alone(self, model: PreTrainedModel) -> list[Tensor]:
        """Return the hidden states of each document, run without the others and without position ids."""
        ids = self.input_ids.to(model.device)
        return [hidden_states(model, ids[line, inside].unsqueeze(0))[0] for line, inside in self.documents()]


def gradients(model: PreTrainedModel, hidden: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the gradient of every adapter tensor of a loss over the logits of ``hidden``, as one vector."""
    head = logits_head(model)
    loss = sum((head(h) * w.to(h)).sum() for h, w in zip(hidden, weights, strict=True))
    return torch.cat([g.float().reshape(-1) for g in torch.autograd.grad(loss, list(trainable_tensors(model).values()))])


def packed_and_alone(model: PreTrainedModel, packed: Packed) -> tuple[float, float]:
    """Return how far the hidden states, and the adapter's gradient, of a packed batch are from those of its documents alone."""
    lines = packed.hidden(model)
    together = [lines[line, inside] for line, inside in packed.documents()]
    weights = [packed.weights[line, inside] for line, inside in packed.documents()]
    alone = packed.hidden_alone(model)
    worst = max(distance(h, expected) for h, expected in zip(together, alone, strict=True))
    return worst, distance(gradients(model, together, weights), gradients(model, alone, weights))


def distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.float(), expected.float()
    return ((got - expected).norm() / expected.norm()).item()


def adapted(model: PreTrainedModel, checkpointing: bool = False) -> PreTrainedModel:
    """Attach a LoRA that changes the model already, in training mode."""
    torch.manual_seed(1)
    METHOD.attach(model)
    with torch.no_grad():
        for name, p in trainable_tensors(model).items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    if checkpointing:
        checkpoint_blocks(model)
    return model.train()


def llama(attention: str, storage: str = "16 bit", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """Return the tiny Llama with transformers' ``attention``, or ours."""
    model = tiny_llama(storage, dtype, attn_implementation="sdpa" if attention == DOCUMENTS else attention, **changes)
    if attention == DOCUMENTS:
        attend_by_documents(model)
    assert model.config._attn_implementation == attention
    return model


def family(name: str) -> PreTrainedModel:
    """Return the family's tiny model with the attention that "auto" gives."""
    model = new_model(FAMILIES[name]).requires_grad_(False)
    attend_by_documents(model)
    return model


# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_refused_exactly_if_it_is_listed(name):
    model = family(name)
    if name not in REFUSED:
        check_packing(model)
        return
    kind = FAMILIES[name].model_type
    with pytest.raises(ModelError, match=rf'^train.packing: the family "{kind}" does not keep .*; set train.packing = false$'):
        check_packing(model)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_a_packed_familys_hidden_states_and_gradients_are_those_of_its_documents_alone(name):
    model = adapted(family(name)).eval()  # OPT has dropout of its own
    hidden, gradient = packed_and_alone(model, Packed.of(LINES, vocabulary=128))
    assert hidden < 5e-6
    assert gradient < 5e-6


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_family_would_train_on_wrong_gradients(name):
    _, gradient = packed_and_alone(adapted(family(name)).eval(), Packed.of(LINES, vocabulary=128))
    assert gradient > 0.1


def test_22_of_24_families_can_be_packed():
    assert len(FAMILIES) - len(REFUSED) == 22
    assert set(FAMILIES) > REFUSED


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_gives_our_attention_where_the_family_takes_one(name, tmp_path):
    loaded = Base(model=str(saved_folder(tmp_path, FAMILIES[name])), bits=16).load(CPU, lambda *_: None)
    assert loaded.model.config._attn_implementation == NOT_OURS.get(name, DOCUMENTS)
    assert "qlite" not in str(loaded.model.config.to_dict())  # what an export writes


def test_opt_sees_other_documents_in_transformers_attention_and_none_in_ours():
    model = new_model(FAMILIES["opt"])
    with pytest.raises(ModelError, match=r'"opt" does not keep .*\(sdpa\)'):
        check_packing(model)
    attend_by_documents(model)
    check_packing(model)


def test_a_family_without_position_ids_is_refused():
    model = new_model(Family("bloom", {"n_layer": 2, "n_head": 4}))
    with pytest.raises(ModelError, match=r'^train.packing: the family "bloom" takes no positions.*; set train.packing = false$'):
        check_packing(model)


@pytest.mark.parametrize("layers", [["full_attention", "conv"], ["linear_attention", "full_attention"]])
def test_a_family_with_layers_of_another_kind_keeps_transformers_attention(layers):
    model = llama("sdpa")
    model.config.layer_types = layers
    attend_by_documents(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_family_that_shares_keys_between_layers_keeps_transformers_attention():
    model = llama("sdpa")
    model.config.num_kv_shared_layers = 1
    attend_by_documents(model)
    assert model.config._attn_implementation == "sdpa"


# Every path


@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "checkpoint"])
@pytest.mark.parametrize("lines", [LINES[:1], LINES], ids=["one-line", "three-lines"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", DOCUMENTS])
def test_packed_is_alone_on_every_path(attention, lines, checkpointing, storage):
    model = adapted(llama(attention, storage), checkpointing)
    hidden, gradient = packed_and_alone(model, Packed.of(lines, vocabulary=64))
    assert hidden < 2e-6
    assert gradient < 2e-6


@pytest.mark.parametrize("attention", [slow("eager"), slow("sdpa"), DOCUMENTS])
@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_packed_is_alone_for_random_documents(attention, lines, seed):
    hidden, gradient = packed_and_alone(adapted(llama(attention)), Packed.of(lines, 64, seed))
    assert hidden < 2e-6
    assert gradient < 5e-6  # of a word or two it is small, and its rounding is not


@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_in_bfloat16_packed_is_alone_but_for_rounding(storage):
    model = adapted(llama(DOCUMENTS, storage, torch.bfloat16))
    hidden, gradient = packed_and_alone(model, Packed.of([[30, 200], [150, 70, 1]], vocabulary=64))
    assert hidden < 1e-3
    assert gradient < 0.01


@pytest.mark.parametrize("name", ["mistral", "gemma3", "cohere2"])
def test_a_sliding_window_slides_inside_a_document(name):
    model = family(name)
    assert model.config.sliding_window == 8
    ids = torch.randint(128, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        within = hidden_states(model, torch.cat([ids, ids], dim=1), torch.arange(20).repeat(2).unsqueeze(0))[0, 20:]
        model.config.sliding_window = 64
        unbounded = hidden_states(model, ids)[0]
    assert distance(within[:8], unbounded[:8]) < 2e-6  # nothing is out of the window's reach yet
    assert distance(within[8:], unbounded[8:]) > 0.01


def test_dropout_of_attention_reaches_no_other_document():
    model = llama(DOCUMENTS, attention_dropout=0.5).train()
    packed = Packed.of([[8, 12]], vocabulary=64)
    others = Packed.of([[8, 12]], vocabulary=64, seed=1)
    others.input_ids[:, 8:] = packed.input_ids[:, 8:]
    seen = []
    for each in (packed, others, packed):
        torch.manual_seed(len(seen) // 2)
        seen.append(each.hidden(model)[0, 8:])
    assert torch.equal(seen[0], seen[1])
    assert distance(seen[2], seen[0]) > 0.01  # another draw


@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled")
def test_flex_attention_confines_documents_in_several_lines():
    model = llama("flex_attention").eval()
    packed = Packed.of(LINES, vocabulary=64)
    with torch.no_grad():
        assert distance(packed.hidden(model), packed.hidden(llama("sdpa").eval())) < 2e-6


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None, window: int | None = None) -> Tensor:
    """Return causal attention inside the stretches between ``bounds``; q [N, H, D], k and v [N, H or fewer, D]."""
    out = []
    for start, stop in pairwise(bounds.tolist()):
        parts = [x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        out.append(scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def test_torchs_varlen_kernel_is_called_as_it_is_declared(monkeypatch):
    declared, calls = inspect.signature(module.varlen_attn), []
    module._varlen_options()  # which reads the signature, once

    def stand_in(*args, **options):
        bound = declared.bind(*args, **options).arguments
        assert bound["window_size"] == (-1, 0)  # causal
        assert bound["cu_seq_q"].dtype == torch.int32
        assert bound["max_q"] == bound["max_k"] == 29  # the longest padding
        calls.append(bound)
        return varlen_reference(bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], bound["scale"])

    monkeypatch.setattr(module, "varlen_attn", stand_in)
    monkeypatch.setattr(module, "_varlen_takes", lambda *_: True)
    hidden, gradient = packed_and_alone(adapted(llama(DOCUMENTS)), Packed.of(LINES, vocabulary=64))
    assert len(calls) == 2
    assert hidden < 2e-6
    assert gradient < 2e-6


@pytest.fixture
def flash(monkeypatch):
    """Put a written-out function in the place of flash-attn's two; return the calls of the one for documents."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, window_size=(-1, -1)):
        assert causal
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        calls.append(len(q))
        return varlen_reference(q, k, v, cu_seqlens_q, softmax_scale, None if window_size[0] < 0 else window_size[0] + 1)

    def dense(q, k, v, causal, softmax_scale, window_size=(-1, -1)):
        whole = torch.tensor([0, q.shape[1]])
        window = None if window_size[0] < 0 else window_size[0] + 1
        return torch.stack([varlen_reference(*qkv, whole, softmax_scale, window) for qkv in zip(q, k, v, strict=True)])

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    functions = ((dense, varlen, None, None, None), (process, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    return calls


@pytest.mark.parametrize("lines", [LINES[:1], LINES], ids=["one-line", "three-lines"])
@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_flash_attention_gets_all_lines_as_one(name, lines, flash):
    model = adapted(new_model(FAMILIES[name]).requires_grad_(False)).eval()
    model.config._attn_implementation = "flash_attention_2"
    hidden, gradient = packed_and_alone(model, Packed.of(lines, vocabulary=128))
    assert flash == [39 * len(lines)] * 2  # once a layer, over B * T tokens
    assert hidden < 5e-6
    assert gradient < 5e-6
    check_packing(model)


def test_flash_attention_finds_the_documents_by_positions_where_a_family_passes_nothing_else_on(flash):
    model = adapted(llama("sdpa"))
    model.config._attn_implementation = "flash_attention_2"
    model._supports_attention_backend = False
    hidden, _ = packed_and_alone(model, Packed.of(LINES, vocabulary=64))
    assert flash == [39 * 3] * 2
    assert hidden < 2e-6


# Our attention beside transformers' own


def test_without_documents_ours_is_sdpa_bit_for_bit():
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    models = [llama(attention).eval() for attention in ("sdpa", DOCUMENTS)]
    padded = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
        assert torch.equal(*(model(ids, attention_mask=padded).logits for model in models))
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(*(model.generate(ids, attention_mask=padded, **options) for model in models))


def test_a_family_that_passes_no_documents_on_gets_the_mask():
    model = adapted(llama(DOCUMENTS))
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: (args, without(kwargs, "documents")), with_kwargs=True)
    hidden, gradient = packed_and_alone(model, Packed.of(LINES, vocabulary=64))
    assert hidden < 2e-6
    assert gradient < 2e-6


def without(kwargs: dict, *names: str) -> dict:
    return {name: value for name, value in kwargs.items() if name not in names}


def test_the_mask_is_deferred_only_where_causal_says_it_all():
    size = {"batch_size": 1, "kv_length": 6, "mask_function": lambda b, h, q, k: k <= q}
    packed = {**size, "q_length": 6, "allow_is_causal_skip": False}
    assert documents_mask(**size, q_length=6) is None  # SDPA's is_causal
    assert isinstance(documents_mask(**packed), DeferredMask)
    assert isinstance(documents_mask(**packed, local_size=6), DeferredMask)
    for options in (packed | {"local_size": 5}, packed | {"use_vmap": True}, packed | {"q_length": 1}):
        assert torch.equal(documents_mask(**options), sdpa_mask(**options))
    assert torch.equal(documents_mask(**packed)(), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())


def test_soft_capping_is_refused_as_sdpa_refuses_it():
    q = torch.randn(1, 2, 4, 8)
    documents = Documents.of(torch.tensor([[0, 1, 0, 1]]), CPU)
    with pytest.raises(ValueError, match="softcap"):
        documents_attention(nn.Module(), q, q, q, None, documents, softcap=2.0)


def test_documents_are_read_off_their_positions():
    found = Documents.of(torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]]), CPU)
    assert found.lengths == (3, 1, 1, 3)
    assert found.bounds.tolist() == [0, 3, 4, 5, 8]
    assert found.bounds.dtype == torch.int32
    assert found.longest == 3


@pytest.mark.parametrize("positions", [[[1, 2, 3]], [[0, 1, 3]], [[0, 1, 2], [3, 4, 5]], [[0, 0, 2]]])
def test_positions_of_no_documents_are_our_own_mistake(positions):
    with pytest.raises(AssertionError):
        Documents.of(torch.tensor(positions), CPU)


# The guard


def leak_in(model: PreTrainedModel, layer: int) -> None:
    """Let one layer of ``model`` see the whole line."""
    attention = model.model.layers[layer].self_attn
    drop = ("documents", "attention_mask")
    attention.register_forward_pre_hook(lambda _, args, kw: (args, {**without(kw, *drop), "attention_mask": None}), with_kwargs=True)


def test_without_position_ids_the_gradient_is_far_off():
    model = adapted(llama(DOCUMENTS))
    packed = Packed.of(LINES, vocabulary=64)
    lines = hidden_states(model, packed.input_ids)
    weights = [packed.weights[line, inside] for line, inside in packed.documents()]
    leaked = gradients(model, [lines[line, inside] for line, inside in packed.documents()], weights)
    expected = gradients(model, packed.hidden_alone(model), weights)
    assert distance(leaked, expected) > 0.3


@pytest.mark.parametrize("layer", [0, 3, 7])
@pytest.mark.parametrize(
    ("storage", "dtype"), [("16 bit", "float32"), ("16 bit", "bfloat16"), ("8 bit", "bfloat16"), ("4 bit", "bfloat16")]
)
def test_a_leak_in_one_layer_of_eight_is_found(storage, dtype, layer):
    model = adapted(llama(DOCUMENTS, storage, getattr(torch, dtype), num_hidden_layers=8))
    check_packing(model)
    leak_in(model, layer)
    with pytest.raises(ModelError, match=r'"llama" does not keep the documents of a line apart \(qlite_documents\).*train.packing = false'):
        check_packing(model)


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 4])
def test_the_guard_lets_a_real_model_pass_and_finds_a_leak_in_any_single_layer(bits, smollm2_files):
    model = Base(model=SMOLLM2, sha256=SMOLLM2_SHA256, bits=bits).load(CPU, lambda *_: None).model
    check_packing(model)
    leak_in(model, 18)  # of its 30 layers the one whose leak shows least
    with pytest.raises(ModelError, match="does not keep the documents of a line apart"):
        check_packing(model)


def test_positions_that_do_not_restart_are_found_where_a_model_learned_them(monkeypatch):
    model = family("opt")
    check_packing(model)
    embed = model.model.decoder.embed_positions
    forward = embed.forward
    monkeypatch.setattr(
        embed, "forward", lambda mask, past, position_ids: forward(mask, past, torch.arange(position_ids.shape[1]).expand_as(position_ids))
    )
    with pytest.raises(ModelError, match=r"change by 0.0% .* and are \d+.\d% from those of the document alone"):
        check_packing(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("leaks", [False, True])
def test_the_guard_leaves_no_trace(training, leaks):
    model = adapted(llama(DOCUMENTS)).train(training)
    if leaks:
        leak_in(model, 0)
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    if leaks:
        with pytest.raises(ModelError):
            check_packing(model)
    else:
        check_packing(model)
    assert {part.training for part in model.modules()} == {training}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_that_gives_no_numbers_is_no_proof():
    model = llama(DOCUMENTS)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="nan%"):
        check_packing(model)


# The recipe's word


@pytest.mark.parametrize(
    ("name", "attention", "device", "dtype", "problem"),
    [
        ("llama", "flash", "cpu", torch.bfloat16, "it is trained on CUDA cards only, and the model is loaded on the CPU"),
        ("llama", "flex", "cpu", torch.bfloat16, "it is trained on CUDA cards only, and the model is loaded on the CPU"),
        ("llama", "flash", "cuda", torch.float32, 'it computes in 16 bit only, and base.dtype = "float32"'),
        ("llama", "flash", "cuda", torch.bfloat16, "the package flash-attn is not installed (pip install flash-attn)"),
        ("gemma2", "sdpa", "cpu", torch.float32, 'it has no soft-capping, which the family "gemma2" was trained with'),
        ("gptj", "sdpa", "cpu", torch.float32, 'the family "gptj" has none: GPTJForCausalLM does not support'),
        ("stablelm", "flex", "cuda", torch.float32, 'the family "stablelm" has none: StableLmForCausalLM does not support'),
    ],
)
def test_an_attention_that_cannot_be_had_is_refused(name, attention, device, dtype, problem, monkeypatch):
    for package in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(f"qlite.model.attention.{package}", lambda: False)
    with pytest.raises(ModelError) as caught:
        meta_model(FAMILIES[name].config(), attention, dtype, torch.device(device))
    assert str(caught.value).startswith(f'base.attention = "{attention}": {problem}')
    assert str(caught.value).endswith('; use "auto"')


@pytest.mark.parametrize(
    ("name", "attention", "device", "used"),
    [
        ("llama", "auto", "cpu", DOCUMENTS),
        ("llama", "sdpa", "cpu", "sdpa"),
        ("llama", "eager", "cpu", "eager"),
        ("llama", "flex", "cuda", "flex_attention"),
        ("gemma2", "auto", "cpu", "eager"),
        ("gemma2", "flex", "cuda", "flex_attention"),
    ],
)
def test_an_attention_that_can_be_had_is_used(name, attention, device, used):
    model = meta_model(FAMILIES[name].config(), attention, torch.bfloat16, torch.device(device))
    assert model.config._attn_implementation == used
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_recipes_attention_reaches_the_model(tmp_path):
    folder = str(saved_folder(tmp_path, FAMILIES["llama"]))
    assert Base(model=folder, attention="eager").load(CPU, lambda *_: None).model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r'^base.attention = "flash": it is trained on CUDA cards only'):
        Base(model=folder, attention="flash").load(CPU, lambda *_: None)


def test_a_run_trained_with_flash_attention_opens_on_a_machine_without_a_card(tmp_path):
    run(tiny_recipe(tmp_path, base={"attention": "sdpa"}, train={"steps": 2}))
    finished = RunFolder(tmp_path / "run")
    written = [path for path in finished.path.rglob("*.toml") if 'attention = "sdpa"' in path.read_text()]
    assert len(written) == 1
    written[0].write_text(written[0].read_text().replace('attention = "sdpa"', 'attention = "flash"'))
    opened = open_run(finished, "cpu", lambda *_: None)
    assert opened.recipe.base.attention == "flash"
    assert opened.base.model.config._attn_implementation == DOCUMENTS
