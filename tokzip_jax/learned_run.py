"""`eval.py --learned`: where the VoCo tokens of a row look, and which facts of a picture can be read from their cache.

A linear read-out of each layer's keys and values (`probe`) says what is there for text to read. Beside it stand the
same read-outs of two things that learned nothing of the kind: the mean of the picture's projected visual tokens, and
the cache that as many VoCo tokens get from the parameters of the row `eval.lower`.
"""

import dataclasses
import functools
import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tokzip_jax import plots_voco, probe, scene_facts, sharding, vlm, voco
from tokzip_jax.config import MethodConfig, ModelConfig, RowConfig, RunConfig
from tokzip_jax.data import shapes, sources
from tokzip_jax.data.rows import PICTURE
from tokzip_jax.data.tokenizer import BOS_ID
from tokzip_jax.data.transforms import fit_image
from tokzip_jax.evals.runner import Runner
from tokzip_jax.metrics import say
from tokzip_jax.probe import Looks, Readout
from tokzip_jax.projectors import KEEPS_PLACES
from tokzip_jax.study import Study
from tokzip_jax.types import Array, Params
from tokzip_jax.workdir import Workdir, write_atomically

FOLDER = "learned"  # under eval/
PICTURES = 2000
POOLED, UNTRAINED = "mean patch", "both, untrained"
WHERE = (
    "Means over {pictures} pictures of {split!r} and over tokens. on patches: attention that goes to the picture at "
    "all;\npatches: e to the power of its entropy; overlap: cosine of two tokens' maps."
)
AREA = "on things: share of the attention to the picture; things cover {area:.1f} % of it."
READ = (
    "Read-outs: accuracy in per cent on pictures that nothing was fitted on, {tests} or more; two standard errors are "
    "{error:.1f} at most.\nOf the layers the best one, its number in brackets. majority: always the commonest answer; "
    "mean patch: the mean of the projected visual tokens."
)
LOWER = "untrained: as many VoCo tokens, read with the parameters of the row {row!r}."

