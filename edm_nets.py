"""What EDM is: networks, preconditioning, official checkpoints, samplers, and the training of a teacher.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).
State-dict keys, shapes and outputs are those of the official networks, so the official weights load.

    python edm_nets.py train --dataset shapes                       # the small teacher, minutes on a CPU
    torchrun --nproc_per_node=8 edm_nets.py train --dataset cifar10
    python edm_nets.py sample --net PATH_OR_URL --seeds 0-63 --steps 18 --out grid.png
    python edm_nets.py bench --net imagenet64 --batch-gpu 32 64 --compile    # how fast, and how near to the limit

Symbols: x [N, C, H, W] noisy images, sigma their noise level, D_x = D(x; sigma) the denoised images,
F_x the raw output of the U-Net; the score is (D_x - x) / sigma ** 2 (Eq. 3).
"""

import argparse
import collections
import contextlib
import copy
import datetime
import functools
import gc
import io
import itertools
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode

import data

# ----------------------------------------------------------------------------------------------------
# Layers.


def init_layer(layer, adm, gain=1):
    """EDM's initial weights: Xavier uniform and zero bias (Song), or U(+-1/sqrt(fan_in)) for both (ADM)."""
    fan_in, fan_out = layer.weight[0].numel(), layer.weight.numel() // layer.weight.shape[1]
    bound = gain / fan_in ** 0.5 if adm else gain * (6 / (fan_in + fan_out)) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound * adm, bound * adm)
    return layer


def make_filter(taps):
    """Separable filter [L] -> kernel [1, 1, L, L] of sum 1. Official networks use [1, 1] and [1, 3, 3, 1]."""
    if len(taps) % 2 or (len(taps) == 2 and taps[0] != taps[1]):
        raise ValueError(f'resample_filter {list(taps)}: expected [1, 1] or a longer filter of even length')
    taps = torch.as_tensor(taps, dtype=torch.float32)
    return (taps.outer(taps) / taps.sum() ** 2)[None, None]


def resample(x, f, up):
    """Factor-2 resampling with kernel f [1, 1, L, L]: [N, C, H, W] -> [N, C, 2H, 2W] or [N, C, H/2, W/2]."""
    if f.shape[-1] == 2:  # [1, 1]: nearest neighbour, or the mean of 2x2
        return F.interpolate(x, scale_factor=2, mode='nearest') if up else F.avg_pool2d(x, 2)
    f, padding = f.to(x.dtype).expand(x.shape[1], -1, -1, -1), (f.shape[-1] - 1) // 2
    if up:
        return F.conv_transpose2d(x, f * 4, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, f, stride=2, padding=padding, groups=x.shape[1])


class Resample(nn.Module):
    """Resampling alone, no weights."""

    def __init__(self, up, taps):
        super().__init__()
        self.up = up
        self.register_buffer('resample_filter', make_filter(taps))

    def forward(self, x):
        return resample(x, self.resample_filter, self.up)


class ResampleConv2d(nn.Conv2d):
    """Resampling, then a convolution."""

    def __init__(self, c_in, c_out, kernel, up, taps):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.up = up
        self.register_buffer('resample_filter', make_filter(taps))

    def forward(self, x):
        return super().forward(resample(x, self.resample_filter, self.up))


