"""Projectors read plainly: one picture, one token, one head and one pixel at a time, in float64.

Written from the papers and from what the released code is known to do. Of the library only the names of its parameters
are used (matrices are [in, out], those of heads [in, N, H] and [N, H, out]).
"""

import math

import jax
import numpy as np


def wide(params):
    """The same parameters in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def linear(p, x):
    """One token through a linear layer."""
    return x @ p["w"] + p.get("b", 0.0)


def norm(p, x, eps):
    """One token normalised over its channels."""
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + eps) * p["scale"] + p["bias"]


def gelu(x):
    """x times the normal distribution function, number by number."""
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def mlp(first, second, x):
    """Linear, exact GELU, linear."""
    return linear(second, gelu(linear(first, x)))


def softmax(scores):
    """Shares of a list of numbers."""
    scores = np.array(scores)
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def attend(p, asking, keys, values):
    """What each token of `asking` reads of the values, by its likeness to the keys, over all heads."""
    out = []
    for token in asking:
        total = p["o"]["b"].copy()
        for head in range(p["q"]["w"].shape[1]):
            q, *k = (x @ p[n]["w"][:, head] + p[n]["b"][head] for n, x in [("q", token), *(("k", key) for key in keys)])
            share = softmax([q @ key / math.sqrt(len(q)) for key in k])
            for weight, value in zip(share, values):
                total += weight * (value @ p["v"]["w"][:, head] + p["v"]["b"][head]) @ p["o"]["w"][head]
        out.append(total)
    return out


def q_former(params, picture, words=None, every=2):
    """What the queries have read of normalised picture tokens; `words` are the ids of a question, real ones only.

    BERT's layers: whatever is added to a token is normalised with it. Queries and words see one another, only queries
    see the picture (in every `every`-th layer), and either has a feed-forward part of its own. A word is its embedding
    and its position's; queries have no position; both start with the same norm.
    """
    asking = [norm(params["norm"], query, 1e-12) for query in params["query"]["table"]]
    count, text = len(asking), []
    for place, word in enumerate([] if words is None else words):
        text.append(norm(params["norm"], params["words"]["table"][word] + params["positions"]["table"][place], 1e-12))
    groups = len(params["layers"]["0"]["0"]["norm1"]["scale"])
    for number in range(groups * every):
        group, place = divmod(number, every)
        p = jax.tree.map(lambda leaf, group=group: leaf[group], params["layers"]["0"][str(place)])
        both = asking + text
        both = [norm(p["norm1"], x + y, 1e-12) for x, y in zip(both, attend(p["attn"], both, both, both))]
        asking, text = both[:count], both[count:]
        if number % every == 0:
            seen = attend(p["cross"], asking, picture, picture)
            asking = [norm(p["norm2"], x + y, 1e-12) for x, y in zip(asking, seen)]
        asking = [norm(p["norm3"], x + mlp(p["mlp"]["up"], p["mlp"]["down"], x), 1e-12) for x in asking]
        text = [norm(p["norm4"], x + mlp(p["text_mlp"]["up"], p["text_mlp"]["down"], x), 1e-12) for x in text]
    return asking


def qformer(params, picture, words=None, every=2):
    """BLIP-2's projector over all tokens of a picture (its CLS token first); with words InstructBLIP's."""
    normal = [norm(params["pre_norm"], x, 1e-5) for x in picture]
    return np.array([linear(params["fc"], x) for x in q_former(params, normal, words, every)])


def llamavid(params, cls, patches, words, grid, every=2):
    """[context token, content tokens]; `grid` squared content tokens, or (0) one for every patch."""
    normal = [norm(params["pre_norm"], x, 1e-5) for x in [cls, *patches]]
    looks = []
    for hidden in q_former(params, normal, words, every):
        query = linear(params["read"], hidden)
        share = softmax([query @ linear(params["key"], x) / math.sqrt(len(query)) for x in patches])
        looks.append(sum(weight * x for weight, x in zip(share, patches)))
    out = [linear(params["value"], sum(looks) / len(looks))]
    side = math.isqrt(len(patches))
    kernel = side // grid if grid else 1
    for i in range(side // kernel):
        for j in range(side // kernel):
            window = [patches[(i * kernel + y) * side + j * kernel + x] for y in range(kernel) for x in range(kernel)]
            out.append(mlp(params["fc1"], params["fc2"], sum(window) / len(window)))
    return np.array(out)


def convolved(kernel, picture, y, x):
    """A 3x3 convolution of every channel by itself at one pixel; nothing lies outside of the picture [S, S, D]."""
    total = np.zeros(picture.shape[2])
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if 0 <= y + dy < len(picture) and 0 <= x + dx < len(picture):
                total += picture[y + dy, x + dx] * kernel[dy + 1, dx + 1]
    return total


def projected(params, patches):
    """Every patch through the two linear layers, as a picture [S, S, D]."""
    side = math.isqrt(len(patches))
    return np.array([mlp(params["fc1"], params["fc2"], x) for x in patches]).reshape(side, side, -1)


def hard_sigmoid(x):
    """0 up to -3, 1 from 3 on, straight between."""
    return np.minimum(np.maximum(x + 3, 0), 6) / 6


def inverted_residual(p, picture, stride):
    """MobileNetV3's block of MobileVLM: depthwise, squeeze and excite, pointwise; stride 1 adds what came in."""
    side = (len(picture) - 1) // stride + 1
    pixels = {}
    for i in range(side):
        for j in range(side):
            x = norm(p["norm1"], convolved(p["depthwise"]["kernel"], picture, i * stride, j * stride), 1e-5)
            pixels[i, j] = x * hard_sigmoid(x)
    mean = sum(pixels.values()) / len(pixels)
    gate = hard_sigmoid(linear(p["excite"], np.maximum(linear(p["squeeze"], mean), 0)))
    out = np.zeros((side, side, len(gate)))
    for (i, j), x in pixels.items():
        out[i, j] = norm(p["norm2"], (x * gate) @ p["point"]["w"], 1e-5)
        if stride == 1:
            out[i, j] += picture[i, j]
    return out


