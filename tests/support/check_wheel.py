"""``make dist`` runs this where nothing is installed but the wheel and what it needs: import, solve, draw."""

from importlib import metadata
from pathlib import Path

import foldpar

home = Path(foldpar.__file__).parent
assert "site-packages" in home.parts, f"{home} is no installed package"
assert metadata.version("foldpar") == foldpar.__version__
assert (home / "py.typed").exists()

layout = foldpar.solve_layout(world=8, tp=2, ep=4)
assert layout.group("ep", 1) == (1, 3, 5, 7) and layout.edp == 2

from hypothesis import given, settings, strategies  # noqa: E402  (loads the entry point)

drawn: list[foldpar.FoldedLayout] = []


@settings(max_examples=20, database=None)
@given(strategies.from_type(foldpar.FoldedLayout))
def draw(layout: foldpar.FoldedLayout) -> None:
    drawn.append(layout)


draw()
assert drawn and all(isinstance(each, foldpar.FoldedLayout) for each in drawn)

missing = [name for name in foldpar.__all__ if not hasattr(foldpar, name)]  # loads torch
assert not missing, f"names that the wheel does not have: {missing}"
print(f"foldpar {foldpar.__version__}: {len(foldpar.__all__)} names, {layout!r}, {len(drawn)} layouts drawn")
