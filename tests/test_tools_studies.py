"""The tools that study LoRA, small: low rank from scratch on pictures made here, the paper's counts, and the study of ranks."""

import csv
import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from qlite.errors import DataError, RecipeError, RunError
from qlite.memory import terms
from qlite.recipe.read import read_recipe
from tests.tiny_run import tiny_tables
from tools import low_rank_from_scratch as scratch
from tools import parameter_counts as counts
from tools import rank_study, start_errors

# Low rank from scratch


def save_idx(path: Path, values: torch.Tensor, magic: int) -> None:
    content = struct.pack(f">{1 + values.dim()}i", magic, *values.shape) + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten classes that are told apart by which rows of the picture are bright; one file of four is packed."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 480), ("t10k", 200)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[2 * int(label) : 2 * int(label) + 4] += 150
        save_idx(folder / f"{part}-images-idx3-ubyte", images, 2051)
        save_idx(folder / f"{part}-labels-idx1-ubyte{'.gz' if part == 't10k' else ''}", labels, 2049)
    return folder


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_low_rank_from_scratch_trains_every_kind_and_goes_on_where_it_was(pictures, tmp_path, capsys):
    command = ["--data", str(pictures), "--out", str(tmp_path), "--ranks", "1", "--epochs", "2", "--batch", "16"]
    scratch.main([*command, "--seeds", "1"])
    assert capsys.readouterr().out.count(" s\n") == 3
    first = {path.name: path.read_bytes() for path in (tmp_path / "trainings").iterdir()}
    scratch.main([*command, "--seeds", "2"])
    out = capsys.readouterr().out
    assert out.count(" s\n") == 3  # those of the second seed alone
    assert all((tmp_path / "trainings" / name).read_bytes() == content for name, content in first.items())
    rows = {row["rank"]: row for row in table_of(tmp_path / "table.csv")}
    assert list(rows) == ["full", "1"]
    full, one = (float(rows[rank]["autoencoder"].partition(" ")[0]) for rank in rows)
    assert full > 90 > one  # one number cannot tell ten classes apart in so short a time
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_its_parameters_are_those_of_two_thin_matrices_and_the_biases():
    found = sum(p.numel() for p in scratch.classifier("lora", 16).parameters() if p.requires_grad)
    assert found == 16 * (784 + 512) + 16 * (512 + 512) + 10 * (512 + 10) + 512 + 512 + 10
    assert sum(p.numel() for p in scratch.classifier("full", 0).parameters()) == 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10


def test_the_same_seed_trains_to_the_same_accuracy(pictures):
    training, test = scratch.scaled(scratch.read_raw(pictures))
    settings = scratch.Settings(1, 32, 1e-3, 480, "")
    one, same = (scratch.train("autoencoder", 4, 1, settings, training, test) for _ in range(2))
    assert one == same


def test_it_refuses_a_folder_without_the_data_and_other_settings(pictures, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"no idx file")
    with pytest.raises(DataError) as error:
        scratch.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert "train-images-idx3-ubyte: is no idx file of images" in lines[0]
    assert all("has no " in line for line in lines[1:4])
    assert "apt-get install dataset-fashion-mnist" in lines[4]
    with pytest.raises(RecipeError, match="--ranks 0: should be 1 to 512"):
        scratch.main(["--ranks", "0"])
    command = ["--data", str(pictures), "--out", str(tmp_path / "kept"), "--ranks", "1", "--epochs", "1", "--seeds", "1"]
    scratch.main(command)
    with pytest.raises(RunError, match="choose another --out"):
        scratch.main([*command, "--lr", "0.1"])


