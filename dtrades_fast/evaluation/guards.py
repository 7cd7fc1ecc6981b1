"""Guard rails: what makes the figures of an evaluation wrong, recognised before it starts.

A few forward passes and one gradient show whether the network is what attacks take it for: a fixed, differentiable
function from images in [0, 1] to logits, of each image by itself. Most of these mistakes have led to published figures
that did not hold (Athalye et al. 2018; Croce and Hein 2020; Tramer et al. 2020).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrades_fast.attacks.base import Model, frozen
from dtrades_fast.attacks.objectives import Margin

__all__ = ["NAMES", "Finding", "GuardError", "Report", "check"]

Norm = Literal["linf", "l2"]
Severity = Literal["error", "warning"]

#: What can be found, by name.
NAMES: dict[str, str] = {
    "images": "images are not numbers in [0, 1]",
    "labels": "labels are not classes of the network",
    "epsilon": "the radius is not in pixel units of [0, 1]",
    "training": "modules are in train mode",
    "forward": "the network fails on the images",
    "shape": "the output is not [N, classes]",
    "class_names": "there are more or fewer names of classes than logits",
    "not_finite": "logits or gradients are NaN or infinite",
    "probabilities": "the output is probabilities",
    "log_probabilities": "the output is log-probabilities",
    "few_classes": "attacks on the difference of logits ratio need more classes",
    "chance": "clean images are classified no better than by chance",
    "changes_itself": "a forward pass changes the network",
    "random": "the output differs from pass to pass",
    "batch_dependent": "an image's output depends on the batch it is in",
    "not_differentiable": "the output has no gradient to the image",
    "zero_gradient": "gradients to the image are exactly zero",
    "autograd_inside": "the forward pass computes gradients itself",
}

#: Findings after which nothing can be evaluated.
FATAL = ("labels", "forward", "shape", "class_names", "not_differentiable")
PASSES = 5  #: on the same images, to see whether they differ
ROWS = 16  #: images in the checks that take several passes
#: Largest distance of two passes' logits, each vector of length 1, that is put down to the order of additions.
SAME = 1e-4
#: How far probabilities of low precision, or clipped ones, may be from [0, 1] and from a sum of 1; no trained network's
#: logits are as near to it on all of a few dozen images. And how far the exponentials of log-probabilities.
SUM, LOG_SUM = 1e-2, 1e-5
#: Above this probability, so many correct predictions or more are what guessing gives.
GUESSING = 0.01
#: Share of the images that predictions agree on with the labels after a renaming of classes, to call them renamed.
RENAMED = 0.7


@dataclass(frozen=True)
class Finding:
    """Something that was recognised.

    Attributes:
        name: one of :data:`NAMES`.
        severity: an ``"error"`` makes the figures wrong; a ``"warning"`` may be as it should.
        message: what was recognised, why it matters, what to do.
    """

    name: str
    severity: Severity
    message: str


@dataclass(frozen=True)
class Report:
    """All findings, none for a sound network."""

    findings: tuple[Finding, ...]

    def has(self, name: str) -> bool:
        return any(finding.name == name for finding in self.findings)


class GuardError(ValueError):
    """An evaluation would give wrong figures; the message has all findings.

    Attributes:
        report: them.
    """

    def __init__(self, report: Report):
        self.report = report
        names = dict.fromkeys(finding.name for finding in report.findings if finding.severity == "error")
        lines = [f"  {finding.severity}: {finding.name}: {finding.message}" for finding in report.findings]
        if not set(names) & set(FATAL):
            lines.append(f"to go on regardless, ignore {', '.join(names)}: the record will say so")
        super().__init__("\n".join(("the figures of this evaluation would be wrong:", *lines)))


def check(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    norm: Norm = "linf",
    ignore: Collection[str] = (),
    classes: int | None = None,
) -> Report:
    """Look for what makes an evaluation's figures wrong, on a few of its images; 64 will do.

    One forward pass of all, some ten of at most 16 images, and one backward pass. Parameters, buffers, modes, gradients
    and torch's random state are left as they were, even where a forward pass changes them. All but ``training`` is
    judged in eval mode, in which attacks see the network.

    Args:
        model: maps images to logits, as it will be evaluated.
        images: [N, C, H, W], as they will be given to attacks.
        labels: [N].
        epsilon: radius of the ball in pixel units.
        norm: of the ball.
        ignore: names of findings that are no reason to stop, see :data:`NAMES`; those of :data:`FATAL` always are.
        classes: number of classes that there are names of.

    Returns:
        All findings: warnings, and errors that are ignored.

    Raises:
        GuardError: there is an error that is not ignored.
        ValueError: ``ignore`` has a name that there is not.
    """
    if unknown := sorted(set(ignore) - set(NAMES)):
        raise ValueError(f"ignore has no finding {', '.join(map(repr, unknown))}; known are {', '.join(NAMES)}")
    findings = [*_check_images(images), *_check_labels(images, labels), *_check_epsilon(images, epsilon, norm)]
    if isinstance(images, Tensor) and images.dim() == 4 and len(images):
        proper = not any(finding.name in ("images", "labels") for finding in findings)
        findings += _check_network(model, _pixels(images), labels if proper else None, classes)
    report = Report(tuple(findings))
    ignored = set(ignore) - set(FATAL)
    if any(finding.severity == "error" and finding.name not in ignored for finding in findings):
        raise GuardError(report)
    return report


def _error(name: str, message: str) -> Finding:
    return Finding(name, "error", message)


def _warning(name: str, message: str) -> Finding:
    return Finding(name, "warning", message)


# What goes in


def _check_images(images: Tensor) -> Iterator[Finding]:
    need = "attacks need a floating-point tensor [N, C, H, W] in [0, 1]"
    if not isinstance(images, Tensor):
        yield _error("images", f"they are {type(images).__name__}; {need}")
        return
    if images.dim() != 4 or not len(images):
        yield _error("images", f"their shape is {list(images.shape)}; {need}")
        return
    if not images.is_floating_point():
        yield _error("images", f"their dtype is {images.dtype}; {need}: give images.float() / 255")
        return
    if not images.isfinite().all():
        yield _error("images", f"some pixels are NaN or infinite; {need}")
        return
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high <= 1:
        return
    found = f"pixels lie between {low:.4g} and {high:.4g}"
    if low >= 0 and high > 2:
        what = "as bytes have them: divide them by 255"
    elif low < 0:
        what = "as normalised images have them: give them as they were before, and put the normalisation in the network"
    else:
        what = "slightly outside: clamp them"
    yield _error("images", f"{found}, {what}. Attacks clip to [0, 1], so epsilon and clipping would be wrong")


def _check_labels(images: Tensor, labels: Tensor) -> Iterator[Finding]:
    """All but whether the network has so many classes."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        yield _error("labels", f"they are {got}; attacks need an int64 tensor [N] of class numbers from 0")
    elif isinstance(images, Tensor) and labels.shape != images.shape[:1]:
        yield _error("labels", f"their shape is {list(labels.shape)} for {len(images)} images; give one per image")
    elif len(labels) and labels.min() < 0:
        yield _error("labels", f"there is a label {int(labels.min())}; classes count from 0")


