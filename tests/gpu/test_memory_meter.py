"""What only a card can show: the meter's figures follow what is allocated. Run with pytest -n 0 -m gpu."""

import pytest
import torch

from qlite.device import MemoryMeter, overflows_to_host
from qlite.units import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


def test_the_meter_follows_what_torch_takes_and_gives_back():
    meter = MemoryMeter(torch.device("cuda", 0))
    before = meter.read()
    held = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    during = meter.read()
    del held
    after = meter.read()
    assert during.used - before.used == 256 * MIB
    assert after.used == before.used
    assert after.peak >= during.used
    assert after.reserved >= 256 * MIB


def test_a_card_with_room_spills_nothing():
    held = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    memory = MemoryMeter(held.device).read()
    assert memory.spilled == 0
    if memory.driver is not None and not overflows_to_host():
        # What makes the comparison sound: the driver counts the context beside all that torch has reserved.
        assert memory.driver >= memory.reserved
