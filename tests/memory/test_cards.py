"""A card is found by the names that people and drivers give it, with the rates that its maker publishes."""

import pytest

from qlite.errors import RecipeError
from qlite.memory.cards import CARDS, find_card
from qlite.units import GIB, parse_bytes

# Dense bfloat16 (Turing: float16) with float32 sums and float32, in teraflops, as the white papers' tables give them.
PUBLISHED = {
    "RTX 2080 Ti": (53.8, 13.4),
    "RTX 3070": (40.6, 20.3),
    "RTX 3080": (59.5, 29.8),
    "RTX 3090": (71.0, 35.6),
    "RTX 4080": (97.5, 48.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 5070": (61.7, 30.9),
    "RTX 5070 Ti": (87.9, 43.9),
    "RTX 5080": (112.6, 56.3),
    "RTX 5090": (209.5, 104.8),
    "A100": (312.0, 19.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rates_are_the_published_ones(name):
    card = CARDS[name]
    assert (card.bf16_flops / 1e12, card.fp32_flops / 1e12) == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("rtx3060 8 GiB", "RTX 3060 8GB"),
        ("3060ti", "RTX 3060 Ti"),
        ("4070TiSuper", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 Super"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 6GB Laptop"),
        ("RTX 4090 mobile", "RTX 4090 Laptop"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
    ],
)
def test_a_card_is_found_by_what_people_and_drivers_call_it(asked, found):
    assert find_card(asked) is CARDS[found]


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_found_by_its_own_name_and_its_drivers(name):
    assert find_card(name) is find_card(f"nvidia  geforce {name.lower()} GPU") is CARDS[name]


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("RTX 3060 16GB", "did you mean RTX 3060, RTX 3060 8GB, RTX 3060 Ti, RTX 3060 Laptop?"),
        ("RTX 4090 D", "did you mean RTX 4090, RTX 4090 Laptop?"),
        ("RTX 5090 Laptop", "did you mean RTX 5090?"),
        ("RTX 3061", "did you mean RTX 3060, "),
        ("GTX 1080", "give its memory instead: --vram 12GiB"),
        ("RX 7900 XTX", '"; give its memory instead: --vram 12GiB'),
        ("12GiB", "give its memory instead: --vram 12GiB"),
        ("Radeon", "known are RTX 2060, "),
        ("", "known are RTX 2060, "),
    ],
)
def test_an_unknown_card_is_refused_with_the_nearest(asked, near):
    with pytest.raises(RecipeError) as error:
        find_card(asked)
    assert f'"{asked}"' in str(error.value)
    assert near in str(error.value)


def test_only_turing_lacks_bfloat16():
    assert {name for name, card in CARDS.items() if not card.has_bf16} == {name for name in CARDS if name.startswith("RTX 20")} | {"T4"}


def test_the_memory_is_in_gib():
    assert CARDS["RTX 3060"].vram_bytes == 12 * GIB == parse_bytes("12GB")


# units.parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * GIB),
        ("12GB", 12 * GIB),
        ("12 G", 12 * GIB),
        (" 7.5 gb ", 15 * GIB // 2),
        ("8192MiB", 8 * GIB),
        (".5tib", 512 * GIB),
        ("3k", 3072),
        ("100 B", 100),
    ],
)
def test_an_amount_of_memory_is_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["12", "", "GB", "-1GB", "0GB", "0.1B", "1e3GB", "12gbb", "12i", "nan GB", "12 GB free", "9" * 400 + "GB"])
def test_what_is_no_amount_of_memory_is_named(text):
    with pytest.raises(RecipeError) as error:
        parse_bytes(text)
    assert f'"{text}"' in str(error.value)
