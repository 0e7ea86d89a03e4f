"""Tables on disk: whole or not at all, resumed, and refused where they are of something else."""

import numpy as np
import pytest

from diffusion.data import array_cache


def rows(index):
    return {"square": index**2, "pair": np.stack([index, -index], -1).astype(np.float32)}


def compute(folder, function=rows, of="squares"):
    return array_cache.compute(folder, 10, function, {"of": of}, batch_size=4, progress=False)


def check(table):
    np.testing.assert_array_equal(table["square"], np.arange(10) ** 2)
    np.testing.assert_array_equal(table["pair"], np.stack([np.arange(10), -np.arange(10)], -1))
    assert table["pair"].dtype == np.float32


def test_rows_are_computed_once_in_whole_batches(tmp_path):
    seen = []

    def noted(index):
        seen.append(index.tolist())
        return rows(index)

    check(compute(tmp_path / "a", noted))
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    check(compute(tmp_path / "a", noted))
    assert len(seen) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        *("about.json", "pair.npy", "square.npy"),
    ]


def test_an_interrupted_computation_goes_on(tmp_path):
    def stops(index):
        if index[0] == 8:
            raise KeyboardInterrupt
        return rows(index)

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "a", stops)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match="nothing is cached"):
        array_cache.read(tmp_path / "a", {})
    seen = []
    check(compute(tmp_path / "a", lambda index: seen.append(index[0]) or rows(index)))
    assert seen == [8]


def test_what_was_left_of_something_else_is_not_used(tmp_path):
    def stops(index):
        if index[0]:
            raise KeyboardInterrupt
        return {"square": index, "pair": index}

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "a", stops, "numbers")
    check(compute(tmp_path / "a"))


def test_a_table_of_something_else_is_refused(tmp_path):
    compute(tmp_path / "a")
    with pytest.raises(ValueError, match=r"of: 'squares' there, 'cubes' here.*delete it"):
        compute(tmp_path / "a", of="cubes")
    with pytest.raises(ValueError, match=r"count: 10 there, 11 here"):
        array_cache.read(tmp_path / "a", {"of": "squares", "count": 11})
