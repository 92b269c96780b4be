"""stopwatch.py: marks that measure and change nothing."""
import itertools

import torch

from model import LanguageModel, ModelConfig
from stopwatch import PARTS, Stopwatch


def test_marks_change_neither_loss_nor_gradients_and_meet_every_part_forward_and_backward():
    model = LanguageModel(ModelConfig(attn='lora', n_layer=2, n_head=4, n_embd=64, d_ff=48, n_expert=4, vocab_size=128)).train()
    watch, x = Stopwatch(cuda=False), torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        out = model(x, x)
        loss = out.nll / x.numel() + 0.01 * out.balance_loss + 0.001 * out.z_loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    plain = gradients()
    marked = []
    seconds = watch.time(lambda: marked.extend(gradients()), model)
    assert all(torch.equal(p, m) for p, m in zip(plain, marked, strict=True))
    assert list(seconds) == list(PARTS) and all(seconds[part] > 0 for part in PARTS if part != 'optimizer')
    ended = [part for part, _ in watch.laps[1:]]                    # after 'start'
    # the experts' part is interrupted by the gathering and adding of each expert's rows, which is dispatch
    inner = [part for part, _ in itertools.groupby(part for part in ended if part not in ('rest', 'dispatch'))]
    # two layers, forward and backward
    assert {part: inner.count(part) for part in ('attention', 'router', 'experts', 'head')} == {
        'attention': 4, 'router': 4, 'experts': 4, 'head': 1}
    assert inner == inner[::-1] and len(inner) == 13                # the backward goes the way back
    assert torch.equal(gradients()[0], plain[0]) and len(watch.laps) == len(ended) + 1, 'the marks are gone'
