"""Run this first on a machine with a GPU, from the root of the repository: `python tests/gpu.py`, about ten minutes.

  1. Every script trains a small network on `shapes`: on the CPU in fp32, on the GPU in fp32 and in bf16. All get the
     same random numbers, so all should have the same losses. Only five steps of each stage are compared, because small
     differences grow. (Those of teacher_free.py are large from the start: the gradient of its constant term a_0 is zero
     except for rounding, but Adam turns it into full steps.)
  2. Every script is timed for a few steps in bf16, with the presets of cifar10, ffhq64 and imagenet64. A step adds up
     two rounds of --batch-gpu images. Single calls of the networks are timed in fp32 and bf16, and so is Inception.
  3. Part 1 is repeated with --compile, and so are the timings of two teachers in training.
Weights and images are random; they take as long as real ones. On a CPU, `--tiny` runs parts 1 and 2 on small networks.
"""

import argparse
import gc
import importlib
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, '.')  # the root of the repository
import data  # noqa: E402
import distributional  # noqa: E402
import edm_nets  # noqa: E402
import fid  # noqa: E402

SIZES = dict(cifar10=(32, 0), ffhq64=(64, 0), imagenet64=(64, 1000))  # side of the images, number of classes
SMALL = {  # flags of part 1
    'edm_nets': 'train --channels 8 --channel-mult 1 2 --blocks 1 --attention 8',
    'disback': '--lr 1e-4 --fake-lr 1e-4 --nodes 2 --degrade-kimg {kimg} --node-kimg 0.01 --gan-weight 1e-3 '
               '--eval-images 0',  # with the learning rates of shapes, rounding in bf16 moves the GAN loss by 20 %
    'teacher_free': '--warmup-kimg {kimg} --eval-images 0',
    'distributional': '--freeze 1 --r1-interval 4 --eval-images 0'}
REAL = {  # flags of part 2: one stage, and no scores
    'edm_nets': 'train --dropout 0',
    'disback': '--nodes 0 --eval-images 0',
    'teacher_free': '--warmup-kimg 1e-3 --eval-images 0',
    'distributional': '--r1-interval 4 --eval-images 0'}
CPU = torch.device('cpu')
NO_LOSS = {'kimg', 'sec_per_kimg', 'seconds', 'peak_gib', 'node', 'degrade_kimg', 'warmup_kimg'}  # in stats.jsonl


def seconds(function, repeat=5):
    """Median seconds of a call, after one call to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]


def run(script, flags):
    """Run a script inside this process. False if it ended in an error, which it has printed."""
    try:
        importlib.import_module(script).main(flags.split())
        return True
    except SystemExit:
        return False
    finally:
        if torch.cuda.is_available():
            gc.collect()  # cycles that hold networks
            torch.cuda.empty_cache()


def no_images(*_, **__):
    """Stands in for edm_nets.generate."""
    return torch.zeros(1, 3, 8, 8)


def losses(script, kimg, flags, device):
    """{name: array} of a run's losses, one per step; its random numbers are drawn on the CPU, whatever the device."""
    def drawn_on_the_cpu(draw):
        def function(*args, generator=None, **kwargs):
            if generator is None or generator.device.type != 'cpu':
                return draw(*args, generator=generator, **kwargs)
            return draw(*args, generator=generator, **dict(kwargs, device='cpu')).to(device)
        return function

    original, (*_, out) = data.step_generator, flags.split()
    with mock.patch('data.step_generator', lambda seed, nimg, stream, _: original(seed, nimg, stream, CPU)), \
            mock.patch('torch.randn', drawn_on_the_cpu(torch.randn)), \
            mock.patch('torch.randint', drawn_on_the_cpu(torch.randint)), \
            mock.patch('torch.cuda.is_available', lambda: device == 'cuda'), \
            mock.patch('fid.summarize'), mock.patch('data.save_checkpoint'), mock.patch('edm_nets.generate', no_images):
        if not run(script, f'{SMALL[script].format(kimg=kimg)} --kimg {kimg} --status-kimg 1e-3 {flags}'):
            return {}
    lines = fid.read_stats(out)
    return {name: np.array([line[name] for line in lines if name in line])
            for name in dict.fromkeys(key for line in lines for key in line) if name not in NO_LOSS}


