"""What cameras are called in the observation convention, wherever their pictures come from."""

from __future__ import annotations

import re
from collections.abc import Iterable


def camera_name(key: str) -> str:
    """The key of a camera's image in the convention: "arm/wrist" and "arm.wrist" become "image_arm_wrist".

    "image", and what begins with "image_", stays.
    """
    name = re.sub("[/.]", "_", key)
    return name if name == "image" or name.startswith("image_") else f"image_{name}"


def camera_names(keys: Iterable[str], where: str) -> dict[str, str]:
    """``camera_name`` of several cameras -> their keys, in order.

    Args:
        keys: what the cameras are called at their origin.
        where: their origin, for the message.

    Raises:
        ValueError: two of them would get one name.
    """
    names: dict[str, str] = {}
    for key in keys:
        other = names.setdefault(name := camera_name(key), key)
        if other != key:
            raise ValueError(f"{where}: the cameras {other!r} and {key!r} would both be {name!r}; rename or drop one")
    return names
