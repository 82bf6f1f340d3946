"""Visual-token compression for vision-language models in JAX."""
