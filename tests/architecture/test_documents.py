"""What the documents tell people to type exists: commands, options, make targets, files, library names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import hybridlab as hl
from hybridlab.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
SHELL = {"console", "bash", "sh", "shell"}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[list[str]]:
    """Words of each command line in the shell blocks, without comments and variable assignments in front."""
    lines = [line for language, body in blocks(text) if language in SHELL for line in body.splitlines()]
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [_without_assignments(words) for words in found if words]


def inline_commands(text: str) -> list[list[str]]:
    """Words of `hybridlab ...` and `make ...` in running text and tables; [optional] parts count too."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:hybridlab|make) [^`]+)`", prose)
    return [re.sub(r"[\[\]|]", " ", span).split() for span in spans]


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def problems(text: str, root: Path) -> list[str]:
    found = []
    for words in shell_commands(text):
        found += _command_problems(words, root, parse=True)
        found += [f"no such file: {word}" for word in words if _is_missing(word, root)]
    for words in inline_commands(text):
        found += _command_problems(words, root, parse=False)
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    found += [f"broken link: {target}" for target in targets if not (root / target).exists()]
    for language, body in blocks(text):
        if language == "python":
            compile(body, "<document>", "exec")
            found += _unknown_names(body)
    return found


def _command_problems(words: list[str], root: Path, parse: bool) -> list[str]:
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        known = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        wanted = [word for word in words[1:] if "=" not in word]
        return [f"no make target {word!r}" for word in wanted if word not in known]
    if program == "hybridlab":
        return _hybridlab_problems(words[1:], parse)
    if words[0].startswith(".venv/bin/") and program != "python":
        return [f"unknown program {words[0]}"]
    return []


def _hybridlab_problems(words: list[str], parse: bool) -> list[str]:
    command: Any = typer.main.get_command(app)
    path = []
    while words and hasattr(command, "commands"):
        path.append(words[0])
        if words[0] not in command.commands:
            return [f"no command 'hybridlab {' '.join(path)}'"]
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        return [f"'hybridlab {' '.join(path)}' is not a whole command"]
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    if unknown or not parse:
        return [f"hybridlab {' '.join(path)} has no option {word}" for word in unknown]
    try:
        command.make_context(command.name, list(words))
    except Exception as error:  # whatever the parser has against it
        return [f"hybridlab {' '.join([*path, *words])}: {error}"]
    return []


def _is_missing(word: str, root: Path) -> bool:
    """Whether a word names a file of the repository that is not there (results are made by commands)."""
    tracked = ("experiments/", "tests/", "notebooks/", "docs/", "cython_kernels/", "hybridlab/")
    return word.startswith(tracked) and not (root / word).exists()


def _unknown_names(source: str) -> list[str]:
    used = set(re.findall(r"\bhl\.(\w+)", source))
    for names in re.findall(r"from hybridlab import ([\w, ]+)", source):
        used |= {name.strip() for name in names.split(",")}
    return [f"hybridlab has no {name}" for name in sorted(used) if not hasattr(hl, name)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_tell_the_truth(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert shell_commands(text)
    assert problems(text, ROOT) == []


def test_readme_begins_with_the_two_commands() -> None:
    first = shell_commands((ROOT / "README.md").read_text(encoding="utf-8"))[:2]
    assert first == [["make", "demo"], ["make", "test"]]


def test_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = {" ".join(words[1:3]) for words in inline_commands(text)}
    command: Any = typer.main.get_command(app)
    for name, sub in command.commands.items():
        for leaf in getattr(sub, "commands", {"": None}):
            assert any(entry.startswith(f"{name} {leaf}".strip()) for entry in table), f"{name} {leaf}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```console\nmake supper\n```", "no make target 'supper'"),
        ("see `make supper`", "no make target 'supper'"),
        ("```console\n.venv/bin/hybridlab dance\n```", "no command 'hybridlab dance'"),
        ("`hybridlab checkpoint burn OUT`", "no command 'hybridlab checkpoint burn'"),
        ("`hybridlab checkpoint --json`", "no command 'hybridlab checkpoint --json'"),
        ("| `hybridlab run CONFIG [--fast]` |", "hybridlab run has no option --fast"),
        ("```bash\nhybridlab generate x --max-tokens many\n```", "hybridlab generate x --max-tokens many: "),
        ("```bash\nA=1 hybridlab run\n```", "hybridlab run: "),
        ("```sh\nhybridlab run experiments/none.yaml\n```", "no such file: experiments/none.yaml"),
        ("```sh\n.venv/bin/hybirdlab run x\n```", "unknown program .venv/bin/hybirdlab"),
        ("[how](docs/none.md)", "broken link: docs/none.md"),
        ("```python\nimport hybridlab as hl\nhl.fly()\n```", "hybridlab has no fly"),
        ("```python\nfrom hybridlab import StepPlan, Wings\n```", "hybridlab has no Wings"),
    ],
)
def test_planted_falsehood_is_found(text: str, problem: str) -> None:
    (found,) = problems(text, ROOT)
    assert found.startswith(problem)


def test_planted_syntax_error_is_found() -> None:
    with pytest.raises(SyntaxError):
        problems("```python\nhl.run(\n```", ROOT)
