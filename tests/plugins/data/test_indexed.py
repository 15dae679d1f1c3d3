"""Corpora through megatron-core's datasets: pure, whole, blended, split, the same on every rank."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from runs import TINY

from dsplugins.contracts import EnvironmentUnfit, Layout
from dsplugins.corpora import sidecar
from dsplugins.corpora.tokenizer import V3_MARKS
from dsplugins.plugins.data.indexed import Indexed
from dsplugins.plugins.data.indexed_mixture import Mixture
from dsplugins.plugins.data.indexed_options import IndexedOptions, Weighed
from dsplugins.schedules import Schedule

SETTINGS = SimpleNamespace(vocab_size=512)
S = 16


def texts(word, count=40):
    """Documents of one corpus, every one different."""
    return [f"{word} {i}: " + f"{word} says {i * i}. " * (1 + i % 5) for i in range(count)]


@pytest.fixture
def web(corpus):
    return corpus("web", texts("web"), fim_rate=0.0)


@pytest.fixture
def code(corpus):
    return corpus("code", texts("code", 25), fim_rate=0.2)


@pytest.fixture
def planned(plan, tmp_path):
    """`planned(steps=, ...)`: a plan of a run in `tmp_path` that takes 8 samples a step."""

    def make(steps=5, tokens=None, seq_length=S, **more):
        made = plan(seq_length=seq_length, **more)
        train = replace(made.train, steps=steps, tokens=tokens, global_batch=Schedule.constant(8))
        return replace(made, train=train, run=replace(made.run, directory=str(tmp_path / "run")))

    return make


def plugin(*train, **options):
    items = tuple(item if isinstance(item, Weighed) else str(item) for item in train)
    return Indexed(IndexedOptions(train=items, **{"split": (3, 1), **options}))


def documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    read = IndexedDataset(str(prefix))
    return [read[i].tolist() for i in range(len(read))]


def core_datasets(prefixes, weights, sizes, seed, cache):
    """What megatron-core's own builder makes: training and validation."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=S,
        blend=([str(prefix) for prefix in prefixes], weights),
        split="3,1",
        tokenizer=SimpleNamespace(unique_identifiers={}, vocab_size=512, eod=511),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(cache),
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[:2]


def samples(dataset, count):
    return [[*dataset[i]["tokens"].tolist(), int(dataset[i]["labels"][-1])] for i in range(count)]


# -- one corpus -----------------------------------------------------------------------------------


def test_a_pass_is_what_megatrons_builder_makes(web, planned, tmp_path):
    data = plugin(web).ds_data(planned(seed=3))
    train, _ = core_datasets([web], None, [None] * 3, 3, tmp_path / "cache")
    assert len(train) > 50
    assert [data.train(i).tolist() for i in range(len(train))] == samples(train, len(train))
    again, _ = core_datasets([web], None, [None] * 3, 4, tmp_path / "cache")
    second = [data.train(len(train) + i).tolist() for i in range(len(train))]
    assert second == samples(again, len(again)), "the second pass: seed + 1"
    _, validation = core_datasets([web], None, [None] * 3, 0, tmp_path / "cache")
    held_out = [data.validation(i).tolist() for i in range(data.validation_size)]
    assert held_out == samples(validation, len(validation))


def test_a_pass_holds_every_training_document_once(web, planned):
    data = plugin(web).ds_data(planned())
    whole = documents(web)
    stream = [token for tokens in whole[:30] for token in tokens]
    count = (len(stream) - 1) // S
    for first in (0, count, 7 * count):
        read = np.concatenate([data.train(first + i)[:-1].numpy() for i in range(count)])
        left = np.bincount(stream, minlength=512) - np.bincount(read, minlength=512)
        assert left.min() >= 0 and left.sum() == len(stream) - count * S <= S, "all but the last part sample"


def test_samples_have_the_contracts_form(web, planned):
    data = plugin(web).ds_data(planned())
    for sample in (data.train(0), data.train(10**7), data.validation(0)):
        assert sample.dtype == torch.int64 and sample.shape == (S + 1,)
        assert sample.min() >= 0 and sample.max() < data.vocab_size == 512
    for index in (-1, data.validation_size):
        with pytest.raises(IndexError):
            data.validation(index)


def test_documents_follow_each_other_through_their_ends(web, planned):
    data = plugin(web).ds_data(planned(seq_length=200))
    tokens = data.train(0).tolist()
    assert tokens.count(511) > 1, "packed, the end of a document inside of a sample"
    text = data.decode(tokens)
    inner = text.split(V3_MARKS["eos"])[1:-1]
    assert inner and set(inner) <= set(texts("web"))


