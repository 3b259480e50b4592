"""The page of models says what the registry says, and every family on it has a test."""

import pytest

from harness.families import VARIANTS
from kvloom.models.families import FAMILIES
from kvloom.models.page import recomputed


def test_the_computed_parts_of_the_page_are_current(request):
    page = (request.config.rootpath / "docs" / "models.md").read_text(encoding="utf-8")
    assert recomputed(page) == page


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_is_compared_with_transformers(name):
    import transformers

    kinds = {kind for kind, _ in VARIANTS.values()} | {"Gemma3Text"}  # Gemma 3 has tests of its own
    types = {getattr(transformers, f"{kind}Config").model_type for kind in kinds}
    assert types & set(FAMILIES.get(name).config.model_types)
