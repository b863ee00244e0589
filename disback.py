"""DisBack: a one-step generator distilled along the path on which its teacher was degraded.

"Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation", S. Zhang et al., ICLR
2025, arXiv:2408.15991 v3. No real images are needed. We trained on shapes only. The paper's FID on ImageNet-64 is 1.38.

A score is the gradient of log p. Score distillation moves the samples of a student G along the teacher's score minus
their own score (the fake score, learned on the fly). The paper says: far from the data, where G begins, the teacher's
score is unreliable. DisBack therefore aims at nearer targets first:
  1. Degradation recording (Alg. 1): fine-tune a copy of the teacher on samples of the untouched student, and save it N
     times on the way, as nodes 1 to N. Node 0 is the teacher, and node N models the student's initial distribution.
  2. Distribution backtracking (Alg. 2): distil from node N-1, then from node N-2, ..., at last from node 0. The fake
     score starts as node N itself. With --nodes 0 this is plain score distillation, Diff-Instruct (arXiv:2305.18455).

    paper             here          paper         here
    G_stu(z; eta)     student       s'_theta_i    target, node i of the path
    s_phi             fake_score    s             (D_x - x_t) / sigma^2, where D_x is the denoised image

    python disback.py                                             # shapes, minutes on a CPU
    python disback.py --dataset cifar10                           # one GPU, the official EDM teacher
    torchrun --nproc_per_node=8 disback.py --dataset imagenet64   # eight GPUs
"""

import copy
import datetime
import functools
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import edm_nets
import fid

# ----------------------------------------------------------------------------------------------------
# Settings. Deviation: the settings of the paper's EDM experiments (its Appendix B) were not available to us. For real
# data, batch, lr, sigma_init and ema_kimg come from SiD (Score identity Distillation); the distribution of sigma and
# the equal learning rates come from Diff-Instruct. As in the paper's SDXL script, the recording takes 1 % of the run,
# and each node takes 1 %. We ran the presets of real data for a few steps only; N = 4 and the preset `shapes` are ours.
# batch_gpu should fit 40 GB; 64 images of ImageNet-64 took 36 GiB, without the noise of 8192 images. A node should
# lie between the teacher and the untouched student. On shapes this student has pixel-FD 25. Nodes, in 18 steps, had 37
# to 57 at a degrade_lr of 1e-3, and 14 at 2e-4 (one seed).

REAL = dict(batch=512, batch_gpu=128, lr=1e-5, fake_lr=1e-5, fake_updates=1, sigma_init=2.5, student_sigma=(-1.2, 1.2),
            fake_sigma=(-1.2, 1.2), decay=0.0, degrade_kimg=500, node_kimg=500, ema_kimg=500, kimg=50_000,
            eval_images=10_000, snapshot_kimg=1000, status_kimg=10)
PRESETS = {  # *_sigma: mean and standard deviation of ln sigma; decay: last share of the run, over which lr falls to 0
    'shapes':     dict(batch=32, lr=6e-4, fake_lr=1e-3, fake_updates=2, sigma_init=2.5, student_sigma=(0.1, 1.6),
                       fake_sigma=(-0.2, 1.8), decay=0.5, degrade_kimg=1, degrade_lr=2e-4, node_kimg=0.25,
                       ema_kimg=500, kimg=28, eval_images=2_000, snapshot_kimg=14, status_kimg=0.7),
    'cifar10':    dict(REAL, batch=256, batch_gpu=256),
    'ffhq64':     REAL,
    'afhqv2':     dict(REAL, lr=5e-6, fake_lr=5e-6),
    'imagenet64': dict(REAL, batch=8192, batch_gpu=32, lr=4e-6, fake_lr=4e-6, degrade_kimg=2000, node_kimg=2000,
                       ema_kimg=2000, kimg=200_000, snapshot_kimg=4000, status_kimg=50),
}
sigma_data = 0.5  # EDM's standard deviation of the pixels
# Deviation: the released scripts enable a GAN loss. Here it is off by default, because Alg. 2 has none. It comes from
# DMD2, which draws separate noise levels for it, uniformly from a grid. Here the student's part uses the student's
# levels, and the discriminator's part those of the fake score.
DISCRIMINATOR_WEIGHT = 1e-2  # weight of the discriminator's loss, as in DMD2 for ImageNet-64


