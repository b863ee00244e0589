"""DisBack: a one-step generator distilled along the path on which its teacher was degraded.

"Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
S. Zhang et al., ICLR 2025, arXiv:2408.15991 v3. No real image is needed.

Score distillation moves a student G by the difference between the score of what G makes (fake_score, learned
on the fly) and the teacher's score, which is unreliable far from the data, where G begins. DisBack therefore
aims at nearer targets first:
  1. Degradation recording (Alg. 1): fine-tune a copy of the teacher on the samples of the untouched student and
     keep N + 1 nodes on the way: node 0 is the teacher, node N models the student's initial distribution.
  2. Distribution backtracking (Alg. 2): distil from node N-1, then N-2, ..., at last node 0; node N is where
     the fake score starts. `--nodes 0` is plain score distillation (Diff-Instruct, or DMD2 without its GAN).

    paper                    here            paper           here
    G_stu(z; eta)            student         s'_theta_i      target, a node of the path
    s_theta                  teacher         N, i            nodes, node
    s_phi                    fake_score      s = (D_x - x_t) / sigma^2, D_x the networks' output

    python disback.py                                                            # shapes, minutes on a CPU
    python disback.py --dataset cifar10                                          # one GPU, the official EDM teacher
    torchrun --nproc_per_node=8 disback.py --dataset imagenet64 --batch-gpu 64   # eight GPUs

Status: measured on shapes and on CIFAR-10 shrunk to 16 pixels (README). The paper's ImageNet-64 FID, 1.38: not run.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import json
import os
import signal
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import edm_nets
import fid
from edm_nets import atomic_save, mark

# ----------------------------------------------------------------------------------------------------
# Settings. Deviation: the paper's EDM settings (its Appendix B) were not available to us. The rows of real data sets
# are those of the distillers it builds on: batch, lr, sigma_init and EMA from SiD, the law of sigma and equal rates for
# both networks from Diff-Instruct. The path has the form of the paper's SDXL script: degradation takes 1 % of the run,
# a node as much; N = 4 is our choice. `shapes` was measured here, in so short a run that the path takes more of it:
# high noise levels keep all colours alive (with Diff-Instruct's law each class ends up in one colour), and the rate
# falls to zero over the last half for the student alone: the fake score has to follow (with both falling, colours
# drift: tv 0.13 in place of 0.09).

PRESETS = {  # student_sigma and fake_sigma: mean and standard deviation of ln sigma in the two losses
    'shapes':     dict(batch=32,   lr=3e-4, fake_lr=1e-3, fake_updates=2, sigma_init=2.5, student_sigma=(0.1, 1.6),
                       fake_sigma=(-0.2, 1.8), ema_kimg=500,  decay=0.5, degrade_kimg=1,    node_kimg=0.25,
                       kimg=28,      eval_images=2_000,
                       snapshot_kimg=14, status_kimg=0.7),
    'cifar10':    dict(batch=256,  lr=1e-5, fake_lr=1e-5, fake_updates=1, sigma_init=2.5, student_sigma=(-1.2, 1.2),
                       fake_sigma=(-1.2, 1.2), ema_kimg=500,  decay=0.0, degrade_kimg=500,  node_kimg=500,
                       kimg=50_000,  eval_images=10_000,
                       snapshot_kimg=1000, status_kimg=10),
    'ffhq64':     dict(batch=512,  lr=1e-5, fake_lr=1e-5, fake_updates=1, sigma_init=2.5, student_sigma=(-1.2, 1.2),
                       fake_sigma=(-1.2, 1.2), ema_kimg=500,  decay=0.0, degrade_kimg=500,  node_kimg=500,
                       kimg=50_000,  eval_images=10_000,
                       snapshot_kimg=1000, status_kimg=10),
    'afhqv2':     dict(batch=512,  lr=5e-6, fake_lr=5e-6, fake_updates=1, sigma_init=2.5, student_sigma=(-1.2, 1.2),
                       fake_sigma=(-1.2, 1.2), ema_kimg=500,  decay=0.0, degrade_kimg=500,  node_kimg=500,
                       kimg=50_000,  eval_images=10_000,
                       snapshot_kimg=1000, status_kimg=10),
    'imagenet64': dict(batch=8192, lr=4e-6, fake_lr=4e-6, fake_updates=1, sigma_init=2.5, student_sigma=(-1.2, 1.2),
                       fake_sigma=(-1.2, 1.2), ema_kimg=2000, decay=0.0, degrade_kimg=2000, node_kimg=2000,
                       kimg=200_000, eval_images=10_000,
                       snapshot_kimg=4000, status_kimg=50),
}
sigma_data = 0.5
# Deviation: the released scripts have a GAN term on. Here it is off, as Alg. 2 has none: --gan-weight 3e-3 is DMD2's.
DISCRIMINATOR_WEIGHT = 1e-2  # of the discriminator in the fake score's loss: DMD2, ImageNet-64


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    p.add_argument('--dataset', choices=PRESETS, default='shapes', help='row of PRESETS (default: %(default)s)')
    preset = PRESETS[p.parse_known_args(argv)[0].dataset]
    p.add_argument('-h', '--help', action='help')
    p.add_argument('--data', help='prepared folder (default: datasets/DATASET); for scores and --gan-weight only')
    p.add_argument('--teacher', help='path or URL (default: the official EDM network; for shapes, trained here once)')
    p.add_argument('--out', help='run folder (default: runs/disback-DATASET)')
    p.add_argument('--kimg', type=float, default=preset['kimg'], help='thousands of student images (%(default)s)')
    p.add_argument('--batch', type=int, default=preset['batch'], help='images per step over all GPUs (%(default)s)')
    p.add_argument('--batch-gpu', type=int, help='images per GPU at a time (default: its whole share)')
    p.add_argument('--lr', type=float, default=preset['lr'], help='of the student (%(default)s)')
    p.add_argument('--fake-lr', type=float, default=preset['fake_lr'], help='of the fake score (%(default)s)')
    p.add_argument('--fake-updates', type=int, default=preset['fake_updates'], help='per student step (%(default)s)')
    p.add_argument('--sigma-init', type=float, default=preset['sigma_init'], help='of the one step (%(default)s)')
    for flag in ('student_sigma', 'fake_sigma'):
        p.add_argument('--' + flag.replace('_', '-'), type=float, nargs=2, metavar=('MEAN', 'STD'),
                       default=preset[flag], help='of ln sigma in its loss (%(default)s)')
    p.add_argument('--loss', choices=['di', 'dmd'], default='di', help="Diff-Instruct's or DMD's (%(default)s)")
    p.add_argument('--nodes', type=int, default=4, help='N; 0: plain score distillation (%(default)s)')
    p.add_argument('--degrade-kimg', type=float, default=preset['degrade_kimg'], help='first stage (%(default)s)')
    p.add_argument('--node-kimg', type=float, default=preset['node_kimg'], help='student images per node (%(default)s)')
    p.add_argument('--gan-weight', type=float, default=0, help="DMD2's GAN term, 3e-3 there; needs data (%(default)s)")
    p.add_argument('--seed', type=int, default=0, help='of all random numbers (%(default)s)')
    p.add_argument('--precision', choices=['bf16', 'fp32'], help='default: bf16 on a GPU, fp32 on a CPU')
    p.add_argument('--compile', action='store_true', help='torch.compile the networks')
    p.add_argument('--profile', type=int, nargs='?', const=16, metavar='STEPS', help='time a few steps, part by part; '
                   'no run (16 steps)')
    p.add_argument('--restart', action='store_true', help='start over; the old run folder is renamed, not deleted')
    p.add_argument('--snapshot-kimg', type=float, default=preset['snapshot_kimg'], help='files, scores (%(default)s)')
    p.add_argument('--status-kimg', type=float, default=preset['status_kimg'], help='status lines (%(default)s)')
    p.add_argument('--eval-images', type=int, default=preset['eval_images'], help='per scoring; 0: none (%(default)s)')
    p.add_argument('--features', choices=['inception', 'pixels'], help='default: pixels for shapes, else inception')
    args = p.parse_args(argv)
    check_numbers(p, args, positive='kimg batch batch_gpu lr fake_lr fake_updates sigma_init degrade_kimg node_kimg '
                  'snapshot_kimg status_kimg profile', not_negative='seed nodes gan_weight eval_images')
    if args.profile:
        args.nodes = 0  # no first stage, and the same step
    if args.nodes > 1000 or 0 < args.eval_images < 10:
        p.error('--nodes must be at most 1000, --eval-images 0 or at least 10')
    if args.dataset == 'shapes' and args.data:
        p.error('--data: shapes is drawn on the fly; name the --dataset that the folder stands for')
    args.features = args.features or ('pixels' if args.dataset == 'shapes' else 'inception')
    args.out = args.out or f'runs/disback-{args.dataset}'
    return args

# ----------------------------------------------------------------------------------------------------
# The method. Images and noise are float32 [N, C, H, W], sigma is [N, 1, 1, 1], x_t = x_0 + sigma eps.


def draw_latents(shape, classes, generator):
    """Latents z, standard normal float32 of `shape` [N, C, R, R]; labels, uniform as in DMD2, one-hot [N, classes]."""
    kwargs = dict(generator=generator, device=generator.device)
    return torch.randn(shape, **kwargs), F.one_hot(torch.randint(classes, [shape[0]], **kwargs), classes)


def draw_noise(shape, generator, P_mean, P_std):
    """Noise levels, ln sigma ~ N(P_mean, P_std^2), float32 [N, 1, 1, 1]; standard normal eps, float32 of `shape`."""
    kwargs = dict(generator=generator, device=generator.device)
    sigma = (P_mean + P_std * torch.randn([shape[0], 1, 1, 1], **kwargs)).exp()
    return sigma, torch.randn(shape, **kwargs)


def denoising_error(D_x, x_0, sigma):
    """Denoising score matching (Eq. 5 for the fake score, Eq. 7 for degradation) with EDM's weight -> [N].

    s - (x_0 - x_t) / sigma^2 = (D_x - x_0) / sigma^2, so matching the score is denoising, up to the weight.
    """
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2  # EDM Table 1, lambda(sigma)
    return (weight * (D_x - x_0) ** 2).sum([1, 2, 3])


def student_loss(x_0, D_fake, D_target, form):
    """Score distillation (Eq. 8) -> scalar, whose gradient with respect to x_0 [N, C, H, W] is Eq. 8's, weighted.

    s_fake - s_target = (D_fake - D_target) / sigma^2. The released Eq. 8 shows no weight w(sigma); it is sigma^2 in
    Diff-Instruct (form 'di'); DMD divides also by each image's mean |x_0 - D_target| ('dmd').
    The value is no measure of progress: only its gradient means something.
    Deviation: the released code masks NaN in the gradient (nan_to_num); here a loss that is not finite stops the run.
    """
    gradient = D_fake - D_target
    if form == 'dmd':
        gradient = gradient / (x_0 - D_target).abs().mean([1, 2, 3], keepdim=True)
    return (gradient.detach() * x_0).sum([1, 2, 3]).mean()


def recording_steps(steps, nodes):
    """The degradation steps (1, 2, ..., `steps`) after which nodes 1 ... N are recorded, the last one at the end."""
    return [round(steps * i / nodes) for i in range(1, nodes + 1)]


def node_at(nimg, nodes, node_kimg):
    """The target after `nimg` student images: node N-1, one less every node_kimg, node 0 (the teacher) to the end.

    Deviation: the released loop advances once and never again; its pseudocode (`idx // interval == 0`) at every step
    of the first interval, then never.
    """
    return max(nodes - 1 - int(nimg // (node_kimg * 1000)), 0)


class Discriminator(nn.Module):
    """DMD2's GAN head on the fake score's bottleneck: [N, C, h, w] -> logits [N].

    Deviation: DMD2 shrinks 8x8 to 1x1 by a second 4x4 convolution; the mean over pixels fits any bottleneck.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(min(32, channels // 4), channels)
        self.out = nn.Linear(channels, 1)

    def forward(self, h):
        return self.out(F.silu(self.norm(self.conv(h))).mean([2, 3])).squeeze(1)

# ----------------------------------------------------------------------------------------------------
# Small helpers, the same text in edm_nets.py and in every method script.


def setup():
    """Join torchrun's process group, or be a world of one. Returns (rank, world_size, device)."""
    if 'RANK' not in os.environ:
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')
    device = torch.device('cpu')
    if torch.cuda.is_available():
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed comes from bf16
    if not dist.is_initialized():
        hour = datetime.timedelta(hours=1)  # rank 0 may be fetching a dataset
        if device.type == 'cuda':
            dist.init_process_group('nccl', timeout=hour, device_id=device)
        else:
            dist.init_process_group('gloo', timeout=hour)
    return dist.get_rank(), dist.get_world_size(), device


def rank_slices(batch, batch_gpu):
    """This rank's rows of the global batch: one slice for each round of gradient accumulation. Raises ValueError."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = batch // world_size
    size = batch_gpu or share
    if batch < 1 or batch % world_size or size < 1 or share % size:
        raise ValueError(f'--batch {batch} is not a multiple of {world_size} process(es) x --batch-gpu {size}')
    return [slice(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]


def sync_last(i, rounds, *ddps):
    """Context of round `i` of gradient accumulation: ranks average their gradients in the last round only."""
    stack = contextlib.ExitStack()
    for ddp in ddps if i < len(rounds) - 1 else []:
        stack.enter_context(ddp.no_sync())
    return stack


def make_autocast(precision, device):
    """The autocast of the networks, to be called for a context: bf16 (no gradient scaling needed), or off for fp32."""
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == 'bf16')


def check_numbers(parser, args, positive, not_negative):
    """Exit with a usage error unless every number is finite and fits in 64 bits, and the named ones are as they say."""
    for name, value in vars(args).items():
        above, least = name in positive.split(), name in not_negative.split()
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(x, (int, float)) and (not abs(x) < 1e18 or above and x <= 0 or least and x < 0) \
                    and not (x == float('inf') and name in ('kimg', 'snapshot_kimg', 'status_kimg')):
                bound = 'above 0' if above else 'of at least 0' if least else 'above -1e18'
                parser.error(f'--{name.replace("_", "-")} {x}: expected a number {bound} and below 1e18')


def print0(*args):
    """Print from rank 0 only, at once."""
    if dist.get_rank() == 0:
        print(*args, flush=True)


def is_due(nimg, batch, kimg):
    """Whether a step of `batch` images that ended at `nimg` crossed a multiple of `kimg`. True at nimg = 0."""
    return nimg // (kimg * 1000) != (nimg - batch) // (kimg * 1000)


def update_ema(ema, net, nimg, batch, ema_kimg):
    """EDM's moving average: half-life `ema_kimg`, or 5 % of the images seen so far if that is less."""
    beta = 0.5 ** (batch / max(min(ema_kimg * 1000, nimg * 0.05), 1e-8))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


class Means:
    """Means of named scalars since the last status line; tensors until then, so that no step waits for the device."""

    def __init__(self):
        self.added = []  # (name, scalar tensor), in order

    def add(self, **scalars):
        self.added += [(name, value.detach()) for name, value in scalars.items()]

    def collect(self):
        """Averages over steps and ranks: {name: float}. Raises FloatingPointError naming what was first not finite."""
        means = {}
        for name in dict.fromkeys(name for name, _ in self.added):
            mean = torch.stack([value for other, value in self.added if other == name]).double().mean()
            dist.all_reduce(mean)
            means[name] = float(mean) / dist.get_world_size()
        if not np.isfinite(list(means.values())).all():
            first = [i for i, (_, value) in enumerate(self.added) if not value.isfinite()] or [len(self.added) - 1]
            first = mean.new_tensor(first[0])  # on one rank perhaps, but all stop alike
            dist.all_reduce(first, dist.ReduceOp.MIN)
            raise FloatingPointError(
                f'{self.added[int(first)][0]} is not finite: training has diverged; latest.pt is from before')
        self.added.clear()
        return means


def check_finite(parts):
    """Raise FloatingPointError, on all ranks alike, if a weight of the networks in {name: part} is not finite."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
            raise FloatingPointError(
                f'a weight of {name} is not finite: training has diverged; latest.pt is from before')


class Stop:
    """SIGTERM or Ctrl-C ends the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""
    patience = datetime.timedelta(minutes=10)  # with a rank that does not come

    def __init__(self):
        self.asked = False
        self.hosts = dist.new_group(backend='gloo') if dist.get_world_size() > 1 else None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self):
        """Whether any rank was asked to. Collective, among the hosts: no device is waited for.

        Raises ConnectionError, naming the rank, where one does not come here. That is where GPUs make the others wait
        for a rank that hangs; between CPUs it is the step itself, in an all_reduce that names nobody.
        """
        if self.hosts is None:
            return self.asked
        asked = torch.tensor([float(self.asked)])
        try:
            dist.monitored_barrier(self.hosts, self.patience)
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.hosts)
        except RuntimeError as error:
            raise ConnectionError(f'a rank is lost: {str(error).splitlines()[0]}') from None
        return bool(asked)

    def over(self, out, kimg):
        """The loop has ended: signals mean again what they did. If one had come, exit with status 0."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self():
            print0(f'{out}: stopped at {kimg:g} kimg; the same command goes on from there')
            sys.exit(0)


def save_checkpoint(out, state):
    """Write latest.pt, keeping the one before it as previous.pt. Whenever killed, one of them is whole."""
    atomic_save(state, f'{out}/next.pt')
    if os.path.exists(f'{out}/latest.pt'):
        os.replace(f'{out}/latest.pt', f'{out}/previous.pt')
    os.replace(f'{out}/next.pt', f'{out}/latest.pt')


def agree(what, mine):
    """Raise ValueError, on all ranks, naming the first rank where the dict `mine` is not that of rank 0. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        keys = sorted(everyone[0] | theirs)
        differ = [f'{k}: {everyone[0].get(k)} -> {theirs.get(k)}' for k in keys if everyone[0].get(k) != theirs.get(k)]
        if differ:
            raise ValueError(f'rank {rank} has other {what} than rank 0 ({", ".join(differ)})')


