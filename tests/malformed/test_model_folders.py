"""Model folders that do not fit themselves, lead out of themselves, or would run a stranger's code: refused with the file and its key."""

import contextlib
import ctypes
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlite.data.dataset import Data
from qlite.data.formats import Conversation
from qlite.errors import QliteError
from qlite.model.load import Base
from qlite.model.shapes import base_shapes
from tests.malformed import Case, count_refused, silent
from tests.model.test_gguf import tiny_model, write_gguf
from tests.tiny_run import run, save_tiny_base, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
Spoil = Callable[[Path], object]


def read(model: str) -> Callable[[], object]:
    """Return what a run reads of a base, in its order: tokenizer and rows, the plan's shapes, the weights."""
    return partial(read_now, model)


def read_now(model: str) -> object:
    base = Base(model=model, bits=16, dtype="float32", fused=False)
    encoder = Data(train="rows.jsonl").encoder(base.tokenizer(silent))
    encoder.encode(Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "rows.jsonl line 1")
    base_shapes(base, silent)
    return base.load(torch.device("cpu"), silent).generation_config


def given(good: Path, spoil: Spoil, folder: Path) -> Callable[[], object]:
    """Return what reads a copy of the good folder that ``spoil`` has changed; beside it lies a folder that is none of its business."""
    model = Path(shutil.copytree(good / "base", folder / "base"))
    outside = Path(shutil.copytree(good / "base", folder / "outside"))
    shutil.copy(outside / "tokenizer.json", outside / "tokenizer.4.0.0.json")
    (outside / "merges.txt").write_text("a b\n", encoding="utf-8")
    (outside / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}', encoding="utf-8")
    spoil(model)
    return read(str(model))


def edited(name: str, **changes: object) -> Spoil:
    """Return what changes keys of a JSON file; None takes a key out."""

    def spoil(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}), encoding="utf-8")

    return spoil


