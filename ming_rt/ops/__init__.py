"""The typed Python face of every kernel: one function per op, torch tensors in and out.

Beside each ``op`` stands ``op_torch``: the same contract as a plain torch composition, which is the readable
definition, the reference of the tests and the baseline of the benches.

Tensors live on the CPU or on a CUDA device, all of one call on the same one. An op refuses a wrong dtype,
shape, layout or value with a ``ValueError`` that names the op, what was expected and what it got. Values in
device memory cannot be refused beforehand: ``check_device`` tells what a kernel met there.
"""

from __future__ import annotations

from ming_rt.ops._native import check_device, cuda_missing, emulate, emulated, is_emulating
from ming_rt.ops._native import cpu as _cpu
from ming_rt.ops.attention import (
    attention_paged,
    attention_paged_torch,
    attention_varlen,
    attention_varlen_torch,
)
from ming_rt.ops.audio_bpe import (
    AudioBpe,
    audio_bpe_decode,
    audio_bpe_decode_torch,
    audio_bpe_encode,
    audio_bpe_encode_torch,
)
from ming_rt.ops.conv import conv_frames, conv_frames_torch
from ming_rt.ops.decode import advance, advance_torch
from ming_rt.ops.embed import embed, embed_torch
from ming_rt.ops.experts import (
    ExpertWeights,
    grouped_gemm_down,
    grouped_gemm_down_torch,
    grouped_gemm_swiglu,
    grouped_gemm_swiglu_torch,
    pack_experts,
    set_prefill_kernel,
)
from ming_rt.ops.gemm import linear, linear_swiglu, linear_swiglu_torch, linear_torch
from ming_rt.ops.group_norm import group_norm, group_norm_torch
from ming_rt.ops.image import (
    patchify,
    patchify_torch,
    resize_frames,
    resize_frames_torch,
    resize_u8,
    resize_u8_torch,
)
from ming_rt.ops.istft import Stft, istft, istft_torch, stft, stft_torch
from ming_rt.ops.moe import (
    RouterWeights,
    moe_combine,
    moe_combine_torch,
    moe_permute,
    moe_permute_torch,
    moe_route,
    moe_route_torch,
)
from ming_rt.ops.norm import layer_norm, layer_norm_torch, rms_norm, rms_norm_torch
from ming_rt.ops.packed import (
    PackedWeight,
    pack_gate_up,
    pack_gate_up_torch,
    pack_weight,
    pack_weight_torch,
    quantise_torch,
)
from ming_rt.ops.rope import (
    axis_table,
    inv_freq,
    rope_append,
    rope_append_torch,
    rope_frequencies,
    rope_qk_,
    rope_qk_torch_,
    rope_table,
    rope_table_torch,
)
from ming_rt.ops.sampling import ngram_bans, ngram_bans_torch, sample, sample_torch
from ming_rt.ops.sine_source import sine_source, sine_source_torch
from ming_rt.ops.spectral import (
    fbank,
    fbank_torch,
    lfr_cmvn,
    lfr_cmvn_torch,
    log_mel,
    log_mel_torch,
    resample,
    resample_torch,
)

ISAS = ("portable", "avx2", "avx512")


def isa() -> str:
    """The instruction set the kernels run with: ``portable``, ``avx2`` or ``avx512``."""
    return _cpu.isa()


def set_isa(name: str) -> None:
    """Use a lower instruction set than the best one (also: environment variable ``MING_RT_ISA``).

    Raises ValueError for an unknown name or one this CPU lacks.
    """
    _cpu.set_isa(name)


def available_isas() -> tuple[str, ...]:
    """The instruction sets this CPU can run, worst first."""
    return ISAS[: ISAS.index(_cpu.best_isa()) + 1]


def num_threads() -> int:
    """Threads a kernel uses, the calling one included."""
    return _cpu.num_threads()


def set_num_threads(n: int) -> None:
    """Set the kernels' thread count, 1..1024 (also: environment variable ``MING_RT_THREADS``)."""
    _cpu.set_num_threads(n)


__all__ = [
    "ISAS",
    "AudioBpe",
    "ExpertWeights",
    "PackedWeight",
    "RouterWeights",
    "Stft",
    "advance",
    "advance_torch",
    "attention_paged",
    "attention_paged_torch",
    "attention_varlen",
    "attention_varlen_torch",
    "audio_bpe_decode",
    "audio_bpe_decode_torch",
    "audio_bpe_encode",
    "audio_bpe_encode_torch",
    "available_isas",
    "axis_table",
    "check_device",
    "conv_frames",
    "conv_frames_torch",
    "cuda_missing",
    "embed",
    "embed_torch",
    "emulate",
    "emulated",
    "fbank",
    "fbank_torch",
    "group_norm",
    "group_norm_torch",
    "grouped_gemm_down",
    "grouped_gemm_down_torch",
    "grouped_gemm_swiglu",
    "grouped_gemm_swiglu_torch",
    "inv_freq",
    "is_emulating",
    "isa",
    "istft",
    "istft_torch",
    "layer_norm",
    "layer_norm_torch",
    "lfr_cmvn",
    "lfr_cmvn_torch",
    "linear",
    "linear_swiglu",
    "linear_swiglu_torch",
    "linear_torch",
    "log_mel",
    "log_mel_torch",
    "moe_combine",
    "moe_combine_torch",
    "moe_permute",
    "moe_permute_torch",
    "moe_route",
    "moe_route_torch",
    "ngram_bans",
    "ngram_bans_torch",
    "num_threads",
    "pack_experts",
    "pack_gate_up",
    "pack_gate_up_torch",
    "pack_weight",
    "pack_weight_torch",
    "patchify",
    "patchify_torch",
    "quantise_torch",
    "resample",
    "resample_torch",
    "resize_frames",
    "resize_frames_torch",
    "resize_u8",
    "resize_u8_torch",
    "rms_norm",
    "rms_norm_torch",
    "rope_append",
    "rope_append_torch",
    "rope_frequencies",
    "rope_qk_",
    "rope_qk_torch_",
    "rope_table",
    "rope_table_torch",
    "sample",
    "sample_torch",
    "set_isa",
    "set_num_threads",
    "set_prefill_kernel",
    "sine_source",
    "sine_source_torch",
    "stft",
    "stft_torch",
]
