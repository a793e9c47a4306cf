"""PEFT's types beside LoRA read by us: AdaLoRA, (IA)^3, prompts, prefixes and gated prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlite.errors import AdapterError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_prompts import read_foreign_prompts
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS, write_adapter
from qlite.methods import METHODS
from tests.families import FAMILIES, saved_folder
from tests.formats.test_foreign import drawn, merged, put_on
from tests.formats.test_peft import ATTENTION, FEED_FORWARD, exact_logits_of, logits_of, ours, theirs
from tests.marks import slow

NAMES = ("llama", "qwen2", "gpt_neox")
PROMPTS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_weights="zero"),
    "a prefix that an MLP makes": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
    ),
    "gated prompts": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, FAMILIES[name]) for name in NAMES}


def config_of(kind: str, name: str) -> peft.PeftConfig:
    places = {"task_type": "CAUSAL_LM", "target_modules": [ATTENTION[name], FEED_FORWARD[name]]}
    if kind == "ia3":
        return peft.IA3Config(**places, feedforward_modules=[FEED_FORWARD[name]], modules_to_save=["lm_head"])
    return peft.AdaLoraConfig(**places, init_r=6, target_r=3, lora_alpha=10, total_step=10)


def made_by_peft(base: Path, folder: Path, config: peft.PeftConfig, dealt: bool = False) -> nn.Module:
    """Return PEFT's model with an adapter of ``config``, written into ``folder``; ``dealt``: with fewer triplets in some layers."""
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(theirs(base), config)
    drawn(wrapped)
    if dealt:
        layers = [module for module in wrapped.modules() if hasattr(module, "ranknum")]
        kept = {
            f"{name}.lora_E.default": [(triplet + place) % 3 > 0 for triplet in range(6)]
            for place, (name, _) in enumerate((n, m) for n, m in wrapped.base_model.model.named_modules() if m in layers)
        }
        kept[next(iter(kept))] = [True] + [False] * 5
        wrapped.base_model.resize_modules_by_rank_pattern(kept, "default")
        wrapped.peft_config["default"].rank_pattern = kept
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.parametrize("kind", ["adalora", "adalora with fewer triplets", "ia3"])
@pytest.mark.parametrize("name", NAMES)
def test_pefts_logits_are_ours_live_and_merged(name, kind, folders, tmp_path):
    made_by_peft(folders[name], tmp_path / "adapter", config_of(kind, name), dealt="fewer" in kind)
    wrapped = peft.PeftModel.from_pretrained(theirs(folders[name]), tmp_path / "adapter")
    model = put_on(ours(folders[name]), tmp_path / "adapter")
    again = merged(model, tmp_path / "merged")
    assert (logits_of(wrapped) - logits_of(ours(folders[name]))).abs().max() > 0.05
    expected = exact_logits_of(wrapped)
    # AdaLoRA's singular values are multiplied into A in float32.
    assert (exact_logits_of(model) - expected).abs().max() <= (2e-5 if "adalora" in kind else 1e-12)
    assert (exact_logits_of(again) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["adalora", "ia3"])
def test_what_we_write_for_peft_is_read_as_a_strangers(kind, folders, tmp_path):
    targets = ("q_proj", "v_proj", "down_proj")
    method = METHODS[kind](targets=targets, **({"rank": 3, "start_rank": 5} if kind == "adalora" else {}))
    model = ours(folders["llama"])
    method.attach(model)
    drawn(model)
    write_adapter(tmp_path, model, method, "org/base")
    assert (exact_logits_of(put_on(ours(folders["llama"]), tmp_path)) - exact_logits_of(model)).abs().max() <= 2e-5


@pytest.mark.parametrize("bits", [4, *map(slow, (8,))])
def test_factors_are_put_on_packed_weights_and_merged_over_them(bits, folders, tmp_path):
    from qlite.model.load import Base

    made_by_peft(folders["qwen2"], tmp_path / "adapter", config_of("ia3", "qwen2"))
    base = Base(model=str(folders["qwen2"]), bits=bits, dtype="float32", fused=False, cache=False)
    model = put_on(base.load(torch.device("cpu"), lambda *_: None).model, tmp_path / "adapter")
    live = logits_of(model)
    assert (logits_of(merged(model, tmp_path / "merged")) - live).abs().max() <= 1e-4 * live.abs().max()


