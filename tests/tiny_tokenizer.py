"""A tiny real tokenizer: one token a character, ChatML's special tokens, and ChatML's template."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlite.data.template import TEMPLATES

SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]


def tiny_tokenizer(template: str | None = "chatml", **special: str | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer (99 + ids) with the named built-in template as its own, or with none."""
    vocab = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", **special}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **{k: v for k, v in names.items() if v}
    )
    fast.chat_template = TEMPLATES[template] if template else None
    return fast


VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
