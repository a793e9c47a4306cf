"""LoRA adapters in PEFT's format that do not fit themselves, the base, or what is read: refused with file, key or tensor."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS
from tests.formats.test_peft import MALFORMED_CONFIGS, UNFIT_TENSORS, UNSUPPORTED, Q
from tests.malformed import Case, count_refused
from tests.malformed.test_safetensors import make_good
from tests.tiny import tiny_llama

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
EMBED = f"{PREFIX}model.embed_tokens"
ROWS = f"{EMBED}.token_adapter.trainable_tokens_delta"


def put_on(folder: Path) -> Callable[[], object]:
    return lambda: put_foreign_adapter(read_foreign_adapter(folder), tiny_llama(), folder)


def given(good: Path, spoil: Callable[[Path], object], folder: Path) -> Callable[[], object]:
    """Return what reads a copy of the good adapter that ``spoil`` has changed."""
    adapter = Path(shutil.copytree(good / "adapter", folder / "adapter"))
    spoil(adapter)
    return put_on(adapter)


def configured(**changes: object) -> Callable[[Path], object]:
    """Return what changes keys of adapter_config.json."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return spoil


def config_of(content: str | bytes | None) -> Callable[[Path], object]:
    """Return what replaces adapter_config.json; None: it is deleted."""

    def spoil(folder: Path) -> None:
        (folder / CONFIG).unlink()
        if content is not None:
            (folder / CONFIG).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def changed(change: Callable[[dict], object], **keys: object) -> Callable[[Path], object]:
    """Return what changes the tensors, and keys of adapter_config.json."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        configured(**keys)(folder)

    return spoil


def both(one: Callable[[Path], object], other: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: (one(folder), other(folder))


def moved(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / to)


NUMBERS = '"r" and "lora_alpha" must be numbers'
BOUNDS = '"r" must be 1 or more and "lora_alpha" more than 0 and finite'
CONFIGS = {
    "rank 0": (configured(r=0), BOUNDS),
    "a negative rank": (configured(r=-4), BOUNDS),
    "a rank in halves": (configured(r=4.5), NUMBERS),
    "true as the rank": (configured(r=True), NUMBERS),
    "no rank": (configured(r=None), NUMBERS),
    "alpha 0": (configured(lora_alpha=0), BOUNDS),
    "a negative alpha": (configured(lora_alpha=-8), BOUNDS),
    "NaN as alpha": (configured(lora_alpha=float("nan")), BOUNDS),
    "infinity as alpha": (configured(lora_alpha=float("inf")), BOUNDS),
    "an alpha of 400 digits": (configured(lora_alpha=10**400), BOUNDS),
    "an alpha of 5,000 digits": (config_of(f'{{"peft_type": "LORA", "r": 4, "lora_alpha": {"9" * 5000}}}'), "not JSON"),
    "true as alpha": (configured(lora_alpha=True), NUMBERS),
    "a list as alpha": (configured(lora_alpha=[8]), NUMBERS),
    "the rank twice": (config_of('{"peft_type": "LORA", "r": 4, "r": 8, "lora_alpha": 8}'), '"r" stands twice'),
    "another rank than the tensors have": (configured(r=8), "has rank 4, and adapter_config.json says r = 8 and no such rank_pattern"),
    "ranks in a list": (configured(rank_pattern=[4]), "rank_pattern must be an object of whole numbers"),
    "ranks as texts": (configured(rank_pattern={"q_proj": "4"}), "rank_pattern must be an object of whole numbers"),
    "a text as use_dora": (configured(use_dora="false"), "use_dora must be true or false"),
    "a number as use_rslora": (configured(use_rslora=1), "use_rslora must be true or false"),
    "alphas in a list": (configured(alpha_pattern=[4]), "alpha_pattern must be an object of numbers"),
    "an alpha of 0 for one layer": (configured(alpha_pattern={"q_proj": 0}), "alpha_pattern must be an object of numbers, more than 0"),
    "a pattern that runs for hours": (configured(alpha_pattern={"(a+)+$": 4}), "is no pattern that can be followed"),
    "a pattern that is none": (configured(alpha_pattern={"q_proj(": 4}), "is no pattern that can be followed"),
    "token ids as texts": (configured(trainable_token_indices=["3"]), "trainable_token_indices must be a list of token ids"),
    "a name as modules_to_save": (configured(modules_to_save="lm_head"), "modules_to_save must be a list of names"),
    "an unknown bias": (configured(bias="some"), "bias = 'some': is none of none, all, lora_only"),
    "DoRA without magnitudes": (configured(use_dora=True), "lora_magnitude_vector"),
    "an unknown type": (configured(peft_type="\x1b[2J"), "peft_type is '\\x1b[2J'"),
    "no type": (configured(peft_type=None), "peft_type is None, only LORA, ADALORA, IA3 are read"),
    "a list as the type": (configured(peft_type=["LORA"]), "peft_type is ['LORA'], only LORA, ADALORA, IA3 are read"),
    "a type that changes no weight": (configured(peft_type="PROMPT_TUNING"), "changes no weight, so it can be neither merged nor added"),
    "no bias": (configured(bias=None), "bias = None"),
    "a config that is null": (config_of("null"), "not a JSON object"),
    "a config that is text": (config_of('"LORA"'), "not a JSON object"),
    "a config 100,000 deep": (config_of("[" * 100_000), "not JSON (its brackets are nested too deeply)"),
    "a config of 40 MB": (config_of(b" " * 40_000_000), "cannot be read (it has 38.1 MiB, and at most 32.0 MiB of such a file are read)"),
    "a config in UTF-16": (config_of("{}".encode("utf-16")), "not JSON"),
    "a config that is a pipe": (both(config_of(None), lambda folder: os.mkfifo(folder / CONFIG)), "it is a named pipe"),
    "a config that is a folder": (both(config_of(None), lambda folder: (folder / CONFIG).mkdir()), "cannot be read (Is a directory"),
    "a config without an end": (both(config_of(None), lambda folder: (folder / CONFIG).symlink_to("/dev/zero")), "it is a device"),
}  # fmt: skip
TENSORS = {
    "no layer": (changed(dict.clear), "holds no tensor called *.lora_A.weight"),
    "a layer that the base has not": (
        changed(lambda t: t.update({A.replace("layers.0", "layers.9"): t.pop(A), B.replace("layers.0", "layers.9"): t.pop(B)})),
        "it has no linear layer model.layers.9.self_attn.q_proj",
    ),
    "a layer that is no linear": (
        changed(lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"})),
        "it has no linear layer model.embed_tokens",
    ),
    "a pattern for a layer": (
        changed(lambda t: t.update({f"{PREFIX}*.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"})),
        "it has no linear layer *",
    ),
    "names without PEFT's prefix": (
        changed(lambda t: [t.update({name.removeprefix(PREFIX): t.pop(name)}) for name in list(t)]),
        "which nothing here takes: PEFT's names are base_model.model.<layer>.<tensor>",
    ),
    "two adapters in one file": (
        changed(lambda t: t.update({A.replace(".weight", f".{name}.weight"): t[A].clone() for name in ("one", "two")})),
        "q_proj.lora_A.weight twice, as two adapters in one file do",
    ),
    "never trained": (
        changed(lambda t: [x.zero_() for name, x in t.items() if "lora_B" in name]),
        "every *.lora_B.weight is zero, so the adapter changes nothing",
    ),
    "A without B": (changed(lambda t: t.pop(B)), f"lacks {B}"),
    "A of no rank": (changed(lambda t: t.update({A: torch.zeros(0, 64), B: torch.zeros(64, 0)})), "q_proj has rank 0"),
    "A without dimensions": (changed(lambda t: t.update({A: torch.zeros(())})), "q_proj has rank 0"),
    "A of one dimension": (changed(lambda t: t.update({A: torch.zeros(4)})), "q_proj has rank 0"),
    "A turned over": (changed(lambda t: t.update({A: t[A].T.contiguous()})), "q_proj has rank 64"),
    "B turned over": (changed(lambda t: t.update({B: t[B].T.contiguous()})), f"{B} is [4, 64], needed is [64, 4]"),
    "B of another rank": (changed(lambda t: t.update({B: torch.zeros(64, 3)})), f"{B} is [64, 3], needed is [64, 4]"),
    "a base twice as wide": (changed(lambda t: [t.update({n: x.repeat(1, 2)}) for n, x in list(t.items()) if "A" in n]), "needed is [4, "),
    "whole numbers": (changed(lambda t: t.update({A: t[A].to(torch.int32)})), f"{A} is int32, and adapters are 16 or 32 bit floats"),
    "true and false": (changed(lambda t: t.update({A: t[A] > 0})), f"{A} is bool"),
    "8-bit floats": (changed(lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), f"{A} is float8_e4m3fn"),
    "complex numbers": (changed(lambda t: t.update({A: t[A].to(torch.complex64)})), f"{A} is complex64"),
    "NaN in 16 bit": (changed(lambda t: t.update({B: torch.full((64, 4), float("nan")).bfloat16()})), "values that are not finite"),
    "infinity in 16 bit": (changed(lambda t: t.update({B: torch.full((64, 4), float("inf")).half()})), "values that are not finite"),
    "half an embedding": (
        changed(lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)})),
        "lacks base_model.model.model.embed_tokens.lora_embedding_B",
    ),
    "an embedding of another vocabulary": (
        changed(lambda t: t.update({f"{EMBED}.lora_embedding_A": torch.zeros(4, 9), f"{EMBED}.lora_embedding_B": torch.zeros(64, 4)})),
        "embed_tokens.lora_embedding_A is [4, 9], needed is [4, 64]",
    ),
    "an embedding that the base has not": (
        changed(lambda t: t.update({f"{PREFIX}wte.lora_embedding_{x}": torch.zeros(4, 4) for x in "AB"})),
        "it has no embedding wte",
    ),
    "a head of more rows than the embedding": (
        changed(lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(100, 64)})),
        "model.embed_tokens has 64 rows with it, and lm_head 100",
    ),
    "a head of another width": (
        changed(lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(64, 32)})),
        "lm_head.weight is [64, 32], needed is [64, 64]",
    ),
    "a classifier": (changed(lambda t: t.update({f"{PREFIX}score.weight": torch.zeros(2, 64)})), "score.weight, which nothing here takes"),
    "a saved layer without its tensors": (configured(modules_to_save=["lm_head"]), "lacks the tensors of lm_head, which adapter_"),
    "a bias where the base has none": (
        changed(lambda t: t.update({f"{Q}.base_layer.bias": torch.zeros(64)}), bias="all"),
        "q_proj.bias, which nothing here takes",
    ),
    "a trained bias of B where the base has none": (
        changed(lambda t: t.update({f"{name[:-7]}.bias": torch.ones(64) for name in list(t) if "lora_B" in name}), lora_bias=True),
        "lora_B.bias is trained, and the base's layer has no bias that could hold it (lora_bias)",
    ),
    "no bias of B": (configured(lora_bias=True), "q_proj.lora_B.bias: adapter_config.json says lora_bias = true"),
    "no rows of tokens": (configured(trainable_token_indices=[3]), "lacks *.trainable_tokens_delta, the rows of the tokens"),
    "fewer rows than tokens": (
        changed(lambda t: t.update({ROWS: torch.zeros(1, 64)}), trainable_token_indices=[3, 5]),
        "trainable_tokens_delta is [1, 64], and adapter_config.json has 2 tokens for it",
    ),
    "rows of a token that the base has not": (
        changed(lambda t: t.update({ROWS: torch.zeros(1, 64)}), trainable_token_indices=[64]),
        "trains token 64, and the base has 64 rows",
    ),
    "rows of a linear": (
        changed(lambda t: t.update({ROWS.replace(EMBED, Q): torch.zeros(1, 64)}), trainable_token_indices={"q_proj": [3]}),
        "q_proj is neither the embedding nor the output head",
    ),
    "a token twice": (configured(trainable_token_indices=[3, 3]), "trainable_token_indices names token 3 twice"),
    "a thousand tensors too many": (changed(lambda t: t.update({f"{n}": torch.zeros(1) for n in range(1000)})), "(and 995 more)"),
    "escape codes in a name": (changed(lambda t: t.update({"\x1b[2J": torch.zeros(1)})), "has \\x1b[2J, which nothing here takes"),
    "a way out of the folder": (changed(lambda t: t.update({"../../x": torch.zeros(1)})), "has ../../x, which nothing here takes"),
    "a name of 10,000 characters": (changed(lambda t: t.update({"x" * 10_000: torch.zeros(1)})), "xxx..., which nothing here takes"),
}  # fmt: skip
FOLDERS = {
    "weights as pickle": (moved(WEIGHTS, "adapter_model.bin"), "has only adapter_model.bin, which is pickle and never read"),
    "no weights": (moved(WEIGHTS, "weights.safetensors"), "adapter_model.safetensors: cannot be read as safetensors"),
    "weights and no config": (moved(CONFIG, "config.json"), "adapter_config.json: cannot be read (No such file or directory)"),
}


def cases(good: Path = Path()) -> list[Case]:
    configs = [
        Case(f"config {n}", partial(given, good, config_of(content)), (CONFIG, said)) for n, (content, said) in enumerate(MALFORMED_CONFIGS)
    ]
    options = [Case(f"option {key}", partial(given, good, configured(**{key: value})), (CONFIG, key)) for key, value in UNSUPPORTED.items()]
    unfit = [
        Case(f"tensor {n}", partial(given, good, changed(change)), ("/adapter", said)) for n, (change, said) in enumerate(UNFIT_TENSORS)
    ]
    own = [
        Case(name, partial(given, good, spoil), ("/adapter", said))
        for each in (CONFIGS, TENSORS, FOLDERS)
        for name, (spoil, said) in each.items()
    ]
    places = [
        Case("no folder", lambda folder: put_on(folder / "adapter"), ("/adapter/adapter_config.json: cannot be read (No such file",)),
        Case("a file as the folder", lambda folder: put_on(good / "adapter" / WEIGHTS), ("cannot be read (Not a directory)",)),
        Case("a whole model", lambda folder: put_on(good / "base"), ("adapter_config.json: cannot be read",)),
        Case("NUL in the folder's name", lambda folder: put_on(Path("a\0b")), ("a\\x00b/adapter_config.json: cannot be read",)),
    ]
    return [*configs, *options, *unfit, *own, *places]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def test_every_malformed_adapter_is_refused_with_file_and_key_or_tensor(good, tmp_path, record_property):
    found = cases(good)
    assert len(found) == 114
    count_refused("adapters", found, tmp_path, record_property)
