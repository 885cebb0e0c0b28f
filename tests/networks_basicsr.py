"""The networks of BasicSR 1.4.2 that produce images, with few channels and blocks where the class takes sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from networks import Network, Shape

VERSION = "1.4.2"
"""The version whose architectures the table covers in full."""

LEFT_OUT: dict[str, str] = {
    "StyleGAN2Generator": "holds no convolution layer (its modulated kernels are plain parameters), and needs CUDA",
    "StyleGAN2Discriminator": "a discriminator, and needs CUDA",
    "HiFaceGANDiscriminator": "a discriminator",
    "UNetDiscriminatorSN": "a discriminator",
    "VGGStyleDiscriminator": "a discriminator",
    "VGGFeatureExtractor": "a frozen part of losses",
}
"""Registered architectures without a case, with the reason."""

_IMAGE: Shape = (1, 3, 16, 16)
_PAIR: Shape = (2, 3, 16, 16)


def _case(
    name: str,
    target: str,
    *shapes: Shape,
    unused: tuple[str, ...] = (),
    asleep: tuple[str, ...] = (),
    tolerance: float = 1e-3,
    construct: Callable[[Callable[..., nn.Module], Mapping[str, Any]], nn.Module] | None = None,
    make_inputs: Callable[[], tuple[Any, ...]] | None = None,
    note: str = "",
    **options: Any,
) -> Network:
    path = f"basicsr.archs.{target}"
    shapes = shapes or (_IMAGE,)
    return Network(name, path, options, shapes, (), unused, asleep, tolerance, construct, make_inputs, note)


def _without_alignment(cls: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """BasicVSR++ as it is built where there is no CUDA."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        return cls(**options)


