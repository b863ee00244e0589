"""The mathematics of teacher_free.py against Gaussians, whose ratios and divergences are known; the verifier."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edm_nets
import teacher_free

MU, STD = 0.4, 0.7  # the student makes N(theta, s^2)
DATA_MU, DATA_STD = -0.2, 0.5


def log_density(x, mu, variance):
    return -0.5 * ((x - mu) ** 2 / variance + torch.as_tensor(2 * torch.pi * variance).log())


def divergence(name, p, q):
    """D_f(p_student = p, p_data = q) by its textbook integrand; p and q are log densities on a grid."""
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))

    def kl(a, b):
        return a.exp() * (a - b)
    return dict(js=(kl(p, m) + kl(q, m)) / 2, rkl=kl(p, q), fkl=kl(q, p), jeffreys=kl(p, q) + kl(q, p),
                hellinger=((p / 2).exp() - (q / 2).exp()) ** 2 / 2, ns=2 * kl(m, q))[name]


@pytest.mark.parametrize('sigma', [0.1, 1.0])
@pytest.mark.parametrize('name', teacher_free.DIVERGENCES)
def test_student_gradient_is_that_of_the_divergence(name, sigma):
    """x_0 = theta + s z and the exact l: the gradient is d D_f(p_student,sigma, p_data,sigma) / d(theta, s)."""
    theta, s = torch.tensor(MU, requires_grad=True), torch.tensor(STD, requires_grad=True)
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    integrand = divergence(name, log_density(x, theta, s ** 2 + sigma ** 2),
                           log_density(x, DATA_MU, DATA_STD ** 2 + sigma ** 2))
    exact = torch.autograd.grad(torch.trapezoid(integrand, x), [theta, s])

    normal = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)  # quantiles
    z, eps = torch.cartesian_prod(normal, normal).T
    x_t = theta + s * z + sigma * eps
    log_ratio = log_density(x_t, DATA_MU, DATA_STD ** 2 + sigma ** 2) - log_density(x_t, MU, STD ** 2 + sigma ** 2)
    loss = teacher_free.student_loss(log_ratio, torch.full([len(z), 1, 1, 1], sigma), name, '1')
    for grad, e in zip(torch.autograd.grad(loss, [theta, s]), exact):
        assert grad == pytest.approx(float(e), rel=1e-2)


def test_weights_and_clamp():
    sigma, l = torch.tensor([0.5, 4.0]).reshape(2, 1, 1, 1), torch.tensor([0.3, -0.2], requires_grad=True)
    grads = {w: torch.autograd.grad(teacher_free.student_loss(l, sigma, 'rkl', w), l)[0] for w in teacher_free.WEIGHTS}
    assert torch.allclose(grads['1'], torch.tensor([-0.5, -0.5]))
    assert torch.allclose(grads['sigma'], grads['1'] * sigma.flatten())
    assert torch.allclose(grads['sigma2'], grads['1'] * sigma.flatten() ** 2)
    l = torch.tensor([50.0, -50.0], requires_grad=True)  # h is bounded, and no sample loses its gradient
    for name in teacher_free.DIVERGENCES:
        grad, = torch.autograd.grad(teacher_free.student_loss(l, torch.ones([2, 1, 1, 1]), name, '1'), l)
        assert grad.isfinite().all() and (grad < 0).all() and grad.abs().max() < 2e4


def test_ratio_loss_is_least_at_the_true_ratio():
    """There it is 2 ln 2 - 2 JS, as the docstring says; where nothing can be told apart, 2 ln 2."""
    generator = torch.Generator().manual_seed(0)
    real = DATA_MU + DATA_STD * torch.randn(2_000_000, generator=generator)
    fake = MU + STD * torch.randn(2_000_000, generator=generator)

    def loss(scale, shift):
        return teacher_free.ratio_loss(*(
            scale * (log_density(x, DATA_MU, DATA_STD ** 2) - log_density(x, MU, STD ** 2)) + shift
            for x in (real, fake)))
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    js = torch.trapezoid(divergence('js', log_density(x, MU, STD ** 2), log_density(x, DATA_MU, DATA_STD ** 2)), x)
    assert loss(1, 0) == pytest.approx(2 * np.log(2) - 2 * float(js), rel=1e-3)
    assert loss(1, 0) < min(loss(0.8, 0), loss(1.2, 0), loss(1, 0.2), loss(1, -0.2))
    assert loss(0, 0) == pytest.approx(2 * np.log(2))


def small(**kwargs):
    torch.manual_seed(0)
    return edm_nets.EDMPrecond(16, 3, **dict(dict(model_type='SongUNet', model_channels=8, channel_mult=[1, 2],
                                                  num_blocks=1, attn_resolutions=[8], label_dim=4), **kwargs)).eval()


@pytest.mark.parametrize('kwargs', [dict(), dict(label_dim=0), dict(model_type='DhariwalUNet', model_channels=64),
                                    dict(augment_dim=9, encoder_type='residual', embedding_type='fourier',
                                         resample_filter=[1, 3, 3, 1])])
def test_ratio_nets_start_from_the_teacher(kwargs):
    """Its weights to the bit, a decoder for `energy` alone, fresh output layer. l = 0 at first."""
    teacher = small(**kwargs)
    for kind in teacher_free.RATIO_NETS:
        net = teacher_free.make_ratio_net(teacher, kind, 'features')
        state, own = teacher.model.state_dict(), net.model.state_dict()
        assert any(k.startswith(('dec', 'out')) for k in own) == (kind == 'energy')
        if kind != 'lightweight':
            changed = {k for k, v in own.items() if not torch.equal(v, state[k])}
            assert len(changed) == (kind == 'energy') and changed <= {'dec.16x16_aux_conv.weight', 'out_conv.weight'}
            assert {k for k in state if k.startswith('enc')} == {k for k in own if k.startswith('enc')}
            same = teacher_free.make_ratio_net(teacher, kind, 'teacher').model.state_dict()
            assert all(torch.equal(v, state[k]) for k, v in same.items())
        sigma, x = torch.tensor([0.1, 1., 5.]).reshape(3, 1, 1, 1), torch.randn(3, 3, 16, 16)
        labels = F.one_hot(torch.tensor([0, 1, 2]), 4) if teacher.label_dim else None
        assert torch.equal(net(x, sigma, labels), torch.zeros(3))
        nn.init.normal_(net.out[-1].weight)
        l = net(x, sigma, labels)
        assert l.shape == (3,) and l.dtype == torch.float32
        assert not torch.allclose(l, net(x, sigma * 2, labels))
        assert all(p.requires_grad for p in net.parameters())


def test_energy_contains_the_ratio_of_gaussians():
    """N(0, s^2) against N(0, t^2), noised: l = (1/t'^2 - 1/s'^2) |x|^2 / 2 + const is one choice of a_3, a_0."""
    net, sigma, s, t = teacher_free.make_ratio_net(small(), 'energy', 'teacher'), 0.6, 0.3, 0.5
    x_t, d = torch.randn(5, 3, 16, 16), 3 * 16 * 16
    s2, t2 = s ** 2 + sigma ** 2, t ** 2 + sigma ** 2
    exact = (log_density(x_t, 0.0, s2) - log_density(x_t, 0.0, t2)).sum([1, 2, 3])
    with torch.no_grad():
        net.out[-1].bias[2] = (1 / t2 - 1 / s2) / 2 * (0.5 ** 2 + sigma ** 2) * d ** 0.5
        net.out[-1].bias[3] = 0.5 * np.log(t2 / s2) * d ** 0.5
        assert torch.allclose(net(x_t, torch.full([5, 1, 1, 1], sigma), torch.eye(4)[:1]), exact, rtol=1e-4)


def test_lightweight_is_light():
    teacher = small(model_channels=16)
    nets = [teacher_free.make_ratio_net(teacher, kind, 'teacher') for kind in ('lightweight', 'encoder', 'energy')]
    count = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert count[0] < count[1] < count[2] < 1.1 * sum(p.numel() for p in teacher.parameters())


class GaussianStudent(nn.Module):
    """One-step student of one pixel that makes N(0, 1)."""
    img_channels, img_resolution, label_dim, sigma_init = 1, 1, 0, 1.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones([]))

    def forward(self, x, sigma, labels=None):
        return 0.1 * x


def exact_ratio(x_t, sigma, labels=None):
    """Data N(0.05, 0.05^2) over the student's N(0, 0.1^2), at the noise level of x_t."""
    x, noise = x_t.flatten(), sigma.flatten() ** 2
    return log_density(x, 0.05, 0.05 ** 2 + noise) - log_density(x, 0.0, 0.1 ** 2 + noise)