def compare_losses(folder, device, tiny, references, **runs):
    """Parts 1 and 3: {script: {run: text}}; the text is a loss's largest difference, relative to its maximum or to 1.

    references: {script: losses on the CPU in fp32}, added where missing; runs: {name: flags}.
    """
    rows, batch = {}, 8 if tiny else 32
    kimg = batch * (2 if tiny else 5) / 1000
    for script in SMALL:
        teacher = '' if script == 'edm_nets' else f'--teacher {folder}/edm_nets-cpu/teacher-000000.pt'
        more, out = f'--batch {batch} {teacher}', f'--out {folder}/{script}-'
        if script not in references:
            references[script] = losses(script, kimg, f'{more} --precision fp32 {out}cpu', 'cpu')
        for name, flags in runs.items():
            found = losses(script, kimg, f'{more} {flags} {out}{name}', device)
            difference = max([np.abs(found[k] - v).max() / max(np.abs(v).max(), 1)
                              for k, v in references[script].items()] if found else [np.inf])
            text = f'{difference:.1e}' + ' FAILED' * (not difference < 0.05)
            rows.setdefault(script, {})[name] = text
            print(script, name, text, flush=True)
    return rows


class Steps:
    """Replaces data.step_generator, which every step calls first: keeps the times, counts the second step's FLOPs."""

    def __init__(self, count):
        self.times, self.original = [], data.step_generator
        self.counter = FlopCounterMode(display=False) if count else None

    def __call__(self, *args):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.counter and len(self.times) == 1:
            self.counter.__enter__()
        elif self.counter and len(self.times) == 2:
            self.counter.__exit__(None, None, None)
        self.times.append(time.perf_counter())
        return self.original(*args)


def random_preset(folder, name, tiny):
    """Write a random teacher and random images for a preset; returns the flags that name them."""
    side, classes = (16, 0) if tiny else SIZES[name]
    args = edm_nets.parse_train_args(['--dataset', name, *SMALL['edm_nets'].split()[1:] * tiny])
    edm_nets.save(f'{folder}/{name}.pt', edm_nets.make_network(args, side, classes), name, 0)
    Path(f'{folder}/{name}').mkdir(exist_ok=True)
    np.save(f'{folder}/{name}/images.npy', np.random.default_rng(0).integers(0, 256, [512, side, side, 3], np.uint8))
    if classes:
        np.save(f'{folder}/{name}/labels.npy', np.arange(512) * 2 % (classes - 1) + 1)
    return f'--dataset {name} --data {folder}/{name}'


