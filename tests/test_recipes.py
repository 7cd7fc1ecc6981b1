"""The recipes and presets that come along: the published numbers, what they make, and how they are listed."""

from __future__ import annotations

import functools
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import yaml

from dtrades_fast import cli, config, defenses, models, recipes
from dtrades_fast.config import parse
from dtrades_fast.pixels import pixels
from dtrades_fast.training.schedules import create_optimizer, create_schedule

RECIPES, PRESETS = config.profiles("recipe"), config.profiles("preset")
CHANNELS_AND_SIZE = {"cifar10": (3, 32), "mnist": (1, 28)}

#: What the sources publish. Where a combination is the project's own, its parts are published.
ATTACK_AND_SCHEDULE = {
    # network, epsilon, step size, steps, epochs, batch, optimizer, lr, weight decay, epochs of each drop
    "at-cifar10": ("resnet18", 8 / 255, 2 / 255, 10, 200, 128, "sgd", 0.1, 5e-4, (100, 150)),
    "at-mnist": ("smallcnn", 0.3, 0.01, 40, 85, 50, "adam", 1e-4, 0, ()),
    "dtrades-cifar10": ("resnet18", 0.031, 0.007, 10, 76, 128, "sgd", 0.1, 2e-4, (74,)),
    "dtrades-mnist": ("smallcnn", 0.3, 0.01, 40, 100, 128, "sgd", 0.01, 0, (54, 74, 89)),
    "faal-cifar10": ("preactresnet18", 8 / 255, 2 / 255, 10, 2, 128, "sgd", 0.01, 5e-4, (1,)),
    "faal-mnist": ("smallcnn", 0.3, 0.01, 40, 2, 128, "sgd", 0.01, 0, (1,)),
    "mart-cifar10": ("resnet18", 0.031, 0.007, 10, 120, 128, "sgd", 0.01, 3.5e-3, (74, 89, 99)),
    "mart-mnist": ("smallcnn", 0.3, 0.01, 40, 100, 128, "sgd", 0.01, 0, (54, 74, 89)),
    "trades-cifar10": ("wrn34_10", 0.031, 0.007, 10, 76, 128, "sgd", 0.1, 2e-4, (74,)),
    "trades-mnist": ("smallcnn", 0.3, 0.01, 40, 100, 128, "sgd", 0.01, 0, (54, 74, 89)),
}
LOSS: dict[str, dict[str, Any]] = {
    "at-cifar10": {},
    "at-mnist": {},
    "dtrades-cifar10": {"lambda_mean": 6, "bn_mode": "clean_adv_clean"},
    "dtrades-mnist": {"lambda_mean": 1, "bn_mode": "clean_adv_clean"},
    "faal-cifar10": {"base_loss": "at", "radius": 0.5, "margin": "count", "absent_class": "official"},
    "faal-mnist": {"base_loss": "at", "radius": 0.5, "margin": "count", "absent_class": "official"},
    "mart-cifar10": {"beta": 5, "clamps": "published", "bn_mode": "clean_adv"},
    "mart-mnist": {"beta": 5, "clamps": "published", "bn_mode": "clean_adv"},
    "trades-cifar10": {"beta": 6, "bn_mode": "clean_adv_clean"},
    "trades-mnist": {"beta": 1, "bn_mode": "clean_adv_clean"},
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


@functools.cache
def recipe(name: str, *words: str) -> config.Config:
    """Nothing left open; the data set's own epsilon, which no recipe uses, is one that no recipe has."""
    return parse(["--recipe", name, *words]).resolved("0.999")


def test_every_method_has_a_recipe_for_both_data_sets() -> None:
    methods = [method for method in defenses.names() if method != "standard"]
    assert sorted(f"{method}-{data}" for method in methods for data in CHANNELS_AND_SIZE) == list(RECIPES)
    assert PRESETS == ("quick", "t4")


@each_recipe
def test_recipe_has_the_published_numbers(name: str) -> None:
    c = recipe(name)
    assert c.attack.epsilon is not None
    assert c.attack.step_size is not None
    o = c.optimization
    attack = (pixels(c.attack.epsilon), pixels(c.attack.step_size), c.attack.steps)
    optimization = (o.epochs, o.batch_size, o.optimizer, o.lr, o.weight_decay, o.milestones)
    assert (c.model.arch, *attack, *optimization) == ATTACK_AND_SCHEDULE[name]
    assert (c.attack.norm, c.attack.epsilon_ramp, o.momentum, o.gamma, o.precision) == ("linf", 0, 0.9, 0.1, "fp32")
    assert (o.nesterov, o.ema, o.clip_norm, c.model.width) == (False, None, None, None)
    assert f"{c.defense.method}-{c.data.dataset}" == name
    assert LOSS[name].items() <= c.method_options.items()
    digits = c.data.dataset == "mnist"
    assert c.data.augmentation == ("none" if digits else "dataset")
    normalized = not digits and c.defense.method in ("at", "faal")
    assert c.model.normalization == ("dataset" if normalized else "none")


@each_recipe
def test_recipe_makes_its_defense_and_its_network(name: str) -> None:
    c = recipe(name)
    defense = c.make_defense()
    assert defense.name == c.defense.method
    assert defense.threat == c.threat()
    assert {option: getattr(defense, option) for option in LOSS[name]} == LOSS[name]
    channels, size = CHANNELS_AND_SIZE[c.data.dataset]
    shape = {"in_channels": channels, "image_size": size, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    with torch.device("meta"):
        model = models.create(c.model.arch, num_classes=10, width=c.model.width, **shape)  # type: ignore[arg-type]
        assert model.eval()(torch.empty(2, channels, size, size)).shape == (2, 10)


@each_recipe
def test_learning_rate_falls_after_the_epochs_named(name: str) -> None:
    """The published codes count epochs from 1 and drop at the beginning of one: "at 75" is after 74."""
    o, steps = recipe(name).optimization, 3
    optimizer = create_optimizer(o, [torch.nn.Parameter(torch.zeros(1))])
    schedule = create_schedule(o, optimizer, steps)
    rates = []  # of each epoch, which is the same throughout it
    for _ in range(o.epochs):
        within = set()
        for _ in range(steps):
            within.add(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        (rate,) = within
        rates.append(rate)
    drops = ATTACK_AND_SCHEDULE[name][-1]
    expected = [o.lr * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(o.epochs)]
    assert rates == pytest.approx(expected)


@each_recipe
def test_every_value_of_a_recipe_can_be_overridden(name: str) -> None:
    """The command line gives another value to each option of the file but the method."""
    written = yaml.safe_load(recipes.text(name))
    others: dict[str, tuple[Any, ...]] = {
        "dataset": ("cifar100",),
        "arch": ("vgg16",),
        "normalization": ("none", "dataset"),
        "augmentation": ("none", "dataset"),
        "epsilon": ("0.123",),
        "step_size": ("0.0123",),
        "optimizer": ("sgd", "adam"),
        "schedule": ("cosine",),
        "precision": ("bf16",),
        "bn_mode": ("concat",),
        "clamps": ("none",),
        "base_loss": ("mart",),
        "margin": ("mean",),
        "absent_class": ("mask",),
        "lambda_gradient": ("entropy",),
        "sensitivity_at": ("last_step",),
        "lambda_share": (0.25,),
        "milestones": ([2, 3],),
    }
    changes = {
        option: next(other for other in others.get(option, (3, 4)) if other != value)
        for option, value in written.items()
        if option != "method"
    }
    words = [word for option, value in changes.items() for word in config._words(option, value)]
    assert recipe(name, *words).stored() == {**recipe(name).stored(), **changes}


@each_recipe
def test_another_method_takes_over_all_but_the_methods_options(name: str) -> None:
    own, other = recipe(name), recipe(name, "--method", "standard")
    assert (other.defense.method, other.method_options) == ("standard", {})
    assert (other.attack, other.optimization, other.model) == (own.attack, own.optimization, own.model)


@each_recipe
def test_run_folder_records_the_resolved_recipe(name: str, tmp_path: Path) -> None:
    images = tiny_run.images(tmp_path / "images", per_class=3)
    words = ["--recipe", name, "--dataset", f"folder:{images}", "--arch", "smallcnn", "--width", "2", "--epochs", "1"]
    words += ["--steps", "1", "--validation-steps", "0", "--threads", "1", "--device", "cpu"]
    assert cli.main(["train", *words, "--runs-dir", str(tmp_path), "--run", "one"]) == 0
    written = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    given = {"dataset": f"folder:{images}", "arch": "smallcnn", "width": 2, "epochs": 1, "steps": 1}
    assert written == {**recipe(name, "--device", "cpu").stored(), **given, "validation_steps": 0, "threads": 1}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", defenses.names())
def test_preset_serves_every_method_and_leaves_the_data_open(name: str, method: str) -> None:
    c = parse(["--preset", name, "--method", method]).resolved("0.3")
    assert c.make_defense().name == method
    assert (c.data.dataset, c.attack.epsilon, c.model.arch) == (config.Data().dataset, "0.3", config.Model().arch)
    over = parse(["--recipe", "trades-mnist", "--preset", name, "--method", method]).resolved("0.999")
    assert (over.attack.epsilon, over.optimization.epochs) == ("0.3", c.optimization.epochs)


def test_t4_is_half_precision_at_full_width() -> None:
    c = parse(["--preset", "t4"])
    assert (c.optimization.precision, c.model.width, c.data.limit) == ("fp16", None, None)
    assert c.optimization.batch_size >= 128


def listed(*words: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        assert cli.main(["recipes", *words]) == 0
    return output.getvalue()


def test_listing_has_a_line_for_each() -> None:
    rows = {line.split()[0]: line for line in listed().splitlines() if line}
    for name in RECIPES:
        c = recipe(name)
        words = [c.defense.method, c.data.dataset, c.attack.epsilon, str(c.attack.steps), str(c.optimization.epochs)]
        assert rows[name].split()[1:7] == [*words, c.model.arch]
    for name in PRESETS:
        assert rows[name].split()[1:4] == ["-", "-", "-"]  # method, data and epsilon are left open
    for name in (*RECIPES, *PRESETS):
        first = recipes.text(name).splitlines()[0]
        assert rows[name].endswith(first.removeprefix("# "))
    assert max(map(len, rows.values())) < 200


@pytest.mark.parametrize("name", [*RECIPES, *PRESETS])
def test_one_is_printed_as_the_file_is_with_its_comments(name: str) -> None:
    printed = listed(name)
    assert printed == (config.RECIPES / f"{name}.yaml").read_text()
    assert printed.startswith("# ")
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_unknown_name_gets_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "trades"]) == 2
    message = capsys.readouterr().err
    assert "unknown recipe or preset 'trades'; recipes are at-cifar10, " in message
    assert "trades-mnist; presets are quick, t4" in message
