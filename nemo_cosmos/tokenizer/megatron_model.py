"""The tokenizers as Megatron-core models: this rank's share of one."""

from __future__ import annotations

from einops import rearrange
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.tokenizer.config import IMAGE_NORM_GROUPS, TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis, Sharing, split_rows
from nemo_cosmos.tokenizer.model import (
    CausalVideoTokenizer,
    ImageTokenizer,
    Tokenizer,
    check_image_shape,
    check_video_shape,
)
from nemo_cosmos.tokenizer.recompute import recompute_activations
from nemo_cosmos.tokenizer.tensor_parallel import split_axes, split_channels

_FIRST_STAGE, _LAST_STAGE = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")


class MegatronTokenizer(Tokenizer):
    """What Megatron's DDP, schedules and checkpoints ask of a model, for the tokenizers of videos and of images.

    A tokenizer is whole at first, to be given the same weights on every rank; `split` leaves a rank its share.
    """

    def _take_for_megatron(self, config: TransformerConfig) -> None:
        """Called once the networks stand; `config` tells precision and communication."""
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.sharing: Sharing | None = None
        self.input_tensor: Tensor | None = None
        # Megatron's schedules take every `decoder` for a transformer's and number the micro-batches of its `layers`.
        self.decoder.layers = ()
        recompute_activations(self, config)

    def split(
        self, groups: ProcessGroupCollection, *, pre_process: bool, post_process: bool, context_parallel_axis: Axis
    ) -> None:
        """Leaves this rank its share, in place.

        Args:
            groups: Process groups; `tp` and `cp` are used.
            pre_process: Whether this pipeline stage has the encoder.
            post_process: Whether this pipeline stage has the decoder.
            context_parallel_axis: What the context-parallel ranks divide.
        """
        self.sharing = Sharing(config=self.tokenizer_config, axis=context_parallel_axis, group=groups.cp)
        if context_parallel_axis == "height":
            split_rows(self, groups.cp)
        split_channels(self, groups.tp)
        self.pre_process, self.post_process = pre_process, post_process
        for name in (*(() if pre_process else _FIRST_STAGE), *(() if post_process else _LAST_STAGE)):
            delattr(self, name)

    def _code_share(self, picture: Tensor, sharing: Sharing) -> Tensor:
        """Encodes and decodes this rank's share.

        Args:
            picture: The whole video or image [B, 3, (T,) H, W], of a shape that fits the compression.
            sharing: How ranks share it.

        Returns:
            The whole reconstruction on every rank of the last pipeline stage. On the first of two the codes of this
            rank's piece, [S, B, latent_channels] with S cells of the grid, as Megatron's pipelines want them.
        """
        shape = tuple(picture.shape)
        past = (sharing.past(shape),) if self.tokenizer_config.modality == "video" else ()
        if self.pre_process:
            codes = self.quantized(self.quant_conv(self.encoder(sharing.own(picture), *past)))
        else:
            codes = rearrange(self.input_tensor, "S B C -> B C S").unflatten(2, sharing.latent_shape(shape))
        if not self.post_process:
            codes_SBC = rearrange(codes.flatten(2), "B C S -> S B C").contiguous()
            return make_viewless_tensor(codes_SBC, requires_grad=True, keep_graph=True)
        return sharing.join(self.decoder(self.post_quant_conv(codes), *past), shape)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Takes the codes that the first pipeline stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Describes this rank's weights for a distributed checkpoint, which any other layout can load."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, split_axes(self), sharded_offsets=sharded_offsets
        )


