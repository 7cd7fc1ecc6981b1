"""Times every operator against plain PyTorch and torch.compile: ``python bench/bench_ops.py`` (under 10 minutes).

Providers: ``eager`` is the operator's twin in dtrades_fast/ops/reference.py, for the losses the expression of the
textbook in torch.nn.functional; ``compile`` is torch.compile of that with default settings (compiled for exactly this
shape and thread count, outside the measurement), ``ours`` is the public function of dtrades_fast.ops with its argument
checks, ``copy`` is a copy that moves as many bytes.

Modes: ``forward`` without a graph, ``backward`` through torch.autograd.grad with the graph retained, to every
differentiable input, ``both`` from the inputs to their gradients, as in training. GB/s counts compulsory bytes only:
each input read once, each output written once.

Shapes, and where they live on a CPU with a typical 48 KiB of L1 and 2 MiB of L2 per core (see :mod:`harness`):
128x10 (5 KiB) stays in L1: what is measured is the cost of a call; 8192x10 (320 KiB) stays in L2: a large batch of
CIFAR-10; 1024x100 (400 KiB) and 128x1000 (500 KiB) do so too: batches of CIFAR-100 and ImageNet; 2048x1000 (8 MiB per
matrix) comes from L3 or memory: ImageNet's classes; 128x3x32x32 (1.5 MiB per tensor) is the training batch of the
papers, at the edge of L2; 512x3x32x32 (6 MiB) is an evaluation batch, L3 or memory.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from harness import (
    COPY,
    RESULTS,
    Call,
    Effort,
    Row,
    copy_call,
    device,
    gb_per_s,
    machine,
    measure,
    pinned,
    print_table,
    some_of,
    thread_counts,
    write_csv,
    write_machine,
)
from torch import Tensor

from dtrades_fast import ops
from dtrades_fast.ops import reference

PROVIDERS = ("eager", "compile", "ours")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOGITS = ((128, 10), (8192, 10), (2048, 1000))
BATCHES = ((128, 10), (1024, 100), (128, 1000))
IMAGES = ((128, 3, 32, 32), (512, 3, 32, 32))
STEP_SIZE, EPSILON, KEY = 2 / 255, 8 / 255, 1234567890123


@dataclass(frozen=True)
class Workload:
    """One operator on given inputs.

    Attributes:
        twin, ours: the two implementations, called with ``inputs``.
        differentiable: positions of the inputs that get a gradient; none means that there is no backward.
        outputs: how many results, counted from the first, the gradient flows from.
        moved: compulsory bytes by mode.
    """

    op: str
    inputs: tuple[Tensor, ...]
    twin: Callable[..., Any]
    ours: Callable[..., Any]
    moved: dict[str, int]
    differentiable: tuple[int, ...] = ()
    outputs: int = 1


Make = Callable[[tuple[int, ...], torch.dtype, torch.device], Iterator[Workload]]


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _row_bytes(like: Tensor, count: int) -> int:
    """``count`` results per sample."""
    return count * like.shape[0] * reference.compute_dtype(like.dtype).itemsize


def entropy_kl(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    clean, adv = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    rows = _row_bytes(clean, 2)
    moved = {"forward": _bytes(clean, adv) + rows, "backward": 2 * _bytes(clean, adv) + rows}
    yield Workload("entropy_kl", (clean, adv), reference.entropy_kl, ops.entropy_kl, moved, (0, 1), outputs=2)


def logit_grad_kl(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    adv, clean = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    moved = {"forward": 3 * _bytes(adv), "backward": 5 * _bytes(adv)}
    inputs = (adv, clean.log_softmax(-1))
    yield Workload("logit_grad_kl", inputs, reference.logit_grad_kl, ops.logit_grad_kl, moved, (0, 1))


def logit_grad_ce(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    logits = torch.randn(shape, device=device).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    moved = {"forward": 2 * _bytes(logits) + _bytes(labels), "backward": 3 * _bytes(logits)}
    yield Workload("logit_grad_ce", (logits, labels), reference.logit_grad_ce, ops.logit_grad_ce, moved, (0,))


def textbook_ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def textbook_kl(clean: Tensor, adv: Tensor) -> Tensor:
    return F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)


def textbook_trades(clean: Tensor, adv: Tensor, labels: Tensor) -> Tensor:
    return textbook_ce(clean, labels) + 6.0 * textbook_kl(clean, adv)


def textbook_mart(clean: Tensor, adv: Tensor, labels: Tensor) -> Tensor:
    q = adv.softmax(1)
    top_two = q.topk(2)[1]
    rival = torch.where(top_two[:, 0] == labels, top_two[:, 1], top_two[:, 0])
    bce = textbook_ce(adv, labels) + F.nll_loss((1.0001 - q + 1e-12).log(), rival, reduction="none")
    wrong = 1.0000001 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return bce + 5.0 * textbook_kl(clean, adv) * wrong


def robust_loss(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    clean, adv = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    trades = functools.partial(ops.trades_loss, base=6.0)
    mart = functools.partial(ops.mart_loss, beta=5.0, slack=1e-4 + 1e-12, weight_slack=1e-7)
    for name, logits, textbook, ours, figures in (
        ("ce_loss", (clean,), textbook_ce, ops.ce_loss, 2),
        ("trades_loss", (clean, adv), textbook_trades, trades, 6),
        ("mart_loss", (clean, adv), textbook_mart, mart, 5),
    ):
        moved = {"both": 2 * _bytes(*logits) + _bytes(labels) + _row_bytes(clean, figures)}
        yield Workload(name, (*logits, labels), textbook, ours, moved, tuple(range(len(logits))))


def _attack_state(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(adv, grad, clean) in the middle of an attack."""
    clean = torch.rand(shape, device=device)
    adv = (clean + EPSILON * (2 * torch.rand_like(clean) - 1)).clamp(0, 1)
    return adv.to(dtype), torch.randn_like(clean).to(dtype), clean.to(dtype)


