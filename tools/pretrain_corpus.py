"""The pretraining documents of the built-in model, from the standard library and open text.

Half is plain source and prose. The other half is made here to grow in-context copying: repeats, and
chats that ask for something written in the code or text they show. None of them uses the prompt or
the answer format of `pennyweight.builtin.task`, and nothing comes from its held-out modules.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pennyweight.builtin import task

BOS, START, END = "<|bos|>", "<|im_start|>", "<|im_end|>"
WORD = re.compile(r"[A-Za-z_]\w{2,}")
TEST_CHARS = 3_000_000
PEP_STEP = 6  # a share of them is enough for the prose rows


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by kind; `chats` are (question, answer) pairs of real data."""

    code: list[str]
    prose: list[str]
    chats: list[tuple[str, str]]
    names: list[str]


def read_corpus(text_folder: Path | None, chat_folder: Path | None, seed: int) -> Corpus:
    """All texts, code of held-out functions cut out; the folders are optional."""
    rng = random.Random(seed)
    code = list(_library_code(rng))
    prose, chats = [], []
    if text_folder:
        with gzip.open(text_folder / "peps/peps.jsonl.gz", "rt", encoding="utf-8") as lines:
            prose += [json.loads(line)["text"] for line in lines][::PEP_STEP]
        book = (text_folder / "sherlock/sherlock_1661.txt").read_text(encoding="utf-8")
        prose.append(book.replace("\r\n", "\n"))
    if chat_folder:
        for file, question, answer in (
            ("tldr/tldr_en.jsonl.gz", "instruction", "output"),
            ("gsm8k/train.jsonl.gz", "question", "answer"),
        ):
            with gzip.open(chat_folder / file, "rt", encoding="utf-8") as lines:
                chats += [(row[question], row[answer]) for row in map(json.loads, lines)]
    rng.shuffle(prose)
    names = sorted({name for text in code for name in WORD.findall(text)})
    return Corpus(code, prose, chats, names)


def _library_code(rng: random.Random) -> Iterator[str]:
    """Library files of training modules, then a share of the library's own tests."""
    held_out = {f.source for path in task.modules(held_out=True) for f in task.functions(path)}
    shared = {f.source for path in task.modules(held_out=False) for f in task.functions(path)}
    held_out -= shared  # what also stands in a training module is no held-out row
    for path in task.modules(held_out=False):
        yield path.read_text(encoding="utf-8")
    root = Path(sysconfig.get_path("stdlib"))
    tests = sorted((root / "test").glob("test_*.py")) + sorted((root / "tkinter").glob("*.py"))
    rng.shuffle(tests)
    left = TEST_CHARS
    for path in tests:
        text = path.read_text(encoding="utf-8", errors="replace")
        about_held_out = any(name in path.stem for name in task.HELD_OUT)
        if about_held_out or len(text) > 200_000 or left < 0:
            continue
        try:
            if any(f.source in held_out for f in task.functions(path)):
                continue
        except (SyntaxError, UnicodeDecodeError):
            continue
        left -= len(text)
        yield text


def made_document(corpus: Corpus, rng: random.Random) -> str:
    """One document that rewards copying from its own beginning."""
    if rng.random() < 0.35:
        return BOS + rng.choice((_repeated_code, _repeated_names, _repeated_names, _looked_up))(
            corpus, rng
        )
    turns = [_turn(corpus, rng)]
    while rng.random() < 0.25:
        turns.append(_turn(corpus, rng))
    return BOS + "".join(
        f"{START}user\n{question}{END}\n{START}assistant\n{answer}{END}\n"
        for question, answer in turns
    )


def _turn(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    if corpus.chats and rng.random() < 0.06:
        return rng.choice(corpus.chats)
    while True:
        pair = rng.choice(QUESTIONS)(corpus, rng)
        if pair and pair[1] and len(pair[1]) < 400:
            return pair


def _invented(rng: random.Random) -> str:
    parts = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 4)))
        for _ in range(rng.randint(1, 3))
    ]
    name = "_".join(parts) if rng.random() < 0.5 else "".join(parts)
    return rng.choice((name, name, name.upper(), "_" + name, name.title()))


