"""Bytes, counts and seconds as a person reads them, and bytes as a person writes them."""

import re

from qlite.errors import RecipeError

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def format_bytes(size: float) -> str:
    """Return ``size`` in binary units with three significant digits: 1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.{2 if abs(size) < 10 else 1 if abs(size) < 100 else 0}f} {unit}"


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` says: "12GiB", "12 GB", "7.5g", "8192MiB".

    GB means GiB, and MB MiB: a card sold with 12 GB has 12 GiB.

    Raises:
        RecipeError: it is no amount of one byte or more in a known unit.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?|\.\d+)\s*([kmgt]?)i?(b?)\s*", text.lower())
    size = round(float(found[1]) * 1024 ** " kmgt".index(found[2] or " ")) if found and (found[2] or found[3]) else 0
    if size < 1:
        raise RecipeError(f'"{text}" is no amount of memory; write a number and a unit, for example "12GiB" or "8192MiB"')
    return size


def format_count(number: float) -> str:
    """Return ``number`` with a decimal prefix: 134_515_008 -> "134.5 M"."""
    for unit in ("", " k", " M", " B"):
        if abs(number) < 1000 or unit == " B":
            break
        number /= 1000
    return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"


def format_seconds(seconds: float) -> str:
    """Return a duration as "42s", "3m 05s" or "2h 07m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_step_seconds(seconds: float) -> str:
    """Return the time of one step, which may be short: "350ms", "4.2s", then as ``format_seconds``."""
    if seconds < 9.95:
        return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"
    return format_seconds(seconds)
