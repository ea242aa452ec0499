"""Owns the list of real assets of both generations: repositories, files, folders, checksums.

A revision is a commit where one is pinned, else a branch.
"""

from dataclasses import dataclass, field

from dataset.fetching.benchmark_files import FILES as BENCHMARK_FILES

# The assets that come from no hub, each with a module of its name.
CORPUS = "corpus"
PHOTO_TOWER = "photo_tower"
FLICKR8K = "flickr8k"
OF_NO_HUB = (CORPUS, PHOTO_TOWER, FLICKR8K, *BENCHMARK_FILES)


@dataclass(frozen=True)
class Source:
    """A repository on one hub; `sha256` maps a file to its pinned checksum at this revision."""

    repo: str
    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asset:
    """Files that belong together and their folder.

    Args:
        files: "a|b" is the first of them that exists; "a?" is fetched where the repository has it.
        generation: the only one that it serves; None serves both.
        stage: of a weight, the stage that it comes from.
    """

    about: str
    kind: str
    files: tuple[str, ...]
    folder: str
    huggingface: Source
    modelscope: Source
    needs: tuple[str, ...] = ()
    generation: int | None = None
    stage: str | None = None


ABOUT = {
    2: "MiniMind2-V (2025): CLIP, 196 tokens an image, 26M or 104M / 第二代: CLIP",
    3: "minimind-3v (2026): SigLIP2, 64 tokens an image, 65M or 200M (MoE) / 第三代: SigLIP2",
    None: "data for either / 两代通用的数据",
}
# Both vocabularies have 6400 tokens but other ids: with the other one, a weight would give noise
# and no error.
TOKENIZER_SHA256 = {
    "tokenizer.json": "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
}
TOKENIZER3_SHA256 = {
    "tokenizer.json": "71f32c68cf63a15355a8fc171b7594b3d41870fe0ddb54fc6aefa55f73a4a668"
}
TOKENIZER_DIRS = {2: "model/minimind_tokenizer", 3: "model/minimind3_tokenizer"}
# Newer transformers writes the template into a file of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja?")
WEIGHTS = (
    Source("jingyaogong/MiniMind2-V-PyTorch", "main"),
    Source("gongjy/MiniMind2-V-PyTorch", "master"),
)
WEIGHTS3 = (
    Source("jingyaogong/minimind-3v-pytorch", "main"),
    Source("gongjy/minimind-3v-pytorch", "master"),
)
SIGLIP_SHA256 = {
    "model.safetensors": "c1e9cc19ed6704b87353ee00b9ff5d6191886d741898339984364f789c62810d"
}
DATA = (
    Source(
        "jingyaogong/minimind-v_dataset",
        "1e279a8b665cb10383451a6af6fd62b9f35bdd79",
        {
            "pretrain_i2t.parquet": "65761f37d1947d54a1d85457ff70938275e4ef58ba5cedcd02463a3a247c93fd",  # noqa: E501
            "sft_i2t.parquet": "712f4026cd0e21b369feddca7334b1e465cb8182b5f298006f3f4f877f926643",
        },
    ),
    Source("gongjy/minimind-v_dataset", "master"),
)
OLD_DATA = (Source(DATA[0].repo, "main"), DATA[1])


def _weight(about: str, file: str, *, generation: int, stage: str) -> Asset:
    """A native weight; its tokenizer comes with it, and its tower if it can see."""
    sources, vision, tokenizer = {
        2: (WEIGHTS, "vision", "tokenizer"),
        3: (WEIGHTS3, "vision3", "tokenizer3"),
    }[generation]
    needs = (tokenizer,) if stage == "llm" else (vision, tokenizer)
    return Asset(about, "model", (file,), "out", *sources, needs, generation, stage)


def _folder(about: str, name: str) -> Asset:
    """A transformers folder of generation 3, without the code that lies in it."""
    weights = "model.safetensors|pytorch_model.bin"
    return Asset(
        about,
        "model",
        ("config.json", "generation_config.json?", *TOKENIZER_FILES, weights),
        f"out/{name}",
        Source(f"jingyaogong/{name}", "main"),
        Source(f"gongjy/{name}", "master"),
        ("vision3",),
        generation=3,
    )


