"""Small files in the formats of the real ones, from a few words and a rule that a network can learn: no language."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from lets_kernels.experiment.glue import FORMATS

NOUNS = ("cat", "dog", "horse", "teacher", "farmer", "child", "bird", "king")
VERBS = ("sees", "hears", "likes", "follows", "finds", "calls")
#: What stands in place of the last noun, the verb, the first noun of the second sentence of a pair.
OTHERS = ((4, ("river", "stone", "table")), (2, ("ignores", "misses", "avoids")), (1, ("tree", "flower", "grass")))
GOOD, BAD = ("wonderful", "brilliant", "charming"), ("awful", "boring", "clumsy")
HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
}
#: MNLI's dev file tells what each of five people said.
DEV = {"mnli": HEADERS["mnli"].replace("label1", "label1 label2 label3 label4 label5")}

Row = dict[str, str]


def write_glue(folder: Path, task: str, samples: int = 64, scored: int | None = None) -> None:
    """A task of GLUE in its folder: ``samples`` to train on, ``scored`` or a quarter as many to score; labels in turn.

    CoLA: right is "the", noun, verb, "the", noun. SST-2: one adjective says it. Of a pair the second sentence is the
    first (``mrpc``, ``qqp``: label 1; ``rte``, ``qnli``, ``mnli``: entailment) or has one of ``OTHERS`` at its end; if
    its verb is one of those, too, ``mnli`` has a contradiction. STS-B: five minus the number of words that differ.
    """
    format = FORMATS[task]
    path = folder / format.folder
    path.mkdir(parents=True, exist_ok=True)
    for name, count, header in (
        ("train.tsv", samples, HEADERS.get(task, "")),
        (format.dev, scored or samples // 4, DEV.get(task, HEADERS.get(task, ""))),
    ):
        chance = random.Random(f"{task} {name}")
        if task == "cola":
            rows = [_cola(i, chance) for i in range(count)]
        else:
            columns = header.split("," if "," in header else " ")
            made = [(_review if task == "sst2" else PAIRS[task])(i, chance) for i in range(count)]
            rows = [columns, *([row.get(column, "-") for column in columns] for row in made)]
        _write(path / name, ["\t".join(row) for row in rows])


def _sentence(chance: random.Random) -> list[str]:
    first, last = chance.sample(NOUNS, 2)
    return ["the", first, chance.choice(VERBS), "the", last]


def _cola(index: int, chance: random.Random) -> list[str]:
    words = _sentence(chance)
    if index % 2 == 0:
        words[1], words[2] = words[2], words[1]
    return ["toy", str(index % 2), "*" if index % 2 == 0 else "", " ".join(words)]


def _review(index: int, chance: random.Random) -> Row:
    adjective = chance.choice(GOOD if index % 2 else BAD)
    return {"sentence": f"a {adjective} film about a {chance.choice(NOUNS)} ", "label": str(index % 2)}


def _pair(
    first: str, second: str, label: str, labels: Sequence[str], changes: Sequence[int] = (0, 1)
) -> Callable[[int, random.Random], Row]:
    """Makes a task's rows: the columns, the labels, and how many words differ for each of these."""

    def row(index: int, chance: random.Random) -> Row:
        words = _sentence(chance)
        others = list(words)
        which = index % len(labels)
        for place, of in OTHERS[: changes[which]]:
            others[place] = chance.choice(of)
        return {first: " ".join(words), second: " ".join(others), label: labels[which], "index": str(index)}

    return row


TWO = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")
PAIRS = {
    "mrpc": _pair("#1 String", "#2 String", "Quality", ("1", "0")),
    "stsb": _pair(*TWO, "score", ("5.000", "4.000", "3.000", "2.000"), (0, 1, 2, 3)),
    "qqp": _pair("question1", "question2", "is_duplicate", ("1", "0")),
    "mnli": _pair(*TWO, "gold_label", ("entailment", "neutral", "contradiction"), (0, 1, 2)),
    "qnli": _pair("question", "sentence", "label", ENTAILED),
    "rte": _pair(*TWO, "label", ENTAILED),
}


# ---- translation -----------------------------------------------------------------------------------------------------

GERMAN = {
    "cat": "katze",
    "dog": "hund",
    "horse": "pferd",
    "teacher": "lehrer",
    "farmer": "bauer",
    "child": "kind",
    "bird": "vogel",
    "king": "könig",
    "sees": "sieht",
    "hears": "hört",
    "likes": "mag",
    "follows": "verfolgt",
    "finds": "findet",
    "calls": "ruft",
}


def write_translation(folder: Path, sentences: int = 64) -> None:
    """``train``, ``valid`` and ``test`` in ``.de`` and ``.en``, the latter two with a quarter of the sentences.

    Word by word, but for the order: a clause that begins with "weil" has its verb at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", sentences), ("valid", sentences // 4), ("test", sentences // 4)):
        chance = random.Random(part)
        pairs = [_translated(chance) for _ in range(count)]
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            _write(folder / f"{part}.{language}", lines)


def _translated(chance: random.Random) -> tuple[str, str]:
    _, first, verb, _, last = _sentence(chance)
    german = [GERMAN[word] for word in (first, verb, last)]
    if chance.random() < 0.5:
        return f"weil das {german[0]} das {german[2]} {german[1]} .", f"because the {first} {verb} the {last} ."
    return f"das {german[0]} {german[1]} das {german[2]} .", f"the {first} {verb} the {last} ."


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
