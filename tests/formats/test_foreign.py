"""PEFT's adapters read by us, feature by feature: the same logits live, and from the merged folder."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlite.errors import AdapterError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.merged import write_merged
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS
from qlite.model.load import Base
from tests.families import FAMILIES, VOCAB, new_tokenizer, saved_folder
from tests.formats.test_peft import ATTENTION, EMBEDDING, FEED_FORWARD, exact_logits_of, logits_of, ours, theirs
from tests.marks import slow

NAMES = ("llama", "qwen2", "gpt_neox")
TIED = ("qwen2",)
BIASED = ("qwen2", "gpt_neox")
GROWN = VOCAB + 16


def options_of(kind: str, name: str) -> dict:
    attention, feed_forward, embedding = ATTENTION[name], FEED_FORWARD[name], EMBEDDING[name]
    return {
        "alphas": {"alpha_pattern": {attention: 3, rf".*\.1\..*{feed_forward}": 0.5}, "rank_pattern": {attention: 2}},
        "rank over the layer's size": {"r": 80},
        "whole head and norms": {"modules_to_save": ["lm_head", "norm"]},
        "whole embedding": {"modules_to_save": [embedding]},
        "whole embedding, tied": {"modules_to_save": [embedding], "ensure_weight_tying": True},
        "a whole feed-forward net": {"target_modules": [attention], "modules_to_save": ["mlp"]},
        "all biases": {"bias": "all"},
        "adapted layers' biases": {"bias": "lora_only"},
        "biases of B": {"lora_bias": True, "target_modules": [attention]},
        "tokens": {"trainable_token_indices": [9, 5, 77]},
        "tokens of both": {"trainable_token_indices": {embedding: [9, 5], "lm_head": [9, 5]}},
        "other tokens of each": {"trainable_token_indices": {embedding: [9, 5], "lm_head": [77]}},
        "an adapted embedding": {"target_modules": [embedding, attention]},
        "an adapted embedding, tied": {"target_modules": [embedding, attention], "ensure_weight_tying": True},
        "an adapted embedding and head, rslora": {"target_modules": [embedding, attention, "lm_head"], "use_rslora": True},
        "an adapted embedding, dora": {"target_modules": [embedding, attention], "use_dora": True},
        "a grown vocabulary": {},
        "a grown vocabulary, tokens": {"trainable_token_indices": [9, VOCAB + 3]},
        "a grown vocabulary, adapted": {"target_modules": [embedding, attention]},
        "a grown vocabulary, both adapted": {"target_modules": [embedding, attention, "lm_head"]},
    }[kind]


KINDS = (
    *(
        "alphas",
        "rank over the layer's size",
        "whole head and norms",
        "whole embedding",
        "whole embedding, tied",
        "a whole feed-forward net",
    ),
    *("all biases", "adapted layers' biases", "biases of B", "tokens", "tokens of both", "other tokens of each"),
    *("an adapted embedding", "an adapted embedding, tied", "an adapted embedding and head, rslora", "an adapted embedding, dora"),
    *("a grown vocabulary", "a grown vocabulary, tokens", "a grown vocabulary, adapted"),
    "a grown vocabulary, both adapted",
)
# Trained biases need some, and of an adapted embedding that grew PEFT saves the head only where it is the same.
CASES = [
    (name, kind)
    for kind in KINDS
    for name in NAMES
    if ("biases" not in kind or name in BIASED) and (kind != "a grown vocabulary, adapted" or name in TIED)
]
FIRST = list({kind: (name, kind) for name, kind in reversed(CASES)}.values())
"""The first family of each kind."""
UNTYING = {
    *("whole head and norms", "whole embedding", "other tokens of each", "an adapted embedding", "an adapted embedding, tied"),
    *("an adapted embedding and head, rslora", "an adapted embedding, dora", "a grown vocabulary, adapted"),
    "a grown vocabulary, both adapted",
}
COMPUTED = ("dora", "biases of B", "adapted embedding", "vocabulary, adapted", "both adapted")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, FAMILIES[name]) for name in NAMES}


@torch.no_grad()
def drawn(model: nn.Module) -> None:
    """Draw all that is trained anew, at the size that it has."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_length = "magnitude" in name
            p.copy_(p * (0.5 + torch.rand(p.shape, generator=generator)) if is_length else torch.randn(p.shape, generator=generator) * 0.2)


