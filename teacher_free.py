"""Teacher-free one-step training: the student follows the gradient of a learned density ratio, at every noise level.

"Towards Training One-Step Diffusion Models Without Distillation" (arXiv:2502.08005 v3), from v4 on "DiffRatio: Training
One-Step Diffusion Models Without Teacher Supervision", M. Zhang, W. Chen, J. He et al. Training needs real images, but
not the teacher's score; the student only starts with its weights. We trained on shapes, not on the paper's data sets.

Score distillation moves a student G by the difference of two learned scores, each with its own error. Here one
classifier, which gets the noise level as an input, learns the log density ratio whose gradient is that difference:
  1. Student: descend an f-divergence D_f = E_student[f(r)] of the noised distributions, r = e^l. Its gradient is
     E[ -h(r) grad l(x_t) dx_t/dtheta ], h(r) = r^2 f''(r). The paper names DiKL (`rkl`) and DiJS (`js`, or `ns`).
  2. Ratio, --ratio-updates times, also in a warm-up: train the classifier's logit l by balanced cross-entropy on real
     and generated images at equal noise. At the optimum l(x_t, sigma) = log(p_data(x_t) / p_student(x_t)).

    paper                    here                 paper            here
    G_theta(z)               student              x_t              x_0 + sigma eps
    p_d                      data (real)          c                sigmoid(l), the probability of `real`
    log r                    log_ratio, l         w(t), p(t)       --weight, --student-sigma

    python teacher_free.py                                              # shapes, minutes on a CPU, nothing downloaded
    python teacher_free.py --dataset cifar10                            # one GPU, starts from the official EDM weights
    torchrun --nproc_per_node=8 teacher_free.py --dataset imagenet64    # eight GPUs
    python teacher_free.py --best-of 1 2 4 8                            # the ratio as a verifier of K candidates
"""

import copy
import datetime
import functools
import glob
import os
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import edm_nets
import fid

# ----------------------------------------------------------------------------------------------------
# Settings. Deviation: the paper's settings (its appendix) were not available to us. For real data, batch, lr,
# sigma_init, ema_kimg and a first stage of 100 kimg come from SiD (Score identity Distillation) and SiDA. The ratio
# network learns at the student's rate, as in Score-of-Mixture Training from a teacher; on shapes, 1 and 5 times this
# rate gave pixel-FD 3.7 and 11.3 (lr 1e-4, 4 draws, 28 kimg, one seed). The distribution of sigma is Diff-Instruct's,
# wider for the ratio network. We ran these rows for a few steps only. The row `shapes` is our choice. batch_gpu
# should fit 40 GB; 32 images of ImageNet-64 took 37 GiB, without the noise of 8192 images.

REAL = dict(batch=512, batch_gpu=64, lr=1e-5, ratio_lr=1e-5, ratio_updates=1, draws=1, sigma_init=2.5,
            student_sigma=(-1.2, 1.2), ratio_sigma=(-1.2, 1.4), decay=0.0, warmup_kimg=100, ema_kimg=500, kimg=50_000,
            xflip=True, eval_images=10_000, snapshot_kimg=1000, status_kimg=10)
PRESETS = {  # *_sigma: mean and standard deviation of ln sigma; decay: last share of the run, where the rates fall to 0
    'shapes':     dict(batch=32, lr=2e-4, ratio_lr=2e-4, ratio_updates=2, draws=1, sigma_init=2.5,
                       student_sigma=(0.1, 1.6), ratio_sigma=(0.1, 1.6), decay=0.5, warmup_kimg=3, ema_kimg=500,
                       kimg=20, xflip=False, eval_images=2_000, snapshot_kimg=10, status_kimg=1),
    'cifar10':    dict(REAL, batch=256, batch_gpu=128),
    'ffhq64':     REAL,
    'afhqv2':     dict(REAL, lr=5e-6, ratio_lr=5e-6),
    'imagenet64': dict(REAL, batch=8192, batch_gpu=16, lr=4e-6, ratio_lr=4e-6, warmup_kimg=1000, ema_kimg=2000,
                       kimg=200_000, xflip=False, snapshot_kimg=4000, status_kimg=50),
}
RATIO_NETS, RATIO_INITS = ['energy', 'encoder', 'lightweight'], ['features', 'teacher', 'random']
INITS = ['teacher', 'features', 'single-level', 'random']


