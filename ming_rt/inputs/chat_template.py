"""Conversations to prompt text, exactly as each model generation was trained on it.

A rendered prompt is a list of segments ``(text, trusted)``. The template's own text and the placeholders of
media are trusted: special tokens in them count. Text of the conversation is not: a special token spelled out
in it stays ordinary characters, for the media placeholders as for the tokenizer. With ``trust_special=True``
the whole prompt is one trusted segment and every quirk of the original processors is reproduced: literal
placeholders in the text are counted and used, unknown item types render as nothing, options of other
generations are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from ming_rt.config import Generation
from ming_rt.errors import InvalidRequestError, UnsupportedError, shown

Segment = tuple[str, bool]  # (text, trusted)

ASR_PROMPT = "Please recognize the language of this speech and transcribe it. Format: oral."
FLASH_SYSTEM_PROMPT = "你是一个友好的AI助手。"
THINKING_PREFIX = (
    "SYSTEM: You are a helpful assistant. When the user asks a question, your response must include two "
    "parts: first, the reasoning process enclosed in <thinking>...</thinking> tags, then the final answer "
    "enclosed in <answer>...</answer> tags. The critical answer or key result should be placed within "
    "\\boxed{}.\n"
)

_HUMAN, _ASSISTANT, _SYSTEM = "HUMAN", "ASSISTANT", "SYSTEM"
_ROLES = {"HUMAN": _HUMAN, "ASSISTANT": _ASSISTANT}
_CHAT_ROLES = {**_ROLES, "user": _HUMAN, "assistant": _ASSISTANT, "system": _SYSTEM, "SYSTEM": _SYSTEM}
_MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` HUMAN, ASSISTANT or SYSTEM; ``items`` with a ``type`` each."""

    role: str
    items: tuple[Mapping[str, Any], ...]


def asr_prompt(topic: str | None = None, phrases: Sequence[str] = ()) -> str:
    """The transcription instruction, with what the recording is about and words that may occur in it."""
    text = ASR_PROMPT
    if topic:
        text += f"This is an audio about {topic}."
    if phrases:
        text += f"This audio may contains the following words or phrases:{','.join(phrases)}."
    return text


