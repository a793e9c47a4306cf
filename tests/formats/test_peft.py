"""Adapters in PEFT's format: ours read by PEFT, PEFT's read by us, and everything that cannot be read refused."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlite.errors import AdapterError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS, adapter_tensors, load_adapter, write_adapter
from qlite.methods.base import adapted_linears, trainable_tensors
from qlite.methods.lora import LoRA, LoRALinear
from qlite.model.load import DTYPES, Base
from tests.families import FAMILIES, VOCAB, saved_folder

NAMES = ("llama", "qwen2", "gpt_neox")
# One more name in each family for a layer of its attention and one of its feed-forward net.
ATTENTION = {"llama": "q_proj", "qwen2": "v_proj", "gpt_neox": "query_key_value"}
FEED_FORWARD = {"llama": "down_proj", "qwen2": "up_proj", "gpt_neox": "dense_h_to_4h"}
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gpt_neox": "embed_in"}
LINEARS = {"llama": 7, "qwen2": 7, "gpt_neox": 4}


def method_of(kind: str, name: str) -> LoRA:
    attention, feed_forward = ATTENTION[name], FEED_FORWARD[name]
    plain = LoRA(rank=4, alpha=10.0)
    return {
        "plain": plain,
        "rank_per_target": replace(plain, rank_per_target={attention: 2, f"*.1.*{feed_forward}": 7}),
        "rslora": replace(plain, rslora=True, rank_per_target={attention: 9}),
        "dora": replace(plain, dora=True),
        "attention": replace(plain, targets="attention"),
        "some_layers": replace(plain, targets=(f"*.1.*.{attention}", feed_forward)),
        "head": replace(plain, targets=("lm_head", attention)),
        "alpha_per_target": replace(plain, alpha_per_target={attention: 3.0, f"*.1.*{feed_forward}": 0.5}),
        "whole_layers": replace(plain, modules_to_save=("lm_head", EMBEDDING[name], "*.0.*norm")),
        "token_rows": replace(plain, trained_tokens=(77, 9, 5)),
    }[kind]


KINDS = ("plain", "rank_per_target", "rslora", "dora", "attention", "some_layers", "head", "alpha_per_target", "whole_layers", "token_rows")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, FAMILIES[name]) for name in NAMES}


def ours(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    base = Base(model=str(folder), bits=16, dtype=dtype, fused=False)
    return base.load(torch.device("cpu"), lambda phase, done, total: None).model


def theirs(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits


def exact_logits_of(model: nn.Module) -> Tensor:
    """Return the logits computed in float64, where the order of sums tells nothing."""
    return logits_of(model.double())


def randomise(model: nn.Module) -> None:
    """Draw every trainable tensor anew: A and B of size 0.2, lengths of rows between 0.5 and 1.5 times what they are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in trainable_tensors(model).items():
            if "magnitude" in name:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def written(folder: Path, model: PreTrainedModel, method: LoRA) -> Path:
    method.attach(model)
    randomise(model)
    write_adapter(folder, model, method, "org/base")
    return folder


