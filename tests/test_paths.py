"""``~`` and variables in paths: expanded by one rule, and written so that they read back as they are."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megalite.paths import escape, expand


@given(st.text(min_size=1).filter(lambda text: "\0" not in text))
@example("~")
@example("~root/$HOME/${HOME}")
@example("$$")
def test_what_is_spelled_is_read_back(text: str) -> None:
    read = expand(escape(text))
    assert read == (f"./{text}" if text.startswith("~") else text)


def test_a_variable_is_not_expanded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "$INNER/$$")
    assert expand("${OUTER}/x") == "$INNER/$$/x"


def test_a_user_has_a_home() -> None:
    assert expand("~root/x") == os.path.expanduser("~root/x") != "~root/x"


@pytest.mark.parametrize("text", ["${}", "${1}/x", "${A B}", "${", "${A"])
def test_what_looks_like_a_variable_and_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no variable; write"):
        expand(text)
