"""How a method that was made of a function of `farebox.calls` shows itself: to `help`, and to an editor."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

M = TypeVar("M", bound=Callable[..., Any])


def shown_as(build: Callable[..., Any], *, given: int = 0) -> Callable[[M], M]:
    """Give a method the name, the words and the arguments of *build*, behind `self`.

    Args:
        given: of the first so many arguments the method takes care itself.
    """

    def show(method: M) -> M:
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        asked = list(inspect.signature(build).parameters.values())[given:]
        method.__name__, method.__doc__ = build.__name__, build.__doc__
        method.__qualname__ = build.__name__
        method.__dict__["__signature__"] = inspect.Signature([itself, *asked])
        return method

    return show