def _check_epsilon(images: Tensor, epsilon: float, norm: Norm) -> Iterator[Finding]:
    whole = 1.0
    if norm == "l2":
        whole = images[0].numel() ** 0.5 if isinstance(images, Tensor) and images.dim() == 4 and len(images) else 1e4
    if 0 < epsilon <= whole:
        return
    if not epsilon > whole:  # NaN too
        yield _error("epsilon", f"it is {epsilon:g} and must be above 0, in pixel units of [0, 1], e.g. 8/255")
        return
    reach = f"an {'L2' if norm == 'l2' else 'Linf'} ball of radius {whole:.4g} already holds every image"
    yield _error(
        "epsilon",
        f"it is {epsilon:g}, but pixels lie in [0, 1] and {reach}, so that no network is robust: if bytes are meant, "
        f"give {epsilon:g}/255",
    )


def _pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] for the checks of the network, even if those given are none."""
    images = images.detach()
    if not images.is_floating_point():
        return images.float() / 255
    images = images.nan_to_num(0.5, 1.0, 0.0)
    low, high = images.min(), images.max()
    return images if low >= 0 and high <= 1 else (images - low) / (high - low).clamp_min(1e-6)


# The network


class _State:
    """What a network's parameters and buffers were."""

    def __init__(self, model: Model):
        self.model = model
        self.before = {name: tensor.detach().clone() for name, tensor in self.now().items()}

    def now(self) -> dict[str, Tensor]:
        if not isinstance(self.model, nn.Module):
            return {}
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def changed(self) -> list[str]:
        now = self.now()
        return [
            name
            for name, tensor in self.before.items()
            if name not in now or now[name].shape != tensor.shape or not same(now[name].detach(), tensor)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        now = self.now()
        for name in self.changed():
            if name in now and now[name].shape == self.before[name].shape:
                now[name].copy_(self.before[name])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _check_network(model: Model, images: Tensor, labels: Tensor | None, classes: int | None) -> Iterator[Finding]:
    """Findings on a network in eval mode, which is left as it was.

    Args:
        labels: None if they cannot be compared with predictions.
        classes: None if they have no names.
    """
    training = [name or "the network" for name, m in _modules(model) if m.training]
    if training:
        some = f"{', '.join(training[:3])}{' and others' if len(training) > 3 else ''}"
        yield _error(
            "training",
            f"{len(training)} modules are in train mode ({some}): dropout would be random and BatchNorm would depend "
            "on the batch; call model.eval()",
        )
    state = _State(model)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), frozen(model):
        try:
            yield from _check_passes(model, images, labels, classes, state)
        finally:
            state.restore()


