"""Serving: a trained run answers requests.

Ranking: `encode_history` once a user, then `score` or `top_k` for any number of candidates, and
`append` as events come in. Retrieval: `RecommendationModel`, a history in, the best unseen items of
the catalogue out.
"""

from ultra_hstu.checkpoint import load_params
from ultra_hstu.serving.compiled import CompiledRanker
from ultra_hstu.serving.inputs import Bucket, Candidates, UserEvents, UserHistory
from ultra_hstu.serving.kv_cache import Cache, join, split
from ultra_hstu.serving.recommend import RecommendationModel
from ultra_hstu.serving.schema import Recommendation
from ultra_hstu.serving.score import Best, append, encode_history, score, top_k
from ultra_hstu.serving.tokens import from_source

# The short names of callers, and older ones.
Events, History, Room, FrozenRanker = UserEvents, UserHistory, Bucket, CompiledRanker

__all__ = [
    "Best",
    "Bucket",
    "Cache",
    "Candidates",
    "CompiledRanker",
    "Events",
    "FrozenRanker",
    "History",
    "Recommendation",
    "RecommendationModel",
    "Room",
    "UserEvents",
    "UserHistory",
    "append",
    "encode_history",
    "from_source",
    "join",
    "load_params",
    "score",
    "split",
    "top_k",
]
