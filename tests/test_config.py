"""Options: where their values come from, how they are stored, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from dtrades_fast import config, defenses
from dtrades_fast.config import Config, parse


def test_defaults() -> None:
    c = parse([])
    assert (c.defense.method, c.model.arch, c.data.dataset, c.run.runs_dir) == (
        "dtrades",
        "resnet18",
        "mnist5k",
        "runs",
    )
    assert c.run_name == "mnist5k-resnet18-dtrades-seed0"
    assert c.attack.epsilon is None
    assert c.method_options == {}


def test_run_name_of_a_folder() -> None:
    assert parse(["--dataset", "folder:/a/b/tiles", "--seed", "3"]).run_name == "folder-tiles-resnet18-dtrades-seed3"


@pytest.mark.parametrize(("path", "name"), [("$TILES", "TILES"), ("~/my tiles", "my-tiles"), ("/a/b.v2/", "b.v2")])
def test_run_name_of_any_folder(path: str, name: str) -> None:
    assert parse(["--dataset", f"folder:{path}"]).run_name == f"folder-{name}-resnet18-dtrades-seed0"


def test_pixels_are_kept_as_written() -> None:
    c = parse(["--epsilon", "8/255", "--step-size", "2/255"])
    assert c.stored()["epsilon"] == "8/255"
    assert yaml.safe_load(c.to_yaml())["step_size"] == "2/255"
    assert c.threat().epsilon == 8 / 255
    assert c.threat().step_size == 2 / 255


def test_resolved_leaves_nothing_open() -> None:
    c = parse(["--method", "trades"]).resolved("0.3")
    assert c.attack.epsilon == "0.3"
    assert c.method_options == {"beta": 6.0, "bn_mode": "clean_adv"}
    assert c.run.device in ("cpu", "cuda")
    assert c.run.threads >= 1
    assert parse(["--epsilon", "0.1"]).resolved("0.3").attack.epsilon == "0.1"


COMMANDS = [
    [],
    ["--method", "trades", "--beta", "3", "--milestones", "5", "7", "--schedule", "step"],
    ["--recipe", "trades-mnist", "--preset", "quick"],
    ["--lambda-max", "40", "--nesterov", "--ema", "0.99", "--width", "8", "--init-weights", "some file.pt"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_stored_configuration_is_read_back(command: list[str], tmp_path: Path) -> None:
    c = parse(command).resolved("0.3")
    path = tmp_path / "config.yaml"
    path.write_text(c.to_yaml())
    assert config.load(path).stored() == c.stored()
    again = parse(["--recipe", str(path)]).resolved("8/255")
    assert again.stored() == c.stored()
    assert again.differences(c.stored()) == []


def test_stored_are_only_the_methods_own_options() -> None:
    stored = parse(["--method", "trades"]).resolved("0.3").stored()
    assert "beta" in stored
    assert not [name for name in stored if name.startswith("lambda")]
    assert not {"resume", "overwrite", "run", "runs_dir", "preset", "recipe"} & set(stored)


def test_differences_name_the_options() -> None:
    stored = parse([]).resolved("0.3").stored()
    other = parse(["--lr", "0.5", "--checkpoint-minutes", "1", "--data-root", "elsewhere"]).resolved("0.3")
    assert other.differences(stored) == ["lr: 0.5 here, 0.1 in the run"]


def test_precedence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: trades\nbeta: 2\nlr: 0.2\nepochs: 77\nbatch_size: 50\nnesterov: true\nwidth: null\n")
    preset = tmp_path / "preset.yaml"
    preset.write_text("epochs: 8\nbatch_size: 60\nnesterov: false\nmethods: {trades: {beta: 4}, at: {}}\n")
    c = parse(["--recipe", str(recipe)])
    assert (c.defense.method, c.defense.beta, c.optimization.lr, c.optimization.epochs) == ("trades", 2, 0.2, 77)
    assert c.optimization.nesterov
    c = parse(["--recipe", str(recipe), "--preset", str(preset), "--batch-size=70"])
    assert (c.defense.beta, c.optimization.lr, c.optimization.epochs, c.optimization.batch_size) == (4, 0.2, 8, 70)
    assert not c.optimization.nesterov
    assert parse(["--recipe", str(recipe), "--preset", str(preset), "--beta", "5"]).defense.beta == 5


def test_another_method_on_a_recipe_keeps_all_but_the_methods_options(tmp_path: Path) -> None:
    c = parse(["--recipe", "trades-mnist", "--method", "dtrades"])
    assert (c.defense.method, c.method_options, c.optimization.lr) == ("dtrades", {}, 0.01)


REFUSED = [
    (["--recipe", "nope"], "unknown recipe 'nope'; known are at-cifar10, "),
    (["--preset", "nope"], "unknown preset 'nope'; known are quick"),
    (["--preset", "trades-mnist"], "unknown preset 'trades-mnist'"),
    (["--recipe", "missing.yaml"], "missing.yaml does not exist"),
    (["--method", "nope"], "unknown method 'nope'; known are at, dtrades"),
    (
        ["--method", "trades", "--lambda-alpha", "1"],
        "lambda_alpha is not an option of method 'trades'; it belongs to .*dtrades",
    ),
    (["--beta", "2"], "beta is not an option of method 'dtrades'; it belongs to .*trades"),
    (["--epsilon", "8/0"], "--epsilon must be a number >= 0"),
    (["--step-size", "0"], "--step-size must be above 0"),
    (["--lr", "0"], "--lr must be above 0, got 0"),
    (["--lr", "nan"], "--lr must be above 0, got nan"),
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--batch-size", "-1"], "--batch-size must be at least 1"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--epsilon-ramp", "2"], "--epsilon-ramp must be a share of training from 0 to 1"),
    (["--ema", "1"], r"--ema must be a decay in \[0, 1\)"),
    (["--schedule", "step"], "--schedule step needs --milestones"),
    (["--nesterov", "--optimizer", "adam"], "--nesterov needs --optimizer sgd"),
    (["--resume", "--overwrite"], "give one of the two"),
    (["--run", "../elsewhere"], "--run must be a folder name"),
    (["--run", ".."], "--run must be a folder name"),
    (["--norm", "l2"], "--norm needs --epsilon with it: .* are for Linf"),
    (["--recipe", "trades-cifar10", "--norm", "l2"], "--norm needs --epsilon with it"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[" ".join(command) for command, _ in REFUSED])
def test_refused(command: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(command)


def test_a_norm_has_a_radius_of_its_own(tmp_path: Path) -> None:
    for given in (["--epsilon", "0.5"], ["--epsilon=0.5"]):
        assert parse(["--recipe", "trades-cifar10", "--norm", "l2", *given]).attack.epsilon == "0.5"
    same = parse(["--recipe", "trades-cifar10", "--norm", "l2", "--epsilon", "0.031"])
    assert (same.attack.norm, same.attack.epsilon) == ("l2", "0.031")  # said twice
    file = tmp_path / "mine.yaml"
    file.write_text("norm: l2\nepsilon: '0.5'\n")
    assert parse(["--preset", str(file)]).attack.norm == "l2"
    file.write_text("norm: l2\n")
    for words in (["--preset", str(file)], ["--recipe", "trades-cifar10", "--preset", str(file)]):
        with pytest.raises(ValueError, match="--norm needs --epsilon with it"):
            parse(words)
    (tmp_path / "one").mkdir()
    stored = parse(["--norm", "l2", "--epsilon", "0.5"]).resolved("0.3").to_yaml()
    (tmp_path / "one" / "config.yaml").write_text(stored)
    again = parse(["--resume", "--run", "one", "--runs-dir", str(tmp_path), "--norm", "l2"])
    assert (again.attack.norm, again.attack.epsilon) == ("l2", "0.5")


def test_what_is_hardly_meant_is_said() -> None:
    assert parse([]).resolved("8/255").warnings() == []
    weak = parse(["--recipe", "trades-mnist", "--steps", "10"]).resolved("0.3")
    assert weak.warnings() == [
        "10 steps of 0.01 reach 0.1, not epsilon 0.3: take more --steps or a larger --step-size (None: epsilon / 4)"
    ]
    short = parse(["--recipe", "trades-cifar10", "--epochs", "30"]).resolved("8/255")
    assert len(short.warnings()) == 1
    assert short.warnings()[0].startswith("--milestones 74 ")
    for recipe in config.profiles("recipe"):
        assert parse(["--recipe", recipe]).resolved("0.3").warnings() == []


@pytest.mark.parametrize("preset", ["quick", "t4"])
@pytest.mark.parametrize("recipe", ["at-mnist", "trades-mnist", "dtrades-mnist", "mart-mnist", "faal-mnist"])
def test_a_preset_with_fewer_steps_still_reaches_epsilon(recipe: str, preset: str) -> None:
    made = parse(["--recipe", recipe, "--preset", preset]).resolved("0.3")
    threat = made.threat()
    assert threat.steps * (threat.step_size or threat.epsilon / 4) >= threat.epsilon


def test_files_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("method: trades\nlearning_rate: 1", "mine.yaml has unknown options learning_rate; known are .*, lr, "),
        ("method: trades\nresume: true", "unknown options resume"),
        ("method: trades\nmethods: {nope: {}}", "mine.yaml: unknown method 'nope'"),
        ("method: trades\nmethods: {at: {nope: 1}}", "mine.yaml has unknown options nope"),
        ("epochs: 1", "mine.yaml is no recipe"),
        ("- a", "mine.yaml must map option names to values"),
        ("a: [", "mine.yaml is not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(["--recipe", str(path)])
    path.write_text("method: trades\nepochs: many")
    with pytest.raises(SystemExit):
        parse(["--recipe", str(path)])


def test_help_lists_every_option_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for method in defenses.names():
        for name in defenses.options(method):
            assert f"--{name.replace('_', '-')} " in text
    asked = (
        "method arch width dataset data-root preset recipe epochs batch-size lr beta lambda-alpha lambda-beta epsilon"
    )
    asked += " steps step-size seed runs-dir run resume overwrite device threads"
    for name in asked.split():
        assert f"--{name}" in text
    words = " ".join(text.replace("│", " ").split())
    assert "6.0 for faal, trades" in words
    assert "{None}" not in text


def test_a_new_defense_brings_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Mine(defenses.Defense):
        """Mine.

        Args:
            temperature: softness of the targets,
                above 0.
            beta: weight of the robust term.
        """

        temperature: float = 2.0
        beta: float = 1.5

        def craft(self, attack_model, batch):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        def loss(self, model, batch, crafted):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    from dtrades_fast.defenses import base

    monkeypatch.setitem(base.REGISTRY, "mine", Mine)
    group = config._defense_group()
    fields = {field.name: field for field in dataclasses.fields(group)}
    shown = fields["temperature"].type.__metadata__[0]  # type: ignore[union-attr]
    assert shown.help == "Softness of the targets, above 0."
    assert shown.help_behavior_hint == "(default: 2.0 for mine)"
    hint = fields["beta"].type.__metadata__[0].help_behavior_hint  # type: ignore[union-attr]
    assert "1.5 for mine" in hint
    assert "6.0 for faal, trades" in hint
    assert Config().method_options == {}
