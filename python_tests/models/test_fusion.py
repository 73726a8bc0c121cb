"""Placing features and choosing routers: what each generation accepts and how wrong counts are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_config

from ming_rt.errors import InvalidRequestError, UnsupportedError
from ming_rt.models.fusion import AUDIO, IMAGE, TEXT, router_modality, scatter

PICTURE, CLIP = 100, 102  # patch ids of tiny_config
GENERATIONS = ["preview", "v1", "v1.5", "flash"]
generations = pytest.mark.parametrize("family", GENERATIONS)


def rows(count: int, first: int = 0) -> torch.Tensor:
    """Distinguishable features ``[count, 2]``."""
    return torch.arange(first, first + count)[:, None] + torch.tensor([0.0, 0.5])


@generations
def test_pictures_and_audio(family):
    ids = np.array([1, PICTURE, PICTURE, 2, 3, 4, PICTURE, 5])
    media = scatter(tiny_config(family), ids, rows(3), None, [rows(2, 50)], np.array([[4, 2]]))
    assert media.rows.tolist() == [1, 2, 4, 5, 6]
    assert media.feats[:, 0].tolist() == [0, 1, 50, 51, 2]


@generations
def test_no_media(family):
    ids = np.arange(4)
    assert scatter(tiny_config(family), ids) is None
    assert router_modality(tiny_config(family), ids).tolist() == [TEXT] * 4


@generations
def test_long_audio_is_cut_and_the_next_one_is_whole(family):
    spans = np.array([[0, 2], [3, 2]])
    media = scatter(tiny_config(family), np.arange(6), audios=[rows(3), rows(2, 50)], audio_spans=spans)
    assert media.rows.tolist() == [0, 1, 3, 4]
    assert media.feats[:, 0].tolist() == [0, 1, 50, 51]


def test_short_audio_leaves_words_in_flash():
    config, spans = tiny_config("flash"), np.array([[1, 4]])
    media = scatter(config, np.arange(6), audios=[rows(2)], audio_spans=spans)
    assert media.rows.tolist() == [1, 2]
    assert router_modality(config, np.arange(6), audio_spans=spans).tolist() == [0, 2, 2, 2, 2, 0]


@pytest.mark.parametrize("family", ["preview", "v1", "v1.5"])
def test_short_audio_is_an_error_elsewhere(family):
    with pytest.raises(InvalidRequestError, match="audio 1: found 2 feature rows, expected 4"):
        scatter(tiny_config(family), np.arange(6), audios=[rows(2)], audio_spans=np.array([[1, 4]]))


@generations
def test_an_empty_span_ends_the_list(family):
    spans = np.array([[1, 1], [3, 0], [4, 1]])
    media = scatter(tiny_config(family), np.arange(6), audios=[rows(1)] * 3, audio_spans=spans)
    assert media.rows.tolist() == [1]
    assert router_modality(tiny_config(family), np.arange(6), audio_spans=spans).tolist() == [
        0,
        2,
        0,
        0,
        0,
        0,
    ]


@generations
@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_picture_rows(family, count):
    with pytest.raises(InvalidRequestError, match=f"found 2 tokens in the prompt, expected {count}"):
        scatter(tiny_config(family), np.array([PICTURE, PICTURE]), rows(count))


@generations
@pytest.mark.parametrize("span", [[-1, 2], [3, 2], [0, 99]])
def test_spans_outside_the_prompt(family, span):
    for call in (
        lambda: scatter(tiny_config(family), np.arange(4), audios=[rows(9)], audio_spans=np.array([span])),
        lambda: router_modality(tiny_config(family), np.arange(4), audio_spans=np.array([span])),
    ):
        with pytest.raises(InvalidRequestError, match="outside the 4 prompt tokens"):
            call()


@generations
def test_more_spans_than_audios(family):
    with pytest.raises(InvalidRequestError, match="found 1 audios, expected 2"):
        scatter(tiny_config(family), np.arange(4), audios=[rows(1)], audio_spans=np.array([[0, 1], [2, 1]]))


@generations
def test_audio_over_a_picture(family):
    ids, spans = np.array([1, PICTURE, 2]), np.array([[0, 2]])
    with pytest.raises(InvalidRequestError, match="overlap"):
        scatter(tiny_config(family), ids, rows(1), None, [rows(2)], spans)
    with pytest.raises(InvalidRequestError, match="overlap"):
        router_modality(tiny_config(family), ids, True, spans)


@pytest.mark.parametrize("family", ["preview", "v1", "v1.5"])
def test_one_patch_id_takes_images_or_videos(family):
    ids = np.array([PICTURE] * 4)
    with pytest.raises(UnsupportedError, match="images and videos"):
        scatter(tiny_config(family), ids, rows(2), rows(2))
    assert scatter(tiny_config(family), ids, None, rows(4)).rows.tolist() == [0, 1, 2, 3]


def test_flash_mixes_images_and_videos():
    ids = np.array([CLIP, PICTURE, CLIP, 1])
    media = scatter(tiny_config("flash"), ids, rows(1), rows(2, 50))
    assert media.rows.tolist() == [0, 1, 2]
    assert media.feats[:, 0].tolist() == [50, 0, 51]
    assert router_modality(tiny_config("flash"), ids, True).tolist() == [IMAGE, IMAGE, IMAGE, TEXT]


def test_preview_routes_everything_between_the_pictures():
    ids = np.array([1, PICTURE, 2, PICTURE, 3, 4])
    spans = np.array([[4, 1]])
    expected = [TEXT, IMAGE, IMAGE, IMAGE, AUDIO, TEXT]
    assert router_modality(tiny_config("preview"), ids, True, spans).tolist() == expected
    assert router_modality(tiny_config("v1"), ids, True, spans).tolist() == [0, 1, 0, 1, 2, 0]
    with pytest.raises(InvalidRequestError, match="before or after all images"):
        router_modality(tiny_config("preview"), ids, True, np.array([[2, 1]]))


def test_patch_tokens_without_pictures():
    """Typed by a user: words in the lite generations, pictures in flash as soon as it has any media."""
    ids, spans = np.array([PICTURE, 1, 2]), np.array([[1, 1]])
    assert router_modality(tiny_config("v1.5"), ids, False, spans).tolist() == [TEXT, AUDIO, TEXT]
    assert router_modality(tiny_config("flash"), ids, False, spans).tolist() == [IMAGE, AUDIO, TEXT]
    assert router_modality(tiny_config("flash"), ids).tolist() == [TEXT] * 3
