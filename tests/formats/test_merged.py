"""Merged folders: what is in them by plain arithmetic, how they are cut into files, and what is refused without a trace."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlite.errors import AdapterError, ExportError, MachineError, NotMergeable, QliteError
from qlite.files import is_whole
from qlite.formats import merged
from qlite.formats.merged import INDEX, write_merged
from qlite.formats.peft import adapter_tensors
from qlite.methods.base import AdaptedLinear, adapt_linears, adapted_linears, trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.load import Base, LoadedBase
from tests.families import FAMILIES, VOCAB, Family, saved_folder
from tools.merge import main

LLAMA, METHOD = FAMILIES["llama"], LoRA(rank=4, alpha=10.0)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders that must not be changed."""
    tmp = tmp_path_factory.mktemp("families")
    twelve_layers = replace(LLAMA, options={"num_hidden_layers": 12})
    return {name: saved_folder(tmp, FAMILIES[name]) for name in ("llama", "qwen2", "gpt_neox")} | {"deep": saved_folder(tmp, twelve_layers)}


def adapted(folder: Path, method: LoRA | None = METHOD, **base: object) -> LoadedBase:
    """Return the model in ``folder`` with ``method`` attached and its adapter drawn at random."""
    loaded = Base(**({"model": str(folder), "bits": 16, "dtype": "float32"} | base)).load(torch.device("cpu"), quiet)
    if method is not None:
        method.attach(loaded.model)
    randomise(loaded.model)
    return loaded


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in trainable_tensors(model).items():
            drawn = torch.rand(p.shape, generator=generator)
            p.copy_(p * (0.5 + drawn) if "magnitude" in name else (drawn - 0.5) * 0.5)


def quiet(phase: str, done: int, total: int) -> None:
    """Show no progress."""


def write(folder: Path, loaded: LoadedBase, dtype: torch.dtype = torch.float32, **options: object) -> dict[str, Tensor]:
    """Write the merged model; return all its tensors by name."""
    write_merged(folder, loaded.model, loaded.tokenizer, loaded.generation_config, dtype, options.pop("progress", quiet), **options)
    return tensors_in(folder)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    everything = {name: t for file in files for name, t in file.items()}
    assert len(everything) == sum(len(file) for file in files)
    return everything


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids).logits


# What the weights are


def dequantised(weight: Tensor, base: dict) -> Tensor:
    """Return what a layer stored with ``base``'s options multiplies by, by bitsandbytes' own whole functions."""
    if base["bits"] == 16:
        return weight.double()
    if base["bits"] == 8:
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        return codes.double() * scale.double()[:, None] / 127
    options = {"blocksize": base.get("block_size", 64), "quant_type": base.get("quant_type", "nf4")}
    # As one row: bitsandbytes 0.50 misreads rows on the CPU that end inside a block, as those of 96 columns do.
    packed, state = bnb.quantize_4bit(weight.float().reshape(1, -1), compress_statistics=base.get("double_quant", True), **options)
    return bnb.dequantize_4bit(packed, state).double().view_as(weight)


