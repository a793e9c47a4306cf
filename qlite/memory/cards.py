"""What a card holds and how fast it is, by its name: consumer cards and a few rented ones, to plan for a card that is not here.

A GeForce card's rates follow from its cores and boost clock: 2 float32 operations a core and cycle, and with float32 sums twice that
on the tensor cores since Ampere, four times that on Turing (which has no bfloat16: there it is the float16 rate). NVIDIA's headline
rates are for float16 sums or sparse matrices, up to four times as much. Sources: NVIDIA's white papers "Turing GPU Architecture",
"Ampere GA102", "Ada" and "RTX Blackwell GPU Architecture", appendices, and its comparison pages for laptops and smaller cards.
"""

import re
from dataclasses import dataclass

from qlite.errors import RecipeError
from qlite.units import GIB


@dataclass(frozen=True)
class Card:
    """One graphics card, as its maker describes it. A card in use runs slower when hot, and shows programs a little less memory."""

    name: str
    vram_bytes: int
    bandwidth: float
    """Bytes a second, to and from its memory."""
    bf16_flops: float
    """Operations a second of dense bfloat16 products with float32 sums, on tensor cores; of float16 where there is no bfloat16."""
    fp32_flops: float
    """Float32 operations a second outside of tensor cores."""
    has_bf16: bool = True


def _geforce(name: str, gib: int, gb_per_second: float, cores: int, boost_mhz: int) -> Card:
    is_turing = name.startswith("RTX 20")
    fp32_flops = 2.0 * cores * boost_mhz * 1e6
    return Card(name, gib * GIB, gb_per_second * 1e9, fp32_flops * (4 if is_turing else 2), fp32_flops, has_bf16=not is_turing)


def _data_centre(name: str, gib: int, gb_per_second: float, bf16_teraflops: float, fp32_teraflops: float) -> Card:
    return Card(name, gib * GIB, gb_per_second * 1e9, bf16_teraflops * 1e12, fp32_teraflops * 1e12, has_bf16=name != "T4")


# name, GiB, GB/s, cores, boost clock in MHz. Of one name with several memories the usual one goes without its size, or the smaller.
_CARDS = (
    _geforce("RTX 2060", 6, 336, 1920, 1680),
    _geforce("RTX 2060 12GB", 12, 336, 2176, 1650),
    _geforce("RTX 2060 Super", 8, 448, 2176, 1650),
    _geforce("RTX 2070", 8, 448, 2304, 1620),
    _geforce("RTX 2070 Super", 8, 448, 2560, 1770),
    _geforce("RTX 2080", 8, 448, 2944, 1710),
    _geforce("RTX 2080 Super", 8, 496, 3072, 1815),
    _geforce("RTX 2080 Ti", 11, 616, 4352, 1545),
    _geforce("RTX 3050", 8, 224, 2560, 1777),
    _geforce("RTX 3050 6GB", 6, 168, 2304, 1470),
    _geforce("RTX 3060", 12, 360, 3584, 1777),
    _geforce("RTX 3060 8GB", 8, 240, 3584, 1777),
    _geforce("RTX 3060 Ti", 8, 448, 4864, 1665),
    _geforce("RTX 3070", 8, 448, 5888, 1725),
    _geforce("RTX 3070 Ti", 8, 608, 6144, 1770),
    _geforce("RTX 3080", 10, 760, 8704, 1710),
    _geforce("RTX 3080 12GB", 12, 912, 8960, 1710),
    _geforce("RTX 3080 Ti", 12, 912, 10240, 1665),
    _geforce("RTX 3090", 24, 936, 10496, 1695),
    _geforce("RTX 3090 Ti", 24, 1008, 10752, 1860),
    _geforce("RTX 4060", 8, 272, 3072, 2460),
    _geforce("RTX 4060 Ti", 8, 288, 4352, 2535),
    _geforce("RTX 4060 Ti 16GB", 16, 288, 4352, 2535),
    _geforce("RTX 4070", 12, 504, 5888, 2475),
    _geforce("RTX 4070 Super", 12, 504, 7168, 2475),
    _geforce("RTX 4070 Ti", 12, 504, 7680, 2610),
    _geforce("RTX 4070 Ti Super", 16, 672, 8448, 2610),
    _geforce("RTX 4080", 16, 717, 9728, 2505),
    _geforce("RTX 4080 Super", 16, 736, 10240, 2550),
    _geforce("RTX 4090", 24, 1008, 16384, 2520),
    _geforce("RTX 5050", 8, 320, 2560, 2572),
    _geforce("RTX 5060", 8, 448, 3840, 2497),
    _geforce("RTX 5060 Ti", 8, 448, 4608, 2572),
    _geforce("RTX 5060 Ti 16GB", 16, 448, 4608, 2572),
    _geforce("RTX 5070", 12, 672, 6144, 2512),
    _geforce("RTX 5070 Ti", 16, 896, 8960, 2452),
    _geforce("RTX 5080", 16, 960, 10752, 2617),
    _geforce("RTX 5090", 32, 1792, 21760, 2407),
    # A laptop's clock is its maker's choice, down to half of this at the lowest power.
    _geforce("RTX 3050 Laptop", 4, 192, 2048, 1740),
    _geforce("RTX 3050 6GB Laptop", 6, 168, 2560, 1492),
    _geforce("RTX 3050 Ti Laptop", 4, 192, 2560, 1695),
    _geforce("RTX 3060 Laptop", 6, 336, 3840, 1703),
    _geforce("RTX 3070 Laptop", 8, 448, 5120, 1620),
    _geforce("RTX 3070 Ti Laptop", 8, 448, 5888, 1485),
    _geforce("RTX 3080 Laptop", 8, 448, 6144, 1710),
    _geforce("RTX 3080 16GB Laptop", 16, 448, 6144, 1710),
    _geforce("RTX 3080 Ti Laptop", 16, 512, 7424, 1590),
    _geforce("RTX 4050 Laptop", 6, 192, 2560, 2370),
    _geforce("RTX 4060 Laptop", 8, 256, 3072, 2370),
    _geforce("RTX 4070 Laptop", 8, 256, 4608, 2175),
    _geforce("RTX 4080 Laptop", 12, 432, 7424, 2280),
    _geforce("RTX 4090 Laptop", 16, 576, 9728, 2040),
    # Data centres': name, GiB, GB/s, and teraflops of bfloat16 and float32 from each one's data sheet, without sparsity.
    _data_centre("T4", 16, 320, 65, 8.1),
    _data_centre("A10", 24, 600, 125, 31.2),
    _data_centre("A10G", 24, 600, 70, 35),
    _data_centre("L4", 24, 300, 121, 30.3),
    _data_centre("A100", 40, 1555, 312, 19.5),
    _data_centre("A100 80GB", 80, 2039, 312, 19.5),
    _data_centre("H100", 80, 3350, 989, 67),
    _data_centre("H100 PCIe", 80, 2000, 756, 51),
    _data_centre("H200", 141, 4800, 989, 67),
)
CARDS = {card.name: card for card in _CARDS}

