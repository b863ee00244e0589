"""What EDM is: networks, preconditioning, official checkpoints, samplers, and the training of a teacher.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).
State-dict keys, shapes and outputs are those of the official networks, so the official weights load.

    python edm_nets.py train --dataset shapes                       # the small teacher, minutes on a CPU
    torchrun --nproc_per_node=8 edm_nets.py train --dataset cifar10
    python edm_nets.py sample --net PATH_OR_URL --seeds 0-63 --steps 18 --out grid.png
    python edm_nets.py bench --net PATH_OR_URL --batch-gpu 32 --precision bf16 --compile

Symbols: x [N, C, H, W] noisy images, sigma their noise level, D_x = D(x; sigma) the denoised images,
F_x the raw output of the U-Net; the score is (D_x - x) / sigma ** 2 (Eq. 3).
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pickle
import sys
import time
import warnings
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


def group_norm(channels, eps):
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


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
        self.norm0 = group_norm(c_in, eps)
        conv0 = ResampleConv2d(c_in, c_out, 3, up, taps) if resampling else nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv0 = init_layer(conv0, adm)
        self.affine = init_layer(nn.Linear(emb, c_out * (2 if adm else 1)), adm)
        self.norm1 = group_norm(c_out, eps)
        self.conv1 = init_layer(nn.Conv2d(c_out, c_out, 3, padding=1), adm, gain=small)
        self.skip = None
        if resampling and adm and c_in == c_out:
            self.skip = Resample(up, taps)
        elif resampling:
            self.skip = init_layer(ResampleConv2d(c_in, c_out, 1, up, taps), adm)
        elif c_in != c_out:
            self.skip = init_layer(nn.Conv2d(c_in, c_out, 1), adm)
        if attention:
            self.norm2 = group_norm(c_out, eps)
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
            q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # each [N, heads, H*W, C/heads]; q|k|v vary fastest
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
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = group_norm(c, 1e-6)
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
        self.out_norm = group_norm(c, 1e-5)
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
        self.kwargs = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, model_type=model_type,
                           **model_kwargs)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.sigma_init = None
        unet = SongUNet if model_type == 'SongUNet' else DhariwalUNet
        self.model = unet(img_resolution, img_channels, img_channels, label_dim, **model_kwargs)

    def forward(self, x, sigma, class_labels=None, augment_labels=None, bottleneck=False):
        """x [N, C, R, R], sigma [], [N] or [N, 1, 1, 1], one-hot class_labels [N, label_dim] -> D_x float32 [N, C, R, R].

        No class_labels means the zero vector. With `bottleneck`, returns (D_x, deepest encoder activation).
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
        c_noise = sigma.log() / 4
        skips, emb = self.model.encode(c_in * x, c_noise.flatten(), class_labels, augment_labels)
        F_x = self.model.decode(skips, emb)
        D_x = c_skip * x + c_out * F_x.to(torch.float32)
        return (D_x, skips[-1]) if bottleneck else D_x
