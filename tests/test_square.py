"""Square: what it proposes and keeps, what it may ask, and that it finds what the official code finds."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast.attacks import Square
from dtrades_fast.attacks.square import bump
from dtrades_fast.attacks.survivors import COMPACT_EVERY

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 12, 16
ATTACKS = {
    "linf": Square(0.06, 90),
    "l2": Square(0.6, 90, norm="l2"),
    "linf restarts": Square(0.04, 30, restarts=3),
    "l2 restarts": Square(0.4, 30, norm="l2", restarts=2),
    "small squares": Square(0.06, 40, p_init=0.05),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 7, 4))
    return nn.Sequential(*layers).eval()


def batch(model: nn.Module, count: int = 20) -> tuple[Tensor, Tensor]:
    """Images and the labels that the model gives them."""
    images = torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the label's."""
    target = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(target, -math.inf).amax(1) - logits[target]


class Recorder(nn.Module):
    """Keeps what the model is shown and whether it was fooled by it."""

    def __init__(self, model: nn.Module, labels: Tensor | None = None):
        super().__init__()
        self.model, self.labels = model, labels
        self.shown: list[Tensor] = []
        self.fooled: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.shown.append(images.clone())
        logits = self.model(images)
        if self.labels is not None:
            self.fooled.append(logits.argmax(1) != self.labels)
        return logits


@each_attack
def test_inside_ball_and_box_and_batch_independent(attack: Square) -> None:
    model = network().double()
    images, labels = batch(network())
    images, index = images.double(), torch.arange(50, 70)
    random = torch.get_rng_state()
    adv, queries = attack.search(model, images, labels, index, 3)
    assert torch.equal(torch.get_rng_state(), random)
    assert adv.min() >= 0
    assert adv.max() <= 1
    delta = (adv - images).flatten(1)
    size = delta.norm(dim=1) if attack.norm == "l2" else delta.abs().amax(1)
    assert size.max() <= attack.epsilon * (1 + 1e-9)
    assert size.min() > 0.9 * attack.epsilon
    fooled = model(adv).argmax(1) != labels
    assert 0 < fooled.sum() < 20
    for step in (1, 7):
        parts = [
            attack.search(model, images[i : i + step], labels[i : i + step], index[i : i + step], 3)
            for i in range(0, len(images), step)
        ]
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), adv, rtol=0, atol=1e-9)
        assert torch.cat([spent for _, spent in parts]).equal(queries)


@each_norm
def test_memory_format_is_kept_and_does_not_matter(norm: str) -> None:
    model = network().double()
    images, labels = batch(network())
    images = images.double()
    attack = Square(0.05 if norm == "linf" else 0.5, 60, norm=norm)  # type: ignore[arg-type]
    last = Recorder(model)
    adv = attack(last, images.contiguous(memory_format=torch.channels_last), labels, key=3)
    assert all(shown.is_contiguous(memory_format=torch.channels_last) for shown in last.shown)
    torch.testing.assert_close(adv, attack(model, images, labels, key=3), rtol=0, atol=1e-9)


@each_norm
def test_the_ball_holds_in_single_precision(norm: str) -> None:
    """Proposals are written over each other thousands of times, and their rounding must not add up."""
    epsilon = 0.05 if norm == "linf" else 0.5
    images = torch.rand(4, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    target = torch.rand(3 * HEIGHT * WIDTH, generator=torch.Generator().manual_seed(3))

    def always_right(x: Tensor) -> Tensor:  # with a margin that nearly every other proposal raises
        score = (x.flatten(1) - target).square().mean(1)
        return torch.stack((100 - score, score), 1)

    labels = torch.zeros(4, dtype=torch.int64)
    adv = Square(epsilon, 1500, norm=norm)(always_right, images, labels)  # type: ignore[arg-type]
    delta = (adv - images).flatten(1).double()
    size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert size.max() <= epsilon * (1 + 2e-6)
    assert adv.min() >= 0
    assert adv.max() <= 1


def test_key_and_index_matter_and_nothing_else() -> None:
    model = network()
    images, labels = batch(model)
    attack = Square(0.01, 1)
    first = attack(model, images, labels, key=1)
    torch.manual_seed(99)
    assert torch.equal(attack(model, images, labels, key=1), first)
    assert not torch.equal(attack(model, images, labels, key=2), first)
    assert not torch.equal(attack(model, images, labels, key=1, index=torch.arange(1, 21)), first)


def test_linf_starts_at_stripes() -> None:
    model = network()
    images, labels = batch(model)
    images = 0.2 + 0.6 * images  # so that nothing is clipped
    delta = Square(0.05, 1)(model, images, labels) - images
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.05))
    signs = delta.sign()
    assert (signs == signs[:, :, :1]).all()  # along a column
    stripes = signs[:, :, 0].flatten()
    assert abs(stripes.mean()) < 4 / len(stripes) ** 0.5
    assert len(signs[:, :, 0].flatten(1).unique(dim=0)) == len(images)


