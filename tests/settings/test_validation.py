"""What pydantic found, in our words."""

from typing import Annotated

import pytest
from pydantic import AfterValidator, TypeAdapter, ValidationError

from megalite.settings.validation import validation_lines


def refuse(value: int) -> int:
    raise ValueError(f"{value} is odd")


def test_an_error_names_its_place_and_not_pydantic() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, Annotated[int, AfterValidator(refuse)]]).validate_python({"a": 3, "b": 5})
    assert validation_lines(caught.value) == ["a: 3 is odd", "b: 5 is odd"]
    assert validation_lines(caught.value, below=1) == ["the file: 3 is odd", "the file: 5 is odd"]
    assert validation_lines(caught.value, below=1, whole="") == ["3 is odd", "5 is odd"]
