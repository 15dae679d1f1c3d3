"""Initial weights: the same in every layout, of the right distribution, complete or refused."""

import time

import pytest
import torch

SEED, STD = 1234, 0.006
KNOWN = (-0.025074928934316756, 1.1409308015099098, -0.3596435208384531, -1.2121459928077125)
SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 48,
    "moe_router_topk": 2,
    "moe_layer_freq": [0, 1, 1, 1],
    "mtp_num_layers": 1,
}


def model(tensor=1, expert=1, pipeline=1, virtual=1, dtype=torch.float32, grouped=False, **changes):
    """This rank's chunks of a small GPTModel from megatron-core's local spec (`changes` to SIZES)."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **{**SIZES, **changes},
        normalization="LayerNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
    )
    chunks = []
    for index in range(virtual):
        stage = index if virtual > 1 else None
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="LayerNorm", vp_stage=stage
        )
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
        where = {"ignore_virtual": False, "vp_stage": stage}
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=96,
                max_sequence_length=32,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
                mtp_block_spec=mtp,
                vp_stage=stage,
            )
        )
    return chunks


def held(chunks):
    """[(global name, global offset, global shape, values)] of every shard of every parameter."""
    from dsplugins.weights import shards

    rows = []
    for chunk in chunks:
        own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        for shard in shards(chunk):
            if shard.data is not None and shard.data.untyped_storage().data_ptr() in own:
                values = shard.data.detach().clone().float().numpy()
                rows.append((shard.key, tuple(shard.global_offset), tuple(shard.global_shape), values))
    return rows


def assemble(rows):
    """Global name -> whole tensor, from the shards of all ranks; copies must agree, nothing may lack."""
    whole, seen = {}, {}
    for key, offset, shape, values in rows:
        tensor = whole.setdefault(key, torch.zeros(shape))
        mark = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        local = (1,) * (len(shape) - values.ndim) + values.shape
        place = tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))
        values = torch.from_numpy(values).view(local)
        if mark[place].any():
            assert torch.equal(tensor[place], values), f"copies of {key} differ"
        tensor[place], mark[place] = values, True
    assert all(mark.all() for mark in seen.values())
    return whole


def initialised(layout, twin=False, **options):
    """A job: build, initialise, give back the shards."""
    from dsplugins.testing import model_parallel
    from dsplugins.weights import initialise

    sizes = {k: v for k, v in layout.items() if k != "virtual"}
    with model_parallel(virtual_pipeline=layout.get("virtual"), **sizes):
        chunks = model(**layout, **options)
        initialise(chunks, SEED, STD, twin)
        return held(chunks)


@pytest.fixture
def one(single):
    """The whole model in one process."""
    from dsplugins.weights import initialise

    chunks = model()
    initialise(chunks, SEED, STD)
    return assemble(held(chunks))


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}, {}],
    ids=["TP2", "EP2", "PP2", "PP2xVPP2", "DP2"],
)
def test_every_layout_starts_alike(one, workers, layout):
    results = workers(2).run(initialised, layout)
    whole = assemble([row for rank in results for row in rank])
    assert whole.keys() == one.keys()
    for key in one:
        assert torch.equal(whole[key], one[key]), key
    if layout:  # or the test would compare replicas with themselves
        rows = [{(key, offset) for key, offset, _, _ in rank} for rank in results]
        assert rows[0] != rows[1]


def test_mtp_embedding_is_a_copy(workers):
    """The last stage's embedding, for MTP, equals the first stage's."""
    first, last = workers(2).run(initialised, {"pipeline": 2})
    key = "embedding.word_embeddings.weight"
    here, there = (next(v for k, _, _, v in rows if k == key) for rows in (first, last))
    assert (here == there).all() and here.std() > 0


def test_bf16_is_the_rounded_fp32(one, workers):
    whole = assemble([row for rank in workers(2).run(initialised, {}, dtype=torch.bfloat16) for row in rank])
    for key in one:
        assert torch.equal(whole[key], one[key].bfloat16().float()), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_is_one_unit_away_everywhere(single, dtype):
    from dsplugins.weights import initialise

    one, other = model(dtype=dtype), model(dtype=dtype)
    initialise(one, SEED, STD)
    initialise(other, SEED, STD, twin=True)
    ups = count = 0
    for (name, a), b in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        if a.dim() == 1:
            assert torch.equal(a, b), name
            continue
        up, down = (torch.nextafter(a, torch.full_like(a, side)) for side in (torch.inf, -torch.inf))
        assert ((b == up) | (b == down)).all(), name
        ups, count = ups + (b == up).sum().item(), count + a.numel()
    assert abs(ups / count - 0.5) < 0.01


def test_a_rough_twin_is_a_share_away_everywhere(single):
    from dsplugins.weights import initialise

    one, other = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    initialise(one, SEED, STD)
    initialise(other, SEED, STD, twin=0.25)
    for (name, a), b in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        if a.dim() > 1:
            ratio = b.detach().double() / a.detach().double()
            assert (((ratio - 1).abs() - 0.25).abs() <= 1.25 * 2**-8).all(), name
            assert 0.4 < (ratio > 1).double().mean() < 0.6, name


def test_a_twin_is_the_same_in_every_layout(workers):
    whole = [
        assemble([row for rank in workers(2).run(initialised, layout, twin=True) for row in rank])
        for layout in ({}, {"tensor": 2})
    ]
    assert whole[0].keys() == whole[1].keys()
    assert all(torch.equal(whole[0][key], whole[1][key]) for key in whole[0])


def test_distribution_and_what_stays(one):
    drawn = {key: value for key, value in one.items() if "norm" not in key and "bias" not in key}
    for key, value in drawn.items():
        count = value.numel()
        assert abs(value.mean()) < 5 * STD / count**0.5, key
        assert abs(value.std() / STD - 1) < 5 / (2 * count) ** 0.5, key
        assert len(value.unique()) > 0.99 * count, key
    gains = [value for key, value in one.items() if "norm" in key and key.endswith("weight")]
    assert gains and all((gain == 1).all() for gain in gains)


def test_normal_numbers_are_normal():
    """A million of them: moments, tails, and no correlation between neighbours, rows or names."""
    from dsplugins.weights import name_key, normal

    position = torch.arange(1 << 20)
    values = normal(name_key(1, "a"), position)
    assert values.mean().abs() < 5e-3 and (values.var() - 1).abs() < 1e-2
    assert (values**3).mean().abs() < 2e-2 and ((values**4).mean() - 3).abs() < 6e-2
    for limit, share in ((1, 0.31731), (2, 0.0455), (3, 0.0027)):
        assert (values.abs() > limit).double().mean().item() == pytest.approx(share, rel=0.06)
    for lag in (1, 2, 64, 4096):
        assert (values[lag:] * values[:-lag]).mean().abs() < 5e-3
    for other in (name_key(1, "b"), name_key(2, "a")):
        assert (values * normal(other, position)).mean().abs() < 5e-3
    assert torch.equal(values[1000:1010], normal(name_key(1, "a"), torch.arange(1000, 1010)))


def test_known_numbers():
    """Written down once: weights must not change between versions, or old runs can't be repeated."""
    from dsplugins.weights import name_key, normal

    values = normal(name_key(1234, "decoder.layers.0.mlp.linear_fc2.weight"), torch.tensor([0, 1, 2, 10**12]))
    torch.testing.assert_close(values, torch.tensor(KNOWN, dtype=torch.float64), rtol=1e-12, atol=0)


