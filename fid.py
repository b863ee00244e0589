"""One ruler: Inception features, Fréchet distance, inception score, precision and recall; and for `shapes`, coverage.

    python fid.py score --net PATH_OR_URL --dataset cifar10 --num 50000    # one step for a student, else 18 Heun steps
    python fid.py ref --dataset cifar10 --out cifar10.npz                  # reference statistics, EDM's format
    python fid.py table RUN_FOLDERS                                        # of last scores, mean and spread over seeds
    python fid.py plot RUN_FOLDERS --out curves.png                        # of scores against images
    python fid.py bench                                                    # how fast, against other ways to do it

FID follows EDM: images as uint8, the 2015 Inception with TensorFlow-1 resizing, float64 statistics, 50,000 images of
seeds 0-49999, the whole training set as reference. The distance over raw pixels, for `shapes` and for machines without
the Inception weights, is always called pixel-FD. Published FIDs are minima: EDM's over three seed ranges, GDD's over
checkpoints.
"""

import argparse
import copy
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import data
import edm_nets

INCEPTION_URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/' \
    'pt_inception-2015-12-05-6726825d.pth'
INCEPTION_SHA256 = '6726825d'  # its first digits, as in the name
PR_IMAGES = 10_000  # precision and recall compare so many images, or all if they are fewer

# ----------------------------------------------------------------------------------------------------
# Inception-v3 of 2015 (Szegedy et al. 2016), the FID variant. Module names are those of the weight file.


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

    def fold(self):
        """Multiply the batch norm into the weights, once they are loaded: one pass over memory less."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """[N, c, R, R] -> [N, 224 + pool, R, R]."""

    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = Conv(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(c, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(c, pool, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(average(x))], 1)


class InceptionB(nn.Module):
    """[N, c, 35, 35] -> [N, c + 480, 17, 17]."""

    def __init__(self, c):
        super().__init__()
        self.branch3x3 = Conv(c, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """[N, c, R, R] -> [N, 768, R, R]; c7: width inside."""

    def __init__(self, c, c7):
        super().__init__()
        wide, tall = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(c, c7, 1), Conv(c7, c7, **wide)
        self.branch7x7_3 = Conv(c7, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(c, c7, 1), Conv(c7, c7, **tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c7, c7, **wide), Conv(c7, c7, **tall)
        self.branch7x7dbl_5 = Conv(c7, 192, **wide)
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average(x))], 1)


class InceptionD(nn.Module):
    """[N, c, 17, 17] -> [N, c + 512, 8, 8]."""

    def __init__(self, c):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(c, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(c, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """[N, c, R, R] -> [N, 2048, R, R]."""

    def __init__(self, c, max_pool):
        super().__init__()
        wide, tall = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.max_pool = max_pool  # the last block pools by maximum: a quirk of the 2015 graph
        self.branch1x1 = Conv(c, 320, 1)
        self.branch3x3_1 = Conv(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **wide), Conv(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **wide), Conv(384, 384, **tall)
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average(x)
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize: source coordinate i * W / size, no half-pixel shift, no antialiasing."""
    for dim in (2, 3):
        n = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = place.floor().long()
        weight = (place - low).view([-1, 1] if dim == 2 else [-1])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
    return x