def made_by_peft(base: Path, folder: Path, name: str, kind: str) -> nn.Module:
    """Return PEFT's model with an adapter of ``kind``, written into ``folder``."""
    model = theirs(base)
    if "grown" in kind:
        torch.manual_seed(3)
        model.resize_token_embeddings(GROWN, mean_resizing=False)
    options = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", "target_modules": [ATTENTION[name], FEED_FORWARD[name]]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options | options_of(kind, name)))
    drawn(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


def put_on(model: nn.Module, folder: Path) -> nn.Module:
    put_foreign_adapter(read_foreign_adapter(folder), model, folder)
    return model


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """Return what transformers reads of the merged ``model``."""
    write_merged(folder, model, new_tokenizer(), None, torch.float32, lambda *_: None)
    return theirs(folder)


@pytest.mark.parametrize(("name", "kind"), [case if case in FIRST else slow(*case) for case in CASES])
def test_pefts_logits_are_ours_live_and_merged(name, kind, folders, tmp_path):
    wrapped = made_by_peft(folders[name], tmp_path / "adapter", name, kind)
    model = put_on(ours(folders[name]), tmp_path / "adapter")
    again = merged(model, tmp_path / "merged")
    assert (logits_of(wrapped)[..., :VOCAB] - logits_of(ours(folders[name]))).abs().max() > 0.05
    expected = exact_logits_of(wrapped)
    # float64's rounding; measured where something was computed in float32 when it was put on: at most 1.1e-5, of logits up to 7.
    assert (exact_logits_of(model) - expected).abs().max() <= (2e-5 if any(word in kind for word in COMPUTED) else 1e-12)
    assert (exact_logits_of(again) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert again.config.get_text_config().vocab_size == expected.shape[-1]
    assert again.config.tie_word_embeddings == (name in TIED and kind not in UNTYING)


def test_a_head_that_did_not_grow_with_the_embedding_is_refused(folders, tmp_path):
    made_by_peft(folders["llama"], tmp_path, "llama", "a grown vocabulary, adapted")
    with pytest.raises(AdapterError, match="model.embed_tokens has 144 rows with it, and lm_head 128: the adapter lacks one of them"):
        put_on(ours(folders["llama"]), tmp_path)


RENAMED: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda n: n.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    "a compiled model": lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "a checkpointed model": lambda n: n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "an old wrapper": lambda n: n.replace("lm_head.", "lm_head.modules_to_save.default."),
    "an older wrapper": lambda n: n.replace("lm_head.", "lm_head.modules_to_save."),
}


@pytest.mark.parametrize("how", RENAMED)
def test_names_of_other_versions_are_read(how, folders, tmp_path):
    wrapped = made_by_peft(folders["llama"], tmp_path, "llama", "whole head and norms")
    tensors = {RENAMED[how](name): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert tensors.keys() != load_file(tmp_path / WEIGHTS).keys()
    if "wrapper" in how:
        tensors[f"{PREFIX}lm_head.original_module.weight"] = torch.zeros(VOCAB, 64)
    save_file(tensors, tmp_path / WEIGHTS)
    assert (exact_logits_of(put_on(ours(folders["llama"]), tmp_path)) - exact_logits_of(wrapped)).abs().max() <= 1e-12


@pytest.mark.parametrize("bits", [4, *map(slow, (8,))])
@pytest.mark.parametrize("kind", ["whole embedding", "all biases", "tokens", "an adapted embedding", "a grown vocabulary"])
def test_it_is_put_on_packed_weights_and_merged_over_them(kind, bits, folders, tmp_path):
    made_by_peft(folders["qwen2"], tmp_path / "adapter", "qwen2", kind)
    packed = {"bits": bits, "embedding_bits": bits, "head_bits": bits}
    base = Base(model=str(folders["qwen2"]), **packed, dtype="float32", fused=False, cache=False)
    model = put_on(base.load(torch.device("cpu"), lambda *_: None).model, tmp_path / "adapter")
    live = logits_of(model)
    assert (logits_of(merged(model, tmp_path / "merged")) - live).abs().max() <= 1e-4 * live.abs().max()


# Without effect


def untrained(base: Path, folder: Path, **options: object) -> Path:
    """Write an adapter as PEFT begins it."""
    given = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options
    peft.get_peft_model(theirs(base), peft.LoraConfig(**given)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"bias": "all"},
        {"trainable_token_indices": [3, 9]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ],
    ids=str,
)
def test_an_adapter_that_changes_nothing_is_refused(options, folders, tmp_path):
    untrained(folders["qwen2"], tmp_path, **options)
    with pytest.raises(AdapterError, match=r"so the adapter changes nothing of its base; was it ever trained\?"):
        put_on(ours(folders["qwen2"]), tmp_path)


def test_rounding_to_bfloat16_is_no_effect(folders, tmp_path):
    untrained(folders["qwen2"], tmp_path, use_dora=True, modules_to_save=["lm_head"])
    save_file({name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="changes nothing of its base"):
        put_on(ours(folders["qwen2"]), tmp_path)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"bias": "all"}, "v_proj.bias"),
        ({"trainable_token_indices": [3, 9]}, "trainable_tokens_delta"),
    ],
    ids=str,
)
def test_one_changed_tensor_is_an_effect(options, part, folders, tmp_path):
    tensors = load_file(untrained(folders["qwen2"], tmp_path, **options) / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if part in name)[0] *= 1.5
    save_file(tensors, tmp_path / WEIGHTS)
    before = logits_of(ours(folders["qwen2"]))
    assert not torch.equal(logits_of(put_on(ours(folders["qwen2"]), tmp_path)), before)


