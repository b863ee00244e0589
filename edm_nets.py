"""What EDM is: networks, preconditioning, official checkpoints, samplers, and the training of a teacher.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).
State-dict keys, shapes and outputs are those of the official networks, so the official weights load.

    python edm_nets.py train --dataset shapes                       # the small teacher, minutes on a CPU
    torchrun --nproc_per_node=8 edm_nets.py train --dataset cifar10
    python edm_nets.py sample --net PATH_OR_URL --seeds 0 63 --steps 18 --out grid.png

Symbols: x [N, C, H, W] noisy images, sigma their noise level, D_x = D(x; sigma) the denoised images,
F_x the raw output of the U-Net; the score is (D_x - x) / sigma ** 2 (Eq. 3).
"""

import argparse
import collections
import copy
import datetime
import functools
import io
import itertools
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

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
    taps = torch.as_tensor(taps, dtype=torch.float32)
    return (taps.outer(taps) / taps.sum() ** 2)[None, None]


def resample(x, f, up):
    """Factor-2 resampling with kernel f [1, 1, L, L]: [N, C, H, W] -> [N, C, 2H, 2W] or [N, C, H/2, W/2]."""
    if f.shape[-1] == 2:  # [1, 1]: nearest neighbour, or the mean of 2x2
        with torch.autocast(x.device.type, enabled=False):  # CUDA's autocast would interpolate in float32
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

    Under CUDA's autocast, torch.nn.GroupNorm would return float32, and a bf16 step would keep 1.7 times as much memory.
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
        if self.heads:  # none where ADM has fewer than 64 channels
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
        x = self.join(h, x if self.skip is None else self.skip(x))
        if self.heads:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, c // self.heads, 3, height * width)
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each [N, heads, H*W, C/heads]; q|k|v vary fastest
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)
            x = self.join(self.proj(a), x)
        return x

    def join(self, h, x):
        return h + x if self.skip_scale == 1 else (h + x) * self.skip_scale

# ----------------------------------------------------------------------------------------------------
# U-Nets.


class NoiseEmbedding(nn.Module):
    """[N] -> [N, channels]: cosines, then sines, of geometrically spaced frequencies, or of random ones (fourier)."""

    def __init__(self, channels, fourier=False, endpoint=False):
        super().__init__()
        self.fourier, self.half, self.last = fourier, channels // 2, channels // 2 - endpoint
        if fourier:
            self.register_buffer('freqs', torch.randn(self.half) * 16)

    def forward(self, c_noise):
        steps = torch.arange(self.half, dtype=torch.float32, device=c_noise.device)
        angles = c_noise.outer(2 * np.pi * self.freqs if self.fourier else 1e-4 ** (steps / self.last))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """Encoder and decoder, the same for DDPM++, NCSN++ and ADM; the sub-classes add `embed` and `output`."""

    def build(self, res, in_channels, width, channel_mult, num_blocks, attn_resolutions, aux_taps=None, **block):
        """Fill `enc` and `dec`; returns the last width. In Song's decoders, only a level's last block has attention."""
        if res % 2 ** (len(channel_mult) - 1):
            raise ValueError(f'{res} px cannot be halved {len(channel_mult) - 1} times: channel_mult is too long')
        self.enc, widths, c_aux = nn.ModuleDict(), [], in_channels
        for level, mult in enumerate(channel_mult):
            name, attention = f'{res >> level}x{res >> level}', res >> level in attn_resolutions
            if level == 0:
                c = width * mult if block['adm'] else width
                self.enc[f'{name}_conv'] = init_layer(nn.Conv2d(in_channels, c, 3, padding=1), block['adm'])
            else:
                self.enc[f'{name}_down'] = UNetBlock(c, c, resampling='down', **block)
                if aux_taps:
                    self.enc[f'{name}_aux_residual'] = init_layer(FusedDownConv2d(c_aux, c, aux_taps), block['adm'])
                    c_aux = c
            widths.append(c)
            for i in range(num_blocks):
                self.enc[f'{name}_block{i}'] = UNetBlock(c, width * mult, attention=attention, **block)
                c = width * mult
                widths.append(c)
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            name, attention = f'{res >> level}x{res >> level}', res >> level in attn_resolutions
            if level == len(channel_mult) - 1:
                self.dec[f'{name}_in0'] = UNetBlock(c, c, attention=True, **block)
                self.dec[f'{name}_in1'] = UNetBlock(c, c, **block)
            else:
                self.dec[f'{name}_up'] = UNetBlock(c, c, resampling='up', **block)
            for i in range(num_blocks + 1):
                c_in, c, attends = c + widths.pop(), width * mult, attention and (block['adm'] or i == num_blocks)
                self.dec[f'{name}_block{i}'] = UNetBlock(c_in, c, attention=attends, **block)
        return c

    def encode(self, x, c_noise, class_labels=None, augment_labels=None):
        """x [N, C, R, R], c_noise [N] -> (activations of the encoder from shallow to deep, emb [N, E])."""
        with torch.autocast(x.device.type, enabled=False):  # the embedding stays float32
            emb = self.embed(c_noise, class_labels, augment_labels)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith('aux_residual'):  # NCSN++ adds the shrunk image; the sum replaces the last activation
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
                or decoder_type != 'standard' or list(resample_filter) not in ([1, 1], [1, 3, 3, 1]):
            raise ValueError('expected the options of an official network, not '
                             f'{embedding_type=}, {encoder_type=}, {decoder_type=}, {resample_filter=}')
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.map_noise = NoiseEmbedding(noise, fourier=embedding_type == 'fourier', endpoint=True)
        self.map_label = init_layer(nn.Linear(label_dim, noise), adm=False) if label_dim else None
        self.map_augment = init_layer(nn.Linear(augment_dim, noise, bias=False), adm=False) if augment_dim else None
        self.map_layer0 = init_layer(nn.Linear(noise, emb), adm=False)
        self.map_layer1 = init_layer(nn.Linear(emb, emb), adm=False)
        c = self.build(img_resolution, in_channels, model_channels, channel_mult, num_blocks, attn_resolutions,
                       aux_taps=list(resample_filter) if encoder_type == 'residual' else None,
                       emb=emb, adm=False, dropout=dropout, taps=list(resample_filter))
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = GroupNorm(c, 1e-6)
        self.dec[f'{img_resolution}x{img_resolution}_aux_conv'] = init_layer(
            nn.Conv2d(c, out_channels, 3, padding=1), adm=False, gain=1e-5)

    def embed(self, c_noise, class_labels, augment_labels):
        emb = self.map_noise(c_noise).unflatten(1, (2, -1)).flip(1).flatten(1)  # here sines come first
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * self.map_label.in_features ** 0.5)
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
        emb = model_channels * channel_mult_emb
        self.map_noise = NoiseEmbedding(model_channels)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = init_layer(nn.Linear(model_channels, emb), adm=True)
        self.map_layer1 = init_layer(nn.Linear(emb, emb), adm=True)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        if augment_dim:
            nn.init.zeros_(self.map_augment.weight)
        if label_dim:
            nn.init.normal_(self.map_label.weight)
        c = self.build(img_resolution, in_channels, model_channels, channel_mult, num_blocks, attn_resolutions,
                       emb=emb, adm=True, dropout=dropout)
        self.out_norm = GroupNorm(c, 1e-5)
        self.out_conv = init_layer(nn.Conv2d(c, out_channels, 3, padding=1), adm=True, gain=0)

    def embed(self, c_noise, class_labels, augment_labels):
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def output(self, x):
        return self.out_conv(F.silu(self.out_norm(x)))


