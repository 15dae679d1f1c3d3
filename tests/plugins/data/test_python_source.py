"""The plugin as a run uses it."""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsplugins.contracts import EnvironmentUnfit, Layout
from dsplugins.plugins.data.python_source import PythonSource, PythonSourceOptions
from dsplugins.testing import JobFailed

SETTINGS = SimpleNamespace(vocab_size=320)
HERE = str(Path(__file__).parent)
INDICES = (0, 1, 7, 1000, 123456)


def source(**options):
    return PythonSource(PythonSourceOptions(**options))


@pytest.fixture
def tiny(corpus_folder):
    """The plugin over the tiny corpus, a fifth of it held out."""
    return lambda **options: source(directory=str(corpus_folder), **{"validation": 0.2, **options})


def digest_of(data):
    total = hashlib.sha256()
    for index in INDICES:
        total.update(data.train(index).numpy().tobytes())
    for index in range(3):
        total.update(data.validation(index).numpy().tobytes())
    return total.hexdigest()


def documents_of(data):
    """The training text of one epoch as documents, without the mark that ends each."""
    length = data.train(0).numel() - 1
    whole = data.facts["train_tokens"] // length
    # Samples are shuffled; put back in the stream's order, with the beginning of the rest behind them.
    found = {data._order[index]: data.train(index) for index in range(2 * whole)}
    stream = [token for index in range(whole + 1) for token in found[index][:-1].tolist()]
    return data.decode(stream[: data.facts["train_tokens"]]).split("<eos>")[:-1]


def test_same_index_same_tokens(tiny, plan):
    one, two = tiny().ds_data(plan()), tiny().ds_data(plan())
    forward = [one.train(index).tolist() for index in INDICES]
    backward = [two.train(index).tolist() for index in reversed(INDICES)]
    assert forward == backward[::-1]
    assert digest_of(one) == digest_of(two)


