"""GLUE and translation of `lets-kernels experiment`: the real formats are read, others refused; networks and scores."""

import itertools
import json
import math
import socket

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from lets_kernels import SAM
from lets_kernels.experiment import glue as glue_module
from lets_kernels.experiment import translation as translation_module
from lets_kernels.experiment.glue import BASE, FORMATS, glue, read
from lets_kernels.experiment.networks import Logits
from lets_kernels.experiment.task import Batch, MissingData
from lets_kernels.experiment.texts import BEGIN, END, PAD, SPECIAL, byte_pairs, lines
from lets_kernels.experiment.toy_texts import write_glue, write_translation
from lets_kernels.experiment.translation import Translator, translate, translation
from support.lengths import at_length

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "pooler_hidden_size": 16}


@pytest.fixture
def small(monkeypatch):
    """Networks that are as the real ones but for their size."""
    monkeypatch.setattr(glue_module, "BASE", {**BASE, **SMALL, "num_hidden_layers": 1})
    for name, value in {"WIDTH": 32, "HEADS": 2, "INNER": 64, "LAYERS": 1}.items():
        monkeypatch.setattr(translation_module, name, value)


class Told(nn.Module):
    """Gives what it is told, batch by batch."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *inputs):
        return next(self.outputs)


def scored(task, outputs):
    """The task's score if the network says this about the test set, in two batches."""
    parts = [[0], list(range(1, len(task.test)))]
    outputs = torch.tensor(outputs)
    return task.score(Told([outputs[part] for part in parts]), [task.test.batch(part, None) for part in parts])


# ---- GLUE: files -----------------------------------------------------------------------------------------------------

# Files as the archive has them, with the lines that an editor would not show: (task, file, header, rows, sentences,
# targets), and what a network says of these rows with the score that this makes.
ONE_RIGHT_OF_TWO = ([[1.0, 0.0], [1.0, 0.0]], 50.0)
ARCHIVE = {
    "cola": (
        "CoLA/{}.tsv",
        None,
        ["gj04\t1\t\tSarah said \"it's so.", "bc01\t0\t*\tThey drank the pub.", "bc01\t1\t\tWe yelled."],
        [("Sarah said \"it's so.",), ("They drank the pub.",), ("We yelled.",)],
        [1, 0, 1],
        # One of two acceptable ones and the other are said to be right: tp 1, fp 0, fn 1, tn 1.
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], 100 * (1 * 1 - 0 * 1) / math.sqrt(1 * 2 * 1 * 2)),
    ),
    "sst2": (
        "SST-2/{}.tsv",
        "sentence\tlabel",
        ["hide new secretions \t0", '" a " gem \t1'],
        [("hide new secretions ",), ('" a " gem ',)],
        [0, 1],
        ONE_RIGHT_OF_TWO,
    ),
    "mrpc": (
        "MRPC/{}.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t10\t11\tHe said "no\tHe " said no', "0\t12\t13\tOne .\tTwo ."],
        [('He said "no', 'He " said no'), ("One .", "Two .")],
        [1, 0],
        ONE_RIGHT_OF_TWO,
    ),
    "stsb": (
        "STS-B/{}.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        [
            f"{i}\tmain\tMSR\t2012\t0\tnone\tnone\ta{i}\tb{i}\t{score}"
            for i, score in enumerate(("5.000", "3.8", "0.2"))
        ],
        [("a0", "b0"), ("a1", "b1"), ("a2", "b2")],
        [5.0, 3.8, 0.2],
        # The order is right. Pearson: deviations (2, 0.8, -2.8) and (1, 0, -1): 4.8/sqrt(12.48 * 2).
        ([[3.0], [2.0], [1.0]], 100 * (1 + 4.8 / math.sqrt(12.48 * 2)) / 2),
    ),
    "qqp": (
        "QQP/{}.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\tWhy?\tHow\x85so?\t0", "4\t5\t6\tWho?\tWho is it?\t1"],
        [("Why?", "How\x85so?"), ("Who?", "Who is it?")],
        [0, 1],
        ONE_RIGHT_OF_TWO,
    ),
    "mnli": (
        "MNLI/{}.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            f"{i}\t1\t1e\tgov\t( a )\t( b )\t(X a)\t(X b)\ta{i}\tb{i}\tneutral\t{label}"
            for i, label in enumerate(("contradiction", "entailment", "neutral"))
        ],
        [("a0", "b0"), ("a1", "b1"), ("a2", "b2")],
        [2, 0, 1],
        ([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 200 / 3),
    ),
    "qnli": (
        "QNLI/{}.tsv",
        "index\tquestion\tsentence\tlabel",
        ["0\tWho?\tNobody.\tnot_entailment", "1\tWhen?\tIn 1999.\tentailment"],
        [("Who?", "Nobody."), ("When?", "In 1999.")],
        [1, 0],
        ONE_RIGHT_OF_TWO,
    ),
    "rte": (
        "RTE/{}.tsv",
        "index\tsentence1\tsentence2\tlabel",
        ["0\tIt rains.\tIt is wet.\tentailment", "1\tIt rains.\tIt snows.\tnot_entailment"],
        [("It rains.", "It is wet."), ("It rains.", "It snows.")],
        [0, 1],
        ONE_RIGHT_OF_TWO,
    ),
}


