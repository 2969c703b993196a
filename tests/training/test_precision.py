import torch

from bdfast.training.precision import computes_in_bfloat16


def test_bfloat16_only_where_the_device_computes_in_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    assert not computes_in_bfloat16(torch.device("cpu"))
    assert not computes_in_bfloat16(torch.device("meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert computes_in_bfloat16(torch.device("cpu"))