ASSETS = {
    "vision": Asset(
        "CLIP ViT-B/16, 0.6 GB / CLIP 视觉塔", "model",
        ("config.json", "preprocessor_config.json", "model.safetensors|pytorch_model.bin"),
        "model/vision_model/clip-vit-base-patch16",
        Source("openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
        Source("openai-mirror/clip-vit-base-patch16", "master"), generation=2,
    ),
    "tokenizer": Asset(
        "the tokenizer of these weights / 这些权重的分词器", "model",
        TOKENIZER_FILES, TOKENIZER_DIRS[2],
        Source("jingyaogong/MiniMind2", "main", TOKENIZER_SHA256),
        Source("gongjy/MiniMind2", "master", TOKENIZER_SHA256), generation=2,
    ),
    "llm_512": _weight(
        "language model, 26M, about 55 MB / 语言模型 26M", "llm_512.pth|lm_512.pth",
        generation=2, stage="llm",
    ),
    "llm_768": _weight(
        "language model, 104M, about 215 MB / 语言模型 104M", "llm_768.pth|lm_768.pth",
        generation=2, stage="llm",
    ),
    "pretrain_vlm_512": _weight(
        "26M after pretraining / 26M 预训练后", "pretrain_vlm_512.pth",
        generation=2, stage="pretrain_vlm",
    ),
    "pretrain_vlm_768": _weight(
        "104M after pretraining / 104M 预训练后", "pretrain_vlm_768.pth",
        generation=2, stage="pretrain_vlm",
    ),
    "sft_vlm_512": _weight(
        "26M, finished: to talk to / 26M 成品, 可直接对话", "sft_vlm_512.pth",
        generation=2, stage="sft_vlm",
    ),
    "sft_vlm_768": _weight(
        "104M, finished / 104M 成品", "sft_vlm_768.pth", generation=2, stage="sft_vlm",
    ),
    "vision3": Asset(
        "SigLIP2 base, patch 32, 189 MB / SigLIP2 视觉塔", "model",
        ("config.json", "preprocessor_config.json", "model.safetensors|pytorch_model.bin"),
        "model/siglip2-base-p32-256-ve",
        Source(
            "jingyaogong/siglip2-base-p32-256-ve",
            "9465d1dc89db6bc6227c5b6b0e0ca9b940325d62", SIGLIP_SHA256,
        ),
        Source("gongjy/siglip2-base-p32-256-ve", "master", SIGLIP_SHA256), generation=3,
    ),
    "tokenizer3": Asset(
        "the tokenizer of these weights / 这些权重的分词器", "model",
        TOKENIZER_FILES, TOKENIZER_DIRS[3],
        Source("jingyaogong/minimind-3v", "main", TOKENIZER3_SHA256),
        Source("gongjy/minimind-3v", "master", TOKENIZER3_SHA256), generation=3,
    ),
    "llm3": _weight(
        "language model, 64M / 语言模型 64M", "llm_768.pth", generation=3, stage="llm",
    ),
    "llm3_moe": _weight(
        "the same with experts (MoE), 198M, 407 MB / 专家语言模型 198M", "llm_768_moe.pth",
        generation=3, stage="llm",
    ),
    "pretrain_vlm3": _weight(
        "65M after pretraining / 65M 预训练后", "pretrain_vlm_768.pth",
        generation=3, stage="pretrain_vlm",
    ),
    "pretrain_vlm3_moe": _weight(
        "200M after pretraining / 200M 预训练后", "pretrain_vlm_768_moe.pth",
        generation=3, stage="pretrain_vlm",
    ),
    "sft_vlm3": _weight(
        "65M, finished: to talk to / 65M 成品, 可直接对话", "sft_vlm_768.pth",
        generation=3, stage="sft_vlm",
    ),
    "sft_vlm3_moe": _weight(
        "200M, finished, 409 MB / 200M 成品", "sft_vlm_768_moe.pth",
        generation=3, stage="sft_vlm",
    ),
    "folder3": _folder("sft_vlm3 as a transformers folder / transformers 目录", "minimind-3v"),
    "folder3_moe": _folder("sft_vlm3_moe as one / 同上, 专家模型", "minimind-3v-moe"),
    "pretrain": Asset(
        "pretraining data, Parquet, 1.27M rows / 预训练数据", "dataset",
        ("pretrain_i2t.parquet|pretrain_data.parquet",), "dataset", *DATA,
    ),
    "sft": Asset(
        "fine-tuning data, Parquet, 2.9M rows, 4.9 GB / 微调数据", "dataset",
        ("sft_i2t.parquet|sft_data.parquet",), "dataset", *DATA,
    ),
    "pretrain_jsonl": Asset(
        "the older form of pretrain / 旧版预训练数据", "dataset",
        ("pretrain_data.jsonl|pretrain_vlm_data.jsonl", "pretrain_images.zip"),
        "dataset", *OLD_DATA,
    ),
    "sft_jsonl": Asset(
        "the older form of sft / 旧版微调数据", "dataset",
        ("sft_data.jsonl|sft_vlm_data.jsonl", "sft_images.zip"), "dataset", *OLD_DATA,
    ),
    "multi_jsonl": Asset(
        "multi-image data / 多图数据", "dataset",
        ("sft_vlm_data_multi.jsonl", "sft_multi_images_trans_image.zip"), "dataset", *OLD_DATA,
    ),
}  # fmt: skip
DEFAULT_ASSETS = {
    2: ("vision", "llm_512", "pretrain", "sft"),
    3: ("vision3", "llm3", "pretrain", "sft"),
}


def list_assets() -> str:
    """All assets, by generation, a line each."""
    lines = []
    for generation, about in ABOUT.items():
        lines.append(about if generation is None else f"generation {generation}, {about}")
        for name, asset in ASSETS.items():
            if asset.generation == generation:
                lines.append(f"  {name:<19}{asset.about}")
    lines.append(f"  {CORPUS:<19}the book Dive into Deep Learning, text / 《动手学深度学习》文本")
    lines.append(
        f"  {PHOTO_TOWER:<19}EfficientNet-Lite0, has seen ImageNet, 17 MB by pip, no hub / "
        "见过 ImageNet 照片的视觉塔, 由 pip 下载"
    )
    lines.append(
        f"  {FLICKR8K:<19}7,000 photos, captions in English and Chinese, 1.1 GB, non-commercial / "
        "7000 张照片及中英文说明, 非商业"
    )
    lines.append("benchmarks, one TSV each, checked by md5 / 评测集, 各一个 TSV")
    lines += [f"  {name:<19}{file.title}" for name, file in BENCHMARK_FILES.items()]
    return "\n".join(lines)
