"""GLUE (Wang et al., 2019): sentences and pairs of sentences to classify, or to say how alike they are."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lets_kernels.experiment.networks import Logits
from lets_kernels.experiment.task import Batch, MissingData, Task
from lets_kernels.experiment.texts import SPECIAL, byte_pairs, lines

#: What the network is called with, each int64 (n, length of the longest).
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: Of the tokenizer that is made where no checkpoint has one.
MERGES = 30_000
#: DeBERTa-v3's base size (He et al., 2023), as its published configuration has it.
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "pooler_hidden_size": 768,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}


# ---- the score, from the network's outputs (n, classes) and the targets ----------------------------------------------


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the samples whose largest logit is the target's."""
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(outputs, targets, num_classes=outputs.shape[1], average="micro")


def matthews(outputs: Tensor, targets: Tensor) -> Tensor:
    """Matthews's correlation, in −1 ... 1; 0 if all predictions are the same."""
    from torchmetrics.functional.classification import binary_matthews_corrcoef

    return binary_matthews_corrcoef(outputs.argmax(1), targets)


def correlation(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of Pearson's and Spearman's correlation, as GLUE has it for its total."""
    from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

    return (pearson_corrcoef(outputs[:, 0], targets) + spearman_corrcoef(outputs[:, 0], targets)) / 2


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A task's files in GLUE's archive.

    Args:
        folder: in the archive.
        sentences: the columns that the network reads, one or two.
        label: the column of the target.
        labels: what stands there, in the order of the logits; empty if it is a number.
        dev: the file that is scored: GLUE keeps the labels of the test files to itself.
        columns: of a file that has no header.
        score: of outputs and targets.
        measure: what it is.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    dev: str = "dev.tsv"
    columns: tuple[str, ...] = ()
    score: Callable[[Tensor, Tensor], Tensor] = accuracy
    measure: str = "dev accuracy, %"


TWO = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")
FORMATS = {
    "cola": Format(
        "CoLA",
        ("sentence",),
        "label",
        ("0", "1"),
        columns=("source", "label", "star", "sentence"),
        score=matthews,
        measure="dev Matthews correlation, × 100",
    ),
    "sst2": Format("SST-2", ("sentence",), "label", ("0", "1")),
    "mrpc": Format("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")),
    "stsb": Format(
        "STS-B", TWO, "score", (), score=correlation, measure="dev mean of Pearson and Spearman correlation, × 100"
    ),
    "qqp": Format("QQP", ("question1", "question2"), "is_duplicate", ("0", "1")),
    "mnli": Format("MNLI", TWO, "gold_label", ("entailment", "neutral", "contradiction"), dev="dev_matched.tsv"),
    "qnli": Format("QNLI", ("question", "sentence"), "label", ENTAILED),
    "rte": Format("RTE", TWO, "label", ENTAILED),
}


def read(path: Path, format: Format) -> tuple[list[tuple[str, ...]], Tensor]:
    """The sentences, and the targets: int64 (n,), or float32 if the task is a regression.

    Quotation marks are letters like any other. Of the lines of QQP a few break off before the last column; such lines
    are left out, as all readers of GLUE do, if they are at most one in a hundred.

    Raises:
        MissingData: this is not the task's file.
    """
    holds = _holds(format)
    rows = csv.reader(lines(path, holds), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        names = list(format.columns) or next(rows)
        missing = [name for name in (*format.sentences, format.label) if name not in names]
        if missing:
            raise MissingData(f"{path} has no column {', '.join(missing)}: it should hold {holds}")
        places, label = [names.index(name) for name in format.sentences], names.index(format.label)
        sentences: list[tuple[str, ...]] = []
        targets: list[float] = []
        short = []
        for row in rows:
            if len(row) < len(names):
                short.append(rows.line_num)
            else:
                sentences.append(tuple(row[place] for place in places))
                targets.append(_target(row[label], format, path, rows.line_num))
    except csv.Error as error:
        raise MissingData(f"{path}, line {rows.line_num}: {error}; the file should hold {holds}") from None
    if len(short) > len(sentences) / 100:
        raise MissingData(
            f"{path}: {len(short)} lines have less than {len(names)} columns, the first is line {short[0]}; "
            f"the file should hold {holds}"
        )
    if not sentences:
        raise MissingData(f"{path} has no line below its header: it should hold {holds}")
    return sentences, torch.tensor(targets) if not format.labels else torch.tensor(targets, dtype=torch.int64)


def _holds(format: Format) -> str:
    if format.columns:
        columns = f"the {len(format.columns)} columns {', '.join(format.columns)} without a header"
    else:
        columns = f"a header with the columns {', '.join((*format.sentences, format.label))}"
    return f"{columns}, separated by tabs, as in the folder {format.folder} of GLUE's archive"


def _target(text: str, format: Format, path: Path, line: int) -> float:
    try:
        return float(text) if not format.labels else format.labels.index(text)
    except ValueError:
        wanted = f"one of {', '.join(format.labels)}" if format.labels else "a number"
        raise MissingData(f"{path}, line {line}: {format.label} is {text!r}, and should be {wanted}") from None


class Sentences:
    """Sentences or pairs of them with their targets; a batch is as long as its longest sentence, or ``length``."""

    def __init__(self, sentences: list[tuple[str, ...]], targets: Tensor, tokenizer: Any, length: int) -> None:
        self.sentences, self.targets, self.tokenizer, self.length = sentences, targets, tokenizer, length

    def __len__(self) -> int:
        return len(self.sentences)

    def batch(self, indices: Sequence[int], seed: int | None) -> Batch:
        """Nothing is random here."""
        columns = zip(*(self.sentences[index] for index in indices), strict=True)
        found = self.tokenizer(
            *map(list, columns),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            return_attention_mask=True,
            return_token_type_ids=True,
        )
        return Batch(tuple(found[name] for name in INPUTS), self.targets[torch.as_tensor(indices)])


# ---- the task --------------------------------------------------------------------------------------------------------


def glue(folder: Path, task: str, checkpoint: Path | None, length: int = 128) -> Task:
    """A task of GLUE, scored on its dev file, for MNLI on the matched one.

    Args:
        folder: GLUE's archive, unpacked: it holds a folder for each task, such as ``CoLA`` with ``train.tsv``.
        task: a key of ``FORMATS``.
        checkpoint: a folder that ``save_pretrained`` of ``transformers`` wrote, or a copy of a repository like
            microsoft/deberta-v3-base: configuration, weights, tokenizer. Nothing is downloaded. None: a network of
            DeBERTa-v3's base size with random weights, and a byte-pair encoding of the training sentences.
        length: in tokens; what is longer is cut, of a pair the longer sentence first.

    Raises:
        MissingData: a file is missing or is another one than it should be; the checkpoint cannot be loaded.
    """
    format = FORMATS[task]
    training = read(folder / format.folder / "train.tsv", format)
    scored = read(folder / format.folder / format.dev, format)
    tokenizer = _trained(training[0]) if checkpoint is None else _loaded("AutoTokenizer", checkpoint)
    train, test = (Sentences(*found, tokenizer, length) for found in (training, scored))
    outputs = len(format.labels) or 1

    def make() -> nn.Module:
        if checkpoint is None:
            return Logits(_deberta(len(tokenizer), outputs), *INPUTS)
        net = _loaded("AutoModelForSequenceClassification", checkpoint, num_labels=outputs)
        return Logits(net.float(), *INPUTS)  # some checkpoints are in half precision

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found = model(*batch.inputs)
        if format.labels:
            return cross_entropy(found, batch.targets, reduction="none"), found
        return mse_loss(found[:, 0], batch.targets, reduction="none"), found

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model, batch)[0].mean()

    return Task(train, test, make, loss, partial(_score, format), format.measure, losses)


@torch.no_grad()
def _score(format: Format, model: nn.Module, batches: Iterable[Batch]) -> float:
    found = [(model(*batch.inputs).float(), batch.targets) for batch in batches]
    outputs, targets = (torch.cat(part) for part in zip(*found, strict=True))
    return 100 * float(format.score(outputs, targets))


def _trained(sentences: list[tuple[str, ...]]) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = byte_pairs([text for row in sentences for text in row], MERGES)
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _deberta(vocabulary: int, outputs: int) -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    size: dict[str, Any] = {**BASE, "vocab_size": vocabulary, "num_labels": outputs}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**size))


def _loaded(auto: str, checkpoint: Path, **options: Any) -> Any:
    import transformers
    from safetensors import SafetensorError

    def has(name: str) -> bool:
        return (checkpoint / name).is_file()

    # Without any of the latter, transformers makes a tokenizer that knows no word.
    if not has("config.json") or not any(map(has, ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json"))):
        raise MissingData(
            f"the checkpoint {checkpoint} should be a folder with config.json, the weights, and tokenizer.json or the "
            "tokenizer's other files, such as a copy of microsoft/deberta-v3-base"
        )
    try:
        return getattr(transformers, auto).from_pretrained(str(checkpoint), local_files_only=True, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        way_out = "; to read spm.model, pip install sentencepiece protobuf" if not has("tokenizer.json") else ""
        raise MissingData(f"the checkpoint in {checkpoint} cannot be loaded: {error}{way_out}") from error
