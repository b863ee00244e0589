"""The mathematics of disback.py against Gaussians, whose scores and divergences are known; the schedule."""

import pytest
import torch

import disback

MU, STD = 0.4, 0.7  # the student makes N(theta, s^2)
TARGET_MU, TARGET_STD = -0.2, 0.5


def denoiser(mu, std):
    return lambda x, sigma: (std ** 2 * x + sigma ** 2 * mu) / (std ** 2 + sigma ** 2)


@pytest.mark.parametrize('sigma', [0.1, 1.0, 5.0])
def test_student_gradient_is_that_of_the_kl(sigma):
    """x_0 = theta + s z: Eq. 8 with w = sigma^2 is sigma^2 d KL(p_student,sigma || p_target,sigma) / d(theta, s)."""
    n, generator = 8_000_000, torch.Generator().manual_seed(0)
    theta, s = torch.tensor(MU, requires_grad=True), torch.tensor(STD, requires_grad=True)
    z = torch.randn([n, 1, 1, 1], generator=generator)
    x_0, level = theta + s * z, torch.full([n, 1, 1, 1], sigma)
    x_t = x_0 + level * torch.randn(x_0.shape, generator=generator)
    loss = disback.student_loss(x_0, denoiser(MU, STD)(x_t, level), denoiser(TARGET_MU, TARGET_STD)(x_t, level), 'di')
    grads = torch.autograd.grad(loss, [theta, s])
    a, b = s ** 2 + sigma ** 2, TARGET_STD ** 2 + sigma ** 2
    kl = 0.5 * (a / b + (theta - TARGET_MU) ** 2 / b - 1 - (a / b).log())
    exact = torch.autograd.grad(kl, [theta, s])
    for grad, e in zip(grads, exact):
        assert grad == pytest.approx(float(sigma ** 2 * e), rel=1e-2)


def test_student_gradient_vanishes_where_both_agree_and_ignores_the_networks():
    x_0 = torch.randn(4, 3, 8, 8, requires_grad=True)
    D = torch.randn(4, 3, 8, 8, requires_grad=True)
    for form in ('di', 'dmd'):
        disback.student_loss(x_0, D, D, form).backward()
        assert x_0.grad.abs().max() == 0 and D.grad is None


def test_dmd_form_divides_by_the_denoising_distance():
    x_0, D_fake, D_target = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x_0.requires_grad_(True)
    di, = torch.autograd.grad(disback.student_loss(x_0, D_fake, D_target, 'di'), x_0)
    dmd, = torch.autograd.grad(disback.student_loss(x_0, D_fake, D_target, 'dmd'), x_0)
    scale = (x_0 - D_target).abs().mean([1, 2, 3], keepdim=True).detach()
    assert torch.allclose(di, dmd * scale, atol=1e-6)
    assert torch.allclose(di, (D_fake - D_target) / 4)


def test_denoising_error_is_least_for_the_true_score():
    """Eq. 5 and 7: among the denoisers of Gaussians the student's own leaves the smallest error, and a known one."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    x_0 = MU + STD * torch.randn([n, 1, 1, 1], generator=generator)
    sigma = torch.full([n, 1, 1, 1], 0.8)
    x_t = x_0 + sigma * torch.randn(x_0.shape, generator=generator)
    error = [disback.denoising_error(denoiser(mu, std)(x_t, sigma), x_0, sigma).mean()
             for mu, std in [(MU, STD), (MU + 0.1, STD), (MU, STD * 1.2), (TARGET_MU, TARGET_STD)]]
    weight = (0.8 ** 2 + 0.5 ** 2) / (0.8 * 0.5) ** 2
    assert error[0] == pytest.approx(weight * STD ** 2 * 0.8 ** 2 / (STD ** 2 + 0.8 ** 2), rel=1e-2)
    assert error[0] < min(error[1:])


def test_path_and_schedule():
    """Node N is recorded at the very end; targets go N-1, ..., 0 and stay there. Without nodes: always the teacher."""
    assert disback.recording_steps(1000, 4) == [250, 500, 750, 1000]
    assert disback.recording_steps(10, 3) == [3, 7, 10]
    assert disback.recording_steps(5, 1) == [5]
    at = [disback.node_at(nimg, 4, 2) for nimg in range(0, 12_000, 1000)]
    assert at == [3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0]
    assert {disback.node_at(n, nodes, 2) for n in range(0, 9000, 100) for nodes in (0, 1)} == {0}


def test_flags_are_the_contract(capsys):
    args = disback.parse_args(['--dataset', 'imagenet64', '--kimg', '0.5', '--teacher', 'x.pt'])
    assert args.kimg == 0.5 and args.batch == disback.PRESETS['imagenet64']['batch']
    assert args.out == 'runs/disback-imagenet64'
    for flag in ('data out batch-gpu seed precision compile snapshot-kimg status-kimg sigma-init eval-images').split():
        assert hasattr(args, flag.replace('-', '_'))
    for wrong in (['--dataset', 'mnist'], ['--batch', 'x'], ['--dat', 'shapes'], ['--loss', 'sid']):
        with pytest.raises(SystemExit) as stop:
            disback.parse_args(wrong)
        assert stop.value.code == 2
