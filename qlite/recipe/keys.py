"""``python -m qlite.train --keys``: every key of a recipe with type, default and meaning."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qlite.recipe.write import all_keys


def print_keys() -> None:
    """Print all keys, table by table, at any width."""
    console = Console(highlight=False)
    previous = ""
    for key in all_keys():
        table = key.name.partition(".")[0]
        if table != previous:
            console.print(Text(f"\n[{table}]", style="bold"))
        previous = table
        head = Text.assemble((key.name, "cyan"), f" = {key.default}   ", (key.type, "dim"))
        console.print(Padding(head, (0, 0, 0, 2)))
        console.print(Padding(Text(key.text), (0, 0, 0, 6)))
