"""The verbs after training, typed as a user types them: export, generate, and what they say when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlite import export, generate
from qlite.errors import MachineError, RecipeError, RunError
from qlite.serving.answer import Sampling, answer_all, answer_batch
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from qlite.verb import run_verb
from tests.marks import slow
from tests.tiny_run import run, tiny_recipe

PROMPTS = [[{"role": "user", "content": word}] for word in ("abc", "fade", "be", "deafbc", "cab")]
GREEDY = Sampling(max_tokens=8)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run over a 4-bit base."""
    folder = tmp_path_factory.mktemp("verbs")
    run(tiny_recipe(folder, train={"steps": 30}, optimizer={"lr": 2e-2}))
    return folder / "run"


@pytest.fixture(scope="module")
def opened(finished):
    """The run, opened with its adapter on."""
    own = open_run(RunFolder(finished), "cpu", lambda *_: None)
    own.attach()
    return own


def test_merged_weights_load_in_transformers_and_answer_as_the_live_adapter(finished, opened, capsys):
    export.main(["--merge", str(finished)])
    out = finished / "merged-fp16"
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    tokenizer = AutoTokenizer.from_pretrained(out)
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        words = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert words == answer_batch(opened.base.model, opened.encoder, [opened.encoder.encode_prompt(prompt)], GREEDY)[0]
    assert "float16 weights, merged over the dequantised base weights" in capsys.readouterr().out


def test_the_template_of_the_training_is_used_whatever_the_base_brings_later(finished, tmp_path):
    # Pain: a template at inference other than the one in training.
    before = open_run(RunFolder(finished), "cpu", lambda *_: None).encoder.encode_prompt(PROMPTS[0])
    path = finished.parent / "base" / "chat_template.jinja"
    own = path.read_text()
    try:
        path.write_text("{% for m in messages %}{{ m.role }}? {{ m.content }}{% endfor %}")
        opened = open_run(RunFolder(finished), "cpu", lambda *_: None)
        assert opened.encoder.encode_prompt(PROMPTS[0]) == before
        export.main(["--merge", str(finished), "--out", str(tmp_path / "out")])
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == own
    finally:
        path.write_text(own)


def test_an_export_never_overwrites_without_force_and_is_the_same_twice(finished, tmp_path):
    out = tmp_path / "out"
    command = ["--merge", str(finished), "--out", str(out), "--dtype", "bf16"]
    export.main(command)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="--force"):
        export.main(command)
    export.main([*command, "--force"])
    assert (out / "model.safetensors").read_bytes() == first


def test_force_replaces_only_what_an_export_wrote(finished, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(MachineError, match="did not write there"):
        export.main(["--merge", str(finished), "--out", str(mine), "--force"])
    with pytest.raises(MachineError, match="did not write there"):
        export.main(["--merge", str(finished), "--out", str(finished), "--force"])
    assert (mine / "thesis.txt").read_text() == "mine"
    assert RunFolder(finished).is_finished


@pytest.mark.parametrize(
    ("flags", "words"), [(["--max-tokens", "0"], "1 or more"), (["--temperature", "-1"], "temperature -1"), (["--top-p", "5"], "at most 1")]
)
def test_numbers_that_make_no_sense_are_refused(finished, flags, words):
    with pytest.raises(RecipeError, match=words):
        generate.main([str(finished), "--prompt", "abc", *flags])


def test_tabs_and_line_breaks_of_an_answer_are_kept_and_escapes_are_not():
    assert generate.clean_lines("\tif x:\n\t\ty\x1b[2J") == "\tif x:\n\t\ty"


def test_an_adapter_trained_with_another_template_than_the_bases_takes_it_along(tmp_path):
    run(tiny_recipe(tmp_path, data={"template": "plain"}, train={"steps": 2, "accumulation": 1, "exact_match_rows": 0}))
    export.main(["--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == RunFolder(tmp_path / "run").template
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template != RunFolder(tmp_path / "run").template


def test_the_adapter_is_written_as_pefts_two_files(finished, tmp_path):
    out = tmp_path / "peft"
    export.main(["--adapter", str(finished), "--out", str(out)])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--adapter", "--onto", "original", "--dtype", "fp32", "--most-kl", "0.1"],
            ["--dtype: counts with --merge", "--onto: counts with --merge or --gguf", "--most-kl: counts with --merge or --gguf"],
        ),
        (["--adapter", "--device", "cpu"], ["--device: counts with --merge or --gguf or --gguf-adapter"]),
        (["--gguf-adapter", "--audit-rows", "0"], ["--audit-rows: counts with --merge or --gguf"]),
        (["--gguf", "q8_0", "--dtype", "fp16", "--shard-gib", "4"], ["--dtype: counts with --merge", "--shard-gib: counts with --merge"]),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_and_all_of_them_at_once(options, told):
    with pytest.raises(RecipeError) as error:
        export.main([*options, "nowhere"])
    form = "--gguf" if "--gguf" in options else options[0]
    assert error.value.problems == [f"{each}, and this is {form}" for each in told]


@pytest.mark.parametrize(("form", "goes_on"), [("--merge", True), ("--gguf=f16", False), ("--gguf-adapter", False)])
def test_only_a_stopped_merge_is_said_to_go_on(finished, tmp_path, monkeypatch, capsys, form, goes_on):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_opened", stop)
    monkeypatch.setattr(sys, "argv", ["export", form, str(finished), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run_verb(export.main)
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted" + "; the same command goes on where it was" * goes_on


def test_a_batch_answers_as_each_prompt_alone(finished):
    own = open_run(RunFolder(finished), "cpu", lambda *_: None)
    own.attach()
    model, encoder = own.base.model.float(), own.encoder
    prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS]
    together = answer_batch(model, encoder, prompts, GREEDY)
    assert together == [answer_batch(model, encoder, [prompt], GREEDY)[0] for prompt in prompts]
    assert answer_all(model, encoder, prompts, GREEDY) == together
    assert any(together)


def test_generate_streams_the_answer_and_says_its_speed(finished, opened, capsys):
    generate.main([str(finished), "--prompt", "abc", "--max-tokens", "8", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert out.strip() == answer_batch(opened.base.model, opened.encoder, [opened.encoder.encode_prompt(PROMPTS[0])], GREEDY)[0]
    assert "tokens/s, peak memory" in err


def test_generate_compares_with_the_untuned_model(finished, capsys):
    generate.main([str(finished), "--prompt", "abc", "--max-tokens", "8", "--base"])
    out = capsys.readouterr().out
    assert out.startswith("base model:\n")
    base, tuned = out.removeprefix("base model:\n").split(f"\n{finished}:\n")
    assert base.strip() != tuned.strip()


def test_sampling_is_a_function_of_the_seed(finished, capsys):
    said = []
    for seed in ("1", "1", "2", "3"):
        generate.main([str(finished), "--prompt", "abc", "--temperature", "2", "--top-p", "0.99", "--seed", seed, "--max-tokens", "12"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(set(said)) > 1


def test_without_a_run_the_newest_finished_one_is_taken(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no finished run"):
        export.main(["--merge"])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished)
    export.main(["--adapter", "--out", str(tmp_path / "peft")])
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.parametrize("verb", ["export", *map(slow, ("train", "generate", "evaluate", "report"))])
def test_a_mistake_ends_with_one_message_and_exit_code_2(verb, tmp_path):
    others = {"train": ["nothing.toml"], "export": ["--merge", "nothing"], "generate": ["nothing", "--prompt", "x"]}
    arguments = others.get(verb, ["nothing"])
    command = [sys.executable, "-m", f"qlite.{verb}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
