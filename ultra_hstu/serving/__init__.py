"""Trained runs at work: recommendations over the catalogue."""

from ultra_hstu.serving.retrieval import Recommendation, RecommendationModel, load_params

__all__ = ["Recommendation", "RecommendationModel", "load_params"]
