"""What is done for speed changes no result, and no training step waits for the device; tests/gpu.py runs."""

import copy
import functools
import importlib
import json
import traceback

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import edm_nets
import fid
import gpu
from conftest import ROOT, run

SHORT = '--snapshot-kimg 9 '  # with the flags that take the first stage away, and have R1 in every step
MORE = dict(edm_nets=SHORT, disback=SHORT + '--nodes 0 --fake-updates 1', teacher_free=SHORT + '--warmup-kimg 0',
            distributional=SHORT + '--r1-interval 1')
load = functools.partial(torch.load, weights_only=True)


def succeed(*command):
    """What a command prints that ends well."""
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(message, *command):
    """A command ends with this message, in one line, to which argparse adds the usage."""
    done = run(*command)
    assert done.returncode and message in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert done.returncode == 2 or done.stderr.count('\n') == 1, done.stderr


def student(out):
    """The weights of the student, or of a teacher in training: those of the last file for users."""
    return load(max(out.glob('[st]*-0*.pt')))['net']


def distance(a, b):
    """The relative distance of two sets of weights."""
    return float(sum((a[k] - b[k]).square().sum() for k in a).sqrt() / sum(a[k].square().sum() for k in a).sqrt())


def status_lines(out):
    return [json.loads(line) for line in (out / 'stats.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('script, more', MORE.items(), ids=MORE)
def test_compiled_training_is_the_same(script, more, command, tmp_path, monkeypatch):
    """With accumulation it has the losses of an eager run, and ends with its weights. The backends make the graphs, for
    edm_nets of the backward pass too, but no kernels: Inductor takes minutes on a CPU."""
    eager, compiled = (tmp_path / name for name in ('eager', 'compiled'))
    succeed(*command(script, eager, f'{more} --kimg 0.064'))
    backend = 'aot_eager' if script == 'edm_nets' else 'eager'
    monkeypatch.setattr(torch.nn.Module, 'compile', functools.partialmethod(torch.nn.Module.compile, backend=backend))
    succeed(*command(script, compiled, f'{more} --kimg 0.064 --compile --batch-gpu 16'))
    assert distance(student(eager), student(compiled)) < 1e-4
    for a, b in zip(status_lines(eager), status_lines(compiled), strict=True):
        names = [name for name in a if name.endswith('loss') and abs(a[name]) > 0.1]  # others are sums that cancel
        assert [b[name] for name in names] == pytest.approx([a[name] for name in names], rel=1e-2)


@pytest.mark.parametrize('more, seen', [
    ('', {torch.bfloat16, torch.float16}), ('--score-precision fp32', {torch.bfloat16, None})])
def test_the_two_scores_run_in_fp16_or_fp32_beside_bf16(more, seen, command, tmp_path, monkeypatch):
    dtypes = set()

    def watch(module, _):
        if isinstance(module, edm_nets.EDMPrecond):
            dtypes.add(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None)
    monkeypatch.setattr(edm_nets, 'generate', gpu.no_images)
    monkeypatch.setattr(fid, 'summarize', lambda *_: None)
    with torch.nn.modules.module.register_module_forward_pre_hook(watch):
        succeed(*command('disback', tmp_path, f'{SHORT} --nodes 0 --kimg 0.032 --precision bf16 {more}'))
    assert dtypes == seen


def test_fp16_keeps_the_difference_of_two_close_networks_that_bf16_drowns():
    """And nearest upsampling, which autocast would do in float32, stays in the dtype that it is given."""
    net = edm_nets.make_network(edm_nets.parse_train_args([]), 16, 4).requires_grad_(False)
    close, x, sigma = copy.deepcopy(net), torch.randn(8, 3, 16, 16), torch.full([8, 1, 1, 1], 0.5)
    for p, q in zip(net.parameters(), close.parameters()):
        p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5 if p.ndim > 1 else p)
        q.copy_(p * (1 + 1e-3 * torch.randn_like(p)))
    difference, errors = net(x, sigma) - close(x, sigma), {}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast('cpu', dtype):
            errors[dtype] = ((net(x, sigma) - close(x, sigma)) - difference).norm() / difference.norm()
            up = edm_nets.resample(x.to(dtype), edm_nets.make_filter([1, 1]), up=True)
        assert up.dtype == dtype and up.shape == (8, 3, 32, 32)
    assert errors[torch.float16] < errors[torch.bfloat16] / 4 and 1 < errors[torch.bfloat16] < 10


class Waits(TorchDispatchMode):
    """Notes the lines of the project where a number is taken out of a tensor: there a GPU would be awaited."""
    steps, lines = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and 0 < self.steps < 3:
            frames = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(str(ROOT))]
            self.lines += f'{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}',
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('script, more', MORE.items(), ids=MORE)
def test_a_step_waits_for_nothing(script, more, command, tmp_path, monkeypatch):
    """No number is read back from the device between the moving average of the first step and that of the third."""
    waits, update_ema = Waits(), importlib.import_module(script).update_ema

    def count(*args):
        update_ema(*args)
        waits.steps += 1
    monkeypatch.setattr(f'{script}.update_ema', count)
    with waits:
        succeed(*command(script, tmp_path, f'{more} --kimg 0.096 --status-kimg 9'))
    assert waits.steps == 3
    assert not [line for line in waits.lines if 'one_hot' not in line], waits.lines  # checks its input on CPUs alone


def test_the_gpu_check_runs_on_a_cpu(monkeypatch, capsys):
    """With one call of each function that is timed."""
    monkeypatch.setattr(gpu, 'seconds', lambda function, repeat=1: (function(), 1)[1])
    assert gpu.main(['--tiny']) == 0
    output = capsys.readouterr().out
    assert all(f'\n{script} cifar10  ' in output and f'\n{script}  ' in output for script in gpu.SMALL), output


def saved_bytes(net, x, sigma):
    """What the graph of one bf16 forward pass keeps, weights apart."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()) or t, lambda t: t)
    with hooks, torch.autocast('cpu', torch.bfloat16):
        net(x, sigma).sum()
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum({storage._cdata: storage.nbytes() for storage in kept if storage._cdata not in own}.values())


def test_the_graph_of_a_bf16_step_is_bf16(monkeypatch):
    """CIFAR-10's network, by fake tensors, with CUDA's autocast, which makes group_norm float32 wherever it is on: 59
    MiB per image, and with torch's own GroupNorm 1.7 times that."""
    group_norm = torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, 'group_norm', lambda x, *args: group_norm(
        x.float() if torch.is_autocast_enabled('cpu') else x, *args))
    args = edm_nets.parse_train_args('--dataset cifar10 --dropout 0'.split())
    with FakeTensorMode():
        net, x, sigma = edm_nets.make_network(args, 32, 0), torch.empty([32, 3, 32, 32]), torch.ones([32, 1, 1, 1])
        here = saved_bytes(net, x, sigma) / 32
        monkeypatch.setattr(edm_nets.GroupNorm, 'forward', torch.nn.GroupNorm.forward)
        assert here < 60 * 2 ** 20 < 1.6 * here < saved_bytes(net, x, sigma) / 32
