import json

import numpy as np
import pytest

from hybrid_dit.data.rendered import RenderedSource
from hybrid_dit.data.source import Source
from hybrid_dit.errors import UserError
from hybrid_dit.pairs import Pairs, batch_at


def numbered(n):
    return Pairs(np.arange(float(n))[:, None, None, None, None], np.arange(float(n))[:, None, None], np.zeros((n, 1)))


def test_processes_share_the_batch_of_the_step():
    sources = [RenderedSource(numbered(7), batch=4, seed=3, process=p, processes=2) for p in range(2)]
    assert isinstance(sources[0], Source)
    for step in range(5):
        parts = [source.next() for source in sources]
        expected = batch_at(numbered(7), step, 4, 3)
        for name in ("latents", "text", "count"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(expected, name))
        keys = [key for part in parts for key in part.keys]
        assert keys == [f"scene {int(i)}" for i in expected.latents.ravel()]


def test_a_position_is_continued():
    source, other = (RenderedSource(numbered(7), batch=4, seed=3) for _ in range(2))
    for _ in range(3):
        source.next()
    other.restore(json.loads(json.dumps(source.state())))
    assert other.next().keys == source.next().keys
    with pytest.raises(UserError, match="belongs to files; give the data.kind and data.path"):
        other.restore({"data": "abcd", "position": {}})


def test_a_batch_that_can_not_be_divided_is_told():
    with pytest.raises(UserError, match="batch of 3 can't be divided over 2 processes"):
        RenderedSource(numbered(7), batch=3, seed=0, process=0, processes=2)