def test_verifier_resamples_towards_the_data(monkeypatch):
    monkeypatch.setattr(teacher_free, 'VERIFIER_SIGMAS', [1e-4])
    monkeypatch.setattr(teacher_free.data, 'to_uint8', lambda x: x)  # exact values
    student, spread = GaussianStudent(), {}
    one = teacher_free.best_of(student, exact_ratio, range(4000), 1, 'resample')
    assert torch.equal(one, edm_nets.generate(student, range(4000)))
    for verifier in ('resample', 'max'):
        kept = teacher_free.best_of(student, exact_ratio, range(4000), 32, verifier).flatten()
        spread[verifier] = float(kept.std())
        assert float(kept.mean()) == pytest.approx(0.05 if verifier == 'resample' else 1 / 15, abs=0.006)
    assert spread['resample'] == pytest.approx(0.05, abs=0.005)  # the data's: resampling keeps coverage
    assert spread['max'] < 0.02  # the maximum does not


def test_verifier_does_not_depend_on_the_batch():
    student = small().requires_grad_(False)
    student.sigma_init = 2.5
    net = teacher_free.make_ratio_net(student, 'encoder', 'teacher').eval()
    nn.init.normal_(net.out[-1].weight)
    a, b = (teacher_free.best_of(student, net, range(6), 3, 'resample', batch=batch) for batch in (3, 256))
    assert a.shape == (6, 3, 16, 16) and a.dtype == torch.uint8
    assert (a.int() - b.int()).abs().max() <= 1


