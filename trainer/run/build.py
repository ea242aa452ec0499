"""Owns what a stage's flags become: model with weights, data sets, loaders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from dataset.collate import GroupingCollator, VLMCollator
from dataset.draws import Draws
from dataset.lm_dataset import VLMDataset
from dataset.records.address import Address
from dataset.records.mixing import Mixture
from dataset.records.reader import default_data_paths
from dataset.text_dataset import TextDataset
from model.generations import GENERATIONS
from model.machine.device import pad_multiple
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.vision.pixels import PixelSteps, pixel_steps
from model.vlm_processor import VLMProcessor, check_special_tokens, load_tokenizer
from model.weights.build_model import attach_tower, find_inputs, placeholder_config
from model.weights.file_names import find_weight
from model.weights.metadata import read_metadata
from model.weights.strict_loading import load_weights, read_weights, weight_config
from trainer.loop.loading import Loader, Supply
from trainer.loop.sample_order import dataset_order, rank_batches
from trainer.loop.stream_order import StreamBatches
from trainer.ranks.group import Logger, Ranks, warn
from trainer.ranks.signals import StopSignal
from trainer.run import preflight
from trainer.run.rewards import AnswerRewards, read_rewards
from trainer.train_args import Stage, TrainArgs

# Share of --rank_timeout that data workers get for a batch: the rest is time to save.
PATIENCE_SHARE = 0.75
# Flags that are config fields.
CONFIG_FLAGS = (
    "generation", "hidden_size", "num_hidden_layers", "num_attention_heads", "dropout", "use_moe",
    "keep_cls", "vision_layer", "image_size", "projector", "token_merge", "image_special_token",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The model that a stage trains, and its data.

    pixel_steps: what becomes of 8-bit pixels; None where the data gives the tower's numbers.
    rewards: of answers, in a stage that learns by them.
    """

    model: MiniMindForCausalLM
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    val_dataset: Dataset | None
    pixel_steps: PixelSteps | None = None
    rewards: AnswerRewards | None = None


def build(stage: Stage, args: TrainArgs, *, device: torch.device) -> Parts:
    """Model and data of a stage: with images, or of text alone (`data_kind` "text")."""
    if stage.data_kind == "text":
        model, tokenizer = init_language_model(args, device=device)
        return Parts(model, tokenizer, *make_text_datasets(args, tokenizer))
    model, processor = init_vlm_model(args, device=device)
    draws = read_draws(args, generation=model.config.generation)
    steps = processor.pixel_steps
    datasets = make_datasets(stage, args, processor, draws=draws)
    rewards = read_rewards(datasets[0]) if stage.has_rewards else None
    return Parts(model, processor.tokenizer, *datasets, steps, rewards)


@dataclass(frozen=True)
class Start:
    """What `--from_weight` and the model flags give: config fields, and tensors unless "none"."""

    fields: dict[str, Any]
    metadata: dict[str, Any]
    state: dict[str, torch.Tensor] | None = None
    path: Path | None = None


def read_start(args: TrainArgs) -> Start:
    """Read the weight to start from and compare it with the flags."""
    flags = {name: getattr(args, name) for name in CONFIG_FLAGS}
    if args.from_weight == "none":
        return Start({k: v for k, v in flags.items() if v is not None}, {})
    path = find_weight(
        args.from_weight,
        save_dir=args.save_dir,
        hidden_size=args.hidden_size,
        use_moe=args.use_moe,
        generation=args.generation,
    )
    state = read_weights(path)
    fields = weight_config(state, path=path, flags=flags)
    return Start(fields, read_metadata(path), state, path)


def check_language(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, start: Start
) -> None:
    """Check that tokenizer and model belong together; without metadata, by the model's loss."""
    check_special_tokens(tokenizer, vocab_size=model.config.vocab_size)
    if start.state is not None and "tokenizer_sha256" not in start.metadata:
        preflight.check_tokenizer_fits(model, tokenizer, weight=start.path)


def init_vlm_model(args: TrainArgs, *, device: torch.device) -> tuple[MiniMindVLM, VLMProcessor]:
    """The model of the flags, with the weights of `--from_weight`, and its processor.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to do.
    """
    start = read_start(args)
    tokenizer, tower = find_inputs(
        args, start.metadata, generation=args.generation, weight=start.path
    )
    model = MiniMindVLM(placeholder_config(start.fields, tokenizer, tower))
    if start.state is not None:
        has_projection = load_weights(model, start.state, path=start.path, may_lack_projection=True)
        Logger(f"weights: {start.path}" + ("" if has_projection else " (its projection is new)"))
    check_language(model, tokenizer, start)
    attach_tower(model, tower, metadata=start.metadata, path=start.path or Path("none"))
    model.to(device)
    if not args.exact_preprocessing:
        model.pixel_steps = read_pixel_steps(model.image_processor, device=device)
    processor = VLMProcessor(
        tokenizer, model.image_processor, config=model.config, pixel_steps=model.pixel_steps
    )
    return model, processor


def read_pixel_steps(processor: BaseImageProcessor, *, device: torch.device) -> PixelSteps | None:
    """The tower's preprocessing in 8-bit pixels; None, with a warning, if it has no such form.

    A GPU resizes small pictures itself. A CPU would take the time from training.
    """
    steps = pixel_steps(processor, keeps_small=device.type != "cpu")
    if steps is None:
        warn(
            "the tower's preprocessing has steps that are not known here, so its library takes "
            "them picture by picture: same numbers, slower loading; --exact_preprocessing 1 asks "
            "for that, without this warning"
        )
    return steps


