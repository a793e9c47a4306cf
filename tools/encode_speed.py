"""Encode a large data file and measure megabytes a second and the memory of the process.

python tools/encode_speed.py [--mb 1000]

The file is made of recipes/quickstart.toml's words: chats of one to five exchanges, 1.1 kB a row on average. It is written to the
temporary folder, and the encoded rows to a cache of their own; both are deleted afterwards.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import psutil

from qlite.data.dataset import Data
from qlite.recipe.read import read_recipe
from qlite.units import format_bytes
from qlite.verb import run_verb

ROOT = Path(__file__).parents[1]


def main(argv: list[str]) -> None:
    """Write the file, encode it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="size of the file in 10^6 bytes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLITE_CACHE"] = str(Path(folder) / "cache")
        recipe = read_recipe(ROOT / "recipes" / "quickstart.toml")
        tokenizer = recipe.base.tokenizer(lambda *_: None)
        path = Path(folder) / "rows.jsonl"
        rows = write_rows(path, args.mb * 10**6)
        size = path.stat().st_size
        for attempt in ("encoded", "from the cache"):
            with Peak() as peak:
                start = time.perf_counter()
                data = Data(train=str(path)).load(tokenizer, 2048, lambda _: None)
                seconds = time.perf_counter() - start
            tokens = int(data.train.lengths.sum())
            print(
                f"{attempt}: {rows:,} rows, {format_bytes(size)}, {tokens:,} tokens in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s; "
                f"process memory {format_bytes(peak.before)} before, {format_bytes(peak.anonymous)} at most, files mapped not counted",
                flush=True,
            )


def write_rows(path: Path, size: int) -> int:
    """Write chats of about ``size`` bytes in all; return how many rows."""
    orders = [json.loads(line) for line in (ROOT / "recipes" / "data" / "orders_train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for row in orders for message in row["messages"]]
    words = sorted({word for text in texts for word in text.split()})
    chance, rows = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            messages = []
            for _ in range(chance.randint(1, 5)):
                for role in ("user", "assistant"):
                    messages.append({"role": role, "content": " ".join(chance.choices(words, k=chance.randint(4, 50)))})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            rows += 1
    return rows


class Peak:
    """Watches how much memory of its own the process holds: anonymous pages, not those of files."""

    def __enter__(self) -> "Peak":
        self._process = psutil.Process()
        self.before = self.anonymous = self._read()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.anonymous = max(self.anonymous, self._read())

    def _read(self) -> int:
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0)


if __name__ == "__main__":
    run_verb(main)
