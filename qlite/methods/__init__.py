"""The methods a recipe can name. To add one: write its file, add it here, and pass tests/methods/test_contract.py."""

from qlite.methods.base import Method
from qlite.methods.combined import Combined
from qlite.methods.llama_adapter import LlamaAdapter
from qlite.methods.llama_adapter_v2 import LlamaAdapterV2
from qlite.methods.lora import LoRA
from qlite.methods.prefix import PrefixTuning
from qlite.methods.prompt import PromptTuning

__all__ = ["METHODS", "Combined", "Method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, PrefixTuning, PromptTuning, LlamaAdapter, LlamaAdapterV2)}
