"""From files to rows that may be trained on: what would silently spoil a training is planted here, and refused with file, line and fix."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from qlite.data import encoding
from qlite.data.dataset import Data, DataSet
from qlite.data.sources import Source
from qlite.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer

GOOD = {"prompt": "p", "completion": "c"}


def save(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(tmp_path: Path, lengths: list[int]) -> str:
    return save(tmp_path / "rows.jsonl", [{"prompt": str(i), "completion": "c" * n} for i, n in enumerate(lengths)])


def load(source, tokens: int = 200, template: str | None = "chatml", note=lambda _: None, **keys) -> DataSet:
    """Return the data set after the checks that training makes."""
    data = Data(train=source, **keys).load(tiny_tokenizer(template), tokens, note)
    data.require_sound()
    return data


def refusal(source, **keys) -> str:
    with pytest.raises(DataError) as error:
        load(source, **keys)
    return str(error.value)


# What would spoil a training silently


def test_answers_cut_off_at_the_limit_are_refused(tmp_path):
    # Pain: rows are cut at the limit without a word, and the model learns to stop in mid-sentence or never.
    source = answers(tmp_path, [5] * 50 + [100])
    said = refusal(source, tokens=80)
    assert "train.tokens = 80: 1 of 51 rows (1.96 %) of data.train are longer and would be left out, first rows.jsonl line 51" in said
    assert 'data.allow = ["long"]' in said
    assert "python -m qlite.preview RECIPE" in said
    said = refusal(source, tokens=80, long_rows="cut_end", allow=("long",))
    assert (
        'data.long_rows = "cut_end": 1 of 51 rows (1.96 %) of data.train lose the token that ends the answer, first rows.jsonl line 51'
        in said
    )
    assert 'data.allow = ["unended"]' in said


def test_one_percent_of_long_rows_is_left_out_and_counted(tmp_path):
    notes = []
    data = load(answers(tmp_path, [5] * 99 + [100]), tokens=80, note=notes.append)
    assert len(data.train) == 99
    assert any("1 of 100 rows (1 %) are longer than train.tokens" in note for note in notes)


def test_rows_cut_at_their_start_keep_their_end(tmp_path):
    data = load(answers(tmp_path, [100]), tokens=80, long_rows="cut_start", allow=("long",))
    row = data.train[0]
    assert len(row) == 80
    assert row.ids[-1] in data.encoder.stop_ids
    assert row.trained[-1]


def test_rows_without_a_token_to_learn_are_refused(tmp_path):
    # Pain: every label is masked, and the loss is 0 or NaN. 28 rows of the classic Alpaca set have an empty answer.
    said = refusal(answers(tmp_path, [1, 0, 2, 0]))
    assert "data.train: 2 of 4 rows (50 %) have no token to learn" in said
    assert "first rows.jsonl line 2 and rows.jsonl line 4" in said
    assert 'data.allow = ["untrained"]' in said
    notes = []
    data = load(answers(tmp_path, [1, 0, 2, 0]), allow=("untrained",), note=notes.append)
    assert len(data.train) == 2
    assert any("2 of 4 rows (50 %) have nothing to learn and are left out, first rows.jsonl line 2" in note for note in notes)


def test_rows_whose_answers_are_all_switched_off_are_refused(tmp_path):
    off = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}
    on = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    assert "1 of 2 rows (50 %) have no token to learn" in refusal(save(tmp_path / "m.jsonl", [on, off]))


def test_a_template_that_is_in_the_rows_already_is_refused(tmp_path):
    # Pain: the template is applied twice, and every row begins and ends twice.
    row = {"prompt": "<|im_start|>user\nhi<|im_end|>\n", "completion": "c"}
    said = refusal(save(tmp_path / "t.jsonl", [row, GOOD]))
    assert "data.train: 1 of 2 rows (50 %) have a token of the model's own in their text, first t.jsonl line 1 (<|im_start|>)" in said
    assert 'format = "text"' in said
    assert len(load(save(tmp_path / "t.jsonl", [row, GOOD]), allow=("control",)).train) == 2


def test_a_second_beginning_of_text_in_a_row_is_refused(tmp_path):
    # Pain: double BOS.
    tokenizer = tiny_tokenizer("chatml", bos_token="<pad>")
    data = Data(train=save(tmp_path / "b.jsonl", [{"prompt": "<pad>hi", "completion": "c"}])).load(tokenizer, 200, lambda _: None)
    with pytest.raises(DataError, match=r"b.jsonl line 1 \(<pad>\)"):
        data.require_sound()


def test_pad_equal_to_the_end_token_masks_no_end(tmp_path):
    # Pain: pad == eos is masked in the labels, so the model never stops.
    tokenizer = tiny_tokenizer("alpaca", pad_token="<eos>")
    data = Data(train=answers(tmp_path, [1, 9])).load(tokenizer, 300, lambda _: None)
    assert all(row.ids[-1] == tokenizer.eos_token_id == data.encoder.pad_id and row.trained[-1] for row in data.train)


def test_held_out_rows_that_are_trained_on_are_said(tmp_path):
    train = save(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": "c"} for i in range(6)])
    test = save(tmp_path / "b.jsonl", [{"prompt": str(i), "completion": "c"} for i in range(4, 9)])
    notes = []
    load(train, test=test, note=notes.append)
    assert any("2 of 5 rows (40 %) held out are training rows, too" in note for note in notes)


def test_all_problems_are_said_at_once(tmp_path):
    rows = [{"prompt": "p", "completion": ""}, {"prompt": "<eos>", "completion": "c"}, {"prompt": "p", "completion": "c" * 300}]
    said = refusal(save(tmp_path / "all.jsonl", rows))
    assert [name in said for name in ('"long"', '"untrained"', '"control"')] == [True] * 3


def test_a_row_of_another_schema_is_named_by_file_and_line_or_left_out(tmp_path):
    source = save(tmp_path / "mixed.jsonl", [GOOD] * 20 + [{"text": "t"}, {**GOOD, "completion": 3}])
    assert refusal(source).startswith('data.train: mixed.jsonl line 21: no field "prompt", which format "prompt" needs')
    notes = []
    assert len(load(source, bad_rows="skip", note=notes.append).train) == 20
    (said,) = [note for note in notes if "do not fit" in note]
    assert "2 of 22 rows (9.09 %) do not fit their format and are left out, first data.train: mixed.jsonl line 21: no field" in said
    assert 'mixed.jsonl line 22: field "completion" is a number, not text' in said


def test_a_template_that_refuses_a_row_names_it_or_leaves_it_out(tmp_path):
    jinja = tmp_path / "strict.jinja"
    jinja.write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    source = save(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "no"}, GOOD])
    with pytest.raises(DataError, match="^rows.jsonl line 2: the chat template refuses this conversation: no"):
        Data(train=source, template=str(jinja)).load(tiny_tokenizer(), 200, lambda _: None)
    data = Data(train=source, template=str(jinja), bad_rows="skip").load(tiny_tokenizer(), 200, lambda _: None)
    assert data.train.row.tolist() == [0, 1]


def test_what_a_cut_leaves_without_an_answer_is_refused_and_left_out(tmp_path):
    source = save(tmp_path / "p.jsonl", [{"prompt": "p" * 100, "completion": "c"}, GOOD, GOOD])
    keys = {"tokens": 60, "long_rows": "cut_end"}
    said = refusal(source, **keys, allow=("long", "unended"))
    assert "1 of 3 rows (33.3 %) have no token to learn" in said
    assert "first p.jsonl line 1" in said
    assert len(load(source, **keys, allow=("long", "untrained")).train) == 2


def test_an_answer_that_ends_with_no_token_that_generation_stops_at_is_refused(tmp_path):
    # Pain: the model never stops. This template ends the turns of some with a token that generation does not know.
    jinja = tmp_path / "odd.jinja"
    jinja.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{{ '<pad>' if 'odd' in m.content else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    source = save(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "completion": "odd"}])
    data = Data(train=source, template=str(jinja)).load(tiny_tokenizer(), 200, lambda _: None)
    with pytest.raises(DataError, match=r"1 of 2 rows \(50 %\) do not end their answer with a token .* first rows.jsonl line 2"):
        data.require_sound()


def test_a_mapping_that_finds_nothing_is_refused(tmp_path):
    # Pain: options that are validated, documented, accepted, and read by nothing.
    source = save(tmp_path / "m.jsonl", [{"instruction": "i", "ctx": "important", "output": "o"}])
    assert load(source, columns={"input": "ctx"}).train
    assert 'data.columns.input = "contxt": no row has it; mend it, or remove it' in refusal(source, columns={"input": "contxt"})
    said = refusal(source, columns={"input": "ctx", "completion": "ctx"})
    assert 'data.columns.completion = "ctx": format "alpaca" reads no field "completion", but instruction, output, input, system' in said
    talk = save(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "u"}, {"role": "SYS", "content": "a"}]}])
    assert load(talk, roles={"assistant": "SYS"}).train
    said = refusal(
        save(tmp_path / "u.jsonl", [{"messages": [{"role": "user", "content": "u"}, {"role": "gpt", "content": "a"}]}]),
        roles={"assistant": "SYS"},
    )
    assert 'data.roles.assistant = "SYS": nobody in the data is called so' in said
    assert "data.stride = 5: only raw text is split into windows, and data.train has none" in refusal(source, stride=5)


def test_a_mapping_for_all_sources_need_not_be_of_use_to_each(tmp_path):
    sources = (
        Source(path=save(tmp_path / "a.jsonl", [{"q": "1", "completion": "c"}])),
        Source(path=save(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}]), columns={}),
    )
    assert len(load(sources, columns={"prompt": "q"}).train) == 2


def test_raw_text_in_which_the_template_is_applied_already_is_taken_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer("chatml", bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", tokenizer.bos_token_id)])
    source = save(tmp_path / "t.jsonl", [{"text": "<pad><|im_start|>user\nhi<|im_end|>"}, {"text": "abc"}])
    data = Data(train=source).load(tokenizer, 200, lambda _: None)
    data.require_sound()
    assert [tokenizer.decode(row.ids) for row in data.train] == ["<pad><|im_start|>user\nhi<|im_end|><eos>", "<pad>abc<eos>"]


def test_an_empty_text_teaches_nothing_and_is_said(tmp_path):
    said = refusal(save(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": ""}]), template=None)
    assert "1 of 2 rows (50 %) have no token to learn" in said
    assert "first t.jsonl line 2" in said


def test_reasoning_in_an_answer_is_no_control_token_and_an_end_token_in_a_tool_call_is(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    jinja = tmp_path / "think.jinja"
    jinja.write_text(
        "{# <think> #}{{ tools or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls or '' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>so"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]}
    good = Data(train=save(tmp_path / "a.jsonl", [{"messages": turns}]), template=str(jinja)).load(tokenizer, 300, lambda _: None)
    good.require_sound()
    bad = Data(train=save(tmp_path / "b.jsonl", [{"messages": [turns[0], call]}]), template=str(jinja)).load(tokenizer, 300, lambda _: None)
    with pytest.raises(DataError, match=r"b.jsonl line 1 \(<\|im_end\|>\)"):
        bad.require_sound()


def test_a_template_without_the_tokenizers_beginning_of_text_is_said(tmp_path):
    tokenizer = tiny_tokenizer("chatml", bos_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", tokenizer.bos_token_id)])
    jinja = tmp_path / "no_bos.jinja"
    jinja.write_text(tokenizer.chat_template.replace("{{ bos_token or '' }}", ""))
    for template, is_said in ((str(jinja), True), ("auto", False)):
        notes = []
        Data(train=save(tmp_path / "a.jsonl", [GOOD]), template=template).load(tokenizer, 200, notes.append)
        assert any("it writes no <pad>" in note for note in notes) == is_said


def test_nothing_short_enough_and_too_much_held_out_are_errors(tmp_path):
    source = answers(tmp_path, [200, 300])
    said = refusal(source, tokens=60)
    assert "train.tokens = 60: data.train has no row with an answer that is that short. The shortest has " in said
    assert "99 % at most 321; raise it" in said  # 300 letters, a prompt of 1 and 20 of ChatML's
    assert "data.held_out_rows = 2: there are only 2 rows in all" in refusal(source, tokens=600, held_out_rows=2)


def test_a_source_of_which_no_row_is_left_says_why(tmp_path):
    said = refusal(answers(tmp_path, [0, 0]), allow=("untrained",))
    assert said == (
        "data.train: no row is left to train on: 2 have no token to learn (an empty answer, or one that is switched off), "
        "first rows.jsonl line 1 and rows.jsonl line 2"
    )


# What is said and kept


def test_the_format_that_was_found_is_said(tmp_path):
    notes = []
    load(save(tmp_path / "a.jsonl", [GOOD]), note=notes.append)
    assert notes[0].endswith('a.jsonl in format "prompt" (found from its first rows)')
    notes.clear()
    load(save(tmp_path / "a.jsonl", [GOOD]), note=notes.append, format="prompt")
    assert notes[0].endswith('a.jsonl in format "prompt"')


def test_several_sources_are_mixed_by_weight(tmp_path):
    first = save(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "c"} for i in range(10)])
    second = save(tmp_path / "b.jsonl", [{"q": f"b{i}", "r": "c"} for i in range(4)])
    sources = (Source(path=first), Source(path=second, weight=2, columns={"prompt": "q", "completion": "r"}))
    data = load(sources)
    texts = [data.encoder.decode(row.ids[: row.answer_start]) for row in data.train]
    assert sum("user\na" in text for text in texts) == 10
    assert sum("user\nb" in text for text in texts) == 8
    assert [source["rows"] for source in data.parts[0].meta["sources"]] == [10, 4]


def test_what_weights_make_of_sources_is_said_and_one_that_vanishes_is_refused(tmp_path):
    first = save(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "c"} for i in range(20)])
    second = save(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "c"} for i in range(10)])
    notes = []
    load((Source(path=first, weight=2), Source(path=second)), note=notes.append)
    assert any("a.jsonl has weight 2: 40 rows an epoch of its 20" in note for note in notes)
    said = refusal((Source(path=first, weight=1e-9), Source(path=second)))
    assert "data.train[1].weight = 1e-09: leaves none of the 20 rows of" in said


@pytest.mark.parametrize(("systems", "common"), [(["s", "s"], "s"), (["s", "t"], ""), (["s", None], "")])
def test_a_system_message_that_all_rows_share_is_remembered(tmp_path, systems, common):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "system", "content": s}, *turns] if s else turns} for s in systems]
    assert load(save(tmp_path / "m.jsonl", rows)).system == common


def test_the_recipes_system_message_is_in_every_row_without_one(tmp_path):
    data = load(save(tmp_path / "m.jsonl", [GOOD, {**GOOD, "system": "own"}]), system="Be kind.")
    texts = [data.encoder.tokenizer.decode(row.ids) for row in data.train]
    assert ["Be kind." in text for text in texts] == [True, False]


def test_raw_text_needs_no_template_and_is_split_into_windows(tmp_path):
    source = save(tmp_path / "t.jsonl", [{"text": "x" * 25}])
    assert [len(row) for row in load(source, tokens=10, template=None).train] == [10, 10, 6]
    overlapping = load(source, tokens=10, template=None, stride=5).train
    assert [len(row) for row in overlapping] == [10, 10, 10, 10, 6]
    assert [int(row.trained.sum()) for row in overlapping] == [10, 5, 5, 5, 1]


def test_questions_of_held_out_rows_are_known_as_text(tmp_path):
    train = save(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "completion": "c"} for i in range(100)])
    data = load(train, held_out_rows=20)
    assert len(data.train) + len(data.test) == 100
    for index in range(20):
        prompt = data.encoder.decode(data.test[index].ids[: data.test[index].answer_start])
        assert data.question(index) in prompt
        assert data.question(index).startswith("question ")


# The cache


def test_rows_are_encoded_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    passes = []
    run = encoding._Encoding.run
    monkeypatch.setattr(encoding._Encoding, "run", lambda self: (passes.append(1), run(self))[1])
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    source = save(tmp_path / "a.jsonl", [GOOD, GOOD])

    def count(**keys) -> int:
        passes.clear()
        load(source, **keys)
        return len(passes)

    assert count() == 1
    assert count() == 0
    assert count(tokens=300) == 0  # only which rows are used depends on it
    assert count(loss_on="last") == 1
    assert count(template="alpaca") == 1
    assert count(system="s") == 1
    assert count(columns={"prompt": "prompt"}) == 1
    Path(source).write_text(json.dumps(GOOD) + "\n")
    assert count() == 1
    assert count() == 0


def test_a_pass_that_fails_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(DataError):
        load(save(tmp_path / "a.jsonl", [GOOD] * 2000 + [{"prompt": 3, "completion": "c"}]))
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_many_batches_keep_the_order_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_ROWS", 7)
    data = load(save(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": str(i)} for i in range(100)]))
    assert [data.encoder.decode(row.ids[row.answer_start :]) for row in data.train] == [str(i) for i in range(100)]
    assert [data.train.where(i) for i in (0, 99)] == ["a.jsonl line 1", "a.jsonl line 100"]


def test_other_code_encodes_anew(tmp_path, monkeypatch):
    # Ids of an older encoder would go on being trained.
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    source = save(tmp_path / "a.jsonl", [GOOD])
    first = load(source).identity
    monkeypatch.setattr(encoding, "_code_hash", lambda: "other")
    assert load(source).identity == first  # a run may go on: these rows are what they were
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 2


def test_all_code_between_a_file_and_its_ids_is_hashed(monkeypatch):
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.append(self.name), b"")[1])
    encoding._code_hash()
    assert {"rows.py", "tables.py", "formats.py", "template.py", "encode.py", "encoding.py", "store.py"} <= set(read)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    source = save(tmp_path / "a.jsonl", [GOOD] * 20)
    write = encoding._Encoding._write_row

    def growing(self, item, row):
        with Path(source).open("a") as file:
            file.write(json.dumps(GOOD) + "\n")
        write(self, item, row)

    monkeypatch.setattr(encoding._Encoding, "_write_row", growing)
    assert 'a.jsonl" has changed while it was read' in refusal(source)
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_a_file_that_changes_between_its_hash_and_its_reading_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    source = save(tmp_path / "a.jsonl", [GOOD])
    hash_of = encoding.fingerprint

    def hashed_then_written(*arguments):
        found = hash_of(*arguments)
        save(Path(source), [GOOD, GOOD])
        return found

    monkeypatch.setattr(encoding, "fingerprint", hashed_then_written)
    assert 'a.jsonl" has changed while it was read' in refusal(source)
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_a_store_larger_than_the_cache_may_be_is_used_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(encoding, "CACHE_BYTES", 1)
    data = load(save(tmp_path / "a.jsonl", [GOOD]), test=save(tmp_path / "b.jsonl", [{**GOOD, "prompt": "q"}]))
    assert (len(data.train), len(data.test)) == (1, 1)


def test_the_cache_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(encoding, "CACHE_BYTES", 3000)
    for number in range(4):
        load(save(tmp_path / "a.jsonl", [{"prompt": str(number), "completion": "c" * 100}]))
    kept = list((tmp_path / "cache" / "encoded").iterdir())
    assert 1 <= len(kept) < 4
