"""Which files a path means, in every way that users write it."""

import os

import pytest

from qlite.data.sources import Source, fingerprint, is_hub, source_bytes, source_files
from qlite.errors import DataError
from tests.data.data_files import GOOD, lines_of, read, refusal, written


def test_a_folder_is_all_files_of_known_kinds_below_it_sorted_by_name(tmp_path):
    for name in ("b.jsonl", "a/z.JSONL", "a.jsonl", "c/d/e.jsonl"):
        written(tmp_path / name, lines_of({"from": name}))
    written(tmp_path / "notes.txt", "text of its own")
    written(tmp_path / "x.bin", b"\0")
    written(tmp_path / ".hidden.jsonl", "broken")
    written(tmp_path / ".git/a.jsonl", "broken")
    written(tmp_path / "README.md", "what this is")
    written(tmp_path / "c/LICENSE.txt", "what one may do")
    names = ["a.jsonl", "a/z.JSONL", "b.jsonl", "c/d/e.jsonl", "notes.txt"]
    assert [row.file for row in read(tmp_path)] == names
    source = Source(path=str(tmp_path))
    assert source_files(source, "k") == [tmp_path / name for name in names]
    assert source_bytes(source, "k") == sum((tmp_path / name).stat().st_size for name in names)


def test_a_readme_is_text_where_a_folder_has_nothing_but_text(tmp_path):
    written(tmp_path / "guide/README.md", "read me")
    written(tmp_path / "a.md", "a")
    assert [row.file for row in read(tmp_path)] == ["a.md", "guide/README.md"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b-z].jsonl", ["b.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "d/c.jsonl", "d/e/f.jsonl"]),
        ("d/**/*.jsonl", ["c.jsonl", "e/f.jsonl"]),
        ("d/**", ["c.jsonl", "e/f.jsonl", "e/g.txt"]),
        ("**/e/*", ["d/e/f.jsonl", "d/e/g.txt"]),
        ("*/*", ["d/c.jsonl"]),
        ("d*/**/f.*", ["d/e/f.jsonl"]),
        ("d/**/../*.jsonl", []),
    ],
)
def test_a_pattern_is_the_files_it_matches_named_from_its_fixed_part(tmp_path, monkeypatch, pattern, names):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "d/c.jsonl", "d/e/f.jsonl", "d/e/g.txt", ".h/i.jsonl", "d/.j.jsonl", "k.bin"):
        written(tmp_path / name, lines_of(GOOD))
    for path in (pattern, str(tmp_path / pattern)):
        if names:
            assert [row.file for row in read(path)] == names
        else:
            assert "no file is called like" in refusal(path)


def test_a_name_with_wildcards_that_exists_is_that_file(tmp_path):
    written(tmp_path / "a[1].jsonl", lines_of({"n": 1}))
    written(tmp_path / "a1.jsonl", lines_of({"n": 2}))
    assert [row.fields["n"] for row in read(tmp_path / "a[1].jsonl")] == [1]


def test_a_missing_file_is_said_with_close_names_and_the_folder_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "orders.jsonl", lines_of(GOOD))
    assert refusal("ordrs.jsonl") == f'there is no "ordrs.jsonl"; did you mean "orders.jsonl"? The folder looked in is "{tmp_path}"'
    assert refusal("xyz.parquet") == f'there is no "xyz.parquet"; the folder looked in is "{tmp_path}"'
    assert refusal("no/such/xyz.csv").endswith(f'there is no folder "{tmp_path}/no/such"')
    assert 'a hub data set is written "org/name"' in refusal("squad")
    assert f'the folder looked in is "{tmp_path}"' in refusal("*.parquet")
    assert 'there is no "~nobody-of-that-name/a.jsonl"' in refusal("~nobody-of-that-name/a.jsonl")
    assert 'there is no "a\\x00b.jsonl"' in refusal("a\0b.jsonl")
    assert "there is no" in refusal("x" * 5000 + ".jsonl")
    for path in ("orders.jsonl", "./orders.jsonl", str(tmp_path / "orders.jsonl")):
        assert len(read(path)) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read("~/orders.jsonl")) == 1


