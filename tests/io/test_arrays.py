"""Arrays in npz files."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.io.arrays import map_array, save_arrays


@pytest.mark.parametrize("name", ["a", "embedding", "a-name-that-is-longer-than-most-names-of-arrays-are"])
def test_arrays_are_those_of_numpy_and_begin_where_it_needs_no_copy(tmp_path, name):
    arrays = {name: np.arange(35, dtype=np.float32).reshape(7, 5), "ids": np.arange(3), "last": np.ones((2, 3))}
    save_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert [*found] == [*arrays] and all((found[key] == value).all() for key, value in arrays.items())
    for key, value in arrays.items():
        mapped = map_array(tmp_path / "a.npz", key)
        assert mapped.ctypes.data % 64 == 0 and (mapped == value).all()
