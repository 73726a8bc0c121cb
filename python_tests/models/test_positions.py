"""Position ids: what the recorded cases do not cover, above all wrong input."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_config

from ming_rt.errors import InvalidRequestError
from ming_rt.models.positions import position_ids

IMAGE, START, VIDEO, VIDEO_START = 100, 101, 102, 103


@pytest.mark.parametrize("family", ["preview", "v1", "v1.5", "flash"])
def test_text_counts_on_every_axis(family):
    positions, delta = position_ids(tiny_config(family), np.arange(7)[None])
    assert (positions == np.arange(7)).all()
    assert delta.tolist() == [0]


@pytest.mark.parametrize("family", ["preview", "v1"])
def test_one_dimensional_generations_count_media_like_text(family):
    ids = np.array([[5, START, IMAGE, IMAGE, IMAGE, IMAGE, 6]])
    positions, delta = position_ids(tiny_config(family), ids, image_grid_thw=np.array([[1, 4, 4]]))
    assert (positions == np.arange(7)).all()
    assert delta.tolist() == [0]


def test_an_image_spans_a_square():
    """v1.5: 2 x 3 merged patches behind two tokens; text goes on behind the longer side."""
    ids = np.array([[5, START, *[IMAGE] * 6, 6]])
    positions, delta = position_ids(tiny_config("v1.5"), ids, image_grid_thw=np.array([[1, 4, 6]]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta.tolist() == [6 - 9]


def test_a_video_lies_around_its_time():
    """flash: slices two units apart, space centred on time, text goes on behind the last slice."""
    ids = np.array([[5, VIDEO_START, *[VIDEO] * 6, 6]])
    positions, _ = position_ids(tiny_config("flash"), ids, video_grid_thw=np.array([[2, 2, 6]]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 4, 4, 4, 5],
        [0, 1, 2, 2, 2, 4, 4, 4, 5],
        [0, 1, 1, 2, 3, 3, 4, 5, 5],
    ]


def test_a_video_without_its_start_token_is_text():
    """The configured start id decides, nothing else."""
    ids = np.array([[5, START, *[VIDEO] * 2, 6]])
    positions, delta = position_ids(tiny_config("flash"), ids, video_grid_thw=np.array([[1, 2, 4]]))
    assert (positions == np.arange(5)).all()
    assert delta.tolist() == [0]


def test_positions_without_pads_do_not_depend_on_pads():
    ids = np.array([5, START, *[IMAGE] * 4, 6])
    grid = np.array([[1, 4, 4]])
    alone, delta = position_ids(tiny_config("v1.5"), ids[None], image_grid_thw=grid)
    padded = np.array([[9, 9, *ids, 9]])
    mask = np.array([[0, 0, *[1] * 7, 0]])
    inside, padded_delta = position_ids(tiny_config("v1.5"), padded, mask, image_grid_thw=grid)
    assert (inside[:, :, 2:9] == alone).all()
    assert (inside[:, 0, [0, 1, 9]] == 1).all()
    assert 10 + padded_delta[0] == 7 + delta[0]  # the first generated token stands at the same place


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        ([START, IMAGE, IMAGE], [[1, 4, 4]], "needs 4 placeholder tokens, found 2"),
        ([START, IMAGE, START, IMAGE], [[1, 2, 2]], "more image blocks than the 1 grids"),
    ],
)
@pytest.mark.parametrize("family", ["v1.5", "flash"])
def test_placeholders_that_contradict_the_grids(family, ids, grid, message):
    with pytest.raises(InvalidRequestError, match=message):
        position_ids(tiny_config(family), np.array([ids]), image_grid_thw=np.array(grid))


def test_a_start_token_at_the_end_is_text():
    ids = np.array([[START, IMAGE, 5, START]])
    positions, _ = position_ids(tiny_config("v1.5"), ids, image_grid_thw=np.array([[1, 2, 2]]))
    assert positions[0, 0].tolist() == [0, 1, 2, 3]
