"""What the builders of drawn data sets have in common: they are made from settings alone, one example at a time."""

import abc
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tokzip_jax.config import ScenesConfig
from tokzip_jax.data import built

SPLITS = ("train", "validation", "test")
_CONFIGS: dict[str, "DrawnConfig"] = {}


@dataclasses.dataclass
class DrawnConfig(tfds.core.BuilderConfig):
    """A TFDS config that holds the settings it stands for."""

    settings: ScenesConfig = dataclasses.field(default_factory=ScenesConfig)


class Drawn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose examples are functions of the settings, the split and a number.

    The folder of a data set is named after the settings that its contents depend on (`config_name`), so two settings
    never share files. It is built in a folder `incomplete.*` that is renamed at the end, so a build that was killed is
    never taken for a data set.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so there are no checksums to look for beside this file
    READ_LATER: tuple[str, ...] = ()  # settings that no file depends on
    DESCRIPTION = ""

    def __init__(self, *, settings: ScenesConfig, **kwargs: Any):
        name = config_name(settings, self.READ_LATER)
        config = _CONFIGS.setdefault(f"{self.name}/{name}", DrawnConfig(name=name, settings=settings))
        super().__init__(file_format="array_record", config=config, **kwargs)

    @classmethod
    def get_builder_config(cls, name: str, version: Any = None) -> DrawnConfig | None:
        """The config of a name that was met before; TFDS warns of every config that it cannot look up."""
        return _CONFIGS.get(f"{cls.name}/{name}")

    @property
    def settings(self) -> ScenesConfig:
        """What the examples are made from."""
        return self.builder_config.settings

    @abc.abstractmethod
    def example(self, split: str, index: int) -> dict[str, Any]:
        """Example `index` of a split: the features, the picture as uint8 [H, W, 3]."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    **{key: tfds.features.Text() for key in ("image_id", "caption", "facts")},
                    **{key: tfds.features.Sequence(tfds.features.Text()) for key in built.LISTS},
                }
            ),
            disable_shuffling=True,  # keeps the examples in order; Grain does the shuffling
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(getattr(self.settings, split)):
            example = self.example(split, index)
            yield index, {**example, "image": io.BytesIO(encode(example["image"]))}


def config_name(settings: ScenesConfig, read_later: tuple[str, ...]) -> str:
    """A readable name with a hash of every setting that is not in `read_later`."""
    values: Mapping[str, Any] = {
        key: value for key, value in dataclasses.asdict(settings).items() if key not in read_later
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings.difficulty}-{settings.size}px-seed{settings.seed}-{settings.train}-{digest}"


def encode(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()
