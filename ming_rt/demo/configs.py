"""Upstream's config files of the four generations as objects: at the real dimensions and tiny."""

from __future__ import annotations

from typing import Any, Literal

from ming_rt.config import GENERATIONS, Generation

Size = Literal["tiny", "real"]

TINY_BASE_VOCAB = 768  # 256 bytes and the merges of the demo tokenizer


def special_tokens(generation: Generation) -> list[str]:
    """The added tokens in the order of their ids, which follow the base vocabulary without a gap."""
    ends = ["<imagePatch>", "<image>", "</image>", "<video>", "</video>"]
    ends += [
        "<gen_imagePatch>",
        "<gen_image>",
        "</gen_image>",
        "<imageHere>",
        "<end_of_chunk>",
        "<end_of_audio>",
    ]
    ends += ["<audioPatch>", "<audio>", "</audio>", "<gen_audioPatch>", "<gen_audio>", "</gen_audio>"]
    ends += ["<audioHere>", "<framePatch>", "<text>", "<asr>", "<tts>"]
    starts = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]"]
    arithmetic = ["<|arithmetic_start|>", "<|arithmetic_end|>", "<|number_start|>", "<|number_end|>"]
    if generation == "flash":
        starts += ["<|role_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
        arithmetic = [arithmetic[i] for i in (1, 3, 0, 2)]
    reserved = [f"<|reserved_token_{n}|>" for n in range(5 if generation == "flash" else 0, 256)]
    return [*starts, *reserved, "<role>", "</role>", *arithmetic, *ends]


def base_vocab(generation: Generation, size: Size) -> int:
    """Tokens of the base vocabulary: the id of the first added token."""
    if size == "tiny":
        return TINY_BASE_VOCAB
    return 156891 if generation == "flash" else 126080


def config_dict(generation: Generation, size: Size = "tiny", num_layers: int | None = None) -> dict[str, Any]:
    """config.json as an object.

    Args:
        generation: "preview", "v1", "v1.5" or "flash".
        size: the shipped dimensions, or the demo checkpoint's (layout and relations as shipped).
        num_layers: layers of the thinker, by default all.
    """
    if generation not in GENERATIONS or size not in ("tiny", "real"):
        raise ValueError(
            f"config_dict: expected {GENERATIONS} and tiny or real, got {generation!r}, {size!r}"
        )
    flash = generation == "flash"
    names = ("BailingMM2Native", "bailingmm_moe_v2_lite") if flash else ("BailingMMNative", "bailingmm")
    config: dict[str, Any] = {
        "architectures": [f"{names[0]}ForConditionalGeneration"],
        "model_type": names[1],
        "mlp_depth": 2,
        "torch_dtype": "bfloat16" if flash else "float32",
        "transformers_version": "4.53.0" if flash else "4.45.0",
        "llm_config": _flash_llm(size) if flash else _lite_llm(generation, size),
        "vision_config": _vision(size),
    }
    if num_layers is not None:
        config["llm_config"]["num_hidden_layers"] = num_layers
    whisper = {"ds_kernel_size": 3, "ds_stride": 2, "whisper_encoder_config": _whisper(size)}
    if generation in ("preview", "v1"):
        config["audio_config"] = _sanm(size)
    else:
        config["audio_config"] = {**whisper, "norm_query_embeds": True}
    if generation == "v1":
        config["whisper_config"] = whisper
    if generation in ("v1", "v1.5"):
        config["talker_config"] = {
            "qa_model_hidden_size": config["llm_config"]["hidden_size"],
            "vocab_size": 184445,
            "text_vocab_size": 151677,
            "audio_vocab_size": 32768,
            "vp_feature_size": 192,
            "vp_kernel_size": 1,
            "vp_stride": 1,
        }
    return config


def _ids(generation: Generation, size: Size) -> tuple[dict[str, int], int]:
    """Ids of the added tokens, and the embedding rows (a few more than there are tokens)."""
    first = base_vocab(generation, size)
    ids = {token: first + i for i, token in enumerate(special_tokens(generation))}
    if size == "tiny":
        return ids, -(-(len(ids) + first) // 64) * 64
    return ids, 157184 if generation == "flash" else 126464


def _lite_llm(generation: Generation, size: Size) -> dict[str, Any]:
    ids, vocab = _ids(generation, size)
    config: dict[str, Any] = {
        "architectures": ["BailingMoeForCausalLM"],
        "model_type": "bailing_moe",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "first_k_dense_replace": 0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "image_patch_token": ids["<imagePatch>"],
        "initializer_range": 0.006,
        "intermediate_size": 5632,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "multi_gate": True,
        "norm_head": generation == "preview",
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "num_shared_experts": 2,
        "output_router_logits": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5 if generation == "v1.5" else 1e-6,
        "rope_scaling": {"type": "3D", "factor": None} if generation == "v1.5" else None,
        "rope_theta": 600000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }
    if generation == "v1.5":
        config |= {"image_start_token": ids["<image>"], "video_start_token": ids["<video>"]}
    if generation == "preview":
        del config["head_dim"]  # hidden_size / num_attention_heads
    if size == "tiny":
        config |= {
            "hidden_size": 512 if generation == "preview" else 256,
            "intermediate_size": 352,
            "moe_intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
        }
    return config


def _flash_llm(size: Size) -> dict[str, Any]:
    ids, vocab = _ids("flash", size)
    config: dict[str, Any] = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "eos_token_id": ids["<|role_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "image_patch_token": ids["<imagePatch>"],
        "video_patch_token": ids["<framePatch>"],
        "image_start_token": ids["<image>"],
        "video_start_token": ids["</image>"],  # as shipped; the id of <video> would be the next one
        "initializer_range": 0.006,
        "intermediate_size": 9216,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 1024,
        "moe_router_topk_scaling_factor": 2.5,
        "n_group": 8,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "output_router_logits": False,
        "partial_rotary_factor": 0.5,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "video_rope", "factor": None},
        "rope_theta": 600000,
        "router_type": "MultiRouter",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": True,
        "use_expert_bias": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "vocab_size": vocab,
    }
    if size == "tiny":
        config |= {
            "hidden_size": 512,
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "num_hidden_layers": 3,
        }
    return config


def _vision(size: Size) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen2_5_VisionTransformer"],
        "model_type": "qwen2_5_vit",
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": 3456,
        "num_heads": 16,
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 8192,
        "torch_dtype": "float32",
    }
    if size == "tiny":
        config |= {"depth": 4, "hidden_size": 160, "intermediate_size": 432, "num_heads": 2}
        config |= {"fullatt_block_indexes": [1, 3], "out_hidden_size": 256}
    return config


