"""Scoring many methods on one split: the tower looks at every picture once, and rows of few tokens share a program.

A method costs what it does to the features and one pass of the language model. The result is `Runner`'s own.
"""

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokzip_jax import encoder_site, layout, sharding, step, vlm
from tokzip_jax.compress.entry import ABOUT_QUESTION
from tokzip_jax.config import AutoConfig, MethodConfig, ModelConfig, ProjectorConfig, RowConfig
from tokzip_jax.evals import scoring
from tokzip_jax.evals.runner import FIXED, Runner
from tokzip_jax.types import Array, Params, VisionFeatures, VisualTokens

SLOTS = 16  # methods that give up to so many tokens are read by one program
AT_ONCE = 4  # rows that are measured side by side, at most
TEXT = ("ids", "thread", "sample", "supervised")
_DECODER = tuple(field.name for field in dataclasses.fields(MethodConfig) if field.name.startswith("decoder"))
NO_DECODER = {name: getattr(MethodConfig(), name) for name in _DECODER}


@dataclasses.dataclass
class Memory:
    """A split in host memory, for runners that differ in model, rows and questions a row.

    Attributes:
        signals: what the methods read of the tower, beside patches and CLS token.
        images: uint8 [N, I, H, W, 3], one entry an example; None until it was read.
        batches: by questions a row: rows without pictures, their text cut to the longest one.
        features: what was seen of the pictures, by what was done to them; arrays [N * I, ...].
        params: the parameters that were loaded last, and what they were loaded for.
        lock: held while something is put in here.
    """

    signals: tuple[str, ...] = ()
    images: np.ndarray | None = None
    batches: dict[int, list[dict[str, np.ndarray]]] = dataclasses.field(default_factory=dict)
    features: dict[MethodConfig, VisionFeatures] = dataclasses.field(default_factory=dict)
    params: tuple[Any, Params] | None = None
    lock: Any = dataclasses.field(default_factory=threading.RLock)


def side_by_side(mesh: Mesh, function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """[function(argument), ...], on one CPU device by some threads at once; elsewhere one after the other.

    XLA's own threads find next to nothing to share in programs of so few tokens, and compile one program at a time.
    The first error is raised; what has not begun by then is left.
    """
    workers = min(AT_ONCE, os.cpu_count() or 1)
    if workers == 1 or mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return [function(argument) for argument in arguments]

    def work(argument: Any) -> Any:
        with jax.set_mesh(mesh):  # every thread has a mesh of its own
            return function(argument)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, arguments))


def pad(tokens: VisualTokens, slots: int) -> VisualTokens:
    """The same tokens with empty slots behind them, `slots` in all."""

    def more(x: Array, value: float) -> Array:
        width = [(0, 0)] * x.ndim
        width[1] = (0, slots - x.shape[1])
        return jnp.pad(x, width, constant_values=value)

    return dataclasses.replace(
        tokens,
        tokens_BMD=more(tokens.tokens_BMD, 0),
        valid_BM=more(tokens.valid_BM, False),
        position_BM=more(tokens.position_BM, -1),
        size_BM=more(tokens.size_BM, 0),
    )


@functools.lru_cache(maxsize=64)
def _looker(cfg: ModelConfig, method: MethodConfig, signals: tuple[str, ...] | None, mesh: Mesh) -> Callable[..., Any]:
    def look(params: Params, images: Array) -> VisionFeatures:
        return encoder_site.look(cfg, params, images, method, signals=signals)[0]

    return jax.jit(look, out_shardings=NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=256)
def _encoder(cfg: ModelConfig, method: MethodConfig, mesh: Mesh) -> Callable[..., VisualTokens]:
    def encode(params: Params, features: VisionFeatures, batch: dict[str, Array], key: Array) -> VisualTokens:
        # A picture's key is its own, as in `Runner`.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["example"])
        pictures = features.patches_BPD.shape[0] // keys.shape[0]
        blank = jnp.zeros((keys.shape[0], pictures, 0, 0, 3), jnp.uint8)  # of pictures only their number is read
        text = layout.question(batch, cfg.projector.text_length) if vlm.reads_question(method) else None
        visual, _ = vlm.encode(cfg, params, blank, method, keys, text=text, features=features)
        return visual if visual.valid_BM.shape[1] >= SLOTS else pad(visual, SLOTS)

    return jax.jit(encode, out_shardings=NamedSharding(mesh, P("data")))


@functools.lru_cache(maxsize=64)
def _reader(
    cfg: ModelConfig, method: MethodConfig, questions: int, targets: int, turns: bool, mesh: Mesh
) -> Callable[..., Array]:
    def read(params: Params, batch: dict[str, Array], visual: VisualTokens) -> Array:
        options = {"questions": questions, "max_targets": targets, "visual": visual, "turns": turns}
        return step.answers(cfg, method, params, batch, **options)[0]

    return jax.jit(read, out_shardings=NamedSharding(mesh, P()))


def reading(method: MethodConfig) -> MethodConfig:
    """What of a method the language model has to know, when the visual tokens are there."""
    return MethodConfig(**{name: getattr(method, name) for name in ("positions", "attention_bias", *NO_DECODER)})


def language_model(params: Params) -> Params:
    """The parameters that read visual tokens."""
    return {name: params[name] for name in ("llm", "lora") if name in params}


def inside(cfg: ModelConfig, method: MethodConfig) -> bool:
    """Whether a method changes the picture or works inside the tower, so that the tower has to look again."""
    ahead, _ = encoder_site.plan(cfg, method)
    return bool(ahead.grid or ahead.between)


def tower_signals(cfg: ModelConfig, method: MethodConfig) -> set[str]:
    """What a method reads of the tower that looks once for all."""
    _, signals = encoder_site.plan(cfg, method)
    return set() if inside(cfg, method) else set(signals) - set(ABOUT_QUESTION)


