"""Distributional distillation: a GAN loss alone turns the diffusion model into a one-step generator.

"Diffusion Models Are Innate One-Step Generators" (arXiv:2405.20750: GDD, and GDD-I with most convolutions frozen),
from its ICML 2025 version on "Revisiting Diffusion Models: From Generative Pre-training to One-Step Generation"
(arXiv:2506.09376: D2O, D2O-F), B. Zheng and T. Yang. Other methods make the student copy the teacher's image of each
noise; the paper says that one step cannot do this. Here the student's images only have to look like the data, and the
teacher is never called. Each step uses a batch of real images x:
  1. Student: L_G = E[ softplus(-l(G(z))) ], the non-saturating GAN loss. l are the logits of the discriminator.
  2. Discriminator: L_D = E[ softplus(-l(x)) + softplus(l(G(z'))) ], z' fresh.
  3. Discriminator again, every 16th step, as an update of its own: 16 gamma / 2 E[ |grad_x sum l(x)|^2 ] (R1).
The discriminator is StyleGAN-XL's. Frozen feature networks give maps, fixed random convolutions mix them, and small
trained heads turn them into logits. Two others are trained copies of the diffusion model and see noised images: `unet`
puts heads on its encoder, as DMD2 does, and `energy` makes one logit with the whole U-Net.

    paper                        here                       paper                      here
    g(x_T, T, 0), T = 80         one_step(student, z)       GDD-I, D2O-F               --freeze 1
    D, k-th feature network      discriminator, --backbones R1 gamma, every 16         --r1-gamma, --r1-interval

    python distributional.py                                              # shapes, minutes on a CPU, no downloads
    python distributional.py --dataset cifar10                            # one GPU, starts from EDM's weights
    torchrun --nproc_per_node=8 distributional.py --dataset imagenet64    # eight GPUs
    python distributional.py --teacher-student-fd 4 18 --activations      # then: two analyses of the paper
"""

import copy
import datetime
import functools
import glob
import hashlib
import os
import re
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.parametrizations import spectral_norm

import data
import edm_nets
import fid

# ----------------------------------------------------------------------------------------------------
# Settings. The rows of real data are the authors' released commands (we could not read their tables). We ran these rows
# for a few steps only. --freeze is 1 where GDD-I has the paper's best FID. --d-lr is the learning rate before
# StyleGAN2's correction for lazy R1. batch_gpu was measured to need 45 GiB or less. The authors report the
# snapshot with the lowest FID, at 5 to 9 million images.
# Deviation: on four GPUs their GAN loss is a sum over batch / 4 images, and R1 a mean. Ours are both means. Adam
# ignores a common factor, so we divide both of their terms by batch / 4: the sum becomes our mean, and their gamma of
# 1e-4 becomes 4e-4 / batch. Deviation: they, like EDM, replace gradients that are not finite; here such a run stops.
#
# Two choices of ours: gamma is 1 if all backbones are U-Nets, and the row `shapes`. Its sigma_init is 2.5 because the
# small teacher was hardly trained at 80.

REAL = dict(sigma_init=80, decay=0.0, eval_images=10_000, snapshot_kimg=250, status_kimg=10)
OFFICIAL = edm_nets.OFFICIAL.format
PRESETS = {  # decay: last share of the run, over which the rate of the student falls to zero
    'shapes':     dict(batch=32, lr=1e-4, d_lr=6e-4, freeze=0, kimg=28, ema_kimg=500, backbones=['energy'],
                       sigma_init=2.5, decay=0.5, eval_images=2_000, snapshot_kimg=14, status_kimg=1),
    'cifar10':    dict(REAL, batch=256, batch_gpu=64, lr=1e-4, d_lr=1e-4, freeze=1, kimg=5_000, ema_kimg=500,
                       backbones=['vgg', 'efficientnet'], teacher=OFFICIAL('cifar10-32x32-uncond-ve')),
    'ffhq64':     dict(REAL, batch=256, batch_gpu=64, lr=2e-5, d_lr=4e-5, freeze=1, kimg=10_000, ema_kimg=500,
                       backbones=['deit', 'efficientnet'], teacher=OFFICIAL('ffhq-64x64-uncond-ve')),
    'afhqv2':     dict(REAL, batch=256, batch_gpu=64, lr=2e-5, d_lr=4e-5, freeze=0, kimg=10_000, ema_kimg=500,
                       backbones=['deit', 'efficientnet'], teacher=OFFICIAL('afhqv2-64x64-uncond-ve')),
    'imagenet64': dict(REAL, batch=512, batch_gpu=32, lr=8e-6, d_lr=4e-5, freeze=1, kimg=10_000, ema_kimg=50_000,
                       backbones=['deit', 'efficientnet'], teacher=OFFICIAL('imagenet-64x64-cond-adm')),
}
UNETS = ['unet', 'energy']  # discriminators on the diffusion model's own U-Net


