"""Teacher and student in one pass: one text is read twice, once off the VoCo tokens and once off the picture itself.

VoCo-LLaMA's equation distils the uncompressed model (arXiv 2406.12275, its KL objective; the released code has no
teacher). Where that model is the trained one itself, both read the same prefix and the same picture, which see neither
VoCo tokens nor text, so that these rows need to run once. The teacher's copy of the text is then

* `joint=False`: a second stream in the same loop over the layers, which reads this layer's keys and values of the
  picture and gets no gradient. (As rows of the differentiated sequence it would cost more than a second pass.) The
  prefix, a few tokens, it computes again.
* `joint=True`: more rows of the differentiated sequence, of kind TEACHER, for a loss on both copies.

The teacher is what `vlm.forward` without VoCo tokens gives. Its text has the position ids that it would have if no VoCo
token stood between it and the picture before it. In a sample with several pictures two things differ from a plain pass,
because the picture rows are the student's: pictures do not see each other, nor text between them; and before each
picture but the first its predecessors' VoCo tokens leave as many position ids unused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax import layers, llm, stack, vlm
from tokzip_jax.attention import attend
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.layout import Layout
from tokzip_jax.masks import TABLES, predecessors, visibility
from tokzip_jax.types import PAD, PREFIX, TEACHER, TEXT, VISION, VOCO, Array, Params, TokenStream


def forward(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    joint: bool,
    voco_count: Array | int,
    key: Array,
    summary: bool = False,
    token_dropout: float = 0.0,
) -> tuple[vlm.Forward, vlm.Forward]:
    """One pass over whole rows, for the student and for its teacher.

    Args:
        cfg, params, batch, voco_count, key, summary, token_dropout: as in `vlm.forward`.
        method: of the student, with a VoCo mask; the teacher reads the same visual tokens.
        joint: whether the teacher gets a gradient.

    Returns:
        What `vlm.forward` returns for the student; and the same for the teacher, with T' + R slots: the student's, and
        behind them the teacher's R = T, padded. Supervised are slots of the teacher's alone, in the student's order.

    Raises:
        ValueError: a method whose pictures see text or VoCo tokens, or whose positions leave the picture out.
    """
    if method.voco_mask == "visible":
        raise ValueError("onepass: under voco_mask='visible' a picture sees text and VoCo tokens before it; use 'voco'")
    x, slots, visual, pooled = vlm.embed(
        cfg, params, batch, method, voco_count=voco_count, key=key, summary=summary, token_dropout=token_dropout
    )
    own, copied = copy_text(slots, batch["ids"].shape[1], prefix=not joint)
    y = jnp.where((own.stream.kind == PAD)[:, :, None], 0, _rows(x, copied))
    together = join(dataclasses.replace(slots, supervised=jnp.zeros_like(slots.supervised)), own)
    table, blocks = jnp.asarray(TABLES[method.voco_mask]), params["llm"]["layers"]
    if joint:
        both, _ = llm.run_layers(cfg, blocks, jnp.concatenate([x, y], axis=1), together.stream, table)
        hidden = both[:, : x.shape[1]]
    else:
        seen = places(slots.stream.kind == VISION, visual.valid_BM.size // x.shape[0])
        hidden, taught = run_both(cfg, blocks, x, slots.stream, jax.lax.stop_gradient(y), own.stream, seen, table)
        both = jnp.concatenate([jax.lax.stop_gradient(hidden), taught], axis=1)
    student = vlm.Forward(hidden_BTD=hidden, layout=slots, visual=visual, summary_BD=pooled)
    return student, dataclasses.replace(student, hidden_BTD=both, layout=together, summary_BD=None)


def join(first: Any, second: Any) -> Any:
    """Two layouts or streams as one, slots of the second behind those of the first."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def places(which_BT: Array, count: int) -> Array:
    """[B, count] the slots that are True, in order; behind them any others."""
    return jnp.argsort(~which_BT, axis=1, stable=True)[:, :count]


def _rows(x_BTD: Array, index_BR: Array) -> Array:
    return jnp.take_along_axis(x_BTD, index_BR[:, :, None], axis=1)


