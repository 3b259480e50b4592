"""The planner's page says what this version computes."""

from pathlib import Path

import pytest

from kvloom.plan.page import PARTS, fill

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def test_every_computed_part_of_the_page_is_what_is_computed():
    text = PAGE.read_text(encoding="utf-8")
    assert fill(text) == text


@pytest.mark.parametrize("name", list(PARTS))
def test_every_part_is_on_the_page(name):
    assert f"<!-- computed: {name} -->" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "figure",
    [
        "1.342 GB = 1.25 GiB, and 42.95 GB = 40 GiB for 32 users",
        "2.147 GB = 2 GiB",
        "131,072 bytes = 128 KiB a token",
        "131.1 MB for 1,000 tokens",
        "69,120 bytes = 67.5 KiB a token",
        "93.34%",
        "82.2%",
        "56.9 times",
    ],
)
def test_the_corrected_figures_are_on_the_page(figure):
    assert figure in PAGE.read_text(encoding="utf-8")


def test_a_part_of_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        fill("<!-- computed: nothing -->\nx\n<!-- end -->")
