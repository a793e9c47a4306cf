"""What is more than low-rank updates answers over a run's base with no other beside it; AdaLoRA's and ReLoRA's runs stand beside LoRA's."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlite import chat, generate
from qlite.analyze import analyze
from qlite.errors import AdapterError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.foreign_prompts import read_foreign_prompts
from qlite.formats.peft import PEFT, PREFIX, write_adapter
from qlite.methods import METHODS
from qlite.methods.base import trainable_tensors
from qlite.model.documents import attend_by_documents
from qlite.serving.answer import Sampling, answer_ids
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder
from tests.test_adapters import alone
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE

OPTIONS = ["--max-tokens", "6", "--device", "cpu"]
FEW = {"steps": 8, "accumulation": 1, "eval_every": 0, "exact_match_rows": 0}
SAME = {"base": {"dtype": "float32"}, "optimizer": {"lr": 2e-2}}
KINDS = {
    "prompt": METHODS["prompt"](length=3),
    "prefix": METHODS["prefix"](length=3, hidden=0),
    "ia3": METHODS["ia3"](),
    "head": METHODS["lora"](rank=2, modules_to_save=("lm_head",)),
    "norms": METHODS["lora"](rank=2, modules_to_save=("norm",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run of LoRA, two of methods like it, and a folder in PEFT's format of each of ``KINDS``."""
    folder = tmp_path_factory.mktemp("alone")
    run(tiny_recipe(folder, train=FEW, **SAME))
    likes = {
        "adalora": {"name": "adalora", "rank": 2, "start_rank": 3},
        "relora": {"name": "relora", "rank": 2, "resets": 1, "warmup": 1},
    }
    for name, method in likes.items():
        run(tiny_recipe(folder, train=FEW, method=method, output={"dir": str(folder / name), "save_every": 20}, **SAME))
    generator = torch.Generator().manual_seed(0)
    for name, method in KINDS.items():
        model = tiny_llama(vocab_size=VOCAB_SIZE).requires_grad_(False)
        attend_by_documents(model)
        method.attach(model)
        for p in trainable_tensors(model).values():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        write_adapter(folder / name, model, method, "base")
    return folder


def place(folder: Path, name: str) -> Path:
    return beneath if (beneath := folder / name / PEFT).is_dir() else folder / name


def answer(opened: OpenRun) -> str:
    prompt = opened.encoder.encode_prompt([{"role": "user", "content": "abc"}])
    (ids,) = answer_ids(opened.base.model, opened.encoder, [prompt], Sampling(6))
    return opened.encoder.decode([token for token in ids if token not in opened.encoder.stop_ids]).strip()


def expected(folder: Path, name: str | None) -> str:
    """Return what the base answers, with the adapter ``name`` put on by hand."""
    opened = open_run(RunFolder(folder / "run"), "cpu", lambda *_: None)
    if name and (prompts := read_foreign_prompts(place(folder, name))):
        prompts.put_on(opened.base.model, folder)
    elif name:
        put_foreign_adapter(read_foreign_adapter(place(folder, name)), opened.base.model, folder)
    opened.base.model.eval()
    return answer(opened)


@pytest.mark.parametrize("name", KINDS)
def test_it_answers_by_itself_and_in_turns_with_the_base(name, folder, capsys):
    asked = [str(folder / "run"), "--prompt", "abc", "--adapter", f"x={place(folder, name)}", *OPTIONS]
    generate.main(asked)
    tuned, plain = expected(folder, name), expected(folder, None)
    assert capsys.readouterr().out.removeprefix("x:\n").strip() == tuned
    assert tuned != plain
    if name == "norms":
        with pytest.raises(AdapterError, match='"x" has biases or norms in the place of the base\'s own, which is not there to answer'):
            generate.main([*asked, "--base"])
        return
    generate.main([*asked, "--base"])
    parts = re.split(r"(?m)^(base|x):\n", capsys.readouterr().out)
    assert {who: text.strip() for who, text in zip(parts[1::2], parts[2::2], strict=True)} == {"base": plain, "x": tuned}


def talked(folder: Path, name: str, lines: list[str], monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.main([str(folder / "run"), "--adapter", f"x={place(folder, name)}", *OPTIONS])
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["prompt", "head"])
def test_chat_takes_it_off_and_on(name, folder, capsys, monkeypatch):
    tuned, plain = expected(folder, name), expected(folder, None)
    lines = ["abc", "/base", "/reset", "abc", "/adapter x", "/reset", "abc"]
    assert talked(folder, name, lines, monkeypatch, capsys) == [tuned, plain, tuned]
    lines = ["/base", "/adapter base", "/reset", "abc", "/base", "/reset", "abc", "/base", "/adapter x", "/reset", "abc"]
    assert talked(folder, name, lines, monkeypatch, capsys) == [plain, plain, tuned]


