"""Files that are whole or not there: several writers of one, long names, what killed ones leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from iks_plugin.files import remove_unfinished, whole_file


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_of_two_writers_the_last_one_wins_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.iks"
    with whole_file(path) as slow:
        slow.write_bytes(b"slow ")
        with whole_file(path) as fast:
            fast.write_bytes(b"fast, and longer than the other")
        assert path.read_bytes() == b"fast, and longer than the other"
        with slow.open("ab") as file:
            file.write(b"and late")
    assert path.read_bytes() == b"slow and late"
    assert names(tmp_path) == ["m.iks"]


def test_a_writer_that_fails_takes_nothing_from_another(tmp_path: Path) -> None:
    with whole_file(tmp_path / "m.iks") as good:
        good.write_bytes(b"good")
        with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "m.iks") as bad:
            bad.write_bytes(b"bad")
            raise ZeroDivisionError
        assert not (tmp_path / "m.iks").exists()
    assert (tmp_path / "m.iks").read_bytes() == b"good"
    assert names(tmp_path) == ["m.iks"]


@pytest.mark.parametrize("name", ["a" * 255, "\xe9" * 127, "\u6f22" * 85, "\U0001f600" * 63], ids=len)
def test_names_as_long_as_they_may_be(tmp_path: Path, name: str) -> None:
    with whole_file(tmp_path / name) as unfinished:
        unfinished.write_bytes(b"x")
    assert names(tmp_path) == [name]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for name in ("m.iks", ".hidden", ".of an older version.iks-unfinished"):
        (tmp_path / name).touch()
    writer = whole_file(tmp_path / "m.iks")
    writer.__enter__().touch()  # and killed
    assert len(names(tmp_path)) == 4
    remove_unfinished([tmp_path, tmp_path / "missing"])
    assert sorted(names(tmp_path)) == [".hidden", "m.iks"]
