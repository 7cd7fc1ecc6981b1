"""The evaluation engine: only true breaks count, nothing is done twice, batches and interruptions change nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import small_nets
import torch
from test_apgd import ten_class_network
from torch import Tensor, nn

from dtrades_fast.attacks import APGD, FGSM, PGD, Square
from dtrades_fast.attacks.base import Attack, Model
from dtrades_fast.attacks.fmn import FMN
from dtrades_fast.attacks.survivors import Survivors
from dtrades_fast.data import ImageSet
from dtrades_fast.evaluation import metrics
from dtrades_fast.evaluation.engine import Cost, Counted, Engine, Progress, allowed, claims

pytestmark = pytest.mark.usefixtures("one_thread")


def image_set(model: nn.Module, count: int = 40) -> ImageSet:
    """Random images, of which the first four are labelled wrongly."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))
    labels = model(pixels.float() / 255).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10
    return ImageSet(pixels, labels, torch.arange(100, 100 + count))


def engine(model: nn.Module, images: ImageSet, progress: Progress | None = None, batch_size: int = 16) -> Engine:
    return Engine(model, images, key=7, batch_size=batch_size, progress=progress)


def test_flags_are_those_of_the_attack_itself() -> None:
    model = ten_class_network()
    images = image_set(model)
    run = engine(model, images)
    natural = run.natural()
    assert natural.tolist() == [False] * 4 + [True] * 36
    for attack in (FGSM(0.02), PGD(0.02, 5), PGD(0.5, 5, norm="l2"), APGD(0.02, 20)):
        got = run.attack(str(attack), attack, natural)
        expected = natural & metrics.correct(model, images, attack, 7, 40)
        assert got.standing.tolist() == expected.tolist()
        assert got.refuted <= 1  # a margin of 0 within rounding
        assert 0 < int(got.standing.sum()) < 36


def test_costs_are_counted() -> None:
    model = ten_class_network()
    images = image_set(model)
    run = engine(model, images)
    natural = run.natural()
    cost = run.attack("pgd", PGD(0.02, 5), natural).cost
    # five steps, and one look at the result by the search's network and one by the network itself
    again = run.cost("pgd/0/again")  # of a margin of 0 within rounding
    assert (cost.forwards - again.forwards, cost.backwards - again.backwards) == (36 * 7, 36 * 5)
    assert again.forwards in (0, 6)
    assert cost.seconds > 0


@dataclass(frozen=True)
class Returns(Attack):
    """What it is given, as an attack."""

    change: float
    epsilon: float = 0.1
    norm: str = "linf"

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        return images + self.change


class Threshold(nn.Module):
    """Class 0 where the first pixel is below a half, else class 1."""

    def forward(self, images: Tensor) -> Tensor:
        first = images[:, 0, 0, 0]
        return torch.stack((0.5 - first, first - 0.5), 1)


