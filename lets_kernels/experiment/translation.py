"""Translation as in IWSLT'14: parallel text, a transformer with encoder and decoder, BLEU."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, log_softmax

from lets_kernels.experiment.task import Batch, MissingData, Task
from lets_kernels.experiment.texts import BEGIN, END, PAD, UNKNOWN, byte_pairs, lines

MERGES = 10_000
SMOOTHING = 0.1
#: Hypotheses that the search keeps for a sentence.
BEAM = 5
#: fairseq's transformer_iwslt_de_en; its dropout is what fairseq's command for IWSLT'14 sets.
WIDTH, HEADS, INNER, LAYERS, DROPOUT = 512, 4, 1024, 6, 0.3


def read(folder: Path, part: str, languages: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The sentences of ``train.de`` and ``train.en`` or the like.

    Files that are cut into pieces of words already are joined again (``@@``), and the tokenizer's ``&apos;`` and the
    like become characters.

    Raises:
        MissingData: a file is missing, or the two have different numbers of lines.
    """
    paths = [folder / f"{part}.{language}" for language in languages]
    others = [path.name for path in reversed(paths)]
    first, second = (
        lines(path, f"a sentence in each line, and {other} its translation in the same line")
        for path, other in zip(paths, others, strict=True)
    )
    if len(first) != len(second):
        raise MissingData(
            f"{paths[0]} has {len(first)} lines and {paths[1].name} {len(second)}: a line of one should be the "
            "translation of the same line of the other"
        )
    return [_plain(line) for line in first], [_plain(line) for line in second]


def _plain(line: str) -> str:
    return " ".join(html.unescape(line.replace("@@ ", "")).split())


class Pairs:
    """Sentences with their translations.

    A batch's inputs are the source with an end, and the target with a beginning; its targets the target with an end.
    All are int64 (n, longest), filled up with ``PAD``.
    """

    def __init__(self, sides: tuple[list[str], list[str]], tokenizer: Any) -> None:
        self.sides, self.tokenizer = sides, tokenizer

    def __len__(self) -> int:
        return len(self.sides[0])

    def batch(self, indices: Sequence[int], seed: int | None) -> Batch:
        """Nothing is random here."""
        source, target = (self._ids([side[index] for index in indices]) for side in self.sides)
        return Batch((source[:, 1:], target[:, :-1]), target[:, 1:])

    def _ids(self, sentences: list[str]) -> Tensor:
        return torch.tensor([found.ids for found in self.tokenizer.encode_batch(sentences)])