def test_a_runs_length_and_what_was_read_before_change_no_sample(web, code, planned):
    blend = (Weighed(str(web), 3.0), Weighed(str(code), 1.0))
    indices = [0, 5, 39, 40, 777, 3, 5000]
    short = plugin(*blend).ds_data(planned(steps=5))
    long = plugin(*blend).ds_data(planned(steps=400))
    by_tokens = plugin(*blend).ds_data(planned(steps=None, tokens=8 * S * 50))
    alone = [short.train(i).tolist() for i in indices]
    assert [long.train(i).tolist() for i in reversed(indices)] == alone[::-1]
    assert [by_tokens.train(i).tolist() for i in indices] == alone
    other = plugin(*blend).ds_data(planned(seed=9))
    assert other.train(0).tolist() != alone[0]
    assert other.validation(0).tolist() == short.validation(0).tolist(), "the same for every seed"


def test_the_index_is_written_once_and_whole(web, planned, tmp_path):
    plugin(web).ds_data(planned())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.npy")}
    assert len(written) == 6, "three files a pass, of training and validation"
    folder = next(iter(written)).parent
    # A run that was killed while it wrote: its folder has another name, and the next one starts anew.
    folder.rename(folder.with_name(folder.name + ".1.partial"))
    (folder.with_name(folder.name + ".1.partial") / "half.npy").write_text("half")
    plugin(web).ds_data(planned())
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.npy")}
    assert folder.exists() and {p: t for p, t in written.items() if p.parent != folder}.items() <= now.items()


def test_another_corpus_of_the_same_name_gets_an_index_of_its_own(corpus, web, planned):
    before = plugin(web).ds_data(planned())
    corpus("web", texts("new", 60), fim_rate=0.0, overwrite=True)
    after = plugin(web).ds_data(planned())
    assert "new" in after.decode(after.train(0)) and after.facts["train_documents"] == 45
    assert before.facts["train_documents"] == 30


# -- several --------------------------------------------------------------------------------------


def test_a_blend_keeps_its_shares_everywhere(web, code, planned):
    data = plugin(Weighed(str(web), 7), Weighed(str(code), 3)).ds_data(planned(steps=100))
    read = [data.decode([t for t in data.train(i).tolist() if t < 508]) for i in range(300)]
    webs = ["w" in text for text in read]
    assert webs == ["c" not in text for text in read], "a sample is from one corpus"
    assert all(abs(sum(webs[first : first + 20]) - 14) <= 1 for first in range(0, 300, 20))


def test_a_blend_takes_its_corpora_in_megatrons_order(web, code, planned, tmp_path):
    data = plugin(Weighed(str(web), 7), Weighed(str(code), 3)).ds_data(planned(seed=3, steps=3))
    theirs, _ = core_datasets([web, code], [7, 3], [24, 8, 0], 3, tmp_path / "cache")
    for index in range(24):
        assert data._mixture[index] == (theirs.dataset_index[index], theirs.dataset_sample_index[index])


def test_without_weights_a_corpus_counts_by_its_size(web, code, planned):
    data = plugin(web, code).ds_data(planned())
    one, two = (passes.samples for passes in data._train)
    taken = data._mixture.taken(one + two)
    assert abs(taken[0] - one) <= 1 and taken.sum() == one + two
    assert data.validation_size >= sum(passes.samples for passes in data._held_out) - 1
    read = {tuple(data.validation(i).tolist()) for i in range(data.validation_size)}
    assert len(read) == data.validation_size, "none twice"


RARE = [[1, 1e-5], [1, 1, 1, 4e-4], [1e-9, 3, 1.3e-3, 1e-3], [10, 10, 10, 3e-3, 5e-3]]


@pytest.mark.parametrize("weights", [[1], [7, 3], [0.2, 0.5, 0.3], [1e-3, 1], *RARE])
def test_a_mixture_repeats_without_a_seam(weights):
    mixture = Mixture(weights, period=1000)
    seen = [0] * len(weights)
    for index in range(3500):
        corpus, nth = mixture[index]
        assert nth == seen[corpus], "each corpus in its own order, nothing left out"
        seen[corpus] += 1
        if index % 500 == 0:
            assert mixture.taken(index + 1).tolist() == seen
    assert mixture[10**12][1] > 10**8


def told_by_the_pattern(mixture, index):
    """What a pattern alone gives, again and again."""
    period, place = divmod(index, len(mixture.corpus))
    corpus = int(mixture.corpus[place])
    return corpus, period * int((mixture.corpus == corpus).sum()) + int(mixture.nth[place])


