"""What would be held is counted, of the code that will run, without memory."""

import resource

import torch

from tpvc.compiler.plan.imagined import MAPPED, SLACK, imagined


def test_bytes_that_live_at_once():
    with imagined() as counter:
        a = torch.zeros(MAPPED)  # four bytes each
        b = a + 1
        del a
        c = b[: MAPPED // 2] * 2
        del b, c
    assert counter.host.peak == 8 * MAPPED
    assert (counter.host.large, counter.host.small) == (0, 0)


def test_small_pieces_have_gaps_between_them_and_views_are_free():
    with imagined() as counter:
        a = torch.zeros(1000)
        b = a[::2].view(10, 50).T
        assert b.shape == (50, 10)
    assert counter.host.peak == int((1 + SLACK) * 4000)


def test_what_is_kept_for_the_gradient_is_held():
    with imagined() as counter:
        w = torch.zeros(MAPPED, requires_grad=True)
        loss = (w.exp() * 2).sum()  # exp keeps its result
        before = counter.host.large
        loss.backward()
    assert before == 8 * MAPPED


def test_numbers_are_answered_and_never_made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with imagined():
        x = torch.ones(1 << 36)
        assert float(x.sum()) == 1.0 and bool((x > 3).all()) and not torch.equal(x, x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB: far from 256 GB


def test_a_device_is_counted_by_itself():
    with imagined() as counter:
        x = torch.zeros(MAPPED, device="cuda")
        assert x.cpu().device.type == "cpu"
    assert counter.device.peak == 4 * MAPPED
    assert counter.host.peak == 4 * MAPPED