def parse_args(argv=None):
    positive, pair = edm_nets.positive, dict(type=float, nargs=2, metavar=('MEAN', 'STD'))
    parser, p, evaluation = edm_nets.common_flags('teacher_free', __doc__, PRESETS, argv)
    p.add_argument('--divergence', choices=DIVERGENCES, default='js', help='what the student minimises (%(default)s)')
    p.add_argument('--weight', choices=WEIGHTS, default='1',
                   help="weight w(sigma) of the noise levels in the student's loss (%(default)s)")
    p.add_argument('--ratio-lr', type=positive(float), metavar='LR',
                   help='learning rate of the ratio network (%(default)s)')
    p.add_argument('--ratio-updates', type=positive(int), metavar='N',
                   help='steps of the ratio network per step of the student (%(default)s)')
    p.add_argument('--warmup-kimg', type=float, metavar='KIMG',
                   help='length of the warm-up of the ratio network, in thousands of images (%(default)s)')
    p.add_argument('--draws', type=positive(int), metavar='N',
                   help='noise levels drawn for each sample in one step of the student (%(default)s)')
    p.add_argument('--student-sigma', **pair,
                   help="mean and standard deviation of ln sigma in the student's loss %(default)s")
    p.add_argument('--ratio-sigma', **pair,
                   help="mean and standard deviation of ln sigma in the ratio network's loss %(default)s")
    p.add_argument('--ratio-net', choices=RATIO_NETS, default='energy',
                   help='kind of the ratio network, see make_ratio_net (%(default)s)')
    p.add_argument('--ratio-init', choices=RATIO_INITS, default='features',
                   help="which of the teacher's weights the ratio network starts from; lightweight uses none "
                   '(%(default)s)')
    p.add_argument('--init', choices=INITS, default='teacher',
                   help="which weights the student starts from, see initial_student (%(default)s)")
    p.add_argument('--fresh-lr', type=positive(float), metavar='LR', help='learning rate of the U-Net weights '
                   'that --init and --ratio-init leave random (that of the other weights)')
    p.add_argument('--single-level', metavar='FILE', help='network of one noise level, for --init single-level')
    evaluation.add_argument('--best-of', type=positive(int), nargs='+', metavar='K', default=[],
                            help='after training, score images that the ratio chose from K candidates each, for each K')
    evaluation.add_argument('--verifier', choices=['resample', 'max'], default='resample',
                            help='how --best-of chooses by the ratio, see best_of (%(default)s)')
    args = parser.parse_args(argv)
    if args.warmup_kimg < 0 or args.best_of and not args.eval_images:
        parser.error('--warmup-kimg must not be negative, and --best-of needs --eval-images above 0')
    if args.single_level and args.init != 'single-level' or \
            args.init == 'single-level' and (args.dataset != 'shapes' or args.data) and not args.single_level:
        flags = f'--dataset {args.dataset}' + f' --data {args.data}' * bool(args.data) + f' --sigma {args.sigma_init:g}'
        parser.error('give --single-level FILE with --init single-level, and only then; shapes needs no FILE; '
                     f'`python edm_nets.py train {flags}` trains that network')
    return args

# ----------------------------------------------------------------------------------------------------
# The method. Images and noise are float32 [N, C, H, W], sigma is [N, 1, 1, 1], l is [N], x_t = x_0 + sigma eps.

