"""The sampler samples from the policy it was given, and says with which log-probs."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tiny
from transformers.cache_utils import DynamicLayer

from data import Problem
from luffy import Trajectory
from machinery.batches import collate
from machinery.model import Policy, from_pretrained, load_config
from luffy import VLLMSampler
from machinery.caches import ROOM, Growing, grouped_attention
from machinery.samplers import Sample, TorchSampler, draw
from machinery.samplers import to_samples

PROMPTS = [[2, 15, 7, 3], [2, 16, 8, 9, 10, 3], [2, 17, 3]]


@pytest.fixture(scope="module")
def sampler(tiny_model):
    return TorchSampler(tiny_model, load_config(tiny_model), ends=[1])


def generate(sampler, prompts=PROMPTS, n=4, seeds=(10, 11, 12), temperature=1.0, max_tokens=12):
    return sampler.generate(
        prompts, n, seeds=list(seeds), temperature=temperature, max_tokens=max_tokens
    )


def test_logprobs_are_the_trainers(sampler, tiny_model):
    """Left padding, cache and dropped rows in the sampler; packing in the trainer: one policy."""
    for temperature in (1.0, 0.5):
        policy = Policy(from_pretrained(tiny_model, attn_implementation="packed"), temperature)
        for prompt, group in zip(PROMPTS, generate(sampler, temperature=temperature)):
            problem = Problem("", "", prompt_ids=tuple(prompt))
            logp, _ = policy(
                collate([Trajectory(0, problem, s.tokens, logp_sampler=s.logps) for s in group])
            )
            expected = torch.tensor([lp for s in group for lp in s.logps])
            torch.testing.assert_close(logp.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_prompts_samples_depend_on_its_seed_alone(sampler):
    def tokens(*args, **kwargs):
        return [[s.tokens for s in group] for group in generate(sampler, *args, **kwargs)]

    together = tokens()
    assert generate(sampler) == generate(sampler)  # log-probs too, bit for bit
    for i in range(3):  # alone, or in another place of the batch
        assert tokens([PROMPTS[i]], seeds=[10 + i])[0] == together[i]
    assert tokens(PROMPTS[::-1], seeds=(12, 11, 10)) == together[::-1]
    assert tokens(seeds=(20, 21, 22)) != together
    assert len(set(map(tuple, together[0]))) > 1


def test_responses_end_in_one_eos_or_are_full(sampler):
    samples = [s for group in generate(sampler, n=64, max_tokens=30) for s in group]
    ended = [s for s in samples if s.tokens[-1] == 1]
    assert ended and all(s.tokens.count(1) == 1 for s in ended)
    assert all(len(s.tokens) == 30 for s in samples if s.tokens[-1] != 1)
    assert all(len(s.tokens) == len(s.logps) for s in samples)


@pytest.mark.parametrize("new", [1, 5])  # a step of decoding; prompts
def test_query_heads_that_share_keys(new):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, n, 8, generator=generator) for heads, n in ((6, new), (2, 7), (2, 7))
    )
    mask = torch.arange(7) >= torch.tensor([0, 2, 3])[:, None, None, None]  # (3, 1, 1, 7)
    copies = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *copies, attn_mask=mask, scale=0.3
    )
    found, _ = grouped_attention(
        SimpleNamespace(num_key_value_groups=3), query, key, value, mask.expand(3, 1, new, 7), 0.3
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_greedy_equals_transformers(sampler, tiny_model):
    model = from_pretrained(tiny_model, attn_implementation="sdpa")
    for prompt, group in zip(PROMPTS, generate(sampler, n=1, temperature=0)):
        expected = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            eos_token_id=1,
            max_new_tokens=12,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert group[0].tokens == expected.tolist()


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1e9, 2.0])
    luck = (torch.arange(10_000) + 0.5) / 10_000
    tokens, logp = draw(logits.expand(10_000, 4), luck, temperature=2.0)
    expected = (logits / 2.0).softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=4) / 10_000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp.exp(), expected[tokens])


def test_draw_follows_the_distribution_of_many_words():
    """To 1e-6 in the distribution function; and no word that has no probability."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50_000, generator=generator)  # not whole blocks
    logits[2000:2700] = logits[-40_000:-39_000] = logits[-500:] = -torch.inf
    luck = torch.cat([torch.rand(100, generator=generator), torch.tensor([0.0, 1 - 2**-24])])
    tokens, logp = draw(logits.expand(len(luck), -1), luck, temperature=0.8)
    p = (logits.double() / 0.8).softmax(-1)
    assert p[tokens].all()
    torch.testing.assert_close(logp, p[tokens].log().float(), atol=1e-5, rtol=0)
    cdf = p.cumsum(0)[tokens]
    assert (luck < cdf + 1e-6).all() and (luck > cdf - p[tokens] - 1e-6).all()
    logits = torch.randn(200, 300, generator=generator)
    logits[:, 100:] = -torch.inf  # the sum of their block may be rounded up
    tokens, _ = draw(logits, torch.full((200,), 1 - 2**-24), temperature=1.0)
    assert (tokens < 100).all()


