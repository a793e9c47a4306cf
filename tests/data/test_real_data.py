"""The recipes over real data read all of it, leave nothing out unsaid, and train what they should."""

from pathlib import Path

import pytest

from qlite.recipe.read import read_recipe
from tests.conftest import SMOLLM2, SMOLLM2_SHA256

ROOT = Path(__file__).parents[2]
# Recipe -> rows read, rows kept, a stretch of text that is trained.
REAL = {
    "sgd": (452, 452, "What city do you want to dine in? Do you have a preferred restaurant?<|im_end|>"),
    "instruct": (1100, 1100, 'The spelling of the given phrase "freind" is incorrect, the correct spelling is "friend".<|im_end|>'),
    "seed_tasks": (175, 173, "Yes, you can have 1 oatmeal banana protein shake and 4 strips of bacon."),
    "e2e": (4672, 4672, "There is a place in the city centre , Alimentum , that is not family - friendly .<|im_end|>"),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_files):
    from qlite.model.load import Base

    return Base(model=SMOLLM2, sha256=SMOLLM2_SHA256).tokenizer(lambda *_: None)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_over_real_data_reads_all_of_it(name, tokenizer, monkeypatch):
    if not (ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the data sets are not beside this repository: ../shared/data")
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml").with_absolute_paths()
    data = recipe.data.load(tokenizer, recipe.train.tokens, lambda _: None)
    data.require_sound()
    read, kept, text = REAL[name]
    part = data.parts[0]
    assert (part.read, len(part.rows)) == (read, kept)
    assert len(data.train) + len(data.test) + part.dropped == kept
    first = part.rows[0]
    trained = tokenizer.decode([int(i) for i, t in zip(first.ids, first.trained, strict=True) if t])
    assert trained.startswith(text)
    assert all(row.ids[-1] in data.encoder.stop_ids and row.trained[-1] for row in part.rows)
    # What chat would send is what stands before the answer.
    asked = tokenizer.decode(first.ids[: first.answer_start])
    assert asked.endswith("<|im_start|>assistant\n")
