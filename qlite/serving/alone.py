"""One adapter on its base, of a kind that no other can stand beside: it answers, or the base does, each in batches of its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

from transformers import PreTrainedModel

from qlite.errors import AdapterError, shown
from qlite.methods.base import adapters_off
from qlite.serving.bank import BASE


class Alone:
    """What an ``AdapterBank`` is where it has one adapter, which is on ``model`` already."""

    mixes: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, name: str, can_be_off: bool):
        """``can_be_off``: whether the base is whole beneath it."""
        self.model, self.names = model, [name]
        self._can_be_off, self._off = can_be_off, ExitStack()

    def require_base(self) -> None:
        """Raise AdapterError where the adapter has written over the base, which cannot answer any more."""
        if not self._can_be_off:
            raise AdapterError(f'"{self.names[0]}" has biases or norms in the place of the base\'s own, which is not there to answer')

    def use(self, names: str | Sequence[str]) -> None:
        """Choose the adapter, or ``BASE``, for all rows of the next batches.

        Raises:
            AdapterError: both at once, another name, or ``BASE`` where the adapter has written over it.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        if others := wanted - {BASE, *self.names}:
            raise AdapterError(f'no adapter is called "{shown(min(others))}"; there are "{BASE}", "{self.names[0]}"')
        if len(wanted) > 1:
            raise AdapterError(
                f'"{self.names[0]}" does more than low-rank updates, and answers in no batch with the base; ask them in turns'
            )
        if BASE in wanted:
            self.require_base()
        self._off.close()
        if BASE in wanted:
            self._off.enter_context(adapters_off(self.model))
