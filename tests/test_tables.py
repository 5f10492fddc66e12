"""Tables from files that anybody may have written become dataclasses, or one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.errors import InputError
from dagan_rt.tables import LARGEST_FILE, fill, parse, read_text, refuse_unknown, table


@dataclass(frozen=True)
class Inner:
    weight: float = 1.0

    @classmethod
    def from_number(cls, number: float) -> Inner:
        return cls(2 * number)


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 0
    flag: bool = False
    ratio: float = 0.5
    pair: tuple[float, float] = (1.0, 2.0)
    many: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: str | None = None
    named: dict[str, Inner] = field(default_factory=dict)


def refused(values: Any, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        fill(Outer, values, "file.toml")
    message = str(caught.value)
    assert message.startswith("file.toml: ") and "\n" not in message and len(message) < 300, message
    assert all(word in message for word in words), message


def test_every_kind_of_field() -> None:
    text = """
        name = "x"
        count = 3
        flag = true
        ratio = 2
        pair = [1, 0.5]
        many = ["a", "b"]
        inner = {weight = 4.0}
        maybe = "y"
        named = {first = {weight = 1.5}, second = 3}
    """
    named = {"first": Inner(1.5), "second": Inner(6.0)}
    expected = Outer("x", 3, True, 2.0, (1.0, 0.5), ("a", "b"), Inner(4.0), "y", named)
    assert fill(Outer, parse(text, "file.toml"), "file.toml") == expected
    assert isinstance(expected.ratio, float)


def test_what_is_left_out_comes_from_the_base_or_the_defaults() -> None:
    assert fill(Outer, {"name": "x"}, "file.toml") == Outer("x")
    base = Outer("base", 7, inner=Inner(9.0))
    assert fill(Outer, {"ratio": 0.25}, "file.toml", base=base) == Outer("base", 7, ratio=0.25, inner=Inner(9.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wings": 2}, ["wings is not a known key", "ratio"]),
        ({"k" * 10**6: 2}, ["kkk"]),
        ({"inner": {"wings": 2}}, ["inner.wings"]),
        ({"named": {"a": {"wings": 2}}}, ["named.a.wings"]),
        ({"name": 3}, ["name must be str, got int 3"]),
        ({"name": "x", "count": 1.0}, ["count must be int, got float 1.0"]),
        ({"count": True}, ["count must be int, got bool"]),
        ({"flag": 1}, ["flag must be bool"]),
        ({"ratio": "1"}, ["ratio must be float, got str"]),
        ({"ratio": None}, ["ratio must be float"]),
        ({"maybe": 3}, ["maybe must be str"]),
        ({"many": "a"}, ["many must be a list of str, got 'a'"]),
        ({"many": ["a", 1]}, ["many[1] must be str"]),
        ({"pair": [1.0]}, ["pair must be a list of 2 float"]),
        ({"pair": [1.0, math.nan]}, ["pair[1]", "finite"]),
        ({"inner": [1]}, ["inner must be a table, got list"]),
        ({"named": 3}, ["named must be a table, got int"]),
        ({"named": {"a": []}}, ["named.a must be a table"]),
        ({"name": ["x" * 10**6]}, ["name must be str, got list"]),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: list[str]) -> None:
    refused({"name": "x"} | change, *words)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1, 10**400, -(10**400)])
def test_numbers_are_finite_and_not_negative(value: float) -> None:
    refused({"name": "x", "ratio": value}, "ratio must be finite and not negative")
    refused({"name": "x", "inner": {"weight": value}}, "inner.weight must be finite")


@pytest.mark.parametrize(
    "value", [-1, 1 << 63, 10**400, 16**10_000], ids=["negative", "65 bits", "long", "too long to print"]
)
def test_integers_have_64_bits(value: int) -> None:
    refused({"name": "x", "count": value}, "count must be")
    assert fill(Outer, {"name": "x", "count": (1 << 63) - 1}, "file.toml").count == (1 << 63) - 1


def test_a_field_without_a_default_is_asked_for() -> None:
    refused({}, "lacks name")


@pytest.mark.parametrize("values", [None, [], ["name"], "name", 3])
def test_only_a_table_is_a_table(values: Any) -> None:
    refused(values, "must be a table")
    with pytest.raises(InputError, match=r"\[data\] must be a table, got int"):
        table({"data": 3}, "data", "file.toml")
    assert table({}, "data", "file.toml") == {}
    with pytest.raises(InputError, match="network.wings"):
        refuse_unknown({"wings": 1}, ("size",), "file.toml", "network")


@pytest.mark.parametrize(
    "text",
    ["a = = 1", "a = 1\na = 2", "a = " + "[" * 100_000, "a = " + "9" * 5000, "a = {" * 5000],
)
def test_what_is_no_toml_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match="^file.toml is not valid TOML: ") as caught:
        parse(text, "file.toml")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes("ü = 1".encode())
    assert read_text(path) == "ü = 1"
    path.write_bytes(b"#" * LARGEST_FILE)
    assert len(read_text(path)) == LARGEST_FILE
    for content, words in ((b"#" * (LARGEST_FILE + 1), "at most"), (b"\xff", "utf-8")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            read_text(path, "report")
        assert str(caught.value).startswith(f"report {path} ")
    for missing, words in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "null")):
        with pytest.raises(InputError, match=f"cannot be read: .*{words}"):
            read_text(missing)
