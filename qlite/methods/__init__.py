"""The methods a recipe can name. To add one: write its file, add it here, and pass tests/methods/test_contract.py."""

from qlite.methods.base import Method
from qlite.methods.combined import Combined
from qlite.methods.lora import LoRA
from qlite.methods.pure_low_rank import PureLowRank

__all__ = ["METHODS", "Combined", "Method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, PureLowRank)}