def sample_stats(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    adv, grad, clean = _attack_state(shape, dtype, device)
    settings = {"epsilon": EPSILON, "lower": 0.0, "upper": 1.0}
    twin = functools.partial(reference.sample_stats, **settings)
    ours = functools.partial(ops.sample_stats, **settings)
    yield Workload("sample_stats", (grad, adv, clean), twin, ours, {"forward": 3 * _bytes(adv) + _row_bytes(adv, 4)})


def lambda_x(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    grad = torch.randn(shape, device=device).to(dtype)
    logits = torch.randn(shape[0], 10, device=device).to(dtype)
    settings = {"alpha": 1.0, "beta": 1.0, "base": 0.0, "minimum": -math.inf, "maximum": math.inf}
    twin = functools.partial(reference.lambda_x, **settings)
    ours = functools.partial(ops.lambda_x, **settings)
    read = _bytes(logits, grad)
    moved = {"forward": read + _row_bytes(logits, 3), "backward": 2 * read + _row_bytes(logits, 1)}
    yield Workload("lambda_x", (logits, grad), twin, ours, moved, (0, 1))


def pgd_step_(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    for norm in ("linf", "l2"):
        state = _attack_state(shape, dtype, device)
        settings = {"step_size": STEP_SIZE, "epsilon": EPSILON, "lower": 0.0, "upper": 1.0, "norm": norm}
        twin = functools.partial(reference.pgd_step_, **settings)
        ours = functools.partial(ops.pgd_step_, **settings)
        yield Workload(f"pgd_step_{norm}", state, twin, ours, {"forward": 4 * _bytes(state[0])})


def random_start(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    clean = torch.rand(shape, device=device).to(dtype)
    index = torch.randperm(shape[0], device=device)
    for kind in ("linf", "l2", "gaussian"):
        settings = {"kind": kind, "radius": EPSILON, "lower": 0.0, "upper": 1.0, "key": KEY}
        twin = functools.partial(reference.random_start, **settings)
        ours = functools.partial(ops.random_start, **settings)
        moved = {"forward": 2 * _bytes(clean) + _bytes(index)}
        yield Workload(f"random_start_{kind}", (clean, index), twin, ours, moved)


#: operator -> what makes its workloads, and the shapes they are made for
OPERATORS: dict[str, tuple[Make, Sequence[tuple[int, ...]]]] = {
    "entropy_kl": (entropy_kl, LOGITS),
    "logit_grad_kl": (logit_grad_kl, LOGITS),
    "logit_grad_ce": (logit_grad_ce, LOGITS),
    "robust_loss": (robust_loss, BATCHES),
    "sample_stats": (sample_stats, IMAGES),
    "lambda_x": (lambda_x, IMAGES),
    "pgd_step_": (pgd_step_, IMAGES),
    "random_start": (random_start, IMAGES),
}


def prepare(work: Workload, mode: str, function: Callable[..., Any]) -> Call:
    """The call to time; for the backward alone, the forward has been done and its graph is kept."""
    if mode == "forward":
        return lambda: function(*work.inputs)
    inputs = [x.detach().clone() for x in work.inputs]
    wanted = [inputs[i].requires_grad_() for i in work.differentiable]

    def forward() -> list[Tensor]:
        results = function(*inputs)
        return [results] if isinstance(results, Tensor) else list(results)

    results = forward()
    grads = [torch.randn_like(x) for x in results]
    if mode == "both":
        return lambda: torch.autograd.grad(forward(), wanted, grads)
    return lambda: torch.autograd.grad(results, wanted, grads, retain_graph=True)


def _leading(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``function`` without the results that carry no gradient, so that no provider differentiates them."""

    def leading(*inputs: Tensor) -> Any:
        results = function(*inputs)
        return results if isinstance(results, Tensor) else tuple(results)[:count]

    return leading


def providers_of(work: Workload, mode: str, chosen: Sequence[str]) -> dict[str, Call]:
    """Every chosen provider, and the copy. Compiles."""
    twin, ours = work.twin, work.ours
    if mode != "forward":
        twin, ours = _leading(twin, work.outputs), _leading(ours, work.outputs)
    calls: dict[str, Call] = {}
    for provider in chosen:
        if provider == "compile":
            torch.compiler.reset()  # nothing is shared with the cases before: neither a dynamic shape nor a limit
            calls[provider] = prepare(work, mode, torch.compile(twin))
        else:
            calls[provider] = prepare(work, mode, ours if provider == "ours" else twin)
        calls[provider]()
    calls[COPY] = copy_call(work.moved[mode], work.inputs[0].device)
    return calls


def bench(work: Workload, mode: str, shape: str, dtype: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """All providers of one case on ``threads`` threads."""
    torch.set_num_threads(threads)
    calls = providers_of(work, mode, options.providers)
    effort = Effort(seconds=0.02, rounds=3) if options.quick else Effort()
    with pinned(threads):
        timings = measure(calls, options.device, effort)
    moved = work.moved[mode]
    return [
        Row(work.op, mode, shape, dtype, name, threads, t.median_us, t.p20_us, t.p80_us, gb_per_s(moved, t.median_us))
        for name, t in timings.items()
    ]


def bench_all(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of case after case."""
    for name in options.ops:
        make, shapes = OPERATORS[name]
        for shape in shapes[:1] if options.quick else shapes:
            for dtype in options.dtypes:
                torch.manual_seed(0)
                for work in make(shape, DTYPES[dtype], options.device):
                    for mode in work.moved:
                        for threads in options.threads:
                            yield bench(work, mode, "x".join(map(str, shape)), dtype, threads, options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_ops.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(OPERATORS)
    parser.add_argument("--ops", type=some_of("operator", known), default=known, metavar="A,B",
                        help=f"operators to time (default: all of {', '.join(known)})")  # fmt: skip
    parser.add_argument("--providers", type=some_of("provider", PROVIDERS), default=list(PROVIDERS), metavar="A,B",
                        help=f"what to compare (default: {','.join(PROVIDERS)})")  # fmt: skip
    parser.add_argument("--dtypes", type=some_of("dtype", list(DTYPES)), default=["float32"], metavar="A,B",
                        help=f"of {', '.join(DTYPES)} (default: float32)")  # fmt: skip
    parser.add_argument("--threads", type=thread_counts, metavar="N,M",
                        help="CPU threads (default: 1,2 on the CPU where it has them, 1 on a GPU)")  # fmt: skip
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--quick", action="store_true",
                        help="the smallest shape only and a few calls: whether it works, not how fast")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR",
                        help="where the CSV and the machine's description go (default: bench/results)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.threads is None:
        options.threads = [1] if options.device.type == "cuda" else thread_counts("1,2" if _has_two_cpus() else "1")
    return options


def _has_two_cpus() -> bool:
    try:
        return bool(thread_counts("2"))
    except argparse.ArgumentTypeError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # events and streams are those of the current one
    # The graph is kept for repeated backward calls, so compiled code must not reuse its saved buffers.
    torch._functorch.config.donated_buffer = False
    started, rows, description = time.monotonic(), [], machine(options.device)
    if (description["load_average"] or 0) > 0.5:
        print(f"warning: the machine is busy (load {description['load_average']}): only ratios mean something, and "
              "those of calls on all CPUs little", file=sys.stderr)  # fmt: skip
    for case in bench_all(options):
        rows += case
        times = ", ".join(f"{row.provider} {row.median_us:.1f}" for row in case)
        first = case[0]
        print(f"{first.op} {first.mode} {first.shape} {first.dtype} {first.threads} threads: {times} us",
              file=sys.stderr, flush=True)  # fmt: skip
    others = [p for p in options.providers if p != "ours"]
    print_table(f"{description['cpu']}, {description['device']}, {description['simd_level']}", rows, "ours", others)
    stem = f"ops-{options.device.type}"
    write_csv(options.out / f"{stem}.csv", rows)
    write_machine(options.out / f"{stem}.json", description)
    print(f"{len(rows)} rows in {options.out / stem}.csv, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
