"""A tokenizer as GGUF's metadata: byte-level BPE with the name of its way to split text, or SentencePiece's BPE with scores.

Source: llama.cpp, src/llama-vocab.cpp. A tokenizer that llama.cpp would not follow is refused by name: other ids than in training
would ask the model something else, and nothing would say so.
"""

import json

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from qlite.errors import ExportError
from qlite.formats.gguf_file import Value

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# (the expression that splits text, whether whole words are looked up before their merges) -> llama.cpp's name for both together.
SPLITS = {
    (LETTERS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    (LETTERS + r"\p{N}{1,3}" + REST, False): "smaug-bpe",
    (LETTERS + r"\p{N}" + REST, False): "qwen2",
    ("|".join(CASED) + r"|\p{N}" + CASED_REST, True): "tekken",
    ("|".join(part + SUFFIX for part in CASED) + r"|\p{N}{1,3}" + CASED_REST, False): "gpt-4o",
}
GPT2, DIGITS = "GPT-2's", "digits, then GPT-2's"
SPLITS |= {(GPT2, False): "gpt-2", (DIGITS, False): "smollm"}
SPACE = "\u2581"  # SentencePiece's
FIX = "use --merge, or a base in a GGUF file, whose tokenizer is kept as it is"


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Value]:
    """Return the metadata of ``tokenizer`` for an embedding of ``size`` rows; tokens that nobody has fill it up.

    Raises:
        ExportError: it is of a kind that llama.cpp does not follow, or has more tokens than the embedding has rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"a {type(tokenizer).__name__} is not written as GGUF: it is no tokenizer of the tokenizers library; {FIX}")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer's model is {model['type']}, and only BPE is written as GGUF; {FIX}")
    tokens = _tokens(tokenizer, size)
    is_spm = bool(model.get("byte_fallback"))
    fields: dict[str, Value] = _sentencepiece(tokenizer, described, tokens) if is_spm else _byte_level(described)
    fields["tokenizer.ggml.tokens"] = tokens
    fields["tokenizer.ggml.token_type"] = _kinds(tokenizer, tokens, model.get("unk_token"), is_spm)
    return fields | _special(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ExportError(f"the tokenizer has a token of id {max(by_id)}, and the model's embedding {size} rows; {FIX}")
    return [by_id.get(index, f"[PAD{index}]") for index in range(size)]


def _kinds(tokenizer: PreTrainedTokenizerBase, tokens: list[str], unknown: str | None, is_spm: bool) -> list[int]:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    kinds = []
    for index, token in enumerate(tokens):
        if token not in vocabulary:
            kind = TokenType.UNUSED
        elif is_spm and token == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        else:
            kind = TokenType.BYTE if is_spm and _is_byte(token) else TokenType.NORMAL
        kinds.append(int(kind))
    return kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """Return the ids of the special tokens, and what is put around a text."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"tokenizer.ggml.{theirs}_token_id": getattr(tokenizer, f"{ours}_token_id") for ours, theirs in names.items()}
    around = tokenizer("a").input_ids
    begins = tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id
    ends = tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id
    flags = {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    return {key: value for key, value in ids.items() if value is not None} | flags


# Byte-level BPE


def _byte_level(described: dict) -> dict[str, Value]:
    model = described["model"]
    # llama.cpp leaves Unicode as it comes; NFC changes only text that is not composed already, which is rare.
    if (described["normalizer"] or {}).get("type", "NFC") != "NFC":
        raise ExportError(f"the tokenizer rewrites text first ({described['normalizer']['type']}), which llama.cpp does not; {FIX}")
    split = _split(described["pre_tokenizer"])
    name = SPLITS.get((split, bool(model.get("ignore_merges"))))
    if name is None:
        raise ExportError(f"the tokenizer splits text in a way that has no name in llama.cpp ({str(split)[:100]}); {FIX}")
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    if not merges:
        raise ExportError(f"the tokenizer has no merges, without which llama.cpp reads no vocabulary; {FIX}")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _split(pre_tokenizer: dict | None) -> str | None:
    """Return the expression by which text is split before its bytes are merged, or the name of one that is the library's own."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step and step["type"] for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return DIGITS
        return GPT2 if kinds == ["ByteLevel"] else None
    is_split = kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert")
    return steps[0]["pattern"].get("Regex") if is_split else None


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge


# SentencePiece's BPE, as the tokenizers library holds it


def _sentencepiece(tokenizer: PreTrainedTokenizerBase, described: dict, tokens: list[str]) -> dict[str, Value]:
    prefix = _space_prefix(described, has_template=tokenizer.chat_template is not None)
    if prefix is None:
        raise ExportError(f"the tokenizer treats spaces in another way than SentencePiece's that llama.cpp knows; {FIX}")
    scores = _scores(described["model"]["merges"])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, -1000.0) for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _scores(merges: list) -> dict[str, float]:
    """Return a score for each piece that a merge makes: minus the rank of the first one.

    The tokenizers library joins the pair whose merge comes first, SentencePiece the one whose piece has the highest score: the same, if
    all merges that make one piece come together, as they do where they were made of a SentencePiece model.
    """
    scores: dict[str, float] = {}
    last = None
    for rank, merge in enumerate(merges):
        piece = "".join(_pair(merge))
        if piece in scores and piece != last:
            raise ExportError(f'the tokenizer makes "{piece}" by merges of different rank, which SentencePiece cannot; {FIX}')
        scores.setdefault(piece, -float(rank))
        last = piece
    return scores


def _space_prefix(described: dict, has_template: bool) -> bool | None:
    """Return whether a space is put before a text (and behind a special token), or None where spaces are treated otherwise."""
    steps = _steps(described["normalizer"], "normalizers") + _steps(described["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE:
        # "first" is none behind a special token, with which a chat begins.
        return steps[0]["prepend_scheme"] == "always" or (steps[0]["prepend_scheme"] == "first" and not has_template)
    # Gemma's split by spaces finds none: they have been replaced.
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE} in steps
    if replaces and kinds[0] == "Prepend" and set(kinds) == {"Prepend", "Replace"} and steps[0]["prepend"] == SPACE:
        return True
    return False if replaces and set(kinds) <= {"Replace", "Split"} else None


def _steps(part: dict | None, inner: str) -> list[dict]:
    return part.get(inner, [part]) if part else []
