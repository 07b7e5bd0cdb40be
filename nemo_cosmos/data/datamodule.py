"""Lightning data modules with Megatron's batching: deterministic across world sizes, resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.data import WrappedDataLoader
from nemo.utils import logging
from torch.utils.data import DataLoader, Dataset

from nemo_cosmos.contracts import LatentCacheCard, Split
from nemo_cosmos.data.clips import ClipDataset
from nemo_cosmos.data.latent_cache import LatentDataset, read_cache_card, require_continuous
from nemo_cosmos.data.packs import PackedSamples, collate_packs
from nemo_cosmos.data.paired import PairedLatents, check_windows
from nemo_cosmos.data.shuffle import AlternatingBatches, PictureSamples, ShuffledEpochs
from nemo_cosmos.data.statistics import statistics_for
from nemo_cosmos.data.token_files import TokenFiles, are_token_files
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.parallel.data_sampler import CosmosDataSampler
from nemo_cosmos.parallel.startup import accelerator


class _MegatronDataModule(pl.LightningDataModule):
    """What the data modules share: batching, and the count of consumed samples in checkpoints."""

    collate_fn: Callable | None = None
    """Makes a micro-batch from its samples; torch's own where None."""

    def __init__(
        self, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        if global_batch_size % micro_batch_size:
            raise user_error(
                "global_batch_size",
                global_batch_size,
                f"a multiple of micro_batch_size={micro_batch_size}",
                "Change one.",
            )
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.data_sampler = CosmosDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def dataset(self, split: Split) -> Dataset:
        """The finite data set of one split."""
        raise NotImplementedError

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the data."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Shuffled training samples, as many as the trainer's `max_steps` asks for."""
        # Not steps x batch: a resumed run may have begun with another global batch size.
        steps_left = self.trainer.max_steps - self.trainer.global_step
        num_samples = self.data_sampler.init_consumed_samples + steps_left * self.global_batch_size
        return self._loader(self.training_samples(num_samples), mode="train")

    def training_samples(self, num_samples: int) -> Dataset:
        """The training samples in the order in which they are seen."""
        return ShuffledEpochs(self.dataset("train"), num_samples=num_samples, seed=self.seed)

    def with_pictures(self, pictures: Dataset, *, every: int, num_pictures: int, num_samples: int) -> Dataset:
        """Training samples between whose global batches stand batches of pictures.

        Args:
            pictures: A data set of single ones.
            every: Of so many global batches the last one holds pictures.
            num_pictures: That stand for one sample.
            num_samples: How many items training will ask for in all.
        """
        samples = PictureSamples(pictures, num_pictures=num_pictures)
        return AlternatingBatches(
            ShuffledEpochs(self.dataset("train"), num_samples=num_samples, seed=self.seed),
            ShuffledEpochs(samples, num_samples=num_samples, seed=self.seed),
            every=every,
            global_batch_size=self.global_batch_size,
            first_item=self.data_sampler.init_consumed_samples,
            first_step=self.trainer.global_step,
        )

    def val_dataloader(self) -> DataLoader:
        """Held-out samples in an order that never changes."""
        batches = self.trainer.limit_val_batches
        num_samples = self.global_batch_size * (batches if isinstance(batches, int) else 1)
        held_out = ShuffledEpochs(self.dataset("heldout"), num_samples=num_samples, seed=0)
        return self._loader(held_out, mode="validation")

    def _loader(self, dataset: Dataset, mode: str) -> DataLoader:
        return WrappedDataLoader(
            mode=mode,
            dataset=dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=accelerator() == "gpu",
            collate_fn=self.collate_fn,
        )

    def state_dict(self) -> dict[str, Any]:
        """How many samples were consumed."""
        consumed = self.data_sampler.compute_consumed_samples(
            self.trainer.global_step - self.data_sampler.init_global_step
        )
        return {"consumed_samples": consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the samples that were consumed."""
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        logging.info(f"Resuming the data after {consumed} samples.")


class _LatentModule(_MegatronDataModule):
    """What the modules of latent caches share.

    Args:
        paths: Folders that `nemo-cosmos tokenize` wrote, token files among them; the first one's card stands for all
            where they agree.
        statistics_of: Card of the checkpoint that is post-trained.
        **batching: As for `_MegatronDataModule`.
    """

    def __init__(self, paths: tuple[str, ...], *, statistics_of: str | None, **batching: int) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.cache_cards = tuple(read_cache_card(path) for path in self.paths)
        self.statistics = statistics_for(self.cache_cards, statistics_of)
        super().__init__(**batching)

    def card_fields(self) -> dict[str, Any]:
        """Where the data came from, and what its latents mean."""
        counts = [f"{card.num_samples['train']} windows" for card in self.cache_cards]
        return {
            "data": f"latents of {' and '.join(counts)}",
            "tokenizer_fingerprint": self.cache_cards[0].tokenizer_fingerprint,
            "text_encoder": self.cache_cards[0].text_encoder,
            **self.statistics.card_fields(),
        }

    def latents(
        self, place: int, split: Split, *, sources: tuple[str, ...] | None = None, with_actions: bool = False
    ) -> LatentDataset | TokenFiles:
        """Samples of one cache, normalised as its domain is."""
        path = self.paths[place]
        if are_token_files(path):
            if sources is not None or with_actions:
                got = f"sources={sources}, with_actions={with_actions}"
                raise user_error(f"{path}", got, "neither, for token files hold tokens only", "Give the latent cache.")
            return TokenFiles(path, split=split)
        statistics = self.statistics.of(self.cache_cards[place].num_latent_frames)
        return LatentDataset(path, split=split, sources=sources, with_actions=with_actions, statistics=statistics)


class LatentDataModule(_LatentModule):
    """Batches of a latent cache, for the WFMs; with pictures between them where these are asked for.

    Continuous latents are for the diffusion WFM; videos and pictures are each normalised by the statistics of their own
    cache. Indices of a discrete tokenizer are for the autoregressive one. Validation sees videos only.

    Args:
        path: Folder that `nemo-cosmos tokenize` wrote; or one of Megatron's token files with their card, see
            `nemo_cosmos.data.token_files`.
        with_actions: Only samples that carry actions, and give them.
        sources: Only these domains.
        pictures: Folder of a cache of single frames (`num_frames` 1); None is videos only.
        pictures_every: Of so many global batches the last one holds pictures; 2 alternates.
        pictures_per_sample: Pictures that stand for one video in such a batch.
        statistics_of: Card of the checkpoint that is post-trained; its latent statistics are used, and its tokenizer
            must be the cache's.
        micro_batch_size: Samples per forward pass and data-parallel rank.
        global_batch_size: Samples per optimizer step.
        patch_spatial: Latent pixels per token and axis; sets the sequence length that Megatron is told.
        seed: Of the sample order.
        num_workers: Loader processes.

    Raises:
        UserError: A cache is missing or, as `pictures`, of videos; a number is out of range; or caches and base do not
            fit together.
    """

    def __init__(
        self,
        path: str,
        *,
        with_actions: bool = False,
        sources: tuple[str, ...] | None = None,
        pictures: str | None = None,
        pictures_every: int = 2,
        pictures_per_sample: int = 1,
        statistics_of: str | None = None,
        micro_batch_size: int = 16,
        global_batch_size: int = 16,
        patch_spatial: int = 2,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        _check_pictures(pictures_every, pictures_per_sample)
        if pictures is not None and with_actions:
            raise user_error("pictures", pictures, "None with actions, which pictures do not have", "Leave one out.")
        paths = (path,) if pictures is None else (path, pictures)
        card = read_cache_card(path)
        super().__init__(
            paths,
            statistics_of=statistics_of,
            seq_length=_num_tokens(card, patch_spatial),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if pictures is not None and (frames := self.cache_cards[1].num_latent_frames) != 1:
            raise user_error("pictures", f"{frames} latent frames", "1", "Give a cache written with num_frames 1.")
        self.with_actions, self.sources = with_actions, sources
        self.has_pictures = pictures is not None
        self.pictures_every, self.pictures_per_sample = pictures_every, pictures_per_sample

    def dataset(self, split: Split) -> Dataset:
        """Latent samples of one split."""
        return self.latents(0, split, sources=self.sources, with_actions=self.with_actions)

    def training_samples(self, num_samples: int) -> Dataset:
        """Videos, and pictures between them."""
        if not self.has_pictures:
            return super().training_samples(num_samples)
        return self.with_pictures(
            self.latents(1, "train"),
            every=self.pictures_every,
            num_pictures=self.pictures_per_sample,
            num_samples=num_samples,
        )


class PairedLatentDataModule(_LatentModule):
    """Batches of continuous latents with the discrete tokens of the same windows, for the diffusion decoder.

    Args:
        path: Folder that `nemo-cosmos tokenize` wrote with a continuous tokenizer.
        tokens: Another, of the same clips in the same windows, with a discrete one.
        sources: Only these domains.
        statistics_of: As for `LatentDataModule`.
        micro_batch_size: Samples per forward pass and data-parallel rank.
        global_batch_size: Samples per optimizer step.
        patch_spatial: Latent pixels per token of the network and axis.
        seed: Of the sample order.
        num_workers: Loader processes.

    Raises:
        UserError: A cache is missing, of the other kind, or of other windows; or latents and base do not fit together.
    """

    def __init__(
        self,
        path: str,
        tokens: str,
        *,
        sources: tuple[str, ...] | None = None,
        statistics_of: str | None = None,
        micro_batch_size: int = 16,
        global_batch_size: int = 16,
        patch_spatial: int = 2,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        card, token_card = read_cache_card(path), read_cache_card(tokens)
        check_windows(path, card, tokens, token_card)
        super().__init__(
            (path,),
            statistics_of=statistics_of,
            seq_length=_num_tokens(card, patch_spatial),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.cache_cards = (card, token_card)
        self.tokens, self.sources = Path(tokens), sources

    def card_fields(self) -> dict[str, Any]:
        """Where the data came from, and what its latents and tokens mean."""
        card, token_card = self.cache_cards
        return {
            **super().card_fields(),
            "data": f"latents and tokens of {card.num_samples['train']} windows",
            "token_fingerprint": token_card.tokenizer_fingerprint,
        }

    def dataset(self, split: Split) -> Dataset:
        """Latents of one split, each with its tokens."""
        tokens = LatentDataset(self.tokens, split=split, sources=self.sources)
        return PairedLatents(self.latents(0, split, sources=self.sources), tokens)


class PackedLatentDataModule(_LatentModule):
    """Packs of latents of several caches, of whatever sizes, for the diffusion WFM.

    A pack is one sequence of tokens in which each clip attends to itself alone. Caches of single frames are pictures,
    which have statistics of their own.

    Args:
        paths: Folders that `nemo-cosmos tokenize` wrote, one for each size.
        tokens_per_pack: Most tokens in a pack.
        statistics_of: As for `LatentDataModule`.
        micro_batch_size: Packs per forward pass and data-parallel rank; several make one longer sequence.
        global_batch_size: Packs per optimizer step.
        patch_spatial: Latent pixels per token and axis.
        seed: Of who is packed with whom, and of the order of packs.
        num_workers: Loader processes.

    Raises:
        UserError: A cache is missing, of indices, or its samples are larger than a pack; or caches and base do not fit
            together.
    """

    collate_fn = staticmethod(collate_packs)
    is_packed, with_actions = True, False

    def __init__(
        self,
        paths: tuple[str, ...],
        *,
        tokens_per_pack: int,
        statistics_of: str | None = None,
        micro_batch_size: int = 1,
        global_batch_size: int = 1,
        patch_spatial: int = 2,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            paths,
            statistics_of=statistics_of,
            seq_length=micro_batch_size * tokens_per_pack,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        for card in self.cache_cards:
            require_continuous(card)
        self.tokens_per_pack = tokens_per_pack
        self.patch_spatial = patch_spatial

    def dataset(self, split: Split) -> Dataset:
        """Packs of one split; caches that have none of it are left out.

        Raises:
            UserError: None of them has any.
        """
        places = [place for place, card in enumerate(self.cache_cards) if card.num_samples.get(split)]
        if not places:
            raise UserError(
                f"{', '.join(map(str, self.paths))}: no {split} sample. Collect and curate such video first."
            )
        return PackedSamples(
            [self.latents(place, split) for place in places],
            [_num_tokens(self.cache_cards[place], self.patch_spatial) for place in places],
            tokens_per_pack=self.tokens_per_pack,
            seed=self.seed,
        )


def _num_tokens(card: LatentCacheCard, patch_spatial: int) -> int:
    *_, frames, height, width = card.latent_shape
    return frames * (height // patch_spatial) * (width // patch_spatial)


def _check_pictures(every: int, per_sample: int) -> None:
    if every < 2:
        raise user_error("pictures_every", every, "at least 2", "Raise it.")
    if per_sample < 1:
        raise user_error("pictures_per_sample", per_sample, "at least 1", "Raise it.")


class VideoClipDataModule(_MegatronDataModule):
    """Batches of pixel windows, for the tokenizer; with pictures between them where these are asked for.

    Windows of one frame are pictures, which is what a tokenizer of images takes.

    Pictures are every `stride`-th frame of every clip, also of clips that are too short for a window, and so of one
    frame. Validation sees videos only.

    Args:
        path: Folder that `nemo-cosmos curate` wrote.
        num_frames: Frames per window.
        height: Pixels.
        width: Pixels.
        stride: Frames between the starts of two windows of a clip.
        crop_from: Bring a clip to this height first, keeping its aspect, and cut each window out of it at random;
            None resizes the whole frame to height x width.
        pictures_every: Of so many global batches the last one holds pictures; 2 alternates, None is videos only.
        pictures_per_sample: Pictures that stand for one window in such a batch.
        micro_batch_size: Windows per forward pass and data-parallel rank.
        global_batch_size: Windows per optimizer step.
        seed: Of the window order, and of what is cut out.
        num_workers: Loader processes.

    Raises:
        UserError: A size is out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        num_frames: int = 17,
        height: int = 128,
        width: int = 128,
        stride: int = 8,
        crop_from: int | None = None,
        pictures_every: int | None = None,
        pictures_per_sample: int = 1,
        micro_batch_size: int = 4,
        global_batch_size: int = 4,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        _check_pictures(2 if pictures_every is None else pictures_every, pictures_per_sample)
        self.path = Path(path)
        self.window = {"num_frames": num_frames, "height": height, "width": width, "stride": stride}
        self.crop_from = crop_from
        self.pictures_every, self.pictures_per_sample = pictures_every, pictures_per_sample
        super().__init__(
            seq_length=num_frames,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )

    def card_fields(self) -> dict[str, Any]:
        """What the windows are."""
        text = "curated clips in windows of {num_frames} frames of {height}x{width}".format(**self.window)
        if self.crop_from is not None:
            text += f", cut out of {self.crop_from} lines"
        if self.pictures_every is not None:
            text += f"; one batch in {self.pictures_every} of single frames, {self.pictures_per_sample} a sample"
        return {"data": text}

    def sample_sizes(self) -> list[tuple[int, int, int]]:
        """(frames, height, width) of all that training will see."""
        num_frames, height, width = (self.window[name] for name in ("num_frames", "height", "width"))
        lengths = [num_frames] if self.pictures_every is None else [num_frames, 1]
        return [(length, height, width) for length in lengths]

    def dataset(self, split: Split) -> Dataset:
        """Pixel windows of one split."""
        return self._windows(split, self.window["num_frames"])

    def training_samples(self, num_samples: int) -> Dataset:
        """Windows, and pictures between them."""
        if self.pictures_every is None:
            return super().training_samples(num_samples)
        return self.with_pictures(
            self._windows("train", 1),
            every=self.pictures_every,
            num_pictures=self.pictures_per_sample,
            num_samples=num_samples,
        )

    def _windows(self, split: Split, num_frames: int) -> ClipDataset:
        window = {**self.window, "num_frames": num_frames}
        return ClipDataset(self.path, split=split, crop_from=self.crop_from, **window)
