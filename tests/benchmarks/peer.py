"""The peer: ``diffusers.UNet2DModel`` in the shape of this project's ``UNet``, for comparisons of speed.

UNet2DModel's decoder has one block a level more than its encoder, for the skips from stem and downsamplers, so at equal settings it is the
larger network. ``matched_peer`` gives it as many as the encoder has: diffusers' own blocks and forward pass, our arrangement, and within 2%
of our parameters.
"""

from __future__ import annotations

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import get_up_block
from torch import Tensor, nn

from sferd_lab.unet import UNetSettings

# What UNet2DModel asks of its blocks to be as ours are: SiLU, 8 groups, adaptive group norm.
COMMON = {"resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": 8, "resnet_time_scale_shift": "scale_shift"}


class BlockSkipsOnly(nn.Module):
    """A down block that hands on the outputs of its residual blocks, but not its downsampler's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As diffusers' down blocks."""
        hidden_states, states = self.block(hidden_states, temb)
        return hidden_states, states[: len(self.block.resnets)]


def stock_peer(shape: UNetSettings, size: int) -> UNet2DModel:
    """UNet2DModel as it comes, with the widths, blocks a level, attention levels and heads of ``shape``."""
    kinds = ["Attn" if level in shape.attention else "" for level in range(len(shape.widths))]
    model = UNet2DModel(
        sample_size=size,
        in_channels=shape.channels,
        out_channels=shape.channels,
        block_out_channels=shape.widths,
        layers_per_block=shape.blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=min(shape.widths) // shape.heads,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    return _with_heads(model, shape.heads)


def matched_peer(shape: UNetSettings, size: int) -> UNet2DModel:
    """UNet2DModel with ``shape.blocks`` blocks a level in the decoder too."""
    model = stock_peer(shape, size)
    model.down_blocks = nn.ModuleList(BlockSkipsOnly(block) for block in model.down_blocks)
    before, blocks = shape.widths[-1], []
    for level in reversed(range(len(shape.widths))):
        width = shape.widths[level]
        blocks.append(
            get_up_block(
                f"{'Attn' if level in shape.attention else ''}UpBlock2D",
                num_layers=shape.blocks,
                in_channels=width,
                out_channels=width,
                prev_output_channel=before,
                temb_channels=shape.emb_dim,
                add_upsample=level > 0,
                upsample_type="conv",
                attention_head_dim=width // shape.heads,
                **COMMON,
            )
        )
        before = width
    model.up_blocks = nn.ModuleList(blocks)
    # Ours embeds the angle in as many numbers as the embedding has.
    model.time_proj, model.time_embedding = Timesteps(shape.emb_dim, True, 0), TimestepEmbedding(shape.emb_dim, shape.emb_dim)
    return _with_heads(model, shape.heads)


def _with_heads(model: UNet2DModel, heads: int) -> UNet2DModel:
    """The same number of attention heads everywhere, which UNet2DModel's single head size cannot say."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = heads
    return model
