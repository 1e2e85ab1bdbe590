"""From interactions to the loaders of a ranking run: columns of events, channels, parts of the split."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from ultra_hstu.config import ChannelConfig, Config
from ultra_hstu.data import signals
from ultra_hstu.data.feed import WHOLE, Loader, Planner
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.sampled import History, SampledPlanner, Sampling
from ultra_hstu.parallel.mesh import DATA
from ultra_hstu.ranking import split as requests
from ultra_hstu.ranking.batch import RankEvents, RankGather
from ultra_hstu.ranking.form import Sizes, channels, form, num_rows
from ultra_hstu.ranking.split import Parts, Requests
from ultra_hstu.retrieval import batch as batching


@dataclasses.dataclass(frozen=True, eq=False)
class RankTable:
    """Requests as a table for a `Loader`."""

    columns: dict[str, np.ndarray]
    lengths: Int64[np.ndarray, "n channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class RankSource:
    """The events of a ranking run, and the requests about them."""

    events: RankEvents
    sizes: Sizes
    parts: Parts
    kept: dict[
        str, np.ndarray
    ]  # of a channel that leaves events out: int64 [E + 1], how many of the first e events it keeps

    @staticmethod
    def of(config: Config, interactions: Interactions) -> "RankSource":
        """Raises ValueError for tasks, signals, features or channels that the source lacks, and for labels outside {0, 1}."""
        rank = config.rank
        features = [signals.feature(interactions, name) for name in rank.features]
        contexts = [signals.context(interactions, name) for name in rank.contextual]
        tasks = [signals.task(interactions, name) for name in rank.tasks]
        times = batching.Events.from_arrays(interactions.items, interactions.timestamps).time_E
        index, kept = {}, {}
        for name, channel in channels(config).items():
            if channel.signal:
                if channel.signal not in interactions.actions:
                    known = ", ".join(sorted(interactions.actions)) or "none"
                    raise ValueError(
                        f"model.channels.{name}.signal={channel.signal!r} is no action of this source, which has {known}"
                    )
                keep_E = interactions.actions[channel.signal] >= channel.at_least
                index[name] = np.flatnonzero(keep_E).astype(np.int32)
                kept[name] = np.concatenate([[0], np.cumsum(keep_E)])
        first_code = np.cumsum([0, *(context.size - 1 for context in contexts)])
        events = RankEvents(
            item_E=interactions.items.astype(np.int32),
            time_E=times,
            signal_ES=signals.signals(interactions.actions, rank.signals, interactions.num_events),
            feature_EF=_stack(
                [codes.code for codes in features], interactions.num_events, np.int32
            ),
            label_EK=_stack([task.label_E for task in tasks], interactions.num_events, np.float32),
            weight_EK=_stack(
                [task.weight_E for task in tasks], interactions.num_events, np.float32
            ),
            context_UC=_stack(
                [
                    np.where(codes.code > 0, codes.code + before, 0)
                    for codes, before in zip(contexts, first_code[:-1], strict=True)
                ],
                interactions.num_users,
                np.int32,
            ),
            index=index,
        )
        sizes = Sizes(
            items=interactions.num_items,
            signals=signals.sizes(rank.signals),
            features=tuple(codes.size for codes in features),
            contextual=tuple(codes.size for codes in contexts),
            kinds=tuple(task.kind for task in tasks),
            timestamps=interactions.timestamps is not None,
        )
        return RankSource(
            events,
            sizes,
            requests.chronological(interactions, rank.validation_fraction, rank.test_fraction),
            kept,
        )

    def loader(
        self,
        config: Config,
        part: str,
        *,
        batch_users: int,
        steps_per_call: int,
        gamma: float = 1.0,
        mesh: Mesh | None = None,
    ) -> Loader:
        """Batches of "train", of which every epoch has its own, "validation" or "test". `gamma` is the cost exponent of load balance."""
        training = part == "train"
        planner = self._planner(config, gamma) if training else WHOLE
        table = (
            (
                lambda seed, epoch: self.table(
                    requests.training(self.parts, config, seed, epoch), config
                )
            )
            if training
            else self.table(requests.evaluation(self.parts, part, config), config)
        )
        lengths = planner.taken(table(0, 0) if callable(table) else table, 0, 0).lengths
        if len(lengths) == 0:
            raise ValueError(
                f"no user has {part} events: raise rank.{part}_fraction"
                if not training
                else "no user has training events"
            )
        longest = [self.longest(config, channel) for channel in channels(config).values()]
        given, layout = config.data.batch_tokens if training else None, form(config)
        shards = 1 if mesh is None else mesh.shape[DATA]
        groups = config.parallel.batch_groups if training else shards
        chosen = [
            groups * batching.choose_rows(lengths[:, i], batch_users // groups, most)
            for i, most in enumerate(longest)
        ]
        gather = RankGather(
            rows=tuple((given or rows) // shards for rows in chosen),
            channels=tuple(channels(config)),
            targets=config.rank.targets,
            contextual=layout.contextual,
            interleaved=layout.interleaved,
            backwards=layout.backwards,
            supervise_history=training and config.rank.supervise == "all",
        )
        return Loader(
            self.events,
            table,
            gather,
            batch_users=batch_users,
            steps_per_call=steps_per_call,
            placement=config.data.placement,
            planner=planner,
            mesh=mesh,
            groups=groups,
        )

    def _planner(self, config: Config, gamma: float) -> Planner:
        sampling = Sampling.of(config.data, gamma)
        if sampling is None:
            return WHOLE
        histories = tuple(
            History(
                channel.max_history,
                f"/{name}",
                num_rows(config, 1, 0) - num_rows(config, 0, 0),
                self.events.index.get(name),
            )
            for name, channel in channels(config).items()
        )
        return SampledPlanner(
            sampling, histories, self.events.time_E if self.sizes.timestamps else None
        )

    def longest(self, config: Config, channel: ChannelConfig) -> int:
        """No request of any part or epoch has more rows."""
        events = int((self.parts.last - self.parts.first).max()) if len(self.parts.first) else 0
        return num_rows(config, min(channel.max_history, events), config.rank.targets)

    def table(self, of: Requests, config: Config) -> RankTable:
        """Requests with the history of every channel: of a mixture, the newest `max_history` of all earlier events that it keeps."""
        columns: dict[str, np.ndarray] = {"user": of.user, "target": of.stop, "count": of.count}
        lengths = []
        for name, channel in channels(config).items():
            start, stop = self.parts.first[of.user] if config.model.channels else of.start, of.stop
            if name in self.kept:
                start, stop = self.kept[name][start], self.kept[name][stop]
            start = np.maximum(start, stop - channel.max_history)
            columns |= {f"start/{name}": start, f"stop/{name}": stop}
            lengths.append(num_rows(config, stop - start, of.count))
        return RankTable(columns, np.stack(lengths, axis=1))


def _stack(columns: list[np.ndarray], length: int, dtype: Any) -> np.ndarray:
    return np.stack(columns, axis=1).astype(dtype) if columns else np.zeros((length, 0), dtype)