def written(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def without(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    """Return what puts something else in a file's place."""
    return lambda folder: ((folder / name).unlink(missing_ok=True), make(folder / name))


def linked_out(name: str) -> Spoil:
    return replaced(name, lambda path: path.symlink_to(f"../outside/{path.name}"))


def all_of(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def indexed(change: Callable[[dict], object] = lambda weight_map: None) -> Spoil:
    """Return what cuts the weights into two shards and changes the index's weight_map."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = {f"model-0000{n}-of-00002.safetensors": dict(list(tensors.items())[n - 1 :: 2]) for n in (1, 2)}
        for name, part in parts.items():
            save_file(part, folder / name, {"format": "pt"})
        weight_map = {tensor: name for name, part in parts.items() for tensor in part}
        change(weight_map)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return spoil


def place(name: object) -> Spoil:
    """Return what has the index say that the last norm is in a file called ``name``."""
    return indexed(lambda weight_map: weight_map.update({NORM: name}))


def with_tensors(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


PLAIN = f"{INDEX}: weight_map.{NORM} = "
SHARD = "model-00001-of-00002.safetensors"
INDEXES: dict[str, tuple[Spoil, str]] = {
    "a shard above the folder": (place("../outside/model.safetensors"), PLAIN + '"../outside/model.safetensors" is not a plain file name'),
    "a shard at an absolute place": (place("/etc/passwd"), PLAIN + '"/etc/passwd" is not a plain file name'),
    "a shard below the folder": (place("sub/model.safetensors"), "is not a plain file name"),
    "a shard with a backslash": (place("..\\outside\\model.safetensors"), "is not a plain file name"),
    "a shard on a drive": (place("C:model.safetensors"), "is not a plain file name"),
    "a shard with NUL": (place("model\0.safetensors"), "is not a plain file name"),
    "the folder as a shard": (place("."), "is not a plain file name"),
    "the folder above as a shard": (place(".."), "is not a plain file name"),
    "a shard without a name": (place(""), "is not a plain file name"),
    "a number as a shard": (place(7), PLAIN + "7 is not a plain file name"),
    "null as a shard": (place(None), "is not a plain file name"),
    "a list as a shard": (place(["a"]), "is not a plain file name"),
    "a shard with escape codes": (place("\x1b[2J/a"), 'weight_map.model.norm.weight = "\\u001b[2J/a" is not a plain'),
    "a missing shard": (place("model-00003-of-00002.safetensors"), "names model-00003-of-00002.safetensors, which is missing"),
    "a deleted shard": (all_of(indexed(), without(SHARD)), f"names {SHARD}, which is missing"),
    "a tensor in the wrong shard": (
        indexed(lambda weight_map: weight_map.update(dict.fromkeys(weight_map, SHARD))),
        f"{SHARD}: lacks ",
    ),
    "a tensor that no shard has": (indexed(lambda weight_map: weight_map.update({"more": SHARD})), f"{SHARD}: lacks more, which"),
    "a tensor that the index leaves out": (indexed(lambda weight_map: weight_map.pop(NORM)), f"missing tensor {NORM}"),
    "a tensor twice in the index": (
        all_of(indexed(), written(INDEX, f'{{"weight_map": {{"{NORM}": "a", "{NORM}": "b"}}}}')),
        f'{INDEX}: is not JSON ("{NORM}" stands twice in it',
    ),
    "an index without a map": (all_of(indexed(), written(INDEX, "{}")), "has no weight_map"),
    "an index with an empty map": (all_of(indexed(), written(INDEX, '{"weight_map": {}}')), "has no weight_map"),
    "an index with a list for a map": (all_of(indexed(), written(INDEX, '{"weight_map": ["a"]}')), "has no weight_map"),
    "an index that is a list": (all_of(indexed(), written(INDEX, "[]")), f"{INDEX}: must hold one JSON object"),
    "an index cut off": (all_of(indexed(), written(INDEX, '{"weight_map": {"a')), f"{INDEX}: is not JSON"),
    "an index 100,000 deep": (all_of(indexed(), written(INDEX, '{"weight_map":' * 100_000)), "brackets are nested too deeply"),
    "an index of 40 MB": (all_of(indexed(), written(INDEX, " " * 40_000_000)), f"{INDEX}: cannot be read (it has 38.1 MiB"),
    "an index that is a pipe": (all_of(indexed(), replaced(INDEX, os.mkfifo)), f"{INDEX} cannot be read (it is a named pipe"),
    "no index for two shards": (all_of(indexed(), without(INDEX)), f"expected model.safetensors or {INDEX}, found {SHARD}"),
    "a shard that is a pipe": (all_of(indexed(), replaced(SHARD, os.mkfifo)), f"names {SHARD}, which cannot be read (it is a named pipe"),
    "a shard that is a folder": (all_of(indexed(), replaced(SHARD, Path.mkdir)), f"names {SHARD}, which cannot be read (Is a directory)"),
    "a shard without an end": (
        all_of(indexed(), replaced(SHARD, lambda path: path.symlink_to("/dev/zero"))),
        f"names {SHARD}, which cannot be read (it is a device",
    ),
    "a shard that is a link to itself": (
        all_of(indexed(), replaced(SHARD, lambda path: path.symlink_to(path))),
        f"names {SHARD}, which is missing",
    ),
    "a shard that is a link out of the folder": (
        all_of(indexed(), replaced(SHARD, lambda path: path.symlink_to("../outside/model.safetensors"))),
        f"names {SHARD}, a link to ",
    ),
    "weights that are a link out of the folder": (linked_out("model.safetensors"), "names model.safetensors, a link to "),
}  # fmt: skip

CONFIG = "config.json"


def config(**changes: object) -> Spoil:
    return edited(CONFIG, **changes)


def quantised(**keys: object) -> Spoil:
    return config(quantization_config=keys)


UNUSABLE = "config.json cannot be used"
CONFIGS: dict[str, tuple[Spoil, str]] = {
    "no config": (without(CONFIG), "has no config.json"),
    "an empty config": (written(CONFIG, ""), "config.json: is not JSON"),
    "a config cut off": (written(CONFIG, '{"model_type": "ll'), "config.json: is not JSON"),
    "a config that is a list": (written(CONFIG, "[1]"), "config.json: must hold one JSON object"),
    "a config that is null": (written(CONFIG, "null"), "config.json: must hold one JSON object"),
    "a config in UTF-16": (written(CONFIG, "{}".encode("utf-16")), "config.json: is not JSON"),
    "a config 100,000 deep": (written(CONFIG, '{"a":' * 100_000), "brackets are nested too deeply"),
    "a config of 40 MB": (written(CONFIG, " " * 40_000_000), "config.json: cannot be read (it has 38.1 MiB"),
    "a config that is a pipe": (replaced(CONFIG, os.mkfifo), "config.json cannot be read (it is a named pipe"),
    "a config without an end": (replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")), "config.json cannot be read (it is a device"),
    "a config that is a folder": (replaced(CONFIG, Path.mkdir), "config.json"),
    "a config that is a link to itself": (replaced(CONFIG, lambda path: path.symlink_to(path)), "Too many levels of symbolic links"),
    "a config that is a link to nothing": (replaced(CONFIG, lambda path: path.symlink_to("gone")), "config.json cannot be read (No such"),
    "a config out of the folder": (linked_out(CONFIG), "config.json is a link to "),
    "an empty object": (written(CONFIG, "{}"), "model_type null is unknown"),
    "no model_type": (config(model_type=None), "model_type null is unknown"),
    "an unknown model_type": (config(model_type="lama"), 'model_type "lama" is unknown'),
    "a list as model_type": (config(model_type=["llama"]), 'model_type ["llama"] is unknown'),
    "escape codes in model_type": (config(model_type="\x1b[2J"), 'model_type "\\u001b[2J" is unknown'),
    "a model with code of its own": (
        config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        'model_type "evil") needs its own Python code, which qlite never runs',
    ),
    "code of its own in another repository": (
        config(model_type="evil", auto_map={"AutoConfig": "org/evil--evil.Config"}),
        "needs its own Python code, which qlite never runs",
    ),
    "a config that sends on to others": (config(configuration_files=["config.4.0.0.json"]), "configuration_files sends the reader on"),
    "a config that sends on out of the folder": (
        config(configuration_files=["config.0/../../outside/config.json"]),
        "configuration_files sends the reader on",
    ),
    "a model of pictures": (config(model_type="vit"), '"vit" is no causal language model'),
    "a mixture of experts": (config(model_type="mixtral"), "base"),
    "heads that do not divide the width": (config(num_attention_heads=5), UNUSABLE),
    "key heads that do not divide the heads": (config(num_key_value_heads=3), "base.model"),
    "no heads": (config(num_attention_heads=0), "base.model"),
    "a negative number of heads": (config(num_attention_heads=-4), "base.model"),
    "more layers than the files": (config(num_hidden_layers=3), "missing tensor model.layers.2."),
    "fewer layers than the files": (config(num_hidden_layers=1), "unknown tensor model.layers.1."),
    "a thousand million layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, and its files hold 21 tensors"),
    "a negative number of layers": (config(num_hidden_layers=-1), "base.model"),
    "layers as text": (config(num_hidden_layers="2"), UNUSABLE),
    "another width": (config(hidden_size=128), "is [64], the model needs [128]"),
    "no width": (config(hidden_size=0), "base.model"),
    "a negative width": (config(hidden_size=-64), "base.model"),
    "a width beyond all memory": (config(intermediate_size=10**30), "base.model"),
    "a width as text": (config(hidden_size="64"), UNUSABLE),
    "a width that is a list": (config(hidden_size=[64]), UNUSABLE),
    "a larger vocabulary than the files": (config(vocab_size=VOCAB_SIZE + 1), f"the model needs [{VOCAB_SIZE + 1}, 64]"),
    "a smaller vocabulary than the tokenizer": (
        all_of(config(vocab_size=50), with_tensors(lambda t: t.update({n: x[:50].clone() for n, x in t.items() if len(x) == VOCAB_SIZE}))),
        f"the tokenizer is not this model's: its vocabulary has {VOCAB_SIZE} tokens, and config.json has vocab_size = 50",
    ),
    "no vocabulary": (config(vocab_size=0), "the tokenizer is not this model's"),
    "an unknown activation": (config(hidden_act="silly"), "base.model"),
    "an activation that is a number": (config(hidden_act=3), "base.model"),
    "rotary positions that are a number": (config(rope_parameters=5), "base.model"),
    "unknown rotary positions": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "base.model"),
    "an unknown dtype": (config(dtype="float1"), "base.model"),
    "quantised by GPTQ": (quantised(quant_method="gptq", bits=4), 'already quantised (config.json: quant_method "gptq")'),
    "quantised by AWQ": (quantised(quant_method="awq", bits=4), 'already quantised (config.json: quant_method "awq")'),
    "quantised by bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), "already quantised"),
    "quantised to FP8": (quantised(quant_method="fp8"), "already quantised"),
    "quantised in no known way": (config(quantization_config="yes"), "already quantised"),
    "a generation config that is a list": (written("generation_config.json", "[]"), "generation_config.json: must hold one JSON object"),
    "a generation config cut off": (written("generation_config.json", '{"top_k"'), "generation_config.json: is not JSON"),
    "a generation config that is a pipe": (replaced("generation_config.json", os.mkfifo), "generation_config.json cannot be read"),
}  # fmt: skip

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
UNREADABLE = "has no tokenizer that can be read ("


def inside(path: str, value: object) -> Spoil:
    """Return what sets ``path`` ("model.vocab") in tokenizer.json."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        *outer, last = path.split(".")
        part = content
        for key in outer:
            part = part[key]
        part[last] = value
        (folder / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")

    return spoil


def template(text: object) -> Spoil:
    return all_of(lambda folder: (folder / "chat_template.jinja").unlink(missing_ok=True), edited(SETTINGS, chat_template=text))


BAD_TEMPLATE = "its tokenizer's chat template cannot be rendered ("
TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "no tokenizer": (without(TOKENIZER, SETTINGS), UNREADABLE),
    "tokenizer.json as []": (written(TOKENIZER, "[]"), UNREADABLE),
    "tokenizer.json as {}": (written(TOKENIZER, "{}"), UNREADABLE),
    "tokenizer.json as null": (written(TOKENIZER, "null"), UNREADABLE),
    "an empty tokenizer.json": (written(TOKENIZER, ""), UNREADABLE),
    "tokenizer.json cut off": (lambda folder: os.truncate(folder / TOKENIZER, 800), UNREADABLE),
    "tokenizer.json that is not UTF-8": (written(TOKENIZER, b'{"version": "\xff"}'), UNREADABLE),
    "tokenizer.json 100,000 deep": (written(TOKENIZER, '{"a":' * 100_000), UNREADABLE),
    "tokenizer.json of 70 MB": (written(TOKENIZER, " " * 70_000_000), f"{TOKENIZER} has 66.8 MiB, and at most 64.0 MiB of such a file"),
    "tokenizer.json that is a pipe": (replaced(TOKENIZER, os.mkfifo), f"{TOKENIZER} cannot be read (it is a named pipe"),
    "tokenizer.json without an end": (replaced(TOKENIZER, lambda path: path.symlink_to("/dev/zero")), f"{TOKENIZER} cannot be read"),
    "tokenizer.json out of the folder": (linked_out(TOKENIZER), f"{TOKENIZER} is a link to "),
    "tokenizer.json of another kind": (inside("model.type", "Magic"), UNREADABLE),
    "a vocabulary that is a list": (inside("model.vocab", ["a", "b"]), UNREADABLE),
    "a vocabulary with negative numbers": (inside("model.vocab", {"a": -1}), UNREADABLE),
    "a vocabulary with numbers beyond 32 bits": (inside("model.vocab", {"a": 2**40}), UNREADABLE),
    "settings as []": (written(SETTINGS, "[]"), f"{SETTINGS}: must hold one JSON object"),
    "settings cut off": (written(SETTINGS, '{"eos'), f"{SETTINGS}: is not JSON"),
    "settings of 40 MB": (written(SETTINGS, " " * 40_000_000), f"{SETTINGS}: cannot be read (it has 38.1 MiB"),
    "settings out of the folder": (linked_out(SETTINGS), f"{SETTINGS} is a link to "),
    "settings that send on out of the folder": (
        edited(SETTINGS, fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"]),
        f"{SETTINGS}: fast_tokenizer_files = ",
    ),
    "settings that send on to a number": (edited(SETTINGS, fast_tokenizer_files=4), "fast_tokenizer_files = 4 are no plain file names"),
    "special tokens that name a file": (
        written("special_tokens_map.json", '{"merges_file": "../outside/merges.txt"}'),
        "special_tokens_map.json: merges_file is no special token",
    ),
    "special tokens that are a pipe": (replaced("special_tokens_map.json", os.mkfifo), "special_tokens_map.json cannot be read"),
    "a tokenizer with code of its own": (
        all_of(edited(SETTINGS, auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}), without(TOKENIZER)),
        "its tokenizer needs its own Python code, which qlite never runs",
    ),
    "no end of text": (edited(SETTINGS, eos_token=None), "its tokenizer has no end-of-text token"),
    "an end of text that is a number": (edited(SETTINGS, eos_token=1), "base.model"),
    "an end of text beyond the vocabulary": (edited(SETTINGS, eos_token="<end>"), f"its eos token is number {VOCAB_SIZE}, and config.json"),
    "a padding beyond the vocabulary": (edited(SETTINGS, pad_token="<none>"), f"its pad token is number {VOCAB_SIZE}, and config.json"),
    "a longest length that is text": (edited(SETTINGS, model_max_length="long"), UNREADABLE),
    "a template of 10 MB": (template("{{ messages }}" + " " * 10_000_000), BAD_TEMPLATE + "it is 10,000,014 characters long"),
    "a template of a text of 10^10": (template("{{ 'a' * 10 ** 10 }}{{ messages }}"), "rows.jsonl line 1: the chat template refuses"),
    "a template of 10^10 turns": (
        template("{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 2000 + "{% endfor %}{% endfor %}"),
        "rows.jsonl line 1: the chat template refuses this conversation: it writes more than",
    ),
    "a template that asks for Python": (template("{{ messages.__class__.__mro__ }}"), "rows.jsonl line 1: the chat template"),
    "a template that never ends": (template("{{ messages"), BAD_TEMPLATE + "line 1: "),
    "a template with brackets in brackets": (template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"), BAD_TEMPLATE),
    "a template with dates that never end": (template("strftime_now('" * 70_000), "rows.jsonl line 1"),
    "a template that is a number": (template(7), "its tokenizer's chat template is no text but 7"),
    "a template that is a pipe": (replaced("chat_template.jinja", os.mkfifo), "chat_template.jinja cannot be read (it is a named pipe"),
    "a template out of the folder": (linked_out("chat_template.jinja"), "chat_template.jinja is a link to "),
    "one more template out of the folder": (
        lambda folder: (
            (folder / "additional_chat_templates").mkdir(),
            (folder / "additional_chat_templates" / "tools.jinja").symlink_to("../../outside/chat_template.jinja"),
        ),
        "tools.jinja is a link to ",
    ),
    "one more template that is a pipe": (
        lambda folder: ((folder / "additional_chat_templates").mkdir(), os.mkfifo(folder / "additional_chat_templates" / "tools.jinja")),
        "tools.jinja cannot be read (it is a named pipe",
    ),
}  # fmt: skip

ONLY = {
    "pickle alone": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle weights are never read"),
    "nothing but a config": (without("model.safetensors"), "holds no *.safetensors"),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "holds no *.safetensors"),
    "GGUF beside no safetensors": (lambda folder: (folder / "model.safetensors").rename(folder / "m.gguf"), "holds GGUF files"),
    "an adapter": (all_of(without(CONFIG), written("adapter_config.json", "{}")), "it holds an adapter: give the base model's folder"),
    "16-bit weights with infinity": (
        with_tensors(lambda t: t.update({NORM: torch.full((64,), float("inf")).bfloat16()})),
        f"model.safetensors: {NORM} has values that are not finite",
    ),
    "half weights with NaN at the very end": (
        with_tensors(lambda t: t.update({NORM: torch.tensor([1.0] * 63 + [float("nan")]).half()})),
        f"model.safetensors: {NORM} has values that are not finite",
    ),
    "64-bit weights with minus infinity": (
        with_tensors(lambda t: t.update({NORM: torch.tensor([float("-inf")] + [1.0] * 63).double()})),
        f"model.safetensors: {NORM} has values that are not finite",
    ),
}  # fmt: skip
NAMES = {
    "no such folder": ("HERE/nowhere", "there is no "),
    "a folder of nobody's home": ("~nobody-of-that-name/model", 'there is no "~nobody-of-that-name/model"'),
    "a name of 5,000 characters": ("./" + "a" * 5000, "there is no "),
    "an id of 5,000 characters": ("a" * 5000, "base.model"),
    "NUL in the name": ("a\0b", '"a\\x00b" is neither a path that exists nor a hub id'),
    "escape codes in the name": ("a\x1b[2Jb", '"a\\x1b[2Jb" is neither a path that exists nor a hub id'),
    "a line break in the name": ("a\nb", "is neither a path that exists nor a hub id"),
    "a device": ("/dev/zero", '"/dev/zero" is a device, and only regular files are read'),
    "a wheel without a version": ("pypi:name/m.gguf", "base.model"),
    "a way out of a wheel": ("pypi:name==1/../m.gguf", "base.model"),
    "an option as a wheel": ("pypi:--index-url==1/m.gguf", "base.model"),
    "an address": ("https://example.com/model", "is neither a path that exists nor a hub id"),
}  # fmt: skip
FOLDERS = {**INDEXES, **CONFIGS, **TOKENIZERS, **ONLY}


def cases(good: Path = Path()) -> list[Case]:
    named = [Case(name, lambda folder, m=model: read(m.replace("HERE", str(folder))), (said,)) for name, (model, said) in NAMES.items()]
    gguf = [
        Case("a pipe called .gguf", lambda folder: (os.mkfifo(folder / "m.gguf"), read(str(folder / "m.gguf")))[1], ("is a named pipe",)),
        Case("a .gguf without a token", gguf_without_a_token, ("m.gguf: has no tokenizer that can be read",)),
        Case("an empty .gguf", lambda folder: ((folder / "m.gguf").touch(), read(str(folder / "m.gguf")))[1], ("m.gguf: is not a GGUF",)),
        *(
            Case(f"a .gguf of {len(content)} bytes", partial(gguf_of, content), ("m.gguf: is not a GGUF file that can be read",))
            for content in (b"GGUF", b"GGUF\3\0\0\0", struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60), b"GGUF\3\0\0\0" + b"\xff" * 999)
        ),
    ]
    return [*named, *gguf, *(Case(name, partial(given, good, spoil), (said,)) for name, (spoil, said) in FOLDERS.items())]


def gguf_without_a_token(folder: Path) -> Callable[[], object]:
    """A vocabulary that lacks a character which its merges need."""
    write_gguf(folder / "m.gguf", "llama", tiny_model("llama"))
    content, length = (folder / "m.gguf").read_bytes(), struct.pack("<Q", 1)
    (folder / "m.gguf").write_bytes(content.replace(length + b"h", length + b"\1", 1))
    return read(str(folder / "m.gguf"))


def gguf_of(content: bytes, folder: Path) -> Callable[[], object]:
    (folder / "m.gguf").write_bytes(content)
    return read(str(folder / "m.gguf"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_tiny_base(folder / "base")
    return folder


def test_every_malformed_folder_is_refused_with_file_and_key(good, tmp_path, record_property):
    found = cases(good)
    assert len(found) == 159
    count_refused("model folders", found, tmp_path, record_property)


def test_the_good_folder_whole_and_in_shards_is_read(good, tmp_path):
    given(good, lambda folder: None, tmp_path)()
    given(good, indexed(), tmp_path / "shards")()


def test_a_run_with_a_malformed_base_leaves_nothing_behind(tmp_path):
    recipe = tiny_recipe(tmp_path)
    with_tensors(lambda tensors: tensors[NORM].fill_(float("nan")))(tmp_path / "base")
    with pytest.raises(QliteError, match="values that are not finite"):
        run(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "test.jsonl", "train.jsonl"]


# What lies outside of the folder is never opened


@contextlib.contextmanager
def opened_below(folder: Path) -> Iterator[Callable[[], int]]:
    """Give a function that returns how often the files in ``folder`` were opened by then, in whatever language: the kernel counts."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    assert handle >= 0
    try:
        for path in [folder, *folder.rglob("*")]:
            assert libc.inotify_add_watch(handle, os.fsencode(path), 0x20) >= 0  # IN_OPEN

        def count() -> int:
            try:
                return len(os.read(handle, 2**16))
            except BlockingIOError:
                return 0

        yield count
    finally:
        os.close(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_nothing_outside_of_the_folder_is_ever_opened(good, tmp_path, record_property):
    # Beside those that are refused, what transformers would follow on the way to a tokenizer that is all right.
    followed = {
        "a vocabulary elsewhere": edited(SETTINGS, vocab_file="../outside/tokenizer.json", tokenizer_file="../outside/tokenizer.json"),
        "merges elsewhere": edited(SETTINGS, merges_file="OUTSIDE/merges.txt"),
        "GPT-2's files elsewhere": all_of(
            edited(SETTINGS, tokenizer_class="GPT2Tokenizer", merges_file="OUTSIDE/merges.txt", vocab_file="OUTSIDE/vocab.json"),
            without(TOKENIZER),
        ),
        "a template elsewhere": edited(SETTINGS, chat_template_file="OUTSIDE/chat_template.jinja"),
        "a name elsewhere": edited(CONFIG, _name_or_path="OUTSIDE"),
    }
    opens = 0
    for number, (name, spoil) in enumerate([*FOLDERS.items(), *followed.items()]):
        spoil = spoil[0] if isinstance(spoil, tuple) else spoil
        folder = tmp_path / str(number)
        folder.mkdir()
        read_it = given(good, spoil, folder)
        settings = folder / "base" / SETTINGS
        if name in followed:
            for path in (settings, folder / "base" / CONFIG):
                path.write_text(path.read_text(encoding="utf-8").replace("OUTSIDE", str(folder / "outside")), encoding="utf-8")
        with opened_below(folder / "outside") as count:
            with contextlib.suppress(QliteError):
                read_it()
            assert count() == 0, name
            (folder / "outside" / CONFIG).read_bytes()
            assert count() > 0  # the trap works
        opens += 1
    assert opens == len(FOLDERS) + len(followed) == 140 + 5
    record_property("figure", f"opens outside of a model folder: 0 with {opens} folders")
