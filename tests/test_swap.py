"""The adapter in merged weights taken out and another put in: how near the exact merge that is, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from qlite import export, swap
from qlite.errors import AdapterError, RecipeError, RunError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.merged import write_merged
from qlite.formats.peft import WEIGHTS, write_adapter
from qlite.formats.swapped import MergedFolder, presence, swapped
from qlite.hashes import sha256
from qlite.methods.lora import LoRA
from qlite.model.checkpoint import SafetensorsCheckpoint
from qlite.model.source import ModelFiles
from tests.adapters import put_on, random_update, randomise
from tests.families import FAMILIES, new_tokenizer, saved_folder
from tests.tiny_run import run, tiny_recipe
from tests.tiny_tokenizer import tiny_tokenizer

METHODS = {
    "a": LoRA(rank=4, alpha=10.0),
    "b": LoRA(rank=3, alpha=6.0, targets="attention"),
    "dora": LoRA(rank=2, dora=True),
}
HALVES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Half of the last place of a value, to the value."""


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def folder(tmp_path_factory, request) -> Path:
    """A base, adapters of it, and ``merged-a``, the first one merged into it in float16."""
    folder = tmp_path_factory.mktemp("swap")
    saved_folder(folder, FAMILIES[request.param]).rename(folder / "base")
    for seed, (name, method) in enumerate(METHODS.items()):
        model = base(folder)
        put_on(model, method, seed)
        write_adapter(folder / name, model, method, "org/base")
        if name != "dora":
            shard_bytes = 40_000 if name == "a" else 2**30  # one folder in shards, one in a single file
            write_merged(folder / f"merged-{name}", model, new_tokenizer(), None, torch.float16, lambda *_: None, shard_bytes)
    return folder


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_after_a_swap_the_weights_are_those_of_the_exact_merge_but_for_two_roundings(folder, tmp_path, capsys):
    out = tmp_path / "out"
    swap.main([str(folder / "merged-a"), "--remove", str(folder / "a"), "--add", str(folder / "b"), "--out", str(out)])
    found, before, exact = weights(out), weights(folder / "merged-a"), weights(folder / "merged-b")
    assert found.keys() == exact.keys()
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        if torch.equal(before[name], exact[name]):
            assert torch.equal(tensor, exact[name])
            continue
        changed += 1
        most = HALVES[torch.float16] * (before[name].float().abs() + 2 * exact[name].float().abs()) * 1.01 + 2.0**-24
        assert ((tensor.float() - exact[name].float()).abs() <= most).all()
    assert changed >= 8
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    told = capsys.readouterr().out
    assert f"remove: {folder / 'a'}; 1.0" in told or f"remove: {folder / 'a'}; 0.9" in told
    assert "swaps since the merge: 1, each rounds once more" in told
    said = json.loads((out / "swap.json").read_text())
    assert (said["from"], said["removed"], said["added"]) == ("merged-a", "a", "b")
    swap.main([str(out), "--remove", str(folder / "b"), "--add", str(folder / "a"), "--out", str(tmp_path / "back")])
    assert "swaps since the merge: 2, each rounds once more" in capsys.readouterr().out
    assert weights(tmp_path / "back").keys() == found.keys()


def test_only_taken_out_it_is_the_base_and_only_put_in_it_is_both(folder, tmp_path):
    swap.main([str(folder / "merged-a"), "--remove", str(folder / "a"), "--out", str(tmp_path / "base")])
    swap.main([str(folder / "merged-a"), "--add", str(folder / "b"), "--out", str(tmp_path / "both")])
    plain, alone, both, merged = (weights(each) for each in (folder / "base", tmp_path / "base", tmp_path / "both", folder / "merged-a"))
    updates = read_foreign_adapter(folder / "b").updates(folder / "b")
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor.float(), plain[name].float(), atol=2e-3, rtol=1e-3)
        update = updates.get(name.removesuffix(".weight"))
        expected = merged[name].float() + (0 if update is None else update.dense())
        torch.testing.assert_close(both[name].float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_swap_adds_at_most_half_of_the_last_place(dtype, record_property):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 256, generator=generator) * 0.05).to(dtype)
    updates = [random_update(8, 256, 256, seed, scaling=1e-4) for seed in range(11)]  # ||dW|| a hundredth of ||W||
    exact = [weight.double() + update.scaling * update.B.double() @ update.A.double() for update in updates]
    current, errors = swapped(weight, None, updates[0]).to(dtype), []
    most = exact[0].abs().maximum(current.abs().double())
    for n in range(1, 101):
        old, new = updates[(n - 1) % 11], updates[n % 11]
        current = swapped(current, old, new).to(dtype)
        most = most.maximum(current.abs().double())
        # Beside its own last place: float16's below 2^-14 is 2^-24 wide, and the float32 sums are of terms that may be larger than it.
        error = (current.double() - exact[n % 11]).abs()
        smallest = 2.0**-25 if dtype == torch.float16 else 0.0
        assert (error <= (n + 1) * (HALVES[dtype] * most + smallest + 2.0**-22 * most.max())).all()
        errors.append(float(error.square().mean().sqrt() / updates[n % 11].dense().square().mean().sqrt()))
    apart = ", ".join(f"{errors[n - 1]:.1e}" for n in (1, 10, 100))
    record_property("figure", f"swap, {str(dtype)[6:]}: after 1, 10 and 100 swaps {apart} of ||dW|| from the exact merge")


