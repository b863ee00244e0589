"""Pixels, run folders, the order of batches, datasets and their preparation: what every script needs.

A prepared dataset is a folder with `images.npy` (uint8 [N, R, R, 3]) and, if it has labels, `labels.npy` (int64 [N]).
The dataset `shapes` needs no folder: its images are drawn when they are asked for.

    python data.py prepare SOURCE DEST [--resolution R]    # SOURCE: EDM zip, image folder, CIFAR-10 tarball,
                                                           # ILSVRC train folder, downsampled-ImageNet npz folder
    python data.py prepare cifar10 datasets/cifar10        # fetches 170 MB
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
HOW_TO_PREPARE = {  # datasets that cannot be fetched
    'ffhq64': 'python data.py prepare FFHQ_IMAGES datasets/ffhq64 --resolution 64 --no-labels',
    'afhqv2': 'python data.py prepare AFHQV2 datasets/afhqv2 --resolution 64 --no-labels',
    'imagenet64': 'python data.py prepare ILSVRC/Data/CLS-LOC/train datasets/imagenet64 --resolution 64'}
MAX_CLASSES = 1 << 20  # a larger label is no class number
IMAGE_TYPES = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
               and kind in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'PPM', 'TIFF', 'AVIF')}  # not EPS: it is a program

# ----------------------------------------------------------------------------------------------------
# Pixels.


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], truncating as EDM's generate.py does."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_device(x, device):
    """Move a CPU tensor to `device`; to a GPU through pinned memory, so that the CPU does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def load_images(dataset, indices, device, flips=None):
    """Load images as float32 [n, 3, R, R] in [-1, 1]. Those for which flips (numpy bool [n]) is true are mirrored."""
    images = dataset.images(indices)
    if flips is not None:
        images = torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(3), images)
    return to_float(to_device(images, device))


