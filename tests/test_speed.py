"""What is done for speed changes no result, and no training step waits for the device; --profile and bench run."""

import collections
import functools
import json
import traceback

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import distributional
import edm_nets
import fid
from conftest import ROOT, distance, run, weights

SCRIPTS = {  # four steps of 32 images, a checkpoint after the second
    'edm_nets': ['train', '--channels', '8', '--channel-mult', '1', '--attention', '16', '--lr', '1e-3'],
    'disback': ['--nodes', '0', '--fake-updates', '1', '--lr', '1e-4', '--fake-lr', '1e-4', '--eval-images', '0'],
    'teacher_free': ['--warmup-kimg', '0', '--lr', '3e-5', '--ratio-lr', '1e-4', '--eval-images', '0'],
    'distributional': ['--r1-interval', '2', '--lr', '3e-5', '--d-lr', '1e-4', '--eval-images', '0']}
STEPS = ['--batch', '32', '--kimg', '0.128', '--status-kimg', '0.032', '--snapshot-kimg', '0.064']


def command(script, runs):
    teacher = [] if script == 'edm_nets' else ['--teacher', runs / 'teacher' / 'teacher-000001.pt']
    return [ROOT / f'{script}.py', *SCRIPTS[script], *STEPS, *teacher]


def result(script, out):
    return weights(out / f'{"teacher" if script == "edm_nets" else "student"}-000000.pt')


def losses(out):
    """Of every status line."""
    return [{k: v for k, v in json.loads(line).items() if k.endswith('loss')} for line in open(out / 'stats.jsonl')]


EAGER = functools.partialmethod(torch.nn.Module.compile, backend='eager')
AOT_RUN = 'import torch, functools, edm_nets, sys; torch.nn.Module.compile = functools.partialmethod(' \
    'torch.nn.Module.compile, backend="aot_eager"); edm_nets.main(sys.argv[1:])'


@pytest.mark.parametrize('script', SCRIPTS)
def test_compiled_training_is_the_same(script, runs, tmp_path, monkeypatch):
    """--compile with accumulation has the losses of an eager run, and ends with its weights; on two processes
    (edm_nets), stopped and resumed (distributional). The backends here make the graphs, for edm_nets of the backward
    pass too, but no kernels: Inductor takes minutes on a CPU."""
    eager, compiled = command(script, runs), [*command(script, runs), '--compile', '--out', tmp_path / 'compiled']
    assert run(*eager, '--out', tmp_path / 'eager').returncode == 0
    if script == 'edm_nets':
        (tmp_path / 'compiled.py').write_text(AOT_RUN)
        done = run(tmp_path / 'compiled.py', *compiled[1:], '--batch-gpu', '8', processes=2)
    else:
        monkeypatch.setattr(torch.nn.Module, 'compile', EAGER)
        if script == 'distributional':
            real = distributional.log_status

            def stop(out, stats, nimg, *more):
                real(out, stats, nimg, *more)
                if nimg == 96:
                    raise OSError('pulled the plug')
            monkeypatch.setattr(distributional, 'log_status', stop)
            assert 'pulled the plug' in run(*compiled, '--batch-gpu', '16').stderr
            monkeypatch.setattr(distributional, 'log_status', real)
        done = run(*compiled, '--batch-gpu', '16')
        assert ('resuming' in done.stdout) == (script == 'distributional')
    assert done.returncode == 0, done.stderr
    assert distance(*(result(script, tmp_path / name) for name in ('eager', 'compiled'))) < 1e-4
    a, b = losses(tmp_path / 'eager'), losses(tmp_path / 'compiled')
    assert len(a) == len(b) and all(x == pytest.approx(y, rel=2 ** -8, abs=1e-3) for x, y in zip(a, b))


