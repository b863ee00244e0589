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
import http.client
import io
import itertools
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
from PIL import Image, ImageDraw, ImageFont

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'  # fixed-length records, no pickle
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
HOW_TO_PREPARE = {  # datasets that cannot be fetched
    'ffhq64': 'python data.py prepare FFHQ_IMAGES datasets/ffhq64 --resolution 64 --no-labels',
    'afhqv2': 'python data.py prepare AFHQV2_TRAIN datasets/afhqv2 --resolution 64 --no-labels',
    'imagenet64': 'python data.py prepare ILSVRC/Data/CLS-LOC/train datasets/imagenet64 --resolution 64'}
MAX_CLASSES = 1 << 20  # a label beyond is no class number
IMAGE_TYPES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp', '.gif', '.ppm', '.tif', '.tiff'}

# ----------------------------------------------------------------------------------------------------
# Pixels.


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_device(x, device):
    """A tensor of the CPU -> on `device`; on a GPU through pinned memory, so that the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], truncating as EDM's generate.py does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def mirror(images, flips):
    """Mirror those images [N, C, H, W] left to right for which flips (bool [N]) says so."""
    return torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(3), images)


def grid(images, columns, scale):
    """uint8 [N, 3, H, W] -> one picture uint8 [rows * H * scale, columns * W * scale, 3], row by row."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.zeros([rows * columns, c, h, w], np.uint8)
    canvas[:n] = images.cpu().numpy()
    canvas = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return canvas.repeat(scale, 0).repeat(scale, 1)


def save_png(picture, path):
    """uint8 [H, W, 3] -> PNG, written whole or not at all."""
    try:
        Image.fromarray(picture).save(f'{path}.tmp', format='png')
        os.replace(f'{path}.tmp', path)
    finally:
        Path(f'{path}.tmp').unlink(missing_ok=True)


def save_grid(images, path, scale=1):
    """uint8 [N, 3, H, W] -> a PNG as square as can be; `scale` enlarges the pixels."""
    save_png(grid(images, int(np.ceil(len(images) ** 0.5)), scale), path)


def save_panels(panels, path, columns, scale):
    """Several grids below one another, each under its title: {title: uint8 [N, 3, H, W]} -> one PNG."""
    pictures = []
    for title, images in panels.items():
        heading = Image.new('RGB', (columns * images.shape[3] * scale, 16), 'white')
        ImageDraw.Draw(heading).text((2, 2), title, fill='black', font=ImageFont.load_default())
        pictures += [np.asarray(heading), grid(images, columns, scale)]
    save_png(np.concatenate(pictures), path)


COLORS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b', '#7f7f7f']


def save_curves(panels, path, width=720, height=250):
    """Panels of curves below one another: {title: {name: [[(x, y), ...] of each run, ...]}} -> one PNG.

    A thin line is one run of several, a bold one their mean, where all have the same x. y is logarithmic where all are
    above 0. Drawn at twice the size and shrunk, which smooths the lines.
    """
    scale, left, right, top, bottom = 2, 60, 170, 24, 24
    font = ImageFont.load_default(12 * scale)
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colors = dict(zip(names, itertools.cycle(COLORS)))
    canvas = Image.new('RGB', (width * scale, height * scale * len(panels)), 'white')
    draw = ImageDraw.Draw(canvas)
    for panel, (title, curves) in enumerate(panels.items()):
        points = np.array([point for runs in curves.values() for run in runs for point in run], float)
        log = bool((points[:, 1] > 0).all())
        bend = np.log if log else np.asarray
        (x_0, y_0), (x_1, y_1) = points.min(0), points.max(0)
        y_0, y_1 = bend(y_0), bend(y_1)
        x_1, margin = max(x_1, x_0 + 1e-9), max(0.05 * (y_1 - y_0), 1e-9)

        def place(x, y):
            u = (x - x_0) / (x_1 - x_0) * (width - left - right)
            v = (y_1 + margin - bend(y)) / (y_1 - y_0 + 2 * margin) * (height - top - bottom)
            return (left + u) * scale, (panel * height + top + v) * scale

        def ticks(low, high, log):
            if log:
                return [k * 10. ** e for e in range(-6, 9) for k in (1, 2, 5) if low <= k * 10. ** e <= high]
            step = min(s for s in (k * 10. ** e for e in range(-6, 9) for k in (1, 2, 5)) if s >= (high - low) / 6)
            return np.arange(np.ceil(low / step), high / step + 1e-6) * step

        low, high = (np.exp([y_0, y_1]) if log else (y_0, y_1))
        for y in ticks(low, high, log):
            draw.line([place(x_0, y), place(x_1, y)], fill='#e0e0e0', width=scale)
            draw.text((left * scale - 8, place(x_0, y)[1]), f'{y + 0:g}', fill='black', font=font, anchor='rm')
        for x in ticks(x_0, x_1, False):
            draw.text((place(x, np.exp(y_0) if log else y_0)[0], (panel + 1) * height * scale - 4), f'{x:g}',
                      fill='black', font=font, anchor='md')
        draw.text((left * scale, (panel * height + 4) * scale), title + ' (logarithmic)' * log, fill='black', font=font)
        for row, (name, runs) in enumerate(curves.items()):
            for run in runs:
                draw.line([place(*point) for point in run], fill=colors[name], width=scale if runs[1:] else 2 * scale)
            if len(runs) > 1 and len({tuple(x for x, _ in run) for run in runs}) == 1:
                draw.line([place(*point) for point in np.mean(runs, 0)], fill=colors[name], width=3 * scale)
            draw.text(((width - right + 12) * scale, (panel * height + top + 16 * row) * scale), name,
                      fill=colors[name], font=font)
    save_png(np.asarray(canvas.resize((width, height * len(panels)), Image.Resampling.LANCZOS)), path)

