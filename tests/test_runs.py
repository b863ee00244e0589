"""Whole runs as a user starts them: one and two processes, accumulation, kill and resume, damage, bad input."""

import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import disback
import distributional
import edm_nets
import teacher_free
from conftest import ENV, ROOT, distance, run, weights

STUDENT = ['--kimg', '0.64', '--batch', '32', '--nodes', '2', '--degrade-kimg', '0.128', '--node-kimg', '0.1', '--lr',
           '1e-4', '--fake-lr', '1e-4', '--status-kimg', '0.064', '--snapshot-kimg', '0.128', '--eval-images', '0']


@pytest.fixture(scope='module')
def folder(runs):
    """The folder with a tiny teacher, and one undisturbed run."""
    folder = runs
    done = run(ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'plain')
    assert done.returncode == 0, done.stderr
    return folder


def teacher(folder):
    return folder / 'teacher' / 'teacher-000001.pt'


def test_the_run_folder(folder):
    assert {'config.json', 'stats.jsonl', 'latest.pt', 'previous.pt', 'student-000000.pt', 'grid-000000.png',
            'summary.png', 'path-00.pt', 'path-01.pt', 'path-02.pt'} == set(os.listdir(folder / 'plain'))
    content = torch.load(folder / 'plain' / 'student-000000.pt', weights_only=True)
    assert content['kimg'] == 0.64 and content['dataset'] == 'shapes' and content['sigma_init'] == 2.5
    assert edm_nets.load(folder / 'plain' / 'student-000000.pt').sigma_init == 2.5
    assert torch.load(teacher(folder), weights_only=True)['sigma_init'] is None
    lines = [json.loads(line) for line in open(folder / 'plain' / 'stats.jsonl')]
    always = {'kimg', 'sec_per_kimg', 'node', 'mismatch', 'mismatch_teacher'}
    assert all(always <= set(line) for line in lines)
    assert lines[-1]['kimg'] == 0.64 and {'fake_loss', 'student_loss'} <= set(lines[-1])
    assert [line['node'] for line in lines if line['kimg'] > 0][0] == 1 and lines[-1]['node'] == 0
    again = run(ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'plain')
    assert again.returncode == 0 and 'complete' in again.stdout
    assert [json.loads(line) for line in open(folder / 'plain' / 'stats.jsonl')] == lines


def test_the_path(folder):
    """Node 0 is the teacher to the bit; degradation moves on from it; the student did not move meanwhile."""
    nodes = [weights(folder / 'plain' / f'path-0{i}.pt') for i in range(3)]
    start = weights(teacher(folder))
    assert distance(start, nodes[0]) == 0 and all(torch.equal(start[k], nodes[0][k]) for k in start)
    assert 0 < distance(start, nodes[1]) < distance(start, nodes[2])


def test_processes_and_accumulation_agree(folder):
    """20 student steps after 4 degradation steps: the same within 1e-4, while training moves the weights by more."""
    command = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'split']
    done = run(*command, '--batch-gpu', '8', processes=2)  # two rounds each
    assert done.returncode == 0, done.stderr
    start, one, two = (weights(path) for path in (
        teacher(folder), folder / 'plain' / 'student-000000.pt', folder / 'split' / 'student-000000.pt'))
    assert distance(one, two) < 1e-4 and distance(start, one) > 1e-3, (distance(one, two), distance(start, one))


def test_without_nodes_it_is_plain_distillation(folder):
    """--nodes 0, by definition, does not depend on the flags of the path, bit for bit; on the seed it does."""
    common = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--kimg', '0.128', '--nodes', '0']
    assert run(*common, '--out', folder / 'zero').returncode == 0
    assert run(*common, '--out', folder / 'zero2', '--degrade-kimg', '9', '--node-kimg', '7').returncode == 0
    assert run(*common, '--out', folder / 'seed', '--seed', '1').returncode == 0
    a, b, seed = (weights(folder / name / 'student-000000.pt') for name in ('zero', 'zero2', 'seed'))
    assert all(torch.equal(a[k], b[k]) for k in a) and distance(a, seed) > 1e-4


KILL_IN_A_WRITE = '''
import os, signal, sys, torch, disback
left, real = int(sys.argv[1]), torch.save
def save(obj, f):
    global left
    left -= 1
    if left == 0:
        f.write(b"half a file")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(obj, f)
torch.save = save
disback.main(sys.argv[2:])
'''


