"""The files of a run: a directory that says what was run, holds what came out, and lets a killed run go on."""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from tokenizers import Tokenizer

from tokzip_jax import config_check, config_io, locks, sharding
from tokzip_jax.config import DataConfig, RunConfig
from tokzip_jax.data import sources
from tokzip_jax.data import tokenizer as tokenizers

# What may differ when a run goes on: none of it changes a number. (`data.workers` is in the state of the data.)
FREE = ("log_every", "checkpoint_every", "compile_cache", "platform", "data.data_dir", "eval.pictures")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file so that a killed process leaves the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class Workdir:
    """Paths under a run's directory.

    Attributes:
        root: the directory.
        part: a folder of their own for results and pictures that are not those of the run's own table; "" = none.
    """

    def __init__(self, root: str | pathlib.Path, part: str = "") -> None:
        self.root = pathlib.Path(root).expanduser().absolute()
        self.part = part

    @property
    def config(self) -> pathlib.Path:
        """The run's config."""
        return self.root / "config.json"

    @property
    def eval(self) -> pathlib.Path:
        """Where results go."""
        return self.root / "eval" / self.part

    @property
    def figures(self) -> pathlib.Path:
        """Where pictures go."""
        return self.root / "figures" / self.part

    @property
    def tokenizer(self) -> pathlib.Path:
        """The tokenizer trained for this run."""
        return self.root / "tokenizer.json"

    def hold(self, name: str, *, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """Hold a name against other processes that work here, see `locks.hold`."""
        return locks.hold(self.root, name, wait=wait)

    def in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """Pieces of work, each held while it is done, see `locks.in_turn`."""
        return locks.in_turn(self.root, names)

    def checkpoints(self, stage: str) -> str:
        """The directory of a stage's checkpoints."""
        return str(self.root / "checkpoints" / stage)

    def open(self, cfg: RunConfig, *, free: tuple[str, ...] = FREE) -> None:
        """Begin or resume: write `config.json`, or compare with the one that is there.

        Args:
            cfg: of the run.
            free: keys that may differ.

        Raises:
            ValueError: the workdir belongs to a run with another config.
        """
        if self.config.exists():
            changed = [
                line
                for line in config_io.difference(self.read_config(), cfg)
                if not line.startswith(tuple(f"{name}:" for name in free))
            ]
            if changed:
                more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise ValueError(
                    f"{self.root} belongs to a run with another config ({'; '.join(changed[:3])}{more}): "
                    "give the config it was started with, or another --workdir"
                )
        else:
            sharding.wait_for_all("every process has seen that the workdir is new")
            if jax.process_index() == 0:
                write_atomically(self.config, config_io.to_json(cfg))

    def read_config(self) -> RunConfig:
        """The config of the run.

        Raises:
            FileNotFoundError: no run was ever started here.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"no run in {self.root}: config.json is missing; train first with train.py")
        cfg = config_io.from_json(self.config.read_text(encoding="utf-8"))
        config_check.validate(cfg)
        return cfg

    def load_tokenizer(self, cfg: DataConfig) -> Tokenizer:
        """The tokenizer the config names, or the one of this run, trained here the first time."""
        if cfg.tokenizer:
            return tokenizers.load(cfg.tokenizer)
        if jax.process_index() == 0 and not self.tokenizer.exists():
            trained = tokenizers.train(sources.texts(sources.load(cfg, "train")), cfg.vocab_size)
            write_atomically(self.tokenizer, trained.to_str())
        sharding.wait_for_all("the tokenizer is written")
        return tokenizers.load(str(self.tokenizer))

    def append_json(self, name: str, entry: dict[str, Any]) -> None:
        """Add an entry to a JSON list, made where it is missing; process 0 only."""
        if jax.process_index() != 0:
            return
        path = self.root / name
        with self.hold(name):
            entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            write_atomically(path, json.dumps([*entries, entry], indent=2) + "\n")
