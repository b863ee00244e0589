"""The same scores for all methods: FID, pixel-FD, precision, recall, Inception score (IS), and coverage of `shapes`.

    python fid.py score --net PATH_OR_URL --dataset cifar10 --num 50000    # a student in 1 step, a teacher in 18
    python fid.py ref --dataset cifar10 --out cifar10.npz                  # reference statistics in EDM's format

FID, the Fréchet distance, follows EDM (arXiv:2206.00364): 50,000 uint8 images of the seeds 0 to 49999 are compared
with the whole training set, by float64 statistics of the Inception network of 2015. Published FIDs are minima over
seeds or checkpoints. For `shapes`, the same distance over raw pixels is always called pixel-FD.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import data
import edm_nets

INCEPTION_URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/' \
    'pt_inception-2015-12-05-6726825d.pth'
PR_IMAGES = 10_000  # precision and recall compare this many images, or all if there are fewer
SCORES = ['FID', 'pixel-FD', 'precision', 'recall', 'IS', 'valid', 'coverage', 'tv']

# ----------------------------------------------------------------------------------------------------
# Inception-v3 of 2015 (Szegedy et al., arXiv:1512.00567), the FID variant. Names are those in the weight file.

AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)


def conv(c_in, c_out, kernel, stride=1, padding='same'):
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU()))


class Block(nn.ModuleDict):
    """Branches side by side, their ends concatenated: [N, c_in, R, R] -> [N, c_out, R', R'].

    branches: {name: [(channels, kernel), ...]}. Where two kernels are given, two convolutions read the same input.
    `branch_pool` begins with the layer `pool`. If that is HALVE, each branch ends with stride 2.
    """

    def __init__(self, c_in, pool, branch_pool=(), **branches):
        super().__init__(dict(pool=pool))
        self.paths = []  # of each branch, the names of its layers
        for branch, layers in dict(branches, branch_pool=branch_pool).items():
            c, path = c_in, [['pool']] if branch == 'branch_pool' else []
            for i, (c_out, *kernels) in enumerate(layers, 1):
                name = f'{branch}_{i}' if layers[1:] else branch
                path.append([f'{name}a', f'{name}b'] if kernels[1:] else [name])
                last = (2, 'valid') if pool is HALVE and i == len(layers) else ()
                self.update({key: conv(c, c_out, kernel, *last) for key, kernel in zip(path[-1], kernels)})
                c = c_out
            self.paths.append(path)

    def forward(self, x):
        ends = []
        for path in self.paths:
            h = [x]
            for names in path:
                h = [self[name](h[0]) for name in names]
            ends += h
        return torch.cat(ends, 1)


class InceptionV3(nn.Module):
    """uint8 [N, 3, H, W] -> (features float32 [N, 2048], logits float32 [N, 1008]), as torch-fidelity's
    `inception-v3-compat`. `inception_v3` also loads the weights. Raises ValueError for other images.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, 3, 2, 'valid')
        self.Conv2d_2a_3x3 = conv(32, 32, 3, 1, 'valid')
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, 1, 'valid')
        for name, c, n in ('5b', 192, 32), ('5c', 256, 64), ('5d', 288, 64):
            self.add_module(f'Mixed_{name}', Block(
                c, AVERAGE, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(n, 1)]))
        self.Mixed_6a = Block(288, HALVE, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        for name, n in ('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192):
            self.add_module(f'Mixed_{name}', Block(
                768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(n, 1), (n, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(n, 1), (n, (7, 1)), (n, (1, 7)), (n, (7, 1)), (192, (1, 7))], branch_pool=[(192, 1)]))
        self.Mixed_7a = Block(
            768, HALVE, branch3x3=[(192, 1), (320, 3)], branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
        for name, c, pool in ('7b', 1280, AVERAGE), ('7c', 2048, MAXIMUM):  # MAXIMUM is a quirk of the 2015 graph
            self.add_module(f'Mixed_{name}', Block(
                c, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f'InceptionV3 takes uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}')
        x = (resize_tf1(images.to(torch.float32), 299) - 128) / 128
        for name, layer in list(self.named_children())[:-1]:
            x = layer(HALVE(x) if name in ('Conv2d_3b_1x1', 'Mixed_5b') else x)
        features = x.mean([2, 3])  # of [N, 2048, 8, 8]
        return features, self.fc(features)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize, without half-pixel shift and antialiasing: [N, C, H, W] -> [N, C, size, size]."""
    for dim in (2, 3):
        n = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = place.floor().long()
        weight = (place - low).view([-1, 1] if dim == 2 else [-1])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
    return x


def inception_v3(path=None):
    """InceptionV3 with its weights, from the file `path` or fetched once and verified. Raises OSError, ValueError."""
    path = path or data.download(INCEPTION_URL, data.cache_path(INCEPTION_URL), sha256='6726825d')
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True), strict=True)
    except Exception as error:  # a wrong file can cause any exception; it is reported in one line
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{path} is not pt_inception-2015-12-05-6726825d.pth: {reason}') from None
    return fold(net)


def fold(net):
    """Multiply the batch norms of an InceptionV3 into its convolutions, in place, which saves time. Returns `net`."""
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return net

# ----------------------------------------------------------------------------------------------------
# Scores: of features and statistics; of images, on any number of processes; of runs.


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (FID: Heusel et al., arXiv:1706.08500, Eq. 6) -> float.

    Means float [d], covariances float [d, d]. With S = R R^T the last term is the sum of the singular values of
    R1^T R2. Raises ValueError for statistics that are not finite or do not fit together.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise ValueError(f'statistics of {len(mu1)} and {len(mu2)} features: one was made from other features')
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError('statistics are not finite')
    eps = torch.finfo(torch.float64).eps

    def root(sigma):  # R [d, rank] with R R^T = sigma, by Cholesky or without the null space
        r, failed = torch.linalg.cholesky_ex(sigma)
        if failed or r.diagonal().min() ** 2 < sigma.diagonal().max() * len(sigma) * eps:
            w, v = torch.linalg.eigh(sigma)
            keep = w > w[-1].clamp(min=0) * eps * 32
            r = v[:, keep] * w[keep].sqrt()
        return r

    trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv:1606.03498), mean of ten parts: logits [N, 1008] -> float.

    Deviation: torch-fidelity shuffles the images before it splits them.
    """
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        marginal = log_p.exp().mean(0, keepdim=True)
        scores.append((log_p.exp() * (log_p - marginal.log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al., arXiv:1904.06991, Eq. 1-2) -> two floats in [0, 1].

    real, fake: features float [N, d], [M, d]. Deviation: the features are those of `Ruler`, not those of VGG-16,
    and come from at most PR_IMAGES images.
    """
    def covered(a, b):  # the share of a that is as close to some point of b as that point's k-th neighbour in b
        radii = torch.cdist(b, b).kthvalue(k + 1, dim=1).values
        return float((torch.cdist(a, b) <= radii).any(1).double().mean())

    return covered(fake, real), covered(real, fake)


def read_shapes(images, tolerance=0.35):
    """Recover what is drawn: uint8 [n, 3, 16, 16] -> kind int64 [n], colour int64 [n], valid bool [n].

    The result is the nearest of 48,552 clean drawings. If its distance is over `tolerance` times its contrast (both
    are root mean squares), the image shows no shape and is not valid.
    """
    place = np.arange(5.5, 9.6, 0.25)
    grid = np.meshgrid(range(4), place, place, np.arange(3.5, 5.1, 0.25), indexing='ij')
    kinds, y, x, radius = (a.ravel() for a in grid)
    masks = torch.from_numpy(data.Shapes.masks(kinds, np.stack([y, x], 1), radius)).float().flatten(1)  # [T, 256]
    c = torch.from_numpy(data.Shapes.colours - data.Shapes.ground).float()  # [6, 3]
    contrast = torch.outer(c.square().sum(1), masks.square().sum(1))  # |c m^T|^2, [6, T]
    nearest, valid = [], []
    for light in (images.float() - data.Shapes.ground).flatten(2).split(256):  # [n, 3, 256]
        # With colour c and mask m: |light - c m^T|^2 = |light|^2 - 2 c^T light m + |c m^T|^2.
        cost, where = (contrast - 2 * c @ (light @ masks.T)).flatten(1).min(1)  # of [n, 6, T]
        valid.append(light.square().sum([1, 2]) + cost <= tolerance ** 2 * contrast.flatten()[where])
        nearest.append(where)
    nearest = torch.cat(nearest)
    return torch.from_numpy(kinds)[nearest % len(masks)], nearest // len(masks), torch.cat(valid)


def shapes_coverage(images):
    """Score images of `shapes` by what they show: uint8 [N, 3, 16, 16] -> dict of floats in [0, 1].

    valid: share of images that show a shape at all. coverage: share of the 24 pairs of kind and colour that make up at
    least a tenth of 1/24 of the valid images. tv: total-variation distance of the pairs from equal shares of 1/24.
    """
    kind, colour, valid = read_shapes(images)
    pairs = len(data.Shapes.kinds) * len(data.Shapes.colours)
    counts = torch.bincount((kind * len(data.Shapes.colours) + colour)[valid], minlength=pairs)
    share = counts / max(int(counts.sum()), 1)
    return dict(valid=float(valid.double().mean()), coverage=float((share >= 0.1 / pairs).double().mean()),
                tv=float((share - 1 / pairs).abs().sum() / 2))


class Statistics:
    """Mean and covariance of features that come in parts, in float64."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def add(self, features):
        """features: float [n, d]."""
        features = features.double()
        self.n += len(features)
        self.sum = self.sum + features.sum(0)
        self.outer = self.outer + features.T @ features

    def result(self):
        """(mu float64 [d], sigma float64 [d, d], number of images) of all processes together. Collective."""
        n = torch.tensor(float(self.n), dtype=torch.float64, device=self.sum.device)
        if dist.is_initialized():
            for total in (n, self.sum, self.outer):
                dist.all_reduce(total)
        if n < len(self.sum) and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f'warning: {n:.0f} images are fewer than the {len(self.sum)} features: their covariance is singular, '
                  'and Fréchet distances are biased', flush=True)
        mu = self.sum / n
        return mu.cpu(), ((self.outer - n * mu[:, None] * mu) / (n - 1)).cpu(), int(n)


def save_statistics(path, mu, sigma, **more):
    """Write mu [d] and sigma [d, d] to an .npz file as EDM does, and `more` beside them. Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with data.whole_file(path) as f:
        np.savez(f, mu=mu, sigma=sigma, **more)


def load_statistics(path, d, fingerprint=None):
    """(mu float64 [d], sigma float64 [d, d]) of an .npz file in EDM's format.

    Raises OSError, or a one-line ValueError if the file holds something else or has another `fingerprint`.
    """
    try:
        with np.load(path) as file:
            mu, sigma = (np.asarray(file[key], np.float64) for key in ('mu', 'sigma'))
            found = str(file.get('fingerprint'))
    except Exception as error:  # a damaged or foreign file can cause any exception
        if isinstance(error, (MemoryError, FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f'{path} is no .npz with mu and sigma') from None
    if fingerprint and found != fingerprint:
        raise ValueError(f'{path} was made from other data or features than {fingerprint}')
    if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f'{path} holds no finite mean and covariance of {d} features, but {mu.shape}, {sigma.shape}')
    return mu, sigma


class Ruler:
    """Scores images against a reference: mean `mu` and covariance `sigma` of its features. Collective.

    features: 'inception' for FID, with weights from the file `inception` or fetched; 'pixels' for pixel-FD. The
    reference is the whole `dataset`, or the .npz file `ref` (path or URL) as it is. With `ref`, `dataset` may be None;
    then precision and recall are left out. The .npz file `cache` keeps the measured reference. A cache of other data or
    features is replaced. Raises ValueError for fewer than ten images, or a `ref` that does not fit.
    """

    def __init__(self, dataset, features, device, inception=None, ref=None, cache=None):
        if dataset is None and (ref is None or features == 'pixels'):
            raise ValueError('give the prepared data: without it, only FID against a --ref can be measured')
        if dataset is not None and len(dataset) < 10:
            raise ValueError(f'{len(dataset)} images are too few to compare with, expected at least 10')
        self.dataset, self.device = dataset, device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.name = 'FID' if features == 'inception' else 'pixel-FD'
        self.net = self.real = None
        if features == 'inception':
            layout = torch.contiguous_format if device.type == 'cuda' else torch.channels_last  # faster on a CPU
            self.net = data.rank0_first(inception_v3, inception).to(device, memory_format=layout)
        self.d = 2048 if self.net else 3 * dataset.resolution ** 2
        url, ref = ref, data.rank0_first(data.download, ref, data.cache_path(ref)) if '://' in str(ref) else ref
        try:
            self.mu, self.sigma = load_statistics(ref, self.d) if ref else self.reference(cache)
        except ValueError as error:
            if ref != url:  # a fetched file that is no reference is not kept
                ref.unlink(missing_ok=True)
            raise ValueError(f'{error} (from {url}; removed from the cache)' if ref != url else error) from None

    def reference(self, cache):
        """(mu [d], sigma [d, d]) of the whole dataset, from the file `cache` if it has them."""
        fingerprint = f'{self.name}, {data.identity(self.dataset)}'
        if cache and os.path.exists(cache):
            try:
                return load_statistics(cache, self.d, fingerprint)
            except ValueError as error:
                if self.rank == 0:
                    print(f'{error}: measured again', flush=True)
        mu, sigma, _ = self.measure(self.dataset.images, len(self.dataset))[0].result()
        if cache and self.rank == 0:
            save_statistics(cache, mu, sigma, fingerprint=fingerprint)
        return mu, sigma

    def features(self, images):
        """uint8 [n, 3, R, R] -> (features float32 [n, d], logits without bias float32 [n, 1008], empty for pixels)."""
        if self.net is None:
            features = data.to_float(images.to(self.device)).flatten(1)
            return features, features.new_empty([len(features), 0])  # a slice would keep the features
        features, logits = self.net(images.to(self.device))
        return features, logits - self.net.fc.bias

    def measure(self, images_of, num, keep=False, batch=250):
        """Returns (this process's Statistics of images_of(0 ... num-1), list). If `keep`, the list is gathered in order
        from all processes: [images (of `shapes` only), features of the first PR_IMAGES, logits]; else it is empty."""
        statistics, kept = Statistics(), []
        statistics.add(torch.zeros([0, self.d], device=self.device))  # sets the shape if a process has no images
        for start in range(self.rank * batch, num, self.world_size * batch):
            images = images_of(np.arange(start, min(start + batch, num)))
            features, logits = self.features(images)
            statistics.add(features)
            if keep:
                shapes = (images if isinstance(self.dataset, data.Shapes) else images[:0]).clone().cpu()
                few = features[:max(PR_IMAGES - start, 0)].clone().cpu()  # gathering a view would send all of it
                kept.append((start, shapes, few, logits.cpu()))
        if keep and self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, kept)
            kept = sorted(sum(everyone, []), key=lambda part: part[0])
        return statistics, [torch.cat(parts) for parts in list(zip(*kept))[1:]]

    def score(self, images_of, num, batch=250):
        """Scores of images_of(indices int [n]) -> uint8 [n, 3, R, R], for the indices 0 ... num-1. Collective.

        Returns a dict: FID or pixel-FD, images (how many), precision, recall, IS of Inception, coverage of `shapes`.
        """
        if num < 10:
            raise ValueError(f'{num} images are too few to score: expected at least 10')
        statistics, (images, features, logits) = self.measure(images_of, num, keep=True, batch=batch)
        mu, sigma, n = statistics.result()
        scores = {self.name: frechet_distance(mu, sigma, self.mu, self.sigma), 'images': n}
        few = min(n, PR_IMAGES, len(self.dataset or ()))
        if few and (self.real is None or len(self.real) != few):  # measured once in a run
            chosen = np.random.default_rng(0).permutation(len(self.dataset))[:few]  # as folders are sorted by class
            _, (_, real, _) = self.measure(lambda i: self.dataset.images(chosen[i]), few, keep=True, batch=batch)
            self.real = real.to(self.device)
        if few:
            scores['precision'], scores['recall'] = precision_recall(self.real, features.to(self.device))
        if self.net:
            scores['IS'] = inception_score(logits)
        if isinstance(self.dataset, data.Shapes):
            scores |= shapes_coverage(images)
        return scores


def report(rows, path=None, columns=SCORES):
    """Print {name: {column: number or text}} as a table, on rank 0, and write it to the text file `path` if given."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    table = [['', *(c for c in columns if any(c in row for row in rows.values()))]]
    for name, row in rows.items():
        cells = [row.get(c, '-') for c in table[0][1:]]
        table.append([name] + [cell if isinstance(cell, str) else f'{cell:.3f}' for cell in cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ['  '.join([row[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(row[1:], widths[1:])]) for row in table]
    if path:
        with data.whole_file(path) as f:
            f.write('\n'.join([*lines, '']).encode())
    print('\n'.join(lines), flush=True)


def read_stats(out):
    """The status lines of a run folder, a list of dicts; those with scores have `images`. Raises OSError."""
    with open(f'{out}/stats.jsonl') as f:
        return [json.loads(line) for line in f]


def summarize(args, before=None):
    """Write summary.png and, with scores, summary.txt to the folder of a finished run on `shapes`. Collective.

    args: out, teacher (a path), sigma_init, features and eval_images (0: no scores) of the run. before: the student
    before training, if it was not the teacher. Raises OSError.
    """
    rank, _, device = edm_nets.setup()
    dataset, seeds, rows = data.Shapes(), np.arange(36), {}
    teacher, after = edm_nets.load(args.teacher), edm_nets.load(max(Path(args.out).glob('student-*.pt')))
    before = copy.deepcopy(teacher) if before is None else before
    teacher, before, after = (net.to(device) for net in (teacher, before, after))
    before.sigma_init = args.sigma_init
    if args.eval_images:
        ruler = Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
        other = data.Shapes(args.eval_images, seed=1)  # its score is the least that so few images can reach
        rows['data, other images'] = ruler.score(other.images, args.eval_images)
        known = Path(args.teacher).with_suffix('.json')  # from `fid.py score --out`; the shipped teacher has one
        try:
            known = json.loads(known.read_text()) if known.is_file() and args.features == 'pixels' else {}
        except ValueError as error:
            raise ValueError(f'{known} is damaged ({error}): remove it, then run the same command again') from None
        same = dict(images=args.eval_images, steps=18, ref=None, data=data.identity(dataset))
        rows['teacher, 18 steps'] = known if ruler.name in known and same.items() <= known.items() else ruler.score(
            lambda i: edm_nets.generate(teacher, i, 18), args.eval_images)
        for stats in read_stats(args.out):
            if stats.get('images') == args.eval_images:
                rows['student after' if stats['kimg'] else 'student before'] = stats
        report(rows, f'{args.out}/summary.txt')
    if rank == 0:
        data.save_panels({
            'data': dataset.images(seeds), 'teacher, 18 steps': edm_nets.generate(teacher, seeds, 18),
            'student before, 1 step': edm_nets.generate(before, seeds),
            'student after, 1 step': edm_nets.generate(after, seeds)}, f'{args.out}/summary.png', columns=18, scale=3)
        print(f'{args.out}/summary.png shows the data, the teacher, the student before and after training', flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--dataset', required=True, help='shapes, cifar10, ... or any name with --data')
    shared.add_argument('--data', help='prepared folder (default: datasets/DATASET)')
    shared.add_argument('--features', choices=['inception', 'pixels'], help='default: inception, but pixels for shapes')
    shared.add_argument('--inception', help='file with the weights of Inception (default: fetched)')
    p = commands.add_parser('score', parents=[shared], help='score a network', allow_abbrev=False)
    p.add_argument('--net', required=True, help='path or URL of a teacher or a student')
    p.add_argument('--num', '--images', type=edm_nets.positive(int), default=50_000,
                   help='number of images (%(default)s); with torchrun, which takes --num for itself, give --images')
    p.add_argument('--seed', type=int, default=0, help='seed of the first image (%(default)s)')
    p.add_argument('--steps', type=edm_nets.positive(int), help='Heun steps (1 for a student, 18 for a teacher)')
    p.add_argument('--sigma-init', type=edm_nets.positive(float), help='noise level of the one step (as in the file)')
    p.add_argument('--precision', choices=['bf16', 'fp32'], default='fp32', help='number format (%(default)s)')
    p.add_argument('--ref', help="reference .npz, path or URL, such as EDM's (default: measured on the dataset)")
    p.add_argument('--batch', type=edm_nets.positive(int), default=250, help='images at a time (%(default)s)')
    p.add_argument('--out', help='JSON file to write the scores to')
    p = commands.add_parser('ref', parents=[shared], help='write reference statistics', allow_abbrev=False)
    p.add_argument('--out', required=True, help='.npz file to write')
    args = parser.parse_args(argv)
    with data.clear_errors(f'fid.py {args.command}'):
        rank, _, device = edm_nets.setup()
        features = args.features or ('pixels' if args.dataset == 'shapes' else 'inception')
        folder = args.data or f'datasets/{args.dataset}'
        optional = args.command == 'score' and args.ref and features == 'inception' and not args.data \
            and args.dataset != 'shapes'
        dataset = None
        if os.path.exists(folder) or not optional:
            dataset = data.rank0_first(data.open_dataset, args.dataset, args.data)
        elif rank == 0:
            print(f'There is no {folder}: precision and recall, which need it, are left out.', flush=True)
        if args.command == 'ref':
            if os.path.exists(args.out):
                raise FileExistsError(f'{args.out} exists already: remove it first, or name another file')
            Ruler(dataset, features, device, args.inception, cache=args.out)
            line = f'{args.out}: {features} statistics of {len(dataset)} images'
        else:
            net = data.rank0_first(edm_nets.load, args.net).to(device)
            net.sigma_init = args.sigma_init or net.sigma_init
            steps = args.steps or (18 if net.sigma_init is None else 1)
            if steps > 1 and args.sigma_init:
                raise ValueError(f'--sigma-init is for one step, but these are {steps}: leave out one of the two')
            if steps == 1 and net.sigma_init is None:
                raise ValueError(f'{args.net} is a teacher, not a one-step student: give more --steps, or --sigma-init')
            if net.img_channels != 3 or dataset is not None and net.img_resolution != dataset.resolution:
                raise ValueError(f'{args.net} makes images of {net.img_resolution} px and {net.img_channels} channels: '
                                 'expected 3 channels, and the resolution of the data')
            if args.num != 50_000 and rank == 0:
                print(f'warning: scores of {args.num} images cannot be compared with those of 50,000', flush=True)
            ruler = Ruler(dataset, features, device, args.inception, args.ref)
            start = time.perf_counter()
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == 'bf16')
            num_steps = None if steps == 1 else steps
            images_of = autocast(lambda i: edm_nets.generate(net, args.seed + i, num_steps, batch=args.batch))
            scores = ruler.score(images_of, args.num, args.batch)
            line = '  '.join(f'{k} {v:.5g}' for k, v in scores.items())
            line += f'  seconds {time.perf_counter() - start:.5g}'
        if rank == 0:
            print(line, flush=True)
            if args.command == 'score' and args.out:
                scores |= dict(steps=steps, ref=args.ref, data=data.identity(dataset) if dataset else None,
                               command=' '.join(['python', *sys.argv]))
                with data.whole_file(args.out) as f:
                    f.write((json.dumps(scores, indent=1) + '\n').encode())
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
