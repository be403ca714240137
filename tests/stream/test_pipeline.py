import time

import torch

import loader
from loader.exchange.gloo import GlooTransport
from loader.stream.pipeline import Pipeline
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import write_file

ROUNDS_IN_FLIGHT = 4
OPTIONS = {"memory_budget": "28MiB", "range_size": "128KiB", "timeout": "90s"}  # of which the client takes 24 MiB


def load(uri, options, log):
    """Fill a replicated tensor; note every message that rank 0 sends in the file `log`."""
    rank = torch.distributed.get_rank()
    send = GlooTransport.send

    def noted(self, number, view, to):
        with log.open("a") as file:
            file.write(f"{view.numel()}\n")
        return send(self, number, view, to)

    if rank == 0:
        GlooTransport.send = noted
    state = {"weight": torch.zeros(2048, 1024)}
    report = loader.load(state, uri, storage_options=options[rank], **OPTIONS)
    return report.ranks[0].exchanged_bytes, state["weight"].sum().item()


def size(request):
    first, last = map(int, request.range.removeprefix("bytes=").split("-"))
    return last + 1 - first


def sent(log):
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def load_with_a_range_held(s3, tmp_path, rank, least, until_sent):
    """Two ranks load; the first range of `rank` over `least` bytes is held until rank 0 has sent `until_sent` bytes, or
    60 s. Returns what it had sent when the range was let go, and what it sent in all."""
    directory, log = tmp_path / "checkpoint", tmp_path / "sent"
    directory.mkdir()
    write_file(directory / "model.safetensors", {"weight": torch.ones(2048, 1024)})
    uri, held = s3.put(directory), []

    def hold(request, forward):
        if request.rank == rank and request.range and size(request) > least and not held:
            held.append(request)
            until = time.monotonic() + 60
            while sent(log) < until_sent and time.monotonic() < until:
                time.sleep(0.01)
            held.append(sent(log))
        return forward(request)

    with CountingProxy(s3.endpoint, listeners=2) as proxy:
        proxy.on_request(hold)
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(2)]
        found = run_ranks(2, load, uri, options, log, nodes=2)
    assert [total for _, total in found] == [2048 * 1024] * 2
    return held[1], found[0][0]


def test_what_was_read_is_sent_while_another_rank_is_late_with_an_earlier_round(s3, tmp_path):
    """Rank 1's first read is held until rank 0 has sent more than the half of one round that is its to send."""
    meanwhile, in_all = load_with_a_range_held(s3, tmp_path, rank=1, least=0, until_sent=1 << 20)
    assert 1 << 20 <= meanwhile < in_all


def test_a_range_that_is_late_holds_back_none_that_has_come(s3, tmp_path):
    """Rank 0's first range is held until it has sent four that it asked for after it."""
    meanwhile, in_all = load_with_a_range_held(s3, tmp_path, rank=0, least=64 << 10, until_sent=512 << 10)
    assert 512 << 10 <= meanwhile < in_all


def test_waiting_for_the_last_ranges_costs_nothing(s3, tmp_path, monkeypatch):
    """With all rounds open, and the first of them done, a look at a late read is one in 0.2 s."""
    write_file(tmp_path / "model.safetensors", {"weight": torch.ones(2048, 1024)})
    looks, held = [], []

    def look(self):
        looks.append(len(held))
        return await_news(self)

    def hold(request, forward):
        if request.range and f"-{(tmp_path / 'model.safetensors').stat().st_size - 1}" in request.range:
            held.append(time.sleep(1))
        return forward(request)

    await_news = Pipeline._await_news
    monkeypatch.setattr(Pipeline, "_await_news", look)
    with CountingProxy(s3.endpoint) as proxy:
        proxy.on_request(hold)
        report = loader.load(
            {"weight": torch.zeros(2048, 1024)},
            s3.put(tmp_path),
            storage_options=s3.at(proxy.url).storage_options,
            **OPTIONS,
        )
    assert held
    assert len(looks) < 2 * report.gets + 20