@dataclasses.dataclass(frozen=True)
class SharedRunner(Runner):
    """A runner that keeps pictures and features of the split in host memory: for a picture P x D floats, and as much
    again for keys, which `eval.limit` bounds. All stages that it reads must have the same vision tower.

    Attributes:
        memory: of the split.
    """

    memory: Memory = dataclasses.field(default_factory=Memory)

    def load(self, row: RowConfig) -> Params:
        """As in `Runner`; what was loaded last is kept, for rows without a training of their own all read the same."""
        wanted = (self.checkpoint, str(self.workdir.root), row.stage, row.method.projector, self.cfg.model)
        with self.memory.lock:
            if self.memory.params is None or self.memory.params[0] != wanted:
                self.memory.params = None  # no two models at once
                self.memory.params = (wanted, super().load(row))
            return self.memory.params[1]

    def rows(self) -> list[dict[str, np.ndarray]]:
        """The eval rows without pictures."""
        with self.memory.lock:
            return self._rows()

    def _rows(self) -> list[dict[str, np.ndarray]]:
        memory, questions = self.memory, self.cfg.data.questions
        if questions not in memory.batches:
            found, images = [], {}
            for batch in self.batches():
                pictures = batch.pop("images")
                images |= {int(n): picture for n, picture in zip(batch["example"], pictures) if n >= 0}
                found.append(batch)
            length = max(int(np.max(np.sum(batch["sample"] > 0, axis=1))) for batch in found)
            memory.batches[questions] = [{**b, **{name: b[name][:, :length] for name in TEXT}} for b in found]
            if memory.images is None:
                blank = np.zeros_like(next(iter(images.values())))
                memory.images = np.stack([images.get(n, blank) for n in range(max(images) + 1)])
        return memory.batches[questions]

    def features(self, params: Params, method: MethodConfig) -> VisionFeatures:
        """What the tower says of every picture: one look for all methods that leave it as it is."""
        with self.memory.lock:
            return self._features(params, method)

    def _features(self, params: Params, method: MethodConfig) -> VisionFeatures:
        own = inside(self.cfg.model, method)
        key = MethodConfig(encoder=method.encoder, tokens=method.tokens, options=method.options)
        key = key if own else MethodConfig()
        if key not in self.memory.features:
            run = _looker(self.cfg.model, key, None if own else self.memory.signals, self.mesh)
            flat = self.memory.images.reshape(-1, *self.memory.images.shape[2:])
            size, parts = self.cfg.eval.batch_size, []
            for start in range(0, len(flat), size):
                part = flat[start : start + size]
                part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
                parts.append(jax.device_get(run(params["vit"], sharding.place(self.mesh, part, "data"))))
            self.memory.features[key] = jax.tree.map(lambda *x: np.concatenate(x)[: len(flat)], *parts)
        return self.memory.features[key]

    def encode(self, params: Params, method: MethodConfig, batch: dict[str, np.ndarray], key: Array) -> VisualTokens:
        """Visual tokens of the pictures of a batch, behind the projector, with empty slots up to `SLOTS`.

        A method that reads the question reads the first one of each row.
        """
        examples = np.maximum(batch["example"], 0)
        pictures = self.memory.images.shape[1]
        index = (examples[:, None] * pictures + np.arange(pictures)).reshape(-1)
        seen = jax.tree.map(lambda x: x[index], self.features(params, method))
        given = (seen, {name: batch[name] for name in (*TEXT, "example")})
        needed = {name: params[name] for name in ("projector", "llm", "lora") if name in params}
        run = _encoder(self.cfg.model, dataclasses.replace(method, seed=0, **NO_DECODER), self.mesh)
        return run(needed, *sharding.place(self.mesh, given, "data"), key)

    def read(
        self,
        params: Params,
        method: MethodConfig,
        batch: dict[str, np.ndarray],
        visual: VisualTokens,
        *,
        turns: bool = False,
    ) -> np.ndarray:
        """[B, Q] which questions of a batch are answered exactly from these visual tokens; `turns` as in `answers`."""
        targets = max(int(np.max(np.sum(other["supervised"], axis=1))) for other in self.rows())
        model = dataclasses.replace(self.cfg.model, projector=ProjectorConfig())  # not read: one program for all
        run = _reader(model, reading(method), batch["question"].shape[1], targets, turns, self.mesh)
        inputs = sharding.place(self.mesh, {name: batch[name] for name in TEXT}, "data")
        return jax.device_get(run(language_model(params), inputs, visual))

    def score(
        self, params: Params, method: MethodConfig, seed: int, auto: AutoConfig = FIXED, order: str = ""
    ) -> tuple[scoring.Score, float | None]:
        """As in `Runner`, which also scores what has VoCo tokens, stitches tiles, or reads clips in another order."""
        if method.voco or auto.ladder or order or method.packing != "tiles":
            return super().score(params, method, seed, auto, order)
        tally, key, filled = scoring.Tally(), jax.random.key(seed), 0
        for batch in self.rows():
            visual = self.encode(params, method, batch, key)
            right = self.read(params, method, batch, visual)
            count = np.sum(jax.device_get(sharding.replicated(self.mesh, visual.valid_BM)), axis=1)
            for row, thread in zip(*np.nonzero((batch["question"] >= 0) & (batch["example"] >= 0)[:, None])):
                asked, question = self.examples[batch["example"][row]], batch["question"][row, thread]
                tally.add(asked["types"][question], asked["answers"][question], bool(right[row, thread]))
                filled += int(count[row])
        score = tally.score()
        return dataclasses.replace(score, filled=filled / score.questions), None
