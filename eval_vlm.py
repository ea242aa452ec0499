"""Describe every image of a folder, score the answers to a data set, or answer multiple choice.

    python eval_vlm.py
    python eval_vlm.py --weight pretrain_vlm --image_dir my_photos --html gallery.html
    python eval_vlm.py --data_path my/val.jsonl --images_path my/images --json scores.json
    python eval_vlm.py --choices MMBench_DEV_EN.tsv
    python eval_vlm.py --benchmark mmstar --data_path mmstar.parquet
    torchrun --nproc_per_node 2 eval_vlm.py --data_path my/val.jsonl --images_path my/images
    python eval_vlm.py --chat

A sub-folder of images is one sample of several images. Scores compare the right images with those
of another record, with grey ones and with none: the gap is what the model gains from seeing them.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch.distributed as dist

from dataset.evaluation.benchmarks import BENCHMARKS, BenchmarkData
from dataset.evaluation.eval_data import EvalData
from dataset.evaluation.multiple_choice import MODES, ChoiceFile
from dataset.features.making import CacheOptions
from dataset.features.prepare import prepare_features
from dataset.lm_dataset import VLMDataset
from model.evaluation.benchmark import BenchmarkScores
from model.evaluation.choices import Choices
from model.evaluation.describe import Description, FolderDescriptions, find_samples, gallery
from model.evaluation.flags import add_describe_arguments, check_args
from model.evaluation.record_scores import RecordScores
from model.evaluation.result_files import check_result_files, write_html, write_json
from model.evaluation.task import Output, Task, run_task
from model.generation.engine import VLMEngine
from model.generation.sampling import add_sampling_arguments, sampling_from
from model.generation.thinking import without_thinking
from model.generations import GENERATIONS
from model.machine.device import memory_guard
from model.machine.terminal import Terminated, one_line, printing, sigterm_as_ctrl_c, silence_stdout
from model.options import (
    NATIVE,
    OnceParser,
    add_cache_arguments,
    add_model_arguments,
    cache_folder,
    parse_bool,
    parse_path,
)
from model.serving.terminal_chat import chat
from model.vision.features import FeatureMaker
from model.vlm_processor import tokenizer_sha256
from trainer.ranks.group import Logger, Ranks, init_distributed_mode, warn

MAX_NEW_TOKENS, SCORE_MAX_NEW_TOKENS = 512, 64
WINDOW_BATCHES = 4  # batches of records that are read and sorted by length together
READER_LEFT = 141  # exit status, as a shell has it for SIGPIPE (which Windows lacks)
SLOWEST_RANK = timedelta(hours=12)  # timeout of the ranks that wait for the slowest one


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, only_answers=True)
    add_describe_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(max_new_tokens=None)
    add_score_arguments(parser)
    add_cache_arguments(parser)
    args = parser.parse_args(argv)
    if args.max_new_tokens is None:
        is_short = args.data_path and not args.open_thinking
        args.max_new_tokens = SCORE_MAX_NEW_TOKENS if is_short else MAX_NEW_TOKENS
    if args.data_path and args.temperature is None:
        args.temperature = 0.0
    return args


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """The other tasks, and what is common to all."""
    add = parser.add_argument
    add("--chat", action="store_true", help="talk in the terminal / 终端对话")
    add("--data_path", type=parse_path, help="score these records instead / 改为对数据集评分")
    add("--images_path", type=parse_path, help="their images / 其图像")
    add("--max_seq_len", type=int, default=1536, help="longest record in tokens / 最大长度")
    add("--num_records", type=int, help="score only the first so many / 只评前若干条")
    generate_help = "answers generated for BLEU, chrF, CIDEr-D and VQA accuracy / 生成数"
    add("--num_generate", type=int, default=100, help=generate_help)
    wrong_help = "wrong captions beside the right one / 每图的错误描述数"
    add("--num_wrong", type=int, default=9, help=wrong_help)
    benchmark_help = "what --data_path is: a published file of this benchmark / 公开评测集"
    add("--benchmark", choices=BENCHMARKS, help=benchmark_help)
    choices_help = "answer this .tsv or .parquet of multiple choice / 选择题文件"
    add("--choices", type=parse_path, help=choices_help)
    mode_help = "score the options' letters or their texts / 按选项字母或文本"
    add("--choice_by", choices=MODES, default="letter", help=mode_help)
    add(
        "--circular",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="right only under every order of options / 循环评测",
    )
    add("--compare", help="weight or transformers folder to score too / 与另一权重比较")
    add("--batch_size", type=int, default=16, help="at a time / 批大小")
    add("--json", type=parse_path, help="write the results here too / 结果写入 JSON")


def check_outputs(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse places that results cannot be written to, before anything is scored."""
    results = {"--json": args.json, "--html": args.html}
    inputs = {"--data_path": args.data_path, "--choices": args.choices}

    def check() -> list[None]:
        if ranks.rank == 0:
            check_result_files(results, inputs)
        return []

    ranks.collect(check)


