"""Images on disk, batches in order: datasets, their preparation, and the pure-function batch order.

A prepared dataset is a folder with `images.npy` (uint8 [N, H, W, 3], memory-mapped) and, when it has
labels, `labels.npy` (int64 [N]). `shapes` needs no folder: it is drawn on the fly.

    python data.py prepare SOURCE DEST [--resolution R]    # SOURCE: EDM zip, image folder, CIFAR-10 tarball,
                                                           # ILSVRC train folder, downsampled-ImageNet npz folder
    python data.py prepare cifar10 datasets/cifar10        # fetched (170 MB, resumable, checksum verified)
    python data.py grid shapes shapes.png                  # look at a dataset

The batch is a pure function of (seed, nimg): see `batch_order`. The same holds for the noise of a training
step: see `step_generator`. So a run can resume exactly, and does not depend on the number of processes.
"""

import argparse
import collections
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'  # fixed-length records, no pickle
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
HOW_TO_PREPARE = {  # datasets that cannot be fetched
    'ffhq64': 'python data.py prepare FFHQ_IMAGES datasets/ffhq64 --resolution 64',
    'afhqv2': 'python data.py prepare AFHQV2_TRAIN datasets/afhqv2 --resolution 64 --no-labels',
    'imagenet64': 'python data.py prepare ILSVRC/Data/CLS-LOC/train datasets/imagenet64 --resolution 64'}
IMAGE_TYPES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp', '.gif', '.ppm', '.tif', '.tiff'}

# ----------------------------------------------------------------------------------------------------
# Pixels.


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], truncating as EDM's generate.py does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def save_grid(images, path, columns=None, scale=1):
    """Write uint8 [N, 3, H, W] as one PNG, row by row; `scale` enlarges each pixel. Written whole or not at all."""
    n, c, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.zeros([rows * columns, c, h, w], np.uint8)
    canvas[:n] = images.cpu().numpy()
    canvas = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    canvas = canvas.repeat(scale, 0).repeat(scale, 1)
    temporary = f'{path}.tmp'
    Image.fromarray(canvas.squeeze(-1) if c == 1 else canvas).save(temporary, format='png')
    os.replace(temporary, path)

# ----------------------------------------------------------------------------------------------------
# Batches in order.


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order and the coin flips of one epoch: (int64 [size], bool [size])."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(size), rng.random(size) < 0.5


def batch_order(seed, nimg, count, size):
    """Images `nimg` ... `nimg + count - 1` of a run over a dataset of `size` images.

    Image number `nimg` of the run is `permutation(seed, epoch)[k]` with `epoch, k = divmod(nimg, size)`.
    Returns (indices int64 [count], flips bool [count]): whether to mirror is decided by the same numbers.
    """
    epochs, places = np.divmod(np.arange(nimg, nimg + count), size)
    parts = [(epoch_order(seed, int(e), size), places[epochs == e]) for e in np.unique(epochs)]
    return (np.concatenate([order[k] for (order, _), k in parts]),
            np.concatenate([flips[k] for (_, flips), k in parts]))


def step_generator(seed, nimg, stream, device):
    """torch.Generator for the random numbers of one training step.

    Draw for the *global* batch and let each rank take its rows: every process then sees the same numbers,
    whatever their count. `stream` (int) separates the uses within one step, e.g. two training stages.
    """
    key = np.random.SeedSequence([seed, nimg, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))

# ----------------------------------------------------------------------------------------------------
# Datasets. Common to all: len(), .resolution, .label_dim (0: unlabelled), .images(i), .labels(i).


class Folder:
    """A prepared folder. Raises FileNotFoundError or ValueError with what to do about it."""

    def __init__(self, path):
        if not (Path(path) / 'images.npy').is_file():
            raise FileNotFoundError(f'no images.npy in {path}: make it with `python data.py prepare SOURCE {path}`')
        self.data = np.load(Path(path) / 'images.npy', mmap_mode='r')
        if self.data.dtype != np.uint8 or self.data.ndim != 4 or self.data.shape[1] != self.data.shape[2] \
                or self.data.shape[3] != 3 or not len(self.data):
            raise ValueError(f'{path}/images.npy is {self.data.dtype} {list(self.data.shape)}, not uint8 [N, R, R, 3]')
        self.resolution = self.data.shape[1]
        self.targets = None
        if (Path(path) / 'labels.npy').is_file():
            self.targets = np.load(Path(path) / 'labels.npy')
            if self.targets.dtype != np.int64 or self.targets.shape != (len(self.data),) or self.targets.min() < 0:
                raise ValueError(f'{path}/labels.npy must be int64 [{len(self.data)}] with no negative label')
        self.label_dim = 0 if self.targets is None else int(self.targets.max()) + 1

    def __len__(self):
        return len(self.data)

    def images(self, indices):
        """int [n] -> uint8 [n, 3, R, R]."""
        return torch.from_numpy(self.data[indices]).permute(0, 3, 1, 2).contiguous()

    def labels(self, indices):
        """int [n] -> int64 [n]; zeros when unlabelled."""
        return torch.zeros(len(indices), dtype=torch.int64) if self.targets is None \
            else torch.from_numpy(self.targets[indices])