class EDMPrecond(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM Eq. 7, Table 1 right column).

    It takes the official constructor arguments and keeps them in `kwargs`. `use_fp16` and `label_dropout` are ignored.
    `sigma_init` is the noise level at which a one-step student is called, or None for a teacher.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0, sigma_max=float('inf'),
                 sigma_data=0.5, model_type='DhariwalUNet', **model_kwargs):
        super().__init__()
        if not 0 <= sigma_min < sigma_max or not 0 < sigma_data < 1e6:
            raise ValueError(f'{sigma_min=}, {sigma_max=}, {sigma_data=}: expected 0 <= min < max and 0 < data')
        self.kwargs = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, model_type=model_type,
                           **model_kwargs)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.sigma_init = None
        unet = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)[model_type]
        self.model = unet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)

    def forward(self, x, sigma, class_labels=None, augment_labels=None, bottleneck=False):
        """x [N, C, R, R], sigma [], [N] or [N, 1, 1, 1], one-hot class_labels [N, label_dim] -> D_x float32, like x.

        No class_labels means the zero vector; augment_labels float [N, augment_dim]. With `bottleneck`, returns (D_x,
        deepest encoder activation).
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels = torch.zeros([1, self.label_dim], device=x.device) if class_labels is None else class_labels
        labels = labels.to(torch.float32).reshape(-1, self.label_dim) if self.label_dim else None
        c_skip = self.sigma_data ** 2 / (sigma ** 2 + self.sigma_data ** 2)
        c_out = sigma * self.sigma_data / (sigma ** 2 + self.sigma_data ** 2).sqrt()
        c_in = 1 / (self.sigma_data ** 2 + sigma ** 2).sqrt()
        c_noise = sigma.log() / 4  # Table 1, these four
        skips, emb = self.model.encode(c_in * x, c_noise.flatten(), labels, augment_labels)
        F_x = self.model.decode(skips, emb)
        D_x = c_skip * x + c_out * F_x.to(torch.float32)
        return (D_x, skips[-1]) if bottleneck else D_x


class UNetCritic(nn.Module):
    """EDM's U-Net as a critic of noised images: the log ratio of teacher_free.py, a discriminator of distributional.py.

    kind 'energy': the whole U-Net. It returns a quadratic form of its output F_x and its input x = c_in x_t,

        l = sqrt(d) (a_1 [x F_x] + a_2 [F_x^2] + a_3 [x^2] + a_0),    [.] the mean of an image's d numbers, a = a(sigma)

    A special case is -|x_t - D_x|^2, the energy of "Should EBMs model the energy or the score?" (Salimans and Ho 2021).
    kind 'encoder': the encoder alone. As in FastGen, the last activation of each resolution has a head, which returns
    one number. No head has a normalisation, because R1 needs the size of the features.
    """

    def __init__(self, kind, img_resolution, img_channels, label_dim, model_type, sigma_data=0.5, **model_kwargs):
        super().__init__()
        self.kwargs = dict(kind=kind, img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           model_type=model_type, sigma_data=sigma_data, **model_kwargs)
        self.kind, self.label_dim, self.sigma_data = kind, label_dim, sigma_data
        unet = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)[model_type]
        self.model = unet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)
        if kind == 'energy':
            self.heads = nn.ModuleList([nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 4))])  # c_noise -> a
            last = [p for p in self.model.parameters() if p.ndim == 4][-1]
            nn.init.normal_(last, std=1e-5)  # ADM's last layer is zero: if a is zero too, neither gets a gradient
        else:
            for name in {'dec', 'out_norm', 'out_conv'} & set(dict(self.model.named_children())):
                delattr(self.model, name)
            x = torch.zeros([1, img_channels, img_resolution, img_resolution])
            with torch.no_grad():
                maps = self.pyramid(x, torch.zeros([1]), torch.zeros([1, label_dim]))
            self.heads = nn.ModuleList(self.make_head(h.shape[1], h.shape[2]) for h in maps)
        for p in (p for head in self.heads for p in head[-1].parameters()):
            nn.init.zeros_(p)  # l is 0 before training

    @staticmethod
    def make_head(c, size):
        """Halve `size` down to 4 px, doubling the width, then one number: [N, c, size, size] -> [N, 1]."""
        width = max(c // 4, 32)
        layers = [nn.Conv2d(c, width, 3, padding=1), nn.LeakyReLU(0.2)]
        while size > 4:
            layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            size, width = size // 2, 2 * width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size ** 2, 1))

    def pyramid(self, x, c_noise, labels):
        """The encoder's last activation of every resolution, fine to coarse: [N, C, R, R], [N, C', R/2, R/2], ..."""
        skips, _ = self.model.encode(x, c_noise, labels)
        return list({h.shape[-1]: h for h in skips}.values())

    def forward(self, x_t, sigma, class_labels=None):
        """x_t [N, C, R, R], sigma [N, 1, 1, 1], one-hot labels [N, label_dim] -> float32 [N, 1]; 'encoder': [N, J]."""
        x, c_noise = x_t / (self.sigma_data ** 2 + sigma ** 2).sqrt(), sigma.flatten().log() / 4  # EDM Table 1
        labels = class_labels.to(torch.float32) if self.label_dim else None
        maps = self.pyramid(x, c_noise, labels) if self.kind == 'encoder' else \
            [self.model.decode(*self.model.encode(x, c_noise, labels))]
        with torch.autocast(x.device.type, enabled=False):  # l is a small difference of large sums
            maps = [h.to(torch.float32) for h in maps]
            if self.kind == 'encoder':
                return torch.cat([head(h) for head, h in zip(self.heads, maps)], dim=1)
            [F_x], a = maps, self.heads[0](c_noise[:, None])
            means = [(u * v).mean([1, 2, 3]) for u, v in ((x, F_x), (F_x, F_x), (x, x))]
            means = torch.stack([*means, torch.ones_like(c_noise)], dim=1)
            return x[0].numel() ** 0.5 * (a * means).sum(1, keepdim=True)


def is_output(name):
    """Whether a weight of this name, in a U-Net or in EDMPrecond, belongs to the last norm or the last layer."""
    return '_aux_norm' in name or '_aux_conv' in name or name.removeprefix('model.').startswith('out_')


def copy_weights(model, teacher, output=True):
    """Copy the teacher's weights into a U-Net, or the part of one. Without `output`, its last norm and layer stay."""
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in teacher.model.state_dict().items()
                                 if k in own and (output or not is_output(k))})


