"""Owns the training flags: one dataclass, the ranges of its values, and how argparse reads it."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dataset.records.address import Address, StreamOptions
from dataset.records.mixing import Mixture, parse_sources
from dataset.text_dataset import LOSS_ON
from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.machine.paths import OUT_DIR, ROOT
from model.options import (
    CACHE_DTYPES,
    CACHE_HELP,
    OnceParser,
    cache_folder,
    parse_bool,
    parse_path,
)
from model.vision.projection import PROJECTORS
from model.weights.file_names import find_weight
from model.weights.strict_loading import is_third_generation, read_weights

DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("swanlab", "wandb", "tensorboard")
TRACKER_MODES = ("online", "offline", "local", "disabled")


COMMON_RECIPE = {"save_interval": 100}  # what all stages share, but not all generations


@dataclass(frozen=True)
class Stage:
    """What differs between training stages: defaults and data."""

    name: str
    title: str
    data_kind: Literal["pretrain", "sft", "text"]  # which records; text has no default files
    defaults: dict[str, Any]
    has_rewards: bool = False  # the model's own answers are learnt, by how good they are
    third: dict[str, Any] = field(default_factory=dict)  # where generation 3's recipe differs

    def recipe(self, generation: int) -> dict[str, Any]:
        """The defaults of a generation."""
        return COMMON_RECIPE | self.defaults | (self.third if generation == 3 else {})


def flag(help_text: str, default: Any = None, **metadata: Any) -> Any:
    """A dataclass field that is also a flag.

    Args:
        metadata: `alias` (another name), `low` and `high` (the least and the largest value),
            `choices`.
    """
    return field(default=default, metadata={"help": help_text} | metadata)


@dataclass
class TrainArgs:
    """All flags of the training scripts; a stage sets the defaults that are None here."""

    save_dir: Path = flag("folder of weights / 权重目录", OUT_DIR, alias="--out_dir")
    save_weight: str = flag("name of the weight to write / 保存的权重名")
    epochs: int = flag("passes over the data / 训练轮数", low=1)
    batch_size: int = flag("samples per device and micro-step / 每卡批大小", low=1)
    learning_rate: float = flag(
        "the rate begins at this, in generation 2 at 1.1 times this / 学习率", low=0.0
    )
    optimizer: str = flag(
        "muon: on the hidden matrices, AdamW on the rest / 优化器", "adamw", choices=OPTIMIZERS
    )
    warmup_steps: int = flag("steps of a rising rate at the start / 预热步数", 0, low=0)
    device: str = flag("cpu, cuda, cuda:1, mps; default: the best / 默认自动选择")
    dtype: str = flag(
        "arithmetic of the forward pass; left out on a CPU without instructions for bfloat16, "
        "float32 / 混合精度类型",
        "bfloat16",
        choices=DTYPES,
    )
    tf32: bool = flag("float32 products on a GPU in TF32: fast, rough / float32 用 TF32", False)
    num_workers: int = flag("processes that load data / 数据加载进程数", 8, low=0)
    accumulation_steps: int = flag("micro-steps per optimizer step / 梯度累积", 1, low=1)
    length_groups: int = flag(
        "parts of a batch, by length, that are run one after the other: less padding / "
        "按长度分组以减少填充",
        1,
        low=1,
    )
    pack: bool = flag(
        "compute a batch's samples as one row without padding; the results are the same / "
        "打包：样本首尾相接，不计算填充",
        False,
    )
    grad_clip: float = flag("largest gradient norm / 梯度裁剪", 1.0, low=0.0)
    log_interval: int = flag("steps between log lines / 日志间隔", 100, low=1)
    save_interval: int = flag("steps between saves / 保存间隔", low=1)
    generation: int = flag(
        "of models and recipes; default: the weight's, else 2 / 模型代次",
        choices=tuple(GENERATIONS),
    )
    hidden_size: int = flag(
        "default: the weight's, else the generation's, 512 or 768 / 隐藏维度", alias="--dim", low=16
    )
    num_hidden_layers: int = flag("default: the weight's, else 8 / 层数", alias="--n_layers", low=1)
    num_attention_heads: int = flag("default: the weight's, else 8 / 注意力头数", low=1)
    dropout: float = flag(
        "share of activations that training drops; default: the weight's, else 0 / 随机失活比例",
        low=0.0,
        high=0.9,
    )
    use_moe: bool = flag("mixture of experts; default: the weight's / 是否使用 MoE")
    max_seq_len: int = flag("longest sample in tokens / 最大长度", low=8)
    loss_on: str = flag(
        "text stage: every token, or a conversation's answers / 文本阶段监督范围",
        "all",
        choices=LOSS_ON,
    )
    num_answers: int = flag(
        "self-critical stage: answers drawn to each prompt / 自批评阶段：每个提示抽取的回答数",
        5,
        low=2,
    )
    answer_weight: float = flag(
        "self-critical stage: weight of the records' own answers / 自批评阶段：数据中回答的权重",
        0.5,
        low=0.0,
    )
    data_path: Path | Address | Mixture = flag(
        "records: a file, folder or 'pattern' of JSONL, JSON, Parquet, Arrow or tar, or shards at "
        "hf://, s3:// or https://; several are mixed, PATH:0.5 takes half of its records an epoch "
        "/ 训练数据，可混合，可为远程分片"
    )
    stream_cache_gb: float = flag(
        "largest size of the folder of fetched shards in GiB / 远程分片本地缓存上限", 16.0, low=0.0
    )
    stream_cache_dir: Path = flag("that folder; default: in ~/.cache / 远程分片缓存目录")
    stream_window: int = flag(
        "how many fetched shards, or parts of large ones, are shuffled together / "
        "一起打乱的远程分片数",
        8,
        low=1,
    )
    images_path: Path = flag("folder or zip of images / 图像目录或 zip")
    from_weight: str = flag("weight to start from, or none / 起始权重")
    from_resume: bool = flag("continue an interrupted run / 断点续训", False)
    freeze_llm: int = flag(
        "0: train all; 1: the projection, in generation 3 also the first and last layer; 2: the "
        "projection / 冻结语言模型的程度"
    )
    lora_rank: int = flag(
        "train low-rank adapters of this rank and the projection; 0: none / LoRA 的秩",
        0,
        low=0,
    )
    lora_targets: str = flag(
        "the matrices that get adapters / LoRA 作用的矩阵", "q_proj,k_proj,v_proj,o_proj"
    )
    fix_image_count: bool = flag(
        "drop <image> tags for which a record has no picture / 去掉多余的 <image>", False
    )
    use_multi_image: bool = flag("the default data is the multi-image set / 多图数据", False)
    use_wandb: bool = flag("track the run; default: if --tracker is given / 是否记录实验")
    tracker: str = flag("where to; default: swanlab / 记录工具", choices=TRACKERS)
    tracker_mode: str = flag(
        "default: the tracker's own, online mostly; without a login offline or local / 记录模式",
        choices=TRACKER_MODES,
    )
    wandb_project: str = flag("project name of the tracker / 项目名")
    wandb_run_name: str = flag("run name of the tracker / 运行名")
    vision_model_path: Path = flag("folder of the vision tower / 视觉塔目录")
    vision_layer: int = flag(
        "hidden state of the tower that is read, such as -2; default: its last output / "
        "取视觉塔哪一层"
    )
    image_size: int = flag(
        "side of the pictures in pixels; default: the weight's, else the tower's / 图片边长", low=1
    )
    cache_vision_features: str = flag(CACHE_HELP["cache_vision_features"], "0")
    cache_dtype: str = flag(CACHE_HELP["cache_dtype"], CACHE_DTYPES[0], choices=CACHE_DTYPES)
    cache_gb: float = flag(CACHE_HELP["cache_gb"], low=0.0)
    exact_preprocessing: bool = flag(
        "pictures through the library's own preprocessing; without it they stay 8-bit until the "
        "device, with the same numbers / 用库自带的图像预处理",
        False,
    )
    projector: str = flag(
        "default: the generation's, linear or mlp / 投影层类型", choices=PROJECTORS
    )
    token_merge: int = flag("patches a side that make one image token / 合并相邻图块", low=1)
    gradient_checkpointing: bool = flag(
        "keep only each layer's input and compute the rest anew in the backward pass: less memory, "
        "slower steps, the same results / 梯度检查点：省显存，稍慢",
        False,
    )
    use_compile: bool = flag(
        "compile the decoder layers at the first step (a minute or more): faster steps, "
        "results within rounding / 编译解码层",
        False,
        alias="--compile",
    )
    tokenizer_path: Path = flag("folder of the tokenizer / 分词器目录")
    checkpoint_dir: Path = flag("folder of training states / 断点目录", ROOT / "checkpoints")
    seed: int = flag("of order and initial weights / 随机种子", 42, low=0)
    val_data_path: Path = flag("records for the validation loss / 验证数据")
    val_images_path: Path = flag("their images / 验证图像")
    system_share: float = flag(
        "share of samples given a system message; default: the generation's / 随机系统提示的比例",
        low=0.0,
        high=1.0,
    )
    empty_think_share: float = flag(
        "share of samples that keep their empty think blocks; default: the generation's / "
        "保留空思考块的比例",
        low=0.0,
        high=1.0,
    )
    trainable: str = flag("REGEX of the parameters to train, over --freeze_llm / 可训练参数")
    keep_cls: bool = flag("CLS is an image token (first release) / 保留 CLS")
    image_special_token: str = flag("placeholder text of one image / 图像占位符")
    on_bad_sample: str = flag(
        "skip: count and report, stop above 1%% / 坏样本处理", "skip", choices=("skip", "error")
    )
    deepspeed: str = flag("ZeRO configuration: a file, or ds_zero2.json / ZeRO 配置")
    rank_timeout: float = flag(
        "seconds of silence after which a rank or its data workers count as lost / "
        "判定进程失联的秒数",
        20.0,
        low=2,
    )
    local_rank: int = flag("set by the deepspeed launcher / 由启动器设置", -1)

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        for item in fields(self):
            value, low = getattr(self, item.name), item.metadata.get("low")
            if value is not None and low is not None and not value >= low:
                raise ValueError(f"--{item.name} {value} is too small; the least is {low}")
            high = item.metadata.get("high")
            if value is not None and high is not None and not value <= high:
                raise ValueError(f"--{item.name} {value} is too large; the most is {high}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate {self.learning_rate} must be above 0")
        if self.val_images_path and not self.val_data_path:
            raise ValueError("--val_images_path needs --val_data_path")
        if self.lora_rank and self.trainable:
            raise ValueError("--lora_rank says what trains, so it does not go with --trainable")
        if self.use_compile and self.deepspeed:
            raise ValueError("--compile does not go with --deepspeed; drop one of them")
        if self.cache_folder() and self.reads_stream():
            raise ValueError(
                "--cache_vision_features takes a pass over all pictures, so it does not go with "
                "--data_path on another machine"
            )

    def reads_stream(self) -> bool:
        """Whether training data comes from another machine."""
        if isinstance(self.data_path, Mixture):
            return self.data_path.num_streams > 0
        return isinstance(self.data_path, Address)

    def stream_options(self) -> StreamOptions:
        """How training data on another machine is read."""
        return StreamOptions(
            self.seed, self.stream_cache_dir, self.stream_cache_gb, self.stream_window
        )

    def cache_folder(self) -> Path | None:
        """The folder of kept features, or None; ValueError if the flag names neither."""
        return cache_folder(self.cache_vision_features, self.save_dir)

    def tracker_name(self) -> str | None:
        """The tracker to use, or None."""
        is_wanted = self.tracker is not None if self.use_wandb is None else self.use_wandb
        return (self.tracker or TRACKERS[0]) if is_wanted else None

    def as_text(self) -> dict[str, Any]:
        """Every argument, as a value that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path | Address | Mixture) else value


