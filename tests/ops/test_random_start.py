"""Starting points as a pure function of (key, index, element): Philox4x32-10, uniform Linf and L2, Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    BATCH,
    DTYPES,
    F16,
    F32,
    F64,
    IMAGES,
    INF,
    NAN,
    assert_compiles,
    assert_deterministic,
    assert_rows_independent,
    assert_same_bits,
    assert_vmaps,
    assert_within,
    each_dtype,
    images_grid,
    layouts,
    needs_kernel,
    per_sample,
    rounding,
    row_dtype,
    uniform,
)

from dtrades_fast.ops import random_start, reference

KINDS = ("linf", "l2", "gaussian")
KEY = 0x1234_5678_9ABC_DEF0
RADIUS = 8 / 255
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(shape, dtype):
    return uniform(shape, dtype, 1), torch.arange(shape[0]) * 3 + 5


# ---- Philox, as Salmon et al. 2011 define it, on Python integers --------------------------------------------------


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words(index, count, draw, key):
    """Word j of a sample is word j % 4 of the counter (j // 4, draw, low and high half of the index)."""
    halves = (index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF)
    blocks = (philox((j, draw, *halves), (key & 0xFFFFFFFF, key >> 32)) for j in range((count + 3) // 4))
    return np.array([w for block in blocks for w in block][:count], dtype=np.uint64)


def oracle(clean, index, kind, radius, key, lower=0.0, upper=1.0):
    """The starting point and its tolerance."""
    x = per_sample(clean)
    count = x.shape[1]
    noise, size = np.zeros_like(x), np.zeros_like(x)
    for i, sample in enumerate(index.tolist()):
        bits = (words(sample, count + count % 2, 0, key) >> np.uint64(8)).astype(np.longdouble)
        if kind == "linf":
            noise[i] = radius * (bits[:count] * np.longdouble(2) ** -23 - 1)
            size[i] = radius
            continue
        length = np.sqrt(-2 * np.log((bits[::2] + 1) / 2**24))
        angle = 2 * np.longdouble("3.14159265358979323846264338327950288") * bits[1::2] / 2**24
        normal = np.stack((length * np.cos(angle), length * np.sin(angle)), 1).reshape(-1)[:count]
        # The square root magnifies the rounding of the logarithm's argument where the logarithm is near 0. The angle,
        # up to 2 pi, is rounded in the twin, and that error is not relative to a cosine near 0: hence the whole length.
        spread = np.repeat(length, 2)[:count] * 8
        scale = radius
        if kind == "l2" and count:
            v = (int(words(sample, 1, 1, key)[0] >> np.uint64(8)) + 1) / np.longdouble(2**24)
            scale = radius * v ** (np.longdouble(1) / count) / np.sqrt((normal**2).sum())
        noise[i], size[i] = scale * normal, scale * spread
    start = x + noise
    if kind != "gaussian":
        start = np.clip(start, lower, upper)
    return start, rounding(clean.dtype) / 2 * (np.abs(x) + np.abs(noise) + size)


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    cases = [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, answer in cases:
        twin = reference.philox(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
        assert " ".join(f"{int(w):08x}" for w in twin) == answer
        assert " ".join(f"{w:08x}" for w in philox(counter, key)) == answer


def test_known_answer_through_the_operator():
    """Counter 0, key 0: u = word / 2^32 in [0, 1) in steps of 2^-24, out = 2 u - 1."""
    start = random_start(torch.zeros(1, 4, dtype=F64), torch.tensor([0]), "linf", 1.0, 0, -INF, INF)
    expected = [(w >> 8) * 2.0**-23 - 1 for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    assert start.tolist() == [expected]


# ---- values --------------------------------------------------------------------------------------------------------


@each_dtype
@each_kind
@images_grid
def test_matches_oracle(shape, kind, dtype):
    clean, index = make(shape, dtype)
    start = random_start(clean, index, kind, RADIUS, KEY)
    assert start.shape == clean.shape
    assert start.dtype == dtype
    expected, tolerance = oracle(clean, index, kind, RADIUS, KEY)
    assert_within(start.reshape(expected.shape), expected, tolerance)


@each_kind
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_remainder(count, kind, dtype):
    """Sizes around the four words of a block, the sixteen lanes and the 64 words that are drawn at a time."""
    clean, index = make((3, count), dtype)
    expected, tolerance = oracle(clean, index, kind, 0.25, KEY, -INF, INF)
    assert_within(random_start(clean, index, kind, 0.25, KEY, -INF, INF), expected, tolerance)


@needs_kernel
@each_dtype
@each_kind
@images_grid
def test_twin_agrees(shape, kind, dtype):
    clean, index = make(shape, dtype)
    expected, tolerance = oracle(clean, index, kind, RADIUS, KEY)
    twin = reference.random_start(clean, index, kind, RADIUS, 0.0, 1.0, KEY)
    assert_within(twin.reshape(expected.shape), expected, tolerance)


@each_kind
@pytest.mark.parametrize("index", [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**63 - 1, -1])
@pytest.mark.parametrize("key", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_large_indices_and_keys(key, index, kind):
    clean, index = torch.full((1, 70), 0.5), torch.tensor([index])
    expected, tolerance = oracle(clean, index, kind, RADIUS, key)
    assert_within(random_start(clean, index, kind, RADIUS, key), expected, tolerance)


@each_kind
def test_no_radius_gives_the_clean_image(kind):
    clean, index = make((5, 3, 5, 7), F32)
    assert torch.equal(random_start(clean, index, kind, 0, KEY), clean)


@each_dtype
@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_stays_in_ball_and_box(kind, dtype):
    clean, index = make((BATCH, 3, 5, 7), dtype)
    start = random_start(clean, index, kind, 0.5, KEY)
    assert (start >= 0).all()
    assert (start <= 1).all()
    distance = (start.double() - clean.double()).flatten(1)
    ulp = torch.finfo(dtype).eps / 2 + torch.finfo(row_dtype(dtype)).eps
    if kind == "linf":
        assert (distance.abs() <= 0.5 + ulp).all()
        assert distance.abs().max() > 0.49
    else:
        assert (distance.norm(dim=1) <= 0.5 + ulp * math.sqrt(105)).all()


@each_dtype
def test_gaussian_is_not_clipped(dtype):
    clean, index = torch.ones(50, 3, 5, 7, dtype=dtype), torch.arange(50)
    start = random_start(clean, index, "gaussian", 0.1, KEY)
    assert 0.4 < (start > 1).double().mean() < 0.6
    assert_same_bits(start, random_start(clean, index, "gaussian", 0.1, KEY, 0.9, 0.95))


def test_nan_pixel_shows():
    clean, index = make((2, 7), F32)
    clean[1, 3] = NAN
    for kind in KINDS:
        nan = random_start(clean, index, kind, RADIUS, KEY).isnan()
        assert nan[1, 3]
        assert nan.sum() == 1


# ---- what the numbers depend on: key, index and position, and nothing else ----------------------------------------


@each_kind
def test_keys_and_indices_give_different_numbers(kind):
    clean = torch.zeros(4, 105)
    index = torch.tensor([0, 1, 2**32, 2**33])
    draws = [random_start(clean, index, kind, 1.0, key, -INF, INF) for key in (0, 1, 2**32, 2**62)]
    flat = torch.cat(draws)
    for i in range(len(flat)):
        for j in range(i):
            assert (flat[i] == flat[j]).sum() <= 1
    assert not any((row[:-4] == row[4:]).any() for row in flat)  # nor do a sample's blocks repeat


@each_kind
@each_dtype
def test_batch_split_and_order_do_not_matter(kind, dtype):
    clean, index = make((BATCH, 3, 5, 7), dtype)
    whole = random_start(clean, index, kind, RADIUS, KEY)
    parts = [random_start(c, i, kind, RADIUS, KEY) for c, i in zip(clean.split(4), index.split(4), strict=True)]
    assert_same_bits(torch.cat(parts), whole)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    assert_same_bits(random_start(clean[order], index[order], kind, RADIUS, KEY), whole[order])
    torch.rand(7)  # nor does what else was drawn
    assert_same_bits(random_start(clean, index, kind, RADIUS, KEY), whole)


@pytest.mark.parametrize("kind", ["linf", "gaussian"])  # an L2 start is scaled by the norm of the whole sample
def test_sizes_share_their_beginning(kind):
    clean, index = torch.zeros(3, 200), torch.arange(3)  # 0 + radius * u: one rounding, fused or not
    whole = random_start(clean, index, kind, RADIUS, KEY, -INF, INF)
    for count in (1, 4, 15, 64, 70, 199):
        part = random_start(clean[:, :count], index, kind, RADIUS, KEY, -INF, INF)
        assert_same_bits(part, whole[:, :count], str(count))


@each_kind
def test_dtypes_share_their_numbers(kind):
    clean, index = make((5, 3, 5, 7), F16)
    for dtype in DTYPES:
        x = clean.to(dtype)
        start = random_start(x, index, kind, RADIUS, KEY)
        if dtype != F64:  # computed in float32, rounded once
            assert_same_bits(start, random_start(x.float(), index, kind, RADIUS, KEY).to(dtype), str(dtype))
        else:
            expected, tolerance = oracle(x.float(), index, kind, RADIUS, KEY)
            assert_within(start.flatten(1), expected, tolerance)


@pytest.mark.parametrize("radius", [1e-7, 1e-5, 1.0, 6e4, 1e38])
@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_rounding_to_half_is_that_of_torch(radius, dtype):
    """Subnormals, ordinary numbers and overflow, in the loop of a kernel that is not pgd_step_."""
    clean, index = torch.zeros(64, 1000, dtype=dtype), torch.arange(64)
    start = random_start(clean, index, "gaussian", radius, KEY)
    assert_same_bits(start, random_start(clean.float(), index, "gaussian", radius, KEY).to(dtype))


@each_dtype
@each_kind
def test_any_layout(kind, dtype):
    clean, index = make((5, 3, 4, 6), dtype)
    expected = random_start(clean, index, kind, RADIUS, KEY)
    for name, x in layouts(clean).items():
        actual = random_start(x, index, kind, RADIUS, KEY)
        assert_same_bits(actual, expected, name)
        assert actual.stride() == torch.empty_like(x).stride(), name
        assert actual.data_ptr() != x.data_ptr(), name
    assert_same_bits(random_start(clean, index.repeat_interleave(2)[::2], kind, RADIUS, KEY), expected, "index")


@needs_kernel
@each_dtype
@each_kind
@pytest.mark.parametrize("shape", [(BATCH, 3, 5, 7), (BATCH, 64), (BATCH,)], ids=str)
def test_sample_alone_has_the_bits_of_the_batch(shape, kind, dtype):
    assert_rows_independent(lambda x, i: random_start(x, i, kind, RADIUS, KEY), *make(shape, dtype))


@needs_kernel
@each_dtype
@each_kind
def test_deterministic(kind, dtype):
    clean, index = make((24, 3, 32, 32), dtype)
    assert_deterministic(lambda: random_start(clean, index, kind, RADIUS, KEY))


# ---- distributions, with a fixed key: no chance is involved in whether they pass -----------------------------------


def kolmogorov_smirnov(values, cdf):
    """sqrt(n) sup |F_n - F|, above 1.95 with a probability of 1e-3 if F is right."""
    u = np.sort(cdf(np.asarray(values, dtype=np.float64).reshape(-1)))
    n = len(u)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - u).max(), (u - steps[:-1]).max())


def normal_cdf(x):
    return 0.5 * (1 + np.array([math.erf(v) for v in x / math.sqrt(2)]))


def draw(kind, samples=1000, pixels=100, dtype=F32, key=KEY):
    clean = torch.zeros(samples, pixels, dtype=dtype)
    return random_start(clean, torch.arange(samples), kind, 1.0, key, -INF, INF)


def test_linf_is_uniform():
    u = draw("linf").double().numpy()
    assert u.min() >= -1
    assert u.max() < 1
    n = u.size
    assert abs(u.mean()) < 3.3 * math.sqrt(1 / 3 / n)
    assert abs((u**2).mean() - 1 / 3) < 3.3 * math.sqrt(4 / 45 / n)
    assert kolmogorov_smirnov(u, lambda x: (x + 1) / 2) < 1.95
    for k in (1, 2, 3, 4, 16, 64):  # neighbouring words, blocks and groups are not correlated
        assert abs((u[:, k:] * u[:, :-k]).mean()) < 3.3 / 3 / math.sqrt(u[:, k:].size)
    assert abs((u[1:] * u[:-1]).mean()) < 3.3 / 3 / math.sqrt(n)  # nor neighbouring samples


@pytest.mark.parametrize("dtype", [F32, F64])
def test_gaussian_is_normal(dtype):
    x = draw("gaussian", dtype=dtype).double().numpy()
    n = x.size
    assert abs(x.mean()) < 3.3 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 3.3 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 3.3 * math.sqrt(96 / n)
    assert kolmogorov_smirnov(x, normal_cdf) < 1.95
    assert np.abs(x).max() <= math.sqrt(48 * math.log(2)) * (1 + 1e-6)  # the smallest u is 2^-24
    for k in (1, 2, 3, 4):  # the two normals of a pair are independent, and so are pairs
        assert abs((x[:, k:] * x[:, :-k]).mean()) < 3.3 / math.sqrt(x[:, k:].size)
    assert abs((x[:, ::2] ** 2 * x[:, 1::2] ** 2).mean() - 1) < 3.3 * math.sqrt(8 / (n / 2))


@pytest.mark.parametrize("pixels", [2, 3, 100])
def test_l2_is_uniform_in_the_ball(pixels):
    x = draw("l2", samples=20000, pixels=pixels).double().numpy()
    radius = np.sqrt((x**2).sum(1))
    assert radius.max() <= 1 + rounding(F32, pixels)
    assert kolmogorov_smirnov(radius, lambda r: np.minimum(r, 1) ** pixels) < 1.95
    direction = x / radius[:, None]
    assert (np.abs(direction.mean(0)) < 4.2 / math.sqrt(pixels * 20000)).all()
    assert (np.abs((direction**2).mean(0) - 1 / pixels) < 4.2 * math.sqrt(2 / 20000) / pixels).all()
    if pixels == 2:
        angle = np.arctan2(x[:, 1], x[:, 0])
        assert kolmogorov_smirnov(angle, lambda a: (a + math.pi) / (2 * math.pi)) < 1.95


# ---- registration, compilation, transforms ---------------------------------------------------------------------------


@needs_kernel
@each_kind
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_opcheck(shape, kind):
    clean, index = make(shape, F32)
    operator = torch.ops.dtrades_fast.random_start.default
    torch.library.opcheck(operator, (clean, index, kind, RADIUS, 0.0, 1.0, KEY))
    strided = clean.half().transpose(0, -1).contiguous().transpose(0, -1)
    torch.library.opcheck(operator, (strided, index, kind, RADIUS, 0.0, 1.0, KEY))


@each_kind
def test_compile(kind):
    assert_compiles(lambda x, i: random_start(x, i, kind, RADIUS, KEY), *make((BATCH, 3, 5), F64), grad=False)


@each_kind
def test_vmap(kind):
    clean, index = make((12, 2, 5), F32)
    assert_vmaps(lambda x, i: random_start(x, i, kind, RADIUS, KEY), clean.unflatten(0, (4, 3)), index.view(4, 3))


@each_kind
def test_no_gradient_is_recorded(kind):
    clean, index = make((3, 5), F32)
    assert not random_start(clean.requires_grad_(), index, kind, RADIUS, KEY).requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------

X, N = torch.zeros(3, 2, 5), torch.arange(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, N, "linf", 0.1, 1), TypeError, r"clean must be a torch.Tensor, got NoneType"),
        ((X.long(), N, "linf", 0.1, 1), TypeError, r"clean must have dtype float32, .*, got torch.int64"),
        ((X[0, 0, 0], N, "linf", 0.1, 1), ValueError, r"clean must have shape \[N, ...\], .*, got a scalar"),
        ((X, [0, 1, 2], "linf", 0.1, 1), TypeError, r"index must be a torch.Tensor, got list"),
        ((X, N.int(), "linf", 0.1, 1), TypeError, r"index must have dtype torch.int64, got torch.int32"),
        ((X, N[:2], "linf", 0.1, 1), ValueError, r"index must have shape \[3\], one per row of clean, got \[2\]"),
        ((X, N[:, None], "linf", 0.1, 1), ValueError, r"index must have shape \[3\], .*, got \[3, 1\]"),
        ((X, N.to("meta"), "linf", 0.1, 1), ValueError, r"index must be on the device of clean, cpu, got meta"),
        ((X, N, "uniform", 0.1, 1), ValueError, r"kind must be one of 'linf', 'l2', 'gaussian', got 'uniform'"),
        ((X, N, "linf", -0.1, 1), ValueError, r"radius must be a finite number of at least 0, got -0.1"),
        ((X, N, "linf", INF, 1), ValueError, r"radius must be a finite number of at least 0, got inf"),
        ((X, N, "linf", "0.1", 1), TypeError, r"radius must be a Python number, got str"),
        ((X, N, "linf", 0.1, 1.0), TypeError, r"key must be an int, got float"),
        ((X, N, "linf", 0.1, -1), ValueError, r"key must lie in \[0, 2\*\*63\), got -1"),
        ((X, N, "linf", 0.1, 2**63), ValueError, r"key must lie in \[0, 2\*\*63\), got 9223372036854775808"),
        ((X, N, "linf", 0.1, 1, 1, 0), ValueError, r"lower must not exceed upper, got 1 and 0"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        random_start(*arguments)


@each_dtype
def test_linf_start_has_the_same_bits_everywhere(dtype):
    """Those of the twin, which the CUDA kernel has too: no instruction set contracts the product and the sum."""
    clean, index = make((5, 3, 5, 7), dtype)
    expected = reference.random_start(clean, index, "linf", RADIUS, 0.0, 1.0, KEY)
    assert_same_bits(random_start(clean, index, "linf", RADIUS, KEY), expected)
