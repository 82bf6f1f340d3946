"""Drawn data sets as files: what was drawn is what is read, by every process, in folders that say what they hold."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tokzip_jax import config_io
from tokzip_jax.config import DataConfig, ScenesConfig
from tokzip_jax.data import clips, drawn, pipeline, scenes, sources
from tokzip_jax.data import tokenizer as bpe
from tokzip_jax.types import IMAGE_ID, VOCO_ID

SMALL = ScenesConfig(train=40, validation=3, test=8)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    cfg = DataConfig(name="scenes", data_dir=folder, scenes=SMALL, text_length=64, caption_length=12)
    sources.load(cfg, "train")
    return cfg


def test_written_is_what_was_drawn(built):
    """Every feature comes back, pixels included, and neither the order nor the sizes of the splits matter."""
    other = dataclasses.replace(SMALL, train=5, test=999)
    for split, count in (("train", 40), ("validation", 3), ("test", 8)):
        source = sources.load(built, split)
        assert len(source) == count
        for index in reversed(range(count)):
            example, expected = source[index], scenes.example(other, split, index)
            assert example["image"].dtype == np.uint8 and example["image"].shape == (64, 64, 3)
            np.testing.assert_array_equal(example.pop("image"), expected.pop("image"))
            assert example == expected
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="scenes has no split 'val'; choose one of test, train, validation"):
        sources.load(built, "val")


def test_splits_and_seeds_are_other_streams():
    settings = (SMALL, dataclasses.replace(SMALL, seed=1))
    facts = {
        scenes.example(setting, split, index)["facts"] for setting in settings for split in drawn.SPLITS
        for index in range(20)
    }
    assert len(facts) == 2 * 3 * 20
    large = scenes.example(dataclasses.replace(SMALL, size=128), "train", 0)
    small = scenes.example(SMALL, "train", 0)
    assert large["image"].shape == (128, 128, 3) and large["facts"] == small["facts"]
    assert large["questions"] == small["questions"]


PRINT_DIGESTS = """
from test_drawn import digest
from tokzip_jax.data import clips, scenes
print(digest(clips), digest(scenes))
"""


def digest(module):
    """A hash of fifteen examples with their pixels."""
    found = hashlib.sha256()
    for index in range(15):
        example = module.example(ScenesConfig(), "test", index)
        found.update(example.pop("image").tobytes() + json.dumps(example).encode())
    return found.hexdigest()


@pytest.mark.slow
def test_other_processes_draw_the_same():
    """With other hashes of strings, and nothing drawn before."""
    run = subprocess.run(
        [sys.executable, "-c", PRINT_DIGESTS],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [digest(clips), digest(scenes)]


def test_every_setting_has_a_folder_of_its_own(tmp_path):
    changed = {
        "difficulty": "hard", "size": 65, "seed": 1, "train": 39, "validation": 4, "test": 9, "questions": 7,
        "captions": "partial", "frames": 7, "frame_order": "middle",
    }  # fmt: skip
    assert changed.keys() == {field.name for field in dataclasses.fields(ScenesConfig)}
    names = {key: dataclasses.replace(SMALL, **{key: value}) for key, value in changed.items()}
    paths = {key: scenes.Scenes(data_dir=tmp_path, settings=settings).data_path for key, settings in names.items()}
    own = scenes.Scenes(data_dir=tmp_path, settings=SMALL).data_path
    assert {key for key, path in paths.items() if path == own} == {"frames", "frame_order"}
    assert len(set(paths.values())) == len(changed) - 2 + 1
    assert own.parent.name.startswith("medium-64px-seed0-40-") and own.parent.parent.name == "scenes"
    assert scenes.Scenes(data_dir=tmp_path, settings=names["frames"]).settings.size == 64


def test_killed_build_is_not_believed(tmp_path, monkeypatch):
    cfg = DataConfig(name="scenes", data_dir=str(tmp_path), scenes=dataclasses.replace(SMALL, train=4, test=1))
    draw, seen = scenes.example, []

    def killed(settings, split, index):
        if index == 2:
            seen.extend(tmp_path.rglob("incomplete*"))
            raise KeyboardInterrupt
        return draw(settings, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "example", killed)
        with pytest.raises(KeyboardInterrupt):
            sources.load(cfg, "train")
    assert seen and not list(tmp_path.rglob("dataset_info.json"))
    assert len(sources.load(cfg, "train")) == 4


def test_rows_and_captions(built):
    """Captions name every thing with one token a word; the prefix of a row is that of one picture."""
    many = [scenes.example(SMALL, "train", index) for index in range(150)]
    texts = [text for example in many for text in (*example["questions"], *example["answers"], example["caption"])]
    tok = bpe.train(texts, 512)
    for example in many:
        words = example["caption"].split()
        facts = json.loads(example["facts"])
        assert sorted(words) == sorted(word for fact in facts for word in (fact["color"], fact["shape"]))
        assert len(tok.encode(example["caption"]).ids) == len(words) <= 12
    (batch, *_) = pipeline.eval_batches(built, tok, split="test", image_size=64, batch_size=4)
    assert batch["images"].shape == (4, 1, 64, 64, 3)
    np.testing.assert_array_equal(batch["images"][0, 0], sources.load(built, "test").image(0))
    assert list(batch["ids"][0, :3]) == [bpe.BOS_ID, IMAGE_ID, VOCO_ID] and batch["ids"][0, 3] > bpe.EOS_ID


def test_settings_survive_the_config_file():
    cfg = DataConfig(name="clips", scenes=ScenesConfig(difficulty="hard", frame_order="middle"))
    assert config_io.from_json(config_io.to_json(cfg), DataConfig) == cfg
    tree = config_io.to_config_dict(cfg)
    tree.scenes.size = 96
    assert config_io.from_config_dict(tree, DataConfig).scenes == dataclasses.replace(cfg.scenes, size=96)
    with pytest.raises(ValueError, match=r"unknown config key scenes\.dificulty; did you mean scenes\.difficulty"):
        config_io.from_config_dict({"scenes": {"dificulty": "easy"}}, DataConfig)
