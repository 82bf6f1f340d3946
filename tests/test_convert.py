"""Converting LLaVA weights: every spelling gives the same parameters, and what does not fit is said at once."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from safetensors.numpy import save_file

from tokzip_jax import checkpoint, config_io, vlm
from tokzip_jax.config import RunConfig
from tokzip_jax.convert import llava
from tokzip_jax.convert.files import read_safetensors
from tokzip_jax.convert.llava_names import SPELLINGS, TABLES, spelling_of

CFG = official.LLAVA
TOWER = "model.vision_tower.vision_tower.vision_model."
HUB = json.loads((official.DATA / "llava_key_mapping.json").read_text())
STATE = official.read("llava_state_dict")


def with_newline(state):
    return {**state, "model.image_newline": np.arange(48, dtype=np.float32)}


def in_memory(state, tower):
    """transformers' names in memory, made from the original ones."""
    out = {}
    for key, leaf in state.items():
        key = key.replace(TOWER, f"{tower}.")
        key = re.sub(r"^model\.(?=embed_tokens|layers|norm)", "model.language_model.", key)
        key = re.sub(
            r"^model\.mm_projector\.(0|2)", lambda m: f"model.multi_modal_projector.linear_{int(m[1]) // 2 + 1}", key
        )
        out[key] = leaf
    return out


def same(ours, other):
    jax.tree.map(np.testing.assert_array_equal, ours, other)
    return True


@pytest.fixture(scope="module")
def converted():
    return llava.from_llava(with_newline(STATE), CFG)


def test_tree_is_that_of_a_fresh_model(converted):
    params, extra = converted
    fresh = jax.eval_shape(lambda key: vlm.init(CFG, "mlp2x_gelu", key), jax.random.key(0))
    del fresh["voco"]  # a LLaVA has none
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(fresh))
    )
    np.testing.assert_array_equal(extra["image_newline"], np.arange(48))


def test_every_tensor_lands_where_its_name_says(converted):
    params = converted[0]
    layer = "model.layers.1"
    q = params["llm"]["layers"]["0"]["attn"]["q"]["w"][1]
    o = params["llm"]["layers"]["0"]["attn"]["o"]["w"][1]
    np.testing.assert_array_equal(q.reshape(48, 48), STATE[f"{layer}.self_attn.q_proj.weight"].T)
    np.testing.assert_array_equal(o.reshape(48, 48), STATE[f"{layer}.self_attn.o_proj.weight"].T)
    # The tower is stored split behind the third of four blocks.
    last = params["vit"]["layers"]["1"]["attn"]["k"]["b"]
    np.testing.assert_array_equal(last, STATE[f"{TOWER}encoder.layers.3.self_attn.k_proj.bias"].reshape(1, 4, 8))
    kernel = STATE[f"{TOWER}embeddings.patch_embedding.weight"]
    assert params["vit"]["patch"]["kernel"][1, 0, 2, 5] == kernel[5, 2, 1, 0]


def test_hub_names_give_the_same_tree(converted):
    state = {HUB[key]: leaf for key, leaf in with_newline(STATE).items()}
    assert set(state) == set(HUB.values())
    assert spelling_of(state) == "llava-hf"
    assert same(converted, llava.from_llava(state, CFG))


@pytest.mark.parametrize(
    ("spelling", "tower"),
    [("transformers-4.52", "model.vision_tower.vision_model"), ("transformers-5", "model.vision_tower")],
)
def test_names_in_memory_give_the_same_tree(converted, spelling, tower):
    state = in_memory(with_newline(STATE), tower)
    assert spelling_of(state) == spelling
    assert same(converted, llava.from_llava(state, CFG))


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_newline_has_a_place_in_a_model_with_one(converted, spelling):
    cfg = dataclasses.replace(CFG, image_newline=True)
    state = llava.to_llava(converted[0], spelling=spelling, extra=converted[1])
    params, extra = llava.from_llava(state, cfg)
    assert not extra
    np.testing.assert_array_equal(params["image_newline"], np.arange(48))
    assert same(llava.to_llava(params, spelling=spelling), state)
    del state[SPELLINGS[spelling].newline]
    with pytest.raises(ValueError, match=rf"1 missing: {SPELLINGS[spelling].newline}"):
        llava.from_llava(state, cfg)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_vision_tower_from_clip(converted, prefix):
    clip = {key.replace(TOWER, prefix): leaf for key, leaf in STATE.items() if key.startswith(TOWER)}
    other_half = {
        "text_model.embeddings.position_ids": np.arange(3),
        "logit_scale": np.float32(4),
        "visual_projection.weight": np.eye(2),
    }
    rest = {key: leaf for key, leaf in with_newline(STATE).items() if not key.startswith(TOWER)}
    assert same(converted, llava.from_llava(rest, CFG, vision={**clip, **other_half}))
    with pytest.raises(ValueError, match=r"no vision tower .*--vision"):
        llava.from_llava(rest, CFG)
    with pytest.raises(ValueError, match="a vision tower of their own"):
        llava.from_llava(STATE, CFG, vision=clip)


