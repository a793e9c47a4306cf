"""The tensors on the screen: by term beside the plan, at each size, and in words where something is wrong."""

import io

import pytest
from rich.cells import cell_len

from qlite.device import MemoryUse
from qlite.memory import terms
from qlite.training.console import PlainConsole
from qlite.training.gauges import COLOURS, LETTERS, memory_blocks, shown_terms, tensor_line
from qlite.units import GIB, MIB
from tests.training.test_console import eval_report, live_console, panel, step_report, trained, written

TERMS = {
    terms.BASE: int(3.25 * GIB),
    terms.VOCABULARY: int(1.96 * GIB),
    terms.REST: 1 * MIB,
    terms.ADAPTER: 20 * MIB,
    terms.SAVED: int(0.5 * GIB),
    terms.INSIDE: int(0.25 * GIB),
}
HELD = sum(TERMS.values())


def on_card(planned: int | None = int(6.02 * GIB), found: dict[str, int] | None = TERMS, spilled: int = 0) -> MemoryUse:
    return MemoryUse(4 * GIB, int(6.1 * GIB), 8 * GIB, 7 * GIB, int(7.5 * GIB), spilled, found, planned)


def on_cpu(planned: int | None = int(6.02 * GIB), found: dict[str, int] | None = TERMS) -> MemoryUse:
    return MemoryUse(7 * GIB, 8 * GIB, 16 * GIB, terms=found, planned=planned)


def shown(memory: MemoryUse, width: int = 80, height: int = 24) -> list[str]:
    return panel(trained(live_console(width, height), memory))


def tensor_bar(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("│ tensors "))[len("│ tensors ") : -2]


def test_every_term_has_a_letter_of_its_own_and_a_colour():
    assert len(set(LETTERS.values())) == len(terms.ALL) == len(set(COLOURS.values()))
    assert set(LETTERS) == set(COLOURS) == set(terms.ALL)
    assert "+" not in LETTERS.values()


def test_the_bar_is_as_long_as_the_plan_and_each_term_has_its_share():
    lines = shown(on_card())
    bar = tensor_bar(lines)
    assert bar.endswith(" 5.98 of planned 6.02 GiB")
    cells = len(bar) - len(" 5.98 of planned 6.02 GiB")
    assert bar[:cells].count("B") == round(cells * 3.25 / 6.02)
    assert bar.index("E") == bar[:cells].count("B")
    assert bar[:cells].rstrip("·").endswith("I")
    assert len(bar[:cells].rstrip("·")) == round(cells * HELD / (6.02 * GIB))
    legend = "\n".join(lines)
    assert "B base weights 3.25  E embedding and head 1.96" in legend
    # 1 and 20 MiB of 5.98 GiB are less than half a percent each.
    assert "+ other 0.02" in legend
    assert "adapter" not in legend
    assert "over" not in legend


def test_bars_of_device_and_tensors_begin_in_one_column():
    lines = shown(on_cpu())
    device = next(line for line in lines if line.startswith("│ RAM"))
    assert device.index("█") == lines[lines.index(device) + 2].index("B") == len("│ tensors ")


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.019])
def test_up_to_two_percent_over_the_plan_is_as_planned(factor):
    assert " over" not in "\n".join(shown(on_card(planned=round(HELD / factor))))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_more_than_planned_is_said_in_words_at_each_width(width):
    lines = shown(on_card(planned=4 * GIB), width, 40)
    assert "50 % over" in tensor_bar(lines)
    assert "·" not in tensor_bar(lines)


@pytest.mark.parametrize("memory", [on_card(None), on_card(found=None), on_card(found={}), on_cpu(None), on_cpu(found=None)])
def test_without_plan_or_terms_there_is_one_gauge(memory):
    plain = MemoryUse(memory.used, memory.peak, memory.total, memory.reserved, memory.driver)
    assert shown(memory) == shown(plain)
    assert "tensors" not in "\n".join(shown(memory))


def test_a_card_shows_what_no_tensor_needs():
    text = "\n".join(shown(on_card(), 160, 40))
    # 7 GiB reserved for a peak of 6.1; 7.5 in use by the driver's count.
    assert "fragmented 0.90  outside torch 0.50" in text
    text = "\n".join(shown(on_cpu(), 160, 40))
    assert "fragmented" not in text
    assert "outside torch" not in text


def test_a_peak_above_what_is_reserved_now_is_no_negative_fragmentation():
    memory = MemoryUse(1 * GIB, 9 * GIB, 16 * GIB, 8 * GIB, 7 * GIB)
    assert "fragmented 0.00  outside torch 0.00" in "\n".join(shown(memory, 160, 40))