def _some_names(corpus: Corpus, rng: random.Random, low: int, high: int) -> list[str]:
    picked = [
        rng.choice(corpus.names) if rng.random() < 0.6 else _invented(rng)
        for _ in range(rng.randint(low, high))
    ]
    return list(dict.fromkeys(picked))


def _written(names: list[str], rng: random.Random) -> str:
    """The same names in one of many spellings of a list."""
    return rng.choice(
        (
            json.dumps,
            str,
            ", ".join,
            " ".join,
            "\n".join,
            lambda n: "(" + ", ".join(n) + ")",
            lambda n: "".join(f"- {x}\n" for x in n).rstrip(),
            lambda n: ", ".join(f"{x}=None" for x in n),
            lambda n: "".join(f"self.{x} = {x}\n" for x in n).rstrip(),
            lambda n: json.dumps({x: i for i, x in enumerate(n)}),
            lambda n: "; ".join(f"`{x}`" for x in n),
        )
    )(names)


def _repeated_names(corpus: Corpus, rng: random.Random) -> str:
    names = _some_names(corpus, rng, 2, 14)
    return "\n".join(_written(names, rng) for _ in range(rng.randint(2, 5))) + "\n"


def _repeated_code(corpus: Corpus, rng: random.Random) -> str:
    excerpt = _excerpt(corpus, rng, 3, 14)
    return f"{excerpt}\n\n# once more\n{excerpt}\n"