def make_critic(kind, teacher, weights='teacher', **changes):
    """A UNetCritic with the teacher's arguments, except for `changes`. Its U-Net never has dropout.

    weights: 'teacher' copies all weights of the teacher, 'features' all but the output layer, and 'random' none.
    """
    kwargs = {k: v for k, v in teacher.kwargs.items() if k not in ('sigma_min', 'sigma_max')}
    critic = UNetCritic(**dict(kwargs, kind=kind, dropout=0, label_dropout=0, augment_dim=0, **changes))
    if weights != 'random':
        copy_weights(critic.model, teacher, output=weights == 'teacher')
    return critic


def compile_networks(*nets):
    """Compile networks in place with static shapes: each batch size gets its own graphs, not slower dynamic ones."""
    torch._dynamo.config.recompile_limit = 64  # all networks share a forward(); past the limit it would run uncompiled
    torch._dynamo.config.optimize_ddp = False  # True cuts the graph at every bucket of DDP, 47 times for ADM
    for net in nets:
        net.compile(dynamic=False)

# ----------------------------------------------------------------------------------------------------
# Files: this project's .pt, and the official .pkl, read without running anything they contain.

OFFICIAL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-{}.pkl'  # weights under CC BY-NC-SA 4.0
TEACHERS = {dataset: OFFICIAL.format(name) for dataset, name in dict(
    cifar10='cifar10-32x32-uncond-vp', ffhq64='ffhq-64x64-uncond-vp', afhqv2='afhqv2-64x64-uncond-vp',
    imagenet64='imagenet-64x64-cond-adm').items()}


def save(path, net, dataset, nimg, **more):
    """Write a network for users, whole or not at all: see `load`. Raises OSError, FloatingPointError."""
    data.check_finite(Path(path).name, net)
    with data.whole_file(path) as f:
        torch.save(dict(net={k: v.cpu() for k, v in net.state_dict().items()}, net_kwargs=net.kwargs,
                        sigma_init=net.sigma_init, dataset=dataset, kimg=nimg / 1000, **more), f)