def ldp(params, patches):
    """MobileVLM's projector: half the side, rounded up."""
    picture = inverted_residual(params["block1"], projected(params, patches), 1)
    picture = inverted_residual(params["block2"], picture, 2)
    return picture.reshape(-1, picture.shape[2])


def ldpv2(params, patches, grid):
    """MobileVLM V2's projector: the mean of windows that may overlap, and a convolution as a position code."""
    picture = projected(params, patches)
    side = len(picture)
    pooled = np.zeros((grid, grid, picture.shape[2]))
    for i in range(grid):
        for j in range(grid):
            rows = range(math.floor(i * side / grid), math.ceil((i + 1) * side / grid))
            columns = range(math.floor(j * side / grid), math.ceil((j + 1) * side / grid))
            pooled[i, j] = sum(picture[y, x] for y in rows for x in columns) / (len(rows) * len(columns))
    out = [
        pooled[i, j] + convolved(params["peg"]["kernel"], pooled, i, j) + params["peg"]["b"]
        for i in range(grid)
        for j in range(grid)
    ]
    return np.array(out)


def raster_code(side, width):
    """Fixed codes [S, S, D] of the places of a raster: a quarter each of sin(x f), cos(x f), sin(y f), cos(y f)."""
    code = np.zeros((side, side, width))
    quarter = width // 4
    for y in range(side):
        for x in range(side):
            for number in range(quarter):
                frequency = 1 / 10000 ** (number / quarter)
                for part, value in enumerate((math.sin, math.cos)):
                    code[y, x, part * quarter + number] = value(x * frequency)
                    code[y, x, (2 + part) * quarter + number] = value(y * frequency)
    return code


def cubic(distance):
    """The kernel of bicubic interpolation with a = -3/4."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0


def resized(code, side):
    """A square code [S, S, D] at the pixel centres of another grid, bicubically; the border is repeated."""
    old = len(code)
    out = np.zeros((side, side, code.shape[2]))
    for i in range(side):
        for j in range(side):
            y, x = ((number + 0.5) * old / side - 0.5 for number in (i, j))
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = code[min(max(row, 0), old - 1), min(max(column, 0), old - 1)]
                    out[i, j] += cubic(y - row) * cubic(x - column) * inside
    return out


def mqt(params, tokens, places, side, count, keys):
    """The first `count` queries of the Matryoshka Query Transformer.

    `places` are the raster indices of the tokens in a picture of `side` patches, -1 for one without a place.
    """
    table = params["query"]["table"]
    own = raster_code(math.isqrt(len(table)), len(table[0]))
    code = resized(own, side)
    where = [code[divmod(place, side)] if place >= 0 else np.zeros(len(table[0])) for place in places]
    seen = where if keys == "official" else [x + w for x, w in zip(tokens, where)]
    asking = [table[number] + own[divmod(number, len(own))] for number in range(count)]
    out = attend(
        params["attn"],
        [norm(params["norm1"], x, 1e-6) for x in asking],
        [norm(params["norm2"], x, 1e-6) for x in seen],
        [norm(params["norm3"], x, 1e-6) for x in tokens],
    )
    return np.array([x @ params["fc"]["w"] for x in out])