class MegatronVideoTokenizer(MegatronTokenizer, CausalVideoTokenizer):
    """A tokenizer of videos.

    Args:
        tokenizer_config: The architecture.
        config: Megatron's configuration: precision and communication.
    """

    def __init__(self, tokenizer_config: TokenizerConfig, config: TransformerConfig) -> None:
        super().__init__(tokenizer_config)
        self._take_for_megatron(config)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes; gradients flow through a quantizer.

        Args:
            video_BCTHW: The whole video [B, 3, T, H, W], the same on all ranks but the data-parallel ones; the last
                pipeline stage needs its shape.

        Returns:
            The whole reconstruction [B, 3, T, H, W] on every rank of the last pipeline stage; on the first of two what
            it sends.

        Raises:
            UserError: The shape does not fit the compression, or the context-parallel ranks cannot share it.
        """
        if self.sharing is None:
            return super().forward(video_BCTHW)
        check_video_shape(self.tokenizer_config, tuple(video_BCTHW.shape))
        return self._code_share(video_BCTHW, self.sharing)


class MegatronImageTokenizer(MegatronTokenizer, ImageTokenizer):
    """A tokenizer of images.

    Args:
        tokenizer_config: The architecture.
        config: Megatron's configuration: precision and communication.
    """

    def __init__(self, tokenizer_config: TokenizerConfig, config: TransformerConfig) -> None:
        super().__init__(tokenizer_config)
        self._take_for_megatron(config)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes pictures as training has them: as videos of one frame.

        Args:
            video_BCTHW: The whole pictures [B, 3, 1, H, W], the same on all ranks but the data-parallel ones; the last
                pipeline stage needs their shape.

        Returns:
            The whole reconstructions [B, 3, 1, H, W] on every rank of the last pipeline stage; on the first of two what
            it sends.

        Raises:
            UserError: The shape does not fit the compression, or the context-parallel ranks cannot share it.
        """
        if video_BCTHW.ndim != 5 or video_BCTHW.shape[2] != 1:
            raise user_error("shape of pictures", tuple(video_BCTHW.shape), "[B, 3, 1, H, W]", "Set num_frames to 1.")
        image_BCHW = video_BCTHW.squeeze(2)
        check_image_shape(self.tokenizer_config, tuple(image_BCHW.shape))
        if self.sharing is None:
            return self._autoencode(image_BCHW).unsqueeze(2)
        result = self._code_share(image_BCHW, self.sharing)
        return result.unsqueeze(2) if self.post_process else result


def build_megatron_tokenizer(
    architecture: TokenizerConfig, config: TransformerConfig
) -> MegatronVideoTokenizer | MegatronImageTokenizer:
    """Makes the tokenizer of an architecture, whole and with torch's own first weights."""
    kind = MegatronImageTokenizer if architecture.modality == "image" else MegatronVideoTokenizer
    return kind(architecture, config)


def check_layout(architecture: TokenizerConfig, config: TransformerConfig, context_parallel_axis: Axis) -> None:
    """Refuses a layout in which a tokenizer cannot be split.

    Args:
        architecture: The tokenizer's.
        config: With the sizes of the layout.
        context_parallel_axis: What the context-parallel ranks divide.

    Raises:
        UserError: With the nearest layout that would do.
    """
    if context_parallel_axis not in ("height", "time"):
        raise user_error("context_parallel_axis", context_parallel_axis, "'height' or 'time'", "Choose one of these.")
    if architecture.modality == "image" and context_parallel_axis == "time":
        raise user_error("context_parallel_axis", "time", "'height' for images", "They have one frame.")
    stages = config.pipeline_model_parallel_size
    if stages > 2 or config.virtual_pipeline_model_parallel_size is not None:
        raise user_error(
            "pipeline_model_parallel_size",
            (stages, config.virtual_pipeline_model_parallel_size),
            "1, or 2 (encoder | decoder), without virtual stages",
            "Use 2, and the other ranks for tensor, context or data parallelism.",
        )
    if config.sequence_parallel:
        raise user_error(
            "sequence_parallel",
            True,
            "False for a tokenizer",
            "Leave it out: tensor parallelism divides activations between layers already.",
        )
    _check_widths(architecture, config.tensor_model_parallel_size)


def _check_widths(architecture: TokenizerConfig, ranks: int) -> None:
    widths = {
        "channels": [architecture.channels * factor for factor in (1, *architecture.channels_mult)],
        "z_channels": [architecture.num_z_channels],
        "patch_channels": [architecture.patch_channels],
        "groups of a norm": [IMAGE_NORM_GROUPS] if architecture.modality == "image" else [],
    }
    fits = [n for n in range(1, ranks + 1) if all(width % n == 0 for some in widths.values() for width in some)]
    if fits[-1] != ranks:
        uneven = {name: some for name, some in widths.items() if any(width % ranks for width in some)}
        raise user_error(
            "tensor_model_parallel_size", ranks, f"a divisor of {uneven}", f"The nearest that would do: {fits[-1]}."
        )