def has_files(args: argparse.Namespace) -> bool:
    """Do the results go anywhere but to the terminal?"""
    return bool(args.json or args.html)


def printing_of(args: argparse.Namespace) -> Callable[[], AbstractContextManager[None]]:
    """The context in which results are printed."""
    return partial(printing, is_extra=has_files(args))


def load(args: argparse.Namespace) -> VLMEngine:
    """The engine of the flags, which it suits; prints which weight it is."""
    engine = VLMEngine.from_args(args)
    sampling_from(args, engine.generation)
    with printing(is_extra=has_files(args)):
        Logger(f"weights: {engine.path}")
    if engine.warning:
        warn(engine.warning)
    return engine


def shows_speed(args: argparse.Namespace, engine: VLMEngine) -> bool:
    """Whether answers are followed by their speed: the flag, else as the generation has it."""
    own = GENERATIONS[engine.generation]
    return own.shows_speed if args.show_speed is None else args.show_speed


def describe_folder(args: argparse.Namespace, ranks: Ranks) -> int:
    """Describe every sample, naming those that cannot be; returns the exit status."""
    samples = find_samples(args.image_dir)
    engine = load(args)
    if args.prompt is None:
        args.prompt = GENERATIONS[engine.generation].prompt
    task = FolderDescriptions(
        samples,
        args.prompt,
        sampling_from(args, engine.generation),
        batch_size=args.batch_size,
        with_thumbnails=bool(args.html),
        show_speed=shows_speed(args, engine),
        group=ranks,
        printing=printing_of(args),
    )
    try:
        found = task.run(engine)
    except BaseException:  # Ctrl-C too: the descriptions so far are written
        if task.so_far and ranks.rank == 0:
            write_descriptions(task, task.so_far, engine.path, args)
        raise
    if ranks.rank == 0:
        write_descriptions(task, found, engine.path, args)
        if ranks.world_size > 1:
            with printing(is_extra=has_files(args)):
                task.print_report(task.report(found))
    return int(any(d.error for d in found))


def write_descriptions(
    task: FolderDescriptions, found: list[Description], weight: Path, args: argparse.Namespace
) -> None:
    """Write the files of the flags."""
    if args.html:
        write_html(args.html, gallery(found, weight=weight.name, prompt=args.prompt))
    if args.json:
        write_json(args.json, {"weight": str(weight)} | task.report(found))


def open_data(args: argparse.Namespace, ranks: Ranks, engine: VLMEngine) -> EvalData:
    """The records of --data_path, with their pictures' features where the flags say so."""
    processor = engine.processor
    dataset = VLMDataset(args.data_path, args.images_path, processor, max_length=args.max_seq_len)
    folder = cache_folder(args.cache_vision_features, args.save_dir)
    if folder is not None:
        num_records = min(args.num_records or len(dataset), len(dataset))
        with printing(is_extra=has_files(args)):
            prepare_features(
                [(dataset, num_records)],
                FeatureMaker(engine.model, processor, batch_size=args.batch_size),
                CacheOptions(folder, args.cache_dtype, max_gib=args.cache_gb),
                ranks,
                log=Logger,
                warn=warn,
            )
    return EvalData(
        dataset,
        num_records=args.num_records,
        num_wrong=args.num_wrong,
        seed=args.seed,
        window=WINDOW_BATCHES * args.batch_size,
        answer_of=without_thinking if processor.can_think else str,
    )


