"""The sum over all classes. Each class's own test fails where one of its inputs is not refused; here they are only counted."""

from pathlib import Path

from tests.malformed import (
    test_adapters,
    test_archives,
    test_data_files,
    test_json,
    test_model_folders,
    test_recipes,
    test_safetensors,
    test_toml,
)

CLASSES = (test_toml, test_recipes, test_json, test_data_files, test_safetensors, test_adapters, test_model_folders, test_archives)


def test_every_class_is_in_the_sum_and_the_sum_is_more_than_950(record_property):
    modules = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {"test_total"}
    assert modules == {each.__name__.rpartition(".")[2] for each in CLASSES}
    counts = [len(each.cases()) for each in CLASSES]
    assert sum(counts) >= 950
    record_property("figure", f"malformed inputs refused / tried: {sum(counts)}/{sum(counts)}")
