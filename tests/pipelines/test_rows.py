"""Each state's row meets the row of its own sample."""

from __future__ import annotations

import pytest
import torch

from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.networks import Network
from free.pipelines.rows import Layout, Rows, Timestep

SAMPLE = torch.tensor([0, 0, 1, 2, 2])
"""Five states of three samples."""
STATES = 10.0 * torch.arange(5)[:, None] + torch.arange(4)
"""[5, 4]."""
OF_SAMPLES = torch.tensor([[100.0], [200.0], [300.0]]).expand(3, 4)


def layout(number: int = 1, sample: torch.Tensor = SAMPLE) -> Layout:
    timestep = torch.arange(900, 900 - 100 * len(sample), -100)
    return Layout(number, sample, sample, 3, timestep, timestep[0], lambda: None)


def rows(place: Layout | None = None) -> Rows:
    return Rows.of(STATES.clone(), place or layout())


def test_rows_meet_those_of_their_samples() -> None:
    expected = STATES + OF_SAMPLES[SAMPLE]
    for result in (rows() + OF_SAMPLES, OF_SAMPLES + rows(), torch.add(rows(), OF_SAMPLES)):
        assert isinstance(result, Rows)
        assert torch.equal(torch.Tensor(result), expected)
    joined = torch.cat([rows(), OF_SAMPLES], dim=1)
    assert torch.equal(torch.Tensor(joined), torch.cat([STATES, OF_SAMPLES[SAMPLE]], 1))


def test_halves_of_guidance_keep_their_rows() -> None:
    doubled = torch.cat([rows()] * 2)
    assert doubled.groups == 2
    added = doubled + torch.cat([OF_SAMPLES, -OF_SAMPLES])
    first, second = added.chunk(2)
    assert isinstance(first, Rows)
    assert torch.equal(torch.Tensor(first), STATES + OF_SAMPLES[SAMPLE])
    assert torch.equal(torch.Tensor(second), STATES - OF_SAMPLES[SAMPLE])


def test_frames_that_become_rows_are_their_samples() -> None:
    frames = Rows.of(torch.zeros(5, 2, 4), layout()).reshape(10, 4)
    assert (frames.groups, frames.inner_rows) == (1, 2)
    of_frames = torch.arange(6.0)[:, None].expand(6, 4)
    met = torch.Tensor(frames + of_frames)[:, 0]
    assert met.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 4, 5]


def test_what_has_no_row_a_state_is_plain() -> None:
    made = rows()
    square = Rows.of(torch.zeros(5, 5), layout())
    for values in (made.sum(), made[0], made.unbind()[1], made.T, square.T, square.transpose(0, 1)):
        assert type(values) is torch.Tensor
    assert isinstance(made[:, :2], Rows)
    assert isinstance(made[:, 0], Rows)
    assert isinstance(made.unsqueeze(1).permute(0, 2, 1), Rows)


def test_rows_of_an_earlier_round_follow_their_samples() -> None:
    told = []
    later = layout(2, torch.tensor([2, 0, 0]))
    later.taken_over = lambda: told.append(0)
    of_sample = Rows.of(OF_SAMPLES[SAMPLE], layout(1))
    met = Rows.of(torch.zeros(3, 4), later) + of_sample
    assert torch.Tensor(met)[:, 0].tolist() == [300, 100, 100]
    assert told
    with pytest.raises(UnsupportedPipelineError, match="carries what it computed"):
        _ = Rows.of(torch.zeros(3, 4), later) + rows(layout(1))


def test_a_timestep_stands_for_those_of_all_states() -> None:
    place = layout()
    timestep = Timestep.of(place.shown, place.timestep, place)
    expanded = (1 - timestep.to(torch.float32) / 1000).expand(10)
    assert isinstance(expanded, Rows)
    torch.testing.assert_close(torch.Tensor(expanded[:5]), 1 - place.timestep / 1000)
    assert torch.equal(torch.Tensor(timestep[None].expand(5)), place.timestep)
    assert torch.equal(torch.Tensor(rows() * timestep), STATES * place.timestep[:, None])
    assert bool(timestep > 100)
    with pytest.raises(UnsupportedPipelineError, match="decides by the timestep"):
        bool(timestep > 700)


