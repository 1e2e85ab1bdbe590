"""Serving: a trained run answers requests.

Ranking: `encode_history` once a user, then `score` or `top_k` for any number of candidates, and `append` as events come in.
Retrieval: `RecommendationModel`, a history in, the best unseen items of the catalogue out.
"""

from ultra_hstu.serving.cache import Cache
from ultra_hstu.serving.frozen import FrozenRanker
from ultra_hstu.serving.inputs import Candidates, Events, History, from_source
from ultra_hstu.serving.ranking import Best, append, encode_history, score, top_k
from ultra_hstu.serving.retrieval import Recommendation, RecommendationModel, load_params

__all__ = [
    "Best",
    "Cache",
    "Candidates",
    "Events",
    "FrozenRanker",
    "History",
    "Recommendation",
    "RecommendationModel",
    "append",
    "encode_history",
    "from_source",
    "load_params",
    "score",
    "top_k",
]
