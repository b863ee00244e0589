"""Whole runs as a user starts them: folders, processes, kill and resume, damage, refusals, analyses, bad input."""

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import distributional
import edm_nets
import teacher_free
from conftest import ROOT, SCRIPTS, quick_heun, run
from test_nets import Tiny, off
from test_speed import distance, fail, load, status_lines, student, succeed

METHODS = ['disback', 'teacher_free', 'distributional']
TEACHER = 'teacherNone/teacher-000000.pt'
QUARTERS = np.full([2, 2], 0.25, np.float32).tobytes()  # the one tensor that is known beforehand, a resample_filter


def checksum(content):
    """Of tensors in dictionaries and lists, of every bit."""
    return hash(json.dumps(content, sort_keys=True, default=lambda x: [x.shape, x.numpy().tobytes().hex()]))


def outcome(out):
    """Checksums of all networks, optimizers and losses that a run has left: equal runs have the same."""
    contents = {path.name: load(path) for path in out.glob('*.pt')} | {'stats.jsonl': status_lines(out)}
    for line in contents['stats.jsonl']:
        del line['sec_per_kimg'], line['seconds']
    for name in ('latest.pt', 'previous.pt'):
        del contents[name]['log_bytes']  # seconds have more or fewer digits
    return {name: checksum(content) for name, content in contents.items()}


@pytest.fixture(scope='module')
def finished(command, tmp_path_factory):
    """finished(script) is the folder of an undisturbed run on `shapes`, which is made when it is first asked for."""
    @functools.cache
    def finished(script):
        succeed(*command(script, out := tmp_path_factory.mktemp(script)))
        return out
    return finished


@pytest.mark.parametrize('script, files, losses', [
    ('edm_nets', 'teacher-000000.pt', 'loss'),
    ('disback', 'student-000000.pt path-00.pt path-01.pt path-02.pt summary.png', 'student_loss fake_loss mismatch'),
    ('teacher_free', 'student-000000.pt summary.png', 'student_loss ratio_loss log_ratio_real log_ratio_fake'),
    ('distributional', 'student-000000.pt summary.png', 'student_loss discriminator_loss real_logit fake_logit')])