def written(folder, name):
    """The task's files in a folder; returns the path of the one to train on."""
    place, header, rows, *_ = ARCHIVE[name]
    for part in ("train", "dev_matched" if name == "mnli" else "dev"):
        path = folder / place.format(part)
        path.parent.mkdir(exist_ok=True)
        head = [] if header is None else [header]
        if part == "dev_matched":  # this file has the labels of five people
            head = [header.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")]
            rows = [row.replace("\tneutral\t", "\tneutral\t-\t-\t-\t-\t", 1) for row in rows]
        path.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8", newline="\n")
    return folder / place.format("train")


def test_all_tasks_have_an_example():
    assert ARCHIVE.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ARCHIVE)
def test_a_task_reads_its_format_and_scores_as_glue_does(tmp_path, name):
    written(tmp_path, name)
    *_, sentences, targets, (outputs, score) = ARCHIVE[name]
    task = glue(tmp_path, name, None)
    for source in (task.train, task.test):
        assert source.sentences == sentences and len(source) == len(sentences)
        assert torch.equal(source.targets, torch.tensor(targets))
    assert scored(task, outputs) == pytest.approx(score, rel=1e-5)  # float32
    best = [[x] for x in targets] if name == "stsb" else torch.eye(len(FORMATS[name].labels))[targets].tolist()
    assert scored(task, best) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_toy_files_have_the_format_and_every_label(tmp_path, name):
    write_glue(tmp_path, name, samples=64)
    task = glue(tmp_path, name, None)
    assert (len(task.train), len(task.test)) == (64, 16)
    for source in (task.train, task.test):
        labels, counts = source.targets.unique(return_counts=True)
        assert len(labels) == (len(FORMATS[name].labels) or 4) and counts.max() - counts.min() <= 1
    first = [line.split("\t") for line in lines(tmp_path / FORMATS[name].folder / "train.tsv", "")]
    written(tmp_path, name)
    real = lines(tmp_path / FORMATS[name].folder / "train.tsv", "")[0].split("\t")
    assert len({*map(len, first), len(real)}) == 1 and (name == "cola" or first[0] == real)
    again = tmp_path / "again"
    write_glue(again, name, samples=64)
    assert lines(again / FORMATS[name].folder / "train.tsv", "") == ["\t".join(row) for row in first]


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (
            "cola",
            lambda text: None,
            r"no file .*CoLA/train.tsv: it should hold the 4 columns source, label, star",
        ),
        ("rte", lambda text: None, r"no file .*: it should hold a header with the columns sentence1, sentence2, label"),
        (
            "sst2",
            lambda text: "",
            r"empty: it should hold a header with the columns sentence, label",
        ),
        ("sst2", lambda text: text.splitlines()[0], "no line below its header"),
        ("mnli", lambda text: text.replace("gold_label", "label"), "no column gold_label"),
        ("qqp", lambda text: text.replace("\t", ","), "no column question1, question2, is_duplicate"),
        (
            "qnli",
            lambda text: text.replace("not_ent", "not-ent"),
            r"line 2: label is 'not-entailment', and should be one",
        ),
        (
            "stsb",
            lambda text: text.replace("3.8", "high"),
            r"line 3: score is 'high', and should be a number",
        ),
        ("rte", lambda text: text.replace("\tIt snows.", ""), r"1 lines have less than 4 columns, the first is line 3"),
        ("rte", lambda text: text.replace("It snows.", "It\rsnows."), r"line 3: .*new-line.*the file should hold"),
        ("rte", lambda text: text.encode("utf-16"), r"not UTF-8"),
    ],
)
def test_another_file_is_refused_in_words(tmp_path, name, damage, message):
    path = written(tmp_path, name)
    damaged = damage(path.read_text(encoding="utf-8"))
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(MissingData, match=message) as caught:
        glue(tmp_path, name, None)
    assert str(path) in str(caught.value)
    assert "should be" in message or f"the folder {FORMATS[name].folder} of GLUE's archive" in str(caught.value)


