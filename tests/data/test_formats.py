"""Rows in every schema that data sets come in: told apart, read as conversations, or refused with the file and the line."""

import pytest

from qlite.data.encode import Encoder
from qlite.data.formats import FORMATS, Conversation, Reading, detect_format
from qlite.data.rows import Row
from qlite.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer

USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def row(fields: dict, number: int = 7) -> Row:
    return Row(fields, "a.jsonl", number)


def read(fields: dict, columns: dict | None = None, roles: dict | None = None) -> Conversation:
    """Return the conversation in ``fields``, whose format is found."""
    format = detect_format([row(fields)], columns or {})
    return Reading(format, columns or {}, roles or {}).to_conversation(row(fields))


def said(conversation: Conversation) -> list[str]:
    return [f"{m['role']}: {m['content']}" for m in conversation.messages]


@pytest.mark.parametrize(
    ("fields", "format", "messages"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt", ["user: p", "assistant: c"]),
        ({"prompt": "p", "completion": "c", "system": "s"}, "prompt", ["system: s", "user: p", "assistant: c"]),
        ({"prompt": [USER], "completion": [REPLY]}, "prompt", ["user: u", "assistant: a"]),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", ["user: i", "assistant: o"]),
        ({"instruction": "i", "output": "o", "text": "i o"}, "alpaca", ["user: i", "assistant: o"]),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", ["user: i\n\n### Input:\nx", "assistant: o"]),
        ({"instruction": "i", "context": "x", "response": "r"}, "dolly", ["user: i\n\n### Input:\nx", "assistant: r"]),
        ({"instruction": "i", "context": None, "response": "r"}, "dolly", ["user: i", "assistant: r"]),
        ({"messages": [USER, REPLY], "prompt": "p"}, "messages", ["user: u", "assistant: a"]),
        ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, "sharegpt", ["user: h", "assistant: g"]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
            "sharegpt",
            ["system: s", "user: h", "assistant: g"],
        ),
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, "choice", ["user: q", "assistant: y"]),
        ({"question": "q", "choices": ["x", "y"], "answer": "A"}, "choice", ["user: q", "assistant: x"]),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, "choice", ["user: q", "assistant: y"]),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}, "choice", ["user: q", "assistant: y"]),
        ({"text": "t"}, "text", ["text: t"]),
    ],
)
def test_formats_are_told_apart_by_their_fields(fields, format, messages):
    assert detect_format([row(fields)], {}) == format
    assert said(read(fields)) == messages


def test_these_are_the_formats():
    assert list(FORMATS) == ["messages", "sharegpt", "choice", "prompt", "alpaca", "dolly", "text"]


def test_a_multiple_choice_row_keeps_its_choices():
    conversation = read({"question": "q", "choices": ["x", "y", "z"], "answer": "B"})
    assert (conversation.choices, conversation.right) == (("x", "y", "z"), 1)


def test_tools_and_their_calls_are_kept_with_arguments_as_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    fields = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "name": "f"},
            REPLY,
        ],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    conversation = read(fields)
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert conversation.messages[1]["content"] == ""
    assert conversation.messages[2] == {"role": "tool", "content": "2", "name": "f"}


