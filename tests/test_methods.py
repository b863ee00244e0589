"""Each script by itself: its flags, its pieces in an empty file, its mathematics against closed forms; the verifier."""

import builtins
import dis
import importlib
import inspect
import json
import os
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import disback
import distributional
import edm_nets
import teacher_free
from conftest import ROOT, run
from test_nets import off, small

CONTRACT = '--data=d --out=o --kimg=0.5 --batch=8 --batch-gpu=4 --seed=3 --precision=bf16 --snapshot-kimg=0.25 ' \
    '--status-kimg=0.125 --compile --teacher=t --sigma-init=3.0 --eval-images=0'
WRONG = {  # what every training script refuses, and what each command does
    '': '''--dataset mnist, --batch x, --batch 0, --batch-gpu 0, --kimg -1, --kimg nan, --lr 0, --snapshot-kimg 0,
           --status-kimg 0, --sigma-init 0, --eval-images x, --precision fp16, --seed x, --seed -1, --dat d''',
    'edm_nets train': '--channels 6, --channel-mult 1 -2, --dropout 1, --decay 2, --sigma 0, --cond 2',
    'disback': '--loss sid, --gan-weight -1, --node-kimg 0',
    'teacher_free': '--divergence tv, --weight 2, --best-of 0, --single-level x, --dataset cifar10 --init single-level',
    'distributional': '--freeze 2, --r1-gamma -1, --teacher-student-fd 1, --backbones vgg vgg',
    'edm_nets sample': '--net x --seeds 5 3, --net x y --titles a a, --net x --steps 2 --sigma-init 3',
    'fid ref': '--dataset shapes',
    'data prepare': 'x', 'fid score': '--net x --dataset shapes --batch -3'}


@pytest.mark.parametrize('path', sorted(ROOT.glob('*.py')), ids=lambda path: path.stem)
def test_importing_does_nothing(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dist, 'init_process_group', pytest.fail)
    before = torch.get_rng_state(), dict(os.environ)
    runpy.run_path(str(path), run_name='imported')
    assert torch.equal(torch.get_rng_state(), before[0]) and dict(os.environ) == before[1]
    assert not any(capfd.readouterr()) and not list(tmp_path.iterdir()) and run(path, '--help').returncode == 0


@pytest.mark.parametrize('name', list(WRONG)[1:])
def test_wrong_values_are_refused_and_help_is_given(name):
    script, *command = name.split()
    trains = name in list(WRONG)[1:5]
    for flags in re.split(r',\s+', (WRONG[''] + ', ') * trains + WRONG[name]):
        assert run(ROOT / f'{script}.py', *command, *flags.split()).returncode == 2, flags
    assert run(ROOT / f'{script}.py', *command, '--help').returncode == 0


@pytest.mark.parametrize('name', list(WRONG)[1:5])
def test_flags_are_the_contract_and_defaults_those_of_the_dataset(name):
    module, train = importlib.import_module(name.split()[0]), name == 'edm_nets train'
    parse = module.parse_train_args if train else module.parse_args
    for dataset, row in module.PRESETS.items():
        args = vars(parse(['--dataset', dataset]))
        assert {k: args[k] for k in row} == row and args['seed'] == 0 and args['compile'] is False
        assert args['out'] == f'runs/{"teacher" if train else name}-{dataset}'
    given = CONTRACT.split()[:10 if train else None]
    for flag, _, value in (flag[2:].partition('=') for flag in given):
        assert str(getattr(parse(given), flag.replace('-', '_'))) == (value or 'True')


COPIES = {  # pieces that people copy together, by module
    'edm_nets': ['init_layer make_filter resample Resample ResampleConv2d FusedDownConv2d GroupNorm UNetBlock UNet '
                 'NoiseEmbedding SongUNet DhariwalUNet EDMPrecond UNetCritic is_output copy_weights make_critic',
                 'Recorded OfficialUnpickler read_official_pickle', 'heun', 'ImageSeeds', 'denoising_loss'],
    'data': ['epoch_order batch_order', 'step_generator'],
    'fid': ['AVERAGE MAXIMUM HALVE conv Block InceptionV3 resize_tf1 fold', 'frechet_distance', 'precision_recall'],
    'disback': ['student_loss', 'sigma_data denoising_error', 'recording_steps', 'node_at'],
    'teacher_free': ['ratio_loss', 'LOGIT_CLAMP WEIGHTS DIVERGENCES student_loss'],
    'distributional': ['generator_loss', 'discriminator_loss', 'r1_penalty', 'same_pad MBConv EfficientNetLite0 '
                       'Projection SumOverRanks GlobalBatchNorm projected_head ProjectedHeads']}


