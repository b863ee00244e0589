"""How fast this machine trains and scores: `python tests/bench.py`, in the root of the repository."""

import argparse
import copy
import sys
import time

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, '.')  # the root of the repository
import edm_nets  # noqa: E402
import fid  # noqa: E402

SIZES = dict(shapes=(16, 4), cifar10=(32, 0), imagenet64=(64, 1000))  # side of the images, number of classes


def seconds(function, repeat=10):
    """Median seconds of a call, after one call to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]


def bench_network(name, n, args, device, peak):
    """One-step sampling of n images, and a training step on n random images; peak: of this machine, in FLOP/s."""
    resolution, label_dim = SIZES[name]
    net = edm_nets.make_network(edm_nets.parse_train_args(['--dataset', name, '--dropout', '0']), resolution, label_dim)
    net = net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6, fused=True)
    x, eps = torch.randn([2, n, 3, resolution, resolution], device=device)
    sigma = torch.rand([n, 1, 1, 1], device=device) + 0.1
    labels = torch.eye(label_dim, device=device)[:1].expand(n, -1) if label_dim else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == 'bf16')

    def forward():
        with torch.no_grad(), autocast:
            edm_nets.one_step(net, x, labels, 80)

    def training_step():
        with autocast:
            loss = edm_nets.denoising_loss(net, x, sigma, eps, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        edm_nets.update_ema(ema, net, 10_000, n, 500)

    flops = {}
    for function in (forward, training_step):
        with FlopCounterMode(display=False) as counter:
            function()
        flops[function] = counter.get_total_flops()
    if args.compile:
        net.compile(dynamic=False)
    for function in (forward, training_step):
        s = seconds(function)
        rate = flops[function] / s
        print(f'{name}, {n} images, {function.__name__}: {s * 1e3:.2f} ms, {n / s:.1f} images/s, '
              f'{rate / 1e12:.3f} TFLOP/s, {rate / peak:.1%} of the peak', flush=True)
    if device.type == 'cuda':
        print(f'peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB')
        torch.cuda.reset_peak_memory_stats()


def main():
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument('--net', nargs='+', choices=SIZES, default=['imagenet64', 'cifar10'] if cuda else ['shapes'])
    p.add_argument('--batch-gpu', nargs='+', type=int, default=[64 if cuda else 32], help='images per step')
    p.add_argument('--precision', choices=['bf16', 'fp32'], default='bf16' if cuda else 'fp32')
    p.add_argument('--compile', action='store_true', help='torch.compile the network')
    args = p.parse_args()
    _, _, device = edm_nets.setup()
    side, dtype = 8192 if cuda else 2048, torch.bfloat16 if args.precision == 'bf16' else torch.float32
    a = torch.randn([side, side], device=device, dtype=dtype)
    peak = 2 * side ** 3 / seconds(lambda: a @ a)
    print(f'matmul peak: {peak / 1e12:.3f} TFLOP/s ({args.precision}, {side}x{side}, {device})')
    for name in args.net:
        for n in args.batch_gpu:
            bench_network(name, n, args, device, peak)

    # Random weights take as long as Inception's own.
    net = fid.fold(fid.InceptionV3()).to(device, memory_format=torch.contiguous_format if cuda else torch.channels_last)
    images = torch.randint(0, 256, [64 if cuda else 8, 3, 32, 32], dtype=torch.uint8, device=device)
    print(f'Inception: {len(images) / seconds(lambda: net(images), 3):.1f} images/s (fp32)')
    mu, sigma = torch.zeros(2048), torch.randn([4096, 2048]).T.cov()
    s = seconds(lambda: fid.frechet_distance(mu, sigma, mu, sigma), 1)
    print(f'Fréchet distance with 2,048 features: {s:.2f} s')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
