"""Pictures of any resolution: grids, tiles and un-padding against LLaVA-1.6's; the way of tiles through the data."""

import dataclasses
import io
import json

import numpy as np
import official
import pytest
from PIL import Image
from test_llava_json import byte_tokenizer, entry

from tokzip_jax import config_check, config_io
from tokzip_jax.config import DataConfig, LlmConfig, ModelConfig, RunConfig, ScenesConfig, VitConfig
from tokzip_jax.data import anyres, pipeline, sources
from tokzip_jax.data.built import BuiltSource
from tokzip_jax.types import IMAGE_ID, VOCO_ID

GOLDEN, PICTURES = official.read("llava_next_preprocess"), official.read("llava_preprocess")


def size_of(image):
    return image.shape[1], image.shape[0]


@pytest.mark.parametrize("number", range(4))
def test_overview_and_tiles_are_llavas(number):
    image = PICTURES[f"image_{number}"]
    grid = anyres.choose_grid(size_of(image), anyres.LLAVA_NEXT, 48)
    np.testing.assert_array_equal(np.multiply(grid, 48), GOLDEN[f"best_resolution_wh_{number}"])
    np.testing.assert_array_equal(anyres.cut(image, grid, 48), GOLDEN[f"tiles_{number}"])


def test_grids_and_real_patches_of_200_sizes_are_llavas():
    """Among them pictures so long that no row, or no column, is left."""
    for size, best, unpadded, count in zip(
        GOLDEN["sel_sizes_wh"].tolist(), GOLDEN["sel_best_wh"], GOLDEN["unpadded_hw"], GOLDEN["next_token_count"]
    ):
        grid = anyres.choose_grid(size, anyres.LLAVA_NEXT, 336)
        np.testing.assert_array_equal(np.multiply(grid, 336), best)
        top, bottom, left, right = anyres.real_box(size, grid, 24)
        assert (bottom - top, right - left) == tuple(unpadded)
        assert 576 + anyres.stitched_tokens((top, bottom, left, right)) == count
    assert 576 in GOLDEN["next_token_count"] and (GOLDEN["unpadded_hw"] == 0).any(axis=0).all()


def test_the_first_of_equal_grids_wins():
    # A square of one tile: 2x1 and 1x2 show all of it and waste a tile each, 2x2 wastes three.
    assert anyres.choose_grid((48, 48), ((2, 2), (2, 1), (1, 2)), 48) == (2, 1)
    assert anyres.choose_grid((48, 48), ((2, 2), (1, 2), (2, 1)), 48) == (1, 2)
    assert anyres.choose_grid((480, 480), ((1, 2), (2, 2)), 48) == (2, 2)


def test_box_is_centred():
    # 10 x 4 on 2 x 1 tiles of 3 patches: 6 x 2.4 patches, 2 of 3 rows; the odd one is left in.
    assert anyres.real_box((10, 4), (2, 1), 3) == (0, 3, 0, 6)
    # On 2 x 2: 2 of 6 rows, two taken off each end.
    assert anyres.real_box((10, 4), (2, 2), 3) == (2, 4, 0, 6)
    assert anyres.real_box((4, 10), (2, 2), 3) == (0, 6, 2, 4)
    assert anyres.stitched_tokens((2, 4, 0, 6)) == 2 * 7


TILES = ((1, 2), (2, 2))
DATA = DataConfig(tiles=TILES, images=5, text_length=64)
MODEL = ModelConfig(
    vit=VitConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32),
    llm=LlmConfig(vocab_size=512, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=32, max_positions=512),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 4}, r"data\.images = 4 is too small for data\.tiles: .* of its largest grid need 5"),
        ({"tiles": ((2, 2), (0, 1))}, r"data\.tiles holds \(0, 1\); a grid is \(columns, rows\), both >= 1"),
        ({"name": "clips", "scenes": ScenesConfig(frames=3)}, r"data\.tiles = .* must be \(\) for clips"),
    ],
)
def test_grids_that_cannot_be_are_refused(changes, message):
    cfg = dataclasses.replace(DATA, **changes)
    with pytest.raises(ValueError, match=message):
        config_check.validate(RunConfig(model=MODEL, data=cfg))
    with pytest.raises(ValueError, match=message):
        sources.load(cfg, "train")


