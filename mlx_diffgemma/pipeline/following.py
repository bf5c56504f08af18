"""What a machine does that shares a model and is not the first: the passes that the first one announces."""

import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..generation import vocabulary
from ..model.network import Network
from ..model.sharing.group import Meeting, Member
from ..model.sharing.ranks import REST, Counterparts, Follower, Told, join
from .loading import load
from .model import DiffusionGemma


def follow(model: DiffusionGemma) -> None:
    """Until the first machine says that it is over. Errors: PeerError when one was lost; CheckpointError."""
    network = model.network
    share = network.tuning.share
    assert isinstance(share, Follower)
    prefixes = Counterparts(network.config)
    while (told := share.hear()).what != "end":
        prefixes.follow(told.log)
        if told.what == "rest":
            time.sleep(REST)
        elif told.what == "link":
            share.rehearse(told.plain["nbytes"], told.plain["times"])
        else:
            _pass(network, prefixes, told)


def _pass(network: Network, prefixes: Counterparts, told: Told) -> None:
    plain, arrays = told.plain, told.arrays
    match told.what:
        case "encode":
            blocks = [[(start, stop) for start, stop in row] for row in plain["blocks"]]
            network.encode(arrays["inputs"], prefixes[told.cache], blocks, plain["picture_mask"])
            mx.clear_cache()  # a chunk's buffers never fit the next, longer one
        case "denoise":
            network.denoise(arrays["canvas"], prefixes[told.cache], arrays.get("signal"))
        case _:
            shaping = vocabulary.Shaping(
                cap=plain["cap"],
                temperature=plain["temperature"],
                forbidden=tuple(plain["forbidden"]),
                positions=arrays.get("positions"),
            )
            table, tuning = network.decoder.embed_tokens, network.tuning
            vocabulary.take_part(arrays["x"], table, shaping, plain["with_signal"], tuning)


def load_in_pieces(path_or_repo: str | Path, count: int, **options: Any) -> DiffusionGemma:
    """A model that this machine computes in the pieces of 2 or 4 machines: with the same bits as they, where kernels
    add pieces in another order than wholes. A thread stands for each machine. Options and errors: as `load` has them.
    """
    first, *others = Meeting(count).members()
    for member in others:
        threading.Thread(target=_follow_in_thread, args=(member, path_or_repo, options), daemon=True).start()
    try:
        return load(path_or_repo, share=join(first), **options)
    except BaseException:
        first.meeting.leave()
        raise


def _follow_in_thread(member: Member, path_or_repo: str | Path, options: dict[str, Any]) -> None:
    try:
        follow(load(path_or_repo, share=join(member), **options))
    except BaseException:  # the first one says what has happened
        member.meeting.leave()