def load(path_or_url):
    """Read a network: this project's .pt or an official EDM .pkl -> EDMPrecond on the CPU, eval mode, frozen.

    A URL is fetched once into the cache. Nothing in the file is executed. Raises OSError, MemoryError, or ValueError
    in one line when the file is damaged, is something else, or asks for more than tensors and the official classes.
    """
    path = Path(path_or_url)
    if '://' in str(path_or_url):
        path = data.download(str(path_or_url), data.cache_path(str(path_or_url)))
    if not path.is_file():
        raise FileNotFoundError(f'no network at {path_or_url}')
    try:
        if zipfile.is_zipfile(path):  # torch.save
            content = torch.load(path, map_location='cpu', weights_only=True)
            if not isinstance(content, dict) or 'net_kwargs' not in content:
                raise ValueError('it is a checkpoint: give the teacher-*.pt or student-*.pt beside it'
                                 if isinstance(content, dict) and 'config' in content else
                                 'it is not what edm_nets.save writes; it may be a bare state dict')
            kwargs, state, sigma_init = (content[key] for key in ('net_kwargs', 'net', 'sigma_init'))
        else:
            kwargs, state, sigma_init = *read_official_pickle(path), None
        if kwargs.get('num_blocks', 0) > 64 or len(kwargs.get('channel_mult', ())) > 16:
            raise ValueError('the network is too deep: expected at most 64 blocks per resolution and 16 resolutions')
        with torch.device('meta'):  # takes no memory before the shapes are known to agree
            net = EDMPrecond(**kwargs)
        net.load_state_dict(state, strict=True, assign=True)
        for name, x in net.state_dict().items():
            if not x.is_floating_point() or x.layout is not torch.strided or not x.isfinite().all():
                raise ValueError(f'{name} is not made of finite floating-point numbers')
        if not 0 < (1 if sigma_init is None else sigma_init) < 1e6:
            raise ValueError(f'sigma_init {sigma_init}: expected a noise level, or None for a teacher')
    except Exception as error:  # a damaged or hostile file can cause any exception; it is reported in one line
        if isinstance(error, (MemoryError, OSError)):
            raise
        if 'allocate memory' in str(error):
            raise MemoryError(f'{path}: {error}') from None
        reason = explain(path, error)
        if path != Path(path_or_url):  # a fetched file that is no network is not kept
            path.unlink(missing_ok=True)
            reason += '; the file was removed from the cache'
        raise ValueError(f'cannot load {path_or_url}: {reason}') from None
    net.sigma_init = sigma_init
    return net.float().eval().requires_grad_(False)


def explain(path, error):
    """Why `path` could not be loaded, in one line: what the file is instead, or what the error says."""
    with open(path, 'rb') as f:
        start, reason = f.read(100).lstrip().lower(), str(error).strip() or type(error).__name__
    for beginning, what in {
            b'version https://git-lfs': 'it is a pointer of git-lfs: fetch the file itself with `git lfs pull`',
            b'<': 'it is a web page: is the address right?', b'\x1f\x8b': 'it is compressed: gunzip it'}.items():
        if start.startswith(beginning):
            return what
    if start.startswith(b'pk') and ('record' in reason or not zipfile.is_zipfile(path)):
        return 'it is a zip file that torch.save did not write, or it is incomplete: check its size'
    if not start.startswith((b'pk', b'\x80')):
        return 'it is neither a .pt of this project nor an official .pkl' if start else 'it is empty'
    if reason.startswith('Weights only load failed'):
        return 'it holds other objects than tensors; from an EDM training give network-snapshot-*.pkl'
    if reason.startswith('Error(s) in loading'):  # each line lists all keys with one kind of fault: return the first
        return reason.split('\n')[1].strip().split('", "')[0].rstrip('. ')
    return reason.split('\n')[0]


class Recorded:
    """Stand-in for an object in an official pickle. It has the class name and the attributes, but none of the code."""

    def __init__(self, meta=None, *_):
        if isinstance(meta, dict):
            self.class_name, self.state = meta['class_name'], meta['state']

    def __setstate__(self, state):
        self.class_name, self.state = 'container', state

    def tensors(self, prefix=''):
        """(full name, tensor) in the order of torch's state_dict."""
        if 'listed' in vars(self):  # a small file could ask for the same one 2^60 times
            raise ValueError(f'{prefix} occurs twice')
        self.listed = True
        for group in ('_parameters', '_buffers'):
            for name, value in self.state.get(group, {}).items():
                if isinstance(value, torch.Tensor):
                    yield prefix + name, value
        for name, module in self.state.get('_modules', {}).items():
            if isinstance(module, Recorded):
                yield from module.tensors(f'{prefix}{name}.')


class OfficialUnpickler(pickle._Unpickler):
    """The pure-Python unpickler, whose memo cannot be made huge. It accepts only our stand-ins and plain containers."""

    def find_class(self, module, name):
        name = f'{module}.{name}'.replace('numpy._core', 'numpy.core')
        stand_ins = ['torch_utils.persistence._reconstruct_persistent_obj', 'torch.nn.modules.container.ModuleDict',
                     'torch.nn.modules.container.ModuleList', 'numpy.core.multiarray.scalar', 'numpy.dtype']
        allowed = dict.fromkeys(stand_ins, Recorded) | {
            'collections.OrderedDict': collections.OrderedDict, 'builtins.set': set, 'dnnlib.util.EasyDict': dict,
            'torch._utils._rebuild_tensor_v2': self.tensor, 'torch.storage._load_from_bytes': self.storage,
            'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
            'torch._utils._rebuild_parameter_with_state': lambda tensor, *_: tensor}
        if name not in allowed:
            raise ValueError(f'refused: the pickle asks for {name}')
        return allowed[name]

    def persistent_load(self, pid):
        raise ValueError('refused: the pickle has a persistent id')

    @staticmethod
    def storage(content):  # torch's own calls torch.load(weights_only=False), which can run code
        if content[:2] == b'PK':
            raise ValueError('refused: the pickle has a tensor storage in zip format')
        return torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)

    @staticmethod
    def tensor(storage, offset, size, stride, *_):
        numel = int(np.prod(size, dtype=np.int64))
        contiguous = tuple(int(np.prod(size[i + 1:], dtype=np.int64)) for i in range(len(size)))
        if not isinstance(storage, torch.storage.TypedStorage) or offset < 0 or min(size, default=0) < 0 \
                or offset + numel > storage._size() or (numel and tuple(stride) != contiguous):
            raise ValueError(f'a tensor of shape {tuple(size)} does not fit its storage')
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, collections.OrderedDict())