class FusedDownConv2d(nn.Conv2d):
    """NCSN++ `aux_residual`: a 3x3 convolution on a wider border, then down-sampling, then the bias."""

    def __init__(self, c_in, c_out, taps):
        super().__init__(c_in, c_out, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer('resample_filter', make_filter(taps))

    def forward(self, x):
        x = F.conv2d(x, self.weight, padding=self.padding)
        x = F.conv2d(x, self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
        return x + self.bias.to(x.dtype)[:, None, None]


class GroupNorm(nn.GroupNorm):
    """Group norm in the dtype of its input, as in EDM; the kernels sum in float32.

    Under CUDA's autocast torch's own would return float32, and the graph of a bf16 step keep 1.7 times as much.
    """

    def __init__(self, channels, eps):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention: [N, C_in, H, W], emb [N, E] -> [N, C_out, H', W'].

    `adm` selects ADM's conventions (adaptive group norm, 64-channel heads) over those of DDPM++ and NCSN++
    (one head, sums scaled by sqrt(1/2)).
    """

    def __init__(self, c_in, c_out, emb, adm, resampling=None, attention=False, dropout=0.0, taps=(1, 1)):
        super().__init__()
        self.adm, self.dropout = adm, dropout
        self.heads = (c_out // 64 if adm else 1) if attention else 0
        if not 0 <= dropout <= 1:
            raise ValueError(f'dropout {dropout}: expected a share')
        self.skip_scale = 1 if adm else 0.5 ** 0.5
        eps, small = (1e-5, 0) if adm else (1e-6, 1e-5)
        up = resampling == 'up'
        self.norm0 = GroupNorm(c_in, eps)
        conv0 = ResampleConv2d(c_in, c_out, 3, up, taps) if resampling else nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv0 = init_layer(conv0, adm)
        self.affine = init_layer(nn.Linear(emb, c_out * (2 if adm else 1)), adm)
        self.norm1 = GroupNorm(c_out, eps)
        self.conv1 = init_layer(nn.Conv2d(c_out, c_out, 3, padding=1), adm, gain=small)
        self.skip = None
        if resampling and adm and c_in == c_out:
            self.skip = Resample(up, taps)
        elif resampling:
            self.skip = init_layer(ResampleConv2d(c_in, c_out, 1, up, taps), adm)
        elif c_in != c_out:
            self.skip = init_layer(nn.Conv2d(c_in, c_out, 1), adm)
        if attention:
            self.norm2 = GroupNorm(c_out, eps)
            self.qkv = init_layer(nn.Conv2d(c_out, c_out * 3, 1), adm, gain=1 if adm else 0.2 ** 0.5)
            self.proj = init_layer(nn.Conv2d(c_out, c_out, 1), adm, gain=small)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        m = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adm:
            scale, shift = m.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + m))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, c // self.heads, 3, height * width)
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each [N, heads, H*W, C/heads]; q|k|v vary fastest
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)
            x = (self.proj(a) + x) * self.skip_scale
        return x

# ----------------------------------------------------------------------------------------------------
# U-Nets.


class Positional(nn.Module):
    """[N] -> [N, channels]: cosines, then sines, of geometrically spaced frequencies. No weights."""

    def __init__(self, channels, endpoint):
        super().__init__()
        self.half, self.last = channels // 2, channels // 2 - (1 if endpoint else 0)

    def forward(self, c_noise):
        freqs = 1e-4 ** (torch.arange(self.half, dtype=torch.float32, device=c_noise.device) / self.last)
        angles = c_noise.outer(freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Fourier(nn.Module):
    """[N] -> [N, channels]: cosines, then sines, of random frequencies."""

    def __init__(self, channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', torch.randn(channels // 2) * scale)

    def forward(self, c_noise):
        angles = c_noise.outer(2 * np.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """Encoder and decoder, the same for DDPM++, NCSN++ and ADM; the sub-classes add `embed` and `output`."""

    def build(self, res, in_channels, width, channel_mult, num_blocks, attends, aux_taps=None, **block):
        """Fill `enc` and `dec`; `attends(res, where)` says which blocks have attention. Returns the last width."""
        if res % 2 ** (len(channel_mult) - 1):
            raise ValueError(f'{res} px cannot be halved {len(channel_mult) - 1} times: channel_mult is too long')
        init = dict(adm=block['adm'])
        self.enc, widths, c_aux = nn.ModuleDict(), [], in_channels
        for level, mult in enumerate(channel_mult):
            name = f'{res >> level}x{res >> level}'
            if level == 0:
                c = width * mult if block['adm'] else width
                self.enc[f'{name}_conv'] = init_layer(nn.Conv2d(in_channels, c, 3, padding=1), **init)
            else:
                self.enc[f'{name}_down'] = UNetBlock(c, c, resampling='down', **block)
                if aux_taps:
                    self.enc[f'{name}_aux_residual'] = init_layer(FusedDownConv2d(c_aux, c, aux_taps), **init)
                    c_aux = c
            widths.append(c)
            for i in range(num_blocks):
                attention = attends(res >> level, 'enc')
                self.enc[f'{name}_block{i}'] = UNetBlock(c, width * mult, attention=attention, **block)
                c = width * mult
                widths.append(c)
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            name = f'{res >> level}x{res >> level}'
            if level == len(channel_mult) - 1:
                self.dec[f'{name}_in0'] = UNetBlock(c, c, attention=True, **block)
                self.dec[f'{name}_in1'] = UNetBlock(c, c, **block)
            else:
                self.dec[f'{name}_up'] = UNetBlock(c, c, resampling='up', **block)
            for i in range(num_blocks + 1):
                attention = attends(res >> level, 'dec-last' if i == num_blocks else 'dec')
                c_in, c = c + widths.pop(), width * mult
                self.dec[f'{name}_block{i}'] = UNetBlock(c_in, c, attention=attention, **block)
        return c

    def encode(self, x, c_noise, class_labels=None, augment_labels=None):
        """x [N, C, R, R], c_noise [N] -> (activations of the encoder from shallow to deep, emb [N, E])."""
        with torch.autocast(x.device.type, enabled=False):  # the embedding stays float32
            emb = self.embed(c_noise, class_labels, augment_labels)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith('aux_residual'):  # NCSN++: the shrunk image joins in and replaces the last activation
                x = aux = skips[-1] = (x + layer(aux)) * 0.5 ** 0.5
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return skips, emb

    def decode(self, skips, emb):
        """The activations and emb of `encode` -> F_x [N, C, R, R]."""
        x, skips = skips[-1], list(skips)
        for name, block in self.dec.items():
            if isinstance(block, UNetBlock):
                x = block(torch.cat([x, skips.pop()], dim=1) if '_block' in name else x, emb)
        return self.output(x)


class SongUNet(UNet):
    """DDPM++ (positional, standard, [1, 1]) and NCSN++ (fourier, residual, [1, 3, 3, 1]), Song et al. 2021."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10,
                 label_dropout=0, embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
                 decoder_type='standard', resample_filter=(1, 1)):
        super().__init__()
        if embedding_type not in ('positional', 'fourier') or encoder_type not in ('standard', 'residual') \
                or decoder_type != 'standard':
            raise ValueError(f'no official network has {embedding_type=}, {encoder_type=}, {decoder_type=}')
        self.label_dropout = label_dropout
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.map_noise = Positional(noise, endpoint=True) if embedding_type == 'positional' else Fourier(noise)
        self.map_label = init_layer(nn.Linear(label_dim, noise), adm=False) if label_dim else None
        self.map_augment = init_layer(nn.Linear(augment_dim, noise, bias=False), adm=False) if augment_dim else None
        self.map_layer0 = init_layer(nn.Linear(noise, emb), adm=False)
        self.map_layer1 = init_layer(nn.Linear(emb, emb), adm=False)
        c = self.build(
            img_resolution, in_channels, model_channels, channel_mult, num_blocks,
            attends=lambda res, where: res in attn_resolutions and where != 'dec',
            aux_taps=list(resample_filter) if encoder_type == 'residual' else None,
            emb=emb, adm=False, dropout=dropout, taps=list(resample_filter))
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = GroupNorm(c, 1e-6)
        self.dec[f'{img_resolution}x{img_resolution}_aux_conv'] = init_layer(
            nn.Conv2d(c, out_channels, 3, padding=1), adm=False, gain=1e-5)

    def embed(self, c_noise, class_labels, augment_labels):
        emb = self.map_noise(c_noise).unflatten(1, (2, -1)).flip(1).flatten(1)  # here sines come first
        if self.map_label is not None:
            emb = emb + self.map_label(drop_labels(self, class_labels) * self.map_label.in_features ** 0.5)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def output(self, x):
        norm, conv = list(self.dec.values())[-2:]
        return conv(F.silu(norm(x)))


class DhariwalUNet(UNet):
    """ADM, Dhariwal & Nichol 2021, as EDM uses it for ImageNet-64."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8),
                 dropout=0.10, label_dropout=0):
        super().__init__()
        self.label_dropout = label_dropout
        emb = model_channels * channel_mult_emb
        self.map_noise = Positional(model_channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = init_layer(nn.Linear(model_channels, emb), adm=True)
        self.map_layer1 = init_layer(nn.Linear(emb, emb), adm=True)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        if augment_dim:
            nn.init.zeros_(self.map_augment.weight)
        if label_dim:
            nn.init.normal_(self.map_label.weight)
        c = self.build(
            img_resolution, in_channels, model_channels, channel_mult, num_blocks,
            attends=lambda res, where: res in attn_resolutions, emb=emb, adm=True, dropout=dropout)
        self.out_norm = GroupNorm(c, 1e-5)
        self.out_conv = init_layer(nn.Conv2d(c, out_channels, 3, padding=1), adm=True, gain=0)

    def embed(self, c_noise, class_labels, augment_labels):
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(drop_labels(self, class_labels))
        return F.silu(emb)

    def output(self, x):
        return self.out_conv(F.silu(self.out_norm(x)))


def drop_labels(net, class_labels):
    """Label dropout while training: whole rows of the one-hot labels [N, label_dim] become zero."""
    if not (net.training and net.label_dropout):
        return class_labels
    return class_labels * (torch.rand([len(class_labels), 1], device=class_labels.device) >= net.label_dropout)


class EDMPrecond(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM Eq. 7, Table 1 right column).

    Takes the official constructor arguments; `use_fp16` is accepted and ignored: precision is the caller's autocast.
    `kwargs` holds the arguments, `sigma_init` the noise level at which a one-step student is called (None: a teacher).
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0, sigma_max=float('inf'),
                 sigma_data=0.5, model_type='DhariwalUNet', **model_kwargs):
        super().__init__()
        if model_type not in ('SongUNet', 'DhariwalUNet'):
            raise ValueError(f'model_type {model_type!r}: expected SongUNet or DhariwalUNet')
        if not 0 <= sigma_min < sigma_max or not 0 < sigma_data < 1e6:
            raise ValueError(f'{sigma_min=}, {sigma_max=}, {sigma_data=}: expected 0 <= min < max and 0 < data')
        self.kwargs = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, model_type=model_type,
                           **model_kwargs)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.sigma_init = None
        unet = SongUNet if model_type == 'SongUNet' else DhariwalUNet
        self.model = unet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)

    def forward(self, x, sigma, class_labels=None, augment_labels=None, bottleneck=False):
        """x [N, C, R, R], sigma [], [N] or [N, 1, 1, 1], one-hot class_labels [N, label_dim] -> D_x float32, like x.

        No class_labels means the zero vector; augment_labels float [N, augment_dim]. With `bottleneck`, returns (D_x,
        deepest encoder activation).
        """
        x, sigma = x.to(torch.float32), torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        sigma = sigma.reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)

        c_skip = self.sigma_data ** 2 / (sigma ** 2 + self.sigma_data ** 2)
        c_out = sigma * self.sigma_data / (sigma ** 2 + self.sigma_data ** 2).sqrt()
        c_in = 1 / (self.sigma_data ** 2 + sigma ** 2).sqrt()
        c_noise = sigma.log() / 4  # Table 1, these four
        skips, emb = self.model.encode(c_in * x, c_noise.flatten(), class_labels, augment_labels)
        F_x = self.model.decode(skips, emb)
        D_x = c_skip * x + c_out * F_x.to(torch.float32)
        return (D_x, skips[-1]) if bottleneck else D_x

# ----------------------------------------------------------------------------------------------------
# Files: this project's .pt, and the official .pkl read without running anything they contain.

OFFICIAL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-{}.pkl'  # weights under CC BY-NC-SA 4.0
TEACHERS = {dataset: OFFICIAL.format(name) for dataset, name in dict(
    cifar10='cifar10-32x32-uncond-vp', ffhq64='ffhq-64x64-uncond-vp', afhqv2='afhqv2-64x64-uncond-vp',
    imagenet64='imagenet-64x64-cond-adm').items()}


def atomic_save(obj, path):
    """torch.save so that `path` is always whole: a temporary name in the same folder, flushed to disk, renamed.

    Raises OSError, leaving `path` as it was and nothing beside it.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f'cannot write {path}: {reason}') from None  # and not torch's word on a file without an end
    finally:
        Path(temporary).unlink(missing_ok=True)


