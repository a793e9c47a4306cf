"""Adapters added up and cut on the command line: what PEFT makes of the files is the base with the sum of the updates."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlite import combine
from qlite.errors import AdapterError, RecipeError, RunError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.peft import CONFIG, write_adapter
from qlite.methods.lora import LoRA
from tests.adapters import put_on
from tests.families import FAMILIES, VOCAB, saved_folder

METHODS = {
    "a": LoRA(rank=4, alpha=10.0, rank_per_target={"q_proj": 2}),
    "b": LoRA(rank=5, alpha=3.0, rslora=True, targets="attention"),
    "dora": LoRA(rank=2, dora=True),
}
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and the adapters ``METHODS`` of it in PEFT's format; ``wide`` is of another base."""
    folder = tmp_path_factory.mktemp("combine")
    saved_folder(folder, FAMILIES["llama"]).rename(folder / "base")
    for seed, (name, method) in enumerate(METHODS.items()):
        model = base(folder)
        put_on(model, method, seed)
        write_adapter(folder / name, model, method, "org/base")
    config = FAMILIES["llama"].config()
    config.hidden_size, config.head_dim = 128, 32
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    put_on(model, LoRA(rank=3), 9)
    write_adapter(folder / "wide", model, LoRA(rank=3), "org/another")
    return folder


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)


def updates(folder: Path, name: str):
    return read_foreign_adapter(folder / name).updates(folder / name)


@torch.no_grad()
def logits_with(folder: Path, parts: dict[str, float]) -> torch.Tensor:
    """Return the logits of the base with the dense sum of the updates on its weights, in float64."""
    model = base(folder).double()
    for name, weight in parts.items():
        for layer, update in updates(folder, name).items():
            dense = update.scaling * update.B.double() @ update.A.double()
            model.get_submodule(layer).weight += weight * dense
    return model(input_ids=IDS).logits


@torch.no_grad()
def logits_by_peft(folder: Path, out: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(base(folder), out).double()(input_ids=IDS).logits


@pytest.mark.parametrize("parts", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": -1.0}, {"a": 0.5}, {"b": 1.0, "a": 2.0}])
def test_peft_reads_the_sum_of_the_updates(folder, tmp_path, parts, capsys):
    out = tmp_path / "out"
    combine.main([*(f"{folder / name}:{weight}" for name, weight in parts.items()), "--out", str(out)])
    found, expected = logits_by_peft(folder, out), logits_with(folder, parts)
    # Measured: 1.4e-7, the factors' last place in float32.
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert (expected - logits_with(folder, {})).abs().max() > 0.1
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {out}: rank")  # nothing is lost, so there is nothing to tell
    assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == "org/base"


def test_a_smaller_rank_says_what_is_lost_and_where_most(folder, tmp_path, capsys):
    out = tmp_path / "out"
    combine.main([str(folder / "a"), "--rank", "3", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    before, after = updates(folder, "a"), updates(tmp_path, "out")
    assert {layer: update.rank for layer, update in after.items()} == {layer: min(3, update.rank) for layer, update in before.items()}
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-2]}
    assert sorted(rows) == sorted(layer for layer in before if not layer.endswith("q_proj"))  # those of rank 2 lose nothing
    lost = {layer: before[layer].dense() - after[layer].dense() for layer in before}
    for layer, (rank, kept, norm, error, spectral) in rows.items():
        assert rank == "3"
        assert float(norm) == pytest.approx(float(before[layer].dense().norm()), rel=0.01)
        assert float(error) == pytest.approx(float(lost[layer].norm()), rel=0.01)
        assert float(spectral) == pytest.approx(float(torch.linalg.matrix_norm(lost[layer], ord=2)), rel=0.01)
        assert float(kept.rstrip("%")) / 100 == pytest.approx(1 - float(lost[layer].norm() / before[layer].dense().norm()) ** 2, abs=1e-5)
    worst = max(lost, key=lambda layer: float(lost[layer].norm() / before[layer].dense().norm()))
    assert lines[-2].startswith(f"worst: {worst}, ")
    assert "all linears together" in lines[-2]


def test_ranks_that_add_up_to_more_than_a_linear_has_become_its_own_without_loss(folder, tmp_path, capsys):
    for name, method in (("big", LoRA(rank=30, targets=("k_proj",))), ("bigger", LoRA(rank=31, targets=("k_proj",)))):
        model = base(folder)
        put_on(model, method, 3)
        write_adapter(tmp_path / name, model, method, "org/base")
    combine.main([str(tmp_path / "big"), str(tmp_path / "bigger"), "--out", str(tmp_path / "out")])
    found = updates(tmp_path, "out")
    for layer, update in found.items():
        assert update.rank == 32
        expected = updates(tmp_path, "big")[layer].dense() + updates(tmp_path, "bigger")[layer].dense()
        torch.testing.assert_close(update.dense(), expected, atol=1e-4, rtol=1e-4)
    assert "worst" not in capsys.readouterr().out


def test_all_that_cannot_be_added_is_said_at_once(folder, tmp_path):
    given = [folder / "a", f"{folder / 'b'}:nan", f"{folder / 'b'}:x", folder / "dora", folder / "wide", folder / "gone", folder]
    with pytest.raises(AdapterError) as error:
        combine.main([*map(str, given), "--out", str(tmp_path / "out")])
    lines = str(error.value).splitlines()
    assert "the number nan behind the colon should be finite and not 0" in lines[0]
    assert "the number x behind the colon" in lines[1]
    assert f'there is no folder "{folder / "gone"}"' in lines[2]
    assert "neither the folder of a run" in lines[3]
    assert "is DoRA, which makes each row of W + s B A as long as was trained" in lines[4]
    assert lines[5].endswith("is [128, 96], that of " + str(folder / "a") + " [64, 96]; they are not of one base")
    assert len(lines) == 6
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_and_a_folder_in_the_way_are_refused(folder, tmp_path):
    with pytest.raises(RecipeError, match="one adapter as it is: nothing to do"):
        combine.main([str(folder / "a"), "--out", str(tmp_path / "out")])
    with pytest.raises(RecipeError, match="--rank 0: should be 1 or more"):
        combine.main([str(folder / "a"), "--rank", "0", "--out", str(tmp_path / "out")])
    with pytest.raises(RunError, match="exists already"):
        combine.main([str(folder / "a"), "--rank", "2", "--out", str(folder / "b")])


def test_another_name_of_the_base_is_told_and_no_error(folder, tmp_path, capsys):
    model = base(folder)
    put_on(model, METHODS["b"], 5)
    write_adapter(tmp_path / "c", model, METHODS["b"], "mirror/base")
    capsys.readouterr()
    combine.main([str(folder / "a"), str(tmp_path / "c"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == 'the adapters call their base differently ("org/base", "mirror/base"); the first is written\n'
