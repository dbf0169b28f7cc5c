import torch
from torch import nn

from megatron.optimizer.param_groups import parameter_groups
from tests.unit.model.small_model import small_gpt_config, small_model


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(4)
        self.dense = nn.Linear(4, 4)
        self.rms = RMSNorm(4)
        self.gate = nn.Parameter(torch.ones(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.block = Block()
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def names_by_group(model: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1)}


def test_matrices_decay_and_biases_norms_and_vectors_do_not():
    assert names_by_group(Model()) == {
        "decay": ["embedding.weight", "block.dense.weight"],
        "no_decay": [
            "block.gate",
            "block.layer_norm.weight",
            "block.layer_norm.bias",
            "block.dense.bias",
            "block.rms.weight",
        ],
    }


def test_the_norms_of_queries_and_keys_do_not_decay():
    names = names_by_group(small_model(small_gpt_config(qk_layernorm=True)))
    norms = {f"layers.{n}.self_attention.{kind}_layernorm.{what}" for n in (0, 1) for kind in "qk" for what in
             ("weight", "bias")}  # fmt: skip
    assert norms <= set(names["no_decay"])


def test_a_tied_parameter_appears_once():
    model = Model()
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))


def test_groups_carry_their_weight_decay():
    assert {group["name"]: group["weight_decay"] for group in parameter_groups(Model(), 0.1)} == {
        "decay": 0.1,
        "no_decay": 0.0,
    }


def test_partitioned_parameters_are_judged_by_their_whole_shape():
    whole, partitioned = Model(), Model()
    for parameter in partitioned.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names_by_group(partitioned) == names_by_group(whole)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.embedding.requires_grad_(False)
    assert names_by_group(model)["decay"] == ["block.dense.weight"]


def test_an_empty_group_is_left_out():
    assert [group["name"] for group in parameter_groups(nn.Linear(4, 4, bias=False), 0.1)] == ["decay"]
