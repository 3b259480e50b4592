"""Merging actions, one method a file; importing this package registers all of them."""

import importlib
import pkgutil


def load_all() -> None:
    """Import every module of this package, so that each registers itself; safe to call again."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
