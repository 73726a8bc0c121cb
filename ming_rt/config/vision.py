"""vision_config: the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ming_rt.config.keys import UNUSED
from ming_rt.strict_json import REQUIRED, Fields


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2.5-type vision tower (tensors ``vision.*``); RMSNorm eps is 1e-6 throughout."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    rms_norm_eps: float = 1e-6
    norm_weight_in_fp32: bool = False  # flash rounds once after the weight
    ignored_keys: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values per patch row: channels x time x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Reads a whole config.json or its ``vision_config`` part. Raises ConfigError."""
        top = Fields(data, "")
        flash = _is_flash(data)
        vision = top.required_section("vision_config") if "vision_config" in data else top
        hidden, heads = vision.integer("hidden_size"), vision.integer("num_heads", hi=1024)
        if hidden % (4 * heads):
            raise vision.fail("num_heads", f"hidden_size {hidden} / num_heads to be a multiple of 4")
        vision.choice("hidden_act", ("silu",), "silu")
        depth = vision.integer("depth", hi=1024)
        full = vision.get("fullatt_block_indexes", REQUIRED, "a list of block indices")
        if not isinstance(full, (list, tuple)) or not all(type(i) is int and 0 <= i < depth for i in full):
            raise vision.fail("fullatt_block_indexes", f"a list of block indices below depth ({depth})")
        # The patch geometry is shared with the image front end and the size rules, which are fixed in code.
        patch, merge = vision.choice("patch_size", (14,)), vision.choice("spatial_merge_size", (2,))
        window = vision.integer("window_size", hi=1 << 14)
        if window % (patch * merge):
            raise vision.fail("window_size", f"a multiple of {patch * merge} (patch x merge size)")
        return cls(
            depth=depth,
            hidden_size=hidden,
            num_heads=heads,
            intermediate_size=vision.integer("intermediate_size"),
            in_channels=vision.choice("in_channels", (3,), 3),
            patch_size=patch,
            temporal_patch_size=vision.choice("temporal_patch_size", (2,)),
            spatial_merge_size=merge,
            window_size=window,
            fullatt_block_indexes=tuple(sorted(set(full))),
            out_hidden_size=vision.integer("out_hidden_size"),
            norm_weight_in_fp32=flash,
            ignored_keys=vision.ignored(UNUSED),
        )


def _is_flash(data: Mapping[str, Any]) -> bool:
    """Whether a whole config.json is flash's; False for a part of one."""
    llm = data.get("llm_config")
    return data.get("model_type") == "bailingmm_moe_v2_lite" or (
        isinstance(llm, Mapping) and llm.get("model_type") == "bailing_moe_v2"
    )
