"""Declared: an input of a scorer that is gathered only for methods whose row declares it."""

from typing import Any, Generic, TypeVar

from kvloom.errors import MethodError

T = TypeVar("T")


class Declared(Generic[T]):
    """Attribute of a `ScoreContext` that reads the entry of the same name in `gathered`.

    Reading it raises `MethodError`, naming the `need` to declare, in a method that did not.
    """

    def __init__(self, need: str) -> None:
        self.need = need
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, context: Any, owner: type) -> T:
        found: T | None = getattr(context.gathered, self.name)
        if found is None:
            raise undeclared(context.method, self.name, self.need)
        return found


def undeclared(method: str, what: str, need: str) -> MethodError:
    """Return the error of a method that reads an input that it did not declare."""
    return MethodError(f"{method} reads {what}, which it did not declare; add {need} to its needs")