def test_another_process_reads_the_same(tiny, plan, corpus_folder):
    script = (
        "import sys, json, test_python_source as t\n"
        "from types import SimpleNamespace as N\n"
        "train, evaluate = N(seed=1, micro_batch=1), N(sequences=4)\n"
        "plan = N(data=N(seq_length=32), train=train, layout=N(data=1), evaluate=evaluate)\n"
        "data = t.source(directory=sys.argv[1], validation=0.2).ds_data(plan)\n"
        "print(json.dumps([t.digest_of(data), data.facts['digest'], data.baselines()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(corpus_folder)],
        env={"PYTHONPATH": ":".join([*sys.path, HERE]), "PYTHONHASHSEED": "17", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    data = tiny().ds_data(plan())
    assert json.loads(done.stdout) == [digest_of(data), data.facts["digest"], data.baselines()]


def test_samples_have_the_contracts_form(tiny, plan):
    import torch

    data = tiny().ds_data(plan(seq_length=24))
    for sample in (data.train(0), data.train(10**7), data.validation(0)):
        assert sample.dtype == torch.int64 and sample.shape == (25,)
        assert sample.min() >= 0 and sample.max() < data.vocab_size
    assert data.train(3)[-1] == data.train(4)[0]


def test_the_seed_moves_training_but_not_validation(tiny, plan):
    one, two = tiny().ds_data(plan(seed=1)), tiny().ds_data(plan(seed=2))
    assert one.train(0).tolist() != two.train(0).tolist()
    assert one.validation(0).tolist() == two.validation(0).tolist()
    assert one.facts == {**two.facts, "train_tokens": one.facts["train_tokens"]}


def test_an_epoch_holds_every_training_file_and_no_held_out_one(tiny, plan, corpus_folder):
    data = tiny(fim_rate=0.0).ds_data(plan())
    seen = documents_of(data)
    files = [path.read_text() for path in corpus_folder.glob("pkg*/module*.py")]
    held_out = set(files) - set(seen)
    assert len(seen) == len(set(seen)) == data.facts["train_files"]
    assert len(held_out) == data.facts["validation_files"] > 0
    assert set(seen) <= set(files)


def test_validation_is_held_out_and_never_turned(tiny, plan, corpus_folder):
    data = tiny(fim_rate=1.0).ds_data(plan(seq_length=1))
    text = {data.validation(i)[0].item() for i in range(data.validation_size)}
    assert not text & {257, 258, 259} and 256 in text
    trained = {data.train(i)[0].item() for i in range(data.facts["train_tokens"])}
    assert {257, 258, 259} <= trained
    assert data.validation_size == data.facts["validation_tokens"] - 1


def test_facts_add_up(tiny, plan, corpus_folder):
    facts = tiny(fim_rate=0.0).ds_data(plan()).facts
    size = sum(path.stat().st_size for path in corpus_folder.glob("pkg*/module*.py"))
    assert facts["train_files"] + facts["validation_files"] == 60
    assert facts["train_bytes"] + facts["validation_bytes"] == size
    assert facts["train_tokens"] == facts["train_bytes"] + facts["train_files"]
    json.dumps(facts)


def test_baselines_look_at_what_an_evaluation_looks_at(tiny, plan):
    few, many = (tiny().ds_data(plan(sequences=n)).baselines() for n in (1, 9))
    assert few != many
    assert all(value["bigram"] < value["unigram"] < 5.56 for value in (few, many)), "ln 260 is 5.56"
    assert tiny().ds_data(plan(sequences=0)).baselines() == {}
    # Two ranks with two sequences each take four at a time: the last three of seven are never looked at.
    seven = replace(plan(sequences=7), layout=Layout(world_size=2))
    seven = replace(seven, train=replace(seven.train, micro_batch=2))
    assert tiny().ds_data(seven).baselines() == tiny().ds_data(plan(sequences=4)).baselines()


def test_prompt_is_held_out_text(tiny, plan, corpus_folder):
    data = tiny(fim_rate=0.0).ds_data(plan(seq_length=64))
    tokens, rest = data.prompt()
    text = data.decode(tokens) + rest
    assert len(tokens) <= 48 and rest.startswith("(self")
    assert not any(text in document for document in documents_of(data))
    assert any(text in path.read_text() for path in corpus_folder.glob("pkg*/module*.py"))


def test_check_is_silent_about_a_good_plan(tiny, plan):
    assert list(tiny().ds_check(plan(), SETTINGS)) == []


@pytest.mark.parametrize(
    ("options", "wanted", "vocab_size", "key"),
    [
        ({}, {"seq_length": 0}, 320, "data.seq_length"),
        ({"validation": 0.0}, {"seq_length": 10**6, "sequences": 0}, 320, "data.seq_length"),
        ({"validation": 0.0}, {}, 320, "evaluate.sequences"),
        ({"max_bytes": 0}, {"sequences": 0}, 320, "data.seq_length"),
        ({}, {}, 259, "model.vocab_size"),
    ],
)
def test_check_names_the_key_and_a_remedy(tiny, plan, options, wanted, vocab_size, key):
    (problem,) = tiny(**options).ds_check(plan(**wanted), SimpleNamespace(vocab_size=vocab_size))
    assert problem.key == key and key in problem.message and problem.remedy
    assert problem.kind == "recipe"
    if key != "model.vocab_size":
        with pytest.raises(ValueError, match=key):
            tiny(**options).ds_data(plan(**wanted))


def test_every_rank_needs_validation_samples(tiny, plan):
    wide = replace(plan(sequences=4), layout=Layout(world_size=8))
    (problem,) = tiny().ds_check(wide, SETTINGS)
    assert problem.key == "evaluate.sequences" and "the 8 that all ranks" in problem.message
    enough = replace(wide, evaluate=replace(wide.evaluate, sequences=10**6))
    assert list(tiny().ds_check(enough, SETTINGS)) == [], "asked for more than there is: gets all"


def test_no_sources(tmp_path, plan):
    empty = source(directory=str(tmp_path))
    (problem,) = empty.ds_check(plan(), SETTINGS)
    assert problem.kind == "environment" and "no Python sources" in problem.message
    with pytest.raises(EnvironmentUnfit):
        empty.ds_data(plan())


def test_the_standard_library_loads_fast(plan):
    start = time.process_time()
    data = source().ds_data(plan(seq_length=256, sequences=64))
    seconds = time.process_time() - start
    assert seconds < 2, "of a processor, whoever else is busy"
    assert data.facts["train_bytes"] > 5_000_000
    baselines = data.baselines()
    assert 2.1 < baselines["bigram"] < 2.8 < 3.0 < baselines["unigram"] < 3.5
    tokens, rest = data.prompt()
    assert 96 <= len(tokens) <= 192 and rest


def load_own(folders, plan):
    import torch.distributed as dist

    data = source(directory=folders[dist.get_rank()]).ds_data(plan)
    return digest_of(data)


def test_ranks_agree(workers, plan, corpus_folder):
    first, second = workers(2).run(load_own, [str(corpus_folder)] * 2, plan(sequences=0))
    assert first == second


def test_ranks_with_other_files_stop(workers, plan, corpus_folder, tmp_path):
    import shutil

    other = shutil.copytree(corpus_folder, tmp_path / "other")
    (other / "pkg0" / "module0.py").write_text("changed = True\n")
    with pytest.raises(JobFailed, match=r"ranks \[1\] read other Python sources than rank 0"):
        workers(2).run(load_own, [str(corpus_folder), str(other)], plan(sequences=0))
