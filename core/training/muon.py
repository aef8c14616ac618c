"""Muon: an optimizer that orthogonalises the momentum of each convolution's weights; it needs fewer steps than Adam.

K. Jordan and others: Muon, an optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon.
J. Liu and others: Muon is scalable for LLM training, 2025, arXiv 2502.16982 (the size of the step).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Five steps of this polynomial bring singular values between about 0.01 and 1 to between 0.7 and 1.2 (Jordan 2024).
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """Muon for the weights of hidden convolutions, fused Adam for all other parameters.

    A hidden convolution has several channels in and a kernel of more than one voxel. The root mean square of its step
    is the learning rate, as it is of Adam's first step. It keeps one moment of these weights where Adam keeps two. Like
    fused Adam it skips the step when found_inf is set, and does not wait for the GPU.

    Args:
        network: the network.
        learning_rate: of both.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf

    def __init__(self, network: nn.Module, learning_rate: float):
        # Convolutions that share a weight make one step of it.
        ids = {id(module.weight) for module in network.modules() if is_hidden(module)}
        hidden = [parameter for parameter in network.parameters() if id(parameter) in ids]
        others = [parameter for parameter in network.parameters() if id(parameter) not in ids]
        self.adam = torch.optim.Adam(others, lr=learning_rate, fused=True)
        super().__init__([{**self.adam.param_groups[0]}, {"params": hidden}], {"lr": learning_rate})
        for weight in hidden:
            self.state[weight]["momentum"] = torch.zeros_like(weight)
        self.share()

    def share(self) -> None:
        """Let Adam work on the first group and the state of this optimizer."""
        self.adam.param_groups, self.adam.state = self.param_groups[:1], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state that `state_dict` has given."""
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Change all parameters that have a gradient."""
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.adam.grad_scale, self.adam.found_inf = scale, skip
        self.adam.step()
        group = self.param_groups[1]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            gradient = weight.grad if scale is None else weight.grad / scale
            go = 1.0
            if skip is not None:  # a step that moves nothing
                go = (skip == 0).to(gradient.dtype)
                gradient = torch.where(skip == 0, gradient, 0.0)
            momentum = self.state[weight]["momentum"]
            momentum.lerp_(gradient, (1 - MOMENTUM) * go)
            direction = orthogonalise(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's look ahead
            weight.sub_(direction.view_as(weight) * (group["lr"] * max(direction.shape) ** 0.5 * go))


def is_hidden(module: nn.Module) -> bool:
    """Return True for a convolution of several channels with a kernel of more than one voxel."""
    return isinstance(module, nn.Conv3d) and min(module.weight.shape[:2]) > 1 and module.weight[0, 0].numel() > 1


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix to X, (M, N), whose singular values are all 1, by a Newton-Schulz iteration.

    Each step is a polynomial of the smaller matrix X X^T, so only two products involve X itself.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    gram = x @ x.T
    size = gram.trace().sqrt().clamp(min=1e-12)  # the Frobenius norm, by which X is divided
    gram = gram / size**2
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = identity / size
    for _ in range(ITERATIONS):
        step = a * identity + (b * identity + c * gram) @ gram
        product, gram = step @ product, gram @ step @ step
    x = product @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
