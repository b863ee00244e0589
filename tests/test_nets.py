"""The networks are the official ones: keys, shapes, outputs; samplers, losses and critics against closed forms."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def off(y, expected):
    """The largest difference of two tensors, relative to the largest value expected."""
    y, expected = y.detach(), torch.as_tensor(expected).detach()
    return float((y - expected).abs().max() / expected.abs().max())


def filled(config):
    """A network with the values of golden.json: every entry a known function of its name."""
    net = edm_nets.EDMPrecond(**config).eval()
    for name, tensor in net.state_dict().items():
        v = np.sin(0.7 * np.arange(tensor.numel()) + sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 1000)
        if tensor.ndim > 1:
            v *= 1.5 / np.sqrt(tensor[0].numel())
        else:
            v = 16 * v if 'freqs' in name else 1 + 0.1 * v if name.endswith('weight') else 0.1 * v
        if 'resample_filter' not in name:
            tensor.copy_(torch.from_numpy(v.reshape(tensor.shape)))
    return net


def small(**kwargs):
    """A small network, by default a SongUNet with 4 classes; all of its layers do something."""
    return filled(dict(dict(img_resolution=16, img_channels=3, label_dim=4, model_type='SongUNet', model_channels=8,
                            channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]), **kwargs))


@pytest.mark.parametrize('kwargs, parameters, entries, digest', FULL_SIZE)
def test_keys_and_shapes_are_those_of_the_official_code(kwargs, parameters, entries, digest):
    with torch.device('meta'):
        net = edm_nets.EDMPrecond(img_channels=3, **kwargs)
    names = dict(net.named_parameters())
    lines = [f'{k}\t{tuple(v.shape)}\t{"par" if k in names else "buf"}' for k, v in net.state_dict().items()]
    assert sum(p.numel() for p in names.values()) == parameters and len(lines) == entries
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == digest


@torch.no_grad()
@pytest.mark.parametrize('name', ['T1', 'T2', 'T3'])
def test_outputs_are_those_of_the_official_code(name):
    golden, net = GOLDEN[name], filled(GOLDEN[name]['config'])
    x = torch.from_numpy(2 * np.sin(0.37 * np.arange(2 * 3 * 256)).reshape(2, 3, 16, 16))
    sigma, labels = torch.tensor([0.3, 5.0]), torch.eye(10)[[1, 3]] if net.label_dim else None
    arguments = {'y': (sigma, labels), 'y_scalar_sigma_0.7': (torch.tensor(0.7), labels), 'y_labels_none': (sigma,),
                 'y_augment': (sigma, labels, torch.arange(18.).sin().reshape(2, 9))}
    for key in arguments.keys() & golden.keys():
        assert off(net(x, *arguments[key])[:, :, ::5, ::5].flatten(), golden[key]) < 3e-5, key  # CPUs differ by 3e-6


@torch.no_grad()
@pytest.mark.parametrize('name, tolerance', [('T1', 2e-2), ('T2', 2e-4), ('T3', 2e-4)])  # CPUs differ by a tenth
def test_samples_are_those_of_the_official_code(name, tolerance):
    net, rng = filled(GOLDEN[name]['config']), edm_nets.ImageSeeds([0, 1], 'cpu')
    z, labels = rng.randn([3, 16, 16]), torch.eye(10)[rng.randint(10)] if net.label_dim else None
    churn = dict(S_churn=3, S_min=0.05, S_max=50, S_noise=1.003, randn_like=rng.randn_like)
    for key, settings in dict(sample_det6={}, sample_churn6=churn).items():
        x = edm_nets.heun(net, z, labels, 6, **settings)[:, :, ::5, ::5].flatten()
        assert off(x, GOLDEN[name][key]) < tolerance, key


@pytest.mark.parametrize('sampler', [{}, dict(num_steps=3, S_churn=5)])
def test_images_depend_on_their_seed_alone(sampler):
    net = small()
    net.sigma_init = 2.5
    together, alone = (edm_nets.generate(net, seeds, **sampler).int() for seeds in (range(5), [3]))
    assert (together[3:4] - alone).abs().max() <= 1 < (together[4:] - alone).abs().max()  # batches round differently


BATCH = (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),  # images, noise levels, labels
         torch.tensor([0.1, 0.4, 1, 5]).reshape(4, 1, 1, 1), torch.eye(4))
TEACHERS = [{}, dict(VE, label_dim=0), dict(model_type='DhariwalUNet', model_channels=32)]


every_critic = pytest.mark.parametrize('kind, kwargs', list(itertools.product(['encoder', 'energy'], TEACHERS)))


@every_critic
def test_critic_starts_from_the_teacher_and_knows_nothing(kind, kwargs):
    """It has the teacher's weights, all or all but the output layer's; no dropout; a decoder only as an `energy`."""
    teacher = small(dropout=0.5, **kwargs)
    theirs = teacher.model.state_dict()
    gone = {k for k in theirs if 'augment' in k or kind == 'encoder' and k.startswith(('dec.', 'out_'))}
    output = {k for k in theirs if '_aux_norm' in k or '_aux_conv' in k or k.startswith('out_')}
    for weights, fresh in dict(teacher=set(), features=output - gone).items():
        critic = edm_nets.make_critic(kind, teacher, weights).train()
        own = critic.model.state_dict()
        assert own.keys() == theirs.keys() - gone and {k for k in own if not torch.equal(own[k], theirs[k])} == fresh
        assert not critic(*BATCH).any() and critic(*BATCH).shape == (4, 2 if kind == 'encoder' else 1)
        assert not any(getattr(module, 'dropout', 0) for module in critic.modules())
    assert not torch.equal(edm_nets.make_critic(kind, teacher, 'random').model.enc['16x16_conv'].weight,
                           teacher.model.enc['16x16_conv'].weight)


@every_critic
def test_every_weight_of_a_critic_learns_also_from_r1(kind, kwargs):
    critic, x = edm_nets.make_critic(kind, small(**kwargs)).train(), BATCH[0].clone().requires_grad_()
    for head in critic.heads:  # it has begun to learn
        nn.init.normal_(head[-1].weight, std=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        logits = critic(x, *BATCH[1:])
    gradient, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    for loss, ndim in ((logits.square().sum(), 1), (gradient.square().sum() + 0 * logits.sum(), 2)):
        gradients = torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)
        assert all(g.isfinite().all() and (g.any() or g.ndim < ndim) for g in gradients)  # R1 does not see all biases


@every_critic
def test_critic_judges_each_image_alone_and_its_gradient_is_that_of_finite_differences(kind, kwargs):
    critic, (x, sigma, labels) = edm_nets.make_critic(kind, small(**kwargs)), BATCH
    for head in critic.heads:
        nn.init.normal_(head[-1].weight, std=0.1)
    x = x.clone().requires_grad_()
    logits = critic(x, sigma, labels)
    assert logits.dtype == torch.float32 and off(critic(x[1:2], sigma[1:2], labels[1:2]), logits[1:2]) < 1e-4
    gradient, = torch.autograd.grad(logits.sum(), x)
    step = 0.002 * gradient / gradient.norm()
    change = critic(x + step, sigma, labels) - critic(x - step, sigma, labels)
    assert float(change.sum().detach()) == pytest.approx(0.004 * float(gradient.norm()), rel=0.02)


def test_energy_contains_the_ratio_of_gaussians():
    """N(0, s^2) against N(0, t^2), noised: l = (1/t'^2 - 1/s'^2) |x|^2 / 2 + const is one choice of a_3, a_0."""
    critic, sigma, d = edm_nets.make_critic('energy', small()), 0.6, 3 * 16 * 16
    s2, t2 = 0.3 ** 2 + sigma ** 2, 0.5 ** 2 + sigma ** 2
    exact = ((1 / t2 - 1 / s2) * BATCH[0].square() / 2 + 0.5 * np.log(t2 / s2)).sum([1, 2, 3])
    nn.init.constant_(critic.heads[0][-1].bias[2], (1 / t2 - 1 / s2) / 2 * (0.5 ** 2 + sigma ** 2) * d ** 0.5)
    nn.init.constant_(critic.heads[0][-1].bias[3], 0.5 * np.log(t2 / s2) * d ** 0.5)
    assert off(critic(BATCH[0], torch.full([4, 1, 1, 1], sigma), BATCH[2]).flatten(), exact) < 1e-4