def copy_text(slots: Layout, count: int, *, prefix: bool) -> tuple[Layout, Array]:
    """The teacher's copy of a row's text.

    Args:
        slots: the student's layout [B, T'].
        count: places for the copy; at least the text (and prefix) tokens of the fullest row.
        prefix: copy prefix tokens too, as what they are.

    Returns:
        The layout [B, count] of the copy, and which slot each of its tokens repeats [B, count]. `previous` counts slots
        of both together: below T' is a slot of the student's (the picture's last token), T' + r the copy's r-th.
    """
    kind, sample = slots.stream.kind, slots.stream.sample
    copied = (kind == TEXT) | (kind == PREFIX) if prefix else kind == TEXT
    index = places(copied, count)
    real = jnp.take_along_axis(copied, index, axis=1)
    position, previous = without_voco(slots.stream)
    own = jnp.where(copied, jnp.cumsum(copied, axis=1) - 1 + kind.shape[1], jnp.arange(kind.shape[1]))
    previous = jnp.where(previous < 0, -1, jnp.take_along_axis(own, jnp.maximum(previous, 0), axis=1))

    def of_slot(values: Array, padding: Any) -> Array:
        return jnp.where(real, jnp.take_along_axis(values, index, axis=1), padding)

    stream = TokenStream(
        kind=of_slot(jnp.where(kind == TEXT, TEACHER, kind), PAD),
        segment=of_slot(slots.stream.segment, 0),
        thread=of_slot(slots.stream.thread, 0),
        sample=of_slot(sample, 0),
        position=of_slot(position, 0),
        order=of_slot(slots.stream.order, 0),
    )
    layout = Layout(
        stream=stream,
        ids=of_slot(slots.ids, 0),
        visual=jnp.full_like(index, -1),
        voco=jnp.full_like(index, -1),
        previous=of_slot(previous, -1),
        supervised=of_slot(slots.supervised, False),
    )
    return layout, index


def without_voco(stream: TokenStream) -> tuple[Array, Array]:
    """Positions [B, T] and nearest predecessors [B, T] (-1 for none) as if no VoCo token stood behind a picture.

    Prefix and vision tokens stay where they are, and so do the gaps that VoCo tokens before them leave.
    """
    kind, sample = stream.kind, stream.sample
    plain, previous = predecessors(jnp.where(kind == VOCO, PAD, kind), stream.thread, sample)
    at = jnp.arange(kind.shape[1], dtype=jnp.int32)
    # The last token of a picture or its prefix up to here, in the same sample: its gap is that of what follows.
    last = jax.lax.cummax(jnp.where((kind == PREFIX) | (kind == VISION), at, -1), axis=1)
    there = jnp.maximum(last, 0)
    same = (last >= 0) & (jnp.take_along_axis(sample, there, axis=1) == sample)
    gap = jnp.take_along_axis(stream.position - plain, there, axis=1)
    return plain + jnp.where(same, gap, 0), previous


def run_both(
    cfg: ModelConfig,
    blocks: Any,
    x_BTD: Array,
    stream: TokenStream,
    y_BRD: Array,
    own: TokenStream,
    seen_BV: Array,
    table: Array,
) -> tuple[Array, Array]:
    """The student's rows with gradient and, in the same loop over the layers, the teacher's without.

    Args:
        cfg, blocks, table: as in `llm.run_layers`.
        x_BTD, stream: the student's rows.
        y_BRD, own: the teacher's rows; they see one another and what is in `seen_BV`.
        seen_BV: the student's slots whose keys and values the teacher reads where they are vision tokens.

    Returns:
        Hidden states [B, T, D] and [B, R, D].
    """
    modules = llm.modules_of(cfg.llm, cfg.param_dtype)
    shared = jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, seen_BV, axis=1), stream)
    shared = dataclasses.replace(shared, kind=jnp.where(shared.kind == VISION, VISION, PAD))
    mask, own_mask = visibility(stream, stream, table), visibility(own, join(shared, own), table)
    angles, own_angles = (
        layers.rope_angles(each.position, cfg.llm.head_dim, cfg.llm.rope_theta) for each in (stream, own)
    )

    def body(carry: tuple[Array, Array], block: Params, _: None) -> tuple[tuple[Array, Array], None]:
        def student(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            q, k = layers.rotate(q, angles), layers.rotate(k, angles)
            return attend(q, k, v, mask=mask, implementation=cfg.attention), (k, v)

        x, read = llm.run_block(modules, block, carry[0], stream.kind, student)
        past_k, past_v = (
            jnp.take_along_axis(part, seen_BV[:, None, :, None], axis=2) for part in jax.lax.stop_gradient(read)
        )

        def teacher(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            q, k = layers.rotate(q, own_angles), layers.rotate(k, own_angles)
            k, v = jnp.concatenate([past_k, k], axis=2), jnp.concatenate([past_v, v], axis=2)
            return attend(q, k, v, mask=own_mask, implementation=cfg.attention), None

        y, _ = llm.run_block(modules, jax.lax.stop_gradient(block), carry[1], own.kind, teacher)
        return (x, y), None

    return stack.run(body, (x_BTD, y_BRD), blocks, 0, cfg.llm.layers, remat=cfg.remat)[0]