@pytest.mark.parametrize("kind", PROMPTS)
def test_what_stands_beside_the_weights_answers_as_in_peft(kind, folders, tmp_path):
    made_by_peft(folders["llama"], tmp_path, PROMPTS[kind])
    wrapped = peft.PeftModel.from_pretrained(theirs(folders["llama"]), tmp_path).eval()
    model = ours(folders["llama"])
    plain = logits_of(model)
    read_foreign_prompts(tmp_path).put_on(model, tmp_path)
    expected = logits_of(wrapped)[:, 5 if kind == "prompt" else 0 :]
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-4)


def changed(folder: Path, tensors: Callable[[dict[str, Tensor]], object] = lambda _: None, **config: object) -> Path:
    """Change the two files of ``folder``; a key that is None is left out of its config."""
    own = load_file(folder / WEIGHTS)
    tensors(own)
    save_file(own, folder / WEIGHTS)
    said = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
DOWN = f"{PREFIX}model.layers.1.mlp.down_proj"


def test_a_start_is_no_change_of_the_base_in_adalora(folders, tmp_path):
    wrapped = made_by_peft(folders["llama"], tmp_path, config_of("adalora", "llama"))
    model = put_on(ours(folders["llama"]), changed(tmp_path, init_lora_weights="pissa"))
    assert (exact_logits_of(model) - exact_logits_of(wrapped)).abs().max() <= 2e-5


WRONG = {
    "no singular values": ("adalora", lambda t: t.pop(f"{Q}.lora_E"), {}, r"lacks \S*q_proj\.lora_E"),
    "triplets of two ranks": ("adalora", lambda t: t.update({f"{Q}.lora_E": torch.ones(2, 1)}), {}, r"are no lora_A \[R, in\], lora_E"),
    "a rank that nobody named": ("adalora", None, {"init_r": 4}, r"has rank 6, and adapter_config.json says r = 4"),
    "no first rank": ("adalora", None, {"init_r": None}, '"init_r" and "lora_alpha" must be numbers'),
    "a pattern of numbers": ("adalora", None, {"rank_pattern": {"x": 3}}, "rank_pattern must be an object of lists of true and false"),
    "no singular value but 0": (
        "adalora",
        lambda t: [v.zero_() for k, v in t.items() if k.endswith("lora_E")],
        {},
        r"every \*\.lora_A\.weight or, of AdaLoRA, \*\.lora_E is zero",
    ),
    "LoRA's tensors": (
        "adalora",
        lambda t: t.update({f"{Q}.lora_A.weight": t.pop(f"{Q}.lora_A"), f"{Q}.lora_B.weight": t.pop(f"{Q}.lora_B")}),
        {},
        r"lora_A\.weight, which nothing here takes in an adapter of its type",
    ),
    "a first rank beyond all": ("adalora", None, {"init_r": 10**400}, '"init_r" is 1000+, more than any layer has rows'),
    "no triplet": ("adalora", lambda t: [t.pop(k) for k in list(t) if "lora_" in k], {}, "is it an AdaLoRA adapter"),
    "an unknown option, told alone": (
        "adalora",
        None,
        {"use_dora": True},
        r"use_dora = True is not supported; what is not read here, .* it writes instead$",
    ),
    "an unknown option": ("adalora", None, {"use_rslora": True}, "use_rslora = True is not supported"),
    "factors in AdaLoRA": ("adalora", lambda t: t.update({f"{Q}.ia3_l": torch.ones(64, 1)}), {}, r"ia3_l, which nothing here takes"),
    "triplets in a LoRA": ("adalora", None, {"peft_type": "LORA"}, r"lora_A, which nothing here takes in an adapter of its type"),
    "factors of another size": ("ia3", lambda t: t.update({f"{Q}.ia3_l": torch.ones(3, 1)}), {}, r"is \[3, 1\], needed is \[64, 1\] or"),
    "factors of no layer": ("ia3", lambda t: t.update({f"{PREFIX}nowhere.ia3_l": torch.ones(3, 1)}), {}, "no linear layer nowhere"),
    "not finite": ("ia3", lambda t: t[f"{DOWN}.ia3_l"].fill_(torch.inf), {}, "has values that are not finite"),
    "no factors": ("ia3", lambda t: [t.pop(k) for k in list(t) if "ia3" in k], {}, r"is it an \(IA\)\^3 adapter"),
    "a pair in (IA)^3": (
        "ia3",
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 64)}),
        {},
        "lora_A.weight, which nothing here takes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_changes_of_linears_is_told(case, folders, tmp_path):
    kind, tensors, config, match = WRONG[case]
    made_by_peft(folders["llama"], tmp_path, config_of(kind, "llama"))
    with pytest.raises(AdapterError, match=match):
        put_on(ours(folders["llama"]), changed(tmp_path, tensors or (lambda _: None), **config))