def parse_args(argv=None):
    positive = edm_nets.positive
    parser, p, evaluation = edm_nets.common_flags('distributional', __doc__, PRESETS, argv)
    p.add_argument('--freeze', type=int, choices=[0, 1],
                   help='1: freeze most convolutions of the student (GDD-I); 0: freeze nothing (GDD) (%(default)s)')
    p.add_argument('--backbones', nargs='+', choices=[*UNETS, *FEATURES],
                   help='what the discriminator is built on: frozen networks trained on ImageNet, or a trained '
                   'copy of the teacher (unet, energy) that sees noised images %(default)s')
    p.add_argument('--features-dir', metavar='FOLDER',
                   help='folder with the weights of the frozen networks (they are fetched)')
    p.add_argument('--loss', choices=['ns', 'linear'], default='ns',
                   help="the student's GAN loss: softplus(-logit) or -logit (%(default)s)")
    p.add_argument('--d-lr', type=positive(float), metavar='LR',
                   help='learning rate of the discriminator (%(default)s)')
    p.add_argument('--r1-gamma', type=float, metavar='GAMMA', help='weight of the gradient penalty R1; 0: none '
                   '(1 if all backbones are U-Nets, else 4e-4 / batch)')
    p.add_argument('--r1-interval', type=positive(int), default=16, metavar='STEPS',
                   help='steps from one R1 penalty to the next (%(default)s)')
    p.add_argument('--noise', type=float, nargs=2, metavar=('MEAN', 'STD'), default=(0.0, 1.6),
                   help='mean and standard deviation of ln sigma of the noise for unet and energy %(default)s')
    evaluation.add_argument('--teacher-student-fd', type=int, nargs='+', metavar='STEPS', default=[],
                            help='after training, compare the student with a teacher that takes this many Heun steps')
    evaluation.add_argument('--activations', action='store_true',
                            help='after training, measure which layers are active at which noise level')
    args = parser.parse_args(argv)
    if args.r1_gamma is None:
        args.r1_gamma = 1.0 if set(args.backbones) <= set(UNETS) else 4e-4 / args.batch
    if len(set(args.backbones)) < len(args.backbones):
        parser.error(f'--backbones {" ".join(args.backbones)}: give each one once')
    if args.r1_gamma < 0 or args.teacher_student_fd and (min(args.teacher_student_fd) < 2 or not args.eval_images):
        parser.error('--r1-gamma must not be negative; --teacher-student-fd must be at least 2 and needs --eval-images')
    return args

# ----------------------------------------------------------------------------------------------------
# The method. Images are float32 [N, C, R, R] in [-1, 1]; logits are a list with one tensor [N, J_k] for each backbone.
# J_k is the number of patches of all four scales; for `unet` it is the number of resolutions, for `energy` it is 1.


def generator_loss(fake_logits, form):
    """GAN loss, mean over patches and images, summed over backbones -> scalar.

    'ns': non-saturating (Goodfellow et al. 2014), as published. 'linear': E[-l]. With feature networks this is the
    GAN loss of DMAD (arXiv:2610.02188).

    Deviation: the published loss sums over the images of a GPU, which makes its gamma depend on the number of GPUs.
    """
    return sum((F.softplus(-l) if form == 'ns' else -l).mean() for l in fake_logits)


def discriminator_loss(real_logits, fake_logits):
    """-log D(real) - log(1 - D(fake)), reduced as in generator_loss -> scalar. Guessing gives 2 ln 2 per backbone."""
    return sum(F.softplus(-l).mean() for l in real_logits) + sum(F.softplus(l).mean() for l in fake_logits)


def r1_penalty(real_logits, real):
    """R1 (Mescheder et al. 2018): |grad_x of the sum of all logits|^2, mean over images -> scalar, without gamma / 2.

    `real` [N, C, R, R] requires a gradient. The sum runs over patches and backbones, as published. The logits must have
    been computed under sdpa_kernel(SDPBackend.MATH): fused attention has no second derivative.
    """
    gradient, = torch.autograd.grad(sum(l.sum() for l in real_logits), real, create_graph=True)
    return gradient.square().sum([1, 2, 3]).mean()