def save_panels(panels, path, columns=8, scale=2):
    """Write {title: uint8 [N, 3, H, W]} as one PNG: a grid below each title. A title '' is left out. Raises OSError."""
    pictures = []
    for title, images in panels.items():
        n, c, h, w = (images := images.expand(-1, 3, -1, -1)).shape  # one channel: grey
        grid = np.zeros([-(-n // columns) * columns, c, h, w], np.uint8)
        grid[:n] = images.cpu().numpy()
        grid = grid.reshape(-1, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
        heading = Image.new('RGB', (columns * w * scale, 16 if title else 0), 'white')
        ImageDraw.Draw(heading).text((2, 2), title, fill='black', font=ImageFont.load_default())
        pictures += [np.asarray(heading), grid.repeat(scale, 0).repeat(scale, 1)]
    with whole_file(path) as f:
        Image.fromarray(np.concatenate(pictures)).save(f, format='png')

# ----------------------------------------------------------------------------------------------------
# Processes and run folders (config.json, stats.jsonl, latest.pt, previous.pt). `Collective`: all ranks must call it.

LOCKED = []  # the open stats.jsonl of this process's run
MAY_CHANGE = {'out', 'data', 'teacher', 'batch_gpu', 'compile', 'snapshot_kimg', 'status_kimg', 'eval_images'}


@contextlib.contextmanager
def clear_errors(script):
    """Print one line for an error that the user can fix, and the traceback of any other error. The exit status is 1."""
    try:
        if 'RANK' in os.environ and 'LOCAL_RANK' not in os.environ:
            raise ValueError('RANK is set and LOCAL_RANK is not: start several processes with torchrun')
        if 0 < torch.cuda.device_count() <= int(os.environ.get('LOCAL_RANK', 0)):
            raise ValueError(f'--nproc_per_node must not be above the {torch.cuda.device_count()} GPUs of this machine')
        yield
    except Exception as error:  # every error is printed, in one line or with its traceback
        mendable = isinstance(error, (OSError, ValueError, FloatingPointError, MemoryError, dist.DistNetworkError))
        if isinstance(error, torch.OutOfMemoryError):
            mendable, error = True, f'{error} A smaller --batch-gpu (fid.py: --batch) needs less memory.'
        print(f'{script}: {error}' if mendable else traceback.format_exc(), file=sys.stderr, flush=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            os._exit(1)  # the other processes may be waiting for this one: torchrun ends them
        sys.exit(1)


def rank0_first(function, *args):
    """Call function(*args) on each machine's first process, then on the others, which can use the files it has made."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if dist.is_initialized() and not first:
        dist.barrier()
    result = function(*args)
    if dist.is_initialized() and first:
        dist.barrier()
    return result


def fingerprint(arrays):
    """A checksum of the contents of arrays or tensors: 8 hexadecimal digits."""
    return f'{functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), arrays, 0):08x}'


@contextlib.contextmanager
def whole_file(path):
    """Open a file that appears at `path` whole or not at all: written beside it, then renamed. Raises OSError."""
    try:
        with open(f'{path}.tmp', 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{path}.tmp', path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides that the disk is full
        if not isinstance(reason, OSError):
            raise
        raise OSError(f'cannot write {path}: {reason}') from None
    finally:
        Path(f'{path}.tmp').unlink(missing_ok=True)


def lock(path, wait=False):
    """Open `path` and lock it until it is closed or this process ends. Raises BlockingIOError if it is locked already.

    On Windows, and on file systems without locks, the file is opened but not locked.
    """
    f = open(path, 'ab')
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f'another process uses {path}: wait until it ends (on many GPUs use torchrun)') from None
    except OSError as error:
        print(f'warning: cannot lock {path}: {error}', flush=True)
    return f


def check_finite(name, network):
    """Raise FloatingPointError if a weight of the network is not finite."""
    if not all(p.isfinite().all() for p in network.parameters()):
        raise FloatingPointError(f'a weight of {name} is not finite: training has diverged; the last checkpoint stays')


def save_checkpoint(out, config, counts, parts):
    """Write latest.pt and keep the one before it as previous.pt. One of them is whole whenever the run is killed.

    counts: {name: int}. parts: {name: network or optimizer}, all that training changes. Raises FloatingPointError.
    """
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            check_finite(name, part)
    state = dict(counts, config=config, log_bytes=os.path.getsize(f'{out}/stats.jsonl'))
    with whole_file(f'{out}/next.pt') as f:
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, f)
    if os.path.exists(f'{out}/latest.pt'):
        os.replace(f'{out}/latest.pt', f'{out}/previous.pt')
    os.replace(f'{out}/next.pt', f'{out}/latest.pt')


def newest_checkpoint(out):
    """The path of the newest whole checkpoint, or None for a new run. A damaged one is reported and set aside."""
    for path in filter(os.path.exists, (f'{out}/latest.pt', f'{out}/previous.pt')):
        try:
            damaged = zipfile.ZipFile(path).testzip()  # compares the checksum of every tensor
            if not damaged and torch.load(path, map_location='cpu', weights_only=True, mmap=True)['config']:
                return path
        except Exception as error:  # a damaged file can cause any exception
            if isinstance(error, (MemoryError, OSError)):
                raise
            if 'allocate memory' in str(error):
                raise MemoryError(f'{path}: {error}') from None
        print(f'{path} is damaged and is renamed to {path}.damaged', flush=True)
        os.replace(path, f'{path}.damaged')
    if [*Path(out).glob('*.pt.damaged'), *Path(out).glob('student-*.pt'), *Path(out).glob('teacher-*.pt')]:
        raise ValueError(f'no whole checkpoint is left in {out}, but files of a run are: give another --out')


def load_checkpoint(args, parts, may_change=frozenset(), **fingerprints):
    """Load the newest whole checkpoint of args.out into `parts`. Collective. Raises ValueError if another run wrote it.

    Returns (config, state). config is what a resumed run must repeat: `args` except for MAY_CHANGE and `may_change`. If
    args.decay is 0, --kimg may change too, as no learning rate depends on it. Data and teacher may move but not change:
    their fingerprints are compared, not their paths. state is the rest of the checkpoint, or {} for a new run.
    """
    may_change = MAY_CHANGE | may_change | (set() if args.decay else {'kimg'})
    config = dict({k: v for k, v in vars(args).items() if k not in may_change}, **fingerprints)
    config = json.loads(json.dumps(config))  # as it will be read back
    path = [newest_checkpoint(args.out) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    if path[0] is None:
        return config, {}
    state = torch.load(path[0], map_location='cpu', weights_only=True, mmap=True)
    changed = [f'{k} was {old} and is now {config[k]}' for k, old in state['config'].items()
               if config.get(k, old) != old]
    if changed := changed + [f'it has no {name}' for name in parts if name not in state]:
        raise ValueError(f'{args.out} holds another run ({", ".join(changed)}): give another --out')
    for name, part in parts.items():
        part.load_state_dict(state[name])
    dist.barrier()  # no rank may write a checkpoint before all ranks have read it
    return config, {k: v for k, v in state.items() if k not in parts}  # tensors would keep the file mapped


def start_log(args, state, plan, **more):
    """Print the plan, write config.json, cut stats.jsonl back to the checkpoint, or report a complete run. Rank 0 only.

    The run folder is locked until the process ends. Raises BlockingIOError if another run has locked it, and ValueError
    if --kimg ends the run where no network was written.
    """
    if (nimg := state.get('nimg', 0)) >= args.kimg * 1000:
        if not list(Path(args.out).glob(f'*-{nimg // 1000:06d}.pt')):  # that checkpoint was not the end of the run
            raise ValueError(f'{args.out} has reached {nimg / 1000:g} kimg, and no network was written there: give a '
                             '--kimg above that')
        return print(f'{args.out} is complete at {nimg / 1000:g} kimg: nothing is left to train', flush=True)
    os.makedirs(args.out, exist_ok=True)
    LOCKED.clear()  # closes the file of an earlier run of this process
    LOCKED.append(log := lock(f'{args.out}/stats.jsonl'))
    print(plan, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    more |= dict(torch=torch.__version__, processes=dist.get_world_size(), device=device, command=sys.argv)
    with whole_file(f'{args.out}/config.json') as f:
        f.write(json.dumps(dict(vars(args), **more), indent=1).encode())
    log.truncate(min(state.get('log_bytes', 0), log.tell()))


def log_status(out, stats, total):
    """Print one line and append one object to stats.jsonl. total: --kimg, as a number of images. Rank 0 only."""
    if torch.cuda.is_available():
        stats = dict(stats, peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)  # of this process
    minutes = stats['sec_per_kimg'] * (total / 1000 - stats['kimg']) / 60 if stats['kimg'] else 0  # no guess at first
    shown = '  '.join(f'{k} {v:.{9 if k == "kimg" else 5}g}' for k, v in stats.items() if k != 'seconds')
    print(f'{stats["kimg"] * 1000 / total:4.0%}  {shown}' + f'  {minutes:.1f} min left' * (minutes > 0), flush=True)
    with open(f'{out}/stats.jsonl', 'a') as f:
        f.write(json.dumps(stats) + '\n')


class Means:
    """Means of named scalars between two status lines. Scalars stay tensors, so that no step waits for the device."""

    def __init__(self, images):  # images: how many the run has seen so far
        self.images, self.start, self.added = images, time.time(), []  # (name, scalar tensor), in order

    def add(self, **scalars):
        self.added += [(name, value.detach()) for name, value in scalars.items()]

    def collect(self, images):
        """{sec_per_kimg, seconds, name: mean over steps and processes}. Collective.

        If a scalar is not finite, raises FloatingPointError on all ranks. The message names the first such scalar.
        """
        means = {}
        for name in dict.fromkeys(name for name, _ in self.added):
            mean = torch.stack([value for other, value in self.added if other == name]).double().mean()
            dist.all_reduce(mean)
            means[name] = float(mean) / dist.get_world_size()
        if not np.isfinite(list(means.values())).all():
            first = next((name for name, value in self.added if not value.isfinite()), 'a loss of another process')
            raise FloatingPointError(f'{first} is not finite: training has diverged; the last checkpoint stays')
        seconds = time.time() - self.start  # reading the means has waited for the GPU to finish
        return dict(sec_per_kimg=1000 * seconds / max(images - self.images, 1), seconds=seconds, **means)

# ----------------------------------------------------------------------------------------------------
# Datasets, and the order of their images. A dataset has len(), .resolution and .label_dim (0: no labels). For indices
# int [n], .images(indices) returns uint8 [n, 3, R, R], and .labels(indices) returns int64 [n], zeros without labels.


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The order and the coin flips of one epoch: (int64 [size], bool [size])."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(size), rng.random(size) < 0.5


def batch_order(seed, nimg, count, size):
    """Images `nimg` ... `nimg + count - 1` of a run: (indices int64 [count], whether to mirror them bool [count]).

    Image number `nimg` is place k of `epoch_order(seed, epoch, size)`, where `epoch, k = divmod(nimg, size)`. So a run
    resumes exactly, and its images do not depend on the number of processes. Deviation: EDM's sampler swaps images
    within a window instead of drawing a permutation for each epoch.
    """
    epochs, places = np.divmod(np.arange(nimg, nimg + count), size)
    parts = [(epoch_order(seed, int(e), size), places[epochs == e]) for e in np.unique(epochs)]
    return np.concatenate([order[k] for (order, _), k in parts]), np.concatenate([flips[k] for (_, flips), k in parts])


def step_generator(seed, nimg, stream, device):
    """A torch.Generator for the random numbers of one training step.

    Draw for the *global* batch and let each process use its own rows: so the number of processes has no effect.
    `stream` (int) separates the stages of a training.
    """
    key = np.random.SeedSequence([seed, nimg, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))


class Folder:
    """A prepared folder. Raises FileNotFoundError if it has no images.npy, a one-line ValueError if it is damaged."""

    def __init__(self, path):
        path, labelled = Path(path), (Path(path) / 'labels.npy').is_file()
        if not (path / 'images.npy').is_file():
            if path.exists():  # perhaps the images, not yet prepared
                command = f'python data.py prepare {path} {path.with_suffix("")}' + '-prepared' * path.is_dir()
            else:
                command = HOW_TO_PREPARE.get(path.name, f'python data.py prepare SOURCE {path}')
                command = command.replace(f'datasets/{path.name}', str(path))
            raise FileNotFoundError(f'no images.npy in {path}: make it with `{command}`')
        try:
            self.data = np.load(path / 'images.npy', mmap_mode='r')
            self.targets = np.load(path / 'labels.npy') if labelled else np.zeros(self.data.shape[:1], np.int64)
            names = json.loads((path / 'classes.json').read_text()) if (path / 'classes.json').is_file() else []
            n, height, width, channels = self.data.shape
            if self.data.dtype != np.uint8 or height != width or channels != 3 or self.targets.dtype != np.int64 \
                    or self.targets.shape != (n,) or self.targets.min() < 0 or self.targets.max() >= MAX_CLASSES:
                raise ValueError('expected images.npy with uint8 [N, R, R, 3], labels.npy with int64 [N] from 0 up')
        except Exception as error:  # a damaged file can cause any exception
            raise ValueError(f'cannot use {path}: {error}') from None
        self.resolution, self.label_dim = height, max(int(self.targets.max()) + 1, len(names)) if labelled else 0

    def __len__(self):
        return len(self.data)

    def images(self, indices):
        return torch.from_numpy(self.data[indices]).permute(0, 3, 1, 2).contiguous()

    def labels(self, indices):
        return torch.from_numpy(self.targets[indices])


class Shapes:
    """`shapes`: anti-aliased 16x16 RGB images of one shape each on a near-black ground, drawn when they are asked for.

    The class is the kind of shape, one of four; colour (one of six), centre and size vary.
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

    def images(self, indices):
        mask = self.masks(self.kind[indices], self.centre[indices], self.radius[indices])[:, None]
        colour = self.colours[self.colour[indices]][:, :, None, None]
        return torch.from_numpy((self.ground + mask * (colour - self.ground)).round().astype(np.uint8))

    def labels(self, indices):
        return torch.from_numpy(self.kind[indices])

    @classmethod
    def masks(cls, kind, centre, radius):
        """Share of each pixel that the shape covers: kind [n], centre [n, 2], radius [n] -> float [n, 16, 16]."""
        x = np.arange(cls.resolution) - centre[:, 0, None, None]  # [n, 1, 16]
        y = np.arange(cls.resolution)[:, None] - centre[:, 1, None, None]  # [n, 16, 1]
        r, ax, ay = radius[:, None, None], np.abs(x), np.abs(y)
        distance = np.select(  # signed distance to the outline, in pixels, negative inside
            [kind[:, None, None] == k for k in range(4)],
            [np.hypot(x, y) - r,
             np.maximum(ax, ay) - 0.85 * r,
             np.maximum(0.866 * ax - 0.5 * y - 0.5 * r, y - 0.5 * r - 0.5),
             np.maximum(np.minimum(ax, ay) - 0.3 * r, np.maximum(ax, ay) - r)])
        return np.clip(0.5 - distance, 0, 1)


def identity(dataset):
    """A text that identifies a dataset: its size, and a checksum of all labels and of a hundred images all over it."""
    some = np.linspace(0, len(dataset) - 1, min(100, len(dataset))).astype(int)
    checksum = fingerprint([dataset.images(some), dataset.labels(np.arange(len(dataset)))])
    return f'{len(dataset)} images of {dataset.resolution} px, {dataset.label_dim} classes, checksum {checksum}'


def open_dataset(dataset, path=None):
    """`shapes`, or the prepared folder at `path` (datasets/NAME); CIFAR-10 is fetched. Raises OSError, ValueError."""
    if dataset == 'shapes' and path is None:
        return Shapes()
    if dataset == 'cifar10' and path is None and not os.path.exists('datasets/cifar10'):
        with contextlib.suppress(FileExistsError):  # another process was faster
            prepare('cifar10', 'datasets/cifar10')
    return Folder(path or f'datasets/{dataset}')

# ----------------------------------------------------------------------------------------------------
# Downloads, and preparation of datasets.


def cache_path(url):
    """Where a download is kept: in $ONE_STEP_CACHE, or ~/.cache/one-step-diffusion, or (without $HOME) in /tmp."""
    home = os.environ.get('HOME') or tempfile.gettempdir()
    folder = os.path.expanduser(os.environ.get('ONE_STEP_CACHE') or f'{home}/.cache/one-step-diffusion')
    name = urllib.parse.urlsplit(url).path.rsplit('/', 1)[-1][-100:]  # without the signature of a signed URL
    return Path(folder) / f'{hashlib.md5(url.encode()).hexdigest()[:8]}-{name}'


def download(url, path, timeout=30, **checksum):
    """Fetch `url` to `path` unless that file exists. An interrupted download is resumed. Returns the Path.

    checksum: md5='...' or sha256='...', the digest or its first digits. The file is verified before it gets its name.
    If several processes ask for it, one fetches it and the others wait. Raises a one-line OSError.
    """
    path, partial = Path(path), Path(f'{path}.partial')
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locked = lock(f'{path}.lock', wait=True)
    except OSError as error:
        raise OSError(f'cannot keep {url} ({error}): make {path.parent} writable; for files of the cache, '
                      'ONE_STEP_CACHE can name another folder') from None
    with locked:
        if path.exists():  # another process has fetched it
            return path
        have = partial.stat().st_size if partial.exists() else 0
        print(f'fetching {url}' + f', {have >> 20} MB already here' * (have > 0), flush=True)
        try:
            request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                resumed = response.status == 206  # the server may ignore the range: start again
                if resumed and not response.headers.get('Content-Range', '').startswith(f'bytes {have}-'):
                    partial.unlink()
                    raise OSError('the server sent another part than was asked for')
                with open(partial, 'ab' if resumed else 'wb') as f:
                    total = f.tell() + int(response.headers.get('Content-Length') or 0)
                    while chunk := response.read(1 << 20):
                        f.write(chunk)
                        if f.tell() % (1 << 26) < len(chunk):  # every 64 MB
                            print(f'  {f.tell() >> 20} of {total >> 20} MB', flush=True)
                    if f.tell() < total:
                        raise OSError(f'only {f.tell()} of {total} bytes arrived')
        except Exception as error:  # a server or the disk can cause any exception
            code = getattr(error, 'code', 0)
            if code == 416:  # no such part: the file at the server has changed
                partial.unlink(missing_ok=True)
            reason = ' '.join(str(error).split()) or type(error).__name__
            final = 'unknown url type' in reason or code in (400, 401, 403, 404, 410, 451)
            raise OSError(f'cannot fetch {url}: {reason}; ' + (
                'check the address' if final else 'run the same command again to go on')) from None
        for name, expected in checksum.items():
            digest = hashlib.new(name, partial.read_bytes()).hexdigest()
            if not digest.startswith(expected):
                partial.unlink()
                raise OSError(f'{url} sent other bytes than expected ({name} {digest}, not {expected})')
        os.replace(partial, path)
    return path


def read_rows(name, pixels, labels):
    """Yield what `read_images` does from a batch: pixels uint8 [n, 3 R R], n labels."""
    side = int((pixels.shape[1] // 3) ** 0.5)
    images = pixels.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield f'{name}[{i}]', image, label


def read_tree(names, open_file, use_labels, classes, notes):
    """`read_images` for a folder or a zip. names: its files, and its folders with a '/' at the end; open_file(name).

    Labels come from EDM's dataset.json, {"labels": [[name, label], ...]} or {"labels": null}. Without that file, the
    top-level folders are the classes if there are several. A single folder that contains everything is ignored.
    """
    hidden = {n for n in names if any(part[:1] in ('.', '@') or part == '__MACOSX' for part in n.split('/') if part)}
    names, top = sorted(set(names) - hidden), ''
    while len(tops := {n[len(top):].partition('/')[:2] for n in names if n != top}) == 1 and list(tops)[0][1]:
        top += ''.join(tops.pop())
    files = [n for n in names if not n.endswith('/')]
    images = [n for n in files if Path(n).suffix.lower() in IMAGE_TYPES]
    lists, labels = [n for n in files if n.rsplit('/', 1)[-1] == 'dataset.json'], {}
    if use_labels and lists not in ([], [f'{top}dataset.json']):
        raise ValueError(f'{lists[0]} is not in the top folder of SOURCE: give its folder as SOURCE, or --no-labels')
    if use_labels and lists:
        labels = dict(json.load(open_file(lists[0])).get('labels') or {})
    elif use_labels and len(folders := {n[len(top):].split('/')[0] for n in names if '/' in n[len(top):]}) > 1:
        classes += sorted(folders, key=lambda c: (int(c), c) if all(map(str.isdecimal, folders)) else c)
        numbers = {c: i for i, c in enumerate(classes)}
        labels = {n[len(top):]: numbers.get(n[len(top):].split('/')[0], 'none') for n in images}
    notes['hidden files passed over'] = len([n for n in hidden if not n.endswith('/')])
    others = set(files) - set(images) - set(lists)
    notes[f'other files passed over ({", ".join(sorted({Path(n).suffix for n in others})[:9])})'] = len(others)
    for n in images:
        yield n, open_file(n), labels.get(n[len(top):], 'none') if labels else None


def read_images(source, use_labels, classes, notes):
    """Yield (name, image: open file or array [R, R, 3], label: int or None). It may raise any exception.

    Names of classes are appended to the list `classes`. The Counter `notes` counts the files that are not used.
    """
    batches = sorted([*source.glob('train_data*.npz'), *source.glob('val_data*.npz')],
                     key=lambda f: (len(f.name), f.name))
    if batches:  # downsampled ImageNet; its classes have their own order
        numbers = {}
        if use_labels:  # lines like `n02119789 1 kit_fox`; the classes of EDM are the sorted n-numbers
            if not (source / 'map_clsloc.txt').is_file():
                raise ValueError('map_clsloc.txt is missing: copy it from the devkit to SOURCE, or give --no-labels')
            lines = sorted(line.split() for line in (source / 'map_clsloc.txt').read_text().splitlines() if line)
            classes += [name for _, _, name in lines]
            numbers = {int(number): i for i, (_, number, _) in enumerate(lines)}
        for f in batches:
            if f.name.startswith('val'):  # not for training
                notes['validation files passed over'] += 1
                continue
            batch = np.load(f)
            pixels = batch['data']
            labels = [numbers.get(n, f'{n} is not in map_clsloc.txt') for n in batch['labels'].tolist()] \
                if use_labels else [None] * len(pixels)
            yield from read_rows(f.name, pixels, labels)
    elif source.is_dir():
        def fail(error):
            raise error
        names = []
        for folder, _, files in os.walk(source, onerror=fail, followlinks=True):
            names += [(Path(folder) / f).relative_to(source).as_posix() for f in files]
            names += [Path(folder).relative_to(source).as_posix() + '/'] * (folder != str(source))
        yield from read_tree(names, lambda name: open(source / name, 'rb'), use_labels, classes, notes)
    elif zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        yield from read_tree(archive.namelist(), archive.open, use_labels, classes, notes)
    elif tarfile.is_tarfile(source):  # CIFAR-10, the binary version: there is no pickle in it
        with tarfile.open(source) as tar:
            members = {Path(m.name).name: m for m in tar if m.isfile() and m.size < 1 << 26}
            for name in (f'data_batch_{i}.bin' for i in range(1, 6)):
                if name not in members:
                    raise ValueError(f'it has no {name}: expected cifar-10-binary.tar.gz (SOURCE cifar10 fetches it)')
                rows = np.frombuffer(tar.extractfile(members[name]).read(), np.uint8).reshape(-1, 3073)
                if rows[:, 0].max() > 9:
                    raise ValueError(f'label {rows[:, 0].max()} in {name}: expected 0 to 9')
                yield from read_rows(name, rows[:, 1:], rows[:, 0].tolist())  # one label and 3072 pixels each
    else:
        raise ValueError('it is neither a folder, nor a complete zip, nor a CIFAR-10 tarball; it may be truncated')


def decode(name, image, resolution, notes):
    """Open file or uint8 [H, W, 3] -> RGB uint8 [H, W, 3]. Raises ValueError. `notes` counts the conversions.

    With a resolution, the image is cropped to the central square and resized by Lanczos, as EDM's `center-crop` does.
    """
    try:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(
            image, formats=[*set(IMAGE_TYPES.values())])
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1
    except Exception as error:  # a damaged image or archive can cause any exception
        raise ValueError(f'cannot read {name}: {error}') from None
    if image.mode not in ('RGB', 'L', 'LA', 'RGBA', 'P', 'CMYK', '1'):
        raise ValueError(f'{name} has mode {image.mode}: convert it to 8-bit RGB')
    notes[f'converted from {image.mode}'] += image.mode != 'RGB'
    notes['not turned, though their EXIF says to turn them (as EDM does)'] += turned
    if image.has_transparency_data:
        image = image.convert('RGBA')
        notes['transparent, put on white'] += image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert('RGB')
    if resolution:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize([resolution] * 2, Image.Resampling.LANCZOS)
    return np.asarray(image)


def prepare(source, dest, resolution=None, use_labels=True):
    """Make a prepared folder at `dest` from `source`, whole or not at all. Raises OSError or ValueError in one line."""
    dest = Path(dest)
    if dest.exists():
        raise FileExistsError(f'{dest} exists already: remove it first, or name another place')
    if str(source) == 'cifar10':
        source = download(CIFAR10_URL, dest.parent / CIFAR10_URL.rsplit('/', 1)[-1], md5=CIFAR10_MD5)
    temporary = dest.with_name(f'.{dest.name}.{platform.node()}.{os.getpid()}.partial')
    for old in dest.parent.glob(f'.{dest.name}.*.partial'):
        print(f'{old} is left over: remove it, unless another process is preparing {dest} now', flush=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    labels, classes, n, side, notes = [], [], 0, None, collections.Counter()
    try:
        with open(temporary / 'images.npy', 'wb') as f:  # a memmap would die of SIGBUS on a full disk
            f.write(bytes(128))  # room for the header
            for name, image, label in read_images(Path(source), use_labels, classes, notes):
                pixels = decode(name, image, resolution, notes)
                height, width, _ = pixels.shape
                side = side or height
                if not width == height == side:
                    raise ValueError(f'{name} is {width}x{height}, not {side}x{side}: give --resolution to resize')
                if label is not None:
                    if type(label) is not int or not 0 <= label < MAX_CLASSES:
                        raise ValueError(f'the label of {name} is {label!r}: expected a class number, or --no-labels')
                    labels.append(label)
                f.write(pixels.tobytes())
                n += 1
                if n % 10_000 == 0:
                    print(f'  {n} images', flush=True)
            if not n or len(labels) not in (0, n):
                raise ValueError('no images found' if not n else f'{n} images have {len(labels)} labels: expected a '
                                 'label for all or none')
            f.seek(0)
            np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=(n, side, side, 3)))
            f.flush()
            os.fsync(f.fileno())
        if labels:
            np.save(temporary / 'labels.npy', np.array(labels, np.int64))
        if labels and classes:
            (temporary / 'classes.json').write_text(json.dumps(classes))
        os.replace(temporary, dest)
    except Exception as error:  # a damaged or hostile source can cause any exception; it is reported in one line
        if dest.exists():
            raise FileExistsError(f'{dest} exists by now: another process made it') from None
        kind = '' if isinstance(error, (OSError, ValueError)) else f'it may be damaged, {type(error).__name__}: '
        raise ValueError(f'cannot prepare {source}: {kind}{error}') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = np.bincount(labels, minlength=len(classes)) if labels else []
    names = [f'{i} = {name}' for i, name in enumerate(classes)] or list(map(str, range(len(counts))))
    shown = [f'{name} ({count})' for name, count in zip(names, counts)]
    if missing := [name for name, count in zip(names, counts) if not count]:
        print(f'warning: there are no images of class {", ".join(missing[:9])}{", ..." * (len(missing) > 9)}')
    if classes and {*classes} <= {'train', 'training', 'val', 'valid', 'validation', 'test'}:
        print('warning: the classes have the names of data splits. If they are splits, give one of them as SOURCE.')
    if notes := +notes:  # those above 0
        print('; '.join(f'{what}: {count}' for what, count in notes.items()))
    shown = shown if len(shown) <= 12 else [*shown[:5], '...', *shown[-3:]]
    print(f'{dest}: {n} images {side}x{side}, ' + (
        f'{len(counts)} classes: {", ".join(shown)}' if labels else 'no labels'))


def main(argv=None):
    parser = argparse.ArgumentParser(description='Prepare a dataset for the other scripts.', allow_abbrev=False)
    p = parser.add_subparsers(required=True).add_parser('prepare', help='make a prepared folder')
    p.add_argument('source', help='zip, folder, tarball, or the word cifar10 to fetch it')
    p.add_argument('dest', help='folder to make')
    p.add_argument('--resolution', type=int, help='centre crop to a square and resize (Lanczos) to this side')
    p.add_argument('--no-labels', action='store_true', help='leave the labels out')
    args = parser.parse_args(argv)
    with clear_errors('data.py'):
        prepare(args.source, args.dest, args.resolution, not args.no_labels)


if __name__ == '__main__':
    main()