class Translator(nn.Module):
    """The transformer in the size of fairseq's transformer_iwslt_de_en: 31,543,296 weights, and 512 for each token.

    One matrix embeds source and target and makes the logits. Called with source (n, s) and target (n, t), int64, it
    gives logits (n, t, tokens): those at a place are of the token that comes next, from the target up to there.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, WIDTH, padding_idx=PAD)
        self.dropout = nn.Dropout(DROPOUT)
        options: dict[str, Any] = {"dropout": DROPOUT, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, **options), LAYERS, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, **options), LAYERS)
        self._as_in_fairseq()

    def _as_in_fairseq(self) -> None:
        """Initial weights, each layer its own; no dropout on attention nor within the feed-forward part."""
        for name, weights in self.named_parameters():
            if weights.dim() > 1:
                nn.init.xavier_uniform_(weights)
            elif name.endswith("bias"):
                nn.init.zeros_(weights)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD] = 0
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                module.dropout.p = 0.0

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.logits(self.decode(self.encode(source), source == PAD, target))

    def encode(self, source: Tensor) -> Tensor:
        """What the decoder attends to, (n, s, 512)."""
        return self.encoder(self._embedded(source), src_key_padding_mask=source == PAD)

    def decode(self, encoded: Tensor, padding: Tensor, target: Tensor) -> Tensor:
        """The states that the logits are made of, (n, t, 512); ``padding`` (n, s) is True where the source is none."""
        places = target.shape[1]
        later = torch.ones(places, places, dtype=torch.bool, device=target.device).triu(1)
        # The target's own padding comes last, so that this mask hides it from all that is not padding.
        return self.decoder(
            self._embedded(target), encoded, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=padding
        )

    def logits(self, states: Tensor) -> Tensor:
        return linear(states, self.embedding.weight)

    def _embedded(self, ids: Tensor) -> Tensor:
        """With sines and cosines of the place (Vaswani et al., 2017, §3.5; fairseq has all sines first)."""
        half = WIDTH // 2
        rates = torch.exp(torch.arange(half, device=ids.device) * (-math.log(10_000) / (half - 1)))
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * rates
        return self.dropout(math.sqrt(WIDTH) * self.embedding(ids) + torch.cat([angles.sin(), angles.cos()], 1))


@torch.no_grad()
def translate(model: Any, source: Tensor, beam: int = BEAM) -> Tensor:
    """Beam search: the translation with the highest mean log-probability of a token, int64 (n, longest).

    Args:
        model: a :class:`Translator`, or what has its ``encode``, ``decode`` and ``logits``.
        source: int64 (n, s); a translation has up to 1.2 s + 10 tokens, as in fairseq's command for IWSLT'14.
        beam: hypotheses that are kept for a sentence; with one, the search is greedy.
    """
    n = len(source)
    encoded = model.encode(source).repeat_interleave(beam, 0)
    padding = (source == PAD).repeat_interleave(beam, 0)
    ids = source.new_full((n * beam, 1), BEGIN)
    total = torch.full((n, beam), -math.inf, device=source.device)
    total[:, 0] = 0  # all begin alike: one of them is enough
    ended = torch.zeros(n * beam, dtype=torch.bool, device=source.device)
    first = torch.arange(n, device=source.device)[:, None] * beam
    for _ in range(int(1.2 * source.shape[1]) + 10):
        logs = log_softmax(model.logits(model.decode(encoded, padding, ids)[:, -1]).float(), 1)
        logs[:, [PAD, BEGIN, UNKNOWN]] = -math.inf
        logs[ended] = -math.inf
        logs[ended, PAD] = 0  # a translation that is over stays as it is
        tokens = logs.shape[1]
        total, chosen = (total[:, :, None] + logs.view(n, beam, tokens)).flatten(1).topk(beam)
        past = (first + chosen // tokens).flatten()
        ids = torch.cat([ids[past], (chosen % tokens).view(-1, 1)], 1)
        ended = ended[past] | (ids[:, -1] == END)
        if ended.all():
            break
    lengths = (ids[:, 1:] != PAD).sum(1).view(n, beam)
    return ids[first[:, 0] + (total / lengths).argmax(1), 1:]


def translation(folder: Path, source: str = "de", target: str = "en") -> Task:
    """A parallel text, as fairseq's preparation of IWSLT'14 leaves it, scored on its test files.

    Both languages share a byte-pair encoding with 10,000 merges of the training files. The loss is the mean over the
    target's tokens, with labels smoothed by 0.1; that of a sentence is its part in it, times the number of sentences.
    The score is BLEU (sacreBLEU's, ``13a``) of a beam search with five hypotheses.

    It differs from fairseq: a batch has a number of sentences, not of tokens; the source shares the target's tokens and
    embedding, where fairseq's command for IWSLT'14 has a dictionary for each language; BLEU is of plain text, not of
    the files' tokens. A character that the training files do not have is left out of the text that is compared.

    Args:
        folder: it holds ``train.de``, ``train.en``, ``test.de`` and ``test.en``. ``valid`` is not read: the network is
            scored as the last epoch leaves it.
        source: the language that is translated, as the files' names end.
        target: the language that it is translated to.

    Raises:
        MissingData: a file is missing, or the two of a pair have different numbers of lines.
    """
    training, tested = (read(folder, part, (source, target)) for part in ("train", "test"))
    tokenizer = byte_pairs(training[0] + training[1], MERGES)
    tokenizer.enable_padding(pad_id=PAD)

    def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(*batch.inputs)
        each = _cross_entropy(outputs, batch.targets, "none").view(batch.targets.shape).sum(1)
        return each * len(each) / (batch.targets != PAD).sum(), outputs

    def score(model: nn.Module, batches: Iterable[Batch]) -> float:
        from torchmetrics.functional.text import sacre_bleu_score

        found: list[str] = []
        wanted: list[list[str]] = []
        for batch in batches:
            found += tokenizer.decode_batch(translate(model, batch.inputs[0]).tolist())
            wanted += [[text] for text in tokenizer.decode_batch(batch.targets.tolist())]
        return 100 * float(sacre_bleu_score(found, wanted, tokenize="13a"))

    return Task(
        Pairs(training, tokenizer),
        Pairs(tested, tokenizer),
        lambda: Translator(tokenizer.get_vocab_size()),
        lambda model, batch: _cross_entropy(model(*batch.inputs), batch.targets, "mean"),
        score,
        "test BLEU",
        losses,
    )


def _cross_entropy(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return cross_entropy(
        outputs.flatten(0, 1),
        targets.flatten(),
        ignore_index=PAD,
        label_smoothing=SMOOTHING,
        reduction=reduction,
    )