def test_a_few_lines_that_break_off_are_left_out(tmp_path):
    path = written(tmp_path, "qqp")
    whole = path.read_text()
    path.write_text(whole + "7\t8\t9\tWhere?\tWhere?\t1\n" * 98 + "10\t11\t12\tWhen\n")
    assert len(read(path, FORMATS["qqp"])[0]) == 100


# ---- GLUE: batches, loss, network ------------------------------------------------------------------------------------


def test_a_pair_becomes_ids_with_types_as_long_as_the_longest(tmp_path):
    write_glue(tmp_path, "rte")
    task = glue(tmp_path, "rte", None, length=9)
    tokenizer = task.train.tokenizer
    (ids, mask, types), targets = task.train.batch([3, 0], seed=5)
    assert targets.tolist() == [1, 0] and ids.shape == mask.shape == types.shape == (2, 9)  # 13 tokens, cut
    text = " ".join(tokenizer.convert_ids_to_tokens(ids[1].tolist()))
    first, second = task.train.sentences[0]
    assert first == second
    words = ["▁" + word for word in first.split()][:3]
    assert text.split() == ["[CLS]", *words, "[SEP]", *words, "[SEP]"]
    assert types[1].tolist() == [0] * 5 + [1] * 4 and mask.all()
    task.train.sentences[0] = ("the cat", "the")
    (ids, mask, _), _ = task.train.batch([3, 0], seed=None)
    assert ids.shape == (2, 9) and ids[1, 6:].tolist() == [PAD] * 3 and mask[1].tolist() == [1] * 6 + [0] * 3
    assert all(
        torch.equal(a, b) for a, b in zip(*(task.train.batch([1, 2], seed).inputs for seed in (0, 1)), strict=True)
    )


