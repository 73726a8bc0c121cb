"""The one table of numeric tolerances. Tests name a row; no test carries numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    atol: float
    rtol: float


TABLE = {
    # An op against its float64 reference or its torch composition, outputs of order one.
    ("op", torch.float32): Tolerance(2e-5, 2e-5),
    ("op", torch.bfloat16): Tolerance(8e-3, 8e-3),
    # Another order of summation through all layers: kernels or compositions, one rank or several.
    ("model", torch.float32): Tolerance(2e-4, 2e-4),
    # cos and sin against float64 at the same fp32 angle.
    ("rope_table", torch.float32): Tolerance(3e-7, 0.0),
    # Softmax over scores of order 1000: one fp32 ulp of a score moves a weight by 1e-4.
    ("attention_peaked", torch.float32): Tolerance(5e-3, 5e-3),
    ("attention_peaked", torch.bfloat16): Tolerance(2e-2, 2e-2),
    # A fused op against a torch composition that rounds between its steps.
    ("op_composition", torch.float32): Tolerance(2e-5, 2e-5),
    ("op_composition", torch.bfloat16): Tolerance(3e-2, 3e-2),
    # Norm of the difference of whole-model logits, bfloat16 run against float32 run.
    ("model_relative", torch.bfloat16): Tolerance(0.0, 5e-2),
    # Share of 20000 draws against the probability: three standard deviations.
    ("sample_share", torch.float32): Tolerance(1.1e-2, 0.0),
    # Audio features against torch compositions, which run their DFT in fp32.
    ("resample", torch.float32): Tolerance(2e-6, 0.0),
    ("log_mel", torch.float32): Tolerance(1e-4, 0.0),
    ("fbank", torch.float32): Tolerance(1e-3, 0.0),
    ("filter_area", torch.float32): Tolerance(0.0, 0.1),  # a triangle sampled at a few points
    # Pixels of 0..255 after two float passes.
    ("resize_frames", torch.float32): Tolerance(2e-4, 0.0),
    # Recorded outputs of the original implementation, fp32.
    ("golden_logits", torch.float32): Tolerance(1e-3, 0.0),
    ("golden_norm", torch.float32): Tolerance(0.0, 1e-5),
    ("golden_copy", torch.float32): Tolerance(0.0, 0.0),
    ("golden_weight", torch.float32): Tolerance(1e-5, 0.0),
    ("golden_rope", torch.float32): Tolerance(2e-3, 0.0),  # an angle of 4000 rad has 2e-4 rounding in fp32
    ("golden_vision", torch.float32): Tolerance(5e-5, 0.0),
    # Blocks amplify rounding in rows that are almost zero: the recording itself is 4.7e-5 from float64 there.
    ("golden_vision_block", torch.float32): Tolerance(5e-5, 5e-6),
    ("golden_whisper", torch.float32): Tolerance(2e-5, 0.0),
    ("golden_sanm", torch.float32): Tolerance(3e-5, 0.0),
    ("golden_sanm_input", torch.float32): Tolerance(1e-4, 1e-4),
    ("golden_unit_rows", torch.float32): Tolerance(1e-5, 0.0),
    ("golden_reference_image", torch.float32): Tolerance(1e-6, 0.0),
    ("golden_audio_rows", torch.float32): Tolerance(5e-6, 0.0),
    ("golden_wave16k", torch.float32): Tolerance(5e-6, 0.0),
    ("golden_mel", torch.float32): Tolerance(1e-4, 0.0),
    ("golden_mel_filters", torch.float32): Tolerance(1e-8, 0.0),
    ("golden_fbank", torch.float32): Tolerance(1e-3, 0.0),
    ("golden_lfr_cmvn", torch.float32): Tolerance(2e-4, 0.0),
    ("golden_flow", torch.float32): Tolerance(5e-5, 0.0),
    ("golden_flow_solved", torch.float32): Tolerance(2e-4, 0.0),  # after up to ten steps
    ("golden_pixels", torch.float32): Tolerance(1e-6, 0.0),
    ("golden_frames", torch.float32): Tolerance(1e-3, 0.0),
    ("golden_crossfade", torch.float32): Tolerance(1e-6, 0.0),
    ("golden_noise", torch.float32): Tolerance(1e-6, 0.0),  # the logarithm and cosine of another library
    ("golden_f0", torch.float32): Tolerance(2e-4, 0.0),  # Hz, and what stands before the excitation
    ("golden_source", torch.float32): Tolerance(1e-4, 0.0),
    ("golden_vocoder", torch.float32): Tolerance(1e-3, 0.0),
    # v1.5 recorded its phase as an fp32 sum times 480: float64 moves the wave by up to 5e-4.
    ("golden_wave", torch.float32): Tolerance(5e-3, 0.0),
    ("golden_transform", torch.float32): Tolerance(1e-6, 1e-5),
    ("golden_shares", torch.float32): Tolerance(1e-6, 0.0),  # probabilities
}


# Float resizing with another order of summation: rounding ties move a pixel by one level.
FRAME_LEVELS = 1  # largest difference of uint8 frames
FRAME_SHARE = 0.005  # share of the pixels that may differ

WAVE_RMS = 5e-4  # root of the mean square difference of v1.5's recorded waves


# Whole models in bf16 against the same weights in fp32: relative L2 error.
RELATIVE_BF16 = {
    "logits": 0.1,  # each token for which all routers choose the same experts
    "vision": 0.045,  # all rows together: cosine 0.999
    "audio": 0.0142,  # all rows together: cosine 0.9999
}
SAME_EXPERTS_BF16 = 0.9  # share of tokens whose experts rounding does not change


def row_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of each row (last dim)."""
    expected = expected.double()
    return (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, row: str = "op") -> None:
    """Compare against the table row for ``actual.dtype`` (or its float32 row where the dtype has none)."""
    tol = TABLE.get((row, actual.dtype)) or TABLE[row, torch.float32]
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=tol.atol, rtol=tol.rtol, equal_nan=False, check_device=False
    )