def test_only_images_in_ball_and_box_count() -> None:
    pixels = torch.full((3, 1, 2, 2), 120, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    run = engine(Threshold(), images)
    natural = run.natural()
    assert natural.all()
    assert not run.attack("inside", Returns(0.05), natural).standing.any()
    for name, change in (("ball", 0.2), ("box", 0.7), ("nan", float("nan"))):
        assert run.attack(name, Returns(change), natural).standing.all()
    # float32 rounding of the ball's edge is no escape
    assert not run.attack("edge", Returns(0.05, 0.05 - 1e-8), natural).standing.any()
    x = images.images(slice(None))
    assert not allowed(x + 0.1, x, 0.15, "l2").any()  # 4 pixels: length 0.2
    assert allowed(x + 0.1, x, 0.21, "l2").all()


class Nervous(nn.Module):
    """Sees class 1 a little too early."""

    def forward(self, images: Tensor) -> Tensor:
        return Threshold()(images + 0.04)


@dataclass(frozen=True)
class Steps(Attack):
    """Brightens the images until the model is fooled, and no further."""

    epsilon: float = 0.1
    norm: str = "linf"

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        adv = images.clone()
        for _ in range(9):
            adv[model(adv).argmax(1) == labels] += 0.01
        return adv


def test_claims_of_another_network_are_refuted_and_searched_again() -> None:
    """The search's network is fooled, the network itself is not."""
    pixels = torch.full((3, 1, 2, 2), 120, dtype=torch.uint8)
    run = engine(Threshold(), ImageSet(pixels, torch.zeros(3, dtype=torch.int64), torch.arange(3)))
    natural = run.natural()
    run.search = Counted(Nervous())
    got = run.attack("claim", Returns(0.01), natural)
    assert got.standing.all()
    assert got.refuted == 3
    got = run.attack("steps", Steps(), natural)
    assert not got.standing.any()  # on the network itself it takes more steps
    assert got.refuted == 3
    assert run.attack("far", Steps(0.001), natural).standing.all()


@pytest.mark.parametrize("nothing", [False, True], ids=["early", "nan"])
def test_smallest_perturbations_are_those_of_the_network_itself(nothing: bool) -> None:
    """Whatever is searched: a form of the network that sees class 1 too early, or one that gives no numbers."""

    class Form(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return Smooth()(images + (float("nan") if nothing else 0.03))

    def smallest(model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        adv = FMN("linf")(model, images, labels, index=ids)
        return adv, (adv - images).flatten(1).abs().amax(1)

    pixels = torch.full((5, 1, 2, 2), 102, dtype=torch.uint8)
    run = engine(Smooth(), ImageSet(pixels, torch.zeros(5, dtype=torch.int64), torch.arange(5)), batch_size=2)
    every = torch.ones(5, dtype=torch.bool)
    direct, refuted = run.find("direct", smallest, every)
    assert not refuted.any()
    run.search = Counted(Form())
    batches = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(len(images))
        return smallest(model, images, labels, ids)

    by_form, refuted = run.find("form", watched, every)
    assert (direct < 0.12).all()
    assert by_form.equal(direct)
    assert refuted.all()
    assert batches == [2, 2, 1, 2, 2, 1]  # first all of them, then what was refuted in batches that are full again
    assert run.cost("form").forwards > run.cost("direct").forwards


def test_a_claim_that_another_batch_rounds_away_is_one() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[9.0, 8.9999], [9.0, 8.9], [float("nan"), 1.0], [5.0, 3.0]])
    assert claims(logits, labels).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "attack", [PGD(0.1, 10, stop_early=True), APGD(0.1, 10), Square(0.1, 60)], ids=lambda a: type(a).__name__
)
def test_searches_go_on_until_a_claim_holds(attack: Attack) -> None:
    """On a form of a network that is fooled too early, attacks find what fools the network itself."""

    class Form(nn.Module):
        itself = staticmethod(Smooth())
        early = Smooth(0.09)

        def forward(self, images: Tensor) -> Tensor:
            return self.early(images)

    class Alone(Form):
        itself = None  # type: ignore[assignment]

    x, labels = torch.full((8, 1, 4, 4), 0.42), torch.zeros(8, dtype=torch.int64)
    found, early = attack(Form(), x, labels), attack(Alone(), x, labels)
    assert (Smooth()(found).argmax(1) != labels).all()
    assert (Form()(early).argmax(1) != labels).all()
    assert not (Smooth()(early).argmax(1) != labels).all()


class Smooth(nn.Module):
    """Class 0 where the mean of the pixels is below a half or less, else class 1; class 2 never."""

    def __init__(self, early: float = 0.0):
        super().__init__()
        self.early = early

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1) + self.early
        return torch.stack((0.5 - mean, mean - 0.5, torch.full_like(mean, -9.0)), 1)