def test_grids_in_a_config():
    """They travel as JSON and ConfigDict, and can be written on a command line."""
    cfg = RunConfig(model=MODEL, data=DATA)
    config_check.validate(cfg)
    assert config_io.from_json(config_io.to_json(cfg)) == cfg
    tree = config_io.to_config_dict(cfg)
    assert config_io.from_config_dict(tree) == cfg
    for written in ("((1, 2), (2, 2))", "[[1, 2], [2, 2]]"):
        assert config_io.from_config_dict({"data": {"tiles": written}}).data.tiles == TILES
    for wrong in ((1, 2), ((1, 2, 3),), ((1, "x"),), "2x2"):
        with pytest.raises(ValueError, match=r"config key data\.tiles = .* must be a tuple of pairs of int"):
            config_io.from_config_dict({"data": {"tiles": wrong}})


def drawn(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def built(monkeypatch):
    """A data set in memory: a square, a tall and a wide picture; the pictures too."""
    images = [drawn(64, 64), drawn(30, 70, 1), drawn(32, 32, 2)]
    one = {"questions": ["what?"], "answers": ["that"], "types": ["open"], "caption": "it"}
    texts = [{"image_id": str(n), **one} for n in range(3)]
    source = BuiltSource([encoded(image) for image in images], texts)
    monkeypatch.setitem(sources.SOURCES, "easy_vqa", lambda cfg, split: source)
    return images


def test_rows_of_tiles(built):
    """Places of the batch and placeholders of the row are those of the overview and of the tiles."""
    cfg = dataclasses.replace(DATA, caption_length=8)
    (batch,) = pipeline.eval_batches(cfg, byte_tokenizer(), split="train", image_size=32, batch_size=3)
    grids = [(2, 2), (1, 2), (1, 2)]
    np.testing.assert_array_equal(batch["tiles"], [(2, 2, 64, 64), (1, 2, 30, 70), (1, 2, 32, 32)])
    for row, (image, (columns, rows)) in enumerate(zip(built, grids)):
        count = 1 + columns * rows
        np.testing.assert_array_equal(batch["images"][row, :count], anyres.cut(image, (columns, rows), 32))
        assert not batch["images"][row, count:].any()
        ids = batch["ids"][row].tolist()
        assert ids[1 : 1 + 2 * count] == [IMAGE_ID, VOCO_ID] * count and ids.count(IMAGE_ID) == count
    whole = dataclasses.replace(cfg, tiles=())
    (plain,) = pipeline.eval_batches(whole, byte_tokenizer(), split="train", image_size=32, batch_size=3)
    assert "tiles" not in plain and (plain["ids"] == IMAGE_ID).sum() == 3


@pytest.mark.parametrize("name", ["llava_json", "llava_json_system_first"])
def test_tiles_of_conversations(tmp_path, name):
    """Once more for every tile, in either layout; an entry without a picture has none."""
    (tmp_path / "images").mkdir()
    image = drawn(70, 60)
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    turns = [("<image>\nWhat?", "That.")]
    entries = [entry(turns, image="a.png"), entry([("And?", "No.")])]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    cfg = DataConfig(
        name=name, data_dir=str(tmp_path), tokenizer="t", text_length=256, caption_length=1, tiles=TILES, images=5
    )
    (tiled,) = pipeline.eval_batches(cfg, byte_tokenizer(), split="train", image_size=32, batch_size=2)
    np.testing.assert_array_equal(tiled["tiles"], [(2, 2, 70, 60), (0, 0, 0, 0)])
    np.testing.assert_array_equal(tiled["images"][0], anyres.cut(image, (2, 2), 32))
    assert not tiled["images"][1].any()
    whole = dataclasses.replace(cfg, tiles=())
    (plain,) = pipeline.eval_batches(whole, byte_tokenizer(), split="train", image_size=32, batch_size=2)
    ids = plain["ids"][0].tolist()
    first, last = ids.index(IMAGE_ID), ids.index(VOCO_ID)
    expected = ids[:first] + ids[first : last + 1] * 5 + ids[last + 1 :]
    assert tiled["ids"][0].tolist() == expected[:256]
    np.testing.assert_array_equal(tiled["ids"][1], plain["ids"][1])