def test_what_is_not_in_the_weights_is_not_taken_out_and_what_is_is_not_put_in_twice(folder, tmp_path):
    merged, out = str(folder / "merged-a"), str(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"--remove: the weights hold -?0\.[01]\d* of that adapter.*: it was not merged into them"):
        swap.main([merged, "--remove", str(folder / "b"), "--out", out])
    with pytest.raises(AdapterError, match=r"--add: the weights hold (1\.0|0\.9)\d* of that adapter.*: it is in them already"):
        swap.main([merged, "--add", str(folder / "a"), "--out", out])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def related(folder, tmp_path) -> tuple[Path, Path]:
    """Two adapters as other runs of the seed of "a" would have: the same A, and a B near that of "a", in every linear otherwise so."""
    generator = torch.Generator().manual_seed(3)
    for name, shares in (("earlier", (1.2, 1.5)), ("other", (0.8, 1.5))):  # of "a", in one linear and the next
        shutil.copytree(folder / "a", tmp_path / name)
        tensors = load_file(tmp_path / name / WEIGHTS)
        for number, key in enumerate(sorted(key for key in tensors if "lora_B" in key)):
            B = tensors[key]
            tensors[key] = B / shares[number % 2] + 0.1 * B.std() * torch.randn(B.shape, generator=generator)
        save_file(tensors, tmp_path / name / WEIGHTS)
    return tmp_path / "earlier", tmp_path / "other"


def test_an_adapter_like_the_merged_one_is_not_taken_for_it(folder, tmp_path, related, capsys):
    merged, (earlier, other) = str(folder / "merged-a"), related
    for name, share in ((earlier, "1.[23]"), (other, r"(0\.9|1\.0)")):
        with pytest.raises(
            AdapterError, match=rf"--remove: the weights hold {share}\d* of that adapter, and .* in \d of \d+ linears: it was not"
        ):
            swap.main([merged, "--remove", str(name), "--out", str(tmp_path / "out")])
    swap.main([merged, "--add", str(other), "--out", str(tmp_path / "both")])
    swap.main([merged, "--remove", str(folder / "a"), "--add", str(other), "--out", str(tmp_path / "swapped")])
    assert "of it was in the weights" in capsys.readouterr().out


def test_where_the_folder_names_the_adapters_in_it_that_decides(folder, tmp_path, related):
    def swapped_to(name: str, start: Path, *options: str) -> Path:
        swap.main([str(start), *options, "--out", str(tmp_path / name)])
        return tmp_path / name

    a, b, named = folder / "a", folder / "b", tmp_path / "named"
    shutil.copytree(folder / "merged-a", named)
    # Of a merge of "other": the weights, which hold "a", say that it is not there.
    (named / "audit.json").write_text(json.dumps({"adapter_sha256": sha256(related[1] / WEIGHTS)}))
    with pytest.raises(AdapterError, match=rf"they may hold it under another name; .* \(SHA-256 {sha256(related[1] / WEIGHTS)[:12]}\)"):
        swapped_to("out", named, "--remove", str(a))
    swapped_to("without", named, "--remove", str(related[1]))
    assert json.loads((tmp_path / "without" / "swap.json").read_text())["holds"] == []
    with pytest.raises(AdapterError, match=r"it was not merged into them; .* \(none\)"):
        swapped_to("out", tmp_path / "without", "--remove", str(related[1]))
    both = swapped_to("both", named, "--add", str(b))
    with pytest.raises(AdapterError, match="--add: .*: it is in them already"):
        swapped_to("out", both, "--add", str(related[1]))
    assert json.loads((both / "swap.json").read_text())["holds"] == [sha256(each / WEIGHTS) for each in (related[1], b)]
    back = swapped_to("back", both, "--remove", str(b))
    assert json.loads((back / "swap.json").read_text())["holds_all"]
    # Unknown what was merged: of what was added since, it is known.
    assert json.loads((swapped_to("since", folder / "merged-a", "--add", str(b)) / "swap.json").read_text())["holds"] == [
        sha256(b / WEIGHTS)
    ]