@pytest.mark.parametrize(
    ("weights", "common"), [([7, 3], 3), ([1, 2, 2e-2], 3), ([1, 1e-4], 1), (RARE[1], 1)]
)
def test_where_a_pattern_gives_the_shares_it_is_the_order(weights, common):
    mixture = Mixture(weights, period=1000)
    indices = range(common * 1000)
    assert [mixture[i] for i in indices] == [told_by_the_pattern(mixture, i) for i in indices]


@pytest.mark.parametrize("weights", RARE)
def test_a_rare_corpus_gets_its_share(weights):
    mixture = Mixture(weights, period=1000)
    for total in (999, 1000, 1001, 123_456, 10**7 + 7, 10**15):
        taken = mixture.taken(total)
        asked = [total * weight / sum(weights) for weight in weights]
        assert taken.sum() == total
        small = [(n, share) for n, share in zip(taken, asked, strict=True) if share < total / 1000]
        assert all(abs(n - share) < 2.01 for n, share in small)


def test_the_smallest_corpora_are_passed_as_often_as_the_largest():
    for sizes in ([2_400_000_000, 24], [2_400_000_000, 3000, 3000], [10**9, 1, 10**9]):
        taken = Mixture(sizes).taken(10 * sum(sizes))
        off = [abs(n - 10 * size) for n, size in zip(taken, sizes, strict=True) if size < 10**6]
        assert max(off) <= 2, "samples"
        assert taken / sizes == pytest.approx([10.0] * len(sizes), abs=1.01)


def test_validation_ends_before_a_sample_comes_twice():
    mixture = Mixture([1, 1])
    assert [mixture.until(samples) for samples in ([10, 4], [4, 10], [4, 4], [0, 4])] == [9, 8, 8, 0]
    assert mixture[9] == (1, 4), "the tenth sample would be the second corpus' fifth"
    assert Mixture([1000, 1]).until([10**9, 10**5]) == pytest.approx(10**8, rel=1e-2)
    assert Mixture([5]).until([7]) == 7 and Mixture([]).until([]) == 0


def test_whole_corpora_are_held_out(web, code, planned):
    data = plugin(web, split=None, validation=(str(code),)).ds_data(planned())
    assert data.facts["train_documents"] == 40
    held_out = [data.decode(data.validation(i)) for i in range(data.validation_size)]
    assert all("code" in text for text in held_out)
    read = np.bincount(np.concatenate([data.validation(i)[:-1] for i in range(data.validation_size)]))
    stream = [token for tokens in documents(code) for token in tokens]
    assert (np.bincount(stream, minlength=len(read)) >= read).all()
    assert len(stream) - read.sum() <= S


# -- what a run asks beside samples ---------------------------------------------------------------


def test_facts_add_up(web, planned):
    facts = plugin(web).ds_data(planned()).facts
    made, whole = sidecar.read(web), documents(web)
    assert (
        len(facts["digest"]) == 64
        and facts["train_documents"] == 30
        and facts["train_tokens"] == sum(map(len, whole[:30]))
    )
    assert facts["validation_tokens"] == facts["validation_samples"] * S
    held_out = sum(map(len, whole[30:])), sum(len(text.encode()) for text in texts("web")[30:])
    wanted = facts["validation_tokens"] * held_out[1] / held_out[0]
    assert facts["validation_bytes"] == pytest.approx(wanted, abs=0.5)
    assert made.tokens == facts["train_tokens"] + held_out[0]
    json.dumps(facts)


def test_a_prompt_is_held_out_and_goes_on(web, code, planned):
    data = plugin(web, split=None, validation=(str(code),)).ds_data(planned())
    tokens, rest = data.prompt()
    assert any(text.startswith(data.decode(tokens) + rest) for text in texts("code", 25))
    assert 0 < len(tokens) <= 12 and rest


def test_baselines_are_models_of_the_same_tokens(web, planned):
    data = plugin(web).ds_data(planned(sequences=5))
    windows = np.stack([data.validation(i).numpy() for i in range(5)])
    fitted = np.stack([data.train(i).numpy() for i in range(data._train[0].samples)])
    share = (np.bincount(fitted.ravel(), minlength=512) + 1) / (fitted.size + 512)
    found = data.baselines()
    assert found["unigram"] == pytest.approx(-np.log(share[windows[:, 1:]]).mean(), rel=1e-12)
    assert found["bigram"] < found["unigram"]
    assert plugin(web).ds_data(planned(sequences=0)).baselines() == {}


