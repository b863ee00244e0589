"""Whole runs of teacher_free.py: the teacher is never called, resume, processes, the inits, verifier."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import edm_nets
import teacher_free
from conftest import ENV, ROOT, distance, run, weights

STUDENT = ['--kimg', '0.64', '--batch', '32', '--warmup-kimg', '0.128', '--ratio-updates', '2', '--draws', '2',
           '--lr', '3e-5', '--ratio-lr', '1e-4', '--status-kimg', '0.064', '--snapshot-kimg', '0.128',
           '--eval-images', '0']


@pytest.fixture(scope='module')
def common(runs):
    return [ROOT / 'teacher_free.py', *STUDENT, '--teacher', runs / 'teacher' / 'teacher-000001.pt', '--out']


@pytest.fixture(scope='module')
def plain(runs, common):
    """One undisturbed run."""
    done = run(*common, runs / 'tf')
    assert done.returncode == 0, done.stderr
    assert 'M in the ratio network; ' in done.stdout
    return runs / 'tf'


def both(path):
    """Student and ratio network of a student file."""
    content = torch.load(path, weights_only=True)
    return {f'{part}.{k}': v for part in ('net', 'ratio_net') for k, v in content[part].items()}


def test_the_run_folder(plain, common):
    assert {'config.json', 'stats.jsonl', 'latest.pt', 'previous.pt', 'student-000000.pt', 'grid-000000.png',
            'summary.png'} == set(os.listdir(plain))
    content = torch.load(plain / 'student-000000.pt', weights_only=True)
    assert set(content) == {'net', 'net_kwargs', 'sigma_init', 'dataset', 'kimg', 'ratio_net', 'ratio_net_kwargs'}
    assert content['kimg'] == 0.64 and content['dataset'] == 'shapes' and content['sigma_init'] == 2.5
    assert edm_nets.load(plain / 'student-000000.pt').sigma_init == 2.5
    net = teacher_free.load_ratio_net(plain / 'student-000000.pt')
    assert net(torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 1, 1), torch.zeros(2, 4)).shape == (2,)
    lines = [json.loads(line) for line in open(plain / 'stats.jsonl')]
    assert all({'kimg', 'sec_per_kimg', 'warmup_kimg'} <= set(line) for line in lines)
    assert {'student_loss', 'ratio_loss', 'log_ratio_real', 'log_ratio_fake'} <= set(lines[-1])
    assert lines[-1]['kimg'] == 0.64 and lines[-1]['warmup_kimg'] == 0.128
    assert 'student_loss' not in lines[1] and lines[1]['kimg'] == 0  # warm-up: the student is at rest
    again = run(*common, plain)
    assert again.returncode == 0 and 'complete' in again.stdout
    assert [json.loads(line) for line in open(plain / 'stats.jsonl')] == lines


COUNT = '''
import sys, edm_nets, teacher_free
levels, real = {}, edm_nets.EDMPrecond.forward
def forward(self, x, sigma, *args, **kwargs):
    for s in sigma.unique().tolist():
        levels[s] = levels.get(s, 0) + 1
    return real(self, x, sigma, *args, **kwargs)
edm_nets.EDMPrecond.forward = forward
teacher_free.train(teacher_free.parse_args(sys.argv[1:]))
print('levels', levels)
'''


def test_no_score_is_ever_evaluated(common, tmp_path):
    """In a whole training no denoiser is called but at sigma_init, where it is the one-step generator: in 5 student
    steps, for 2 x 4 + 5 fresh batches of the ratio, and for 3 grids (before and after the warm-up, at the end)."""
    done = run('-c', COUNT, *common[1:], tmp_path / 'run', '--snapshot-kimg', '9', '--kimg', '0.16')
    assert done.returncode == 0, done.stderr
    levels = eval(done.stdout.split('levels ')[1])
    assert levels == {2.5: 5 + 13 + 3}


def test_processes_and_accumulation_agree(plain, common, runs):
    """20 student steps after 4 of warm-up: the same within 1e-4, while training moves the weights by ten times that."""
    done = run(*common, runs / 'tf-split', '--batch-gpu', '8', processes=2)  # two processes, two rounds each
    assert done.returncode == 0, done.stderr
    teacher, one, two = (weights(runs / path) for path in (
        'teacher/teacher-000001.pt', 'tf/student-000000.pt', 'tf-split/student-000000.pt'))
    assert distance(one, two) < 1e-4 and distance(teacher, one) > 1e-3, (distance(one, two), distance(teacher, one))


def test_kill_and_resume_bit_for_bit(plain, common, runs):
    """SIGKILL in the warm-up and later; the same command ends with the same bits of both networks, and the same log."""
    kills, out = 0, runs / 'tf-killed'
    for lines in (2, 8):
        process = subprocess.Popen([sys.executable, *map(str, common), str(out)], env=ENV, stdout=subprocess.DEVNULL)
        log = out / 'stats.jsonl'
        while process.poll() is None and not (log.exists() and len(open(log).readlines()) >= lines):
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 1
    done = run(*common, out)
    assert done.returncode == 0 and 'resuming' in done.stdout, done.stderr
    a, b = both(plain / 'student-000000.pt'), both(out / 'student-000000.pt')
    assert all(torch.equal(a[k], b[k]) for k in a)
    stats = [list(map(json.loads, open(folder / 'stats.jsonl'))) for folder in (plain, out)]
    for line in stats[0] + stats[1]:
        del line['sec_per_kimg'], line['seconds']
    assert stats[0] == stats[1]


def test_single_level_training_and_init(common, runs, tmp_path):
    """edm_nets.py train --sigma makes a network of one level, a one-step sampler; --init single-level starts there."""
    done = run(ROOT / 'edm_nets.py', 'train', '--dataset', 'shapes', '--sigma', '2.5', '--kimg', '0.25', '--batch',
               '32', '--channels', '8', '--channel-mult', '1', '2', '--out', tmp_path / 'single')
    assert done.returncode == 0, done.stderr
    path = tmp_path / 'single' / 'teacher-000000.pt'
    assert edm_nets.load(path).sigma_init == 2.5
    done = run(*common, tmp_path / 'run', '--init', 'single-level', '--single-level', path, '--kimg', '0.032', '--lr',
               '1e-9')
    assert done.returncode == 0, done.stderr
    assert distance(weights(path), weights(tmp_path / 'run' / 'student-000000.pt')) < 1e-4


def test_best_of(common, tmp_path, few_shapes):
    more = ['--kimg', '0.064', '--eval-images', '40', '--ratio-net', 'lightweight', '--weight', 'sigma2']
    done = run(*common, tmp_path / 'best', *more, '--best-of', '1', '3')
    assert done.returncode == 0 and 'resample, K = 3' in done.stdout, done.stderr
    with open(tmp_path / 'best' / 'stats.jsonl') as f:
        last = json.loads(f.readlines()[-1])
    row = next(line for line in done.stdout.splitlines() if line.startswith('resample, K = 1'))
    assert float(row.split()[4]) == pytest.approx(last['pixel-FD'], abs=1e-3)  # K = 1 is the plain student


def test_prepared_data_without_classes(unlabelled, tmp_path):
    """A folder of images of an unconditional network, mirrored; two processes."""
    done = run(ROOT / 'teacher_free.py', *unlabelled, '--features', 'pixels', '--eval-images', '20',
               '--warmup-kimg', '0.064', '--out', tmp_path / 'run', processes=2)
    assert done.returncode == 0 and 'pixel-FD' in done.stdout, done.stderr
    assert teacher_free.load_ratio_net(tmp_path / 'run' / 'student-000000.pt').label_dim == 0


def test_bad_input_is_one_line(plain, common, runs, tmp_path):
    for more, message in [
            (['--out', plain, '--divergence', 'rkl', '--kimg', '1'], 'divergence: js -> rkl, kimg: 0.64 -> 1.0'),
            (['--batch', '30', '--batch-gpu', '8'], 'not a multiple'),
            (['--teacher', tmp_path / 'none.pt'], 'no network at'),
            (['--init', 'single-level', '--single-level', tmp_path / 'none.pt'], 'no network at'),
            (['--lr', '1e9'], 'diverged')]:
        done = run(*common, tmp_path / 'a', *more)
        assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr, (more, done.stderr)
    assert not (tmp_path / 'a' / 'student-000000.pt').exists()
