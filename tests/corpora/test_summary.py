"""What `data show` tells, against counting."""

from dsplugins.corpora.summary import look


def test_counts_lengths_and_samples(corpus, bpe):
    texts = ["x" * 2**i for i in range(9)]
    prefix = corpus("c", texts, fim_rate=0.0)
    lengths = [len(ids) + 1 for ids in bpe.encode(texts)]
    found = look(prefix, 3, bpe)
    assert (found.documents, found.tokens, found.dtype) == (9, sum(lengths), "uint16")
    assert found.lengths["0%"] == min(lengths) and found.lengths["100%"] == max(lengths)
    assert found.lengths["50%"] == sorted(lengths)[4]
    assert sum(count for _, count in found.histogram) == 9
    for low, count in found.histogram:
        assert count == sum(low <= length < 2 * low for length in lengths)
    assert [sample["document"] for sample in found.samples] == [0, 3, 6]
    assert found.samples[1]["text"].startswith("xxxxxxxx<") and not found.samples[1]["fim"]


def test_turned_documents_are_told(corpus, bpe):
    found = look(corpus("c", ["some text"] * 3, fim_rate=1.0), 5, bpe)
    assert [sample["fim"] for sample in found.samples] == [True] * 3
    assert found.sidecar.fim_documents == 3


def test_without_a_sidecar_there_are_counts(corpus, bpe):
    prefix = corpus("c", ["one", "two"])
    prefix.with_name("c.json").unlink()
    found = look(prefix, 2, None)
    assert found.documents == 2 and found.sidecar is None and found.samples == ()