def test_linf_proposes_one_square_per_sample_and_keeps_what_helps() -> None:
    model = network()
    images, labels = batch(model)
    images, epsilon = 0.2 + 0.6 * images, 0.002
    labels = model(images).argmax(1)
    sure = margin(model(images), labels).argsort()[:10]
    images, labels = images[sure], labels[sure]
    spy, attack = Recorder(model, labels), Square(epsilon, 40)
    attack(spy, images, labels)
    assert not torch.stack(spy.fooled).any()

    best, kept = spy.shown[0], 0
    for proposal, shown in enumerate(spy.shown[1:]):
        torch.testing.assert_close((shown - images).abs(), torch.full_like(shown, epsilon))
        side = attack.side(proposal, shown.shape)
        for change, perturbation in zip(shown - best, shown - images, strict=True):
            where = change.abs().amax(0) > epsilon / 2
            if where.any():
                rows, columns = where.nonzero().unbind(1)
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side
                for channel, moved in zip(perturbation, change.abs() > epsilon / 2, strict=True):
                    assert len(channel[moved].sign().unique()) <= 1
        better = margin(model(shown), labels) > margin(model(best), labels)
        kept += int(better.sum())
        best = torch.where(better[:, None, None, None], shown, best)
    assert kept > 20
    assert torch.equal(attack(model, images, labels), best)


def test_l2_is_the_published_loop() -> None:
    """Against algorithm 3 of the paper on whole images, one sample at a time, with the same random numbers."""
    model, epsilon, key = network().double(), 0.05, 7
    images, labels = batch(network(), 3)
    images = images.double()
    attack = Square(epsilon, 41, norm="l2")
    taken = 0
    for i in range(3):
        x, y, index = images[i : i + 1], labels[i : i + 1], torch.tensor([i])
        spy = Recorder(model, y)
        attack(spy, x, y, index=index, key=key)
        assert not torch.cat(spy.fooled).any()
        numbers = attack._numbers(index, 50 * 8, key, 1).view(50, 8).double()
        best = spy.shown[0]
        for proposal, shown in enumerate(spy.shown[1:]):
            expected = l2_proposal(x, best, epsilon, attack.side(proposal, x.shape), numbers[proposal])
            torch.testing.assert_close(shown, expected, rtol=0, atol=1e-9)
            if margin(model(shown), y) > margin(model(best), y):
                best, taken = shown, taken + 1
    assert taken > 10


def l2_proposal(x: Tensor, best: Tensor, epsilon: float, side: int, numbers: Tensor) -> Tensor:
    delta = (best - x)[0]
    top, left, source_top, source_left = (
        int(number * (size - side)) for number, size in zip(numbers[:4], (HEIGHT, WIDTH) * 2, strict=True)
    )
    to = (slice(None), slice(top, top + side), slice(left, left + side))
    source = (slice(None), slice(source_top, source_top + side), slice(source_left, source_left + side))
    either = torch.zeros_like(delta, dtype=torch.bool)
    either[to] = either[source] = True
    budget = ((epsilon**2 - delta.norm() ** 2).clamp(min=0) / 3 + (delta * either).square().sum((1, 2))).sqrt()
    signs = 1 - 2 * (numbers[4:7] < 0.5).double()
    new = signs[:, None, None] * bump(side)[int(numbers[7] < 0.5)]
    new += delta[to] / delta[to].flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)
    new *= (budget / new.flatten(1).norm(dim=1))[:, None, None]
    delta[source] = 0
    delta[to] = new
    return (x + epsilon * delta / delta.norm()).clamp(0, 1)