def open_run(args):
    """Make the run folder. --restart: rename the old one to OUT-before-1, -2, ...; nothing is deleted. Collective.

    Raises ValueError, on all ranks, where one was started with other arguments than rank 0.
    """
    agree('arguments', vars(args))
    if dist.get_rank() == 0:
        if args.restart and os.path.exists(args.out):
            number = next(i for i in range(1, 1000) if not os.path.exists(f'{args.out}-before-{i}'))
            os.rename(args.out, f'{args.out}-before-{number}')
            print(f'{args.out} was renamed to {args.out}-before-{number}', flush=True)
        os.makedirs(args.out, exist_ok=True)
    dist.barrier()  # guards the folder


def load_checkpoint(out, config):
    """The newest whole checkpoint of this run, or None. A damaged one is reported and set aside. Collective.

    Raises ValueError with the differences when the folder holds a run of another config.
    """
    paths, state = [f'{out}/latest.pt', f'{out}/previous.pt'], None
    if dist.get_rank() > 0:
        dist.barrier()  # rank 0 looks first
    for path in filter(os.path.exists, paths):
        try:
            with zipfile.ZipFile(path) as file:
                if dist.get_rank() == 0 and file.testzip():  # compares the checksum of every tensor
                    raise zipfile.BadZipFile('wrong checksum')
            content = torch.load(path, map_location='cpu', weights_only=True)
            old, state = dict(content['config']), content
            break
        except Exception as error:  # whatever a damaged file can provoke; reported, and the file is kept
            unread = isinstance(error, (MemoryError, PermissionError)) or 'allocate memory' in str(error)
            if dist.get_rank() > 0 or unread:
                raise
            reason = str(error).split('\n')[0]
            print(f'{path} is damaged ({reason}): set aside as {path}.damaged', flush=True)
            os.replace(path, f'{path}.damaged')
    if dist.get_rank() == 0:
        dist.barrier()  # guards the checkpoints
    agree('checkpoint', {k: v for k, v in (state or {}).items() if isinstance(v, int)})
    if state is None and any(os.path.exists(f'{path}.damaged') for path in paths):
        raise ValueError(f'no whole checkpoint is left in {out}: --restart starts over')
    changed = [f'{k}: {old.get(k)} -> {config.get(k)}' for k in sorted(old | config)
               if old.get(k) != config.get(k)] if state else []
    if changed:
        raise ValueError(f'{out} holds another run ({", ".join(changed)}): give another --out, or --restart')
    return state