def test_splitmix_is_splitmix():
    """With no second key the bits are SplitMix64's published ones for seed 1234567."""
    from dsplugins.weights import _mix

    bits = _mix((1234567, 0), torch.arange(1, 4)).tolist()
    assert [b % 2**64 for b in bits] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_names_and_seeds_differ(single, one):
    from dsplugins.weights import initialise

    fc2 = [v for k, v in one.items() if "experts.linear_fc2" in k and "shared" not in k]
    assert len(fc2) == 4 and fc2[0].shape[0] == 8  # three decoder layers and MTP's; eight experts each
    assert len({tensor[e, 0, 0].item() for tensor in fc2 for e in range(8)}) == 32
    chunks = model()
    initialise(chunks, SEED + 1, STD)
    for key, other in assemble(held(chunks)).items():
        if one[key].std() > 0:
            assert (one[key] != other).double().mean() > 0.99, key


def test_layer_names_do_not_depend_on_the_recipes_spelling(single):
    from dsplugins.weights import initialise

    names = []
    for frequency in (1, [1, 1, 1, 1]):
        chunks = model(moe_layer_freq=frequency)
        initialise(chunks, SEED, STD)
        names.append(assemble(held(chunks)))
    for key in names[0] | names[1]:
        assert torch.equal(names[0][key], names[1][key]), key


class Marked(torch.nn.Module):
    """A stand-in for a model chunk: parameters and the shards that it admits to."""

    def __init__(self, admit):
        super().__init__()
        self.kept = torch.nn.Parameter(torch.full((4, 4), 3.0))
        self.kept.ds_keep_init = True
        self.drawn = torch.nn.Parameter(torch.zeros(2, 8, 4))
        self.admit = admit

    def sharded_state_dict(self, metadata=None):
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        shards = {"kept": ShardedTensor.from_rank_offsets("kept", self.kept.data)}
        for index in self.admit:
            data = self.drawn[index] if index < 2 else self.drawn[0].clone()
            offset = (0, index % 2, 2)
            shards[f"drawn{len(shards)}"] = ShardedTensor.from_rank_offsets(
                "drawn", data, offset, prepend_axis_num=1
            )
        return shards


def test_views_of_one_parameter_equal_one_shard():
    """Experts packed in one tensor: by expert or as a whole, the numbers are the same."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from dsplugins.weights import fill, initialise

    chunk = Marked((0, 1))
    assert initialise([chunk], SEED, STD) == {"drawn": 64}
    assert (chunk.kept == 3).all()
    whole = torch.zeros(2, 8, 4)
    fill(ShardedTensor.from_rank_offsets("drawn", whole), SEED, STD)
    assert torch.equal(whole, chunk.drawn.detach())
    strided = torch.zeros(8, 4).t()
    fill(ShardedTensor.from_rank_offsets("t", strided), SEED, STD)
    straight = torch.zeros(4, 8)
    fill(ShardedTensor.from_rank_offsets("t", straight), SEED, STD)
    assert torch.equal(strided, straight)


@pytest.mark.parametrize("admit", [(0,), (0, 1, 1), (0, 3)], ids=["hidden", "twice", "a copy"])
def test_incomplete_models_are_refused(admit):
    from dsplugins.weights import initialise

    with pytest.raises(ValueError, match=r"drawn: \d+ of 64 elements"):
        initialise([Marked(admit)], SEED, STD)


def test_two_million_parameters_take_less_than_a_second_of_a_processor():
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from dsplugins.weights import fill

    shard = ShardedTensor.from_rank_offsets("x", torch.empty(2048, 1024))
    start = time.process_time()
    fill(shard, SEED, STD)
    assert time.process_time() - start < 1.0
