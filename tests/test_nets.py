"""The networks are the official ones: keys, shapes, outputs; samplers and losses against closed forms."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import edm_nets

GOLDEN = json.loads((Path(__file__).parent / 'golden.json').read_text())  # outputs of the official code

VP = dict(model_type='SongUNet', augment_dim=9)
VE = dict(VP, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
FULL_SIZE = [  # arguments, parameters, entries, SHA-256 of the lines "name<TAB>shape<TAB>par|buf" of the official code
    (dict(img_resolution=32, channel_mult=[2, 2, 2], **VP), 55_733_891, 425, '57cf56f98520ffd8'),
    (dict(img_resolution=32, label_dim=10, channel_mult=[2, 2, 2], **VP), 55_735_299, 427, '6fe5a590942a7670'),
    (dict(img_resolution=32, channel_mult=[2, 2, 2], **VE), 56_397_827, 432, '6d9445c7732f5e67'),
    (dict(img_resolution=32, label_dim=10, channel_mult=[2, 2, 2], **VE), 56_400_643, 434, '16cc756da0bbd226'),
    (dict(img_resolution=64, channel_mult=[1, 2, 2, 2], **VP), 61_805_571, 553, 'a03a6ad24b8c7c7b'),
    (dict(img_resolution=64, channel_mult=[1, 2, 2, 2], **VE), 62_761_091, 563, 'f20ebc549f767287'),
    (dict(img_resolution=64, label_dim=1000, model_type='DhariwalUNet', use_fp16=True), 295_899_267, 553,
     '1a21d6ab3d90810c')]


@pytest.mark.parametrize('kwargs, parameters, entries, digest', FULL_SIZE)
def test_full_size_keys(kwargs, parameters, entries, digest):
    with torch.device('meta'):
        net = edm_nets.EDMPrecond(img_channels=3, **kwargs)
    names = dict(net.named_parameters())
    lines = [f'{k}\t{tuple(v.shape)}\t{"par" if k in names else "buf"}' for k, v in net.state_dict().items()]
    assert sum(p.numel() for p in names.values()) == parameters and len(lines) == entries
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == digest


def filled(config):
    """A network with the recipe's values: every entry a known function of its name."""
    net = edm_nets.EDMPrecond(**config).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith('resample_filter'):
            continue
        seed = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 1000
        v = np.sin(0.7 * np.arange(tensor.numel()) + seed)
        if tensor.ndim > 1:
            v *= 1.5 / np.sqrt(tensor[0].numel())
        elif 'freqs' in name:
            v *= 16
        else:
            v = 1 + 0.1 * v if name.endswith('weight') else 0.1 * v
        tensor.copy_(torch.from_numpy(v.reshape(tensor.shape)))
    return net


def assert_golden(y, values, atol):
    assert torch.allclose(y[:, :, ::5, ::5].flatten().float(), torch.tensor(values), rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize('name', ['T1', 'T2', 'T3'])
def test_golden_outputs(name):
    golden, net = GOLDEN[name], filled(GOLDEN[name]['config'])
    assert sum(p.numel() for p in net.parameters()) == golden['params']
    x = torch.from_numpy(2 * np.sin(0.37 * np.arange(2 * 3 * 256)).reshape(2, 3, 16, 16))
    sigma, labels = torch.tensor([0.3, 5.0]), torch.eye(10)[[1, 3]] if net.label_dim else None
    assert_golden(net(x, sigma, labels), golden['y'], 1e-5)
    assert_golden(net(x, torch.tensor(0.7), labels), golden['y_scalar_sigma_0.7'], 1e-5)
    if 'y_labels_none' in golden:
        assert_golden(net(x, sigma), golden['y_labels_none'], 1e-5)
    if 'y_augment' in golden:
        assert_golden(net(x, sigma, labels, torch.arange(18.).sin().reshape(2, 9)), golden['y_augment'], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name, atol', [('T1', 2e-2), ('T2', 2e-4), ('T3', 2e-4)])  # T1 magnifies rounding 50,000 times
def test_golden_samples(name, atol):
    net, rng = filled(GOLDEN[name]['config']), edm_nets.ImageSeeds([0, 1], 'cpu')
    z = rng.randn([3, 16, 16])
    labels = torch.eye(10)[rng.randint(10)] if net.label_dim else None
    assert_golden(edm_nets.heun(net, z, labels, 6), GOLDEN[name]['sample_det6'], atol)
    churned = edm_nets.heun(net, z, labels, 6, S_churn=3, S_min=0.05, S_max=50, S_noise=1.003,
                            randn_like=rng.randn_like)
    assert_golden(churned, GOLDEN[name]['sample_churn6'], atol)


class GaussianDenoiser(torch.nn.Module):
    """The ideal denoiser of data N(mean, std^2): D(x; sigma) = (std^2 x + sigma^2 mean) / (std^2 + sigma^2)."""
    sigma_min, sigma_max = 0, float('inf')

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, sigma, class_labels=None):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return (self.std ** 2 * x + sigma ** 2 * self.mean) / (self.std ** 2 + sigma ** 2)


def test_heun_solves_the_gaussian_ode():
    """Along the exact flow x(0) = mean + std z' with z' = (x(80) - mean) / sqrt(std^2 + 80^2)."""
    net, z = GaussianDenoiser(0.3, 0.5), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    exact = 0.3 + 0.5 * (80 * z - 0.3) / (0.5 ** 2 + 80 ** 2) ** 0.5
    errors = [(edm_nets.heun(net, z, num_steps=n) - exact).abs().max() for n in (18, 36)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 3  # second order


def test_images_depend_on_their_seed_alone():
    net = edm_nets.EDMPrecond(16, 3, 4, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1).eval()
    net.sigma_init = 2.5
    together, alone = edm_nets.generate(net, range(5)), edm_nets.generate(net, [3], batch=1)
    assert torch.equal(together[3:4], alone) and not torch.equal(together[3], together[4])
    assert torch.equal(edm_nets.generate(net, range(5), 3, S_churn=5)[2:3], edm_nets.generate(net, [2], 3, S_churn=5))


def test_denoising_loss_has_its_known_minimum():
    """For data N(0, s^2) the ideal denoiser leaves s^2 sigma^2 / (s^2 + sigma^2) per pixel."""
    torch.manual_seed(0)
    s, n = 0.5, 20_000
    x_0, sigma = s * torch.randn(n, 3, 4, 4), torch.full([n, 1, 1, 1], 0.7)
    loss = edm_nets.denoising_loss(GaussianDenoiser(0, s), x_0, sigma, torch.randn_like(x_0))
    assert abs(loss / 48 - 1) < 0.01  # with EDM's weight it is 1 per pixel at every sigma, as s = sigma_data
    worse = edm_nets.denoising_loss(GaussianDenoiser(0, 0.4), x_0, sigma, torch.randn_like(x_0))
    assert worse > loss * 1.01
