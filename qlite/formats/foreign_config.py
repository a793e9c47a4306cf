"""What adapter_config.json says, key by key: what is read, what has no effect on the tensors, and what is refused by name."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from qlite.errors import AdapterError, shown
from qlite.given import MOST_JSON_BYTES, parse_json, read_given

LORA, ADALORA, IA3 = "LORA", "ADALORA", "IA3"
GENERAL = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
"""What PEFT 0.21 says in every config, and changes nothing that is read here."""
PLACES = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    # Of layers that hold their weights turned over, as GPT-2's do; PEFT itself sets it back for linears, and has none for embeddings.
    "fan_in_fan_out",
}
LORAS = {
    *("r", "lora_alpha", "bias", "init_lora_weights", "rank_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# PEFT 0.21's options of each type that are read here, follow from the tensors, only guide training, or only say where it is from.
READ_OR_WITHOUT_EFFECT = {
    LORA: GENERAL | PLACES | LORAS | {"use_rslora", "use_dora", "lora_bias", "alpha_pattern", "trainable_token_indices"},
    ADALORA: GENERAL | PLACES | LORAS | {*("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
                                         *("orth_reg_weight", "total_step")},
    IA3: GENERAL | PLACES | {"feedforward_modules", "init_ia3_weights"},
}  # fmt: skip
TYPES = (LORA, ADALORA, IA3)
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
"""Types that change no linear (formats/foreign_prompts.py)."""
# The other named starts (pissa, olora, corda, loftq, lora_ga, mica) take something from the base's weights or out of training.
STARTS_THAT_LEAVE_THE_BASE = {"gaussian", "eva", "orthogonal"}
BIASES = ("none", "all", "lora_only")
# A pattern is a stranger's and runs on every layer's name: more repetitions than these could run for minutes.
MOST_REPETITIONS, MOST_PATTERN = 3, 200
MOST_RANK = 2**31
WAY_OUT = "what is not read here, PEFT may merge (model.merge_and_unload()): give the model that it writes instead"

TokenIds = dict[str, list[int]]
"""Token ids by the end of the layer's name; "" is the input embedding."""


@dataclass(frozen=True)
class ForeignConfig:
    """The options of an adapter that another program wrote. (IA)^3 has neither rank nor alpha; AdaLoRA's rank is the one it begins with."""

    kind: str = LORA
    rank: int = 1
    alpha: float = 1.0
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_ids: TokenIds = field(default_factory=dict)
    base_name: str | None = None

    def alpha_of(self, layer: str) -> float:
        """Return the alpha of the layer with dotted name ``layer``."""
        return next((alpha for pattern, alpha in self.alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer)), self.alpha)

    def ids_of(self, layer: str) -> list[int] | None:
        """Return the trained tokens of the embedding or head ``layer``, in the order of its rows; None where the config names none."""
        return next((ids for name, ids in self.token_ids.items() if layer.endswith(name)), None)


def parsed_config(path: Path) -> dict:
    """Return the JSON object in ``path``. Raises AdapterError."""
    try:
        config = parse_json(read_given(path, MOST_JSON_BYTES), says_once=True)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror}); a PEFT adapter has this file") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object")
    return config


def read_config(path: Path) -> tuple[ForeignConfig, list[str]]:
    """Return what ``path`` says, and all that is wrong with it.

    Raises:
        AdapterError: it is no JSON object, or of no type that is read, or says neither rank nor alpha.
    """
    config = parsed_config(path)
    kind = config.get("peft_type")
    rank_key = "init_r" if kind == ADALORA else "r"
    if kind in PROMPTS:
        raise AdapterError(
            f"{path}: peft_type is {kind}, which changes no weight, so it can be neither merged nor added to others; over the base of a "
            "run it answers by itself: python -m qlite.generate RUN --adapter NAME=FOLDER"
        )
    if isinstance(kind, str) and kind not in TYPES and config.get("r") is None:
        raise AdapterError(f"{path}: peft_type is {shown(kind)!r}, only {', '.join(TYPES)} are read; {WAY_OUT}")
    rank, alpha = (1, 1) if kind == IA3 else (config.get(rank_key), config.get("lora_alpha"))
    if type(rank) is not int or type(alpha) not in (int, float):
        raise AdapterError(f'{path}: "{rank_key}" and "lora_alpha" must be numbers')
    if rank > MOST_RANK:
        raise AdapterError(f'{path}: "{rank_key}" is {shown(str(rank)[:20])}, more than any layer has rows')
    if rank < 1 or not 0 < alpha <= sys.float_info.max:
        given = f"{shown(str(rank)[:20])} and {alpha}"
        raise AdapterError(f'{path}: "{rank_key}" must be 1 or more and "lora_alpha" more than 0 and finite; these are {given}')
    problems = [*_type_problems(config), *_pattern_problems(config), *_token_problems(config), *_unsupported(config)]
    if problems:
        return ForeignConfig(kind if kind in TYPES else LORA, rank, float(alpha)), problems
    ids, base = config.get("trainable_token_indices") or {}, config.get("base_model_name_or_path")
    return ForeignConfig(
        kind,
        rank,
        float(alpha),
        _ranks(config),
        {pattern: float(each) for pattern, each in (config.get("alpha_pattern") or {}).items()},
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        bool(config.get("lora_bias")),
        tuple(config.get("modules_to_save") or ()),
        ids if isinstance(ids, dict) else {"": ids},
        base if isinstance(base, str) else None,
    ), []


