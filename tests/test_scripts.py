"""Each file by itself: importing it does nothing, its flags are the contract, its pieces work in an empty file."""

import builtins
import dis
import importlib
import inspect
import os
import re
import runpy
import types

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, run

CONTRACT = '--data=d --out=o --kimg=0.5 --batch=8 --batch-gpu=4 --seed=3 --precision=bf16 --snapshot-kimg=0.25 ' \
    '--status-kimg=0.125 --teacher=t --sigma-init=3.0 --eval-images=0'
WRONG = '--dataset mnist, --batch x, --batch 0, --batch-gpu 0, --kimg -1, --kimg nan, --lr 0, --snapshot-kimg 0, ' \
    '--status-kimg 0, --sigma-init 0, --eval-images x, --precision fp16, --seed x, --dat d'
SCRIPTS = {  # the training scripts, a default that --help shows, and wrong values of flags of their own
    'edm_nets': ('0.002', '--channels 6, --channel-mult 1 -2, --dropout 1, --decay 2, --sigma 0, --cond 2'),
    'disback': ('0.001', '--loss sid, --nodes -1, --gan-weight -1, --node-kimg 0'),
    'teacher_free': ('jeffreys', '--divergence tv, --weight 2, --warmup-kimg -1, --best-of 2 --eval-images 0, '
                     '--best-of 0, --single-level x.pt, --dataset cifar10 --init single-level'),
    'distributional': ('energy', '--backbones resnet, --freeze 2, --r1-gamma -1, --teacher-student-fd 1, '
                       '--teacher-student-fd 2 --eval-images 0')}


@pytest.mark.parametrize('path', sorted(ROOT.glob('*.py')), ids=lambda path: path.stem)
def test_importing_does_nothing_and_help_is_given(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dist, 'init_process_group', pytest.fail)
    before = torch.get_rng_state(), dict(os.environ)
    runpy.run_path(str(path), run_name='imported')
    assert torch.equal(torch.get_rng_state(), before[0]) and dict(os.environ) == before[1]
    assert not any(capfd.readouterr()) and not list(tmp_path.iterdir())
    assert run(path, '--help').returncode == 0


@pytest.mark.parametrize('script', SCRIPTS)
def test_flags_are_the_contract(script):
    module, (shown, wrong), train = importlib.import_module(script), SCRIPTS[script], ['train'] * (script == 'edm_nets')
    parse = module.parse_train_args if train else module.parse_args
    for dataset, row in module.PRESETS.items():
        args = vars(parse(['--dataset', dataset]))
        name = 'teacher' if train else script
        assert {k: args[k] for k in row} == row and args['out'] == f'runs/{name}-{dataset}' and args['seed'] == 0
    given = CONTRACT.split()[:9 if train else None]
    if script == 'distributional':  # published: 1e-4 where the main loss is the sum over a quarter of the batch
        assert parse(['--dataset', 'cifar10']).r1_gamma == pytest.approx(1e-4 / 64) and parse([]).r1_gamma == 1
    args = parse(['--compile', *given])
    for flag, value in (flag[2:].split('=') for flag in given):
        assert str(getattr(args, flag.replace('-', '_'))) == value
    assert args.dataset == 'shapes' and args.compile
    assert shown in run(ROOT / f'{script}.py', *train, '--help').stdout
    for flags in (WRONG + ', ' + wrong).split(', '):
        with pytest.raises(SystemExit, match='2'):
            parse(flags.split())


@pytest.mark.parametrize('command', [
    'edm_nets.py sample --net x --seeds 5 3', 'edm_nets.py sample --net x --steps 0', 'data.py prepare x',
    'fid.py score --net x --dataset shapes --batch -3', 'fid.py ref --dataset shapes'])
def test_wrong_values_of_other_commands_are_refused(command):
    script, *more = command.split()
    assert run(ROOT / script, *more).returncode == 2


COPIES = {  # pieces that people copy together, by module
    'edm_nets': ['init_layer make_filter resample Resample ResampleConv2d FusedDownConv2d GroupNorm UNetBlock UNet '
                 'NoiseEmbedding SongUNet DhariwalUNet EDMPrecond UNetCritic copy_weights make_critic',
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


@pytest.mark.parametrize('module, names', [(module, names) for module, group in COPIES.items() for names in group])
def test_copied_pieces_find_all_names_in_an_empty_file(module, names):
    module = importlib.import_module(module)
    text = inspect.getsource(module)
    lines = re.findall(r'^(?:import (?!data|edm_nets|fid).*|from \S+ import .*)', text, re.M)  # of packages
    for piece in names.split():
        value = getattr(module, piece)
        lines.append(inspect.getsource(value) if inspect.isroutine(value) or inspect.isclass(value) else
                     re.search(rf'^{piece} = (\{{.*?\}}|.*?)( *#.*?)?$', text, re.M | re.S).group())
    exec(code := compile('\n'.join(lines), 'empty.py', 'exec'), namespace := {})  # our own source
    assert globals_of(code) <= namespace.keys() | vars(builtins).keys() | {'__module__', '__qualname__', '__class__'}
