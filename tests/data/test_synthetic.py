"""Dead leaves: fixed by their numbers, of many sizes and colours."""

from __future__ import annotations

import numpy as np
import pytest

from keeplora.data.synthetic import dead_leaves, drifting


def test_a_picture_is_fixed_by_its_index_and_seed():
    pixels = [np.asarray(dead_leaves(i, seed=s)) for i, s in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert pixels[0].shape == (160, 160, 3)
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], pixels[3])


def test_a_longer_set_begins_with_the_shorter_one_and_no_two_are_alike():
    few, more = ([dead_leaves(i) for i in range(n)] for n in (3, 12))
    assert all(a == b for a, b in zip(few, more, strict=False))
    assert len({p.tobytes() for p in more}) == 12


def test_pictures_differ_in_colour_and_in_fineness():
    pixels = np.stack([np.asarray(p, dtype=float) for p in map(dead_leaves, range(40))])
    assert pixels.mean((1, 2)).std(0).min() > 20  # levels of 255
    edges = np.abs(np.diff(pixels, axis=2)).mean((1, 2, 3))
    assert edges.max() > 8 * edges.min()


@pytest.mark.parametrize("side", [32, 224])
def test_any_side(side):
    assert dead_leaves(5, side=side).size == (side, side)


def test_a_clip_is_a_window_that_moves_over_the_picture():
    picture = dead_leaves(2)
    clip = drifting(picture, 5)
    assert [frame.size for frame in clip] == [(120, 120)] * 5
    assert clip[0] == picture.crop((0, 0, 120, 120))
    assert clip[-1] == picture.crop((40, 40, 160, 160))
    assert len({frame.tobytes() for frame in clip}) == 5
    assert len(drifting(picture, 1)) == 1
