"""The ruler against closed forms: distances of Gaussians, known coverage, one and several batches. Then runs."""

import argparse
import importlib.util
import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
import edm_nets
import fid
from conftest import ROOT
from test_nets import small

CPU = torch.device('cpu')


def test_frechet_distance():
    """Covariances U diag(a) U^T, U diag(b) U^T: the distance is |mu|^2 + sum (sqrt a - sqrt b)^2, exactly."""
    rng = np.random.default_rng(0)
    u, mu = np.linalg.qr(rng.normal(size=[200, 200]))[0], rng.normal(size=200)
    for zeros in (0, 60, 150):  # singular covariances too, with different null spaces
        a, b = np.exp(3 * rng.normal(size=[2, 200]))
        a[:zeros], b[zeros // 2:zeros + zeros // 2] = 0, 0
        exact = (mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        assert fid.frechet_distance(mu, u * a @ u.T, 0 * mu, u * b @ u.T) == pytest.approx(exact, rel=1e-7), zeros
        assert fid.frechet_distance(mu, u * a @ u.T, mu, u * a @ u.T) == pytest.approx(0, abs=1e-9 * a.sum()), zeros
    s1, s2 = (np.cov(rng.normal(size=[200, 500])) for _ in range(2))  # these do not commute
    textbook = (mu ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(mu, s1, 0 * mu, s2) == pytest.approx(textbook, rel=1e-7)
    for bad, message in (([mu * np.nan, s1], 'not finite'), ([mu[:3], s1[:3, :3]], 'other features')):
        with pytest.raises(ValueError, match=message):
            fid.frechet_distance(mu, s1, *bad)


def test_inception(tmp_path):
    net = fid.InceptionV3()
    state = net.state_dict()
    assert sum(k.endswith('conv.weight') for k in state) == 94 and state['fc.weight'].shape == (1008, 2048)
    assert state['Mixed_7c.branch3x3dbl_3b.conv.weight'].shape == (384, 384, 3, 1)
    gone = ('num_batches_tracked', 'bn.weight')  # the original graph has neither: 23,868,176 values
    assert sum(v.numel() for k, v in state.items() if not k.endswith(gone)) == 23_868_176
    for name in state:
        state[name] += (0.1 * torch.rand(state[name].shape)).to(state[name].dtype) * ('.bn.' in name)
    features, logits = net(images := torch.randint(0, 256, [2, 3, 32, 32], dtype=torch.uint8))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert (fid.fold(net)(images)[0] - features).abs().max() < 1e-4 * features.abs().max()
    with pytest.raises(ValueError, match='uint8'):
        net(images.float())
    torch.save(dict(a=torch.zeros(1)), tmp_path / 'wrong.pth')
    with pytest.raises(ValueError, match='is not pt_inception'):
        fid.inception_v3(tmp_path / 'wrong.pth')
    ramp = torch.arange(32.).expand(1, 3, 32, 32)  # TF1: source coordinate i * 32 / 299, clamped at the border
    assert torch.allclose(fid.resize_tf1(ramp, 299)[0, 0, 5], (torch.arange(299.) * 32 / 299).clamp(max=31), atol=1e-4)


def test_scores_of_known_images():
    sure = torch.eye(10).repeat(100, 1) * 1000  # ten classes, equally often, each certain: the score is 10
    assert fid.inception_score(sure[torch.randperm(1000)], splits=1) == pytest.approx(10, rel=1e-4)
    assert fid.inception_score(torch.zeros(100, 10)) == pytest.approx(1)
    real = torch.randn(500, 2)
    assert fid.precision_recall(real, real) == (1, 1) and fid.precision_recall(real, real + 100) == (0, 0)
    precision, recall = fid.precision_recall(real, real[:1] + 0.01 * torch.randn(500, 2))  # one mode
    assert precision > 0.9 and recall < 0.1
    dataset = data.Shapes(1000)
    images = dataset.images(np.arange(1000))
    kind, colour, valid = fid.read_shapes(images)
    assert np.array_equal(kind, dataset.kind) and np.array_equal(colour, dataset.colour) and valid.all()
    scores, red_discs, noise, ground = map(fid.shapes_coverage, (
        images, images[(kind == 0) & (colour == 0)], torch.randint(0, 256, [50, 3, 16, 16]).byte(),
        torch.full([5, 3, 16, 16], data.Shapes.ground, dtype=torch.uint8)))
    assert scores['coverage'] == 1 and scores['tv'] < 0.1 and noise['valid'] == ground['valid'] == 0
    assert red_discs['coverage'] == pytest.approx(1 / 24) and red_discs['tv'] == pytest.approx(23 / 24)


def test_score_of_data_and_of_batches():
    ruler = fid.Ruler(data.Shapes(1000), 'pixels', CPU)
    x = ruler.dataset.images(np.arange(1000)).flatten(1).double().numpy() / 127.5 - 1
    assert np.allclose(ruler.mu, x.mean(0), atol=1e-5) and np.allclose(ruler.sigma, np.cov(x.T), atol=1e-5)
    same = ruler.score(ruler.dataset.images, 1000)
    assert same['pixel-FD'] < 1e-8 * ruler.sigma.trace() and same['precision'] == same['recall'] == 1
    other = data.Shapes(300, seed=1)
    all_at_once, in_batches = (ruler.score(other.images, 300, batch=batch) for batch in (250, 7))
    assert all_at_once.pop('pixel-FD') == pytest.approx(in_batches.pop('pixel-FD'), rel=1e-6)
    assert all_at_once == in_batches and all_at_once['images'] == 300
    with pytest.raises(ValueError, match='3 images are too few'):
        fid.Ruler(data.Shapes(3), 'pixels', CPU)


def test_references(tmp_path, capsys, monkeypatch):
    datasets, path = [data.Shapes(300, seed=seed) for seed in (0, 1)], tmp_path / 'reference.npz'
    (mu, sigma), (_, other) = [(ruler.mu.numpy(), ruler.sigma.numpy()) for ruler in (
        fid.Ruler(dataset, 'pixels', CPU) for dataset in datasets)]
    assert capsys.readouterr().out.count('warning: 300 images are fewer than the 768 features') == 2
    for bad, message in [
            (dict(mu=mu), 'no .npz with mu and sigma'), (dict(mu=[None], sigma=sigma), 'no .npz with mu and sigma'),
            (dict(mu=mu[:9], sigma=sigma[:9, :9]), '768 features'), (dict(mu=mu, sigma=sigma[:9]), '768 features'),
            (dict(mu=mu, sigma=sigma * np.nan), 'no finite'), (dict(mu=mu * np.inf, sigma=sigma), 'no finite')]:
        np.savez(path, **bad)
        with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
            fid.Ruler(datasets[0], 'pixels', CPU, ref=path)
    fid.save_statistics(path, mu, sigma)
    assert np.array_equal(fid.Ruler(datasets[1], 'pixels', CPU, ref=path).sigma, sigma)  # `ref` is used as it is
    for dataset, right in zip([*datasets, datasets[0]], (sigma, other, sigma)):  # `cache` must be of its dataset
        assert np.array_equal(fid.Ruler(dataset, 'pixels', CPU, cache=path).sigma, right)
        assert capsys.readouterr().out.count(': measured again\n') == 1
    monkeypatch.delattr(fid.Ruler, 'measure')
    assert np.array_equal(fid.Ruler(datasets[0], 'pixels', CPU, cache=path).sigma, sigma)  # nothing is measured


class Fake(torch.nn.Module):
    """Stands in for Inception: its features are pixels."""
    fc = torch.nn.Linear(1, 1008).requires_grad_(False)

    def forward(self, images):
        return torch.nn.functional.pad(images.flatten(1) / 255, (0, 2048 - images[0].numel())), torch.zeros(1, 1008)


def test_a_foreign_one_step_network_against_a_fetched_reference_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, 'inception_v3', lambda _: Fake())
    monkeypatch.setenv('ONE_STEP_CACHE', str(tmp_path / 'cache'))
    edm_nets.save(tmp_path / 'net.pt', net := small(), 'elsewhere', 0)
    fid.save_statistics(tmp_path / 'ref.npz', np.zeros(2048), np.zeros([2048, 2048]))
    line = f'score --net {tmp_path}/net.pt --dataset elsewhere --num 10 --sigma-init 2.5 --precision bf16'
    with pytest.raises(SystemExit):  # there is no folder for the file, but the score is printed
        fid.main([*line.split(), '--ref', (tmp_path / 'ref.npz').as_uri(), '--out', f'{tmp_path}/missing/score.json'])
    *_, scores = capsys.readouterr().out.splitlines()
    net.sigma_init = 2.5
    pixels = edm_nets.generate(net, range(10)).flatten(1) / 255
    expected = pixels.mean(0).square().sum() + pixels.var(0).sum()  # of a distribution to the point 0
    assert float(scores.split()[1]) == pytest.approx(float(expected), rel=1e-2) and 'precision' not in scores
    with pytest.raises(ValueError, match='give the prepared data'):
        fid.Ruler(None, 'inception', CPU)
    (tmp_path / 'page.npz').write_text('<html>')
    with pytest.raises(ValueError, match='no .npz with mu and sigma .from file:.*page.npz; removed from the cache.$'):
        fid.Ruler(None, 'inception', CPU, ref=(tmp_path / 'page.npz').as_uri())
    assert not list((tmp_path / 'cache').glob('*page.npz'))
    for command, message in {line + ' --ref x --data typo': 'no images.npy in typo',
                             f'ref --dataset shapes --out {tmp_path}/ref.npz': 'ref.npz exists already'}.items():
        with pytest.raises(SystemExit):
            fid.main(command.split())
        assert message in capsys.readouterr().err


def write_run(out, kimg, scores):
    """A run folder of a run of so many kimg, with a status line per score, at 0, 1, 2, ... kimg."""
    out.mkdir()
    (out / 'config.json').write_text(json.dumps(dict(kimg=kimg, command=['x.py'], trained_parameters=500_000)))
    lines = [dict(kimg=k, seconds=1.5, mismatch=k - s, images=40, **{'pixel-FD': s}) for k, s in enumerate(scores)]
    (out / 'stats.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(out)


def test_summary_of_a_run(tmp_path, few_shapes, capsys, world):
    args = argparse.Namespace(out=write_run(tmp_path / 'run', 2, [9, 3, 5]), teacher=tmp_path / 'teacher.pt',
                              features='pixels', eval_images=40, sigma_init=2.5)
    edm_nets.save(args.teacher, net := small(), 'shapes', 0)
    net.sigma_init = 2.5
    edm_nets.save(tmp_path / 'run' / 'student-000002.pt', net, 'shapes', 2000)
    fid.summarize(args)
    table, output = (tmp_path / 'run' / 'summary.txt').read_text(), capsys.readouterr().out
    rows = [re.split('  +', line)[:2] for line in table.splitlines()]
    assert [name for name, _ in rows[:3]] == ['', 'data, other images', 'teacher, 18 steps']
    assert rows[3:] == [['student before', '9.000'], ['student after', '5.000']]
    assert table in output and 'summary.png' in output.splitlines()[-1]
    assert Image.open(tmp_path / 'run' / 'summary.png').size == (18 * 48, 4 * (16 + 2 * 48))

    # Scores beside the teacher's file stand for its row, but only those of as many images in 18 steps, on equal data.
    same = {'pixel-FD': 777, 'images': 40, 'steps': 18, 'ref': None, 'data': data.identity(data.Shapes())}
    for other, used in ((dict(steps=17), False), (dict(ref='x.npz'), False), (dict(data='x'), False), ({}, True)):
        args.teacher.with_suffix('.json').write_text(json.dumps(same | other))
        fid.summarize(args)
        assert ('777.000' in capsys.readouterr().out) == used
    args.teacher.with_suffix('.json').write_text('{"pixel-FD": 7')
    with pytest.raises(ValueError, match='teacher.json is damaged .*: remove it, then run the same command again'):
        fid.summarize(args)


def test_figures(tmp_path, capsys):
    """Seeds go together: their mean and sample standard deviation; a run that ended early is left out, and said so."""
    spec = importlib.util.spec_from_file_location('figures', ROOT / 'assets' / 'figures.py')
    spec.loader.exec_module(figures := importlib.util.module_from_spec(spec))
    runs = [write_run(tmp_path / name, kimg, [8, score]) for name, kimg, score in [
        ('a-seed0', 1, 3), ('a-seed1', 1, 5), ('a-seed0-nodes0', 1, 2), ('b-seed7', 2, 1)]]
    figures.main(['table', *runs])
    assert [re.split('  +', line) for line in capsys.readouterr().out.splitlines()] == [
        ['', 'pixel-FD', 'kimg', 'seconds', 'trained'], ['a', '4 ±1.4', '1', '3', '0.5'],
        ['a-nodes0', '2', '1', '3', '0.5'], ['b (0 of 1 runs)', '-', '-', '-', '-']]
    figures.main(['plot', *runs, '--columns', 'pixel-FD', 'mismatch', '--out', f'{tmp_path}/curves.png'])
    picture = np.asarray(Image.open(tmp_path / 'curves.png')).astype(int)
    for color in figures.COLORS[:3]:  # three names: each has a line in each of the two panels
        near = abs(picture - [int(color[i:i + 2], 16) for i in (1, 3, 5)]).sum(2) < 30
        assert near.shape == (500, 720) and near[:250, 60:500].any() and near[250:, 60:500].any()
    with pytest.raises(SystemExit):
        figures.main(['plot', *runs, '--columns', 'loss', '--out', f'{tmp_path}/none.png'])
    assert 'figures.py plot: no run has loss' in capsys.readouterr().err


def test_kept_runs_stand_for_folders(tmp_path, capsys, monkeypatch):
    """What `keep` wrote gives the same table as the folders, also by a pattern; --reach finds the first such score."""
    spec = importlib.util.spec_from_file_location('figures', ROOT / 'assets' / 'figures.py')
    spec.loader.exec_module(figures := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(figures, 'TRIALS', tmp_path / 'trials.json')
    runs = [write_run(tmp_path / f'a-seed{i}', 2, scores) for i, scores in enumerate(([8, 6, 3], [8, 5, 9]))]
    tables = []
    for names in (runs[:1], runs[1:]):
        figures.main(['keep', *names])
    for names in (runs, [f'{tmp_path}/gone/a-seed?']):
        figures.main(['table', *names, '--columns', 'pixel-FD', '--reach', '5', '4', '1'])
        tables.append(capsys.readouterr().out)
    assert [re.split('  +', line) for line in tables[0].splitlines()] == [
        ['', 'pixel-FD', 'kimg to 5', 'kimg to 4', 'kimg to 1'],
        ['a', '6 ±4.2', '1.5 ±0.71', '2 (1 of 2)', 'never']]
    assert tables[0] == tables[1]
    with pytest.raises(SystemExit):
        figures.main(['table', f'{tmp_path}/c-seed0'])
    assert 'c-seed0 is no run folder' in capsys.readouterr().err
