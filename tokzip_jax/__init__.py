"""Visual-token compression for vision-language models in JAX.

The functions that need no model are here: `visionzip`, `random`, `uniform` and `average_pool` turn arrays into
`VisualTokens`, `received_attention` scores patches where there is no CLS token. The model is in `tokzip_jax.vlm`,
VoCo's two-stage inference in `tokzip_jax.voco`, the masks in `tokzip_jax.masks`, and every setting of a run in
`tokzip_jax.config`.
"""

from tokzip_jax.compress import average_pool, random, uniform, visionzip
from tokzip_jax.compress.ops import received_attention
from tokzip_jax.types import TokenStream, VisionFeatures, VisualTokens

__all__ = [
    "TokenStream",
    "VisionFeatures",
    "VisualTokens",
    "average_pool",
    "random",
    "received_attention",
    "uniform",
    "visionzip",
]
__version__ = "0.1.0"
