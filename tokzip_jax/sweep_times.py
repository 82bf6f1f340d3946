"""How long a question's prefill takes: measured in turns for all methods of a sweep, and kept in the workdir."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokzip_jax import generate, layout, sharding, vlm, voco
from tokzip_jax.bench.timing import Case, interleave, spread
from tokzip_jax.config import MethodConfig, ModelConfig, RunConfig
from tokzip_jax.evals import shared
from tokzip_jax.evals.shared import SharedRunner
from tokzip_jax.metrics import say
from tokzip_jax.types import Array, Params, VisualTokens
from tokzip_jax.workdir import Workdir, write_atomically

ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Prefills:
    """Prefills of a run's language model.

    Attributes:
        cfg, mesh: of the run.
        workdir: its part where `eval/prefill.json` goes.
        base: runner of the run's own rows.
        again: also time what the workdir holds.
        timed: what was timed already with `again`.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    base: SharedRunner
    again: bool = False
    timed: set[str] = dataclasses.field(default_factory=set)

    @property
    def path(self) -> pathlib.Path:
        """Where the times are kept: of the programs, and which program reads which row."""
        return self.workdir.eval / "prefill.json"

    def known(self) -> dict[str, float]:
        """Milliseconds of the rows that were asked for so far in this workdir, by name."""
        kept = self._kept()
        return {row: kept["programs"][program] for row, program in kept["rows"].items()}

    def milliseconds(self, methods: Mapping[str, tuple[ModelConfig, MethodConfig]]) -> dict[str, float]:
        """Milliseconds a question, the median of runs in turns; kept in the workdir. Where one is missing, all that are
        asked for are measured, so that they compare.

        Args:
            methods: name of a row -> the model that it is read with, and how.
        """
        with self.workdir.hold("times of prefills"):
            return self._milliseconds(methods)

    def _kept(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        return {name: found.get(name, {}) for name in ("programs", "rows")}

    def _milliseconds(self, methods: Mapping[str, tuple[ModelConfig, MethodConfig]]) -> dict[str, float]:
        kept = self._kept()
        rows = {row: _program(model, method) for row, (model, method) in methods.items()}
        wanted = {rows[row]: method for row, (_, method) in methods.items()}
        missing = [name for name in wanted if name not in kept["programs"] or (self.again and name not in self.timed)]
        if missing:
            kept["programs"] |= self._time(wanted)
            self.timed.update(wanted)
        if (missing or not rows.items() <= kept["rows"].items()) and jax.process_index() == 0:
            write_atomically(self.path, json.dumps({**kept, "rows": kept["rows"] | rows}, indent=2) + "\n")
        return {row: kept["programs"][program] for row, program in rows.items()}

    def _time(self, wanted: dict[str, MethodConfig]) -> dict[str, float]:
        say(f"timing {len(wanted)} prefills")
        cfg = dataclasses.replace(self.cfg, data=dataclasses.replace(self.cfg.data, questions=1))
        runner = dataclasses.replace(self.base, cfg=cfg)
        row = cfg.rows[cfg.eval.upper]
        params, batch = runner.load(row), runner.rows()[0]
        everything = runner.encode(params, row.method, batch, jax.random.key(0))
        asked = (batch["sample"] > 0) & ~batch["supervised"]
        prompt = {name: np.where(asked, batch[name], 0) for name in shared.TEXT}
        prompt = sharding.place(self.mesh, prompt, "data")
        cases = {}
        for name, method in wanted.items():
            if method.voco_mask != "visible":
                cases[name] = Case(self._from_cache(params, batch, method))
                continue
            tokens = _slots(everything, int(name.split()[0]))
            run = functools.partial(_first_logits, cfg.model, shared.reading(method))
            cases[name] = Case(functools.partial(run, shared.language_model(params), prompt, tokens))
        shared.side_by_side(self.mesh, lambda case: jax.block_until_ready(case.function()), cases.values())  # compiles
        seconds = interleave(cases, runs=ROUNDS)
        return {name: 1000 * spread(values)["median"] / len(batch["example"]) for name, values in seconds.items()}

    def _from_cache(self, params: Params, batch: dict[str, np.ndarray], method: MethodConfig) -> Callable[[], Array]:
        """Stage two of VoCo tokens: the questions of a batch, read from the cache of its pictures."""
        model, images = self.cfg.model, self.base.memory.images[np.maximum(batch["example"], 0)]
        given = {**{name: batch[name] for name in shared.TEXT}, "images": images}
        ids, asked = layout.question(given, batch["ids"].shape[1])
        ids = ids[:, : int(asked.sum(axis=1).max())]
        given = sharding.place(self.mesh, given, "data")
        build = functools.partial(voco.build, model, method=method, positions="compact")
        cache = jax.jit(lambda params, batch: build(params, batch))(params, given)
        return functools.partial(_first_logits_of_cache, model, shared.language_model(params), cache, ids)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_logits(
    cfg: ModelConfig, method: MethodConfig, params: Params, batch: dict[str, Array], visual: VisualTokens
) -> Array:
    return generate.prefill(cfg, params, batch, method, max_new=1, visual=visual).logits_BV


@functools.partial(jax.jit, static_argnums=0)
def _first_logits_of_cache(cfg: ModelConfig, params: Params, cache: voco.VocoCache, ids_BT: Array) -> Array:
    return voco.ask(cfg, params, cache, ids_BT, max_new=1).logits_BV


def _slots(tokens: VisualTokens, count: int) -> VisualTokens:
    """The first `count` of a picture's tokens, or zeros behind them: the time does not depend on which they are."""
    if count > tokens.valid_BM.shape[1]:
        return dataclasses.replace(shared.pad(tokens, count), valid_BM=np.ones((len(tokens.valid_BM), count), bool))
    names = ("tokens_BMD", "valid_BM", "position_BM", "size_BM")
    return dataclasses.replace(tokens, **{name: getattr(tokens, name)[:, :count] for name in names})


def _program(model: ModelConfig, method: MethodConfig) -> str:
    """What a prefill depends on: the visual tokens that enter, and the decoder site; or the VoCo tokens in a cache."""
    if method.voco_mask != "visible":
        return f"{method.voco} VoCo tokens, {method.voco_mask}"
    count = vlm.visual_slots(model, dataclasses.replace(method, **shared.NO_DECODER))
    cuts = f" {method.decoder} {method.decoder_layers} {method.decoder_keep}" if method.decoder != "none" else ""
    return f"{count} tokens{cuts}{' biased' if method.attention_bias else ''}"
