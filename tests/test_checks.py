"""Checks of arguments: what counts by what it equals, and what is refused with name, found and expected."""

import enum
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pyramid_rt import InputError, checks


class Colour(enum.StrEnum):
    RED = "red"


class OldColour(str, enum.Enum):  # noqa: UP042  (as older code writes it; its str() is another)
    RED = "red"


class Size(enum.IntEnum):
    THREE = 3


THREES = [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), Size.THREE]


@pytest.mark.parametrize("value", THREES, ids=repr)
def test_whole_takes_what_equals_an_integer(value):
    result = checks.whole("n", value, 0, 5)
    assert result == 3
    assert type(result) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", b"3", None, [3],
     torch.tensor([3]), torch.empty((), device="meta", dtype=torch.int64), 10**400, -1],
    ids=lambda value: checks.shown(value)[:20],
)  # fmt: skip
def test_whole_refuses_the_rest(value):
    with pytest.raises(InputError, match=r"^n must be an integer in 0\.\.5, found "):
        checks.whole("n", value, 0, 5)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [((1, None), "integer >= 1, found"), ((None, 1), "integer <= 1, found"), ((), "integer, found")],
)
def test_whole_says_its_bounds(bounds, words):
    with pytest.raises(InputError, match=words):
        checks.whole("n", "x", *bounds)


@pytest.mark.parametrize(
    "value",
    [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16),
     Fraction(1, 2), Decimal("0.5")],
    ids=repr,
)  # fmt: skip
def test_number_takes_what_equals_a_real_number(value):
    result = checks.number("x", value, 0, 1)
    assert result == 0.5
    assert type(result) is float
    assert checks.number("x", 1, 0, 1) == 1.0


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.False_,
        "0.5",
        b"0.5",
        None,
        math.nan,
        1j,
        10**400,
        Decimal("sNaN"),
        [0.5],
        torch.tensor([0.5]),
    ],
    ids=lambda value: checks.shown(value)[:20],
)
def test_number_refuses_the_rest(value):
    with pytest.raises(InputError, match=r"^x must be a number >= 0, found "):
        checks.number("x", value, 0, infinite=True)


def test_bounds_of_a_number():
    assert checks.number("x", math.inf, 0, infinite=True) == math.inf
    for bad in (0, 1.5):
        with pytest.raises(InputError, match=r"in \(0, 1\], found"):
            checks.number("x", bad, above=0, high=1)
    with pytest.raises(InputError, match=r"finite and >= 0, found inf"):
        checks.number("x", math.inf, 0)
    with pytest.raises(InputError, match="and finite, found inf"):
        checks.number("x", math.inf)
    with pytest.raises(InputError, match=r"in \[0, 2\), found 2"):
        checks.number("x", 2, 0, below=2)
    assert checks.number("x", checks.FLOAT32_MAX, 0, checks.FLOAT32_MAX) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)], ids=repr)
def test_flag_takes_booleans(value):
    assert checks.flag("f", value) is True


@pytest.mark.parametrize("value", [1, 0, "yes", "", None, b"", [], np.int64(1), torch.tensor(1)], ids=repr)
def test_flag_refuses_what_only_has_a_truth(value):
    with pytest.raises(InputError, match=r"^f must be True or False, found "):
        checks.flag("f", value)


@pytest.mark.parametrize("value", ["red", Colour.RED, OldColour.RED, np.str_("red")], ids=repr)
def test_text_and_choice_take_what_equals_a_string(value):
    for result in (checks.text("c", value), checks.choice("c", value, ["red", "blue"])):
        assert result == "red"
        assert type(result) is str


@pytest.mark.parametrize("value", [b"red", None, 5, ["red"], Path("red")], ids=repr)
def test_text_and_choice_refuse_the_rest(value):
    with pytest.raises(InputError, match=r"^c must be a string, found "):
        checks.text("c", value)
    with pytest.raises(InputError, match=r"^unknown c .*; expected one of red, blue$"):
        checks.choice("c", value, ["red", "blue"])


def test_path():
    assert checks.path("p", "a/b") == checks.path("p", Path("a/b")) == Path("a/b")
    for bad, words in ((b"a", "a string or"), (5, "a string or"), ("", "a string or"), ("a\0b", "NUL")):
        with pytest.raises(InputError, match=rf"^p must be a path.*{words}"):
            checks.path("p", bad)
    with pytest.raises(InputError, match="encoding"):
        checks.path("p", "\ud800")


@pytest.mark.parametrize(
    "value", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])], ids=repr
)
def test_sequence_takes_ordered_collections(value):
    assert checks.sequence("s", value, "integers") == [1, 2]


@pytest.mark.parametrize(
    "value", ["12", b"12", {1, 2}, {1: 2}, 5, None, torch.tensor([[1, 2]]), np.array(1), iter([1])], ids=repr
)
def test_sequence_refuses_the_rest(value):
    with pytest.raises(InputError, match=r"^s must be a list of integers, found "):
        checks.sequence("s", value, "integers")


def test_instance():
    assert checks.instance("i", Path("a"), Path, "a path object") == Path("a")
    with pytest.raises(InputError, match=r"^i must be a path object, found 5$"):
        checks.instance("i", 5, Path, "a path object")


def test_shown_is_short_and_never_fails():
    class Rude:
        def __repr__(self):
            raise RuntimeError

    assert checks.shown(10**5000) == "an integer of 16610 bits"
    assert len(checks.shown("x" * 10**6)) <= 80
    assert len(checks.shown(list(range(10**6)))) <= 80
    assert "Rude" in checks.shown(Rude())
    assert checks.shown([1, "a"]) == "[1, 'a']"
