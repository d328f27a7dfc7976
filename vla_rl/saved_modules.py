"""A head or encoder as a saved policy describes it: checked before import, and before its weights take memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from vla_rl.importing import load_object
from vla_rl.saved_files import RESTORE, check_arguments, one_line

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True)
class SavedModule(Generic[Kind]):
    """Class and arguments of a module.

    Attributes:
        cls: the module's class.
        kwargs: its constructor's arguments.
        unknown_fields: what else the description holds.
        where: names the place of the description, for errors.
    """

    cls: type[Kind]
    kwargs: dict[str, Any]
    unknown_fields: dict[str, Any]
    where: str

    @classmethod
    def from_json(cls, value: Any, base: type[Kind], *, where: str) -> SavedModule[Kind]:
        """The description `{"class": "package.module:Class", "kwargs": {...}, ...}`, checked.

        Args:
            value: what a JSON file gave.
            base: what the class has to be a subclass of; it is imported from Python's path, never from the file's
                directory.
            where: names the place of the description, for errors.

        Raises:
            ValueError: it is malformed, names no subclass of `base`, or has arguments that the class does not take.
        """
        if not isinstance(value, dict) or not {"class", "kwargs"} <= value.keys():
            raise ValueError(
                f"{where} is no object with 'class' and 'kwargs', which describe the {base.__name__}; {RESTORE}"
            )
        module_class = load_object(value["class"])
        if not (isinstance(module_class, type) and issubclass(module_class, base)):
            raise ValueError(f"{where} names {value['class'][:80]!r}, which is no {base.__name__}; {RESTORE}")
        check_arguments(module_class, value["kwargs"], where=f"'kwargs' of {where}")
        unknown = {name: field for name, field in value.items() if name not in ("class", "kwargs")}
        return cls(module_class, value["kwargs"], unknown, where)

    def sketch(self) -> Kind:
        """The module without memory for its weights, to read their shapes; a whole one if its class needs numbers.

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

    def build(self) -> Kind:
        """The module with fresh weights.

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