def test_factors_of_one_change_nothing_and_are_refused(folders, tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(theirs(folders["llama"]), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"every \*\.ia3_l is 1, so the adapter changes nothing of its base; was it ever trained\?"):
        put_on(ours(folders["llama"]), tmp_path)


WRONG_PROMPTS = {
    "no length": ("prompt", None, {"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number of 1 or more"),
    "another length": ("prompt", None, {"num_virtual_tokens": 6}, r"is \[5, 64\], and adapter_config.json says num_virtual_tokens = 6"),
    "no prompt": ("prefix", dict.clear, {"num_virtual_tokens": 10**12}, "holds no tensor called prompt_embeddings"),
    "an empty prompt": ("prompt", lambda t: t.update(prompt_embeddings=torch.ones(9, 0)), {"num_virtual_tokens": 9}, r"is \[9, 0\], and"),
    "a length beyond any memory": ("gated prompts", None, {"adapter_len": 10**15}, "says adapter_len = 1000000000000000"),
    "another prompt": (
        "prompt",
        lambda t: t.update(prompts=t.pop("prompt_embeddings")),
        {},
        "holds no tensor called prompt_embeddings",
    ),
    "another width": ("prefix", lambda t: t.update(prompt_embeddings=torch.ones(5, 8)), {}, r"is \[5, 8\], needed is \[5, "),
    "more": ("prompt", lambda t: t.update(other=torch.ones(1)), {}, "has other, which nothing here takes"),
    "saved layers": ("prompt", None, {"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
    "an encoder's": ("prefix", None, {"num_transformer_submodules": 2}, "models that encode and decode"),
    "not finite": ("prefix", lambda t: t["prompt_embeddings"].fill_(torch.nan), {}, "not finite"),
    "too many blocks": ("gated prompts", None, {"adapter_layers": 9}, "adapter_layers is 9, and this base has 2 blocks"),
    "closed gates": ("gated prompts", lambda t: [v.zero_() for k, v in t.items() if "gate" in k], {}, "was it ever trained"),
}


@pytest.mark.parametrize("case", WRONG_PROMPTS)
def test_what_is_wrong_with_prompts_is_told(case, folders, tmp_path):
    kind, tensors, config, match = WRONG_PROMPTS[case]
    made_by_peft(folders["llama"], tmp_path, PROMPTS[kind])
    with pytest.raises(AdapterError, match=match):
        read_foreign_prompts(changed(tmp_path, tensors or (lambda _: None), **config)).put_on(ours(folders["llama"]), tmp_path)


def test_gated_prompts_are_refused_in_a_family_that_peft_computes_otherwise(folders, tmp_path):
    made_by_peft(folders["llama"], tmp_path, PROMPTS["gated prompts"])
    with pytest.raises(AdapterError, match='ADAPTION_PROMPT in the family "qwen2" is another computation in PEFT'):
        read_foreign_prompts(tmp_path).put_on(ours(folders["qwen2"]), tmp_path)


def test_who_would_merge_a_prompt_is_told_what_answers_with_it(folders, tmp_path):
    made_by_peft(folders["llama"], tmp_path, PROMPTS["prefix"])
    with pytest.raises(AdapterError, match=r"PREFIX_TUNING, which changes no weight.*python -m qlite\.generate RUN --adapter NAME=FOLDER"):
        read_foreign_adapter(tmp_path)
