import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.errors import SferdError
from sferd_lab.unet import AdaGN, AttentionMap, SelfAttention, UNet, UNetSettings, angle_embedding, unet_info


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(**settings):
    """A small U-Net in float64 with random weights throughout: as made, its zeroed layers would hide angle, labels and attention."""
    torch.manual_seed(0)
    unet = UNet(UNetSettings(**{"widths": (8, 8), "blocks": 1, "heads": 2} | settings)).double()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    return unet.requires_grad_(False)


def captured(unet, x, phi=0.7, **condition):
    capture = dict.fromkeys(unet.attention_layers)
    return unet(x, phi, capture=capture, **condition), capture


SHAPES = [
    pytest.param({"heads": 1}, (8, 8), id="one head"),
    pytest.param({"heads": 2}, (4, 8), id="two heads, wide image"),
    pytest.param({"heads": 8, "channels": 3}, (6, 2), id="eight heads, colour, tall image"),
    pytest.param({"widths": (8, 16, 16), "attention": (1, 2), "heads": 4, "blocks": 2}, (8, 12), id="three levels"),
]


# ---- attention


@pytest.mark.parametrize(("settings", "size"), SHAPES)
def test_each_query_spreads_a_weight_of_one_over_the_keys(settings, size):
    unet = network(**settings)
    _, maps = captured(unet, normal(2, unet.shape.channels, *size))
    for map_ in maps.values():
        torch.testing.assert_close(map_.weights.sum(-1), torch.ones_like(map_.weights[..., 0]), rtol=0, atol=1e-14)
        # Over queries they do not sum to 1, or the test could not tell which axis the softmax runs over.
        assert (map_.weights.sum(-2) - 1).abs().max() > 1e-3


@pytest.mark.parametrize(("settings", "size"), SHAPES)
def test_received_attention_averages_exactly_one_over_positions(settings, size):
    unet = network(**settings)
    _, maps = captured(unet, normal(2, unet.shape.channels, *size))
    for map_ in maps.values():
        received = map_.received()
        torch.testing.assert_close(received.mean((1, 2)), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)
        assert received.std() > 1e-3


def test_received_attention_sums_over_queries_and_averages_over_heads():
    # One image, two heads, a 1 x 2 map. Head 0: both queries look at key 1. Head 1: query 0 at key 0, query 1 half at each.
    weights = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]]], dtype=torch.float64)
    torch.testing.assert_close(AttentionMap(weights, 1, 2).received(), torch.tensor([[[0.75, 1.25]]], dtype=torch.float64))


@pytest.mark.parametrize(("settings", "size"), SHAPES)
def test_capturing_attention_does_not_change_the_output(settings, size):
    unet = network(**settings)
    x = normal(3, unet.shape.channels, *size)
    v, maps = captured(unet, x)
    assert all(maps.values())
    torch.testing.assert_close(v, unet(x, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_map_is_the_softmax_of_queries_times_keys_over_the_root_of_a_heads_size(heads):
    layer = SelfAttention("here", 8, heads).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    h = normal(2, 8, 2, 3)
    capture = {"here": None}
    out = layer(h, capture)
    # From the layer's own weights, image by image, head by head, position by position.
    size = 8 // heads
    normed = F.group_norm(h, 8, layer.norm.weight, layer.norm.bias)
    kernel = layer.qkv.weight[:, :, 0, 0]
    added = torch.zeros_like(h)
    for image in range(2):
        for head in range(heads):
            rows = [slice(part * 8 + head * size, part * 8 + (head + 1) * size) for part in range(3)]
            q, k, v = (kernel[row] @ normed[image].flatten(1) + layer.qkv.bias[row, None] for row in rows)
            scores = torch.einsum("dq,dk->qk", q, k) / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            torch.testing.assert_close(capture["here"].weights[image, head], weights)
            added[image, head * size : (head + 1) * size] = torch.einsum("qk,dk->dq", weights, v).unflatten(-1, (2, 3))
    torch.testing.assert_close(out, h + F.conv2d(added, layer.out.weight, layer.out.bias))


def test_a_map_knows_its_own_height_and_width_on_an_image_that_is_not_square():
    unet = network(widths=(8, 8, 8), attention=(0, 2))
    _, maps = captured(unet, normal(1, 1, 4, 12))
    sizes = {name: (map_.height, map_.width, *map_.weights.shape[1:]) for name, map_ in maps.items()}
    low, high = (1, 3, 2, 3, 3), (4, 12, 2, 48, 48)
    assert sizes == {"encoder.0.0": high, "encoder.2.0": low, "middle": low, "decoder.2.0": low, "decoder.0.0": high}


def test_received_attention_lies_where_the_keys_are():
    # One key at row 1, column 2 of a 2 x 3 map stands out and every query looks for it.
    layer = SelfAttention("here", 8, 1).double()
    with torch.no_grad():
        layer.norm.weight.copy_(torch.ones(8))
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        layer.qkv.bias[:8] = 1.0
        layer.qkv.weight[8:16, :, 0, 0] = 5 * torch.eye(8)
    h = torch.zeros(1, 8, 2, 3, dtype=torch.float64)
    h[..., 1, 2] = 1.0
    capture = {"here": None}
    layer(h, capture)
    assert capture["here"].received()[0].argmax() == 1 * 3 + 2


def test_layers_are_named_in_the_order_of_computation():
    unet = network(widths=(8, 8), blocks=2, attention=(1,))
    order = []
    for module in unet.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda module, *_: order.append(module.name))
    unet(normal(1, 1, 4, 4), 0.5)
    assert unet.attention_layers == tuple(order) == ("encoder.1.0", "encoder.1.1", "middle", "decoder.1.0", "decoder.1.1")


def test_only_the_layers_asked_for_hand_out_a_map():
    denoiser = NetworkDenoiser(network())
    x = normal(1, 1, 4, 4)
    assert denoiser(x, 0.5).attention == {}
    assert set(denoiser(x, 0.5, ["middle", "decoder.0.0"]).attention) == {"middle", "decoder.0.0"}


def test_an_unknown_layer_is_refused_with_the_names_there_are():
    with pytest.raises(SferdError, match=r"attention layer 'decoder.7.0'; allowed: .*middle, decoder.1.0"):
        NetworkDenoiser(network())(normal(1, 1, 4, 4), 0.5, ["decoder.7.0"])


# ---- images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (4, 8), (12, 4), (8, 20)])
def test_every_image_size_that_divides_by_the_factor_works_grey_and_colour(channels, size):
    unet = network(channels=channels, widths=(8, 8, 8))
    assert unet.shape.factor == 4
    x = normal(2, channels, *size)
    assert unet(x, 0.5).shape == x.shape


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (7, 7), (2, 2)])
def test_any_other_image_size_is_refused(size):
    with pytest.raises(SferdError, match=rf"image size {size[0]}x{size[1]}; allowed: multiples of 4, for 3 levels"):
        network(widths=(8, 8, 8))(normal(1, 1, *size), 0.5)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 4, 4), (4, 4)])
