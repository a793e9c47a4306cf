"""Embedding and head in 8 or 4 bit, over all families: what they compute, what is tied, what is refused, what is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlite import evaluate, export, generate
from qlite.errors import ModelError, RecipeError
from qlite.formats.merged import write_merged
from qlite.hashes import sha256
from qlite.methods.base import adapted_linears, adapters_off
from qlite.methods.lora import LoRA
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.head import hidden_states, logits_head
from qlite.model.load import Base
from qlite.model.vocabulary import token_embeddings
from qlite.quant import linear
from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import QuantLinear
from qlite.recipe.schema import Recipe
from qlite.training.loss import chunked_cross_entropy
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from tests.families import FAMILIES, Family, new_tokenizer, saved_folder
from tests.model.test_families import CPU, as_transformers_loads, loaded, logits_of, quiet, token_ids
from tests.model.test_gguf import tiny_model, write_gguf
from tests.quant.test_linear import LargestTensor
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE

# Rows of 32 values in the embeddings of these two.
BLOCKS = {"opt": 32, "gemma4": 32}
TIED = sorted(name for name, family in FAMILIES.items() if family.config().tie_word_embeddings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, family) for name, family in FAMILIES.items()}


def packed_model(folder: Path, bits: int, name: str = "", **base: object) -> nn.Module:
    """Return the model with 16-bit blocks between an embedding and a head of ``bits``, in float32."""
    keys = {"bits": 16, "embedding_bits": bits, "head_bits": bits, "dtype": "float32", "block_size": BLOCKS.get(name, 64)} | base
    return Base(model=str(folder), **keys).load(CPU, quiet).model


def with_dense_vocabulary(folder: Path, packed: nn.Module) -> nn.Module:
    """Return the 16-bit model with the dense values of ``packed``'s embeddings and head in place of its own."""
    plain = loaded(folder, 16).model
    for name, module in packed.named_modules():
        if isinstance(module, QuantEmbedding | QuantLinear):
            plain.get_submodule(name).weight.data = matrix_of(module).dense(torch.float32)
    return plain


def tables(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantEmbedding)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_computes_what_it_would_with_the_dense_values(name, bits, folders):
    model = packed_model(folders[name], bits, name)
    expected = logits_of(with_dense_vocabulary(folders[name], model))
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert len(tables(model)) == (2 if name == "gemma4" else 1)
    assert torch.equal(logits_of(model), expected)
    with torch.no_grad():
        assert torch.equal(logits_head(model)(hidden_states(model, token_ids())), expected)
    assert (expected - logits_of(loaded(folders[name], 16).model)).abs().max() > 1e-4  # it is not the model unquantised


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TIED)
def test_tied_they_are_one_set_of_tensors_and_untied_two(name, bits, folders):
    def places(module: nn.Module) -> set[int]:
        return {t.data_ptr() for t in matrix_of(module).packed_tensors().values()}

    model = packed_model(folders[name], bits, name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert places(embedding) == places(head)
    untied = packed_model(folders["llama"], bits)
    assert places(untied.get_input_embeddings()).isdisjoint(places(untied.get_output_embeddings()))


def test_nine_of_the_families_are_tied():
    assert len(TIED) == 9


@pytest.mark.parametrize(("embedding", "head"), [(8, 16), (16, 4), (4, 8)])
def test_a_tied_model_is_refused_two_storages_before_a_weight_is_read(embedding, head, folders, monkeypatch):
    monkeypatch.setattr("qlite.model.load.fill", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=rf'base.embedding_bits = {embedding} and base.head_bits = {head}: this "qwen2" has one tensor'):
        Base(model=str(folders["qwen2"]), embedding_bits=embedding, head_bits=head).load(CPU, quiet)


@pytest.mark.parametrize(("embedding", "head"), [(8, 16), (16, 4), (4, 8)])
def test_an_untied_model_takes_any_two_storages(embedding, head, folders):
    model = packed_model(folders["llama"], 16, embedding_bits=embedding, head_bits=head)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding) == (embedding < 16)
    assert isinstance(model.get_output_embeddings(), QuantLinear) == (head < 16)
    assert torch.equal(logits_of(model), logits_of(with_dense_vocabulary(folders["llama"], model)))


def test_rows_that_are_no_whole_number_of_blocks_are_refused_with_the_fix(folders):
    with pytest.raises(ModelError, match=r"has 64 values .*base.block_size = 128; set base.block_size = 64.* or base.embedding_bits = 8"):
        packed_model(folders["llama"], 4, block_size=128, head_bits=16)
    packed_model(folders["llama"], 8, head_bits=16)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both", "neither"])
