"""The tests need neither network nor GPU."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(  # also of the processes that are started
    PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "tests"}', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1',
    ONEDNN_MAX_CPU_ISA='AVX512_CORE_FP16')  # some virtual machines advertise AMX and trap it

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import data  # noqa: E402
import edm_nets  # noqa: E402

SCRIPTS = {  # the four training loops, with the flags of a run of six steps that takes a second or two
    'edm_nets': 'train --cond 1 --channels 8 --channel-mult 1 1 --blocks 1 --attention 8 --lr 1e-3 --rampup-kimg 0.1',
    'disback': '--nodes 2 --degrade-kimg 0.064 --node-kimg 0.05 --lr 1e-4 --fake-lr 1e-4 --eval-images 0',
    'teacher_free': '--warmup-kimg 0.096 --draws 2 --lr 1e-4 --ratio-lr 1e-4 --eval-images 0',
    'distributional': '--backbones energy --freeze 1 --r1-interval 4 --lr 1e-4 --d-lr 1e-4 --eval-images 0'}


def quick_heun(net, z, labels, num_steps, heun=edm_nets.heun, **more):
    """Three steps instead of eighteen, for the pictures that the scripts draw with a teacher."""
    return heun(net, z, labels, min(num_steps, 3), **more)


def run(script, *arguments):
    """A command as a user types it, but run inside this process, which saves the import of torch."""
    module, output, errors, code = importlib.import_module(script.stem), io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), \
            mock.patch('edm_nets.heun', quick_heun):
        try:
            module.main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


@pytest.fixture(scope='session')
def command(tmp_path_factory):
    """command(script, out, more) is the command of a tiny run on `shapes`; of the same flag twice the second counts.

    With classes=3 it is one of two steps on the prepared folder `command.folder`/data3; with 0 on data0, unlabelled."""
    def command(script, out, more='', classes=None):
        flags = f'{SCRIPTS[script]} --out {out} --batch 32 --kimg 0.192 --status-kimg 0.032 --snapshot-kimg 0.064 '
        if classes is not None:
            flags += f'--dataset cifar10 --data {command.folder}/data{classes} --kimg 0.064 '
        if script != 'edm_nets':
            flags += f'--features pixels --teacher {command.folder}/teacher{classes}/teacher-000000.pt '
        return [ROOT / f'{script}.py', *f'{flags} {more}'.split()]
    command.folder = folder = tmp_path_factory.mktemp('command')
    for name in ('data0', 'data3'):
        (folder / name).mkdir()
        np.save(folder / name / 'images.npy', data.Shapes(64).images(np.arange(64)).permute(0, 2, 3, 1))
    np.save(folder / 'data3' / 'labels.npy', np.arange(64) % 3)
    for classes, more in (None, '--kimg 0.5 --snapshot-kimg 9'), (0, '--cond 0'), (3, ''):
        assert run(*command('edm_nets', folder / f'teacher{classes}', more, classes)).returncode == 0
    return command


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def world():
    """A process group of this process alone."""
    edm_nets.setup()
    yield
    dist.destroy_process_group()


@pytest.fixture
def few_shapes(monkeypatch):
    """`shapes` of 2,000 images instead of 50,000, for scripts inside this process: a reference of scores in no time."""
    monkeypatch.setattr(data.Shapes.__init__, '__defaults__', (2_000, 0))
