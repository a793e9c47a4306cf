"""GGUF adapters: what llama.cpp adds to its base, by plain arithmetic on the file, is what was trained; Ollama's Modelfile beside it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from qlite.data.template import TEMPLATES
from qlite.errors import ExportError, RunError
from qlite.export import main
from qlite.files import is_whole, new_folder
from qlite.formats.gguf_lora import write_adapter_gguf
from qlite.formats.go_template import GoTemplate
from qlite.formats.modelfile import modelfile
from qlite.methods.base import adapted_linears
from qlite.methods.lora import LoRA
from qlite.model.load import LoadedBase
from tests.formats.test_gguf_out import folder_of, loaded, written
from tests.formats.test_gguf_out import read as checkpoint_of
from tests.marks import slow
from tests.model.test_gguf import SIZES, byte_vocabulary, logits, rebuilt, tiny_model, write_gguf
from tests.tiny_run import run, tiny_recipe


def adapter_of(tmp: Path, base: LoadedBase, alpha: float) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Write the adapter into ``tmp``/lora; return the file's metadata and tensors."""
    with new_folder(tmp / "lora") as folder:
        write_adapter_gguf(folder / "a.gguf", base, alpha, "tiny", lambda *_: None)
    reader = gguf.GGUFReader(tmp / "lora" / "a.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}


def put_on(base: Path, metadata: dict[str, object], adapter: dict[str, gguf.ReaderTensor]) -> dict[str, np.ndarray]:
    """Return the tensors of the GGUF file ``base`` with what llama.cpp adds: alpha / rank * B A, the rank that of each B."""
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(base).tensors}
    for name in [name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")]:
        A, B = adapter[f"{name}.lora_a"].data, adapter[f"{name}.lora_b"].data
        assert adapter[f"{name}.lora_a"].tensor_type == adapter[f"{name}.lora_b"].tensor_type == Kind.F32
        tensors[name] = tensors[name] + metadata["adapter.lora.alpha"] / B.shape[1] * (B @ A)
    return tensors


@pytest.mark.parametrize("name", ["llama", *map(slow, ("qwen2", "gemma", "phi3"))])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, alpha=10.0),
        LoRA(rank=4, alpha=8.0, rank_per_target={"o_proj": 2, "model.layers.0.*": 3}),
        LoRA(rank=4, alpha=16.0, rslora=True, rank_per_target={"o_proj": 2}),
        LoRA(rank=4, alpha=8.0, alpha_per_target={"o_proj": 2.0, "model.layers.0.*": 4.0}),
    ],
    ids=["plain", "ranks", "rslora", "alphas"],
)
def test_base_and_adapter_in_llama_cpps_arithmetic_are_the_merged_file(name, method, tmp_path):
    base = loaded(folder_of(tmp_path, name), method)
    metadata, adapter = adapter_of(tmp_path, base, method.alpha)
    assert len(adapter) == 2 * len(list(adapted_linears(base.model)))
    plain = written(tmp_path / "plain", loaded(tmp_path / "base", None))
    ours = put_on(plain, metadata, adapter)
    merged = {tensor.name: tensor.data for tensor in gguf.GGUFReader(written(tmp_path, base)).tensors}
    assert set(ours) == set(merged)
    for tensor, values in merged.items():
        np.testing.assert_allclose(ours[tensor], values, rtol=1e-5, atol=1e-6, err_msg=tensor)
    changed = [tensor for tensor, values in merged.items() if not np.array_equal(values, put_on(plain, metadata, {})[tensor])]
    assert len(changed) == len(adapter) // 2


def test_the_metadata_says_what_the_adapter_is(tmp_path):
    metadata, adapter = adapter_of(tmp_path, loaded(folder_of(tmp_path, "llama"), LoRA(rank=4, alpha=10.0, targets=["q_proj"])), 10.0)
    assert {key: value for key, value in metadata.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "tiny",
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "adapter.type": "lora",
        "adapter.lora.alpha": 10.0,
    }
    assert {name: tuple(tensor.data.shape) for name, tensor in adapter.items()} == {
        f"blk.{layer}.attn_q.weight.lora_{part}": shape for layer in range(2) for part, shape in (("a", (4, 64)), ("b", (64, 4)))
    }


