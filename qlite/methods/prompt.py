"""Prompt tuning: learned vectors before the embedded input, and nothing else.   Lester et al. 2021, arXiv:2104.08691, section 2.

They are no tokens: ids, labels and outputs stay those of the caller. Each document of a packed line begins with them; the lines become one
for that, so where a family has sliding windows narrower than it, their mask is over all lines together. A cache holds the prompt's keys
and values, too, so it is as many positions longer than its ids.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlite.errors import ModelError, RecipeError, shown
from qlite.methods.base import Beside, Method
from qlite.methods.beside import PROMPT
from qlite.model.documents import Documents

COMMONEST = 5000
"""Tokens of which those that a prompt begins as are drawn: of T5's pieces the commonest (section 3.2); where pieces come from merges, as in
most later vocabularies, the first are the commonest, too, and the last may have never been trained."""


class SoftPrompt(Beside):
    """The vectors [P, D], as the embedding gives them, in the dtype that it gives."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.prompt = nn.Parameter(vectors)
        self.positions = len(vectors)


class PromptedForward:
    """Stands as the ``forward`` of a decoder that begins with a ``SoftPrompt``."""

    def __init__(self, decoder: PreTrainedModel, soft: SoftPrompt):
        self.decoder, self.soft, self.whole = decoder, soft, decoder.forward
        self.__signature__ = inspect.signature(decoder.forward)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what the decoder gives for the tokens alone."""
        if self.soft.is_off:
            return self.whole(*args, **kwargs)
        named = self.__signature__.bind_partial(*args, **kwargs).arguments
        rest = next((p.name for p in self.__signature__.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        inputs = {**named, **named.pop(rest, {})}
        cache = inputs.get("past_key_values")
        is_read = cache is not None and cache.get_seq_length() > 0
        return self.whole(**self.shifted(inputs)) if is_read else self.begun(inputs)

    def shifted(self, inputs: dict) -> dict:
        """Return ``inputs`` as they are where the cache holds the prompt: all stand P positions further, and P more are seen."""
        if (mask := inputs.get("attention_mask")) is not None:
            inputs = {**inputs, "attention_mask": self.order(mask).of(mask.new_ones(len(mask), len(self.soft.prompt)), mask)}
        if (positions := inputs.get("position_ids")) is not None:
            inputs = {**inputs, "position_ids": positions + len(self.soft.prompt)}
        return inputs

    def begun(self, inputs: dict) -> object:
        """Run ``inputs`` with the prompt before the tokens of each line, or of each document."""
        ids, embedded = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        tokens = self.decoder.get_input_embeddings()(ids) if embedded is None else embedded
        prompt, count = self.soft.prompt.to(tokens.dtype), len(self.soft.prompt)
        documents: Documents | None = inputs.get("documents")
        if documents is not None:
            longer = documents.longer(count)
            inputs |= {"documents": longer, "position_ids": longer.positions()}
            lines = documents.begun_with(prompt, tokens.flatten(0, 1)).unsqueeze(0)
            out = self.whole(inputs_embeds=lines, **inputs)
            out.last_hidden_state = longer.without_beginnings(count, out.last_hidden_state.squeeze(0)).unflatten(0, tokens.shape[:2])
            return out
        mask, prompts = inputs.get("attention_mask"), prompt.expand(len(tokens), -1, -1)
        order = Plain(count) if mask is None else self.order(mask)
        inputs = self.shifted(inputs)
        if (positions := inputs.get("position_ids")) is not None:
            _require_one_document(inputs, self.decoder)
            own = torch.arange(count, device=positions.device).expand(len(tokens), -1)
            inputs["position_ids"] = order.of(own, positions.expand(len(tokens), -1))
        out = self.whole(inputs_embeds=order.of(prompts, tokens), **inputs)
        out.last_hidden_state = order.tokens(out.last_hidden_state)
        return out

    def order(self, mask: Tensor) -> "AfterPadding":
        """Return where prompt and tokens stand under ``mask`` [B, T]."""
        return AfterPadding(len(self.soft.prompt), mask)


class Plain:
    """The order of P prompt vectors and the tokens of each line: the prompt first."""

    def __init__(self, count: int):
        self.count = count

    def of(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Return prompts [B, P, ...] and tokens [B, T, ...] as one [B, P + T, ...]."""
        return torch.cat([prompts, tokens], dim=1)

    def tokens(self, both: Tensor) -> Tensor:
        """Return the tokens' part [B, T, ...] of what ``of`` gave."""
        return both[:, self.count :]


