"""Describe every image of a folder, score the answers to a data set, or answer multiple choice.

    python eval_vlm.py
    python eval_vlm.py --weight pretrain_vlm --image_dir my_photos --html gallery.html
    python eval_vlm.py --data_path my/val.jsonl --images_path my/images --json scores.json
    python eval_vlm.py --choices MMBench_DEV_EN.tsv
    torchrun --nproc_per_node 2 eval_vlm.py --data_path my/val.jsonl --images_path my/images
    python eval_vlm.py --chat

A sub-folder of images is one sample of several images. Scores compare the right images with those
of another record, with grey ones and with none: what these lack is what the model sees.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch.distributed as dist
from tqdm import tqdm

from dataset.evaluation.eval_data import EvalData, spread
from dataset.evaluation.multiple_choice import MODES, Choice, ChoiceFile
from dataset.lm_dataset import VLMDataset
from model.evaluation.describe import (
    Description,
    describe,
    find_samples,
    gallery,
    print_descriptions,
    to_json,
)
from model.evaluation.evaluator import ChoiceRow, Evaluator
from model.evaluation.report import (
    Results,
    build_report,
    choice_report,
    compare,
    compare_choices,
    print_choices,
    print_difference,
    print_report,
)
from model.evaluation.result_files import check_result_files, write_html, write_json
from model.generation.engine import VLMEngine
from model.generation.sampling import add_sampling_arguments, sampling_from
from model.machine.device import memory_guard
from model.machine.paths import ROOT
from model.machine.terminal import Terminated, one_line, printing, sigterm_as_ctrl_c, silence_stdout
from model.options import NATIVE, OnceParser, add_model_arguments, parse_bool, parse_path
from model.serving.terminal_chat import chat
from model.vlm_processor import tokenizer_sha256
from trainer.ranks.group import Logger, Ranks, init_distributed_mode, warn

DEFAULT_PROMPT = "仔细看一下这张图：\n\n<image>\n\n描述一下这个图像的内容。"
DESCRIBE_DEFAULTS = {"max_new_tokens": 512, "temperature": 0.65}
SCORE_DEFAULTS = {"max_new_tokens": 64, "temperature": 0.0}
WINDOW_BATCHES = 4  # batches of records that are read and sorted by length together
READER_LEFT = 141  # exit status, as a shell has it for SIGPIPE (which Windows lacks)
SLOWEST_RANK = timedelta(hours=12)  # how long the others wait for it


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image_dir", type=parse_path, default=ROOT / "dataset" / "eval_images",
        help="folder of images to describe / 要描述的图像目录")  # fmt: skip
    add("--prompt", default=DEFAULT_PROMPT,
        help="question; without <image>, the image comes first / 提问")  # fmt: skip
    add("--html", type=parse_path, help="write a gallery here / 生成 HTML 图集")
    add_sampling_arguments(parser)
    parser.set_defaults(**dict.fromkeys(DESCRIBE_DEFAULTS))
    add("--chat", action="store_true", help="talk in the terminal / 终端对话")
    add("--data_path", type=parse_path, help="score these records instead / 改为对数据集评分")
    add("--images_path", type=parse_path, help="their images / 其图像")
    add("--max_seq_len", type=int, default=1536, help="longest record in tokens / 最大长度")
    add("--num_records", type=int, help="score only the first so many / 只评前若干条")
    add("--num_generate", type=int, default=100,
        help="answers generated for BLEU, chrF, CIDEr-D and VQA accuracy / 生成数")  # fmt: skip
    add("--num_wrong", type=int, default=9,
        help="wrong captions beside the right one / 每图的错误描述数")  # fmt: skip
    add("--choices", type=parse_path,
        help="answer this .tsv or .parquet of multiple choice / 选择题文件")  # fmt: skip
    add("--choice_by", choices=MODES, default="letter",
        help="score the options' letters or their texts / 按选项字母或文本")  # fmt: skip
    add("--circular", type=parse_bool, nargs="?", const=True, default=False,
        help="right only under every order of options / 循环评测")  # fmt: skip
    add("--compare", help="weight or transformers folder to score too / 与另一权重比较")
    add("--batch_size", type=int, default=16, help="at a time / 批大小")
    add("--json", type=parse_path, help="write the results here too / 结果写入 JSON")
    args = parser.parse_args(argv)
    defaults = SCORE_DEFAULTS if args.data_path else DESCRIBE_DEFAULTS
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    scored = [f"--{n}" for n in ("data_path", "choices") if getattr(args, n)]
    tasks = scored + ["--chat"] * args.chat
    if len(tasks) > 1:
        raise ValueError(f"{' and '.join(tasks)} are two tasks: give one")
    needs = {"images_path": "data_path", "num_records": "data_path", "circular": "choices"}
    for name, other in needs.items():
        if getattr(args, name) and not getattr(args, other):
            raise ValueError(f"--{name} needs --{other}")
    if args.compare and not scored:
        raise ValueError("--compare needs something to score: --data_path or --choices")
    if args.html and tasks:
        raise ValueError(f"--html is a gallery of --image_dir; leave out {tasks[0]} or it")
    if args.chat and args.json:
        raise ValueError("--json holds results, and --chat has none; leave out one of both")
    if args.chat and "RANK" in os.environ:
        raise ValueError("--chat is for one process: run it without torchrun")
    if args.circular and args.choice_by == "text":
        raise ValueError(
            "--circular turns the list of options, which --choice_by text does not use"
        )
    lowest = {"batch_size": 1, "max_seq_len": 1, "num_records": 1, "num_generate": 0,
              "num_wrong": 1}  # fmt: skip
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name} must be {low} or more, got {value}")
    sampling_from(args)


def check_outputs(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse places that results cannot be written to, before anything is scored."""
    results = {"--json": args.json, "--html": args.html}
    inputs = {"--data_path": args.data_path, "--choices": args.choices}

    def check() -> list:
        if ranks.rank == 0:
            check_result_files(results, inputs)
        return []

    ranks.collect(check)