def parse_args(stage: Stage, argv: list[str] | None, *, description: str) -> TrainArgs:
    """Read the command line; argparse ends the program on an unknown flag or value."""
    parser = OnceParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual, third = stage.recipe(DEFAULT_GENERATION), stage.recipe(3)
    for item in fields(TrainArgs):
        default = usual.get(item.name, item.default)
        names = [f"--{item.name}", *filter(None, [item.metadata.get("alias")])]
        if item.name == "local_rank":
            names.append("--local-rank")
        shown = "" if default is None else f" (default: {default})"
        if third.get(item.name, default) != default:
            shown = f" (default: {default}, in generation 3 {third[item.name]})"
        if item.name in usual or item.name == "dtype":
            default = None  # set below, when the generation is known, or where the device is
        options = {"default": default, "help": item.metadata["help"] + shown, "dest": item.name}
        if item.name == "freeze_llm":
            options |= {"type": parse_freeze, "nargs": "?", "const": 1, "metavar": "0/1/2"}
        elif item.name == "data_path":
            options |= {"type": str, "nargs": "+", "metavar": "PATH[:WEIGHT]"}
        elif item.name == "cache_vision_features":
            options |= {"nargs": "?", "const": "1", "metavar": "0/1/PATH"}
        elif item.type is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "0/1"}
        else:
            reader = parse_path if item.type is Path else item.type
            options |= {"type": reader, "choices": item.metadata.get("choices")}
        parser.add_argument(*names, **options)
    args = TrainArgs(**vars(parser.parse_args(argv)))
    if isinstance(args.data_path, list):
        args.data_path = parse_sources(args.data_path)
    args.from_weight = args.from_weight or usual["from_weight"]
    args.generation = args.generation or weight_generation(args)
    for name, value in stage.recipe(args.generation).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.check()
    if stage.has_rewards:
        check_rewards(args)
    if args.wandb_run_name is None:
        args.wandb_run_name = (
            f"MiniMind-V-{stage.title}-Epoch-{args.epochs}-BatchSize-"
            f"{args.batch_size}-LearningRate-{args.learning_rate}"
        )
    return args


def check_rewards(args: TrainArgs) -> None:
    """Raise ValueError for what does not go with the model's own answers and their rewards."""
    if args.deepspeed:
        raise ValueError("--deepspeed: this stage draws answers by whole weights; drop it")
    if args.reads_stream():
        raise ValueError(
            "--data_path: rewards take a pass over the records, so this stage reads none of "
            "another machine; download them first"
        )


def parse_freeze(text: str) -> int:
    """0, 1, 2, or true and false in any case for 1 and 0."""
    return 2 if text == "2" else int(parse_bool(text))


def weight_generation(args: TrainArgs) -> int:
    """The generation of the weight to start from, by its tensors; 2 where there is none."""
    if args.from_weight == "none":
        return DEFAULT_GENERATION
    try:
        path = find_weight(
            args.from_weight,
            save_dir=args.save_dir,
            hidden_size=args.hidden_size,
            use_moe=args.use_moe,
        )
        return 3 if is_third_generation(read_weights(path, shapes_only=True)) else 2
    except (OSError, ValueError):
        return DEFAULT_GENERATION  # the build of the model reports what is wrong
