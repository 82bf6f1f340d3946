"""Decoder-site methods read plainly: one row of real tokens, one layer and one token at a time, in float64."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Row:
    """Real tokens of one row: states [n, D], position ids, picture number (0 = text), and how many are the prompt."""

    x: np.ndarray
    position: np.ndarray
    picture: np.ndarray
    prompt: np.ndarray

    def take(self, index):
        return Row(self.x[index], self.position[index], self.picture[index], self.prompt[index])


def layer(cfg, block, row):
    """One LLaMA layer over a row: (states behind it, attention [N, n, n])."""
    half, n = cfg.head_dim // 2, len(row.x)
    angle = row.position[:, None] * cfg.rope_theta ** (-np.arange(half) / half)

    def rms(p, x):
        return p["scale"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + cfg.norm_eps)

    def turn(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    y = rms(block["norm1"], row.x)
    q, k, v = (np.einsum("td,dnh->nth", y, block["attn"][name]["w"]) for name in "qkv")
    k, v = (np.repeat(heads, cfg.heads // cfg.kv_heads, axis=0) for heads in (turn(k), v))
    logits = np.einsum("nth,nsh->nts", turn(q), k) / np.sqrt(cfg.head_dim)
    logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    x = row.x + np.einsum("nts,nsh,nhd->td", weights, v, block["attn"]["o"]["w"])
    y = rms(block["norm2"], x)
    gate = y @ block["mlp"]["gate"]["w"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ block["mlp"]["up"]["w"])) @ block["mlp"]["down"]["w"], weights


def raters(x, tokens, words, scale=1.0):
    """Places in `words` (places in the row) of the text that the picture at `tokens` matches best."""
    x = x * np.sqrt(scale)
    match = np.zeros(len(words))
    for token in tokens:
        weight = np.exp(x[words] @ x[token] - (x[words] @ x[token]).max())
        match += weight / weight.sum() / len(tokens)
    found = [word for word, value in zip(words, match) if value > match.mean()]
    return found or list(words)


def cluster(x, count):
    """Density-peak clusters of x [n, D], averaged: [count, D], highest peak first."""
    n = len(x)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / x.shape[1]) for b in x] for a in x])
    density = [np.exp(-np.mean(np.sort(distance[i] ** 2)[:count])) for i in range(n)]
    peak = []
    for i in range(n):
        denser = [distance[i, j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peak.append(density[i] * (min(denser) if denser else distance.max()))
    centres = sorted(range(n), key=lambda i: -peak[i])[:count]
    groups = [[] for _ in centres]
    for i in range(n):
        nearest = centres.index(i) if i in centres else int(np.argmin([distance[i, c] for c in centres]))
        groups[nearest].append(x[i])
    return np.array([np.sum(group, axis=0) / (len(group) + 1e-6) for group in groups])


def scores(cfg, method, weights, row, tokens, asks):
    """What each of `tokens` (places in the row) is worth."""
    if method.decoder in ("fastv", "pyramiddrop"):
        return weights.mean(axis=0)[asks[-1], tokens]
    if method.decoder == "fastv_paper":
        return np.array([np.mean([weights[:, q, t].mean() for q in asks if q > t]) for t in tokens])
    if method.decoder == "sparsevlm_plus":
        theirs = weights[:, asks][:, :, tokens].copy()
        frequency = cfg.rope_theta ** (-np.arange(cfg.head_dim // 2) / (cfg.head_dim // 2))
        for r, ask in enumerate(asks):
            for t, token in enumerate(tokens):
                # A query and a key of ones, turned to their places.
                q, k = ((1 + 1j) * np.exp(1j * row.position[at] * frequency) for at in (ask, token))
                theirs[:, r, t] /= (q.real @ k.real + q.imag @ k.imag) / np.sqrt(cfg.head_dim)
        heads = np.argsort(-theirs.sum(axis=(1, 2)), kind="stable")[: method.decoder_heads]
        return theirs[heads].mean(axis=0).mean(axis=0)
    return weights.mean(axis=0)[asks][:, tokens].mean(axis=0)


def cut(cfg, method, keep, weights, row, asks):
    """The row behind a cut; `asks` are, for each picture, the places that have a say (also moved along)."""
    alive, merged = np.ones(len(row.x), bool), {}
    for picture in sorted(set(row.picture) - {0}):
        tokens = np.flatnonzero(row.picture == picture)
        value = scores(cfg, method, weights, row, tokens, asks[picture])
        best = [tokens[i] for i in np.argsort(-value, kind="stable")]
        count = keep
        if method.decoder == "sparsevlm_v1":
            rank = np.linalg.matrix_rank(weights.mean(axis=0)[asks[picture]][:, tokens].astype(np.float32))
            count = min(int(rank * method.decoder_scale + method.decoder_bias), len(tokens) - 1, keep)
        if method.decoder == "sparsevlm_paper":
            rank = np.linalg.matrix_rank(weights.mean(axis=0)[asks[picture]][:, tokens].astype(np.float32))
            count = min(len(tokens) - int(np.float32(method.decoder_scale) * (len(tokens) - rank)), keep)
        gone = best[count:]
        alive[gone] = False
        if method.decoder in ("sparsevlm", "sparsevlm_v1", "sparsevlm_paper") and gone:
            some = gone[: int(0.3 * len(gone)) + 1]
            merged[picture] = (tokens[-1], cluster(row.x[some], len(some) // 10 + 1))
    parts, moved = [], {picture: [] for picture in asks}
    for place in range(len(row.x)):
        if alive[place]:
            for picture, places in asks.items():
                if place in places:
                    moved[picture].append(sum(len(part.x) for part in parts))
            parts.append(row.take([place]))
        for last, tokens in merged.values():
            if last == place:
                same = row.take([place] * len(tokens))
                parts.append(dataclasses.replace(same, x=tokens))
    names = [field.name for field in dataclasses.fields(Row)]
    row = Row(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    if method.decoder in ("pyramiddrop", "sparsevlm", "sparsevlm_v1", "sparsevlm_paper"):
        row.position = np.arange(len(row.x))
    return row, moved


def run(cfg, blocks, method, row):
    """All layers over a row, with the method's cuts."""
    pictures = sorted(set(row.picture) - {0})
    words = np.flatnonzero((row.picture == 0) & row.prompt)
    asks = {}
    for picture in pictures:
        tokens = np.flatnonzero(row.picture == picture)
        if method.decoder.startswith("sparsevlm"):
            scale = row.x.shape[1] ** -0.5 if method.decoder == "sparsevlm_paper" else 1.0
            asks[picture] = raters(row.x, tokens, words[words > tokens[-1]], scale)
        else:
            asks[picture] = list(np.flatnonzero(row.prompt)) if method.decoder == "fastv_paper" else [words[-1]]
    for number, block in enumerate(blocks):
        if number in method.decoder_layers:
            if method.decoder == "pyramiddrop":
                _, weights = layer(cfg, block, row)
            keep = method.decoder_keep[method.decoder_layers.index(number)]
            row, asks = cut(cfg, method, keep, weights, row, asks)
        row.x, weights = layer(cfg, block, row)
    return row