@dataclass(frozen=True)
class Breaks(Attack):
    """Fools the model on samples by their index; of several parts, and counts what it is shown."""

    wanted: tuple[int, ...]
    shown: list[int]
    fail_after: int = 10**9
    epsilon: float = 1.0
    norm: str = "linf"

    def parts(self) -> Sequence[Attack]:
        return [Breaks((i,), self.shown, self.fail_after) for i in self.wanted] if len(self.wanted) > 1 else (self,)

    def perturb(self, model: Model, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
        if len(self.shown) >= self.fail_after:
            raise KeyboardInterrupt
        self.shown.extend(index.tolist())
        broken = torch.isin(index, torch.tensor(self.wanted))
        return torch.where(broken[:, None, None, None], torch.ones_like(images), images)


def test_parts_see_what_still_stands_in_full_batches() -> None:
    pixels = torch.full((10, 1, 2, 2), 120, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(10, dtype=torch.int64), torch.arange(10))
    shown: list[int] = []
    run = engine(Threshold(), images, batch_size=4)
    got = run.attack("breaks", Breaks((3, 0, 9), shown), run.natural())
    assert got.stages == (9, 8, 7)
    assert got.standing.nonzero().squeeze(1).tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert shown == [*range(10), 0, 1, 2, *range(4, 10), 1, 2, *range(4, 10)]


def test_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrades_fast.evaluation.engine.SAVE_SECONDS", 0.0)
    pixels = torch.full((10, 1, 2, 2), 120, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(10, dtype=torch.int64), torch.arange(10))
    folder, wanted = tmp_path / "state", (3, 0, 9)

    def session(shown: list[int], fail_after: int, resume: bool = True) -> tuple[list[bool], tuple[int, ...]]:
        run = engine(Threshold(), images, Progress(folder, {"weights": "a"}, resume=resume), batch_size=4)
        got = run.attack("breaks", Breaks(wanted, shown, fail_after), run.natural())
        return got.standing.tolist(), got.stages

    whole: list[int] = []
    expected = session(whole, 10**9, resume=False)
    for fail_after in (1, 4, 10, 13, 20):
        shutil.rmtree(folder)
        first: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            session(first, fail_after)
        second: list[int] = []
        assert session(second, 10**9) == expected
        assert first + second == whole
    assert session([], 0) == expected  # all is done
    with pytest.raises(ValueError, match="belongs to another evaluation \\(weights: a, now b\\)"):
        Progress(folder, {"weights": "b"}, resume=True)
    Progress(folder, {"weights": "a"}, resume=True).finish()
    assert not folder.exists()
    session([], 10**9, resume=False)
    with pytest.raises(ValueError, match="unfinished evaluation: --resume goes on with it, --overwrite starts again"):
        session([], 0, resume=False)
    other = Progress(folder, {"weights": "b"}, overwrite=True)
    assert session([], 0) == expected  # nothing is lost before it begins
    other.begin()
    assert other.values == {}
    with pytest.raises(ValueError, match="belongs to another evaluation \\(weights: b, now a\\)"):
        session([], 0)
    (folder / "notes.txt").write_text("not ours")
    other.finish()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "0.pt").write_bytes(b"cut")
    with pytest.raises(RuntimeError, match="damaged"):
        Progress(folder, {"weights": "a"}, resume=True)


def test_batch_size_does_not_matter() -> None:
    model = ten_class_network()
    images = image_set(model)
    flags = []
    for batch_size in (3, 16, 64):
        run = engine(model, images, batch_size=batch_size)
        flags.append(run.attack("apgd", APGD(0.02, 20, loss="dlr", targets=3), run.natural()).standing.tolist())
    assert flags[0] == flags[1] == flags[2]