# ----------------------------------------------------------------------------------------------------
# Batches in order.


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order and the coin flips of one epoch: (int64 [size], bool [size])."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(size), rng.random(size) < 0.5


def batch_order(seed, nimg, count, size):
    """Images `nimg` ... `nimg + count - 1` of a run over a dataset of `size` images.

    Image number `nimg` of the run is place k of `epoch_order(seed, epoch)`, with `epoch, k = divmod(nimg, size)`.
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
        self.data = self.read(Path(path) / 'images.npy', mmap_mode='r')
        if self.data.dtype != np.uint8 or self.data.ndim != 4 or self.data.shape[1] != self.data.shape[2] \
                or self.data.shape[3] != 3 or not len(self.data):
            raise ValueError(f'{path}/images.npy is {self.data.dtype} {list(self.data.shape)}, not uint8 [N, R, R, 3]')
        self.resolution = self.data.shape[1]
        self.targets = None
        if (Path(path) / 'labels.npy').is_file():
            self.targets = self.read(Path(path) / 'labels.npy')
            if self.targets.dtype != np.int64 or self.targets.shape != (len(self.data),) \
                    or self.targets.min() < 0 or self.targets.max() >= MAX_CLASSES:
                raise ValueError(f'{path}/labels.npy must be int64 [{len(self.data)}] of class numbers from 0')
        self.label_dim = 0 if self.targets is None else int(self.targets.max()) + 1

    @staticmethod
    def read(path, **kwargs):
        try:
            return np.load(path, **kwargs)
        except Exception as error:  # whatever a damaged file can provoke
            if isinstance(error, (MemoryError, PermissionError)):
                raise
            raise ValueError(f'{path} is damaged: {error}') from None

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
             np.maximum(0.866 * ax - 0.5 * y - 0.5 * r, y - 0.5 * r - 0.5),
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
    def read_back(cls, images, tolerance=0.35):
        """Recover what is drawn: uint8 [n, 3, 16, 16] -> kind int64 [n], colour int64 [n], valid bool [n].

        The nearest of 8,092 clean masks, each in six colours, wins; an image further from it than `tolerance` times the
        drawing's contrast (root mean square) is no shape at all: not valid.
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
            valid.append(energy + best <= tolerance ** 2 * fitted)
        return torch.cat(kind), torch.cat(colour), torch.cat(valid)


@functools.lru_cache(maxsize=1)
def _shape_templates():
    """Masks float32 [T, 256] on a fine grid of centres and radii, and their kinds int64 [T]."""
    grid = np.meshgrid(np.arange(4), np.arange(5.5, 9.6, 0.25), np.arange(5.5, 9.6, 0.25), np.arange(3.5, 5.1, 0.25),
                       indexing='ij')
    kind, cx, cy, radius = (g.ravel() for g in grid)
    masks = Shapes.masks(kind, np.stack([cx, cy], 1), radius)
    return torch.from_numpy(masks).float().flatten(1), torch.from_numpy(kind)