def test_megatrons_own_corpora_need_a_tokenizer(web, bpe, planned):
    described = plugin(web).ds_data(planned())
    sidecar.place(web).unlink()
    (problem,) = plugin(web).ds_check(planned(), SETTINGS)
    assert problem.key == "plugins.indexed.tokenizer" and "no sidecar web.json" in problem.message
    assert list(plugin(web, tokenizer=str(bpe.path)).ds_check(planned(), SETTINGS)) == []
    bare = plugin(web, tokenizer=str(bpe.path)).ds_data(planned())
    assert bare.train(3).tolist() == described.train(3).tolist()
    assert "validation_bytes" not in bare.facts


# -- check ----------------------------------------------------------------------------------------


def test_check_is_silent_about_a_good_plan(web, code, planned):
    both = plugin(Weighed(str(web), 1), Weighed(str(code), 1))
    assert list(both.ds_check(planned(), SETTINGS)) == []


@pytest.mark.parametrize(
    ("options", "wanted", "vocab_size", "key", "said"),
    [
        ({}, {}, 511, "model.vocab_size", "has 512 ids"),
        ({"fim_rate": 0.1}, {}, 512, "plugins.indexed.fim_rate", "was built with a rate of 0"),
        ({}, {"seq_length": 10**6}, 512, "data.seq_length", "does not fit into"),
        (
            {"split": (39, 1)},
            {"seq_length": 100},
            512,
            "plugins.indexed.split",
            "0 validation samples",
        ),
        ({}, {"sequences": -1}, 512, "evaluate.sequences", "-1"),
        ({"split": None}, {}, 512, "plugins.indexed", "holds nothing out"),
        ({"split": (1,)}, {}, 512, "plugins.indexed.split", "two or three shares"),
        ({"split": (0, 1)}, {}, 512, "plugins.indexed.split", "the first above 0"),
        ({"validation": ("x",)}, {}, 512, "plugins.indexed.split", "both say"),
        ({"train": ()}, {}, 512, "plugins.indexed.train", "names no corpus"),
        ({"train": ("a", Weighed("b", 1.0))}, {}, 512, "plugins.indexed.train", "others have none"),
        ({"train": (Weighed("b", 0.0),)}, {}, 512, "plugins.indexed.train", "weight above 0"),
    ],
)
def test_check_names_the_key_and_a_remedy(web, planned, options, wanted, vocab_size, key, said):
    made = Indexed(IndexedOptions(**{"train": (str(web),), "split": (3, 1), **options}))
    problems = list(made.ds_check(planned(**wanted), SimpleNamespace(vocab_size=vocab_size)))
    problem = next(problem for problem in problems if problem.key == key)
    assert said in problem.message and problem.remedy and problem.kind == "recipe"
    if key != "model.vocab_size":
        with pytest.raises(ValueError, match="plugins.indexed|data.seq_length|evaluate"):
            made.ds_data(planned(**wanted))


def test_another_tokenizer_is_refused(web, corpus, bpe, planned, tmp_path):
    other = tmp_path / "other.json"
    other.write_bytes(bpe.path.read_bytes() + b"\n")
    (problem,) = plugin(web, tokenizer=str(other)).ds_check(planned(), SETTINGS)
    assert problem.key == "plugins.indexed.tokenizer" and problem.kind == "recipe"
    assert f"another tokenizer than {other}" in problem.message
    apart = corpus("apart", texts("apart"), tokenizer=replace(bpe, path=other), fim_rate=0.0)
    (problem,) = plugin(web, apart).ds_check(planned(), SETTINGS)
    assert "were made with different tokenizers" in problem.message


@pytest.mark.parametrize("lost", ["web.bin", "web.idx", "web.bytes.npy"])
def test_missing_files_are_the_machines_fault(web, planned, lost):
    web.with_name(lost).unlink()
    (problem,) = plugin(web).ds_check(planned(), SETTINGS)
    assert problem.kind == "environment" and lost in problem.message and problem.remedy
    with pytest.raises(EnvironmentUnfit, match=lost):
        plugin(web).ds_data(planned())


def test_all_missing_corpora_are_told_at_once(web, planned, tmp_path):
    made = plugin(web, tmp_path / "one", tmp_path / "two", fim_rate=0.1)
    problems = list(made.ds_check(planned(), SimpleNamespace(vocab_size=3)))
    assert [problem.kind for problem in problems] == ["environment"] * 2 + ["recipe"] * 2
    assert [problem.key for problem in problems[2:]] == ["plugins.indexed.fim_rate", "model.vocab_size"]