def _looked_up(corpus: Corpus, rng: random.Random) -> str:
    keys = _some_names(corpus, rng, 3, 10)
    values = [rng.choice((str(rng.randint(0, 999)), rng.choice(corpus.names))) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    shuffled = rng.sample(pairs, len(pairs))
    given, asked = rng.choice(((" = ", ": "), (": ", " -> "), (" -> ", "=")))
    return (
        "\n".join(f"{k}{given}{v}" for k, v in pairs)
        + "\n\n"
        + "\n".join(f"{k}{asked}{v}" for k, v in shuffled)
        + "\n"
    )


def _excerpt(corpus: Corpus, rng: random.Random, low: int, high: int) -> str:
    """Some whole lines, at most 700 characters, from a file chosen by its length."""
    while True:
        texts = rng.choices(corpus.code, k=2)
        lines = max(texts, key=len).splitlines()
        first = rng.randrange(max(1, len(lines) - high))
        kept = lines[first : first + rng.randint(low, high)]
        text = "\n".join(kept).strip("\n")[:700]
        if len(text) > 30:
            return text


def _answer(found: list[str], rng: random.Random) -> str:
    found = list(dict.fromkeys(found))[:12]
    return rng.choice((json.dumps, ", ".join, "\n".join))(found)


def _matches(question: str, pattern: str) -> Callable[[Corpus, random.Random], tuple[str, str]]:
    """A question whose answer is the list of what `pattern` finds in an excerpt."""
    compiled = re.compile(pattern, re.MULTILINE)

    def ask(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
        found: list[str] = []
        for _ in range(20):
            text = _excerpt(corpus, rng, 3, 14)
            found = compiled.findall(text)
            if found:
                return f"{question}\n\n{text}", _answer(found, rng)
        return "", ""

    return ask


def _line_with(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    text = _excerpt(corpus, rng, 4, 14)
    line = rng.choice([line for line in text.splitlines() if line.strip()])
    words = WORD.findall(line)
    if not words:
        return "", ""
    word = rng.choice(words)
    answer = next(each for each in text.splitlines() if word in each)
    return f"Which line has {word} first?\n\n{text}", answer.strip()


def _copy(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    text = _excerpt(corpus, rng, 1, 6)
    lines = text.splitlines()
    question, answer = rng.choice(
        (
            ("Repeat this.", text),
            ("Repeat the first line.", lines[0]),
            ("Repeat the last line.", lines[-1]),
        )
    )
    return f"{question}\n\n{text}", answer.strip()


def _listed(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    names = _some_names(corpus, rng, 2, 10)
    question, answer = rng.choice(
        (
            ("Write these as a JSON list.", json.dumps(names)),
            ("Write these separated by commas.", ", ".join(names)),
            ("Write these one a line.", "\n".join(names)),
            ("Which of these begin with an underscore?", _picked(names, lambda n: n[0] == "_")),
            ("Which of these are in capitals?", _picked(names, str.isupper)),
            ("Which of these are short?", _picked(names, lambda n: len(n) < 6)),
            ("Write the first and the last.", json.dumps([names[0], names[-1]])),
            ("What comes first?", names[0]),
            ("What comes last?", names[-1]),
        )
    )
    return f"{question}\n\n{_written(names, rng)}", answer


def _picked(names: list[str], keep: Callable[[str], bool]) -> str:
    return json.dumps([name for name in names if keep(name)])


def _settings(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    """Settings, some with a value: a lookup, or a split in two lists."""
    names = _some_names(corpus, rng, 2, 8)
    values = [rng.choice(("", str(rng.randint(0, 99)), repr(_invented(rng)))) for _ in names]
    lines = [f"{n} = {v}" if v else n for n, v in zip(names, values, strict=True)]
    shown = rng.choice(("\n", "; ", ", ")).join(lines)
    given = {n: v for n, v in zip(names, values, strict=True) if v}
    if given and rng.random() < 0.5:
        name = rng.choice(list(given))
        return f"What is the value of {name}?\n\n{shown}", given[name]
    bare = [n for n in names if n not in given]
    return f"Which settings are set, and which are not?\n\n{shown}", json.dumps(
        {"set": list(given), "unset": bare}
    )


def _class(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    """Class, bases and methods of the first lines of a class."""
    for _ in range(20):
        text = rng.choice(corpus.code)
        heads = list(re.finditer(r"^class (\w+)(?:\(([\w., ]*)\))?:", text, re.MULTILINE))
        if heads:
            head = rng.choice(heads)
            shown = text[head.start() : head.start() + rng.randint(150, 700)].rsplit("\n", 1)[0]
            bases = [b.strip() for b in (head[2] or "").split(",") if b.strip()]
            methods = re.findall(r"^    def (\w+)", shown, re.MULTILINE)[:8]
            answer: dict[str, object] = {"class": head[1], "bases": bases}
            if rng.random() < 0.6:
                answer["methods"] = methods
            return f"Describe this class.\n\n{shown}", json.dumps(answer)
    return "", ""


def _docstring(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    for _ in range(20):
        text = rng.choice(corpus.code)
        heads = list(re.finditer(r'^( *)def \w+\(.*\):\n +"""(.+?)(?:"""|\n)', text, re.MULTILINE))
        if heads:
            head = rng.choice(heads)
            shown = text[head.start() : head.end() + rng.randint(0, 200)].rsplit("\n", 1)[0]
            return f"What does this do?\n\n{shown}", head[2].strip()
    return "", ""


def _call(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    """A call taken apart: the function and the names of its keywords."""
    for _ in range(40):
        line = rng.choice(_excerpt(corpus, rng, 2, 10).splitlines()).strip()
        try:
            tree = ast.parse(line.rstrip(":"))
        except (SyntaxError, ValueError):
            continue
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        if calls:
            call = calls[0]
            parts = [ast.unparse(arg) for arg in call.args]
            return f"What is passed here?\n\n{line}", json.dumps(
                {"call": ast.unparse(call.func), "values": parts}
            )
    return "", ""


QUESTIONS = (
    _matches("Which names are assigned here?", r"^ *(\w+) = "),
    _matches("Which attributes of self occur?", r"self\.(\w+)"),
    _matches("Which functions are called?", r"([A-Za-z_]\w+)\("),
    _matches("Which strings occur?", r"'(\w+)'"),
    _matches("Which numbers occur?", r"\b(\d+)\b"),
    _matches("What is imported?", r"^(?:from|import) ([\w.]+)"),
    _matches("What is returned?", r"return (.+)$"),
    _matches("Which functions begin here?", r"def (\w+)"),
    _matches("Which conditions are tested?", r" if (.+):$"),
    _line_with,
    _copy,
    _copy,
    _listed,
    _listed,
    _listed,
    _settings,
    _settings,
    _class,
    _class,
    _docstring,
    _call,
    _call,
)
