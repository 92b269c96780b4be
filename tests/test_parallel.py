"""parallel.py within one process: what shards hold and in which dtype they compute. Several of them: test_train.py."""
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import parallel
from attention import RMSNorm
from model import LanguageModel, ModelConfig

CONFIG = dict(vocab_size=61, n_layer=2, n_head=2, n_embd=32, block_size=16, d_ff=32, n_expert=4, attn='mla', router='sigmoid',
              n_dense_layer=1)


@pytest.fixture
def group():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('changes', [{}, {'attn': 'gqa', 'qk_norm': True, 'attention_bias': True, 'tie_embeddings': False}], ids=str)
def test_shards_are_built_on_meta_and_hold_the_numbers_of_a_whole_model(group, changes):
    config = ModelConfig(**{**CONFIG, **changes})
    sharded = parallel.sharded(config, 3, torch.device('cpu'), 'bfloat16', False)
    whole = LanguageModel(config, seed=3).state_dict()
    parts = sharded.state_dict()
    assert parts.keys() == whole.keys() and all(isinstance(p, DTensor) for p in sharded.parameters())
    for name, tensor in parts.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert tensor.dtype == torch.float32 and torch.equal(tensor, whole[name]), name


def test_layers_are_gathered_in_the_dtype_of_their_products_but_gains_router_and_stream_in_float32(group):
    model = parallel.sharded(ModelConfig(**CONFIG), 0, torch.device('cpu'), 'bfloat16', False)
    whole = LanguageModel(ModelConfig(**CONFIG), seed=0)
    dtypes, stream = {}, set()
    for name, module in model.named_modules():
        if name.startswith('layers.'):
            module.register_forward_pre_hook(lambda m, args, name=name: dtypes.update(
                {f'{name}.{n}': p.dtype for n, p in m.named_parameters(recurse=False)}))
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda m, args: stream.add(args[0].dtype))
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, expected = (m(tokens[:, :-1], tokens[:, 1:]) for m in (model, whole))
    out.nll.backward()
    wide = {f'{name}.weight' for name, m in whole.named_modules() if isinstance(m, RMSNorm) or name.endswith('router')}
    assert dtypes.keys() == {n for n, _ in whole.named_parameters() if n.startswith('layers.')}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name in wide else torch.bfloat16), name
    assert stream == {torch.float32} and all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert out.nll.item() == pytest.approx(expected.nll.item(), rel=1e-4)
    assert torch.equal(out.load, expected.load)
