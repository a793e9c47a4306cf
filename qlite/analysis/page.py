"""A study of an adapter as one HTML file that loads nothing: curves over rank and block, similarity as maps, and the advice."""

from collections.abc import Callable
from pathlib import PurePath

import torch
from torch import Tensor

from qlite.analysis.findings import Findings, Linear, average, chosen
from qlite.analysis.similarity import Overlap, by_chance
from qlite.analysis.spectrum import SHARE
from qlite.recipe.share import local_name
from qlite.reporting.chart import TALL, Chart, Line
from qlite.reporting.document import document
from qlite.reporting.heat import Heat
from qlite.reporting.markup import prose, section, short, table
from qlite.reporting.scale import Point

LOOKS = [f"run{colour}{f' dash{dash}' if dash else ''}" for dash in range(4) for colour in range(6)]


def page(found: Findings) -> str:
    """Return the page."""
    title = " beside ".join(_names([name for name in (found.adapter, found.other) if name]))
    notes = "".join(f"<p>{prose(note, 500)}</p>" for note in found.notes)
    kind = "two adapters" if found.other else "an adapter"
    over = f"Over {prose(local_name(found.base or 'a base that it does not name'), 200)}, {len(found.linears)} linears."
    header = (
        f'<header><p class="eyebrow">qlite, a study of {kind}</p><h1>{prose(title, 200)}</h1><p class="lead">{over}</p>{notes}</header>'
    )
    sections = [
        section("ranks", "How much rank it uses", *_ranks(found)),
        section("advice", "What rank to use next time", *(f"<p>{prose(line)}</p>" for line in found.advice())),
        section("overlap", "How alike the two are", *_overlaps(found)),
        section("amplification", "What it makes of the base", *_amplified(found)),
    ]
    return document(f"{title} · qlite", header, sections)


def _names(paths: list[str]) -> list[str]:
    """Return what the folders themselves are called, for a page may go to others, or the paths where that is the same."""
    names = [PurePath(path.replace("\\", "/")).name or path for path in paths]
    return names if len(set(names)) == len(names) else paths


def _lines(found: Findings, points: Callable[[list[Linear]], list[Point]]) -> list[Line]:
    """Return a line for each name that linears have."""
    made = [(leaf, points(found.of(leaf))) for leaf in found.leaves]
    return [Line(leaf, own, LOOKS[index % len(LOOKS)], has_dots=len(own) < 40) for index, (leaf, own) in enumerate(made)]


def _ranks(found: Findings) -> list[str]:
    whole = found.kept()
    enough = next(rank for rank, kept in enumerate(whole, start=1) if kept >= SHARE)
    told = f"All linears, each cut to the same rank: {SHARE:.0%} of the energy is left at rank {enough}, of {len(whole)}."
    curves = [Line("all linears", _counted(whole), "plan")]
    curves += [line for line in _lines(found, lambda own: _counted(found.kept(own[0].leaf))) if len(found.leaves) > 1]
    kept = Chart("kept", "Energy that is left", "share of ‖ΔW‖²", told, curves, TALL, from_zero=True, counted="rank")
    effective = Chart(
        "effective", "Effective rank", "directions", "exp of the entropy of the singular values (Roy and Vetterli 2007).",
        _lines(found, lambda own: _blocks(own, lambda each: each.effective_rank)), from_zero=True, counted="block",
    )  # fmt: skip
    energy = Chart(
        "energy", "Where the change is", "share of the adapter's ‖ΔW‖²", "Of all linears together it is 1.",
        _lines(found, lambda own: _blocks(own, lambda each: each.share)), from_zero=True, counted="block",
    )  # fmt: skip
    return [kept.draw(), f'<div class="pair">{effective.draw()}{energy.draw()}</div>']


def _counted(values: list[float]) -> list[Point]:
    return [(rank, value) for rank, value in enumerate(values, start=1)]


def _blocks(own: list[Linear], value: Callable[[Linear], float]) -> list[Point]:
    """Return (block, value), in order of blocks; of several linears of one name in a block, their mean."""
    by_block: dict[int, list[float]] = {}
    for each in own:
        by_block.setdefault(each.block, []).append(value(each))
    return [(block, average(values)) for block, values in sorted(by_block.items())]