def _whisper(size: Size) -> dict[str, int]:
    if size == "tiny":
        return {"n_mels": 128, "n_ctx": 3000, "n_state": 128, "n_head": 2, "n_layer": 2}
    return {"n_mels": 128, "n_ctx": 15000, "n_state": 1280, "n_head": 20, "n_layer": 32}


def _sanm(size: Size) -> dict[str, Any]:
    encoder = {
        "attention_dropout_rate": 0.1,
        "attention_heads": 4,
        "dropout_rate": 0.1,
        "input_layer": "pe",
        "input_size": 560,
        "kernel_size": 11,
        "linear_units": 2048,
        "normalize_before": True,
        "num_blocks": 50,
        "output_size": 512,
        "pos_enc_class": "SinusoidalPositionEncoder",
        "positional_dropout_rate": 0.1,
        "sanm_shfit": 0,
        "selfattention_layer_type": "sanm",
    }
    if size == "tiny":
        encoder |= {"attention_heads": 2, "linear_units": 256, "num_blocks": 4, "output_size": 128}
    return {
        "model_type": "bailingmm",
        "audio_encoder_output_size": encoder["output_size"],
        "ds_conv_type": "conv",
        "ds_kernel_size": 1,
        "ds_stride": 1,
        "norm_query_embeds": True,
        "audio_encoder_config_sanm": encoder,
        "audio_wav_frontend_config_sanm": {},
    }


def preprocessor_dict(generation: Generation) -> dict[str, Any]:
    """preprocessor_config.json as an object."""
    flash = generation == "flash"
    prefix = "BailingMM2" if flash else "BailingMM"
    return {
        "min_pixels": 78400,
        "max_pixels": 2007040 if flash else 802816,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_token": "<image>",
        "video_token": "<video>",
        "audio_token": "<audio>",
        "image_processor_type": f"{prefix}ImageProcessor",
        "feature_extractor_type" if flash else "audio_processor_type": f"{prefix}AudioProcessor",
        "processor_class": f"{prefix}Processor",
        "sampling_rate": 16000,
        "wav_frontend_args": {
            "cmvn_file": "am.mvn",
            "fs": 16000,
            "window": "hamming",
            "n_mels": 80,
            "frame_length": 25,
            "frame_shift": 10,
            "lfr_m": 7,
            "lfr_n": 6,
        },
        "whisper_frontend_args": {"n_mels": 128},
    }