def _with_alignment(cls: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """BasicVSR++ as it is built where there is CUDA; what this adds runs on a CPU as well."""
    with mock.patch("torch.cuda.is_available", return_value=True):
        return cls(**options)


def _with_offsets(cls: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """As after some training: the layers that start at zero, which compute the offsets of alignments, have moved."""
    model = cls(**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                module.weight.normal_(std=0.05)
    return model


def _find_norms(model: nn.Module) -> nn.Module:
    """Let spectral norms converge: with their random start they scale weights far up, until outputs saturate."""
    with torch.no_grad():
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    for _ in range(4):
                        hook(module, None)
    return model


def _normed(cls: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    return _find_norms(cls(**options))


_FACE_PARTS = ("left_eye", "right_eye", "nose", "mouth")


def _dfdnet(cls: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """DFDNet with a random dictionary of faces, and VGG with random weights instead of downloaded ones."""
    from torchvision.models import vgg

    channels = {"256": 128, "128": 256, "64": 512, "32": 512}
    dictionary = {size: {part: torch.rand(2, c, 2, 2) for part in _FACE_PARTS} for size, c in channels.items()}
    random_vgg = vgg.vgg19
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(vgg, "vgg19", lambda **_: random_vgg(weights=None)):
        path = Path(folder, "dictionary.pth")
        torch.save(dictionary, path)
        return _find_norms(cls(dict_path=path, **options))


def _face() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A small face, and where its parts are. 512 x 512 in training; nothing in the network asks for that size."""
    boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (16, 16, 48, 48), (16, 32, 48, 64)]
    return torch.rand(1, 3, 64, 64), [torch.tensor([box], dtype=torch.float32) for box in boxes]


_OFFSETS = "the layers that compute the offsets of its alignment start at zero, so they are not rewritten"

BASICSR: tuple[Network, ...] = (
    # SpyNet enlarges images to a multiple of 32, and makes NaN of 32: its coarsest flow is of one pixel then.
    _case("BasicVSR", "basicvsr_arch:BasicVSR", (1, 2, 3, 36, 36), num_feat=8, num_block=1),
    _case(
        "IconVSR",
        "basicvsr_arch:IconVSR",
        (1, 5, 3, 36, 36),
        num_feat=8,
        num_block=1,
        asleep=("edvr.pcd_align.*offset_conv?*",),
        note=_OFFSETS,
    ),
    _case(
        "BasicVSRPlusPlus",
        "basicvsrpp_arch:BasicVSRPlusPlus",
        (1, 2, 3, 64, 64),
        mid_channels=8,
        num_blocks=1,
        construct=_without_alignment,
        unused=("spynet.*",),
    ),
    _case(
        "BasicVSRPlusPlus-aligned",
        "basicvsrpp_arch:BasicVSRPlusPlus",
        (1, 2, 3, 64, 64),
        mid_channels=8,
        num_blocks=1,
        construct=_with_alignment,
        asleep=("deform_align.*.conv_offset.?",),
        note=_OFFSETS,
    ),
    _case("DFDNet", "dfdnet_arch:DFDNet", num_feat=64, construct=_dfdnet, make_inputs=_face),
    _case("DUF", "duf_arch:DUF", (1, 7, 3, 8, 8), scale=2, num_layer=16, note="3d convolutions, batch norm"),
    _case(
        "ECBSR",
        "ecbsr_arch:ECBSR",
        num_in_ch=3,
        num_out_ch=3,
        num_block=2,
        num_channel=8,
        with_idt=True,
        act_type="prelu",
        scale=2,
        note="each block reads its convolution's weight, and is merged in eval mode",
    ),
    _case(
        "ECBSR-rrelu",
        "ecbsr_arch:ECBSR",
        (1, 1, 16, 16),
        num_in_ch=1,
        num_out_ch=1,
        num_block=1,
        num_channel=8,
        with_idt=False,
        act_type="rrelu",
        scale=2,
        note="draws its slopes in train mode",
    ),
    _case("EDSR", "edsr_arch:EDSR", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=2, upscale=2),
    _case(
        "EDVR",
        "edvr_arch:EDVR",
        (1, 3, 3, 16, 16),
        num_feat=16,
        num_frame=3,
        num_extract_block=1,
        num_reconstruct_block=1,
        asleep=("pcd_align.*offset_conv?*",),
        note=_OFFSETS,
    ),
    _case(
        "EDVR-predeblur",
        "edvr_arch:EDVR",
        (1, 3, 3, 32, 32),
        num_feat=16,
        num_frame=3,
        num_extract_block=1,
        num_reconstruct_block=1,
        hr_in=True,
        with_predeblur=True,
        with_tsa=False,
        construct=_with_offsets,
    ),
    _case(
        "HiFaceGAN",
        "hifacegan_arch:HiFaceGAN",
        (1, 3, 64, 64),
        num_feat=8,
        crop_size=64,
        construct=_normed,
        tolerance=3e-3,
    ),
    _case(
        "SPADEGenerator", "hifacegan_arch:SPADEGenerator", (1, 3, 64, 64), num_feat=8, crop_size=64, construct=_normed
    ),
    _case("MSRResNet", "srresnet_arch:MSRResNet", num_feat=16, num_block=2, upscale=4),
    _case(
        "RCAN",
        "rcan_arch:RCAN",
        num_in_ch=3,
        num_out_ch=3,
        num_feat=16,
        num_group=1,
        num_block=2,
        squeeze_factor=2,
        upscale=2,
    ),
    _case("RIDNet", "ridnet_arch:RIDNet", in_channels=3, mid_channels=16, out_channels=3, num_block=1),
    _case("RRDBNet", "rrdbnet_arch:RRDBNet", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=1, num_grow_ch=8),
    _case(
        "RRDBNet-x2",
        "rrdbnet_arch:RRDBNet",
        num_in_ch=3,
        num_out_ch=3,
        scale=2,
        num_feat=16,
        num_block=1,
        num_grow_ch=8,
    ),
    _case("SpyNet", "spynet_arch:SpyNet", (1, 3, 64, 64), (1, 3, 64, 64)),
    _case("SRVGGNetCompact", "srvgg_arch:SRVGGNetCompact", num_feat=16, num_conv=3, upscale=2),
    _case(
        "SwinIR",
        "swinir_arch:SwinIR",
        _PAIR,
        img_size=16,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    _case(
        "SwinIR-light",
        "swinir_arch:SwinIR",
        _PAIR,
        img_size=16,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        upscale=2,
        upsampler="pixelshuffledirect",
    ),
    _case(
        "SwinIR-real",
        "swinir_arch:SwinIR",
        _PAIR,
        img_size=16,
        embed_dim=24,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        upscale=4,
        upsampler="nearest+conv",
        resi_connection="3conv",
    ),
    _case(
        "SwinIR-denoise",
        "swinir_arch:SwinIR",
        _PAIR,
        img_size=16,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        upscale=1,
        upsampler="",
    ),
    _case("TOFlow", "tof_arch:TOFlow", (1, 7, 3, 32, 32)),
)