Scenes = Sequence[Sequence[shapes.Thing]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a model makes of pictures: where its VoCo tokens look, and features [L, B, F] by name."""

    looks: Looks
    features: dict[str, np.ndarray]


def check(cfg: RunConfig, names: Sequence[str], pictures: int = PICTURES) -> None:
    """Refuse what cannot be looked at.

    Raises:
        ValueError: a data set without facts, a name that is no row with VoCo tokens, or too few pictures.
    """
    scene_facts.check(cfg.data.name)
    known = [name for name, row in cfg.rows.items() if row.stage and _cached(row.method)]
    for name in names:
        if name not in known:
            choice = f"choose of {', '.join(map(repr, known))}" if known else "this run has none"
            raise ValueError(f"--learned holds {name!r}, which is no row that is read from VoCo tokens alone; {choice}")
    if pictures < 3:
        raise ValueError(f"--learned_pictures={pictures} must be at least 3: some to fit on, some to test on")


def _cached(method: MethodConfig) -> bool:
    """Whether the VoCo tokens are all that is kept of a picture, whatever the question."""
    alone = method.voco > 0 and method.voco_mask == "voco"
    return alone and method.decoder == "none" and not vlm.reads_question(method)


def make(cfg: RunConfig, workdir: Workdir, mesh: Mesh, names: Sequence[str], pictures: int = PICTURES) -> str:
    """`eval/learned/ROW.json` and `figures/learned_ROW.png` of each row, and the tables as text.

    Args:
        cfg, workdir, mesh: of the run; call this with the mesh set.
        names: rows. Those of a stage that was studied are read from its first seed's training at the chosen rate.
        pictures: how many of the eval split, the first ones; `eval.limit` holds too.

    Raises:
        ValueError: as `check`.
        FileNotFoundError: a stage was not trained to its end.
    """
    check(cfg, names, pictures)
    runner = Runner.create(_first_seeds(cfg, workdir, mesh, names), workdir, mesh)
    scenes = [scene_facts.things(example["facts"]) for example in runner.examples[:pictures]]
    probe.split(len(scenes))  # says that there are too few of them
    labels = scene_facts.labels(scenes, shapes.LEVELS[cfg.data.scenes.difficulty])
    texts = []
    for name in dict.fromkeys(names):
        row = runner.cfg.rows[name]
        say(f"{name}: looking at {len(scenes)} pictures")
        texts.append(_one(runner, name, _see(runner, row, scenes), _lower(runner, row, scenes), labels))
    return "\n\n".join([*texts, f"written to {workdir.eval / FOLDER} and {workdir.figures}"])


def _first_seeds(cfg: RunConfig, workdir: Workdir, mesh: Mesh, names: Sequence[str]) -> RunConfig:
    """The config with the rows that are read moved to their study's first seed; the other stages may be unfinished."""
    read = {cfg.rows[name].stage for name in (*names, cfg.eval.lower) if name in cfg.rows}
    stages = tuple(stage for stage in cfg.study.stages if stage in read)
    narrow = dataclasses.replace(cfg, study=dataclasses.replace(cfg.study, stages=stages))
    return Study(narrow, workdir, mesh).first()


def _lower(runner: Runner, row: RowConfig, scenes: Scenes) -> Seen | None:
    """What as many VoCo tokens see with the parameters of the row `eval.lower`, where that has VoCo tokens too."""
    lower = runner.cfg.rows.get(runner.cfg.eval.lower)
    if lower is None or not _cached(lower.method) or lower.stage == row.stage:
        return None
    method = dataclasses.replace(lower.method, voco=row.method.voco)
    return _see(runner, dataclasses.replace(lower, method=method), scenes)


# Replicated results can be read in every process.
@functools.partial(jax.jit, static_argnums=(0, 3), out_shardings=P())
def _look(cfg: ModelConfig, params: Params, batch: dict[str, Array], method: MethodConfig) -> dict[str, Array]:
    """Attention, objects and features; pictures are the second axis of all."""
    visual, _ = vlm.encode(cfg, params, batch["images"], method, jax.random.key(method.seed))
    cache = voco.build(cfg, params, batch, method, positions="compact", visual=visual)
    weight = visual.valid_BM[:, :, None].astype(jnp.float32)
    mean = jnp.sum(visual.tokens_BMD * weight, axis=1) / jnp.sum(weight, axis=1)
    return {
        "attention": vlm.voco_attention(cfg, params, batch, method, visual=visual),
        "objects": probe.patch_shares(batch["objects"], cfg.vit.grid)[None],
        **{which: probe.features(cache, which) for which in probe.FEATURES},
        POOLED: mean[None].astype(jnp.float32),
    }


def _see(runner: Runner, row: RowConfig, scenes: Scenes) -> Seen:
    """Every picture once, in batches of `eval.batch_size`."""
    params, method, parts = runner.load(row), row.method, []
    for batch, real in _batches(runner, scenes):
        found = _look(runner.cfg.model, params, sharding.place(runner.mesh, batch, "data"), method)
        parts.append(jax.tree.map(lambda x, real=real: x[:, :real], jax.device_get(found)))
    seen = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    attention, objects = seen.pop("attention"), seen.pop("objects")[0]
    # Patches have a place to compare with where nothing was dropped or merged.
    placed = method.encoder == "none" and method.projector in KEEPS_PLACES
    looks = jax.jit(probe.looks)(attention, objects if placed else None)
    # A jitted function sorts its dict.
    return Seen(jax.device_get(looks), {kind: seen[kind] for kind in (*probe.FEATURES, POOLED)})


def _batches(
    runner: Runner, scenes: Scenes
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Rows of one picture without a question, and how many of a batch are real; the others repeat the last one."""
    cfg = runner.cfg
    source, side, size = sources.load(cfg.data, cfg.eval.split), cfg.model.vit.image_size, cfg.eval.batch_size
    ids = np.tile(np.array([BOS_ID, *PICTURE], np.int32), (size, 1))
    text = {"ids": ids, "thread": 0 * ids, "sample": np.ones_like(ids), "supervised": np.zeros(ids.shape, bool)}
    for first in range(0, len(scenes), size):
        numbers = np.minimum(np.arange(first, first + size), len(scenes) - 1)
        pictures = {
            "images": np.stack([fit_image(source.image(int(n)), side)[None] for n in numbers]),
            "objects": np.stack([shapes.cover(scenes[n], side) for n in numbers]),
        }
        yield {**text, **pictures}, min(size, len(scenes) - first)


def readouts(features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, dict[str, Readout]]:
    """Read-outs by fact and kind of features; a fact of several questions gets their mean.

    Questions to which all fitted pictures give one answer are left out, and so are facts without any other.

    Args:
        features: [L, B, F] by name.
        labels: [B, Q] by name, see `scene_facts.labels`.
    """
    train, test = probe.split(len(next(iter(labels.values()))))
    # Facts that are asked of the same pictures share a decomposition.
    groups: dict[bytes, dict[str, np.ndarray]] = {}
    for fact, answers in labels.items():
        asked = answers[:, 0] != scene_facts.NOT_ASKED
        fitted = answers[train[asked[train]]]
        told = [q for q in range(answers.shape[1]) if len(np.unique(fitted[:, q])) > 1]
        if told and np.any(asked[test]):
            groups.setdefault(asked.tobytes(), {})[fact] = answers[:, told]
    found: dict[str, dict[str, Readout]] = {fact: {} for fact in labels}
    for key, facts in groups.items():
        asked = np.flatnonzero(np.frombuffer(key, bool))
        columns = np.concatenate(list(facts.values()), axis=1)[asked]
        fit, held = (np.flatnonzero(np.isin(asked, part)) for part in (train, test))
        for kind, values in features.items():
            each = iter(probe.linear_readouts(values[:, asked], columns, fit, held))
            for fact, answers in facts.items():
                found[fact][kind] = _mean([next(each) for _ in range(answers.shape[1])])
    return {fact: kinds for fact, kinds in found.items() if kinds}


def _mean(parts: list[Readout]) -> Readout:
    """Of several questions; their regularisations by their logarithms."""
    return Readout(
        accuracy_L=np.mean([part.accuracy_L for part in parts], axis=0),
        l2_L=np.exp(np.mean(np.log([part.l2_L for part in parts]), axis=0)),
        majority=float(np.mean([part.majority for part in parts])),
        chance=float(np.mean([part.chance for part in parts])),
        tests=parts[0].tests,
    )


def _one(runner: Runner, name: str, seen: Seen, lower: Seen | None, labels: Mapping[str, np.ndarray]) -> str:
    """Write one row's JSON and figure; its tables."""
    cfg, row = runner.cfg, runner.cfg.rows[name]
    features = {**seen.features, **({} if lower is None else {UNTRAINED: lower.features["both"]})}
    facts = readouts(features, labels)
    result = {
        "row": name,
        "stage": row.stage,
        "split": cfg.eval.split,
        "pictures": seen.looks.entropy_LBk.shape[1],
        "looks": _numbers(seen.looks),
        "facts": {
            fact: {
                **{field: getattr(next(iter(kinds.values())), field) for field in ("majority", "chance", "tests")},
                "accuracy": {kind: np.asarray(found.accuracy_L).tolist() for kind, found in kinds.items()},
            }
            for fact, kinds in facts.items()
        },
        "untrained": None if lower is None else {"row": cfg.eval.lower, "looks": _numbers(lower.looks)},
    }
    if jax.process_index() == 0:
        file = urllib.parse.quote(name, safe=" ")  # a name may hold what a file name cannot
        write_atomically(runner.workdir.eval / FOLDER / f"{file}.json", json.dumps(result, indent=2) + "\n")
        path = runner.workdir.figures / f"learned_{file}.png"
        plots_voco.learned_figure(seen.looks, facts, path, untrained=None if lower is None else lower.looks)
    return _text(result)


def _numbers(looks: Looks) -> dict[str, Any]:
    """Means over pictures, [L][k] each; "overlap" [L][k][k]."""
    values = {
        "spent": looks.spent_LBk,
        "entropy": looks.entropy_LBk,
        "patches": np.exp(looks.entropy_LBk),
        "overlap": looks.overlap_LBkk,
        "object_share": looks.object_LBk,
    }
    means = {key: None if value is None else np.mean(value, axis=1).tolist() for key, value in values.items()}
    return {**means, "object_area": None if looks.area_B is None else float(np.mean(looks.area_B))}


def _text(result: Mapping[str, Any]) -> str:
    """The tables of one row."""
    looks, facts = result["looks"], result["facts"]
    means = {"on patches %": 100 * np.mean(looks["spent"], axis=1), "patches": np.mean(looks["patches"], axis=1)}
    overlap = np.array(looks["overlap"])
    tokens = overlap.shape[-1]
    if tokens > 1:
        means["overlap"] = overlap[:, *np.triu_indices(tokens, 1)].mean(axis=1)
    if looks["object_share"] is not None:
        means["on things %"] = 100 * np.mean(looks["object_share"], axis=1)
    lines = [["layer", *means]]
    lines += [[str(n), *(f"{value:.3g}" for value in values)] for n, values in enumerate(zip(*means.values()), 1)]
    kinds = list(next(iter(facts.values()))["accuracy"]) if facts else []
    read = [["read-out", "majority", *kinds]]
    for name, fact in facts.items():
        read.append([name, f"{100 * fact['majority']:.1f}", *map(_best, fact["accuracy"].values())])
    caption = [WHERE.format(pictures=result["pictures"], split=result["split"])]
    if looks["object_area"] is not None:
        caption.append(AREA.format(area=100 * looks["object_area"]))
    if facts:
        fewest = min(fact["tests"] for fact in facts.values())
        caption.append(READ.format(tests=fewest, error=100 / fewest**0.5))
    if result["untrained"]:
        caption.append(LOWER.format(row=result["untrained"]["row"]))
    tables = [_columns(lines), *([_columns(read)] if facts else [])]
    return "\n\n".join([f"{result['row']} (stage {result['stage']})", *tables, "\n".join(caption)])


def _best(accuracy_L: Sequence[float]) -> str:
    """ "93.1 (2)": the best layer; without a number where there is but one."""
    layer = int(np.argmax(accuracy_L))
    return f"{100 * accuracy_L[layer]:.1f}" + (f" ({layer + 1})" if len(accuracy_L) > 1 else "")


def _columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells under one another, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))])
        for line in lines
    )
