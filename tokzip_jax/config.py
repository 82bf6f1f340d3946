"""Everything that a run can be told, as frozen dataclasses.

A config file builds a `RunConfig`, `to_config_dict` makes it editable from the command line, and
`from_config_dict` (called once, by the entry) turns it back, checked.
"""

import dataclasses

from tokzip_jax.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A CLIP-shaped vision transformer; the defaults are CLIP ViT-L/14-336."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"  # or "gelu" (exact)
    norm_eps: float = 1e-5
    window: int = 0  # side, in patches, of the windows that patches see one another in; 0 = the whole picture
    feature_layer: int = -2  # whose output the language model reads; Python indexing of the blocks' outputs

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.grid**2

    @property
    def feature_blocks(self) -> int:
        """How many blocks have to run to get the features (-2 of 24 layers: 23)."""
        return self.layers + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConfig:
    """A LLaMA-shaped decoder; the defaults are Vicuna v1.5 7B."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    max_positions: int = 4096
    tied_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Sizes of the projectors that have sizes of their own; defaults: BLIP-2's Q-Former, InternVL's factor."""

    unshuffle: int = 2  # pixel_unshuffle: side of the block of patches that becomes one token
    queries: int = 32  # qformer, instructblip, llamavid and mqt (there a square, 256): learned queries
    width: int = 768  # the Q-Formers' own
    layers: int = 12
    heads: int = 12  # also mqt's (16)
    mlp_dim: int = 3072
    cross_every: int = 2  # of so many layers the first reads the picture
    text_length: int = 256  # words of a question that are read, its last ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The towers, and what they have in common."""

    vit: VitConfig = VitConfig()
    llm: LlmConfig = LlmConfig()
    projector: ProjectorConfig = ProjectorConfig()
    voco_embeddings: int = 1  # 1: all VoCo tokens share one embedding (official); n: n of their own, the most usable
    # Cells along a picture's side, each with a matrix of llm.width squared for `voco_start` = "cells"; 0 = none.
    voco_cells: int = 0
    image_newline: bool = False  # a learned embedding behind each row of a stitched picture, see `method.packing`
    contrast_dim: int = 0  # width of the CLS/caption contrastive space; 0 = no contrastive head
    param_dtype: str = "float32"
    dtype: str = "float32"
    logits_dtype: str = "float32"
    attention: str = "auto"  # "auto", "einsum", "blocks", "xla" or "cudnn", see attention.attend; TPU: splash.py
    remat: str = "none"  # "none", "full" or "dots"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What becomes of a picture on its way to the answer, site by site."""

    encoder: str = "none"  # a name of tokzip_jax.compress.ENCODER, or "none"
    tokens: int = 0  # visual tokens the encoder site passes on
    options: Options = Options()  # of the encoder-site method, e.g. contextual=10 of visionzip; its file has them all
    seed: int = 0  # random selection
    projector: str = "mlp2x_gelu"  # a name of tokzip_jax.projectors.PROJECTORS
    pool_grid: int = 0  # avgpool_linear, ldpv2: side of the pooled grid (1 = one token; LDPv2's own is 12)
    pool_rows: int = 0  # avgpool_linear: rows of the pooled grid, pool_grid is then its columns; 0 = a square
    factor: int = 0  # pool_linear, pool_mlp, mlp_pool: patches along a side that become one token
    pool: str = "average"  # the same: "average", "max" or "bilinear"
    unshuffle_order: str = "v2"  # pixel_unshuffle: "v2" (tokens in raster order) or "v1" (column by column)
    level: int = 0  # nested_pool: 0 = all patches, each further level halves the side, the last one is one token
    queries: int = 0  # mqt: how many of the learned queries are used, the first ones; 0 = all
    mqt_keys: str = "official"  # mqt: "official" (keys are position codes alone) or "paper" (features and codes)
    draw_budget: bool = False  # nested_pool, mqt, in training: each picture draws a level (queries) up to that set here
    content_grid: int = 0  # llamavid: side of the content tokens' grid (1 = one token); 0 = every patch
    # Of a picture that is cut into tiles (data.tiles): "tiles", each a picture of its own; "spatial", all as one, in
    # raster order; LLaVA-NeXT's "spatial_unpad", without what is black and with model.image_newline behind each row; or
    # LLaVA-OneVision's "anyres_max_9", the same with no more patches than about nine pictures have.
    packing: str = "tiles"
    voco: int = 0  # VoCo slots of an image
    voco_mask: str = "visible"  # "visible" (plain causal), "voco" (text sees VoCo, not vision) or "prefix_visible"
    # What VoCo tokens start from: their "embedding"; "pooled": the mean of the patches of each one's part is added; or
    # "cells": that, and the mean of each cell of the part through a matrix of the cell's own (`model.voco_cells`).
    voco_start: str = "embedding"
    decoder: str = "none"  # a name of tokzip_jax.compress.decoder.DECODER, or "none"
    decoder_layers: tuple[int, ...] = ()  # the cuts: layers that are the first ones to see fewer visual tokens
    decoder_keep: tuple[int, ...] = ()  # tokens of a picture that stay at each cut (SparseVLM adds merged ones)
    decoder_form: str = "gather"  # "gather" (shorter rows) or "mask" (hidden where they stand; for verification)
    decoder_positions: str = "official"  # position ids behind a cut: the method's own, "original" or "compact"
    # sparsevlm_v1 keeps int(scale * rank + bias), sparsevlm_paper deletes int(scale * (tokens - rank)); of both at most
    # decoder_keep stay.
    decoder_scale: float = 13.5
    decoder_bias: float = 0.0  # sparsevlm_v1
    decoder_heads: int = 14  # sparsevlm_plus: heads that are averaged (official: 14, whatever the model has)
    # "original": an id a token. "compact": what text cannot see takes no id (video; needs mask "voco"). "raster": a
    # token keeps the id of its place in the whole picture (RESTORE).
    positions: str = "original"
    # RESTORE's: the language model weighs keys by how many patches they speak for, and far ones less lightly.
    attention_bias: bool = False

    def __post_init__(self) -> None:
        """A plain dict will do for `options`."""
        object.__setattr__(self, "options", Options(self.options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the loss; a term with weight 0 is not computed."""

    ce: float = 1.0  # next-token cross entropy on the supervised positions
    kl: float = 0.0  # KL to the teacher
    teacher: str = "frozen"  # parameters of the stage's `init_from`; or "self": the model that trains, no gradient
    teacher_ce: float = 0.0  # cross entropy of the same text read off the picture, not off VoCo tokens (joint training)
    temperature: float = 1.0  # of the KL; its square scales the term
    contrast: float = 0.0  # CLIP loss between the CLS token and the caption
    chunk: int = 1024  # supervised positions whose logits exist at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or Muon, with linear warm-up and cosine decay."""

    method: str = "adamw"  # or "muon": the matrices of towers and projectors get orthogonal updates, the rest AdamW
    learning_rate: float = 1e-3
    final_fraction: float = 0.0  # learning rate at the end, as a share of the peak
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1  # micro-batches a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveConfig:
    """Compression that grows over a stage, see `progressive`; ratios are shares of the tokens that are left out: of all
    patches (sites "encoder" and "projector"), of what enters the language model, or of the VoCo tokens.

    The defaults are those of EPIC's code; in its paper the largest ratio goes from 0.05 to 0.9, and the teacher's lead
    from 0.05 to 0.3 over the whole stage.
    """

    # What shrinks: "encoder" (method.tokens), "projector" (what its own option sets), "decoder" (method.decoder_keep),
    # "voco" (VoCo tokens in use); "" = nothing.
    site: str = ""
    low: float = 0.1  # the student's ratio is drawn from [low, high], first at the stage's start ...
    high: float = 0.1
    final_low: float = 0.26  # ... and, after a straight line, at its end
    final_high: float = 0.74
    lead: float = 0.1  # by how much the teacher's ratio is smaller, at the start ...
    final_lead: float = 0.3  # ... and from `lead_by` (a share of the stage) on
    lead_by: float = 0.4
    budgets: tuple[int, ...] = ()  # but for site "voco": the numbers of tokens that are compiled; the nearest is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank deltas beside frozen matrices (arXiv 2106.09685); see `lora.py`."""

    rank: int = 0  # 0 = none
    alpha: float = 16.0  # the delta is alpha / rank times the product of its factors
    paths: tuple[str, ...] = (r"llm/layers/\d+/attn/[qv]/w",)  # patterns of the matrices; the paper's are q and v
    kinds: tuple[str, ...] = ()  # token kinds the deltas reach, e.g. ("voco", "text"); () = every token
    init: str = "official"  # first factor: "official" (Kaiming uniform, as released) or "paper" (Gaussian)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training of a recipe."""

    init_from: str = ""  # "" = fresh; the name of an earlier stage, or a path of converted parameters
    seed: int = 0  # added to the run's: fresh parameters, order of the data, what is random in a step
    drawn_as: str = ""  # the stage whose name is in its random keys, so that two stages draw alike; "" = its own
    frame_order: str = ""  # how `clips` are read: a value of data.scenes.frame_order; "" = that one
    steps: int = 1
    batch_size: int = 32  # rows a step, over all devices
    train: tuple[str, ...] = (".*",)  # path patterns of the parameters that train; the others are frozen
    method: MethodConfig = MethodConfig()
    voco_counts: tuple[int, ...] = ()  # VoCo tokens inserted, one of these; () = always method.voco
    voco_draw: str = "turn"  # which: "turn" (step by step), "random" (one a step) or "row" (every row its own)
    token_dropout: float = 0.0  # share of the pictures of a step that lose a random part of their visual tokens
    lora: LoraConfig = LoraConfig()  # train them with train=("lora/.*", ...)
    loss: LossConfig = LossConfig()
    progressive: ProgressiveConfig = ProgressiveConfig()
    optim: OptimConfig = OptimConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """The number of VoCo tokens follows from the question, see `elastic.choose`.

    The table shows means over the questions. To choose, a question is read once a number, which `prefill` counts.
    """

    ladder: tuple[int, ...] = ()  # ascending, up to method.voco; () = all questions read method.voco tokens
    threshold: float = 0.0  # the smallest number is taken whose first answer token changes by no more than this
    measure: str = "kl"  # of the change: "kl" (nats) or "probability" (the largest difference of one)
    against: str = "largest"  # to what: the "largest" number of the ladder, or the "next" one
    # Whose number it is: each "question"'s, and the cache keeps the largest one; or the "picture"'s, the largest that
    # any of its questions picks, and the cache keeps no more.
    per: str = "question"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig:
    """One line of the results table: parameters of a stage, read by a method."""

    stage: str = "base"  # "" = the question-only prior, which sees no picture and needs no parameters
    method: MethodConfig = MethodConfig()
    auto: AutoConfig = AutoConfig()
    frame_order: str = ""  # how `clips` are read, as in a stage; "" = data.scenes.frame_order, whatever the stage read
    seeds: int = 1  # random selection: how many seeds are averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured after training."""

    batch_size: int = 32
    split: str = "test"
    limit: int = 0  # pictures; 0 = all
    order: tuple[str, ...] = ()  # rows of the table, top to bottom
    upper: str = "upper"  # the row that counts as 100 %
    lower: str = "lower"  # the row that counts as retention 0
    pictures: int = 6  # pictures in figures/kept_tokens.png


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The drawn data sets `scenes` and `clips`; another setting is another data set with files of its own."""

    difficulty: str = "medium"  # "easy", "medium" or "hard": see tokzip_jax.data.shapes.LEVELS
    size: int = 64  # side of a picture in pixels
    seed: int = 0
    train: int = 20000  # pictures or clips of each split
    validation: int = 1000
    test: int = 2000
    questions: int = 8  # the most questions about one of them
    captions: str = "full"  # or "partial": those of every second picture leave out the colours (`scenes` only)
    frames: int = 6  # of a clip
    frame_order: str = "true"  # what is read of a clip: "true", "shuffled" or "middle" (that frame alone); no new files


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set and how rows are made of it."""

    name: str = "easy_vqa"  # a name of tokzip_jax.data.sources.SOURCES
    data_dir: str = ""  # where data sets are built and looked for; "" = TFDS's own default
    tokenizer: str = ""  # a tokenizer.json; "" = train one from the training split into the workdir
    vocab_size: int = 512  # of a tokenizer trained here
    text_length: int = 128  # tokens of a row before its images are put in
    images: int = 1  # the most images of a row
    # Any resolution: the grids (columns, rows) that a picture may be cut into, each tile a picture of its own behind a
    # small one of the whole; () = off. `data.anyres.LLAVA_NEXT` are LLaVA-NeXT's.
    tiles: tuple[tuple[int, int], ...] = ()
    questions: int = 0  # the most questions packed into a row; 0 = as many as fit
    describe: str = ""  # a question that training asks first about every picture, its answer the caption; "" = none
    targets: int = 0  # the most supervised positions of a row; 0 = text_length
    caption_length: int = 16
    held_out: int = 0  # easy_vqa: the last so many training pictures are its split "validation", not trained on
    workers: int = 0  # Grain worker processes
    on_error: str = "skip"  # a picture that cannot be decoded: "skip" (listed in skipped.jsonl) or "raise"
    scenes: ScenesConfig = ScenesConfig()  # read by `scenes` and `clips`


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Stages that are trained again and again, see `study`."""

    stages: tuple[str, ...] = ()  # which; () = a plain run
    learning_rates: tuple[float, ...] = ()  # each is tried with the first seed; () = the stage's own
    seeds: tuple[int, ...] = (0, 1, 2)  # added to the stage's
    # The stage whose training time all others get for a column of their own; "" = no such column. One that is neither
    # in `stages` nor read by a row is timed and not trained.
    equal_time: str = ""
    split: str = "validation"  # that chooses the learning rate
    limit: int = 0  # pictures of it; 0 = all


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the two mesh axes; -1 = all that are left."""

    data: int = -1
    model: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    seed: int = 0
    platform: str = ""  # "cpu", "gpu", "tpu" or "accelerator" (no CPU): refuse to run on anything else; "" = anything
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    rows: dict[str, RowConfig] = dataclasses.field(default_factory=dict)
    eval: EvalConfig = EvalConfig()
    study: StudyConfig = StudyConfig()
    log_every: int = 10
    checkpoint_every: int = 100
    compile_cache: str = "~/.cache/tokzip_jax/compiled"