# Ours, read by PEFT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_our_adapter_to_the_same_logits(name, kind, folders, tmp_path):
    model = ours(folders[name])
    plain_logits = logits_of(model)
    written(tmp_path, model, method_of(kind, name))
    expected = exact_logits_of(model)
    found = exact_logits_of(peft.PeftModel.from_pretrained(theirs(folders[name]), tmp_path))
    assert (expected - plain_logits).abs().max() > 0.05
    # Measured: 8e-15, and for DoRA, whose lengths of rows are float32, 7e-7.
    assert (found - expected).abs().max() <= (2e-6 if kind == "dora" else 1e-13)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_our_bfloat16_adapter_and_no_layer_of_ours_rounds_more(name, kind, folders, tmp_path):
    model = ours(folders[name], "bfloat16")
    written(tmp_path, model, method_of(kind, name))
    theirs_read = peft.PeftModel.from_pretrained(theirs(folders[name], "bfloat16"), tmp_path, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for path, layer in adapted_linears(model):
        if not isinstance(layer, LoRALinear):  # a head with rows of its own rounds as any head does
            continue
        x, other = torch.randn(40, layer.base.in_features, generator=generator).bfloat16(), theirs_read.get_submodule(PREFIX + path)
        found, expected = layer(x).float(), other(x).float()
        bias = other.base_layer.bias
        exact = nn.functional.linear(x.float(), layer.merged_weight(layer.base.weight.float()), None if bias is None else bias.float())
        # PEFT rounds B A x, its multiple and the sum; we round the sum.
        assert (found - exact).norm() < 1.05 * (expected - exact).norm()
        assert (expected - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_peft_puts_our_adapter_on_the_same_layers_with_the_same_ranks(name, folders, tmp_path):
    model = ours(folders[name])
    written(tmp_path, model, method_of("rank_per_target", name))
    wrapped = peft.PeftModel.from_pretrained(theirs(folders[name]), tmp_path)
    layers = {n.removeprefix(PREFIX): m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {n: m.r["default"] for n, m in layers.items()} == {n: m.rank for n, m in adapted_linears(model)}
    ranks = [m.rank for _, m in adapted_linears(model)]
    assert len(ranks) == 2 * LINEARS[name]
    assert sorted(ranks) == sorted([2, 2, 7] + [4] * (len(ranks) - 3))


@pytest.mark.parametrize("name", NAMES)
def test_the_target_modules_are_leaf_names_where_those_say_it_all_and_whole_names_otherwise(name, folders, tmp_path):
    def targets(kind: str) -> list[str]:
        folder = written(tmp_path / kind, ours(folders[name]), method_of(kind, name))
        return json.loads((folder / CONFIG).read_text())["target_modules"]

    assert len(targets("plain")) == LINEARS[name]
    assert not any("." in target for target in targets("plain"))
    some = targets("some_layers")
    assert len(some) == len(set(some)) == 1 + 2
    assert all(target.count(".") >= 3 for target in some)
    assert sorted(target.rpartition(".")[2] for target in some) == sorted([ATTENTION[name], *[FEED_FORWARD[name]] * 2])


@pytest.mark.parametrize("kind", KINDS)
def test_our_files_are_those_that_peft_writes(kind, folders, tmp_path):
    model = ours(folders["llama"])
    method = method_of(kind, "llama")
    written(tmp_path / "ours", model, method)
    wrapped = peft.PeftModel.from_pretrained(theirs(folders["llama"]), tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine, its = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[key], its[key]) for key in mine)
    config, its_config = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    its_config["target_modules"] = sorted(its_config["target_modules"])
    its_config["base_model_name_or_path"] = "org/base"
    assert config | {"target_modules": sorted(config["target_modules"])} == {key: its_config[key] for key in config}


# PEFT's, read by us


def peft_options(kind: str, name: str) -> dict:
    attention, feed_forward = ATTENTION[name], FEED_FORWARD[name]
    both = {"target_modules": [attention, feed_forward]}
    return {
        "plain": both,
        "all-linear": {"target_modules": "all-linear"},
        "regex": {"target_modules": rf".*\.1\..*{attention}"},
        "one_layer": both | {"layers_to_transform": [1], "layers_pattern": "layers"},
        "rank_pattern": both | {"rank_pattern": {attention: 3, rf".*\.1\..*{feed_forward}": 8}},
        "rslora": both | {"use_rslora": True, "rank_pattern": {feed_forward: 9}},
        "dora": both | {"use_dora": True},
        "gaussian": both | {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    }[kind]


PEFT_KINDS = ("plain", "all-linear", "regex", "one_layer", "rank_pattern", "rslora", "dora", "gaussian")


def made_by_peft(base: Path, folder: Path, **options: object) -> nn.Module:
    """Return PEFT's model with a drawn adapter, which is written into ``folder``."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | options))
    wrapped = peft.get_peft_model(theirs(base), config)
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


def put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    put_foreign_adapter(read_foreign_adapter(folder), model, folder)
    return model


@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_pefts_adapter_read_by_us_gives_the_same_logits(name, kind, folders, tmp_path):
    wrapped = made_by_peft(folders[name], tmp_path, **peft_options(kind, name))
    expected = exact_logits_of(wrapped)
    model = ours(folders[name])
    plain_logits = logits_of(model)
    found = exact_logits_of(put_on(model, tmp_path))
    assert (expected - plain_logits).abs().max() > 0.05
    # Measured: 8e-15, and for DoRA, whose lengths of rows are float32, 7e-7.
    assert (found - expected).abs().max() <= (2e-6 if kind == "dora" else 1e-13)
    layers = [n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert [n for n, _ in adapted_linears(model)] == [n.removeprefix(PREFIX) for n in layers]
    assert len(layers) == {"all-linear": 2 * LINEARS[name], "regex": 1, "one_layer": 2}.get(kind, 4)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_keeps_its_float32_over_a_bfloat16_base_where_it_is_to_be_merged(name, folders, tmp_path):
    made_by_peft(folders[name], tmp_path, **peft_options("dora", name))
    saved = load_file(tmp_path / WEIGHTS)
    held = adapter_tensors(put_on(ours(folders[name], "bfloat16"), tmp_path))
    assert len(held) == 4 * 3
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[key], t) and t.dtype == torch.float32 for key, t in saved.items())


# What cannot be read


@pytest.fixture(scope="module")
def good(folders, tmp_path_factory) -> Path:
    """A PEFT adapter that must not be changed, on q_proj and down_proj of both Llama layers."""
    folder = tmp_path_factory.mktemp("good")
    made_by_peft(folders["llama"], folder, **peft_options("plain", "llama"))
    return folder


def spoilt(good: Path, folder: Path, change_config=lambda c: None, change_tensors=lambda t: None) -> Path:
    config, tensors = json.loads((good / CONFIG).read_text()), load_file(good / WEIGHTS)
    change_config(config)
    change_tensors(tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


UNSUPPORTED = {
    "peft_type": "LOHA",
    "layer_replication": [[0, 1]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "init_lora_weights": "pissa_niter_4",
    "an_option_of_next_year": 1,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_an_unsupported_option_is_refused_by_name_and_value(key, good, tmp_path):
    folder = spoilt(good, tmp_path, lambda c: c.update({key: UNSUPPORTED[key]}))
    with pytest.raises(AdapterError) as caught:
        read_foreign_adapter(folder)
    assert str(folder / CONFIG) in str(caught.value)
    assert key in str(caught.value)
    assert repr(UNSUPPORTED[key]) in str(caught.value)


def test_every_option_of_peft_is_either_read_without_effect_or_refused(good, tmp_path):
    options = set(json.loads((good / CONFIG).read_text()))
    harmless = {"auto_mapping": {}, "revision": "main", "exclude_modules": ["k_proj"], "layers_pattern": "layers", "lora_dropout": 0.1}
    harmless |= {"eva_config": {"rho": 2.0}, "corda_config": {"x": 1}, "loftq_config": {"loftq_bits": 4}, "lora_ga_config": {"x": 1}}
    harmless |= {"velora_config": {"scale": 1.0}, "layers_to_transform": [0, 1], "ensure_weight_tying": True, "inference_mode": False}
    harmless |= {"task_type": None, "rank_pattern": {}, "qalora_group_size": 8, "megatron_core": "x", "peft_version": "9"}
    harmless |= {"base_model_name_or_path": "x", "target_modules": "whatever"}
    harmless |= {"fan_in_fan_out": True, "bias": "all"}
    needed = {"r", "lora_alpha", "use_dora", "use_rslora", "lora_bias", "modules_to_save", "alpha_pattern", "trainable_token_indices"}
    assert options == needed | set(harmless) | set(UNSUPPORTED) - {"an_option_of_next_year"}
    assert len(options) == 8 + 22 + 11
    found = read_foreign_adapter(spoilt(good, tmp_path, lambda c: c.update(harmless)))
    plain = read_foreign_adapter(good)
    assert found.linears.keys() == plain.linears.keys()
    for layer, pair in found.linears.items():
        assert pair.scaling == plain.linears[layer].scaling
        assert torch.equal(pair.A, plain.linears[layer].A)
        assert torch.equal(pair.B, plain.linears[layer].B)
    assert (found.embeddings, found.whole, found.rows) == ({}, {}, {})


def test_all_unsupported_options_are_named_at_once(good, tmp_path):
    folder = spoilt(good, tmp_path, lambda c: c.update(UNSUPPORTED))
    with pytest.raises(AdapterError) as caught:
        read_foreign_adapter(folder)
    assert [key for key in UNSUPPORTED if key not in str(caught.value)] == []


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_a_start_that_changed_the_base_is_refused(start, good, tmp_path):
    with pytest.raises(AdapterError, match=f"init_lora_weights = '{start}' changed the base"):
        read_foreign_adapter(spoilt(good, tmp_path, lambda c: c.update(init_lora_weights=start)))


def test_pefts_own_pissa_adapter_would_lose_what_it_took_out_of_the_base(folders, tmp_path):
    """Why it is refused: over the base as it is, its tensors do not give PEFT's logits."""
    expected = logits_of(made_by_peft(folders["llama"], tmp_path, init_lora_weights="pissa", target_modules=["q_proj"]))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"init_lora_weights": True}))
    assert not torch.allclose(logits_of(put_on(ours(folders["llama"]), tmp_path)), expected, atol=0.01)