def parse_messages(
    generation: Generation, messages: Sequence[Mapping[str, Any]], trust_special: bool = False
) -> list[Turn]:
    """Checks the form of a conversation and brings it into one shape.

    Roles are HUMAN and ASSISTANT, or user, assistant and (first message only) system; content is a string or
    a list of items ``{"type": "text" | "image" | "video" | "audio", <type>: value, ...options}``. The OpenAI
    forms ``{"type": "image_url", "image_url": {"url": value}}`` (likewise video_url, audio_url) mean the same
    as image, video and audio. Raises ``InvalidRequestError``.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages: expected a non-empty list of {role, content}")
    turns = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where}: expected {{role, content}}, found {type(message).__name__}")
        roles = _ROLES if trust_special else _CHAT_ROLES
        name = message.get("role")
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise InvalidRequestError(f"{where}.role: found {shown(name)}, expected {', '.join(roles)}")
        if role == _SYSTEM and number:
            raise InvalidRequestError(f"{where}.role: a system message is possible as the first message only")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
            raise InvalidRequestError(f"{where}.content: expected a string or a list of items")
        items = tuple(
            _item(generation, item, f"{where}.content[{i}]", trust_special) for i, item in enumerate(content)
        )
        if role == _SYSTEM and any(item["type"] != "text" for item in items):
            raise InvalidRequestError(f"{where}.content: expected only text in a system message")
        turns.append(Turn(role, items))
    if all(turn.role == _SYSTEM for turn in turns):
        raise InvalidRequestError("messages: expected a message after the system message")
    return turns


def _item(generation: Generation, item: object, where: str, trust_special: bool) -> Mapping[str, Any]:
    if not isinstance(item, Mapping) or not isinstance(kind := item.get("type"), str):
        raise InvalidRequestError(f"{where}: expected an item with a type, found {type(item).__name__}")
    if odd := [key for key in item if not isinstance(key, str)]:
        raise InvalidRequestError(f"{where}: found the key {shown(odd[0])}, expected names as keys")
    if kind in ("image_url", "video_url", "audio_url"):
        if trust_special and generation != "flash":
            raise UnsupportedError(f"{where}.type: {kind} exists for flash only, expected {kind[:5]}")
        url = item.get(kind)
        if isinstance(url, Mapping):
            if extra := sorted(
                shown(key) for key in url if key != "url" and (key, url[key]) != ("detail", "auto")
            ):
                raise InvalidRequestError(f"{where}.{kind}: found {', '.join(extra)}, expected url only")
            url = url.get("url")
        if not isinstance(url, str):
            raise InvalidRequestError(f"{where}.{kind}: expected {{url: text}}")
        options = {key: value for key, value in item.items() if key not in ("type", kind)}
        # In the original the template does not see such an item, only the media collection does.
        return {**options, "type": kind if trust_special else kind[:5], kind[:5]: url}
    if kind in (*_MEDIA, "text"):
        if item.get(kind) is None:
            raise InvalidRequestError(f"{where}: an item of type {kind} needs the key {kind!r}")
        if kind == "text" and not isinstance(item["text"], str):
            raise InvalidRequestError(f"{where}.text: expected a string, found {type(item['text']).__name__}")
        if kind == "image" and isinstance(item["image"], list) and not item["image"]:
            raise InvalidRequestError(f"{where}.image: found an empty list, expected at least one image")
        if kind == "audio" and isinstance(item["audio"], list):
            raise UnsupportedError(f"{where}.audio: found a list, expected one audio item per recording")
    elif not trust_special:
        raise InvalidRequestError(f"{where}.type: found {shown(kind)}, expected text, image, video or audio")
    return item


def media_items(turns: Iterable[Turn], kind: str) -> list[Mapping[str, Any]]:
    """All images, videos or audios (``kind``) of a conversation in order, one item per medium.

    The images of a list become items without the options of the list's item, as in the original.
    """
    found: list[Mapping[str, Any]] = []
    for item in (item for turn in turns for item in turn.items):
        if item["type"] not in (kind, f"{kind}_url"):
            continue
        if kind == "image" and isinstance(item["image"], list):
            found.extend({"type": "image", "image": image} for image in item["image"])
        else:
            found.append(item)
    return found


def render_segments(
    generation: Generation,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    system_template: str | None = None,
    add_generation_prompt: bool = True,
    use_cot_system_prompt: bool = False,
    sys_prompt_exp: str | None = None,
    trust_special: bool = False,
) -> list[Segment]:
    """The prompt before placeholder expansion.

    ``thinking`` asks for visible reasoning: flash's system prompt says so, the others put ``THINKING_PREFIX``
    before the first text of the last user message. A system message replaces flash's ``FLASH_SYSTEM_PROMPT``;
    for the others, which were trained without one, it becomes a ``<role>SYSTEM</role>`` block in front.
    preview, v1 and v1.5 only: ``system_template`` replaces everything before the first message (it has to
    contain the opening ``<role>HUMAN</role>``), ``add_generation_prompt=False`` leaves the prompt open.
    flash only: ``sys_prompt_exp`` is the system message as an option, ``use_cot_system_prompt`` the same as
    ``thinking``. Raises ``InvalidRequestError``, or ``UnsupportedError`` for an option of another generation.
    """
    turns = parse_messages(generation, messages, trust_special)
    for name, text in (("system_template", system_template), ("sys_prompt_exp", sys_prompt_exp)):
        if text is not None and not isinstance(text, str):
            raise InvalidRequestError(f"{name}: expected a string, found {type(text).__name__}")
    flash = generation == "flash"
    if not trust_special:
        others = {
            "system_template": system_template is not None,
            "add_generation_prompt": not add_generation_prompt,
        }
        if not flash:
            others = {
                "sys_prompt_exp": sys_prompt_exp is not None,
                "use_cot_system_prompt": use_cot_system_prompt,
            }
        for name, given in others.items():
            if given:
                raise UnsupportedError(f"{name}: not an option of {generation} prompts")
    system: str | None = None
    if turns[0].role == _SYSTEM:
        if system_template is not None or sys_prompt_exp is not None:
            raise InvalidRequestError("messages[0]: a system message and a system option exclude each other")
        system = "".join(item["text"] for item in turns[0].items)
        turns = turns[1:]
    segments: list[Segment] = []

    def add(text: str, trusted: bool = True) -> None:
        segments.append((text, trusted or trust_special))

    if flash:
        if turns[-1].role != _HUMAN:
            raise InvalidRequestError("messages: expected the last message to be the user's")
        system = sys_prompt_exp if system is None else system
        add("<role>SYSTEM</role>")
        add(FLASH_SYSTEM_PROMPT if system is None else system, trusted=system is None)
        add(f"\n\ndetailed thinking {'on' if thinking or use_cot_system_prompt else 'off'}<|role_end|>")
        for turn in turns:
            add(f"<role>{turn.role}</role>")
            segments += _render_items(generation, turn, trust_special)
            add("<|role_end|>")
        add("<role>ASSISTANT</role>")
        return _merge(segments)
    if thinking:
        turns = _with_thinking_prefix(turns)
    if system is not None:
        add("<role>SYSTEM</role>")
        add(system, trusted=False)
    add("<role>HUMAN</role>" if system_template is None else system_template)
    for turn in turns:
        add("<role>ASSISTANT</role>" if turn.role == _ASSISTANT else "")
        segments += _render_items(generation, turn, trust_special)
        add("<role>HUMAN</role>" if turn.role == _ASSISTANT else "")
    add("<role>ASSISTANT</role>" if add_generation_prompt else "")
    return _merge(segments)


def render(generation: Generation, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """``render_segments`` as one string."""
    return "".join(text for text, _ in render_segments(generation, messages, **options))


def _with_thinking_prefix(turns: list[Turn]) -> list[Turn]:
    last = max((i for i, turn in enumerate(turns) if turn.role == _HUMAN), default=None)
    if last is None:
        raise InvalidRequestError("thinking: expected a user message")
    items = list(turns[last].items)
    at = next((i for i, item in enumerate(items) if item["type"] == "text"), None)
    if at is None:
        items.append({"type": "text", "text": THINKING_PREFIX})
    else:
        items[at] = {**items[at], "text": THINKING_PREFIX + items[at]["text"]}
    return [*turns[:last], Turn(_HUMAN, tuple(items)), *turns[last + 1 :]]


def _placeholder(generation: Generation, kind: str) -> str:
    return f"<{kind}>" if generation in ("preview", "v1") else f"<{kind.upper()}>"


def _render_items(generation: Generation, turn: Turn, trust_special: bool) -> list[Segment]:
    """Items without separators; literal lower-case placeholders suppress as many of the template's own."""
    literal = {kind: _count(turn.items, f"<{kind}>") if trust_special else 0 for kind in _MEDIA}
    segments: list[Segment] = []
    for item in turn.items:
        kind = item["type"]
        if kind == "text":
            segments.append((item["text"], trust_special))
        elif kind in _MEDIA:
            if kind == "video" and literal[kind] > 1:
                raise InvalidRequestError(f"found {literal[kind]} literal <video> in a message, expected one")
            wanted = len(item["image"]) if kind == "image" and isinstance(item["image"], list) else 1
            marks = [_placeholder(generation, kind)] * max(wanted - literal[kind], 0)
            segments.append(("\n".join(marks), True))
    return segments