def read_official_pickle(path):
    """Official .pkl -> (constructor arguments of EDMPrecond, state_dict). Layout: {'ema': EDMPrecond, ...}."""
    content = OfficialUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    net = content.get('ema') if isinstance(content, dict) else content
    if getattr(net, 'class_name', None) != 'EDMPrecond':
        raise ValueError(f"expected an EDMPrecond under 'ema', not {getattr(net, 'class_name', type(net).__name__)}")
    interface = 'img_resolution img_channels label_dim use_fp16 sigma_min sigma_max sigma_data model_type'.split()
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
    ramp = torch.arange(num_steps, dtype=torch.float64, device=z.device) / max(num_steps - 1, 1)
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
    """The student's sampler: x_0 = G(sigma_init z; sigma_init), float32 [N, C, R, R] like z; one-hot labels or None."""
    return student(sigma_init * z, torch.full([], sigma_init, device=z.device), class_labels)


class ImageSeeds:
    """A random generator for each image, so that image i is the same at any batch size and on any number of GPUs."""

    def __init__(self, seeds, device):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, shape, **kwargs):
        return torch.stack([torch.randn(shape, generator=g, device=self.device, **kwargs) for g in self.generators])

    def randn_like(self, x):
        return self.randn(x.shape[1:], dtype=x.dtype)

    def randint(self, high):
        return torch.stack([torch.randint(high, [], generator=g, device=self.device) for g in self.generators])


@torch.no_grad()
def generate(net, seeds, num_steps=None, class_idx=None, batch=256, **sampler):
    """Generate images with the same random numbers, in the same order, as EDM's generate.py.

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
# The flags that all training scripts share.


def positive(kind):
    """An argparse type: a number above 0, e.g. `type=positive(int)`."""
    def number(text):
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f'{text}: expected a number above 0')
        return kind(text)
    return number


def natural(text):
    """An argparse type: an integer, 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f'{text}: expected 0 or more')
    return int(text)


def common_flags(script, description, presets, argv):
    """An argparse parser with the flags of every script that trains; defaults are the dataset's row of `presets`.

    Returns (parser, method, evaluation): the two groups to which a script adds its own flags.
    """
    def images_per_score(text):
        if int(text) and int(text) < 10:
            raise argparse.ArgumentTypeError('expected at least 10, or 0 for no scores')
        return int(text)

    parser = argparse.ArgumentParser(description=description.splitlines()[0], add_help=False, allow_abbrev=False)
    p = parser.add_argument_group('data and output')
    p.add_argument('--dataset', choices=presets, default='shapes',
                   help='the dataset, which also chooses the defaults of the other flags (%(default)s)')
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**presets[dataset])
    p.add_argument('-h', '--help', action='help', help='show these flags, with the defaults for --dataset')
    p.add_argument('--data', metavar='FOLDER', help='the prepared dataset (datasets/DATASET)')
    p.add_argument('--out', metavar='FOLDER', default=f'runs/{script}-{dataset}',
                   help='where all files of the run go; several machines must share this folder. The same command '
                   f'continues the run (runs/{script}-DATASET)')
    p.add_argument('--snapshot-kimg', type=positive(float), metavar='KIMG', help='thousands of images between two '
                   'snapshots: network, picture of samples, scores and checkpoint (%(default)s)')
    p.add_argument('--status-kimg', type=positive(float), metavar='KIMG',
                   help='thousands of images between two status lines (%(default)s)')
    if script != 'teacher':
        p.add_argument('--teacher', metavar='FILE', help='path or URL of the diffusion model to start from (the '
                       'official EDM network of the dataset; for shapes, your own or the shipped one)')
    networks = 'student' if script == 'distributional' else 'networks'
    p = parser.add_argument_group('optimisation')
    p.add_argument('--kimg', type=positive(float), help='length of the training, in thousands of images (%(default)s)')
    p.add_argument('--batch', type=positive(int), metavar='IMAGES', help='images per step, over all GPUs (%(default)s)')
    p.add_argument('--batch-gpu', type=positive(int), metavar='IMAGES', help='images that a GPU works on at a time; '
                   f'fewer save memory{", but batch norm sees fewer" * (script == "distributional")} '
                   f'({presets[dataset].get("batch_gpu", "all")})')
    p.add_argument('--lr', type=positive(float),
                   help=f'learning rate{" of the student" * (script != "teacher")} (%(default)s)')
    p.add_argument('--seed', type=natural, default=0, help='seed of all random numbers (%(default)s)')
    p.add_argument('--precision', choices=['bf16', 'fp32'],
                   help=f'number format of the {networks} (bf16 on a GPU, fp32 on a CPU)')
    p.add_argument('--compile', action='store_true', help=f'compile the {networks} with torch.compile')
    method, evaluation = (parser.add_argument_group(title) for title in ('method', 'evaluation'))
    if script != 'teacher':
        method.add_argument('--sigma-init', type=positive(float), metavar='SIGMA',
                            help='noise level of the latents from which the student makes images (%(default)s)')
        evaluation.add_argument('--eval-images', type=images_per_score, metavar='IMAGES',
                                help='images generated for each score during training; 0: no scores (%(default)s)')
        parser.set_defaults(features='pixels' if dataset == 'shapes' else 'inception')
        evaluation.add_argument('--features', choices=['inception', 'pixels'],
                                help='what scores compare: Inception features for FID, or pixels (%(default)s)')
    return parser, method, evaluation

