"""What is trained is the answer and its end token; what generation asks with is what training saw before the answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlite.data.encode import ALL, ANSWERS, LAST, Encoded, Encoder
from qlite.data.formats import Conversation
from qlite.data.template import TEMPLATES, find_template, freeze_date
from qlite.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
# Gives an earlier answer without its reasoning, as Qwen3 and DeepSeek do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
text = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=12)
words = text.filter(lambda s: s.strip() == s and "<" not in s)  # no control tokens: they are refused


def encoder(template: str | None = "chatml", loss_on: str = ANSWERS, **special) -> Encoder:
    tokenizer = tiny_tokenizer(template, **special)
    return Encoder(tokenizer, tokenizer.chat_template, loss_on)


def with_template(jinja: str, loss_on: str = ANSWERS) -> Encoder:
    return Encoder(tiny_tokenizer(), jinja, loss_on)


def encode(own: Encoder, messages: list[dict], **more) -> Encoded:
    (row,) = own.encode(Conversation(messages, **more), "rows.jsonl line 3")
    return row


def trained_text(own: Encoder, messages: list[dict], **more) -> str:
    row = encode(own, messages, **more)
    return own.tokenizer.decode([i for i, t in zip(row.ids, row.trained, strict=True) if t])


# What is trained


def test_every_answer_and_its_end_token_are_trained_and_nothing_else():
    assert trained_text(encoder(), TALK) == "1<|im_end|>2<|im_end|>"


def test_only_the_last_answer_is_trained_where_the_recipe_says_so():
    assert trained_text(encoder(loss_on=LAST), TALK) == "2<|im_end|>"


def test_everything_is_trained_where_the_recipe_says_so():
    row = encode(encoder(loss_on=ALL), TALK)
    assert all(row.trained)
    assert row.ids == encode(encoder(), TALK).ids


def test_a_switched_off_answer_is_read_and_not_trained():
    assert trained_text(encoder(), TALK, untrained=frozenset([2])) == "2<|im_end|>"


def test_an_empty_answer_teaches_nothing():
    empty = [*TALK[:4], {"role": "assistant", "content": " "}]
    assert trained_text(encoder(), empty) == "1<|im_end|>"
    assert encode(encoder(), [TALK[1], empty[-1]]).trained_tokens == 0


def test_what_the_last_answer_begins_with_is_known():
    row = encode(encoder(), TALK)
    own = encoder()
    assert own.tokenizer.decode(row.ids[row.answer_start :]) == "2<|im_end|>"
    assert list(row.ids[: row.answer_start]) == own.encode_prompt(TALK[:-1])


@settings(deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from([ANSWERS, LAST, ALL]), st.sampled_from(sorted(TEMPLATES)))
def test_trained_are_exactly_the_tokens_of_the_answers_that_the_mask_means(turns, loss_on, template):
    own = encoder(template, loss_on)
    messages = [m for user, answer in turns for m in ({"role": "user", "content": user}, {"role": "assistant", "content": answer})]
    row = encode(own, messages)
    end = "<|im_end|>" if template == "chatml" else "<eos>"
    answers = [f"{answer}{end}" for _, answer in turns]
    got = own.tokenizer.decode([i for i, t in zip(row.ids, row.trained, strict=True) if t])
    whole = own.tokenizer.decode(row.ids)
    assert got == {ANSWERS: "".join(answers), LAST: answers[-1], ALL: whole}[loss_on]
    assert row.trained[-1]
    assert row.ids[-1] in own.stop_ids


@settings(deadline=None)
@given(words, words)
def test_what_is_trained_decodes_to_the_answer(user, answer):
    own = encoder()
    row = encode(own, [{"role": "user", "content": user}, {"role": "assistant", "content": answer}])
    assert own.decode(row.ids[row.answer_start :]) == answer


# The law: what chat sends is what training saw


@settings(deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from([*sorted(TEMPLATES), "forgetful"]), st.booleans())
def test_the_ids_chat_would_send_are_those_training_saw_before_each_answer(turns, template, has_system):
    own = with_template(FORGETFUL) if template == "forgetful" else encoder(template)
    messages = [m for user, answer in turns for m in ({"role": "user", "content": user}, {"role": "assistant", "content": answer})]
    messages = [{"role": "system", "content": "S"}, *messages] if has_system else messages
    row = encode(own, messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = own.encode_prompt(messages[:index])
            assert list(row.ids[: len(prompt)]) == prompt
            assert not row.trained[len(prompt) - 1]
            assert row.trained[len(prompt)]


@settings(deadline=None)
@given(st.lists(st.tuples(words, words, words), min_size=2, max_size=4))
def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_of_them_as_chat_would_send_it(turns):
    own = with_template(FORGETFUL)
    messages = []
    for user, thought, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": f"{thought}</think>{answer}"}]
    rows = own.encode(Conversation(messages))
    assert len(rows) == len(turns)
    for number, row in enumerate(rows):
        prompt = own.encode_prompt(messages[: 2 * number + 1])
        assert list(row.ids[: row.answer_start]) == prompt
        assert own.decode(row.ids[row.answer_start :]) == messages[2 * number + 1]["content"]
        assert list(row.trained) == [index >= row.answer_start for index in range(len(row))]


def test_a_batch_is_encoded_as_each_conversation_alone():
    own = encoder()
    talks = [
        Conversation(TALK),
        Conversation([{"role": "text", "content": "abc"}]),
        Conversation(TALK[1:3]),
        Conversation([{"role": "text", "content": ""}]),
    ]
    together = own.encode_many(talks, ["a", "b", "c", "d"])
    assert together == [own.encode(talk) for talk in talks]


def mistral_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before whatever it is given, as Llama 2's and Mistral's do."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"[INST]/abc?"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(letters))}
    for word in ("▁a", "▁b", "▁c"):
        vocab[word] = len(vocab)
    merges = [("▁", letter) for letter in "abc"]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return fast


def test_an_answer_behind_a_prompt_gets_no_second_space():
    tokenizer = mistral_like()
    own = Encoder(tokenizer, tokenizer.chat_template)
    row = encode(own, [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "a"}])
    assert tokenizer.convert_ids_to_tokens(row.ids[row.answer_start :]) == ["▁a", "</s>"]
    whole = tokenizer(
        own.tokenizer.apply_chat_template([{"role": "user", "content": "b?"}], tokenize=False) + " a</s>", add_special_tokens=False
    )
    assert list(row.ids) == whole["input_ids"]


# Beginning and end


def test_there_is_one_beginning_of_text_token_whoever_writes_it():
    # The fault this guards against: the template writes it, and the tokenizer adds another one.
    tokenizer = tiny_tokenizer("chatml", bos_token="<pad>")
    own = Encoder(tokenizer, tokenizer.chat_template)
    assert encode(own, TALK).ids.count(tokenizer.bos_token_id) == 1
    assert own.encode_prompt(TALK[:2]).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_ends_with_a_token_that_generation_stops_at(template):
    own = encoder(template)
    row = encode(own, TALK)
    assert row.ids[-1] in own.stop_ids
    assert row.trained[-1]


def test_a_tokenizer_whose_pad_is_its_end_token_still_trains_the_end_token():
    own = encoder("alpaca", pad_token="<eos>")
    row = encode(own, TALK[1:3])
    assert row.ids[-1] == own.tokenizer.eos_token_id == own.pad_id
    assert row.trained[-1]


def test_a_template_without_an_end_token_gets_one():
    own = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert trained_text(own, TALK[1:3]) == "1<eos>"


def test_what_a_template_writes_behind_the_end_of_a_turn_is_not_learnt():
    # Phi-3 closes the whole conversation with another token; the model is to stop at the turn's own.
    own = with_template(TEMPLATES["chatml"] + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    assert trained_text(own, TALK) == "1<|im_end|>2<|im_end|>"
    assert own.tokenizer.convert_tokens_to_ids("<|im_end|>") in own.stop_ids


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<eos>think</eos>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<pad>{{ call.function.name }}<pad>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", ["think", "end", "im", "n", "<eos", "think</eos>"])
def test_an_answer_that_also_stands_in_the_templates_own_text_is_trained_whole(content):
    answer = [TALK[1], {"role": "assistant", "content": content}]
    assert trained_text(with_template(THINKING), answer) == f"<eos>think</eos>\n{content}<|im_end|>"


def test_a_tool_call_behind_the_content_is_trained_to_its_end():
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert trained_text(with_template(THINKING), [TALK[1], call]) == "<eos>think</eos>\nI look.<pad>f<pad><|im_end|>"


# Templates of the kinds that models bring: what comes before, inside and behind an answer differs.
KINDS = {
    "header": (  # Llama 3: two lines of header, content trimmed
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
    ),
    "instruct": (  # Mistral: the system message inside the first question
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if messages[0].role == 'system' and loop.index0 == 1 %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    ),
    "closing": (  # Phi-3: another token behind the last turn
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
    ),
    "reasoning": (  # Qwen3: reasoning before the answer, and only in the last turn
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<pad>\n{{ m.reasoning_content or '' }}\n<pad>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "channels": (  # gpt-oss: reasoning and answer are turns of their own
        "{% for m in messages %}{% if m.reasoning_content %}<|im_start|>assistant analysis: {{ m.reasoning_content }}<|im_end|>{% endif %}"
        "<|im_start|>{{ m.role }} final: {{ m.content }}{{ '<eos>' if m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from(sorted(KINDS)), st.booleans())
def test_whatever_the_template_an_answer_is_trained_whole_to_its_end_and_asked_for_as_it_was(turns, kind, repeats):
    own = with_template(KINDS[kind])
    messages = []
    for user, answer in turns:
        # The same words in question, reasoning and answer: the last is meant.
        reasoning = {"reasoning_content": f"{answer} so {answer}"} if kind in ("reasoning", "channels") and repeats else {}
        messages += [{"role": "user", "content": answer if repeats else user}, {"role": "assistant", "content": answer, **reasoning}]
    rows = own.encode(Conversation(messages))
    assert all(own.is_ended(row) for row in rows)
    row, answer = rows[-1], turns[-1][1]
    assert own.tokenizer.decode(row.ids[row.answer_start :]).endswith((f"{answer}<|im_end|>", f"{answer}<eos>"))
    assert all(row.trained[row.answer_start :])
    assert list(row.ids[: row.answer_start]) == own.encode_prompt(messages[:-1])


def test_reasoning_that_the_template_leaves_out_is_refused():
    answer = [TALK[1], {"role": "assistant", "content": "1", "reasoning_content": "because"}]
    assert "because" in trained_text(with_template(KINDS["reasoning"]), answer)
    with pytest.raises(DataError, match="rows.jsonl line 3: the chat template leaves the assistant's reasoning out"):
        encode(encoder(), answer)


def test_a_tool_call_or_result_that_the_template_leaves_out_is_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    with pytest.raises(DataError, match="leaves a call of weather out"):
        encode(encoder(), [TALK[1], call])
    with pytest.raises(DataError, match="no place for the results of tools"):
        encode(encoder("alpaca"), [TALK[1], {"role": "tool", "content": "sunny"}, TALK[2]])


@pytest.mark.parametrize(
    ("shown", "calls", "words"),
    [
        ("{{ c.function.name }}", [("f", {"city": "Oslo"})], "leaves the assistant's argument of a call out"),
        (
            "{% if loop.first %}{{ c | tojson }}{% endif %}",
            [("weather", {"x": "1"}), ("weather", {"x": "1"})],
            "leaves a call of weather out",
        ),
    ],
)
def test_arguments_and_every_call_must_be_written(shown, calls, words):
    own = with_template(
        TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}" + shown + "{% endfor %}")
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": a}} for name, a in calls]}
    with pytest.raises(DataError, match=words):
        encode(own, [TALK[1], call])


def test_a_system_message_that_stands_in_the_templates_text_by_chance_is_still_left_out():
    own = with_template("{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match="leaves the system's message out"):
        encode(own, [{"role": "system", "content": "user"}, *TALK[1:3]])


def test_a_template_that_opens_a_reasoning_it_does_not_write_is_refused_with_both_texts():
    # DeepSeek-R1's kind: asked with "<think>", answered without.
    own = with_template(TEMPLATES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    with pytest.raises(DataError, match=r"asks for an answer with '<think>\\n' and writes '1<\|im_end\|>"):
        encode(own, TALK[1:3])


def test_a_conversation_that_the_assistant_opens_is_encoded_or_refused_by_its_template():
    assert trained_text(encoder(), TALK[2:3]) == "1<|im_end|>"
    own = with_template("{{ raise_exception('must begin with user') if not messages or messages[0].role != 'user' }}" + TEMPLATES["chatml"])
    with pytest.raises(DataError, match="line 3: the chat template refuses this conversation: must begin with user"):
        encode(own, TALK[2:3])


def test_a_file_that_is_no_jinja_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.jinja").write_text("{# messages #}\n{% for m in messages %}{{ m.content }")
    with pytest.raises(DataError, match=r'data.template: ".*broken.jinja" line 2: not Jinja \('):
        find_template(str(tmp_path / "broken.jinja"), tiny_tokenizer())
    (tmp_path / "marked.jinja").write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert "generation" in find_template(str(tmp_path / "marked.jinja"), tiny_tokenizer())


def test_raw_text_is_trained_as_a_whole_and_ended():
    row = encode(encoder(None), [{"role": "text", "content": "abc"}])
    assert all(row.trained)
    assert len(row) == 4
    assert row.answer_start == 0


def test_a_piece_of_a_text_that_goes_on_is_not_ended():
    assert (
        encode(encoder(None), [{"role": "text", "content": "abc"}], goes_on=True).ids
        == encode(encoder(None), [{"role": "text", "content": "abc"}]).ids[:-1]
    )


@pytest.mark.parametrize("post", ["$A", "<pad> $A", "$A <eos>", "<pad> $A <eos>"])
@pytest.mark.parametrize("text", ["abc", "<pad>abc"])
def test_a_raw_prompt_is_read_as_the_beginning_of_a_raw_text_is_in_training(post, text):
    tokenizer = tiny_tokenizer(None, bos_token="<pad>")
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>") if token in post]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=post, special_tokens=tokens)
    own = Encoder(tokenizer, None)
    asked = own.encode_prompt([{"role": "user", "content": text}])
    trained = encode(own, [{"role": "text", "content": text + "de"}]).ids
    assert trained[: len(asked)] == asked
    assert asked.count(tokenizer.bos_token_id) == (1 if "<pad>" in post + text else 0)
    assert trained.count(tokenizer.eos_token_id) == 1


def test_without_a_template_a_prompt_is_text_to_be_continued():
    own = encoder(None)
    assert own.decode(own.encode_prompt([{"role": "user", "content": "abc"}])) == "abc"
    assert own.stop_ids == [own.tokenizer.eos_token_id]


# What is refused


def test_a_conversation_without_any_template_is_refused_with_the_choices():
    with pytest.raises(DataError, match='data.template: .* "alpaca", "chatml", "plain" or a .jinja file'):
        encode(encoder(None), TALK)


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DataError, match="no end-of-text token"):
        encoder(eos_token=None)


@pytest.mark.parametrize(
    ("jinja", "words"),
    [
        ("{{ raise_exception('no system messages') }}", "refuses this conversation: no system messages"),
        ("{{ messages[9].content }}", "rows.jsonl line 3: the chat template refuses"),
        ("{{ messages[0].content + 1 }}", "rows.jsonl line 3: the chat template fails"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}",
            "leaves the system's message out",
        ),
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}",
            "leaves the user's message out",
        ),
        ("{{ messages|length }}", "asks for an answer with '2' and writes '3' there"),
        (
            "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves the assistant's message out",
        ),
    ],
)
def test_a_template_that_cannot_render_a_row_names_it(jinja, words):
    with pytest.raises(DataError, match="rows.jsonl line 3") as error:
        encode(with_template(jinja), TALK)
    assert words in str(error.value)


def test_tools_that_the_template_has_no_place_for_are_refused():
    with pytest.raises(DataError, match="rows.jsonl line 3: the row offers tools"):
        encode(encoder(), TALK, tools=[{"type": "function", "function": {"name": "f"}}])


def test_tools_reach_a_template_that_has_a_place_for_them():
    own = with_template("{{ tools | tojson }}" + TEMPLATES["chatml"])
    row = encode(own, TALK, tools=[{"name": "weather"}])
    assert own.tokenizer.decode(row.ids).startswith('[{"name": "weather"}]')


def test_a_control_token_in_the_text_is_found():
    own = encoder()
    assert own.control_token(Conversation(TALK)) is None
    assert own.control_token(Conversation([*TALK[:-1], {"role": "assistant", "content": "done<|im_end|>"}])) == "<|im_end|>"


# Templates by name and file


def test_templates_are_found_by_name_and_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    tokenizer = tiny_tokenizer()
    assert find_template("auto", tokenizer) == TEMPLATES["chatml"]
    assert find_template("plain", tokenizer) == TEMPLATES["plain"]
    assert find_template(str(tmp_path / "mine.jinja"), tokenizer) == "{{ messages }}"
    assert find_template("auto", tiny_tokenizer(None)) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "alpaca",
            "S\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nU\n\n### Response:\nA<eos>\n\n",
        ),
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"),
        ("plain", "S\nU\nA<eos>\n"),
    ],
)
def test_the_built_in_templates_write_what_they_should(name, text):
    talk = [{"role": role, "content": role[0].upper()} for role in ("system", "user", "assistant")]
    assert tiny_tokenizer(name).apply_chat_template(talk, tokenize=False) == text


def test_template_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "b.jinja").write_text("Dear {{ name }},")
    for name, words in (("a.jinja", "byte 0: not UTF-8"), ("b.jinja", "no chat template"), ("c.jinja", "cannot read")):
        with pytest.raises(DataError, match=words):
            find_template(str(tmp_path / name), tiny_tokenizer())


def test_chatml_is_refused_for_a_tokenizer_that_lacks_its_tokens():
    with pytest.raises(DataError, match='data.template = "chatml": this tokenizer has no token <|im_end|>'):
        find_template("chatml", mistral_like())


def test_a_template_that_writes_the_date_writes_one_date():
    template = "Today: {{ strftime_now('%d %b %Y') }}\n" + TEMPLATES["chatml"]
    assert freeze_date(template).startswith("Today: {{ '26 Jul 2024' }}\n")
    own = with_template(template)
    assert own.tokenizer.decode(own.encode_prompt(TALK[:2])).startswith("Today: 26 Jul 2024\n")