def test_l2_starts_at_tiles_of_bumps() -> None:
    """Each tile has the same length, and differs from the next by sign or by the way that it lies."""
    model = network()
    images = torch.full((5, 3, HEIGHT, WIDTH), 0.5)
    delta = Square(0.3, 1, norm="l2")(model, images, model(images).argmax(1)) - images
    tiles = delta.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).double()  # [n, C, 6, 8, 4], of 2 x 2 pixels
    lengths = tiles.norm(dim=4)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3 / (3 * 6 * 8) ** 0.5), rtol=1e-5, atol=0)
    shapes = (tiles / lengths[..., None]).flatten(0, 3).mul(1e3).round().unique(dim=0)
    assert len(shapes) == 4
    by_channel = tiles.abs().mul(1e4).round()
    assert (by_channel == by_channel[:, :1]).all()  # channels lie the same way and differ by their signs
    assert len(tiles.sign().flatten(1).unique(dim=0)) == 5


class EverBetter(nn.Module):
    """Is never fooled and finds each proposal better than the one before it."""

    shown = 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += 1
        margin = images.new_full((len(images), 1), 1e-5 * self.shown)
        return torch.cat((1 - margin, margin), 1)


def test_l2_keeps_its_length() -> None:
    """Of what each proposal may use, only the box takes a part, and the next one gets that back."""
    epsilon, labels = 0.5, torch.zeros(4, dtype=torch.int64)  # next to a power of 2 rounding adds up in one direction
    images = torch.full((4, 1, 10, 10), 0.5)
    adv = Square(epsilon, 3000, norm="l2")(EverBetter(), images, labels)
    length = (adv - images).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, epsilon), rtol=2e-6, atol=0)
    images = torch.full((4, 1, 18, 18), 0.5)
    images[..., :9] = 0  # where the box takes half of it
    spy = Recorder(EverBetter())
    Square(epsilon, 600, norm="l2")(spy, images, labels)
    shares = torch.stack([(shown - images).flatten(1).norm(dim=1) / epsilon for shown in spy.shown])
    assert shares[0].max() < 0.9
    assert shares.max() < 1 + 2e-6
    assert (shares[300:] > 1 - 1e-5).float().mean() > 0.2


