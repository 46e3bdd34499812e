"""What the examples share: small image classifiers around a residual net or an ODE."""

from jode.models.image import MODELS, Classifier, Residual, VectorField, layers, vector_field

__all__ = ["MODELS", "Classifier", "Residual", "VectorField", "layers", "vector_field"]
