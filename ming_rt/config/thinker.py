"""llm_config: the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ming_rt.config.keys import UNUSED
from ming_rt.config.rope import RopeConfig, read_rope
from ming_rt.strict_json import REQUIRED, Fields

Generation = Literal["preview", "v1", "v1.5", "flash"]
GENERATIONS: tuple[Generation, ...] = get_args(Generation)


@dataclass(frozen=True)
class ThinkerConfig:
    """The language model: BailingMoe ("moe": preview, v1, v1.5) or BailingMoeV2 ("moe_v2": flash)."""

    arch: Literal["moe", "moe_v2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int | None  # dense MLP width, used by layers below first_k_dense_replace
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    use_qkv_bias: bool
    use_bias: bool
    use_qk_norm: bool
    rms_norm_eps: float
    norm_weight_in_fp32: bool  # True: round once after the weight (v1.5); False: round, then multiply
    rope: RopeConfig
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int
    norm_topk_prob: bool
    first_k_dense_replace: int
    multi_gate: bool  # three routers (text, image, audio) instead of one
    router: Literal["softmax", "grouped_sigmoid"]
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_head: bool
    image_patch_token: int
    video_patch_token: int
    image_start_token: int | None
    video_start_token: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    ignored_keys: tuple[str, ...] = ()

    @property
    def generation(self) -> Generation:
        """Which of the four generations has these settings."""
        if self.arch == "moe_v2":
            return "flash"
        if self.rope.type == "3D":
            return "v1.5"
        return "preview" if self.norm_head else "v1"

    @property
    def num_dense_layers(self) -> int:
        """First layers without experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ThinkerConfig:
        """Reads a whole config.json or its ``llm_config`` part. Raises ConfigError."""
        top = Fields(data, "")
        llm = top.required_section("llm_config") if "llm_config" in data else top
        v2 = _read_arch(llm) == "moe_v2"
        hidden = llm.integer("hidden_size")
        heads = llm.integer("num_attention_heads", hi=4096)
        kv_heads = llm.integer("num_key_value_heads", hi=4096)
        if heads % kv_heads:
            raise llm.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        head_dim = llm.integer("head_dim", None, lo=2, hi=1024)
        if head_dim is None:
            if hidden % heads:
                raise llm.fail("head_dim", f"a value (hidden_size {hidden} is no multiple of {heads} heads)")
            head_dim = hidden // heads
        llm.choice("hidden_act", ("silu",), "silu")
        llm.choice("tie_word_embeddings", (False,), False)
        llm.absent("quantization_config")
        vocab = llm.integer("vocab_size", hi=1 << 24)
        layers = llm.integer("num_hidden_layers", hi=1024)
        dense = llm.integer("first_k_dense_replace", 0, lo=0, hi=layers)
        experts = llm.integer("num_experts", lo=2, hi=4096)
        top_k = llm.integer("num_experts_per_tok", hi=min(experts, 64))
        groups = llm.integer("n_group", 8, hi=experts) if v2 else 1
        top_groups = llm.integer("topk_group", min(4, groups), hi=groups) if v2 else 1
        if v2 and (experts % groups or experts // groups < 2):
            raise llm.fail("n_group", f"a divisor of num_experts ({experts}), two experts or more a group")
        if v2 and top_k > experts // groups * top_groups:
            raise llm.fail(
                "num_experts_per_tok", f"at most {experts // groups * top_groups} (topk_group groups)"
            )
        if v2:
            multi_gate = llm.choice("router_type", ("MultiRouter", "topN"), "topN") == "MultiRouter"
        else:
            multi_gate = llm.flag("multi_gate", False)

        def token(key: str, default: Any = None) -> Any:
            return llm.integer(key, default, lo=0, hi=vocab - 1)

        rope = read_rope(llm, head_dim, "moe_v2" if v2 else "moe")
        start = REQUIRED if rope.sections else None  # the three-axis positions look for these tokens
        image_patch = token("image_patch_token", REQUIRED if v2 or vocab <= 126346 else 126346)
        return cls(
            arch="moe_v2" if v2 else "moe",
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=llm.integer("intermediate_size", REQUIRED if dense else None),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            use_qkv_bias=llm.flag("use_qkv_bias", False),
            use_bias=llm.flag("use_bias", True),
            use_qk_norm=v2,
            rms_norm_eps=llm.number("rms_norm_eps", 1e-5, hi=0.1),
            norm_weight_in_fp32=not v2 and rope.type == "3D",
            rope=rope,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=llm.integer("moe_intermediate_size"),
            num_shared_experts=llm.integer("num_shared_experts", 0, lo=0, hi=64),
            norm_topk_prob=v2 or llm.flag("norm_topk_prob", True),
            first_k_dense_replace=dense,
            multi_gate=multi_gate,
            router="grouped_sigmoid" if v2 else "softmax",
            n_group=groups,
            topk_group=top_groups,
            routed_scaling_factor=llm.number("routed_scaling_factor", 2.5, hi=1e4) if v2 else 1.0,
            norm_head=not v2 and llm.flag("norm_head", False),
            image_patch_token=image_patch,
            video_patch_token=token("video_patch_token", REQUIRED) if v2 else image_patch,
            image_start_token=token("image_start_token", start),
            video_start_token=token("video_start_token", start),
            eos_token_id=token("eos_token_id"),
            pad_token_id=token("pad_token_id"),
            ignored_keys=llm.ignored(UNUSED),
        )


def _read_arch(llm: Fields) -> Literal["moe", "moe_v2"]:
    kind = llm.choice("model_type", ("bailing_moe", "bailing_moe_v2"), None)
    if kind is None:
        names = llm.data.get("architectures")
        kind = "bailing_moe_v2" if names == ["BailingMoeV2ForCausalLM"] else None
        if kind is None and names != ["BailingMoeForCausalLM"]:
            raise llm.fail("model_type", "'bailing_moe' or 'bailing_moe_v2'")
    return "moe_v2" if kind == "bailing_moe_v2" else "moe"
