"""PEFT's prompts, prefixes and gated prompts, written by another program: attached as our own methods, and no change of any linear."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from qlite.errors import AdapterError, shown, some_of
from qlite.formats.foreign_config import GENERAL, PROMPTS, parsed_config
from qlite.formats.peft import CONFIG, PREFIX, SHOWN_NAME, WEIGHTS, copy_adapter, read_tensors, require_alike
from qlite.methods.beside import PROMPT
from qlite.methods.llama_adapter import LlamaAdapter
from qlite.methods.prefix import PrefixTuning
from qlite.methods.prompt import PromptTuning
from qlite.model.blocks import decoder_blocks

KINDS = dict(zip(PROMPTS, (PromptTuning, PrefixTuning, LlamaAdapter), strict=True))
NUMBERS = {
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
}
"""What each type's config has to say."""
VIRTUAL = {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"}
# PEFT 0.21's options that are read here, follow from the tensors, or only say how they began.
READ_OR_WITHOUT_EFFECT = {
    "PROMPT_TUNING": VIRTUAL | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    "PREFIX_TUNING": VIRTUAL | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "ADAPTION_PROMPT": {"adapter_len", "adapter_layers", "target_modules"},
}
ADAPTION = ".adaption_prompt"
MOST_PROBLEMS = 5
"""In one message."""


@dataclass(frozen=True)
class ForeignPrompts:
    """What the two files of such an adapter hold."""

    kind: str
    """PEFT's name of its type."""
    config: dict[str, int]
    """The numbers that its tensors' shapes follow from."""
    tensors: dict[str, Tensor]
    base_name: str | None
    """The base as the config names it."""

    def put_on(self, model: PreTrainedModel, origin: Path) -> None:
        """Attach the method and fill it; ``origin`` is only named in messages.

        Raises:
            AdapterError: it does not fit ``model``, or changes nothing.
            RecipeError, ModelError: ``model`` has no place for it.
        """
        blocks = len(decoder_blocks(model))
        method = KINDS[self.kind].of_peft(self.config, blocks)
        if self.config.get("adapter_layers", 0) > blocks:
            raise AdapterError(f"{origin}: adapter_layers is {self.config['adapter_layers']}, and this base has {blocks} blocks")
        method.attach(model)
        written = method.peft(model)
        if written is None:
            raise AdapterError(f'{origin}: {self.kind} in the family "{model.config.model_type}" is another computation in PEFT; not read')
        require_alike(self.tensors, written[1], origin)
        gates = [tensor for name, tensor in self.tensors.items() if name.endswith(".adaption_gate")]
        if gates and not any(gate.any() for gate in gates):
            raise AdapterError(f"{origin}: every *.adaption_gate is zero, so the adapter changes nothing of its base; was it ever trained?")
        own = method.from_peft(model, self.tensors)
        copy_adapter({PREFIX + name: tensor for name, tensor in own.items()}, model, origin)


def read_foreign_prompts(folder: Path) -> ForeignPrompts | None:
    """Return what is in ``folder``; None where its config names another type.

    Raises:
        AdapterError: its files cannot be read, or one of its options is not supported.
    """
    config = parsed_config(folder / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        return None
    numbers = {key: config.get(key) for key in NUMBERS[kind]}
    problems = [f"{key} must be a whole number of 1 or more" for key, value in numbers.items() if type(value) is not int or value < 1]
    known = GENERAL | READ_OR_WITHOUT_EFFECT[kind]
    problems += [f"{shown(key)} = {shown(repr(value))} is not supported" for key, value in config.items() if value and key not in known]
    if config.get("num_transformer_submodules") not in (None, 1):
        problems.append("num_transformer_submodules is of models that encode and decode")
    if problems:
        raise AdapterError(f"{folder / CONFIG}: {some_of(problems, MOST_PROBLEMS)}")
    tensors, key = read_tensors(folder), NUMBERS[kind][0]
    # Before anything of that size is made.
    prompts = {name: tensor for name, tensor in tensors.items() if name == PROMPT or name.endswith(ADAPTION)}
    if not prompts:
        raise AdapterError(f"{folder / WEIGHTS}: holds no tensor called {PROMPT if kind != PROMPTS[-1] else '*' + ADAPTION}")
    wrong = [name for name, tensor in prompts.items() if tensor.dim() < 2 or not tensor.numel() or tensor.shape[-2] != numbers[key]]
    if wrong:
        told = f"{shown(wrong[0], SHOWN_NAME)} is {list(tensors[wrong[0]].shape)}, and {CONFIG} says {key} = {numbers[key]}"
        raise AdapterError(f"{folder / WEIGHTS}: {told}; the two files are not of one adapter")
    base = config.get("base_model_name_or_path")
    return ForeignPrompts(kind, numbers, tensors, base if isinstance(base, str) else None)
