"""The tests need neither network nor GPU."""

import os
import subprocess
import sys
from pathlib import Path

os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_FP16'  # some virtual machines advertise AMX and trap it
os.environ['CUDA_VISIBLE_DEVICES'] = ''
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = str(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

ENV = dict(os.environ, OMP_NUM_THREADS='1')
TEACHER = ['--kimg', '1', '--batch', '32', '--channels', '8', '--channel-mult', '1', '2', '--status-kimg', '0.25',
           '--snapshot-kimg', '0.25']


def run(*command, processes=1, **kwargs):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    return subprocess.run([sys.executable, *launcher, *map(str, command)], env=ENV, capture_output=True, text=True,
                          timeout=200, **kwargs)


def weights(path):
    return torch.load(path, weights_only=True)['net']


def distance(a, b):
    """Relative distance of two sets of weights."""
    return float(sum((a[k] - b[k]).square().sum() for k in a).sqrt() / sum(a[k].square().sum() for k in a).sqrt())


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a tiny teacher on shapes, teacher/teacher-000001.pt."""
    folder = tmp_path_factory.mktemp('runs')
    done = run(ROOT / 'edm_nets.py', 'train', '--dataset', 'shapes', *TEACHER, '--out', folder / 'teacher')
    assert done.returncode == 0, done.stderr
    return folder
