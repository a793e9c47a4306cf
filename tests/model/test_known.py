"""The known shapes give the numbers of parameters that the hub shows for the models' files."""

import tomllib
from pathlib import Path

import pytest
import torch

from qlite.model.known import KNOWN, known_config
from qlite.model.load import empty_model
from qlite.quant.linear import Storage

RECIPES = Path(__file__).parents[2] / "recipes"

# As published: the parameters of the files on the hub.
PARAMETERS = {
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 751_632_384 - 151_936 * 1024,  # its files hold the tied head a second time
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,  # likewise
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "tiiuae/Falcon3-7B-Base": 7_455_550_464,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_as_many_parameters_as_its_files(name):
    model = empty_model(known_config(name), Storage(16), torch.bfloat16, "meta")
    assert model.num_parameters() == PARAMETERS[name]


def test_every_known_shape_is_held_to_a_count():
    """A variant differs from a counted model in nothing but the lengths that it was made for."""
    lengths = ("max_position_embeddings", "sliding_window")
    counted = [{k: v for k, v in KNOWN[name].items() if k not in lengths} for name in PARAMETERS]
    assert [name for name, shape in KNOWN.items() if {k: v for k, v in shape.items() if k not in lengths} not in counted] == []
    assert len(KNOWN) == 98


def test_every_hub_model_of_a_shipped_recipe_is_known():
    models = {tomllib.loads(path.read_text(encoding="utf-8"))["base"]["model"] for path in RECIPES.glob("*.toml")}
    hub = {model for model in models if not model.startswith("pypi:")}
    assert len(hub) == 9
    assert hub <= set(KNOWN)


def test_the_windows_that_change_memory_are_told():
    assert known_config("mistralai/Mistral-7B-v0.1").sliding_window == 4096
    assert known_config("mistralai/Mistral-7B-Instruct-v0.3").sliding_window is None
    gemma = known_config("google/gemma-2-9b-it")
    assert gemma.layer_types[:2] == ["sliding_attention", "full_attention"]
    assert known_config("google/gemma-3-1b-it").layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]


def test_a_name_is_found_in_any_case_and_an_unknown_one_is_none():
    assert known_config("qwen/qwen2.5-7b-instruct").hidden_size == 3584
    assert known_config("Qwen/Qwen2.5-7B-Instruct-1M") is None
    assert known_config("Llama-2-7b-hf") is None


def test_a_config_is_a_new_one_each_time():
    known_config("microsoft/phi-4").hidden_size = 1
    assert known_config("microsoft/phi-4").hidden_size == 5120
