"""Serving: a trained run answers requests.

`retrieval`: a history in, the best unseen items of the catalogue out.
"""

from ultra_hstu.serving.retrieval import Recommendation, RecommendationModel, load_params

__all__ = ["Recommendation", "RecommendationModel", "load_params"]
