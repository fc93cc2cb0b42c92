import pytest
import torch

from millrace.data.batch import TokenBatch
from millrace.data.errors import DataError
from millrace.megatron.context import ContextShare
from millrace.megatron.microbatch import MicroBatch, cut_batch, make_micro_batch

CPU = torch.device("cpu")


def batch_of(*lengths: int) -> TokenBatch:
    total = sum(lengths)
    streams = {"weight": torch.arange(1.0, total + 1)}
    return TokenBatch(torch.arange(100, 100 + total), torch.tensor(lengths), streams)


def cut(batch: TokenBatch, dp: int, capacity: int, multiple: int = 1) -> list[list[MicroBatch]]:
    return [
        cut_batch(batch, dp=dp, dp_rank=rank, capacity=capacity, multiple=multiple, device=CPU) for rank in range(dp)
    ]


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("capacity", [20, 33, 100])
def test_every_token_stands_in_exactly_one_micro_batch(dp: int, capacity: int) -> None:
    batch = batch_of(5, 20, 1, 7, 7, 13)
    parts = [part for rank in cut(batch, dp, capacity) for part in rank]
    positions = torch.cat([part.positions for part in parts])
    assert sorted(positions.tolist()) == list(range(53))
    for part in parts:
        assert part.real <= capacity
        if part.real:
            assert torch.equal(part.tokens, batch.tokens[part.positions])
            assert torch.equal(part.input_ids[part.model_rows], part.tokens)
            assert torch.equal(part.streams["weight"], batch.streams["weight"][part.positions])


def test_ranks_get_equal_numbers_of_micro_batches_and_empty_ones_weigh_nothing() -> None:
    first, second = cut(batch_of(9), dp=2, capacity=10, multiple=4)
    assert len(first) == len(second) == 1
    assert (first[0].real, first[0].input_ids.numel(), first[0].padded_lengths) == (9, 12, (9, 3))
    empty = second[0]
    assert (empty.real, empty.lengths, empty.padded_lengths, empty.shown) == (0, (), (4,), 1)
    assert empty.streams["weight"].tolist() == [0.0]
    assert empty.predicting_rows.numel() == 0


def test_padding_repeats_the_sequences_from_the_first_on() -> None:
    part = make_micro_batch(batch_of(3, 2), [0, 1], 16, CPU)
    assert part.padded_lengths == (3, 2, 3, 2, 3, 2, 1)
    assert part.input_ids.tolist() == [*range(100, 105)] * 3 + [100]
    assert part.real == 5 and part.model_rows.tolist() == [0, 1, 2, 3, 4]
    for rank in range(2):  # each has two of a sequence's four chunks, of a copy the same
        shared = make_micro_batch(batch_of(3), [0], 4, CPU, context=ContextShare(2, rank))
        assert shared.padded_lengths == (4, 4)
        assert shared.input_ids[:2].tolist() == shared.input_ids[2:].tolist()


def test_rows_predict_the_next_token_of_their_own_sequence_only() -> None:
    part = make_micro_batch(batch_of(3, 1, 2), [0, 1, 2], 4, CPU)
    assert part.predicting_rows.tolist() == [0, 1, 4]
    assert part.segment_ids.tolist() == [0, 0, 0, 1, 2, 2]
    packed = part.packed_seq_params()
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6, 8]
    assert packed.max_seqlen_q == 3


def test_a_sequence_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(DataError, match="max_tokens_per_micro_batch"):
        cut(batch_of(5, 11), dp=1, capacity=10)


def test_a_cut_that_leaves_sequences_out_keeps_the_others_where_they_were() -> None:
    batch = batch_of(3, 9, 4, 8, 2, 5)
    keep = torch.tensor([True, False, True, False, False, True])
    for rank in range(2):
        options = {"dp": 2, "dp_rank": rank, "capacity": 10, "multiple": 1, "device": CPU}
        whole, part = cut_batch(batch, **options), cut_batch(batch, **options, keep=keep)
        assert [m.index for m in part] == [m.index for m in whole] == list(range(len(whole)))
        kept = set(batch.positions(keep.nonzero()[:, 0].tolist()).tolist())
        assert [m.positions.tolist() for m in part] == [[p for p in m.positions.tolist() if p in kept] for m in whole]


def test_taught_rows_are_the_trained_rows_of_one_teacher() -> None:
    batch = batch_of(4, 3, 3).with_streams(
        weight=torch.tensor([0.0, 0, 1, 1, 0, 1, 1, 0, 1, 1]), taught=torch.tensor([2.0] * 4 + [1] * 3 + [0] * 3)
    )
    part = make_micro_batch(batch, [0, 1, 2], 4, CPU)
    assert [part.taught_rows(teacher).tolist() for teacher in (0, 1, 2, 3)] == [[7, 8], [4, 5], [1, 2], []]


@pytest.mark.parametrize(("ranks", "multiple"), [(2, 1), (2, 2), (3, 2), (4, 1)])
def test_context_parallel_ranks_share_each_sequence_by_two_chunks_that_cost_the_same(ranks: int, multiple: int) -> None:
    batch = batch_of(5, 1, 24)
    shares = [
        make_micro_batch(batch, [0, 1, 2], multiple, CPU, context=ContextShare(ranks, rank)) for rank in range(ranks)
    ]
    holders = torch.stack([part.model_rows >= 0 for part in shares])
    assert torch.equal(holders.sum(0), torch.ones(30, dtype=torch.int64)), "each token is computed once"
    first = shares[0]
    total = sum(first.padded_lengths)
    assert all(length % (2 * ranks) == 0 for length in first.padded_lengths)
    edges = first.packed_seq_params().cu_seqlens_q_padded.tolist()
    assert edges == [0, *torch.tensor(first.padded_lengths).cumsum(0).tolist()]
    for rank, part in enumerate(shares):
        assert part.input_ids.numel() * ranks == total and part.input_ids.numel() % multiple == 0
        assert torch.equal(part.tokens, batch.tokens) and torch.equal(part.segment_ids, batch.segment_ids)
        rows, places = part.computed_here(torch.arange(30))
        assert torch.equal(part.input_ids[places], batch.tokens[rows])
        # Transformer Engine's cut: of 2 CP chunks of a sequence rank r computes chunk r and the r-th from the end.
        chunk = first.padded_lengths[2] // (2 * ranks)
        mine = {*range(rank * chunk, (rank + 1) * chunk)}
        mine |= {first.padded_lengths[2] - 1 - at for at in mine}
        assert {int(row) - 6 for row in rows if row >= 6} == {at for at in mine if at < 24}


def test_a_context_parallel_micro_batch_without_sequences_keeps_every_rank_busy_with_padding() -> None:
    for rank in range(2):
        part = make_micro_batch(batch_of(3), [], 2, CPU, context=ContextShare(2, rank))
        assert (part.real, part.shown, part.input_ids.numel(), part.predicting_rows.numel()) == (0, 1, 2, 0)