def open_dataset(dataset, path=None):
    """`shapes`, or the prepared folder of `dataset` (`path`, by default datasets/NAME). CIFAR-10 is fetched if missing.

    Raises FileNotFoundError with the command that prepares a dataset which cannot be fetched. Warns of a folder whose
    images are all the same, or with a class that has none. In a run of several processes let rank 0 call it first.
    """
    if dataset == 'shapes' and path is None:
        return Shapes()
    path = Path(path or f'datasets/{dataset}')
    if not path.exists() and dataset == 'cifar10':
        prepare('cifar10', path)
    if not path.exists() and dataset in HOW_TO_PREPARE:
        raise FileNotFoundError(f'{path} not found. {dataset} cannot be fetched: `{HOW_TO_PREPARE[dataset]}` makes it')
    folder, rank = Folder(path), os.environ.get('RANK', '0')
    first = folder.images(np.arange(min(100, len(folder))))
    if (first == first[0]).all() and rank == '0':
        print(f'warning: {path}: ' + ('one image alone' if len(folder) == 1 else 'the first images are all the same'))
    missing = sorted(set(range(folder.label_dim)) - set(() if folder.targets is None else folder.targets.tolist()))
    if missing and rank == '0':
        print(f'warning: {path}: no image of {len(missing)} of {folder.label_dim} classes, e.g. of class {missing[0]}')
    return folder

# ----------------------------------------------------------------------------------------------------
# Download.


def download(url, path, timeout=30, **checksum):
    """Fetch `url` to `path` unless it is there: resumed after a break, verified, renamed when whole.

    checksum: md5='...' or sha256='...', the hexadecimal digest or its first digits.

    Raises OSError in one line when the server cannot be reached, stops early, or sends other bytes.
    """
    path, partial = Path(path), Path(f'{path}.partial')
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    print(f'fetching {url}' + (f', {have >> 20} MB already here' if have else ''), flush=True)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            have = have if response.status == 206 else 0  # the server may ignore the range: start again
            if have and not response.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
                partial.unlink()
                raise OSError('the server sent another part than was asked for, so what is here was removed')
            total = have + int(response.headers.get('Content-Length') or 0)
            with open(partial, 'r+b' if have else 'wb') as f:
                f.seek(have)
                while chunk := response.read(1 << 20):
                    f.write(chunk)
                    if f.tell() >> 26 != (f.tell() - len(chunk)) >> 26:
                        print(f'  {f.tell() >> 20} of {total >> 20} MB', flush=True)
                f.truncate()
                if total and f.tell() < total:
                    raise OSError(f'{f.tell()} of {total} bytes came')
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416:
            partial.unlink(missing_ok=True)  # nothing left to send, or the file has changed: start afresh next time
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OSError(f'cannot fetch {url}: {reason}; run the same command again to go on') from None
    for name, expected in checksum.items():
        with open(partial, 'rb') as f:
            digest = hashlib.file_digest(f, name).hexdigest()
        if not digest.startswith(expected):
            partial.unlink()
            raise OSError(f'{url} sent other bytes than expected ({name} {digest}, not {expected})')
    os.replace(partial, path)
    return path


def cache_path(url):
    """Where downloads are kept: $ONE_STEP_CACHE or ~/.cache/one-step-diffusion."""
    folder = os.environ.get('ONE_STEP_CACHE') or Path.home() / '.cache' / 'one-step-diffusion'
    return Path(folder) / f'{hashlib.md5(url.encode()).hexdigest()[:8]}-{url.rsplit("/", 1)[-1]}'

# ----------------------------------------------------------------------------------------------------
# Preparation. A reader -> (count, iterator of (name, image or uint8 [H, W, 3], label or None)). Raises ValueError.


class CifarUnpickler(pickle.Unpickler):
    """Reads the batches of cifar-10-python.tar.gz; anything but a plain numpy array is refused."""

    allowed = {'numpy.core.multiarray': ['_reconstruct'], 'numpy._core.multiarray': ['_reconstruct'],
               'numpy': ['ndarray', 'dtype'], '_codecs': ['encode']}

    def find_class(self, module, name):
        if name not in self.allowed.get(module, []):
            raise ValueError(f'refused: the pickle asks for {module}.{name}')
        return super().find_class(module.replace('numpy.core', 'numpy._core'), name)


