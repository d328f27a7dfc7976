"""A head as a saved policy describes it: checked before its class is imported, and before its weights take memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vla_rl.heads.base import ActionHead
from vla_rl.importing import load_object
from vla_rl.saved_files import RESTORE, check_arguments, one_line


@dataclass(frozen=True)
class SavedHead:
    """Class and arguments of a head.

    Attributes:
        cls: the head's class.
        kwargs: its constructor's arguments.
        unknown_fields: what else the description holds.
        where: names the place of the description, for errors.
    """

    cls: type[ActionHead]
    kwargs: dict[str, Any]
    unknown_fields: dict[str, Any]
    where: str

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> SavedHead:
        """The description `{"class": "package.module:Class", "kwargs": {...}, ...}`, checked.

        Raises:
            ValueError: it is malformed, names no `ActionHead`, or has arguments that the class does not take.
        """
        if not isinstance(value, dict) or not {"class", "kwargs"} <= value.keys():
            raise ValueError(f"{where} is no object with 'class' and 'kwargs', which describe the head; {RESTORE}")
        head_class = load_object(value["class"])
        if not (isinstance(head_class, type) and issubclass(head_class, ActionHead)):
            raise ValueError(f"{where} names {value['class'][:80]!r}, which is no ActionHead; {RESTORE}")
        check_arguments(head_class, value["kwargs"], where=f"'kwargs' of {where}")
        unknown = {name: field for name, field in value.items() if name not in ("class", "kwargs")}
        return cls(head_class, value["kwargs"], unknown, where)

    def sketch(self) -> ActionHead:
        """The head without memory for its weights, to read their shapes; a whole one if its class needs numbers.

        Raises:
            ValueError: the class refuses the arguments.
        """
        try:
            with torch.device("meta"):
                return self.cls(**self.kwargs)
        except Exception as error:  # the class may be anyone's
            if "meta" in str(error):  # it looks at the numbers in its weights, and there are none
                return self.build()
            raise self._refused(error) from error

    def build(self) -> ActionHead:
        """The head with fresh weights.

        Raises:
            ValueError: the class refuses the arguments.
        """
        try:
            return self.cls(**self.kwargs)
        except Exception as error:  # the class may be anyone's
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.where} describes a {self.cls.__name__} that cannot be built "
            f"({type(error).__name__}: {one_line(error)}); {RESTORE}"
        )