def _count(items: Iterable[object], text: str) -> int:
    """Occurrences of ``text`` in all strings of nested values, keys and file names included."""
    count, rest = 0, list(items)
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            count += value.count(text)
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            rest += value
    return count


def _merge(segments: Iterable[Segment]) -> list[Segment]:
    """Joins neighbours of equal trust, drops empty ones."""
    given = (segment for segment in segments if segment[0])
    return [("".join(text for text, _ in group), trust) for trust, group in groupby(given, itemgetter(1))]


def expand_segments(
    generation: Generation,
    segments: Iterable[Segment],
    image_tokens: Sequence[int] = (),
    video_tokens: Sequence[int] = (),
    audio_tokens: Sequence[int] = (),
) -> list[Segment]:
    """Replaces media placeholders by start token, that many patch tokens, and end token.

    Only trusted text is searched, images first, then videos, then audios. In preview and v1 the placeholder
    is the start token itself, so the block of a later image lands inside the first one's; this is how the
    original prompts of several images look, therefore it is kept. preview, v1 and v1.5 put the first audio
    at every placeholder; an audio without placeholder is appended at the end of the prompt.
    """
    result = list(segments)

    def replace(old: str, new: str, count: int = -1) -> bool:
        for i, (text, trusted) in enumerate(result):
            if trusted and old in text:
                result[i] = (text.replace(old, new, count), True)
                if count == 1:
                    return True
        return False

    for kind, patch, counts in (
        ("image", "<imagePatch>", image_tokens),
        ("video", "<framePatch>" if generation == "flash" else "<imagePatch>", video_tokens),
    ):
        for count in counts:
            replace(_placeholder(generation, kind), f"<{kind}>{patch * count}</{kind}>\n", 1)
    mark = _placeholder(generation, "audio")
    blocks = [f"<audio>{'<audioPatch>' * count}</audio>" for count in audio_tokens]
    if generation != "flash":
        blocks = blocks[:1]
    for block in blocks:
        if not any(trusted and mark in text for text, trusted in result):
            result.append((block + "\n", True))
        else:
            replace(mark, block, 1 if generation == "flash" else -1)
    return _merge(result)


def expand(generation: Generation, prompt: str, **token_counts: Sequence[int]) -> str:
    """``expand_segments`` of a prompt string that is trusted as a whole."""
    return "".join(text for text, _ in expand_segments(generation, [(prompt, True)], **token_counts))