def save(path, net, dataset, nimg, **more):
    """Write the slim file for users: weights, constructor arguments, sigma_init, `more`; read by `load` or torch.load.

    Raises FloatingPointError when a weight is not finite.
    """
    check_finite(dict(network=net))
    atomic_save(dict(net={k: v.cpu() for k, v in net.state_dict().items()}, net_kwargs=net.kwargs,
                     sigma_init=net.sigma_init, dataset=dataset, kimg=nimg / 1000, **more), path)


def load(path_or_url):
    """Read a network: this project's .pt or an official EDM .pkl -> EDMPrecond on the CPU, eval mode, frozen.

    A URL is fetched once into the cache. Nothing in the file is executed. Raises FileNotFoundError, OSError
    (download), or ValueError with one line when the file is damaged, is something else, or asks for anything
    beyond tensors, numbers and the official classes. A .pt has checksums; the weights of a .pkl have none: there a
    flipped bit goes unseen unless the number is no longer finite.
    """
    path = Path(path_or_url)
    if '://' in str(path_or_url):
        path = data.download(str(path_or_url), data.cache_path(str(path_or_url)))
    if not path.is_file():
        raise FileNotFoundError(f'no network at {path_or_url}')
    try:
        if zipfile.is_zipfile(path):  # torch.save
            content = torch.load(path, map_location='cpu', weights_only=True)
            kwargs, state, sigma_init = content['net_kwargs'], content['net'], content['sigma_init']
        else:
            kwargs, state = read_official_pickle(path)
            sigma_init = None
        if kwargs.get('num_blocks', 0) > 64 or len(kwargs.get('channel_mult', ())) > 16:
            raise ValueError('the recorded network is absurdly deep')
        with torch.device('meta'):  # no memory until the shapes are known to agree
            net = EDMPrecond(**kwargs)
        net.load_state_dict(state, strict=True, assign=True)
        for name, x in net.state_dict().items():
            if not x.is_floating_point() or x.layout is not torch.strided or not x.isfinite().all():
                raise ValueError(f'{name} is not made of finite floating-point numbers')
        if sigma_init is not None and not 0 < sigma_init < 1e6:
            raise ValueError(f'sigma_init {sigma_init}: expected a noise level, or None for a teacher')
    except Exception as error:  # whatever a damaged or hostile file can provoke; told in one line, never hidden
        if isinstance(error, (MemoryError, PermissionError)) or 'allocate memory' in str(error):
            raise
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        if path != Path(path_or_url):  # fetched: do not keep what is no network
            path.unlink(missing_ok=True)
            reason += '; removed from the cache'
        raise ValueError(f'cannot load {path_or_url}: {reason}') from None
    net.sigma_init = sigma_init
    return net.float().eval().requires_grad_(False)


def newest(folder, kind):
    """The last KIND-<kimg>.pt of a run folder, kind teacher or student. Raises FileNotFoundError."""
    files = sorted(Path(folder).glob(f'{kind}-*.pt'), key=lambda file: int(file.stem.split('-')[1]))
    if not files:
        raise FileNotFoundError(f'no {kind}-*.pt in {folder}')
    return str(files[-1])


class Recorded:
    """Stand-in for an object in an official pickle: the name of its class and its attributes, nothing of its code."""

    def __init__(self, meta=None):
        if meta is not None:
            if not isinstance(meta, dict) or meta.get('type') != 'class' or not isinstance(meta.get('state'), dict):
                raise ValueError('a persistent object is not of the form {type: class, class_name, state}')
            self.class_name, self.state = meta['class_name'], meta['state']

    def __setstate__(self, state):
        self.class_name, self.state = 'container', state

    def tensors(self, prefix=''):
        """(full name, tensor) in the order of torch's state_dict."""
        for group in ('_parameters', '_buffers'):
            for name, value in self.state.get(group, {}).items():
                if isinstance(value, torch.Tensor):
                    yield prefix + name, value
        for name, module in self.state.get('_modules', {}).items():
            if isinstance(module, Recorded):
                yield from module.tensors(f'{prefix}{name}.')


class RecordedDtype:
    """Stand-in for numpy.dtype: one of bool, int, uint, float."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or code[:1] not in 'biuf' or code[1:] not in ('1', '2', '4', '8'):
            raise ValueError(f'numpy type {code!r} refused')
        self.code, self.order = code, '='

    def __setstate__(self, state):
        self.order = state[1] if state[1] in '<>' else '='


class OfficialUnpickler(pickle._Unpickler):
    """The pure-Python unpickler (its memo cannot be blown up), restricted to the names below: stand-ins of our own
    and plain containers. Raises ValueError for any other."""

    def find_class(self, module, name):
        module = module.replace('numpy._core', 'numpy.core')
        names = {
            ('torch_utils.persistence', '_reconstruct_persistent_obj'): Recorded,
            ('collections', 'OrderedDict'): collections.OrderedDict, ('builtins', 'set'): set,
            ('dnnlib.util', 'EasyDict'): dict,
            ('torch._utils', '_rebuild_tensor_v2'): self.tensor,
            ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
            ('torch._utils', '_rebuild_parameter_with_state'): lambda tensor, *_: tensor,
            ('torch.storage', '_load_from_bytes'): self.storage,
            ('torch.nn.modules.container', 'ModuleDict'): Recorded,
            ('torch.nn.modules.container', 'ModuleList'): Recorded,
            ('numpy.core.multiarray', 'scalar'): self.scalar, ('numpy', 'dtype'): RecordedDtype}
        if (module, name) not in names:
            raise ValueError(f'refused: the pickle asks for {module}.{name}')
        return names[module, name]

    def persistent_load(self, pid):
        raise ValueError('refused: the pickle has a persistent id')

    @staticmethod
    def storage(content):  # originally torch.load(weights_only=False), a second way in
        if content[:2] == b'PK':
            raise ValueError('refused: a tensor storage in zip format')
        storage = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError('refused: a tensor storage that is not one')
        return storage

    @staticmethod
    def tensor(storage, offset, size, stride, *_):
        numel = int(np.prod(size, dtype=np.int64))
        contiguous = tuple(int(np.prod(size[i + 1:], dtype=np.int64)) for i in range(len(size)))
        if not isinstance(storage, torch.storage.TypedStorage) or offset < 0 or min(size, default=0) < 0 \
                or offset + numel > storage._size() or (numel and tuple(stride) != contiguous):
            raise ValueError(f'a tensor of shape {tuple(size)} does not fit its storage')
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, collections.OrderedDict())

    @staticmethod
    def scalar(dtype, content):
        dtype = np.dtype(dtype.code).newbyteorder(dtype.order)
        if len(content) != dtype.itemsize:
            raise ValueError('a numpy number of the wrong length')
        return np.frombuffer(content, dtype)[0].item()


def read_official_pickle(path):
    """Official .pkl -> (constructor arguments of EDMPrecond, state_dict). Layout: {'ema': EDMPrecond, ...}."""
    content = OfficialUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    net = content.get('ema') if isinstance(content, dict) else content
    if not isinstance(net, Recorded):
        raise ValueError("no network under 'ema'")
    if net.class_name != 'EDMPrecond':
        raise ValueError(f'the network is a {net.class_name}, expected EDMPrecond')
    interface = ['img_resolution', 'img_channels', 'label_dim', 'use_fp16', 'sigma_min', 'sigma_max', 'sigma_data',
                 'model_type']
    kwargs = dict(zip(interface, net.state.get('_init_args', ()))) | dict(net.state['_init_kwargs'])
    return kwargs, collections.OrderedDict(net.tensors())

# ----------------------------------------------------------------------------------------------------
# Samplers.


def heun(net, z, class_labels=None, num_steps=18, sigma_min=0.002, sigma_max=80, rho=7, S_churn=0, S_min=0,
         S_max=float('inf'), S_noise=1, randn_like=torch.randn_like):
    """EDM Algorithm 2 (Algorithm 1 where S_churn is 0), in float64 around the float32 network.

    z float [N, C, R, R] standard normal, class_labels one-hot [N, label_dim] or None -> float64 [N, C, R, R], about
    [-1, 1]. 2 num_steps - 1 network calls. `randn_like(x)` supplies the churn noise, e.g. ImageSeeds.randn_like.
    """
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    i = torch.arange(num_steps, dtype=torch.float64, device=z.device)
    ramp = i / max(num_steps - 1, 1)
    t = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho  # Eq. 5
    t = torch.cat([t, torch.zeros_like(t[:1])])

    def slope(x, t):
        return (x - net(x, t, class_labels).to(torch.float64)) / t

    x = z.to(torch.float64) * t[0]
    for t_cur, t_next in zip(t[:-1], t[1:]):
        if S_churn > 0:
            gamma = min(S_churn / num_steps, 2 ** 0.5 - 1) if S_min <= t_cur <= S_max else 0
            t_hat = t_cur + gamma * t_cur
            x = x + (t_hat ** 2 - t_cur ** 2).sqrt() * S_noise * randn_like(x)
            t_cur = t_hat
        d_cur = slope(x, t_cur)
        x_next = x + (t_next - t_cur) * d_cur
        if t_next > 0:
            x_next = x + (t_next - t_cur) * (d_cur + slope(x_next, t_next)) / 2
        x = x_next
    return x


def one_step(student, z, class_labels, sigma_init):
    """The student's sampler: x_0 = G(sigma_init z; sigma_init), not clipped. z float [N, C, R, R], one-hot class_labels
    [N, label_dim] or None -> float32 [N, C, R, R]."""
    return student(sigma_init * z, torch.full([], sigma_init, device=z.device), class_labels)


class ImageSeeds:
    """One random generator per image, so that image i is the same at any batch size and on any number of GPUs."""

    def __init__(self, seeds, device):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, shape, **kwargs):
        """-> [N, *shape]."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device, **kwargs) for g in self.generators])

    def randn_like(self, x):
        return self.randn(x.shape[1:], dtype=x.dtype)

    def randint(self, high):
        """-> int64 [N]."""
        return torch.stack([torch.randint(high, [], generator=g, device=self.device) for g in self.generators])


