"""``dtrades-fast export``: a run's network as one file that others load, with a model card.

The file has the form of RobustBench's checkpoints: ``{"state_dict": names to tensors}``, normalisation among them, so
that the network takes images in [0, 1]. RobustBench's loader cuts as many characters from the front of every name that
has ``module.`` or ``model.`` anywhere in it; no name here has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dtrades_fast import environment, models
from dtrades_fast.config import option
from dtrades_fast.evaluation.record import stored
from dtrades_fast.evaluation.report import threat
from dtrades_fast.evaluation.targets import Epoch, Target, find_run, load_target
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Options", "export", "main"]


@dataclass
class Options:
    """Write a run's network as NAME.pt, in the form of RobustBench's checkpoints, with the model card NAME.md."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, or name of a run in --runs-dir."""
    out: Annotated[str | None, option("STR", "Folder for both files.", "RUN/export")] = None
    checkpoint: Epoch = "best"
    """Weights of the best epoch (by validation) or of the last one."""
    runs_dir: str = "runs"
    """Folder in which the name of a run is looked for."""


def main(argv: Sequence[str], prog: str) -> int:
    """The sub-command ``export``."""
    options = tyro.cli(Options, args=list(argv), prog=prog)
    folder = find_run(options.run, options.runs_dir)
    out = folder.export if options.out is None else Path(options.out).expanduser()
    for path in export(folder, out, options.checkpoint):
        print(path)
    return 0


def export(folder: RunFolder, out: Path, epoch: Epoch = "best") -> tuple[Path, Path]:
    """Write checkpoint and model card, each all or nothing; earlier ones of the same name are replaced.

    Args:
        folder: of the run.
        out: where both are put; made if it is not there.
        epoch: whose weights: the best one's by validation, or the last one's.

    Returns:
        Their paths, ``NAME.pt`` and ``NAME.md``; NAME is the run's, with ``-last`` for the last epoch.

    Raises:
        FileNotFoundError: the run has no weights yet.
        RuntimeError: its weights are damaged.
        ValueError: ``out`` is a file.
    """
    target = load_target(folder.path, epoch=epoch)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    name = target.name if epoch == "best" else f"{target.name}-last"
    weights, text = out / f"{name}.pt", out / f"{name}.md"
    checkpoint.save_state(weights, {"state_dict": dict(target.model.state_dict())})
    checkpoint.write_text(text, card(target, folder, epoch, weights))
    return weights, text


def card(target: Target, folder: RunFolder, epoch: Epoch, weights: Path) -> str:
    """The model card, Markdown.

    Args:
        target: the network.
        folder: of its run.
        epoch: whose weights they are.
        weights: the exported file.
    """
    assert target.config is not None
    config, stored = target.config, target.config.stored()
    chosen = ", by validation" if epoch == "best" else ""
    env = json.loads(folder.env.read_text()) if folder.env.is_file() else {}
    written = folder.config.read_text()
    recipe = re.match(r"# recipe: ([^;]*);", written)
    epochs = len(folder.read_metrics())
    mean, std = (
        ", ".join(f"{x:.4g}" for x in target.model.get_buffer(f"normalize.{n}").flatten()) for n in ("mean", "std")
    )
    of_method = ", ".join(f"{name} {value}" for name, value in config.method_options.items())
    facts = {
        "method": f"{config.defense.method}{f' ({of_method})' if of_method else ''}",
        "recipe": recipe[1] if recipe else "none",
        "network": f"{target.arch}, width {config.model.width or 'as published'}, "
        f"{models.parameter_count(target.model):,} parameters, {target.classes} classes",
        "input": f"images in [0, 1]; the network itself subtracts {mean} and divides by {std}",
        "data set": f"{config.data.dataset}, fingerprint {env.get('data', {}).get('fingerprint', 'unknown')}",
        "threat in training": f"{stored['norm']}, epsilon {stored['epsilon']}, {stored['steps']} steps",
        "weights": f"the {epoch} of {epochs} epochs{chosen}, seed {stored['seed']}",
        "trained with": _software(env),
        "exported with": _software({"versions": environment.versions(), "commit": environment.git_commit()}),
        "SHA-256": f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}` ({weights.name}), "
        f"`{target.sha256}` (the run's weights)",
    }
    return "\n".join(
        (
            f"# {weights.stem}",
            "",
            f"{target.arch} trained on {config.data.dataset} by {config.defense.method} with dtrades-fast.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "## Robustness",
            "",
            *_figures(target, folder),
            "",
            "## Use",
            "",
            f'`{weights.name}` holds `{{"state_dict": ...}}`, the state dict of a network of '
            "`dtrades_fast.models.create`, and nothing that would run code.",
            "",
            "```python",
            "from dtrades_fast.evaluation.targets import load_target",
            "",
            f'model = load_target("{weights.name}").model  # images in [0, 1], [N, C, H, W], to logits',
            "```",
            "",
            f'`torch.load("{weights.name}", weights_only=True)["state_dict"]` are the tensors alone, `network.*` of '
            "the architecture and `normalize.*` of its normalisation. RobustBench's loader takes the file as it is.",
            "",
            "## All options of the run",
            "",
            "```yaml",
            written.rstrip(),
            "```",
            "",
        )
    )


def _software(env: dict[str, Any]) -> str:
    """Versions and commit in one line."""
    versions = [f"{name} {version}" for name, version in env.get("versions", {}).items() if version]
    return ", ".join([*versions, f"commit {env.get('commit') or 'unknown'}"])


def _figures(target: Target, folder: RunFolder) -> Iterator[str]:
    """What ``eval.json`` has on these very weights."""
    mine = [record for record in stored(folder.evaluation) if record["weights_sha256"] == target.sha256]
    if not mine:
        yield f"Not evaluated yet: `dtrades-fast evaluate {folder.path}`, then export it again."
        return
    yield "Robust accuracies are upper bounds: a stronger attack may find more."
    yield ""
    yield "| attack | threat | images | search | clean accuracy | robust accuracy |"
    yield "|---|---|---|---|---|---|"
    for record in mine:
        images = f"{record['points']:,} {record['split']}"
        where = f"{threat(record)} | {images} | {record['precision']} | {100 * record['na']:.2f} %"
        for attack, figures in record["attacks"].items():
            yield f"| {attack} | {where} | {100 * figures['ra']:.2f} % |"
    for record in mine:
        verdict = record["verdict"]
        yield ""
        yield f"Gradients at {threat(record)}: {'; '.join((verdict['verdict'], *verdict['reasons']))}."
        if record["ignored"]:
            yield f"Findings that were ignored: {', '.join(record['ignored'])}."
