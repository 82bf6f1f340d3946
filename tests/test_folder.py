"""FOLDER, simple and in a block, against the official numbers and a plain loop."""

import pathlib

import merging
import numpy as np
import pytest

from tokzip_jax.compress.folder import between, check_budget, folder, folds

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "folder_simple.npz")
RNG = np.random.default_rng(0)
PATCHES, METRIC = RNG.normal(size=(3, 21, 6)).astype(np.float32), RNG.normal(size=(3, 21, 4)).astype(np.float32)


# One fold with its scale, two folds, four folds at full size, the fold that goes without the scale, a single pair, and
# a metric of its own.
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c5", "c6", "c7", "c8", "m"])
def test_official_numbers_of_the_simple_form(case):
    x, removed = GOLDEN[f"{case}/x"], int(GOLDEN[f"{case}/r"])
    metric = GOLDEN["m/metric_in"] if case == "m" else None
    protect = case != "m" and bool(GOLDEN[f"{case}/class_token"])
    result = folder(x, metric, tokens=x.shape[1] - removed, protect=protect)
    np.testing.assert_array_equal(result.size_BM, GOLDEN[f"{case}/size"][:, :, 0])
    np.testing.assert_allclose(result.tokens_BMD, GOLDEN[f"{case}/out"], atol=1e-5)
    merging.assert_books(result, x.shape[1])


def test_folds_are_halves():
    assert folds(577, 384) == (288, 96) and folds(577, 432) == (288, 144)
    assert folds(65, 2) == (2,) and folds(9, 0) == () and folds(1, 0) == ()
    assert sum(folds(577, 575)) == 575


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match=r"FOLDER: 1 tokens asked of 21 patches; it must be 2 \.\. 21"):
        folder(PATCHES, tokens=1)
    with pytest.raises(ValueError, match=r"FOLDER: 22 tokens asked of 21 patches; it must be 2 \.\. 21"):
        check_budget(21, 22, simple=True)
    with pytest.raises(ValueError, match=r"FOLDER: 0 tokens asked of 20 patches; it must be 1 \.\. 20"):
        between(20, 0, 1)
    with pytest.raises(ValueError, match=r"folding 21 tokens cannot remove 20; it must be 0 \.\. 19"):
        folds(21, 20)
    with pytest.raises(ValueError, match="scale = 'size' is unknown; choose one of official, always, none"):
        folder(PATCHES, tokens=4, scale="size")
    with pytest.raises(ValueError, match=r"metric of shape \(3, 20, 4\) does not fit"):
        folder(PATCHES, METRIC[:, 1:], tokens=4)