def init_language_model(
    args: TrainArgs, *, device: torch.device
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """The text-only model of the flags and its tokenizer; raises as `init_vlm_model`."""
    start = read_start(args)
    tokenizer = load_tokenizer(
        args.tokenizer_path,
        expected_sha256=start.metadata.get("tokenizer_sha256"),
        generation=args.generation,
        weight=start.path,
    )
    model = MiniMindForCausalLM(MiniMindConfig(**start.fields))
    if start.state is not None:
        load_weights(model, start.state, path=start.path, may_lack_projection=False)
        Logger(f"weights: {start.path}")
    check_language(model, tokenizer, start)
    return model.to(device), tokenizer


def read_draws(args: TrainArgs, *, generation: int) -> Draws | None:
    """What training changes at random about a sample; None: nothing."""
    own = {name: getattr(args, name) for name in GENERATIONS[generation].draws}
    given = {name: share for name, share in own.items() if share is not None}
    draws = Draws(args.seed, **(GENERATIONS[generation].draws | given))
    return None if draws.change_nothing else draws


def make_datasets(
    stage: Stage, args: TrainArgs, processor: VLMProcessor, *, draws: Draws | None
) -> tuple[VLMDataset, VLMDataset | None]:
    """Training and validation data; paths that are not given are the default ones.

    Args:
        draws: for the training data alone.
    """
    data_path, images_path = args.data_path, args.images_path
    if data_path is None:
        kind = "multi" if args.use_multi_image else stage.data_kind
        data_path, default_images = default_data_paths(kind)
        images_path = images_path or default_images
    options = {
        "max_length": args.max_seq_len,
        "on_bad_sample": "return",
        "fix_image_count": args.fix_image_count,
    }
    dataset = VLMDataset(
        data_path, images_path, processor, **options, draws=draws, stream=args.stream_options()
    )
    for warning in filter(None, (dataset.records.slowness, dataset.records.emptiness)):
        warn(warning)
    if dataset.stream is not None:
        Logger(dataset.stream.summary)
    for part in dataset.parts or ():
        Logger(f"source {part.name}: {part.num_taken} of {part.num_records} records an epoch")
    if not dataset.has_images(preflight.sample_of(dataset, seed=args.seed)):
        warn(f"{dataset.data_path.name}: no usable record has a picture; only text is learnt from")
    if args.val_data_path is None:
        return dataset, None
    try:
        return dataset, VLMDataset(args.val_data_path, args.val_images_path, processor, **options)
    except (FileNotFoundError, ValueError) as error:  # the readers name the flags of training
        message = re.sub(r"--(data_path|images_path)\b", r"--val_\1", str(error))
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(message) from error


def make_text_datasets(
    args: TrainArgs, tokenizer: PreTrainedTokenizerBase
) -> tuple[TextDataset, TextDataset | None]:
    """Training and validation text, packed."""
    if args.data_path is None:
        raise ValueError("name the text to train on by --data_path: a .txt, .md or .jsonl file")
    if isinstance(args.data_path, Mixture):
        raise ValueError("--data_path: this stage reads one file of text; put several together")
    if isinstance(args.data_path, Address):
        raise ValueError(
            f"--data_path {args.data_path}: this stage reads a file; download it first"
        )
    options = {"max_length": args.max_seq_len, "loss_on": args.loss_on}
    dataset = TextDataset(args.data_path, tokenizer, **options)
    if args.val_data_path is None:
        return dataset, None
    return dataset, TextDataset(args.val_data_path, tokenizer, **options)


@dataclass(frozen=True)
class Loaders:
    """Loads the training and validation data of a run.

    Args:
        pad: the id of the padding token.
        pixel_steps: where the data gives 8-bit pixels.
    """

    args: TrainArgs
    ranks: Ranks
    stop: StopSignal
    pad: int
    pixel_steps: PixelSteps | None = None

    def train(self, dataset: VLMDataset | TextDataset, epoch: int, start: int) -> Loader:
        """This rank's batches of an epoch from global sample `start` on."""
        split = {"start": start, "batch_size": self.args.batch_size, "ranks": self.ranks}
        stream = getattr(dataset, "stream", None)
        if stream is not None:
            batches = StreamBatches(stream, epoch=epoch, **split)
            return self._load(dataset.for_epoch(epoch), batches, supply=batches)
        order = dataset_order(dataset, seed=self.args.seed, epoch=epoch)
        return self._load(dataset.for_epoch(epoch), rank_batches(order, **split))

    def validation(self, dataset: Dataset) -> Loader:
        """This rank's share of the validation data, in file order."""
        order, size = np.arange(len(dataset)), self.args.batch_size
        return self._load(dataset, rank_batches(order, start=0, batch_size=size, ranks=self.ranks))

    @property
    def collator(self) -> VLMCollator:
        """Makes a batch of samples."""
        return VLMCollator(
            pad_token_id=self.pad,
            pad_multiple=pad_multiple(self.ranks.device),
            packs=self.args.pack,
            at_side=self.pixel_steps.at_side if self.pixel_steps else None,
        )

    def _load(
        self, dataset: Dataset, batches: Sampler[list[int]], *, supply: Supply | None = None
    ) -> Loader:
        args = self.args
        return Loader(
            dataset,
            batches,
            collate=GroupingCollator(self.collator, num_groups=args.length_groups),
            num_workers=args.num_workers,
            pin_memory=self.ranks.device.type == "cuda",
            seed=args.seed,
            stop=self.stop,
            patience_s=PATIENCE_SHARE * args.rank_timeout,
            supply=supply,
        )