class Echo(torch.nn.Module):
    """Returns what it was told."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, extra: object = None) -> object:
        assert type(hidden_states) is torch.Tensor
        assert type(timestep) is torch.Tensor
        return hidden_states, timestep, extra


@pytest.mark.parametrize("made", ["t", "share", "rest", "token"])
def test_a_network_is_told_each_row_its_own_where_a_number_arrives(made: str) -> None:
    place, module = layout(), Echo()
    own = {"t": place.timestep, "share": place.timestep / 1000, "rest": 1 - place.timestep / 1000, "token": place.timestep}[
        made
    ]
    shown = own[0].item() if made != "t" else int(own[0])
    given = torch.tensor([shown] * 5)
    if made == "token":  # the first one is given, and told so
        given = torch.tensor([[0.0, shown, shown]]).expand(5, -1)
    with Network("net", module, 1000).wrapped(lambda: None):
        _, told, extra = module(rows(place), timestep=given, extra=[OF_SAMPLES, torch.zeros(2)])
        with pytest.raises(UnsupportedPipelineError, match="net is given timestep 123"):
            module(rows(place), timestep=torch.tensor([123.0] * 5))
        with pytest.raises(UnsupportedPipelineError, match="net is called with 4 rows"):
            module(torch.zeros(4, 4), timestep=rows(place)[:, 0])
    assert "_compiled_call_impl" not in module.__dict__
    expected = own if made != "token" else torch.stack([torch.zeros(5), own, own], 1)
    torch.testing.assert_close(torch.Tensor(told), expected, check_dtype=False)
    assert torch.equal(torch.Tensor(extra[0]), OF_SAMPLES[SAMPLE])
    assert torch.equal(extra[1], torch.zeros(2))


# --- what a pipeline makes of the timestep ------------------------------------------------------------------------------


def timestep() -> Timestep:
    place = layout()
    return Timestep.of(place.shown.clone(), place.timestep, place)


def test_a_number_made_of_the_timestep_is_made_of_each_states_own() -> None:
    t, each, table = timestep(), layout().timestep, torch.linspace(0, 1, 1000)
    for made, expected in (
        (table[t], table[each]),
        (table[t][None], table[each]),
        (table.index_select(0, t.reshape(1)), table[each]),
        ((1 - t / 1000) ** 2, (1 - each / 1000) ** 2),
        (2.0 ** (t / 1000), 2.0 ** (each / 1000)),
        (t.view(1, 1, 1).float().sqrt(), each.float().sqrt()),
        (t.reshape(1).float().mean(), each.float()),
        (torch.cat((t.view(1), torch.tensor([5]))).max(), each),
        ((t[None] * torch.tensor([1.0, 2.0]))[1], 2.0 * each),
    ):
        assert isinstance(made, Timestep)
        assert made.numel() == 1
        torch.testing.assert_close(made.each, expected)
        met = made.view(1, 1) * rows()
        assert isinstance(met, Rows)
        torch.testing.assert_close(torch.Tensor(met), expected[:, None] * STATES)


def test_several_numbers_made_of_the_timestep_are_each_states_own() -> None:
    t, each, frequencies = timestep(), layout().timestep, torch.tensor([1.0, 0.1, 0.01, 0.0])
    table = torch.randn(1000, 4)
    for made, expected in (
        (torch.cos(t * frequencies), torch.cos(each[:, None] * frequencies)),
        (table[t], table[each]),
        ((t * frequencies)[None], each[:, None] * frequencies),
    ):
        torch.testing.assert_close(torch.Tensor(rows() + made), STATES + expected)
    with pytest.raises(UnsupportedPipelineError, match="rows of the timestep"):
        rows() * (t * torch.ones(5, 1))
    with pytest.raises(UnsupportedPipelineError, match="rows of the timestep"):
        rows() * t.expand(3).view(3, 1)


def test_what_decides_by_the_timestep_has_one_answer() -> None:
    t, table = timestep(), torch.linspace(0, 1, 1000)
    low, high = torch.tensor([0, 1]), torch.tensor([500, 700])
    for decide in (
        lambda: t > 600, lambda: t[None] > 600, lambda: t.view(1, 1) > 600, lambda: bool(table[t] > 0.6), lambda: t > high,
        lambda: torch.isin(t, high).any().item(), lambda: bool(torch.where(table[t] > 0.6, 1.0, 0.0)),
    ):  # fmt: skip
        with pytest.raises(UnsupportedPipelineError, match="decides by the timestep"):
            decide()
    assert t > 100
    assert t[None] <= 900
    assert (t > low).all()
    assert bool(t)


def test_what_is_made_of_the_timestep_is_no_conditioning() -> None:
    class Guided(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
            return hidden_states

    network, t = Network("transformer", Guided(), 1000), timestep()
    call = {"hidden_states": rows(), "timestep": t}
    network(Guided(), (), {**call, "guidance": torch.tensor(3.5)})
    with pytest.raises(UnsupportedPipelineError, match="made of the timestep as 'guidance'"):
        network(Guided(), (), {**call, "guidance": t / 1000})
