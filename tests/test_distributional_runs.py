"""Whole runs of distributional.py: what is frozen stays, resume, processes, projected heads, analyses."""

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import distributional
import edm_nets
from conftest import ENV, ROOT, distance, run, weights
from test_distributional import Tiny

STUDENT = ['--kimg', '0.64', '--batch', '32', '--lr', '3e-5', '--d-lr', '1e-4', '--r1-interval', '4',
           '--status-kimg', '0.064', '--snapshot-kimg', '0.128', '--eval-images', '0']


@pytest.fixture(scope='module')
def common(runs):
    return [ROOT / 'distributional.py', *STUDENT, '--teacher', runs / 'teacher' / 'teacher-000001.pt', '--out']


@pytest.fixture(scope='module')
def plain(runs, common):
    """One undisturbed run, with most convolutions frozen."""
    done = run(*common, runs / 'd', '--freeze', '1')
    assert done.returncode == 0, done.stderr
    assert '% frozen' in done.stdout
    return runs / 'd'


def test_the_run_folder(plain, common):
    assert {'config.json', 'stats.jsonl', 'latest.pt', 'previous.pt', 'student-000000.pt', 'grid-000000.png',
            'summary.png'} == set(os.listdir(plain))
    content = torch.load(plain / 'student-000000.pt', weights_only=True)
    assert set(content) == {'net', 'net_kwargs', 'sigma_init', 'dataset', 'kimg'} and content['kimg'] == 0.64
    assert edm_nets.load(plain / 'student-000000.pt').sigma_init == content['sigma_init'] \
        == distributional.PRESETS['shapes']['sigma_init']
    lines = [json.loads(line) for line in open(plain / 'stats.jsonl')]
    assert all({'kimg', 'sec_per_kimg'} <= set(line) for line in lines) and lines[-1]['kimg'] == 0.64
    assert {'student_loss', 'discriminator_loss', 'real_logit', 'fake_logit'} <= set(lines[-1])
    steps = [round(line['kimg'] * 1000 / 32) for line in lines if 'r1_penalty' in line]  # two steps to a line
    assert steps == [6, 10, 14, 18]  # R1 after steps 4, 8, 12 and 16, not after the first
    again = run(*common, plain, '--freeze', '1')
    assert again.returncode == 0 and 'complete' in again.stdout
    assert [json.loads(line) for line in open(plain / 'stats.jsonl')] == lines


def test_frozen_stays_to_the_bit(plain, runs):
    """In the student, its average and the checkpoint; the optimizer has state for the others alone."""
    before, after = weights(runs / 'teacher' / 'teacher-000001.pt'), weights(plain / 'student-000000.pt')
    latest = torch.load(plain / 'latest.pt', weights_only=True)
    net = edm_nets.load(plain / 'student-000000.pt')
    frozen = {name: distributional.frozen_by_gdd_i(name) for name, _ in net.named_parameters()}
    assert 0 < sum(frozen.values()) < len(frozen)
    for name, is_frozen in frozen.items():
        for state in (after, latest['student']):
            assert torch.equal(before[name], state[name]) == is_frozen, name
    moments = latest['optimizer']['state']
    assert len(moments) == len(frozen) - sum(frozen.values())
    assert sorted(m['exp_avg'].numel() for m in moments.values()) == sorted(
        p.numel() for name, p in net.named_parameters() if not frozen[name])


def test_processes_and_accumulation_agree(plain, common, runs):
    """20 steps, R1 among them: the same within 1e-4, while training moves the weights by more."""
    done = run(*common, runs / 'd-split', '--freeze', '1', '--batch-gpu', '8', processes=2)  # two rounds each
    assert done.returncode == 0, done.stderr
    teacher, one, two = (weights(runs / path) for path in (
        'teacher/teacher-000001.pt', 'd/student-000000.pt', 'd-split/student-000000.pt'))
    assert distance(one, two) < 1e-4 and distance(teacher, one) > 1e-3, (distance(one, two), distance(teacher, one))


