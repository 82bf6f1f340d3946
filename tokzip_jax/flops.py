"""What a method costs, counted on paper: tokens, FLOPs and KV-cache bytes.

One multiply-add is two FLOPs. Counted are the matrix products (projections, attention scores and values, feed-forward,
head); norms, softmax, rotary angles and element-wise work are not, nor is the compressor itself (for VisionZip at
CLIP-L/14-336 about 1 MFLOP against 365 GFLOP of the tower). `causal=True` counts only the query-key pairs that a causal
mask keeps, the work of a kernel that skips the others; `causal=False` counts all pairs, the work of plain masked
products. VisionZip's paper counts a two-matrix feed-forward; here it is SwiGLU's three. Low-rank deltas cost what they
add where they run beside their weights; merged into them they cost nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from tokzip_jax import encoder_site, lora, stack, tiling, vlm, voco_start
from tokzip_jax.compress.entry import PROJECTED
from tokzip_jax.config import LlmConfig, LoraConfig, MethodConfig, ModelConfig, VitConfig
from tokzip_jax.data import anyres
from tokzip_jax.decoder_site import check
from tokzip_jax.paths import first_match
from tokzip_jax.projectors import PROJECTORS
from tokzip_jax.vit import LAST_SIGNALS
from tokzip_jax.vlm import visual_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """The costs of the pictures of one row (one, the frames of a video, or an overview and tiles), and of one question
    about them.

    Attributes:
        patches: patches, or what is made of them in its blocks, that leave the vision tower.
        encoder_tokens: what the encoder site passes on to the projector.
        visual_tokens: what the projector passes on to the language model.
        layer_tokens: visual tokens that each layer works on: the same number, or what the cuts of a decoder site leave
            (static slots, of which a rank-adaptive method may leave some empty).
        voco_tokens: VoCo tokens that follow them.
        read_tokens: tokens of the pictures that a question can read, and so those that stay in the KV cache: the VoCo
            tokens under a mask that hides vision from text, else visual and VoCo tokens. A mean where questions pick
            their own number; then the two sizes in bytes and `prefill_flops` are means too.
        vit_flops: the vision tower up to the feature layer; up to its end where the encoder site reads the
            last block, on a smaller picture or on fewer and fewer tokens where it works there.
        projector_flops: the projector, twice where the encoder site looks at projected patches; and what VoCo tokens
            start from.
        picture_flops: the language model over each picture alone (prefix, visual and VoCo tokens; no head), spent once
            however many questions follow. VoCo's stage one; None where the picture is read together with the question.
        prefill_flops: the language model from projected visual tokens (VoCo: from the pictures' cache, stage two) to
            the logits of the answer's first token, one question.
        decode_flops: the language model over that token, to the logits of the second. Each later one reads one more
            key a layer (4 N H FLOPs), `llm_flops` with a longer past.
        kv_bytes: cache bytes of the pictures' tokens that stay in the cache while questions are answered: of
            `read_tokens`, or of what each layer keeps of them.
        prompt_kv_bytes: cache bytes of the whole prompt: the prefix where it stays visible, pictures, the question.
    """

    patches: float
    encoder_tokens: float
    visual_tokens: float
    layer_tokens: tuple[float, ...]
    voco_tokens: float
    read_tokens: float
    vit_flops: float
    projector_flops: float
    picture_flops: float | None
    prefill_flops: float
    decode_flops: float
    kv_bytes: float
    prompt_kv_bytes: float

    @property
    def mean_tokens(self) -> float:
        """Visual tokens that a layer works on, averaged over the layers."""
        return sum(self.layer_tokens) / len(self.layer_tokens)


def llm_flops(llm: LlmConfig, new: float, *, past: float = 0, head: float = 1, causal: bool = True) -> float:
    """FLOPs of the decoder over `new` tokens that follow `past` cached ones; the head on `head` positions.

    Per layer and token: 2 D (2 N H + 2 K H) for q, o, k, v and 2 * 3 D F for SwiGLU; 4 N H per query-key pair for
    scores and values, where there are new * (new + 1) / 2 + new * past pairs (causal) or new * (new + past).
    """
    heads = llm.heads * llm.head_dim
    weights = llm.width * (2 * heads + 2 * llm.kv_heads * llm.head_dim + 3 * llm.mlp_dim)
    pairs = new * (new + 1) / 2 + new * past if causal else new * (new + past)
    total = llm.layers * (2 * new * weights + 4 * heads * pairs) + 2 * head * llm.width * llm.vocab_size
    return int(total) if float(total).is_integer() else total


def stitched_tokens(model: ModelConfig, method: MethodConfig, tiles: Sequence[int]) -> int:
    """Visual tokens of a picture whose tiles are stitched; an upper bound where an encoder-site method chose them.

    Args:
        model, method: the model and what becomes of a tile.
        tiles: columns, rows, width and height of the picture.
    """
    columns, rows, *size = tiles
    one, side = visual_slots(model, method), model.vit.grid
    if method.packing == "spatial":
        return one + columns * rows * one
    top, bottom, left, right = anyres.real_box(size, (columns, rows), side)
    lines, across = bottom - top, right - left
    if method.packing == tiling.SHRINKING:
        sides = tiling.shrunk_sides(max(lines, across), side)
        lines, across = int(sides[lines, across]), int(sides[across, lines])
    places = lines * across
    places += columns * rows if method.encoder != "none" else 0  # a CLS token has none
    return one + min(columns * rows * one, places) + lines


def layer_tokens(model: ModelConfig, method: MethodConfig) -> tuple[int, ...]:
    """Visual tokens of a picture that each layer of the language model works on.

    Raises:
        ValueError: a schedule that cannot be, see `decoder_site.check`.
    """
    visual = visual_slots(model, method)
    edges = [(0, visual), *((step.layer, step.after) for step in check(method, visual, model.llm))]
    ends = [layer for layer, _ in edges[1:]] + [model.llm.layers]
    return tuple(count for (start, count), end in zip(edges, ends, strict=True) for _ in range(start, end))


def scheduled_flops(llm: LlmConfig, new: Sequence[float], *, head: float = 1, causal: bool = True) -> float:
    """`llm_flops` of a whole row of which layer i works on `new[i]` tokens."""
    one = dataclasses.replace(llm, layers=1)
    return sum(llm_flops(one, tokens, head=0, causal=causal) for tokens in new) + 2 * head * llm.width * llm.vocab_size


def delta_weights(model: ModelConfig, method: MethodConfig, cfg: LoraConfig | None) -> dict[str, list[int]]:
    """Weights in the low-rank deltas of each layer: {"vit": one number a block, "llm": one a layer}.

    Layers are those of stacks as `vlm.init` makes them, the language model's in one piece.

    Raises:
        ValueError: see `lora.matrices`; a delta of the projector, whose tokens this ledger does not know one by one.
    """
    weights = {"vit": [0] * model.vit.layers, "llm": [0] * model.llm.layers}
    found: dict[str, jax.ShapeDtypeStruct] = {}
    if cfg is not None:
        shapes = jax.eval_shape(functools.partial(vlm.init, model, method.projector), jax.random.key(0))
        found = lora.matrices(cfg, shapes)
    for path, leaf in found.items():
        tower, _, group, *_ = path.split("/")
        if tower not in weights:
            raise ValueError(f"the ledger counts low-rank deltas of vit/ and llm/ only, not of {path!r}")
        lead, fan_in = first_match(lora.MATRICES, path, name="LoRA")
        inputs, outputs = leaf.shape[lead : lead + fan_in], leaf.shape[lead + fan_in :]
        counts = stack.sizes(shapes[tower]["layers"])
        start = sum(counts[: int(group)])
        for layer in range(start, start + counts[int(group)]):
            weights[tower][layer] += cfg.rank * (math.prod(inputs) + math.prod(outputs))
    return weights


def vit_flops(
    vit: VitConfig, *, removed: Mapping[int, int] | None = None, whole: bool = False, deltas: Sequence[int] = ()
) -> int:
    """FLOPs of the vision tower for one picture: patch embedding and the blocks up to the feature layer.

    Args:
        vit: the tower.
        removed: block number -> tokens that leave between its attention and its MLP.
        whole: all blocks run, since the encoder site reads the last one's queries or keys.
        deltas: weights of low-rank deltas in each block; counted at the tokens that enter the block.
    """
    tokens = vit.patches + 1
    total = 2 * vit.patches * 3 * vit.patch_size**2 * vit.width
    for block in range(vit.layers if whole else vit.feature_blocks):
        total += 2 * tokens * vit.width * 4 * vit.width + 4 * tokens**2 * vit.width
        total += 2 * tokens * deltas[block] if deltas else 0
        tokens -= (removed or {}).get(block, 0)
        total += 2 * tokens * vit.width * 2 * vit.mlp_dim
    return total


def tower_flops(model: ModelConfig, method: MethodConfig, *, deltas: Sequence[int] = ()) -> int:
    """`vit_flops` with what the encoder site does to the picture or inside the tower, and reads of it.

    Raises:
        ValueError: options that the method does not have, or a budget that it cannot keep.
    """
    plan, signals = encoder_site.plan(model, method)
    vit = encoder_site.tower(model, plan).vit
    return vit_flops(vit, removed=plan.removed, whole=bool(set(signals) & set(LAST_SIGNALS)), deltas=deltas)


def projector_flops(model: ModelConfig, method: MethodConfig, *, text_tokens: int = 0) -> int:
    """FLOPs of the projector for one picture; `text_tokens` of the question, for those that read it.

    Raises:
        ValueError: a projector that this ledger does not know, or options that the encoder site does not have.
    """
    if method.projector not in PROJECTORS:
        raise ValueError(f"the ledger knows no projector {method.projector!r}; it knows {', '.join(PROJECTORS)}")
    projector, (_, signals) = PROJECTORS[method.projector], encoder_site.plan(model, method)
    # A method that compares patches behind the projector has all of them projected first.
    before = projector.flops(model, method, model.vit.patches, text_tokens) if PROJECTED in signals else 0
    return before + projector.flops(model, method, encoder_site.slots(model, method), text_tokens)


def kv_bytes_per_token(llm: LlmConfig, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers (Vicuna 7B in bfloat16: 524,288, VoCo's "0.525 MB")."""
    return 2 * llm.layers * llm.kv_heads * llm.head_dim * jnp.dtype(dtype).itemsize


def ledger(
    model: ModelConfig,
    method: MethodConfig,
    *,
    text_tokens: int,
    prefix_tokens: int = 1,
    dtype: str | None = None,
    causal: bool = True,
    read_voco: float | None = None,
    deltas: LoraConfig | None = None,
    images: float = 1,
    stitched: float | None = None,
) -> Ledger:
    """The costs of a method on the pictures of a row and one question.

    Args:
        model, method: the model and what becomes of a picture.
        text_tokens: tokens of the question.
        prefix_tokens: tokens before the picture (BOS). The mask "voco" hides them from the question, and then they
            leave the cache with the visual tokens.
        dtype: of the KV cache; None = `model.dtype`.
        causal: see the module's docstring.
        read_voco: VoCo tokens that a question reads on the mean where each picks its own number (all costs are linear
            in it); the picture is still compressed into `method.voco`. None = all of them.
        deltas: low-rank deltas that run beside their weights, as `lora.attach` has them; None: none, or merged.
        images: pictures of the row; where rows differ their mean, and then the costs are those of the mean row.
        stitched: visual tokens of the row where its pictures are tiles that are stitched into one (`tiling`), which has
            VoCo tokens once; None = each picture has its own.

    Raises:
        ValueError: no question, no picture, a negative prefix, an unknown projector, an impossible decoder site,
            `read_voco` where text sees vision, or deltas that cannot be or stand in the projector.
    """
    if read_voco is not None and method.voco_mask == "visible":
        raise ValueError("read_voco is for questions that read VoCo tokens alone, not for voco_mask='visible'")
    if text_tokens < 1 or prefix_tokens < 0:
        raise ValueError(f"text_tokens={text_tokens} must be >= 1 and prefix_tokens={prefix_tokens} >= 0")
    if images < 1:
        raise ValueError(f"images={images} must be >= 1: the ledger is about rows with pictures")
    seen = images if stitched is None else 1  # pictures, as the language model sees them
    visual = visual_slots(model, method) if stitched is None else stitched  # tokens of one of them
    picture = prefix_tokens + visual + method.voco
    added = delta_weights(model, method, deltas)
    if method.voco_mask == "visible":
        read, past = seen * (visual + method.voco), 0
        cached = prefix_tokens + read
        picture_flops = None
    else:
        read = seen * (method.voco if read_voco is None else read_voco)
        past = cached = read + (prefix_tokens if method.voco_mask == "prefix_visible" else 0)
        picture_flops = llm_flops(model.llm, picture, head=0, causal=causal) + 2 * picture * sum(added["llm"])
        picture_flops *= seen
    starts = voco_start.flops(method.voco_start, method.voco, visual, model.llm.width, model.voco_cells)
    per_token = kv_bytes_per_token(model.llm, dtype or model.dtype)
    by_layer = layer_tokens(model, method) if stitched is None else (stitched,) * model.llm.layers
    by_layer = tuple(seen * count for count in by_layer)
    kv_bytes, prompt_kv_bytes = read * per_token, (cached + text_tokens) * per_token
    if picture_flops is None:
        new = prompt = [count + prefix_tokens + seen * method.voco + text_tokens for count in by_layer]
        prefill = scheduled_flops(model.llm, new, causal=causal)
        unkept = (seen * visual * len(by_layer) - sum(by_layer)) * (per_token // model.llm.layers)
        kv_bytes, prompt_kv_bytes = kv_bytes - unkept, prompt_kv_bytes - unkept
    else:
        new, prompt = [text_tokens] * len(by_layer), [cached + text_tokens] * len(by_layer)
        prefill = llm_flops(model.llm, text_tokens, past=past, causal=causal)
    one = dataclasses.replace(model.llm, layers=1)
    decode = sum(llm_flops(one, 1, past=count, head=0) for count in prompt) + llm_flops(model.llm, 0)
    return Ledger(
        patches=images * encoder_site.patches(model, method),
        encoder_tokens=images * encoder_site.slots(model, method),
        visual_tokens=seen * visual,
        layer_tokens=by_layer,
        voco_tokens=seen * method.voco,
        read_tokens=read,
        vit_flops=images * tower_flops(model, method, deltas=added["vit"]),
        projector_flops=images * (projector_flops(model, method, text_tokens=text_tokens) + starts),
        picture_flops=picture_flops,
        prefill_flops=prefill + 2 * sum(tokens * weights for tokens, weights in zip(new, added["llm"], strict=True)),
        decode_flops=decode + 2 * sum(added["llm"]),
        kv_bytes=kv_bytes,
        prompt_kv_bytes=prompt_kv_bytes,
    )


@dataclasses.dataclass(frozen=True)
class CacheSetting:
    """A line of VoCo-LLaMA's table 7 (7B, 576 patches).

    Attributes:
        name: what is in the cache when the question comes.
        new: picture tokens that the question's pass has to compute.
        past: picture tokens that it finds in the cache.
        printed: the paper's FLOPs.
    """

    name: str
    new: int
    past: int
    printed: float

    def flops(self, llm: LlmConfig, text_tokens: float) -> float:
        """Ours for a question of `text_tokens` tokens."""
        return llm_flops(llm, self.new + text_tokens, past=self.past)

    def text_tokens(self, llm: LlmConfig) -> float | None:
        """How long a question would have to be for ours to equal the printed figure; None where none is short enough.

        Our count grows with the length, so halving an interval finds it.
        """
        low, high = 0.0, float(llm.max_positions)
        if not self.flops(llm, low) <= self.printed <= self.flops(llm, high):
            return None
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if self.flops(llm, middle) < self.printed else (low, middle)
        return (low + high) / 2


# The paper does not say how long its question was. No single length gives all three printed figures: they would need
# 154, 90 and 39 text tokens. `python -m tokzip_jax.bench table7` shows them beside ours at one length.
VOCO_TABLE_7 = (
    CacheSetting("no cache", 576, 0, 9.6e12),
    CacheSetting("full vision cache", 0, 576, 1.2e12),
    CacheSetting("one VoCo token", 0, 1, 0.5e12),
)
