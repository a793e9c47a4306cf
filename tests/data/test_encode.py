"""What is trained is the answer and its end token; what generation asks with is what training saw before the answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlite.data.encode import Encoder
from qlite.data.template import TEMPLATES
from qlite.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
text = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=12)
words = text.filter(lambda s: s.strip() == s)


def trained_text(encoder: Encoder, messages: list[dict]) -> str:
    encoded = encoder.encode(messages)
    return encoder.tokenizer.decode([i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t])


def test_every_answer_and_its_end_token_are_trained_and_nothing_else():
    assert trained_text(Encoder(tiny_tokenizer()), TALK) == "1<|im_end|>2<|im_end|>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_ends_with_a_token_that_generation_stops_at(template):
    encoder = Encoder(tiny_tokenizer(template))
    encoded = encoder.encode(TALK)
    assert encoded.ids[-1] in encoder.stop_ids
    assert encoded.trained[-1]


@settings(deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from(sorted(TEMPLATES)))
def test_the_ids_chat_would_send_are_those_training_saw_before_each_answer(turns, template):
    encoder = Encoder(tiny_tokenizer(template))
    messages = [m for user, answer in turns for m in ({"role": "user", "content": user}, {"role": "assistant", "content": answer})]
    ids, trained = (lambda e: (e.ids, e.trained))(encoder.encode(messages))
    for index in range(0, len(messages), 2):
        prompt = encoder.encode_prompt(messages[: index + 1])
        assert ids[: len(prompt)] == prompt
        assert not trained[len(prompt) - 1]
        assert trained[len(prompt)]


@settings(deadline=None)
@given(words, words)
def test_what_is_trained_decodes_to_the_answer(user, answer):
    encoder = Encoder(tiny_tokenizer())
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    encoded = encoder.encode(messages)
    start = encoded.trained.index(True)
    assert encoder.decode(encoded.ids[start:]) == answer


def test_a_tokenizer_whose_pad_is_its_end_token_still_trains_the_end_token():
    encoder = Encoder(tiny_tokenizer("alpaca", pad_token="<eos>"))
    encoded = encoder.encode(TALK[1:3])
    assert encoded.ids[-1] == encoder.tokenizer.eos_token_id == encoder.pad_id
    assert encoded.trained[-1]


def test_a_template_without_an_end_token_gets_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert trained_text(Encoder(tokenizer), TALK[1:3]) == "1<eos>"


def test_raw_text_is_trained_as_a_whole_and_ended():
    encoded = Encoder(tiny_tokenizer()).encode([{"role": "text", "content": "abc"}])
    assert all(encoded.trained)
    assert len(encoded) == 4


def test_without_any_template_the_key_and_the_choices_are_named():
    with pytest.raises(DataError, match='data.template: .* "alpaca", "chatml", "plain"'):
        Encoder(tiny_tokenizer(None))


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DataError, match="no end-of-text token"):
        Encoder(tiny_tokenizer(eos_token=None))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="rows.jsonl line 3"):
        Encoder(tokenizer).encode(TALK[1:], "rows.jsonl line 3")


def test_a_template_that_refuses_a_role_names_the_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match="rows.jsonl line 3.*no system messages"):
        Encoder(tokenizer).encode(TALK, "rows.jsonl line 3")