def test_low_precision_is_checked_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search in bfloat16 claims wrongly is searched on, so that the points that still stand do so in full."""
    model = small_nets.network("robust")
    images = small_nets.digits()[1].subset(torch.arange(96))
    attacks = (APGD(small_nets.EPSILON, 30), APGD(small_nets.EPSILON, 30, loss="dlr"))
    standing, refuted = {}, 0
    wrong_claims: list[int] = []
    forget = Survivors._forget

    def counting(self: Survivors) -> None:
        before = int(self.found.sum())
        forget(self)
        wrong_claims.append(before - int(self.found.sum()))

    monkeypatch.setattr(Survivors, "_forget", counting)
    for precision in ("fp32", "bf16"):
        run = Engine(model, images, key=7, batch_size=32, precision=precision)  # type: ignore[arg-type]
        natural = run.natural()
        for attack in attacks:
            got = run.attack(str(attack), attack, natural)
            standing[precision, attack], refuted = got.standing, refuted + got.refuted
    assert run.how.endswith(", bf16")
    assert run.search.network.network.dtype == torch.bfloat16  # type: ignore[union-attr]
    dtypes = {type(m): next(m.parameters()).dtype for m in run.search.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert dtypes == {nn.Conv2d: torch.bfloat16, nn.Linear: torch.float32}  # and the logits are not rounded
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert sum(wrong_claims) > 0  # or this shows nothing
    assert refuted < sum(wrong_claims)
    for attack in attacks:
        assert int((standing["bf16", attack] & ~standing["fp32", attack]).sum()) <= 2  # as with another seed


def test_costs_of_several_processes_are_counted_once(tmp_path: Path) -> None:
    """Files of two processes, of which the first wrote after they had told each other, the second before."""
    pixels = torch.full((4, 1, 2, 2), 120, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    whole = Progress(tmp_path / "one", {})
    engine(Threshold(), images, whole, batch_size=2).natural()
    for rank, rows in enumerate(([0, 1], [2, 3])):
        part = Progress(None, {})
        part.folder, part.rank = tmp_path / "two", rank
        part.folder.mkdir(exist_ok=True)
        part.of("clean", 4)
        part.done("clean", torch.tensor(rows), torch.ones(2), Cost(1.0, 2, 0))
        part.save()
    again = Progress(tmp_path / "two", {}, resume=True)
    run = engine(Threshold(), images, again, batch_size=2)
    assert run.natural().all()
    assert (run.cost("clean").forwards, run.cost("clean").seconds) == (whole.cost("clean").forwards, 2.0) == (4, 2.0)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["0.pt"]


def test_what_is_made_once_is_the_same_after_a_kill(tmp_path: Path) -> None:
    numbers = iter(range(9))

    def make() -> dict[str, int]:
        return {"number": next(numbers)}

    assert Progress(None, {}).once("thing", make) == {"number": 0}
    assert Progress(tmp_path / "state", {}).once("thing", make) == {"number": 1}
    assert Progress(tmp_path / "state", {}, resume=True).once("thing", make) == {"number": 1}
    fresh = Progress(tmp_path / "state", {}, overwrite=True)
    assert fresh.once("thing", make) == {"number": 2}
    fresh.finish()
    assert not (tmp_path / "state").exists()


class Overflows(nn.Module):
    """The brightest pixel, through activations that float16 cannot hold above 0.65: all logits are NaN then."""

    def forward(self, images: Tensor) -> Tensor:
        first = images[:, 0, :2, :2].flatten(1) * torch.ones(4, dtype=images.dtype)
        huge = 2 * torch.nn.functional.linear(first, 5e4 * torch.eye(4))
        small = 1e-5 * (huge - huge.mean(1, keepdim=True))
        return small - small.mean(1, keepdim=True)


def test_overflow_in_half_precision_is_no_robustness() -> None:
    """Logits that are NaN say nothing, whatever the label; where images overflow from the start, fp32 searches."""
    dark = torch.from_numpy(np.random.default_rng(0).integers(60, 160, (24, 1, 4, 4), dtype=np.uint8))
    bright = dark + 80
    for pixels, how in ((dark, ", fp16"), (bright, "fp32 since fp16 overflows")):
        model = Overflows().eval()
        images = ImageSet(pixels, model(pixels.float() / 255).argmax(1), torch.arange(24))
        attack, stands = PGD(0.08, 10, stop_early=True), {}
        for precision in ("fp32", "fp16"):
            run = Engine(model, images, key=7, batch_size=24, precision=precision)  # type: ignore[arg-type]
            stands[precision] = run.attack("pgd", attack, run.natural()).standing
        assert run.how.endswith(how)
        assert 0 < int(stands["fp32"].sum()) < 24
        assert stands["fp16"].tolist() == stands["fp32"].tolist()