def read_cifar10(path):
    """The official tarballs, binary (records of 1 + 3072 bytes) or python; the 50,000 training images."""
    records = []  # (label, uint8 [3072])
    with tarfile.open(path) as tar:
        members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
        for i in range(1, 6):
            member = members.get(f'data_batch_{i}.bin') or members.get(f'data_batch_{i}')
            if member is None or member.size > 1 << 26:
                raise ValueError(f'no data_batch_{i} of 31 MB: not a CIFAR-10 tarball')
            raw = tar.extractfile(member).read()
            if member.name.endswith('.bin'):
                if len(raw) % 3073:
                    raise ValueError(f'{member.name} is not made of records of 3073 bytes')
                rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
                records += [(int(row[0]), row[1:]) for row in rows]
            else:
                batch = CifarUnpickler(io.BytesIO(raw), encoding='latin1').load()
                if batch['data'].dtype != np.uint8:
                    raise ValueError(f'{member.name} is {batch["data"].dtype}, expected uint8')
                records += list(zip(batch['labels'], batch['data'], strict=True))
    bad = [label for label, _ in records if label not in range(10)]
    if bad:
        raise ValueError(f'label {bad[0]!r} out of range 0..9')
    return len(records), ((f'image {i}', row.reshape(3, 32, 32).transpose(1, 2, 0), label)
                          for i, (label, row) in enumerate(records))


