"""What goes to the hub, and what is said where it does not get there: against a server that speaks the hub's language."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from qlite import export
from qlite.errors import ExportError, MachineError, RecipeError, RunError
from qlite.files import new_folder, write_json, write_text
from qlite.formats.peft import WEIGHTS
from qlite.hashes import sha256
from qlite.training.pushing import pack
from qlite.training.run_folder import RunFolder
from tests.hub_server import TOKEN, Hub, hub_server
from tests.tiny_run import run, tiny_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with its adapter exported."""
    folder = tmp_path_factory.mktemp("secret-place")
    run(tiny_recipe(folder, train={"steps": 2, "accumulation": 1}))
    export.main(["--adapter", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A run with the same recipe but for its seed, finished before the exports that the tests make."""
    folder = tmp_path_factory.mktemp("another")
    run(tiny_recipe(folder, train={"steps": 2, "accumulation": 1, "seed": 5}))
    return folder / "run"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its attempts
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(finished: Path, *more: str, what: str = "--adapter") -> None:
    export.main([what, str(finished), "--push", "ann/orders", *more])


def test_an_adapter_arrives_private_whole_and_with_a_card_that_names_no_folder(finished, hub, capsys):
    push(finished)
    there = hub.repositories["ann/orders"]
    assert there["private"] is True
    sent = there["files"]
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert sent["adapter_model.safetensors"] == (finished / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "base"
    card = sent["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\ntags: [qlite, lora]\n---\n\n# run\n")
    assert 'train = "train.jsonl"' in card
    assert not any(b"secret-place" in content for content in sent.values())
    told = capsys.readouterr().out
    assert f"sent: {hub.url}/ann/orders" in told
    assert TOKEN not in told


def test_a_dry_run_shows_every_file_and_the_card_and_asks_the_hub_nothing(finished, hub, capsys):
    push(finished, "--dry-run", "--public")
    lines = capsys.readouterr().out.splitlines()
    size = (finished / "peft/adapter_config.json").stat().st_size
    assert f"{finished / 'peft'} -> ann/orders (public: anybody can read it): 3 files," in lines[0]
    assert lines[2].split() == ["adapter_config.json", str(size), "B"]
    assert "  library_name: peft" in lines
    assert lines[-1] == "Nothing was sent (--dry-run)."
    assert hub.asked == []


def test_a_merged_model_and_what_earlier_versions_wrote_lose_the_folders_on_the_way(finished, hub, capsys):
    export.main(["--gguf-adapter", str(finished)])
    old = finished / "gguf-adapter"
    (old / "Modelfile").write_text(f"FROM {finished.parent}/base/x.gguf\nADAPTER ./run-lora.gguf\n")
    (old / "README.md").write_text(f'# run\ntrain = "{finished.parent}/train.jsonl"\n')
    write_manifest(old)
    push(finished, "--public", what="--gguf-adapter")
    sent = hub.repositories["ann/orders"]
    assert sent["private"] is False
    assert sent["files"]["Modelfile"] == b"FROM ./x.gguf\nADAPTER ./run-lora.gguf\n"
    assert sent["files"]["README.md"] == b'# run\ntrain = "train.jsonl"\n'
    assert "(folders of this machine taken out)" in capsys.readouterr().out
    shutil.rmtree(old)


def test_a_tokenizer_is_sent_as_it_is_wherever_the_command_is_typed(finished, tmp_path, monkeypatch):
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(work)  # one level below: messages have the home folder as ".."
    texts = dict.fromkeys(
        ("tokenizer.json", "vocab.json", "tokenizer_config.json", "x/config.json"), '{"../": 1, "../../": 2, "\\n../": 3}'
    )
    texts |= {"merges.txt": "../ ..", "chat_template.jinja": "see ../x", "audit.json": '{"x": "../x"}', "README.md": "see ../x"}
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").mkdir()
        for name, text in texts.items():
            write_text(folder / name, text)
    parcel = pack(tmp_path / "out", RunFolder(finished).recipe(), "ann/orders", is_public=False)
    assert set(parcel.sizes) == set(texts)
    assert parcel.texts == {"README.md": b"see x", "audit.json": b'{"x": "x"}'}


def refused(arguments: list[str]) -> str:
    with pytest.raises(RunError) as error:
        export.main([*arguments, "--push", "ann/orders", "--dry-run"])
    assert "--force writes it anew, or give another --out" in str(error.value)
    return str(error.value)


def test_only_the_run_that_is_named_is_sent_in_the_form_that_is_asked_for(finished, other, tmp_path, capsys):
    peft, lora = tmp_path / "peft", tmp_path / "lora"
    export.main(["--adapter", str(other), "--out", str(peft)])
    export.main(["--gguf-adapter", str(other), "--out", str(lora)])
    assert "was written with --adapter, and this asks for --gguf q8_0" in refused(["--gguf", "Q8_0", str(finished), "--out", str(peft)])
    assert "was written with --gguf-adapter, and this asks for --adapter" in refused(["--adapter", str(other), "--out", str(lora)])
    for form, out in (("--adapter", peft), ("--gguf-adapter", lora)):
        assert f'holds another adapter than "{finished}" does' in refused([form, str(finished), "--out", str(out)])
        export.main([form, str(other), "--out", str(out), "--push", "ann/orders", "--dry-run"])
        assert capsys.readouterr().out.endswith("Nothing was sent (--dry-run).\n")


@pytest.mark.parametrize(
    ("audit", "options", "told"),
    [
        ({"dtype": "float16", "onto": "original"}, ["--merge"], None),
        ({"dtype": "float16", "onto": "original"}, ["--merge", "--onto", "original"], None),
        (
            {"dtype": "bfloat16", "onto": "original"},
            ["--merge"],
            "was written with --merge --dtype bf16, and this asks for --merge --dtype fp16",
        ),
        ({"dtype": "float16", "onto": "dequantised"}, ["--merge", "--onto", "original"], "is merged over the dequantised weights"),
        ({"type": "q8_0", "onto": "original"}, ["--gguf", "q4_0"], "was written with --gguf q8_0, and this asks for --gguf q4_0"),
        ({"type": "q8_0", "onto": "original", "adapter_sha256": "0"}, ["--gguf", "q8_0"], "holds another adapter than"),
        ({"type": "q8_0", "onto": "original", "adapter_sha256": None}, ["--gguf", "q8_0"], "does not say whether it is of the run"),
        ({}, ["--merge"], "is no export that this knows"),
    ],
)
def test_what_an_audit_says_of_an_export_decides_whether_it_is_sent(finished, tmp_path, capsys, audit, options, told):
    with new_folder(tmp_path / "out") as folder:
        write_text(folder / "README.md", "# run")
        write_json(folder / "audit.json", {"adapter_sha256": sha256(finished / "adapter" / "adapter_model.safetensors"), **audit})
    arguments = [*options, str(finished), "--out", str(tmp_path / "out")]
    if told:
        assert told in refused(arguments)
    else:
        export.main([*arguments, "--push", "ann/orders", "--dry-run"])
        assert "Nothing was sent (--dry-run)." in capsys.readouterr().out


@pytest.mark.parametrize("method", [{"init": "pissa", "rank": 4}, {"name": "prefix"}], ids=lambda method: next(iter(method.values())))
def test_an_adapter_whose_file_for_peft_is_another_than_the_runs_own_is_sent_as_it_was_shown(tmp_path, hub, method):
    run(tiny_recipe(tmp_path, method=method, train={"steps": 2, "accumulation": 1, "exact_match_rows": 0}))
    finished = RunFolder(tmp_path / "run")
    assert sha256(finished.adapter / WEIGHTS) != sha256(finished.peft_adapter / WEIGHTS)
    push(finished.path, "--dry-run")
    push(finished.path)
    assert sha256(finished.peft_adapter / WEIGHTS) == hashlib.sha256(hub.repositories["ann/orders"]["files"][WEIGHTS]).hexdigest()


def write_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({path.name: sha256(path) for path in folder.iterdir()}))


def test_after_a_break_the_same_command_goes_on_and_sends_no_large_file_twice(finished, hub):
    hub.breaks_at = "/commit/"
    with pytest.raises(MachineError, match="The same command goes on: what the hub has got is not sent again"):
        push(finished)
    assert hub.repositories["ann/orders"]["files"] == {}
    hub.breaks_at, hub.asked[:] = None, []
    push(finished)
    assert len(hub.repositories["ann/orders"]["files"]) == 3
    assert not [each for each in hub.asked if each.startswith("PUT")]


def test_a_second_push_of_the_same_names_is_one_more_commit(finished, hub):
    push(finished)
    push(finished)
    assert sum("/commit/" in each for each in hub.asked) == 2


@pytest.mark.parametrize(
    ("there", "more", "told"),
    [
        ({"private": True, "files": {"model.bin": b""}}, (), "holds something else (model.bin); give another name"),
        ({"private": False, "files": {}}, (), "is there already and is public; add --public, or change it in its settings"),
        ({"private": True, "files": {}}, ("--public",), "is there already and is private; leave out --public"),
    ],
)
def test_a_repository_that_is_something_else_stays_as_it_is(finished, hub, there, more, told):
    hub.repositories["ann/orders"] = there
    before = dict(there["files"])
    with pytest.raises(RecipeError) as error:
        push(finished, *more)
    assert told in str(error.value)
    assert there["files"] == before


@pytest.mark.parametrize(
    ("token", "writable", "told"),
    [
        (None, ("ann",), "nobody is logged in; run `hf auth login`"),
        ("hf_other", ("ann",), "the hub does not know the token that is kept here"),
        (TOKEN, (), 'the hub lets this token write nothing there; is "ann" you or an organisation of yours'),
    ],
)
def test_who_may_not_write_is_told_what_to_do(finished, hub, monkeypatch, token, writable, told):
    hub.writable = writable
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RecipeError) as error:
        push(finished)
    assert told in str(error.value)
    assert str(token) not in str(error.value)


def test_without_a_network_it_says_what_to_type(finished, hub):
    hub.breaks_at = "/api"
    with pytest.raises(MachineError, match="the hub could not be reached, or broke off"):
        push(finished)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--push", "orders"], '--push "orders": should be ORG/NAME'),
        (["--push", "a/b/c"], "should be ORG/NAME"),
        (["--push", "a/b c"], "should be ORG/NAME"),
        (["--dry-run"], "--dry-run: says how something is sent; add --push ORG/NAME"),
        (["--public"], "--public: says how something is sent"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_done(arguments, told):
    with pytest.raises(RecipeError) as error:
        export.main(["--adapter", "nowhere", *arguments])
    assert told in str(error.value)


def test_only_what_was_written_whole_and_after_the_training_is_sent(finished, hub, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "peft", out)
    (out / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ExportError, match="is no whole export"):
        push(finished, "--out", str(out))
    os.utime(out / "manifest.json", (0, 0))
    with pytest.raises(RunError, match="is older than the end of the run"):
        push(finished, "--out", str(out))
    assert hub.asked == []