class Waits(TorchDispatchMode):
    """Counts, by line of the project, where a number is taken out of a tensor: there a GPU would be awaited."""

    def __init__(self):
        super().__init__()
        self.lines = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        running = edm_nets.Profile.running
        if function is torch.ops.aten._local_scalar_dense.default and running and running.seen:
            frames = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(str(ROOT))]
            self.lines[f'{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}'] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_step_waits_for_nothing(script, runs, tmp_path):
    """No number is read back from the device (copies to it are not seen here: on a GPU --profile warns of both).

    And --profile names the parts of the step, and leaves nothing but the trace.
    """
    with Waits() as waits:
        done = run(*command(script, runs), '--out', tmp_path / 'run', '--profile', '2')
    assert done.returncode == 0, done.stderr
    assert not [line for line in waits.lines if 'one_hot' not in line], waits.lines  # checks its input on CPUs alone
    assert [file.name for file in tmp_path.iterdir()] == ['run-trace.json.gz']
    table = {line[:38].strip(): line[38:].split() for line in done.stdout.splitlines()}
    assert {'random numbers', 'moving average', 'all parts, one after the other', 'a step'} <= set(table)
    shares = [float(row[1][:-1]) for row in table.values() if len(row) == 2 and row[1].endswith('%')]
    assert len(shares) > 5 and sum(shares) == pytest.approx(100, abs=1)
    assert float(table['peak memory of tensors, rank 0'][0]) > 0.01


def test_a_profile_is_of_what_was_asked_for(tmp_path, monkeypatch):
    """Not of the teacher that is trained on the way, which is finished as ever."""
    monkeypatch.chdir(tmp_path)
    net = dict(edm_nets.SMALL, model_channels=8, channel_mult=[1, 2])
    monkeypatch.setitem(edm_nets.PRESETS, 'shapes', dict(edm_nets.PRESETS['shapes'], net=net, kimg=1))
    done = run(ROOT / 'disback.py', '--profile', '1')
    assert done.returncode == 0 and 'fake score, forward' in done.stdout and 'network, forward' not in done.stdout
    assert (tmp_path / 'runs' / 'teacher-shapes' / 'teacher-000001.pt').exists()
    assert not (tmp_path / 'runs' / 'disback-shapes').exists()


def test_bench_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, 'compile', EAGER)
    monkeypatch.setattr(edm_nets.seconds_per_call, '__defaults__', (1,))
    done = run(ROOT / 'edm_nets.py', 'bench', '--batch-gpu', '2', '--ways')
    assert done.returncode == 0, done.stderr
    assert 'training step' in done.stdout and 'GFLOP/image' in done.stdout and 'compiled' in done.stdout
    fid.bench(torch.device('cpu'), n=1, d=32)
    distances = [float(line.split(': ')[1]) for line in capsys.readouterr().out.splitlines() if '32 features' in line]
    assert distances[0] == pytest.approx(distances[1], rel=1e-8)


def saved_bytes(net, x, sigma):
    """What the graph of one bf16 forward pass keeps, weights apart."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu', torch.bfloat16):
        net(x, sigma).sum()
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum(s.nbytes() for key, s in storages.items() if key not in own)


def test_the_graph_of_a_bf16_step_is_bf16(monkeypatch):
    """CIFAR-10's network, by fake tensors, with CUDA's autocast, which makes group_norm float32 wherever it is on: 59
    MiB per image, and with torch's own GroupNorm 1.7 times that."""
    real = torch.nn.functional.group_norm

    def as_on_cuda(x, groups, *more):
        return real(x.float() if torch.is_autocast_enabled('cpu') else x, groups, *more)
    monkeypatch.setattr(torch.nn.functional, 'group_norm', as_on_cuda)
    with FakeTensorMode():
        net = edm_nets.EDMPrecond(32, 3, **edm_nets.PRESETS['cifar10']['net'], dropout=0)
        x, sigma = torch.empty([32, 3, 32, 32]), torch.ones([32, 1, 1, 1])
        here = saved_bytes(net, x, sigma) / 32
        monkeypatch.setattr(edm_nets.GroupNorm, 'forward', torch.nn.GroupNorm.forward)
        assert here < 60 * 2 ** 20 < 1.6 * here < saved_bytes(net, x, sigma) / 32


def test_folded_inception_is_the_same():
    torch.manual_seed(0)
    net = fid.InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    images = torch.randint(0, 256, [2, 3, 32, 32], dtype=torch.uint8)
    before = net(images)[0]
    after = fid.fold(net)(images)[0]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
