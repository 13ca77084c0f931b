"""Every block of code on every page runs: Python from the top of a page to its end, of the shell what exists."""

import ast
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch

from lets_kernels.__main__ import main
from lets_kernels.experiment.recipes import RECIPES, TABLES
from support.docs_blocks import BLOCK, after, before, blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("*/README.md")),
    ROOT / "benchmarks" / "experiments" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
#: The Python of the README stands alone, block by block: tests/docs/test_readme.py runs each in a process of its own.
ALONE = {ROOT / "README.md"}


def of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def one_rank(monkeypatch, tmp_path):
    """What torchrun tells a program that it starts once, in a folder where the program may write."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_grad_enabled(True)


def test_a_block_says_in_which_language_it_is():
    for page in PAGES:
        assert {name for _, name, _ in BLOCK.findall(page.read_text())} <= {"python", "diff", "console", "text"}, page
        assert page.read_text().count("```") == 2 * len(BLOCK.findall(page.read_text())), page


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ALONE and blocks(p, "python", "diff")], ids=of)
def test_python_runs_from_the_top_of_a_page_to_its_end(page, one_rank):
    """A block may use what the blocks above it have made, and nothing else. Of a diff, what it leads to runs."""
    names = {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page, "python", "diff"), 1):
        code = after(text) if language == "diff" else text
        exec(compile(code, f"{of(page)}, block {number}", "exec"), names)


def test_the_readme_s_diff_leads_to_a_loop_that_trains():
    ((_, diff),) = blocks(ROOT / "README.md", "diff")
    model = torch.nn.Linear(4, 1)
    before = model.weight.detach().clone()
    data = [(torch.randn(8, 4), torch.randn(8, 1))] * 3
    exec(after(diff), {"torch": torch, "model": model, "data": data, "loss_fn": torch.nn.functional.mse_loss})
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()


def commands(page):
    """The lines of the shell: those of blocks, and those set in by four columns that begin with a command."""
    text = "\n".join(text for _, text in blocks(page, "console"))
    text += "\n" + "\n".join(re.findall(r"^    ((?:make|pip|python|lets-kernels) .*)$", page.read_text(), re.MULTILINE))
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=of)
def test_a_command_of_the_shell_is_there(page, capsys):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
            words = words[1:]
        program, *rest = words
        if program == "make":
            named = [word for word in rest if "=" not in word]
            assert set(named) <= TARGETS, line
        elif program == "lets-kernels" or [program, *rest[:2]] == ["python", "-m", "lets_kernels"]:
            check_ours(rest if program == "lets-kernels" else rest[2:], line, capsys)
        elif [program, *rest[:1]] == ["python", "-m"]:
            module = ROOT / rest[1].replace(".", "/")
            ours = (module / "__main__.py").is_file() or module.with_suffix(".py").is_file()
            assert ours or rest[1:] == ["build"], line
        elif program in ("python", "torchrun"):
            file = next(word for word in rest if word.endswith(".py"))
            assert file == "train.py" or (ROOT / file).is_file(), line  # train.py: the reader's own
        else:
            assert program in ("objdump", "cibuildwheel") or [program, *rest[:1]] == ["pip", "install"], line
            for word in rest[1:]:
                assert not word.endswith(".txt") or (ROOT / word).is_file(), line


def check_ours(words, line, capsys):
    """The options of a command are those that its help names."""
    command = [word for word in words[:1] if not word.startswith("-")]
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    text = capsys.readouterr().out
    for word in words[len(command) :]:
        assert not word.startswith("--") or word.partition("=")[0] in text, line
    if command == ["experiment"] and words[1:]:
        assert words[1] in {*RECIPES, *TABLES}, line


def test_examples_in_the_words_of_a_page_name_targets_that_exist():
    """`make something` within a sentence."""
    for page in PAGES:
        for target in re.findall(r"`(?:[A-Z_]+=\S+ )?make ([a-z][a-z-]*)", page.read_text()):
            assert target in TARGETS, (page, target)


def test_the_checks_of_this_file_would_notice():
    diff = "-from sam import SAM\n+from lets_kernels import SAM\n \n x = 1\n"
    assert after(diff) == "from lets_kernels import SAM\n\nx = 1\n"
    assert before(diff) == "from sam import SAM\n\nx = 1\n"
    assert ast.parse(after(" x = (\n-    1,\n+    2,\n )\n"))
    assert {"build", "docs", "test"} <= TARGETS and "nonsense" not in TARGETS
    assert len([p for p in PAGES if blocks(p, "python")]) >= 5