def test_images_with_other_channels_or_dimensions_are_refused(shape):
    with pytest.raises(SferdError, match=r"images have shape .*; allowed: \(B, 1, H, W\)"):
        network()(normal(*shape), 0.5)


def test_each_image_of_a_batch_is_treated_by_itself_at_its_own_angle():
    unet = network()
    x, phi = normal(3, 1, 4, 4), torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64)
    together = unet(x, phi)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], unet(x[row : row + 1], phi[row]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("phi", [torch.zeros(3), torch.zeros(2, 2), 2.0, -0.1])
def test_an_angle_of_the_wrong_shape_or_range_is_refused(phi):
    with pytest.raises(SferdError, match="phi"):
        network()(normal(2, 1, 4, 4), phi)


# ---- labels


def test_no_labels_means_the_last_label():
    unet, x = network(classes=3), normal(2, 1, 4, 4)
    null = unet(x, 0.5, torch.tensor([3, 3]))
    assert torch.equal(unet(x, 0.5), null)
    for label in range(3):
        assert (unet(x, 0.5, torch.tensor([label, label])) - null).abs().max() > 1e-3


def test_each_image_is_told_its_own_label():
    unet, x = network(classes=3), normal(2, 1, 4, 4)
    together = unet(x, 0.5, torch.tensor([2, 0]))
    torch.testing.assert_close(together[1:], unet(x[1:], 0.5, torch.tensor([0])), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0])],
    ids=["too large", "negative", "one for two images", "a column", "not whole numbers"],
)
def test_labels_the_network_does_not_know_are_refused(labels):
    with pytest.raises(SferdError, match=r"labels are .*; allowed: integers \(2,\) with 0 to 3"):
        network(classes=3)(normal(2, 1, 4, 4), 0.5, labels)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(SferdError, match="labels were given to an unconditional network"):
        network()(normal(2, 1, 4, 4), 0.5, torch.tensor([0, 1]))


# ---- the angle and the semantic code


def test_the_time_embedding_tells_neighbouring_angles_of_a_1000_step_grid_apart():
    phi = torch.linspace(0, HALF_PI, 1001, dtype=torch.float64)
    embedding = angle_embedding(phi, 32)
    # A step of 1/1000 of the range turns the fastest pair by 1 radian, a chord of 2 sin(1/2).
    neighbours = (embedding[1:] - embedding[:-1]).norm(dim=1)
    assert neighbours.min() > 2 * math.sin(0.5)
    torch.testing.assert_close(embedding[:, 0], torch.cos(torch.arange(1001, dtype=torch.float64)))


