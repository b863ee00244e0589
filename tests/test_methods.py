"""The mathematics of the three methods against Gaussians and other closed forms; starts; the verifier."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import disback
import distributional
import edm_nets
import teacher_free
from test_nets import BATCH, off, small

MU, STD = 0.4, 0.7  # the student makes N(theta, s^2)
DATA_MU, DATA_STD = -0.2, 0.5
TEXTBOOK = dict(  # f of the divergences E_student[f(r)], r = p_data / p_student
    js=lambda r: (r * r.log() - (1 + r) * ((1 + r) / 2).log()) / 2, rkl=lambda r: -r.log(), fkl=lambda r: r * r.log(),
    hellinger=lambda r: (r.sqrt() - 1) ** 2 / 2, jeffreys=lambda r: (r - 1) * r.log(),
    ns=lambda r: (1 + r) * ((1 + r) / (2 * r)).log())


def denoise(x, sigma, mu, std):
    return (std ** 2 * x + sigma ** 2 * mu) / (std ** 2 + sigma ** 2)


def log_density(x, mu, std, sigma=0):
    variance = torch.as_tensor(std ** 2 + sigma ** 2)
    return -0.5 * ((x - mu) ** 2 / variance + (2 * torch.pi * variance).log())


def divergence(name, sigma, theta=MU, s=STD):
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64) * max(sigma, 1)
    p, q = log_density(x, theta, s, sigma), log_density(x, DATA_MU, DATA_STD, sigma)
    return torch.trapezoid(p.exp() * TEXTBOOK[name]((q - p).exp()), x)


@pytest.mark.parametrize('sigma', [0.1, 1.0, 5.0])
@pytest.mark.parametrize('name', [*teacher_free.DIVERGENCES, 'di'])
def test_student_gradient_is_that_of_the_divergence(name, sigma):
    """It has the exact ratio or, in disback.py, the exact scores: there `di` is sigma^2 times `rkl`."""
    theta, s = torch.tensor([MU, STD], requires_grad=True)
    exact = torch.autograd.grad(divergence('rkl' if name == 'di' else name, sigma, theta, s), [theta, s])
    normal = torch.special.ndtri((torch.arange(600, dtype=torch.float64) + 0.5) / 600)  # quantiles
    z, eps = torch.cartesian_prod(normal, normal).T.reshape(2, -1, 1, 1, 1)
    x_0, level = theta + s * z, torch.full_like(z, sigma)
    x_t = x_0 + sigma * eps
    if name == 'di':
        D_fake, D_data = denoise(x_t, sigma, MU, STD), denoise(x_t, sigma, DATA_MU, DATA_STD)
        loss = disback.student_loss(x_0, D_fake, D_data, 'di') / sigma ** 2
    else:
        log_ratio = log_density(x_t, DATA_MU, DATA_STD, sigma) - log_density(x_t, MU, STD, sigma)
        loss = teacher_free.student_loss(log_ratio.flatten(), level, name, '1')
    for gradient, e in zip(torch.autograd.grad(loss, [theta, s]), exact):
        assert float(gradient) == pytest.approx(float(e), rel=1e-2)


def test_dmd_form_divides_by_the_denoising_distance_and_no_gradient_reaches_the_scores():
    x_0, D_fake, D_target = tensors = [torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(3)]
    di, dmd = (torch.autograd.grad(disback.student_loss(*tensors, form), tensors, allow_unused=True)
               for form in ('di', 'dmd'))
    assert off(di[0], (D_fake - D_target) / 4) < 1e-5 and di[1:] == dmd[1:] == (None, None)
    assert off(dmd[0] * (x_0 - D_target).abs().mean([1, 2, 3], keepdim=True), di[0]) < 1e-5


def test_denoising_losses_are_least_for_the_true_score():
    z, eps = torch.randn(2, 200_000, 1, 1, 1)
    x_0, sigma = MU + STD * z, torch.full_like(z, 0.8)
    exact = (0.8 ** 2 + 0.5 ** 2) / (0.8 * 0.5) ** 2 * STD ** 2 * 0.8 ** 2 / (STD ** 2 + 0.8 ** 2)  # with EDM's weight
    for loss in (lambda net: edm_nets.denoising_loss(net, x_0, sigma, eps),
                 lambda net: disback.denoising_error(net(x_0 + sigma * eps, sigma, None), x_0, sigma).mean()):
        least, *others = (float(loss(lambda x, sigma, labels: denoise(x, sigma, mu, std))) for mu, std in (
            (MU, STD), (MU + 0.1, STD), (MU, STD * 1.2), (DATA_MU, DATA_STD)))
        assert least == pytest.approx(exact, rel=1e-2) and least < min(others)


def test_path_is_recorded_to_the_end_and_walked_back_to_the_teacher():
    assert disback.recording_steps(1000, 4) == {250: 1, 500: 2, 750: 3, 1000: 4}
    assert disback.recording_steps(10, 3) == {3: 1, 7: 2, 10: 3} and disback.recording_steps(5, 1) == {5: 1}
    assert [disback.node_at(nimg, 4, 2) for nimg in range(0, 9000, 1000)] == [3, 3, 2, 2, 1, 1, 0, 0, 0]
    assert {disback.node_at(n, nodes, 2) for n in range(0, 9000, 100) for nodes in (0, 1)} == {0}


@pytest.mark.parametrize('name', teacher_free.DIVERGENCES)
def test_weight_is_a_power_of_sigma_and_every_sample_keeps_a_bounded_gradient(name):
    sigma, l = torch.tensor([0.5, 4.0]).reshape(2, 1, 1, 1), torch.tensor([50.0, -50.0], requires_grad=True)
    plain, *weighted = (torch.autograd.grad(teacher_free.student_loss(l, sigma, name, weight), l)[0]
                        for weight in ('1', 'sigma', 'sigma2'))
    assert (plain < 0).all() and plain.abs().max() < 2e4
    assert [(w / plain).tolist() for w in weighted] == [pytest.approx([0.5, 4.0]), pytest.approx([0.25, 16.0])]


def test_ratio_loss_is_least_at_the_true_ratio():
    """There it is 2 ln 2 - 2 JS, and 2 ln 2 where nothing can be told apart."""
    real, fake = DATA_MU + DATA_STD * torch.randn(2_000_000), MU + STD * torch.randn(2_000_000)
    true = [log_density(x, DATA_MU, DATA_STD) - log_density(x, MU, STD) for x in (real, fake)]
    least, blind, *others = (float(teacher_free.ratio_loss(*(scale * l + shift for l in true))) for scale, shift in (
        (1, 0), (0, 0), (0.8, 0), (1.2, 0), (1, 0.2), (1, -0.2)))
    assert least == pytest.approx(2 * np.log(2) - 2 * float(divergence('js', 0)), rel=2e-3) and least < min(others)
    assert blind == pytest.approx(2 * np.log(2))


def test_gan_losses_at_the_optimal_discriminator():
    """For each backbone it is 2 ln 2 - 2 JS. The student's loss is steepest where its images are recognised."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    real, fake = (torch.repeat_interleave((p / q).log(), (w * 10).round().long())[:, None] for w in (p, q))
    for n in (1, 2):  # backbones
        loss = distributional.discriminator_loss(n * [real], n * [fake])
        assert float(loss) == pytest.approx(n * (2 * np.log(2) - 2 * float((q * TEXTBOOK['js'](p / q)).sum())))
    logits = torch.tensor([[-3.0, 0.0, 3.0]], requires_grad=True)
    distributional.generator_loss([logits]).backward()
    assert off(logits.grad, -torch.sigmoid(-logits) / 3) < 1e-5