@pytest.mark.parametrize("size", [(60, 24), (80, 24), (100, 30), (160, 50)])
@pytest.mark.parametrize("memory", [on_card(), on_cpu(), on_card(planned=3 * GIB, spilled=GIB)], ids=["card", "cpu", "trouble"])
def test_the_panel_with_both_gauges_fits_and_keeps_figures_and_curve(size, memory):
    lines = shown(memory, *size)
    text = "\n".join(lines)
    assert len(lines) < size[1]
    assert {cell_len(line) for line in lines} == {size[0]}
    assert "…" not in text
    for figure in ("step 60/100", "1.8000", "1.2500", "3.49", "2.00e-04", "0.512", "2,000", "◆ eval", "of planned"):
        assert figure in text, figure


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (20, 8), (30, 12), (40, 10), (300, 100)])
def test_no_size_is_too_odd_for_both_gauges(size):
    lines = shown(on_card(planned=GIB, spilled=GIB), *size)
    assert "cannot draw" not in "".join(lines)
    assert len(lines) <= max(6, size[1] - 1)


def test_as_the_terminal_gets_lower_the_details_go_first_then_the_legend_then_the_bar():
    console = trained(live_console(80, 6), on_card())
    screens = {}
    for height in range(6, 40):
        console._screen.console.height = height
        screens[height] = "\n".join(panel(console))

    def lowest(needle: str, heights: list[int]) -> int:
        return min(height for height in heights if needle in screens[height])

    least_important_first = ("fragmented", "base weights", "│ tensors ", "tokens/s")
    # Where there is no room for a curve anyway, its lines go to the memory.
    with_curve = [height for height in screens if "◆ eval" in screens[height]]
    for heights in (list(screens), with_curve):
        found = [lowest(needle, heights) for needle in least_important_first]
        assert found == sorted(set(found), reverse=True)
    assert lowest("base weights", list(screens)) < min(with_curve)


def test_blocks_get_shorter_and_the_last_is_one_gauge():
    sizes = [len(block) for block in memory_blocks(on_card(), 60)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) == 4
    assert not any("tensors" in line.plain for line in memory_blocks(on_card(), 60)[-1])


@pytest.mark.parametrize("width", [30, 60, 160])
def test_a_spill_is_said_in_words_whatever_else_is_shown(width):
    for block in memory_blocks(on_card(spilled=int(1.2 * GIB)), width):
        assert "spilled 1.20 GiB to host memory: slow; lower train.micro_batch" in " ".join(line.plain for line in block)
    assert "spilled" not in "\n".join(shown(on_card()))


def test_small_terms_are_told_together_and_none_is_lost():
    found = {terms.BASE: 1000, terms.REST: 4, terms.ADAPTER: 5, terms.OPTIMIZER: 0, terms.SAVED: 2}
    assert shown_terms(found) == {terms.BASE: 1000, "other": 11}
    assert shown_terms({terms.BASE: 10, terms.LOSS: 0}) == {terms.BASE: 10}
    assert shown_terms({}) == {}


def test_the_line_tells_tensors_plan_and_terms():
    told = "base weights 3.25, embedding and head 1.96, saved for backward 0.50, inside a block 0.25, other 0.02"
    assert tensor_line(on_card()) == f"5.98 GiB of tensors (planned 6.02): {told}"
    assert tensor_line(on_card(planned=None)) == f"5.98 GiB of tensors: {told}"
    assert tensor_line(on_card(planned=4 * GIB)) == f"5.98 GiB of tensors (planned 4.00: 50 % over): {told}"
    assert tensor_line(on_cpu(10 * MIB, {terms.BASE: 10 * MIB})) == "10.0 MiB of tensors (planned 10.0): base weights 10.0"
    assert tensor_line(on_cpu(None, {terms.BASE: 512})) == "0.5 KiB of tensors: base weights 0.5"


def test_plain_lines_tell_the_tensors_once_after_the_first_step_that_has_them():
    console = PlainConsole("t", io.StringIO())
    with console:
        console.step(step_report(1, memory=on_cpu(found=None)))
        for step in range(2, 50):
            console.step(step_report(step, memory=on_cpu()))
        console.evaluated(eval_report(49))
    lines = written(console).splitlines()
    told = [index for index, line in enumerate(lines) if line.startswith("memory  ")]
    assert [lines[index] for index in told] == [f"memory  {tensor_line(on_cpu())}"]
    assert lines[1].startswith("step 1/")
    assert lines[told[0] + 1].startswith("step 3/")