def frozen_by_gdd_i(name):
    """Whether GDD-I freezes the parameter of EDMPrecond of this name.

    Frozen: both 3x3 convolutions of every block, and the output projection of its attention. Trained: norms, `affine`
    (which brings in the noise level), `qkv`, `skip`, `aux_residual`, the first and last layer, the layers that embed
    noise level and label. This freezes 84.4 % of the CIFAR-10 network, 83.8 % at 64 px, 78.8 % of ADM (abstract: 85 %).
    """
    return re.search(r'\.\d+x\d+_(block\d+|up|down|in\d)\.(conv0|conv1|proj)\.', name) is not None


def draw_noise(shape, generator, P_mean, P_std):
    """Noise levels, ln sigma ~ N(P_mean, P_std^2), float32 [N, 1, 1, 1]; standard normal eps, float32 of `shape`."""
    kwargs = dict(generator=generator, device=generator.device)
    sigma = (P_mean + P_std * torch.randn([shape[0], 1, 1, 1], **kwargs)).exp()
    return sigma, torch.randn(shape, **kwargs)

# ----------------------------------------------------------------------------------------------------
# The discriminator: heads on frozen feature networks, or a copy of the diffusion model's own U-Net.


class Projection(nn.Module):
    """The input of the heads: a feature network, then random convolutions that mix its maps. Nothing in it is trained.

    They mix across channels, then across scales, from coarse to fine (Projected GANs, Sauer et al. 2021; StyleGAN-XL).
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
        """images [N, 3, R, R] in [-1, 1] -> the network's own four maps, of the images at 224 px."""
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=(224, 224), mode='bilinear', align_corners=False)
        return self.network(x)

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
    """The sum over ranks. Its gradient is again such a sum, so that R1 can differentiate twice."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient.contiguous())


class GlobalBatchNorm(nn.Module):
    """Batch norm over the images that all ranks hold in one round, without running statistics: [N, C, H, W] -> same.

    Deviation: in the published code every GPU normalises its own images. torch's SyncBatchNorm needs CUDA, and cannot
    be differentiated twice, which R1 does.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x):
        mean = SumOverRanks.apply(x.mean([0, 2, 3])) / dist.get_world_size()
        x = x - mean[:, None, None]
        var = SumOverRanks.apply(x.square().mean([0, 2, 3])) / dist.get_world_size()
        return x * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


def projected_head(c, size, out):
    """Halve the nominal `size` down to 8 px, then one 4x4 convolution: [N, c, r, r] -> [N, out, r', r'].

    Deviation: torch's spectral norms start with 15 power iterations. The published ones start with one, and are too
    small for about five steps.
    """
    layers = []
    while size > 8:
        size, width = size // 2, {8: 512, 16: 256, 32: 128, 64: 64}[size // 2]
        layers += [spectral_norm(nn.Conv2d(c, width, 4, 2, 1)), GlobalBatchNorm(width), nn.LeakyReLU(0.2)]
        c = width
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(c, out, 4, bias=False)))


