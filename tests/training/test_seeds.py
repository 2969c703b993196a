import torch

from bdfast.training.seeds import derived_seed, seeded


def test_seeded_leaves_the_global_generator_where_it_was():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7, torch.device("cpu")):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    with seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(1), inside)


def test_derived_seeds_differ_and_stay():
    seeds = {derived_seed(0, "a", 1), derived_seed(0, "a", 2), derived_seed(0, "b", 1), derived_seed(1, "a", 1)}
    assert len(seeds) == 4
    assert derived_seed(0, "unlearn", 1) == derived_seed(0, "unlearn", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