@torch.no_grad()
def generate(net, seeds, num_steps=None, class_idx=None, batch=256, **sampler):
    """Images of a network, in the random numbers and order of EDM's generate.py.

    seeds: one int per image. num_steps: Heun steps, or None for the one-step sampler at `net.sigma_init`.
    Labels are drawn per image unless `class_idx` is given. Returns uint8 [N, C, R, R] on the CPU.
    """
    device, images = next(net.parameters()).device, []
    for part in torch.as_tensor(list(seeds)).split(batch):
        rng = ImageSeeds(part.tolist(), device)
        z, labels = rng.randn([net.img_channels, net.img_resolution, net.img_resolution]), None
        if net.label_dim:
            idx = rng.randint(net.label_dim)
            labels = F.one_hot(idx if class_idx is None else torch.full_like(idx, class_idx), net.label_dim)
        x = one_step(net, z, labels, net.sigma_init) if num_steps is None else \
            heun(net, z, labels, num_steps, randn_like=rng.randn_like, **sampler)
        images.append(data.to_uint8(x).cpu())
    return torch.cat(images)

# ----------------------------------------------------------------------------------------------------
# Small helpers, the same text in edm_nets.py and in every method script.


def setup():
    """Join torchrun's process group, or be a world of one. Returns (rank, world_size, device)."""
    if 'RANK' not in os.environ:
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')
    device = torch.device('cpu')
    if torch.cuda.is_available():
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; speed comes from bf16
    if not dist.is_initialized():
        hour = datetime.timedelta(hours=1)  # rank 0 may be fetching a dataset
        if device.type == 'cuda':
            dist.init_process_group('nccl', timeout=hour, device_id=device)
        else:
            dist.init_process_group('gloo', timeout=hour)
    return dist.get_rank(), dist.get_world_size(), device


def rank_slices(batch, batch_gpu):
    """This rank's rows of the global batch: one slice for each round of gradient accumulation. Raises ValueError."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = batch // world_size
    size = batch_gpu or share
    if batch < 1 or batch % world_size or size < 1 or share % size:
        raise ValueError(f'--batch {batch} is not a multiple of {world_size} process(es) x --batch-gpu {size}')
    return [slice(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]


def sync_last(i, rounds, *ddps):
    """Context of round `i` of gradient accumulation: ranks average their gradients in the last round only."""
    stack = contextlib.ExitStack()
    for ddp in ddps if i < len(rounds) - 1 else []:
        stack.enter_context(ddp.no_sync())
    return stack


def make_autocast(precision, device):
    """The autocast of the networks, to be called for a context: bf16 (no gradient scaling needed), or off for fp32."""
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == 'bf16')


def rank0_first(function, *args):
    """function(*args) on rank 0, then on the others, which find in place what it fetched or prepared."""
    if dist.get_rank() > 0:
        dist.barrier()
    result = function(*args)
    if dist.get_rank() == 0:
        dist.barrier()
    return result


def check_numbers(parser, args, positive, not_negative):
    """Exit with a usage error unless every number is finite and fits in 64 bits, and the named ones are as they say."""
    for name, value in vars(args).items():
        above, least = name in positive.split(), name in not_negative.split()
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(x, (int, float)) and (not abs(x) < 1e18 or above and x <= 0 or least and x < 0) \
                    and not (x == float('inf') and name in ('kimg', 'snapshot_kimg', 'status_kimg')):
                bound = 'above 0' if above else 'of at least 0' if least else 'above -1e18'
                parser.error(f'--{name.replace("_", "-")} {x}: expected a number {bound} and below 1e18')


def print0(*args):
    """Print from rank 0 only, at once."""
    if dist.get_rank() == 0:
        print(*args, flush=True)


def is_due(nimg, batch, kimg):
    """Whether a step of `batch` images that ended at `nimg` crossed a multiple of `kimg`. True at nimg = 0."""
    return nimg // (kimg * 1000) != (nimg - batch) // (kimg * 1000)


def update_ema(ema, net, nimg, batch, ema_kimg):
    """EDM's moving average: half-life `ema_kimg`, or 5 % of the images seen so far if that is less."""
    beta = 0.5 ** (batch / max(min(ema_kimg * 1000, nimg * 0.05), 1e-8))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


class Means:
    """Means of named scalars since the last status line; tensors until then, so that no step waits for the device."""

    def __init__(self):
        self.added = []  # (name, scalar tensor), in order

    def add(self, **scalars):
        self.added += [(name, value.detach()) for name, value in scalars.items()]

    def collect(self):
        """Averages over steps and ranks: {name: float}. Raises FloatingPointError naming what was first not finite."""
        means = {}
        for name in dict.fromkeys(name for name, _ in self.added):
            mean = torch.stack([value for other, value in self.added if other == name]).double().mean()
            dist.all_reduce(mean)
            means[name] = float(mean) / dist.get_world_size()
        if not np.isfinite(list(means.values())).all():
            first = [i for i, (_, value) in enumerate(self.added) if not value.isfinite()] or [len(self.added) - 1]
            first = mean.new_tensor(first[0])  # on one rank perhaps, but all stop alike
            dist.all_reduce(first, dist.ReduceOp.MIN)
            raise FloatingPointError(
                f'{self.added[int(first)][0]} is not finite: training has diverged; latest.pt is from before')
        self.added.clear()
        return means


def check_finite(parts):
    """Raise FloatingPointError, on all ranks alike, if a weight of the networks in {name: part} is not finite."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
            raise FloatingPointError(
                f'a weight of {name} is not finite: training has diverged; latest.pt is from before')


class Stop:
    """SIGTERM or Ctrl-C ends the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""
    patience = datetime.timedelta(minutes=10)  # with a rank that does not come

    def __init__(self):
        self.asked = False
        self.hosts = dist.new_group(backend='gloo') if dist.get_world_size() > 1 else None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self):
        """Whether any rank was asked to. Collective, among the hosts: no device is waited for.

        Raises ConnectionError, naming the rank, where one does not come here. That is where GPUs make the others wait
        for a rank that hangs; between CPUs it is the step itself, in an all_reduce that names nobody.
        """
        if self.hosts is None:
            return self.asked
        asked = torch.tensor([float(self.asked)])
        try:
            dist.monitored_barrier(self.hosts, self.patience)
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.hosts)
        except RuntimeError as error:
            raise ConnectionError(f'a rank is lost: {str(error).splitlines()[0]}') from None
        return bool(asked)

    def over(self, out, kimg):
        """The loop has ended: signals mean again what they did. If one had come, exit with status 0."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self():
            print0(f'{out}: stopped at {kimg:g} kimg; the same command goes on from there')
            sys.exit(0)


def save_checkpoint(out, state):
    """Write latest.pt, keeping the one before it as previous.pt. Whenever killed, one of them is whole."""
    atomic_save(state, f'{out}/next.pt')
    if os.path.exists(f'{out}/latest.pt'):
        os.replace(f'{out}/latest.pt', f'{out}/previous.pt')
    os.replace(f'{out}/next.pt', f'{out}/latest.pt')


def agree(what, mine):
    """Raise ValueError, on all ranks, naming the first rank where the dict `mine` is not that of rank 0. Collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        keys = sorted(everyone[0] | theirs)
        differ = [f'{k}: {everyone[0].get(k)} -> {theirs.get(k)}' for k in keys if everyone[0].get(k) != theirs.get(k)]
        if differ:
            raise ValueError(f'rank {rank} has other {what} than rank 0 ({", ".join(differ)})')