def test_messages_in_a_cell_of_a_table_are_read_from_their_json():
    assert said(read({"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'})) == [
        "user: u",
        "assistant: a",
    ]


def test_text_parts_of_openai_are_joined():
    assert (
        said(read({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, REPLY]}))[0]
        == "user: ab"
    )


def test_answers_can_be_switched_off():
    assert read({"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]}).untrained == {1}
    # Of a conversational prompt only the completion is learnt.
    assert read({"prompt": [USER, REPLY, USER], "completion": [REPLY]}).untrained == {1}


def test_what_follows_the_last_answer_is_left_off():
    assert said(read({"messages": [USER, REPLY, USER]})) == ["user: u", "assistant: a"]


def test_a_system_message_is_put_in_front_of_conversations_without_one():
    conversation = read({"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]}).with_system("s")
    assert said(conversation)[0] == "system: s"
    assert conversation.untrained == {2}
    assert said(conversation.with_system("t"))[0] == "system: s"
    assert said(read({"text": "t"}).with_system("s")) == ["text: t"]


# Columns and roles


@pytest.mark.parametrize(
    ("fields", "columns", "messages"),
    [
        ({"mr": "m", "ref": "r"}, {"prompt": "mr", "completion": "ref"}, ["user: m", "assistant: r"]),
        ({"instruction": "i", "instances": [{"output": "o"}]}, {"output": "instances.0.output"}, ["user: i", "assistant: o"]),
        ({"a.b": "dotted", "out": "o"}, {"prompt": "a.b", "completion": "out"}, ["user: dotted", "assistant: o"]),
        ({"t": "title", "n": 3, "o": "o"}, {"prompt": "{t} no. {n}", "completion": "o"}, ["user: title no. 3", "assistant: o"]),
        (
            {"turns": [{"who": "user", "says": "h"}, {"who": "bot", "says": "b"}]},
            {"messages": "turns", "role": "who", "content": "says"},
            ["user: h", "assistant: b"],
        ),
    ],
)
def test_columns_are_found_under_their_names_paths_and_in_texts(fields, columns, messages):
    assert said(read(fields, columns)) == messages


def test_a_brace_in_the_data_is_no_column():
    assert said(read({"a": "{b}", "o": "o"}, {"prompt": "> {a}", "completion": "o"}))[0] == "user: > {b}"


def test_a_text_of_columns_of_which_a_row_has_only_some_is_refused():
    reading = Reading("alpaca", {"input": "{context} {hint}"})
    assert said(reading.to_conversation(row({"instruction": "i", "output": "o"})))[0] == "user: i"
    with pytest.raises(DataError, match='a.jsonl line 7: data.columns.input = "{context} {hint}": the row has no "hint"'):
        reading.to_conversation(row({"instruction": "i", "output": "o", "context": "c"}))


def test_roles_are_named_by_the_recipe():
    fields = {"messages": [{"role": "USER", "content": "h"}, {"role": "SYSTEM", "content": "b"}]}
    assert said(read(fields, roles={"assistant": "SYSTEM"})) == ["user: h", "assistant: b"]


# What is refused


BAD_ROWS = [
    ({"question": "q"}, None, "fields 'question' fit no format"),
    ({}, None, "no fields fit no format"),
    ({"prompt": None, "completion": "c"}, None, "fit no format"),
    ({"prompt": "p"}, "prompt", 'no field "completion", which format "prompt" needs; it has \'prompt\''),
    ({"prompt": "p", "completion": 3}, "prompt", 'field "completion" is a number, not text'),
    ({"prompt": "p", "completion": "\ud800"}, "prompt", 'field "completion" holds half a surrogate pair (\\ud800)'),
    ({"messages": []}, "messages", 'field "messages" is a list; it should be a list of messages'),
    ({"messages": "text"}, "messages", 'field "messages" is a text'),
    ({"messages": [{"role": "user"}]}, "messages", 'message 1 should have "role" and "content", and has \'role\''),
    ({"messages": [USER, "a"]}, "messages", "message 2 should have"),
    ({"messages": [{"role": "narrator", "content": "n"}]}, "messages", 'message 1 is of role "narrator", which is unknown'),
    ({"messages": [{"role": ["user"], "content": "n"}]}, "messages", "which is unknown"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, "messages", "only text can be trained on"),
    ({"messages": [{"from": "human", "value": "h"}]}, "messages", 'data.columns = { role = "…", content = "…" }'),
    ({"messages": [USER, {**REPLY, "tool_calls": "oops"}]}, "messages", "tool_calls of message 2 is a text; it should be a list"),
    ({"messages": [USER, {**REPLY, "tool_calls": [3]}]}, "messages", "a tool call of message 2 is a number"),
    ({"messages": [USER]}, "messages", "the assistant says nothing in it"),
    ({"messages": [USER, REPLY], "tools": "no json"}, "messages", 'field "tools" is a text'),
    ({"question": "q", "choices": ["x"], "answer": 0}, "choice", "two texts or more"),
    ({"question": "q", "choices": ["x", "y"], "answer": 2}, "choice", "answer 2 is none of the 2 choices"),
    ({"question": "q", "choices": ["x", "y"], "answer": True}, "choice", "answer true is none of the 2 choices"),
    ({"question": "q", "choices": ["x", 5], "answer": 0}, "choice", "choice 2 is a number"),
]


@pytest.mark.parametrize(("fields", "format", "words"), BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(fields, format, words):
    with pytest.raises(DataError) as error:
        Reading(format).to_conversation(row(fields)) if format else detect_format([row(fields)], {})
    assert str(error.value).startswith("a.jsonl line 7: ")
    assert words in str(error.value)


def test_rows_of_two_formats_in_one_file_are_both_named():
    rows = [row({"prompt": "p", "completion": "c"}, 1), row({"text": "t"}, 2)]
    with pytest.raises(DataError, match=r'^a.jsonl line 2: .*"text", and a.jsonl line 1 is in format "prompt"; split the file'):
        detect_format(rows, {})


def test_the_alpaca_prompts_are_the_originals_word_for_word():
    tokenizer = tiny_tokenizer("alpaca")
    encoder = Encoder(tokenizer, tokenizer.chat_template)
    fields = {"instruction": "Add.", "input": "1 1", "output": "2"}
    wanted = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    )
    short = wanted.replace(", paired with an input that provides further context", "").replace("### Input:\n1 1\n\n", "")
    for given, prompt in ((fields, wanted), ({**fields, "input": ""}, short)):
        assert tokenizer.decode(encoder.encode_prompt(read(given).messages[:-1])) == prompt
