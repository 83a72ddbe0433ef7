"""Parameters of the backbone that deltas own: they come and go without a copy as they do with one."""

import torch
from models import FAMILIES, attach, values

from deltaexp.ownership import originals
from deltaexp.structure import backbone_parameters


def test_values_are_exchanged_without_copying() -> None:
    backbone = FAMILIES["bert"].build()
    before, parameters = values(backbone.state_dict()), backbone_parameters(backbone)
    deltas = []
    for seed in (1, 2):  # of two that own the same, one at a time has its values in the backbone
        delta_model = attach(
            backbone, "lora", seed=seed, unfrozen_modules=["deltas", "classifier"], modified_modules=["attn.q"]
        )
        delta_model._ownership.exchange(parameters)
        assert not originals(backbone)
        deltas.append(delta_model)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    for delta_model in deltas:
        trained = dict(delta_model._ownership.trained)
        for _ in range(2):
            delta_model._ownership.exchange(parameters)
            assert originals(backbone).keys() == trained.keys()
            assert all(parameters[name].data_ptr() == value.data_ptr() for name, value in trained.items())
            assert all(torch.equal(delta_model.delta_tensors()[name], value) for name, value in trained.items())
            delta_model._ownership.exchange(parameters)
            assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    for delta_model in reversed(deltas):
        delta_model.detach()  # which finds that the values are out already
        assert {"classifier.weight", "classifier.bias"} <= delta_model.delta_tensors().keys()
    deltas[1].attach()
    assert torch.equal(parameters["classifier.weight"], trained["classifier.weight"])
    deltas[1].detach()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
