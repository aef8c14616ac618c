"""The network that the scripts train and run: the one function to change for another network.

Return any nn.Module that maps a float image (B, 1, X, Y, Z) in 0..1 to logits (B, K, X, Y, Z), K = len(config.organs).
Checkpoints store its state dict and compare names and shapes with it; they know nothing else of the network.
"""

from torch import nn

from core.config import Config
from vnet import VNet, check_size


def build_network(config: Config) -> nn.Module:
    """Build the network that the settings describe, with fresh weights.

    Raises:
        ValueError: when the settings describe no network, or their size or patch_size does not fit it.
    """
    network = VNet(len(config.organs), config.channels, config.down_convs, config.up_convs, config.norm)
    check_size(config.input_size, network.halvings, "patch_size" if config.patch_size else "size")
    return network
