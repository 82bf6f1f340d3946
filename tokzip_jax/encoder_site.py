"""The encoder site in our stack: a picture to the visual tokens that a method of `compress.ENCODER` leaves of it.

The methods know no model. Here they get one: its tower's facts and signals, patches behind the projector and words of
the question for those that compare the two, a smaller picture or a merging inside the tower for those that want it.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from tokzip_jax import attention, compress, vit
from tokzip_jax.compress.downsample import downsample, resize_positions
from tokzip_jax.compress.entry import ABOUT_QUESTION, PROJECTED, QUESTION, QUESTION_VALID, Plan
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors import KEEPS_PLACES
from tokzip_jax.types import Array, Params, VisionFeatures, VisualTokens


def ask(cfg: ModelConfig, method: MethodConfig, key: Array | None = None) -> compress.Ask:
    """What a config asks of its encoder-site method.

    Raises:
        ValueError: options that the method does not have.
    """
    options = compress.options(method.encoder, method.options)
    return compress.Ask(method.tokens, options, vit.tower(cfg.vit), key)


def slots(cfg: ModelConfig, method: MethodConfig) -> int:
    """Tokens of one picture that the encoder site passes on to the projector."""
    return cfg.vit.patches if method.encoder == "none" else method.tokens


def plan(cfg: ModelConfig, method: MethodConfig) -> tuple[Plan, tuple[str, ...]]:
    """What has to be done before the features are there, and the signals that the method reads.

    Raises:
        ValueError: options that the method does not have, or a budget that it cannot keep.
    """
    entry, request = compress.ENCODER[method.encoder], ask(cfg, method)
    return entry.prepare(request), entry.read(request.options)


def tower(cfg: ModelConfig, plan: Plan) -> ModelConfig:
    """The model with the tower that reads the picture: a smaller one for a smaller picture."""
    if not plan.grid:
        return cfg
    side = plan.grid * cfg.vit.patch_size
    return dataclasses.replace(cfg, vit=dataclasses.replace(cfg.vit, image_size=side))


def patches(cfg: ModelConfig, method: MethodConfig) -> int:
    """Tokens of one picture, without CLS, that leave the vision tower."""
    ahead, _ = plan(cfg, method)
    return tower(cfg, ahead).vit.patches - sum(ahead.removed.values())


def check(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    """Refuse an encoder site that cannot work, before anything is compiled; `key` is its dotted place in the config.

    Raises:
        ValueError: an unknown method or option, an impossible budget or combination: one sentence with the key.
    """
    if method.encoder not in compress.ENCODER:
        known = ", ".join(map(repr, sorted(compress.ENCODER)))
        raise ValueError(f"{key}.encoder = {method.encoder!r} is unknown; choose one of {known}")
    try:
        request = ask(cfg, method)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    try:
        compress.check(method.encoder, request.tower, request.tokens, request.options)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    ahead, signals = plan(cfg, method)
    if set(signals) & set(ABOUT_QUESTION) and method.projector not in KEEPS_PLACES:
        known = ", ".join(map(repr, KEEPS_PLACES))
        other = "" if QUESTION in signals else f", or {key}.options.compare = 'patches'"
        raise ValueError(
            f"{key}.encoder = {method.encoder!r} reads every patch behind the projector, and {key}.projector = "
            f"{method.projector!r} does not work patch by patch; choose one of {known}{other}"
        )
    if ahead.proportional and cfg.attention not in attention.BIASED:
        raise ValueError(
            f"{key}.options.proportional = True adds the log of a token's size to the attention logits, which "
            f"model.attention = {cfg.attention!r} cannot; use {', '.join(map(repr, attention.BIASED))}, or "
            "options.proportional = False"
        )


def look(
    cfg: ModelConfig,
    params: Params,
    images: Array,
    method: MethodConfig,
    *,
    signals: tuple[str, ...] | None = None,
    summary: bool = False,
) -> tuple[VisionFeatures, Array | None]:
    """What the tower says of pictures: all that a method reads of it. One look may do for several methods.

    Args:
        cfg, params: the model, and its parameters under "vit".
        images: [B, H, W, 3] uint8, or floats that are normalised already.
        method: its encoder site; what it does to the picture or inside the tower is done here.
        signals: of the tower; None = those that the method reads.
        summary: also return the CLS token behind the last norm.

    Returns:
        The features, and the summary [B, D] or None.
    """
    ahead, wanted = plan(cfg, method)
    wanted = wanted if signals is None else signals
    cfg = tower(cfg, ahead)
    if ahead.grid:
        # The table of positions is resized at every step: next to the tower that is nothing.
        params = {**params, "pos": resize_positions(params["pos"], grid=ahead.grid)}
        images = downsample(images, side=cfg.vit.image_size)
    pixels = vit.normalise(images, cfg.dtype) if images.dtype == jnp.uint8 else images.astype(cfg.dtype)
    own = tuple(name for name in wanted if name not in ABOUT_QUESTION)
    return vit.features(
        cfg, params, pixels, signals=own, summary=summary, between=ahead.between, proportional=ahead.proportional
    )


def choose(
    cfg: ModelConfig,
    found: VisionFeatures,
    method: MethodConfig,
    key: Array,
    *,
    project: Callable[[VisualTokens, Array], VisualTokens],
    question: tuple[Array, Array] | None = None,
) -> VisualTokens:
    """Features of pictures to visual tokens in front of the projector.

    Args:
        cfg: the model.
        found: from `look`, with the signals that the method reads of the tower.
        method: its encoder site.
        key: for a random selection: one key, or B keys.
        project: (visual tokens, CLS tokens [B, D]) -> visual tokens behind the projector.
        question: [B, T, D] embedded words and [B, T] which are real, for a method that reads the question.
    """
    request, (_, signals) = ask(cfg, method, key), plan(cfg, method)
    more = {}
    if PROJECTED in signals:
        more[PROJECTED] = project(compress.everything(found.patches_BPD), found.cls_BD).tokens_BMD
    if QUESTION in signals:
        more[QUESTION], more[QUESTION_VALID] = question
    found = dataclasses.replace(found, signals={**found.signals, **more})
    return compress.apply(method.encoder, found, request)


def run(
    cfg: ModelConfig,
    params: Params,
    images: Array,
    method: MethodConfig,
    key: Array,
    *,
    project: Callable[[VisualTokens, Array], VisualTokens],
    question: tuple[Array, Array] | None = None,
    summary: bool = False,
) -> tuple[VisualTokens, Array, Array | None]:
    """Pictures to visual tokens in front of the projector: `look`, then `choose`; arguments as there.

    Returns:
        Visual tokens [B, M, D], the feature layer's CLS token [B, D], and the summary [B, D] or None.
    """
    found, pooled = look(cfg, params, images, method, summary=summary)
    return choose(cfg, found, method, key, project=project, question=question), found.cls_BD, pooled