class ProjectedHeads(nn.Module):
    """The four heads on a Projection, of 10.3 M parameters; with classes, also Miyato 2018's projection discriminator.

    class_means [label_dim, E]: initial value of the class embeddings. Each head trains its own.
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
            h = head(h).flatten(2)  # [N, 1 or 64, 16; VGG: 121]
            if hasattr(self, 'maps'):
                layer, embedding = self.maps[i], self.embeddings[i](labels)
                c_map = F.linear(embedding, layer.weight / layer.in_features ** 0.5, layer.bias)  # [N, 64]
                c_map = F.leaky_relu(c_map, 0.2) * 2 ** 0.5
                h = (h * c_map[:, :, None]).sum(1, keepdim=True) / h.shape[1] ** 0.5
            logits.append(h.squeeze(1))
        return torch.cat(logits, dim=1)


class Discriminator(nn.ModuleDict):
    """The trained part of the discriminator, by backbone: {'energy': UNetCritic, 'vgg': ProjectedHeads, ...}."""

    def forward(self, *views, labels, one_hot):
        """For each of `views` (what `look` returns), a list of logits [N, J], one for each backbone.

        DDP wants one forward call before each backward, so real and generated images come together. They stay separate
        batches: BatchNorm computes its statistics for each alone, as published.
        """
        return [[part(*view[name], one_hot) if name in UNETS else part(view[name], labels)
                 for name, part in self.items()] for view in views]


def look(images, projections, noise):
    """What the heads see of images [N, C, R, R]: {backbone: tuple of tensors}. noise: (sigma, eps), for the U-Nets."""
    sigma, eps = noise
    views = {name: net(images) for name, net in projections.items()}
    return views | dict.fromkeys(UNETS, (images + sigma * eps, sigma))


@torch.no_grad()
def class_means(projection, dataset, per_class=50, batch=32):
    """Deepest features of each class of the dataset, averaged over images and pixels -> float32 [label_dim, E].

    It uses about `per_class` images of each class, at most 10,000 in all. A class without an image gets the mean of all
    images. Deviation: the published code uses EfficientNet's means over ImageNet for every network and data set.
    """
    device = next(projection.parameters()).device
    indices, _ = data.batch_order(0, 0, min(per_class * dataset.label_dim, 10_000, len(dataset)), len(dataset))
    total, counts = 0, torch.zeros([dataset.label_dim])
    for part in np.array_split(indices, -(-len(indices) // batch)):
        features = projection.raw(data.load_images(dataset, part, device))[-1].mean([2, 3]).cpu()
        one_hot = F.one_hot(dataset.labels(part), dataset.label_dim).float()
        total, counts = total + one_hot.T @ features, counts + one_hot.sum(0)
    return torch.where(counts[:, None] > 0, total / counts[:, None].clamp(min=1), total.sum(0) / counts.sum())


def make_discriminator(args, teacher, dataset, device):
    """(Discriminator, {backbone: Projection}) of --backbones, on the device. Collective: the first rank downloads.

    Deviation: the papers use no U-Net as discriminator. `unet` is DMD2's, but with heads on all resolutions, and only
    the GAN loss trains its encoder.
    """
    parts, projections = {}, nn.ModuleDict()
    for name in args.backbones:
        if name in UNETS:
            critic = edm_nets.make_critic('encoder' if name == 'unet' else name, teacher)
            parts[name] = critic.to(memory_format=torch.channels_last)
            continue
        network = data.rank0_first(feature_network, name, args.features_dir)
        projections[name] = Projection(network).to(device, memory_format=torch.channels_last)
        parts[name] = ProjectedHeads(class_means(projections[name], dataset) if teacher.label_dim else None)
    return Discriminator(parts).to(device), projections

# ----------------------------------------------------------------------------------------------------
# Small helpers, the same text in every script.


def setup():
    """Join torchrun's process group, or be a world of one. Returns (rank, world_size, device)."""
    if 'RANK' not in os.environ:
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')
    device = torch.device('cpu')
    if torch.cuda.is_available():
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 stays exact; speed comes from bf16
    if not dist.is_initialized():
        backend, device_id = ('nccl', device) if device.type == 'cuda' else ('gloo', None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1), device_id=device_id)  # long downloads
    return dist.get_rank(), dist.get_world_size(), device


def is_due(nimg, batch, kimg):
    """Whether a step of `batch` images that ended at `nimg` crossed a multiple of `kimg`. True at nimg = 0."""
    return nimg // (kimg * 1000) != (nimg - batch) // (kimg * 1000)


@torch.no_grad()
def update_ema(ema, net, nimg, batch, ema_kimg):
    """EDM's moving average: half-life `ema_kimg`, or 5 % of the images seen so far if that is less."""
    beta = 0.5 ** (batch / max(min(ema_kimg * 1000, nimg * 0.05), 1e-8))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)

# ----------------------------------------------------------------------------------------------------
# Training.