def test_bump_is_the_published_one() -> None:
    """The sums of squares around the two middles, one by one (Andriushchenko et al. 2020, section 3.3)."""
    for side in (1, 3, 5, 8, 13):
        pattern = torch.zeros(side, side, dtype=torch.float64)
        half = side // 2
        for begin, height, sign in ((0, half, 1.0), (half, side - half, -1.0)):
            hill = torch.zeros(height, side, dtype=torch.float64)
            for reach in range(max(height, side) // 2 + 1):
                for row in range(height):
                    for column in range(side):
                        if abs(row - height // 2) <= reach and abs(column - side // 2) <= reach:
                            hill[row, column] += 1 / (reach + 1) ** 2
            if height:
                pattern[begin : begin + height] = sign * hill / hill.norm()
        pattern /= pattern.norm()
        torch.testing.assert_close(bump(side), torch.stack((pattern, pattern.T)))


def test_schedule_is_the_published_one_whatever_the_budget() -> None:
    """Shares .8, .4, ... after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals."""
    for queries in (100, 10_000):
        attack = Square(0.1, queries)
        sides = [attack.side(i, (3, 32, 32)) for i in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
        assert sides == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    l2 = Square(0.1, norm="l2")
    assert [l2.side(i, (3, 28, 28)) for i in (0, 11, 51, 201, 501, 8001)] == [25, 19, 13, 9, 7, 3]
    assert [Square(0.1, p_init=1.0, norm=norm).side(0, (1, 8, 30)) for norm in ("linf", "l2")] == [8, 8]  # type: ignore[arg-type]


@each_norm
def test_queries_are_those_until_the_model_was_fooled(norm: str) -> None:
    model = network()
    images, labels = batch(model)
    attack = Square(0.06 if norm == "linf" else 0.6, 73, norm=norm)  # type: ignore[arg-type]
    together = Recorder(model)
    adv, queries = attack.search(together, images, labels, torch.arange(20), 3)
    fell = []
    for i in range(len(images)):
        alone = Recorder(model, labels[i : i + 1])
        attack(alone, images[i : i + 1], labels[i : i + 1], index=torch.tensor([i]), key=3)
        fooled = torch.cat(alone.fooled).tolist()
        fell.append(fooled.index(True) + 1 if any(fooled) else attack.queries)
        assert (model(adv[i : i + 1]).argmax(1) != labels[i]).item() == any(fooled)
    assert queries.tolist() == fell
    assert max(fell) == attack.queries
    assert len(set(fell)) > 3
    # those that fell leave at the next look, so that no more is asked than that
    paid = [min(COMPACT_EVERY * math.ceil(count / COMPACT_EVERY), attack.queries) for count in fell]
    assert sum(map(len, together.shown)) == sum(paid)


def test_more_queries_and_restarts_are_never_weaker() -> None:
    model = network()
    images, labels = batch(model, 40)
    index = torch.arange(40)
    few, many, again = (
        attack.search(model, images, labels, index, 3)
        for attack in (Square(0.04, 20), Square(0.04, 120), Square(0.04, 20, restarts=3))
    )
    broken, later, restarted = (model(adv).argmax(1) != labels for adv, _ in (few, many, again))
    assert 0 < broken.sum() < later.sum()
    assert broken.sum() < restarted.sum()
    for adv, queries, flags in ((*many, later), (*again, restarted)):
        assert not (broken & ~flags).any()
        assert queries[broken].equal(few[1][broken])
        assert adv[broken].equal(few[0][broken])
    assert (many[1][~later] == 120).all()
    assert (again[1][~restarted] == 60).all()
    assert ((again[1] > 20) & (again[1] <= 60))[restarted & ~broken].all()


def test_restarts_are_its_parts() -> None:
    model = network()
    images, labels = batch(model)
    attack = Square(0.04, 20, restarts=2)
    first, second = attack.parts()
    adv = first(model, images, labels, key=3)
    stands = model(adv).argmax(1) == labels
    adv[stands] = second(model, images[stands], labels[stands], index=torch.arange(20)[stands], key=3)
    assert adv.equal(attack(model, images, labels, key=3))


def test_needs_no_gradients() -> None:
    """A network that hides its gradients behind rounding falls all the same."""
    model = network()
    images, _ = batch(model)

    def steps(x: Tensor) -> Tensor:
        return model((8 * x).round() / 8)

    labels = steps(images).argmax(1)
    assert (steps(Square(0.2, 100)(steps, images, labels)).argmax(1) != labels).float().mean() > 0.9


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of four colour patterns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    patterns = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    clean = F.interpolate(patterns, size=(16, 16), mode="bilinear")[labels]
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return (0.25 + 0.5 * clean + 0.15 * noise).clamp(0, 1), labels


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stages = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*stages, nn.Linear(256, 4))
    images, labels = drawn(256, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 3.0)])
def test_finds_what_the_official_code_finds(norm: str, epsilon: float) -> None:
    """After the same queries; its squares are the same for all samples."""
    official = pytest.importorskip("pyautoattack.square").SquareAttack
    queries, fooled, points = 150, {"ours": 0, "official": 0}, 0
    for seed in (2, 3):
        model, (images, labels) = trained(seed), drawn(64, 100 + seed)
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        images, labels = images[right], labels[right]
        points += len(images)
        options = {"norm": "Linf" if norm == "linf" else "L2", "n_queries": queries - 1, "resc_schedule": False}
        theirs = official(model, eps=epsilon, seed=seed, device="cpu", **options)
        for name, adv in (
            ("ours", Square(epsilon, queries, norm=norm)(model, images, labels, key=seed)),  # type: ignore[arg-type]
            ("official", theirs.perturb(images, labels)),
        ):
            with torch.no_grad():
                fooled[name] += int((model(adv).argmax(1) != labels).sum())
    assert points > 110
    assert 0.4 * points < fooled["official"] < 0.97 * points
    assert -0.04 * points < fooled["ours"] - fooled["official"] < 0.12 * points


def test_refusals() -> None:
    for wrong in (
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"epsilon": 0.1, "queries": 0},
        {"epsilon": 0.1, "restarts": 0},
        {"epsilon": 0.1, "p_init": 0.0},
        {"epsilon": 0.1, "p_init": 1.5},
        {"epsilon": 0.1, "norm": "l1"},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            Square(**wrong)  # type: ignore[arg-type]
