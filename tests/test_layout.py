"""If this fails, a file stands where a reader would not look for it, or a folder imports one that
it must not know.
"""

import ast
import subprocess
from pathlib import Path

import pytest
from support.scripts import ROOT

TOP_LEVEL = {
    "model", "dataset", "trainer", "tests", "out", "checkpoints", "eval_vlm.py", "web_demo.py",
    "requirements.txt", "README.md", "pyproject.toml", "requirements-dev.txt", "Makefile",
    ".gitignore", ".ci", "README_zh.md", "CHANGELOG.md", "BENCHMARKS.md", "CONTRIBUTING.md",
    "LICENSE", ".pre-commit-config.yaml",
}  # fmt: skip
PACKAGES = ("model", "dataset", "trainer")
# Folder (or a file that stands lower than its folder) -> folders and files that it may import,
# beside its own. Imports inside functions count too.
MODEL = "model model/machine model/vision model/weights"
DATASET = "dataset dataset/records"
TRAINER = "trainer/train_args.py trainer/ranks trainer/tracking trainer/loop trainer/saving"
ALLOWED = {
    "model/machine": "",
    "model/vision": "",
    "model": "model/machine model/vision",
    "model/weights": "model model/machine model/vision",
    "model/vision/features.py": MODEL,
    "model/generation": MODEL,
    "model/evaluation": f"{MODEL} model/generation",
    "model/export": MODEL,
    "model/serving": f"{MODEL} model/generation",
    "model/serving/api/protocol": f"{MODEL} model/generation",
    "model/serving/api": f"{MODEL} model/generation model/serving model/serving/api/protocol",
    "model/serving/web/protection": f"{MODEL} model/serving",
    "model/serving/web": f"{MODEL} model/generation model/serving model/serving/web/protection",
    "dataset/records": "dataset/records/streams",
    "dataset/records/streams": "dataset/records",
    "dataset": "dataset/records",
    "dataset/features": DATASET,
    "dataset/evaluation": DATASET,
    "dataset/examining": f"{DATASET} dataset/evaluation",
    "dataset/converting": f"{DATASET} dataset/examining",
    "dataset/synthetic": "",
    "dataset/fetching": "",
    "trainer": "",
    "trainer/train_args.py": f"{MODEL} {DATASET}",
    "trainer/stages.py": "trainer/train_args.py",
    "trainer/ranks": "model/machine",
    "trainer/tracking": "model/machine trainer/train_args.py trainer/ranks",
    "trainer/loop": f"{MODEL} trainer/train_args.py trainer/ranks trainer/tracking",
    "trainer/saving": f"{MODEL} {TRAINER}",
    "trainer/run": f"{MODEL} model/vision/features.py model/generation model/evaluation {DATASET} "
    f"dataset/features dataset/evaluation {TRAINER}",
    "trainer/chain": f"{MODEL} model/generation dataset/synthetic dataset/records trainer/tracking",
    "trainer/measuring": f"{MODEL} {DATASET} {TRAINER} trainer/run "
    "trainer/measuring/matrix_rate.py",
    "trainer/measuring/matrix_rate.py": "",
    "trainer/trainer_utils.py": f"{TRAINER} trainer/run",  # a face for readers of the original
}
# Commands may import any of their own package, and these may introduce strangers to one another;
# nobody imports a command.
COMMANDS = {
    "eval_vlm.py": f"{MODEL} model/vision/features.py model/generation model/evaluation "
    f"model/serving {DATASET} dataset/evaluation dataset/features trainer/ranks",
    "web_demo.py": f"{MODEL} model/generation model/serving/api model/serving/web",
    "dataset/download.py": f"{MODEL} dataset/fetching",
    "dataset/check_published.py": f"{MODEL} model/evaluation dataset/fetching",
    "dataset/prompt_picture.py": f"{MODEL} dataset dataset/records",
    "dataset/doctor.py": f"{MODEL} model/evaluation {DATASET} dataset/examining dataset/converting",
    "dataset/benchmark_layouts.py": "model/machine dataset/records dataset/converting",
    "dataset/convert.py": f"{MODEL} model/evaluation dataset/examining dataset/converting "
    "dataset/fetching",
    "dataset/synthetic/__main__.py": "",
    "model/export/__main__.py": MODEL,
    "trainer/train_pretrain_vlm.py": "trainer/stages.py trainer/run",
    "trainer/train_sft_vlm.py": "trainer/stages.py trainer/run",
    "trainer/train_scst_vlm.py": "trainer/stages.py trainer/run",
    "trainer/train_llm.py": "trainer/stages.py trainer/run",
    "trainer/benchmark.py": f"{MODEL} {TRAINER} trainer/stages.py trainer/measuring "
    "trainer/measuring/matrix_rate.py trainer/run",
    "trainer/train_tokenizer.py": f"{MODEL} {DATASET} dataset/synthetic",
    "trainer/train_clip_tiny.py": f"{MODEL} dataset/synthetic {TRAINER} trainer/run",
    "trainer/benchmark_saving.py": f"{MODEL} {TRAINER} trainer/run",
    "trainer/plot.py": "model model/machine trainer/tracking",
    "trainer/demo.py": "model model/machine trainer/chain trainer/measuring/matrix_rate.py",
    "trainer/photos.py": "model model/machine trainer/chain trainer/measuring/matrix_rate.py",
}
MAX_LINES = 400


def python_files() -> list[Path]:
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in files]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def own_imports(path: Path) -> set[str]:
    """Our files that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {a.name for a in node.names}
        else:
            continue
        files = {n.replace(".", "/") + ".py" for n in names}
        found |= {f for f in files if (ROOT / f).is_file() and not f.startswith("tests/")}
    return found


def rules_of(name: str) -> list[str]:
    """What a file may import: folders, and files that stand for themselves."""
    folder = name.rpartition("/")[0]
    allowed = COMMANDS.get(name, ALLOWED.get(name, ALLOWED.get(folder)))
    assert allowed is not None, f"say in ALLOWED what {folder} may import"
    return [*allowed.split(), *([folder] if folder and name not in ALLOWED else [])]


def test_top_level_holds_only_what_belongs_there():
    tracked = subprocess.run(
        ["git", "-c", "core.quotepath=off", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL
    assert {"out/.gitkeep", "checkpoints/.gitkeep"} <= set(tracked)


PRODUCT = [p for p in python_files() if p.relative_to(ROOT).parts[0] != "tests"]


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_module_imports_only_what_it_may(path):
    name = path.relative_to(ROOT).as_posix()
    allowed = rules_of(name)
    for imported in own_imports(path):
        assert imported not in COMMANDS, f"{imported} is a command: nobody imports it"
        folder = imported.rpartition("/")[0]
        lower = imported if imported in ALLOWED else folder
        assert lower in allowed, f"{name} may not import {imported}"


def test_imports_form_no_cycle():
    graph = {p.relative_to(ROOT).as_posix(): own_imports(p) for p in PRODUCT}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_file_is_short_and_says_what_it_owns(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_tracked_files_name_no_path_of_this_machine():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert f"{ROOT}/" not in text and f"{Path.home()}/" not in text, path