def test_padding_does_not_change_logits(tmp_path, small):
    write_glue(tmp_path, "rte")
    task = glue(tmp_path, "rte", None)
    task.train.sentences[0] = ("the cat", "the")
    model = task.network().eval()
    with torch.no_grad():
        alone, beside = model(*task.train.batch([0], None).inputs), model(*task.train.batch([0, 1], None).inputs)
    # Sums of at most 32 terms of order one in another order: some roundings of float32.
    torch.testing.assert_close(beside[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, expected", [("mnli", [math.log(3)] * 2), ("stsb", [25.0, 16.0])])
def test_the_loss_of_each_sample_and_of_the_batch(tmp_path, name, expected):
    """All logits 0: log 3 for three classes; the squares of the scores 5 and 4."""
    write_glue(tmp_path, name)
    task = glue(tmp_path, name, None)
    outputs = torch.zeros(2, len(FORMATS[name].labels) or 1)
    losses, found = task.losses(Told([outputs]), task.train.batch([0, 1], None))
    assert found is outputs and losses.tolist() == pytest.approx(expected)
    assert float(task.loss(Told([outputs]), task.train.batch([0, 1], None))) == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("name, outputs", [("sst2", 2), ("mnli", 3), ("stsb", 1)])
def test_the_network_has_the_weights_of_deberta_v3_base(tmp_path, name, outputs):
    """By hand, with width d = 768. A layer: four matrices of attention with biases, 4 (d² + d); two layer norms,
    4 d; d to 3072 and back, 2·3072 d + 3072 + d: 7,087,872. Twelve of them; relative positions, 512 d, with a norm,
    2 d; words, V d, with a norm, 2 d; the pooler, d² + d; a row of the classifier, d + 1.
    """
    d = 768
    layer = 4 * (d * d + d) + 4 * d + 2 * 3072 * d + 3072 + d
    assert layer == 7_087_872
    write_glue(tmp_path, name)
    task = glue(tmp_path, name, None)
    words = len(task.train.tokenizer)
    expected = 12 * layer + 512 * d + 2 * d + words * d + 2 * d + d * d + d + outputs * (d + 1)
    with torch.device("meta"):
        model = task.network()
    assert isinstance(model, Logits) and sum(p.numel() for p in model.parameters()) == expected


def two_steps(task, base, source):
    """The losses of two steps of SAM on the first two samples."""
    torch.manual_seed(0)
    model = task.network()
    optimizer = SAM(model.parameters(), base, rho=0.05, lr=1e-4)
    batch = source.batch([0, 1], None)
    before = [p.detach().clone() for p in itertools.islice(model.parameters(), 8)]

    def closure():
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses) and optimizer.metrics()["skipped_steps"] == 0
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=False))
    return losses


def test_two_steps_of_sam_on_deberta(tmp_path, monkeypatch):
    """At length all twelve layers, otherwise two of this width."""
    monkeypatch.setattr(glue_module, "BASE", {**BASE, "num_hidden_layers": at_length(12, 2)})
    write_glue(tmp_path, "mrpc")
    task = glue(tmp_path, "mrpc", None, length=16)
    two_steps(task, torch.optim.AdamW, task.train)


def test_initial_weights_and_steps_follow_from_the_seed(tmp_path, small):
    write_glue(tmp_path, "cola")
    write_translation(tmp_path)
    for make in (lambda: glue(tmp_path, "cola", None), lambda: translation(tmp_path)):
        first, second = (two_steps(task, torch.optim.Adam, task.train) for task in (make(), make()))
        assert first == second


# ---- GLUE: a checkpoint ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, small):
    """A folder as transformers writes it, in half precision as DeBERTa-v3's is, with four outputs no task has."""
    write_glue(tmp_path, "rte")
    task = glue(tmp_path, "rte", None)
    folder = tmp_path / "checkpoint"
    task.network().net.half().save_pretrained(folder)
    task.train.tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_brings_network_and_tokenizer_and_no_connection_is_made(tmp_path, checkpoint, monkeypatch):
    def refused(*arguments):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    own, task = glue(tmp_path, "rte", None), glue(tmp_path, "rte", checkpoint)
    for a, b in zip(own.train.batch([0, 1], None).inputs, task.train.batch([0, 1], None).inputs, strict=True):
        assert torch.equal(a, b)
    from safetensors.torch import load_file

    saved, model = load_file(checkpoint / "model.safetensors"), task.network()
    found = model.net.state_dict()
    assert found.keys() == saved.keys()
    assert all(found[k].dtype == torch.float32 and torch.equal(found[k], saved[k].float()) for k in saved)
    assert model(*task.train.batch([0, 1], None).inputs).shape == (2, 2)


