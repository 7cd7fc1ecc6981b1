"""What an evaluation prints: tables, and a row of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["class_table", "markdown", "table", "threat"]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def count(number: int) -> str:
    """To three digits, e.g. 12.3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def threat(record: Mapping[str, Any]) -> str:
    """The ball in words, e.g. ``Linf epsilon 8/255``."""
    return f"{'L2' if record['norm'] == 'l2' else 'Linf'} epsilon {record['epsilon']}"


def table(records: Sequence[dict[str, Any]]) -> Table:
    """A row per network and attack, in percent; narrow enough for a terminal of 80 characters."""
    threats = list(dict.fromkeys(threat(record) for record in records))
    norms = {record["norm"] for record in records}
    counts = dict.fromkeys(f"{r['points']:,} {r['split']} images of {r['dataset']}" for r in records)
    title = f"Accuracy in %, {', '.join(threats)}; {', '.join(counts)}"
    view = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("run", overflow="fold", min_width=12)
    for name in ("weights", "NA", "attack", "RA", "RD", "ASR\nall", "ASR\ncorrect", "worst\nclass", "spread"):
        view.add_column(name, justify="left" if name in ("weights", "attack") else "right", no_wrap=True)
    for record in records:
        head = (record["run"], record["checkpoint"], percent(record["na"]))
        for name, figures in record["attacks"].items():
            ball = threat(record).replace(" epsilon", "") if len(norms) > 1 else record["epsilon"]
            attack = name if len(threats) == 1 else f"{name} {ball}"
            shares = [percent(figures[share]) for share in ("ra", "rd", "asr_all", "asr_correct")]
            worst = f"{figures['worst_class']}: {percent(figures['worst_class_ra'])}"
            view.add_row(*head, attack, *shares, worst, percent(figures["spread"]))
            head = ("", "", "")
        if not record["attacks"]:
            view.add_row(*head)
        view.add_section()
    return view


def class_table(record: dict[str, Any]) -> Table:
    """NA and RA of each class of one network, in percent."""
    title = f"Classes of {record['run']}, accuracy in %, {threat(record)}"
    view = Table(title=title, box=box.SIMPLE_HEAD)
    view.add_column("class")
    columns = [record["per_class"], *(figures["per_class"] for figures in record["attacks"].values())]
    for name in ("NA", *(f"RA {name}" for name in record["attacks"])):
        view.add_column(name, justify="right")
    for label in record["per_class"]:
        view.add_row(label, *(percent(column[label]) for column in columns))
    return view


def cost_table(record: dict[str, Any]) -> Table:
    """What each attack of one network took, and AutoAttack's stages."""
    view = Table(title=f"Cost on {record['device']}, searching on {record['search']}", box=box.SIMPLE_HEAD)
    for name in ("attack", "RA", "seconds", "forward", "backward"):
        view.add_column(name, justify="left" if name == "attack" else "right")
    for name, figures in record["attacks"].items():
        stages = figures.get("stages", {})
        for stage, part in (*stages.items(), (name, figures)):
            numbers = (f"{part['seconds']:.1f}", count(part["forwards"]), count(part["backwards"]))
            view.add_row(stage if stage == name else f"  {stage}", percent(part["ra"]), *numbers)
    return view


def minimum_norm_table(record: dict[str, Any]) -> Table:
    """Average minimum perturbation norms of one network, in pixel units."""
    view = Table(title=f"Smallest perturbation of {record['run']}, in pixel units", box=box.SIMPLE_HEAD)
    for name in ("norm", "attack", "mean (APN)", "median", "broken %", "censored"):
        view.add_column(name, justify="left" if name in ("norm", "attack") else "right")
    for norm, found in record["minimum_norm"].items():
        for name, figures in ({"smallest": found["apn"]} | found["by_attack"]).items():
            shown = (f"{figures['mean']:.4f}", f"{figures['median']:.4f}", percent(figures["success_rate"]))
            view.add_row(norm, name, *shown, str(figures["censored"]))
    return view


def transfer_table(record: dict[str, Any]) -> Table:
    """RA of one network under images made on others, in percent."""
    title = f"Images made on other networks, {threat(record)}, RA of {record['run']} in %"
    view = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("made on", "the attacker has", *record["transfer"]):
        view.add_column(name, justify="right" if name in record["transfer"] else "left")
    first = next(iter(record["transfer"].values()))
    for i, source in enumerate(first["sources"]):
        shares = [percent(found["ra"][i][0]) for found in record["transfer"].values()]
        view.add_row(source, first["relations"][i][0], *shares)
    return view


def tables(record: dict[str, Any]) -> list[Table]:
    """All that is worth printing of one network, beside its row in :func:`table`."""
    views = [class_table(record)]
    if record["attacks"]:
        views.append(cost_table(record))
    if record["minimum_norm"]:
        views.append(minimum_norm_table(record))
    if record["transfer"]:
        views.append(transfer_table(record))
    return views


def markdown(record: dict[str, Any]) -> str:
    """The network's row of a Markdown table, with its head."""
    columns = {"run": record["run"], "NA": percent(record["na"])}
    columns |= {f"RA {name}": percent(figures["ra"]) for name, figures in record["attacks"].items()}
    columns |= {f"APN {norm}": f"{found['apn']['mean']:.4f}" for norm, found in record["minimum_norm"].items()}
    columns |= {"threat": threat(record), "points": str(record["points"]), "verdict": record["verdict"]["verdict"]}
    rows = (list(columns), ["---"] * len(columns), list(columns.values()))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