def read_npz(folder):
    """Downsampled ImageNet (train_data_batch_*.npz: data uint8 [n, 3*R*R], labels 1..1000)."""
    files = sorted(Path(folder).glob('*.npz'), key=lambda f: (len(f.name), f.name))
    counts = [len(np.load(f)['labels']) for f in files]

    def images():
        for f in files:
            batch = np.load(f)
            pixels, labels = batch['data'], batch['labels']
            side = int((pixels.shape[-1] // 3) ** 0.5)
            if pixels.shape != (len(labels), 3 * side ** 2) or pixels.dtype != np.uint8 \
                    or labels.dtype.kind not in 'iu':
                raise ValueError(f'{f.name} has data {pixels.dtype} {list(pixels.shape)} and labels {labels.dtype} '
                                 f'{list(labels.shape)}: expected uint8 [n, 3 R R] and whole numbers [n]')
            for i, row in enumerate(pixels):
                yield f'{f.name}[{i}]', row.reshape(3, side, side).transpose(1, 2, 0), int(labels[i]) - 1
    return sum(counts), images()


def read_zip(path):
    """An EDM zip: images, and dataset.json with {"labels": [[name, label], ...]} or null."""
    archive = zipfile.ZipFile(path)
    names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in IMAGE_TYPES)
    labels = None
    if 'dataset.json' in archive.namelist():
        if archive.getinfo('dataset.json').file_size > 1 << 30:
            raise ValueError('dataset.json of more than 1 GiB')
        labels = json.loads(archive.read('dataset.json')).get('labels')
    labels = None if labels is None else dict(labels)
    if labels is not None and set(names) - set(labels):
        raise ValueError(f'dataset.json has no label for {sorted(set(names) - set(labels))[0]}')
    return len(names), ((n, archive.open(n), labels and labels[n]) for n in names)


def read_folder(path):
    """Images below a folder; the sorted top-level sub-folders, if more than one, are the classes (ILSVRC: wnids)."""
    files = sorted(f for f in Path(path).rglob('*') if f.suffix.lower() in IMAGE_TYPES)
    tops = sorted({f.relative_to(path).parts[0] for f in files if f.parent != Path(path)})
    classes = {top: i for i, top in enumerate(tops)} if len(tops) > 1 else None
    if classes and any(f.parent == Path(path) for f in files):
        raise ValueError('there are images both in class folders and beside them')
    return len(files), ((str(f), f, classes and classes[f.relative_to(path).parts[0]]) for f in files)


def decode(name, image, resolution, converted):
    """File, path or array -> uint8 [R, R, 3]: RGB; centre crop to a square, then Lanczos (EDM's `center-crop`)."""
    if not isinstance(image, np.ndarray):
        try:
            image = Image.open(image)
            image.load()
        except Exception as error:  # whatever a damaged image, or its archive, can provoke
            raise ValueError(f'cannot read {name}: {error}') from None
        if image.mode not in ('RGB', 'L', 'LA', 'RGBA', 'P', 'CMYK', '1'):
            raise ValueError(f'{name} has mode {image.mode}: convert it to 8-bit RGB')
        if getattr(image, 'n_frames', 1) > 1:
            converted['animations, first frame'] += 1
        if image.mode != 'RGB':
            converted[image.mode] += 1
            image = image.convert('RGB')
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    if resolution is None and height != width:
        raise ValueError(f'{name} is {width}x{height}, not square: give --resolution to crop and resize')
    if resolution not in (None, height) or height != width:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize([resolution] * 2, Image.Resampling.LANCZOS)
    return np.asarray(image)


def prepare(source, dest, resolution=None, use_labels=True):
    """Make a prepared folder at `dest` from `source`; nothing stands at `dest` until it is whole. Prints progress.

    Raises OSError or ValueError in one line, leaving nothing behind, for whatever is wrong with the source or the disk.
    """
    dest = Path(dest)
    if dest.exists():
        raise FileExistsError(f'{dest} exists already: remove it first, or name another place')
    if str(source) == 'cifar10':
        source = download(CIFAR10_URL, dest.parent / CIFAR10_URL.rsplit('/', 1)[-1], md5=CIFAR10_MD5)
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f'{source} not found')
    temporary = dest.with_name(f'.{dest.name}.partial')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if source.is_dir():
            count, images = read_npz(source) if any(source.glob('*.npz')) else read_folder(source)
        elif zipfile.is_zipfile(source):
            count, images = read_zip(source)
        elif tarfile.is_tarfile(source):
            count, images = read_cifar10(source)
        else:
            raise ValueError('neither a folder, a whole zip nor a CIFAR-10 tarball (truncated?)')
        if not count:
            raise ValueError('no images')
        labels, converted, side = [], collections.Counter(), resolution
        with open(temporary / 'images.npy', 'wb') as f:  # not a memmap: on a full disk that would die of SIGBUS
            for i, (name, image, label) in enumerate(images):
                pixels = decode(name, image, resolution, converted)
                if i == 0:
                    side = pixels.shape[0]
                    np.lib.format.write_array_header_1_0(
                        f, dict(descr='|u1', fortran_order=False, shape=(count, side, side, 3)))
                if pixels.shape != (side, side, 3):
                    raise ValueError(f'{name} is {pixels.shape[1]}x{pixels.shape[0]} where others are {side}x{side}: '
                                     'give --resolution to make them equal')
                if use_labels and label is not None:
                    if type(label) is not int or not 0 <= label < MAX_CLASSES:
                        raise ValueError(f'label {label!r} of {name} is out of range: expected a class number from 0')
                    labels.append(label)
                f.write(np.ascontiguousarray(pixels).data)
                if (i + 1) % 10_000 == 0:
                    print(f'  {i + 1} of {count} images', flush=True)
            f.flush()
            os.fsync(f.fileno())
        if len(labels) not in (0, count):
            raise ValueError(f'{len(labels)} of {count} images have a label: give all, none, or --no-labels')
        if labels:
            np.save(temporary / 'labels.npy', np.array(labels, np.int64))
        os.replace(temporary, dest)
    except Exception as error:  # whatever a damaged or hostile source can provoke; told in one line, never hidden
        told = isinstance(error, (OSError, ValueError))
        kind = '' if told else f'{type(error).__name__}, damaged or not what it seems? '
        raise ValueError(f'cannot prepare {source}: {kind}{error}') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note = f' ({", ".join(f"{n} from {mode}" for mode, n in converted.items())} to RGB)' if converted else ''
    print(f'{dest}: {count} images {side}x{side}{note}, {len(set(labels)) or "no"} classes')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True)
    p = commands.add_parser('prepare', help='make a prepared folder')
    p.add_argument('source', help='zip, folder, tarball, or the word cifar10 to fetch it')
    p.add_argument('dest', help='folder to make')
    p.add_argument('--resolution', type=int, help='centre crop to a square and resize (Lanczos) to this side')
    p.add_argument('--no-labels', action='store_true', help='leave the labels out')
    p = commands.add_parser('grid', help='write a picture of a dataset')
    p.add_argument('dataset', help='shapes, or a prepared folder')
    p.add_argument('dest', help='PNG to write')
    args = parser.parse_args(argv)
    try:
        if args.command == 'prepare':
            if args.resolution is not None and not 1 <= args.resolution <= 4096:
                raise ValueError(f'--resolution {args.resolution}: expected 1 to 4096')
            prepare(args.source, args.dest, args.resolution, not args.no_labels)
        else:
            dataset = Shapes() if args.dataset == 'shapes' else Folder(args.dataset)
            save_grid(dataset.images(np.arange(min(100, len(dataset)))), args.dest)
    except (OSError, ValueError) as error:
        sys.exit(f'data.py: {error}')


if __name__ == '__main__':
    main()
