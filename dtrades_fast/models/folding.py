"""A network as an attack needs it: eval mode, frozen, BatchNorm folded into the convolutions before it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from dtrades_fast.models.layout import contiguous_input
from dtrades_fast.models.pooling import MaxPool2d

__all__ = ["FoldedNetwork", "faithful", "fold"]

Module = TypeVar("Module", bound=nn.Module)
Layer = nn.Conv2d | nn.Linear  #: a BatchNorm can be folded into

#: Largest difference of a folded network's logits, as a share of the largest logit: float32 rounding through 34 layers.
LOGIT_TOLERANCE = 1e-3
#: Largest difference of its input gradients, in L2 and as a share: rounding flips a few ReLUs.
GRADIENT_TOLERANCE = 0.05


class FoldedNetwork(nn.Module):
    """``model`` in eval mode with BatchNorm folded into the layer before it; same logits within rounding.

    .. math:: W' = W \\gamma / \\sqrt{v + \\epsilon}, \\quad b' = (b - m) \\gamma / \\sqrt{v + \\epsilon} + \\beta

    A convolution or linear layer is folded where nothing but the BatchNorm sees its output. What is not folded shares
    its storage with ``model``; after a change of the model's weights or statistics, :meth:`refresh` brings the folded
    ones up to date. No parameter here needs a gradient, and the model's modes and gradients are left alone.

    Args:
        model: traced with ``torch.fx``, so its control flow must not depend on the images.

    Raises:
        RuntimeError: the model cannot be traced; its own words say why.

    Attributes:
        folded: BatchNorm layers that are gone.
        kept: BatchNorm layers that are still there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        graph, constants = traced(model)
        pairs = foldable_pairs(model, graph)
        self._pairs: list[tuple[Layer, _BatchNorm, Layer]] = []  # layer and BatchNorm of the model, layer here
        parts: dict[str, object] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                parts[str(node.target)] = frozen_copy(model.get_submodule(str(node.target)))
            elif node.op == "get_attr":
                name = str(node.target)
                parts[name] = constants[name] if name in constants else attribute(model, name)
        for layer, norm in pairs:
            theirs = cast(Layer, model.get_submodule(str(layer.target)))
            own = parts[str(layer.target)] = with_own_weights(theirs)
            self._pairs.append((theirs, cast(_BatchNorm, model.get_submodule(str(norm.target))), own))
            norm.replace_all_uses_with(layer)
            graph.erase_node(norm)
            del parts[str(norm.target)]
        self.network = fx.GraphModule(parts, graph)
        self.network.eval()
        self.folded = len(pairs)
        self.kept = sum(isinstance(module, _BatchNorm) for module in self.network.modules())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and statistics, in place."""
        for layer, norm, own in self._pairs:
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
            weight, bias = fuse(layer.weight, layer.bias, mean, variance, norm.eps, norm.weight, norm.bias)
            own.weight.copy_(weight)
            cast(Tensor, own.bias).copy_(bias)

    @property
    def own_layers(self) -> list[Layer]:
        """The layers with weights of their own, which :meth:`refresh` writes; all others share the model's."""
        return [own for _, _, own in self._pairs]

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def traced(model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The model's graph, and the tensors in it that are no attributes of the model; which is left as it was."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise RuntimeError(f"{type(model).__name__} cannot be traced: {error}") from error
    finally:
        constants = {name: value for name, value in vars(model).items() if name not in before[0][1]}
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
    return graph, constants


class _Tracer(fx.Tracer):
    """Keeps our own layers whole, as it does PyTorch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MaxPool2d) or super().is_leaf_module(m, module_qualified_name)


def foldable_pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Layers and the BatchNorms, with running statistics, that alone see what they give; each used once."""
    calls = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(node.target for node in calls)
    pairs = []
    for norm, module in calls.items():
        layer = norm.args[0] if norm.args else None
        if not isinstance(module, _BatchNorm) or not isinstance(layer, fx.Node) or layer not in calls:
            continue
        hooks = [hook for hook in calls[layer]._forward_pre_hooks.values() if hook is not contiguous_input]
        if "weight" not in calls[layer]._parameters or hooks or calls[layer]._forward_hooks:
            continue  # a weight that is computed anew in each pass
        once = len(layer.users) == uses[layer.target] == uses[norm.target] == 1
        if once and type(calls[layer]) in (nn.Conv2d, nn.Linear) and module.running_mean is not None:
            pairs.append((layer, norm))
    return pairs


def attribute(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its dotted name, detached."""
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(owner), name)).detach()


def frozen_copy(module: Module) -> Module:
    """A copy with a mode and ``requires_grad`` of its own, on the same storage."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    twin._forward_pre_hooks = module._forward_pre_hooks.copy()
    twin._modules = {name: None if m is None else frozen_copy(m) for name, m in module._modules.items()}
    return twin.eval()


def with_own_weights(layer: Layer) -> Layer:
    """A frozen copy of a layer with a weight and a bias of its own, still to be filled."""
    own = frozen_copy(layer)
    weight = layer.weight.detach()
    own.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
    own.bias = nn.Parameter(weight.new_empty(len(weight)), requires_grad=False)
    return own


def fold(model: nn.Module, images: Tensor) -> FoldedNetwork | None:
    """The folded network, or None if there is none that computes what the model computes on these images.

    Args:
        model: in eval mode.
        images: [N, C, H, W], a few real ones: logits and gradients of both are compared on them.
    """
    try:
        network = FoldedNetwork(model)
        return network if faithful(network, model, images) else None
    except Exception:  # of tracing, or of the network's own code; there is always the network itself
        return None


def faithful(network: nn.Module, model: nn.Module, images: Tensor) -> bool:
    """Whether two networks give the same logits, with and without gradients, and the same input gradients, within
    rounding."""
    with torch.no_grad():
        if not close(network(images), model(images)):
            return False
    logits, gradients = zip(*(logits_and_gradients(m, images) for m in (network, model)), strict=True)
    if not close(*logits):
        return False
    change = (gradients[0] - gradients[1]).norm() <= GRADIENT_TOLERANCE * gradients[1].norm()
    return bool(change)


def close(logits: Tensor, expected: Tensor) -> bool:
    """Whether these are the expected ones within rounding."""
    if logits.shape != expected.shape:
        return False
    return bool((logits - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max())


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the prediction's margin over the mean logit."""
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        logits = model(images)
        (gradient,) = torch.autograd.grad((logits.amax(1) - logits.mean(1)).sum(), images)
    return logits.detach(), gradient