def _ranks(config: dict) -> dict[str, int]:
    """Return the ranks of rank_pattern: AdaLoRA's says of each triplet whether it is kept."""
    ranks = config.get("rank_pattern") or {}
    return {name: sum(kept) if isinstance(kept, list) else kept for name, kept in ranks.items()}


def _type_problems(config: dict) -> list[str]:
    keys = ("use_rslora", "use_dora", "lora_bias")
    problems = [f"{key} must be true or false" for key in keys if not isinstance(config.get(key), bool | None)]
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        problems.append("modules_to_save must be a list of names")
    return problems


def _pattern_problems(config: dict) -> list[str]:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    problems = []
    is_adalora = config.get("peft_type") == ADALORA
    if not isinstance(ranks, dict) or not all(_is_kept_list(each) if is_adalora else type(each) is int for each in ranks.values()):
        problems.append(f"rank_pattern must be an object of {'lists of true and false' if is_adalora else 'whole numbers'}")
    if not isinstance(alphas, dict) or not all(type(each) in (int, float) and 0 < each <= sys.float_info.max for each in alphas.values()):
        problems.append("alpha_pattern must be an object of numbers, more than 0 and finite")
    elif wrong := [pattern for pattern in alphas if not _is_quick(pattern)]:
        problems.append(f"alpha_pattern: {shown(wrong[0])!r} is no pattern that can be followed; write out the layers' names")
    return problems


def _is_kept_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, bool) for each in value)


def _is_quick(pattern: str) -> bool:
    """Return whether ``pattern`` is a regular expression that no name takes long to be compared with."""
    repeated = re.findall(r"[*+?{]", pattern)
    if len(pattern) > MOST_PATTERN or len(repeated) > MOST_REPETITIONS or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _token_problems(config: dict) -> list[str]:
    given = config.get("trainable_token_indices") or []
    lists = given if isinstance(given, dict) else {"": given}
    if all(isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids) for ids in lists.values()):
        twice = next((each for ids in lists.values() for each in ids if ids.count(each) > 1), None) if _is_short(lists) else None
        return [] if twice is None else [f"trainable_token_indices names token {twice} twice"]
    return ["trainable_token_indices must be a list of token ids, or an object of such lists by layer"]


def _is_short(lists: TokenIds) -> bool:
    """Return whether looking for a token that stands twice takes no time; the rows' number tells of longer lists."""
    return sum(map(len, lists.values())) <= 1000


def _unsupported(config: dict) -> list[str]:
    """Return what would be lost silently."""
    problems, kind = [], config.get("peft_type")
    if kind not in TYPES:
        problems.append(f"peft_type is {shown(repr(kind))}, only {', '.join(TYPES)} are read")
    if config.get("bias", "none") not in BIASES:
        problems.append(f"bias = {config['bias']!r}: is none of {', '.join(BIASES)}")
    # AdaLoRA only asks whether there is one.
    if kind != ADALORA and isinstance(init := config.get("init_lora_weights"), str) and init not in STARTS_THAT_LEAVE_THE_BASE:
        problems.append(f"init_lora_weights = {init!r} changed the base too: save it anew with path_initial_model_for_weight_conversion")
    known = READ_OR_WITHOUT_EFFECT[kind if kind in TYPES else LORA]
    others = [f"{key} = {value!r} is not supported" for key, value in config.items() if value and key not in known]
    return [*problems, *others, *([WAY_OUT] if others else [])]