# ----------------------------------------------------------------------------------------------------
# Small helpers, the same text in every script.


def setup():
    """Join torchrun's process group, or be a world of one. Returns (rank, world_size, device)."""
    if 'RANK' not in os.environ:
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')
    device = torch.device('cpu')
    if torch.cuda.is_available():
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 stays exact; speed comes from bf16
    if not dist.is_initialized():
        backend, device_id = ('nccl', device) if device.type == 'cuda' else ('gloo', None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1), device_id=device_id)  # long downloads
    return dist.get_rank(), dist.get_world_size(), device


def is_due(nimg, batch, kimg):
    """Whether a step of `batch` images that ended at `nimg` crossed a multiple of `kimg`. True at nimg = 0."""
    return nimg // (kimg * 1000) != (nimg - batch) // (kimg * 1000)


@torch.no_grad()
def update_ema(ema, net, nimg, batch, ema_kimg):
    """EDM's moving average: half-life `ema_kimg`, or 5 % of the images seen so far if that is less."""
    beta = 0.5 ** (batch / max(min(ema_kimg * 1000, nimg * 0.05), 1e-8))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)

# ----------------------------------------------------------------------------------------------------
# Training a teacher (EDM Section 5): python edm_nets.py train

P_mean, P_std = -1.2, 1.2  # ln sigma ~ N(P_mean, P_std^2), EDM Table 1

# The settings are those of EDM Table 7 and its train.py. batch_gpu is meant for 40 GB. We chose the row `shapes`.
# Deviation: EDM augments CIFAR-10, FFHQ and AFHQv2 geometrically and tells the network how. We only mirror (xflip).
SMALL = dict(model_type='SongUNet', channels=16, channel_mult=[1, 2, 2], blocks=1, attention=[4])
DDPMPP = dict(model_type='SongUNet', channels=128, channel_mult=[2, 2, 2], blocks=4, attention=[16])
DDPMPP64 = dict(DDPMPP, channel_mult=[1, 2, 2, 2])
ADM = dict(model_type='DhariwalUNet', channels=192, channel_mult=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8])
REAL = dict(rampup_kimg=10_000, decay=0.0, kimg=200_000, ema_kimg=500, cond=0, xflip=True, snapshot_kimg=2500,
            status_kimg=50)
PRESETS = {
    'shapes':     dict(batch=64, lr=2e-3, dropout=0.00, rampup_kimg=5, decay=0.5, kimg=130, ema_kimg=500, cond=1,
                       xflip=False, snapshot_kimg=26, status_kimg=6.5, **SMALL),
    'cifar10':    dict(REAL, batch=512, batch_gpu=256, lr=1e-3, dropout=0.13, **DDPMPP),
    'ffhq64':     dict(REAL, batch=256, batch_gpu=128, lr=2e-4, dropout=0.05, **DDPMPP64),
    'afhqv2':     dict(REAL, batch=256, batch_gpu=128, lr=2e-4, dropout=0.25, **DDPMPP64),
    'imagenet64': dict(REAL, batch=4096, batch_gpu=64, lr=1e-4, dropout=0.10, kimg=2_500_000, ema_kimg=50_000, cond=1,
                       xflip=False, snapshot_kimg=10_000, status_kimg=50, **ADM),
}


def denoising_loss(net, x_0, sigma, eps, class_labels=None):
    """EDM's weighted denoising loss (Eq. 2 with Table 1's weight), summed over pixels, mean over images.

    x_0 float [N, C, R, R] in [-1, 1], sigma [N, 1, 1, 1], eps like x_0 standard normal -> scalar.
    """
    weight = (sigma ** 2 + 0.5 ** 2) / (sigma * 0.5) ** 2  # sigma_data = 0.5
    return (weight * (net(x_0 + sigma * eps, sigma, class_labels) - x_0) ** 2).sum([1, 2, 3]).mean()


def parse_train_args(argv):
    parser, p, _ = common_flags('teacher', train.__doc__, PRESETS, argv)
    parser.prog += ' train'
    p.add_argument('--rampup-kimg', type=float, metavar='KIMG',
                   help='thousands of images over which the learning rate rises from zero (%(default)s)')
    p.add_argument('--decay', type=float, metavar='SHARE',
                   help='last share of the run, over which the learning rate falls to zero (%(default)s)')
    p.add_argument('--dropout', type=float, metavar='P', help='dropout probability of the network (%(default)s)')
    p.add_argument('--cond', type=int, choices=[0, 1], help='1: the class is an input of the network (%(default)s)')
    p.add_argument('--channels', type=positive(int), help='base width of the network, a multiple of 4 (%(default)s)')
    p.add_argument('--channel-mult', type=positive(int), nargs='+', metavar='N',
                   help='width at each resolution, as a multiple of the base width %(default)s')
    p.add_argument('--blocks', type=positive(int), help='residual blocks per resolution (%(default)s)')
    p.add_argument('--attention', type=int, nargs='*', metavar='RES',
                   help='resolutions with self-attention %(default)s')
    p.add_argument('--sigma', type=positive(float),
                   help='train at this noise level alone (for teacher_free.py --init single-level)')
    parser.set_defaults(out=None)
    args = parser.parse_args(argv)
    if args.channels % 4 or not 0 <= args.dropout < 1 or not 0 <= args.decay <= 1:
        parser.error('--channels must be a multiple of 4, --dropout and --decay between 0 and 1')
    args.out = args.out or f'runs/teacher-{args.dataset}' + (f'-sigma{args.sigma:g}' if args.sigma else '')
    return args


