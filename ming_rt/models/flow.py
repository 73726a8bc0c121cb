"""The flow-matching model: codec tokens to mel frames, in the voice of a speaker vector.

An encoder makes a condition for every frame, then an ordinary differential equation is solved from noise to
mel in a few Euler steps. In each step the estimator sees the frames twice, with and without condition, as one
batch of two; the difference is the guidance.
"""

from __future__ import annotations

import numpy as np
import torch

from ming_rt import ops
from ming_rt.config.speech import FlowConfig
from ming_rt.layers.conv import Conv1d
from ming_rt.layers.linear import Linear
from ming_rt.layers.tap import Tap, no_tap
from ming_rt.models.flow_encoder import CausalFlowEncoder, FlowEncoder
from ming_rt.models.flow_estimator import FlowEstimator
from ming_rt.models.flow_noise import FRAMES, fixed_noise
from ming_rt.runtime.transfer import send
from ming_rt.runtime.weights import WeightSource

EPS = 1e-5
REGULATOR_STEPS = 4


def time_grid(steps: int) -> tuple[torch.Tensor, list[float]]:
    """Times f32 ``[steps]`` at which the estimator is asked, and the lengths of the steps.

    They lie dense near 0: the grid is 1 - cos of equal angles. Times add up from the lengths.
    """
    grid = 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * torch.pi)
    now, times, lengths = grid[0], [], []
    for end in grid[1:]:
        times.append(now)
        lengths.append(end - now)
        now = now + lengths[-1]
    return torch.stack(times), [float(length) for length in lengths]