def test_a_tied_model_loads_from_either_name(kept, folders, tmp_path):
    expected = logits_of(packed_model(folders["qwen2"], 4))
    folder = saved_folder(tmp_path, FAMILIES["qwen2"])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if kept in (name, "both"):
            tensors[name] = table.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    if kept == "neither":
        with pytest.raises(ModelError, match=r"missing tensor lm_head.weight; missing tensor model.embed_tokens.weight"):
            packed_model(folder, 4)
        return
    model = packed_model(folder, 4)
    assert torch.equal(logits_of(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_different_tensors_stay_two_though_the_config_ties_them(tmp_path):
    folder = saved_folder(tmp_path, FAMILIES["qwen2"])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}, file, metadata={"format": "pt"})
    model = packed_model(folder, 8)
    head, embedding = (matrix_of(module).dense(torch.float32) for module in (model.lm_head, model.model.embed_tokens))
    assert torch.equal(head, embedding.flip(0))


# Written, adapted, trained


def merged_folder(tmp_path: Path, model: nn.Module) -> Path:
    write_merged(tmp_path / "out", model, new_tokenizer(), None, torch.float32, quiet)
    return tmp_path / "out"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gemma4", "phi", "gpt_neox", "opt"])
def test_the_merged_folder_is_that_of_the_dense_values(name, bits, folders, tmp_path):
    model = packed_model(folders[name], bits, name)
    dense = with_dense_vocabulary(folders[name], model)
    for each in (model, dense):
        torch.manual_seed(1)
        LoRA(rank=4).attach(each)
        for _, adapted in adapted_linears(each):
            nn.init.normal_(adapted.lora_B.weight, std=0.1)
    expected = logits_of(model)
    assert torch.equal(expected, logits_of(dense))
    ours, theirs = (load_file(merged_folder(tmp_path / str(i), each) / "model.safetensors") for i, each in enumerate((model, dense)))
    assert ours.keys() == theirs.keys() == load_file(folders[name] / "model.safetensors").keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
    again, info = as_transformers_loads(tmp_path / "0" / "out", model)
    assert not any(info.values())
    assert again.config.tie_word_embeddings == (name in TIED)
    assert (logits_of(again) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_packed_head_can_be_adapted_switched_off_and_merged(name, dora, folders, tmp_path):
    model = packed_model(folders[name], 4)
    before = logits_of(model)
    LoRA(rank=4, targets=("lm_head",), dora=dora).attach(model)
    ((found, head),) = adapted_linears(model)
    assert found == "lm_head"
    nn.init.normal_(head.lora_B.weight, std=0.1)
    adapted = logits_of(model)
    assert (adapted - before).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits_of(model), before)
    folder = merged_folder(tmp_path, model)
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], model.model.embed_tokens.table.dense(torch.float32))
    again, _ = as_transformers_loads(folder, model)
    assert not again.config.tie_word_embeddings  # with a tensor of its own it is no longer tied
    assert (logits_of(again) - adapted).abs().max() <= 1e-4 * adapted.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_still_means_the_linears_of_the_blocks(name, folders):
    packed, plain = packed_model(folders[name], 8, name), loaded(folders[name], 16).model
    for model in (packed, plain):
        LoRA(rank=2).attach(model)
    assert [found for found, _ in adapted_linears(packed)] == [found for found, _ in adapted_linears(plain)]


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head",)])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_step_holds_the_table_dense(bits, targets, tmp_path, monkeypatch):
    vocabulary, wide = 4096, 64
    folder = saved_folder(tmp_path, Family("llama", {"vocab_size": vocabulary, "num_hidden_layers": 1}))
    monkeypatch.setattr(linear, "SLICE_BYTES", vocabulary * wide * 4 // 8)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    model = packed_model(folder, bits)
    LoRA(rank=2, targets=targets).attach(model)
    checkpoint_blocks(model)
    head, ids = logits_head(model), token_ids()
    with LargestTensor() as seen:
        hidden = hidden_states(model.train(), ids)
        predicts = torch.arange(ids.shape[1] - 1)
        # Which writes over what the head returns.
        chunked_cross_entropy(head, hidden, predicts, ids[0, 1:], 1.0, chunk=3).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert linear.SLICE_BYTES <= seen.bytes < vocabulary * wide * 4 // 4


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_with_a_bias_trains(bits, sliced, tmp_path, monkeypatch):
    if sliced:
        monkeypatch.setattr(linear, "SLICE_BYTES", 16 * 64 * 4)
        monkeypatch.setattr(linear, "SLICED_FROM", 1)
    model = packed_model(saved_folder(tmp_path, Family("phi", {"partial_rotary_factor": 0.5})), bits)
    assert model.lm_head.bias is not None
    LoRA(rank=2).attach(model)
    ids = token_ids()
    hidden = hidden_states(model, ids)
    chunked_cross_entropy(logits_head(model), hidden, torch.arange(ids.shape[1] - 1), ids[0, 1:], 1.0, chunk=3).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_two_keys_reach_the_embeddings_by_name(folders):
    names = {name: [found for found, _ in token_embeddings(loaded(folders[name], 16).model)] for name in ("llama", "opt", "gemma4", "gptj")}
    assert names == {
        "llama": ["model.embed_tokens"],
        "opt": ["model.decoder.embed_tokens"],  # and not its embed_positions
        "gemma4": ["model.embed_tokens", "model.embed_tokens_per_layer"],
        "gptj": ["transformer.wte"],
    }


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3"])
def test_in_bfloat16_the_embedding_rounds_as_the_dense_one(name, folders):
    model = packed_model(folders[name], 8, dtype="bfloat16")
    plain = loaded(folders[name], 16, "bfloat16").model
    plain.get_input_embeddings().weight.data = model.get_input_embeddings().table.dense(torch.bfloat16)
    assert torch.equal(embedded(model, token_ids()), embedded(plain, token_ids()))


# GGUF files and whole runs


def test_a_gguf_file_without_an_output_matrix_is_tied(tmp_path):
    dense = tiny_model("qwen2")
    write_gguf(tmp_path / "tiny.gguf", "qwen2", dense)
    model = packed_model(tmp_path / "tiny.gguf", 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    values, own = model.lm_head.dense(torch.float32), dense.lm_head.weight
    assert (values - own).norm() < 0.1 * own.norm()


KEYS = {"embedding_bits": 4, "head_bits": 4}


@pytest.fixture(scope="module", params=["tied", "untied"])
def finished(request, tmp_path_factory) -> Path:
    """A finished run with embedding and head in 4 bit; the folder that holds it and its base."""
    folder = tmp_path_factory.mktemp(request.param)
    run(run_recipe(folder, request.param == "tied"))
    return folder


def run_recipe(folder: Path, is_tied: bool, **changes: dict) -> Recipe:
    recipe = tiny_recipe(folder, base=KEYS, **changes)
    tiny_llama(vocab_size=VOCAB_SIZE, tie_word_embeddings=is_tied).save_pretrained(folder / "base")
    return recipe


def test_a_run_stopped_and_gone_on_with_gives_the_same_bytes(finished, tmp_path):
    recipe = run_recipe(tmp_path, finished.name.startswith("tied"))
    run(recipe, stop_after=3)
    assert run(recipe).steps[0].step == 3
    adapters = [folder / "run" / "adapter" / "adapter_model.safetensors" for folder in (finished, tmp_path)]
    assert sha256(adapters[0]) == sha256(adapters[1])


def test_what_is_exported_answers_as_the_run(finished, tmp_path):
    export.main(["--merge", str(finished / "run"), "--dtype", "fp32", "--out", str(tmp_path / "merged")])
    opened = open_run(RunFolder(finished / "run"), "cpu", quiet)
    opened.attach()
    is_tied = finished.name.startswith("tied")
    assert (opened.base.model.lm_head.weight is opened.base.model.model.embed_tokens.weight) == is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) != is_tied
    merged, info = as_transformers_loads(tmp_path / "merged", opened.base.model, torch.bfloat16)
    assert not any(info.values())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        live, again = (model.eval()(ids).logits.float() for model in (opened.base.model, merged))
    assert (live - again).norm() < 0.02 * live.norm()  # bfloat16's rounding of merged weights


def test_the_verbs_measure_and_answer_over_such_a_base(finished, tmp_path, capsys):
    folder = str(finished / "run")
    evaluate.main([folder, "--device", "cpu", "--metrics", "loss", "--out", str(tmp_path / "out.json")])
    loss = json.loads((tmp_path / "out.json").read_text())["metrics"]["loss"]
    assert loss["adapter"] == pytest.approx(RunFolder(finished / "run").result["eval_loss"], rel=1e-2)  # batched otherwise, in bfloat16
    assert loss["base"] > loss["adapter"] + 0.1
    capsys.readouterr()
    generate.main([folder, "--device", "cpu", "--prompt", "abc", "--max-tokens", "4"])
    first = capsys.readouterr().out
    generate.main([folder, "--device", "cpu", "--prompt", "abc", "--max-tokens", "4"])
    assert capsys.readouterr().out == first != ""


@pytest.mark.parametrize("key", ["bits", "embedding_bits", "head_bits"])
def test_the_4_bit_formats_keys_are_of_use_to_any_of_the_three(key, tmp_path):
    sixteen = {"bits": 16, "embedding_bits": 16, "head_bits": 16, "block_size": 32}
    assert tiny_recipe(tmp_path, base=sixteen | {key: 4}).base.block_size == 32
    with pytest.raises(RecipeError, match="base.block_size = 32: only a 4-bit base has it"):
        tiny_recipe(tmp_path, base=sixteen | {key: 8})