class InceptionV3(nn.Module):
    """uint8 [N, 3, H, W] -> (features float32 [N, 2048], logits float32 [N, 1008]). torch-fidelity's
    `inception-v3-compat`. Weights: `inception_v3(path)`; without them it is the bare architecture."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, max_pool=False), InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f'InceptionV3 takes uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}')
        x = (resize_tf1(images.to(torch.float32), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        features = x.mean([2, 3])
        return features, self.fc(features)


def inception_v3(path=None):
    """InceptionV3 with its weights, from `path` or fetched once and verified. Raises OSError, ValueError."""
    path = path or data.download(INCEPTION_URL, data.cache_path(INCEPTION_URL), sha256=INCEPTION_SHA256)
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True), strict=True)
    except Exception as error:  # whatever a file that is not the weights can provoke; told in one line
        raise ValueError(f'{path} is not pt_inception-2015-12-05-6726825d.pth: {str(error).splitlines()[0]}') from None
    return fold(net)


def fold(net):
    """The same InceptionV3 with its batch norms folded into the convolutions, in place."""
    for module in net.modules():
        if isinstance(module, Conv):
            module.fold()
    return net

# ----------------------------------------------------------------------------------------------------
# Scores as functions of features and statistics.


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (FID: Heusel et al. 2017): means [d], covariances [d, d] -> float.

    With S = R R^T the last term is the sum of the singular values of R1^T R2: exact also when covariances are
    singular, with no root of a product. Raises ValueError on statistics that do not fit together or are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f'statistics of {list(mu1.shape)}, {list(sigma1.shape)} against {list(mu2.shape)}, '
                         f'{list(sigma2.shape)}: made from other features?')
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError('statistics are not finite')
    eps = torch.finfo(torch.float64).eps

    def root(sigma):  # R [d, rank] with R R^T = sigma: Cholesky, or without the null space
        r, failed = torch.linalg.cholesky_ex(sigma)
        if failed or r.diagonal().min() ** 2 < sigma.diagonal().max() * len(sigma) * eps:
            w, v = torch.linalg.eigh(sigma)
            keep = w > w[-1].clamp(min=0) * eps * 32
            r = v[:, keep] * w[keep].sqrt()
        return r

    trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)), mean over ten parts (Salimans et al. 2016): logits without bias [N, 1008] -> float."""
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        marginal = log_p.exp().mean(0, keepdim=True)
        scores.append((log_p.exp() * (log_p - marginal.log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019): features [N, d], [M, d] -> (float, float).

    Precision: share of fakes within the k-th neighbour distance of some real image; recall: the other way round.
    Deviation: on the features of the ruler, not VGG16's.
    """
    def radii(a):
        return torch.cat([torch.cdist(part, a).kthvalue(k + 1, dim=1).values for part in a.split(1024)])

    def covered(a, b, radius_b):
        return torch.cat([(torch.cdist(part, b) <= radius_b).any(1) for part in a.split(1024)]).double().mean()
    return float(covered(fake, real, radii(real))), float(covered(real, fake, radii(fake)))


def shapes_coverage(images):
    """Read kind and colour of each image back: uint8 [N, 3, 16, 16] -> dict.

    valid: share of images that are a shape at all; coverage: share of the 24 kind-colour pairs present (with at least
    a tenth of an equal share); tv: total-variation distance of the pairs from uniform. Both over valid images.
    """
    kind, colour, valid = data.Shapes.read_back(images)
    pairs = len(data.Shapes.kinds) * len(data.Shapes.colours)
    counts = torch.bincount((kind * len(data.Shapes.colours) + colour)[valid], minlength=pairs)
    share = counts / max(int(counts.sum()), 1)
    return dict(valid=float(valid.double().mean()), coverage=float((share >= 0.1 / pairs).double().mean()),
                tv=float((share - 1 / pairs).abs().sum() / 2))

# ----------------------------------------------------------------------------------------------------
# Scoring images, on any number of processes.


class Statistics:
    """Streaming mean and covariance in float64."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def add(self, features):
        """features float [n, d]."""
        features = features.double()
        self.n, self.sum, self.outer = self.n + len(features), self.sum + features.sum(0), \
            self.outer + features.T @ features

    def result(self):
        """All ranks together: (mu [d], sigma [d, d], number of images)."""
        n = torch.tensor(float(self.n), dtype=torch.float64, device=self.sum.device)
        if dist.is_initialized():
            for total in (n, self.sum, self.outer):
                dist.all_reduce(total)
        mu = self.sum / n
        return mu.cpu(), ((self.outer - n * mu[:, None] * mu) / (n - 1)).cpu(), int(n)


def save_statistics(path, mu, sigma):
    """Write mu [d] and sigma [d, d] as EDM does, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(f'{path}.tmp', 'wb') as file:
            np.savez(file, mu=mu, sigma=sigma)
        os.replace(f'{path}.tmp', path)
    finally:
        Path(f'{path}.tmp').unlink(missing_ok=True)


def load_statistics(path, d):
    """(mu float64 [d], sigma float64 [d, d]) of an .npz of EDM's format. Raises OSError, ValueError in one line."""
    try:
        with np.load(path) as file:
            mu, sigma = (np.asarray(file[key], np.float64) for key in ('mu', 'sigma'))
    except Exception as error:  # whatever a damaged or foreign file can provoke
        if isinstance(error, (MemoryError, FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f'{path} is no .npz with mu and sigma: {error}') from None
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise ValueError(f'{path} has statistics of {list(mu.shape)}, {list(sigma.shape)}, expected {[d]}, {[d, d]}: '
                         'made from other features?')
    largest = np.abs(sigma).max()  # a pixel that never varies has a variance of zero, or by rounding a little less
    if not (np.abs(mu).max() < 1e100 and largest < 1e100 and np.allclose(sigma, sigma.T)
            and sigma.diagonal().min() >= -1e-6 * largest):
        raise ValueError(f'{path}: mu and sigma are not a finite mean and covariance')
    return mu, sigma


class Ruler:
    """Features, and the reference to compare with: `score` for generated images.

    features: 'inception' (FID, weights from `inception` or fetched) or 'pixels' (pixel-FD). The reference is the
    whole `dataset`, or the statistics in the .npz file `ref`. Collective: every rank makes one. `cache` names a .npz
    file that keeps the measured reference. Raises ValueError when the dataset has fewer than ten images, or `ref`
    does not fit; warns where there are fewer images than features.
    """

    def __init__(self, dataset, features, device, inception=None, ref=None, cache=None):
        if len(dataset) < 10:
            raise ValueError(f'{len(dataset)} images are too few to compare with; --eval-images 0: no scores')
        self.dataset, self.device = dataset, device
        self.name = 'FID' if features == 'inception' else 'pixel-FD'
        self.net = self.real = None
        if features == 'inception':
            load = edm_nets.rank0_first if dist.is_initialized() else lambda function, path: function(path)
            # Measured on a CPU (`bench`); on a GPU, in float32 without TF32, contiguous is the usual choice: untested.
            layout = torch.contiguous_format if device.type == 'cuda' else torch.channels_last
            self.net = load(inception_v3, inception).to(device, memory_format=layout)
        ref = ref or (cache if cache and os.path.exists(cache) else None)
        if ref:
            self.mu, self.sigma = load_statistics(ref, 2048 if self.net else 3 * dataset.resolution ** 2)
        else:
            self.mu, self.sigma, _ = self.measure(dataset.images, len(dataset))[0].result()
            self.warn_of_few(len(dataset))
            if cache and (not dist.is_initialized() or dist.get_rank() == 0):
                save_statistics(cache, self.mu, self.sigma)

    def warn_of_few(self, n):
        if n < len(self.mu) and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f'warning: {n} images are fewer than the {len(self.mu)} features: their covariance is singular, and '
                  f'{self.name} biased', flush=True)

    def features(self, images):
        """uint8 [n, 3, R, R] -> (features [n, d], logits without bias [n, 1008] or None)."""
        if self.net is None:
            return images.to(self.device).flatten(1).float() / 127.5 - 1, None
        features, logits = self.net(images.to(self.device))
        return features, logits - self.net.fc.bias

    def measure(self, images_of, num, keep=False, batch=250):
        """This rank's Statistics of images_of(0..num-1); and if `keep`, of all ranks and in order, [images, features,
        logits]: features of at most PR_IMAGES, None for what no score reads."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        statistics, kept = Statistics(), []
        statistics.add(self.features(images_of(np.arange(1)))[0][:0])  # the shape, should this rank have no image
        for start in range(rank * batch, num, world_size * batch):
            images = images_of(np.arange(start, min(start + batch, num)))
            features, logits = self.features(images)
            statistics.add(features)
            if keep:
                images = images.cpu() if isinstance(self.dataset, data.Shapes) else None  # only they are read back
                few = features[:max(PR_IMAGES - start, 0)]
                kept.append((start, images, few.cpu(), None if logits is None else logits.cpu()))
        if keep and world_size > 1:
            everyone = [None] * world_size
            dist.all_gather_object(everyone, kept)
            kept = sorted(sum(everyone, []), key=lambda k: k[0])
        parts = [torch.cat(part) if part[0] is not None else None for part in list(zip(*kept))[1:]]
        return statistics, parts

    def score(self, images_of, num, batch=250):
        """Scores of images_of(indices int [n]) -> uint8 [n, 3, R, R], indices 0 ... num-1, as a dict. Collective.

        FID or pixel-FD, images (their number), precision, recall; with Inception IS; on shapes valid, coverage, tv.
        """
        statistics, (images, features, logits) = self.measure(images_of, num, keep=True, batch=batch)
        mu, sigma, n = statistics.result()
        scores = {self.name: frechet_distance(mu, sigma, self.mu, self.sigma), 'images': n}
        few = min(n, PR_IMAGES)
        if self.real is None:
            self.warn_of_few(n)
        if self.real is None or len(self.real) != min(few, len(self.dataset)):  # the same at every scoring of a run
            chosen = np.random.default_rng(0).permutation(len(self.dataset))[:few]  # folders are sorted by class
            parts = np.array_split(chosen, -(-few // batch))
            self.real = torch.cat([self.features(self.dataset.images(part))[0] for part in parts])
        scores['precision'], scores['recall'] = precision_recall(self.real, features.to(self.device))
        if logits is not None:
            scores['IS'] = inception_score(logits)
        if isinstance(self.dataset, data.Shapes):
            scores |= shapes_coverage(images)
        return scores

# ----------------------------------------------------------------------------------------------------
# Tables and curves of finished runs.

SCORES = ['FID', 'pixel-FD', 'precision', 'recall', 'IS', 'valid', 'coverage', 'tv']
TABLE = [*SCORES, 'kimg', 'seconds', 'trained']


def report(rows, path=None, columns=SCORES):
    """Print {name: {column: number or text}} as a table, on rank 0, and write it to a text file if there is a path."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    columns = [c for c in columns if any(c in row for row in rows.values())]
    cells = [['', *columns]] + [[name] + [x if isinstance(x, str) else f'{x:.3f}' for x in (
        row.get(c, '-') for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join([row[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(row[1:], widths[1:])]) for row in cells]
    if path:
        with open(path, 'w') as f:
            f.write('\n'.join(lines) + '\n')
    print('\n'.join(lines), flush=True)


def read_stats(out):
    """The status lines of a run folder: a list of dicts."""
    with open(f'{out}/stats.jsonl') as f:
        return [json.loads(line) for line in f]


def read_scores(out):
    """The first and the last line with scores of a run: (student before, student after)."""
    lines = [stats for stats in read_stats(out) if 'images' in stats]
    if not lines or lines[0]['kimg']:
        raise ValueError(f'{out} was begun without scores: repeat it with another --out, or with --eval-images 0')
    return lines[0], lines[-1]


def by_name(runs):
    """Run folders -> {name: [folder, ...]}: those that differ in nothing but `-seed0`, `-seed1`, ... go together."""
    groups = {}
    for out in runs:
        groups.setdefault(re.sub(r'-seed\d+', '', Path(out).resolve().name), []).append(out)
    return groups


def table(runs):
    """Last scores, kimg, seconds of training (scoring not counted) and millions of trained parameters: a row per name.

    Means over the seeds and, after ±, sample standard deviations. Runs that did not reach their --kimg are left out of
    the means, and the row's name says so.
    """
    rows = {}
    for name, folders in by_name(runs).items():
        ends = []
        for out in folders:
            lines, config = read_stats(out), json.loads(Path(out, 'config.json').read_text())
            if lines and lines[-1]['kimg'] >= config['kimg']:
                ends.append(dict(read_scores(out)[1], seconds=sum(line['seconds'] for line in lines),
                                 trained=config['trained_parameters'] / 1e6))
        row = rows[name if len(ends) == len(folders) else f'{name} ({len(ends)} of {len(folders)} runs)'] = {}
        for c in TABLE:
            values = [end[c] for end in ends if c in end]
            if values:
                spread = f' ±{np.std(values, ddof=1):.2g}' if len(values) > 1 and np.ptp(values) else ''
                row[c] = f'{np.mean(values):.4g}{spread}'
    return rows


def plot(runs, columns, out):
    """A panel per column of stats.jsonl, against thousands of student images; a colour per name -> PNG `out`.

    Raises ValueError where no run has such a column.
    """
    panels = {}
    for column in columns:
        panel = panels[f'{column} against thousands of student images'] = {}
        for name, folders in by_name(runs).items():
            curves = [list({line['kimg']: line[column] for line in read_stats(folder) if column in line}.items())
                      for folder in folders]
            if any(curves):
                panel[name] = [curve for curve in curves if curve]
        if not panel:
            raise ValueError(f'no run has {column} in its stats.jsonl')
    data.save_curves(panels, out)


def bench(device, n=32, d=2048):
    """Seconds per 1,000 images of Inception and per Fréchet distance, and of other ways, as ratios in one run."""
    import scipy.linalg
    images = torch.randint(0, 256, [n, 3, 32, 32], dtype=torch.uint8, device=device)
    as_loaded = InceptionV3().to(device)  # random weights take as long
    nets = {'folded, contiguous': fold(copy.deepcopy(as_loaded)), 'with batch norm, contiguous': as_loaded}
    nets |= {name.replace('contiguous', 'channels_last'): copy.deepcopy(net).to(memory_format=torch.channels_last)
             for name, net in nets.items()}
    a = torch.randn([8192 if device.type == 'cuda' else 2048] * 2, device=device)
    seconds = edm_nets.seconds_per_call(
        {name: lambda net=net: net(images) for name, net in nets.items()} | {'matmul': lambda: a @ a}, device)
    peak = 2 * len(a) ** 3 / seconds.pop('matmul')
    with FlopCounterMode(display=False) as counter:
        as_loaded(images)
    print(f'float32 matmul peak {peak / 1e12:.2f} TFLOP/s, Inception {counter.get_total_flops() / n / 1e9:.3g} GFLOP '
          f'per image, {n} images at a time, {device}')
    for name, s in seconds.items():
        print(f'{name:34s}{s / n * 1e3:9.2f} s per 1,000 images {counter.get_total_flops() / s / peak:7.1%} of peak')
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn([3 * d, d], generator=generator, dtype=torch.float64) @ torch.randn(
        [d, d], generator=generator, dtype=torch.float64) / d for _ in range(2))
    s1, s2, zero = x.T.cov(), y.T.cov(), torch.zeros(d)
    for name, way in (('frechet_distance', lambda: frechet_distance(zero, s1, zero, s2)),
                      ('the same by scipy.linalg.sqrtm', lambda: float(
                          s1.trace() + s2.trace() - 2 * scipy.linalg.sqrtm((s1 @ s2).numpy()).real.trace()))):
        start = time.perf_counter()
        value = way()
        print(f'{name:34s}{time.perf_counter() - start:9.2f} s, {d} features: {value:.9g}')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--dataset', required=True, help='shapes, cifar10, ... or any name with --data')
    shared.add_argument('--data', help='prepared folder (default: datasets/DATASET)')
    shared.add_argument('--features', choices=['inception', 'pixels'], help='default: pixels for shapes only')
    shared.add_argument('--inception', help='weights pt_inception-2015-12-05-6726825d.pth (default: fetched)')
    p = commands.add_parser('score', parents=[shared], help='score a network', allow_abbrev=False)
    p.add_argument('--net', required=True, help='path or URL of a teacher or a student')
    p.add_argument('--num', '--images', type=int, default=50_000,
                   help='how many images; under torchrun, which takes --num for its own, --images (%(default)s)')
    p.add_argument('--seed', type=int, default=0, help='seed of the first image (%(default)s)')
    p.add_argument('--steps', type=int, help='Heun steps (default: one step for a student, 18 for a teacher)')
    p.add_argument('--ref', help='reference statistics .npz, e.g. of EDM (default: measured on the dataset)')
    p.add_argument('--batch', type=int, default=250, help='images at a time (%(default)s)')
    p = commands.add_parser('ref', parents=[shared], help='write reference statistics', allow_abbrev=False)
    p.add_argument('--out', required=True, help='.npz to write')
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument('runs', nargs='+', help='run folders; NAME-seed0, NAME-seed1, ... are one row, one colour')
    p = commands.add_parser('table', parents=[runs], help='of last scores', allow_abbrev=False)
    p.add_argument('--columns', nargs='+', choices=TABLE, default=TABLE, help='(default: those there are of all)')
    p = commands.add_parser('plot', parents=[runs], help='scores against images', allow_abbrev=False)
    p.add_argument('--columns', nargs='+', default=['pixel-FD'], help='of stats.jsonl (default: %(default)s)')
    p.add_argument('--out', required=True, help='.png to write')
    commands.add_parser('bench', help='time Inception and the distance', allow_abbrev=False)
    args = parser.parse_args(argv)
    if args.command == 'score':
        edm_nets.check_numbers(parser, args, positive='num steps batch', not_negative='seed')
    try:
        if args.command == 'table':
            return report(table(args.runs), columns=args.columns)
        if args.command == 'plot':
            return plot(args.runs, args.columns, args.out)
        _, _, device = edm_nets.setup()
        if args.command == 'bench':
            return bench(device)
        features = args.features or ('pixels' if args.dataset == 'shapes' else 'inception')
        dataset = edm_nets.rank0_first(data.open_dataset, args.dataset, args.data)
        ruler = Ruler(dataset, features, device, args.inception,
                      args.ref if args.command == 'score' else None)
        if args.command == 'ref':
            if dist.get_rank() == 0:
                save_statistics(args.out, ruler.mu, ruler.sigma)
            edm_nets.print0(f'{args.out}: {features} statistics of {len(ruler.dataset)} images')
            return
        net = edm_nets.rank0_first(edm_nets.load, args.net).to(device)
        steps = args.steps if args.steps or net.sigma_init is not None else 18
        if steps == 1 and net.sigma_init is None:
            raise ValueError(f'{args.net} is a teacher, not a one-step student: give more --steps')
        if args.num < 10 or net.img_resolution != ruler.dataset.resolution:
            raise ValueError(f'--num {args.num} images of side {net.img_resolution} against {ruler.dataset.resolution}')
        if args.num != 50_000:
            edm_nets.print0(f'warning: {ruler.name} of {args.num} images cannot be compared with that of 50,000')
        start = time.perf_counter()
        scores = ruler.score(lambda i: edm_nets.generate(net, args.seed + i, None if steps == 1 else steps),
                             args.num, args.batch)
        scores['seconds'] = time.perf_counter() - start
        edm_nets.print0('  '.join(f'{k} {v:.5g}' for k, v in scores.items()))
    except Exception as error:  # told in one line where it is not the code's fault, else raised
        if line := edm_nets.one_line(error):
            sys.exit(f'fid.py {args.command}: {line}')
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