def test_r1_is_the_mean_square_gradient_of_the_sum_of_all_logits():
    x, a, c = torch.randn(5, 3, 2, 2, requires_grad=True), torch.randn(3, 12), torch.randn(3)
    logits = x.flatten(1) @ a.T + x.flatten(1).square().sum(1, keepdim=True) / 2 * c
    expected = (a.sum(0) + x.flatten(1) * c.sum()).square().sum(1).mean()
    assert off(distributional.r1_penalty([logits[:, :1], logits[:, 1:]], x), expected) < 1e-4


@pytest.mark.parametrize('verifier, mean, low, high', [('resample', 0.05, 0.045, 0.055), ('max', 1 / 15, 0, 0.02)])
def test_verifier_resamples_towards_the_data(monkeypatch, verifier, mean, low, high):
    """A student of one pixel makes N(0, 0.1^2), the data are N(0.05, 0.05^2): the peak of their ratio is at 1/15."""
    student = edm_nets.EDMPrecond(1, 1, model_channels=32, channel_mult=[1], num_blocks=1)  # at first D = c_skip x
    student.sigma_init, exact = 2.396, lambda x, sigma, labels: torch.cat([  # the log ratio, in two parts
        log_density(x, 0.05, 0.05, sigma), -log_density(x, 0.0, 0.1, sigma)], 1).flatten(1)
    monkeypatch.setattr(teacher_free, 'VERIFIER_SIGMAS', [1e-4])
    monkeypatch.setattr(teacher_free.data, 'to_uint8', lambda x: x)  # exact values
    one, kept = (teacher_free.best_of(student, exact, range(4000), K, verifier, batch=4096) for K in (1, 32))
    assert float(kept.mean()) == pytest.approx(mean, rel=0.1) and low < kept.std() < high
    assert off(one, edm_nets.generate(student, range(4000))) < 1e-5  # candidate 0 is the plain image
    assert off(teacher_free.best_of(student, exact, range(9), 32, verifier, batch=64), kept[:9]) < 1e-5


def test_lightweight_ratio_net_is_light_and_random():
    nets = [teacher_free.make_ratio_net(small(model_channels=32), kind, 'teacher') for kind in teacher_free.RATIO_NETS]
    energy, encoder, light = (sum(p.numel() for p in net.model.parameters()) for net in nets)
    assert light < encoder / 3 < energy / 4 and nets[2](*BATCH).shape == (4, 2) and not nets[2](*BATCH).any()


@pytest.mark.parametrize('init, fresh', [('teacher', ()), ('features', ('_aux_norm', '_aux_conv')), ('random', ('',))])
def test_student_starts_with_what_init_says_of_the_teacher(init, fresh):
    teacher = small()
    student = teacher_free.initial_student(teacher_free.parse_args(['--init', init]), teacher)
    other = {k for k, v in student.named_parameters() if not torch.equal(v, teacher.state_dict()[k])}
    assert other == {k for k, _ in student.named_parameters() if any(part in k for part in fresh)}
    assert student.sigma_init == 2.5 and not student.training


@pytest.mark.parametrize('sigma_init, label_dim, fits', [(2.5, 4, 1), (None, 4, 0), (20.0, 4, 0), (2.5, 0, 0)])
def test_single_level_network_must_fit(tmp_path, sigma_init, label_dim, fits):
    net = small(label_dim=label_dim)
    net.sigma_init = sigma_init
    edm_nets.save(tmp_path / 'net.pt', net, 'shapes', 0)
    args = teacher_free.parse_args(['--init', 'single-level', '--single-level', f'{tmp_path}/net.pt'])
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r'expected \(2.5, 16, 4\)'):
        assert teacher_free.initial_student(args, small()).sigma_init == 2.5