# Deviation: l is clamped to +-10 inside h(r), as in SiDA, because h is unbounded for three divergences. f-distill clips
# r to [0.1, 20] instead. That gave `fkl` a pixel-FD of 5.3 on shapes, not 6.5 (one seed), but for another divergence.
LOGIT_CLAMP = 10
VERIFIER_SIGMAS = [0.2, 0.5, 1.0]  # noise levels of best_of; the paper's are unknown. Lower ones show fine grain only
WEIGHTS = {'1': 0, 'sigma': 1, 'sigma2': 2}  # w(sigma) = sigma^power; sigma2 is Diff-Instruct's weight
# h(r) = r^2 f''(r) as a function of l = log r; the comments give f. Only js and rkl are known to be in the paper.
# Deviation: js has the exact gradient of the Jensen-Shannon divergence; the paper's DiJS may be the surrogate ns.
DIVERGENCES = {
    'js':        lambda l: torch.sigmoid(l) / 2,  # (r ln r - (1 + r) ln((1 + r) / 2)) / 2: Jensen-Shannon divergence
    'rkl':       lambda l: torch.ones_like(l),    # -ln r: KL(p_student || p_data), "DiKL", as Diff-Instruct
    'fkl':       lambda l: l.exp(),               # r ln r: KL(p_data || p_student)
    'hellinger': lambda l: (l / 2).exp() / 4,     # (sqrt r - 1)^2 / 2: squared Hellinger distance
    'jeffreys':  lambda l: 1 + l.exp(),           # (r - 1) ln r: the sum of both KL divergences
    'ns':        lambda l: torch.sigmoid(-l),     # (1 + r) ln((1 + r) / 2r): 2 KL(mean of both || p_data), GDD's loss
}


def draw_noise(shape, generator, P_mean, P_std):
    """Noise levels, ln sigma ~ N(P_mean, P_std^2), float32 [N, 1, 1, 1]; standard normal eps, float32 of `shape`."""
    kwargs = dict(generator=generator, device=generator.device)
    sigma = (P_mean + P_std * torch.randn([shape[0], 1, 1, 1], **kwargs)).exp()
    return sigma, torch.randn(shape, **kwargs)


def ratio_loss(real_log_ratio, fake_log_ratio):
    """Balanced binary cross-entropy on the logit l = log p_data / p_student -> scalar.

    Guessing gives 2 ln 2. The optimum is 2 ln 2 - 2 JS, where JS is the Jensen-Shannon divergence averaged over sigma.
    """
    return F.softplus(-real_log_ratio).mean() + F.softplus(fake_log_ratio).mean()


def student_loss(log_ratio, sigma, divergence, weight):
    """Mean of -w(sigma) h(r) l over the noised student samples -> scalar. h is held constant; the value has no meaning.

    If l is exact, the gradient -w h(r) grad l dx_t/dtheta is that of w E_student[f(r)] at each sigma.
    """
    h = DIVERGENCES[divergence](log_ratio.detach().clamp(-LOGIT_CLAMP, LOGIT_CLAMP))
    return -(sigma.flatten() ** WEIGHTS[weight] * h * log_ratio).mean()