class LengthRegulator:
    """Stretches v1's token rate to the mel rate: nearest neighbour, then convolutions."""

    def __init__(self, config: FlowConfig, src: WeightSource, name: str = "length_regulator.model") -> None:
        width = config.output_size
        self.convs = [Conv1d(src, f"{name}.{3 * step}", width, width, 3) for step in range(REGULATOR_STEPS)]
        self.norms = [
            [src.tensor(f"{name}.{3 * step + 1}.{part}", (width,), src.dtype) for part in ("weight", "bias")]
            for step in range(REGULATOR_STEPS)
        ]
        self.out = Conv1d(src, f"{name}.{3 * REGULATOR_STEPS}", width, width, 1)

    def __call__(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """``[N, C]`` -> ``[frames, C]``."""
        nearest = np.floor(np.arange(frames, dtype=np.float32) * (np.float32(len(x)) / np.float32(frames)))
        (rows,) = send([np.minimum(nearest.astype(np.int64), len(x) - 1)], x.device)
        x, pad = x[rows][None], self.convs[0].pad
        x = torch.nn.functional.pad(x, (0, 0, *pad))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = ops.group_norm(conv(x, padded=True), *norm, EPS, act="mish", pad=pad)
        return self.out(x[:, pad[0] : pad[0] + frames])[0]


class Flow:
    """Codec tokens to mel, of preview and v1 or (``config.causal``) of v1.5; in float32."""

    def __init__(self, config: FlowConfig, src: WeightSource) -> None:
        self.config = config
        shape = (config.vocab_size, config.input_size)
        self.embedding = src.tensor("input_embedding.weight", shape, src.dtype)
        self.speaker_map = Linear(src, "spk_embed_affine_layer", config.spk_embed_dim, config.output_size)
        self.encoder = (CausalFlowEncoder if config.causal else FlowEncoder)(config.encoder, src)
        self.encoder_proj = Linear(src, "encoder_proj", config.encoder.output_size, config.output_size)
        self.regulator = None if config.causal else LengthRegulator(config, src)
        self.estimator = FlowEstimator(config.estimator, src)
        self.device, self.dtype = src.device, src.dtype

    def frames(self, tokens: int) -> int:
        """Mel frames that so many tokens become, prompt and piece together."""
        config = self.config
        if config.causal:
            return tokens * config.token_mel_ratio
        seconds = np.float32(tokens) / np.float32(config.input_frame_rate)
        return int(seconds * np.float32(config.sample_rate) / np.float32(config.hop))

    def noise(self, frames: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise f32 ``[frames, C]`` on the CPU to start from: of v1.5's fixed table, otherwise fresh.

        Raises:
            ValueError: more frames than the table has.
        """
        channels = self.config.output_size
        if not self.config.causal:
            return torch.randn(frames, channels, generator=generator)
        if frames > FRAMES:
            raise ValueError(f"flow: expected at most {FRAMES} mel frames, got {frames}")
        return torch.from_numpy(np.ascontiguousarray(fixed_noise(channels)[:, :frames].T))

    def speaker(self, embedding: torch.Tensor) -> torch.Tensor:
        """A voice's vector ``[spk_embed_dim]`` -> ``[C]``."""
        row = torch.nn.functional.normalize(embedding[None].float(), dim=1, eps=1e-12)
        return self.speaker_map(row.to(self.dtype))[0]

    def condition(
        self, tokens: torch.Tensor, context: int = 0, *, chunked: bool = False, tap: Tap = no_tap
    ) -> torch.Tensor:
        """Tokens i64 ``[N]`` -> ``[frames, C]``; the last ``context`` of them (v1.5) are only looked at.

        ``chunked`` (v1.5): frames see no further than the end of their chunk.
        """
        x = ops.embed(tokens, self.embedding)
        tap("token_embedding", x)
        if self.regulator is None:
            main, rest = x[: len(x) - context], x[len(x) - context :]
            x = self.encoder(main, rest if context else None, chunked, tap)
        else:
            x = self.encoder(x, tap)
        tap("encoder_out", x)
        x = self.encoder_proj(x)
        tap("encoder_proj", x)
        return x if self.regulator is None else self.regulator(x, self.frames(len(tokens)))

    def solve(
        self,
        noise: torch.Tensor,
        condition: torch.Tensor,
        speaker: torch.Tensor,
        prompt: torch.Tensor | None = None,
        *,
        chunked: bool = False,
        tap: Tap = no_tap,
    ) -> torch.Tensor:
        """Noise ``[T, C]`` and condition ``[T, C]`` -> mel ``[T, C]``.

        Args:
            speaker: ``[C]``.
            prompt: mel of the first frames, ``[P, C]``.
            chunked: frames see no further than the end of their chunk (v1.5).
        """
        frames, channels = noise.shape
        inputs = noise.new_zeros(2, frames, self.config.estimator.in_channels)
        x, *given = inputs.split(channels, dim=2)
        for part, value in zip(given, (condition, speaker), strict=False):
            part[0] = value
        if prompt is not None:
            given[2][0, : len(prompt)] = prompt
        times, lengths = time_grid(self.config.steps)
        tap("t_steps", times)
        shifts = self.estimator.times(times.to(noise.device))
        levels = self.estimator.layout(2, frames, chunked)
        with_condition, guidance = 1 + self.config.guidance, self.config.guidance
        state = noise
        for step, length in enumerate(lengths):
            tap(f"x_step_{step}", state)
            x[:] = state
            v = self.estimator(inputs, shifts[step], levels)
            tap(f"v_step_{step}", v)
            state = state + length * (with_condition * v[0] - guidance * v[1])
        return state

    def __call__(
        self,
        tokens: torch.Tensor,
        embedding: torch.Tensor,
        noise: torch.Tensor,
        *,
        prompt_tokens: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
        final: bool = True,
        chunked: bool = False,
        tap: Tap = no_tap,
    ) -> torch.Tensor:
        """Mel of a piece, f32 ``[T, C]`` without the prompt's frames.

        Args:
            tokens: codec tokens i64 ``[N]``.
            embedding: the voice's vector ``[spk_embed_dim]``.
            noise: ``[frames, C]``, of prompt and piece together; on the CPU or the model's device.
            prompt_tokens: those of the voice's recording, i64 ``[P]``.
            prompt_mel: its frames ``[F, C]``, which the result leaves out; v1.5 continues them, in preview
                and v1 only their number counts.
            final: nothing follows; otherwise the last tokens are only looked at (v1.5).
            chunked: frames see no further than the end of their chunk, so that they stay when more follows
                (v1.5).

        Raises:
            ValueError: noise of another shape, or no tokens to speak.
        """
        config = self.config
        whole = tokens if prompt_tokens is None else torch.cat([prompt_tokens, tokens])
        context = 0 if final else config.pre_lookahead_len
        frames, dropped = self.frames(len(whole) - context), 0 if prompt_mel is None else len(prompt_mel)
        if frames <= dropped:
            raise ValueError(f"flow: expected tokens of more than {dropped} mel frames, got {frames} frames")
        if noise.shape != (frames, config.output_size):
            raise ValueError(
                f"flow: expected noise of shape {[frames, config.output_size]}, got {list(noise.shape)}"
            )
        whole, embedding, noise = (x.to(self.device) for x in (whole, embedding, noise))
        condition = self.condition(whole, context, chunked=chunked, tap=tap)
        tap("mu", condition)
        prompt = prompt_mel.to(self.device) if config.causal and prompt_mel is not None else None
        speaker = self.speaker(embedding)
        tap("spk", speaker)
        mel = self.solve(noise, condition, speaker, prompt, chunked=chunked, tap=tap)
        return mel[dropped:]
