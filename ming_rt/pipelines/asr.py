"""Transcription as a chat: the prompt the models were trained on for it, and what their answer says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ming_rt.config import Generation
from ming_rt.errors import InvalidRequestError, UnsupportedError, shown
from ming_rt.inputs.chat_template import asr_prompt
from ming_rt.pipelines.events import Done, Transcript

Context = str | Sequence[str] | Mapping[str, Any]


def asr_request(
    generation: Generation, audio: Any, language: str | None, context: Context | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and prompt options that ask for a transcript; the arguments are ``Session.transcribe``'s.

    Raises:
        InvalidRequestError: a malformed language or context.
        UnsupportedError: this generation cannot be told the language.
    """
    options: dict[str, Any] = {}
    if language is not None:
        if not isinstance(language, str) or not language.isprintable() or not 1 <= len(language) <= 40:
            raise InvalidRequestError(f"language: found {shown(language)}, expected a name such as 'English'")
        if generation != "flash":
            raise UnsupportedError(f"language: Ming {generation} cannot be told the language; leave it out")
        options["answer_prefix"] = f"{language}\t"
    if generation == "v1":  # its other encoder is not meant for transcription
        options["use_whisper_encoder"] = True
    text = asr_prompt(*_topic_and_phrases(context))
    content = [{"type": "text", "text": text}, {"type": "audio", "audio": audio}]
    return [{"role": "user", "content": content}], options


def transcript(generation: Generation, done: Done, language: str | None) -> Transcript:
    """The answer as a transcript; flash begins it with the language and a tab unless it was told that."""
    text = done.text
    if generation == "flash" and language is None:
        named, tab, rest = text.partition("\t")
        if tab:
            language, text = named.strip(), rest
    return Transcript(text, language, done.finish_reason, done.usage, done.timings)


def _topic_and_phrases(context: Context | None) -> tuple[str | None, tuple[str, ...]]:
    topic: Any = None
    phrases: Any = ()
    if isinstance(context, str):
        topic = context
    elif isinstance(context, Mapping):
        if not context.keys() <= {"topic", "phrases"}:
            raise InvalidRequestError(
                f"context: found keys {', '.join(map(shown, context)):.60}, expected topic and phrases"
            )
        topic, phrases = context.get("topic"), context.get("phrases", ())
    elif context is not None:
        phrases = context
    good = topic is None or isinstance(topic, str)
    good = good and isinstance(phrases, Sequence) and not isinstance(phrases, (str, bytes))
    if not good or not all(isinstance(phrase, str) for phrase in phrases):
        raise InvalidRequestError(
            f"context: found {shown(context)}, expected a topic, a list of words, or both"
        )
    return topic, tuple(phrases)