def _overlaps(found: Findings) -> list[str]:
    if not found.overlaps:
        return []
    own = {leaf: [each for each in found.of(leaf) if each.name in found.overlaps] for leaf in found.leaves}
    own = {leaf: linears for leaf, linears in own.items() if linears}
    words = (
        "φ(i, j) is the share of the smaller of two subspaces that lies in the larger: the i strongest directions of one adapter's A "
        "and the j strongest of the other's (arXiv:2106.09685, section 7.2). Empty is 0, full 1; what chance gives is drawn beside it."
    )
    maps = []
    for leaf, linears in own.items():
        overlaps = [found.overlaps[each.name] for each in linears]
        maps += [_map(f"{leaf}, mean of {len(overlaps)}", _mean([each.phi for each in overlaps])).draw("j", "i")]
        maps += [_map(f"{leaf}, by chance", _mean([each.chance for each in overlaps])).draw("j", "i")]
    every = [each for linears in own.values() for each in linears]
    small = "".join(_map(f"{each.leaf} {each.block}", found.overlaps[each.name].phi).draw("j", "i", True) for each in every)
    cosine = Chart(
        "cosine", "Whether they change the same", "cosine of ΔW and ΔW", "1: the same up to size; 0: nothing to do with each other.",
        [Line(leaf, _blocks(linears, lambda each: found.overlaps[each.name].cosine), LOOKS[index % len(LOOKS)], has_dots=len(linears) < 40)
         for index, (leaf, linears) in enumerate(own.items())], counted="block",
    )  # fmt: skip
    rows = [_overlap_row(leaf, [found.overlaps[each.name] for each in linears]) for leaf, linears in own.items()]
    head = ["linear", "φ(1, 1)", "φ of all directions", "by chance", f"inputs of {SHARE:.0%}", f"outputs of {SHARE:.0%}", "cosine"]
    each_linear = f'<details><summary>Each linear</summary><div class="heats">{small}</div></details>'
    return [f"<p>{words}</p>", table(head, rows, "numbers"), f'<div class="heats">{"".join(maps)}</div>', each_linear, cosine.draw()]


def _overlap_row(leaf: str, own: list[Overlap]) -> list[str]:
    chance = average(by_chance(*each.phi.shape, each.dimensions) for each in own)
    ends = (average(float(each.phi[place, place]) for each in own) for place in (0, -1))
    means = (average(getattr(each, name) for each in own) for name in ("inputs", "outputs", "cosine"))
    return [prose(leaf), *(short(value, 2) for value in (*ends, chance, *means))]


def _mean(maps: list[Tensor]) -> Tensor:
    """Return the mean of those that have the shape of the first: ranks may differ from block to block."""
    return torch.stack([each for each in maps if each.shape == maps[0].shape]).mean(0)


def _map(title: str, values: Tensor) -> Heat:
    rows, columns = map(chosen, values.shape)
    shown = values[[i - 1 for i in rows]][:, [j - 1 for j in columns]]
    return Heat(title, shown.tolist(), rows, columns)


def _amplified(found: Findings) -> list[str]:
    if not found.amplified:
        return []
    words = (
        "‖ΔW‖ over ‖UᵀWV‖, with U and V the update's directions: how much stronger it makes what the base does there (arXiv:2106.09685, "
        "section 7.3, table 7). Had it gone where W is strongest, the factor would be the first of the other two; anywhere, the second."
    )
    chart = Chart(
        "factor", "Amplification", "‖ΔW‖ over ‖UᵀWV‖", "Block by block.",
        _lines(found, lambda own: _blocks(own, lambda each: found.amplified[each.name].factor)), from_zero=True, counted="block",
    )  # fmt: skip
    rows = []
    for leaf in found.leaves:
        own = [found.amplified[each.name] for each in found.of(leaf)]
        names = ("rank", "weight", "update", "within", "own", "random", "factor", "own_factor", "random_factor")
        rows.append([prose(leaf), *(short(average(getattr(each, name) for each in own), 3) for name in names)])
    head = ["linear, mean", "rank", "‖W‖", "‖ΔW‖", "‖UᵀWV‖ of ΔW", "of W", "of chance", "factor", "if W's", "if chance"]
    return [f"<p>{words}</p>", table(head, rows, "numbers"), chart.draw()]