def test_the_run_folder(script, files, losses, finished, command):
    """Which files there are, what is in the one for users, every loss by name. The same command changes nothing."""
    always, out = 'config.json stats.jsonl latest.pt previous.pt grid-000000.png', finished(script)
    assert {path.name for path in out.iterdir()} == {*always.split(), *files.split()}
    content, sigma_init = load(out / files.split()[0]), None if script == 'edm_nets' else 2.5
    ratio_net = {'ratio_net', 'ratio_net_kwargs'} if script == 'teacher_free' else set()
    assert set(content) == {'net', 'net_kwargs', 'sigma_init', 'dataset', 'kimg'} | ratio_net
    assert (content['sigma_init'], content['dataset'], content['kimg']) == (sigma_init, 'shapes', 0.192)
    first, *lines = status_lines(out)
    lines = [line for line in lines if line['kimg']]
    assert [line['kimg'] for line in lines] == [0.032, 0.064, 0.096, 0.128, 0.16, 0.192] and first['kimg'] == 0
    assert all({'sec_per_kimg', *losses.split()} <= set(line) for line in lines)
    assert {'disback': 'degradation_loss', 'teacher_free': 'ratio_loss'}.get(script, 'kimg') in first
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'is complete at 0.192 kimg' in succeed(*command(script, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def batch_norm(path, norm=None):
    """Write what a batch norm makes of this rank's share of eight images, with first and second derivatives."""
    rank, world_size, _ = distributional.setup()
    norm, x = norm or distributional.GlobalBatchNorm(3), torch.arange(600.).cos().reshape(8, 3, 5, 5)
    x = x.chunk(world_size)[rank].requires_grad_()
    gradient, = torch.autograd.grad((norm(x) ** 3).sum(), x, create_graph=True)
    torch.save((norm(x), gradient, *torch.autograd.grad(gradient.square().sum(), x)), f'{path}-{rank}')


def in_turn(folder, commands):
    """What each of two processes does: a batch norm, then whole runs, the last with an error on one of them."""
    batch_norm(f'{folder}/norm')
    with mock.patch('edm_nets.heun', quick_heun), mock.patch('torch.distributed.destroy_process_group'):
        for script, *argv in json.loads(commands):
            print('now', time.time(), flush=True)
            odd = ['--batch', str(32 - dist.get_rank())] * ('fails' in str(argv))
            importlib.import_module(script).main(argv + odd)


@pytest.fixture(scope='module')
def two(command, tmp_path_factory):
    """What two processes have done, all in one start, in `two.folder`."""
    folder = tmp_path_factory.mktemp('two')
    lines = [command(script, folder / script, '--batch-gpu 8 --snapshot-kimg 9') for script in SCRIPTS]
    lines += [command(script, folder / f'{script}0', '--eval-images 20', 0) for script in METHODS[1:]]
    score = f'score --net {folder}/teacher_free0/student-000000.pt --data {command.folder}/data0 --num 60'
    score = [ROOT / 'fid.py', *f'{score} --dataset cifar10 --features pixels --batch'.split()]
    lines += [[*score, '17'], command('disback', folder / 'fails')]
    python = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node=2'.split(), __file__, folder]
    two = subprocess.run([*python, json.dumps([[line[0].stem, *map(str, line[1:])] for line in lines])],
                         capture_output=True, text=True, timeout=200)
    two.folder, two.score, two.seconds = folder, score, time.time() - float(two.stdout.rsplit('now', 1)[1].split()[0])
    return two


def test_batch_norm_is_torchs_over_all_ranks_to_second_derivatives(two, tmp_path, world):
    batch_norm(tmp_path / 'torch', torch.nn.BatchNorm2d(3))
    batch_norm(tmp_path / 'one')
    exact, one, *both = map(torch.load, [tmp_path / 'torch-0', tmp_path / 'one-0', *sorted(two.folder.glob('norm-*'))])
    for ours in (one, [torch.cat(parts) for parts in zip(*both)]):
        assert all(off(a, b) < 1e-4 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize('script', SCRIPTS)
def test_processes_and_accumulation_agree(script, finished, two, command):
    """Two processes with two rounds each end where one process ends; training has moved the weights much farther."""
    start = finished(script) / 'previous.pt' if script == 'edm_nets' else command.folder / TEACHER
    start, one = load(start).get('net'), student(finished(script))
    assert distance(one, student(two.folder / script)) < 1e-4 and distance(one, start) > 1e-3


def test_unlabelled_images_and_scores_on_two_processes(two):
    """The methods score their students before and after, and fid.py does it as on one process and in other batches."""
    for script in METHODS[1:]:
        scores = [line for line in status_lines(two.folder / f'{script}0') if 'images' in line]
        assert [(line['kimg'], line['images']) for line in scores] == [(0, 20), (0.064, 20)]
    values = [re.findall('pixel-FD ([0-9.]+)  images 60', out) for out in (two.stdout, succeed(*two.score, '60'))]
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-3)


def test_an_error_on_one_rank_ends_the_run_on_all(two):
    """Here the ranks even have different batches, one of which cannot be shared out."""
    assert two.returncode == 1 and 'disback.py: --batch 31 is not a multiple of the 2 processes' in two.stderr
    assert two.seconds < 60


def die(command, moment, count):
    """A run that ends itself by SIGKILL when it comes to the moment for the count-th time."""
    owner, name = dict(step=(torch.optim.Adam, 'step'), write=(torch, 'save'), rename=(os, 'replace'))[moment]
    calls, real = itertools.count(1), getattr(owner, name)

    def deadly(*args, **kwargs):
        if next(calls) == count:
            if moment == 'write':
                args[1].raw.write(b'half a file')
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, deadly)
    run(*command)


@pytest.mark.parametrize('script, kills', [
    ('edm_nets', [('step', 6)]), ('distributional', [('step', 12)]),  # the sixth step; the fourth left a checkpoint
    ('disback', [('step', 2), ('step', 17), ('write', 2), ('rename', 6)]),
    ('teacher_free', [('step', 5), ('step', 18)])])
def test_kill_and_resume_bit_for_bit(script, kills, command, finished, tmp_path):
    """SIGKILL in the first stage, where the student rests, in the last step, as a checkpoint is written or renamed."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_runs'])  # all runs are copies of a process that has imported it
    for kill in kills:
        process = context.Process(target=die, args=(command(script, tmp_path), *kill))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if kill in (('step', 2), ('step', 5)):
            state = load(tmp_path / 'latest.pt')
            assert state['nimg'] == 0 and checksum(state['student']) == checksum(load(command.folder / TEACHER)['net'])
    assert 'complete' not in succeed(*command(script, tmp_path))
    assert outcome(tmp_path) == outcome(finished(script))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in finished(script).iterdir()}


def test_a_projected_discriminator_resumes_bit_for_bit(command, tmp_path, monkeypatch):
    """With a stand-in for a feature network, stopped in the third step, the one with R1. Its fixed random convolutions
    come from the checkpoint, because another version of torch may draw others."""
    tiny, projected_head, make_discriminator = Tiny(), distributional.projected_head, distributional.make_discriminator
    monkeypatch.setattr(distributional, 'feature_network', lambda *_: tiny)
    monkeypatch.setattr(distributional, 'projected_head', lambda c, size, out: projected_head(c, 8, out))  # small
    flags = '--backbones vgg unet --batch 4 --batch-gpu 2 --kimg 0.016 --snapshot-kimg 0.008 --r1-interval 2'
    whole, cut = (command('distributional', tmp_path / name, flags) for name in ('whole', 'cut'))
    graphs, r1_penalty, generator_loss = [], distributional.r1_penalty, distributional.generator_loss

    def watch(logits, images):
        graphs.append(weakref.ref(logits[0]))
        return r1_penalty(logits, images)

    def check(*args):
        assert not [graph for graph in graphs if graph()]  # R1 has let go of the graph of the feature network
        return generator_loss(*args)
    with monkeypatch.context() as context:
        context.setattr(distributional, 'r1_penalty', watch)
        context.setattr(distributional, 'generator_loss', check)
        succeed(*whole)
    assert len(graphs) == 2
    with monkeypatch.context() as context:
        context.setattr(distributional, 'r1_penalty', None)
        assert "'NoneType' object is not callable" in run(*cut).stderr
    monkeypatch.setattr(distributional, 'make_discriminator',
                        lambda *args: torch.manual_seed(1) and make_discriminator(*args))
    succeed(*cut)
    assert load(tmp_path / 'cut' / 'latest.pt')['mixing'] and 'r1_penalty' in status_lines(tmp_path / 'cut')[-1]
    assert outcome(tmp_path / 'whole') == outcome(tmp_path / 'cut')

    # Batch norm sees the images of a round together, so --batch-gpu must stay, but only once training has begun.
    fail('batch_gpu_times_processes was 2 and is now 1', *whole, '--batch-gpu', '1')
    with monkeypatch.context() as context:
        context.setattr(distributional, 'generator_loss', None)
        assert "'NoneType' object is not callable" in run(*command('distributional', tmp_path / 'first', flags)).stderr
    succeed(*command('distributional', tmp_path / 'first', flags), '--batch-gpu', '1')


@pytest.mark.parametrize('damage', [
    lambda content: content[:len(content) // 2], lambda content: content.replace(QUARTERS, b'\1' + QUARTERS[1:], 1),
    lambda content: b'something else'], ids=['truncated', 'one flipped bit', 'foreign'])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(damage, command, finished, tmp_path):
    shutil.copytree(finished('disback'), tmp_path / 'run')
    latest, previous = (tmp_path / 'run' / name for name in ('latest.pt', 'previous.pt'))
    latest.write_bytes(damage(latest.read_bytes()))
    assert 'latest.pt is damaged' in succeed(*command('disback', tmp_path / 'run'))
    assert outcome(tmp_path / 'run') == outcome(finished('disback'))
    for path in (latest, previous):
        path.unlink()
        path.write_bytes(damage((finished('disback') / path.name).read_bytes()))
    fail('no whole checkpoint is left', *command('disback', tmp_path / 'run'))


def test_a_full_disk_loses_nothing(command, finished, tmp_path):
    """A file that does not fit is told of in one line and leaves no part of itself; then there is room again."""
    large, small = ((finished('disback') / name).stat().st_size for name in ('latest.pt', 'path-00.pt'))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (small // 2, (small + large) // 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))  # longer files get an OSError, as on a full disk
        try:
            fail('cannot write', *command('disback', tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list(tmp_path.glob('*.tmp'))
    succeed(*command('disback', tmp_path))
    assert outcome(tmp_path) == outcome(finished('disback'))


@pytest.mark.parametrize('script', SCRIPTS)
def test_another_value_of_any_flag_is_refused_by_name(script, finished, command, monkeypatch):
    """But for those that change no result. The flags are all that the script hands over, so none can be forgotten."""
    with mock.patch('data.load_checkpoint', wraps=data.load_checkpoint) as spy:
        succeed(*command(script, finished(script)))
    (args, _, *more), fingerprints = spy.call_args
    monkeypatch.setattr(torch, 'load', functools.cache(torch.load))
    edm_nets.setup()
    harmless = data.MAY_CHANGE | {'best_of', 'verifier', 'score_precision', 'features_dir', 'teacher_student_fd',
                                  'activations'}
    for name, value in list(vars(args).items()):
        setattr(args, name, value + 1 if isinstance(value, (bool, int, float)) else
                [*value, 1] if isinstance(value, (list, tuple)) else f'{value} or another')
        refused = pytest.raises(ValueError, match=f'another run .{name} was ')
        with contextlib.nullcontext() if name in harmless else refused:
            data.load_checkpoint(args, {}, *more, **fingerprints)
        setattr(args, name, value)


@pytest.mark.parametrize('script', SCRIPTS)
def test_moved_inputs_are_accepted_and_others_at_the_same_place_refused(script, command, tmp_path):
    """And where the learning rate does not fall towards the end, the run may become longer."""
    more = '--gan-weight 3e-3 --loss dmd --eval-images 10' if script == 'disback' else ''
    line, reference = command(script, tmp_path / 'run', more, 3), tmp_path / 'run' / 'reference-pixels.npz'
    succeed(*line)
    assert script != 'disback' or {'gan_loss', 'discriminator_loss'} < set(status_lines(tmp_path / 'run')[-1])
    shutil.copytree(command.folder / 'data3', tmp_path / 'data')
    shutil.copytree(command.folder / 'teacher3', tmp_path / 'teacher')
    images, teacher = tmp_path / 'data' / 'images.npy', tmp_path / 'teacher' / 'teacher-000000.pt'
    moved = line + ['--data', images.parent] + ['--teacher', teacher] * (script in METHODS)
    assert 'is complete' in succeed(*moved)
    succeed(*moved, '--kimg', '0.096')
    assert [stats['kimg'] for stats in status_lines(tmp_path / 'run')][-2:] == [0.064, 0.096]
    if script in METHODS:
        shutil.copy(command.folder / 'teacher0' / teacher.name, teacher)
        fail('another run (teacher was checksum ', *moved)
    np.save(images, 255 - np.load(images))
    before = reference.exists() and reference.read_bytes()
    fail('data was 64 images of 16 px, 3 classes, checksum', *moved)
    assert script != 'disback' or reference.read_bytes() == before  # a run that is refused has changed nothing
    for name in ('latest.pt', 'previous.pt'):
        (tmp_path / 'run' / name).unlink()
    fail('no whole checkpoint is left in', *moved)  # it does not start again over what is there


@pytest.mark.parametrize('script, function, count, message', [
    ('edm_nets', 'denoising_loss', 3, 'train: loss'), ('disback', 'denoising_error', 13, 'disback.py: fake_loss'),
    ('teacher_free', 'ratio_loss', 11, '.py: ratio_loss'), ('distributional', 'generator_loss', 3, '.py: student_loss'),
    ('distributional', 'r1_penalty', 1, 'a weight of discriminator')])
def test_what_is_not_finite_is_named_and_not_saved(script, function, count, message, command, tmp_path, monkeypatch):
    """A loss in the third step; or not the loss of R1, but its gradient, in the last step before a checkpoint."""
    calls, real = itertools.count(1), getattr(importlib.import_module(script), function)

    def poisoned(*args):
        y = real(*args)
        return y if next(calls) != count else y + (y * 0).sqrt() if function == 'r1_penalty' else y * np.nan
    monkeypatch.setattr(f'{script}.{function}', poisoned)
    fail(f'{message} is not finite', *command(script, tmp_path, '--snapshot-kimg 0.16'))
    state = load(tmp_path / 'latest.pt')
    assert state['nimg'] == 0 and all(x.isfinite().all() for part in state.values() if isinstance(part, dict)
                                      for x in part.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize('script, function', [
    ('edm_nets', 'denoising_loss'), ('disback', 'student_loss'), ('teacher_free', 'student_loss'),
    ('distributional', 'generator_loss')])
def test_after_twenty_minutes_a_step_is_saved_without_a_status_line(script, function, command, tmp_path, monkeypatch):
    real = getattr(importlib.import_module(script), function)
    calls, clock = itertools.count(1), itertools.count(0, 1300.)
    monkeypatch.setattr(f'{script}.{function}', lambda *args: real(*args) if next(calls) < 4 else 1 / 0)
    monkeypatch.setattr(time, 'time', lambda: next(clock))
    assert 'ZeroDivisionError' in run(*command(script, tmp_path, '--status-kimg 9 --snapshot-kimg 9')).stderr
    assert load(tmp_path / 'latest.pt')['nimg'] == 96 and status_lines(tmp_path)[-1]['kimg'] == 0


def test_the_path_leads_away_from_the_teacher(finished, command):
    """Node 0 is the teacher to the bit, and the last of the targets."""
    paths = command.folder / TEACHER, *(finished('disback') / f'path-0{node}.pt' for node in range(3))
    start, *nodes = (load(path)['net'] for path in paths)
    assert checksum(nodes[0]) == checksum(start) and 0 < distance(start, nodes[1]) < distance(start, nodes[2])
    assert [line['node'] for line in status_lines(finished('disback')) if 'node' in line] == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_batch_that_makes_tiny_rounds_is_refused(script, command, tmp_path):
    fail('31 images per GPU can only be cut into 31 x 1: change --batch', *command(script, tmp_path, '--batch 31'),
         '--batch-gpu', '8')
    assert not list(tmp_path.iterdir())


def test_attention_at_a_missing_resolution_is_refused(command, tmp_path):
    fail('--attention 12: this network has the resolutions [16, ', *command('edm_nets', tmp_path, '--attention 12'))


def test_without_nodes_it_is_plain_distillation(command, tmp_path):
    """By definition --nodes 0 does not depend on the flags of the path, bit for bit; on the seed it does."""
    for name, more in dict(a='', b='--degrade-kimg 9 --node-kimg 7', seed='--seed 1').items():
        succeed(*command('disback', tmp_path / name, f'--kimg 0.064 --nodes 0 {more}'))
    a, b, seed = (checksum(student(tmp_path / name)) for name in ('a', 'b', 'seed'))
    assert a == b != seed


def test_no_score_of_the_teacher_is_ever_evaluated(command, tmp_path):
    """In a whole training no denoiser is called but at sigma_init, where it is the one-step generator: in 6 student
    steps, for fresh samples of 3 x 2 + 6 ratio updates (another 6 take those of the student step), for 2 grids."""
    line, net = command('teacher_free', tmp_path, '--snapshot-kimg 9 --ratio-updates 2'), edm_nets.EDMPrecond
    with mock.patch.object(net, 'forward', autospec=True, side_effect=net.forward) as spy:
        teacher_free.train(teacher_free.parse_args(line[1:]))
    assert [float(call.args[2].unique()) for call in spy.call_args_list] == [2.5] * (6 + 3 * 2 + 6 + 2)


def test_single_level_training_and_init(command, tmp_path):
    """A network of one level is a one-step sampler, and --init single-level starts there."""
    succeed(*command('edm_nets', tmp_path / 'single', '--sigma 2.5 --kimg 0.032'))
    path = tmp_path / 'single' / 'teacher-000000.pt'
    more = f'--init single-level --single-level {path} --kimg 0.032 --lr 1e-9'
    succeed(*command('teacher_free', tmp_path / 'run', more))
    assert load(path)['sigma_init'] == 2.5 and distance(load(path)['net'], student(tmp_path / 'run')) < 1e-4


def test_best_of_one_is_the_plain_student(command, tmp_path):
    more = '--eval-images 40 --ratio-net lightweight --weight sigma2 --best-of 1 3'
    succeed(*command('teacher_free', tmp_path, more, 3))
    _, one, three = (line.split() for line in (tmp_path / 'best-of-resample.txt').read_text().splitlines())
    assert one[:4] + three[:4] == 'resample, K = 1 resample, K = 3'.split() and one[4:] != three[4:]
    assert float(one[4]) == pytest.approx(status_lines(tmp_path)[-1]['pixel-FD'], rel=1e-3)


def test_frozen_weights_stay_to_the_bit(finished, command):
    """In the student, its average and the checkpoint; the optimizer has moments for the others alone."""
    out, before = finished('distributional'), load(command.folder / TEACHER)['net']
    state, names = load(out / 'latest.pt'), {name for name in before if 'resample_filter' not in name}
    frozen = {name for name in names if distributional.frozen_by_gdd_i(name)}
    for after in (state['student'], state['ema'], student(out)):
        assert {name for name in names if torch.equal(before[name], after[name])} == frozen
    assert len(state['optimizer']['state']) == len(names) - len(frozen) < len(names)
    assert [line['kimg'] for line in status_lines(out) if 'r1_penalty' in line] == [0.16]  # every fourth step


def test_analyses_of_a_finished_run(command, tmp_path):
    succeed(*command('distributional', tmp_path, '', 3))
    succeed(*command('distributional', tmp_path, '--eval-images 20 --teacher-student-fd 2 3 --activations', 3))
    head, *rows = (line.split() for line in (tmp_path / 'teacher-student-fd.txt').read_text().splitlines())
    assert head == ['teacher-data', 'student-data', 'teacher-student'] and [row[1] for row in rows] == ['2', '3']
    assert rows[0][4] == rows[1][4] and rows[0][3] != rows[1][3]  # one student; the teacher's images differ
    head, *rows = (line.split() for line in (tmp_path / 'activations.txt').read_text().splitlines())
    assert len(head) == 14 and head[12:] == ['before', 'after']
    assert len(rows) > 10 and all(max(map(float, row[1:13])) == 1 for row in rows)  # relative to the largest


def test_sample_draws_one_network_or_several(finished, command, tmp_path):
    nets = [command.folder / TEACHER, finished('disback') / 'student-000000.pt']
    for some in (nets[1:], nets):
        succeed(ROOT / 'edm_nets.py', 'sample', '--seeds', '0', '8', '--out', tmp_path / 'grid.png', '--net', *some)
        assert Image.open(tmp_path / 'grid.png').size == (9 * 48, len(some) * (16 + 48))  # a title above each row


BAD_INPUT = {
    'expected a number above 0': ['disback --lr nan'],
    'must not be negative': ['disback --nodes -1', 'teacher_free --warmup-kimg -1'],
    'expected at least 10': ['disback --eval-images 9', 'disback --eval-images -5'],
    'is not finite': ['disback --student-sigma 0 1e99', 'disback --lr 1e30'],
    'give a teacher of all levels': ['disback --teacher {run}/student-000000.pt'],
    'no network at x.pt': ['disback --teacher x.pt', 'edm_nets.py sample --net x.pt',
                           'teacher_free --init single-level --single-level x.pt'],
    'cannot load': ['disback --teacher {bad}/images.npy'], 'cannot use': ['edm_nets --dataset ffhq64 --data {bad}'],
    'and 4 classes, the data has 16 px, 3 channels and 3 classes': [
        f'{script} --dataset cifar10 --data {{folder}}/data3' for script in ('disback --gan-weight 1', *METHODS[1:])],
    'are (None, 16, 4), expected (2.5, 16, 4)': ['teacher_free --init single-level --single-level {folder}/' + TEACHER],
    'are (2.5, 16, 4), expected (': [
        f'teacher_free --init single-level --single-level {{run}}/student-000000.pt {more}'
        for more in ('--sigma-init 9', '--teacher {folder}/teacher0/teacher-000000.pt')],
    'needs --eval-images': ['teacher_free --best-of 2', 'distributional --teacher-student-fd 2'],
    'not found: it is at https://': ['distributional --backbones vgg --features-dir .'],
    '16 px cannot be halved 5 times': ['edm_nets --channel-mult 1 1 1 1 1 1'],
    'no images.npy in x': ['edm_nets --dataset ffhq64 --data x', 'fid.py score --net x --dataset x --data x'],
    'needs labels, and the data has none': ['edm_nets --dataset cifar10 --data {folder}/data0'],
    'is no student': ['edm_nets.py sample --net {run}/path-00.pt --steps 1']}


@pytest.mark.parametrize('message, line', [(message, line) for message in BAD_INPUT for line in BAD_INPUT[message]])
def test_bad_input_ends_in_one_line(message, line, command, finished, tmp_path, few_shapes):
    (tmp_path / 'images.npy').write_bytes(b'nothing')
    line = line.format(run=finished('disback'), bad=tmp_path, folder=command.folder)
    script, *more = line.split()
    fail(message, *([ROOT / script, *more] if '.py' in script else command(script, tmp_path / 'run', ' '.join(more))))


@pytest.mark.parametrize('script', METHODS)
def test_a_step_leaves_no_gradient_elsewhere(script, command, tmp_path):
    """Whenever an optimizer steps, in all networks of the run only its own parameters have gradients."""
    def check(optimizer, *_):
        own = {p for group in optimizer.param_groups for p in group['params']}
        for part in spy.call_args.args[1].values():
            assert not isinstance(part, torch.nn.Module) or {p for p in part.parameters() if p.grad is not None} <= own
    with mock.patch('data.load_checkpoint', wraps=data.load_checkpoint) as spy, register_optimizer_step_pre_hook(check):
        succeed(*command(script, tmp_path, '--gan-weight 1' * (script == 'disback'), 3))


def test_the_small_helpers_are_the_same_text_everywhere():
    for name, scripts in dict(setup=SCRIPTS, is_due=SCRIPTS, update_ema=SCRIPTS, draw_noise=METHODS).items():
        assert len({inspect.getsource(getattr(importlib.import_module(script), name)) for script in scripts}) == 1, name


def test_a_launcher_that_is_not_torchrun_is_told_so(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    with pytest.raises(SystemExit), data.clear_errors('x.py'):
        edm_nets.setup()
    assert capsys.readouterr().err == 'x.py: RANK is set and LOCAL_RANK is not: start several processes with torchrun\n'


def test_the_six_lines_of_the_readme_draw_a_picture(tmp_path, monkeypatch):
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
    path = tmp_path / re.search(r"load\('(.*?)'\)", code)[1]
    path.parent.mkdir(parents=True)
    net = edm_nets.load(ROOT / 'assets' / 'teacher-shapes.pt')
    net.sigma_init = 2.5
    edm_nets.save(path, net, 'shapes', 28_000)
    monkeypatch.chdir(tmp_path)
    exec(code, space := {})  # our own text
    assert len(code.splitlines()) == 6
    assert space['images'].shape == (64, 3, 16, 16) and space['x'].shape == (1, 3, 16, 16)
    assert Image.open('samples.png').size == (8 * 32, 8 * 32)


if __name__ == '__main__':
    in_turn(*sys.argv[1:])
