"""Turn the SNIPS commands (Coucke et al. 2018, CC0) into rows that answer a command with its intent and slots as JSON.

python tools/snips_rows.py ../shared/data/snips_nlu --out build

The folder is https://github.com/sonos/nlu-benchmark, 2017-06-custom-intent-engines, its files side by side or in their
folders. Written are snips_train.jsonl (train_*_full.json) and snips_test.jsonl (validate_*.json), the same bytes on
every machine:
{"messages": [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", "content": "{\"intent\":...}"}]}
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

SEED = 20
SYSTEM_PROMPT = "Give the intent and slots as JSON."
TRAIN, TEST = "train_*_full.json", "validate_*.json"


def main() -> int:
    """Write both files and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with train_*_full.json and validate_*.json")
    parser.add_argument("--out", type=Path, default=Path("build"), help="the folder of the two files")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        return refuse(f'there is no folder "{arguments.folder}"; the data is on github.com/sonos/nlu-benchmark')
    for pattern in (TRAIN, TEST):
        if not any(arguments.folder.rglob(pattern)):
            return refuse(f'"{arguments.folder}" holds no {pattern}; is it the SNIPS data?')
    test = read_rows(arguments.folder, TEST)
    asked = {command_of(row) for row in test}
    rows = read_rows(arguments.folder, TRAIN)
    train = [row for row in rows if command_of(row) not in asked]
    write_rows(arguments.out / "snips_train.jsonl", train)
    write_rows(arguments.out / "snips_test.jsonl", test)
    print(f"left out of the training rows, because they are test rows too: {len(rows) - len(train)}")
    return 0


def refuse(problem: str) -> int:
    """Print what is wrong and return the exit status for it."""
    print(problem, file=sys.stderr)
    return 2


def read_rows(folder: Path, pattern: str) -> list[dict]:
    """Return the rows of all files, shuffled: the files have one intent each, and a batch should have several."""
    rows = []
    for path in sorted(folder.rglob(pattern), key=lambda path: path.name):
        for intent, commands in json.loads(read_text(path)).items():
            rows += [to_row(intent, command["data"]) for command in commands]
    random.Random(SEED).shuffle(rows)
    return rows


def command_of(row: dict) -> str:
    """Return what the user says in a row."""
    return row["messages"][1]["content"]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one row a line, under a temporary name first, and print how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    temporary.replace(path)
    print(f"{path}: {len(rows)} rows")


def read_text(path: Path) -> str:
    """Return a file's text. One of them is UTF-8 with a few bytes of Latin-1 in it, so only those are read as Latin-1."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: chr(ord(found[0]) - 0xDC00), text)


def to_row(intent: str, pieces: list[dict]) -> dict:
    """Return one command, given in pieces {"text"[, "entity"]}, as a chat of three messages."""
    slots: dict[str, str | list[str]] = {}
    for piece in pieces:
        if "entity" in piece:
            add_slot(slots, piece["entity"], one_line(piece["text"]))
    answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False, separators=(",", ":"))
    command = one_line("".join(piece["text"] for piece in pieces))
    contents = {"system": SYSTEM_PROMPT, "user": command, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def add_slot(slots: dict[str, str | list[str]], entity: str, text: str) -> None:
    """Put a slot's text in; the texts of an entity that comes more than once become a list."""
    if entity not in slots:
        slots[entity] = text
    elif isinstance(slots[entity], list):
        slots[entity].append(text)
    else:
        slots[entity] = [slots[entity], text]


def one_line(text: str) -> str:
    """Return the text with each run of white space as one space, and none at its ends."""
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
