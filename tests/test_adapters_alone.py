"""What is more than low-rank updates answers over a run's base with no other beside it; AdaLoRA's and ReLoRA's runs stand beside LoRA's."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from qlite import chat, generate
from qlite.errors import AdapterError
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import put_foreign_adapter
from qlite.formats.foreign_prompts import read_foreign_prompts
from qlite.formats.peft import PEFT, write_adapter
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
    if name == "head":
        with pytest.raises(AdapterError, match='"x" has layers in the place of the base\'s own, which is not there to answer'):
            generate.main([*asked, "--base"])
        return
    generate.main([*asked, "--base"])
    parts = re.split(r"(?m)^(base|x):\n", capsys.readouterr().out)
    assert {who: text.strip() for who, text in zip(parts[1::2], parts[2::2], strict=True)} == {"base": plain, "x": tuned}


def test_chat_takes_it_off_and_on(folder, capsys, monkeypatch):

    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n/base\n/reset\nabc\n/adapter x\n/reset\nabc\n"))
    chat.main([str(folder / "run"), "--adapter", f"x={place(folder, 'prompt')}", *OPTIONS])
    tuned, plain = expected(folder, "prompt"), expected(folder, None)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [tuned, plain, tuned]


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