def open_run(args):
    """Make the run folder. --restart: rename the old one to OUT-before-1, -2, ...; nothing is deleted. Collective.

    Raises ValueError, on all ranks, where one was started with other arguments than rank 0.
    """
    agree('arguments', vars(args))
    if dist.get_rank() == 0:
        if args.restart and os.path.exists(args.out):
            number = next(i for i in range(1, 1000) if not os.path.exists(f'{args.out}-before-{i}'))
            os.rename(args.out, f'{args.out}-before-{number}')
            print(f'{args.out} was renamed to {args.out}-before-{number}', flush=True)
        os.makedirs(args.out, exist_ok=True)
    dist.barrier()  # guards the folder


def load_checkpoint(out, config):
    """The newest whole checkpoint of this run, or None. A damaged one is reported and set aside. Collective.

    Raises ValueError with the differences when the folder holds a run of another config.
    """
    paths, state = [f'{out}/latest.pt', f'{out}/previous.pt'], None
    if dist.get_rank() > 0:
        dist.barrier()  # rank 0 looks first
    for path in filter(os.path.exists, paths):
        try:
            with zipfile.ZipFile(path) as file:
                if dist.get_rank() == 0 and file.testzip():  # compares the checksum of every tensor
                    raise zipfile.BadZipFile('wrong checksum')
            content = torch.load(path, map_location='cpu', weights_only=True)
            old, state = dict(content['config']), content
            break
        except Exception as error:  # whatever a damaged file can provoke; reported, and the file is kept
            unread = isinstance(error, (MemoryError, PermissionError)) or 'allocate memory' in str(error)
            if dist.get_rank() > 0 or unread:
                raise
            reason = str(error).split('\n')[0]
            print(f'{path} is damaged ({reason}): set aside as {path}.damaged', flush=True)
            os.replace(path, f'{path}.damaged')
    if dist.get_rank() == 0:
        dist.barrier()  # guards the checkpoints
    agree('checkpoint', {k: v for k, v in (state or {}).items() if isinstance(v, int)})
    if state is None and any(os.path.exists(f'{path}.damaged') for path in paths):
        raise ValueError(f'no whole checkpoint is left in {out}: --restart starts over')
    changed = [f'{k}: {old.get(k)} -> {config.get(k)}' for k in sorted(old | config)
               if old.get(k) != config.get(k)] if state else []
    if changed:
        raise ValueError(f'{out} holds another run ({", ".join(changed)}): give another --out, or --restart')
    return state