def test_the_slowest_pair_of_the_time_embedding_never_repeats_over_the_whole_range():
    embedding = angle_embedding(torch.linspace(0, HALF_PI, 101, dtype=torch.float64), 32)
    assert (embedding[:, 15].diff() < 0).all()


def test_the_network_sees_the_angle():
    unet, x = network(), normal(1, 1, 4, 4)
    assert (unet(x, 0.5) - unet(x, 0.5 + HALF_PI / 1000)).abs().max() > 1e-3


def test_adagn_is_the_published_formula():
    # h <- (1 + z_s) ((1 + t_s) GN(h) + t_b) + z_b, written out with means and standard deviations over each group of channels.
    torch.manual_seed(0)
    layer = AdaGN(16, 5, 3).double()
    h, emb, z = normal(2, 16, 3, 2), normal(2, 5, seed=1), normal(2, 3, seed=2)
    groups = h.reshape(2, 8, -1)
    normed = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed.reshape_as(h)
    t = emb @ layer.time.weight.T + layer.time.bias
    s = z @ layer.semantic.weight.T + layer.semantic.bias
    t_scale, t_shift, z_scale, z_shift = (part[:, :, None, None] for part in (t[:, :16], t[:, 16:], s[:, :16], s[:, 16:]))
    torch.testing.assert_close(layer(h, emb, z), (1 + z_scale) * ((1 + t_scale) * normed + t_shift) + z_shift)


def test_adagn_without_a_code_is_the_time_part_alone():
    torch.manual_seed(0)
    layer = AdaGN(8, 5).double()
    h, emb = normal(2, 8, 3, 2), normal(2, 5, seed=1)
    scale, shift = (part[:, :, None, None] for part in layer.time(emb).split(8, dim=1))
    torch.testing.assert_close(layer(h, emb, None), (1 + scale) * F.group_norm(h, 8) + shift)


def test_a_new_network_predicts_zero_velocity():
    torch.manual_seed(0)
    unet = UNet(UNetSettings(widths=(8, 8))).double()
    assert torch.equal(unet(normal(2, 1, 4, 4), 0.5), torch.zeros(2, 1, 4, 4, dtype=torch.float64))


def test_a_new_network_has_a_gradient_all_the_same():
    torch.manual_seed(0)
    unet = UNet(UNetSettings(widths=(8, 8))).double()
    unet(normal(2, 1, 4, 4), 0.5).sum().backward()
    assert unet.decoder.head.weight.grad.abs().max() > 0


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels = 0; allowed: 1 or more"),
        ({"blocks": 0}, "blocks = 0; allowed: 1 or more"),
        ({"heads": 0}, "heads = 0; allowed: 1 or more"),
        ({"widths": ()}, r"widths = \(\); allowed: 1 or more"),
        ({"widths": (8, 0)}, r"widths = \(8, 0\); allowed: 1 or more"),
        ({"classes": -1}, "classes = -1; allowed: 0"),
        ({"widths": (8,), "attention": (1,)}, r"attention = \(1,\); allowed: levels 0 to 0"),
        ({"attention": (-1,)}, r"attention = \(-1,\); allowed: levels 0 to 1"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, message):
    with pytest.raises(SferdError, match=message):
        UNetSettings(**settings)


def test_heads_must_divide_the_channels():
    with pytest.raises(SferdError, match=r"heads = 3; allowed: a divisor of the 8 channels of attention layer 'encoder.0.0'"):
        UNet(UNetSettings(widths=(8,), attention=(0,), heads=3))


def test_the_info_of_a_network_builds_the_same_network():
    unet = network(channels=3, widths=(8, 16), attention=(1,), heads=4, classes=2)
    twin = UNet(UNetSettings(**unet_info(unet))).double()
    twin.load_state_dict(unet.state_dict())
    x = normal(1, 3, 4, 4)
    assert torch.equal(twin(x, 0.5), unet(x, 0.5))


def test_a_decoder_on_frozen_features_trains():
    # torch's group norm reads past its tensors in just this case: weights to train, channels last, an input without gradient.
    unet = network(channels=3, widths=(8, 16)).requires_grad_(False)
    features = unet.encode(normal(4, 3, 8, 8), 0.5)
    assert not features.middle.requires_grad
    assert features.middle.is_contiguous(memory_format=torch.channels_last)
    plain = unet.decoder(features, features.middle)
    trained = unet.decoder.requires_grad_(True)(features, features.middle)
    assert torch.equal(trained, plain)
    trained.square().sum().backward()
    norm = unet.decoder.levels[0][0].norm
    before, step = norm.weight.detach().clone(), 1e-6 * norm.weight.grad.sign()

    def loss(shift):
        with torch.no_grad():
            norm.weight.copy_(before + shift)
            return unet.decoder(features, features.middle).square().sum()

    assert torch.isclose((loss(step) - loss(-step)) / 2, (norm.weight.grad * step).sum(), rtol=1e-6)