def globals_of(code):
    """The global names that a piece of compiled code reads, and those that the code in it reads."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ('LOAD_GLOBAL', 'LOAD_NAME')}
    return names.union(*(globals_of(part) for part in code.co_consts if isinstance(part, types.CodeType)))


@pytest.mark.parametrize('module, names', [(module, names) for module in COPIES for names in COPIES[module]])
def test_copied_pieces_find_all_names_in_an_empty_file(module, names):
    text = inspect.getsource(module := importlib.import_module(module))
    lines = re.findall(r'^(?:import (?!data|edm_nets|fid).*|from \S+ import .*)', text, re.M)  # of packages
    for name in names.split():
        piece = getattr(module, name)
        lines.append(inspect.getsource(piece) if inspect.isroutine(piece) or inspect.isclass(piece) else
                     re.search(rf'^{name} = (\{{.*?\}}|.*?)( *#.*?)?$', text, re.M | re.S).group())
    exec(code := compile('\n'.join(lines), 'empty.py', 'exec'), namespace := {})  # our own source
    assert globals_of(code) <= namespace.keys() | vars(builtins).keys() | {'__module__', '__qualname__', '__class__'}


MU, STD, DATA_MU, DATA_STD = 0.4, 0.7, -0.2, 0.5  # the student makes N(theta, s^2)
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
        loss, *weighted = (teacher_free.student_loss(log_ratio.flatten(), level, name, w) for w in teacher_free.WEIGHTS)
        assert all(off(w, loss * sigma ** power) < 1e-5 for power, w in enumerate(weighted, 1))
        for l in torch.tensor([[50.0], [-50.0]]):  # h(r) is bounded, and no sample loses its gradient
            assert 0 < float(teacher_free.student_loss(l, level[:1], name, '1') / -l) < 3e4
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


def test_ratio_loss_is_least_at_the_true_ratio():
    """There it is 2 ln 2 - 2 JS, and 2 ln 2 where nothing can be told apart."""
    real, fake = DATA_MU + DATA_STD * torch.randn(2_000_000), MU + STD * torch.randn(2_000_000)
    true = [log_density(x, DATA_MU, DATA_STD) - log_density(x, MU, STD) for x in (real, fake)]
    least, blind, *others = (float(teacher_free.ratio_loss(*(scale * l + shift for l in true))) for scale, shift in (
        (1, 0), (0, 0), (0.8, 0), (1.2, 0), (1, 0.2), (1, -0.2)))
    assert least == pytest.approx(2 * np.log(2) - 2 * float(divergence('js', 0)), rel=2e-3) and least < min(others)
    assert blind == pytest.approx(2 * np.log(2))


def test_gan_losses_at_the_optimal_discriminator():
    """They are 2 ln 2 - 2 JS for each backbone; the student's is steepest where its images are recognised."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    real, fake = (torch.repeat_interleave((p / q).log(), (w * 10).round().long())[:, None] for w in (p, q))
    assert distributional.parse_args(['--dataset', 'cifar10']).r1_gamma == 1e-4 / (256 / 4)  # that of four GPUs
    loss = distributional.discriminator_loss([real, real], [fake, fake])
    assert float(loss) == pytest.approx(4 * np.log(2) - 4 * float((q * TEXTBOOK['js'](p / q)).sum()))
    logits = torch.tensor([[-3.0, 0.0, 3.0]], requires_grad=True)
    for form, expected in dict(ns=-torch.sigmoid(-logits) / 3, linear=-torch.ones(1, 3) / 3).items():
        logits.grad = None
        distributional.generator_loss([logits], form).backward()
        assert off(logits.grad, expected) < 1e-5


@pytest.mark.parametrize('init, fresh', [('teacher', 0), ('single-level', 0), ('features', 4), ('random', 999)])
def test_what_starts_at_random_has_a_rate_of_its_own(init, fresh):
    net = edm_nets.make_network(edm_nets.parse_train_args(['--channels', '8']), 16, 4)
    count, groups = len(list(net.parameters())), teacher_free.parameter_groups(net, init, 1e-4, 1e-3)
    assert {group['lr']: len(group['params']) for group in groups} == {
        rate: n for rate, n in {1e-4: count - min(fresh, count), 1e-3: min(fresh, count)}.items() if n}
    if init == 'features':  # scale, bias of the last norm, weight, bias of the last layer
        assert [p.shape[0] for p in groups[1]['params']] == [8, 8, 3, 3]
    [group] = teacher_free.parameter_groups(net, init, 1e-4, None)
    assert group['lr'] == group['full_lr'] == 1e-4 and len(group['params']) == count


def test_the_shipped_teacher_stands_in_for_an_own_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = edm_nets.shapes_teacher()
    net, scores = edm_nets.load(shipped), json.loads(Path(shipped).with_suffix('.json').read_text())
    assert (net.img_resolution, net.label_dim, net.sigma_init) == (16, 4, None) and scores['images'] == 2000
    Path('runs/teacher-shapes').mkdir(parents=True)
    Path('runs/teacher-shapes/teacher-000130.pt').touch()
    assert edm_nets.shapes_teacher() == 'runs/teacher-shapes/teacher-000130.pt'


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


@pytest.mark.parametrize('init, fresh', [('teacher', ()), ('features', ('_aux_norm', '_aux_conv')), ('random', ('',))])
def test_student_starts_with_what_init_says_of_the_teacher(init, fresh):
    teacher = small(dropout=0.5)
    student = teacher_free.initial_student(teacher_free.parse_args(['--init', init]), teacher)
    other = {k for k, v in student.named_parameters() if not torch.equal(v, teacher.state_dict()[k])}
    assert other == {k for k, _ in student.named_parameters() if any(part in k for part in fresh)}
    assert student.sigma_init == 2.5 and not student.training