def start_log(out, log_bytes, args, *optimizers):
    """Write config.json, and cut stats.jsonl back to the checkpoint: what came later is about to be done again."""
    versions = dict(torch=torch.__version__, numpy=np.__version__, world_size=dist.get_world_size(),
                    device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')
    with open(f'{out}/config.json', 'w') as f:
        trained = sum(p.numel() for o in optimizers for group in o.param_groups for p in group['params']
                      if p.requires_grad)
        json.dump(dict(vars(args), versions=versions, command=sys.argv, trained_parameters=trained), f, indent=1)
    with open(f'{out}/stats.jsonl', 'ab') as f:
        f.truncate(min(log_bytes, f.tell()))


def log_status(out, stats, nimg, total, seconds, images):
    """One line to the terminal and one object to stats.jsonl. `seconds` for the last `images`."""
    speed = seconds / images if images else 0
    stats = dict(kimg=nimg / 1000, sec_per_kimg=round(speed * 1000, 4), seconds=round(seconds, 2), **stats)
    if torch.cuda.is_available():
        stats['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30  # of this rank
    left = speed * max(total - nimg, 0)
    print0(f'kimg {nimg / 1000:<9.2f} {min(nimg / total, 1):4.0%}  ' + '  '.join(
        f'{k} {v:<.5g}' for k, v in stats.items() if k not in ('kimg', 'seconds')) + f'  left {left / 60:.1f} min')
    if dist.get_rank() == 0:
        with open(f'{out}/stats.jsonl', 'a') as f:
            f.write(json.dumps(stats) + '\n')

# ----------------------------------------------------------------------------------------------------
# --profile of every script that trains: where the time of a step goes.


def mark(name, first=False):
    """In a training loop: here the next part of a step begins; `first` of all. Does nothing without --profile."""
    if Profile.running:
        Profile.running.mark(name, first)


class Profile:
    """n + 1 steps to warm up, n timed as they are, n timed by part, and one under torch.profiler for the trace."""
    running = None

    class Done(Exception):
        """Enough steps were seen."""

    def __init__(self, n, device):
        self.n, self.device, self.seen, self.part, self.parts = n, device, 0, None, {}
        activity = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(
            activities=[activity.CPU] + [activity.CUDA] * (device.type == 'cuda'), profile_memory=device.type == 'cpu')

    def mark(self, name, first):
        if self.part:  # it ends when the device has done it, so that nothing overlaps
            self.parts[self.part] = self.parts.get(self.part, 0) + (self.clock() - self.start) / self.n
        if first:
            self.next_step()
            self.seen += 1
        self.part = name if 2 * self.n + 1 < self.seen <= 3 * self.n + 1 else None
        if self.part:
            self.start = self.clock()

    def next_step(self):
        cuda = self.device.type == 'cuda'
        if cuda and self.seen in (self.n, self.n + 1):  # the last step of the warm-up tells where the host waits
            torch.cuda.set_sync_debug_mode('warn' if self.seen == self.n else 'default')
        if self.seen == self.n + 1:
            self.start = self.clock()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        if self.seen == 2 * self.n + 1:
            self.seconds = (self.clock() - self.start) / self.n
        if self.seen == 3 * self.n + 1:
            storages = [] if cuda else [
                t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
            self.held = sum({s._cdata: s.nbytes() for s in storages}.values())  # weights, gradients, optimizers
            self.profiler.start()
        if self.seen == 3 * self.n + 2:
            self.profiler.stop()
            raise self.Done

    def clock(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self):
        """(seconds of all_reduce, bytes of tensors at the worst moment) of the step under torch.profiler.

        On CUDA the worst moment of all timed steps; on a CPU without what its libraries allocate for themselves.
        """
        reduce, memory = 0, []
        for e in self.profiler.profiler.kineto_results.events():
            if e.name() == '[memory]':
                memory.append((e.start_ns(), e.nbytes()))
            elif e.name() == 'gloo:all_reduce' or e.name().startswith('ncclDevKernel_AllReduce'):
                reduce += e.duration_ns() / 1e9
        return reduce, torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else \
            self.held + max(np.cumsum([0] + [nbytes for _, nbytes in sorted(memory)]))


def profile(train, args):
    """--profile N: where a step of train(args) spends its time. Of the run only OUT-trace.json.gz stays. Collective."""
    rank, world_size, device = setup()
    trace = f'{args.out}-trace.json.gz'
    Profile.running = this = Profile(args.profile, device)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        args.out, args.eval_images, args.restart = shared[0], 0, False
        args.kimg = args.status_kimg = args.snapshot_kimg = float('inf')
        try:
            train(args)
        except Profile.Done:
            pass
        finally:
            Profile.running = None
        dist.barrier()  # guards the folder
    reduce, peak = this.read()
    total = sum(this.parts.values())
    print0(f'\n{args.batch} images per step, {args.precision}, {world_size} process(es), {device}\n'
           f'{"part of a step":38s}{"ms":>10s}{"share":>8s}')
    for name, seconds in this.parts.items():
        print0(f'{name:38s}{seconds * 1e3:10.2f}{seconds / total:8.1%}')
    if world_size > 1:
        print0(f'{"communication: all_reduce, overlapping":38s}{reduce * 1e3:10.2f}{reduce / total:8.1%}')
    print0(f'{"all parts, one after the other":38s}{total * 1e3:10.2f}\n'
           f'{"a step":38s}{this.seconds * 1e3:10.2f}   {this.seconds / args.batch * 1e3:.4g} s/kimg\n'
           f'{"peak memory of tensors, rank 0":38s}{peak / 2 ** 30:10.3f} GiB')
    if rank == 0:
        os.makedirs(os.path.dirname(trace) or '.', exist_ok=True)
        this.profiler.export_chrome_trace(trace)
        print(f'{trace}: one step, for ui.perfetto.dev', flush=True)


def compile_networks(*nets):
    """torch.compile, in place. Static shapes: another batch size gets graphs of its own, not slower dynamic ones."""
    torch._dynamo.config.recompile_limit = 64  # all networks share a forward(); past the limit it would run uncompiled
    for net in nets:
        net.compile(dynamic=False)

# ----------------------------------------------------------------------------------------------------
# Training a teacher (EDM Section 5): python edm_nets.py train

P_mean, P_std = -1.2, 1.2  # ln sigma ~ N(P_mean, P_std^2), EDM Table 1

DDPMPP = dict(model_type='SongUNet', model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attn_resolutions=[16])
DDPMPP64 = dict(DDPMPP, channel_mult=[1, 2, 2, 2])
ADM = dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
           attn_resolutions=[32, 16, 8])
SMALL = dict(model_type='SongUNet', model_channels=16, channel_mult=[1, 2, 2], num_blocks=1, attn_resolutions=[4])
# EDM Table 7 and the official train.py; `shapes` measured here (README). Deviation: EDM augments CIFAR-10, FFHQ and
# AFHQv2 geometrically and tells the network; here only mirror images are added, and augment_dim is 0.
# `decay`: the last part of the run over which the learning rate falls to zero; EDM keeps it constant.
PRESETS = {
    'shapes':     dict(net=SMALL,    batch=64,   lr=2e-3, rampup_kimg=5,      kimg=130,       ema_kimg=500,
                       decay=0.5, dropout=0.00, cond=True,  xflip=False,
                       snapshot_kimg=26, status_kimg=6.5),
    'cifar10':    dict(net=DDPMPP,   batch=512,  lr=1e-3, rampup_kimg=10_000, kimg=200_000,   ema_kimg=500,
                       decay=0.0, dropout=0.13, cond=False, xflip=True,
                       snapshot_kimg=2500, status_kimg=50),
    'ffhq64':     dict(net=DDPMPP64, batch=256,  lr=2e-4, rampup_kimg=10_000, kimg=200_000,   ema_kimg=500,
                       decay=0.0, dropout=0.05, cond=False, xflip=True,
                       snapshot_kimg=2500, status_kimg=50),
    'afhqv2':     dict(net=DDPMPP64, batch=256,  lr=2e-4, rampup_kimg=10_000, kimg=200_000,   ema_kimg=500,
                       decay=0.0, dropout=0.25, cond=False, xflip=True,
                       snapshot_kimg=2500, status_kimg=50),
    'imagenet64': dict(net=ADM,      batch=4096, lr=1e-4, rampup_kimg=10_000, kimg=2_500_000, ema_kimg=50_000,
                       decay=0.0, dropout=0.10, cond=True,  xflip=False,
                       snapshot_kimg=10000, status_kimg=200),
}


def denoising_loss(net, x_0, sigma, eps, class_labels=None):
    """EDM's weighted denoising loss (Eq. 2 with Table 1's weight), summed over pixels, mean over images.

    x_0 float [N, C, R, R] in [-1, 1], sigma [N, 1, 1, 1], eps like x_0 standard normal -> scalar.
    """
    weight = (sigma ** 2 + 0.5 ** 2) / (sigma * 0.5) ** 2  # sigma_data = 0.5
    return (weight * (net(x_0 + sigma * eps, sigma, class_labels) - x_0) ** 2).sum([1, 2, 3]).mean()


def parse_train_args(argv):
    p = argparse.ArgumentParser(prog='edm_nets.py train', add_help=False, allow_abbrev=False)
    p.add_argument('--dataset', choices=PRESETS, default='shapes', help='row of PRESETS (default: %(default)s)')
    preset = PRESETS[p.parse_known_args(argv)[0].dataset]
    net = preset['net']
    p.add_argument('-h', '--help', action='help')
    p.add_argument('--data', help='prepared folder (default: datasets/DATASET)')
    p.add_argument('--out', help='run folder (default: runs/teacher-DATASET)')
    p.add_argument('--kimg', type=float, default=preset['kimg'], help='thousands of images to train on (%(default)s)')
    p.add_argument('--batch', type=int, default=preset['batch'], help='images per step over all GPUs (%(default)s)')
    p.add_argument('--batch-gpu', type=int, help='images per GPU at a time (default: its whole share)')
    p.add_argument('--lr', type=float, default=preset['lr'], help='learning rate (%(default)s)')
    p.add_argument('--dropout', type=float, default=preset['dropout'], help='(%(default)s)')
    p.add_argument('--cond', type=int, choices=[0, 1], default=preset['cond'], help='use the labels (%(default)s)')
    p.add_argument('--channels', type=int, default=net['model_channels'], help='base width (%(default)s)')
    p.add_argument('--channel-mult', type=int, nargs='+', default=net['channel_mult'], help='per level (%(default)s)')
    p.add_argument('--blocks', type=int, default=net['num_blocks'], help='blocks per level (%(default)s)')
    p.add_argument('--attention', type=int, nargs='*', default=net['attn_resolutions'], help='at which (%(default)s)')
    p.add_argument('--rampup-kimg', type=float, default=preset['rampup_kimg'], help='of the rate (%(default)s)')
    p.add_argument('--decay', type=float, default=preset['decay'], help='last part of the run, in which the rate '
                   'falls to zero (%(default)s)')
    p.add_argument('--sigma', type=float, help='train at this one noise level alone: a denoiser that is no diffusion '
                   'model, for teacher_free.py --init single-level')
    p.add_argument('--seed', type=int, default=0, help='of weights, data order and noise (%(default)s)')
    p.add_argument('--precision', choices=['bf16', 'fp32'], help='default: bf16 on a GPU, fp32 on a CPU')
    p.add_argument('--compile', action='store_true', help='torch.compile the network')
    p.add_argument('--profile', type=int, nargs='?', const=16, metavar='STEPS', help='time a few steps, part by part; '
                   'no run (16 steps)')
    p.add_argument('--restart', action='store_true', help='start over; the old run folder is renamed, not deleted')
    p.add_argument('--snapshot-kimg', type=float, default=preset['snapshot_kimg'], help='files, grid (%(default)s)')
    p.add_argument('--status-kimg', type=float, default=preset['status_kimg'], help='lines (%(default)s)')
    args = p.parse_args(argv)
    check_numbers(p, args, positive='kimg batch batch_gpu lr channels channel_mult blocks sigma snapshot_kimg '
                  'status_kimg profile', not_negative='seed dropout rampup_kimg decay')
    if args.channels % 4 or args.dropout > 1 or args.decay > 1:
        p.error('--channels must be a multiple of 4, --dropout and --decay at most 1')
    args.out = args.out or f'runs/teacher-{args.dataset}' + (f'-sigma{args.sigma:g}' if args.sigma else '')
    return args


def train(args):
    """From wherever the run folder stands to --kimg."""
    preset = PRESETS[args.dataset]

    # Initialize. Weights from --seed; all later from data.step_generator and batch_order, but for dropout's masks.
    rank, world_size, device = setup()
    rounds = rank_slices(args.batch, args.batch_gpu)
    args.precision = args.precision or ('bf16' if device.type == 'cuda' else 'fp32')
    autocast = make_autocast(args.precision, device)
    torch.manual_seed(args.seed)
    open_run(args)

    # Data.
    dataset = open_data(args.dataset, args.data)
    label_dim = dataset.label_dim if args.cond else 0

    # Networks.
    net_kwargs = dict(preset['net'], model_channels=args.channels, channel_mult=args.channel_mult,
                      num_blocks=args.blocks, attn_resolutions=args.attention, dropout=args.dropout)
    net = EDMPrecond(dataset.resolution, 3, label_dim, **net_kwargs)
    net = net.to(device, memory_format=torch.channels_last).train()
    net.sigma_init = args.sigma  # None: all noise levels, and no one-step sampler
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if args.compile:
        compile_networks(net)
    ddp = DDP(net, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True)
    print0(f'teacher: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(dataset)} images '
           f'{dataset.resolution}x{dataset.resolution}, {label_dim} classes, {world_size} process(es), {device}')

    # Resume.
    config = {k: v for k, v in vars(args).items() if k in (
        'dataset', 'batch', 'lr', 'rampup_kimg', 'decay', 'dropout', 'cond', 'channels', 'channel_mult', 'blocks',
        'attention', 'sigma', 'seed', 'precision')}
    if args.decay:
        config['kimg'] = args.kimg  # the rate depends on it
    total, nimg, resumed = args.kimg * 1000, 0, 0 if args.profile else None  # a profile begins with no snapshot
    if state := load_checkpoint(args.out, config):
        nimg = resumed = state['nimg']
        net.load_state_dict(state['net'])
        ema.load_state_dict(state['ema'])
        optimizer.load_state_dict(state['optimizer'])
        if nimg >= total:
            print0(f'{args.out} is complete at {nimg / 1000:g} kimg, nothing to do')
            return
        print0(f'resuming {args.out} at {nimg / 1000:g} kimg')
    dist.barrier()  # guards the checkpoint: nobody writes before all have read
    if rank == 0:
        start_log(args.out, state['log_bytes'] if state else 0, args, optimizer)
    del state

    stop = Stop()
    means, tick_time, tick_nimg = Means(), time.time(), nimg
    while True:
        # Status line, snapshot, checkpoint, done?
        done = nimg >= total
        snapshot = done or is_due(nimg, args.batch, args.snapshot_kimg)
        stopping = stop()
        if nimg != resumed and (snapshot or stopping or is_due(nimg, args.batch, args.status_kimg)):
            log_status(args.out, means.collect(), nimg, total, time.time() - tick_time, nimg - tick_nimg)
            if snapshot or stopping:
                check_finite(dict(net=net, ema=ema))
            if snapshot and rank == 0:
                grid = generate(ema, range(64), num_steps=None if args.sigma else 18)
                data.save_grid(grid, f'{args.out}/grid-{nimg // 1000:06d}.png', scale=2)
                if nimg:
                    save(f'{args.out}/teacher-{nimg // 1000:06d}.pt', ema, args.dataset, nimg)
            if (snapshot or stopping) and rank == 0:
                save_checkpoint(args.out, dict(
                    config=config, nimg=nimg, net=net.state_dict(), ema=ema.state_dict(),
                    optimizer=optimizer.state_dict(), log_bytes=os.path.getsize(f'{args.out}/stats.jsonl')))
            tick_time, tick_nimg = time.time(), nimg
        if done or stopping:
            break

        # One step. The random numbers are drawn for the global batch; this rank takes its rows.
        mark('random numbers', first=True)
        indices, flips = data.batch_order(args.seed, nimg, args.batch, len(dataset))
        generator = data.step_generator(args.seed, nimg, 0, device)
        sigma = (P_mean + P_std * torch.randn([args.batch, 1, 1, 1], generator=generator, device=device)).exp()
        if args.sigma:
            sigma = torch.full_like(sigma, args.sigma)
        eps = torch.randn([args.batch, 3, dataset.resolution, dataset.resolution], generator=generator, device=device)
        if args.dropout:  # its masks are the one thing that depends on the processes and on --batch-gpu
            torch.manual_seed(hash((args.seed, nimg, rank)))
        for i, rows in enumerate(rounds):
            mark('images')
            images = data.mirror(dataset.images(indices[rows]), flips[rows] & preset['xflip'])
            x_0 = data.to_float(data.to_device(images, device))
            labels = F.one_hot(data.to_device(dataset.labels(indices[rows]), device), label_dim) if label_dim else None
            with sync_last(i, rounds, ddp):
                mark('network, forward')
                with autocast():
                    loss = denoising_loss(ddp, x_0, sigma[rows], eps[rows], labels)
                mark('network, backward')
                (loss / len(rounds)).backward()
            means.add(loss=loss)
        mark('optimizer')
        ramp = min((nimg + args.batch) / max(args.rampup_kimg * 1000, 1), 1)  # Deviation: EDM's first step has rate 0
        fall = min((1 - nimg / total) / args.decay, 1) if args.decay else 1
        for group in optimizer.param_groups:
            group['lr'] = args.lr * ramp * fall
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark('moving average')
        update_ema(ema, net, nimg, args.batch, preset['ema_kimg'])
        nimg += args.batch
    dist.barrier()  # guards the last files
    stop.over(args.out, nimg / 1000)


def open_data(name, path):
    """data.open_dataset, by rank 0 first. Collective. Raises ValueError where the ranks find different images."""
    dataset = rank0_first(data.open_dataset, name, path)
    images = dataset.images(np.arange(min(100, len(dataset))))
    agree('images', dict(count=len(dataset), resolution=dataset.resolution, classes=dataset.label_dim,
                         checksum=zlib.crc32(images.numpy())))
    return dataset


def open_teacher(path, state=None):
    """A teacher on the CPU, loaded by rank 0 first; `.checksum` is that of its weights. Collective.

    Raises what `load` raises; ValueError where it is not the same on all ranks, or no longer the one that the
    checkpoint `state` was trained from.
    """
    net = rank0_first(load, path)
    net.checksum = 0
    for x in net.state_dict().values():
        net.checksum = zlib.crc32(x.contiguous().numpy(), net.checksum)
    agree('teacher', dict(checksum=net.checksum))
    if state and state.get('teacher', net.checksum) != net.checksum:
        raise ValueError(f'{path} is not the network that this run began with: give another --out, or --restart')
    return net


def start_training(argv):
    args = parse_train_args(argv)
    profile(train, args) if args.profile else train(args)


def shapes_teacher(sigma=None):
    """The path of the small teacher on `shapes` (or of its twin trained at one noise level), trained on the way if it
    is not there yet. Collective."""
    out = 'runs/teacher-shapes' + (f'-sigma{sigma:g}' if sigma else '')
    path = f'{out}/teacher-{PRESETS["shapes"]["kimg"]:06d}.pt'
    if not os.path.exists(path):
        asked, Profile.running = Profile.running, None  # a profile is not of these steps
        try:
            train(parse_train_args(['--dataset', 'shapes', *(['--sigma', str(sigma)] if sigma else [])]))
        except ValueError as error:
            raise ValueError(f'{error}; or name a --teacher') from None
        finally:
            Profile.running = asked
    return path

# ----------------------------------------------------------------------------------------------------
# Sampling and measuring: python edm_nets.py sample | bench


def parse_seeds(text):
    """'0-3,7' -> [0, 1, 2, 3, 7]."""
    ends = [(int(first), int(last if dash else first)) for first, dash, last in (
        part.partition('-') for part in text.split(','))]
    if not 0 < sum(max(last - first + 1, 0) for first, last in ends) <= 1_000_000:
        raise argparse.ArgumentTypeError(f'{text}: expected one to a million seeds, e.g. 0-63')
    return [seed for first, last in ends for seed in range(first, last + 1)]


def sample(argv=None):
    """One PNG of the images of one or several networks, all from the same seeds."""
    p = argparse.ArgumentParser(prog='edm_nets.py sample', allow_abbrev=False)
    p.add_argument('--net', nargs='+', required=True, help='paths or URLs of teachers or students')
    p.add_argument('--seeds', type=parse_seeds, default='0-63', help='one per image, e.g. 0-63 (%(default)s)')
    p.add_argument('--steps', type=int, help='Heun steps; 1: one step (default: 1 for a student, 18 for a teacher)')
    p.add_argument('--class', dest='class_idx', type=int, help='class of all images (default: drawn per image)')
    p.add_argument('--sigma-init', type=float, help='noise level of the one step (default: as in the file)')
    p.add_argument('--churn', type=float, default=0, help='S_churn of the Heun sampler (%(default)s)')
    p.add_argument('--out', default='grid.png', help='(%(default)s)')
    args = p.parse_args(argv)
    check_numbers(p, args, positive='steps sigma_init', not_negative='churn class_idx')
    panels = {}
    for path in args.net:
        net = load(path).to('cuda' if torch.cuda.is_available() else 'cpu')
        net.sigma_init = args.sigma_init or net.sigma_init
        steps = args.steps or (18 if net.sigma_init is None else 1)
        if steps == 1 and net.sigma_init is None:
            raise ValueError(f'{path} is no student: give --sigma-init, or more --steps')
        if args.class_idx is not None and not 0 <= args.class_idx < net.label_dim:
            raise ValueError(f'--class {args.class_idx}: {path} has {net.label_dim} classes')
        images = generate(net, args.seeds, None if steps == 1 else steps, args.class_idx, S_churn=args.churn)
        panels[f'{path}, {steps} step' + 's' * (steps > 1)] = images
    scale = max(1, 48 // net.img_resolution)
    if len(panels) == 1:
        data.save_grid(images, args.out, scale)
    else:  # one below the other, from the same seeds
        data.save_panels(panels, args.out, min(len(images), 18), scale)
    print(f'{args.out}: {len(images)} images of ' + '; '.join(panels))


def seconds_per_call(functions, device, repeat=10):
    """{name: function} -> {name: median seconds of `repeat` calls}, taken in turns, after two calls each to warm up."""
    times = {name: [] for name in functions}
    for _ in range(repeat + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[2:])) for name, seconds in times.items()}


def plain_attention(q, k, v):
    """EDM's einsums, [N, heads, T, C] each; softmax in float32. Unlike EDM's, q k^T is in the dtype of q."""
    w = torch.einsum('nhqc,nhkc->nhqk', q, k / k.shape[-1] ** 0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum('nhqk,nhkc->nhqc', w, v)


class BenchStep:
    """A training step on random images and its parts, as the scripts have them or in another way."""

    def __init__(self, net, n, precision, device, compile=False, channels_last=True, fused=True, foreach=True,
                 attention=None):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = copy.deepcopy(net).to(device, memory_format=layout)
        self.ema, self.foreach, self.attention = copy.deepcopy(self.net), foreach, attention
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-6, fused=fused, foreach=False)
        self.autocast = make_autocast(precision, device)
        if compile:
            compile_networks(self.net)
        self.x = torch.randn([n, net.img_channels, net.img_resolution, net.img_resolution], device=device)
        self.sigma, self.eps = torch.rand([n, 1, 1, 1], device=device) + 0.1, torch.randn_like(self.x)
        self.labels = torch.eye(net.label_dim, device=device)[:1].expand(n, -1) if net.label_dim else None
        self.backward()

    @torch.no_grad()
    def forward(self):
        with self.autocast():
            self.net(self.x, self.sigma, self.labels)

    def backward(self):
        other = mock.patch.object(F, 'scaled_dot_product_attention', self.attention)
        with other if self.attention else contextlib.nullcontext(), self.autocast():
            loss = denoising_loss(self.net, self.x, self.sigma, self.eps, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def average(self):
        if self.foreach:
            return update_ema(self.ema, self.net, 10_000, 32, 500)
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.net.parameters()):
                average.copy_(p.lerp(average, 0.9))

    def __call__(self):
        self.backward()
        self.optimizer.step()
        self.average()


def bench(argv=None):
    """Images/s, TFLOP/s and share of the matmul peak of the same run, by part of the step; and other ways to do it."""
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog='edm_nets.py bench', allow_abbrev=False)
    p.add_argument('--net', nargs='+', default=['imagenet64', 'cifar10'] if cuda else ['shapes'],
                   help='paths or URLs, or rows of PRESETS for the network untrained (%(default)s)')
    p.add_argument('--batch-gpu', type=int, nargs='+', default=[64 if cuda else 32], help='per call (%(default)s)')
    p.add_argument('--precision', choices=['bf16', 'fp32'], default='bf16' if cuda else 'fp32', help='(%(default)s)')
    p.add_argument('--compile', action='store_true', help='torch.compile the network')
    p.add_argument('--ways', action='store_true', help='also the whole step in other ways, one change at a time')
    args = p.parse_args(argv)
    check_numbers(p, args, positive='batch_gpu', not_negative='')
    _, _, device = setup()
    side, dtype = 8192 if cuda else 2048, torch.bfloat16 if args.precision == 'bf16' else torch.float32
    a, b = (torch.randn([side, side], device=device, dtype=dtype) for _ in range(2))
    peak = 2 * side ** 3 / seconds_per_call(dict(matmul=functools.partial(torch.matmul, a, b)), device)['matmul'] / 1e12
    print(f'matmul peak {peak:.2f} TFLOP/s ({args.precision}, {side}x{side}, {device})')
    del a, b
    for name, n in itertools.product(args.net, args.batch_gpu):
        bench_network(name, n, args, device, peak)