class AfterPadding(Plain):
    """As ``Plain``, but behind a line's padding on the left: before it, no sliding window and no convolution would see the prompt."""

    def __init__(self, count: int, mask: Tensor):
        """``mask`` [B, T], 0 where a line is padding."""
        super().__init__(count)
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        places = torch.arange(count + mask.shape[1], device=mask.device)
        inside = torch.where(places < padding + count, places - padding, places)
        self.sources = torch.where(places < padding, places + count, inside)
        self.places = places[: mask.shape[1]] + count * (places[: mask.shape[1]] >= padding)

    def of(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        return _taken(super().of(prompts, tokens), self.sources)

    def tokens(self, both: Tensor) -> Tensor:
        return _taken(both, self.places)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Return x [B, N, ...] at ``places`` [B, M]: [B, M, ...]."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), places]


def _require_one_document(inputs: dict, decoder: PreTrainedModel) -> None:
    """Raise ModelError for a packed line whose documents cannot be told from a padded line's positions."""
    if inputs.get("attention_mask") is None and not inputs.get("use_cache"):
        raise ModelError(
            f'method.name = "prompt": in packed lines it knows where documents begin with base.attention = "auto" alone, and this '
            f'"{decoder.config.model_type}" computes "{decoder.config._attn_implementation}" attention; set train.packing = false'
        )


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Learned vectors before the embedded input."""

    name: ClassVar[str] = "prompt"
    is_mergeable: ClassVar[bool] = False
    length: Annotated[int, Field(ge=1)] = 20
    """How many vectors stand before the input."""
    text: str | tuple[Annotated[int, Field(ge=0)], ...] = ""
    """A text whose tokens' embeddings they begin as, again and again until all have begun, or its token ids; empty: tokens drawn from the
    vocabulary's first 5,000."""

    @property
    def words(self) -> str:
        return f"prompt of {self.length}"

    @property
    def positions(self) -> int:
        return self.length

    def resolved(self, tokenizer: PreTrainedTokenizerBase | None) -> "PromptTuning":
        if not self.text:
            return self
        ids = self._ids(tokenizer)
        if not 0 < len(ids) <= self.length:
            given = f' = "{shown(self.text)}"' if isinstance(self.text, str) else ""
            raise RecipeError(
                f"method.text{given}: is {len(ids)} tokens, and method.length = {self.length} of them can begin as its; "
                + (f"set method.length = {len(ids)}, or shorten it" if ids else "give a text that has tokens")
            )
        return replace(self, text=ids)

    def _ids(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        """Return the ids that ``text`` is."""
        if not isinstance(self.text, str):
            return self.text
        return tuple(tokenizer(self.text, add_special_tokens=False)["input_ids"]) if tokenizer is not None else (0,)

    @torch.no_grad()
    def attach(self, model: PreTrainedModel) -> None:
        decoder, embedding = _decoder(model), model.get_input_embeddings()
        _require_embeds(model)
        assert not (isinstance(self.text, str) and self.text), "resolved() was not called"
        if beyond := [each for each in self.text if each >= embedding.num_embeddings]:
            raise RecipeError(f"method.text: token {beyond[0]} has no row: the embedding has {embedding.num_embeddings}; leave it out")
        drawn = torch.randint(min(COMMONEST, embedding.num_embeddings), (self.length,), device="cpu")
        ids = torch.tensor([self.text[i % len(self.text)] for i in range(self.length)], device="cpu") if self.text else drawn
        soft = SoftPrompt(embedding(ids.to(embedding.weight.device)).detach().clone())
        decoder.soft_prompt, decoder.forward = soft, PromptedForward(decoder, soft)

    def peft(self, model: PreTrainedModel) -> tuple[dict, dict[str, Tensor]]:
        """Return PEFT's PROMPT_TUNING."""
        prompt, config = _decoder(model).soft_prompt.prompt, model.config.get_text_config()
        fields = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.length,
            "token_dim": prompt.shape[1],
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        return fields, {PROMPT: prompt}

    @classmethod
    def of_peft(cls, config: dict[str, int], blocks: int) -> "PromptTuning":
        """Return the method that PEFT's ``config`` names."""
        return cls(length=config["num_virtual_tokens"])

    def from_peft(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensor of ``model``'s prompt that PEFT's ``tensors`` are, by dotted name."""
        name = next(name for name, module in model.named_modules() if isinstance(module, SoftPrompt))
        return {f"{name}.prompt": tensors[PROMPT]}


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return what turns ids into hidden states in every pass: in OPT a part of the base model, which the head's model calls by itself."""
    return model.get_decoder()


def _require_embeds(model: PreTrainedModel) -> None:
    """Raise ModelError if ``model`` needs to know more of a position than its embedding."""
    family = model.config.model_type
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise ModelError(
            f'method.name = "prompt": every block of the family "{family}" has an embedding of the tokens of its own, and a prompt is no '
            "token; choose another method"
        )
    if "inputs_embeds" not in inspect.signature(_decoder(model).forward).parameters:
        raise ModelError(f'method.name = "prompt": the family "{family}" takes ids and no embedded input; choose another method')
