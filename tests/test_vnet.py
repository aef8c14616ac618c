"""The network against figure 2 of the V-Net paper, and the faults that public ports of it are known for."""

import pytest
import torch
from torch import nn

from vnet import NORMS, ResidualStage, VNet, check_size

CLASSES = 14


def small_vnet(norm: str = "instance") -> VNet:
    torch.manual_seed(0)
    return VNet(CLASSES, channels=4, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm)


def test_stages_have_the_papers_channels_and_sizes():
    network = VNet(CLASSES)
    shapes = {}
    for name, module in network.named_modules():
        if isinstance(module, ResidualStage):
            module.register_forward_hook(
                lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            )
    with torch.inference_mode():
        logits = network(torch.zeros(1, 1, 64, 32, 32))
    assert shapes == {
        "first": (16, 64, 32, 32),
        "down_stages.0": (32, 32, 16, 16),
        "down_stages.1": (64, 16, 8, 8),
        "down_stages.2": (128, 8, 4, 4),
        "down_stages.3": (256, 4, 2, 2),
        "up_stages.0": (256, 8, 4, 4),
        "up_stages.1": (128, 16, 8, 8),
        "up_stages.2": (64, 32, 16, 16),
        "up_stages.3": (32, 64, 32, 32),
    }
    assert logits.shape == (1, CLASSES, 64, 32, 32)


def test_stages_have_the_papers_number_of_5x5x5_convolutions():
    network = VNet(CLASSES)
    stages = [network.first, *network.down_stages, *network.up_stages]
    assert [len(stage.convs) for stage in stages] == [1, 2, 3, 3, 3, 3, 3, 2, 1]
    assert all(conv.kernel_size == (5, 5, 5) for stage in stages for conv in stage.convs)


def test_parameter_count_is_the_figures():
    # Weights of the 5x5x5 convolutions, of the 2x2x2 ones down and up, and of the last 1x1x1 one with its bias.
    fives = 16 + 2 * 32**2 + 3 * 64**2 + 3 * 128**2 + 3 * 256**2  # down: channels in times out, per convolution
    fives += 3 * 256**2 + 3 * 128**2 + 2 * 64**2 + 32**2  # up
    twos = 16 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 128 + 256 * 64 + 128 * 32 + 64 * 16
    # A norm's scale and shift and a PReLU's slope behind each convolution, one of each per channel.
    channels = 16 + 2 * 32 + 3 * (64 + 128 + 256) + 3 * (256 + 128) + 2 * 64 + 32
    channels += (32 + 64 + 128 + 256) + (128 + 64 + 32 + 16)
    expected = 125 * fives + 8 * twos + 32 * CLASSES + CLASSES + 3 * channels
    assert expected == 65_179_166
    assert sum(p.numel() for p in VNet(CLASSES).parameters()) == expected


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_reaches_every_parameter(norm):
    network = small_vnet(norm)
    image = torch.rand(2, 1, 16, 8, 12)
    target = torch.randint(CLASSES, (2, 16, 8, 12))
    nn.functional.cross_entropy(network(image), target).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [(16, 16, 16), (8, 4, 4), (20, 12, 28)])
def test_output_has_the_inputs_size(size):
    assert small_vnet()(torch.rand(1, 1, *size)).shape == (1, CLASSES, *size)


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
def test_samples_of_a_batch_do_not_mix(norm):
    # A port that repeats the input along the batch axis instead of the channels gets this wrong.
    network = small_vnet(norm).double()
    batch = torch.rand(3, 1, 8, 8, 8, dtype=torch.double)
    together = network(batch)
    alone = torch.cat([network(sample[None]) for sample in batch])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_stage_adds_its_input():
    # With norms that multiply by 0 the convolutions say nothing, and what is left is the activated input.
    for channels_in in (1, 6):
        stage = ResidualStage(channels_in, 6, convs=2, norm="instance")
        for norm in stage.norms:
            nn.init.zeros_(norm.weight)
        x = torch.randn(2, channels_in, 4, 4, 4)
        expected = torch.where(x > 0, x, 0.25 * x).expand(2, 6, 4, 4, 4)
        torch.testing.assert_close(stage(x), expected)


def test_skips_reach_the_way_up():
    # Cut below the first stage, the network must still see the scan through the uppermost skip.
    network = small_vnet()
    nn.init.zeros_(network.ups[-1].conv.weight)
    image = torch.rand(1, 1, 8, 8, 8, requires_grad=True)
    network(image)[0, 1, 4, 4, 4].backward()
    assert image.grad.abs().sum() > 0


def test_nothing_is_random_in_a_forward_pass():
    network = small_vnet().train()
    image = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(network(image), network(image))
    assert torch.equal(network(image), network.eval()(image))


def test_as_many_stages_up_as_there_are_halvings():
    with pytest.raises(ValueError, match="up_convs: got 5 stages up for 5 down, expected 4"):
        VNet(CLASSES, up_convs=(3, 3, 2, 1, 1))


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm: got 'layer', expected one of instance, batch, group, none"):
        VNet(CLASSES, norm="layer")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 64, 64), "size: got 100 64 64, expected multiples of 16.*nearest is 96 64 64"),
        ((64, 64, 8), "expected multiples of 16.*nearest is 64 64 16"),
        ((16, 16, 16), "leaves a single voxel at the bottom"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        check_size(size, halvings=4)
    with pytest.raises(ValueError, match=message):
        VNet(CLASSES, channels=1)(torch.zeros(1, 1, *size))


def test_sizes_that_fit_pass():
    check_size((256, 256, 128), halvings=4)
    check_size((32, 16, 16), halvings=4)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 16), (1, 16, 16, 16)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected \\(B, 1, X, Y, Z\\)"):
        small_vnet()(torch.zeros(shape))