def parse_args(argv=None):
    positive, pair = edm_nets.positive, dict(type=float, nargs=2, metavar=('MEAN', 'STD'))
    parser, p, _ = edm_nets.common_flags('disback', __doc__, PRESETS, argv)
    p.add_argument('--nodes', type=int, default=4, help='nodes recorded on the path, not counting the '
                   'teacher; 0: no path, plain score distillation (%(default)s)')
    p.add_argument('--degrade-kimg', type=positive(float), metavar='KIMG',
                   help='thousands of images on which the teacher is degraded, in stage 1 (%(default)s)')
    p.add_argument('--degrade-lr', type=positive(float), metavar='LR',
                   help='learning rate of stage 1 (%(default)s; None means that of --fake-lr)')
    p.add_argument('--node-kimg', type=positive(float), metavar='KIMG',
                   help='thousands of student images before the next node becomes the target (%(default)s)')
    p.add_argument('--fake-lr', type=positive(float), metavar='LR',
                   help='learning rate of the fake score (%(default)s)')
    p.add_argument('--fake-updates', type=positive(int), metavar='N',
                   help='steps of the fake score per step of the student (%(default)s)')
    p.add_argument('--student-sigma', **pair,
                   help="mean and standard deviation of ln sigma in the student's loss %(default)s")
    p.add_argument('--fake-sigma', **pair,
                   help="mean and standard deviation of ln sigma in the fake score's loss %(default)s")
    p.add_argument('--loss', choices=['di', 'dmd'], default='di',
                   help="weight of the score difference: Diff-Instruct's or DMD's (%(default)s)")
    p.add_argument('--score-precision', choices=['fp16', 'fp32'], default='fp16', help='number format of both '
                   "scores in the student's loss with --precision bf16. If fp16 overflows, continue the run with fp32 "
                   '(%(default)s)')
    p.add_argument('--gan-weight', type=float, default=0, metavar='W',
                   help="weight of an additional GAN loss; DMD2 uses 3e-3, together with --loss dmd (%(default)s)")
    args = parser.parse_args(argv)
    args.degrade_lr = args.degrade_lr or args.fake_lr
    if args.nodes < 0 or args.gan_weight < 0:
        parser.error('--nodes and --gan-weight must not be negative')
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

    s = (D_x - x_t) / sigma^2 should be (x_0 - x_t) / sigma^2 on average. So the error of s is (D_x - x_0) / sigma^2.
    """
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2  # EDM Table 1, lambda(sigma)
    return (weight * (D_x - x_0) ** 2).sum([1, 2, 3])


def student_loss(x_0, D_fake, D_target, form):
    """Score distillation (Eq. 8) -> scalar. Its gradient in x_0 [N, C, H, W] is w(sigma) (s_fake - s_target) / N.

    Only this gradient counts; the value has no meaning. s_fake - s_target = (D_fake - D_target) / sigma^2. The authors
    do not state w. 'di' is Diff-Instruct's, w = sigma^2; 'dmd' is DMD's, w = sigma^2 / mean |x_0 - D_target|.
    Deviation: the released code, like EDM and Diff-Instruct, masks NaN in gradients. Here a NaN loss stops the run.
    """
    gradient = D_fake - D_target
    if form == 'dmd':
        gradient = gradient / (x_0 - D_target).abs().mean([1, 2, 3], keepdim=True)
    return (gradient.detach() * x_0).sum([1, 2, 3]).mean()


def recording_steps(steps, nodes):
    """{step: node}: the step after which each node is saved. Nodes 1 to N are evenly spaced; the last step saves N."""
    return {round(steps * i / nodes): i for i in range(1, nodes + 1)}


def node_at(nimg, nodes, node_kimg):
    """The target node after `nimg` student images: N-1 at first, then one less every node_kimg, down to 0, the teacher.

    Deviation: the released loop changes its target once, and even that fails (see `train`); we follow the paper.
    """
    return max(nodes - 1 - int(nimg // (node_kimg * 1000)), 0)


def make_discriminator(channels):
    """DMD2's GAN head on the bottleneck of the fake score: [N, channels, h, w] -> logits [N, 1].

    Deviation: DMD2 shrinks 8x8 to 1x1 by a second 4x4 convolution; the mean over pixels fits any bottleneck.
    """
    conv, norm = nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(min(32, channels // 4), channels)
    return nn.Sequential(conv, norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))

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
    # The student's gradient is the small difference of two similar networks, so both run in fp16. On shapes,
    # for networks 1, 10, 100 steps apart, its relative error is about 5, 0.7, 0.1 in bf16, but 0.7, 0.1, 0.01 in fp16.
    fp16 = args.precision == 'bf16' and args.score_precision == 'fp16'
    score_autocast = functools.partial(torch.autocast, device.type, torch.float16, enabled=fp16)

    # Data. The method itself needs no images; only the evaluation and the GAN term do.
    needed = args.eval_images or args.gan_weight or args.dataset == 'shapes'
    dataset = data.rank0_first(data.open_dataset, args.dataset, args.data) if needed else None
    if args.teacher is None:
        args.teacher = edm_nets.shapes_teacher() if args.dataset == 'shapes' else edm_nets.TEACHERS[args.dataset]

    # Networks. All are in eval mode, without dropout, as in DMD2 (Deviation: Diff-Instruct keeps it). In stage 1 the
    # fake score is the copy that is degraded. The target starts as the teacher; stage 2 loads each node into it.
    target = edm_nets.open_teacher(args.teacher, dataset).to(device, memory_format=torch.channels_last)
    if target.sigma_init is not None:
        raise ValueError(f'{args.teacher} is for noise level {target.sigma_init:g} only: give a teacher of all levels')
    student, ema, fake_score = (copy.deepcopy(target) for _ in range(3))
    student.sigma_init = ema.sigma_init = args.sigma_init
    student.requires_grad_(True)
    fake_score.requires_grad_(True)
    if args.compile:
        edm_nets.compile_networks(student, fake_score, target)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_fake = wrap(student), wrap(fake_score)
    shape = [args.batch, student.img_channels, student.img_resolution, student.img_resolution]  # of the global batch
    parts, fake_parameters = dict(student=student, ema=ema, fake_score=fake_score), list(fake_score.parameters())
    if args.gan_weight:
        _, h = target(torch.zeros([1, *shape[1:]], device=device), 1., bottleneck=True)
        torch.manual_seed(args.seed)
        discriminator = parts['discriminator'] = make_discriminator(h.shape[1]).to(device)
        ddp_discriminator = wrap(discriminator)
        fake_parameters += discriminator.parameters()
    # Diff-Instruct's betas. Deviation: SiD has beta1 0.9 on FFHQ, and an eps of 1e-6 for losses 100 times larger.
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True)
    student_optimizer = parts['student_optimizer'] = adam(student.parameters(), args.lr)
    fake_optimizer = parts['fake_optimizer'] = adam(fake_parameters, args.degrade_lr if args.nodes else args.fake_lr)

    # Resume. `parts` and two counts of images are the whole state: random numbers follow from seed and counts.
    fingerprints = dict(teacher=target.fingerprint, **(dict(data=data.identity(dataset)) if dataset else {}))
    config, state = data.load_checkpoint(args, parts, {'score_precision'}, **fingerprints)
    degraded, nimg, total = state.get('degraded', 0), state.get('nimg', 0), args.kimg * 1000  # images of both stages
    steps = max(round(args.degrade_kimg * 1000 / args.batch), args.nodes) if args.nodes else 0  # of the first stage
    resumed = nimg if state and degraded == steps * args.batch else None
    if rank == 0:
        a, b = (sum(p.numel() for p in group) for group in (student.parameters(), fake_parameters))
        data.start_log(args, state, f'[1/3] teacher of {a / 1e6:.2f} M parameters: {args.teacher}\n'
                       f'[2/3] recording {args.nodes} nodes, {degraded / 1000:g} to {steps * args.batch / 1000:g} '
                       f'kimg: degradation_loss should fall (--nodes 0 skips this)\n'
                       f'[3/3] training the student, {nimg / 1000:g} to {args.kimg:g} kimg: mismatch should fall once '
                       f'node is 0, the teacher; pictures of samples: {args.out}/grid-*.png', trained_parameters=a + b)
        if (args.nodes - 1) * args.node_kimg >= args.kimg:
            print('warning: this run ends before the teacher becomes the target: lower --nodes or --node-kimg')
    ruler = args.eval_images and fid.Ruler(
        dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
    classes, means = max(student.label_dim, 1), data.Means(degraded)  # an unconditional network ignores its one label

    # Stage 1, degradation recording (Alg. 1, Eq. 7): the fake score learns the samples of the untouched student.
    recordings, saved = recording_steps(steps, args.nodes), time.time()
    if rank == 0 and degraded == 0 and args.nodes:  # Deviation: the released code never stores the teacher
        edm_nets.save(f'{args.out}/path-00.pt', target, args.dataset, 0)
    for step in range(degraded // args.batch + 1, steps + 1):
        generator = data.step_generator(args.seed, degraded, 1, device)
        z, labels = draw_latents(shape, classes, generator)
        sigma, eps = draw_noise(shape, generator, *args.fake_sigma)
        for rows in rounds:
            ddp_fake.require_backward_grad_sync = rows is rounds[-1]  # ranks average their gradients once a step
            with autocast():
                with torch.no_grad():
                    x_0 = edm_nets.one_step(student, z[rows], labels[rows], args.sigma_init)
                D_x = ddp_fake(x_0 + sigma[rows] * eps[rows], sigma[rows], labels[rows])
            loss = denoising_error(D_x, x_0, sigma[rows]).mean()
            (loss / len(rounds)).backward()
            means.add(degradation_loss=loss)
        fake_optimizer.step()
        fake_optimizer.zero_grad(set_to_none=True)
        degraded += args.batch
        if step == steps:  # backtracking starts with a fresh optimizer
            fake_optimizer = parts['fake_optimizer'] = adam(fake_parameters, args.fake_lr)
        if step in recordings or is_due(degraded, args.batch, args.status_kimg):
            stats = dict(kimg=0, degrade_kimg=degraded / 1000, **means.collect(degraded))
            if rank == 0:
                data.log_status(args.out, stats, total)
            if rank == 0 and step in recordings:
                edm_nets.save(f'{args.out}/path-{recordings[step]:02d}.pt', fake_score, args.dataset, 0)
            means = data.Means(degraded)
        if rank == 0 and step < steps and (step in recordings or time.time() - saved > 1200):
            data.save_checkpoint(args.out, config, dict(degraded=degraded, nimg=0), parts)
            saved = time.time()
    dist.barrier()  # wait until rank 0 has written the path's files

    # Stage 2, distribution backtracking (Alg. 2).
    node = 0  # the target is the teacher
    means = data.Means(nimg)
    while True:
        # Status line (a resumed run has its first one already), snapshot, checkpoint, done?
        done = nimg >= total
        snapshot = done or is_due(nimg, args.batch, args.snapshot_kimg)
        if nimg != resumed and (snapshot or is_due(nimg, args.batch, args.status_kimg)):
            stats = dict(kimg=nimg / 1000, node=node_at(nimg, args.nodes, args.node_kimg), **means.collect(nimg))
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
            data.save_checkpoint(args.out, config, dict(degraded=degraded, nimg=nimg), parts)
            saved = time.time()
        if done:
            break

        # Load the current target. Deviation: the released script loads it with strict=False, and no key matches.
        if node != node_at(nimg, args.nodes, args.node_kimg):
            node = node_at(nimg, args.nodes, args.node_kimg)
            target.load_state_dict(edm_nets.load(f'{args.out}/path-{node:02d}.pt').state_dict(), strict=True)

        # Random numbers of this step, for the global batch; this rank takes its rows.
        generator = data.step_generator(args.seed, nimg, 0, device)
        z, labels = draw_latents(shape, classes, generator)
        sigma, eps = draw_noise(shape, generator, *args.student_sigma)

        # Update the student (Eq. 8): it descends D_fake - D_target.
        samples = []  # x_0 of each round
        for p in fake_parameters:  # here the GAN term must train the student only
            p.requires_grad_(False)
        for rows in rounds:
            ddp_student.require_backward_grad_sync = rows is rounds[-1]
            with autocast():
                x_0 = edm_nets.one_step(ddp_student, z[rows], labels[rows], args.sigma_init)
            x_t = x_0 + sigma[rows] * eps[rows]
            with torch.no_grad(), score_autocast():
                D_fake, D_target = (net(x_t, sigma[rows], labels[rows]) for net in (fake_score, target))
            loss = student_loss(x_0, D_fake, D_target, args.loss)
            means.add(student_loss=loss)
            if args.gan_weight:
                with autocast():
                    h = fake_score(x_t, sigma[rows], labels[rows], bottleneck=True)[1]  # keeping D_x would cost memory
                    logits = discriminator(h)
                gan_loss = F.softplus(-logits.float()).mean()
                loss = loss + args.gan_weight * x_0[0].numel() * gan_loss  # DMD2 averages losses over pixels, we sum
                means.add(gan_loss=gan_loss)
            (loss / len(rounds)).backward()
            samples.append(x_0.detach())
            a, b = (denoising_error(D, samples[-1], sigma[rows]).mean() for D in (D_target, D_fake))
            means.add(mismatch=a - b)  # how much worse the target denoises these samples than the fake score does
        for p in fake_parameters:
            p.requires_grad_(True)
        fall = min((1 - nimg / total) / args.decay, 1) if args.decay else 1
        student_optimizer.param_groups[0]['lr'] = args.lr * fall  # the fake score keeps its rate, to follow the student
        student_optimizer.step()
        student_optimizer.zero_grad(set_to_none=True)
        update_ema(ema, student, nimg, args.batch, args.ema_kimg)

        # Update the fake score (Eq. 5), first on the same samples, then on fresh ones (Deviation: as in DMD2).
        for update in range(args.fake_updates):
            if update:
                z, labels = draw_latents(shape, classes, generator)
                with torch.no_grad(), autocast():
                    samples = [edm_nets.one_step(student, z[rows], labels[rows], args.sigma_init) for rows in rounds]
            sigma, eps = draw_noise(shape, generator, *args.fake_sigma)
            for rows, x_0 in zip(rounds, samples):
                ddp_fake.require_backward_grad_sync = rows is rounds[-1]
                x_t, level, y = x_0 + sigma[rows] * eps[rows], sigma[rows], labels[rows]
                if args.gan_weight:  # append as many real images, at the same noise levels
                    ddp_discriminator.require_backward_grad_sync = rows is rounds[-1]
                    first = nimg * args.fake_updates + update * args.batch
                    indices = data.batch_order(args.seed, first, args.batch, len(dataset))[0][rows]
                    real = data.load_images(dataset, indices, device)
                    real_y = data.to_device(dataset.labels(indices), device).clamp(max=classes - 1)
                    x_t, level = torch.cat([x_t, real + level * eps[rows]]), level.repeat(2, 1, 1, 1)
                    y = torch.cat([y, F.one_hot(real_y, classes)])
                with autocast():
                    D_x, h = ddp_fake(x_t, level, y, bottleneck=True)
                loss = denoising_error(D_x[:len(x_0)], x_0, sigma[rows]).mean()
                means.add(fake_loss=loss)
                if args.gan_weight:
                    with autocast():
                        fake_logits, real_logits = ddp_discriminator(h).float().chunk(2)
                    discriminator_loss = (F.softplus(fake_logits) + F.softplus(-real_logits)).mean()
                    loss = loss + DISCRIMINATOR_WEIGHT * x_0[0].numel() * discriminator_loss
                    means.add(discriminator_loss=discriminator_loss)
                (loss / len(rounds)).backward()
            fake_optimizer.step()
            fake_optimizer.zero_grad(set_to_none=True)
        nimg += args.batch
    dist.barrier()  # guards the last files
    return nimg != resumed


def main(argv=None):
    args = parse_args(argv)
    with data.clear_errors('disback.py'):
        trained = train(args)
        if args.dataset == 'shapes' and not args.data and (trained or not os.path.exists(f'{args.out}/summary.png')):
            fid.summarize(args)
            if args.nodes and dist.get_rank() == 0:
                print(f'To compare, run the same without the path: --nodes 0 --out {args.out}-nodes0')
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
