"""Checks of settings in one sentence each, before these cost any time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(settings: Any) -> None:
    """Check the fields of a dataclass that are annotated with a Literal: Python itself does not.

    Raises:
        ValueError: one holds none of its choices.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        if get_origin(hints[field.name]) is Literal:
            check_choice(hints[field.name], **{field.name: getattr(settings, field.name)})


def check_choice(literal: Any, **settings: Any) -> None:
    """Raise ValueError unless all settings are among the choices of a Literal."""
    for name, value in settings.items():
        if value not in get_args(literal):
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, get_args(literal)))}")


def check_least(least: float, **settings: float) -> None:
    """Raise ValueError unless all settings are at least `least`."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name}={value}; expected at least {least}")


def check_positive(**settings: float) -> None:
    """Raise ValueError unless all settings are above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}={value}; expected a number above 0")


def check_share(**settings: float) -> None:
    """Raise ValueError unless all settings lie from 0 to 1."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}; expected a number from 0 to 1")