def test_kill_and_resume_bit_for_bit(plain, common, runs):
    """SIGKILL; the same command ends with the same bits of student and discriminator, and the same log."""
    kills, out = 0, runs / 'd-killed'
    command = [*common, out, '--freeze', '1']
    for lines in (3, 7):
        process = subprocess.Popen([sys.executable, *map(str, command)], env=ENV, stdout=subprocess.DEVNULL)
        log = out / 'stats.jsonl'
        while process.poll() is None and not (log.exists() and len(open(log).readlines()) >= lines):
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 1
    done = run(*command)
    assert done.returncode == 0 and 'resuming' in done.stdout, done.stderr
    a, b = (torch.load(folder / 'latest.pt', weights_only=True) for folder in (plain, out))
    for part in ('student', 'ema', 'discriminator'):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    stats = [list(map(json.loads, open(folder / 'stats.jsonl'))) for folder in (plain, out)]
    for line in stats[0] + stats[1]:
        del line['sec_per_kimg'], line['seconds']
    assert stats[0] == stats[1]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The flags for a stand-in feature network, read from a file as the real ones are."""
    torch.manual_seed(0)
    torch.save(Tiny().state_dict(), tmp_path / 'file')
    digest = hashlib.sha256((tmp_path / 'file').read_bytes()).hexdigest()[:8]
    (tmp_path / 'file').rename(tmp_path / f'tiny-{digest}.pth')
    monkeypatch.setitem(distributional.FEATURES, 'vgg', (Tiny, f'https://host/tiny-{digest}.pth'))
    return ['--backbones', 'vgg', 'unet', '--features-dir', tmp_path]


def test_projected_discriminator(common, tiny, runs):
    """A conditional run with a feature network beside the U-Net: R1 and all; stopped and resumed to the bit."""
    small = [*common[1:-1], *tiny, '--batch', '4', '--batch-gpu', '2', '--kimg', '0.012', '--status-kimg', '0.004',
             '--snapshot-kimg', '0.008', '--r1-interval', '2']
    done = run(common[0], *small, '--out', runs / 'd-whole')
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(runs / 'd-whole' / 'stats.jsonl')]
    assert any('r1_penalty' in line for line in lines)
    real = distributional.update_ema

    def interrupt(ema, student, nimg, *rest):
        if nimg == 8:  # the third step
            raise OSError('the machine is gone')
        real(ema, student, nimg, *rest)
    distributional.update_ema = interrupt
    try:
        assert 'the machine is gone' in run(common[0], *small, '--out', runs / 'd-cut').stderr
    finally:
        distributional.update_ema = real
    done = run(common[0], *small, '--out', runs / 'd-cut')
    assert done.returncode == 0 and 'resuming' in done.stdout, done.stderr
    a, b = (torch.load(runs / name / 'latest.pt', weights_only=True) for name in ('d-whole', 'd-cut'))
    assert a['mixing'] and not any('.network.' in k for k in a['mixing'])
    for part in ('student', 'discriminator', 'mixing'):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    start = distributional.Projection(Tiny()).across_scales[0].weight.shape
    assert a['mixing']['vgg.across_scales.0.weight'].shape == start
    assert {k.split('.')[1] for k in a['discriminator']} == {'vgg', 'unet'}
    assert 'parts.vgg.embeddings.0.weight' in a['discriminator']


def test_analyses(plain, common, few_shapes):
    more = ['--freeze', '1', '--features', 'pixels']
    done = run(*common, plain, *more, '--eval-images', '60', '--teacher-student-fd', '2', '3', '--activations')
    assert done.returncode == 0, done.stderr
    lines = (plain / 'teacher-student-fd.txt').read_text().splitlines()
    rows = [line.split() for line in lines[1:]]
    assert [row[1] for row in rows] == ['2', '3'] and rows[0][4] == rows[1][4]  # one student, one distance to the data
    assert all(float(value) > 0 for row in rows for value in row[3:]) and rows[0][3] != rows[1][3]
    picture = np.asarray(Image.open(plain / 'activations.png'))
    assert picture.shape[2] == 3 and len(np.unique(picture)) > 20


def test_prepared_data_without_classes(unlabelled, tmp_path):
    """A folder of images of an unconditional network."""
    done = run(ROOT / 'distributional.py', *unlabelled, '--features', 'pixels', '--eval-images', '20',
               '--backbones', 'unet', '--out', tmp_path / 'run')
    assert done.returncode == 0 and 'pixel-FD' in done.stdout, done.stderr


def test_weights_that_are_not_finite_are_not_saved(common, tmp_path, monkeypatch):
    """The loss is finite and its gradient NaN, in the last step before a checkpoint: the checkpoint before it stays."""
    penalty = distributional.r1_penalty
    monkeypatch.setattr(distributional, 'r1_penalty',
                        lambda logits, x: penalty(logits, x) + (logits[0].sum() * 0).sqrt())
    done = run(*common, tmp_path, '--snapshot-kimg', '0.16')  # R1 comes in the fifth step
    assert done.returncode != 0 and 'a weight of discriminator is not finite' in done.stderr, done.stderr
    latest = torch.load(tmp_path / 'latest.pt', weights_only=True)
    assert latest['nimg'] == 0 and all(p.isfinite().all() for p in latest['discriminator'].values())


def test_bad_input_is_one_line(plain, common, runs, tmp_path):
    for more, message in [
            (['--out', plain, '--freeze', '0'], 'freeze: 1 -> 0'),
            (['--batch', '30', '--batch-gpu', '8'], 'not a multiple'),
            (['--teacher', tmp_path / 'none.pt'], 'no network at'),
            (['--backbones', 'vgg', '--features-dir', tmp_path], 'vgg16_bn-6c64b313.pth; the first is at https'),
            (['--lr', '1e9'], 'diverged')]:
        done = run(*common, tmp_path / 'a', *more)
        assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr, (more, done.stderr)
    assert not (tmp_path / 'a' / 'student-000000.pt').exists()
