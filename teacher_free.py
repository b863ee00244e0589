"""Teacher-free one-step training: the student follows the gradient of a learned density ratio, at every noise level.

"Towards Training One-Step Diffusion Models Without Distillation" (arXiv:2502.08005 v3), from v4 on "DiffRatio: Training
One-Step Diffusion Models Without Teacher Supervision", M. Zhang, W. Chen, J. He et al. Real images are needed; the
teacher's score is never evaluated: the teacher gives its weights, as a start, and is gone.

Score distillation moves a student G by the difference of two learned scores, each with its own error. Here one
classifier, told the noise level, learns the log density ratio whose gradient is that difference:
  1. Ratio (--ratio-updates times): balanced cross-entropy on its logit l, of real and generated images at equal noise.
     At its optimum l(x_t, sigma) = log p_data(x_t) / p_student(x_t).
  2. Student: with r = e^l, every f-divergence D_f = E_student[f(r)] of the noised distributions has the gradient
     E[ -h(r) grad l(x_t) dx_t/dtheta ], h(r) = r^2 f''(r). `js` is the paper's DiJS, `rkl` its DiKL.

    paper                    here                 paper            here
    G_theta(z)               student              x_t              x_0 + sigma eps
    p_d                      data (real)          c = 1/(1+e^-l)   the classifier, label 1: data
    log r                    log_ratio, l         w(t), p(t)       --weight, --student-sigma

    python teacher_free.py                                             # shapes, minutes on a CPU, nothing downloaded
    python teacher_free.py --dataset cifar10                           # one GPU, starts from the official EDM weights
    torchrun --nproc_per_node=8 teacher_free.py --dataset imagenet64 --batch-gpu 32  # eight GPUs
    python teacher_free.py --best-of 1 2 4 8                           # the ratio as a verifier of K candidates

Status: measured on shapes and on CIFAR-10 shrunk to 16 pixels (README). The paper's one-step FIDs: not run.
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
# Settings. Deviation: the paper's own (its appendix) were not available to us: sigma_init, w, the law of sigma, rates
# and batches are donors'. Rows of real data sets: batch, lr, sigma_init, EMA and the first 100 kimg without the student
# from SiD and SiDA (more of them for imagenet64's batch); the ratio learns at four to five times the student's rate, as
# in Score-of-Mixture Training; Diff-Instruct's law of sigma, a little wider for the ratio, so that the student never
# asks where it was not taught. None of them was run.
# `shapes` was measured here by pixel-FD, one seed each, in runs of 12 to 16 kimg with --ratio-init teacher (the default
# came later). What limits is how well grad l is learned, so the ratio is given two updates and the student four draws
# of noise per sample, the best at equal time; twice the student's rate, 5e-4 for the ratio, and ln sigma around -0.4
# were worse.

PRESETS = {  # student_sigma and ratio_sigma: mean and standard deviation of ln sigma in the two losses
    'shapes':     dict(batch=32,   lr=1e-4, ratio_lr=3e-4, ratio_updates=2, draws=4, sigma_init=2.5,
                       student_sigma=(0.1, 1.6),  ratio_sigma=(0.1, 1.6),  ema_kimg=500,  decay=0.5, warmup_kimg=6,
                       xflip=False, kimg=28, eval_images=2_000, snapshot_kimg=14, status_kimg=1),
    'cifar10':    dict(batch=256,  lr=1e-5, ratio_lr=5e-5, ratio_updates=1, draws=1, sigma_init=2.5,
                       student_sigma=(-1.2, 1.2), ratio_sigma=(-1.2, 1.4), ema_kimg=500,  decay=0.0, warmup_kimg=100,
                       xflip=True,  kimg=50_000, eval_images=10_000, snapshot_kimg=1000, status_kimg=10),
    'ffhq64':     dict(batch=512,  lr=1e-5, ratio_lr=5e-5, ratio_updates=1, draws=1, sigma_init=2.5,
                       student_sigma=(-1.2, 1.2), ratio_sigma=(-1.2, 1.4), ema_kimg=500,  decay=0.0, warmup_kimg=100,
                       xflip=True,  kimg=50_000, eval_images=10_000, snapshot_kimg=1000, status_kimg=10),
    'afhqv2':     dict(batch=512,  lr=5e-6, ratio_lr=2e-5, ratio_updates=1, draws=1, sigma_init=2.5,
                       student_sigma=(-1.2, 1.2), ratio_sigma=(-1.2, 1.4), ema_kimg=500,  decay=0.0, warmup_kimg=100,
                       xflip=True,  kimg=50_000, eval_images=10_000, snapshot_kimg=1000, status_kimg=10),
    'imagenet64': dict(batch=8192, lr=4e-6, ratio_lr=2e-5, ratio_updates=1, draws=1, sigma_init=2.5,
                       student_sigma=(-1.2, 1.2), ratio_sigma=(-1.2, 1.4), ema_kimg=2000, decay=0.0, warmup_kimg=1000,
                       xflip=False, kimg=200_000, eval_images=10_000, snapshot_kimg=4000, status_kimg=50),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    p.add_argument('--dataset', choices=PRESETS, default='shapes', help='row of PRESETS (default: %(default)s)')
    preset = PRESETS[p.parse_known_args(argv)[0].dataset]
    p.add_argument('-h', '--help', action='help')
    p.add_argument('--data', help='prepared folder (default: datasets/DATASET)')
    p.add_argument('--teacher', help='path or URL (default: the official EDM network; for shapes, trained here once)')
    p.add_argument('--out', help='run folder (default: runs/teacher_free-DATASET)')
    p.add_argument('--kimg', type=float, default=preset['kimg'], help='thousands of student images (%(default)s)')
    p.add_argument('--batch', type=int, default=preset['batch'], help='images per step over all GPUs (%(default)s)')
    p.add_argument('--batch-gpu', type=int, help='generated images per GPU at a time (default: its share)')
    p.add_argument('--lr', type=float, default=preset['lr'], help='of the student (%(default)s)')
    p.add_argument('--ratio-lr', type=float, default=preset['ratio_lr'], help='of the ratio network (%(default)s)')
    p.add_argument('--ratio-updates', type=int, default=preset['ratio_updates'], help='per student step (%(default)s)')
    p.add_argument('--draws', type=int, default=preset['draws'], help='of noise per student sample (%(default)s)')
    p.add_argument('--warmup-kimg', type=float, default=preset['warmup_kimg'],
                   help='first stage: the ratio learns, the student rests (%(default)s)')
    p.add_argument('--sigma-init', type=float, default=preset['sigma_init'], help='of the one step (%(default)s)')
    for flag in ('student_sigma', 'ratio_sigma'):
        p.add_argument('--' + flag.replace('_', '-'), type=float, nargs=2, metavar=('MEAN', 'STD'),
                       default=preset[flag], help='of ln sigma in its loss (%(default)s)')
    p.add_argument('--divergence', choices=DIVERGENCES, default='js', help='of student and data (%(default)s)')
    p.add_argument('--weight', choices=WEIGHTS, default='1', help='w(sigma) in the student loss (%(default)s)')
    p.add_argument('--ratio-net', choices=RATIO_NETS, default='energy',
                   help='the whole U-Net, its encoder half, or a small encoder (%(default)s)')
    p.add_argument('--ratio-init', choices=['features', 'teacher', 'random'], default='features',
                   help="weights to start with: the teacher's without or with its output layer (%(default)s)")
    p.add_argument('--init', choices=INITS, default='teacher', help='of the student (%(default)s)')
    p.add_argument('--single-level', metavar='PATH', help='network for --init single-level')
    p.add_argument('--best-of', type=int, nargs='+', metavar='K', default=[],
                   help='once trained, score samples that are the pick of K candidates')
    p.add_argument('--verifier', choices=['resample', 'max'], default='resample', help='how to pick (%(default)s)')
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
    check_numbers(p, args, positive='kimg batch batch_gpu lr ratio_lr ratio_updates draws sigma_init best_of '
                  'snapshot_kimg status_kimg profile', not_negative='seed warmup_kimg eval_images')
    if args.profile:
        args.warmup_kimg = 0  # no first stage
    if 0 < args.eval_images < 10 or args.best_of and not args.eval_images:
        p.error('--eval-images must be 0 or at least 10, and not 0 for --best-of')
    if args.init == 'single-level' and args.dataset != 'shapes' and not args.single_level:
        p.error(f'--init single-level: train the network with `python edm_nets.py train --dataset {args.dataset} '
                f'--sigma {args.sigma_init:g}`, then give it as --single-level PATH')
    if args.single_level and args.init != 'single-level':
        p.error('--single-level is the network for --init single-level')
    if args.dataset == 'shapes' and args.data:
        p.error('--data: shapes is drawn on the fly; name the --dataset that the folder stands for')
    args.features = args.features or ('pixels' if args.dataset == 'shapes' else 'inception')
    args.out = args.out or f'runs/teacher_free-{args.dataset}'
    return args

# ----------------------------------------------------------------------------------------------------
# The method. Images and noise are float32 [N, C, H, W], sigma is [N, 1, 1, 1], l is [N], x_t = x_0 + sigma eps.

LOGIT_CLAMP = 10  # Deviation: of l inside h(r), unbounded for three of the divergences; SiDA clamps its logits alike
VERIFIER_SIGMAS = [0.2, 0.5, 1.0]  # of the verifier; the paper's are unknown. Smaller ones judge pixel noise alone
WEIGHTS = {'1': 0, 'sigma': 1, 'sigma2': 2}  # w(sigma) = sigma^power; sigma2 is Diff-Instruct's weight
# h(r) = r^2 f''(r) as a function of l = log r, then f. Which members the paper has beyond two is not known to us.
# Deviation: DiJS is taken as the exact gradient of the divergence; the paper's may be a surrogate (`ns`).
DIVERGENCES = {
    'js':        lambda l: torch.sigmoid(l) / 2,  # (r ln r - (1 + r) ln((1 + r) / 2)) / 2: Jensen-Shannon, "DiJS"
    'rkl':       lambda l: torch.ones_like(l),    # -ln r: KL(p_student || p_data), "DiKL", as Diff-Instruct
    'fkl':       lambda l: l.exp(),               # r ln r: KL(p_data || p_student)
    'hellinger': lambda l: (l / 2).exp() / 4,     # (sqrt r - 1)^2 / 2: squared Hellinger distance
    'jeffreys':  lambda l: 1 + l.exp(),           # (r - 1) ln r: both KL
    'ns':        lambda l: torch.sigmoid(-l),     # (1 + r) ln((1 + r) / 2r): 2 KL(mean of both || p_data), GDD's loss
}
INITS, RATIO_NETS = ['teacher', 'random', 'single-level', 'features'], ['energy', 'encoder', 'lightweight']


def draw_noise(shape, generator, P_mean, P_std):
    """Noise levels, ln sigma ~ N(P_mean, P_std^2), float32 [N, 1, 1, 1]; standard normal eps, float32 of `shape`."""
    kwargs = dict(generator=generator, device=generator.device)
    sigma = (P_mean + P_std * torch.randn([shape[0], 1, 1, 1], **kwargs)).exp()
    return sigma, torch.randn(shape, **kwargs)


def ratio_loss(real_log_ratio, fake_log_ratio):
    """Balanced binary cross-entropy on the logit l = log p_data / p_student -> scalar.

    2 ln 2 where data and student cannot be told apart; at the optimum 2 ln 2 - 2 JS, JS in nats averaged over sigma.
    """
    return F.softplus(-real_log_ratio).mean() + F.softplus(fake_log_ratio).mean()


def student_loss(log_ratio, sigma, divergence, weight):
    """-w(sigma) h(r) l on the student's noised samples -> scalar; only its gradient, through l alone, has a meaning.

    That gradient is -w h(r) grad l dx_t/dtheta: of the divergence E_student[f(r)] at each sigma, if l is exact.
    """
    h = DIVERGENCES[divergence](log_ratio.detach().clamp(-LOGIT_CLAMP, LOGIT_CLAMP))
    return -(sigma.flatten() ** WEIGHTS[weight] * h * log_ratio).mean()


class RatioNet(nn.Module):
    """The log ratio l(x_t, sigma, labels) on the EDM U-Net, preconditioned alike, with one of two heads.

    kind 'energy': the whole U-Net, and l is a quadratic form of its output F_x and its input x = c_in x_t,

        l = sqrt(d) (a_1 [x F_x] + a_2 [F_x^2] + a_3 [x^2] + a_0),    [.] the mean of an image's d numbers, a = a(sigma)

    which contains -|x_t - D_x|^2, the usual way to make an energy out of a denoiser ("Should EBMs model the energy or
    the score?", Salimans and Ho 2021). Deviation: the paper's network is not known; an encoder is likelier. kind
    'encoder': the encoder half alone, with a convolutional head on the last activation of every resolution, as
    FastGen's discriminators; DMD2's, on the deepest alone, was measured worse.

    Learned for 16 kimg against a frozen, half-trained student (shapes), grad l has a cosine with the difference of two
    fitted scores, at sigma 0.1 to 1, of 0.3 for `energy` and 0.1 for `encoder`, which hardly sees fine grain; of 0.6
    for `energy` with the teacher's output layer, one of the two scores inside. `energy` costs about twice as much.

    Takes the arguments of EDMPrecond after `kind`, without sigma_min, sigma_max and use_fp16; `kwargs` holds them all.
    """

    def __init__(self, kind, img_resolution, img_channels, label_dim, model_type, sigma_data=0.5, **model_kwargs):
        super().__init__()
        self.kwargs = dict(kind=kind, img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           model_type=model_type, sigma_data=sigma_data, **model_kwargs)
        self.kind, self.label_dim, self.sigma_data = kind, label_dim, sigma_data
        unet = dict(SongUNet=edm_nets.SongUNet, DhariwalUNet=edm_nets.DhariwalUNet)[model_type]
        self.model = unet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)
        if kind == 'energy':
            self.out = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 4))  # c_noise -> a_1, a_2, a_3, a_0
            last = [p for p in self.model.parameters() if p.ndim == 4][-1]
            nn.init.normal_(last, std=1e-5)  # ADM's last layer is zero: with a = 0 as well, neither would ever learn
        else:
            for name in ('dec', 'out_norm', 'out_conv'):
                if hasattr(self.model, name):
                    delattr(self.model, name)
            x, c_noise = torch.zeros([1, img_channels, img_resolution, img_resolution]), torch.zeros([1])
            with torch.no_grad():
                channels = [h.shape[1] for h in self.pyramid(x, c_noise, torch.zeros([1, label_dim]))]
            widths = [max(c // 4, 32) for c in channels]
            self.heads = nn.ModuleList(nn.Sequential(
                nn.Conv2d(c, w, 4, stride=2, padding=1), nn.GroupNorm(8, w), nn.SiLU(),
                nn.Conv2d(w, w, 3, padding=1), nn.GroupNorm(8, w), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
                for c, w in zip(channels, widths))
            self.out = nn.Sequential(nn.Linear(4 * sum(widths), 1))
        nn.init.zeros_(self.out[-1].weight)  # at first l = 0: nothing is known
        nn.init.zeros_(self.out[-1].bias)

    def pyramid(self, x, c_noise, labels):
        """The encoder's last activation of every resolution, fine to coarse: [N, C, R, R], [N, C', R/2, R/2], ..."""
        skips, _ = self.model.encode(x, c_noise, labels)
        return list({h.shape[-1]: h for h in skips}.values())

    def forward(self, x_t, sigma, class_labels=None):
        """x_t [N, C, R, R], sigma [N, 1, 1, 1], one-hot class_labels [N, label_dim] -> l float32 [N]."""
        x, c_noise = x_t / (self.sigma_data ** 2 + sigma ** 2).sqrt(), sigma.flatten().log() / 4  # EDM Table 1
        labels = class_labels.to(torch.float32) if self.label_dim else None
        if self.kind == 'encoder':
            h = [head(feature) for head, feature in zip(self.heads, self.pyramid(x, c_noise, labels))]
            with torch.autocast(x.device.type, enabled=False):  # l in float32
                return self.out(torch.cat(h, dim=1).to(torch.float32)).squeeze(1)
        F_x = self.model.decode(*self.model.encode(x, c_noise, labels)).to(torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # l is a small difference of large sums
            a = self.out(c_noise[:, None])
            means = [(u * v).mean([1, 2, 3]) for u, v in ((x, F_x), (F_x, F_x), (x, x))]
            return x[0].numel() ** 0.5 * (a * torch.stack([*means, torch.ones_like(c_noise)], dim=1)).sum(1)


def load_weights(unet, teacher, output):
    """Copy the teacher's weights into a U-Net, or the part of one. Without `output`, its last norm and layer stay."""
    own = unet.state_dict()
    unet.load_state_dict(own | {k: v for k, v in teacher.model.state_dict().items() if k in own and (
        output or not ('_aux_norm' in k or '_aux_conv' in k or k.startswith('out_')))})


