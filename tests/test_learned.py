"""What `eval.py --learned` asks of scenes: facts and masks of literal ones, read-outs of facts, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import small_run

from tokzip_jax import learned_run, probe, scene_facts
from tokzip_jax.config import RowConfig
from tokzip_jax.data import shapes
from tokzip_jax.data.shapes import Thing
from tokzip_jax.workdir import Workdir

evaluate = small_run.load_file(small_run.ROOT / "eval.py")
EASY = shapes.LEVELS["easy"]  # circle, square, triangle, cross; red, yellow, green, blue, black; 1 to 3 things
SCENES = [
    [Thing("circle", "red", 0.2, 0.9, 0.4, 0)],
    [Thing("square", "blue", 0.5, 0.5, 0.3, 0), Thing("cross", "green", 0.9, 0.1, 0.25, 1)],  # nearly as large
    [
        Thing("circle", "red", 0.1, 0.1, 0.3, 0),
        Thing("triangle", "black", 0.68, 0.32, 0.44, 1),
        Thing("square", "red", 0.9, 0.9, 0.2, 2),
    ],
]


def test_facts_of_literal_scenes():
    found = scene_facts.labels(SCENES, EASY)
    expected = {
        "number of things": [[0], [1], [2]],
        "color of the largest": [[0], [-1], [4]],
        "shape of the largest": [[0], [-1], [2]],
        "column of the largest": [[0], [-1], [2]],
        "row of the largest": [[2], [-1], [0]],
        "which colors are there": [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 1]],
    }
    assert {name: labels.tolist() for name, labels in found.items()} == expected
    text = json.dumps([dataclasses.asdict(thing) for thing in SCENES[2]])
    assert scene_facts.things(text) == SCENES[2]


def test_things_cover_what_they_are_drawn_on():
    for scene in SCENES:
        white = shapes.draw(scene, [(255, 255, 255)] * len(scene), np.zeros((64, 64, 3), np.uint8))
        np.testing.assert_array_equal(shapes.cover(scene, 64), white[:, :, 0].astype(np.float32) / 255)
    # A square of 0.44 by 0.44 in the upper right quarter.
    (mask,) = masks = shapes.cover([Thing("square", "red", 0.75, 0.25, 0.5, 0)], 100)[None]
    assert np.all(mask[4:46, 54:96] == 1) and np.all(mask[48:] == 0) and np.all(mask[:, :52] == 0)
    np.testing.assert_allclose(probe.patch_shares(masks, 2)[0], [0, 4 * 0.44**2, 0, 0], atol=0.01)


def test_read_outs_of_facts():
    """Pictures about which a fact is not asked are left out, questions with one answer too; several are averaged."""
    rng = np.random.default_rng(0)
    one, three = rng.integers(0, 2, (80, 1)), rng.integers(0, 2, (80, 3))
    three[:, 1] = 1
    some = np.where(rng.random((80, 1)) < 0.4, scene_facts.NOT_ASKED, 2 * one)
    features = {"keys": rng.normal(size=(2, 80, 5)) + one, "mean patch": rng.normal(size=(1, 80, 3)) + three[:, 2:]}
    features = {name: values.astype(np.float32) for name, values in features.items()}
    facts = {"one": one, "some": some, "three": three, "none": np.ones((80, 2), int)}
    found = learned_run.readouts(features, facts)
    assert list(found) == ["one", "some", "three"]
    assert all(list(kinds) == list(features) for kinds in found.values())
    train, test = probe.split(80)
    for kind, values in features.items():
        each = [probe.linear_readout(values, three[:, q], train, test) for q in (0, 2)]
        three_found = found["three"][kind]
        np.testing.assert_allclose(three_found.accuracy_L, np.mean([one.accuracy_L for one in each], axis=0))
        assert three_found.majority == np.mean([one.majority for one in each])
        asked = np.flatnonzero(some[:, 0] >= 0)
        fit, held = (np.flatnonzero(np.isin(asked, part)) for part in (train, test))
        alone = probe.linear_readout(values[:, asked], some[asked, 0], fit, held)
        np.testing.assert_array_equal(found["some"][kind].accuracy_L, alone.accuracy_L)
        assert found["some"][kind].tests == len(held) < len(test) and found["some"][kind].chance == 1 / 3
    assert found["one"]["keys"].accuracy_L[1] > 0.75 > found["one"]["mean patch"].accuracy_L[0]


def refusals():
    """(arguments of eval.run, words)."""
    some = "which is no row that is read from VoCo tokens alone"
    return [
        ({"learned": ("upper",)}, f"--learned holds 'upper', {some}; choose of 'lower', 'VoCo 1'"),
        ({"learned": ("VoCo 1", "VoCo 9")}, "--learned holds 'VoCo 9'"),
        ({"learned": ("average pooling 1",)}, some),
        ({"learned": ("prefix too",)}, "--learned holds 'prefix too'"),
        ({"learned": ("VoCo 1",), "pictures": 2}, "--learned_pictures=2 must be at least 3"),
        ({"learned": ("VoCo 1",), "rows": ("lower",)}, "give neither --checkpoint, --rows nor --methods"),
        ({"learned": ("VoCo 1",), "methods": ("free",)}, "give neither --checkpoint, --rows nor --methods"),
    ]


@pytest.mark.parametrize(("arguments", "words"), refusals())
def test_what_is_refused(arguments, words, tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    read = dataclasses.replace(cfg.rows["VoCo 1"].method, voco_mask="prefix_visible")
    cfg = dataclasses.replace(cfg, rows={**cfg.rows, "prefix too": RowConfig(stage="voco", method=read)})
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="scenes"))
    with pytest.raises(ValueError) as error:
        evaluate.run(Workdir(tmp_path / "run"), cfg, **arguments)
    assert words in str(error.value) and not (tmp_path / "run").exists()


def test_pictures_without_facts_are_refused(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    with pytest.raises(ValueError, match=r"data.name = 'easy_vqa' has no facts .*; data sets that do: 'scenes'"):
        evaluate.run(Workdir(tmp_path / "run"), cfg, learned=("VoCo 1",))