def start_log(out, log_bytes, args, *optimizers):
    """Write config.json, and cut stats.jsonl back to the checkpoint: what came later is about to be done again."""
    versions = dict(torch=torch.__version__, numpy=np.__version__, world_size=dist.get_world_size(),
                    device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')
    with open(f'{out}/config.json', 'w') as f:
        trained = sum(p.numel() for o in optimizers for group in o.param_groups for p in group['params']
                      if p.requires_grad)
        json.dump(dict(vars(args), versions=versions, command=sys.argv, trained_parameters=trained), f, indent=1)
    with open(f'{out}/stats.jsonl', 'ab') as f:
        f.truncate(min(log_bytes, f.tell()))


def log_status(out, stats, nimg, total, seconds, images):
    """One line to the terminal and one object to stats.jsonl. `seconds` for the last `images`."""
    speed = seconds / images if images else 0
    stats = dict(kimg=nimg / 1000, sec_per_kimg=round(speed * 1000, 4), seconds=round(seconds, 2), **stats)
    if torch.cuda.is_available():
        stats['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30  # of this rank
    left = speed * max(total - nimg, 0)
    print0(f'kimg {nimg / 1000:<9.2f} {min(nimg / total, 1):4.0%}  ' + '  '.join(
        f'{k} {v:<.5g}' for k, v in stats.items() if k not in ('kimg', 'seconds')) + f'  left {left / 60:.1f} min')
    if dist.get_rank() == 0:
        with open(f'{out}/stats.jsonl', 'a') as f:
            f.write(json.dumps(stats) + '\n')

# ----------------------------------------------------------------------------------------------------
# Training.


def load_node(net, out, node):
    """Load node `node` of the recorded path into `net`, in place and strictly. A missing key is an error.

    Deviation: the released script loads a whole guidance model with strict=False, of which no key matches: its target
    stays the teacher.
    """
    net.load_state_dict(edm_nets.load(f'{out}/path-{node:02d}.pt').state_dict(), strict=True)


def train(args):
    """Both stages, from wherever the run folder stands to --kimg. Returns False if there was nothing left to do."""
    preset = PRESETS[args.dataset]

    # Initialize. Every random number of the training comes from data.step_generator and batch_order.
    rank, world_size, device = setup()
    rounds = rank_slices(args.batch, args.batch_gpu)
    args.precision = args.precision or ('bf16' if device.type == 'cuda' else 'fp32')
    autocast = make_autocast(args.precision, device)
    open_run(args)
    if args.teacher is None:
        args.teacher = edm_nets.shapes_teacher() if args.dataset == 'shapes' else edm_nets.TEACHERS[args.dataset]

    # Resume? `degraded` counts the images of the first stage, `nimg` those shown to the student.
    config = {k: v for k, v in vars(args).items() if k in (
        'dataset', 'teacher', 'batch', 'lr', 'fake_lr', 'fake_updates', 'sigma_init', 'student_sigma', 'fake_sigma',
        'loss', 'data', 'features', 'nodes', 'degrade_kimg', 'node_kimg', 'gan_weight', 'seed', 'precision')}
    if preset['decay']:
        config['kimg'] = args.kimg  # the rate depends on it
    config = json.loads(json.dumps(config))  # lists for tuples, as they will be read back
    state, total = load_checkpoint(args.out, config), args.kimg * 1000
    if state and state['nimg'] >= total:
        print0(f'{args.out} is complete at {state["nimg"] / 1000:g} kimg, nothing to do')
        return False

    # Teacher. Data only where it is used: the method itself needs none.
    teacher = edm_nets.open_teacher(args.teacher, state).to(device, memory_format=torch.channels_last)
    if teacher.sigma_init is not None:
        raise ValueError(f'{args.teacher} was trained at sigma {teacher.sigma_init:g} alone: it has no score elsewhere')
    dataset = ruler = None
    if args.gan_weight or args.eval_images:
        dataset = edm_nets.open_data(args.dataset, args.data)
        if dataset.resolution != teacher.img_resolution:
            raise ValueError(f'{args.teacher} makes images of {teacher.img_resolution} px, not {dataset.resolution}')
        if args.gan_weight and teacher.label_dim and not 0 < dataset.label_dim <= teacher.label_dim:
            raise ValueError(f'{args.teacher} knows {teacher.label_dim} classes, the data has {dataset.label_dim}')
    if args.eval_images:
        ruler = fid.Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')

    # Networks. All stay in eval mode: no dropout, as in DMD2 (Deviation: Diff-Instruct keeps it). The fake score is at
    # first the copy that is degraded, then node N, as Alg. 2 has it (Deviation: the released code starts from DMD2's
    # weights); without nodes it is the teacher. The target's weights are swapped in place.
    student, fake_score, target = (copy.deepcopy(teacher) for _ in range(3))
    student.sigma_init = args.sigma_init
    ema = copy.deepcopy(student)
    discriminator = None
    if args.gan_weight:
        h = teacher(torch.zeros([1, 3, dataset.resolution, dataset.resolution], device=device), 1., bottleneck=True)[1]
        torch.manual_seed(args.seed)
        discriminator = Discriminator(h.shape[1]).to(device)
    for net in (student, fake_score):
        net.requires_grad_(True)
        if net.model.map_augment is not None:
            net.model.map_augment.requires_grad_(False)  # no augmentation here: its gradient would be zero
    if args.compile:
        edm_nets.compile_networks(student, fake_score, target)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_fake = wrap(student), wrap(fake_score)
    ddp_discriminator = discriminator and wrap(discriminator)
    print0(f'disback: {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters in each of student, '
           f'fake score, target and teacher; {args.nodes} nodes; {world_size} process(es), {device}')

    # Optimizers.
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True)  # Diff-Instruct and SiD
    student_optimizer = adam(student.parameters(), lr=args.lr)
    fake_parameters = [p for net in (fake_score, discriminator) if net for p in net.parameters() if p.requires_grad]
    fake_optimizer = adam(fake_parameters, lr=args.fake_lr)

    # The path, and where the run stands. `evolving`, the two counts and the length of the log are the whole state: the
    # random numbers of a step are a function of the counts.
    steps = max(round(args.degrade_kimg * 1000 / args.batch), args.nodes) if args.nodes else 0
    recordings = {step * args.batch: i + 1 for i, step in enumerate(recording_steps(steps, args.nodes))}
    degrade_total, degraded, nimg, node = steps * args.batch, 0, 0, None
    resumed = 0 if args.profile else None  # a profile begins with no snapshot
    evolving = dict(student=student, ema=ema, fake_score=fake_score, student_optimizer=student_optimizer,
                    fake_optimizer=fake_optimizer, **(dict(discriminator=discriminator) if discriminator else {}))
    if state:
        degraded, nimg, resumed = state['degraded'], state['nimg'], state['degraded'] + state['nimg']
        for name, part in evolving.items():
            part.load_state_dict(state[name])
        print0(f'resuming {args.out} at {nimg / 1000:g} kimg, after {degraded / 1000:g} kimg of degradation')
    elif rank == 0:
        # Node 0 is the untouched teacher. Deviation: the released code never stores it, so its path ends before.
        edm_nets.save(f'{args.out}/path-00.pt', teacher, args.dataset, 0)
    if rank == 0:
        start_log(args.out, state['log_bytes'] if state else 0, args, student_optimizer, fake_optimizer)
        if os.path.exists(f'{args.out}/summary.png'):
            os.remove(f'{args.out}/summary.png')  # of a shorter run
    del state
    dist.barrier()  # guards path-00.pt
    if args.nodes and (args.nodes - 1) * args.node_kimg >= args.kimg:
        print0('warning: --kimg ends before the last target, the teacher: give fewer --nodes or a smaller --node-kimg')

    shape = [args.batch, teacher.img_channels, teacher.img_resolution, teacher.img_resolution]  # of the global batch
    classes = max(teacher.label_dim, 1)  # an unconditional network ignores its one label
    stop = Stop()
    means, tick_time, tick_seen = Means(), time.time(), degraded + nimg
    while True:
        # The target of the moment.
        seen, degrading, done = degraded + nimg, degraded < degrade_total, nimg >= total  # seen: in both stages
        aim = 0 if degrading else node_at(nimg, args.nodes, args.node_kimg)
        if node != aim:
            load_node(target, args.out, aim)
            node = aim

        # Status line, snapshot, checkpoint, done?
        count = degraded if degrading else nimg
        snapshot = done or is_due(count, args.batch, args.snapshot_kimg)
        stopping = stop()
        if seen != resumed and (snapshot or stopping or is_due(count, args.batch, args.status_kimg)):
            generator = data.step_generator(args.seed, seen, 2, device)
            z, labels, sigma, eps = (part[rounds[0]] for part in (
                *draw_latents(shape, classes, generator), *draw_noise(shape, generator, *args.fake_sigma)))
            with torch.no_grad(), autocast():
                x_0 = edm_nets.one_step(student, z, labels, args.sigma_init)
                # Mismatch (our definition, the paper's is not known): how much worse a target denoises the student's
                # samples than the fake score, their own model.
                fake_error, *errors = (
                    denoising_error(net(x_0 + sigma * eps, sigma, labels), x_0, sigma).mean()
                    for net in (fake_score, target, teacher))
                means.add(**{name: error - fake_error for name, error in zip(('mismatch', 'mismatch_teacher'), errors)})
            stats, seconds = dict(node=node, degrade_kimg=degraded / 1000, **means.collect()), time.time() - tick_time
            if snapshot or stopping:
                check_finite(evolving)
            if snapshot and ruler and (seen == 0 or nimg > 0):
                stats |= ruler.score(lambda seeds: edm_nets.generate(ema, seeds), args.eval_images)
            log_status(args.out, stats, nimg, total, seconds, seen - tick_seen)
            if snapshot and rank == 0:
                data.save_grid(edm_nets.generate(ema, range(64)), f'{args.out}/grid-{nimg // 1000:06d}.png', scale=2)
                if nimg:
                    edm_nets.save(f'{args.out}/student-{nimg // 1000:06d}.pt', ema, args.dataset, nimg)
            if (snapshot or stopping) and rank == 0:
                save_checkpoint(args.out, dict(
                    {name: part.state_dict() for name, part in evolving.items()}, config=config, degraded=degraded,
                    teacher=teacher.checksum, nimg=nimg, log_bytes=os.path.getsize(f'{args.out}/stats.jsonl')))
            tick_time, tick_seen = time.time(), seen
        if done or stopping:
            break

        # Random numbers of this step, for the global batch; this rank takes its rows.
        mark('random numbers', first=True)
        generator = data.step_generator(args.seed, degraded if degrading else nimg, int(degrading), device)
        z, labels = draw_latents(shape, classes, generator)
        sigma, eps = draw_noise(shape, generator, *args.student_sigma)
        samples = []  # x_0 of each round
        fall = min((1 - nimg / total) / preset['decay'], 1) if preset['decay'] else 1
        student_optimizer.param_groups[0]['lr'] = args.lr * fall  # the fake score's stays: it has to follow

        # The student's gradient (Alg. 2, Eq. 8), descended: D_fake - D_target. While degrading the student rests.
        for p in fake_parameters:
            p.requires_grad_(False)  # with --gan-weight, the gradient passes through to x_t
        for i, rows in enumerate(rounds if not degrading else []):
            with sync_last(i, rounds, ddp_student):
                mark('student, forward')
                with autocast():
                    x_0 = edm_nets.one_step(ddp_student, z[rows], labels[rows], args.sigma_init)
                mark('scores')
                x_t = x_0 + sigma[rows] * eps[rows]
                with torch.set_grad_enabled(bool(discriminator)), autocast():  # not DDP's: its weights get no gradient
                    D_fake, h = fake_score(x_t, sigma[rows], labels[rows], bottleneck=True)
                D_fake = D_fake.detach()
                with torch.no_grad(), autocast():
                    D_target = target(x_t, sigma[rows], labels[rows])
                loss = student_loss(x_0, D_fake, D_target, args.loss)
                if discriminator:
                    with autocast():
                        logits = discriminator(h)
                    gan_loss = F.softplus(-logits.float()).mean()
                    loss = loss + args.gan_weight * x_0[0].numel() * gan_loss  # DMD2's other term is a mean over pixels
                    means.add(gan_loss=gan_loss)
                mark('student, backward')
                (loss / len(rounds)).backward()
            means.add(student_loss=loss, difference=(D_fake - D_target).abs().mean())
            samples.append(x_0.detach())
        for p in fake_parameters:
            p.requires_grad_(True)
        if not degrading:
            mark('optimizers')
            student_optimizer.step()
            student_optimizer.zero_grad(set_to_none=True)
            mark('moving average')
            update_ema(ema, student, nimg, args.batch, preset['ema_kimg'])

        # Update the fake score (Eq. 5) on the same samples; Deviation: --fake-updates above 1 draw fresh ones for the
        # rest, as in DMD2. While degrading (Eq. 7), on samples of the untouched student.
        for update in range(1 if degrading else args.fake_updates):
            mark('random numbers')
            if update:
                z, labels = draw_latents(shape, classes, generator)
            if update or degrading:
                mark('fresh samples, forward')
                with torch.no_grad(), autocast():
                    samples = [edm_nets.one_step(student, z[rows], labels[rows], args.sigma_init) for rows in rounds]
            mark('random numbers')
            sigma, eps = draw_noise(shape, generator, *args.fake_sigma)
            for i, (rows, x_0) in enumerate(zip(rounds, samples)):
                with sync_last(i, rounds, ddp_fake, *([ddp_discriminator] if discriminator and not degrading else [])):
                    mark('fake score, forward')
                    x_t = x_0 + sigma[rows] * eps[rows]
                    if degrading or not discriminator:  # the path is recorded without a GAN
                        with autocast():
                            D_x = ddp_fake(x_t, sigma[rows], labels[rows])
                        loss = fake_loss = denoising_error(D_x, x_0, sigma[rows]).mean()
                    else:  # one forward for the fakes and, at the same noise, as many real images
                        first = seen * args.fake_updates + update * args.batch
                        indices, _ = data.batch_order(args.seed, first, args.batch, len(dataset))
                        real = data.to_float(data.to_device(dataset.images(indices[rows]), device))
                        real_labels = labels[rows] if not teacher.label_dim else \
                            F.one_hot(data.to_device(dataset.labels(indices[rows]), device), labels.shape[1])
                        with autocast():
                            D_x, h = ddp_fake(
                                torch.cat([x_t, real + sigma[rows] * eps[rows]]), sigma[rows].repeat(2, 1, 1, 1),
                                torch.cat([labels[rows], real_labels]), bottleneck=True)
                            fake_logits, real_logits = ddp_discriminator(h).float().chunk(2)
                        fake_loss = denoising_error(D_x[:len(x_0)], x_0, sigma[rows]).mean()
                        discriminator_loss = (F.softplus(fake_logits) + F.softplus(-real_logits)).mean()
                        loss = fake_loss + DISCRIMINATOR_WEIGHT * x_0[0].numel() * discriminator_loss
                        means.add(discriminator_loss=discriminator_loss)
                    mark('fake score, backward')
                    (loss / len(rounds)).backward()
                means.add(fake_loss=fake_loss)
            mark('optimizers')
            fake_optimizer.step()
            fake_optimizer.zero_grad(set_to_none=True)

        # Count, and record a node where one is due; after the last, backtracking starts with a fresh optimizer.
        if not degrading:
            nimg += args.batch
            continue
        degraded += args.batch
        if degraded in recordings:
            check_finite(dict(fake_score=fake_score))
            if rank == 0:
                edm_nets.save(f'{args.out}/path-{recordings[degraded]:02d}.pt', fake_score, args.dataset, degraded)
            dist.barrier()  # guards the node's file
        if degraded == degrade_total:
            fake_optimizer = evolving['fake_optimizer'] = adam(fake_parameters, lr=args.fake_lr)
    dist.barrier()  # guards the last files
    stop.over(args.out, nimg / 1000)
    return True


def summarize(args):
    """summary.png (data, teacher, student before and after) and, with scores, a table, also in summary.txt."""
    _, _, device = setup()
    teacher = edm_nets.load(args.teacher).to(device)
    before = edm_nets.load(args.teacher).to(device)
    before.sigma_init = args.sigma_init
    after = edm_nets.load(edm_nets.newest(args.out, 'student')).to(device)
    dataset, rows, seeds = data.Shapes(), {}, np.arange(36)
    if args.eval_images:
        ruler = fid.Ruler(dataset, args.features, device)
        # Two draws of data differ too: the first row is the least that so few images can reach.
        rows['data, other images'] = ruler.score(data.Shapes(args.eval_images, seed=1).images, args.eval_images)
        rows['teacher, 18 steps'] = ruler.score(lambda i: edm_nets.generate(teacher, i, 18), args.eval_images)
        rows['student before'], rows['student after'] = fid.read_scores(args.out)
        if args.nodes:
            rows['the same without nodes'] = fid.read_scores(f'{args.out}-nodes0')[1]
        fid.report(rows, f'{args.out}/summary.txt')
    if dist.get_rank() == 0:
        data.save_panels({
            'data': dataset.images(seeds), 'teacher, 18 steps': edm_nets.generate(teacher, seeds, 18),
            'student before, 1 step': edm_nets.generate(before, seeds),
            'student after, 1 step': edm_nets.generate(after, seeds)}, f'{args.out}/summary.png', columns=18, scale=3)
        print(f'{args.out}/summary.png: data, teacher, student before, student after', flush=True)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.profile:
            edm_nets.profile(train, args)
            return
        trained = train(args)
        if args.dataset == 'shapes' and (trained or not os.path.exists(f'{args.out}/summary.png')):
            if args.nodes and args.eval_images:  # the same number of images without backtracking, for the table
                train(argparse.Namespace(**dict(vars(args), nodes=0, out=f'{args.out}-nodes0')))
            summarize(args)
    except Exception as error:  # told in one line where it is not the code's fault, else raised
        if line := edm_nets.one_line(error):
            sys.exit(f'disback.py: {line}')
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