# Words that a driver's or a shop's name has around what tells cards apart.
_NOISE = {"nvidia", "geforce", "rtx", "gpu", "tesla", "graphics", "card", "founders", "edition", "sxm", "sxm4", "sxm5", "hbm3"}
USUAL_CARD = CARDS["RTX 3060"]
"""Stands for a card that is not known: the order of what is fast is much the same on all."""


def find_card(name: str) -> Card:
    """Return the card called ``name``, in any case and spacing: "NVIDIA GeForce RTX 3060", "rtx3060", "3060 8 GB", "4070 Ti Super".

    A name sold with several memories means the usual one or the smaller, unless it says which.

    Raises:
        RecipeError: no card is called so; the message has the nearest names.
    """
    for wanted in (_words(name), _words(name) - {"pcie"}):
        for card in _CARDS:
            # The size may be said, too, where the name alone is enough.
            if wanted in (_words(card.name), _words(card.name) | {f"{card.vram_bytes // GIB}gb"}):
                return card
    raise RecipeError(f'no card is known as "{name}"; {_near(name)}')


def _words(name: str) -> frozenset[str]:
    text = re.sub(r"(\d+)\s*(?:gib|gb|g)\b", r" \1gb ", name.lower())
    text = text.replace("mobile", "laptop").replace("notebook", "laptop")
    # "rtx3060ti" is written together, too; "a10g" is one word.
    text = re.sub(r"(\d{4})(ti|super|laptop)", r"\1 \2", re.sub(r"(rtx|ti|super)(?=\d|super|laptop)", r"\1 ", text))
    return frozenset(re.findall(r"[a-z0-9]+", text)) - _NOISE


def _near(name: str) -> str:
    number, by_memory = re.search(r"\d{3,4}", name), "give its memory instead: --vram 12GiB"
    near = [known for known in CARDS if number and any(each.startswith(number[0][:3]) for each in re.findall(r"\d{3,4}", known))]
    if near:
        return f"did you mean {', '.join(near)}? If not, {by_memory}"
    # A number that no card has is another maker's or another decade's: any guess would be wrong.
    return by_memory if number else f"known are {', '.join(CARDS)}; or {by_memory}"