def has_files(args: argparse.Namespace) -> bool:
    """Do the results go anywhere but to the terminal?"""
    return bool(args.json or args.html)


def load(args: argparse.Namespace) -> VLMEngine:
    """The engine of the flags; says what it is."""
    engine = VLMEngine.from_args(args)
    with printing(is_extra=has_files(args)):
        Logger(f"weights: {engine.path}")
    if engine.warning:
        warn(engine.warning)
    return engine


def describe_folder(args: argparse.Namespace, ranks: Ranks) -> int:
    """Describe every sample, naming those that cannot be; returns the exit status."""
    samples = find_samples(args.image_dir)
    engine, sampling = load(args), sampling_from(args)
    so_far: list[Description] = []  # of this rank

    def work() -> list[Description]:
        for batch in ranks.batches(samples, args.batch_size):
            described = describe(engine, batch, args.prompt, sampling,
                                 with_thumbnails=bool(args.html))  # fmt: skip
            so_far.extend(described)
            if ranks.world_size == 1:
                with printing(is_extra=has_files(args)):
                    print_descriptions(described)
        return so_far

    try:
        found = sorted(ranks.collect(work), key=lambda d: d.name)
    except BaseException:  # whatever ends it, what is described already is not lost
        if so_far and ranks.rank == 0:
            write_descriptions(so_far, len(samples), engine, args)
        raise
    if ranks.rank == 0:
        write_descriptions(found, len(samples), engine, args)
        if ranks.world_size > 1:
            with printing(is_extra=has_files(args)):
                print_descriptions(found)
    return int(any(d.error for d in found))


def write_descriptions(
    found: list[Description], num_samples: int, engine: VLMEngine, args: argparse.Namespace
) -> None:
    """Into the files of the flags; the JSON says how many samples are missing, if any."""
    if args.html:
        write_html(args.html, gallery(found, weight=engine.path.name, prompt=args.prompt))
    if args.json:
        report = {"weight": str(engine.path), "prompt": args.prompt, "seed": args.seed}
        if len(found) < num_samples:
            report["not_described"] = num_samples - len(found)
        write_json(args.json, report | {"samples": to_json(found)})


def score_data(engine: VLMEngine, args: argparse.Namespace, ranks: Ranks) -> Results:
    """All scores of a data set with one weight, on every rank."""
    dataset = VLMDataset(args.data_path, args.images_path, engine.processor,
                         max_length=args.max_seq_len)  # fmt: skip
    data = EvalData(dataset, num_records=args.num_records, num_wrong=args.num_wrong,
                    seed=args.seed, window=WINDOW_BATCHES * args.batch_size)  # fmt: skip
    evaluator = Evaluator(engine, batch_size=args.batch_size)
    sampling = sampling_from(args)

    def score_windows() -> list[tuple]:
        numbers = range(ranks.rank, data.num_windows, ranks.world_size)
        windows = map(data.read_window, tqdm(numbers, desc="scoring", disable=quiet(ranks)))
        return [(*evaluator.score_window(window), window.left_out) for window in windows]

    def answer() -> list:
        some = list(ranks.batches(spread(questions, args.num_generate), data.window))
        return [
            row
            for batch in tqdm(some, desc="answering", disable=quiet(ranks))
            for row in evaluator.answer(batch, [data.messages(q) for q in batch], sampling)
        ]

    scored = ranks.collect(score_windows)
    results = Results(
        answers=sorted((r for s in scored for r in s[0]), key=lambda r: (r.index, r.turn)),
        captions=sorted((r for s in scored for r in s[1]), key=lambda r: r.index),
        left_out=data.left_out + Counter(reason for s in scored for reason, _ in s[2]),
    )
    examples = data.examples | {reason: why for s in scored for reason, why in reversed(s[2])}
    if not results.answers:
        raise ValueError(f"{args.data_path}: no usable record with images "
                         f"({next(iter(examples.values()))})")  # fmt: skip
    if "broken" in examples:
        warn(f"{results.left_out['broken']} broken record(s), as {examples['broken']}")
    usable = {row.index for row in results.answers} if args.num_generate else set()
    questions = sorted(data.questions(usable), key=lambda q: q.language)  # each gets its share
    results.texts = sorted(ranks.collect(answer), key=lambda r: (r.index, r.turn))
    for question in questions:
        if question.is_caption:
            results.references.setdefault(question.language, []).append(question.references)
    return results