def make_task(args: argparse.Namespace, ranks: Ranks) -> Task[Any]:
    """The scoring task of the flags: gives the data of `dataset/` to the tasks of `model/`."""
    if args.benchmark:
        benchmark = BENCHMARKS[args.benchmark]
        return BenchmarkScores(
            benchmark,
            partial(
                BenchmarkData,
                benchmark,
                args.data_path,
                args.images_path,
                num_records=args.num_records,
            ),
            partial(sampling_from, args),
            source=args.data_path,
            max_length=args.max_seq_len,
            batch_size=args.batch_size,
            group=ranks,
            warn=warn,
        )
    if args.data_path:
        return RecordScores(
            partial(open_data, args, ranks),
            partial(sampling_from, args),
            source=args.data_path,
            batch_size=args.batch_size,
            num_generate=args.num_generate,
            group=ranks,
            warn=warn,
        )
    return Choices(
        partial(ChoiceFile, args.choices),
        source=args.choices,
        mode=args.choice_by,
        circular=args.circular,
        max_length=args.max_seq_len,
        batch_size=args.batch_size,
        group=ranks,
        warn=warn,
    )


def score(args: argparse.Namespace, ranks: Ranks) -> int:
    """Score one weight or two, print the tables and write the JSON; returns the exit status."""
    second_tokenizer = check_second(args) if args.compare else None
    run_task(
        make_task(args, ranks),
        partial(load_first, args, second_tokenizer),
        partial(load, second_args(args)) if args.compare else None,
        head={"data": str(args.data_path or args.choices)},
        output=Output(
            printing_of(args),
            write=partial(write_json, args.json) if args.json else lambda report: None,
            is_main=ranks.rank == 0,
        ),
    )
    return 0


def load_first(args: argparse.Namespace, second_tokenizer: str | None) -> VLMEngine:
    """Load the weight to score.

    Raises:
        ValueError: it does not take such long records, or has another tokenizer than the second.
    """
    engine = load(args)
    name = engine.path.name
    if args.max_seq_len > engine.max_tokens:
        raise ValueError(f"--max_seq_len {args.max_seq_len}: {name} takes {engine.max_tokens}")
    if second_tokenizer not in (None, tokenizer_sha256(engine.processor.tokenizer)):
        raise ValueError(
            f"--compare {args.compare} has another tokenizer than {name}, so losses per token "
            "cannot be compared"
        )
    return engine


def second_args(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the weight to compare with."""
    is_folder = (Path(args.compare) / "config.json").is_file()
    if is_folder:
        changes = {"load_from": args.compare}
    else:
        changes = {"load_from": NATIVE, "weight": args.compare}
    return argparse.Namespace(**(vars(args) | changes))


def check_second(args: argparse.Namespace) -> str:
    """Load the weight to compare with and let go of it, so that what is wrong with it is reported
    before the first one is scored; returns its tokenizer's digest."""
    engine = VLMEngine.from_args(second_args(args))
    sampling_from(args, engine.generation)
    return tokenizer_sha256(engine.processor.tokenizer)


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Do the task of the flags; returns the exit status."""
    if args.chat:
        engine = load(args)
        return chat(
            engine,
            sampling_from(args, engine.generation),
            show_speed=shows_speed(args, engine),
        )
    check_outputs(args, ranks)
    is_scored = args.data_path or args.choices
    # Not with several ranks: one that waits in a collective operation would not run the handler.
    # torchrun ends the others when one is gone.
    is_alone = ranks.world_size == 1
    with sigterm_as_ctrl_c() if is_alone else contextlib.nullcontext():
        return (score if is_scored else describe_folder)(args, ranks)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be loaded, or an image described."""
    args = parse_args(argv)
    # Characters that the terminal cannot show, or input that is not UTF-8, must not end the run.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        check_args(args)
        ranks = init_distributed_mode(args.device, timeout=SLOWEST_RANK)
        args.device = str(ranks.device)
        with memory_guard("lower --batch_size"):
            return run(args, ranks)
    except BrokenPipeError:
        silence_stdout()
        return READER_LEFT
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("\nstopped before the end / 未完成即停止", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
