"""What texts need before they are trained on: lines of a file, and words as numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lets_kernels.experiment.task import MissingData

#: The tokens that are no text; their numbers are their places.
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
PAD, BEGIN, END, UNKNOWN = range(4)


def lines(path: Path, holds: str) -> list[str]:
    """The lines of a UTF-8 file; ``holds`` says, for the error, what should be in it.

    Raises:
        MissingData: there is no such file, it is empty, or it is no text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # some rare characters end a line for Python alone
            found = [line.rstrip("\r\n") for line in file]
    except FileNotFoundError:
        raise MissingData(f"there is no file {path}: it should hold {holds}") from None
    except UnicodeDecodeError as error:
        raise MissingData(f"{path} is not UTF-8 ({error}): it should hold {holds}") from None
    if not found:
        raise MissingData(f"{path} is empty: it should hold {holds}")
    return found


def byte_pairs(sentences: Sequence[str], merges: int) -> Any:
    """A ``tokenizers.Tokenizer`` made from the sentences: their characters, and ``merges`` of the most frequent pair.

    The same sentences give the same one. It frames what it encodes: [CLS], text, [SEP], and for a pair another text,
    [SEP], the latter two of type 1. A character that the sentences do not have becomes [UNK].
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as Joined
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = Metaspace()  # a word begins with a mark in place of the space, which counts as a letter
    tokenizer.decoder = Joined()
    letters = set().union(*sentences) - {" "} | {"▁"}
    size = len(SPECIAL) + len(letters) + merges
    trainer = BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)],
    )
    return tokenizer