def make_ratio_net(teacher, kind, init):
    """The ratio network to start with, of three kinds: 'energy' and 'encoder' (RatioNet), and 'lightweight'.

    init, for the first two: 'features', the teacher's weights except for the output layer, so that F_x does not start
    as the teacher's score in disguise; 'teacher', all of its weights; 'random', none. 'lightweight' is a small encoder,
    half as wide, one block per level, no attention, random in any case.
    """
    kwargs = {k: v for k, v in teacher.kwargs.items() if k not in ('sigma_min', 'sigma_max')}
    kwargs |= dict(dropout=0, augment_dim=0, kind='energy' if kind == 'energy' else 'encoder')
    if kind == 'lightweight':
        kwargs |= dict(model_channels=kwargs['model_channels'] // 2, num_blocks=1, attn_resolutions=[])
    ratio_net = RatioNet(**kwargs)
    if kind != 'lightweight' and init != 'random':
        load_weights(ratio_net.model, teacher, output=init == 'teacher')
    return ratio_net


def load_ratio_net(path):
    """The ratio network in a student file, frozen, on the CPU. Raises ValueError when the file holds none."""
    content = torch.load(path, map_location='cpu', weights_only=True)
    if 'ratio_net' not in content:
        raise ValueError(f'{path} holds no ratio network')
    ratio_net = RatioNet(**content['ratio_net_kwargs'])
    ratio_net.load_state_dict(content['ratio_net'])
    return ratio_net.eval().requires_grad_(False)


@torch.no_grad()
def best_of(student, ratio_net, seeds, K, verifier, batch=256):
    """The ratio as a verifier (v5): of K one-step samples per seed, made in parallel, keep one.

    l at small noise is the log importance weight of a sample, nearly: it is averaged here over VERIFIER_SIGMAS, and was
    learned against the student, while this is called with its moving average. 'resample' picks candidate k with
    probability softmax(l)_k, importance resampling, which moves p_student towards p_data; 'max' picks the largest l.
    Candidate 0 is the image of `edm_nets.generate`. Returns uint8 [N, C, R, R] on the CPU.
    """
    device, images = next(student.parameters()).device, []
    shape = [student.img_channels, student.img_resolution, student.img_resolution]
    for part in torch.as_tensor(list(seeds)).split(max(batch // K, 1)):
        rng, labels = edm_nets.ImageSeeds(part.tolist(), device), None
        z = rng.randn([1, *shape])
        if student.label_dim:
            labels = F.one_hot(rng.randint(student.label_dim), student.label_dim).repeat_interleave(K, 0)
        z = torch.cat([z, rng.randn([K - 1, *shape])], 1).flatten(0, 1)  # [n * K, C, R, R], candidates side by side
        x_0 = edm_nets.one_step(student, z, labels, student.sigma_init)
        log_ratio = 0
        for sigma in VERIFIER_SIGMAS:
            sigma = torch.full([len(x_0), 1, 1, 1], sigma, device=device)
            eps = rng.randn([K, *shape]).flatten(0, 1)
            log_ratio = log_ratio + ratio_net(x_0 + sigma * eps, sigma, labels) / len(VERIFIER_SIGMAS)
        log_ratio = log_ratio.reshape(-1, K)
        if verifier == 'resample':  # argmax(l + Gumbel noise) is a draw from softmax(l); ndtr makes normals uniform
            uniform = torch.special.ndtr(rng.randn([K])).clamp(1e-6, 1 - 1e-6)
            log_ratio = log_ratio - (-uniform.log()).log()
        chosen = x_0.reshape(-1, K, *shape)[torch.arange(len(part), device=device), log_ratio.argmax(1)]
        images.append(data.to_uint8(chosen).cpu())
    return torch.cat(images)


def open_both(args, state=None):
    """(dataset, network to start from). Collective. Raises OSError; ValueError if they do not fit each other."""
    dataset, teacher = edm_nets.open_data(args.dataset, args.data), edm_nets.open_teacher(args.teacher, state)
    if dataset.resolution != teacher.img_resolution:
        raise ValueError(f'{args.teacher} makes images of {teacher.img_resolution} px, not {dataset.resolution}')
    if teacher.label_dim and not 0 < dataset.label_dim <= teacher.label_dim:
        raise ValueError(f'{args.teacher} knows {teacher.label_dim} classes, the data has {dataset.label_dim}')
    return dataset, teacher

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


def initial_student(args, teacher):
    """The student before training, by --init: the paper's study of what the teacher's weights are good for.

    Raises ValueError when the network of --single-level is of another sigma_init, resolution or number of classes.
    """
    if args.init == 'single-level':  # features of one noise level only
        student = edm_nets.load(args.single_level)
        if student.sigma_init != args.sigma_init or any(
                getattr(student, name) != getattr(teacher, name) for name in ('img_resolution', 'label_dim')):
            raise ValueError(f'{args.single_level} is not a network of sigma {args.sigma_init:g} alone for the '
                             f'images of the teacher: see `python edm_nets.py train --help`, --sigma')
        return student
    student = edm_nets.EDMPrecond(**teacher.kwargs).eval()
    if args.init != 'random':  # `features`: of all noise levels, but no map from latents to images
        load_weights(student.model, teacher, output=args.init == 'teacher')
    return student


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
    if args.init == 'single-level' and args.single_level is None:
        args.single_level = edm_nets.shapes_teacher(args.sigma_init)

    # Resume? `warmed` counts the images of the first stage, `nimg` those shown to the student.
    config = {k: v for k, v in vars(args).items() if k in (
        'dataset', 'data', 'teacher', 'batch', 'lr', 'ratio_lr', 'ratio_updates', 'draws', 'warmup_kimg', 'sigma_init',
        'student_sigma', 'ratio_sigma', 'divergence', 'weight', 'ratio_net', 'ratio_init', 'init', 'single_level',
        'features', 'seed', 'precision')}
    if preset['decay']:
        config['kimg'] = args.kimg  # the rate depends on it
    config = json.loads(json.dumps(config))  # lists for tuples, as they will be read back
    state, total = load_checkpoint(args.out, config), args.kimg * 1000
    if state and state['nimg'] >= total:
        print0(f'{args.out} is complete at {state["nimg"] / 1000:g} kimg, nothing to do')
        return False

    # Data.
    dataset, teacher = open_both(args, state)
    ruler = args.eval_images and fid.Ruler(
        dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')

    # Networks. All stay in eval mode: no dropout. The teacher gives its weights and goes.
    torch.manual_seed(args.seed)
    student = initial_student(args, teacher).to(device, memory_format=torch.channels_last)
    student.sigma_init = args.sigma_init
    ema = copy.deepcopy(student).requires_grad_(False)
    ratio_net = make_ratio_net(teacher, args.ratio_net, args.ratio_init).to(device, memory_format=torch.channels_last)
    ratio_net.eval()
    classes, checksum = teacher.label_dim, teacher.checksum
    del teacher
    student.requires_grad_(True)
    if student.model.map_augment is not None:
        student.model.map_augment.requires_grad_(False)  # no augmentation here: its gradient would be zero
    if args.compile:
        edm_nets.compile_networks(student, ratio_net)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_ratio = wrap(student), wrap(ratio_net)
    a, b = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (student, ratio_net))
    # Bytes per parameter, float32: weights, gradient, two moments of Adam; for the student also the EMA.
    print0(f'teacher-free: {a:.2f} M parameters in the student, {b:.2f} M in the ratio network; {20 * a + 16 * b:.0f} '
           f'MB with EMA, gradients, Adam (score distillation: {40 * a:.0f}); {world_size} process(es), {device}')

    # Optimizers.
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True)  # Diff-Instruct and SiD
    student_optimizer = adam(student.parameters(), lr=args.lr)
    ratio_optimizer = adam(ratio_net.parameters(), lr=args.ratio_lr)

    # Where the run stands. `evolving`, the two counts and the length of the log are the whole state: the random
    # numbers of a step are a function of the counts.
    warmup_total = round(args.warmup_kimg * 1000 / args.batch) * args.batch
    warmed, nimg, resumed = 0, 0, 0 if args.profile else None  # a profile begins with no snapshot
    evolving = dict(student=student, ema=ema, ratio_net=ratio_net, student_optimizer=student_optimizer,
                    ratio_optimizer=ratio_optimizer)
    if state:
        warmed, nimg, resumed = state['warmed'], state['nimg'], state['warmed'] + state['nimg']
        for name, part in evolving.items():
            part.load_state_dict(state[name])
        print0(f'resuming {args.out} at {nimg / 1000:g} kimg, after {warmed / 1000:g} kimg of warm-up')
    if rank == 0:
        start_log(args.out, state['log_bytes'] if state else 0, args, student_optimizer, ratio_optimizer)
        if os.path.exists(f'{args.out}/summary.png'):
            os.remove(f'{args.out}/summary.png')  # of a shorter run
    del state
    dist.barrier()  # guards the checkpoint: nobody writes before all have read

    shape = [args.batch, student.img_channels, student.img_resolution, student.img_resolution]  # the global batch
    no_labels = torch.zeros([args.batch, 1], device=device)  # ignored by unconditional networks
    stop = Stop()
    means, tick_time, tick_seen = Means(), time.time(), warmed + nimg
    while True:
        # Status line, snapshot, checkpoint, done?
        seen, warming, done = warmed + nimg, warmed < warmup_total, nimg >= total
        count = warmed if warming else nimg
        snapshot = done or is_due(count, args.batch, args.snapshot_kimg)
        stopping = stop()
        if seen != resumed and (snapshot or stopping or is_due(count, args.batch, args.status_kimg)):
            stats, seconds = dict(warmup_kimg=warmed / 1000, **means.collect()), time.time() - tick_time
            if snapshot or stopping:
                check_finite(evolving)
            if snapshot and ruler and (seen == 0 or nimg > 0):
                stats |= ruler.score(lambda seeds: edm_nets.generate(ema, seeds), args.eval_images)
            log_status(args.out, stats, nimg, total, seconds, seen - tick_seen)
            if snapshot and rank == 0:
                data.save_grid(edm_nets.generate(ema, range(64)), f'{args.out}/grid-{nimg // 1000:06d}.png', scale=2)
                if nimg:
                    edm_nets.save(f'{args.out}/student-{nimg // 1000:06d}.pt', ema, args.dataset, nimg,
                                  ratio_net={k: v.cpu() for k, v in ratio_net.state_dict().items()},
                                  ratio_net_kwargs=ratio_net.kwargs)
            if (snapshot or stopping) and rank == 0:
                save_checkpoint(args.out, dict(
                    {name: part.state_dict() for name, part in evolving.items()}, config=config, warmed=warmed,
                    teacher=checksum, nimg=nimg, log_bytes=os.path.getsize(f'{args.out}/stats.jsonl')))
            tick_time, tick_seen = time.time(), seen
        if done or stopping:
            break

        # Random numbers and real images of this step, for the global batch; this rank takes its rows. A generated
        # image has the label of the real one beside it: p(label) cancels in the ratio.
        mark('random numbers', first=True)
        generator = data.step_generator(args.seed, count, int(warming), device)
        z = torch.randn(shape, generator=generator, device=device)
        noises = [draw_noise(shape, generator, *args.student_sigma) for _ in range(args.draws)]  # (sigma, eps)
        order = [data.batch_order(args.seed, seen * args.ratio_updates + update * args.batch, args.batch, len(dataset))
                 for update in range(args.ratio_updates)]  # (indices, flips) of each update
        labels = [F.one_hot(data.to_device(dataset.labels(indices), device), classes) if classes else no_labels
                  for indices, _ in order]
        samples = []  # x_0 of each round
        fall = min((1 - nimg / total) / preset['decay'], 1) if preset['decay'] else 1
        for optimizer, lr in ((student_optimizer, args.lr), (ratio_optimizer, args.ratio_lr)):
            for group in optimizer.param_groups:
                group['lr'] = lr * fall

        # The student's gradient: it climbs the log ratio. While warming up the student rests.
        ratio_net.requires_grad_(False)  # the gradient passes through to x_t
        for i, rows in enumerate(rounds if not warming else []):
            with sync_last(i, rounds, ddp_student):
                mark('student, forward')
                with autocast():
                    x_0 = edm_nets.one_step(ddp_student, z[rows], labels[0][rows], args.sigma_init)
                    mark('log ratio, forward')
                    x_t = torch.cat([x_0 + sigma[rows] * eps[rows] for sigma, eps in noises])  # [draws * N, C, R, R]
                    sigma = torch.cat([sigma[rows] for sigma, _ in noises])
                    log_ratio = ratio_net(x_t, sigma, labels[0][rows].repeat(args.draws, 1))
                loss = student_loss(log_ratio, sigma, args.divergence, args.weight)
                mark('student and log ratio, backward')
                (loss / len(rounds)).backward()
            means.add(student_loss=loss)
            samples.append(x_0.detach())
        ratio_net.requires_grad_(True)
        if not warming:
            mark('optimizers')
            student_optimizer.step()
            student_optimizer.zero_grad(set_to_none=True)
            mark('moving average')
            update_ema(ema, student, nimg, args.batch, preset['ema_kimg'])

        # Update the ratio on the same samples, further times on fresh ones. Deviation, as the paper's form is not
        # known: a generated image has the label, so that p(label) cancels, and the noise (as in SiDA) of the real one
        # beside it.
        for (indices, flips), y in zip(order, labels):
            mark('random numbers')
            if not samples:
                z = torch.randn(shape, generator=generator, device=device)
                mark('fresh samples, forward')
                with torch.no_grad(), autocast():
                    samples = [edm_nets.one_step(student, z[rows], y[rows], args.sigma_init) for rows in rounds]
            mark('random numbers')
            sigma, eps = draw_noise(shape, generator, *args.ratio_sigma)
            for i, (rows, x_0) in enumerate(zip(rounds, samples)):
                mark('images')
                images = data.mirror(dataset.images(indices[rows]), flips[rows] & preset['xflip'])
                real = data.to_float(data.to_device(images, device))
                with sync_last(i, rounds, ddp_ratio):
                    mark('ratio, forward')
                    x_t = torch.cat([real, x_0]) + (sigma[rows] * eps[rows]).repeat(2, 1, 1, 1)
                    with autocast():
                        log_ratio = ddp_ratio(x_t, sigma[rows].repeat(2, 1, 1, 1), y[rows].repeat(2, 1))
                    real_log_ratio, fake_log_ratio = log_ratio.chunk(2)
                    loss = ratio_loss(real_log_ratio, fake_log_ratio)
                    mark('ratio, backward')
                    (loss / len(rounds)).backward()
                means.add(ratio_loss=loss, log_ratio_real=real_log_ratio.mean(), log_ratio_fake=fake_log_ratio.mean())
            mark('optimizers')
            ratio_optimizer.step()
            ratio_optimizer.zero_grad(set_to_none=True)
            samples = []

        # Count.
        if warming:
            warmed += args.batch
        else:
            nimg += args.batch
    dist.barrier()  # guards the last files
    stop.over(args.out, nimg / 1000)
    return True


def summarize(args):
    """summary.png (data, teacher, student before and after) and, with scores, a table, also in summary.txt."""
    _, _, device = setup()
    teacher = edm_nets.load(args.teacher).to(device)
    torch.manual_seed(args.seed)
    before = initial_student(args, teacher).to(device)
    before.sigma_init = args.sigma_init
    after = edm_nets.load(edm_nets.newest(args.out, 'student')).to(device)
    dataset, rows, seeds = data.Shapes(), {}, np.arange(36)
    if args.eval_images:
        ruler = fid.Ruler(dataset, args.features, device)
        # Two draws of data differ too: the first row is the least that so few images can reach.
        rows['data, other images'] = ruler.score(data.Shapes(args.eval_images, seed=1).images, args.eval_images)
        rows['teacher, 18 steps'] = ruler.score(lambda i: edm_nets.generate(teacher, i, 18), args.eval_images)
        rows['student before'], rows['student after'] = fid.read_scores(args.out)
        fid.report(rows, f'{args.out}/summary.txt')
    if dist.get_rank() == 0:
        data.save_panels({
            'data': dataset.images(seeds), 'teacher, 18 steps': edm_nets.generate(teacher, seeds, 18),
            'student before, 1 step': edm_nets.generate(before, seeds),
            'student after, 1 step': edm_nets.generate(after, seeds)}, f'{args.out}/summary.png', columns=18, scale=3)
        print(f'{args.out}/summary.png: data, teacher, student before, student after', flush=True)


def verify(args):
    """Score the finished student with K candidates per image, for every K of --best-of; a table, also in a file."""
    _, _, device = setup()
    path = edm_nets.newest(args.out, 'student')
    student, ratio_net = edm_nets.load(path).to(device), load_ratio_net(path).to(device)
    dataset = edm_nets.open_data(args.dataset, args.data)
    ruler = fid.Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
    rows = {}
    for K in args.best_of:
        images = functools.partial(best_of, student, ratio_net, K=K, verifier=args.verifier)
        rows[f'{args.verifier}, K = {K}'] = ruler.score(images, args.eval_images)
        if dist.get_rank() == 0:
            data.save_grid(images(range(64)), f'{args.out}/best-of-{K}-{args.verifier}.png', scale=2)
    fid.report(rows, f'{args.out}/best-of-{args.verifier}.txt')


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.profile:
            edm_nets.profile(train, args)
            return
        trained = train(args)
        if args.dataset == 'shapes' and (trained or not os.path.exists(f'{args.out}/summary.png')):
            summarize(args)
        if args.best_of:
            verify(args)
    except Exception as error:  # told in one line where it is not the code's fault, else raised
        if line := edm_nets.one_line(error):
            sys.exit(f'teacher_free.py: {line}')
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