def test_buffers_of_old_files_are_ignored(converted):
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6),
        f"{TOWER}embeddings.position_ids": np.arange(577)[None],
    }
    assert same(converted, llava.from_llava({**with_newline(STATE), **buffers}, CFG))


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_export_is_the_inverse(converted, spelling):
    params, extra = converted
    state = llava.to_llava(params, spelling=spelling, extra=extra)
    assert spelling_of(state) == spelling
    assert same(converted, llava.from_llava(state, CFG))
    if spelling == "llava-hf":
        assert same({HUB[key]: leaf for key, leaf in with_newline(STATE).items()}, state)


def test_grouped_heads_keep_their_rows_together():
    cfg = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, kv_heads=2))
    shapes = jax.eval_shape(lambda key: vlm.init(cfg, "mlp2x_gelu", key), jax.random.key(0))
    drawn = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: drawn.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    state = llava.to_llava(params)
    k = state["language_model.model.layers.1.self_attn.k_proj.weight"]
    assert k.shape == (24, 48)  # [K*H, D]: head after head
    np.testing.assert_array_equal(k[12:], params["llm"]["layers"]["0"]["attn"]["k"]["w"][1, :, 1].T)
    del params["voco"]
    assert same(params, llava.from_llava(state, cfg)[0])


def test_everything_that_does_not_fit_is_said_at_once():
    state = dict(STATE)
    for layer in (0, 1):
        del state[f"model.layers.{layer}.mlp.up_proj.weight"]
    del state["model.norm.weight"]
    state["model.layers.2.self_attn.q_proj.weight"] = np.ones((48, 48))  # a third layer
    state["model.mystery"] = np.ones(3)
    state["lm_head.weight"] = np.ones((63, 48))
    state["model.layers.1.self_attn.k_proj.weight"] = np.ones((24, 48))
    with pytest.raises(ValueError) as error:
        llava.from_llava(state, CFG)
    said = str(error.value)
    assert "3 missing: model.layers.#.mlp.up_proj.weight (layers 0..1), model.norm.weight" in said
    assert "2 without a place: model.mystery, model.layers.2.self_attn.q_proj.weight" in said
    assert "2 of another shape" in said
    assert "model.layers.1.self_attn.k_proj.weight is (24, 48), the config wants (48, 48)" in said
    assert "lm_head.weight is (63, 48), the config wants (64, 48)" in said


def test_foreign_weights_and_a_long_list_of_problems():
    with pytest.raises(ValueError, match="no LLaVA weights: none of 2 names is known, such as"):
        llava.from_llava({"transformer.wte.weight": np.ones((2, 2)), "a": np.ones(1)}, CFG)
    with pytest.raises(ValueError, match=r"95 missing: .* and 26 other names$"):
        llava.from_llava({TOWER + "pre_layrnorm.bias": np.ones(32)}, CFG)


def test_a_tied_head_is_not_read():
    tied = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, tied_head=True))
    without = {key: leaf for key, leaf in STATE.items() if key != "lm_head.weight"}
    params, _ = llava.from_llava(STATE, tied)
    assert "head" not in params["llm"]
    assert same(params, llava.from_llava(without, tied)[0])


def test_dtype_is_the_configs_unless_given():
    half = dataclasses.replace(CFG, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(llava.from_llava(STATE, half)[0])} == {jnp.dtype("bfloat16")}
    params, _ = llava.from_llava(STATE, half, dtype="float16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float16")}


def longer(rows, state=STATE):
    """The tiny LLaVA with a token table of so many rows; row i of the new ones is all i."""
    out = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = np.repeat(np.arange(64, rows, dtype=np.float32)[:, None], 48, axis=1)
        out[name] = np.concatenate([state[name], new])
    return out


def test_more_vocabulary_rows_than_the_config_has_are_left_out(converted):
    assert same(converted[0], llava.from_llava(longer(70), CFG)[0])
    assert same(converted[0], llava.from_llava(longer(32064), CFG, row_32000="image")[0])


@pytest.mark.parametrize("embeddings", [1, 3])
def test_row_32000_of_a_voco_llama_is_the_voco_table(converted, embeddings):
    cfg = dataclasses.replace(CFG, voco_embeddings=embeddings)
    params, _ = llava.from_llava(longer(32001), cfg, row_32000="voco")
    np.testing.assert_array_equal(params.pop("voco")["table"], np.full((embeddings, 48), 32000))
    assert same(converted[0], params)


