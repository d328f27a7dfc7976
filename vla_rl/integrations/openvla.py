"""OpenVLA as an encoder: its code lives in its hub repository, so that it runs only pinned to a commit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_rl.encoders import FrozenVLMEncoder

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"


def openvla_encoder(
    name: str = "openvla/openvla-7b", *, revision: str, trust_remote_code: bool = False, **kwargs: Any
) -> FrozenVLMEncoder:
    """Hidden states of OpenVLA (or a model fine-tuned from it) as features; its `generate` is never called.

    Args:
        name: hub id.
        revision: commit of the repository, 40 hexadecimal digits: read its code at that commit first.
        trust_remote_code: has to be True: the repository's code runs on your machine.
        kwargs: of `FrozenVLMEncoder.from_pretrained`, such as `dtype`, `device` and `lora`.

    Raises:
        ValueError: the revision is no commit, or `trust_remote_code` is not set.
    """
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(
            f"revision={revision!r}: {name} runs code from its repository, and branches and tags move; give the commit "
            "that you have read, 40 hexadecimal digits"
        )
    if not trust_remote_code:
        raise ValueError(
            f"{name} runs code from its repository; read it at commit {revision[:8]} and give trust_remote_code=True"
        )
    from vla_rl.encoders import FrozenVLMEncoder

    return FrozenVLMEncoder.from_pretrained(
        name, revision=revision, trust_remote_code=True, **{"prompt": PROMPT, **kwargs}
    )