def quiet(ranks: Ranks) -> bool | None:
    """Whether to hide a progress bar; None hides it where there is no terminal."""
    return True if ranks.rank else None


def choose(engine: VLMEngine, args: argparse.Namespace, ranks: Ranks
           ) -> tuple[list[ChoiceRow], Counter]:  # fmt: skip
    """All answers to a multiple-choice file with one weight, and why questions are left out."""
    evaluator, file = Evaluator(engine, batch_size=args.batch_size), ChoiceFile(args.choices)

    def work() -> list[tuple[list[ChoiceRow], list[str]]]:
        found = []
        for batch in tqdm(ranks.batches(file, args.batch_size), disable=quiet(ranks)):
            rows, left_out = evaluator.choose_window(
                [c for c in batch if isinstance(c, Choice)], mode=args.choice_by,
                circular=args.circular, max_length=args.max_seq_len,
            )  # fmt: skip
            found.append((rows, [str(c) for c in batch if not isinstance(c, Choice)] + left_out))
        return found

    found = ranks.collect(work)
    rows = sorted((row for rows, _ in found for row in rows), key=lambda row: row.index)
    left_out = [reason for _, reasons in found for reason in reasons]
    if not rows:
        why = f" ({left_out[0]})" if left_out else ""
        raise ValueError(f"{args.choices}: no usable question{why}")
    if left_out:
        warn(f"{len(left_out)} question(s) are left out, as {left_out[0]}")
    return rows, Counter(["unusable"] * len(left_out))


def run_scores(args: argparse.Namespace, ranks: Ranks) -> int:
    """Score one weight or two, print the tables and write the JSON; returns the exit status."""
    known = check_second(args) if args.compare else None
    engine = load(args)
    name = engine.path.name
    if args.max_seq_len > engine.max_tokens:
        raise ValueError(f"--max_seq_len {args.max_seq_len}: {name} takes {engine.max_tokens}")
    if known not in (None, tokenizer_sha256(engine.processor.tokenizer)):
        raise ValueError(
            f"--compare {args.compare} has another tokenizer than {name}, so losses per token "
            "cannot be compared"
        )
    report = {"weight": str(engine.path), "data": str(args.data_path or args.choices)}
    find = score_data if args.data_path else choose
    first = find(engine, args, ranks)
    try:
        report |= show(first, args, ranks)
        if args.compare:
            del engine
            engine = load(second_args(args))
            second = find(engine, args, ranks)
            report["compare"] = {"weight": str(engine.path)} | show(second, args, ranks)
            difference = (compare if args.data_path else compare_choices)(*pair(first, second))
            report["compare"]["difference"] = difference
            if ranks.rank == 0:
                with printing(is_extra=has_files(args)):
                    print(f"\n{engine.path.name} minus {name}, paired:")
                    print_difference(difference)
    finally:  # the first weight's scores are not lost to what befalls the second
        if args.json and ranks.rank == 0:
            write_json(args.json, report)
    return 0


def second_args(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the weight to compare with."""
    is_folder = (Path(args.compare) / "config.json").is_file()
    changes = ({"load_from": args.compare} if is_folder
               else {"load_from": NATIVE, "weight": args.compare})  # fmt: skip
    return argparse.Namespace(**(vars(args) | changes))


def check_second(args: argparse.Namespace) -> str:
    """Load the weight to compare with as it is loaded later, and let go of it, so that what is
    wrong with it is said before the first one is scored; returns its tokenizer's digest."""
    return tokenizer_sha256(VLMEngine.from_args(second_args(args)).processor.tokenizer)


def pair(first, second) -> tuple:
    """Results of a data set as they are; of multiple choice, the rows."""
    return (first, second) if isinstance(first, Results) else (first[0], second[0])


def show(found: Results | tuple, args: argparse.Namespace, ranks: Ranks) -> dict:
    """The report of one weight; the first rank prints it."""
    is_data = isinstance(found, Results)
    report = build_report(found) if is_data else choice_report(*found, circular=args.circular)
    if ranks.rank == 0:
        with printing(is_extra=has_files(args)):
            (print_report if is_data else print_choices)(report)
    return report


def run_task(args: argparse.Namespace, ranks: Ranks) -> int:
    """What the flags ask for; returns the exit status."""
    if args.chat:
        return chat(load(args), sampling_from(args))
    check_outputs(args, ranks)
    is_scored = args.data_path or args.choices
    # Ranks that wait for each other would not notice; torchrun ends them when one is gone.
    is_alone = ranks.world_size == 1
    with sigterm_as_ctrl_c() if is_alone else contextlib.nullcontext():
        return (run_scores if is_scored else describe_folder)(args, ranks)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be loaded, or an image described."""
    args = parse_args(argv)
    # A character that the terminal lacks, or bytes that are none, end neither run nor chat.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        check_args(args)
        ranks = init_distributed_mode(args.device, timeout=SLOWEST_RANK)
        args.device = str(ranks.device)
        with memory_guard("lower --batch_size"):
            return run_task(args, ranks)
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