def _modules(model: Model) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules()) if isinstance(model, nn.Module) else []


def _check_passes(
    model: Model, images: Tensor, labels: Tensor | None, classes: int | None, state: _State
) -> Iterator[Finding]:
    try:
        with torch.no_grad():
            logits = model(images.clone())
    except Exception as error:  # the network's own code may raise anything
        yield _error(
            "forward",
            f"the network fails on images of shape {list(images.shape)} and {images.dtype} ({type(error).__name__}: "
            f"{error}): give images of its size, channels and device; a network of another dtype is to be wrapped so "
            "that it takes these and returns its logits as float32",
        )
        return
    if any(module.training for _, module in _modules(model)):
        yield _error(
            "training", "a forward pass puts modules into train mode: take the call of train() out of forward()"
        )
    if changed := state.changed():
        yield _error(
            "changes_itself",
            f"a forward pass in eval mode changes {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}: "
            "an image's result would depend on the images before it; such a defense needs an attack of its own",
        )
    if wrong := _wrong_shape(logits, len(images)):
        yield _error("shape", wrong)
        return
    if classes is not None and classes != logits.shape[1]:
        yield _error(
            "class_names",
            f"there are {classes} names for {logits.shape[1]} logits: give one name per logit, in their order",
        )
        return
    logits = logits.detach()
    if not logits.isfinite().all():
        count = int((~logits.isfinite().all(1)).sum())
        yield _error(
            "not_finite",
            f"the logits of {count} of {len(logits)} images are NaN or infinite: no attack climbs from there; look for "
            "overflow (float16), a division by zero or a logarithm of zero in the network or its normalisation",
        )
        return
    yield from _check_logits(logits)
    yield from _check_predictions(logits, labels)

    def fresh(batch: Tensor) -> Tensor:
        state.restore()
        with torch.no_grad():
            return model(batch.clone()).detach()

    yield from _check_repeats(fresh, images[:ROWS])
    state.restore()
    yield from _check_gradient(model, images[:ROWS])


def _wrong_shape(logits: Any, count: int) -> str | None:
    need = f"attacks need one tensor of logits [{count}, classes] for {count} images"
    if not isinstance(logits, Tensor):
        return f"the output is {type(logits).__name__}; {need}: wrap the network so that it returns the logits alone"
    if logits.dim() != 2 or len(logits) != count or logits.shape[1] < 2:
        return f"the output has shape {list(logits.shape)}; {need}, with at least 2 classes"
    if not logits.is_floating_point():
        return f"the output has dtype {logits.dtype}; {need}, as floating-point numbers: no classes, no votes"
    return None


def _check_logits(logits: Tensor) -> Iterator[Finding]:
    values, classes = logits.double(), logits.shape[1]
    if values.min() > -SUM and values.max() < 1 + SUM and ((values.sum(1) - 1).abs() < SUM).all():
        yield _error(
            "probabilities",
            "each row lies in [0, 1] and sums to 1, so it is the output of a softmax: confident predictions then have "
            "vanishing gradients and attacks fail for no merit of the network; take the last softmax off",
        )
    elif values.max() < LOG_SUM and (values.logsumexp(1).abs() < LOG_SUM).all():
        yield _warning(
            "log_probabilities",
            "each row's exponentials sum to 1, so it is the output of a log-softmax: cross-entropy and margins of it "
            "are those of logits, unless it was rounded or clipped; return the logits",
        )
    if classes < 4:
        which = "DLR needs 3 classes and its targeted form 4" if classes < 3 else "targeted DLR needs 4 classes"
        yield _warning(
            "few_classes",
            f"with {classes} classes, AutoAttack's standard form is not possible ({which}): use attacks on "
            "cross-entropy and margin, PGD, APGD-CE and Square",
        )


def _check_predictions(logits: Tensor, labels: Tensor | None) -> Iterator[Finding]:
    classes = logits.shape[1]
    if labels is None:
        return
    if int(labels.max()) >= classes:
        yield _error(
            "labels",
            f"there is a label {int(labels.max())}, but the network has {classes} classes, numbered from 0: is it the "
            "network of this data set, and do labels count from 0?",
        )
        return
    predicted = logits.argmax(1)
    correct, count = int((predicted == labels).sum()), len(labels)
    if not at_chance(correct, count, classes):
        return
    table = torch.zeros(classes, classes, dtype=torch.int64, device=labels.device)
    table.index_put_((predicted, labels), torch.ones_like(labels), accumulate=True)
    if table.amax(1).sum() >= RENAMED * count and labels.bincount().max() <= count / 2:
        why = "the predictions do match after a renaming of classes, so the network has them in another order"
    else:
        why = "is it trained, does it get the normalisation (mean, std) that it was trained with, and of this data set?"
    yield _warning(
        "chance",
        f"{correct} of {count} clean images are classified correctly, as many as guessing among {classes} classes "
        f"gives: {why}",
    )