# All at once


def test_config_and_tensors_are_told_together_with_names_and_shapes(folders, tmp_path):
    untrained(folders["llama"], tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_qalora": True, "alpha_pattern": [1]}))
    gone = next(name for name in tensors if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != gone} | {"extra": torch.full((2,), float("nan"))}, tmp_path / WEIGHTS
    )
    with pytest.raises(AdapterError) as caught:
        read_foreign_adapter(tmp_path)
    wanted = (
        str(tmp_path / CONFIG),
        str(tmp_path / WEIGHTS),
        "use_qalora = True",
        "alpha_pattern must be",
        f"lacks {gone}",
        "has extra",
        "finite",
    )
    assert [word for word in wanted if word not in str(caught.value)] == []


def test_all_that_does_not_fit_the_base_is_told_together(folders, tmp_path):
    untrained(folders["llama"], tmp_path, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    first, second = (name for name in tensors if "lora_A" in name)
    tensors |= {
        first: torch.ones(4, 63),
        second.replace("layers.1", "layers.7"): tensors.pop(second),
        f"{PREFIX}lm_head.weight": torch.ones(9, 9),
    }
    tensors[second.replace("layers.1", "layers.7").replace("lora_A", "lora_B")] = tensors.pop(second.replace("lora_A", "lora_B"))
    save_file(tensors, tmp_path / WEIGHTS)
    model = ours(folders["llama"])
    with pytest.raises(AdapterError) as caught:
        put_on(model, tmp_path)
    for told in (f"{first} is [4, 63], needed is [4, 64]", "no linear layer model.layers.7.self_attn.q_proj", "lm_head.weight is [9, 9]"):
        assert told in str(caught.value)
    assert torch.equal(logits_of(model), logits_of(ours(folders["llama"])))