def train(args):
    """Train, or continue, up to --kimg. Returns False if there was nothing left to do."""
    # Initialize. --batch is global. Gradient accumulation: this rank adds up gradients over `rounds`, its slices.
    rank, world_size, device = setup()
    if args.batch % world_size:
        raise ValueError(f'--batch {args.batch} is not a multiple of the {world_size} processes')
    share = args.batch // world_size
    size = max(n for n in range(1, min(args.batch_gpu or share, share) + 1) if share % n == 0)
    if 2 * size < min(args.batch_gpu or share, share):
        raise ValueError(f'{share} images per GPU can only be cut into {share // size} x {size}: change --batch')
    rounds = [slice(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]
    args.precision = args.precision or ('bf16' if device.type == 'cuda' else 'fp32')
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == 'bf16')

    # Data.
    dataset = data.rank0_first(data.open_dataset, args.dataset, args.data)
    args.teacher = args.teacher or edm_nets.shapes_teacher()

    # Networks. The student has no dropout. Deviation: the preconditioning is EDM's, without the authors' small eps.
    student = edm_nets.open_teacher(args.teacher, dataset)
    torch.manual_seed(args.seed)
    discriminator, projections = make_discriminator(args, student, dataset, device)
    student = student.to(device, memory_format=torch.channels_last)
    student.sigma_init = args.sigma_init
    ema = copy.deepcopy(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (args.freeze and frozen_by_gdd_i(name)))
    if args.compile:
        edm_nets.compile_networks(student)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_discriminator = wrap(student), wrap(discriminator)
    warnings.filterwarnings('ignore', message='Grad strides do not match')  # in R1; it is only about speed
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, betas=(0.0, 0.99), fused=True)
    # R1 takes extra optimizer steps; Adam's rate and beta are adjusted to make up for them, as in StyleGAN2.
    lazy = args.r1_interval / (args.r1_interval + 1) if args.r1_gamma else 1
    d_optimizer = torch.optim.Adam(discriminator.parameters(), args.d_lr * lazy, (0.0, 0.99 ** lazy), fused=True)

    # Resume. `parts` and the count of images are the whole state: random numbers follow from seed and count. The random
    # convolutions are saved, because another version of torch may draw others.
    mixing = nn.ModuleDict({name: nn.ModuleList([net.across_channels, net.across_scales, *getattr(
        net.network, 'resize', ())]) for name, net in projections.items()})
    parts = dict(student=student, ema=ema, discriminator=discriminator, mixing=mixing, optimizer=optimizer,
                 d_optimizer=d_optimizer)
    config, state = data.load_checkpoint(
        args, parts, {'features_dir', 'teacher_student_fd', 'activations'}, teacher=student.fingerprint,
        data=data.identity(dataset), batch_gpu_times_processes=size * world_size if projections else 0)  # batch norm
    nimg, resumed, total = state.get('nimg', 0), state.get('nimg'), args.kimg * 1000
    if rank == 0:
        a, b, c = (sum(p.numel() for p in group) for group in (
            trained, student.parameters(), discriminator.parameters()))
        data.start_log(args, state, f'[1/2] teacher of {b / 1e6:.2f} M parameters: {args.teacher}\n'
                       f'[2/2] training the student ({1 - a / b:.2%} frozen) against a discriminator of {c / 1e6:.2f} '
                       f'M parameters on {" + ".join(args.backbones)}, {nimg / 1000:g} to {args.kimg:g} kimg: the '
                       f'Fréchet distance should fall; samples: {args.out}/grid-*.png', trained_parameters=a + c)
    ruler = args.eval_images and fid.Ruler(
        dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
    shape = [args.batch, student.img_channels, student.img_resolution, student.img_resolution]  # of the global batch
    classes, means, saved = max(student.label_dim, 1), data.Means(nimg), time.time()

    while True:
        # Status line (a resumed run has its first one already), snapshot, checkpoint, done?
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # not for scores
        done = nimg >= total
        snapshot = done or is_due(nimg, args.batch, args.snapshot_kimg)
        if nimg != resumed and (snapshot or is_due(nimg, args.batch, args.status_kimg)):
            stats = dict(kimg=nimg / 1000, **means.collect(nimg))
            if snapshot and ruler:
                stats |= ruler.score(lambda seeds: edm_nets.generate(ema, seeds), args.eval_images)
            if rank == 0:
                data.log_status(args.out, stats, total)
            if rank == 0 and snapshot:
                data.save_panels({'': edm_nets.generate(ema, range(64))}, f'{args.out}/grid-{nimg // 1000:06d}.png')
                if nimg:
                    edm_nets.save(f'{args.out}/student-{nimg // 1000:06d}.pt', ema, args.dataset, nimg)
            means = data.Means(nimg)
        if rank == 0 and nimg != resumed and (snapshot or time.time() - saved > 1200):  # at most 20 minutes are lost
            # At nimg 0 nothing was normalised yet: --batch-gpu may still change.
            settings = {k: v for k, v in config.items() if nimg or k != 'batch_gpu_times_processes'}
            data.save_checkpoint(args.out, settings, dict(nimg=nimg), parts)
            saved = time.time()
        if done:
            break

        # Only the student runs in bf16. Deviation: on a GPU the discriminator runs in TF32, not in float32. The
        # student's gradient through EfficientNet has a cosine with float32's of 0.976 in TF32 (emulated), 0.75 in bf16.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == 'bf16'

        # Random numbers, real images and labels of this step, for the global batch; this rank takes its rows.
        generator = data.step_generator(args.seed, nimg, 0, device)
        z_student, z_discriminator = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        student_noise, d_noise = (draw_noise(shape, generator, *args.noise) for _ in range(2))  # (sigma, eps) each
        indices, _ = data.batch_order(args.seed, nimg, args.batch, len(dataset))  # never mirrored, as published
        labels = data.to_device(dataset.labels(indices), device).clamp(max=classes - 1)  # 0 where there are no classes
        one_hot = F.one_hot(labels, classes)

        # Update the student. The discriminator is called without DDP, because its weights get no gradient here.
        discriminator.requires_grad_(False)
        for rows in rounds:
            discriminator.train(rows is rounds[0])  # the spectral norms iterate in the first round alone
            ddp_student.require_backward_grad_sync = rows is rounds[-1]  # ranks average their gradients once a step
            with autocast():
                fake = edm_nets.one_step(ddp_student, z_student[rows], one_hot[rows], args.sigma_init)
            view = look(fake, projections, [part[rows] for part in student_noise])
            [fake_logits] = discriminator(view, labels=labels[rows], one_hot=one_hot[rows])
            loss = generator_loss(fake_logits, args.loss)
            (loss / len(rounds)).backward()
            means.add(student_loss=loss)
        discriminator.requires_grad_(True)
        fall = min((1 - nimg / total) / args.decay, 1) if args.decay else 1
        optimizer.param_groups[0]['lr'] = args.lr * fall  # the discriminator's stays: it has to follow
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, student, nimg, args.batch, args.ema_kimg)

        # Update the discriminator, on fresh samples. No graph through the student or the feature networks.
        reals = []
        for rows in rounds:
            discriminator.train(rows is rounds[0])
            ddp_discriminator.require_backward_grad_sync = rows is rounds[-1]
            reals.append(data.load_images(dataset, indices[rows], device))
            with torch.no_grad():
                with autocast():
                    fake = edm_nets.one_step(student, z_discriminator[rows], one_hot[rows], args.sigma_init)
                # Real and generated images get the same noise, as in SiDA.
                views = [look(x, projections, [part[rows] for part in d_noise]) for x in (reals[-1], fake)]
            real_logits, fake_logits = ddp_discriminator(*views, labels=labels[rows], one_hot=one_hot[rows])
            loss = discriminator_loss(real_logits, fake_logits)
            (loss / len(rounds)).backward()
            a, b = (sum(l.mean() for l in logits) / len(logits) for logits in (real_logits, fake_logits))
            means.add(discriminator_loss=loss, real_logit=a, fake_logit=b)
        d_optimizer.step()
        d_optimizer.zero_grad(set_to_none=True)

        # R1 on the same real images, every --r1-interval steps. Its gradient flows through the frozen feature networks.
        if args.r1_gamma and nimg and (nimg // args.batch) % args.r1_interval == 0:
            for rows, real in zip(rounds, reals):
                discriminator.train(rows is rounds[0])
                ddp_discriminator.require_backward_grad_sync = rows is rounds[-1]
                real.requires_grad_(True)
                with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
                    view = look(real, projections, [part[rows] for part in d_noise])
                    [real_logits] = ddp_discriminator(view, labels=labels[rows], one_hot=one_hot[rows])
                penalty = r1_penalty(real_logits, real)
                unseen = 0 * sum(l.sum() for l in real_logits)  # DDP needs all weights; R1 leaves out the last biases
                loss = args.r1_interval * args.r1_gamma / 2 * penalty + unseen
                (loss / len(rounds)).backward(inputs=list(discriminator.parameters()))  # no gradient for the images
                means.add(r1_penalty=penalty)
                del view, real_logits, penalty, unseen, loss  # they would keep the graph of the feature networks
            d_optimizer.step()
            d_optimizer.zero_grad(set_to_none=True)
        nimg += args.batch
    dist.barrier()  # guards the last files
    return nimg != resumed

# ----------------------------------------------------------------------------------------------------
# Analyses of a finished run.


def teacher_student_fd(args, teacher, student, dataset, device):
    """Print and save the distances teacher-data, student-data and teacher-student, for each number of teacher steps.

    The paper's argument against instance losses is that teacher and student can both be close to the data and still far
    from each other, and farther if the teacher takes more steps. Both start from the same latents.
    """
    ruler = fid.Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')

    def statistics(net, num_steps=None):
        images_of = functools.partial(edm_nets.generate, net, num_steps=num_steps)
        return ruler.measure(images_of, args.eval_images)[0].result()[:2]

    of_data, of_student, rows = (ruler.mu, ruler.sigma), statistics(student), {}
    for steps in args.teacher_student_fd:
        of_teacher = statistics(teacher, steps)
        pairs = {'teacher-data': (of_teacher, of_data), 'student-data': (of_student, of_data),
                 'teacher-student': (of_teacher, of_student)}
        rows[f'{ruler.name}, {steps} steps'] = {name: fid.frechet_distance(*a, *b) for name, (a, b) in pairs.items()}
    fid.report(rows, f'{args.out}/teacher-student-fd.txt', pairs)


@torch.no_grad()
def layer_activity(net, x, sigma, labels):
    """How much each layer does at this noise level: {name: rms of what it adds / rms of its block's output}.

    Layers: `conv1` and `proj`, the last of a block's residual branch and of its attention. x: noisy [N, C, R, R].
    """
    sizes, activity = {}, {}  # sizes: rms of every layer's output

    def keep(name, module, inputs, output):
        sizes[name] = float(output.square().mean().sqrt())

    handles = [module.register_forward_hook(functools.partial(keep, name))
               for name, module in net.model.named_modules()]
    net(x, torch.full([len(x)], sigma, device=x.device), labels)
    for handle in handles:
        handle.remove()
    for name, block in net.model.named_modules():
        if isinstance(block, edm_nets.UNetBlock):
            scale = block.skip_scale  # each sum on the way to the block's output is scaled
            activity[f'{name}.conv1'] = sizes[f'{name}.conv1'] * scale ** (2 if block.heads else 1) / sizes[name]
            if block.heads:
                activity[f'{name}.proj'] = sizes[f'{name}.proj'] * scale / sizes[name]
    return activity


def activations(args, teacher, student, dataset, device, images=64):
    """Write activations.txt: which layers work at which noise level in the diffusion model, and which in the student.

    Rows are layers. The first columns are the teacher on noised data, by noise level; `before` (teacher) and `after`
    (student) are one step from pure noise. Rows are divided by the largest of the first columns. The protocol is ours.
    """
    indices, _ = data.batch_order(args.seed, 0, images, len(dataset))
    x_0 = data.load_images(dataset, indices, device)
    labels = F.one_hot(dataset.labels(indices), teacher.label_dim).to(device) if teacher.label_dim else None
    eps = torch.randn(x_0.shape, generator=data.step_generator(args.seed, 0, 0, device), device=device)
    columns = {f'{sigma:.3g}': layer_activity(teacher, x_0 + sigma * eps, sigma, labels)
               for sigma in np.geomspace(80, 0.002, 12)}
    largest = {name: max(column[name] for column in columns.values()) for name in columns['80']}
    for title, net in (('before', teacher), ('after', student)):
        columns[title] = layer_activity(net, args.sigma_init * eps, args.sigma_init, labels)
    rows = {name: {title: column[name] / largest[name] for title, column in columns.items()} for name in largest}
    fid.report(rows, f'{args.out}/activations.txt', columns)


def main(argv=None):
    args = parse_args(argv)
    with data.clear_errors('distributional.py'):
        worked = train(args)
        if args.dataset == 'shapes' and not args.data and (worked or not os.path.exists(f'{args.out}/summary.png')):
            fid.summarize(args)
        if args.teacher_student_fd or args.activations:
            device = setup()[2]
            dataset = data.rank0_first(data.open_dataset, args.dataset, args.data)
            teacher, student = (edm_nets.load(path).to(device) for path in (
                args.teacher, max(glob.glob(f'{args.out}/student-*.pt'))))
        if args.teacher_student_fd:
            teacher_student_fd(args, teacher, student, dataset, device)
        if args.activations:
            activations(args, teacher, student, dataset, device)
        dist.destroy_process_group()

# ----------------------------------------------------------------------------------------------------
# Appendix. The feature networks in plain torch: [N, 3, 224, 224] -> four maps, fine to coarse. Tensors are named as in
# the public weight files. All are frozen and in eval mode.


def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding of [N, C, H, W], more at the right and below. For stride 2, H and W must be even."""
    pad = [(kernel - stride) // 2, (kernel - stride + 1) // 2]
    return F.pad(x, pad + pad)


class MBConv(nn.Module):
    """EfficientNet-Lite's block: expand 1x1, depthwise, project 1x1; ReLU6, no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, kernel, stride, expand):
        super().__init__()
        self.kernel, self.stride, self.residual, c = kernel, stride, stride == 1 and c_in == c_out, c_in * expand
        sizes = dict(pw=(c_in, c, 1), dw=(c, c, kernel, stride, 0, 1, c), pwl=(c, c_out, 1))
        if expand == 1:
            sizes = dict(dw=sizes['dw'], pw=sizes['pwl'])
        self.names = list(sizes)
        for i, name in enumerate(self.names):
            setattr(self, f'conv_{name}', nn.Conv2d(*sizes[name], bias=False))
            setattr(self, f'bn{i + 1}', nn.BatchNorm2d(sizes[name][1], eps=1e-3))

    def forward(self, x):
        h = x
        for i, name in enumerate(self.names):
            h = same_pad(h, self.kernel, self.stride) if name == 'dw' else h
            h = getattr(self, f'bn{i + 1}')(getattr(self, f'conv_{name}')(h))
            h = F.relu6(h) if i < len(self.names) - 1 else h
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019) -> 24 @ 56, 40 @ 28, 112 @ 14, 320 @ 7 px."""
    mean, std, channels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (24, 40, 112, 320)

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self.blocks, c = nn.ModuleList(), 32
        for n, kernel, stride, width, expand in [  # blocks, kernel, stride of the first, channels, expansion
                (1, 3, 1, 16, 1), (2, 3, 2, 24, 6), (2, 5, 2, 40, 6), (3, 3, 2, 80, 6), (3, 5, 1, 112, 6),
                (4, 5, 2, 192, 6), (1, 3, 1, 320, 6)]:
            self.blocks.append(nn.Sequential(*(
                MBConv(width if i else c, width, kernel, 1 if i else stride, expand) for i in range(n))))
            c = width

    def forward(self, x):
        x, maps = F.relu6(self.bn1(self.conv_stem(same_pad(x, 3, 2)))), []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in (1, 2, 4, 6):  # the last stage of a resolution
                maps.append(x)
        return maps


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


FEATURES = {  # the network, and its public weights; their SHA-256 begins with the digits in the name
    'efficientnet': (EfficientNetLite0, 'https://github.com/rwightman/pytorch-image-models/releases/download/'
                                        'v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth'),
    'vgg': (VGG16BN, 'https://download.pytorch.org/models/vgg16_bn-6c64b313.pth'),
    'deit': (DeiT, 'https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth'),
}


def feature_network(backbone, folder=None):
    """A frozen feature network with its public weights, on the CPU. Raises OSError; ValueError for a wrong file.

    The weight file is read from `folder` if this is given. Otherwise it is downloaded once into the cache.
    """
    network, url = FEATURES[backbone]
    path = f'{folder}/{os.path.basename(url)}' if folder else \
        data.download(url, data.cache_path(url), sha256=url.rsplit('-', 1)[1][:8])
    if not os.path.exists(path):
        raise FileNotFoundError(f'{path} not found: it is at {url}, download it into --features-dir')
    with open(path, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if not digest.startswith(str(path).rsplit('-', 1)[1][:8]):
        raise ValueError(f'{path} is damaged: its SHA-256, {digest[:8]}..., is not the one in its name; delete it')
    net = network()
    try:
        own, state = net.state_dict(), torch.load(path, map_location='cpu', weights_only=True)
        state = state.get('model', state)  # DeiT's file has the weights under this key
        net.load_state_dict({k: v if k.startswith('resize.') or k.endswith('num_batches_tracked') else state[k]
                             for k, v in own.items()})
    except Exception as error:  # a wrong file can cause any error; report it in one line
        raise ValueError(f'{path} does not hold the weights of {backbone}: {" ".join(str(error).split())}') from None
    return net.eval().requires_grad_(False)


if __name__ == '__main__':
    main()