def make_network(args, resolution, label_dim):
    """The untrained network that the arguments of `train` describe. Raises ValueError."""
    sizes = [resolution >> level for level in range(len(args.channel_mult))]
    if not set(args.attention) <= set(sizes):
        raise ValueError(f'--attention {" ".join(map(str, args.attention))}: this network has the resolutions {sizes}')
    return EDMPrecond(resolution, 3, label_dim, model_type=args.model_type, model_channels=args.channels,
                      channel_mult=args.channel_mult, num_blocks=args.blocks, attn_resolutions=args.attention,
                      dropout=args.dropout)


def train(args):
    """Train a teacher, or continue its training, up to --kimg."""
    # Initialize. --batch is global. Gradient accumulation: this rank adds up gradients over `rounds`, its slices.
    rank, world_size, device = setup()
    if args.batch % world_size:
        raise ValueError(f'--batch {args.batch} is not a multiple of the {world_size} processes')
    share = args.batch // world_size
    size = max(n for n in range(1, min(args.batch_gpu or share, share) + 1) if share % n == 0)
    if 2 * size < min(args.batch_gpu or share, share):
        raise ValueError(f'{share} images per GPU can only be cut into {share // size} x {size}: change --batch')
    rounds = [slice(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]
    args.precision = args.precision or ('bf16' if device.type == 'cuda' else 'fp32')
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == 'bf16')

    # Data and networks.
    torch.manual_seed(args.seed)
    dataset = data.rank0_first(data.open_dataset, args.dataset, args.data)
    label_dim = dataset.label_dim if args.cond else 0
    if args.cond and not label_dim:
        raise ValueError('--cond 1 needs labels, and the data has none: give --cond 0')
    net = make_network(args, dataset.resolution, label_dim).to(device, memory_format=torch.channels_last).train()
    net.sigma_init = args.sigma  # None: all noise levels, and no one-step sampler
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    if args.compile:
        compile_networks(net)
    ddp = DDP(net, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True)

    # Resume. `parts` and the count of images are the whole state: random numbers follow from seed and count.
    parts = dict(net=net, ema=ema, optimizer=optimizer)
    config, state = data.load_checkpoint(args, parts, data=data.identity(dataset))
    nimg, resumed, total = state.get('nimg', 0), state.get('nimg'), args.kimg * 1000
    if rank == 0:
        parameters = sum(p.numel() for p in net.parameters())
        data.start_log(args, state, f'teacher of {parameters / 1e6:.2f} M parameters ({world_size} x {device.type}), '
                       f'trained from {nimg / 1000:g} to {args.kimg:g} kimg on {len(dataset)} images, {label_dim} '
                       f'classes. The loss should fall. Samples: {args.out}/grid-*.png', trained_parameters=parameters)

    means, saved = data.Means(nimg), time.time()
    while True:
        # Status line (a resumed run has its first one already), snapshot, checkpoint, done?
        done = nimg >= total
        snapshot = done or is_due(nimg, args.batch, args.snapshot_kimg)
        if nimg != resumed and (snapshot or is_due(nimg, args.batch, args.status_kimg)):
            stats = dict(kimg=nimg / 1000, **means.collect(nimg))
            if rank == 0:
                data.log_status(args.out, stats, total)
            if rank == 0 and snapshot:
                grid = {'': generate(ema, range(64), num_steps=None if args.sigma else 18)}
                data.save_panels(grid, f'{args.out}/grid-{nimg // 1000:06d}.png')
                if nimg:
                    save(f'{args.out}/teacher-{nimg // 1000:06d}.pt', ema, args.dataset, nimg)
            means = data.Means(nimg)
        if rank == 0 and nimg != resumed and (snapshot or time.time() - saved > 1200):  # at most 20 minutes are lost
            data.save_checkpoint(args.out, config, dict(nimg=nimg), parts)
            saved = time.time()
        if done:
            break

        # Images and random numbers of this step, for the global batch; this rank takes its rows.
        indices, flips = data.batch_order(args.seed, nimg, args.batch, len(dataset))
        generator = data.step_generator(args.seed, nimg, 0, device)
        sigma = (P_mean + P_std * torch.randn([args.batch, 1, 1, 1], generator=generator, device=device)).exp()
        if args.sigma:
            sigma = torch.full_like(sigma, args.sigma)
        eps = torch.randn([args.batch, 3, dataset.resolution, dataset.resolution], generator=generator, device=device)
        if args.dropout:  # its masks are the one thing that depends on the processes and on --batch-gpu
            torch.manual_seed(hash((args.seed, nimg, rank)))

        # Update the network.
        for rows in rounds:
            x_0 = data.load_images(dataset, indices[rows], device, flips[rows] & args.xflip)
            labels = F.one_hot(data.to_device(dataset.labels(indices[rows]), device), label_dim) if label_dim else None
            ddp.require_backward_grad_sync = rows is rounds[-1]  # ranks average their gradients once a step
            with autocast():
                loss = denoising_loss(ddp, x_0, sigma[rows], eps[rows], labels)
            (loss / len(rounds)).backward()
            means.add(loss=loss)
        ramp = min((nimg + args.batch) / max(args.rampup_kimg * 1000, 1), 1)  # Deviation: EDM's first step has rate 0
        fall = min((1 - nimg / total) / args.decay, 1) if args.decay else 1
        optimizer.param_groups[0]['lr'] = args.lr * ramp * fall
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, net, nimg, args.batch, args.ema_kimg)
        nimg += args.batch
    dist.barrier()  # guards the last files


