"""decoding.py: its text is what full forwards would write, drawn with the probabilities that were asked for."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from decoding import choose, generate
from model import LanguageModel, ModelConfig
from tensors import BF16, F32, numbers, token_ids
from test_model import MORE, every_variant, random_model


def greedy(model, prompt, n):
    """By full forwards, with the window that generate() documents: when full, its newest half goes on."""
    size, window, text = model.config.block_size, list(prompt)[-model.config.block_size:], []
    for _ in range(n):
        if len(window) > size:
            window = window[-(size // 2):]
        with torch.no_grad():
            new = model(torch.tensor([window]))[0, -1].argmax().item()
        window.append(new)
        text.append(new)
    return text


def generated(model, prompts, n, **knobs):
    return torch.stack(list(generate(model, prompts, n, **knobs)), 1).tolist()


@every_variant
@pytest.mark.parametrize('static', [False, True])
def test_greedy_text_is_what_full_forwards_write_alone_and_beside_others_and_far_beyond_the_context(attn, static):
    """Prompts of different lengths go on as each alone, as long as the longest fits: when its cache is rebuilt, all
    rows go on from their newest half."""
    model = random_model(attn, **(MORE if static else {}))
    trunk = model.trunk if static else None                          # compiled or not, for it the cache is static
    for length, n in ((1, 26), (15, 12), (16, 2), (40, 3)):          # the first two build it anew twice
        prompt = token_ids(length, seed=length).tolist()
        assert generated(model, [prompt], n, temperature=0, compiled=trunk) == [greedy(model, prompt, n)]
    prompts = [token_ids(n, seed=n).tolist() for n in (3, 9, 1, 6)]
    together = generated(model, prompts, 8, temperature=0, compiled=trunk)
    assert together == [greedy(model, p, 8) for p in prompts] and len({tuple(t) for t in together}) > 1


def probabilities(logits, temperature, top_k, top_p):
    """By a loop over tokens, likeliest first, until k are taken or the probability p is reached."""
    e = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits)[:top_k]
    kept, total = [], e[order].sum()
    for i in order:
        if top_p is not None and sum(e[kept]) / total >= top_p:
            break
        kept.append(i)
    p = np.zeros(len(logits))
    p[kept] = e[kept] / e[kept].sum()
    return p


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, None, None), (1.5, 3, None), (0.7, None, 0.6), (1.0, None, 0.05), (1.3, 5, 0.7), (9.0, None, 0.5)])
def test_tokens_are_drawn_with_the_probabilities_of_temperature_top_k_and_top_p(temperature, top_k, top_p):
    n, logits, generator = 3000, numbers(12, std=1.5), torch.Generator().manual_seed(0)
    p = probabilities(logits.numpy(), temperature, top_k, top_p)
    drawn = choose(logits.float().expand(n, 12), temperature, top_k, top_p, generator)
    counts = torch.bincount(drawn, minlength=12).numpy()
    assert (counts[p == 0] == 0).all()                      # nothing outside of them
    assert (abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + 1e-9).all()


def test_no_more_than_top_k_are_drawn_from_where_logits_are_equal_and_the_likeliest_always_stays():
    logits = torch.tensor([[1.0, 2, 2, 2, 2, 0]]).expand(400, 6)        # in bfloat16 equal ones are common
    draw = lambda **options: choose(logits, **{'temperature': 1.0, 'top_k': None, 'top_p': None,
                                               'generator': torch.Generator().manual_seed(0), **options}).unique()
    assert len(draw(top_k=2)) == 2 and len(draw(top_k=3)) == 3 and set(draw(top_k=4).tolist()) == {1, 2, 3, 4}
    assert draw(top_k=1).tolist() == draw(temperature=0.0).tolist() == [1]
    assert draw(top_p=1e-50).tolist() == [1]                            # 0 in float32


def test_text_follows_its_seed_and_its_knobs():
    model, prompts = random_model('lora'), [[1, 2, 3]] * 40
    first = generated(model, prompts, 2, temperature=1.5, top_k=9, top_p=0.9, seed=4)
    assert first == generated(model, prompts, 2, temperature=1.5, top_k=9, top_p=0.9, seed=4)
    assert first != generated(model, prompts, 2, temperature=1.5, top_k=9, top_p=0.9, seed=5)
    assert len({t[0] for t in first}) > 1
    for knobs in (dict(top_k=1), dict(top_p=1e-9)):
        assert generated(model, prompts[:2], 5, **knobs) == generated(model, prompts[:2], 5, temperature=0)
    assert generated(model, prompts[:2], 3, top_k=1000, top_p=1.0, seed=2) == generated(model, prompts[:2], 3, seed=2)


def test_text_after_saving_and_loading_is_identical(tmp_path):
    for attn, knobs in (('enhanced', MORE), ('gqa', dict(qk_norm=True, n_expert_group=2, top_k_group=1))):
        model = random_model(attn, F32, **knobs)
        checkpoint = {'model': model.state_dict(), 'config': dataclasses.asdict(model.config)}
        torch.save(checkpoint, tmp_path / 'checkpoint.pt')
        saved = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
        for seed in (99, None):
            again = LanguageModel(ModelConfig(**saved['config']), seed=seed)
            again.load_state_dict(saved['model'], strict=True)
            assert again.config == model.config
            assert torch.equal(again(token_ids(2, 16)), model(token_ids(2, 16)))
            one, other = (generated(m, [[3, 1, 4], [1, 5]], 30, seed=1) for m in (again, model))
            assert one == other


def test_bad_requests_for_text_are_refused_in_one_line():
    model = random_model('mla')
    for prompts, knobs, words in (([], {}, 'prompt'), ([[1], []], {}, 'prompt'), ([[1]], dict(top_k=0), 'top_k'),
                                  ([[1]], dict(temperature=-1), 'temperature'), ([[1]], dict(temperature=math.nan), 'temperature'),
                                  ([[1]], dict(top_p=0), 'top_p'), ([[1]], dict(top_p=1.1), 'top_p'),
                                  ([[1]], dict(top_p=math.nan), 'top_p')):
        with pytest.raises(ValueError, match=words) as error:
            next(generate(model, prompts, 3, **knobs))
        assert '\n' not in str(error.value)
    cache = model.new_cache(1, 4)
    model.decode(token_ids(1, 3), cache)
    with pytest.raises(ValueError, match='4 slots, 3 of them filled'):
        model.decode(token_ids(1, 2), cache)
    assert cache.filled == 3                                # and the cache is as it was
    model.decode(token_ids(1, 1), cache)


def test_decoding_with_a_static_cache_is_captured_once_and_writes_the_same_text(dynamo):
    model, graphs = random_model('mla').for_decoding(BF16), dynamo('eager')
    trunk = torch.compile(model.trunk, backend=graphs, fullgraph=True, dynamic=False)
    for prompts in ([[5, 6, 7], [1, 2, 3]], [[5, 6, 8], [3, 2, 1]]):        # one row alone goes its own way in eager
        eager = generated(model, prompts, 12, temperature=0, compiled=model.trunk)
        assert generated(model, prompts, 12, temperature=0, compiled=trunk) == eager
        assert graphs.frame_count == 1                      # one graph for all tokens after the prompt


def test_a_cache_that_is_built_anew_is_as_large_as_the_first(monkeypatch):
    model, capacities = random_model('mla'), []
    size, new_cache = model.config.block_size, model.new_cache
    monkeypatch.setattr(model, 'new_cache', lambda *a: (capacities.append(a[1]), new_cache(*a))[1])
    generated(model, [[1] * (size - 4)], 6, temperature=0)  # half of it and 6 more would fit into less
    assert capacities == [size, size] and size // 2 + 6 < size
