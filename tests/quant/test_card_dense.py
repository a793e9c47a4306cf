"""What makes NF4 weights dense on a card, where there is none: bitsandbytes, and shapes. The kernel itself: tests/test_card_kernels.py."""

import torch
from torch._subclasses import FakeTensorMode

from qlite.memory import terms
from qlite.memory.ledger import Ledger
from qlite.quant.card_dense import dense_nf4

PACKED, CONSTANTS = torch.ops.bitsandbytes.quantize_4bit(torch.randn(6, 128), 64, "nf4", torch.uint8)


def test_without_a_card_bitsandbytes_does_it():
    found = dense_nf4(PACKED, CONSTANTS, 64, (6, 128), torch.bfloat16)
    assert torch.equal(found, torch.ops.bitsandbytes.dequantize_4bit(PACKED, CONSTANTS, 64, "nf4", (6, 128), torch.bfloat16))


def test_what_has_no_bytes_has_the_shape_and_counts_as_dequantised():
    with FakeTensorMode(allow_non_fake_inputs=True), (ledger := Ledger()), ledger.phase("step"):
        found = dense_nf4(torch.empty(384, 1, dtype=torch.uint8), torch.empty(12), 64, (6, 128), torch.float16)
        assert (found.shape, found.dtype) == ((6, 128), torch.float16)
        assert ledger.now[terms.DEQUANTISED] == found.nbytes
