"""What enters a model after it was folded: whoever folded it gets a look before families are resolved."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

__all__ = ["base_of", "greet_newcomers", "when_greeted"]

_GREETER = "_foldpar_greeter"


def base_of(model: nn.Module) -> nn.Module:
    """The model that a library's model of adapters is around, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return cast(nn.Module, get()) if get is not None and hasattr(model, "peft_config") else model


def when_greeted(model: nn.Module, greet: Callable[[nn.Module], None]) -> None:
    """Let ``greet(model)`` run whenever the families of the model, or of one around it, are asked for.

    It sees what libraries have put in, marks what it knows and refuses what it must; it communicates nothing, and
    repeating it does nothing.
    """
    setattr(model, _GREETER, greet)


def greet_newcomers(model: nn.Module) -> None:
    """Run what :func:`when_greeted` was told, for this model and those inside it."""
    for module in list(model.modules()):
        greet: Callable[[nn.Module], None] | None = vars(module).get(_GREETER)
        if greet is not None:
            greet(module)
