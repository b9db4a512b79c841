"""The table of transformers' model types is what the library does with them."""

from __future__ import annotations

import pytest
import transformers
from hf_models import FAMILIES
from pages import DOCS, models_script

PAGE = DOCS["models"]
ROWS = {row.split(" | ")[0].strip("|` "): row for row in PAGE.splitlines() if row.startswith("| `")}


def test_every_family_that_is_compared_says_so() -> None:
    """Types of several parts, such as vision and text, have a row for each."""
    for family in FAMILIES:
        if family != "jetmoe":
            assert any("| compared |" in row for name, row in ROWS.items() if name.startswith(family)), family
    assert "| refused |" in ROWS["jetmoe"] and "\n- `jetmoe`: " in PAGE


@pytest.mark.skipif(
    f"transformers {transformers.__version__} whose" not in PAGE, reason="the table is of another version"
)
@pytest.mark.parametrize("model_type", ["mixtral", "flint"])
def test_some_rows_are_up_to_date(model_type: str) -> None:
    models = models_script()
    assert models.line_of(models.row(model_type, models.compared())) == ROWS[model_type] + "\n"


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    f"transformers {transformers.__version__} whose" not in PAGE, reason="the table is of another version"
)
def test_all_rows_are_up_to_date() -> None:
    assert models_script().page() == PAGE