def test_an_adapted_head_is_written_where_the_base_has_one_and_refused_where_it_is_the_embedding(tmp_path):
    method = LoRA(rank=4, alpha=4.0, targets=["lm_head", "q_proj"])
    _, adapter = adapter_of(tmp_path, loaded(folder_of(tmp_path, "llama"), method), 4.0)
    assert "output.weight.lora_b" in adapter
    tied = loaded(folder_of(tmp_path / "tied", "qwen2"), method)
    with pytest.raises(ExportError, match=r"lm_head is the embedding's own tensor .* use --gguf f16"):
        adapter_of(tmp_path / "tied", tied, 4.0)
    assert not (tmp_path / "tied" / "lora").exists()
    # Merged, the head has a tensor of its own.
    merged = checkpoint_of(written(tmp_path / "tied", tied))
    assert not merged.config().tie_word_embeddings
    torch.testing.assert_close(logits(rebuilt(merged)), logits(tied.model), rtol=1e-5, atol=1e-4)


def test_dora_is_refused_by_name(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"), LoRA(rank=4, alpha=4.0, dora=True, targets=["v_proj"]))
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn\.v_proj: .* no place for DoRA's magnitudes; use --gguf f16"):
        adapter_of(tmp_path, base, 4.0)


def test_a_layer_that_was_trained_whole_is_refused_by_name(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"), LoRA(rank=4, alpha=4.0, modules_to_save=("lm_head",)))
    with pytest.raises(ExportError, match=r"lm_head is trained itself, and llama.cpp's adapters only add to linears; use --gguf f16"):
        adapter_of(tmp_path, base, 4.0)
    assert not (tmp_path / "lora").exists()


def test_an_adapter_without_linears_is_refused(tmp_path):
    with pytest.raises(ExportError, match="adapts no linear layer"):
        adapter_of(tmp_path, loaded(folder_of(tmp_path, "llama"), None), 4.0)


# Ollama


def test_the_modelfile_says_where_when_to_stop_and_the_system_message():
    assert modelfile(
        ["FROM ./m.gguf"], GoTemplate("{{ .Prompt }}", ("it differs",)), ["</s>", '<"end">'], "Be brief.\nAlways."
    ).splitlines() == [
        "FROM ./m.gguf",
        "# Beware: it differs.",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<\\"end\\">"',
        'SYSTEM """Be brief.',
        'Always."""',
    ]
    text = modelfile(["FROM ./m.gguf"], None, [], 'a """ b')
    assert 'TEMPLATE "' not in text
    assert "SYSTEM" not in text
    assert all(line.startswith("#") for line in text.splitlines()[1:])


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run on a tiny GGUF base, trained with ChatML."""
    tmp = tmp_path_factory.mktemp("run")
    more = {"tokenizer.ggml.eot_token_id": 258}
    write_gguf(tmp / "base.gguf", "llama", tiny_model("llama", {"max_position_embeddings": 256}), metadata=more)
    run(tiny_recipe(tmp, base={"model": str(tmp / "base.gguf")}, data={"template": "plain"}))
    return tmp / "run"


def test_the_command_writes_one_file_and_a_modelfile(finished, capsys):
    main(["--gguf", "Q8_0", str(finished), "--device", "cpu"])
    out = finished / "gguf-q8_0"
    assert is_whole(out)
    assert set(json.loads((out / "manifest.json").read_text())) == {"run-q8_0.gguf", "Modelfile", "audit.json", "README.md"}
    assert "run-q8_0.gguf" in capsys.readouterr().out
    said = {key: field.contents() for key, field in gguf.GGUFReader(out / "run-q8_0.gguf").fields.items()}
    assert (said["general.name"], said["general.file_type"], said["llama.context_length"]) == ("run", 7, 256)
    assert said["tokenizer.chat_template"] == TEMPLATES["plain"]
    assert said["tokenizer.ggml.tokens"] == byte_vocabulary()[0]
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./run-q8_0.gguf"
    assert 'PARAMETER stop "</s>"' in lines
    with pytest.raises(RunError, match="exists already"):
        main(["--gguf", "q8_0", str(finished), "--device", "cpu"])


def test_the_command_writes_the_adapter_for_its_base(finished):
    main(["--gguf-adapter", str(finished), "--device", "cpu"])
    out = finished / "gguf-adapter"
    assert set(json.loads((out / "manifest.json").read_text())) == {"run-lora.gguf", "Modelfile", "README.md"}
    assert (out / "Modelfile").read_text().startswith(f"FROM {finished.parent / 'base.gguf'}\nADAPTER ./run-lora.gguf\n")
    tensors = gguf.GGUFReader(out / "run-lora.gguf").tensors
    assert len(tensors) == SIZES["num_hidden_layers"] * 7 * 2
    assert any(tensor.data.any() for tensor in tensors if tensor.name.endswith("lora_b"))
