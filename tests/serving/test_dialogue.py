"""A dialogue sends, turn after turn, what training saw before an answer; its cache and its switches change no answer."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from qlite.data.encode import Encoder
from qlite.data.formats import Conversation
from qlite.data.template import TEMPLATES
from qlite.errors import DataError, MachineError
from qlite.methods import METHODS
from qlite.methods.base import trainable_tensors
from qlite.serving.answer import Sampling, generate_ids
from qlite.serving.dialogue import Dialogue, Exchange
from tests.tiny import CONFIG, tiny_llama
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

TURNS = ("abc", "And then?", "de", "  again, please  ")


def encoder_of(template: str = "chatml") -> Encoder:
    return Encoder(tiny_tokenizer(template), TEMPLATES[template])


def tiny(**changes):
    """Return an untrained Llama over the tiny tokenizer: what it says is noise, and seldom ends."""
    return tiny_llama(vocab_size=VOCAB_SIZE, **changes).eval()


def adapted():
    """Return the same with an adapter that changes its answers."""
    model = tiny()
    METHODS["lora"](rank=4).attach(model)
    generator = torch.Generator().manual_seed(3)
    for p in trainable_tensors(model).values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model.requires_grad_(False).eval()


def dialogue_of(model, max_tokens: int = 6, system: str | None = "Be brief.", template: str = "chatml", **sampling) -> Dialogue:
    return Dialogue(model, encoder_of(template), Sampling(max_tokens=max_tokens, **sampling), system)


def silent(_: str) -> None: ...


class Spy:
    """Sees what a model is asked with, and how many ids each of its passes computes."""

    def __init__(self, model, monkeypatch):
        self.prompts: list[list[int]] = []
        self.passes: list[int] = []
        generate = model.generate

        def spying(input_ids, **rest):
            self.prompts += input_ids.tolist()
            self.passes = []
            return generate(input_ids=input_ids, **rest)

        monkeypatch.setattr(model, "generate", spying)
        model.get_input_embeddings().register_forward_hook(lambda _, args, __: self.passes.append(args[0].shape[1]))


def said_without_cache(model, encoder: Encoder, ids: list[int], max_tokens: int = 6) -> list[int]:
    """Return the greedy answer of one call that starts from nothing."""
    prompt = torch.tensor([ids])
    return generate_ids(model, encoder, prompt, torch.ones_like(prompt), Sampling(max_tokens=max_tokens))[0].tolist()


@pytest.mark.parametrize("system", ["Be brief.", None])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_turn_sends_the_ids_that_training_had_before_its_answer(template, system, monkeypatch):
    model = tiny()
    dialogue, spy = dialogue_of(model, template=template, system=system), Spy(model, monkeypatch)
    history = [{"role": "system", "content": system}] if system else []
    for user in TURNS:
        history.append({"role": "user", "content": user})
        reply = dialogue.ask(user, silent)
        assert spy.prompts[-1] == dialogue.encoder.encode_prompt(history)
        trained = dialogue.encoder.encode(Conversation([*history, {"role": "assistant", "content": "xyz"}]))[-1]
        assert list(trained.ids[: len(spy.prompts[-1])]) == spy.prompts[-1]
        history.append({"role": "assistant", "content": reply.text})
    assert len(spy.prompts) == len(TURNS)
    assert dialogue.exchanges == [Exchange(history[i]["content"], history[i + 1]["content"]) for i in range(bool(system), len(history), 2)]


def test_the_cache_changes_no_answer_and_is_not_computed_again(monkeypatch):
    model = tiny()
    dialogue, spy = dialogue_of(model), Spy(model, monkeypatch)
    read: list[int] = []
    for user in TURNS:
        reply = dialogue.ask(user, silent)
        prompt, first_pass = spy.prompts[-1], spy.passes[0]
        new = said_without_cache(model, dialogue.encoder, prompt)
        assert reply.text == dialogue.encoder.decode(new)
        shared = next(i for i in range(len(prompt)) if prompt[: i + 1] != read[: i + 1])
        assert first_pass == len(prompt) - shared
        read = [*prompt, *new[:-1]]  # the last token was chosen, but never read
    assert first_pass < len(prompt) // 2


def test_after_undo_the_cache_is_cut_back_and_the_answer_is_the_same(monkeypatch):
    model = tiny()
    dialogue, spy = dialogue_of(model), Spy(model, monkeypatch)
    dialogue.ask("abc", silent)
    want = dialogue.ask("de", silent)
    assert dialogue.undo() == Exchange("de", want.text)
    dialogue.ask("something else that is longer", silent)
    dialogue.undo()
    again = dialogue.ask("de", silent)
    assert again.text == want.text
    assert spy.prompts[1] == spy.prompts[3]
    assert spy.passes[0] < len(spy.prompts[3])
    dialogue.undo()
    # The same question at once: all but its last id has been read, and that one is read again for its logits.
    assert dialogue.ask("de", silent).text == want.text
    assert spy.passes[0] == 1


def test_a_sliding_window_that_forgot_old_tokens_is_not_reused():
    torch.manual_seed(0)
    config = MistralConfig(**{**CONFIG, "vocab_size": VOCAB_SIZE, "sliding_window": 8, "attn_implementation": "sdpa"})
    model = MistralForCausalLM(config).eval()
    dialogue = dialogue_of(model)
    for user in TURNS:
        messages = dialogue.messages(user)
        new = said_without_cache(model, dialogue.encoder, dialogue.encoder.encode_prompt(messages))
        assert dialogue.ask(user, silent).text == dialogue.encoder.decode(new)


def test_toggled_it_is_the_base_that_answers_on_the_same_history(monkeypatch):
    model, base = adapted(), tiny()
    dialogue = dialogue_of(model)
    dialogue.ask("abc", silent)
    answers = {}
    for is_base in (True, False):
        assert dialogue.toggle_base() is dialogue.is_base is is_base
        ids = dialogue.encoder.encode_prompt(dialogue.messages("de"))
        answers[is_base] = dialogue.ask("de", silent).text
        assert answers[is_base] == dialogue.encoder.decode(said_without_cache(base if is_base else adapted(), dialogue.encoder, ids))
        dialogue.undo()
    assert answers[True] != answers[False]


def test_an_answer_ends_at_a_stop_token_which_is_no_part_of_the_text():
    model = tiny()
    dialogue = dialogue_of(model)
    free = said_without_cache(model, dialogue.encoder, dialogue.encoder.encode_prompt(dialogue.messages("abc")))
    stop = free[3]
    assert stop not in free[:3]
    dialogue.encoder.__dict__["stop_ids"] = [stop]
    pieces = []
    reply = dialogue.ask("abc", pieces.append)
    assert reply.text == "".join(pieces) == dialogue.encoder.decode(free[:3])
    assert (reply.tokens, reply.is_cut, reply.is_interrupted) == (4, False, False)


def test_an_answer_as_long_as_it_may_be_is_called_cut():
    reply = dialogue_of(tiny(), max_tokens=4).ask("abc", silent)
    assert (reply.tokens, reply.is_cut) == (4, True)


def test_an_answer_that_ends_on_its_last_token_is_not_cut():
    model = tiny()
    dialogue = dialogue_of(model, max_tokens=4)
    free = said_without_cache(model, dialogue.encoder, dialogue.encoder.encode_prompt(dialogue.messages("abc")), max_tokens=4)
    assert free[3] not in free[:3]
    dialogue.encoder.__dict__["stop_ids"] = [free[3]]
    assert not dialogue.ask("abc", silent).is_cut


class Interrupting:
    """Presses Ctrl-C when the ``at``-th piece of text arrives."""

    def __init__(self, at: int):
        self.at, self.pieces = at, []

    def __call__(self, text: str) -> None:
        self.pieces.append(text)
        if len(self.pieces) == self.at:
            raise KeyboardInterrupt


def test_ctrl_c_in_mid_answer_keeps_what_was_said_and_the_talk_goes_on(monkeypatch):
    model = tiny()
    dialogue = dialogue_of(model)
    dialogue.ask("abc", silent)
    ids = dialogue.encoder.encode_prompt(dialogue.messages("de"))
    want = dialogue.encoder.decode(said_without_cache(model, dialogue.encoder, ids)[:3])
    reply = dialogue.ask("de", Interrupting(at=3))
    assert (reply.text, reply.tokens, reply.is_interrupted, reply.is_cut) == (want, 3, True, False)
    assert dialogue.exchanges[-1] == Exchange("de", want)
    ids = dialogue.encoder.encode_prompt(dialogue.messages("fa"))
    assert dialogue.ask("fa", silent).text == dialogue.encoder.decode(said_without_cache(model, dialogue.encoder, ids))


def test_ctrl_c_between_a_token_and_its_text_still_shows_what_is_kept(monkeypatch):
    dialogue = dialogue_of(tiny())
    decode, calls, pieces = dialogue.encoder.decode, [], []

    def pressed(ids: list[int]) -> str:
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(ids)

    monkeypatch.setattr(dialogue.encoder, "decode", pressed)
    reply = dialogue.ask("abc", pieces.append)
    assert (reply.tokens, reply.is_interrupted) == (3, True)
    assert "".join(pieces) == reply.text == decode(calls[2])


def test_ctrl_c_inside_a_pass_leaves_no_half_written_cache(monkeypatch):
    model = tiny()
    dialogue = dialogue_of(model)
    dialogue.ask("abc", silent)
    # Layer 0 has written its keys by then, layer 1 has not.
    press = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    reply = dialogue.ask("de", silent)
    press.remove()
    assert (reply.text, reply.tokens, reply.is_interrupted) == ("", 0, True)
    assert [exchange.user for exchange in dialogue.exchanges] == ["abc"]
    ids = dialogue.encoder.encode_prompt(dialogue.messages("de"))
    assert dialogue.ask("de", silent).text == dialogue.encoder.decode(said_without_cache(model, dialogue.encoder, ids))


def turns_of(exchanges: list[Exchange]) -> list[dict]:
    return [m for e in exchanges for m in ({"role": "user", "content": e.user}, {"role": "assistant", "content": e.answer})]


def test_what_no_longer_fits_the_context_is_forgotten_oldest_first_and_no_more_than_needed(monkeypatch):
    limit, room = 120, 20
    model = tiny(max_position_embeddings=limit)
    dialogue, spy = dialogue_of(model, max_tokens=room), Spy(model, monkeypatch)
    left_out = 0
    for user in ("abc", "de", "fade", "bead", "cafe"):
        before = list(dialogue.exchanges)
        reply = dialogue.ask(user, silent)
        head, asked = [{"role": "system", "content": "Be brief."}], {"role": "user", "content": user}
        lengths = [len(dialogue.encoder.encode_prompt([*head, *turns_of(before[i:]), asked])) for i in range(len(before) + 1)]
        assert reply.left_out == next(i for i, length in enumerate(lengths) if length + room <= limit)
        kept = before[reply.left_out :]
        assert dialogue.exchanges == [*kept, Exchange(user, reply.text)]
        assert spy.prompts[-1] == dialogue.encoder.encode_prompt([*head, *turns_of(kept), asked])
        assert reply.context == len(spy.prompts[-1]) + reply.tokens <= limit
        left_out += reply.left_out
    assert left_out >= 2


def test_an_answer_that_would_outgrow_the_context_is_cut_there():
    dialogue = dialogue_of(tiny(max_position_embeddings=80), max_tokens=512, system=None)
    reply = dialogue.ask("abc", silent)
    assert (reply.context, reply.is_cut) == (80, True)
    assert dialogue.ask("de", silent).left_out == 1


def test_a_prompts_vectors_take_their_part_of_the_context():
    model = tiny(max_position_embeddings=100)
    METHODS["prompt"](length=20).attach(model)
    dialogue = dialogue_of(model.eval(), max_tokens=512, system=None)
    assert dialogue.limit == 80
    assert dialogue.ask("abc", silent).context == 80
    with pytest.raises(DataError, match="this model reads at most 80"):
        dialogue.ask("a" * 100, silent)


def test_a_message_longer_than_the_context_is_refused_with_both_numbers():
    dialogue = dialogue_of(tiny(max_position_embeddings=80), system=None)
    dialogue.ask("abc", silent)
    before = list(dialogue.exchanges)
    long = len(dialogue.encoder.encode_prompt([{"role": "user", "content": "a" * 100}]))
    with pytest.raises(DataError, match=f"{long} tokens; this model reads at most 80"):
        dialogue.ask("a" * 100, silent)
    assert dialogue.exchanges == before


def test_a_model_that_names_no_limit_has_none():
    torch.manual_seed(0)
    dialogue = dialogue_of(BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=2, n_head=4)).eval())
    assert dialogue.limit is None
    assert dialogue.ask("abc", silent).tokens == 6


def test_out_of_memory_says_how_long_the_context_was_and_the_talk_can_go_on():
    model = tiny()
    dialogue = dialogue_of(model)
    dialogue.ask("abc", silent)
    length = len(dialogue.encoder.encode_prompt(dialogue.messages("de")))
    fail = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(MachineError, match=f"out of memory with {length} tokens"):
        dialogue.ask("de", silent)
    fail.remove()
    assert len(dialogue.exchanges) == 1
    assert dialogue.ask("de", silent).tokens == 6


def test_reset_forgets_everything_but_the_system_message(monkeypatch):
    model = tiny()
    dialogue, spy = dialogue_of(model), Spy(model, monkeypatch)
    first = dialogue.ask("abc", silent)
    dialogue.ask("de", silent)
    dialogue.reset()
    assert dialogue.undo() is None
    assert dialogue.ask("abc", silent).text == first.text
    assert spy.prompts[2] == spy.prompts[0]
    assert spy.passes[0] == len(spy.prompts[0])


def test_sampled_answers_are_a_function_of_the_seed():
    said = []
    for seed in (1, 1, 2):
        dialogue = dialogue_of(tiny(), max_tokens=12, temperature=1.0)
        torch.manual_seed(seed)
        said.append([dialogue.ask(user, silent).text for user in TURNS])
    assert said[0] == said[1] != said[2]
