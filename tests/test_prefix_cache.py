"""States of prefixes: the longest known one is found, and what was not used for longest is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlin.config import UserError
from jaxlin.prefix_cache import PrefixCache, common_prefix


def test_prefix_cache():
    """The longest that leaves something; what was not used for longest goes first, by number and by bytes."""
    state = np.zeros(25, np.float32)
    cache = PrefixCache(entries=3, bytes=250)
    cache.put([1, 2], state)
    cache.put([1], state)
    assert cache.longest([1, 2, 3])[0] == 2 and cache.longest([1, 2])[0] == 1 and cache.longest([1]) == (0, None)
    assert cache.longest([2, 1])[0] == 0 and cache.bytes == 200
    cache.put([5], state)  # 300 bytes: [1, 2] was used before [1]
    assert len(cache) == 2 and cache.longest([1, 2, 3])[0] == 1 and cache.longest([5, 5])[0] == 1
    small = PrefixCache(entries=2)
    for token in range(4):
        small.put([token], state)
    assert [small.longest([token, 0])[0] for token in range(4)] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="its state has 100 bytes, at most 99 are kept"):
        PrefixCache(bytes=99).put([1], state)
    with pytest.raises(ValueError, match="entries=0"):
        PrefixCache(entries=0)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == [] == common_prefix([[1], []])