def test_inits():
    teacher = small()
    start = {}
    for init in ('teacher', 'random', 'features'):
        args = teacher_free.parse_args(['--init', init])
        torch.manual_seed(1)
        start[init] = teacher_free.initial_student(args, teacher).state_dict()
    same = {init: {k for k, v in teacher.state_dict().items() if torch.equal(v, start[init][k])} for init in start}
    assert same['teacher'] == set(teacher.state_dict())
    changed = set(teacher.state_dict()) - same['features']
    assert changed == {'model.dec.16x16_aux_conv.weight'}  # norm and biases start as they do anyway
    assert 'model.enc.16x16_conv.weight' not in same['random']


def test_single_level_must_fit(tmp_path):
    teacher, path = small(), tmp_path / 'net.pt'
    args = teacher_free.parse_args(['--init', 'single-level', '--single-level', str(path)])
    for sigma_init, label_dim in [(2.5, 4), (None, 4), (20.0, 4), (2.5, 0)]:
        net = small(label_dim=label_dim)
        net.sigma_init = sigma_init
        edm_nets.save(path, net, 'shapes', 0)
        if (sigma_init, label_dim) == (2.5, 4):
            assert teacher_free.initial_student(args, teacher).sigma_init == 2.5
        else:
            with pytest.raises(ValueError, match='is not a network of sigma 2.5'):
                teacher_free.initial_student(args, teacher)


def test_flags_are_the_contract(capsys):
    args = teacher_free.parse_args(['--dataset', 'imagenet64', '--kimg', '0.5', '--teacher', 'x.pt'])
    assert args.kimg == 0.5 and args.batch == teacher_free.PRESETS['imagenet64']['batch']
    assert args.out == 'runs/teacher_free-imagenet64'
    for flag in ('data out batch-gpu seed precision compile snapshot-kimg status-kimg sigma-init eval-images').split():
        assert hasattr(args, flag.replace('-', '_'))
    assert list(teacher_free.DIVERGENCES)[:2] == ['js', 'rkl']
    for wrong in (['--divergence', 'tv'], ['--weight', '2'], ['--warmup-kimg', '-1'], ['--best-of', '0'],
                  ['--dataset', 'cifar10', '--init', 'single-level'], ['--single-level', 'x.pt'],
                  ['--best-of', '2', '--eval-images', '0']):
        with pytest.raises(SystemExit) as stop:
            teacher_free.parse_args(wrong)
        assert stop.value.code == 2
