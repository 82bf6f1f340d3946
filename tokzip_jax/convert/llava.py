"""LLaVA-1.5, LLaVA-1.6 and VoCo-LLaMA weights to our parameters, and back.

    python -m tokzip_jax.convert.llava --input DIR_OR_FILES... --output PATH --config configs/voco_llava15_7b.py

PATH then serves as a stage's `init_from`. What the checkpoint does not hold (the VoCo table of a LLaVA, the contrastive
heads) is made fresh there. Original LLaVA-1.5 files hold no vision tower: add `--vision` with CLIP's files.
"""

import argparse
import dataclasses
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tokzip_jax import checkpoint, stack, vit, vlm
from tokzip_jax.config import ModelConfig
from tokzip_jax.config_io import from_config_dict
from tokzip_jax.convert.files import read_safetensors
from tokzip_jax.convert.llava_names import NEWLINE, PROJECTOR, SPELLINGS, TABLES, Spelling, spelling_of
from tokzip_jax.convert.table import load, save
from tokzip_jax.paths import flatten
from tokzip_jax.types import Params

# What row 32000 of a longer vocabulary table may be; see `from_llava`.
ROW_32000 = ("voco", "image", "text")
# A CLIP checkpoint's other half.
_CLIP_TEXT = r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale"


def from_llava(
    state: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    vision: Mapping[str, Any] | None = None,
    row_32000: str | None = None,
    dtype: Any = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """A state dict as our parameters.

    Args:
        state: {name: array} in any of the spellings; anything with `.shape` that `np.asarray` reads will do.
        cfg: the model. Vocabulary rows from `cfg.llm.vocab_size` on are left out, of table and head alike.
        vision: CLIP's state dict, for files without a vision tower.
        row_32000: what row 32000 of a table with more rows is, which no file says and which differs: "voco"
            (VoCo-LLaMA: it becomes `voco/table`, for each of `cfg.voco_embeddings` tokens), "image" (llava-hf: its
            placeholder) or "text" (an ordinary token of a large vocabulary).
        dtype: of the result; None = `cfg.param_dtype`.

    Returns:
        NumPy parameters as `vlm.init` nests them, without "contrast" and, unless there is one, without "voco"; and what
        has no place in them: {"image_newline": [D]} of a LLaVA-1.6 without `cfg.image_newline`.

    Raises:
        ValueError: all names that are missing, superfluous or of another shape at once; no or two vision towers; an
            unclear row 32000.
    """
    dtype = jnp.dtype(dtype or cfg.param_dtype)
    name = spelling_of(state)
    spelling, table = SPELLINGS[name], TABLES[name]
    embed = f"{spelling.llm}.embed_tokens.weight"
    _check_row(name, state[embed].shape[0] if embed in state else 0, row_32000)
    state = _with_vision(spelling, state, vision)
    if cfg.llm.tied_head:
        table = table._replace(ignored=(*table.ignored, re.escape(f"{spelling.head}.weight")))
        table = table._replace(rules=tuple(rule for rule in table.rules if rule.path != "llm/head/w"))
    wanted = _wanted(cfg)
    if spelling.newline in state:
        wanted[NEWLINE] = jax.ShapeDtypeStruct((cfg.llm.width,), dtype)
    arrays = load(table, state, wanted, dtype=dtype)
    extra = {NEWLINE: arrays.pop(NEWLINE)} if NEWLINE in arrays and not cfg.image_newline else {}
    params = _nest(arrays)
    params["vit"]["layers"] = stack.split(params["vit"]["layers"], vit.cuts(cfg.vit))
    params["llm"]["layers"] = stack.split(params["llm"]["layers"], ())
    if row_32000 == "voco":
        row = np.asarray(state[embed])[32000].astype(dtype)
        params["voco"] = {"table": np.repeat(row[None], cfg.voco_embeddings, axis=0)}
    return params, extra


def to_llava(
    params: Params, *, spelling: str = "llava-hf", extra: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Our parameters under LLaVA's names, the inverse of `from_llava`.

    Args:
        params: with the projector mlp2x_gelu. VoCo table and contrastive heads have no name there and are left out.
        spelling: one of SPELLINGS.
        extra: what `from_llava` put aside.
    """
    return save(TABLES[spelling], {**flatten(_joined(params)), **(extra or {})})


def _joined(params: Params) -> Params:
    """The parameters with every stack as one."""
    towers = {name: {**params[name], "layers": stack.join(params[name]["layers"])} for name in ("vit", "llm")}
    return {**params, **towers}


def _wanted(cfg: ModelConfig) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda key: _joined(vlm.init(cfg, PROJECTOR, key)), jax.random.key(0))
    return {path: leaf for path, leaf in flatten(shapes).items() if path.split("/")[0] not in ("voco", "contrast")}


def _nest(flat: Mapping[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _check_row(spelling: str, rows: int, row_32000: str | None) -> None:
    if row_32000 not in (None, *ROW_32000):
        raise ValueError(f"row_32000={row_32000!r} is unknown; choose one of {', '.join(ROW_32000)}")
    if rows > 32000 and row_32000 is None:
        raise ValueError(
            f"the token table has {rows} rows, and row 32000 is the VoCo token in a VoCo-LLaMA and the image "
            f"placeholder in llava-hf files: say which with row_32000 (--row-32000), one of {', '.join(ROW_32000)}"
        )
    if rows <= 32000 and row_32000 is not None:
        raise ValueError(f"row_32000={row_32000!r}, but the token table has {rows} rows only; leave it out")
    if row_32000 == "voco" and spelling != "llava":
        raise ValueError(f"row_32000='voco', but in {spelling} names row 32000 is the image placeholder: give 'image'")


def _with_vision(spelling: Spelling, state: Mapping[str, Any], vision: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The state dict with CLIP's vision tower under the names it has in that spelling."""
    own = any(key.startswith(f"{spelling.vision}.") for key in state)
    if own and vision is not None:
        raise ValueError("the weights hold a vision tower of their own: leave out the separate one (vision, --vision)")
    if own:
        return state
    if vision is None:
        raise ValueError("the weights hold no vision tower (LLaVA-1.5 files do not): add CLIP's with vision (--vision)")
    tower = {key: leaf for key, leaf in vision.items() if not re.fullmatch(_CLIP_TEXT, key)}
    return {**state, **{f"{spelling.vision}.{key.removeprefix('vision_model.')}": leaf for key, leaf in tower.items()}}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LLaVA or VoCo-LLaMA safetensors to a checkpoint for init_from.")
    parser.add_argument("--input", nargs="+", required=True, help="directories, .safetensors or .index.json files")
    parser.add_argument("--output", required=True, help="directory to write; replaced if it exists")
    parser.add_argument("--config", required=True, help="a file of configs/, with :arg if it takes one")
    parser.add_argument("--vision", nargs="+", help="CLIP's files, where the input has no vision tower")
    parser.add_argument("--row-32000", choices=ROW_32000, help="what that vocabulary row is")
    parser.add_argument("--dtype", help="of the written arrays; default: the config's param_dtype")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _arguments(argv)
    try:
        path, _, option = args.config.partition(":")
        if not pathlib.Path(path).exists():
            raise FileNotFoundError(f"no config at {path}")
        cfg = from_config_dict(runpy.run_path(path)["get_config"](*([option] if option else []))).model
        state = read_safetensors(args.input)
        vision = read_safetensors(args.vision) if args.vision else None
        params, extra = from_llava(state, cfg, vision=vision, row_32000=args.row_32000, dtype=args.dtype)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    checkpoint.save_params(args.output, params, info={"source": spelling_of(state), "model": dataclasses.asdict(cfg)})
    leaves = flatten(params)
    print(f"read {len(state) + len(vision or {})} tensors under {spelling_of(state)} names")
    for part in params:
        mine = [leaf for name, leaf in leaves.items() if name.split("/")[0] == part]
        print(f"  {part:10} {sum(leaf.size for leaf in mine):>14,} parameters, {mine[0].dtype}")
    for name, leaf in extra.items():
        aside = f"{args.output.rstrip('/')}.extra.safetensors"
        save_file({name: leaf}, aside)
        print(f"  {name} {leaf.shape} has no place in the parameters: put aside in {aside}")
    print(f"wrote {args.output}: give it as a stage's init_from")


if __name__ == "__main__":
    main()
