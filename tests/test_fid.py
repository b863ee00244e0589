"""The ruler against closed forms: distances of Gaussians, known coverage, one and several batches."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid


def random_covariance(d, rank, rng):
    a = rng.normal(size=[d, rank])
    return a @ a.T / rank


def test_frechet_distance_of_commuting_gaussians():
    """Covariances U diag(a) U^T, U diag(b) U^T: the distance is |mu|^2 + sum (sqrt a - sqrt b)^2, exactly."""
    rng = np.random.default_rng(0)
    d = 200
    u = np.linalg.qr(rng.normal(size=[d, d]))[0]
    mu = rng.normal(size=d)
    for zeros in (0, 60, 150):  # singular covariances too, with different null spaces
        a, b = np.exp(rng.normal(size=d) * 3), np.exp(rng.normal(size=d) * 3)
        a[:zeros], b[zeros // 2:zeros + zeros // 2] = 0, 0
        exact = (mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        value = fid.frechet_distance(mu, u * a @ u.T, np.zeros(d), u * b @ u.T)
        assert abs(value / exact - 1) < 1e-8, zeros


def test_frechet_distance_against_the_textbook():
    import scipy.linalg
    rng = np.random.default_rng(1)
    s1, s2 = random_covariance(64, 200, rng), random_covariance(64, 200, rng)
    mu1, mu2 = rng.normal(size=[2, 64])
    textbook = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(fid.frechet_distance(mu1, s1, mu2, s2) / textbook - 1) < 1e-8
    assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-8
    low1, low2 = random_covariance(64, 20, rng), random_covariance(64, 30, rng)  # rank 20 and 30: exact by SVD
    assert fid.frechet_distance(mu1, low1, mu1, low1) == pytest.approx(0, abs=1e-9)
    assert fid.frechet_distance(mu1, low1, mu1, 0 * low2) == pytest.approx(np.trace(low1), rel=1e-10)
    with pytest.raises(ValueError, match='not finite'):
        fid.frechet_distance(mu1 * np.nan, s1, mu2, s2)
    with pytest.raises(ValueError, match='other features'):
        fid.frechet_distance(mu1, s1, mu2[:3], s2[:3, :3])


def test_streaming_statistics_equal_numpy():
    x = np.random.default_rng(0).normal(3, 2, size=[1000, 20])
    statistics = fid.Statistics()
    for part in np.array_split(x, 7):
        statistics.add(torch.from_numpy(part))
    mu, sigma, n = statistics.result()
    assert n == 1000 and np.allclose(mu, x.mean(0)) and np.allclose(sigma, np.cov(x.T))


def test_inception_keys_and_resize():
    net = fid.InceptionV3()
    state = net.state_dict()
    assert sum(k.endswith('conv.weight') for k in state) == 94 and state['fc.weight'].shape == (1008, 2048)
    assert state['Mixed_7c.branch3x3dbl_3b.conv.weight'].shape == (384, 384, 3, 1)
    gone = ('num_batches_tracked', 'bn.weight')  # the original graph has neither: 23,868,176 values
    assert sum(v.numel() for k, v in state.items() if not k.endswith(gone)) == 23_868_176
    features, logits = net(torch.randint(0, 256, [2, 3, 32, 32], dtype=torch.uint8))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    with pytest.raises(ValueError, match='uint8'):
        net(torch.zeros(2, 3, 32, 32))
    ramp = torch.arange(32.).expand(1, 3, 32, 32)  # TF1: source coordinate i * 32 / 299, clamped at the border
    assert torch.allclose(fid.resize_tf1(ramp, 299)[0, 0, 5], (torch.arange(299.) * 32 / 299).clamp(max=31), atol=1e-4)


def test_inception_weights_are_checked(tmp_path):
    torch.save(dict(a=torch.zeros(1)), tmp_path / 'wrong.pth')
    with pytest.raises(ValueError, match='is not pt_inception'):
        fid.inception_v3(tmp_path / 'wrong.pth')


def test_inception_score_of_known_distributions():
    sure = torch.eye(10).repeat(100, 1) * 1000  # ten classes, equally often, each certain: the score is 10
    assert fid.inception_score(sure[torch.randperm(1000, generator=torch.Generator().manual_seed(0))], splits=1) \
        == pytest.approx(10, rel=1e-4)
    assert fid.inception_score(torch.zeros(100, 10)) == pytest.approx(1)


def test_precision_and_recall():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(500, 2, generator=g)
    assert fid.precision_recall(real, real) == (1, 1)
    assert fid.precision_recall(real, real + 100) == (0, 0)
    one_mode = real[:1] + 0.01 * torch.randn(500, 2, generator=g)
    precision, recall = fid.precision_recall(real, one_mode)
    assert precision > 0.9 and recall < 0.1


def test_shapes_are_read_back():
    dataset = data.Shapes()
    images = dataset.images(np.arange(1000))
    kind, colour, valid = dataset.read_back(images)
    assert np.array_equal(kind, dataset.kind[:1000]) and np.array_equal(colour, dataset.colour[:1000]) and valid.all()
    red_discs = images[(kind == 0) & (colour == 0)]
    scores = fid.shapes_coverage(red_discs)
    assert scores['coverage'] == pytest.approx(1 / 24) and scores['tv'] == pytest.approx(23 / 24)
    assert fid.shapes_coverage(images)['coverage'] == 1 and fid.shapes_coverage(images)['tv'] < 0.1
    noise = torch.randint(0, 256, [50, 3, 16, 16], dtype=torch.uint8)
    assert fid.shapes_coverage(noise)['valid'] == 0
    ground = torch.full([5, 3, 16, 16], data.Shapes.ground, dtype=torch.uint8)
    assert fid.shapes_coverage(ground)['valid'] == 0


def test_score_of_data_and_of_batches():
    ruler = fid.Ruler(data.Shapes(2000), 'pixels', torch.device('cpu'))
    same = ruler.score(ruler.dataset.images, 2000)
    assert same['pixel-FD'] == pytest.approx(0, abs=1e-6) and same['precision'] == same['recall'] == 1
    other = data.Shapes(300, seed=1)
    all_at_once = ruler.score(other.images, 300)
    statistics, (images, *_) = ruler.measure(other.images, 300, keep=300, batch=7)
    mu, sigma, n = statistics.result()
    assert n == len(images) == 300
    assert fid.frechet_distance(mu, sigma, ruler.mu, ruler.sigma) == pytest.approx(all_at_once['pixel-FD'], rel=1e-6)


def test_too_few_images_to_compare_with():
    with pytest.raises(ValueError, match='3 images are too few'):
        fid.Ruler(data.Shapes(3), 'pixels', torch.device('cpu'))


def test_reference_files(tmp_path, capsys):
    dataset = data.Shapes(300)
    ruler = fid.Ruler(dataset, 'pixels', torch.device('cpu'))
    assert 'warning: 300 images are fewer than the 768 features' in capsys.readouterr().out
    mu, sigma = ruler.mu.numpy(), ruler.sigma.numpy()
    nan, skew = sigma.copy(), sigma.copy()
    nan[3, 4], skew[0, 1] = np.nan, 9
    for bad, message in [
            (dict(x=1), 'no .npz with mu and sigma'), (dict(mu=mu), 'no .npz with mu and sigma'),
            (dict(mu=mu[:9], sigma=sigma[:9, :9]), 'other features'), (dict(mu=mu, sigma=sigma[:9]), 'other features'),
            (dict(mu=mu, sigma=nan), 'not a finite'), (dict(mu=mu * np.inf, sigma=sigma), 'not a finite'),
            (dict(mu=mu, sigma=skew), 'covariance'), (dict(mu=mu, sigma=-sigma), 'covariance'),
            (dict(mu=mu * 1e200, sigma=sigma), 'not a finite'), (dict(mu=[None], sigma=sigma), 'no .npz')]:
        np.savez(tmp_path / 'bad.npz', **bad)
        with pytest.raises(ValueError, match=message) as error:
            fid.Ruler(dataset, 'pixels', torch.device('cpu'), ref=tmp_path / 'bad.npz')
        assert '\n' not in str(error.value)
    fid.save_statistics(tmp_path / 'ref.npz', ruler.mu, ruler.sigma)
    content = (tmp_path / 'ref.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match='cut.npz is no .npz'):
        fid.Ruler(dataset, 'pixels', torch.device('cpu'), ref=tmp_path / 'cut.npz')
    again = fid.Ruler(dataset, 'pixels', torch.device('cpu'), ref=tmp_path / 'ref.npz')
    assert again.score(dataset.images, 300)['pixel-FD'] == pytest.approx(0, abs=1e-6)


def test_tables_and_curves_of_runs(tmp_path, capsys):
    """Seeds go together: their mean and sample standard deviation; a run that ended early is left out, and said so."""
    runs = [('a-seed0', 2, [8, 3]), ('a-seed1', 2, [8, 5]), ('a-seed0-nodes0', 2, [8, 2]), ('b-seed7', 1, [8, 1])]
    for i, (name, kimg, scores) in enumerate(runs):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(dict(kimg=2, trained_parameters=500_000)))
        lines = [dict(kimg=k * kimg, seconds=1.5, mismatch=k - 0.3 * i, images=20, **{'pixel-FD': s})
                 for k, s in enumerate(scores)]
        (tmp_path / name / 'stats.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    runs = [f'{tmp_path}/{name}' for name in sorted(os.listdir(tmp_path))]
    fid.main(['table', *runs])
    rows = [re.split('  +', line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ['', 'pixel-FD', 'kimg', 'seconds', 'trained']
    assert sorted(rows[1:]) == [['a', '4 ±1.4', '2', '3', '0.5'], ['a-nodes0', '2', '2', '3', '0.5'],
                                ['b (0 of 1 runs)', '-', '-', '-', '-']]
    fid.main(['plot', *runs, '--columns', 'pixel-FD', 'mismatch', '--out', f'{tmp_path}/curves.png'])
    picture = np.asarray(Image.open(tmp_path / 'curves.png')).astype(int)
    assert picture.shape == (500, 720, 3)
    for color in ('#1f77b4', '#d62728', '#2ca02c'):  # three names: each has a line in each of the two panels
        near = abs(picture - [int(color[i:i + 2], 16) for i in (1, 3, 5)]).sum(2) < 30
        assert near[:250, 60:500].any() and near[250:, 60:500].any()
    with pytest.raises(SystemExit, match='fid.py plot: no run has loss'):
        fid.main(['plot', *runs, '--columns', 'loss', '--out', f'{tmp_path}/none.png'])
