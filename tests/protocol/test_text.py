"""Control characters in outside text are escaped, exceptions become sentences, and both can be encoded."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.text import sentence, shape_of, visible, visible_lines

texts = st.text(st.characters())  # lone surrogates included


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("guest-a 模", "guest-a 模"),
        ("a\nb\x1b[2J\x7f\x85", "a\\nb\\x1b[2J\\x7f\\x85"),
        ("\u202egpj.exe\u2028\u200b\ufeff", "\\u202egpj.exe\\u2028\\u200b\\ufeff"),
        ("/tmp/\udcff\udcfe", "/tmp/\\udcff\\udcfe"),
        ("\U000e0001", "\\U000e0001"),
    ],
    ids=["what prints", "control characters", "what turns or breaks lines", "no UTF-8", "beyond 16 bits"],
)
def test_visible_escapes_only_unprintable_characters(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(texts)
def test_visible_text_prints_and_encodes_and_is_left_as_it_is(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown.encode().decode() == visible(shown)


@given(st.lists(texts.map(lambda text: text.replace("\n", ""))))
def test_visible_lines_keeps_newlines_and_escapes_the_rest_of_each_line(lines: list[str]) -> None:
    assert visible_lines("\n".join(lines)) == "\n".join(map(visible, lines))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("too \x1b[7mmuch"), "too \\x1b[7mmuch"),
        (RuntimeError(), "RuntimeError"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a\udcff"), "/a\\udcff: No such file"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"/a"), "/a: No such file"),
        (OSError("a path too long"), "a path too long"),
        (
            ExceptionGroup("several", [ExceptionGroup("more", [ValueError("the first"), KeyError("x")])]),
            "the first",
        ),
    ],
    ids=["its text", "no text", "of the system", "a path", "a path in bytes", "no errno", "a group's first"],
)
def test_the_sentence_of_an_exception_is_its_cause_and_no_repr(error: Exception, text: str) -> None:
    assert sentence(error) == text


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1, "a", b""], "an array of 3"),
        ({"a": 1}, "a map of 1"),
        (None, "nil"),
        (True, "a boolean"),
        (5, "an integer"),
        (0.5, "a float"),
        ("secret", "a string"),
        (b"secret", "bytes"),
        (object(), "a value of another type"),
    ],
)
def test_the_form_of_a_value_shows_its_type_and_not_its_contents(value: object, named: str) -> None:
    assert shape_of(value) == named
