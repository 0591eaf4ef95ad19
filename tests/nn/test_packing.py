import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from idl.nn.packing import pack

U = torch.arange(24.0).reshape(4, 3, 2) + 1
LENGTHS = [2, 3, 1, 3]


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_and_sizes_are_those_of_torch(batch_first):
    u = U if batch_first else U.transpose(0, 1)
    rows, packing = pack(u, LENGTHS, 2, batch_first)
    packed = pack_padded_sequence(u, LENGTHS, batch_first=batch_first, enforce_sorted=False)
    assert packing.sizes == tuple(packed.batch_sizes.tolist())
    assert torch.equal(packing.order, packed.sorted_indices)
    assert torch.equal(rows, packed.data)
    padded, _ = pad_packed_sequence(packed, batch_first=batch_first)
    assert torch.equal(packing.padded(rows), padded)


@pytest.mark.parametrize("lengths", [None, LENGTHS, torch.tensor(LENGTHS), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_rows_gives_the_sequences_back(batch_first, lengths):
    u = U if batch_first else U.transpose(0, 1)
    rows, packing = pack(u, lengths, 2, batch_first)
    kept = torch.arange(3) < torch.tensor([3] * 4 if lengths is None else list(lengths))[:, None]
    expected = U.where(kept[..., None], 0)
    assert torch.equal(packing.padded(rows), expected if batch_first else expected.transpose(0, 1))
    assert torch.equal(packing.padded(rows[:, 0] > 0), kept if batch_first else kept.T)


def test_sorting_and_unsorting_are_inverse():
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    for u, lengths in ((U, LENGTHS), (U, None), (pack_sequence([U[0, :1], U[1]], enforce_sorted=False), None)):
        _, packing = pack(u, lengths, 2, True)
        some = values[:, : packing.batch]
        assert torch.equal(packing.unsorted(packing.sorted(some)), some)
    _, single = pack(U[0], None, 2, True)
    assert torch.equal(single.unsorted(single.sorted(values[:, 0])), values[:, 0])


def test_what_was_packed_comes_back_packed():
    packed = pack_sequence([U[0, :1], U[1]], enforce_sorted=False)
    rows, packing = pack(packed, None, 2, True)
    back = packing.like_the_input(rows * 2)
    assert torch.equal(back.data, packed.data * 2)
    assert torch.equal(back.sorted_indices, packed.sorted_indices)
    assert packing.padded(rows).shape == (2, 3, 2)


def test_padding_passes_gradients_and_nothing_of_what_is_left_out():
    u = U.clone().requires_grad_()
    rows, packing = pack(u, LENGTHS, 2, True)
    packing.padded(rows).sum().backward()
    assert torch.equal(u.grad[:, :, 0], (torch.arange(3) < torch.tensor(LENGTHS)[:, None]).float())