def test_row_32000_must_be_named():
    with pytest.raises(ValueError, match=r"32001 rows, and row 32000 is the VoCo token .* image placeholder"):
        llava.from_llava(longer(32001), CFG)
    hub = {HUB[key]: leaf for key, leaf in longer(32064).items()}
    with pytest.raises(ValueError, match="row 32000 is the image placeholder: give 'image'"):
        llava.from_llava(hub, CFG, row_32000="voco")
    with pytest.raises(ValueError, match="the token table has 64 rows only"):
        llava.from_llava(STATE, CFG, row_32000="voco")
    with pytest.raises(ValueError, match="row_32000='speech' is unknown; choose one of voco, image, text"):
        llava.from_llava(longer(32001), CFG, row_32000="speech")


def write_shards(folder):
    """The tiny LLaVA in two files and their index, some of it in bfloat16."""
    folder.mkdir()
    state = {key: leaf.astype(jnp.bfloat16) if "mlp" in key else leaf for key, leaf in STATE.items()}
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: np.ascontiguousarray(state[key]) for key in keys}, folder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


def test_files_are_read_by_header_until_asked(tmp_path):
    state = write_shards(tmp_path / "in")
    for paths in (
        tmp_path / "in",
        str(tmp_path / "in" / "model.safetensors.index.json"),
        [tmp_path / "in" / "a.safetensors", tmp_path / "in" / "b.safetensors", tmp_path / "in" / "a.safetensors"],
    ):
        tensors = read_safetensors(paths)
        assert {key: leaf.shape for key, leaf in tensors.items()} == {key: leaf.shape for key, leaf in state.items()}
    for key, leaf in tensors.items():
        read = np.asarray(leaf)
        assert read.dtype == state[key].dtype
        np.testing.assert_array_equal(read, state[key])
    assert np.asarray(tensors["model.layers.0.mlp.up_proj.weight"], np.float32).dtype == np.float32


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        read_safetensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file; other formats"):
        read_safetensors(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        read_safetensors(tmp_path / "text.safetensors")
    write_shards(tmp_path / "in")
    save_file({"model.norm.weight": np.ones(48)}, tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is both in .* and in .*again.safetensors"):
        read_safetensors([tmp_path / "in", tmp_path / "again.safetensors"])
    (tmp_path / "in" / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: b\.safetensors"):
        read_safetensors(tmp_path / "in")


@pytest.fixture
def config(tmp_path):
    """A config file for the tiny LLaVA; its argument is the vocabulary's size."""
    path = tmp_path / "config.py"
    cfg = config_io.to_json(RunConfig(model=CFG))
    path.write_text(
        "import json\n"
        f"CONFIG = json.loads({cfg!r})\n"
        "def get_config(vocabulary='64'):\n"
        "    CONFIG['model']['llm']['vocab_size'] = int(vocabulary)\n"
        "    return CONFIG\n"
    )
    return path


def test_command_writes_what_a_stage_loads(tmp_path, config, capsys):
    write_shards(tmp_path / "in")
    save_file({"model.image_newline": np.ones(48, np.float32)}, tmp_path / "newline.safetensors")
    inputs = [str(tmp_path / "in"), str(tmp_path / "newline.safetensors")]
    llava.main(["--input", *inputs, "--output", str(tmp_path / "out"), "--config", f"{config}:60"])
    said = capsys.readouterr().out
    assert re.search(r"read \d+ tensors under llava names", said) and "image_newline (48,)" in said
    cfg = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, vocab_size=60))
    wanted = jax.eval_shape(lambda key: vlm.init(cfg, "mlp2x_gelu", key), jax.random.key(0))
    del wanted["voco"]
    loaded = checkpoint.load_params(str(tmp_path / "out"), wanted)
    assert same(llava.from_llava(read_safetensors(tmp_path / "in"), cfg)[0], loaded)
    assert checkpoint.read_info(str(tmp_path / "out"))["source"] == "llava"
    aside = read_safetensors(tmp_path / "out.extra.safetensors")
    np.testing.assert_array_equal(aside["image_newline"], np.ones(48))


def test_command_ends_in_one_sentence(tmp_path, config):
    write_shards(tmp_path / "in")
    command = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--config"]
    with pytest.raises(SystemExit, match=r"error: the weights \(llava\) do not fit .* of another shape"):
        llava.main([*command, f"{config}:65"])
    with pytest.raises(SystemExit, match="error: no config at"):
        llava.main([*command, "nowhere.py"])
    assert not (tmp_path / "out").exists()


def test_tables_name_every_parameter_once():
    paths = {rule.path for rule in TABLES["llava"].rules}
    for name, found in TABLES.items():
        assert {rule.path for rule in found.rules} == paths, name
        assert len({rule.key for rule in found.rules}) == len({rule.path for rule in found.rules}) == len(found.rules)
