"""The runs whose losses are kept in tests/golden/: a change of numbers must be meant, and shown in the commit's diff."""

import json
import tempfile
from pathlib import Path

import torch

from tests.tiny_run import run, tiny_recipe

FOLDER = Path(__file__).parent / "golden"
CASES = {
    "lora_4bit": {},
    "lora_8bit": {"base": {"bits": 8}},
    "lora_16bit": {"base": {"bits": 16}},
    "dora_4bit": {"method": {"dora": True, "dropout": 0.0}},
    "packed_4bit": {"train": {"packing": True, "tokens": 96, "accumulation": 1}},
    "head_4bit": {"base": {"embedding_bits": 4, "head_bits": 4}},
    "checkpointing_none_float32": {"base": {"dtype": "float32"}, "memory": {"checkpointing": "none"}},
}
NO_EXTRAS = {"train": {"eval_every": 0, "exact_match_rows": 0}}


def losses(case: str) -> list[float]:
    """Return the losses of the case's run."""
    with tempfile.TemporaryDirectory() as folder:
        return [report.loss for report in run(tiny_recipe(Path(folder), **_changes(case))).steps]


def _changes(case: str) -> dict:
    return {table: {**NO_EXTRAS.get(table, {}), **CASES[case].get(table, {})} for table in {**NO_EXTRAS, **CASES[case]}}


def machine() -> dict[str, str]:
    """Return what the last bits of a loss depend on beside the code: torch, and the instructions its kernels choose by."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wide = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if has.get(name)]
    return {"torch": torch.__version__, "cpu": " ".join([torch.backends.cpu.get_cpu_capability(), *wide])}


def golden(case: str) -> dict:
    """Return what is kept for the case."""
    return json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))


def update(case: str) -> None:
    """Keep the case's losses as they are now."""
    (FOLDER / f"{case}.json").write_text(json.dumps({**machine(), "losses": losses(case)}, indent=2) + "\n", encoding="utf-8")
