"""Everything made up: random checkpoints in upstream's layout, a picture, a sound, a clip.

Names are resolved on first use: asking for a config must not import the models or the media libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ming_rt.demo.checkpoint import default_checkpoint, make_checkpoint
    from ming_rt.demo.configs import config_dict, preprocessor_dict, special_tokens
    from ming_rt.demo.media import DemoMedia, demo_media

_HOMES = {
    "DemoMedia": "media",
    "config_dict": "configs",
    "default_checkpoint": "checkpoint",
    "demo_media": "media",
    "make_checkpoint": "checkpoint",
    "preprocessor_dict": "configs",
    "special_tokens": "configs",
}
__all__ = [
    "DemoMedia",
    "config_dict",
    "default_checkpoint",
    "demo_media",
    "make_checkpoint",
    "preprocessor_dict",
    "special_tokens",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ming_rt.demo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ming_rt.demo.{_HOMES[name]}"), name)
