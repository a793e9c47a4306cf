"""What a default run of the tests leaves to ``-m slow``: variants of something that it runs, each of many seconds."""

import pytest
from _pytest.mark.structures import ParameterSet


def slow(*values: object) -> ParameterSet:
    """Return ``values`` as one case of ``parametrize`` that only ``-m slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
