"""Several adapters on the command line: generate and chat with runs and PEFT's folders on one base, and what does not belong together."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlite import chat, combine, export, generate
from qlite.errors import AdapterError, DataError, shown
from qlite.formats.peft import write_adapter
from qlite.methods.lora import LoRA
from qlite.serving import bank as banks
from qlite.serving.answer import Sampling, answer_ids
from qlite.training import open_bank as opening
from qlite.training.open_run import open_run
from qlite.training.provenance import read_provenance
from qlite.training.run_folder import RunFolder
from tests.adapters import put_on
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE

PROMPTS = ("abc", "fade")
OPTIONS = ["--max-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two finished runs over one base in 4 bit, ``run`` and ``dora``, and ``peft``, an adapter without a run."""
    folder = tmp_path_factory.mktemp("adapters")
    few = {"steps": 12, "accumulation": 1, "eval_every": 0, "exact_match_rows": 0}
    same = {"base": {"dtype": "float32"}, "optimizer": {"lr": 2e-2}}  # float32: where the order of sums changes no word
    run(tiny_recipe(folder, train=few, **same))
    changes = {"rank": 3, "dora": True, "targets": "attention"}
    dora = {"dir": str(folder / "dora"), "save_every": 20}
    run(tiny_recipe(folder, train={**few, "seed": 7}, method=changes, output=dora, data={"system": "Backwards."}, **same))
    shutil.copytree(folder / "run" / "adapter", folder / "peft")
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    shutil.copytree(folder / "peft", folder / "nobodys")
    save_file(load_file(folder / "peft" / "adapter_model.safetensors"), folder / "nobodys" / "adapter_model.safetensors")
    return folder


def alone(path: Path, prompt: str, system: str | None) -> str:
    """Return the answer of a run opened by itself."""
    opened = open_run(RunFolder(path), "cpu", lambda *_: None)
    opened.attach()
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    (ids,) = answer_ids(opened.base.model, opened.encoder, [opened.encoder.encode_prompt(messages)], Sampling(6))
    return opened.encoder.decode([token for token in ids if token not in opened.encoder.stop_ids])


def adapters(folder: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("--adapter", f"{name}={folder / name}")]


def test_every_adapter_answers_every_prompt_in_one_batch_as_alone(folder, capsys, monkeypatch):
    chosen, use = [], banks.AdapterBank.use

    def listening(bank, names):
        chosen.append(names)
        use(bank, names)

    monkeypatch.setattr(banks.AdapterBank, "use", listening)
    generate.main([*adapters(folder, "run", "dora", "peft"), *(w for p in PROMPTS for w in ("--prompt", p)), "--base", *OPTIONS])
    out, err = capsys.readouterr()
    expected = {name: alone(folder / name, "abc", system) for name, system in (("run", None), ("dora", "Backwards."))}
    first, second = out.removeprefix("> abc\n").split("> fade\n")
    parts = re.split(r"(?m)^(base|run|dora|peft):\n", first)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(said) == ["base", "run", "dora", "peft"]
    assert {name: said[name].strip() for name in expected} == {name: text.strip() for name, text in expected.items()}
    assert len(set(said.values())) > 2
    assert second.count(":\n") == 4
    assert [sorted(names) for names in chosen] == [sorted(["base", "run", "dora", "peft"] * 2)]
    assert err.startswith("[8 rows, ")
    assert "tokens/s together, peak memory" in err