def shapes_teacher(sigma=None):
    """The path of the small teacher on `shapes`: your own, or the shipped one. Collective.

    With a `sigma`, the path of a network that is trained at this noise level alone. A missing network is trained once.
    """
    args = parse_train_args(['--sigma', str(sigma)] if sigma else [])
    path = f'{args.out}/teacher-{int(args.kimg):06d}.pt'
    shipped = Path(__file__).parent / 'assets' / 'teacher-shapes.pt'
    if not os.path.exists(path) and shipped.is_file() and not sigma:
        return str(shipped)
    if not os.path.exists(path):
        if dist.get_rank() == 0:
            print(f'{path} is needed and does not exist yet. It is trained now, once.', flush=True)
        train(args)
    return path


def open_teacher(path, dataset=None):
    """`load` a teacher, first on one rank of each machine. Its `.fingerprint` identifies the weights. Collective.

    Raises ValueError if the network does not fit `dataset`. Without a dataset nothing is compared.
    """
    net = data.rank0_first(load, path)
    # As in DMD2, the methods do not augment. Deviation: Diff-Instruct and SiD do, but not on ImageNet.
    net.model.map_augment, net.kwargs['augment_dim'] = None, 0
    net.fingerprint = f'checksum {data.fingerprint(net.state_dict().values())}'
    if dataset is not None and (
            (dataset.resolution, 3) != (net.img_resolution, net.img_channels)
            or net.label_dim and dataset.label_dim != net.label_dim):
        raise ValueError(
            f'{path} is a network of {net.img_resolution} px, {net.img_channels} channels and {net.label_dim} classes, '
            f'the data has {dataset.resolution} px, 3 channels and {dataset.label_dim} classes')
    return net

# ----------------------------------------------------------------------------------------------------
# Sampling: python edm_nets.py sample


def sample(argv):
    """One PNG of the images of one or several networks, one below the other, all from the same seeds."""
    p = argparse.ArgumentParser(prog='edm_nets.py sample', allow_abbrev=False)
    p.add_argument('--net', nargs='+', required=True, help='paths or URLs of teachers or students')
    p.add_argument('--seeds', type=int, nargs=2, default=(0, 63), metavar=('FIRST', 'LAST'), help='(%(default)s)')
    p.add_argument('--steps', type=positive(int), help='Heun steps (one step for a student, 18 for a teacher)')
    p.add_argument('--class', dest='class_idx', type=int, help='class of all images (drawn for each image)')
    p.add_argument('--sigma-init', type=positive(float), help='noise level of the one step (as in the file)')
    p.add_argument('--titles', nargs='+', default=[], help='a heading for each network (its path and steps)')
    p.add_argument('--out', default='grid.png', help='PNG to write (%(default)s)')
    args = p.parse_args(argv)
    if args.titles and not len(args.titles) == len(set(args.titles)) == len(args.net):
        p.error(f'--titles {" ".join(args.titles)}: give {len(args.net)} different ones, one for each network')
    if args.sigma_init and (args.steps or 1) > 1:
        p.error(f'--sigma-init is for one step, but these are {args.steps}: leave out one of the two')
    torch.backends.cudnn.allow_tf32 = False  # as in training and scoring
    panels, sizes, seeds = {}, set(), range(args.seeds[0], args.seeds[1] + 1)
    if not seeds:
        p.error('--seeds: LAST must not be below FIRST')
    for path, title in itertools.zip_longest(args.net, args.titles):
        net = load(path).to('cuda' if torch.cuda.is_available() else 'cpu')
        sizes.add(net.img_resolution)
        if len(sizes) > 1:
            raise ValueError(f'{path} makes images of another size than {args.net[0]}')
        net.sigma_init = args.sigma_init or net.sigma_init
        steps = args.steps or (18 if net.sigma_init is None else 1)
        if steps == 1 and net.sigma_init is None:
            raise ValueError(f'{path} is no student: give --sigma-init for one step, or give more --steps')
        if args.class_idx is not None and not 0 <= args.class_idx < net.label_dim:
            raise ValueError(f'--class {args.class_idx}: {path} has {net.label_dim} classes')
        panels[title or f'{path}, steps: {steps}'] = generate(net, seeds, None if steps == 1 else steps, args.class_idx)
    data.save_panels(panels, args.out, min(len(seeds), 18), scale=max(1, 48 // net.img_resolution))
    print(f'{args.out}: {len(seeds)} images of ' + '; '.join(panels))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = dict(train=lambda argv: train(parse_train_args(argv)), sample=sample)
    if not argv or argv[0] not in commands:
        print(__doc__)
        sys.exit(0 if argv and argv[0] in ('-h', '--help') else 'edm_nets.py: expected train or sample')
    with data.clear_errors(f'edm_nets.py {argv[0]}'):
        commands[argv[0]](argv[1:])
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