STORAGES = [
    {"bits": 4},
    {"bits": 4, "quant_type": "fp4"},
    {"bits": 4, "double_quant": False, "block_size": 128},
    {"bits": 8},
    {"bits": 16},
]


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, rslora=True, rank_per_target={"q_proj": 9}), replace(METHOD, dora=True)])
@pytest.mark.parametrize("base", STORAGES, ids=str)
def test_a_merged_weight_is_the_dequantised_one_plus_the_scaled_product(base, method, folders, tmp_path):
    loaded = adapted(folders["llama"], method, **base)
    adapter = {name.removeprefix("base_model.model."): t.detach().double() for name, t in adapter_tensors(loaded.model).items()}
    found, original = write(tmp_path / "out", loaded), load_file(folders["llama"] / "model.safetensors")
    assert found.keys() == original.keys()
    merged_count = 0
    for name, weight in original.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in adapter:
            assert torch.equal(found[name], weight)
            continue
        A, B = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        expected = dequantised(weight, base) + B @ A * (10.0 / (len(A) ** 0.5 if method.rslora else len(A)))
        if method.dora:
            expected *= (adapter[f"{layer}.lora_magnitude_vector"] / expected.norm(dim=1))[:, None]
        assert torch.allclose(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        merged_count += 1
    assert merged_count == 2 * 7


def test_a_trained_weight_of_the_base_itself_is_written_as_trained(folders, tmp_path):
    loaded = adapted(folders["llama"])
    loaded.model.model.norm.weight.requires_grad_(True).data.fill_(1.25)
    assert torch.equal(write(tmp_path / "out", loaded)["model.norm.weight"], torch.full((64,), 1.25))


@pytest.mark.parametrize(
    ("name", "head", "embedding"), [("qwen2", "lm_head", "model.embed_tokens"), ("neox", "embed_out", "gpt_neox.embed_in")]
)
def test_an_adapted_head_that_was_tied_is_written_apart_from_the_embedding(name, head, embedding, folders, tmp_path):
    tied_neox = replace(FAMILIES["gpt_neox"], options=FAMILIES["gpt_neox"].options | {"tie_word_embeddings": True})
    folder = folders["qwen2"] if name == "qwen2" else saved_folder(tmp_path, tied_neox)
    loaded = adapted(folder, replace(METHOD, targets=("lm_head",)))
    found, original = write(tmp_path / "out", loaded), load_file(folder / "model.safetensors")
    (_, layer), *others = adapted_linears(loaded.model)
    assert others == []
    assert found.keys() == original.keys() | {f"{head}.weight"}
    assert f"{head}.weight" not in original
    assert torch.equal(found[f"{embedding}.weight"], original[f"{embedding}.weight"].float())
    expected = layer.merged_weight(original[f"{embedding}.weight"].float())
    assert torch.equal(found[f"{head}.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    reread, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    expected_logits = logits_of(loaded.model)
    assert torch.allclose(logits_of(reread), expected_logits, rtol=0, atol=1e-5 * expected_logits.abs().max())


def test_a_tied_model_whose_blocks_alone_are_adapted_stays_tied(folders, tmp_path):
    found = write(tmp_path / "out", adapted(folders["qwen2"]))
    assert "lm_head.weight" not in found
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


# Files


def test_small_shards_hold_the_same_tensors_as_one_file_and_load_in_transformers(folders, tmp_path):
    loaded = adapted(folders["deep"], bits=4)
    limit = 500_000
    shards = write(tmp_path / "shards", loaded, shard_bytes=limit)
    whole = write(tmp_path / "whole", loaded)
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert [path.name for path in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "whole" / INDEX).exists()
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert index["weight_map"] == {name: file for file in files for name in load_file(tmp_path / "shards" / file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(sum(t.nbytes for t in load_file(tmp_path / "shards" / file).values()) <= limit for file in files)
    reread, info = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    expected = logits_of(loaded.model)
    assert torch.allclose(logits_of(reread), expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(folders, tmp_path):
    loaded = adapted(folders["llama"])
    found = write(tmp_path / "out", loaded, shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(found) == 2 * 9 + 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_tensors_and_the_config_have_the_dtype_asked_for(dtype, folders, tmp_path):
    found = write(tmp_path / "out", adapted(folders["qwen2"], dtype="bfloat16"), dtype)
    assert {t.dtype for t in found.values()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert "quantization_config" not in config


def test_the_folder_has_a_manifest_of_all_its_files(folders, tmp_path):
    write(tmp_path / "out", adapted(folders["llama"]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert is_whole(tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "manifest.json").read_text())) == names - {"manifest.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names


def test_progress_counts_every_byte_once(folders, tmp_path):
    seen = []
    found = write(tmp_path / "out", adapted(folders["qwen2"]), progress=lambda phase, done, total: seen.append((phase, done, total)))
    total = sum(t.nbytes for t in found.values())
    assert len(seen) == len(found)
    assert seen[-1] == ("merge", total, total)
    assert sorted(seen) == seen
    assert {each[2] for each in seen} == {total}


def test_writing_changes_nothing_in_the_model(folders, tmp_path):
    loaded = adapted(folders["llama"], bits=4)
    before = {name: t.clone() for name, t in loaded.model.state_dict().items()}
    config = loaded.model.config.to_dict()
    write(tmp_path / "out", loaded, torch.float16)
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert loaded.model.config.to_dict() == config


def test_a_second_export_replaces_the_first_whole(folders, tmp_path):
    write(tmp_path / "out", adapted(folders["deep"]), shard_bytes=500_000)
    assert len(list((tmp_path / "out").glob("*.safetensors*"))) > 2
    write(tmp_path / "out", adapted(folders["llama"]))
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert is_whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_somebody_put_a_file_into_is_not_replaced(folders, tmp_path):
    write(tmp_path / "out", adapted(folders["llama"]))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(MachineError, match="did not write there"):
        write(tmp_path / "out", adapted(folders["llama"]))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the context that still exist; ``peak`` is their largest sum."""

    def __init__(self, known: Iterator[Tensor]):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known and t.device.type != "meta":
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


@contextmanager
def live_bytes(model: nn.Module) -> Iterator[LiveBytes]:
    with LiveBytes(t for t in [*model.parameters(), *model.buffers()]) as counted:
        yield counted


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_more_than_one_tensor_at_work_is_in_memory(dtype, bits, folders, tmp_path):
    loaded = adapted(folders["deep"], bits=bits)
    with live_bytes(loaded.model) as counted:
        write_merged(tmp_path / "out", loaded.model, loaded.tokenizer, None, dtype, quiet)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    largest = 4 * max(layer.base.in_features * layer.base.out_features for _, layer in adapted_linears(loaded.model))
    assert 12 * largest < file.stat().st_size
    assert largest < counted.peak <= 4 * largest  # dense, the sum, and what is rounded


def test_the_count_of_live_bytes_sees_them_all(folders):
    """The test above would fail if all tensors were made at once."""
    loaded = adapted(folders["deep"])
    with live_bytes(loaded.model) as counted:
        kept = [part for tensor in merged.merged_tensors(loaded.model) for part in merged.cast(tensor, torch.float16)]
    assert counted.peak >= sum(t.nbytes for t in kept) > 4 * 150_000


# Refused


def spoilt(folders: dict[str, Path], tmp: Path, name: str, value: float, count: int) -> Path:
    """Return a copy of the Llama folder whose tensor ``name`` has ``count`` times ``value``."""
    folder = saved_folder(tmp, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[:count] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_values_too_large_for_fp16_are_counted_and_refused_and_nothing_is_left(name, folders, tmp_path):
    loaded = adapted(spoilt(folders, tmp_path, name, -1e5, 3))
    out = tmp_path / "exports" / "out"
    with pytest.raises(ExportError) as caught:
        write(out, loaded, torch.float16, shard_bytes=20_000)  # in shards, so that some are written before
    message = str(caught.value)
    assert message.startswith(f"{name}: 3 values up to 1e+05 do not fit float16 (largest 6.55e+04)")
    assert "--dtype bf16" in message
    assert list(out.parent.iterdir()) == []
    assert torch.isfinite(write(out, loaded, torch.bfloat16)[name]).all()


@pytest.mark.parametrize(("value", "expected"), [(65504.0, 65504.0), (65519.0, 65504.0), (1e-9, 0.0)])
def test_values_that_round_into_fp16_are_written_rounded(value, expected, folders, tmp_path):
    loaded = adapted(spoilt(folders, tmp_path, "model.norm.weight", value, 1))
    assert write(tmp_path / "out", loaded, torch.float16)["model.norm.weight"][0].item() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_are_counted_and_refused_in_every_dtype(value, dtype, folders, tmp_path):
    loaded = adapted(folders["llama"])
    layer = dict(adapted_linears(loaded.model))[DOWN.removesuffix(".weight")]
    layer.lora_B.weight.data[5] = value
    out = tmp_path / "exports" / "out"
    with pytest.raises(ExportError, match=rf"^{DOWN}: 96 values are not finite"):  # one row of [64, 96]
        write(out, loaded, dtype)
    assert list(out.parent.iterdir()) == []


def test_a_refused_export_leaves_the_older_one_as_it_was(folders, tmp_path):
    out = tmp_path / "exports" / "out"
    before = write(out, adapted(folders["llama"]))
    loaded = adapted(spoilt(folders, tmp_path, DOWN, 1e5, 1))
    with pytest.raises(ExportError):
        write(out, loaded, torch.float16)
    assert is_whole(out)
    assert {name: t.sum() for name, t in tensors_in(out).items()} == {name: t.sum() for name, t in before.items()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


class Gate(AdaptedLinear):
    """No linear map, so it has no merged weight."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.gate = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.gate.tanh()


def test_an_adapter_that_is_no_linear_map_is_refused_and_nothing_is_left(folders, tmp_path):
    loaded = adapted(folders["llama"], None)
    adapt_linears(loaded.model, ("down_proj",), lambda name, base: Gate(base))
    out = tmp_path / "exports" / "out"
    with pytest.raises(NotMergeable, match="Gate is not one linear map$"):
        write(out, loaded, shard_bytes=20_000)
    assert list(out.parent.iterdir()) == []


def test_something_trained_that_is_no_weight_of_the_base_is_refused_by_name(folders, tmp_path):
    loaded = adapted(folders["llama"])
    loaded.model.model.layers[0].register_parameter("steering", nn.Parameter(torch.zeros(64)))
    with pytest.raises(NotMergeable, match=r"^model\.layers\.0\.steering is no weight of the base model"):
        write(tmp_path / "out", loaded)
    assert list(tmp_path.iterdir()) == []


# tools/merge.py


def made_by_peft(base: Path, folder: Path, **options: object) -> nn.Module:
    """Return PEFT's model in float32 with a drawn adapter, which is written into ``folder``."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


PEFT_OPTIONS = {
    "plain": {},
    "rank-pattern-rslora": {"use_rslora": True, "rank_pattern": {r".*\.1\..*(_proj|dense)": 7}},
    "dora": {"use_dora": True},
}


def assert_merges_as_peft(base: Path, tmp: Path, options: dict) -> None:
    expected = made_by_peft(base, tmp / "adapter", **options).merge_and_unload().state_dict()
    main([str(tmp / "adapter"), "--base", str(base), "--out", str(tmp / "out"), "--dtype", "fp32"])
    found = tensors_in(tmp / "out")
    in_memory = AutoModelForCausalLM.from_pretrained(tmp / "out", dtype=torch.float32).state_dict()  # under transformers' own names
    assert in_memory.keys() == expected.keys()
    assert len(found) >= 2 * 9 + 2
    assert all(torch.allclose(in_memory[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected)


@pytest.mark.parametrize("kind", PEFT_OPTIONS)
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_the_merge_tool_merges_as_peft_over_a_bfloat16_base(name, kind, folders, tmp_path):
    assert_merges_as_peft(folders[name], tmp_path, PEFT_OPTIONS[kind])


@pytest.mark.parametrize("kind", PEFT_OPTIONS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_merge_tool_merges_as_peft_over_a_base_with_more_digits_than_bfloat16(stored, kind, tmp_path):
    base = saved_folder(tmp_path, Family("llama", stored=stored))
    assert_merges_as_peft(base, tmp_path, PEFT_OPTIONS[kind])


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [9, 5]}, {"alpha_pattern": {"q_proj": 3}}],
    ids=lambda options: next(iter(options)),
)
def test_the_merge_tool_merges_what_stands_beside_the_low_rank_pairs(options, folders, tmp_path):
    assert_merges_as_peft(folders["qwen2"], tmp_path, options)


def test_the_merge_tool_writes_the_vocabulary_and_tokenizer_that_grew(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.add_tokens([f"<new {number}>" for number in range(VOCAB)])
    grown = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    grown.resize_token_embeddings(len(tokenizer))
    wrapped = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    main([str(tmp_path / "adapter"), "--base", str(folders["llama"]), "--out", str(tmp_path / "out"), "--dtype", "fp32"])
    merged, again = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[*again("<new 3> one <new 100>").input_ids]])
    assert ids.max() >= VOCAB
    assert torch.allclose(merged(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits, atol=1e-4)


def test_the_merge_tool_refuses_a_tokenizer_that_grew_without_the_embedding(folders, tmp_path):
    made_by_peft(folders["llama"], tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.add_tokens([f"<new {number}>" for number in range(VOCAB)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"its tokenizer has a token of id \d+, and the embedding with the adapter on it 128 rows"):
        main([str(tmp_path / "adapter"), "--base", str(folders["llama"]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_merge_tool_merges_over_the_dequantised_base_with_bits_4(folders, tmp_path):
    made_by_peft(folders["qwen2"], tmp_path / "adapter")
    main([str(tmp_path / "adapter"), "--base", str(folders["qwen2"]), "--out", str(tmp_path / "out"), "--dtype", "fp32", "--bits", "4"])
    adapter, weight = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), load_file(folders["qwen2"] / "model.safetensors")[DOWN]
    A, B = (adapter[f"base_model.model.{DOWN.removesuffix('weight')}lora_{side}.weight"].double() for side in "AB")
    expected = dequantised(weight, {"bits": 4}) + B @ A * 10 / 4
    assert torch.allclose(tensors_in(tmp_path / "out")[DOWN].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_merge_tool_writes_fp16_by_default(folders, tmp_path):
    made_by_peft(folders["qwen2"], tmp_path / "adapter")
    main([str(tmp_path / "adapter"), "--base", str(folders["qwen2"]), "--out", str(tmp_path / "out")])
    assert {t.dtype for t in tensors_in(tmp_path / "out").values()} == {torch.float16}


def test_the_merge_tool_leaves_a_folder_alone_that_exists(folders, tmp_path):
    made_by_peft(folders["qwen2"], tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(QliteError, match=r"mine\" exists already"):
        main([str(tmp_path / "adapter"), "--base", str(folders["qwen2"]), "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_merge_tool_refuses_an_adapter_of_another_base_as_such(folders, tmp_path):
    made_by_peft(folders["deep"], tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"adapter: .*model\.layers\.\d+\.self_attn\.q_proj"):
        main([str(tmp_path / "adapter"), "--base", str(folders["llama"]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
