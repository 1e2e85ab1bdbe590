"""Serving: a trained run answers requests.

Ranking: `encode_history` once a user, then `score` or `top_k` for any number of candidates, and `append` as events come in.
Retrieval: `RecommendationModel`, a history in, the best unseen items of the catalogue out.
"""

from ultra_hstu.serving.cache import Cache
from ultra_hstu.serving.capacity import Room
from ultra_hstu.serving.encoded_user import EncodedUser, join, split
from ultra_hstu.serving.frozen import FrozenRanker
from ultra_hstu.serving.inputs import Candidates, Events, History, from_source
from ultra_hstu.serving.ranking import Best, append, encode_history, score, top_k
from ultra_hstu.serving.retrieval import Recommendation, RecommendationModel
from ultra_hstu.serving.trained import load_params

__all__ = [
    "Best",
    "Cache",
    "Candidates",
    "EncodedUser",
    "Events",
    "FrozenRanker",
    "History",
    "Recommendation",
    "RecommendationModel",
    "Room",
    "append",
    "encode_history",
    "from_source",
    "join",
    "load_params",
    "score",
    "split",
    "top_k",
]