@pytest.mark.parametrize(
    "missing, message",
    [
        (["config.json"], "should be a folder with config.json, the weights, and tokenizer.json"),
        (
            ["tokenizer.json", "tokenizer_config.json"],
            "the weights, and tokenizer.json or the",
        ),
        (["model.safetensors"], "cannot be loaded: .*no file named model.safetensors"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_words(tmp_path, checkpoint, missing, message):
    for name in missing:
        (checkpoint / name).unlink()
    with pytest.raises(MissingData, match=message) as caught:
        glue(tmp_path, "rte", checkpoint).network()
    assert str(checkpoint) in str(caught.value)


def test_weights_that_are_none_are_refused_in_words(tmp_path, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"none")
    with pytest.raises(MissingData, match="cannot be loaded"):
        glue(tmp_path, "rte", checkpoint).network()


# ---- translation: files and batches ----------------------------------------------------------------------------------


@pytest.fixture
def parallel(tmp_path):
    write_translation(tmp_path, sentences=64)
    return tmp_path


def test_a_parallel_text_is_read_with_its_pieces_joined(parallel):
    (parallel / "test.de").write_text("das ist pf@@ er@@ d &apos;s &amp; so\r\n ja  \n", encoding="utf-8", newline="\n")
    (parallel / "test.en").write_text("it\u2028is\nyes\n", encoding="utf-8", newline="\n")
    task = translation(parallel)
    assert task.test.sides == (["das ist pferd 's & so", "ja"], ["it is", "yes"])
    assert len(task.train) == 64 and len(task.train.sides[1]) == 64
    turned = translation(parallel, "en", "de")
    assert turned.train.sides == (task.train.sides[1], task.train.sides[0])


def test_a_batch_has_the_source_and_the_target_shifted_by_one(parallel):
    (parallel / "train.de").write_text("katze\nhund das katze\n")
    (parallel / "train.en").write_text("the cat\ncat\n")
    source = translation(parallel).train
    number = {text: source.tokenizer.token_to_id("▁" + text) for text in ("katze", "hund", "das", "the", "cat")}
    (read_, given), targets = source.batch([0, 1], seed=3)
    assert read_.tolist() == [
        [number["katze"], END, PAD, PAD],
        [number["hund"], number["das"], number["katze"], END],
    ]
    assert given.tolist() == [[BEGIN, number["the"], number["cat"]], [BEGIN, number["cat"], END]]
    assert targets.tolist() == [[number["the"], number["cat"], END], [number["cat"], END, PAD]]
    assert source.tokenizer.decode_batch(targets.tolist()) == ["the cat", "cat"]


def test_the_encoding_has_so_many_merges_and_is_the_same_each_time(parallel):
    sentences = [*lines(parallel / "train.de", ""), *lines(parallel / "train.en", "")]
    first, second = byte_pairs(sentences, 40), byte_pairs(sentences, 40)
    assert first.to_str() == second.to_str()
    assert len(json.loads(first.to_str())["model"]["merges"]) == 40
    letters = set("".join(sentences)) - {" "}
    assert first.get_vocab_size() == len(SPECIAL) + len(letters) + 1 + 40  # one marks where a word begins
    assert [first.token_to_id(name) for name in SPECIAL] == [0, 1, 2, 3]
    assert first.decode(first.encode(sentences[0]).ids) == sentences[0]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("train.de", None, r"no file .*train.de: it should hold a sentence in each line, and train.en its translation"),
        ("test.en", None, r"no file .*test.en: it should hold .* and test.de its translation in the same line"),
        ("test.en", "one\n", r"test.de has 16 lines and test.en 1"),
        ("train.en", "", r"train.en is empty"),
    ],
)
def test_no_parallel_text_is_refused_in_words(parallel, name, text, message):
    (parallel / name).unlink()
    if text is not None:
        (parallel / name).write_text(text)
    with pytest.raises(MissingData, match=message):
        translation(parallel)


# ---- translation: network, loss, search, score -----------------------------------------------------------------------


def test_the_network_has_the_weights_of_fairseqs():
    """By hand, d = 512. Attention: 4 (d² + d) = 1,050,624; d to 1024 and back with biases: 1,050,112; a norm: 2 d. An
    encoder layer has one attention and two norms, a decoder layer two and three; one matrix for all words. fairseq's
    own, with its two dictionaries of 8,848 and 6,632 words, has 39,469,056.
    """
    attention, forward, norm = 4 * (512 * 512 + 512), 2 * 512 * 1024 + 1024 + 512, 2 * 512
    layers = 6 * (attention + forward + 2 * norm) + 6 * (2 * attention + forward + 3 * norm)
    assert layers == 31_543_296 == 39_469_056 - 512 * (8_848 + 6_632)
    with torch.device("meta"):
        model = Translator(10_000)
    assert sum(p.numel() for p in model.parameters()) == layers + 512 * 10_000
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert set(dropout) == {0.0, 0.3} and dropout.count(0.0) == 12
    assert {module.dropout for module in model.modules() if isinstance(module, nn.MultiheadAttention)} == {0.0}


def test_two_steps_of_sam_on_the_real_translator(parallel):
    task = translation(parallel)
    two_steps(task, torch.optim.Adam, task.train)


@pytest.mark.parametrize("gradients", [True, False])  # without them torch takes other kernels
def test_logits_see_neither_later_tokens_nor_padding(small, gradients):
    model = Translator(20).eval()
    source, target = torch.randint(4, 20, (2, 5)), torch.randint(4, 20, (2, 6))
    with torch.set_grad_enabled(gradients):
        before = model(source, target)
        for place in range(6):
            changed = target.clone()
            changed[:, place] = (target[:, place] - 3) % 16 + 4
            after = model(source, changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.isclose(after[:, place:], before[:, place:]).all(2).any()
        padded = torch.cat([source, torch.full((2, 3), PAD)], 1), torch.cat([target, torch.full((2, 2), PAD)], 1)
        # Sums of 64 terms of order one in another order: some roundings of float32.
        torch.testing.assert_close(model(*padded)[:, :6], before, rtol=1e-5, atol=1e-5)
        assert not torch.isclose(model(source.flip(1), target), before).all(2).any()  # positions count


def test_layers_begin_with_weights_of_their_own():
    model = Translator(10)
    first, second = (layer.linear1.weight for layer in model.encoder.layers[:2])
    assert not torch.equal(first, second) and not model.embedding.weight[PAD].any()
    assert not any(weights.any() for name, weights in model.named_parameters() if name.endswith("bias"))


def test_the_loss_is_the_mean_over_tokens_with_smoothed_labels(parallel):
    """By the formula: 0.9 of the target's −log p and 0.1 of the mean of all −log p, of all tokens but padding."""
    task = translation(parallel)
    batch = task.train.batch(list(range(8)), None)
    assert (batch.targets == PAD).any()
    outputs = torch.randn(*batch.targets.shape, 30, dtype=torch.float64)
    targets = batch.targets % 30
    targets[batch.targets == PAD] = PAD
    batch = Batch(batch.inputs, targets)
    logs = -log_softmax(outputs, 2)
    each = 0.9 * logs.gather(2, targets[:, :, None])[:, :, 0] + 0.1 * logs.mean(2)
    counted = targets != PAD
    expected = float(each[counted].mean())
    assert float(task.loss(Told([outputs]), batch)) == pytest.approx(expected, rel=1e-12)
    losses, found = task.losses(Told([outputs]), batch)
    assert found is outputs and losses.shape == (8,) and float(losses.mean()) == pytest.approx(expected, rel=1e-12)
    assert float(losses[2]) == pytest.approx(float(each[2][counted[2]].sum() * 8 / counted.sum()), rel=1e-12)


class Knows:
    """A translator with the translations at hand: each next token is certain, or has the probabilities given."""

    def __init__(self, following, tokens=12):
        self.following, self.tokens = following, tokens

    def encode(self, source):
        return source

    def decode(self, encoded, padding, target):
        assert torch.equal(padding, encoded == PAD)
        states = torch.full((*target.shape, self.tokens), -100.0)
        for i, row in enumerate(target.tolist()):
            said = tuple(token for token in row[1:] if token not in (PAD, END))
            for token, share in self.following(tuple(encoded[i].tolist()), said).items():
                states[i, -1, token] = math.log(share)
        return states

    def logits(self, states):
        return states


def test_a_perfect_translator_has_a_bleu_of_100(parallel):
    task = translation(parallel)
    batches = [task.test.batch(part, None) for part in ([0, 1, 2], [3, 4])]
    answers = {
        tuple(row): [token for token in wanted if token != PAD]
        for batch in batches
        for row, wanted in zip(batch.inputs[0].tolist(), batch.targets.tolist(), strict=True)
    }
    tokens = task.train.tokenizer.get_vocab_size()

    def next_one(source, said, most=50):
        return {answers[source][len(said)] if len(said) < min(most, len(answers[source])) else END: 1.0}

    perfect = Knows(next_one, tokens)
    assert task.score(perfect, batches) == pytest.approx(100, rel=1e-6)
    terse = Knows(lambda source, said: next_one(source, said, most=3), tokens)
    assert 0 <= task.score(terse, batches) < 90


def test_the_search_finds_what_a_greedy_one_misses():
    """First 4 (0.6) or 5 (0.4); after 4 five tokens are equally likely, after 5 one is sure."""
    tree = {(): {4: 0.6, 5: 0.4}, (4,): dict.fromkeys(range(6, 11), 0.2), (5,): {7: 1.0}}
    model = Knows(lambda source, said: tree.get(said, {END: 1.0}))
    source = torch.tensor([[4, END], [5, END]])
    assert translate(model, source, beam=1)[:, 0].tolist() == [4, 4]
    assert translate(model, source).tolist() == [[5, 7, END]] * 2


def test_the_search_divides_by_the_length_and_ends():
    """(4) has probability 0.5 in two tokens with the end; (5, 5, 5) has 0.45 in four: the better mean."""
    tree = {(): {4: 0.5, 5: 0.45, 6: 0.05}, (5,): {5: 1.0}, (5, 5): {5: 1.0}}
    model = Knows(lambda source, said: tree.get(said, {END: 1.0}))
    assert translate(model, torch.tensor([[4, END]])).tolist() == [[5, 5, 5, END]]
    endless = Knows(lambda source, said: {4: 1.0})
    assert translate(endless, torch.tensor([[4, 4, 4, 4, END]])).shape == (1, 16)  # 1.2 · 5 + 10


def test_the_search_keeps_a_translation_that_is_over_as_it_is():
    """(5) has 0.4 in two tokens. It is second when it ends, and first when (4, 6) with 0.6 becomes four of 0.15."""
    tree = {(): {4: 0.6, 5: 0.4}, (4,): {6: 1.0}, (4, 6): dict.fromkeys(range(7, 11), 0.25)}
    model = Knows(lambda source, said: tree.get(said, {END: 1.0}))
    assert translate(model, torch.tensor([[4, END]])).tolist() == [[5, END, PAD, PAD]]


def test_a_small_translator_learns_the_toy_text(tmp_path, small, monkeypatch):
    """What it is taught in parallel is what the search asks for one by one."""
    monkeypatch.setattr(translation_module, "WIDTH", 64)
    monkeypatch.setattr(translation_module, "DROPOUT", 0.0)
    write_translation(tmp_path, sentences=128)
    task = translation(tmp_path)
    model = task.network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.01, lr=5e-3)
    for step in range(80):
        batch = task.train.batch([(32 * step + i) % 128 for i in range(32)], None)

        def closure():
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert task.score(model.eval(), [task.test.batch(list(range(32)), None)]) > 80