class Shapes:
    """`shapes`: 50,000 anti-aliased 16x16 RGB images of one shape each on a near-black ground, drawn when asked for.

    Class = kind of shape, four kinds; colour (six), centre and size vary. `read_back` recovers kind and colour
    from any image, so that what a generator covers is measured and not guessed.
    """

    resolution = 16
    kinds = ['disc', 'square', 'triangle', 'cross']
    colours = np.array([[230, 60, 60], [60, 200, 80], [70, 110, 240], [235, 215, 70], [220, 80, 220], [70, 215, 220]])
    ground = 12  # grey level of the background
    label_dim = len(kinds)

    def __init__(self, size=50_000, seed=0):
        rng = np.random.default_rng(seed)
        self.kind, self.colour = rng.integers(len(self.kinds), size=size), rng.integers(len(self.colours), size=size)
        self.centre, self.radius = rng.uniform(5.5, 9.5, [size, 2]), rng.uniform(3.5, 5.0, size)

    def __len__(self):
        return len(self.kind)

    @classmethod
    def masks(cls, kind, centre, radius):
        """Share of each pixel that the shape covers: kind [n], centre [n, 2], radius [n] -> float [n, 16, 16]."""
        pixel = np.arange(cls.resolution)
        x = pixel[None, None, :] - centre[:, 0, None, None]
        y = pixel[None, :, None] - centre[:, 1, None, None]
        r, ax, ay = radius[:, None, None], np.abs(x), np.abs(y)
        distance = np.select(  # signed distance to the outline, in pixels, negative inside
            [kind[:, None, None] == k for k in range(4)],
            [np.hypot(x, y) - r,
             np.maximum(ax, ay) - 0.85 * r,
             np.maximum(ax * 0.866 - y * 0.5 - 0.5 * r, y - 0.5 * r - 0.5) + 0 * r,
             np.maximum(np.minimum(ax, ay) - 0.3 * r, np.maximum(ax, ay) - r)])
        return np.clip(0.5 - distance, 0, 1)

    def images(self, indices):
        """int [n] -> uint8 [n, 3, 16, 16]."""
        mask = self.masks(self.kind[indices], self.centre[indices], self.radius[indices])[:, None]
        colour = self.colours[self.colour[indices]][:, :, None, None]
        return torch.from_numpy((self.ground + mask * (colour - self.ground)).round().astype(np.uint8))

    def labels(self, indices):
        """int [n] -> int64 [n], the kind of shape."""
        return torch.from_numpy(self.kind[indices])

    @classmethod
    def read_back(cls, images, tolerance=0.2):
        """Recover what is drawn: uint8 [n, 3, 16, 16] -> kind int64 [n], colour int64 [n], valid bool [n].

        The nearest of some 15,000 clean drawings wins; an image further from it than `tolerance`
        of its own contrast (root mean square) is no shape at all: not valid.
        """
        masks, kinds = _shape_templates()
        light = (images.float() - cls.ground).flatten(2)  # [n, 3, 256]
        # With colour c and mask m: |light - c m^T|^2 = |light|^2 - 2 c^T light m + |c|^2 |m|^2.
        c = torch.from_numpy(cls.colours - cls.ground).float()  # [6, 3]
        kind, colour, valid = [], [], []
        for part in light.split(256):
            cost = -2 * torch.einsum('kc,ncp->nkp', c, part) @ masks.T \
                + c.square().sum(1)[:, None] * masks.square().sum(1)  # [n, 6, templates]
            best, where = cost.flatten(1).min(1)
            colour.append(where // len(masks))
            kind.append(kinds[where % len(masks)])
            energy = part.square().sum([1, 2])
            fitted = (c.square().sum(1)[colour[-1]] * masks.square().sum(1)[where % len(masks)])
            valid.append((energy + best) <= tolerance ** 2 * fitted.clamp(min=1) * 4)
        return torch.cat(kind), torch.cat(colour), torch.cat(valid)


@functools.lru_cache(maxsize=1)
def _shape_templates():
    """Masks float32 [T, 256] on a fine grid of centres and radii, and their kinds int64 [T]."""
    grid = np.meshgrid(np.arange(4), np.arange(5.25, 9.8, 0.5), np.arange(5.25, 9.8, 0.5), np.arange(3.5, 5.1, 0.5),
                       indexing='ij')
    kind, cx, cy, radius = (g.ravel() for g in grid)
    masks = Shapes.masks(kind, np.stack([cx, cy], 1), radius)
    return torch.from_numpy(masks).float().flatten(1), torch.from_numpy(kind)