MALFORMED_CONFIGS = [
    (None, "cannot be read"),
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    ('{"peft_type": "LORA", "lora_alpha": 8}', '"r" and "lora_alpha" must be numbers'),
    ('{"peft_type": "LORA", "r": 4}', '"r" and "lora_alpha" must be numbers'),
    ('{"peft_type": "LORA", "r": "4", "lora_alpha": 8}', '"r" and "lora_alpha" must be numbers'),
]


@pytest.mark.parametrize(("content", "problem"), MALFORMED_CONFIGS, ids=["missing", "cut", "list", "no-r", "no-alpha", "r-as-text"])
def test_a_malformed_config_is_refused_by_its_path(content, problem, good, tmp_path):
    folder = spoilt(good, tmp_path)
    (folder / CONFIG).unlink()
    if content is not None:
        (folder / CONFIG).write_text(content)
    with pytest.raises(AdapterError) as caught:
        read_foreign_adapter(folder)
    assert str(folder / CONFIG) in str(caught.value)
    assert problem in str(caught.value)


def test_a_config_that_is_no_text_is_refused(good, tmp_path):
    folder = spoilt(good, tmp_path)
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(AdapterError, match="not JSON"):
        read_foreign_adapter(folder)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\xff" * 64])
def test_weights_that_cannot_be_read_are_refused_by_their_path(content, good, tmp_path):
    folder = spoilt(good, tmp_path)
    (folder / WEIGHTS).unlink()
    if content is not None:
        (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="cannot be read as safetensors") as caught:
        read_foreign_adapter(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_pickled_weights_are_never_read(good, tmp_path):
    folder = spoilt(good, tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model\.bin, which is pickle and never read"):
        read_foreign_adapter(folder)


def test_weights_without_a_lora_tensor_are_refused(good, tmp_path):
    folder = spoilt(good, tmp_path, change_tensors=lambda t: [t.pop(key) for key in list(t) if "lora_A" in key])
    with pytest.raises(AdapterError, match=r"holds no tensor called \*\.lora_A\.weight"):
        read_foreign_adapter(folder)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


UNFIT_TENSORS = [
    (lambda t: t.pop(f"{Q}.lora_B.weight"), f"lacks {Q}.lora_B.weight"),
    (lambda t: t.pop(f"{Q}.lora_A.weight"), f"has {Q}.lora_B.weight, which nothing here takes"),
    (lambda t: t.update({f"{PREFIX}extra": torch.zeros(2)}), f"has {PREFIX}extra, which nothing here takes"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}), f"has {Q}.lora_magnitude_vector, which nothing"),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}), f"{Q}.lora_A.weight is [4, 63], needed is [4, 64]"),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 64)}), "q_proj has rank 5, and adapter_config.json says r = 4"),
    (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(64, 4, 1)}), f"{Q}.lora_B.weight is [64, 4, 1], needed is [64, 4]"),
    (lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")), f"{Q}.lora_B.weight has values that are not finite"),
    (lambda t: t[f"{Q}.lora_A.weight"][0, 0].fill_(float("-inf")), f"{Q}.lora_A.weight has values that are not finite"),
]


