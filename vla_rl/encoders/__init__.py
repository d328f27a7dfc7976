"""Encoders: frames and instructions to `Features`, through any Hugging Face vision-language model kept frozen."""

from vla_rl.encoders.base import Encoder
from vla_rl.encoders.features import Features
from vla_rl.encoders.lora import LoRASettings
from vla_rl.encoders.small import small_vlm
from vla_rl.encoders.vlm import FrozenVLMEncoder

__all__ = ["Encoder", "Features", "FrozenVLMEncoder", "LoRASettings", "small_vlm"]