def bench_network(name, n, args, device, peak):
    """The part of `bench` for one network and number of images, whose memory is free again when it returns."""
    if name in PRESETS:
        resolution, label_dim = dict(shapes=(16, 4), cifar10=(32, 0), imagenet64=(64, 1000)).get(name, (64, 0))
        net = EDMPrecond(resolution, 3, label_dim, **PRESETS[name]['net'], dropout=0).eval()
    else:
        net = load(name).requires_grad_(True)
    make = functools.partial(BenchStep, net, n, precision=args.precision, device=device)
    step, flops = make(), {}
    for part in ('forward', 'backward'):
        with FlopCounterMode(display=False) as counter:
            getattr(step, part)()
        flops[part] = counter.get_total_flops()
    flops = {'one-step sampling': flops['forward'], 'forward and backward': flops['backward'],
             'training step': flops['backward']}
    if args.compile:
        compile_networks(step.net)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_call({
        'one-step sampling': step.forward, 'forward and backward': step.backward, 'optimizer': step.optimizer.step,
        'moving average': step.average, 'training step': step}, device)
    print(f'\n{name}, {n} images' + (f', peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB'
                                     if device.type == 'cuda' else ''))
    for part, s in seconds.items():
        rate = flops.get(part, 0) / s / 1e12
        work = f'{n / s:9.1f} images/s {rate:9.3f} TFLOP/s {rate / peak:6.1%} of peak ' \
               f'{flops[part] / n / 1e9:8.3g} GFLOP/image' if rate else ''
        print(f'{part:24s}{s * 1e3:9.2f} ms {s / seconds["training step"]:6.1%}  {work}')
    if args.ways:
        make = functools.partial(make, compile=args.compile)
        naive = dict(channels_last=False, fused=False, foreach=False, attention=plain_attention)
        other = dict(fp32='bf16', bf16='fp32')[args.precision]
        ways = {'as it is': step, 'naive: the next four at once': make(**naive),
                **{f'{key}: {value if isinstance(value, bool) else "einsum"}': make(**{key: value})
                   for key, value in naive.items()},
                other: make(precision=other),
                'not compiled' if args.compile else 'compiled': make(compile=not args.compile)}
        seconds = seconds_per_call(ways, device)
        print('the whole step in other ways: its time over the time as it is')
        for way, s in seconds.items():
            print(f'{way:34s}{s / seconds["as it is"]:8.3f}')


def one_line(error):
    """What to tell of an error of the user, the machine or another rank; None for one of the code, to be traced."""
    if isinstance(error, (OSError, ValueError, FloatingPointError)):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'allocate memory' in str(error):
        return f'out of memory ({str(error) or "no more is said"}); when training, a smaller --batch-gpu takes less'
    if isinstance(error, dist.DistNetworkError) or 'gloo/transport' in str(error):  # closed, reset, timed out
        return f'no connection to another rank: {str(error).splitlines()[0]}'
    return None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = dict(train=start_training, sample=sample, bench=bench)
    if not argv or argv[0] not in commands:
        print(__doc__)
        sys.exit(0 if argv and argv[0] in ('-h', '--help') else 'edm_nets.py: expected train, sample or bench')
    try:
        commands[argv[0]](argv[1:])
    except Exception as error:  # told in one line where it is not the code's fault, else raised
        if line := one_line(error):
            sys.exit(f'edm_nets.py {argv[0]}: {line}')
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