def test_kill_and_resume_bit_for_bit(folder):
    """SIGKILL while training and in a checkpoint write, SIGTERM; the same command ends with the same bits."""
    command = [*STUDENT, '--teacher', str(teacher(folder)), '--out', str(folder / 'killed')]
    kills = 0
    for lines, number in ((2, signal.SIGKILL), (6, signal.SIGTERM)):  # sent when stats.jsonl has so many lines
        process = subprocess.Popen([sys.executable, str(ROOT / 'disback.py'), *command], env=ENV, text=True,
                                   stdout=subprocess.PIPE)
        log = folder / 'killed' / 'stats.jsonl'
        while process.poll() is None and not (log.exists() and len(open(log).readlines()) >= lines):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(number)
        output = process.communicate()[0]
    assert process.returncode == 0 and 'stopped at' in output  # SIGTERM: a checkpoint of the step it came in
    kills += run('-c', KILL_IN_A_WRITE, 3, *command).returncode == -9  # half-way through the third file written
    assert kills >= 2
    done = run(ROOT / 'disback.py', *command)
    assert done.returncode == 0 and ('resuming' in done.stdout or 'complete' in done.stdout), done.stderr
    plain, killed = (weights(folder / name / 'student-000000.pt') for name in ('plain', 'killed'))
    assert all(torch.equal(plain[k], killed[k]) for k in plain)
    stats = [list(map(json.loads, open(folder / name / 'stats.jsonl'))) for name in ('plain', 'killed')]
    for line in stats[0] + stats[1]:
        del line['sec_per_kimg'], line['seconds']
    assert len(stats[0]) <= len(stats[1]) <= len(stats[0]) + 1 and stats[0][-1] == stats[1][-1]
    assert len([line for line in stats[1] if line not in stats[0]]) <= 2  # that of SIGTERM, and the one it shortens


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(folder):
    command = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'damaged']
    shutil.copytree(folder / 'plain', folder / 'damaged')
    latest = folder / 'damaged' / 'latest.pt'
    content = latest.read_bytes()
    tensor = torch.load(latest, weights_only=True)['student']['model.map_layer1.weight']
    middle = content.index(tensor.numpy().tobytes()) + 100  # not in the padding between tensors
    for damage in (content[:len(content) // 2], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
                   teacher(folder).read_bytes()):
        latest.write_bytes(damage)
        (folder / 'damaged' / 'student-000000.pt').unlink()
        done = run(*command)
        assert done.returncode == 0 and 'latest.pt is damaged' in done.stdout and 'resuming' in done.stdout
        plain, mended = (weights(folder / name / 'student-000000.pt') for name in ('plain', 'damaged'))
        assert all(torch.equal(plain[k], mended[k]) for k in plain)
    (folder / 'damaged' / 'previous.pt').write_bytes(content[:100])
    torch.save(dict(a=1), latest)
    assert 'no whole checkpoint is left' in run(*command).stderr


def test_a_full_disk_loses_nothing(folder, tmp_path):
    """A file that does not fit is told of in one line and leaves no part of itself; then there is room again."""
    command = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', tmp_path / 'run']
    fits = [path.stat().st_size for path in (teacher(folder), folder / 'plain' / 'latest.pt')]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (fits[0] // 2, sum(fits) // 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))  # what is longer gets an OSError, as on a full disk
        try:
            done = run(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert done.returncode == 1 and 'cannot write' in done.stderr and done.stderr.count('\n') == 1, done.stderr
        assert not list((tmp_path / 'run').glob('*.tmp'))
    assert run(*command).returncode == 0
    plain, filled = (weights(path / 'student-000000.pt') for path in (folder / 'plain', tmp_path / 'run'))
    assert all(torch.equal(plain[k], filled[k]) for k in plain)


def test_the_loss_that_diverged_first_is_named(folder, tmp_path, monkeypatch):
    """A single NaN, among the fake losses: the run stops, and says so; the checkpoint is from before."""
    calls, real = [], disback.denoising_error

    def sometimes(*args):
        calls.append(real(*args) * (np.nan if len(calls) == 20 else 1))
        return calls[-1]
    monkeypatch.setattr(disback, 'denoising_error', sometimes)
    done = run(ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', tmp_path / 'run', '--nodes', '0')
    assert done.returncode == 1 and done.stderr.startswith('disback.py: fake_loss is not finite'), done.stderr
    state = torch.load(tmp_path / 'run' / 'latest.pt', weights_only=True)
    assert all(x.isfinite().all() for name in ('student', 'ema', 'fake_score') for x in state[name].values())


def test_the_teacher_must_stay_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(disback.PRESETS['shapes'], 'decay', 0)  # a run whose rate does not fall can be made longer
    shutil.copy(teacher(folder), tmp_path / 'teacher.pt')
    command = [ROOT / 'disback.py', *STUDENT, '--teacher', tmp_path / 'teacher.pt', '--out', tmp_path / 'run']
    assert run(*command, '--kimg', '0.032', '--nodes', '0').returncode == 0
    shutil.copy(folder / 'plain' / 'path-01.pt', tmp_path / 'teacher.pt')
    assert 'is not the network that this run began with' in run(*command, '--nodes', '0').stderr


RANKS = '''
import datetime, time, data, edm_nets
rank, _, _ = edm_nets.setup()
edm_nets.agree("arguments", dict(lr=1))
for attempt in (lambda: edm_nets.agree("arguments", dict(lr=rank)), lambda: edm_nets.open_data("shapes", None)):
    if rank == 1:
        data.Shapes.__init__.__defaults__ = (50_000, 1)
    try:
        attempt()
    except ValueError as error:
        print(f"<{rank}: {error}>")
stop = edm_nets.Stop()
stop.patience = datetime.timedelta(seconds=1)
stop()
if rank == 1:
    time.sleep(3)
try:
    stop()
except ConnectionError as error:
    print(f"<{rank}: {error}>")
'''


def test_ranks_that_differ_or_hang_are_named(tmp_path):
    (tmp_path / 'ranks.py').write_text(RANKS)
    done = run(tmp_path / 'ranks.py', processes=2)
    for rank in (0, 1):
        assert f'<{rank}: rank 1 has other arguments than rank 0 (lr: 0 -> 1)>' in done.stdout, done.stderr
        assert f'<{rank}: rank 1 has other images than rank 0 (checksum: ' in done.stdout
    assert '<0: a rank is lost: [Rank 0]: Rank 1 failed' in done.stdout


def test_restart_keeps_the_old_folder(folder):
    shutil.copytree(folder / 'plain', folder / 'again')
    command = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'again', '--lr', '2e-4']
    assert '--restart' in run(*command).stderr
    done = run(*command, '--restart', '--kimg', '0.032', '--nodes', '0')
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(folder / 'again-before-1')) == set(os.listdir(folder / 'plain'))
    assert json.loads(open(folder / 'again' / 'stats.jsonl').readlines()[-1])['kimg'] == 0.032


def test_gan_term_and_dmd_form_run(folder):
    done = run(ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder), '--out', folder / 'gan', '--kimg', '0.128',
               '--gan-weight', '3e-3', '--loss', 'dmd', '--fake-updates', '2', '--batch-gpu', '16')
    assert done.returncode == 0, done.stderr
    last = json.loads(open(folder / 'gan' / 'stats.jsonl').readlines()[-1])
    assert {'gan_loss', 'discriminator_loss'} <= set(last)


def test_prepared_data_with_classes(folder, tmp_path):
    """A folder of labelled images, as for CIFAR-10: an own teacher, scores, the GAN term on real images."""
    rng = np.random.default_rng(0)
    (tmp_path / 'data').mkdir()
    images = rng.integers(0, 256, [64, 16, 16, 3], dtype=np.uint8)
    images[:, 0] = 12  # as on many a margin: a variance of zero, or by rounding a little less
    np.save(tmp_path / 'data' / 'images.npy', images)
    np.save(tmp_path / 'data' / 'labels.npy', rng.integers(0, 3, 64))
    common = ['--dataset', 'cifar10', '--data', tmp_path / 'data', '--batch', '32', '--kimg', '0.064']
    done = run(ROOT / 'edm_nets.py', 'train', *common, '--channels', '8', '--channel-mult', '1', '2', '--blocks', '1',
               '--attention', '8', '--cond', '1', '--rampup-kimg', '0.1', '--out', tmp_path / 'teacher')
    assert done.returncode == 0, done.stderr
    path = tmp_path / 'teacher' / 'teacher-000000.pt'
    assert torch.load(path, weights_only=True)['net_kwargs']['label_dim'] == 3
    command = [ROOT / 'disback.py', *common, '--teacher', path, '--features', 'pixels', '--eval-images', '20',
               '--nodes', '1',
               '--degrade-kimg', '0.032', '--gan-weight', '3e-3', '--out', tmp_path / 'run']
    done = run(*command)
    assert done.returncode == 0 and 'pixel-FD' in done.stdout, done.stderr
    more = run(*command, '--kimg', '0.096')  # compares with the reference that the first run left
    assert more.returncode == 0 and 'resuming' in more.stdout and 'pixel-FD' in more.stdout, more.stderr
    (tmp_path / 'data' / 'images.npy').unlink()
    assert 'nothing to do' in run(*command).stdout  # a complete run needs neither data nor teacher


def test_bad_input_is_one_line(folder, tmp_path):
    common = [ROOT / 'disback.py', *STUDENT, '--teacher', teacher(folder)]
    (tmp_path / 'random.pt').write_bytes(b'nothing')
    for more, message in [
            (['--out', folder / 'plain', '--lr', '0.5'], 'lr: 0.0001 -> 0.5'),
            (['--out', tmp_path / 'a', '--batch', '30', '--batch-gpu', '8'], 'not a multiple'),
            (['--out', tmp_path / 'a', '--batch-gpu', '0'], '--batch-gpu 0: expected a number above 0'),
            (['--out', tmp_path / 'b', '--teacher', tmp_path / 'random.pt'], 'cannot load'),
            (['--out', tmp_path / 'c', '--teacher', tmp_path / 'none.pt'], 'no network at'),
            (['--out', tmp_path / 'd', '--lr', '1e9', '--nodes', '0'], 'diverged'),
            (['--out', tmp_path / 'e', '--fake-lr', '1e9'], 'a weight of fake_score is not finite'),
            (['--out', tmp_path / 'b', '--teacher', folder / 'plain' / 'student-000000.pt'], 'no score elsewhere'),
            *((flags.split(), 'expected a number') for flags in (
                '--lr nan', '--lr inf', '--kimg nan', '--batch 99999999999999999999', '--seed -1', '--nodes -1',
                '--student-sigma 0 1e99', '--eval-images -5')),
            (['--lr', ''], 'invalid float'), (['--eval-images', '9'], 'at least 10')]:
        done = run(*common, *more)
        assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr, (more, done.stderr)
    assert not (tmp_path / 'd' / 'student-000000.pt').exists()
    for command, message in [
            ('edm_nets.py train --channels 6', 'multiple of 4'),
            ('edm_nets.py train --channel-mult 1 -2', 'expected a number above 0'),
            ('edm_nets.py train --channel-mult 1 1 1 1 1 1', '16 px cannot be halved 5 times'),
            ('edm_nets.py sample --net x --seeds 5-3', 'expected one to a million seeds'),
            ('edm_nets.py sample --net x --seeds 0-99999999999999999999', 'expected one to a million seeds'),
            ('edm_nets.py sample --net x --seeds 5-', 'invalid parse_seeds value'),
            ('edm_nets.py sample --net x --steps -1', 'expected a number above 0'),
            ('edm_nets.py bench --batch-gpu 0', 'expected a number above 0'),
            ('fid.py score --net x --dataset shapes --batch -3', 'expected a number above 0'),
            ('fid.py score --net x --dataset nowhere', 'no images.npy'),
            ('data.py grid nowhere x.png', 'no images.npy')]:
        script, *more = command.split()
        done = run(ROOT / script, *more, *(['--out', tmp_path / 'f'] if 'train' in more else []))
        assert done.returncode and message in done.stderr and 'Traceback' not in done.stderr, (command, done.stderr)


def test_sample_and_score(folder, tmp_path):
    student = folder / 'plain' / 'student-000000.pt'
    sample = [ROOT / 'edm_nets.py', 'sample', '--seeds', '0-8', '--out', tmp_path / 'grid.png', '--net']
    for nets, size in ([student], (144, 144)), ([teacher(folder), student], (432, 128)):  # a title above each row
        done = run(*sample, *nets)
        assert done.returncode == 0 and Image.open(tmp_path / 'grid.png').size == size, done.stderr
    score = [ROOT / 'fid.py', 'score', '--net', student, '--dataset', 'shapes', '--images', '300']
    results = [run(*score, '--batch', batch, processes=p) for batch, p in ((250, 1), (17, 2))]
    values = [float(r.stdout.split('pixel-FD ')[-1].split()[0]) for r in results]
    assert max(values) / min(values) < 1 + 1e-3 and 'cannot be compared' in results[0].stdout


def test_copies_are_identical():
    """The helpers that every script repeats are the same text everywhere."""
    for name in ('setup', 'rank_slices', 'sync_last', 'make_autocast', 'check_numbers', 'print0',
                 'is_due', 'update_ema', 'Means', 'check_finite', 'Stop', 'agree', 'open_run', 'save_checkpoint',
                 'load_checkpoint', 'start_log', 'log_status'):
        for script in (disback, teacher_free, distributional):
            assert inspect.getsource(getattr(edm_nets, name)) == inspect.getsource(getattr(script, name)), name
    assert inspect.getsource(edm_nets.rank0_first) == inspect.getsource(distributional.rank0_first)
    assert inspect.getsource(disback.draw_noise) == inspect.getsource(distributional.draw_noise)
    for name in ('draw_noise', 'open_both'):
        assert inspect.getsource(getattr(distributional, name)) == inspect.getsource(getattr(teacher_free, name)), name