def time_preset(script, name, flags, peak, tiny):
    """Parts 2 and 3: one row of the table of steps. peak: FLOP/s of a large matrix product in bf16."""
    n = 2 if tiny else importlib.import_module(script).PRESETS[name]['batch_gpu']
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps = Steps(count='--compile' not in flags)
    with mock.patch('data.step_generator', steps), mock.patch('data.save_checkpoint'), \
            mock.patch('distributional.feature_network', lambda backbone, _: distributional.FEATURES[backbone][0]()), \
            mock.patch('edm_nets.save'), mock.patch('edm_nets.generate', no_images):
        if not run(script, f'{REAL[script]} {flags} --batch {2 * n} --kimg {0.014 * n} --precision bf16'):
            return dict(batch=f'2 x {n}', ms='FAILED')
    step = float(np.median(np.diff(steps.times)[2:]))
    row = {'batch': f'2 x {n}', 'ms': f'{step * 1e3:.1f}', 'images/s': f'{2 * n / step:.1f}'}
    if steps.counter:
        flops = steps.counter.get_total_flops()
        row |= {'TFLOP': f'{flops / 1e12:.3g}', 'of peak': f'{flops / step / peak:.1%}'}
    if torch.cuda.is_available():
        row['peak GiB'] = f'{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}'
    return row


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tiny', action='store_true', help='use small networks, which a CPU can run')
    p.add_argument('--part', type=int, nargs='+', choices=[1, 2, 3], default=[1, 2, 3], help='parts (%(default)s)')
    args = p.parse_args(argv)
    cuda, start = torch.cuda.is_available(), time.time()
    if not cuda and not args.tiny:
        p.error('this machine has no GPU: give --tiny to run small networks on the CPU')
    device, side = torch.device('cuda' if cuda else 'cpu'), 8192 if cuda else 256
    a = torch.randn([side, side], device=device, dtype=torch.bfloat16)
    peak = 2 * side ** 3 / seconds(lambda: a @ a)
    print(f'{torch.cuda.get_device_name() if cuda else "CPU"}, torch {torch.__version__}: a product of two matrices of '
          f'{side}x{side} in bf16 runs at {peak / 1e12:.3g} TFLOP/s', flush=True)
    compared, timed, calls, references = {}, {}, {}, {}

    def add(rows, name, row):
        rows[name] = row
        print(f'{time.time() - start:4.0f} s  {name}  {row}', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if 1 in args.part:
            compared = compare_losses(
                folder, device.type, args.tiny, references, fp32='--precision fp32', bf16='--precision bf16')
        for name in (['cifar10'] if args.tiny else SIZES) if 2 in args.part else ():
            flags = random_preset(folder, name, args.tiny)
            for script in REAL:
                more = SMALL[script][5:] * args.tiny if script == 'edm_nets' else f'--teacher {folder}/{name}.pt'
                more += ' --backbones energy' * (args.tiny and script == 'distributional')
                add(timed, f'{script} {name}', time_preset(
                    script, name, f'{flags} {more} --out {folder}/{script}-{name}', peak, args.tiny))
            net = edm_nets.load(f'{folder}/{name}.pt').to(device, memory_format=torch.channels_last)
            z = torch.randn([2 if args.tiny else 64, 3, net.img_resolution, net.img_resolution], device=device)
            for precision in ('fp32', 'bf16'):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'):
                    s = seconds(lambda: edm_nets.one_step(net, z, None, 80))
                add(calls, f'{name}, {precision}', {'images/s': f'{len(z) / s:.1f}'})
        if 2 in args.part:
            inception = fid.fold(fid.InceptionV3()).to(
                device, memory_format=torch.contiguous_format if cuda else torch.channels_last)
            images = torch.randint(0, 256, [250 if cuda else 2, 3, 32, 32], dtype=torch.uint8, device=device)
            s = seconds(lambda: inception(images), 3)
            add(calls, 'Inception, fp32', {'images/s': f'{len(images) / s:.1f}'})
        if 3 in args.part and cuda:
            for script, row in compare_losses(folder, 'cuda', args.tiny, references, compiled='--compile').items():
                compared.setdefault(script, {}).update(row)
            for name in ('cifar10', 'imagenet64'):
                flags = random_preset(folder, name, args.tiny)
                add(timed, f'edm_nets {name}, compiled', time_preset(
                    'edm_nets', name, f'{flags} --out {folder}/compiled-{name} --compile', peak, args.tiny))
    for title, rows in {
            'Largest difference of a loss from the CPU in fp32, relative to the loss': compared,
            'A step of two rounds of --batch-gpu images in bf16': timed, 'One call': calls}.items():
        if rows:
            print(f'\n{title}')
            fid.report(rows, columns=list(dict.fromkeys(column for row in rows.values() for column in row)))
    return int('FAILED' in f'{compared} {timed}')


if __name__ == '__main__':
    sys.exit(main())
