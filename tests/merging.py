"""Bipartite matching read from the papers: one picture, float64, a list of tokens that know their members."""

import numpy as np


def first_tokens(x, metric, attention=None):
    """Tokens of which none is merged: dicts with x, metric, attention, size, place, members."""
    attention = np.zeros(len(x)) if attention is None else attention
    return [
        {
            "x": np.asarray(x[i], float),
            "metric": np.asarray(metric[i], float),
            "attention": float(attention[i]),
            "place": i,
            "members": [i],
        }
        for i in range(len(x))
    ]


def join(target, arriving):
    """One token of several: averages weighted by members, attention averaged by token."""
    all_of_them = [target, *arriving]
    sizes = [len(token["members"]) for token in all_of_them]
    return {
        "x": sum(n * token["x"] for n, token in zip(sizes, all_of_them)) / sum(sizes),
        "metric": sum(n * token["metric"] for n, token in zip(sizes, all_of_them)) / sum(sizes),
        "attention": np.mean([token["attention"] for token in all_of_them]),
        "place": target["place"],
        "members": [member for token in all_of_them for member in token["members"]],
    }


def step(tokens, removed, *, protected, penalty=0.0, order="index"):
    """One step of matching: a new list of tokens."""
    evens, odds = range(0, len(tokens), 2), range(1, len(tokens), 2)
    best, into = {}, {}
    for e in evens:
        a = tokens[e]["metric"]
        cosines = [
            a @ tokens[o]["metric"] / (np.linalg.norm(a) * np.linalg.norm(tokens[o]["metric"]) or 1.0) for o in odds
        ]
        into[e] = odds[int(np.argmax(cosines))]
        best[e] = max(cosines) - penalty * tokens[e]["attention"]
    by_score = sorted((e for e in evens if not (protected and e == 0)), key=lambda e: (-best[e], e))
    leaving = by_score[:removed]
    staying = [e for e in evens if e not in leaving]
    if order == "score":
        staying = by_score[removed:]
    result = {o: join(tokens[o], [tokens[e] for e in leaving if into[e] == o]) for o in odds}
    result |= {e: tokens[e] for e in staying}
    places = sorted(result) if order == "raster" else [*staying, *odds]
    return [result[i] for i in places]


def assert_same(result, row, tokens, first=0, atol=1e-5, scale=None):
    """A row of `VisualTokens` against a list of tokens, whose first `first` are no patches."""
    tokens = tokens[first:]
    expected = np.array([token["x"] for token in tokens])
    if scale is not None:
        expected *= np.array([scale(len(token["members"])) for token in tokens])[:, None]
    np.testing.assert_array_equal(result.position_BM[row], [token["place"] - first for token in tokens])
    np.testing.assert_array_equal(result.size_BM[row], [len(token["members"]) for token in tokens])
    for slot, token in enumerate(tokens):
        np.testing.assert_array_equal(np.asarray(result.source_BP[row])[np.array(token["members"]) - first], slot)
    np.testing.assert_allclose(result.tokens_BMD[row], expected, atol=atol)


def assert_books(result, patches, *, dropped=False):
    """Sizes are the patches with that source, places are unique and a token's place is its own member."""
    slots = result.size_BM.shape[1]
    for row in range(len(result.size_BM)):
        source, size, place, valid = (
            np.asarray(x[row]) for x in (result.source_BP, result.size_BM, result.position_BM, result.valid_BM)
        )
        assert source.shape == (patches,) and source.min() >= -1 and source.max() < slots
        np.testing.assert_array_equal(np.bincount(source[source >= 0], minlength=slots), size)
        assert np.all(size[~valid] == 0)
        placed = valid & (place >= 0)
        kept = place[placed]
        assert len(set(kept)) == len(kept) and np.all(kept < patches)
        np.testing.assert_array_equal(source[kept], np.flatnonzero(placed))
        if not dropped:
            assert size.sum() == patches