@pytest.mark.parametrize(
    ("change", "problem"),
    UNFIT_TENSORS,
    ids=["lacks-B", "lacks-A", "extra", "magnitude-without-dora", "width", "rank", "three-dimensions", "nan", "infinity"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(change, problem, good, folders, tmp_path):
    folder = spoilt(good, tmp_path, change_tensors=change)
    model = ours(folders["llama"])
    with pytest.raises(AdapterError) as caught:
        put_on(model, folder)
    assert problem in str(caught.value)
    assert str(folder) in str(caught.value)


def test_an_adapter_that_does_not_fit_leaves_what_is_attached_as_it_was(good, folders, tmp_path):
    folder = spoilt(good, tmp_path, change_tensors=lambda t: t.update({f"{PREFIX}extra": torch.zeros(2)}))
    model = ours(folders["llama"])
    method_of("plain", "llama").attach(model)
    before = {name: p.clone() for name, p in trainable_tensors(model).items()}
    with pytest.raises(AdapterError):
        load_adapter(folder, model)
    assert all(torch.equal(p, before[name]) for name, p in trainable_tensors(model).items())


def test_five_problems_are_shown_and_the_rest_counted(good, folders, tmp_path):
    folder = spoilt(good, tmp_path, change_tensors=lambda t: t.update({f"extra{i}": torch.zeros(1) for i in range(8)}))
    with pytest.raises(AdapterError) as caught:
        put_on(ours(folders["llama"]), folder)
    assert str(caught.value).count("which nothing here takes") == 5
    assert "(and 3 more)" in str(caught.value)


def test_dora_without_its_magnitudes_is_refused(good, folders, tmp_path):
    folder = spoilt(good, tmp_path, lambda c: c.update(use_dora=True))
    with pytest.raises(AdapterError, match=r"lacks .*lora_magnitude_vector"):
        put_on(ours(folders["llama"]), folder)


# As factors alone


def test_the_updates_of_an_adapter_are_what_its_layers_merge(folders, tmp_path):
    for kind in ("plain", "rank_per_target", "rslora", "head"):
        model = ours(folders["llama"])
        written(tmp_path / kind, model, method_of(kind, "llama"))
        found = read_foreign_adapter(tmp_path / kind).updates(tmp_path / kind)
        layers = dict(adapted_linears(model))
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            torch.testing.assert_close(found[name].dense(), layer.merged_weight(torch.zeros(found[name].shape)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, layer: tensors.pop(f"{layer}.lora_B.weight"), "lacks base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"),
        (lambda tensors, layer: tensors.update({f"{layer}.lora_B.weight": torch.ones(64, 3)}), "[4, 96], [64, 3]"),
        (lambda tensors, layer: tensors.update({f"{layer}.bias": torch.ones(3)}), "holds whole layers (model.layers.0.mlp.down_proj)"),
        (lambda tensors, layer: tensors[f"{layer}.lora_A.weight"].fill_(torch.inf), "has values that are not finite"),
        (lambda tensors, layer: [t.zero_() for name, t in tensors.items() if "lora_B" in name], "was it ever trained?"),
    ],
)
def test_tensors_that_make_no_update_are_refused(change, words, folders, tmp_path):
    written(tmp_path, ours(folders["llama"]), method_of("plain", "llama"))
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors, "base_model.model.model.layers.0.mlp.down_proj")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError) as error:
        read_foreign_adapter(tmp_path).updates(tmp_path)
    assert words in str(error.value)