def test_only_an_id_that_is_nothing_on_this_disk_is_a_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("org/name")
    assert is_hub("HuggingFaceH4/ultrachat_200k")
    assert is_hub("org/name-v1.0")
    for path in (
        "squad",
        "./org/name",
        "/org/name",
        "~/name",
        "a/b/c",
        "org/name.jsonl",
        "org/a.jsonl.gz",
        "org/*",
        "../org",
        "org/",
        "ö/x",
    ):
        assert not is_hub(path), path
    written(tmp_path / "org/name/a.jsonl", lines_of(GOOD))
    assert not is_hub("org/name")
    assert len(read("org/name")) == 1


def test_a_folder_or_pattern_without_data_says_what_it_holds(tmp_path):
    assert f'the folder "{tmp_path}" holds no file; files that are read end in .jsonl, ' in refusal(tmp_path)
    for name in ("a.bin", "b.gz", "c", "d.xlsx", "e.pdf", "f.doc", "g.bin"):
        written(tmp_path / name, "x")
    assert "holds only a.bin, b.gz, c, d.xlsx, e.pdf and 2 more; files" in refusal(tmp_path)
    assert "holds only b.gz; files that are read end in" in refusal(tmp_path / "*.gz")


def test_control_characters_and_odd_bytes_in_names_never_reach_a_message(tmp_path):
    name = os.fsdecode(b"a\x1b[31m\n\xff.jsonl")
    written(tmp_path / name, "broken")
    assert refusal(tmp_path).startswith("a\\x1b[31m\\n\\udcff.jsonl line 1: not JSON")
    assert refusal(tmp_path / name).startswith("a\\x1b[31m\\n\\udcff.jsonl line 1: not JSON")
    assert len(fingerprint(Source(path=str(tmp_path)), "k")) == 64


def test_links_are_followed_and_those_without_an_end_are_refused(tmp_path):
    written(tmp_path / "real/a.jsonl", lines_of(GOOD))
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path / "real")
    (data / "b.jsonl").symlink_to(tmp_path / "real/a.jsonl")
    assert [row.file for row in read(data)] == ["b.jsonl", "link/a.jsonl"]
    assert [row.file for row in read(data / "**/*.jsonl")] == ["b.jsonl", "link/a.jsonl"]
    (tmp_path / "real/back").symlink_to(data)
    for path in (data, data / "**/*.jsonl"):
        assert "leads back to a folder that it lies in" in refusal(path)
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "self.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    gone = refusal(tmp_path / "gone.jsonl")
    assert gone.startswith("gone.jsonl: cannot read the file, which is a link to /")
    assert gone.endswith(" (No such file or directory)")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/self.jsonl").symlink_to("self.jsonl")
    assert "self.jsonl: cannot read the file, which is a link to self.jsonl" in refusal(tmp_path / "links")


def test_pipes_and_devices_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl: is a named pipe, and only regular files are read; write its content to a file"
    assert "is a named pipe" in refusal(tmp_path)
    with pytest.raises(DataError, match="is a named pipe"):
        fingerprint(Source(path=str(tmp_path)), "k")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert "zero.txt: is a device" in refusal(tmp_path / "zero.txt")
    assert "is a device" in refusal("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_said(tmp_path):
    written(tmp_path / "a.jsonl", lines_of(GOOD)).chmod(0)
    assert "a.jsonl: cannot read the file (Permission denied)" in refusal(tmp_path / "a.jsonl")
    written(tmp_path / "d/a.jsonl", lines_of(GOOD))
    (tmp_path / "d").chmod(0)
    assert "cannot look into the folder" in refusal(tmp_path / "d")
    (tmp_path / "d").chmod(0o700)
