"""qlite.model.checkpoint against what save_pretrained wrote, whole and in shards."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlite.errors import ModelError
from qlite.model.checkpoint import SafetensorsCheckpoint, open_checkpoint
from qlite.model.source import ModelFiles

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
INDEX = "model.safetensors.index.json"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two folders that must not be changed, ``whole`` and ``shards``, of one bfloat16 model."""
    root = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(root / "whole")
    tiny_llama().save_pretrained(root / "shards", max_shard_size="12KB")
    return root


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of ``shards`` to spoil."""
    return Path(shutil.copytree(saved / "shards", tmp_path / "model"))


def opened(folder: Path) -> SafetensorsCheckpoint:
    return open_checkpoint(ModelFiles(folder, None, str(folder)))


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_index(folder: Path, tensor: str, shard: object) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {tensor: shard})


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_every_tensor_is_read_as_it_was_saved(kind, saved):
    checkpoint, expected = opened(saved / kind), tiny_llama().state_dict()
    assert set(checkpoint.order()) == set(expected)
    assert len(checkpoint.order()) == 3 * 9 + 3
    assert checkpoint.shapes() == {name: tuple(expected[name].shape) for name in checkpoint.order()}
    assert set(checkpoint.dtypes().values()) == {torch.bfloat16}
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)
    assert checkpoint.nbytes == 2 * sum(tensor.numel() for tensor in expected.values())


def test_the_order_reads_each_shard_once_and_from_front_to_back(saved):
    checkpoint = opened(saved / "shards")
    weight_map = json.loads((saved / "shards" / INDEX).read_text())["weight_map"]
    visited = list(dict.fromkeys(weight_map[name] for name in checkpoint.order()))
    assert len(visited) == len(set(weight_map.values())) > 3
    for shard in visited:
        header = (saved / "shards" / shard).read_bytes()
        length = int.from_bytes(header[:8], "little")
        table = json.loads(header[8 : 8 + length])
        starts = [table[name]["data_offsets"][0] for name in checkpoint.order() if weight_map[name] == shard]
        assert starts == sorted(starts)
        assert len(starts) == len(set(table) - {"__metadata__"})


def test_a_tensors_pages_leave_memory_with_it_and_the_file_is_never_written(tmp_path, saved):
    psutil = pytest.importorskip("psutil")
    shutil.copy(saved / "whole" / "config.json", tmp_path / "config.json")
    tensors = {f"layer.{number}": torch.full((16, 1024, 1024), number, dtype=torch.uint8) for number in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    checkpoint = opened(tmp_path)
    process = psutil.Process()
    before, peak = process.memory_info().rss, 0
    for number, name in enumerate(checkpoint.order()):
        tensor = checkpoint.read(name)
        assert int(tensor.max()) == number  # every page is read
        peak = max(peak, process.memory_info().rss)
    del tensor
    # Two tensors of 16 MiB may overlap in the loop; all six would be 96 MiB.
    assert peak - before < 48 * 2**20
    assert process.memory_info().rss - before < 16 * 2**20

    checkpoint.read("layer.1").zero_()
    assert int(checkpoint.read("layer.1").min()) == 1


def test_the_config_is_the_saved_one(saved):
    config = opened(saved / "shards").config()
    assert config.model_type == "llama"
    assert {key: getattr(config, key) for key in SIZES} == SIZES


def test_the_generation_config_is_read_where_there_is_one(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert opened(folder).generation_config() is None
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder)
    assert opened(folder).generation_config().eos_token_id == [2, 7]


def save_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


def test_the_tokenizer_comes_with_its_template(folder):
    save_tokenizer(folder)
    tokenizer = opened(folder).tokenizer()
    assert tokenizer("hello world").input_ids == [2, 3]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "world"}], return_dict=False) == [3]


def test_a_folder_without_a_tokenizer_says_which_files_to_add(folder):
    with pytest.raises(ModelError, match=r"no tokenizer that can be read .*tokenizer\.json and tokenizer_config\.json"):
        opened(folder).tokenizer()


def test_a_tokenizers_own_code_is_never_run(folder):
    save_tokenizer(folder)
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, tokenizer_class="Fast")
    assert opened(folder).tokenizer()("world").input_ids == [3]
    edit_json(folder / "tokenizer_config.json", auto_map=None)
    edit_json(folder / "config.json", auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]})
    assert opened(folder).tokenizer()("world").input_ids == [3]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="its own Python code, which qlite never runs"):
        opened(folder).tokenizer()


def test_a_models_own_code_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    with pytest.raises(ModelError, match=r'"evil"\) needs its own Python code, which qlite never runs'):
        opened(folder).config()
    # A model type that transformers knows is read by transformers' own class.
    edit_json(folder / "config.json", model_type="llama")
    assert type(opened(folder).config()) is LlamaConfig


def test_an_unknown_model_type_and_a_bad_config_are_refused(folder):
    edit_json(folder / "config.json", model_type="lama")
    with pytest.raises(ModelError, match='model_type "lama" is unknown'):
        opened(folder).config()
    edit_json(folder / "config.json", model_type="llama", hidden_size="wide")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        opened(folder).config()
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="must hold one JSON object"):
        opened(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_an_already_quantised_checkpoint_is_refused_with_the_way_out(method, folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f'already quantised .*"{method}".* name the 16-bit model'):
        opened(folder)


@pytest.mark.parametrize("name", ["../other/m.safetensors", "/etc/m.safetensors", "sub/m.safetensors", "..", "", "a\\b", "c:x", 7, None])
def test_an_index_entry_that_is_no_plain_file_name_is_refused(name, folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match=r"index\.json: weight_map\.model\.norm\.weight = .* not a plain file name"):
        opened(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ModelError, match=f"names {shard.name}, a link to .*outside the folder"):
        opened(folder)


def test_the_hub_caches_links_to_its_own_blobs_are_followed(saved, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((saved / "shards").iterdir())):
        shutil.copy(file, blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    assert len(opened(snapshot).order()) == 30
    # Another repository's blobs are outside.
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    shutil.copytree(blobs, tmp_path / "models--org--other" / "blobs")
    target = tmp_path / "models--org--other" / "blobs" / Path(os.readlink(shard)).name
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(ModelError, match="outside the folder"):
        opened(snapshot)


def test_a_missing_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"names {shard.name}, which is missing; the download may be incomplete"):
        opened(folder)


def test_a_tensor_that_only_the_index_knows_is_named(folder):
    edit_index(folder, "model.layers.9.mlp.up_proj.weight", sorted(folder.glob("*.safetensors"))[0].name)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.9\.mlp\.up_proj\.weight"):
        opened(folder)


def test_a_shard_cut_short_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{shard.name}: is damaged or cut short"):
        opened(folder)


def test_shards_without_an_index_are_refused_and_a_single_odd_name_is_not(folder, saved, tmp_path):
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=f"expected model.safetensors or {INDEX}, found model-00001"):
        opened(folder)
    shutil.copytree(saved / "whole", tmp_path / "odd")
    (tmp_path / "odd" / "model.safetensors").rename(tmp_path / "odd" / "weights.safetensors")
    assert len(opened(tmp_path / "odd").order()) == 30


def test_eight_bit_floats_are_refused(tmp_path, saved):
    shutil.copy(saved / "whole" / "config.json", tmp_path / "config.json")
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a\.weight is stored as F8_E4M3; give the 16-bit model"):
        opened(tmp_path)


def test_the_fingerprint_changes_with_a_config_or_shape_and_not_with_the_place(folder, saved):
    same = opened(saved / "shards").fingerprint()
    assert opened(folder).fingerprint() == same != opened(saved / "whole").fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    changed = opened(folder).fingerprint()
    shard = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in load_file(shard).items()}, shard)
    assert len({same, changed, opened(folder).fingerprint()}) == 3