def test_an_unknown_name_leaves_who_answers(folder):
    from qlite.serving.dialogue import Dialogue
    from qlite.training.open_bank import open_bank

    found = open_bank(str(folder / "run"), [f"x={place(folder, 'prompt')}"], "cpu", lambda *_: None)
    dialogue = Dialogue(found.opened.base.model, found.opened.encoder, Sampling(6), None, found.voices)
    dialogue.toggle_base()
    with pytest.raises(AdapterError, match='no adapter is called "y"'):
        dialogue.swap("y")
    assert dialogue.is_base
    assert answer(found.opened) == expected(folder, None)


def test_chat_says_that_a_base_is_gone(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\n"))
    with pytest.raises(AdapterError, match="biases or norms in the place"):
        chat.main([str(folder / "run"), "--adapter", f"x={place(folder, 'norms')}", *OPTIONS])


def test_what_is_wrong_with_one_adapter_is_what_is_told(folder, tmp_path):
    """Not that it changes no weight, which is what generate is asked for here."""
    shutil.copytree(place(folder, "prompt"), tmp_path / "prompt")
    config = tmp_path / "prompt" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_virtual_tokens": 4}))
    with pytest.raises(AdapterError) as error:
        generate.main([str(folder / "run"), "--prompt", "abc", "--adapter", f"x={tmp_path / 'prompt'}", *OPTIONS])
    assert "says num_virtual_tokens = 4; the two files are not of one adapter" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_vocabulary_of_its_own_is_refused(folder, tmp_path):
    model = tiny_llama(vocab_size=VOCAB_SIZE)
    method = METHODS["lora"](rank=2, modules_to_save=("embed_tokens", "lm_head"))
    method.attach(model)
    write_adapter(tmp_path, model, method, "base")
    file = tmp_path / "adapter_model.safetensors"
    rows = {name: tensor for name, tensor in load_file(file).items() if "embed_tokens" in name or "lm_head" in name}
    save_file(load_file(file) | {name: torch.cat([tensor, tensor[:5]]) for name, tensor in rows.items()}, file)
    with pytest.raises(AdapterError, match=f"has {VOCAB_SIZE + 5} rows for tokens, and the run's base {VOCAB_SIZE}: .*merge it"):
        generate.main([str(folder / "run"), "--prompt", "abc", "--adapter", f"x={tmp_path}", *OPTIONS])


def test_beside_another_it_is_refused_with_what_it_is(folder):
    given = [word for name in ("ia3", "prompt") for word in ("--adapter", f"{name}={place(folder, name)}")]
    with pytest.raises(AdapterError) as error:
        generate.main([str(folder / "run"), "--prompt", "abc", *given, *OPTIONS])
    factors, prompt = str(error.value).splitlines()
    assert re.search(r"holds factors of linears \(.*\); only low-rank updates of linears stand beside each other on one base", factors)
    assert "peft_type is PROMPT_TUNING, which changes no weight" in prompt


def test_runs_of_methods_like_lora_stand_beside_it_and_answer_as_alone(folder, capsys):
    names = ("run", "adalora", "relora")
    generate.main(["--prompt", "abc", *(word for name in names for word in ("--adapter", f"{name}={folder / name}")), *OPTIONS])
    parts = re.split(r"(?m)^(run|adalora|relora):\n", capsys.readouterr().out)
    said = {who: text.strip() for who, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert said == {name: alone(folder / name, "abc", None).strip() for name in names}


def test_an_analysis_of_methods_like_lora_advises_none_of_loras_keys(folder):
    for name, words in (("adalora", "AdaLoRA has dealt its ranks out by itself"), ("relora", "the sum of several of rank 2")):
        (line,) = analyze(folder / name, quiet=True).findings.advice()
        assert words in line
        assert "method." not in line
    assert "method.rank" in "".join(analyze(folder / "run", quiet=True).findings.advice())


def test_a_masked_triplet_counts_in_no_rank(folder, tmp_path):
    shutil.copytree(folder / "adalora" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("lora_E"))][:2] = 0
    save_file(tensors, file)
    left = {
        name.removeprefix(PREFIX).removesuffix(".lora_E"): max(1, int(tensor.count_nonzero()))
        for name, tensor in tensors.items()
        if name.endswith("lora_E")
    }
    found = {linear.name: linear.rank for linear in analyze(tmp_path / "adapter", quiet=True).findings.linears}
    assert found == left
    assert {1, 3} <= set(left.values())


def test_one_seed_makes_alike_only_what_begins_alike(folder):
    beside = analyze(folder / "run", folder / "adalora", quiet=True).findings
    again = analyze(folder / "run", folder / "run", quiet=True).findings
    assert not any("both runs began with train.seed" in note for note in beside.notes)
    assert any("both runs began with train.seed" in note for note in again.notes)