def copied(pictures: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_it_refuses_trainings_of_other_data_of_the_same_size(pictures, tmp_path):
    other, out = copied(pictures, tmp_path / "other"), ["--out", str(tmp_path / "out"), "--ranks", "1", "--epochs", "1", "--seeds", "1"]
    scratch.main(["--data", str(other), *out])
    packed = other / "t10k-labels-idx1-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    scratch.main(["--data", str(other), *out])  # the same, unpacked
    save_idx(other / "t10k-labels-idx1-ubyte", torch.arange(200).flip(0) % 10, 2049)
    with pytest.raises(RunError, match="choose another --out"):
        scratch.main(["--data", str(other), *out])


def test_damaged_files_and_labels_of_no_class_are_told_together(pictures, tmp_path):
    folder = copied(pictures, tmp_path / "damaged")
    packed = folder / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(packed.read_bytes())
    content[12:24] = b"\xff" * 12
    packed.write_bytes(content)
    save_idx(folder / "train-labels-idx1-ubyte", torch.arange(480) % 11, 2049)
    with pytest.raises(DataError) as error:
        scratch.main(["--data", str(folder), "--out", str(tmp_path / "out")])
    assert "train-labels-idx1-ubyte: has a label 10, and there are 10 classes, 0 to 9" in str(error.value)
    assert "t10k-labels-idx1-ubyte.gz: cannot be read" in str(error.value)


def test_a_rank_that_is_named_twice_counts_once(pictures, tmp_path, capsys):
    command = ["--data", str(pictures), "--out", str(tmp_path), "--ranks", "1", "1", "--epochs", "1", "--seeds", "1"]
    scratch.main(command)
    assert "3/3  autoencoder rank 1" in capsys.readouterr().out
    assert "±" not in (tmp_path / "table.csv").read_text(encoding="utf-8")


# The paper's counts


def test_gpt_3_has_the_parameters_of_its_shapes_and_lora_the_papers_on_queries_and_values():
    total, trained = counts.parameters(counts.models()["GPT-3 175B"], 4)
    d, layers = 12288, 96
    block = 12 * d * d + 9 * d + 4 * d  # attention, MLP, their biases and two norms
    # OPT's table of positions has two rows more than the context.
    assert total == layers * block + (50257 + 2048 + 2) * d + 2 * d
    assert trained == layers * 2 * 4 * 2 * d
    assert counts.parameters(counts.models()["GPT-3 175B"], 1)[1] == pytest.approx(4.7e6, rel=0.01)  # the paper's table 4


def test_llama_7b_has_its_known_parameters():
    total, trained = counts.parameters(counts.models()["LLaMA-7B"], 8)
    assert (total, trained) == (6_738_415_616, 4_194_304)


def test_a_name_that_no_model_has_is_refused_with_those_there_are(capsys):
    with pytest.raises(RecipeError, match="--only foo: no model is called so; there are GPT-3 175B, LLaMA-7B"):
        counts.main(["--only", "foo"])
    with pytest.raises(RecipeError, match="--rank 0: should be 1 or more"):
        counts.main(["--rank", "0"])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_plan_of_what_lasts_is_arithmetic_too_and_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    config = type(counts.models()["LLaMA-7B"])(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=96
    )
    found = counts.count(config, 4, 32)
    assert found.fewer == found.parameters / found.trained
    # Base and adapter in bfloat16, gradients and both of Adam's moments in float32, and the half of the weights that bfloat16 leaves out.
    lasting = counts.lasting(found.plans["16 bit"])
    tables = found.plans["16 bit"].terms[terms.REST] - 2 * 64 * 5
    assert lasting - tables == pytest.approx(2 * found.parameters + (2 + 2 + 4 + 8) * found.trained, rel=0.001)
    monkeypatch.setattr(counts, "models", lambda: {"tiny": config})
    counts.main(["--tokens", "32", "--out", str(tmp_path)])
    written = (tmp_path / "counts.md").read_text()
    assert f"| {found.fewer:,.0f} |" in written
    assert capsys.readouterr().out.strip() == written.strip() + f"\n{tmp_path / 'counts.png'}"
    assert (tmp_path / "counts.png").read_bytes().startswith(b"\x89PNG")


# The study of ranks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tables = tiny_tables(folder, method={"rank": 4, "alpha": 12.0}, train={"accumulation": 1, "eval_every": 4})
    (folder / "tiny.toml").write_text(tomli_w.dumps(tables))
    return folder / "tiny.toml"


@pytest.mark.slow
def test_a_rank_study_trains_sets_and_ranks_once_each_and_goes_on(recipe, tmp_path, capsys):
    command = [str(recipe), "--quick", "--out", str(tmp_path), "--sets", "q", "qv", "--ranks", "1", "--budget", "4"]
    rank_study.main(command)
    out = capsys.readouterr().out
    rows = table_of(tmp_path / "table.csv")
    assert [(row["part"], row["matrices"], row["rank"]) for row in rows] == [
        ("rank", "q", "1"), ("rank", "qv", "1"), ("budget", "q", "7"), ("budget", "qv", "4"),
    ]  # fmt: skip
    assert "| q_proj, v_proj | 4 | 1,792 |" in out  # 2 blocks of (64 + 64) and (64 + 32), times the rank
    assert all(float(row["held_out_loss"]) > 0 for row in rows)
    own = json.loads((tmp_path / "runs" / "q-r7-s0" / "adapter" / "adapter_config.json").read_text())
    assert (own["r"], own["lora_alpha"], own["target_modules"]) == (7, 21.0, ["q_proj"])  # alpha / rank as the recipe has it
    assert (tmp_path / "rank_study.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    rank_study.main(command)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


def test_a_rank_study_refuses_what_makes_no_sense(recipe, tmp_path):
    with pytest.raises(RecipeError) as error:
        rank_study.main([str(recipe), "--ranks", "0", "2", "--seeds", "0", "--out", str(tmp_path)])
    assert error.value.problems == ["--ranks 0: should be 1 or more", "--seeds 0: should be 1 or more"]
    other = recipe.with_name("other.toml")
    other.write_text(
        recipe.read_text().replace("[method]", '[method]\nname = "low_rank"').replace("alpha = 12.0\n", "").replace("dropout = 0.1\n", "")
    )
    with pytest.raises(RecipeError, match='method.name = "low_rank": this study is of LoRA'):
        rank_study.main([str(other), "--out", str(tmp_path)])
    with pytest.raises(RecipeError) as error:
        rank_study.main([str(recipe), "--ranks", "1", "64", "--sets", "q", "qv", "--budget", "40", "--out", str(tmp_path)])
    assert [problem.partition(" is more than")[0] for problem in error.value.problems] == [
        "--budget 40: method.rank = 40:", "--sets qv --ranks 64: method.rank = 64:"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_study_is_of_the_quickstart_by_default_and_a_quick_one_has_a_folder_of_its_own():
    assert rank_study.arguments([]).recipe == Path("recipes/quickstart.toml")
    assert rank_study.arguments([]).out != rank_study.arguments(["--quick"]).out
    assert rank_study.arguments(["--quick", "--out", "x"]).out == Path("x")
    given = rank_study.arguments(["my.toml", "--ranks", "8", "8", "4", "--seeds", "2", "train.steps=3"])
    assert (given.recipe, given.overrides, given.ranks) == (Path("my.toml"), ["train.steps=3"], (8, 4))


def test_a_run_of_another_recipe_is_refused_with_flags_that_the_tool_has(recipe, tmp_path):
    quick = read_recipe(recipe).having(rank_study.QUICK)
    trained = rank_study.train_point(quick, ("q", 1), 256, 1, tmp_path)
    assert trained.parameters == 256
    with pytest.raises(RunError, match="holds a run of another recipe") as error:
        rank_study.train_point(quick.having({"optimizer.lr": 1e-3}), ("q", 1), 256, 1, tmp_path)
    assert "choose another --out, or delete that folder" in str(error.value)
    assert "--fresh" not in str(error.value)


# How near PiSSA and LoftQ begin


def test_both_ways_begin_nearer_to_the_original_at_every_rank(recipe, capsys):
    start_errors.main([str(recipe), "--ranks", "2", "8", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines] == [
        "smaller by, %",
        *(f"{way}, rank {rank}" for rank in (2, 8) for way in start_errors.WAYS),
    ]
    whole = [float(line.split()[-2]) for line in lines[1:]]
    assert 0 < whole[0] < whole[3]


def test_what_cannot_begin_is_refused_before_a_weight_is_read(recipe, tmp_path):
    with pytest.raises(RecipeError, match="--ranks 100: method.rank = 100: is more than .* can have"):
        start_errors.main([str(recipe), "--ranks", "4", "100"])
    with pytest.raises(RecipeError, match="--ranks 0: should be 1 or more"):
        start_errors.main([str(recipe), "--ranks", "0"])
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        start_errors.main([str(tmp_path / "none.toml")])
    command = [sys.executable, start_errors.__file__, str(tmp_path / "none.toml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
