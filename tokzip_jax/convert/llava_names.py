"""What LLaVA's tensors are called: the same ones go by four sets of names, one table each.

The original files, the llava-hf files on the hub, and what a model in memory calls them in transformers 4.52 and later,
and in 5. All of them pair rotary halves as we do, so no query or key row moves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokzip_jax.convert.table import CONV, FLAT, LINEAR, LINEAR_HEADS, Rule, Table, match

PROJECTOR = "mlp2x_gelu"
NEWLINE = "image_newline"  # of LLaVA-1.6: our path too, where the config has one


def _llm_rules(llm: str, head: str) -> list[Rule]:
    layer, ours = f"{llm}.layers.#", "llm/layers"
    return [
        Rule(f"{llm}.embed_tokens.weight", "llm/embed/table", more_rows=True),
        *(Rule(f"{layer}.self_attn.{n}_proj.weight", f"{ours}/attn/{n}/w", LINEAR) for n in "qkv"),
        Rule(f"{layer}.self_attn.o_proj.weight", f"{ours}/attn/o/w", LINEAR_HEADS),
        *(Rule(f"{layer}.mlp.{n}_proj.weight", f"{ours}/mlp/{n}/w", LINEAR) for n in ("gate", "up", "down")),
        Rule(f"{layer}.input_layernorm.weight", f"{ours}/norm1/scale"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{ours}/norm2/scale"),
        Rule(f"{llm}.norm.weight", "llm/norm/scale"),
        Rule(f"{head}.weight", "llm/head/w", LINEAR, more_rows=True),
    ]


def _vision_rules(tower: str) -> list[Rule]:
    layer, ours = f"{tower}.encoder.layers.#", "vit/layers"
    norms = {
        f"{tower}.pre_layrnorm": "vit/pre_norm",  # spelled like this in every checkpoint
        f"{tower}.post_layernorm": "vit/post_norm",
        f"{layer}.layer_norm1": f"{ours}/norm1",
        f"{layer}.layer_norm2": f"{ours}/norm2",
    }
    rules = [
        Rule(f"{tower}.embeddings.class_embedding", "vit/cls"),
        Rule(f"{tower}.embeddings.position_embedding.weight", "vit/pos"),
        Rule(f"{tower}.embeddings.patch_embedding.weight", "vit/patch/kernel", CONV),
        Rule(f"{layer}.self_attn.out_proj.weight", f"{ours}/attn/o/w", LINEAR_HEADS),
        Rule(f"{layer}.self_attn.out_proj.bias", f"{ours}/attn/o/b"),
    ]
    for key, path in norms.items():
        rules += [Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")]
    for n in "qkv":
        rules.append(Rule(f"{layer}.self_attn.{n}_proj.weight", f"{ours}/attn/{n}/w", LINEAR))
        rules.append(Rule(f"{layer}.self_attn.{n}_proj.bias", f"{ours}/attn/{n}/b", FLAT))
    for n, name in (("fc1", "up"), ("fc2", "down")):
        rules.append(Rule(f"{layer}.mlp.{n}.weight", f"{ours}/mlp/{name}/w", LINEAR))
        rules.append(Rule(f"{layer}.mlp.{n}.bias", f"{ours}/mlp/{name}/b"))
    return rules


def _projector_rules(first: str, second: str) -> list[Rule]:
    rules = []
    for key, path in ((first, f"projector/{PROJECTOR}/fc1"), (second, f"projector/{PROJECTOR}/fc2")):
        rules += [Rule(f"{key}.weight", f"{path}/w", LINEAR), Rule(f"{key}.bias", f"{path}/b")]
    return rules


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Where a source format keeps its parts.

    Attributes:
        llm, head, vision, newline: prefixes of the decoder, its head, the vision tower, and the name of the newline.
        projector: the two linear layers.
    """

    llm: str
    head: str
    vision: str
    projector: tuple[str, str]
    newline: str

    def table(self, name: str) -> Table:
        """The rules of this format."""
        rules = [*_llm_rules(self.llm, self.head), *_vision_rules(self.vision), *_projector_rules(*self.projector)]
        # Buffers that old files carry; both are computed here.
        ignored = (r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids")
        return Table(name, (*rules, Rule(self.newline, NEWLINE)), ignored)


_MEMORY = Spelling(
    "model.language_model",
    "lm_head",
    "model.vision_tower.vision_model",
    ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    "model.image_newline",
)
SPELLINGS = {
    "llava": Spelling(
        "model",
        "lm_head",
        "model.vision_tower.vision_tower.vision_model",
        ("model.mm_projector.0", "model.mm_projector.2"),
        "model.image_newline",
    ),
    "llava-hf": Spelling(
        "language_model.model",
        "language_model.lm_head",
        "vision_tower.vision_model",
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        "image_newline",
    ),
    "transformers-4.52": _MEMORY,
    "transformers-5": dataclasses.replace(_MEMORY, vision="model.vision_tower"),
}
TABLES = {name: spelling.table(name) for name, spelling in SPELLINGS.items()}


def spelling_of(state: Mapping[str, Any]) -> str:
    """The name of the table that knows most of a state dict's names.

    Raises:
        ValueError: no table knows any.
    """
    known = {name: len(state) - len(match(table, state)[1]) for name, table in TABLES.items()}
    best = max(known, key=known.get)
    if not known[best]:
        raise ValueError(f"no LLaVA weights: none of {len(state)} names is known, such as {sorted(state)[:3]}")
    return best