def test_a_run_of_pissa_is_known_in_its_own_merge_and_answers_end_as_it_has_learned(tmp_path):
    base = {"bits": 16, "dtype": "float32"}
    run(tiny_recipe(tmp_path, base=base, method={"init": "pissa", "rank": 4}, train={"steps": 2, "accumulation": 1}))
    export.main(["--merge", str(tmp_path / "run"), "--dtype", "fp32"])
    merged, out, again = tmp_path / "run" / "merged-fp32", tmp_path / "out", tmp_path / "again"
    swap.main([str(merged), "--remove", str(tmp_path / "run"), "--out", str(out)])
    assert json.loads((out / "swap.json").read_text())["holds"] == []
    before, trained, found = weights(tmp_path / "base"), weights(merged), weights(out)
    for name, tensor in found.items():
        assert (tensor - before[name]).norm() <= 1e-2 * (trained[name] - before[name]).norm(), name
    (out / "generation_config.json").unlink()
    swap.main([str(out), "--add", str(tmp_path / "run"), "--out", str(again)])
    assert tiny_tokenizer().convert_tokens_to_ids("<|im_end|>") in GenerationConfig.from_pretrained(again).eos_token_id


@pytest.mark.parametrize("dtype", HALVES)
def test_a_merged_adapter_is_found_in_every_dtype_whatever_it_rounds_away(dtype):
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-3, 1e-4):  # of the weights
        base = {str(n): (torch.randn(96, 64, generator=generator) * 0.05).to(dtype) for n in range(8)}
        updates = {name: random_update(4, 96, 64, int(name), scaling=1e-4) for name in base}
        for update in updates.values():
            update.B.mul_(size * 0.05 / update.dense().square().mean().sqrt())
        merged = {name: swapped(weight, None, updates[name]).to(dtype) for name, weight in base.items()}
        assert not presence(merged.__getitem__, updates, {}).is_out
        assert not presence(base.__getitem__, updates, {}).is_in


def test_of_an_adapter_too_small_to_be_told_from_chance_nothing_is_claimed():
    update = random_update(4)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(5))
    small = {"x": type(update)(update.A, update.B * 1e-4, update.scaling)}
    found = presence({"x": weight}.__getitem__, small, {})
    assert not found.is_in
    assert not found.is_out
    large = {"x": update}
    assert presence({"x": weight}.__getitem__, large, {}).is_out
    added = presence({"x": weight + update.dense()}.__getitem__, large, {})
    assert added.is_in
    assert added.share == pytest.approx(
        float((weight + update.dense()).flatten() @ update.dense().flatten() / update.dense().square().sum())
    )
    assert presence({"x": weight + update.dense()}.__getitem__, large, large).is_out


def test_all_that_cannot_be_swapped_is_said_at_once(folder, tmp_path):
    model = base(folder)
    method = LoRA(rank=2, targets=("model.layers.1.*",)) if hasattr(model, "model") else LoRA(rank=2, targets=("gpt_neox.layers.1.*",))
    method.attach(model)
    randomise(model, 1)
    write_adapter(tmp_path / "c", model, method, "org/base")
    files = tmp_path / "c" / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): tensor for name, tensor in load_file(files).items()}, files)
    with pytest.raises(AdapterError) as error:
        swap.main(
            [str(tmp_path / "gone"), "--remove", str(folder / "dora"), "--add", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
        )
    lines = str(error.value).splitlines()
    assert lines[0] == f'--add: there is no folder "{tmp_path / "nothing"}"'
    assert lines[1] == f'there is no folder "{tmp_path / "gone"}"'
    assert lines[2].startswith(f"--remove: {folder / 'dora'} is DoRA: merged, its rows have lost their own lengths")
    with pytest.raises(AdapterError, match="--add: the base has no linear layer .*layers.9"):
        swap.main([str(folder / "merged-a"), "--add", str(tmp_path / "c"), "--out", str(tmp_path / "out")])
    with pytest.raises(RecipeError, match="nothing to do"):
        swap.main([str(folder / "merged-a"), "--out", str(tmp_path / "out")])
    with pytest.raises(RunError, match="exists already"):
        swap.main([str(folder / "merged-a"), "--remove", str(folder / "a"), "--out", str(folder / "b")])


def test_the_shapes_of_a_merged_folder_go_by_the_names_that_adapters_use(folder):
    found = MergedFolder(SafetensorsCheckpoint(ModelFiles(folder / "merged-a", None, "merged-a"))).shapes()
    updates = read_foreign_adapter(folder / "a").updates(folder / "a")
    assert {layer: found[layer] for layer in updates} == {layer: update.shape for layer, update in updates.items()}
