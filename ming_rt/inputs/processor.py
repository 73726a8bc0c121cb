"""A conversation to everything the model reads: token ids, patches, audio features, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ming_rt.config import OmniConfig, WhisperConfig
from ming_rt.errors import (
    ConfigError,
    InvalidMediaError,
    InvalidRequestError,
    TokenizerError,
    UnsupportedError,
)
from ming_rt.inputs import audio, image, video
from ming_rt.inputs.chat_template import (
    Turn,
    expand_segments,
    media_items,
    parse_messages,
    render_segments,
)
from ming_rt.inputs.image_gen import ImageGenInputs, image_gen_inputs
from ming_rt.inputs.limits import DEFAULT_LIMITS, Limits
from ming_rt.inputs.tokenizer import Tokenizer

AudioEncoderName = Literal["whisper", "sanm"]


@dataclass(frozen=True)
class Prompt:
    """One request as the model reads it; media of one kind are concatenated in conversation order."""

    input_ids: np.ndarray  # i64 [S]
    text: str  # the expanded prompt string, without an answer prefix
    pixel_values: np.ndarray | None = None  # f32 [P, 1176], patches of all images
    image_grid_thw: np.ndarray | None = None  # i64 [n, 3], patches per axis of each image
    pixel_values_videos: np.ndarray | None = None
    video_grid_thw: np.ndarray | None = None
    audio_feats: tuple[np.ndarray, ...] = ()  # f32 [T_i, F] of each recording
    audio_encoder: AudioEncoderName | None = None  # None without recordings
    audio_spans: np.ndarray | None = None  # i64 [n, 2], (start, length) of the placeholders; None without
    image_gen: ImageGenInputs | None = None  # only where asked for


class Processor:
    """Makes prompts for one checkpoint; holds no request state, so threads may share it.

    Args:
        config: the checkpoint's configuration.
        tokenizer: the checkpoint's tokenizer.
        directory: where the file of the fbank normalisation lies; needed with a SANM encoder only.
        limits: caps on what a request may bring.

    Raises:
        TokenizerError: the tokenizer lacks a token of the prompts, or disagrees with the configuration.
        ConfigError: the normalisation file is missing or malformed.
    """

    def __init__(
        self,
        config: OmniConfig,
        tokenizer: Tokenizer,
        directory: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self._audio_start = tokenizer.token_id("<audio>")
        for token in ("<role>", "</role>", "</image>", "<video>", "</video>", "<audioPatch>", "</audio>"):
            tokenizer.token_id(token)
        tokenizer.stop_ids(config.generation)
        thinker = config.thinker
        wanted = {"<imagePatch>": thinker.image_patch_token, "<image>": thinker.image_start_token}
        if config.generation == "flash":
            wanted["<framePatch>"] = thinker.video_patch_token
        for token, token_id in wanted.items():
            if config.vision is None or token_id is None:
                continue
            if (found := tokenizer.token_id(token)) != token_id:
                raise TokenizerError(
                    f"token {token}: found id {found}, expected {token_id} as in config.json"
                )
        whisper = config.audio.get("whisper")
        self._max_mel_frames = 2 * whisper.n_ctx if isinstance(whisper, WhisperConfig) else None
        self._cmvn = None
        if "sanm" in config.audio:
            if directory is None:
                raise ConfigError(
                    f"no directory given, expected the one with {config.preprocessor.cmvn_file}"
                )
            self._cmvn = audio.load_cmvn(Path(directory) / config.preprocessor.cmvn_file)

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        use_whisper_encoder: bool | None = None,
        answer_prefix: str = "",
        trust_special: bool = False,
        image_gen: bool = False,
        aspect_ratio: float | None = None,
        highres: bool | int = False,
        **template_options: Any,
    ) -> Prompt:
        """Processes a conversation (the form is described at ``parse_messages``).

        Args:
            messages: the conversation; earlier media have to be repeated in every turn's request.
            use_whisper_encoder: v1 only: Whisper instead of the default SANM features for recordings.
            answer_prefix: text the answer is made to begin with; its ids end the prompt.
            trust_special: special tokens in the conversation's text count, with all quirks of the original
                processor; otherwise they are ordinary text.
            image_gen: also make the inputs of image generation, with ``aspect_ratio`` and ``highres``.
            template_options: ``thinking`` and the others of ``render_segments``.

        Raises:
            InvalidRequestError: malformed or too many messages, or too much text.
            InvalidMediaError: a picture, recording or video cannot be used.
            UnsupportedError: this generation cannot serve the combination of media or options.
        """
        generation, limits = self.config.generation, self.limits
        if not isinstance(answer_prefix, str):
            raise InvalidRequestError(
                f"answer_prefix: expected a string, found {type(answer_prefix).__name__}"
            )
        if not image_gen and (aspect_ratio is not None or highres):
            raise InvalidRequestError("aspect_ratio, highres: expected only together with image_gen=True")
        if isinstance(messages, Sequence) and len(messages) > limits.max_messages:
            raise InvalidRequestError(
                f"messages: found {len(messages)}, expected at most {limits.max_messages}"
            )
        turns = parse_messages(generation, messages, trust_special)
        self._check_length(turns, answer_prefix, template_options)
        images, videos, audios = (media_items(turns, kind) for kind in ("image", "video", "audio"))
        self._check_media(len(images), len(videos), len(audios), trust_special)
        encoder = self._audio_encoder(use_whisper_encoder) if audios else None
        segments = render_segments(generation, messages, trust_special=trust_special, **template_options)

        pictures = [self._image(item) for item in images]
        clips = [self._video(item) for item in videos]
        feats = tuple(self._audio(item, encoder) for item in audios) if encoder else ()
        audio_tokens = [self._audio_tokens(len(f), encoder) for f in feats] if encoder else []
        merge = self.config.preprocessor.merge_size**2
        expanded = expand_segments(
            generation,
            segments,
            [int(np.prod(grid)) // merge for _, grid, _ in pictures],
            [int(np.prod(grid)) // merge for _, grid in clips],
            audio_tokens,
        )
        ids = np.array(self.tokenizer.encode_segments(expanded), np.int64)
        spans = self._audio_spans(ids, audio_tokens)
        prefix = np.array(self.tokenizer.encode(answer_prefix, allow_special=trust_special), np.int64)
        template = "".join(text for text, _ in segments)
        first = pictures[0][2] if pictures else None
        return Prompt(
            input_ids=np.concatenate([ids, prefix]),
            text="".join(text for text, _ in expanded),
            pixel_values=np.concatenate([pixels for pixels, _, _ in pictures]) if pictures else None,
            image_grid_thw=np.array([grid for _, grid, _ in pictures], np.int64) if pictures else None,
            pixel_values_videos=np.concatenate([pixels for pixels, _ in clips]) if clips else None,
            video_grid_thw=np.array([grid for _, grid in clips], np.int64) if clips else None,
            audio_feats=feats,
            audio_encoder=encoder,
            audio_spans=spans if feats else None,
            image_gen=image_gen_inputs(
                generation, template, first, aspect_ratio=aspect_ratio, highres=highres
            )
            if image_gen
            else None,
        )

    def _check_length(self, turns: list[Turn], *others: object) -> None:
        texts = [item["text"] for turn in turns for item in turn.items if item["type"] == "text"]
        texts += [value for other in others for value in _strings(other)]
        count = sum(map(len, texts))
        if count > self.limits.max_text_chars:
            raise InvalidRequestError(
                f"messages: found {count} characters of text, expected at most {self.limits.max_text_chars}"
            )

    def _check_media(self, images: int, videos: int, audios: int, trust_special: bool) -> None:
        config, limits = self.config, self.limits
        if (count := images + videos + audios) > limits.max_media:
            raise InvalidRequestError(
                f"messages: found {count} media items, expected at most {limits.max_media}"
            )
        if (images or videos) and config.vision is None:
            raise UnsupportedError(
                "this checkpoint has no vision tower: it takes neither pictures nor videos"
            )
        if config.generation == "flash":
            return
        if images and videos:
            raise UnsupportedError(
                f"{config.generation} takes pictures or videos, not both in one conversation "
                f"(found {images} pictures and {videos} videos)"
            )
        if audios > 1 and not trust_special:
            raise UnsupportedError(
                f"{config.generation} takes one recording per conversation, found {audios}"
            )

    def _audio_encoder(self, use_whisper: bool | None) -> AudioEncoderName:
        generation = self.config.generation
        fixed: AudioEncoderName | None = (
            None if generation == "v1" else "sanm" if generation == "preview" else "whisper"
        )
        name = fixed or ("whisper" if use_whisper else "sanm")
        if fixed and use_whisper is not None and use_whisper != (fixed == "whisper"):
            raise UnsupportedError(f"use_whisper_encoder={use_whisper}: {generation} always uses {fixed}")
        if name not in self.config.audio:
            raise UnsupportedError(f"this checkpoint has no {name} audio encoder")
        return name

    def _image(self, item: Mapping[str, Any]) -> tuple[np.ndarray, tuple[int, int, int], np.ndarray]:
        """Patches, grid and the loaded picture u8 [H, W, 3]."""
        return image.preprocess_image(item["image"], self.config.preprocessor, _options(item), self.limits)

    def _video(self, item: Mapping[str, Any]) -> tuple[np.ndarray, tuple[int, int, int]]:
        config = self.config
        return video.preprocess_video(
            item["video"], config.generation, config.preprocessor, _options(item), self.limits
        )

    def _audio(self, item: Mapping[str, Any], encoder: AudioEncoderName) -> np.ndarray:
        wave = audio.load_audio(item["audio"], limits=self.limits, **_options(item))
        if encoder == "sanm":
            return audio.fbank_features(wave, self._cmvn)
        feats = audio.log_mel_features(wave, self.config.preprocessor.whisper_mels)
        if self._max_mel_frames is not None and len(feats) > self._max_mel_frames:
            raise InvalidMediaError(
                f"audio: found {len(feats) / 100:.1f} s, expected at most {self._max_mel_frames / 100:.1f} s"
            )
        return feats

    def _audio_tokens(self, frames: int, encoder: AudioEncoderName) -> int:
        config = self.config.audio[encoder]
        count = audio.projector_tokens if encoder == "sanm" else audio.whisper_tokens
        return count(frames, config.ds_kernel_size, config.ds_stride)

    def _audio_spans(self, ids: np.ndarray, audio_tokens: list[int]) -> np.ndarray:
        """(start, length) of the placeholder runs; only flash looks beyond the first start token."""
        starts = np.flatnonzero(ids == self._audio_start) + 1
        if self.config.generation != "flash":
            starts = starts[:1]
        count = min(len(starts), len(audio_tokens))
        return np.stack([starts[:count], np.array(audio_tokens[:count], np.int64)], 1)


def _options(item: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a media item beside its type and value."""
    return {
        key: value for key, value in item.items() if key not in ("type", item["type"].removesuffix("_url"))
    }


def _strings(value: object) -> list[str]:
    """Strings in an option value, or in the values of an object of options."""
    if isinstance(value, Mapping):
        return [entry for entry in value.values() if isinstance(entry, str)]
    return [value] if isinstance(value, str) else []
