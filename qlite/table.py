"""What every recipe table is: a frozen dataclass whose fields are the table's keys and whose methods are the behaviour."""

from typing import ClassVar

from pydantic import ConfigDict


class Table:
    """Base of the dataclasses that a recipe is made of. The docstring under a field documents the key."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
