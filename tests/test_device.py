"""Memory as the device tells it: what has spilled from a card to the host, and what a CPU's meter reads."""

import platform

import pytest
import torch

from qlite.device import MemoryMeter, overflows_to_host, spilled_bytes
from qlite.units import GIB, MIB

CARD = 8 * GIB


@pytest.mark.parametrize(
    ("reserved", "driver", "spilled"),
    [
        (6 * GIB, 7 * GIB, 0),  # as it should be: the driver counts the context, too
        (7 * GIB, 6 * GIB, GIB),  # a GiB of it is not on the card
        (30 * GIB, 7 * GIB, 23 * GIB),
        (9 * GIB, None, GIB),  # more than the card has: no driver's figure needed
        (9 * GIB, 20 * GIB, GIB),  # a driver that counts what it lent from the host, too
        (8 * GIB, None, 0),
        (0, 0, 0),
        (6 * GIB, 6 * GIB - 64 * MIB, 0),  # rounding
        (6 * GIB, 6 * GIB - 65 * MIB, 65 * MIB),
        (CARD + 64 * MIB, None, 0),
    ],
)
def test_what_torch_has_and_the_card_has_not_is_spilled(reserved, driver, spilled):
    assert spilled_bytes(reserved, driver, CARD) == spilled


@pytest.mark.parametrize(
    ("system", "release", "overflows"),
    [
        ("Windows", "11", True),
        ("Linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("Linux", "4.4.0-19041-Microsoft", True),
        ("Linux", "6.8.0-45-generic", False),
        ("Darwin", "23.5.0", False),
    ],
)
def test_drivers_overflow_to_the_host_on_windows_and_on_wsl(system, release, overflows, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert overflows_to_host() == overflows


def test_a_cpu_spills_nothing_and_knows_no_terms():
    memory = MemoryMeter(torch.device("cpu")).read()
    assert memory.spilled == 0
    assert memory.terms is None
    assert memory.planned is None
    assert 0 < memory.used <= memory.peak < memory.total
