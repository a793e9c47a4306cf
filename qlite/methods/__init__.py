"""The methods a recipe can name. To add one: write its file, add it here, and pass tests/methods/test_contract.py."""

from qlite.methods.adalora import AdaLoRA
from qlite.methods.base import Method
from qlite.methods.bottleneck import Bottleneck
from qlite.methods.combined import Combined
from qlite.methods.full import Full
from qlite.methods.galore import GaLore
from qlite.methods.ia3 import IA3
from qlite.methods.llama_adapter import LlamaAdapter
from qlite.methods.llama_adapter_v2 import LlamaAdapterV2
from qlite.methods.lora import LoRA
from qlite.methods.prefix import PrefixTuning
from qlite.methods.prompt import PromptTuning
from qlite.methods.pure_low_rank import PureLowRank
from qlite.methods.relora import ReLoRA

__all__ = ["METHODS", "Combined", "Method"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(LoRA, AdaLoRA, ReLoRA, PureLowRank, IA3, Bottleneck),
        *(PrefixTuning, PromptTuning, LlamaAdapter, LlamaAdapterV2, Full, GaLore),
    )
}