def test_a_cache_that_grows_in_place_holds_what_transformers_holds():
    """Longer than its room, by one token and by two, and with rows that leave."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs, rows = Growing(), DynamicLayer(), torch.arange(6)
    for t in range(3 * ROOM):
        new = 5 if t == 0 else 1 + t % 2
        states = [torch.randn(len(rows), 2, new, d, generator=generator) for d in (8, 4)]
        found, expected = ours.update(*states), theirs.update(*states)
        assert all(map(torch.equal, found, expected)), t
        if t in (7, 8, 2 * ROOM):
            rows = rows[1:]
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.arange(len(rows)))
            held = [x for v in vars(ours).values() for x in (v if isinstance(v, list) else [v])]
            held = [x.untyped_storage() for x in held if isinstance(x, torch.Tensor)]
            sizes = {x.data_ptr(): x.nbytes() for x in held}  # and not those of before as well
            assert sum(sizes.values()) == ours.keys.nbytes + ours.values.nbytes


class Engine:
    """vLLM's engine, as far as VLLMSampler knows it on a GPU; it writes down what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def tell(*args, **kwargs):
            self.told.append((name, kwargs.get("level") or kwargs.get("tags", [None])[0]))
            return [] if name == "generate" else True

        return tell


@pytest.fixture
def engine(monkeypatch):
    """VLLMSampler on a GPU, with an engine that writes down what it is told."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    sampler = object.__new__(VLLMSampler)
    sampler.llm, sampler.ranks, sampler.frees_memory, sampler.ends = Engine(), None, True, [1]
    sampler.awake = False
    return sampler


def test_a_push_wakes_the_engine_in_stages(engine):
    """Weights first, all of them, before there is room for the cache; it sleeps when it is told."""
    pushed = [
        ("wake_up", "weights"),
        ("apply_model", None),
        ("wake_up", "kv_cache"),
        ("reset_prefix_cache", None),
    ]
    engine.push([])
    assert engine.llm.told == pushed
    generate(engine)
    generate(engine)  # as an evaluation of several benchmarks
    assert engine.llm.told == pushed + [("generate", None)] * 2
    engine.sleep()
    assert engine.llm.told[-1] == ("sleep", 2)
    assert generate(engine, n=0) == [[], [], []]  # as in SFT: it is not woken
    assert engine.llm.told[-1] == ("sleep", 2)


def test_an_engine_that_keeps_old_keys_and_values_is_an_error(engine):
    engine.llm.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="old weights"):
        engine.push([])


def test_nothing_is_sampled_from_weights_that_were_not_pushed(engine, tiny_model):
    """On a GPU an engine that sleeps has none, and would wait for ever."""
    with pytest.raises(RuntimeError, match="push"):
        generate(engine)
    for sampler in (engine, TorchSampler(tiny_model, load_config(tiny_model), ends=[1])):
        sampler.push([])
        generate(sampler)
        sampler.sleep()
        with pytest.raises(RuntimeError, match="push"):
            generate(sampler)


def test_weights_pushed_are_weights_used(sampler, tiny_model):
    before = generate(sampler, temperature=0)
    model = from_pretrained(tiny_model)
    original = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    sampler.push(model.named_parameters())
    assert generate(sampler, temperature=0) != before
    sampler.push(original.items())
    assert generate(sampler, temperature=0) == before


def test_a_log_prob_for_each_token_that_vllm_sampled():
    def output(tokens, of):
        flat = SimpleNamespace(token_ids=of, logprobs=[-0.5] * len(of))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens), logprobs=flat)])

    (sample,) = to_samples(output([7, 1], [7, 1]), ends=[1])
    assert sample == Sample([7, 1], [-0.5, -0.5], truncated=False)
    for others in ([7, 1, 1], [7], [1, 7]):
        with pytest.raises(RuntimeError, match="sampled 2"):
            to_samples(output([7, 1], others), ends=[1])


def test_room_for_a_response_is_its_own_prompts(tmp_path):
    """A long prompt shortens no other's; learnt positions have no place beyond the context."""
    path = make_tiny("gpt2", tmp_path / "gpt2")
    config = load_config(path)
    lengths = 3, 20, config.max_position_embeddings - 8
    prompts = [[2, *(5 + i % 40 for i in range(n))] for n in lengths]
    how = dict(n=16, temperature=1.0, max_tokens=30)
    sampler = TorchSampler(path, config, ends=[1])
    groups = sampler.generate(prompts, seeds=[1, 2, 3], **how)
    assert [max(len(s.tokens) for s in group) for group in groups] == [30, 30, 7]
    assert all(s.truncated == (s.tokens[-1] != 1) for group in groups for s in group)
    for prompt, seed, group in zip(prompts, (1, 2, 3), groups):
        [alone] = sampler.generate([prompt], seeds=[seed], **how)
        assert [s.tokens for s in alone] == [s.tokens for s in group]