def at_chance(correct: int, count: int, classes: int) -> bool:
    """Whether guessing gives so many correct predictions or more; False where ``count`` is too small to tell."""
    if classes**-count > GUESSING:
        return False
    right, wrong = math.log(1 / classes), math.log1p(-1 / classes)
    below = sum(math.exp(log_binomial(count, k) + k * right + (count - k) * wrong) for k in range(correct))
    return 1 - below > GUESSING


def log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _check_repeats(forward: Callable[[Tensor], Tensor], images: Tensor) -> Iterator[Finding]:
    """Whether the same images give the same logits, again and in other company.

    Args:
        forward: a pass of the network in the state that it was given in.
    """
    first = forward(images)
    difference = max(distance(forward(images), first) for _ in range(PASSES - 1))
    if difference > SAME:
        yield _error(
            "random",
            f"{PASSES} passes of the same images differ by up to {difference:.2g} of the length of their logits: "
            "gradients of one pass say little about the next and lucky passes count as robust; fix the random numbers, "
            "or evaluate and attack the average over many passes",
        )
        return
    company = images if len(images) > 1 else torch.cat((images, 1 - images))
    together = forward(company)
    try:
        alone = torch.cat([forward(company[row : row + 1]) for row in (len(company) - 1, len(company) // 2)])
    except Exception as error:  # e.g. BatchNorm on its own statistics
        yield _error("batch_dependent", f"the network fails on a single image ({error}), so it looks at the batch")
        return
    difference = distance(alone, together[[len(company) - 1, len(company) // 2]])
    if difference > SAME:
        yield _error(
            "batch_dependent",
            f"the logits of an image alone and in a batch differ by {difference:.2g} of their length: results would "
            "depend on the batch size, and attacks on one image would move another's; use BatchNorm with its running "
            "statistics, or whatever does not look at the batch",
        )


def distance(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows of logits, each vector of length 1."""
    a, b = (z.double() / (torch.linalg.vector_norm(z.double(), dim=1, keepdim=True) + 1e-10) for z in (a, b))
    return torch.linalg.vector_norm(a - b, dim=1).max().item()


def _check_gradient(model: Model, images: Tensor) -> Iterator[Finding]:
    """The gradient of the margin between the two largest logits, which no confidence makes vanish."""
    with torch.enable_grad():
        inputs = images.clone().requires_grad_()
        with autograd_calls() as calls:
            logits = model(inputs)
        blocked = "the logits do not depend on the image as far as autograd can see (no_grad, detach, NumPy, argmax?)"
        gradient = None
        if logits.requires_grad:
            try:
                direction = Margin(logits.detach().argmax(1)).logit_grad(logits.detach())
                (gradient,) = torch.autograd.grad(logits, inputs, direction, allow_unused=True)
            except RuntimeError as error:
                blocked = f"the backward pass fails ({error})"
    if calls:
        yield _error(
            "autograd_inside",
            f"the forward pass calls autograd {len(calls)} times, so it optimises something for each image: attacks "
            "that take its gradient as it is miss that; such a defense needs an adaptive attack",
        )
    if gradient is None:
        yield _error(
            "not_differentiable",
            f"{blocked}: attacks with gradients would not move, which is no robustness; make the forward pass "
            "differentiable, or attack a differentiable stand-in (BPDA) and use Square",
        )
    elif not gradient.isfinite().all():
        yield _error(
            "not_finite",
            "the gradient of the margin to the image is NaN or infinite: attacks would write NaN into images; look for "
            "a square root, norm or division at zero",
        )
    elif zero := int((gradient.flatten(1).abs().amax(1) == 0).sum()):
        severity: Severity = "error" if zero == len(images) else "warning"
        yield Finding(
            "zero_gradient",
            severity,
            f"the margin of {zero} of {len(images)} images has a gradient of exactly zero: attacks with gradients do "
            "not move there, which is no robustness; look for rounding, saturation or dead units, attack a "
            "differentiable stand-in (BPDA) and use Square",
        )


@contextmanager
def autograd_calls() -> Iterator[list[str]]:
    """The calls of ``torch.autograd.grad`` and ``backward`` in this thread inside, under whatever name."""
    watched = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}
    calls: list[str] = []
    before = sys.getprofile()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in watched:
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)