def test_half_a_copy_and_a_lost_tokenizer_are_told(corpus, bpe, planned, tmp_path):
    moved = tmp_path / "moved.json"
    moved.write_bytes(bpe.path.read_bytes())
    prefix = corpus("c", texts("c"), tokenizer=replace(bpe, path=moved), fim_rate=0.0)
    moved.rename(tmp_path / "tokenizer.json")
    assert list(plugin(prefix).ds_check(planned(), SETTINGS)) == [], "found beside the corpus"
    (tmp_path / "tokenizer.json").rename(tmp_path / "gone.json")
    (problem,) = plugin(prefix).ds_check(planned(), SETTINGS)
    assert problem.kind == "environment" and "its tokenizer is not at" in problem.message
    (tmp_path / "gone.json").rename(moved)
    content = prefix.with_name("c.bin").read_bytes()
    prefix.with_name("c.bin").write_bytes(content[:-2])
    (problem,) = plugin(prefix).ds_check(planned(), SETTINGS)
    assert problem.kind == "environment" and "copy it again" in problem.message


def test_every_rank_needs_validation_samples(web, planned):
    wide = replace(planned(sequences=4), layout=Layout(world_size=8))
    (problem,) = plugin(web).ds_check(wide, SETTINGS)
    assert problem.key == "evaluate.sequences" and "the 8 that all ranks" in problem.message


# -- several ranks --------------------------------------------------------------------------------


def read_on_a_rank(prefixes, plan, apart=False):
    import torch.distributed as dist

    rank = dist.get_rank()
    options = IndexedOptions(train=tuple(prefixes[rank]), split=(3, 1))
    data = Indexed(options).ds_data(plan)
    # One rank reads further than what was planned, and nobody waits for it.
    far = data.train(5000).tolist() if rank or not apart else None
    return [data.train(i).tolist() for i in (0, 1, 33, 100)], data.validation(0).tolist(), far


def test_ranks_read_the_same_as_one_process(workers, web, code, planned):
    prefixes = [str(web), str(code)]
    first, second = workers(2).run(read_on_a_rank, [prefixes] * 2, planned(), apart=True)
    assert first[:2] == second[:2] and first[2] is None
    data = plugin(web, code).ds_data(planned())
    assert [data.train(i).tolist() for i in (0, 1, 33, 100)] == first[0]
    assert data.train(5000).tolist() == second[2]


def refused_on_a_rank(options, plan):
    import torch.distributed as dist

    with pytest.raises(EnvironmentUnfit) as caught:
        Indexed(options[dist.get_rank()]).ds_data(plan)
    return str(caught.value)


@pytest.mark.parametrize("differs", ["corpora", "cache"])
def test_machines_that_hold_other_files_stop_all_ranks(workers, web, code, planned, tmp_path, differs):
    one = IndexedOptions(train=(str(web),), split=(3, 1), cache=str(tmp_path / "a"))
    other = replace(
        one, **({"train": (str(code),)} if differs == "corpora" else {"cache": str(tmp_path / "b")})
    )
    first, second = workers(2).run(refused_on_a_rank, [one, other], planned())
    assert first == second
    if differs == "corpora":
        assert first.startswith("ranks [1] read other corpora than rank 0")
    else:
        assert first.startswith(f"ranks [1] don't see {tmp_path}/b/web-") and "plugins.indexed.cache" in first


def test_two_ranks_train_on_it(web, code, tmp_path):
    recipe = tmp_path / "indexed.yaml"
    recipe.write_text(
        f"extends: [{TINY}]\n"
        "plugins:\n"
        "  python_source: null\n"
        "  indexed:\n"
        f"    train: [{{prefix: {web}, weight: 0.7}}, {{prefix: {code}, weight: 0.3}}]\n"
        "    split: [3, 1]\n"
        "model: {vocab_size: 512, num_layers: 2}\n"
        "data: {seq_length: 16}\n"
        "train: {steps: 2, micro_batch: 1}\n"
        "evaluate: {sequences: 2}\n"
        "save: {at_end: false}\n"
        "run: {world_size: 2}\n"
    )
    line = [sys.executable, "-m", "dsplugins", "train", str(recipe), f"run.directory={tmp_path}/run"]
    done = forks.run(line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data: source web (0.7) + code (0.3)," in done.stdout
    assert "step 2  tokens 256" in done.stdout and "what stood there:" in done.stdout
    losses = [json.loads(row)["loss"] for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(5.5 < loss < 7 for loss in losses), "ln 512 is 6.24"


def test_a_run_may_hold_nothing_out(web, planned):
    data = plugin(web, split=None).ds_data(planned(sequences=0))
    assert data.validation_size == 0 and data.facts["train_documents"] == 40
    assert data.baselines() == {} and data.prompt() is None
