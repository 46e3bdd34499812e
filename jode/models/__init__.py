"""What the examples share: small image classifiers around a residual net or an ODE."""

from jode.models.image import MODELS, Classifier, classifier, deep, features

__all__ = ["MODELS", "Classifier", "classifier", "deep", "features"]
