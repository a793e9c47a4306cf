"""The page that a run leaves: what it shows, what no text can do to it, that it asks for nothing, and that nothing missing breaks it."""

import base64
import hashlib
import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlite.errors import RunError
from qlite.report import main
from qlite.reporting import document
from qlite.reporting.document import is_ours
from qlite.reporting.markup import plain, prose, short
from qlite.reporting.overlay import LOOKS
from qlite.reporting.run_page import run_page
from qlite.reporting.scale import Axis, evenly, smooth, thin
from qlite.reporting.told import Figures
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import tell, write_report
from tests.tiny_run import STEPS, Watcher, run, tiny_recipe

VOID = {"meta", "br"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' &amp; \x1b[2J\u202eevil\ud800"


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open, self.code = "", [], {"style": "", "script": ""}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]] += data
        else:
            self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, planned, with samples."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_recipe(folder, memory={"plan": "tell"}, train={"samples": ["abc"]}))
    return folder / "run"


@pytest.fixture
def mine(finished, tmp_path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


def page_of(folder: Path) -> Page:
    return Page(run_page(tell(RunFolder(folder))))


def add_records(folder: Path, *records: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def long_run(folder: Path, steps: int) -> None:
    """Write metrics of so many steps into ``folder``, with an outlier each way."""
    first = next(record for record in RunFolder(folder).records.read() if record["kind"] == "step")
    losses = [2 + math.sin(step) / 10 for step in range(1, steps + 1)]
    losses[steps // 3], losses[steps // 2] = 9.25, 0.125
    lines = [json.dumps({**first, "step": step, "steps": steps, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_finished_run_has_its_report_and_everything_is_on_it(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    figures = {"loss", "eval-loss", "lr", "grad-norm", "speed", "memory-bars", "memory-steps", "data-train-lengths", "data-test-lengths"}
    assert figures <= set(page.ids())
    assert {"learning", "memory", "samples", "answers", "data", "notes", "recipe", "versions"} <= set(page.ids())
    result = RunFolder(finished).result
    parameters = json.loads((finished / "overview.json").read_text())["trained_parameters"]
    parts = ["Finished", "LoRA, rank 4", "4 bit (nf4", f"{parameters:,} parameters", f"{result['tokens']:,}", "bitsandbytes", "train.jsonl"]
    parts += [short(result["eval_loss"]), "40 rows of", "warmup_steps = 1", "Most is held in training", f"after step {STEPS}", "abc"]
    parts += [record["text"] for record in RunFolder(finished).records.read() if record["kind"] == "note"]
    assert [part for part in parts if part not in page.text] == []


def test_the_overview_counts_rows_and_tokens(finished):
    train_part, test_part = json.loads((finished / "overview.json").read_text())["parts"]
    assert (train_part["read"], train_part["kept"], train_part["used"], train_part["held_out"]) == (40, 40, 40, 0)
    assert (test_part["key"], test_part["read"], test_part["used"], test_part["held_out"]) == ("data.test", 7, 0, 7)
    assert sum(rows for _, _, rows in train_part["histogram"]) == 40
    assert 0 < train_part["trained_tokens"] < train_part["tokens"]
    assert train_part["lengths"]["low"] <= train_part["lengths"]["median"] <= train_part["lengths"]["high"]


def test_every_figure_has_a_title_a_description_and_a_table(finished):
    page = page_of(finished)
    assert len(page.ids()) == len(set(page.ids()))
    pictures = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("aria-hidden") != "true"]
    assert len(pictures) > 15
    for attrs in pictures:
        assert attrs["role"] == "img"
        if "aria-label" not in attrs:
            assert {attrs["aria-labelledby"], attrs["aria-describedby"]} <= set(page.ids())
    count = [tag for tag, _ in page.elements].count
    assert count("figure") == count("details") == count("summary") == 9


def test_it_asks_for_nothing_and_runs_nothing_but_its_own(finished):
    """No element, attribute, style or script that could load, and a policy that names what may run by its hash."""
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags().isdisjoint({"img", "link", "iframe", "object", "embed", "base", "form", "image", "use", "video", "audio", "source"})
    for _, attrs in page.elements:
        assert not {"src", "srcset", "style", "xlink:href", "action", "data", "poster"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#")[0] == "#"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", page.code["style"] + page.code["script"])
    addresses = set(re.findall(r"\w+://[^\s\"'<]*", text)) - {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody loads
    assert addresses == set()
    (policy,) = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.code[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_texts_of_strangers_are_texts(mine):
    """In samples, answers, notes, names of files and of terms, the recipe, versions."""
    answers = {"kind": "answers", "step": STEPS, "rows": 3, "exact": 0, "samples": [[HOSTILE, HOSTILE, HOSTILE]]}
    add_records(mine, {"kind": "note", "text": HOSTILE}, {"kind": "samples", "step": 6, "samples": [[HOSTILE, HOSTILE]]}, answers)
    for name in ("run.json", "overview.json", "memory.json"):
        facts = json.loads((mine / name).read_text())
        if name == "run.json":
            facts |= {"device": HOSTILE, HOSTILE: HOSTILE}
        elif name == "memory.json":
            facts["measured"]["training"]["terms"][HOSTILE] = 10**6
            facts["measured"][HOSTILE] = {"bytes": 10**6, "terms": {HOSTILE: 10**6}}
        else:
            facts["parts"][0] |= {"key": HOSTILE, "sources": [{"path": HOSTILE, "rows": 3, "format": HOSTILE}]}
        (mine / name).write_text(json.dumps(facts))
    quoted = json.dumps(HOSTILE.replace("\ud800", ""))
    recipe = (mine / "recipe.toml").read_text().replace('name = "lora"', f"name = {quoted}", 1)
    (mine / "recipe.toml").write_text(re.sub(r'\nmodel = ".*"', lambda _: f"\nmodel = {quoted}", recipe))
    folder = mine.rename(mine.with_name("<script>alert(1)<script>&\x1b"))
    page = Page(write_report(RunFolder(folder)).read_text(encoding="utf-8"))
    assert "img" not in page.tags()
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.text.count("<script>alert(1)</script>") > 10
    for unseen in ("\x1b", "\u202e"):
        assert unseen not in page.text
        assert not any(unseen in (value or "") for _, attrs in page.elements for value in attrs.values())
    assert r"\x1b[2J\u202eevil\ud800" in page.text


def test_what_is_unseen_is_shown_and_what_reads_is_left():
    assert prose("a\x1bb") == 'a<span class="unseen">\\x1b</span>b'
    assert plain("a\x00<\ud800\n\u2066") == "a\\x00&lt;\\ud800 \\u2066"
    text = "é\tשלום\nनमस्ते 👩‍👩‍👧"
    assert prose(text) == text
    assert prose("a" * 3000) == "a" * 2000 + " … and 1,000 characters more"


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.toml", "run.json", "overview.json", "memory.json", "result.json", "data.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"5\nnull\n[]\n", b"\xff\xfe\x00" * 50, b"[" * 200_000, b'{"kind": 1}'])
def test_missing_and_damaged_files_break_nothing(mine, name, content):
    if content is None:
        (mine / name).unlink()
    else:
        (mine / name).write_bytes(content)
    page = page_of(mine)
    assert "mine" in page.text
    if content and name not in ("data.json", "metrics.jsonl") and b"kind" not in content:
        assert f"{name}: " in page.text  # that something is missing is said


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 0, 10**400, 1e308, float("nan"), float("inf")])
def test_values_of_another_kind_break_nothing(mine, value):
    def spoiled(thing: object) -> object:
        if isinstance(thing, dict):
            return {key: each if key in ("kind", "text") else spoiled(each) for key, each in thing.items()}
        return [spoiled(each) for each in thing] if isinstance(thing, list) else value

    records = RunFolder(mine).records.read()
    one_by_one = [{**record, key: value} for record in records[-5:] for key in record if key != "kind"]
    for damaged in ([*records, *map(spoiled, records)], one_by_one):
        (mine / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in damaged))
        page_of(mine)
    for name in ("run.json", "overview.json", "memory.json", "result.json"):
        found = json.loads((mine / name).read_text())
        (mine / name).write_text(json.dumps(spoiled(found)))
        page_of(mine)
        (mine / name).write_text(json.dumps(dict.fromkeys(found, value)))
        page_of(mine)


def test_without_records_the_figures_of_the_result_remain(mine):
    result = RunFolder(mine).result
    (mine / "metrics.jsonl").unlink()
    page = page_of(mine)
    assert f"{result['tokens']:,}" in page.text
    assert short(result["eval_loss"], 3) in page.text
    assert "loss" not in page.ids()
    assert "answers" in page.ids()  # which the result keeps, too
    assert "metrics.jsonl: missing or empty" in page.text


def test_an_unfinished_run_can_be_looked_at(tmp_path, capsys):
    run(tiny_recipe(tmp_path), stop_after=3)  # the stop comes before the record of its own step
    assert not (tmp_path / "run" / "report.html").exists()
    main([str(tmp_path / "run")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert f"Not finished: 2 of {STEPS} steps so far" in page_of(tmp_path / "run").text
    run(tiny_recipe(tmp_path))
    assert "Finished" in Page((tmp_path / "run" / "report.html").read_text()).text


def test_thinning_keeps_every_extreme_and_both_ends(mine):
    points = [(float(step), math.sin(step)) for step in range(5000)]
    points[1234], points[4321] = (1234.0, 50.0), (4321.0, -50.0)
    kept = thin(points, 100)
    assert len(kept) <= 202
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
    assert set(kept) <= set(points)
    for bucket in range(100):  # of each stretch, its own
        stretch = [value for _, value in points[1:-1][bucket * 4998 // 100 : (bucket + 1) * 4998 // 100]]
        assert {min(stretch), max(stretch)} <= {value for _, value in kept}
    assert thin(points[:200], 100) == points[:200]
    long_run(mine, 2000)
    (drawn,) = [attrs for tag, attrs in page_of(mine).elements if attrs.get("data-name") == "each step" and "9.25" in attrs["data-points"]]
    values = drawn["data-points"].split()
    assert values[values.index("9.25") - 1] == str(2000 // 3 + 1)
    assert values[values.index("0.125") - 1] == str(2000 // 2 + 1)
    assert len(values) <= 2 * 482


def test_ticks_are_round_and_hold_all_values():
    assert Axis.over([0.53, 2.2], 6).ticks == (0.5, 1.0, 1.5, 2.0, 2.5)
    assert Axis.over([1300, 1575], 5, from_zero=True).ticks == (0, 500, 1000, 1500, 2000)
    axis = Axis.over([0.02, 1.6], may_be_log=True)
    assert axis.is_log
    assert (axis.place(axis.low), axis.place(axis.high)) == (0, 1)
    assert axis.place(0.2) == pytest.approx(math.log(0.2 / axis.low) / math.log(axis.high / axis.low))
    assert [Axis.over([0.0, 7.0], 4).label(tick) for tick in (0.0, 2.5)] == ["0.0", "2.5"]
    assert Axis.over([3.0]).low < 3 < Axis.over([3.0]).high
    assert Axis.along(1, 300).ticks == (100, 200, 300)
    assert Axis.along(5, 5).place(5) == 0
    for low, high in ((1e-9, 2e-9), (-3.0, 5.0), (0.0, 0.0), (1e8, 3e9), (0.999, 1.001)):
        axis = Axis.over([low, high])
        assert axis.low <= low <= high <= axis.high
        assert len({axis.label(tick) for tick in axis.ticks}) == len(axis.ticks) <= 7


def test_smoothing_and_even_choice_are_as_computed_by_hand():
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    assert smooth([3.0] * 500) == pytest.approx([3.0] * 500)
    spike = smooth([0.0] * 50 + [9.0] + [0.0] * 49)  # reach 3, twice: weights 1 2 3 ... 7 ... 3 2 1 of 49
    assert spike[44:58] == pytest.approx([9 * weight / 49 for weight in (1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 0)])
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]


def test_it_is_small_and_quick(mine):
    """2,000 steps with all their curves. Seconds of this process alone, whatever else the machine does."""
    long_run(mine, 2000)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        path = write_report(RunFolder(mine))
        seconds.append(time.process_time() - start)
    print(f"2,000 steps: {path.stat().st_size / 1000:.0f} kB, made and written in {min(seconds):.2f} s of one core")
    assert min(seconds) < 1
    assert path.stat().st_size < 400_000


def light_of(colour: str) -> float:
    """Return the relative luminance of "#1d4f91" (WCAG 2.2, section 1.4.3)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_can_be_told_from_the_paper_in_light_dark_and_print():
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    style = (Path(document.__file__).parent / "page.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 3
    for scheme in schemes:
        colours = {name: "#" + "".join(digit * 2 for digit in each[1:]) if len(each) == 4 else each for name, each in scheme.items()}
        assert {"t0", "t13", "paper"} <= colours.keys()
        for name in colours.keys() - {"paper", "line", "wash"}:
            dark, bright = sorted(light_of(colours[each]) for each in (name, "paper"))
            least = 4.5 if name in ("ink", "soft", "good", "bad", "eval") else 3
            assert (bright + 0.05) / (dark + 0.05) >= least, name


def test_several_runs_lie_over_each_other_with_that_in_which_they_differ(finished, tmp_path, capsys):
    runs = []
    for name, rate in (("a", "0.02"), ("b<i>", "0.03")):
        folder = Path(shutil.copytree(finished, tmp_path / "runs" / name))
        recipe = (folder / "recipe.toml").read_text()
        (folder / "recipe.toml").write_text(recipe.replace("lr = 0.01", f"lr = {rate}").replace("/run", f"/{name}"))
        runs.append(str(folder))
    result = RunFolder(Path(runs[1])).result
    (Path(runs[1]) / "result.json").write_text(json.dumps({**result, "eval_loss": 1.25}))
    main(runs)
    out = tmp_path / "runs" / "compare.html"
    assert capsys.readouterr().out.strip() == str(out)
    page = Page(out.read_text(encoding="utf-8"))
    drawn = [(attrs["data-name"], attrs["class"]) for tag, attrs in page.elements if "data-name" in attrs]
    assert drawn == [("a", "run0"), ("b<i>", "run1")] * 3  # loss, held-out loss, speed
    assert {"loss", "eval-loss", "speed", "figures"} <= set(page.ids())
    differences = page.text.partition("What differs in their recipes")[2]
    assert "optimizer.lr0.020.03" in differences
    assert "method.rank" not in differences
    assert "output.dir" not in differences
    assert "<b>1.25</b>" in out.read_text()
    main(runs)  # its own it writes over


def test_nothing_of_somebody_elses_is_written_over(mine, tmp_path):
    theirs = tmp_path / "theirs.html"
    theirs.write_text("<html>mine</html>")
    (mine / "report.html").write_text("mine")
    for arguments in ([str(mine), "--out", str(theirs)], [str(mine)]):
        with pytest.raises(RunError, match="is no report of qlite's"):
            main(arguments)
    RunFolder(mine).discard()
    assert (mine / "report.html").read_text() == "mine"
    assert theirs.read_text() == "<html>mine</html>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "is no run folder"),
        (["{run}", "--out", "x.txt"], "is an .html file"),
        (["{run}", "{run}/../run"], "named twice"),
        (["nothing", "{run}"], '"nothing" is no run folder'),
    ],
)
def test_mistakes_are_named(finished, arguments, words):
    with pytest.raises(RunError, match=words):
        main([argument.replace("{run}", str(finished)) for argument in arguments])


def test_more_runs_than_can_be_told_apart_are_refused(mine, tmp_path):
    many = [str(shutil.copytree(mine, tmp_path / str(number))) for number in range(len(LOOKS) + 1)]
    with pytest.raises(RunError, match=f"{len(LOOKS) + 1} runs: more than {len(LOOKS)}"):
        main(many)


def test_without_a_name_it_is_the_newest_finished_run(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished, tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    main([])
    assert Path(capsys.readouterr().out.strip()) == Path("runs/one/report.html")


def test_what_stands_in_the_way_of_a_report_ends_no_run_and_is_told(tmp_path):
    recipe, watcher = tiny_recipe(tmp_path, train={"steps": 2}), Watcher()
    run(recipe, stop_after=1)
    (tmp_path / "run" / "report.html").mkdir()
    train(recipe, RunFolder(tmp_path / "run"), watcher)
    assert RunFolder(tmp_path / "run").is_finished
    assert "all is written but the run's report: " in watcher.notes[-1]
    assert not any("the run's report" in record.get("text", "") for record in RunFolder(tmp_path / "run").records.read())


def test_a_flaw_in_the_drawing_ends_no_run_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("qlite.training.run_report.run_page", lambda _: 1 / 0)
    watcher = run(tiny_recipe(tmp_path, train={"steps": 2}))
    assert RunFolder(tmp_path / "run").is_finished
    assert "mistake of qlite's own (ZeroDivisionError" in watcher.notes[-1]


def test_fresh_discards_report_and_overview(mine):
    assert is_ours(mine / "report.html")
    RunFolder(mine).discard()
    assert list(mine.iterdir()) == []


def test_the_figures_are_those_of_the_records(mine):
    (mine / "result.json").unlink()
    figures, records = Figures.of(tell(RunFolder(mine))), RunFolder(mine).records.read()
    steps = [record for record in records if record["kind"] == "step"]
    assert figures.steps == STEPS
    assert figures.tokens == sum(record["tokens"] for record in steps)
    assert figures.first_loss == steps[0]["loss"]
    assert figures.eval_loss == next(record for record in reversed(records) if record["kind"] == "eval")["loss"]
    memory = json.loads((mine / "memory.json").read_text())
    assert figures.tensor_bytes == max(peak["bytes"] for peak in memory["measured"].values())
    assert figures.planned_bytes == memory["planned"]["phases"]["training"]["bytes"]