def make_ratio_net(teacher, kind, init):
    """The initial ratio network: 'energy', 'encoder' (edm_nets.UNetCritic) or 'lightweight'. Its outputs sum to l.

    init: 'teacher' copies all of the teacher's weights; 'features' copies all but the output layer, so that the network
    does not start with the teacher's score; 'random' copies none. 'lightweight', a small encoder, always starts random.
    Deviation: we do not know the paper's network. An encoder is more likely, but it hardly sees fine grain.
    """
    if kind == 'lightweight':
        return edm_nets.make_critic('encoder', teacher, 'random', num_blocks=1, attn_resolutions=[],
                                    model_channels=teacher.kwargs['model_channels'] // 2)
    return edm_nets.make_critic(kind, teacher, init)


def load_ratio_net(path):
    """The ratio network in a student file, frozen, on the CPU. Raises ValueError when the file holds none."""
    content = torch.load(path, map_location='cpu', weights_only=True)
    if 'ratio_net' not in content:
        raise ValueError(f'{path} holds no ratio network: give a student file of teacher_free.py')
    ratio_net = edm_nets.UNetCritic(**content['ratio_net_kwargs'])
    ratio_net.load_state_dict(content['ratio_net'])
    return ratio_net.eval().requires_grad_(False)


def initial_student(args, teacher):
    """The student before training. --init repeats the paper's study of what the teacher's weights contribute.

    'teacher' copies all its weights. 'features' copies all but the output layer: it keeps features of all noise levels,
    but no map from latents to images. 'single-level' takes a network trained at sigma_init alone. 'random' copies none.
    Raises ValueError if the network of --single-level has another sigma_init, resolution or number of classes.
    """
    path = args.init == 'single-level' and (args.single_level or edm_nets.shapes_teacher(args.sigma_init))
    torch.manual_seed(args.seed)
    if path:
        student = data.rank0_first(edm_nets.load, path)
        found, wanted = ((sigma, net.img_resolution, net.label_dim) for sigma, net in (
            (student.sigma_init, student), (args.sigma_init, teacher)))
        if found != wanted:
            raise ValueError(f'{path}: (sigma, resolution, classes) are {found}, expected {wanted}')
        return student
    student = edm_nets.EDMPrecond(**teacher.kwargs).eval()
    student.sigma_init = args.sigma_init
    if args.init != 'random':
        edm_nets.copy_weights(student.model, teacher, output=args.init == 'teacher')
    return student.requires_grad_(False)


def parameter_groups(net, init, lr, fresh_lr):
    """Parameter groups of an optimizer: U-Net weights that `init` left random learn at `fresh_lr`, others at `lr`."""
    groups = {lr: [], fresh_lr or lr: []}
    for name, parameter in net.named_parameters():
        fresh = init == 'random' or init == 'features' and edm_nets.is_output(name)
        groups[(fresh_lr or lr) if fresh else lr].append(parameter)
    return [dict(params=params, lr=rate, full_lr=rate) for rate, params in groups.items() if params]


@torch.no_grad()
def best_of(student, ratio_net, seeds, K, verifier, batch=256):
    """Keep one of K one-step samples per seed, chosen by the ratio (v5 of the paper) -> uint8 [N, C, R, R] on the CPU.

    The mean of l over the noise levels VERIFIER_SIGMAS is about log p_data / p_student of a sample. 'resample' picks
    candidate k with probability softmax(l)_k, which moves p_student towards p_data; 'max' picks the largest l.
    Candidate 0 is the image that `edm_nets.generate` makes from the seed. Deviation: the student is the EMA, but the
    ratio was learned against the weights without it.
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
            log_ratio = log_ratio + ratio_net(x_0 + sigma * eps, sigma, labels).sum(1) / len(VERIFIER_SIGMAS)
        log_ratio = log_ratio.reshape(-1, K)
        if verifier == 'resample':  # argmax(l + Gumbel noise) is a draw from softmax(l); ndtr makes normals uniform
            uniform = torch.special.ndtr(rng.randn([K])).clamp(1e-6, 1 - 1e-6)
            log_ratio = log_ratio - (-uniform.log()).log()
        chosen = x_0.reshape(-1, K, *shape)[torch.arange(len(part), device=device), log_ratio.argmax(1)]
        images.append(data.to_uint8(chosen).cpu())
    return torch.cat(images)

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
    if args.teacher is None:
        args.teacher = edm_nets.shapes_teacher() if args.dataset == 'shapes' else edm_nets.TEACHERS[args.dataset]

    # Networks, all in eval mode: no dropout. The teacher is needed for its weights only.
    teacher = edm_nets.open_teacher(args.teacher, dataset)
    student = initial_student(args, teacher).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(student)
    ratio_net = make_ratio_net(teacher, args.ratio_net, args.ratio_init).eval()
    ratio_net = ratio_net.to(device, memory_format=torch.channels_last)
    classes, fingerprint = max(teacher.label_dim, 1), teacher.fingerprint
    del teacher
    student.requires_grad_(True)
    if args.compile:
        edm_nets.compile_networks(student, ratio_net)
    wrap = functools.partial(DDP, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    ddp_student, ddp_ratio = wrap(student), wrap(ratio_net)
    # Diff-Instruct's betas. Deviation: SiD has beta1 0.9 on FFHQ, and an eps of 1e-6 for losses 100 times larger.
    adam = functools.partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True)
    student_optimizer = adam(parameter_groups(student, args.init, args.lr, args.fresh_lr))
    ratio_init = 'random' if args.ratio_net == 'lightweight' else args.ratio_init
    ratio_optimizer = adam(parameter_groups(ratio_net, ratio_init, args.ratio_lr, args.fresh_lr))

    # Resume. `parts` and two counts of images are the whole state: random numbers follow from seed and counts.
    parts = dict(student=student, ema=ema, ratio_net=ratio_net, student_optimizer=student_optimizer,
                 ratio_optimizer=ratio_optimizer)
    config, state = data.load_checkpoint(args, parts, {'best_of', 'verifier'}, teacher=fingerprint,
                                         data=data.identity(dataset))
    warmed, nimg, total = state.get('warmed', 0), state.get('nimg', 0), args.kimg * 1000  # images of both stages
    warmup_total = round(args.warmup_kimg * 1000 / args.batch) * args.batch
    resumed = nimg if state and warmed == warmup_total else None
    if rank == 0:
        a, b = (sum(p.numel() for p in net.parameters()) for net in (student, ratio_net))
        data.start_log(args, state, f'[1/3] teacher of {a / 1e6:.2f} M parameters: {args.teacher}\n'
                       f'[2/3] training the ratio network of {b / 1e6:.2f} M parameters, {warmed / 1000:g} to '
                       f'{warmup_total / 1000:g} kimg: ratio_loss should fall below 1.386, the loss of guessing\n'
                       f'[3/3] training both, {nimg / 1000:g} to {args.kimg:g} kimg: the Fréchet distance should '
                       f'fall; pictures of samples: {args.out}/grid-*.png', trained_parameters=a + b)
    ruler = args.eval_images and fid.Ruler(
        dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz')
    shape = [args.batch, student.img_channels, student.img_resolution, student.img_resolution]  # of the global batch
    means, saved = data.Means(warmed), time.time()

    def real_batch(first):
        """Indices, flips and one-hot labels of the global batch of real images that starts at image number `first`."""
        indices, flips = data.batch_order(args.seed, first, args.batch, len(dataset))
        labels = data.to_device(dataset.labels(indices), device).clamp(max=classes - 1)  # 0 where there are no classes
        return indices, flips, F.one_hot(labels, classes)

    def update_ratio(real, generator, samples=None):
        """One step of the ratio network on real images and as many generated ones.

        real: what `real_batch` returns; samples: x_0 of each round, or None to draw new ones. Deviation: we do not know
        the paper's form. Here each generated image has the label and, as in SiDA, the noise of one real image.
        """
        indices, flips, labels = real
        if samples is None:
            z = torch.randn(shape, generator=generator, device=device)
            with torch.no_grad(), autocast():
                samples = [edm_nets.one_step(student, z[rows], labels[rows], args.sigma_init) for rows in rounds]
        sigma, eps = draw_noise(shape, generator, *args.ratio_sigma)
        for rows, x_0 in zip(rounds, samples):
            ddp_ratio.require_backward_grad_sync = rows is rounds[-1]  # ranks average their gradients once a step
            images = data.load_images(dataset, indices[rows], device, flips[rows] & args.xflip)
            x_t = torch.cat([images, x_0]) + (sigma[rows] * eps[rows]).repeat(2, 1, 1, 1)
            with autocast():
                log_ratio = ddp_ratio(x_t, sigma[rows].repeat(2, 1, 1, 1), labels[rows].repeat(2, 1))
            real_log_ratio, fake_log_ratio = log_ratio.sum(1).chunk(2)
            loss = ratio_loss(real_log_ratio, fake_log_ratio)
            (loss / len(rounds)).backward()
            means.add(ratio_loss=loss, log_ratio_real=real_log_ratio.mean(), log_ratio_fake=fake_log_ratio.mean())
        ratio_optimizer.step()
        ratio_optimizer.zero_grad(set_to_none=True)

    # Stage 1, warm-up: the ratio network learns to judge the untouched student.
    while warmed < warmup_total:
        generator = data.step_generator(args.seed, warmed, 1, device)
        for update in range(args.ratio_updates):
            update_ratio(real_batch(warmed * args.ratio_updates + update * args.batch), generator)
        warmed += args.batch
        if is_due(warmed, args.batch, args.status_kimg):
            stats = dict(kimg=0, warmup_kimg=warmed / 1000, **means.collect(warmed))
            if rank == 0:
                data.log_status(args.out, stats, total)
            means = data.Means(warmed)
        if rank == 0 and warmed < warmup_total and (
                is_due(warmed, args.batch, args.snapshot_kimg) or time.time() - saved > 1200):
            data.save_checkpoint(args.out, config, dict(warmed=warmed, nimg=0), parts)
            saved = time.time()

    # Stage 2: student and ratio network in turns.
    means = data.Means(nimg)
    while True:
        # Status line (a resumed run has its first one already), snapshot, checkpoint, done?
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
                    edm_nets.save(f'{args.out}/student-{nimg // 1000:06d}.pt', ema, args.dataset, nimg,
                                  ratio_net={k: v.cpu() for k, v in ratio_net.state_dict().items()},
                                  ratio_net_kwargs=ratio_net.kwargs)
            means = data.Means(nimg)
        if rank == 0 and nimg != resumed and (snapshot or time.time() - saved > 1200):  # at most 20 minutes are lost
            data.save_checkpoint(args.out, config, dict(warmed=warmed, nimg=nimg), parts)
            saved = time.time()
        if done:
            break

        # Random numbers of this step, for the global batch; this rank takes its rows.
        generator = data.step_generator(args.seed, nimg, 0, device)
        z = torch.randn(shape, generator=generator, device=device)
        noises = [draw_noise(shape, generator, *args.student_sigma) for _ in range(args.draws)]  # (sigma, eps)
        reals = [real_batch((warmed + nimg) * args.ratio_updates + update * args.batch)
                 for update in range(args.ratio_updates)]
        labels = reals[0][2]
        fall = min((1 - nimg / total) / args.decay, 1) if args.decay else 1
        for group in student_optimizer.param_groups + ratio_optimizer.param_groups:
            group['lr'] = group['full_lr'] * fall

        # Update the student: it climbs the log ratio.
        samples = []  # x_0 of each round
        ratio_net.requires_grad_(False)  # the gradient passes through to x_t
        for rows in rounds:
            ddp_student.require_backward_grad_sync = rows is rounds[-1]
            with autocast():
                x_0 = edm_nets.one_step(ddp_student, z[rows], labels[rows], args.sigma_init)
                x_t = torch.cat([x_0 + sigma[rows] * eps[rows] for sigma, eps in noises])  # [draws * N, C, R, R]
                sigma = torch.cat([sigma[rows] for sigma, _ in noises])
                log_ratio = ratio_net(x_t, sigma, labels[rows].repeat(args.draws, 1)).sum(1)
            loss = student_loss(log_ratio, sigma, args.divergence, args.weight)
            (loss / len(rounds)).backward()
            means.add(student_loss=loss)
            samples.append(x_0.detach())
        ratio_net.requires_grad_(True)
        student_optimizer.step()
        student_optimizer.zero_grad(set_to_none=True)
        update_ema(ema, student, nimg, args.batch, args.ema_kimg)

        # Update the ratio network, first on the same samples, then on fresh ones.
        for real in reals:
            update_ratio(real, generator, samples)
            samples = None
        nimg += args.batch
    dist.barrier()  # guards the last files
    return nimg != resumed


def verify(args):
    """Score the finished student with K candidates per image, for every K of --best-of. Writes a table and grids."""
    rank, _, device = setup()
    path = max(glob.glob(f'{args.out}/student-*.pt'))
    student, ratio_net = edm_nets.load(path).to(device), load_ratio_net(path).to(device)
    dataset = data.rank0_first(data.open_dataset, args.dataset, args.data)
    ruler, rows = fid.Ruler(dataset, args.features, device, cache=f'{args.out}/reference-{args.features}.npz'), {}
    for K in args.best_of:
        images = functools.partial(best_of, student, ratio_net, K=K, verifier=args.verifier)
        rows[f'{args.verifier}, K = {K}'] = ruler.score(images, args.eval_images)
        if rank == 0:
            data.save_panels({'': images(range(64))}, f'{args.out}/best-of-{K}-{args.verifier}.png')
    fid.report(rows, f'{args.out}/best-of-{args.verifier}.txt')


def main(argv=None):
    args = parse_args(argv)
    with data.clear_errors('teacher_free.py'):
        trained = train(args)
        if args.dataset == 'shapes' and not args.data and (trained or not os.path.exists(f'{args.out}/summary.png')):
            fid.summarize(args, initial_student(args, edm_nets.load(args.teacher)))
        if args.best_of:
            verify(args)
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
