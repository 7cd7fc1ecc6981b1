"""Starting weights: a checkpoint or torchvision's ImageNet weights, as far as they fit; freezing the backbone."""

from __future__ import annotations

import http.client
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights, VGG16_BN_Weights, WeightsEnum

from dtrades_fast.models.normalize import Classifier

__all__ = ["LoadReport", "freeze_backbone", "load_init_weights", "read_state"]

_IMAGENET: dict[str, WeightsEnum] = {
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "vgg16": VGG16_BN_Weights.IMAGENET1K_V1,
}
_CONTAINERS = ("state_dict", "model", "model_state_dict")
# What torch.load raises for truncated files: a seek before a cut file's start is an OSError, for one.
_UNREADABLE = (OSError, RuntimeError, EOFError)
_WRAPPERS = ("module.", "model.")  # what DataParallel and model zoos put in front of every key


@dataclass(frozen=True)
class LoadReport:
    """What became of every key.

    Attributes:
        loaded: the model's keys that were set from the file.
        missing: the model's keys that the file lacks; they keep their initial values.
        unexpected: the file's keys, as written there, that the model lacks.
        mismatched: ``"key: file [shape], model [shape]"`` where the name is known but the shape differs.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def load_init_weights(model: Classifier, spec: str | Path, arch: str) -> LoadReport:
    """Copy into ``model`` whatever fits by name and shape; nothing is copied when an error is raised.

    A file of this package also brings its normalisation constants, since its weights belong to them.

    Args:
        model: from :func:`dtrades_fast.models.create`.
        spec: ``"imagenet"`` for torchvision's weights (downloaded once), or the path of a ``.safetensors`` file or of
            a torch file with a state dict, bare or under ``state_dict``, ``model`` or ``model_state_dict``. Torch files
            are read with ``weights_only=True``: no code of theirs is run.
        arch: the model's architecture, which selects the ImageNet weights.

    Raises:
        FileNotFoundError: the file does not exist, or the ImageNet weights can be neither found nor downloaded.
        ValueError: not a file of tensors, no ImageNet weights for ``arch``, or no weight tensor fits.
    """
    state = _imagenet_state(arch) if spec == "imagenet" else read_state(Path(spec).expanduser())
    own = model.state_dict()
    fits: dict[str, Tensor] = {}
    unexpected: list[str] = []
    mismatched: dict[str, str] = {}
    for written, tensor in state.items():
        key = _model_key(written)
        if key in fits or key in mismatched:
            raise ValueError(f"{spec} holds {key!r} twice, once as {written!r}: keep one of the two in the file")
        if key not in own:
            unexpected.append(written)
        elif tensor.shape != own[key].shape:
            mismatched[key] = f"{key}: file {list(tensor.shape)}, model {list(own[key].shape)}"
        else:
            fits[key] = tensor
    # Biases, BatchNorm counters and the normalisation fit networks of any width, so only weight tensors count.
    if not any(own[key].dim() >= 2 for key in fits if key.startswith("network.")):
        raise ValueError(_nothing_fits(spec, arch, list(mismatched.values()), unexpected))
    for key, tensor in fits.items():
        own[key].copy_(tensor)
    return LoadReport(
        loaded=tuple(fits),
        missing=tuple(key for key in own if key not in fits and key not in mismatched),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched.values()),
    )


def freeze_backbone(model: Classifier) -> None:
    """Leave only the head trainable: the rest gets no gradient and stays in eval mode, so BatchNorm is fixed too."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.backbone_frozen = True
    model.train(model.training)


def _model_key(written: str) -> str:
    """The model's name for a file's key: wrappers' prefixes off, ``network.`` before bare architectures' keys."""
    key = written
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key if key.startswith(("network.", "normalize.")) else f"network.{key}"


def read_state(path: Path, containers: Sequence[str] = _CONTAINERS) -> Mapping[str, Tensor]:
    """The state dict in a ``.safetensors`` or torch file, on the CPU; no code of the file's is run.

    Args:
        path: the file.
        containers: names that a torch file may keep its state dict under.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than tensors, no state dict, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give a .safetensors or torch file, or 'imagenet'")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is no torch file; it is not loaded, because that could run code from "
            "it. Where you trust it, save its tensors alone with torch.save(model.state_dict(), path)"
        ) from error
    except (safetensors.SafetensorError, *_UNREADABLE) as error:
        raise ValueError(f"{path} is damaged, unreadable or not a weights file ({error}): copy it again") from error
    return _state_in(content, path, containers)


def _state_in(content: Any, path: Path, containers: Sequence[str]) -> Mapping[str, Tensor]:
    """The state dict in what a torch file held."""
    if isinstance(content, Mapping):
        for container in containers:
            if isinstance(content.get(container), Mapping):
                content = content[container]
                break
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return content
    found = f"a dict with the keys {list(content)[:8]}" if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"{path} holds {found}; expected is a state dict (names to tensors), bare or under {', '.join(containers)}"
    )


def _imagenet_state(arch: str) -> Mapping[str, Tensor]:
    if arch not in _IMAGENET:
        raise ValueError(
            f"no ImageNet weights exist for {arch!r}, only for {', '.join(_IMAGENET)}: give a file instead"
        )
    weights = _IMAGENET[arch]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except (http.client.HTTPException, pickle.UnpicklingError, *_UNREADABLE) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        raise FileNotFoundError(
            f"the ImageNet weights of {arch} are {'damaged' if file.is_file() else 'missing'} at {file} and could not "
            f"be downloaded ({error}): get {weights.url} on a machine with internet access and put it there "
            "(TORCH_HOME moves the folder), or start without initial weights"
        ) from error


def _nothing_fits(spec: str | Path, arch: str, mismatched: list[str], unexpected: list[str]) -> str:
    examples = [*mismatched[:3], *(f"{key}: not in the model" for key in unexpected[:3])]
    return (
        f"no weight of {spec} fits the {arch} model ({'; '.join(examples)}): "
        "use the architecture, width and number of channels that the file was made with"
    )