def test_chat_swaps_the_adapter_in_place_and_its_system_message_with_it(folder, capsys, monkeypatch):
    lines = ["abc", "/adapter", "/adapter dora", "/reset", "abc", "/base", "/adapter run", "/reset", "abc", "/adapter nobody"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    with pytest.raises(AdapterError, match='no adapter is called "nobody"; there are "base", "run", "dora"'):
        chat.main([*adapters(folder, "run", "dora"), *OPTIONS])
    out, err = capsys.readouterr()
    tuned = [alone(folder / name, "abc", system) for name, system in (("run", None), ("dora", "Backwards."), ("run", None))]
    assert out == "".join(f"{text}\n" for text in tuned)
    told = [line for line in err.splitlines() if not line.startswith("[")]
    assert told[0] == "run answers, of: run, dora"
    assert told[1] == "dora answers, under the system message that it was trained with: Backwards."
    assert told[3] == "adapter off: the base model answers"
    assert told[4] == "run answers, under the system message that it was trained with: none"


def test_with_one_run_there_is_nothing_to_swap_and_chat_says_how_to(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter b\n"))
    chat.main([str(folder / "run"), *OPTIONS])
    assert capsys.readouterr().err == "only one adapter was given; to have a choice, begin with --adapter NAME=FOLDER for each\n"


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_run", lambda *_: pytest.fail("loaded"))
    other = tmp_path / "other"
    shutil.copytree(folder / "dora", other)
    identity = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps({**identity, "base.model": "0" * 32, "data.template": "1" * 32}))
    (other / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "empty").mkdir()
    given = [
        f"a={folder / 'run'}",
        f"a={folder / 'dora'}",
        f"base={folder / 'dora'}",
        "no_folder",
        f"gone={tmp_path / 'gone'}",
        f"empty={tmp_path / 'empty'}",
        f"other={other}",
    ]
    with pytest.raises(AdapterError) as error:
        generate.main(["--prompt", "abc", *(word for each in given for word in ("--adapter", each)), *OPTIONS])
    lines = str(error.value).splitlines()
    assert lines[0] == f'--adapter {shown(given[1])}: the name "a" is given twice; choose another'
    assert '"base" is the model without any adapter; choose another name' in lines[1]
    assert lines[2] == "--adapter no_folder: write NAME=FOLDER, for example a=runs/a"
    assert lines[3].endswith(f'there is no folder "{tmp_path / "gone"}"')
    assert "is neither the folder of a run (it has no recipe.toml) nor of a PEFT adapter (it has no adapter_config.json)" in lines[4]
    assert lines[5].startswith(f"other: was trained on another base model than {folder / 'run'}: ")
    assert "(00000000), not " in lines[5]
    assert lines[6] == (
        f"other: was trained with another chat template than {folder / 'run'}: "
        f'"{other / "template.jinja"}", not "{folder / "run" / "template.jinja"}"'
    )
    assert len(lines) == 7


def test_an_exported_adapter_is_refused_for_what_its_run_would_be(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_run", lambda *_: pytest.fail("loaded"))
    for number, key in enumerate(("base.model", "tokenizer", "data.template")):
        out = exported_as_of_another(folder / "run", tmp_path / str(number), key)
        with pytest.raises(
            AdapterError, match="^x: was trained (on|with) another (base model|tokenizer|chat template) than .*run: [^\\n]*$"
        ):
            generate.main(["--prompt", "abc", *adapters(folder, "run"), "--adapter", f"x={out}", *OPTIONS])


def test_an_exported_adapter_is_not_added_to_one_of_another_base_and_the_sum_says_what_it_is_of(folder, tmp_path, capsys):
    run_folder, out = folder / "run", tmp_path / "out"
    exported_as_of_another(run_folder, tmp_path / "other", "base.model")
    exported_as_of_another(run_folder, tmp_path / "rows", "data.train")
    with pytest.raises(AdapterError, match=r"other: was trained on another base model than .*run: .*\(00000000\), not "):
        combine.main([str(run_folder), str(tmp_path / "other"), "--out", str(out)])
    combine.main([str(run_folder), str(tmp_path / "rows"), "--out", str(out)])
    said, before = read_provenance(out), read_provenance(run_folder / "adapter")
    assert said["base"] == before["base"]
    assert said["identity"] == {key: value for key, value in before["identity"].items() if key != "data.train"}
    assert said["versions"]["qlite"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert str(folder).encode() not in (out / "adapter_model.safetensors").read_bytes()
    # It is held against others as a run is.
    with pytest.raises(AdapterError, match="other: was trained on another base model than .*out: "):
        combine.main([str(out), str(tmp_path / "other"), "--out", str(tmp_path / "more")])
    combine.main([str(out), str(folder / "nobodys"), "--out", str(tmp_path / "more")])
    assert read_provenance(tmp_path / "more")["identity"] == {}


def test_an_adapter_that_names_another_base_and_no_weights_is_told_of(folder, capsys):
    model = tiny_llama(vocab_size=VOCAB_SIZE)
    put_on(model, LoRA(rank=2), seed=0)
    write_adapter(folder / "strangers", model, LoRA(rank=2), "another/model")
    generate.main(["--prompt", "abc", *adapters(folder, "run", "strangers"), *OPTIONS])
    said = " ".join("".join(capsys.readouterr()).split())
    assert 'strangers: says that it is of "another/model" and does not say of which weights' in said


def exported_as_of_another(run_folder: Path, out: Path, key: str) -> Path:
    """Write the run's adapter into ``out`` as PEFT reads it, and let it say another hash of ``key``."""
    export.main(["--adapter", str(run_folder), "--out", str(out)])
    said = read_provenance(out)
    said["identity"][key] = "0" * 32
    save_file(load_file(out / "adapter_model.safetensors"), out / "adapter_model.safetensors", {"qlite": json.dumps(said)})
    return out


def test_an_adapter_of_other_shapes_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_run", lambda *_: pytest.fail("loaded"))
    model = tiny_llama(vocab_size=VOCAB_SIZE, intermediate_size=96, num_hidden_layers=3)
    put_on(model, LoRA(rank=2), seed=0)
    write_adapter(tmp_path / "wide", model, LoRA(rank=2), "another/model")
    with pytest.raises(AdapterError) as error:
        generate.main(["--prompt", "abc", *adapters(folder, "run"), *adapters(tmp_path, "wide"), *OPTIONS])
    assert str(error.value).splitlines() == [
        "wide: the base has no linear layer model.layers.2.mlp.down_proj (and 6 more)",
        "wide: it is for a model.layers.0.mlp.down_proj of [64, 96], and the base's is [64, 128] (and 5 more)",
    ]


def test_without_a_run_nobody_knows_the_base_and_with_one_named_it_is_its(folder, capsys):
    with pytest.raises(AdapterError, match="none of the adapters is a run of qlite's, so the base is not known; name a run"):
        generate.main(["--prompt", "abc", *adapters(folder, "peft"), *OPTIONS])
    generate.main([str(folder / "run"), "--prompt", "abc", *adapters(folder, "peft"), *OPTIONS])
    assert capsys.readouterr().out.startswith("peft:\n")


def test_a_name_is_given_twice_even_where_the_first_is_nowhere_and_its_run_is_not_missed(tmp_path):
    gone, also = f"a={tmp_path / 'gone'}", f"a={tmp_path / 'also'}"
    with pytest.raises(AdapterError) as error:
        generate.main(["--prompt", "abc", "--adapter", gone, "--adapter", also])
    first, second = str(error.value).splitlines()
    assert first.endswith(f'there is no folder "{tmp_path / "gone"}"')
    assert second.endswith('the name "a" is given twice; choose another')


def test_an_answer_ends_where_the_models_context_does(folder, capsys):
    asked = "a" * 2020
    generate.main(["--prompt", asked, *adapters(folder, "run", "peft"), "--max-tokens", "500", "--device", "cpu"])
    tokens = int(re.search(r"\[2 rows, (\d+) tokens", capsys.readouterr().err)[1])
    assert tokens <= 2 * 28


def test_one_row_is_called_a_row(folder, capsys):
    generate.main(["--prompt", "abc", *adapters(folder, "run"), *OPTIONS])
    assert capsys.readouterr().err.startswith("[1 row, ")


def test_a_message_that_cannot_be_answered_is_refused_as_from_one_adapter(folder):
    with pytest.raises(DataError, match="this model reads at most 2048: shorten it"):
        generate.main(["--prompt", "a" * 3000, *adapters(folder, "run", "peft"), *OPTIONS])


def test_several_prompts_to_one_run_are_answered_one_after_the_other(folder, capsys):
    generate.main([str(folder / "run"), "--prompt", "abc", "--prompt", "fade", *OPTIONS])
    out = capsys.readouterr().out
    assert out == "".join(f"> {prompt}\n{alone(folder / 'run', prompt, None)}\n" for prompt in PROMPTS)
